"""Hyper-parameters of a parameter group: which there may be, of what type, and the ranges that all optimizers share.

What type a hyper-parameter has is said by the annotation of the constructor's argument, and nowhere else.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import gpu, masters
from ..formats import nearest
from ..policy import check_storage
from ..tape import SOURCES, Traced

if TYPE_CHECKING:
    from .base import Rule
    from .parts import Stabilizer

ROUNDINGS = ("auto", "nearest", "stochastic")

# How torch's own optimizers run; nothing here.
TORCHS_KEYS = ("maximize", "foreach", "capturable", "differentiable", "fused", "decoupled_weight_decay")
# What a group carries that is no hyper-parameter of an optimizer: this library's own, those of schedulers
# (torch.optim.lr_scheduler, swa_utils), labels, and what training loops read (timm `lr_scale`, Megatron `lr_mult` and
# `wd_mult`). A name of one's own begins with an underscore.
EXTRAS = (
    *("params", "param_names", "steps", "states_version", "base_lr", "scalar_lr_at"),
    *("initial_lr", "max_lr", "min_lr", "swa_lr", "base_momentum", "max_momentum", "min_momentum"),
    *("name", "names", "group_name", "label", "tag", "tags", "lr_scale", "lr_mult", "wd_mult"),
)


def is_number(value: Any) -> bool:
    """Whether something is one real number: of Python, of numpy, or in a tensor."""
    if isinstance(value, Tensor):
        return value.numel() == 1 and value.is_floating_point()
    return isinstance(value, Real) and not isinstance(value, bool)


def of_python(value: Any) -> Any:
    """A number of numpy's, or a tuple with some, as Python has it: `torch.load(weights_only=True)` takes no other."""
    if isinstance(value, tuple):
        return tuple(map(of_python, value))
    return value.item() if type(value).__module__ == "numpy" and value.ndim == 0 else value


def on_device(value: Any) -> bool:
    """Whether a hyper-parameter is in a tensor that a step must not wait for: on a device that kernels run on."""
    return isinstance(value, Tensor) and (value.device.type != "cpu" or gpu.runs(value.device))


def of_floats(group: Mapping[str, Any], owner: str) -> Mapping[str, Any]:
    """A group in which numbers in tensors are floats, exactly; a learning rate that only a device knows is traced."""
    known = {k: x.item() for k, x in group.items() if isinstance(x, Tensor) and k not in EXTRAS and not on_device(x)}
    rate = {"lr": Traced.of(group["lr"], owner)} if on_device(group["lr"]) else {}
    return {**group, **known, **rate} if known or rate else group


def strange(keys: Iterable[str], known: Iterable[str]) -> list[str]:
    """Which keys of a group are neither hyper-parameters, nor known extras, nor of the user's own (`_…`)."""
    every = {*known, *EXTRAS, *TORCHS_KEYS}
    return [key for key in keys if key not in every and not str(key).startswith("_")]


def check_names(optimizer: str, group: Mapping[str, Any], known: list[str], index: int) -> None:
    """Raise `ValueError` for a key that a group given by the user does not have: a misspelt one would do nothing.

    torch takes any key. Here a group may have the optimizer's hyper-parameters, `EXTRAS`, torch's switches if they are
    off, and whatever begins with an underscore.
    """
    on = [key for key in TORCHS_KEYS if group.get(key) and key != "decoupled_weight_decay"]
    for key in (*strange(group, known), *on):
        raise ValueError(
            f"group {index}: {optimizer} has no hyper-parameter {key!r}{nearest(key, [*known, *EXTRAS])}; it has: "
            f"{', '.join(known)}. For a key of your own, begin its name with an underscore"
        )


def types_of(owner: type) -> dict[str, str]:
    """The types of the constructor's arguments, those of the classes it derives from included."""
    found = {}
    for base in reversed(owner.__mro__):
        for name, argument in inspect.signature(base.__init__).parameters.items() if "__init__" in vars(base) else ():
            if argument.annotation is not argument.empty:
                found[name] = str(inspect.formatannotation(argument.annotation)).strip("'")
    return found


def check_types(owner: type, group: Mapping[str, Any]) -> None:
    """Raise `TypeError` (`ValueError` for whole numbers) for a hyper-parameter that is of another type than asked."""
    for name, annotation in types_of(owner).items():
        wanted, *others = annotation.split(" | ")
        value = group.get(name)
        if name not in group or (value is None and "None" in others):
            continue
        none = ", or None" if "None" in others else ""
        if wanted == "int" and not is_number(value):
            raise ValueError(f"{name} must be a whole number{none}, not {value!r}")
        if wanted == "float" and not is_number(value):
            raise TypeError(f"{name} must be a number{none}, not {value!r}")
        if wanted == "bool" and value not in (True, False):
            raise TypeError(f"{name} must be True or False{none}, not {value!r}")


def check_common(group: Mapping[str, Any]) -> None:
    """Types and ranges of the hyper-parameters that carry the field's usual names; asked in each step."""
    for name, value in group.items():
        if isinstance(value, Tensor) and name not in EXTRAS and on_device(value):
            _check_on_device(name, value, group)
    betas = group.get("betas", ())
    if not isinstance(betas, (tuple, list)) or not all(is_number(beta) and 0 <= float(beta) < 1 for beta in betas):
        raise ValueError(f"betas must be numbers in [0, 1), not {betas!r}")
    for name in ("lr", "eps", "weight_decay"):
        value = group.get(name, 0.0)
        if not is_number(value):
            raise TypeError(f"{name} must be a number, not {value!r}")
        if not on_device(value):
            _check_rate(name, value)


def _check_rate(name: str, value: Any) -> None:
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be a finite number >= 0, not {float(value)}")


def _check_on_device(name: str, value: Tensor, group: Mapping[str, Any]) -> None:
    """Raise for a hyper-parameter on a device that is no learning rate, or one that not all kernels can read."""
    what = f"{name} is a tensor on {value.device}"
    if name != "lr" or not gpu.runs(value.device):
        raise TypeError(f"{what}, and every step would wait for it: pass a float, or a tensor on the CPU")
    if value.dtype not in SOURCES or value.numel() != 1:
        raise TypeError(
            f"{what}, of {value.numel()} values in {value.dtype}: kernels read one in float32 or float64, as "
            f"torch.tensor(1e-3, device={str(value.device)!r}) is"
        )
    params = [entry[1] if isinstance(entry, tuple) else entry for entry in group["params"]]
    devices = {p.device for p in params if isinstance(p, Tensor)}  # a checkpoint has their numbers
    for device in devices - {value.device, torch.device("cpu")}:
        raise ValueError(f"{what}, and there are parameters on {device}: give each device's a group with its own lr")


def check_finite(group: Mapping[str, Any], like: Mapping[str, Any]) -> None:
    """Raise `ValueError` for a number of a checkpoint's group that is NaN, or infinite where the optimizer's is not."""
    for name, value in group.items():
        number = is_number(value) and name != "params"
        if number and not math.isfinite(value) and not (value == like.get(name) and not math.isnan(value)):
            raise ValueError(f"the checkpoint's {name} is {float(value)}: it is damaged, or of a run that had failed")


def check(rule: Rule, group: Mapping[str, Any]) -> None:
    """Raise for anything that a group asks of an optimizer and cannot have, before anything has changed."""
    if not isinstance(group["seed"], int):
        raise TypeError(f"seed must be an int, not {group['seed']!r}")
    check_types(type(rule), group)
    for part in rule.stabilize:
        check_types(type(part), group)
    check_common(group)
    if on_device(group["lr"]):  # once: later steps do not wait to read it
        _check_rate("lr", group["lr"])
    rule.check_group(group)
    plans = [rule.plan(group, kind) for kind in rule.kinds]
    signed = {m.name: m.signed for moments, _ in plans for m in moments.values()}
    check_storage(group["states"], "states", signed)
    for match, storage in rule.policy.rules:
        check_storage(storage, f"policy {match!r}", signed)
    for part in rule.stabilize:
        part.check(group)
        for moments, _ in plans:
            _check_reads(part, moments, type(rule).__name__)
    for kind in rule.kinds:
        rule.program(group, kind)  # raises for stages that do not fit together
    for argument, known in (("master", masters.MASTERS), ("rounding", ROUNDINGS), ("state_rounding", ROUNDINGS[1:])):
        if group[argument] not in known:
            hint = nearest(group[argument], known)
            raise ValueError(f"unknown {argument} {group[argument]!r}{hint}; known: {', '.join(known)}")
    if group["rounding"] == "stochastic" and group["master"] != "none":
        raise ValueError('rounding="stochastic" and a master contradict each other: a master keeps the rest')
    if not group.get("param_names") and not any(isinstance(entry, tuple) for entry in group.get("params", ())):
        _check_nameless(rule)


def _check_reads(part: Stabilizer, moments: Mapping[str, Any], optimizer: str) -> None:
    """A stabilizer may read an optimizer's moments, where there is one number for each value."""
    own = {"p", "g", "s", "c", "x", *(letter for stage in part.stages for letter in stage.writes)}
    for letter in dict.fromkeys(r for stage in part.stages for r in stage.reads if len(r) == 1 and r not in own):
        asked = f"stabilize: {part!r} reads {letter!r}, which {optimizer}"
        if letter not in moments:
            raise ValueError(f"{asked} has not")
        if moments[letter].over != "value":  # it is new before the update that would read it is repeated
            raise ValueError(f"{asked} has for each {moments[letter].over} only, not for each value")


def _check_nameless(rule: Rule) -> None:
    """Rules that go by name do nothing without names; better to say so."""
    globs = [match for match, _ in rule.policy.rules if isinstance(match, str) and match != "*"]
    if globs or rule.roles:
        asked = f"policy {globs[0]!r}" if globs else f"roles {next(iter(rule.roles))!r}"
        raise ValueError(f"{asked} goes by names, and the parameters have none: pass model.named_parameters()")
