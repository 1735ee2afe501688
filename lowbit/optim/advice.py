"""What an optimizer warns of, once: settings that are allowed, and seldom meant."""

from __future__ import annotations

import sys
import warnings
from typing import TYPE_CHECKING

import torch

from ..roles import clean_name
from ..shards import local
from .hyper import on_device

if TYPE_CHECKING:
    from .base import Rule, Work


def _warn(message: str) -> None:
    """At the line that called lowbit, through whatever constructors and hooks."""
    frame, level = sys._getframe(1), 2
    while frame.f_back and str(frame.f_globals.get("__name__")).partition(".")[0] in ("lowbit", "torch"):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def nameless(rule: Rule) -> None:
    """Without names, an embedding or a head looks like any other matrix."""
    for group in rule.param_groups if rule.by_role else ():
        if "param_names" not in group and any(p.dim() > 1 for p in group["params"]):
            _warn(
                f"{type(rule).__name__} treats embeddings, heads and other matrices differently and goes by names, "
                "which these parameters have not: all are taken for ordinary matrices. "
                "Pass model.named_parameters()"
            )
            return


def unmatched(rule: Rule) -> None:
    """A glob that matches nothing is a slip of the pen, unless its parameters are added later."""
    names = [clean_name(name) for group in rule.param_groups for name in group.get("param_names", ())]
    for glob in rule.policy.unmatched(names) if names else ():
        _warn(
            f"policy {glob!r} matches none of the {len(names)} parameters, the first of which is {names[0]!r}: "
            "`explain()` lists them all"
        )


def resolution(rule: Rule, work: Work) -> None:
    """A parameter that is rounded to nearest does not move when an update is below half its resolution.

    Looked at in the first step (by the scheduler's peak rate, so that a warm-up is no reason) and every 100 after.
    """
    for group, tensors in work:
        first = group["steps"] == 0
        rounds = group["master"] == "none" and group["rounding"] == "nearest"
        if rule.advised or not rounds or (group["steps"] % 100 and not first) or on_device(group["lr"]):
            continue
        lr = max(float(group["lr"]), float(group.get("initial_lr", 0.0)) if first else 0.0)
        for slot, _ in tensors:
            p = slot.param
            if (p.dtype == torch.float32 and slot.stored is None) or not local(p).numel() or rule.advised:
                continue
            half, what, way_out = slot.resolution()
            if 0 < lr < half:
                rule.advised = True
                _warn(
                    f"lr={lr:.2g} is below the resolution of {slot.label} ({what} is about {half:.2g}): "
                    f'most updates will round away. Use rounding="stochastic" or {way_out}.'
                )
