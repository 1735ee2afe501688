"""Parameter groups as people use them: no weight decay on norms and biases, other learning rates at the two ends."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from ..roles import check_role, check_used, clean_name, near, role_map, role_of
from ..roles import roles as roles_of_model


def param_groups(
    params: nn.Module | Iterable[tuple[str, Tensor]],
    *,
    lr: float | Tensor | None = None,
    weight_decay: float = 0.1,
    no_decay: str | Sequence[str] = ("norm", "bias"),
    embedding_lr: float = 1.0,
    head_lr: float = 1.0,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    roles: Mapping[str, str] | None = None,
) -> list[dict[str, Any]]:
    """Groups for an optimizer of this library or of `torch.optim`.

    Every parameter that requires a gradient is in one group, under its name, tied weights once. Frozen parameters are
    left out: an optimizer would neither move nor decay them, and `add_param_group` takes them when they thaw.

    Args:
        params: a model, whose modules tell what is what; or (name, parameter) pairs, where names and shapes do.
        lr: the learning rate; without it, groups have none of their own and take the optimizer's.
        weight_decay: of what is decayed.
        no_decay: roles that are not decayed. Any vector or scalar that is no norm counts as a "bias".
        embedding_lr: times `lr` for embeddings; a weight that is also the head is an embedding.
        head_lr: times `lr` for the head.
        overrides: {name, glob or "@role": options of a group}, such as {"*.router.*": {"lr": 1e-5, "states": "fp32"}}.
            All that match apply; where two give the same option, the first does.
        roles: {name or glob: role}, where a guess is wrong.

    Returns:
        A list of groups, for the `params` of an optimizer; a scheduler scales each one's own learning rate.

    Raises:
        ValueError: a number out of range, a pattern that names no parameter, an unknown role, or a multiplier and no
            `lr` to multiply.
        TypeError: parameters without names.

    >>> net = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 8), nn.LayerNorm(8))
    >>> for group in param_groups(net, lr=1e-3, embedding_lr=0.5):
    ...     print([name for name, p in group["params"]], group["lr"], group["weight_decay"])
    ['0.weight'] 0.0005 0.1
    ['1.weight'] 0.001 0.1
    ['1.bias', '2.weight', '2.bias'] 0.001 0.0
    """
    numbers = {"lr": lr, "weight_decay": weight_decay, "embedding_lr": embedding_lr, "head_lr": head_lr}
    for argument, value in numbers.items():
        if not (value is None and argument == "lr"):
            _check_number(argument, value)
    scales = {"embedding": embedding_lr, "head": head_lr}
    for role, scale in scales.items():
        if scale != 1 and lr is None:
            raise ValueError(f"{role}_lr={scale} multiplies lr: pass lr= as well")
    spared = (no_decay,) if isinstance(no_decay, str) else tuple(no_decay)
    for role in spared:
        check_role(role, "no_decay")
    named = _named(params)
    found = _roles(params, named, roles)
    special = _checked(overrides or {}, named, found)

    groups: list[tuple[dict[str, Any], list[tuple[str, Tensor]]]] = []
    for name, p in named.items():
        if not p.requires_grad:
            continue
        role = found[name]
        options: dict[str, Any] = {"weight_decay": 0.0 if _kind(role, p) in spared else weight_decay}
        if lr is not None:
            scale = scales.get(role, 1.0)
            options["lr"] = lr * scale  # a tensor of its own for each group: schedulers write into it
            if scale != 1:  # for optimizers with a second learning rate, such as Muon's aux_lr, which is multiplied too
                options["base_lr"] = float(lr)
        for pattern, own in reversed(special.items()):
            if _matches(pattern, name, role):
                options |= own
        same = next((members for other, members in groups if other == options), None)
        if same is None:
            groups.append((options, [(name, p)]))
        else:
            same.append((name, p))
    if not groups:
        raise ValueError("param_groups: no parameter requires a gradient")
    return [{"params": members, **options} for options, members in groups]


def _kind(role: str, p: Tensor) -> str:
    return role or ("bias" if p.dim() < 2 else "")


def _check_number(argument: str, value: Any) -> None:
    number = isinstance(value, int | float | Tensor) and not isinstance(value, bool)
    if not (number and math.isfinite(float(value)) and float(value) >= 0):
        raise ValueError(f"{argument} must be a finite number >= 0, not {value!r}")


def _named(params: nn.Module | Iterable[Any]) -> dict[str, Tensor]:
    """Every parameter once, under its first name."""
    named: dict[str, Tensor] = {}
    seen: set[int] = set()
    for entry in params.named_parameters() if isinstance(params, nn.Module) else params:
        pair = isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[0], str)
        if not (pair and isinstance(entry[1], Tensor)):
            raise TypeError("param_groups takes a model or (name, parameter) pairs: pass model.named_parameters()")
        name, p = entry
        if id(p) in seen:
            continue
        if name in named:
            raise ValueError(f"param_groups: {name!r} names two parameters; put a word in front of one model's names")
        seen.add(id(p))
        named[name] = p
    return named


def _roles(params: Any, named: Mapping[str, Tensor], roles: Mapping[str, str] | None) -> dict[str, str]:
    told = role_map(roles)
    check_used(roles or {}, {name: p.shape for name, p in named.items()})
    if isinstance(params, nn.Module):
        found = roles_of_model(params, roles)
        return {name: found[name] for name in named}
    return {name: role_of(name, p.shape, told) for name, p in named.items()}


def _checked(overrides: Any, named: Mapping[str, Tensor], found: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """The overrides, each of which is for some parameter (a frozen one will do)."""
    if not isinstance(overrides, Mapping) or not all(isinstance(own, Mapping) for own in overrides.values()):
        raise TypeError('overrides must be {pattern: options}, such as {"*.router.*": {"lr": 1e-5}}')
    for pattern, own in overrides.items():
        if pattern.startswith("@"):
            check_role(pattern[1:], f"overrides {pattern!r}")
        if "params" in own or "param_names" in own:
            raise ValueError(f"overrides {pattern!r}: which parameters it is for is said by the pattern alone")
        if not any(_matches(pattern, name, found[name]) for name in named):
            raise ValueError(f"overrides {pattern!r} names no parameter{near(pattern, named)}")
    return {pattern: dict(own) for pattern, own in overrides.items()}


def _matches(pattern: str, name: str, role: str) -> bool:
    if pattern.startswith("@"):
        return pattern[1:] == role
    return pattern == name or fnmatchcase(clean_name(name), pattern)
