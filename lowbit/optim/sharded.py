"""A step of what is sharded: counts that ranks add up, and rules of whole matrices, which gather them.

A rule with matrix stages needs all of a matrix. Every rank gathers the tensor with its gradient and states, does the
whole step as if it were alone (the same numbers, so the same results), and keeps its own rows. That is one tensor at a
time. Distributed Muons share the work out instead; this is the form that is the same bits as a single process.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from torch import Tensor

from ..shards import add_up, local, whole
from .matrices import Chain

if TYPE_CHECKING:
    from .base import Rule


class WholeChain(Chain):
    """The chain of a sharded tensor; it works on a gathered copy."""

    def run(self) -> None:
        slot, state, shard = self.slot, self.state, self.slot.shard
        assert shard is not None and slot.param.grad is not None
        self.slot, self.state = copy.copy(slot), {k: whole(v) if isinstance(v, Tensor) else v for k, v in state.items()}
        self.slot.param, self.slot.shard = whole(slot.param.detach()).detach(), None
        self.slot.param.grad = whole(slot.param.grad)
        try:
            super().run()
            for name in slot.cut:  # the others are the state's own
                local(state[name]).copy_(shard.take(self.state[name]))
            local(slot.param).copy_(shard.take(self.slot.param))
        finally:
            self.slot, self.state = slot, state


def count_together(rule: Rule) -> None:
    """Take into the states what was left alone in a step, on all ranks; every rank must come here."""
    sharded = [slot for slot in rule._slots.values() if slot.shard is not None and slot.param in rule.state]
    add_up([shard for slot in sharded if (shard := slot.shard)], [slot.lost for slot in sharded])
    for slot in sharded:
        rule.state[slot.param]["skipped"].add_(slot.lost)
        slot.lost.zero_()
