"""Step each parameter inside of backward, as soon as its gradient is there, and free the gradient at once.

Gradients are then never all in memory: of a model in 4 bits they are most of what a training step needs. The idea is
"fused backward" of LOMO (https://arxiv.org/abs/2306.09782); torchtune calls it optimizer-in-backward. The step is the
ordinary one, tensor by tensor: same counts, learning rates and random bits, so the same bits in every state.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._compile import _disable_dynamo

from .. import backends
from ..stages import Job
from . import advice, replay
from .base import Rule, check_common
from .matrices import Chain
from .sharded import count_together
from .slot import asked_of

if TYPE_CHECKING:
    from types import TracebackType

_M_MMAP_THRESHOLD, _LARGE = -3, 1 << 20
REMOVE = "remove() what step_in_backward returned, and call step() after backward()"


def step_in_backward(opt: Rule, *, averaged: bool = False) -> InBackward:
    """Make `backward()` step each parameter as soon as its gradient is complete, and free the gradient.

        with lowbit.optim.step_in_backward(opt):
            for batch in data:
                model(batch).backward()  # all .grad are None when this returns
                opt.step()               # ends the step
                scheduler.step()

    `opt.step()` after each backward pass stays: it ends the step, and steps what has a gradient and was not stepped
    (a parameter that was frozen when this was called, for example). The result is that of ordinary steps, bit for bit;
    learning rates and other hyper-parameters are those at the time of `backward()`. `step(closure)` works too.

    What looks at all gradients between `backward()` and `step()` finds none: `clip_grad_norm_` does nothing (use the
    optimizer's `stabilize=` with AdaClip or AdaGN, which look at one tensor), and accumulating gradients over several
    backward passes is an error. A step that fails half-way leaves the tensors that were stepped before as they are.

    On a CPU, glibc is told to give large blocks back to the system when they are freed (`mallopt`, for the process and
    for good): it would keep hundreds of megabytes of what a forward pass has decoded, in holes between what it keeps
    for the backward pass. That costs some time; with `MALLOC_MMAP_THRESHOLD_` in the environment it is left alone.

    Args:
        opt: an optimizer of this library.
        averaged: with several ranks (`torch.distributed`), say that gradients are complete in the hook: each rank
            trains a model of its own, or a hook registered earlier has averaged them.

    Returns:
        A handle: `remove()` undoes it, and so does leaving it as a context manager.

    Raises:
        TypeError: `opt` is not an optimizer of this library.
        ValueError: it measures something over all tensors (`GlobalClip`), so no tensor can be stepped alone; or it
            steps in backward already.
        RuntimeError: there are several ranks. DistributedDataParallel averages gradients only after the hooks of
            single parameters have run, so ranks would diverge without a word. (With `fully_shard` they are averaged
            before: it is taken where the optimizer was built after `fully_shard`.) Also raised in `backward()` for a
            parameter that gets a gradient a second time before `opt.step()`, and while a CUDA graph is captured.
    """
    if not isinstance(opt, Rule):
        raise TypeError(f"step_in_backward: an optimizer of lowbit.optim is needed, not {type(opt).__name__}")
    if opt.in_backward is not None:
        raise ValueError("step_in_backward: this optimizer steps in backward already")
    opt.init_state()
    for slot in opt._slots.values():
        for stage in slot.program.stages:
            if stage.over == "all":
                raise ValueError(
                    f"step_in_backward: {type(opt).__name__} measures {stage.function.__name__!r} over all tensors, "
                    "and in backward there is one gradient at a time; leave GlobalClip out, or use AdaClip or AdaGN"
                )
    _check_alone(opt, averaged)
    if any(device.type == "cpu" for device in opt.devices):
        _give_back_freed_memory()
    return InBackward(opt, averaged)


class InBackward:
    """What `step_in_backward` returns; `remove()` or leaving it as a context manager makes steps ordinary again."""

    def __init__(self, rule: Rule, averaged: bool):
        self.rule, self.averaged = rule, averaged
        self.stepped: set[Tensor] = set()  # in the step that is under way
        self.groups: dict[Tensor, dict[str, Any]] = {}
        self.begun = self.removed = False
        self.lock = threading.RLock()  # each device has a thread of its own in backward
        every = (p for group in rule.param_groups for p in group["params"])
        self.hooks = [p.register_post_accumulate_grad_hook(self._hook) for p in every if p.requires_grad]
        rule.in_backward = self

    def remove(self) -> None:
        """Make steps ordinary again; a step that is under way is still ended by `opt.step()`."""
        for hook in self.hooks:
            hook.remove()
        self.hooks, self.removed = [], True
        if not self.begun and self.rule.in_backward is self:
            self.rule.in_backward = None

    def __enter__(self) -> InBackward:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    @_disable_dynamo
    @torch.no_grad()
    def _hook(self, p: Tensor) -> None:
        with self.lock:
            _check_alone(self.rule, self.averaged)
            if p in self.stepped:
                raise RuntimeError(
                    f"{self.rule._slots[p].label}: a second gradient in one step. Call opt.step() after each "
                    "backward(), it ends the step; checkpoint with use_reentrant=False, whose backward passes are one; "
                    f"to accumulate gradients, {REMOVE}"
                )
            self._step(p)
            p.grad = None

    @torch.no_grad()
    def end(self) -> None:
        """End the step: what has a gradient and was not stepped is stepped now. `Rule.step` calls this."""
        if hasattr(self.rule, "grad_scale"):  # GradScaler announces itself so
            raise RuntimeError(f"a GradScaler's scale was in the gradients that backward() has used: {REMOVE}")
        self._begin()
        for p in [p for p in self.groups if p.grad is not None]:
            self._step(p)
        if self.rule.sharded:
            count_together(self.rule)
        self.begun = False
        self.stepped.clear()
        self.groups.clear()
        if self.removed:
            self.rule.in_backward = None

    def _begin(self) -> None:
        """Count the step, unless it is under way; what an ordinary step does before the first tensor."""
        rule = self.rule
        if self.begun:
            return
        if replay.capturing(rule):
            raise RuntimeError(f"a step in backward cannot be captured in a CUDA graph: {REMOVE}")
        for group in rule.param_groups:
            check_common(group)
        rule.init_state()
        rule._roster = None  # what the last ordinary step found
        self.groups = {p: group for group in rule.param_groups for p in group["params"]}
        slots = [
            (g, [(rule._slots[p], rule.state[p]) for p in g["params"] if p in rule.state]) for g in rule.param_groups
        ]
        advice.resolution(rule, slots)
        for group in rule.param_groups:
            group["steps"] += 1
        if rule.guarded:
            rule._reset("before")
        self.begun = True

    def _step(self, p: Tensor) -> None:
        """One tensor's part of a step."""
        rule, slot = self.rule, self.rule._slots[p]
        first = not self.begun
        self._begin()
        group = self.groups[p]
        try:
            assert p.grad is not None
            slot.check(asked_of(rule, group), p.grad)
            if not rule.guarded:  # as released: of this tensor alone, when its gradient is there
                rule._reset("before", only=p)
            made, parts, turns = rule._jobs([(group, [(slot, rule.state[p])])])
            rule._run(backends.share([job for job in made if isinstance(job, Job)]), parts)
            for job in made:
                if isinstance(job, Chain):
                    job.run()
        except BaseException:
            if first:  # nothing was stepped: this was no step
                for each in rule.param_groups:
                    each["steps"] -= 1
                self.begun = False
            raise
        rule._reset("after", only=p)
        for its in turns:
            for count in its.counts:
                count.copy_(its.then)  # pyright: ignore[reportArgumentType]  # they have begun
        self.stepped.add(p)


def _give_back_freed_memory() -> None:
    """Of a step of a 1.3B model in 4 bits, half a gigabyte (benchmarks/one_billion.py).

    glibc raises the size from which blocks are mapped, and so given back, to 32 MB as it goes; see mallopt(3).
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGE)
        libc.malloc_trim(0)


def _check_alone(rule: Rule, averaged: bool) -> None:
    """Raise where gradients are probably averaged over ranks later than in a hook. DTensors' are averaged before it."""
    if averaged or not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    if all(hasattr(p, "device_mesh") for group in rule.param_groups for p in group["params"]):
        return
    raise RuntimeError(
        "step_in_backward: there are several ranks, and DistributedDataParallel averages gradients only after hooks "
        "have run, so each rank would step with its own. Step after backward(), or, if each rank has a model of its "
        "own or a hook of yours averages first, say averaged=True. With fully_shard, build the optimizer after it"
    )
