"""Quantize and dequantize at once: the values a 4-bit operand would have, in fp32, without making the codes.

What the values are is said by `codec` (and `stablespam`), and tests hold the short cuts below to it bit for bit. They
exist because a layer needs no codes: for uniform grids and E2M1, rounding is a few arithmetic operations, where the
codec's search through the grid would cost more time than the matmul it prepares.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import codec
from ..formats import Format
from ..rounding import narrow, uniform
from ..rows import row_bits
from .recipe import Operand
from .stablespam import RELEASED

_E1M2 = (0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5)
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def fake_quantize(x: Tensor, operand: Operand | None, noise: tuple[int, int] | None = None) -> Tensor:
    """The matrix `x` as the operand's format would hold it, blocks along its rows, in fp32 (`x` itself if None).

    `noise` is the key of the random bits, needed where the operand rounds stochastically.
    """
    if operand is None or x.numel() == 0:
        return x
    rows = (x.float().reshape(1, -1) if operand.flat else x.float()).contiguous()  # a transposed matrix is not
    bits = None if operand.rounding == "nearest" or noise is None else row_bits(noise, rows)
    if operand.spec is not None and operand.spec.dtype is not None:
        return narrow(rows, operand.spec.dtype, bits).float().reshape(x.shape)
    assert operand.block is not None
    cols = rows.shape[1]
    edge = cols - cols % operand.block
    draws = None if bits is None else uniform(bits)
    pieces = []
    for low, high, length in ((0, edge, operand.block), (edge, cols, cols - edge)):  # whole blocks, then the short one
        if low < high:
            u = None if draws is None else draws[:, low:high].unflatten(1, (-1, length))
            pieces.append(_blocks(rows[:, low:high].unflatten(1, (-1, length)), operand, u).flatten(1))
    return (pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)).reshape(x.shape)


def _blocks(x: Tensor, operand: Operand, u: Tensor | None) -> Tensor:
    """Blocks [..., n]: take the outliers out, quantize the rest, put them back."""
    kept: list[tuple[Tensor, Tensor]] = []
    if operand.outliers:
        magnitude, x = x.abs(), x.clone()
        # One masked maximum per outlier, not topk, which is slow on a CPU for many short blocks. Of equal magnitudes
        # the first is taken; topk may take others, which can show in the last bit of what is left.
        for _ in range(min(operand.outliers, x.shape[-1])):
            where = magnitude.argmax(-1, keepdim=True)
            kept.append((where, x.gather(-1, where)))
            magnitude.scatter_(-1, where, -1.0)
            x.scatter_(-1, where, 0.0)
    fmt = operand.spec
    values = RELEASED[str(operand.format)].values(x) if fmt is None else _values(fmt, x, u)
    for where, exact in kept:
        values.scatter_(-1, where, exact)
    return values


def _values(fmt: Format, x: Tensor, u: Tensor | None) -> Tensor:
    """decode(encode(x)), by arithmetic where the grid allows."""
    uniform_step = _uniform_step(fmt)
    if u is not None or (uniform_step is None and not _is_e2m1(fmt)):
        return codec.decode(fmt, codec.encode(fmt, x, u))
    scale = codec.derive_scale(fmt, x.abs().amax(-1)).unsqueeze(-1)
    unit = x * codec.reciprocal(scale)
    if uniform_step is None:
        return _round_e2m1(unit).mul_(scale)
    # The scale sends no value beyond the top, so there is nothing to clamp.
    return (unit if uniform_step == 1 else unit.div_(uniform_step)).round_().mul_(uniform_step).mul_(scale)


def _uniform_step(fmt: Format) -> float | None:
    """The step of a signed uniform grid whose ties go to the even code, else None."""
    if fmt.kind == "integer" and fmt.signed and not fmt.square:
        return 1.0
    return 0.5 if fmt.sign_magnitude and fmt.table[:8] == _E1M2 and fmt.bits == 4 else None


def _is_e2m1(fmt: Format) -> bool:
    return fmt.sign_magnitude and fmt.table[:8] == _E2M1 and fmt.bits == 4


def _round_e2m1(unit: Tensor) -> Tensor:
    """Values in [-6, 6] to the nearest of 0 .5 1 1.5 2 3 4 6 and their negatives, ties to the even code.

    The step is half the power of two at or below the magnitude, held between 1/2 and 2. Adding 1.5 * 2**23 steps leaves
    fp32 no bits below one step, so the addition itself rounds, to nearest even; subtracting them is exact.
    """
    power = (unit.view(torch.int32) & 0x7F800000).view(torch.float32).clamp_(1.0, 4.0)
    shift = power.mul_(0.5 * 1.5 * 2.0**23)
    return (unit + shift).sub_(shift)
