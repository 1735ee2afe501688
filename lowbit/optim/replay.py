"""A step in a CUDA graph: what can be captured, and what can be replayed.

While a graph is captured nothing runs, so `step` counts nothing: it only puts its launches into the graph. They read
all that differs from step to step from one small buffer on the device. `prepare_replay` counts a step, with all that
the host does in one, and fills that buffer. What the host does *between* the launches of a step cannot be told to a
graph, and is refused here, before anything has changed.
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .. import gpu
from ..backends import cuda
from ..stages import Job
from .slot import Slot

if TYPE_CHECKING:
    from .base import Rule

Shares = list[tuple[ModuleType, list[Job]]]
EAGERLY = "step such an optimizer outside of the graph"


def capturing(rule: Rule) -> bool:
    """Whether a CUDA graph is being captured where a step of this optimizer would run."""
    return any(gpu.capturing(device) for device in rule.devices)


def check_no_state_is_missing(rule: Rule) -> None:
    """What is made while a graph is captured would be made again by each replay."""
    if any(rule._lacks_state(p) for group in rule.param_groups for p in group["params"]):
        raise RuntimeError("a step cannot be captured while a parameter has no state: call init_state() before")


def check_capture(rule: Rule, slots: list[Slot], shares: Shares, copied: bool) -> None:
    """Raise if a graph cannot be captured of a step."""
    doing = "this step cannot be captured in a CUDA graph"
    _check(rule, slots, shares, copied, doing)
    for _, jobs in shares:
        if reason := cuda.uncapturable(jobs):
            raise RuntimeError(f"{doing}: {reason}")


def check_replay(rule: Rule, slots: list[Slot], shares: Shares, copied: bool) -> None:
    """Raise if a captured step cannot be this one."""
    doing = "no captured step can be replayed as this one"
    _check(rule, slots, shares, copied, doing)
    for _, jobs in shares:
        if reason := cuda.unprepared(jobs):
            raise RuntimeError(
                f"{doing}: {reason}. Leave the gradients where the captured step found them, "
                "or do an eager step() and capture anew"
            )


def _check(rule: Rule, slots: list[Slot], shares: Shares, copied: bool, doing: str) -> None:
    for slot in slots:
        what = f"{doing}: {slot.label}"
        if slot.shard is not None:
            raise RuntimeError(f"{what} is sharded, and ranks meet in a step; {EAGERLY}")
        if slot.program.parts:
            raise RuntimeError(f"{what} has matrix stages, where the host decides what comes next; {EAGERLY}")
        for name, x in (("it", slot.param), ("its gradient", slot.param.grad)):
            if isinstance(x, Tensor) and (not x.is_contiguous() or x.is_neg()):
                raise RuntimeError(f"{what}: {name} is not contiguous, so a step works on a copy; make it contiguous")
    if copied:
        raise RuntimeError(f"{doing}: with sparse momentum, a step works on copies of what has momentum; {EAGERLY}")
    for backend, jobs in shares:
        if backend is not cuda:
            where = f"on the {backend.__name__.rsplit('.', 1)[-1]} backend, on {jobs[0].param.device}"
            raise RuntimeError(f"{doing}: some of it runs {where}, and only CUDA kernels can be replayed; {EAGERLY}")
    for part in (*rule.stabilize, rule):
        for group in rule.param_groups:
            if _resets_late(part, group):
                raise RuntimeError(
                    f"{doing}: {part!r} resets moments after a step, when the replay may not have run yet; "
                    'variant="paper" resets before it'
                )


def _resets_late(part: Any, group: dict[str, Any]) -> bool:
    return part.resets(group) == "after" or (getattr(part, "late", False) and group["reset_interval"] > 0)
