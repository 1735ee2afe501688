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

from . import codec
from .blocks import halve
from .formats import Format
from .formats import format as find_format
from .rounding import uniform
from .rows import row_bits
from .scales import Coded, best


def encode(fmt: Format, blocks: Coded, noise: tuple[int, int], run: int) -> dict[str, Tensor]:
    """The parts of a matrix in a format with e4m3 scales of blocks in rows.

    Args:
        fmt: the format; its block divides the runs that are rotated.
        blocks: the matrix, rotated, made of whole runs.
        noise: the key of the random bits, one 16-bit number for each block.
        run: how many values share a correction, those that a rotation mixes.
    """
    found = best(fmt, blocks)
    byte = find_format("e4m3")
    held = codec.values(byte, found.parts["scale"].unsqueeze(-1), torch.ones_like(found.multiplier)).squeeze(-1)
    # Sums are in units of each block's own scale, so that nothing overflows; here they get the tensor's.
    weight, each = held.double().square(), run // fmt.block[1]
    squares, products = (
        halve(torch.where(held > 0, total * weight, 0.0).unflatten(1, (-1, each)))
        for total in (blocks.total("squares", found.inverse), blocks.products(found.inverse))
    )
    correction = torch.where(products > 0, squares / products, 1.0).float().repeat_interleave(each, 1)
    draws = uniform(row_bits(noise, held)).unsqueeze(-1)
    corrected = (held * correction).clamp(max=byte.top).unsqueeze(-1)
    scale = codec.encode(byte, corrected, draws, scale=torch.ones_like(held))["codes"].squeeze(-1)
    scale = torch.where(held.isnan(), found.parts["scale"], scale)
    return {**found.parts, "codes": blocks.codes(found), "scale": scale}
