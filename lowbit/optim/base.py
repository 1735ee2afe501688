"""Rule: the base class of every optimizer, and the one place where a step happens.

A subclass declares what its paper says (moments, scalars, stages, constants); this class does the rest, for every
optimizer and every state format alike: parameter groups, states, job table, rounding seeds, checks, checkpoints.

One step, once through: check everything -> constants per group (float64 on the host) -> one job per tensor ->
`backend.step(jobs)`, one call. State values are plain tensors and ints, created eagerly for every parameter that
requires a gradient, so checkpoint engines never need a fake first step.
"""

from __future__ import annotations

import inspect
import math
import warnings
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Literal, TypedDict

import torch
from torch import Tensor

from .. import backends, layout, masters, packed
from ..formats import nearest
from ..policy import PRESETS_VERSION, Decision, Policy, Storage, check_storage, role_of
from ..rounding import key
from ..stages import Job, Moment, Program, Stage
from . import checkpoint
from .explain import Explanation, explain

ROUNDINGS = ("auto", "nearest", "stochastic")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)

Params = Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]]


class Options(TypedDict, total=False):
    """The keyword arguments that every optimizer takes: how things are stored and rounded (see `Rule`)."""

    states: Storage
    seed: int
    master: str
    rounding: str
    state_rounding: str
    stabilize: Iterable[Stabilizer]
    policy: Policy | None
    roles: Mapping[str, str] | None


class Part:
    """What contributes stages to a program: a rule itself, or a stabilizer put in front of one."""

    scalars: ClassVar[dict[str, float]] = {}
    stages: tuple[Stage, ...] = ()

    def constants(self, group: Mapping[str, Any], t: int) -> dict[str, float]:
        """What does not depend on the value: float64, rounded once to fp32. `t` counts this tensor's steps from 1."""
        return {}

    def resets(self, group: Mapping[str, Any]) -> Literal["", "before", "after"]:
        """Whether the moments are set to zero in the step that `group["steps"]` has just counted."""
        return ""


class Stabilizer(Part):
    """A part that any optimizer can put in front of its update: `stabilize=(AdaClip(), …)`.

    `hyper` become keys of the parameter groups, so they can differ per group and are part of the state dict.
    """

    def __init__(self, **hyper: Any):
        self.hyper = hyper

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v}' for k, v in self.hyper.items())})"

    def check(self, group: Mapping[str, Any]) -> None:
        """Raise `ValueError` for a hyper-parameter out of range."""


class Rule(torch.optim.Optimizer, Part):
    """An optimizer whose per-value state can be stored in any format.

    To write your own: declare `moments` (letter -> Moment), `scalars` (name -> initial value) and `stages`, give
    `constants`, and pass the hyper-parameters as `defaults`.

    Args:
        params: parameters, (name, parameter) pairs, or groups, as in `torch.optim`. Names make policies, roles and
            rounding seeds independent of the order.
        defaults: hyper-parameters and their default values; every one can be set per group.
        states: "fp32", "bf16", "8bit", "4bit", a format name, a Format, or a dict from moment names to those. Also per
            group.
        seed: of stochastic rounding.
        master: how the low bits of a bf16/fp16 parameter are kept: "none", "split8", "split16", "kahan", "fp32".
        rounding: how a bf16/fp16 parameter is written: "auto" (stochastic when master is "none", else nearest),
            "nearest" or "stochastic".
        state_rounding: how states are written: "nearest" or "stochastic".
        stabilize: stabilizers to put in front of the update, in order.
        policy: overrides of which tensor's state is stored how.
        roles: {glob on names: role}, such as {"*.table": "embedding"}.

    Raises:
        ValueError: a hyper-parameter out of range, an unknown name, or a parameter given twice.
        TypeError: a parameter that is not float32, bfloat16 or float16.
    """

    moments: ClassVar[dict[str, Moment]] = {}
    guarded: bool = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Show the common options in a subclass's signature in place of its `**options`."""
        super().__init_subclass__(**kwargs)
        if "__init__" in vars(cls):
            own = inspect.signature(cls.__init__)
            named = {n: p for n, p in own.parameters.items() if p.kind is not p.VAR_KEYWORD}
            if len(named) < len(own.parameters):
                common = inspect.signature(Rule.__init__).parameters
                missing = [common[n] for n in Options.__annotations__ if n not in named]
                shown = sorted([*named.values(), *missing], key=lambda p: p.kind)
                cls.__init__.__signature__ = own.replace(parameters=shown)  # type: ignore[attr-defined]

    def __init__(
        self,
        params: Params,
        defaults: dict[str, Any],
        *,
        states: Storage = "8bit",
        seed: int = 0,
        master: str = "none",
        rounding: str = "auto",
        state_rounding: str = "nearest",
        stabilize: Iterable[Stabilizer] = (),
        policy: Policy | None = None,
        roles: Mapping[str, str] | None = None,
    ):
        self.stabilize = tuple(stabilize)
        self.policy = policy or Policy()
        self.roles = dict(roles or {})
        self._programs: dict[Any, Program] = {}
        self._slots: dict[Tensor, _Slot] = {}
        self._warned = False
        for part in self.stabilize:
            if not isinstance(part, Stabilizer):
                raise TypeError(f"stabilize: {part!r} is not a stabilizer, such as lowbit.optim.AdaClip()")
            for name, value in part.hyper.items():
                if name in defaults and defaults[name] != value:
                    raise ValueError(f"stabilize: {name!r} of {part!r} is already a hyper-parameter of this optimizer")
                defaults[name] = value
        storage = {"states": states, "seed": seed, "master": master, "rounding": rounding}
        super().__init__(_as_list(params), {**defaults, **storage, "state_rounding": state_rounding})

    # ---- what a subclass may override

    def plan(self, group: Mapping[str, Any]) -> tuple[Mapping[str, Moment], tuple[Stage, ...]]:
        """The moments and stages of a group (amsgrad adds a moment, for instance)."""
        return self.moments, self.stages

    def check_group(self, group: Mapping[str, Any]) -> None:
        """Raise `ValueError` for a hyper-parameter out of range; called before anything changes."""

    def step_after(self, group: Mapping[str, Any], t: int) -> int:
        """What `state["step"]` becomes after step t of a tensor: t."""
        return t

    # ---- groups and states

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in torch; its states are created at once. Checks everything before it changes anything."""
        group = {**self.defaults, **param_group}
        given = group["params"]
        entries = [given] if isinstance(given, Tensor) else _as_list(given)
        params = [entry[1] if isinstance(entry, tuple) else entry for entry in entries]
        names = [entry[0] if isinstance(entry, tuple) else "" for entry in entries]
        taken = {id(p): label for g in self.param_groups for p, label in self._labelled(g)}
        seen: dict[int, str] = {}
        for index, (p, name) in enumerate(zip(params, names, strict=True)):
            label = name or f"parameter {index} of group {len(self.param_groups)}"
            if not isinstance(p, Tensor):
                raise TypeError(f"{label}: an optimizer takes tensors, not {type(p).__name__}")
            if p.dtype not in FLOATS:
                raise TypeError(f"{label}: parameters must be float32, bfloat16 or float16, not {p.dtype}")
            if hasattr(p, "device_mesh"):
                raise TypeError(f"{label}: sharded parameters (DTensor) are not supported in this version")
            if not p.is_leaf:
                raise ValueError(f"{label}: not a leaf tensor; pass the parameters themselves, not results computed")
            if id(p) in seen or id(p) in taken:
                first = seen.get(id(p)) or taken[id(p)]
                raise ValueError(f"{label}: given twice (first as {first}); give every parameter once")
            seen[id(p)] = label
        self._check(group)
        super().add_param_group({**param_group, "params": entries})
        group = self.param_groups[-1]
        others = self.param_groups[:-1]
        group.setdefault("steps", others[0]["steps"] if others else 0)
        group.setdefault("states_version", PRESETS_VERSION)
        self.init_state()

    def _check(self, group: Mapping[str, Any]) -> None:
        check_common(group)
        self.check_group(group)
        moments, _ = self.plan(group)
        signed = {m.name: m.signed for m in moments.values()}
        check_storage(group["states"], "states", signed)
        for match, storage in self.policy.rules:
            check_storage(storage, f"policy {match!r}", signed)
        if not isinstance(group["seed"], int):
            raise TypeError(f"seed must be an int, not {type(group['seed']).__name__}")
        for part in self.stabilize:
            part.check(group)
            for stage in part.stages:
                missing = [r for r in stage.reads if len(r) == 1 and r not in {"p", "g", "s", "c", "x", *moments}]
                if missing:
                    raise ValueError(f"stabilize: {part!r} reads {missing[0]!r}, which {type(self).__name__} has not")
        if group["master"] not in masters.MASTERS:
            hint = nearest(group["master"], masters.MASTERS)
            raise ValueError(f"unknown master {group['master']!r}{hint}; known: {', '.join(masters.MASTERS)}")
        for argument, known in (("rounding", ROUNDINGS), ("state_rounding", ROUNDINGS[1:])):
            if group[argument] not in known:
                hint = nearest(group[argument], known)
                raise ValueError(f"unknown {argument} {group[argument]!r}{hint}; known: {', '.join(known)}")
        if group["rounding"] == "stochastic" and group["master"] != "none":
            raise ValueError('rounding="stochastic" and a master contradict each other: a master keeps the rest')

    def _labelled(self, group: Mapping[str, Any]) -> list[tuple[Tensor, str]]:
        """Each parameter of a group with the name that messages use."""
        names = group.get("param_names")
        index = next((i for i, g in enumerate(self.param_groups) if g is group), len(self.param_groups))
        return [(p, names[i] if names else f"parameter {i} of group {index}") for i, p in enumerate(group["params"])]

    def init_state(self) -> None:
        """Create the state of every parameter that requires a gradient and has none yet."""
        position = 0
        for group in self.param_groups:
            names = group.get("param_names")
            for i, (p, label) in enumerate(self._labelled(group)):
                if p not in self._slots:
                    name = clean_name(names[i]) if names else ""
                    self._slots[p] = _Slot(self, group, p, name, label, position)
                position += 1
                if (p.requires_grad or p.grad is not None) and not self.state.get(p):
                    self.state[p] = self._slots[p].fresh()

    # ---- the step

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step for every parameter that has a gradient.

        A tensor (or 256-value block, where no measurement is made) with a non-finite gradient is left as it was and
        counted (`counters`). Raises before anything has changed for a sparse or integer gradient, or when a parameter's
        dtype, device or shape is no longer what the state was made for.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            self.init_state()
            work = [
                (group, self._slots[p], grad)
                for group in self.param_groups
                for p in group["params"]
                if (grad := p.grad) is not None
            ]
            for _, slot, grad in work:
                slot.check(grad)
            self._warn_resolution(work)
            for group in self.param_groups:
                group["steps"] += 1
            self._reset(work, "before")
            jobs = self._jobs(work)
            backends.step(jobs)
            self._reset(work, "after")
            for group, slot, _ in work:
                count = self.state[slot.param]["step"]
                count.fill_(self.step_after(group, int(count) + 1))
        return loss

    def _jobs(self, work: list[tuple[dict[str, Any], _Slot, Tensor]]) -> list[Job]:
        cache: dict[tuple[int, int], dict[str, float]] = {}
        jobs = []
        for group, slot, grad in work:
            if slot.param.numel() == 0:
                continue
            state = self.state[slot.param]
            t = int(state["step"]) + 1
            if (id(group), t) not in cache:
                constants: dict[str, float] = {}
                for part in (*self.stabilize, self):
                    constants.update(part.constants(group, t))
                cache[id(group), t] = constants
            jobs.append(slot.job(group, state, grad, cache[id(group), t]))
        return jobs

    def _reset(self, work: list[tuple[dict[str, Any], _Slot, Tensor]], when: str) -> None:
        """Momentum reset: zero scales and codes, written directly; what debiases a moment restarts with it."""
        due = {id(g) for g in self.param_groups if any(p.resets(g) == when for p in (*self.stabilize, self))}
        for group, slot, _ in work:
            if id(group) in due:
                slot.zero_moments(self.state[slot.param], keep=when == "after")

    def _warn_resolution(self, work: list[tuple[dict[str, Any], _Slot, Tensor]]) -> None:
        """Once: a 16-bit parameter rounded to nearest does not move when an update is below half its ulp."""
        if self._warned:
            return
        for group, slot, _ in work:
            p = slot.param
            if p.dtype == torch.float32 or group["master"] != "none" or group["rounding"] != "nearest" or not p.numel():
                continue
            typical = float(p.detach().float().square().mean().sqrt())
            half_ulp = typical * torch.finfo(p.dtype).eps / 2
            if 0 < float(group["lr"]) < half_ulp:
                warnings.warn(
                    f"lr={float(group['lr']):.2g} is below the resolution of {slot.label} ({p.dtype}, half an ulp is "
                    f'about {half_ulp:.2g}): most updates will round away. Use rounding="stochastic" or a master.',
                    stacklevel=4,
                )
                break
        self._warned = True

    def program(self, group: Mapping[str, Any]) -> Program:
        """The stages of a group, stabilizers first, as backends run them."""
        moments, stages = self.plan(group)
        name = (tuple(moments.items()), stages)
        if name not in self._programs:
            parts = (*self.stabilize, self)
            own = {id(self): stages}
            every = tuple(stage for part in parts for stage in own.get(id(part), part.stages))
            scalars = {k: v for part in parts for k, v in part.scalars.items()}
            self._programs[name] = Program(every, moments, scalars, self.guarded)
        return self._programs[name]

    # ---- what it tells

    def explain(self) -> Explanation:
        """Every tensor with its role, formats, the rule that chose them and its bytes; `str()` is a table."""
        self.init_state()
        return explain(self)

    def state_bytes(self) -> int:
        """Bytes of all tensors in `state`, codes, scales, scalars and counters included."""
        return sum(v.nbytes for state in self.state.values() for v in state.values() if isinstance(v, Tensor))

    def counters(self) -> dict[str, int]:
        """How often non-finite values made a step leave a block, or a whole tensor, as it was, since the start."""
        counts = [state["skipped"].tolist() for state in self.state.values() if state]
        blocks, tensors = (sum(column) for column in zip(*counts, strict=True)) if counts else (0, 0)
        return {"skipped_blocks": blocks, "skipped_tensors": tensors}

    # ---- copies and checkpoints

    def __getstate__(self) -> dict[str, Any]:
        # Also what a subclass keeps; not hooks (as in torch), and not what is built again.
        own = {k: v for k, v in vars(self).items() if not k.startswith("_optimizer_") and k not in ("_programs", "_slots", "step")}
        return {**own, **super().__getstate__()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        checkpoint.unwrap(state)
        super().__setstate__(state)
        self._programs, self._slots = {}, {}
        for group in self.param_groups:
            for name, value in {**self.defaults, "steps": 0, "states_version": PRESETS_VERSION}.items():
                group.setdefault(name, value)
            group.update({k: tuple(v) for k, v in group.items() if isinstance(v, list) and k == "betas"})
        self.init_state()

    def state_dict(self) -> dict[str, Any]:
        """As in torch; tensors, numbers, strings, tuples and dicts only, so `torch.load(weights_only=True)` takes it."""
        state_dict = super().state_dict()
        for group in state_dict["param_groups"]:
            group["states"] = checkpoint.plain(group["states"])
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load hyper-parameters, counters and states; a state stored in another format is converted.

        How states are stored (`states`, `master`) stays what this optimizer was built with. Also takes the state dict
        of the `torch.optim` namesake. Raises `ValueError` (or `KeyError`) before anything has changed when the
        checkpoint is not an optimizer's, belongs to other parameters, or is damaged.
        """
        with checkpoint.checked_and_kept(self):
            super().load_state_dict(state_dict)


class _Slot:
    """What never changes about one parameter: its name, shape, formats; makes its state and its jobs."""

    def __init__(self, rule: Rule, group: Mapping[str, Any], p: Tensor, name: str, label: str, position: int):
        self.param, self.label, self.name = p, label, name
        self.role = role_of(name, rule.roles) if name else ""
        self.rows, self.cols = layout.rows_of(p.shape)
        self.made_for = (p.dtype, p.device, p.shape)
        self.id = zlib.crc32(name.encode()) if name else position
        self.program = rule.program(group)
        self.decisions: dict[str, Decision] = {
            letter: rule.policy.decide(group["states"], m.name, m.signed, name, tuple(p.shape), self.role)
            for letter, m in self.program.moments.items()
        }
        self.formats = {letter: decision.format for letter, decision in self.decisions.items()}
        self.master = group["master"]

    def check(self, grad: Tensor) -> None:
        """Raise before a step changes anything."""
        p = self.param
        if (p.dtype, p.device, p.shape) != self.made_for:
            was, now = (f"{d}, {dev}, {tuple(s)}" for d, dev, s in (self.made_for, (p.dtype, p.device, p.shape)))
            raise RuntimeError(
                f"{self.label}: was {was} when the optimizer was built and is {now} now; "
                "change the model's dtype, device or shape first and build the optimizer after"
            )
        if grad.layout != torch.strided:
            raise TypeError(f"{self.label}: sparse gradients are not supported; use nn.Embedding(sparse=False)")
        if grad.dtype not in FLOATS:
            raise TypeError(f"{self.label}: the gradient is {grad.dtype}; it must be float32, bfloat16 or float16")
        if grad.shape != p.shape or grad.device != p.device:
            raise ValueError(
                f"{self.label}: the gradient is {tuple(grad.shape)} on {grad.device}, "
                f"the parameter {tuple(p.shape)} on {p.device}"
            )

    def fresh(self) -> dict[str, Any]:
        """A state of zeros: plain tensors and ints only."""
        p = self.param
        state: dict[str, Any] = {"step": torch.zeros((), dtype=torch.float32, device="cpu")}
        for letter, moment in self.program.moments.items():
            fmt = self.formats[letter]
            for part, tensor in packed.zeros(fmt, tuple(p.shape), p.device).items():
                state[state_key(moment.name, part)] = tensor
            if fmt.compressed:
                state[f"{moment.name}_format"] = fmt.tag
        for name, value in self.program.scalars.items():
            state[name] = torch.full((), value, dtype=torch.float32, device=p.device)
        state["skipped"] = torch.zeros(2, dtype=torch.int64, device=p.device)
        kept = masters.companion_dtype(self.master, p.dtype)
        if kept is not None:
            start = p.detach() if self.master == "fp32" else torch.zeros_like(p)
            state["master"] = start.to(kept, copy=True).contiguous()
        return state

    def job(self, group: Mapping[str, Any], state: dict[str, Any], grad: Tensor, constants: dict[str, float]) -> Job:
        moments = {}
        for letter, moment in self.program.moments.items():
            parts = self.formats[letter].parts if self.formats[letter].compressed else ("codes",)
            moments[letter] = {part: state[state_key(moment.name, part)] for part in parts}
        noise = {}
        half = self.param.dtype != torch.float32
        if half and self.master == "none" and group["rounding"] != "nearest":
            noise["p"] = key(group["seed"], group["steps"], self.id, 0)
        if group["state_rounding"] == "stochastic":
            for operand, letter in enumerate(self.program.moments, start=1):
                noise[letter] = key(group["seed"], group["steps"], self.id, operand)
        return Job(
            param=self.param,
            grad=grad,
            moments=moments,
            formats=self.formats,
            scalars={name: state[name] for name in self.program.scalars},
            constants=constants,
            skipped=state["skipped"],
            rows=self.rows,
            cols=self.cols,
            program=self.program,
            master=self.master if "master" in state else "none",
            companion=state.get("master"),
            noise=noise,
        )

    def zero_moments(self, state: dict[str, Any], keep: bool) -> None:
        """Zero every moment and what debiases it; `keep` spares maxima of moments, as released code does."""
        for letter, moment in self.program.moments.items():
            if keep and moment.name.startswith("max_"):
                continue
            for part in packed.part_shapes(self.formats[letter], tuple(self.param.shape)):
                state[state_key(moment.name, part)].zero_()
            if moment.weight:
                state[moment.weight].zero_()


def state_key(moment: str, part: str) -> str:
    """The state's key of a moment's part: `exp_avg` for the codes, `exp_avg_scale` for the scales."""
    return moment if part == "codes" else f"{moment}_{part}"


def clean_name(name: str) -> str:
    """A parameter's name without what wrappers put in front of it, so that wrapping changes no seed and no policy.

    >>> clean_name("_orig_mod.module.layers.0.weight")
    'layers.0.weight'
    """
    return ".".join(w for w in name.split(".") if w not in ("_orig_mod", "module", "_fsdp_wrapped_module"))


def _as_list(params: Any) -> list[Any]:
    if isinstance(params, Tensor):
        raise TypeError("params must be a list of tensors, of (name, tensor) pairs or of groups, not one tensor")
    return list(params)


def check_common(group: Mapping[str, Any]) -> None:
    """Ranges of the hyper-parameters that carry the field's usual names."""
    lr = float(group["lr"])
    if not (math.isfinite(lr) and lr >= 0):
        raise ValueError(f"lr must be a finite number >= 0, not {lr}")
    betas = group.get("betas", ())
    if not isinstance(betas, (tuple, list)) or any(not 0 <= float(beta) < 1 for beta in betas):
        raise ValueError(f"betas must be numbers in [0, 1), not {betas!r}")
    for name in ("eps", "weight_decay"):
        value = float(group.get(name, 0.0))
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} must be a finite number >= 0, not {value}")
