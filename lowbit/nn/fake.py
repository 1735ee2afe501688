"""An operand of a matmul: the values that its codes stand for, and the codes where they are kept.

What the values are is said by `codec` (and `stablespam`, `eden`); how they are made is a backend's business. A rotation
comes first; outliers are taken out before and put back after.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends
from ..backends.reference_matrix import blocks, joined
from ..rotation import Rotation
from ..rows import unpack
from .operand import Operand
from .stablespam import RELEASED

Noise = tuple[int, int]  # the key of an operand's random bits


def fake_quantize(
    x: Tensor,
    operand: Operand | None,
    noise: Noise | None = None,
    rotation: Rotation | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The matrix `x` as the operand's format would hold it, blocks along its rows (`x` itself if None).

    Args:
        x: a matrix of any float dtype.
        operand: its own `hadamard` is not looked at.
        noise: the key of the random bits, needed where the operand does not round to nearest.
        rotation: of the rows, before they are rounded.
        dtype: what the result, computed in fp32, is rounded to; where no format holds it, it stays as it is.
    """
    if operand is None or x.numel() == 0:
        return turned(x, rotation)
    if operand.rounding == "eden":
        return quantized(x, operand, noise, rotation, dtype=dtype)[0]
    if operand.outliers or operand.flat or operand.spec is None:
        return _with_outliers(turned(x, rotation), operand, noise).to(dtype)
    x, noise = _zeros_appended(x, rotation), noise if operand.rounding == "stochastic" else None
    return backends.fake(operand.spec, x, noise, rotation=rotation, dtype=dtype)


def encode(
    x: Tensor, operand: Operand, noise: Noise | None = None, rotation: Rotation | None = None
) -> dict[str, Tensor]:
    """The parts of `x` in the operand's format, which `decode` gives the values of `fake_quantize` for, bit for bit.

    Empty where no codes hold them: outliers stay exact, flat groups cross rows, an empty matrix has no blocks.
    """
    if operand.codes is None or x.numel() == 0:
        return {}
    x, noise = _zeros_appended(x, rotation), noise if operand.rounding != "nearest" else None
    return backends.encode(operand.codes, x, noise, rotation=rotation, run=_run(operand))


def quantized(
    x: Tensor,
    operand: Operand,
    noise: Noise | None = None,
    rotation: Rotation | None = None,
    edge: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, dict[str, Tensor]]:
    """(`fake_quantize`, `encode`) in one pass; with an edge, and the part `inside` (see `backends.quantized`)."""
    if operand.codes is None or x.numel() == 0:
        return fake_quantize(x, operand, noise, rotation, dtype), {}
    x, noise = _zeros_appended(x, rotation), noise if operand.rounding != "nearest" else None
    return backends.quantized(operand.codes, x, noise, rotation=rotation, dtype=dtype, run=_run(operand), edge=edge)


def _run(operand: Operand) -> int:
    """How many values share a correction."""
    return operand.hadamard if operand.rounding == "eden" else 0


def decode(parts: dict[str, Tensor], operand: Operand, cols: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The inverse of `encode`: [rows, cols], computed in fp32 and then rounded to `dtype`."""
    codes = parts["codes"]
    assert operand.codes is not None
    traced = torch.compiler.is_compiling() or codes.is_meta or type(codes) is not Tensor
    return (backends.reference if traced else backends).decode(operand.codes, parts, cols, dtype)


def turned(x: Tensor, rotation: Rotation | None) -> Tensor:
    """A matrix rotated along its rows, in fp32 (`x` itself if None), with zeros appended up to a multiple of the size.

    Zeros in both operands add nothing to their product, and a rotation of both changes none.
    """
    return x if rotation is None else backends.rotate(_zeros_appended(x, rotation), rotation)


def turned_back(x: Tensor, rotation: Rotation | None, cols: int, mask: Tensor | None = None) -> Tensor:
    """The inverse of `turned` of a matrix of `cols` columns, up to rounding; what a mask has no bit for is 0 before.

    The matrix may be overwritten.
    """
    if rotation is not None:
        return backends.rotate(x, rotation, back=True, mask=mask, own=True)[:, :cols]
    return x if mask is None else x * unpack(mask, 1, cols).to(x.dtype)


def padded(cols: int, rotation: Rotation | None) -> int:
    """How many columns `turned` makes of so many."""
    return cols if rotation is None else -(-cols // rotation.size) * rotation.size


def _zeros_appended(x: Tensor, rotation: Rotation | None) -> Tensor:
    more = padded(x.shape[1], rotation) - x.shape[1]
    return F.pad(x.detach(), (0, more)) if more else x


def _with_outliers(x: Tensor, operand: Operand, noise: Noise | None) -> Tensor:
    """Operands that no codes hold: largest magnitudes stay as they are, blocks of the flat tensor cross rows."""
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
        result = joined([values(block) for block in _blocks(rows.float().contiguous(), operand)])
    else:
        result = backends.fake(operand.spec, rows, noise if operand.rounding == "stochastic" else None)
    if taken:
        for block, (where, exact) in zip(_blocks(result, operand), taken, strict=True):
            block.scatter_(-1, where, exact)
    return result.reshape(x.shape)


def _blocks(rows: Tensor, operand: Operand) -> list[Tensor]:
    assert isinstance(operand.block, int)
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
