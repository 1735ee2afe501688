"""State for a part of a matrix: a fixed number of values of each row, drawn at random.

The moments are a narrower matrix, with the rows of the parameter: stored, compressed, checkpointed and sharded as any
other. Which values they belong to is a bit mask, one bit per value, little-endian in each row. A step gathers these
values of parameter, gradient and companion, is made on the copies, and puts them back.

The values of a row are those with the smallest hashes of (seed, step of the draw, tensor, element), so what is drawn
depends on nothing else.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ..rounding import bits16, key
from ..stages import Job
from ..stored import load, store_

OPERAND = 255  # of the random bits: no moment of a rule has this number


def mask_shape(rows: int, cols: int) -> tuple[int, int]:
    """Of the bit mask of a matrix."""
    return rows, -(-cols // 8)


def draw(
    seed: int,
    step: int,
    tensor: int,
    rows: int,
    cols: int,
    kept: int,
    device: torch.device | str = "cpu",
    first: int = 0,
) -> Tensor:
    """A bit mask with `kept` bits in each row; `first` is the number of the first row.

    >>> draw(0, 0, 0, rows=2, cols=8, kept=3).tolist()
    [[112], [14]]
    """
    bits = bits16(key(seed, step, tensor, OPERAND), first * cols, rows * cols, device).view(rows, cols)
    chosen = bits.argsort(dim=1, stable=True)[:, :kept]
    flags = torch.zeros(rows, -(-cols // 8) * 8, dtype=torch.uint8, device=device).scatter_(1, chosen, 1)
    places = 2 ** torch.arange(8, dtype=torch.uint8, device=device)
    return (flags.view(rows, flags.shape[1] // 8, 8) * places).sum(-1, dtype=torch.uint8)


def columns(mask: Tensor, kept: int) -> Tensor:
    """The columns that a mask names, ascending: int64 [rows, kept]."""
    places = torch.arange(8, dtype=torch.uint8, device=mask.device)
    flags = mask.unsqueeze(-1).bitwise_right_shift(places) & 1
    return flags.flatten(1).nonzero()[:, 1].view(len(mask), kept)


class Part:
    """Copies of the chosen values of a parameter, its gradient and its companion, while a step works on them.

    Of a stored weight all values are loaded, and stored again when the step is done.
    """

    def __init__(self, job: Job, mask: Tensor, kept: int):
        param, companion, gradient = job.param, job.companion, job.grad.detach()
        self.param, self.rest, self.index, self.job = param, companion, columns(mask, kept), job
        self.stored, self.stochastic = job.stored, "p" in job.noise
        self.whole = param.detach() if self.stored is None else load(*self.stored, job.cols)
        job.param, job.gathered = self._gather(self.whole), self._gather(gradient)
        job.companion = None if companion is None else self._gather(companion)
        job.cols = kept
        if self.stored is not None:
            job.stored, job.noise = None, job.noise - {"p"}

    def _gather(self, x: Tensor) -> Tensor:
        return x.gather(1, self.index)

    def put_back(self) -> None:
        """Write what the step has made of the copies."""
        self.whole.scatter_(1, self.index, self.job.param)
        if self.rest is not None and self.job.companion is not None:
            self.rest.scatter_(1, self.index, self.job.companion)
        if self.stored is not None:
            store_(*self.stored, self.whole, key(*self.job.stream, 0) if self.stochastic else None)
            increment_version(self.param)
