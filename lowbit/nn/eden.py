"""MS-EDEN: unbiased quantization whose noise is in the scales, not in the codes (Quartet II).

https://arxiv.org/abs/2601.22813, section 4; release: https://github.com/IST-DASLab/Quartet-II. Of a randomly rotated
run x, whose values rounded to nearest are q:

    S = <x, x> / <x, q>      each block's scale becomes SR(S * scale), rounded stochastically in E4M3

Rounding to nearest shrinks a vector; S makes up for it along the vector itself, and what is left at right angles to it
has mean 0 over rotations (EDEN, https://arxiv.org/abs/2108.08842). That is one random number a block of 16, and half of
the squared error that stochastic rounding of the codes has. The release sums x and q in units of each block's scale,
where blocks with large values count too little: on log-normal data S then falls short by 5e-4 along x, where q itself
does by 7e-3 (4,000 rotations of 128). Followed is the formula, which is exact there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import codec, scales
from ..blocks import matrix, tiles
from ..formats import Format
from ..formats import format as find_format
from ..rounding import uniform
from ..rows import pack, row_bits


def encode(fmt: Format, x: Tensor, run: int, noise: tuple[int, int]) -> dict[str, Tensor]:
    """The parts of a rotated matrix in a format with e4m3 scales of blocks in rows.

    Args:
        fmt: the format; `run` is a multiple of its block.
        x: fp32 [rows, cols], rotated in runs of `run` values.
        run: values that share a correction.
        noise: the key of the random bits, one 16-bit number for each block.
    """
    width = fmt.block[1]
    found = scales.best(fmt, scales.Tiles(fmt, x))
    ones = torch.ones_like(found.multiplier)
    blocks = tiles(x, (1, width)).squeeze(2)  # [rows, blocks, width]
    codes = codec.nearby(fmt, blocks, found.inverse)
    byte = find_format("e4m3")
    held = codec.values(byte, found.parts["scale"].unsqueeze(-1), ones)
    # In units of the tensor's scale no square overflows.
    units = blocks * codec.reciprocal(found.parts["tensor_scale"])
    units = torch.where(found.multiplier.isnan().unsqueeze(-1), 0.0, units)
    rounded = codec.values(fmt, codes, ones) * held.nan_to_num(0.0)
    squares, products = (v.flatten(1).unflatten(1, (-1, run)).sum(-1) for v in (units * units, units * rounded))
    correction = torch.where(products > 0, squares / products, 1.0).repeat_interleave(run // width, 1).unsqueeze(-1)
    draws = uniform(row_bits(noise, found.multiplier)).unsqueeze(-1)
    scale = codec.encode(byte, (held * correction).clamp(max=byte.top), draws, scale=ones)["codes"].squeeze(-1)
    scale = torch.where(found.multiplier.isnan(), found.parts["scale"], scale)
    return {**found.parts, "codes": pack(matrix(codes.unsqueeze(2), *x.shape), fmt.bits), "scale": scale}
