"""The blocks of a matrix as dimensions of their own, and what a sum over one means."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import STEP_BLOCK


def tiles(x: Tensor, block: tuple[int, int]) -> Tensor:
    """A matrix [rows, cols] as its blocks [down, across, height, width], padded with zeros at the end."""
    height, width = block
    rows, cols = x.shape
    padded = F.pad(x, (0, -cols % width, 0, -rows % height))
    down, across = padded.shape[0] // height, padded.shape[1] // width
    return padded.reshape(down, height, across, width).transpose(1, 2)


def matrix(blocks: Tensor, rows: int, cols: int) -> Tensor:
    """The inverse of `tiles`, without what was padded."""
    down, across, height, width = blocks.shape
    return blocks.transpose(1, 2).reshape(down * height, across * width)[:rows, :cols]


def halve(values: Tensor) -> Tensor:
    """The sum over the last dimension by a halving tree: x[i] + x[i + n/2], zeros padded to a power of two."""
    length = values.shape[-1]
    if length == 0:
        return values.new_zeros(values.shape[:-1])
    values = F.pad(values, (0, (1 << (length - 1).bit_length()) - length))
    while values.shape[-1] > 1:
        half = values.shape[-1] // 2
        values = values[..., :half] + values[..., half:]
    return values[..., 0]


def counts(rows: int, cols: int, block: tuple[int, int], device: torch.device) -> Tensor:
    """How many values each block of `tiles` has, in float64 [down, across]."""
    sides = (
        torch.arange(0, max(n, 1), size, dtype=torch.float64, device=device).neg().add(n).clamp(max=size)
        for n, size in zip((rows, cols), block, strict=True)
    )
    height, width = sides
    return height.unsqueeze(1) * width


def total(blocks: Tensor) -> Tensor:
    """The sum over each block of `tiles`, in float64.

    Each row of a block is cut into pieces of 256 values (the last may be short), each summed by the halving tree in
    fp32; then pieces, then rows, by the tree in float64.
    """
    width = blocks.shape[-1]
    if width > STEP_BLOCK:
        blocks = F.pad(blocks, (0, -width % STEP_BLOCK)).unflatten(-1, (-1, STEP_BLOCK))
    else:
        blocks = blocks.unsqueeze(-2)
    return halve(halve(halve(blocks).double()))
