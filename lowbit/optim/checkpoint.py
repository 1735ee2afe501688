"""State dicts: checked before anything changes, dtypes kept, formats converted.

`torch.optim.Optimizer.load_state_dict` casts every floating state to the parameter's dtype, which ruins codes and
scales. So a pre-hook, which runs last, checks the incoming states, converts them to what this optimizer stores, and
wraps every value in an object that torch's cast does not look into; `Rule.__setstate__` unwraps them. User hooks see
plain tensors on both sides.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import backends, layout, masters, rows
from ..formats import Format, catalogue
from ..policy import PRESETS_VERSION
from ..roles import clean_name
from ..shards import local, whole
from .hyper import TORCHS_KEYS, check, check_finite, strange
from .slot import Slot, state_key

if TYPE_CHECKING:
    from .base import Rule

# How states are stored belongs to the optimizer that is running, not to the file.
OWN_KEYS = ("states", "master", "rounding")
# The key of a saved group that says whose it is; and hyper-parameters by which torch's optimizers are known.
OPTIMIZER = "optimizer"
TORCHS = {"amsgrad": "AdamW", "dampening": "SGD"}


class _Keep:
    """A value that torch's load_state_dict must not touch."""

    __slots__ = ("value",)

    def __init__(self, value: Any):
        self.value = value


def unwrap(state: dict[str, Any]) -> None:
    """Take every value out of its wrapper, in place."""
    for values in state["state"].values():
        for name, value in values.items():
            if isinstance(value, _Keep):
                values[name] = value.value


@contextmanager
def checked_and_kept(rule: Rule) -> Iterator[None]:
    """While this lasts, the pre-hook is there, behind the user's."""
    handle = rule.register_load_state_dict_pre_hook(_prepare)
    try:
        yield
    finally:
        handle.remove()


def _prepare(rule: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
    saved_groups = _checked_groups(rule, state_dict)
    _check_whose(rule, saved_groups)
    groups, states = [], {}
    for index, (saved, group) in enumerate(zip(saved_groups, rule.param_groups, strict=True)):
        order = _order(saved, group, index)
        incoming = [saved["params"][i] for i in order]
        if saved.get("decoupled_weight_decay") is False and saved.get("weight_decay"):
            raise ValueError(f"group {index}: the checkpoint's weight decay is coupled (L2), lowbit's is decoupled")
        if saved.get("maximize"):
            raise ValueError(f"group {index}: the checkpoint has maximize=True, which lowbit's optimizers have not")
        known = {k: v for k, v in group.items() if k not in saved and k != "steps"}
        theirs = {k: v for k, v in saved.items() if k not in (*TORCHS_KEYS, OPTIMIZER)}
        new = {**known, **theirs, **{k: group[k] for k in OWN_KEYS}, "params": incoming}
        if isinstance(group["lr"], Tensor):  # schedulers compute in the tensor's precision, where it is
            there = isinstance(new["lr"], Tensor)
            new["lr"] = new["lr"].to(group["lr"].device) if there else torch.full_like(group["lr"], new["lr"])
        if "param_names" in group:
            new["param_names"] = group["param_names"]
        if "steps" not in new:  # torch counts for each parameter only
            counts = [state_dict["state"].get(number, {}).get("step", 0) for number in incoming]
            new["steps"] = max((int(_count(count, f"group {index}")) for count in counts), default=0)
        new["states_version"] = PRESETS_VERSION
        check(rule, new)
        check_finite(new, group)
        groups.append(new)
        for number, p in zip(incoming, group["params"], strict=True):
            own = rule._slots[p]
            slot = Slot(rule, new, p, own.name, own.label, own.id)  # amsgrad adds a moment, for instance
            saved_state = state_dict["state"].get(number)
            if not saved_state and "states_version" in saved and state_dict["state"] and p.requires_grad:
                raise ValueError(
                    f"{own.label}: the checkpoint has no state for it. If it was frozen when that was saved, load "
                    "while requires_grad is False and set it to True after"
                )
            if saved_state:
                converted = _Conversion(slot, new, saved).run(saved_state)
                states[number] = {name: _Keep(value) for name, value in converted.items()}
    return {**state_dict, "state": states, "param_groups": groups}


def _checked_groups(rule: Any, state_dict: Any) -> list[dict[str, Any]]:
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= set(state_dict):
        keys = list(state_dict)[:5] if isinstance(state_dict, Mapping) else type(state_dict).__name__
        raise ValueError(f"not an optimizer's state dict: it needs 'state' and 'param_groups', and has {keys}")
    groups = state_dict["param_groups"]
    have, want = [len(g["params"]) for g in groups], [len(g["params"]) for g in rule.param_groups]
    if have != want:
        raise ValueError(f"the checkpoint's groups have {have} parameters and this optimizer's {want}")
    strange = set(state_dict["state"]) - {number for g in groups for number in g["params"]}
    if strange:
        raise ValueError(
            f"the checkpoint has states for {sorted(map(repr, strange))[:3]}, which its groups do not name"
        )
    return groups


def _family(cls: type) -> set[str]:
    """The names of a class, of those it derives from and of those derived from it, but for what is `apart`."""
    found, above, below = {cls.__name__}, [cls], [cls]
    for one in above:
        above += one.__bases__ if not vars(one).get("apart") else ()
    for one in below:
        below += [sub for sub in one.__subclasses__() if not vars(sub).get("apart")]
    return found | {one.__name__ for one in (*above, *below)}


def _check_whose(rule: Any, saved_groups: list[dict[str, Any]]) -> None:
    """Raise for what an optimizer of another family saved.

    States of the same names may mean something else: AdamS's momentum has the shape of Lion's, and its learning rate
    would make Lion diverge. But AdamW's states start Stable-SPAM. Groups that do not say whose they are (torch's) are
    known by their hyper-parameters; `_Conversion` looks at the states.
    """
    name, family = type(rule).__name__, _family(type(rule))
    for saved, group in zip(saved_groups, rule.param_groups, strict=True):
        ours = "states_version" in saved
        torchs = next((known for key, known in TORCHS.items() if key in saved and not ours), name)
        whose = saved.get(OPTIMIZER, torchs)
        if whose not in family:
            raise ValueError(
                f"the checkpoint was saved by {whose}, and this is {name}: what they keep differs. Build the optimizer "
                "that saved it, or begin with fresh states"
            )
        foreign = [] if ours or torchs != name else strange(saved, group)
        if foreign:
            raise ValueError(
                f"the checkpoint's groups have {foreign[0]!r}, which {name} has not: another optimizer saved it"
            )


def _order(saved: Mapping[str, Any], group: Mapping[str, Any], index: int) -> list[int]:
    """Positions in the saved group of this group's parameters: by name where both have names."""
    count = len(group["params"])
    if "param_names" not in saved or "param_names" not in group:
        return list(range(count))
    there = {clean_name(name): i for i, name in enumerate(saved["param_names"])}
    missing = [name for name in group["param_names"] if clean_name(name) not in there]
    if missing:
        raise ValueError(f"group {index}: the checkpoint has no state for {missing[0]!r}; it has {list(there)[:3]} …")
    return [there[clean_name(name)] for name in group["param_names"]]


def _count(step: Any, label: str) -> Tensor:
    count = torch.as_tensor(step, dtype=torch.float32)
    if count.numel() != 1 or not math.isfinite(count) or count < 0:
        raise ValueError(f"{label}: the checkpoint's 'step' must be a whole number >= 0, not {step!r}")
    return count.reshape(()).cpu().clone()


def convert_stale(rule: Rule) -> None:
    """After a copy or an unpickling: states in other formats than their group asks for now are converted."""
    for group in rule.param_groups:
        for p in group["params"]:
            state, slot = rule.state.get(p), rule._slots[p]
            if state and any(
                state.get(f"{moment.name}_format")
                != (slot.formats[letter].tag if slot.formats[letter].compressed else None)
                for letter, moment in slot.program.moments.items()
            ):
                rule.state[p] = _Conversion(slot, group, group).run(state)


@cache
def _by_tag() -> dict[int, Format]:
    """Every format a state can be stored in, by the number that checkpoints hold."""
    blocks = [1 << k for k in range(9)]
    stored = [f for f in catalogue().values() if f.compressed and f.plain]
    return {v.tag: v for f in stored for v in (f, *(f.with_block(b) for b in blocks if b != f.block[1]))}


class _Conversion:
    """One parameter's saved state to the state this optimizer keeps; of a sharded one, rank by rank the own rows."""

    def __init__(self, slot: Any, group: Mapping[str, Any], saved_group: Mapping[str, Any]):
        self.slot, self.group, self.saved_group = slot, group, saved_group
        self.device = slot.param.device
        self.read: set[str] = {"master"}  # which of the saved tensors mean something here

    def run(self, saved: Mapping[str, Any]) -> dict[str, Any]:
        return self.slot.spread(self._own(saved))

    def _own(self, saved: Mapping[str, Any]) -> dict[str, Any]:
        state = self.slot.own()
        if "step" not in saved:
            raise ValueError(f"{self.slot.label}: the checkpoint has no 'step'; it has {sorted(map(str, saved))}")
        state["step"] = _count(saved["step"], self.slot.label)
        for letter, moment in self.slot.program.moments.items():
            name = moment.name
            if moment.over == "value":
                state.update(self._moment(letter, name, moment.signed, saved))
            else:
                state[name] = self._own_tensor(saved, name)
            if moment.weight and moment.weight not in saved:
                state[moment.weight].fill_(self._weight(letter, int(state["step"])))
        if self.slot.kept:
            state["mask"] = self._own_tensor(saved, "mask")
        for name in (*self.slot.program.scalars, "skipped"):
            if name in saved:
                state[name] = self._own_tensor(saved, name)
        for name in self.slot.host:
            if name in saved:
                state[name] = self._tensor(saved, name, (), torch.float32).cpu()
        if "master" in state and "master" in saved:
            state["master"] = self._companion(saved, state["master"])
        foreign = [k for k, v in saved.items() if isinstance(v, Tensor) and v.dim() and k not in self.read]
        if foreign:
            raise ValueError(
                f"{self.slot.label}: the checkpoint has {foreign[0]!r}, which this optimizer does not keep: another "
                "one saved it"
            )
        return state

    def _companion(self, saved: Mapping[str, Any], fresh: Tensor) -> Tensor:
        """The low bits of the parameter, which must be loaded already, as this optimizer keeps them."""
        p, theirs, own = local(self.slot.param).detach(), self.saved_group["master"], self.group["master"]
        dtype = masters.companion_dtype(theirs, p.dtype)
        if dtype is None:
            return fresh
        kept = self._tensor(saved, "master", tuple(self.slot.param.shape), dtype, "master" in self.slot.cut)
        if theirs == own:
            return kept
        rounded, converted = masters.store(own, masters.load(theirs, p, kept), p.dtype, None)
        assert converted is not None
        return torch.where(rounded == p, converted, fresh)

    def _moment(self, letter: str, name: str, signed: bool, saved: Mapping[str, Any]) -> dict[str, Any]:
        fmt, own_shape = self.slot.formats[letter], self.slot.shape_of(letter)
        if name not in saved:
            if name.startswith("max_"):
                raise ValueError(f"{self.slot.label}: the checkpoint has no {name!r}; it was made without amsgrad")
            raise ValueError(f"{self.slot.label}: the checkpoint has no {name!r}; it has {sorted(map(str, saved))}")
        tag = saved.get(f"{name}_format")
        stored = self._stored_format(name, tag, saved[name])
        parts, cut = {}, name in self.slot.cut
        for part, (shape, dtype) in rows.part_shapes(stored, own_shape).items():
            parts[part] = self._tensor(saved, state_key(name, part), shape, dtype, cut)
        own_shape = self.slot.here(own_shape, cut)
        if stored != fmt:
            height, cols = layout.rows_of(own_shape)
            values = backends.decode(stored, parts, cols) if height * cols else torch.zeros(height, cols)
            if not stored.compressed:
                values = parts["codes"].float().reshape(height, cols)
            parts = backends.encode(fmt, values, live=not signed)
            if not fmt.compressed:
                parts["codes"] = parts["codes"].reshape(own_shape)
        result: dict[str, Any] = {state_key(name, part): tensor for part, tensor in parts.items()}
        return {**result, f"{name}_format": fmt.tag} if fmt.compressed else result

    def _stored_format(self, name: str, tag: Any, value: Any) -> Format:
        if tag is not None:
            own = {f.tag: f for f in self.slot.formats.values()}
            found = own.get(int(tag)) or _by_tag().get(int(tag))
            if found is None:
                raise ValueError(
                    f"{self.slot.label}: {name!r} is stored in a format this version does not know ({tag})"
                )
            return found
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise ValueError(f"{self.slot.label}: {name!r} is neither a floating-point tensor nor codes with a format")
        return next((f for f in catalogue().values() if f.dtype == value.dtype), catalogue()["fp32"])

    def _own_tensor(self, saved: Mapping[str, Any], name: str) -> Tensor:
        shape, dtype = self.slot.tensors[name]
        return self._tensor(saved, name, shape, dtype, name in self.slot.cut)

    def _tensor(
        self, saved: Mapping[str, Any], name: str, shape: tuple[int, ...], dtype: torch.dtype, cut: bool = False
    ) -> Tensor:
        value = saved.get(name)
        self.read.add(name)
        if not isinstance(value, Tensor):
            raise ValueError(f"{self.slot.label}: the checkpoint's {name!r} is missing; it must have shape {shape}")
        if tuple(value.shape) != shape:
            got = f"has shape {tuple(value.shape)}"
            raise ValueError(f"{self.slot.label}: the checkpoint's {name!r} {got}; it must have shape {shape}")
        if value.dtype != dtype and not (value.is_floating_point() and dtype.is_floating_point):
            raise ValueError(f"{self.slot.label}: the checkpoint's {name!r} is {value.dtype}; it must be {dtype}")
        value = self._here(value.detach(), cut)
        # A guarded step stores nothing that is not finite; released code does.
        if name != "master" and self.slot.program.guarded and value.is_floating_point() and not value.isfinite().all():
            raise ValueError(f"{self.slot.label}: the checkpoint's {name!r} is not finite: it is damaged")
        return value.to(device=self.device, dtype=dtype, copy=True).contiguous()

    def _here(self, value: Tensor, cut: bool) -> Tensor:
        """What this rank needs of a saved tensor, be that whole or sharded."""
        shard = self.slot.shard if cut else None
        if shard is None:
            return whole(value)
        if (getattr(value, "placements", None), getattr(value, "device_mesh", None)) == (shard.placements, shard.mesh):
            return local(value)
        return shard.take(whole(value))

    def _weight(self, letter: str, t: int) -> float:
        """The accumulated weight that t steps of torch's own Adam stand for."""
        betas = self.group.get("betas", (0.0,))
        beta = float(betas[0] if letter == "m" else betas[-1])
        return 1 - beta**t


def save_optimizer(opt: Rule, path: str | Path) -> None:
    """Write an optimizer's state dict as one safetensors file (no pickle): tensors as they are, the rest as metadata.

    The file is written under a temporary name and moved into place, so a crash leaves the old one. Of sharded
    parameters every rank must call this: states are gathered one after the other, and the first rank writes them.
    """
    from safetensors.torch import save_file

    state_dict = opt.state_dict()
    tensors, numbers = {}, {}
    for number, state in state_dict["state"].items():
        for name, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"{number}.{name}"] = whole(value.detach()).cpu().contiguous()
            else:
                numbers[f"{number}.{name}"] = value
    meshes = list({slot.shard.mesh: None for slot in opt._slots.values() if slot.shard is not None})
    groups = [{k: plain(v) for k, v in group.items()} for group in state_dict["param_groups"]]
    target = Path(path)
    draft = target.with_name(target.name + ".part")
    if not meshes or meshes[0].get_rank() == meshes[0].mesh.flatten()[0]:
        save_file(tensors, str(draft), {"lowbit": json.dumps({"groups": groups, "numbers": numbers})})
        draft.replace(target)
    for group in meshes[0].get_all_groups() if meshes else ():
        torch.distributed.barrier(group)  # the file is there when this returns


def load_optimizer(opt: Rule, path: str | Path) -> None:
    """Load what `save_optimizer` wrote; formats are converted as in `load_state_dict`.

    Raises `ValueError` before anything has changed when the file is not one of ours or is damaged.
    """
    from safetensors import SafetensorError, safe_open

    state: dict[int, dict[str, Any]] = {}
    try:
        with safe_open(str(path), framework="pt") as file:
            header = json.loads((file.metadata() or {})["lowbit"])
            for full in file.keys():  # noqa: SIM118 - safe_open is no mapping
                number, _, name = full.partition(".")
                state.setdefault(int(number), {})[name] = file.get_tensor(full)
        for full, value in header["numbers"].items():
            number, _, name = full.partition(".")
            state.setdefault(int(number), {})[name] = value
        groups = [{k: tuple(v) if k == "betas" else v for k, v in group.items()} for group in header["groups"]]
    except (SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a file written by lowbit.save_optimizer, or damaged ({error})") from error
    opt.load_state_dict({"state": state, "param_groups": groups})


def plain(value: Any) -> Any:
    """A group's value as JSON has it."""
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, Format):
        return value.name
    return {k: plain(v) for k, v in value.items()} if isinstance(value, Mapping) else value
