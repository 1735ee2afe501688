"""A forward and backward pass on the meta device, with every storage counted for as long as something holds it.

Tensors on the meta device have shapes and dtypes and no memory, but they are made, kept by autograd and let go at the
same moments as real ones. So the layers' and the model's own code says what is in memory when.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Live(TorchDispatchMode):
    """Counts the bytes that operations make while it is active: `now`, and the `most` at any time."""

    def __init__(self, known: Iterable[Tensor]):
        super().__init__()
        self.now = self.most = 0
        self.sizes = {x.untyped_storage()._cdata: 0 for x in known}  # counted elsewhere

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(t not in (Tensor, nn.Parameter) for t in types):
            return NotImplemented  # a stored weight: it says which operations on plain tensors it is
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self._count(x.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        address = storage._cdata
        if address not in self.sizes:
            self.sizes[address] = storage.nbytes()
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._gone, address)

    def _gone(self, address: int) -> None:
        self.now -= self.sizes.pop(address)


class FusedAttention(TorchFunctionMode):
    """Attention as fused kernels do it: nothing that grows with the square of the sequence is kept."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        q, k, v, *rest = args
        names = ("attn_mask", "dropout_p", "is_causal")
        given = {**dict(zip(names, rest, strict=False)), **kwargs}
        if given.pop("enable_gqa", False):
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return fused(q, k, v, given.pop("dropout_p", 0.0), given.pop("is_causal", False), **given)[0]


@dataclass
class Pass:
    """What one forward and backward pass took, in bytes, beside what was there before."""

    activations: int = 0  # what is alive between forward and backward
    gradients: int = 0  # all together
    gradient: int = 0  # the largest
    most: int = 0  # at any time, with an optimizer's temporaries where it steps in backward


def run(
    model: nn.Module, tokens: Tensor, known: Iterable[Tensor], released: Mapping[Tensor, int] | None = None
) -> Pass:
    """One pass of a model without memory.

    Args:
        model: gives logits [batch, seq, vocab], or an output that has `logits`.
        tokens: int64 [batch, seq].
        known: tensors that were there before, and are not counted.
        released: gradients are freed as soon as they are there, after a step that needs so many bytes for a while.
    """
    live, found = Live(known), Pass()

    def arrived(p: Tensor) -> None:
        assert p.grad is not None
        found.gradients += p.grad.nbytes
        found.gradient = max(found.gradient, p.grad.nbytes)
        if released is not None:
            found.most = max(found.most, live.now + released[p])
            p.grad = None

    with ExitStack() as stack:
        for p in model.parameters():
            if p.requires_grad:
                stack.callback(p.register_post_accumulate_grad_hook(arrived).remove)
        stack.enter_context(FusedAttention())
        stack.enter_context(live)
        out = model(tokens)
        loss = F.cross_entropy(getattr(out, "logits", out).flatten(0, 1).float(), tokens.flatten())
        del out
        found.activations = live.now
        loss.backward()
    model.zero_grad()
    found.most = max(found.most, live.most)
    return found
