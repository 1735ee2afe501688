"""A step as one operator of torch, which a compiler takes as it is: `torch.compile(fullgraph=True)` passes through.

Tracing a step takes minutes, and nothing in it can be fused. A compiler is told that the operator reads gradients and
writes parameters; states, counters and the learning rate are the optimizer's own, and are read when the operator runs,
so a schedule compiles nothing anew.

Importing this module registers it; that happens when a compiler first meets a step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .base import rules


@torch.library.custom_op("lowbit::step", mutates_args=("params",), tags=(torch.Tag.cudagraph_unsafe,))
def step(params: Sequence[Tensor], grads: Sequence[Tensor], which: Sequence[int], optimizer: int) -> None:
    """`Rule.step` of the optimizer of that number, where `which` of its parameters have these gradients."""
    rule = rules[optimizer]
    every = [p for group in rule.param_groups for p in group["params"]]
    own = [every[k] for k in which]
    kept = [p.grad for p in every]
    # A compiler that cannot say who else needs the old values hands over copies, and writes these back by itself.
    copied = [(p, given) for p, given in zip(own, params, strict=True) if p.data_ptr() != given.data_ptr()]
    before = [(p, p.detach().clone()) for p, _ in copied]
    try:
        for p, given in copied:
            p.detach().copy_(given)
        for p in every:
            p.grad = None
        for p, g in zip(own, grads, strict=True):
            p.grad = g
        rule._step()
        for p, given in copied:
            given.copy_(p.detach())
    finally:
        for p, g in zip(every, kept, strict=True):
            p.grad = g
        for p, old in before:
            p.detach().copy_(old)


@step.register_fake
def _(params: Sequence[Tensor], grads: Sequence[Tensor], which: Sequence[int], optimizer: int) -> None:
    return None
