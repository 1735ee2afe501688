"""Quantize and dequantize at once: the values a 4-bit operand would have, in fp32, without making the codes.

What the values are is said by `codec` (and `stablespam`); how they are made is a backend's business. Outliers are taken
out before and put back after.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends
from ..backends.reference import blocks, joined
from .recipe import Operand
from .stablespam import RELEASED


def fake_quantize(x: Tensor, operand: Operand | None, noise: tuple[int, int] | None = None) -> Tensor:
    """The matrix `x` as the operand's format would hold it, blocks along its rows, in fp32 (`x` itself if None).

    `noise` is the key of the random bits, needed where the operand rounds stochastically.
    """
    if operand is None or x.numel() == 0:
        return x
    rows = x.reshape(1, -1) if operand.flat else x
    taken: list[tuple[Tensor, Tensor]] = []
    if operand.outliers:
        rows = rows.float().clone(memory_format=torch.contiguous_format)
        for block in _blocks(rows, operand):
            where = _largest(block, operand.outliers)
            taken.append((where, block.gather(-1, where)))
            block.scatter_(-1, where, 0.0)
    if operand.spec is None:  # the formulas of the Stable-SPAM release are its own: no backend knows them
        values = RELEASED[str(operand.format)].values
        quantized = joined([values(block) for block in _blocks(rows.float().contiguous(), operand)])
    else:
        quantized = backends.fake(operand.spec, rows, None if operand.rounding == "nearest" else noise)
    if taken:
        for block, (where, exact) in zip(_blocks(quantized, operand), taken, strict=True):
            block.scatter_(-1, where, exact)
    return quantized.reshape(x.shape)


def _blocks(rows: Tensor, operand: Operand) -> list[Tensor]:
    assert operand.block is not None
    return blocks(rows, operand.block)


def _largest(block: Tensor, count: int) -> Tensor:
    """Where the largest magnitudes of blocks [..., n] are: [..., count], or fewer in a shorter block.

    One masked maximum each, not topk, which is slow on a CPU for many short blocks. Of equal magnitudes the first is
    taken; topk may take others, which can show in the last bit of what is left.
    """
    magnitude, found = block.abs(), []
    for _ in range(min(count, block.shape[-1])):
        found.append(magnitude.argmax(-1, keepdim=True))
        magnitude.scatter_(-1, found[-1], -1.0)
    return torch.cat(found, -1)
