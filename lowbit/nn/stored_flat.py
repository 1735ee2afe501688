"""Broadcasting stored weights: what DistributedDataParallel does when it is built, without a value changing.

DDP lays the tensors of a bucket end to end (`cat` of flat views), broadcasts that from rank 0, cuts it up again and
copies each piece to its parameter. A dense detour would not do: codes made anew from values, under scales that are
kept, are not rank 0's codes, and ranks would train different weights. So the flat tensor remembers what it was made
of, broadcasts the parts of that, and gives a piece back as the weight that it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .stored import StoredView, StoredWeight
from .stored_ops import LIST_RULES, Step, StoredTensor


class StoredFlat(StoredTensor):
    """Tensors end to end, of which some are stored weights. Read, it is dense; it cannot be written to."""

    pieces: tuple[Tensor, ...]  # 1-D, or a StoredWeight of any shape

    @staticmethod
    def __new__(cls, pieces: tuple[Tensor, ...]) -> StoredFlat:
        first = next(piece for piece in pieces if isinstance(piece, StoredWeight))
        count = sum(piece.numel() for piece in pieces)
        return torch.Tensor._make_wrapper_subclass(cls, torch.Size([count]), dtype=first.dtype, device=first.device)

    def __init__(self, pieces: tuple[Tensor, ...]) -> None:
        self.pieces = pieces

    def dense(self) -> Tensor:
        return torch.cat([p.dense().view(-1) if isinstance(p, StoredWeight) else p for p in self.pieces])

    def viewed(self, step: Step) -> Tensor:
        """One of the pieces, if that is what is asked for; a dense copy otherwise."""
        if step.func is torch.ops.aten.slice.Tensor and step.args[0] == 0:
            asked = range(len(self))[slice(*step.args[1:])]
            first = 0
            for piece in self.pieces:
                if asked == range(first, first + piece.numel()):
                    return piece.view(-1)
                first += piece.numel()
        return step(self.dense())

    def tensors(self) -> list[Tensor]:
        """The plain tensors that it stands on."""
        found: list[Tensor] = []
        for piece in self.pieces:
            found += [*piece.parts.values(), piece.writes] if isinstance(piece, StoredWeight) else [piece]
        return found


def _cat(func: Any, args: Any, kwargs: Any) -> Any:
    """Flat views of whole weights and other flat tensors of one dtype, laid end to end."""
    pieces = tuple(_weight(x) for x in args[0])
    alike = len({(x.dtype, x.device) for x in pieces}) == 1 and all(x.dim() == 1 for x in args[0])
    if not alike or any(isinstance(x, StoredTensor) and not isinstance(x, StoredWeight) for x in pieces):
        return func([x.dense() if isinstance(x, StoredTensor) else x for x in args[0]], *args[1:], **kwargs)
    return StoredFlat(tuple(x.clone() for x in pieces))


def _weight(x: Tensor) -> Tensor:
    return x.weight if isinstance(x, StoredView) and x.whole else x


def _broadcast(func: Any, args: Any, kwargs: Any) -> Any:
    tensors, *others = args
    work = None
    for x in tensors:
        for tensor in x.tensors() if isinstance(x, StoredFlat) else [x]:
            if work is not None:
                work.wait()
            work = func([tensor], *others, **kwargs)[1]
    return tensors, work


LIST_RULES.update({"aten::cat": _cat, "c10d::broadcast_": _broadcast})
