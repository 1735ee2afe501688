"""What a step found and made, for the next one: mostly nothing has changed but gradients and numbers.

Of a model of many small tensors the host's part of a step is the longest, and Python takes most of it if it looks at
every tensor in turn. A roster compares all that a step depends on with what the last one found, in passes over all
tensors that are loops in C (`map`, comparisons of lists). If all is as it was, what was checked need not be checked,
and the jobs are the last ones. If anything differs, the step goes through everything as the first did.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from ctypes import c_float
from itertools import chain
from operator import attrgetter, is_
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import backends
from ..stages import Batch, Job, Kept, Turn
from ..tape import traced
from .hyper import on_device
from .slot import Slot, asked_of, format_of, tensors_of

if TYPE_CHECKING:
    from .base import Rule

Shares = list[tuple[ModuleType, list[Job]]]
Work = list[tuple[dict[str, Any], list[tuple[Slot, dict[str, Any]]]]]


class Guards:
    """Whether tensors have the dtypes, devices, layouts, shapes and strides that others had: what can be without torch.

    The same names as torch's own, which takes a fifth of the time.
    """

    about = attrgetter("dtype", "device", "shape", "layout")

    def __init__(self, *tensors: Tensor, **_: Any):
        self.known = self._about(tensors)

    def check(self, *tensors: Tensor) -> bool:
        """Whether these are alike, one by one."""
        return self._about(tensors) == self.known

    def _about(self, tensors: tuple[Tensor, ...]) -> list[Any]:
        return [*map(self.about, tensors), *map(Tensor.stride, tensors), *map(Tensor.is_neg, tensors)]


def _guards(tensors: list[Tensor]) -> Any:
    """What torch.compile asks before it runs what it has compiled for some tensors: one call for all of them."""
    try:
        return torch._C._dynamo.guards.TensorGuards(  # pyright: ignore[reportAttributeAccessIssue]
            *tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None
        )
    except (AttributeError, TypeError):  # it is torch's own affair
        return Guards(*tensors)


class Turns:
    """The tensors of a group that are of one kind and have made equally many steps, and what they share."""

    def __init__(self, group: dict[str, Any], kind: str):
        self.group, self.kind, self.turn = group, kind, Turn()
        self.counts: list[Tensor] = []
        self.then: Tensor | None = None

    def begin(self, rule: Rule, count: float) -> float:
        """Fill in what is this step's; returns what the tensors' own counts are after it."""
        group, turn, t = self.group, self.turn, int(count) + 1
        turn.constants, turn.traced = rule._constants(group, t, self.kind), {}
        if on_device(group["lr"]):
            turn.traced = traced(turn.constants, type(rule).__name__)
            turn.constants = {k: x for k, x in turn.constants.items() if k not in turn.traced}
        turn.seed, turn.step = group["seed"], group["steps"]
        return rule.step_after(group, t)


class Roster:
    """All that a step depends on, as the last one found it; plain jobs only, neither parts of tensors nor chains."""

    def __init__(self, rule: Rule, work: Work, shares: Shares, turns: Iterable[Turns]):
        self.work = work
        states = {id(slot.param): (slot, state) for _, tensors in work for slot, state in tensors}
        jobs = [job for _, share in shares for job in share]
        stepped = {id(job.param) for job in jobs}
        empty = [slot.param for slot, _ in states.values() if id(slot.param) not in stepped]
        self.params = [*(job.param for job in jobs), *empty]  # that have a gradient: those of a share in a row
        self.its = [states[id(p)] for p in self.params]
        self.shares = [(backend, share, Kept()) for backend, share in shares]
        self.kinds = [(kind, backend) for backend, share in shares for kind in {job.kind for job in share}]
        self.turns = list(turns)
        self.counts = [[c_float.from_address(x.data_ptr()) for x in its.counts] for its in self.turns]
        # Of all parameters, and of those without a gradient or a state.
        self.groups = list(rule.param_groups)
        self.settings = _settings(rule)
        self.every = [p for group in rule.param_groups for p in group["params"]]
        self.keys, self.states = [*rule.state], [*rule.state.values()]
        self.idle = [p for p in self.every if id(p) not in states]
        self.stateless = [p for p in self.every if not rule.state.get(p)]
        grads: list[Tensor] = [p.grad for p in self.params]  # type: ignore[misc]
        self.formats = [format_of(p) for p in self.params]
        self.guards, self.addresses = _guards([*self._own(), *grads]), self._addresses()
        self.grads: list[Tensor] = []  # of the step that begins

    @staticmethod
    def can_be(work: Work) -> bool:
        """Whether these tensors have plain jobs, and counts that are where they are made."""
        return all(
            not slot.kept and not slot.program.parts and slot.shard is None and _is_count(state["step"])
            for _, tensors in work
            for slot, state in tensors
        )

    def _own(self) -> list[Tensor]:
        """Of every tensor that is stepped, the plain ones that it is made of."""
        if not any(self.formats):
            return self.params
        if not _same([format_of(p) for p in self.params], self.formats):
            raise TypeError("a parameter is stored otherwise")
        return [*chain.from_iterable(map(tensors_of, self.params))]

    def _addresses(self) -> list[int]:
        """Of every tensor that is stepped, and of its state's."""
        states = chain.from_iterable([slot.of_state(state) for slot, state in self.its])
        return [*map(Tensor.data_ptr, self._own()), *map(Tensor.data_ptr, states)]

    def lasts(self, rule: Rule) -> bool:
        """Whether a step now would make what the last one made; `grads` are its gradients then."""
        every = [p for group in rule.param_groups for p in group["params"]]
        if not (
            _same(rule.param_groups, self.groups)
            and _same(every, self.every)
            and _same([*rule.state], self.keys)
            and _same([*rule.state.values()], self.states)
            and _settings(rule) == self.settings
            and all(p.grad is None for p in self.idle)
            and not any(p.requires_grad for p in self.stateless)
            and all(backends.for_program(*kind) is backend for kind, backend in self.kinds)
        ):
            return False
        try:
            grads: list[Tensor] = [p.grad for p in self.params]  # type: ignore[misc]
            if self._addresses() != self.addresses or not self.guards.check(*self._own(), *grads):
                return False
        except (
            AttributeError,
            KeyError,
            RuntimeError,
            TypeError,
        ):  # no gradient, or a state that lacks a tensor
            return False
        self.grads = grads
        self.values = [{count.value for count in counts} for counts in self.counts]
        return all(len(values) == 1 for values in self.values)

    def begin(self, rule: Rule) -> tuple[Shares, Callable[[], None]]:
        """The step's jobs, with its numbers, and what sets all tensors' own counts."""
        after = [turns.begin(rule, *values) for turns, values in zip(self.turns, self.values, strict=True)]
        shares: Shares = []
        start = 0
        for backend, jobs, kept in self.shares:
            shares.append((backend, Batch(jobs, self.grads[start : start + len(jobs)], kept)))
            start += len(jobs)
        self.grads = []

        def advance() -> None:
            for counts, then in zip(self.counts, after, strict=True):
                for count in counts:
                    count.value = then

        return shares, advance


def _same(these: list[Any], those: list[Any]) -> bool:
    """Whether two lists have the same objects; tensors are not to be compared."""
    return len(these) == len(those) and all(map(is_, these, those))


def _settings(rule: Rule) -> list[Any]:
    """What of the groups decides on jobs."""
    names = "rounding", "state_rounding"
    return [
        (asked_of(rule, group), on_device(group["lr"]), *(group[name] for name in names)) for group in rule.param_groups
    ]


def _is_count(x: Tensor) -> bool:
    return x.dtype == torch.float32 and x.device.type == "cpu" and x.layout == torch.strided and x.numel() == 1
