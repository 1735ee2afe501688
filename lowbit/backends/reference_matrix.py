"""The reference backend's whole matrices: to codes, to what codes stand for, to both at once, and back."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import codec, eden
from ..formats import Format
from ..rotation import Rotation
from ..rotation import rotate as turn
from ..rotation import rotate_back as turn_back
from ..rounding import narrow, uniform
from ..rows import Measured, decode_rows, encode_rows, pack, row_bits, unpack
from ..scales import Coded, best


def takes(fmt: Format, live: bool = False) -> bool:
    """Whether this backend codes and decodes a format; `live` as for `encode`."""
    return True


def _turned(x: Tensor, rotation: Rotation | None) -> Tensor:
    return x if rotation is None else turn(_padded(x, rotation), rotation)


def _padded(x: Tensor, rotation: Rotation) -> Tensor:
    return F.pad(x, (0, rotation.padded(x.shape[1]) - x.shape[1]))


def measured(fmt: Format, x: Tensor, *, rotation: Rotation | None = None) -> Measured:
    """See `backends.measured`."""
    return Measured(fmt, _turned(x, rotation))


def encode(
    fmt: Format,
    x: Tensor,
    noise: tuple[int, int] | None = None,
    *,
    live: bool = False,
    rotation: Rotation | None = None,
    run: int = 0,
) -> dict[str, Tensor]:
    """See `backends.encode`."""
    if run:
        assert noise is not None
        return eden.encode(fmt, measured(fmt, x, rotation=rotation), noise, run)
    return encode_rows(fmt, _turned(x, rotation), noise, live=live)


def decode(fmt: Format, parts: dict[str, Tensor], cols: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """See `backends.decode`."""
    return decode_rows(fmt, parts, cols).to(dtype)


def quantized(
    fmt: Format,
    x: Tensor,
    noise: tuple[int, int] | None = None,
    *,
    rotation: Rotation | None = None,
    dtype: torch.dtype = torch.float32,
    run: int = 0,
    edge: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """See `backends.quantized`."""
    parts = encode(fmt, x, noise, rotation=rotation, run=run)
    values = decode(fmt, parts, rotation.padded(x.shape[1]) if rotation else x.shape[1], dtype)
    if edge is not None:
        parts["inside"] = inside(fmt, measured(fmt, x, rotation=rotation), edge)
    return values, parts


def inside(fmt: Format, blocks: Coded, edge: float) -> Tensor:
    """The part `inside` of a matrix."""
    return pack((blocks.units(best(fmt, blocks).inverse).abs() <= edge).to(torch.uint8), 1)


def rotate(
    x: Tensor,
    rotation: Rotation,
    *,
    back: bool = False,
    dtype: torch.dtype = torch.float32,
    mask: Tensor | None = None,
    own: bool = False,
) -> Tensor:
    """See `backends.rotate`."""
    if mask is not None:
        x = x * unpack(mask, 1, x.shape[1]).to(x.dtype)
    return (turn_back if back else turn)(_padded(x, rotation), rotation).to(dtype)


# ---- decode(encode(x)) without codes
#
# A layer needs no codes, and for uniform grids and E2M1 rounding to nearest is a few arithmetic operations, where the
# codec's search through the grid costs more time than the matmul it prepares. Tests hold the short cuts to the codec.


def fake(
    fmt: Format,
    x: Tensor,
    noise: tuple[int, int] | None = None,
    *,
    rotation: Rotation | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """See `backends.fake`."""
    x = _turned(x, rotation)
    if x.is_meta:
        return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    bits = None if noise is None else row_bits(noise, x)
    x = x.float().contiguous()
    if fmt.dtype is not None:
        return narrow(x, fmt.dtype, bits).to(torch.float32, copy=True).to(dtype)
    if x.numel() == 0:
        return x.to(dtype)
    if not fmt.plain:
        return decode(fmt, encode(fmt, x, noise), x.shape[1], dtype)
    pieces = blocks(x, fmt.block[1])
    draws = [None] * len(pieces) if bits is None else blocks(uniform(bits), fmt.block[1])
    return joined([_fake_blocks(fmt, piece, u) for piece, u in zip(pieces, draws, strict=True)]).to(dtype)


def blocks(x: Tensor, length: int) -> list[Tensor]:
    """The blocks along the rows of a matrix, as views [rows, n, length]: the whole ones, then the short last ones."""
    whole = x.shape[1] // length
    edge = whole * length
    pieces = [x[:, :edge].unflatten(1, (whole, length))] if whole else []
    return [*pieces, x[:, edge:].unsqueeze(1)] if edge < x.shape[1] else pieces


def joined(pieces: list[Tensor]) -> Tensor:
    """The inverse of `blocks`."""
    return torch.cat([piece.flatten(1) for piece in pieces], 1) if len(pieces) > 1 else pieces[0].flatten(1)


def _fake_blocks(fmt: Format, x: Tensor, u: Tensor | None) -> Tensor:
    rounded = _arithmetic(fmt)
    if u is not None or rounded is None:
        return codec.decode(fmt, codec.encode(fmt, x, u))
    scale = codec.derive_scale(fmt, x.abs().amax(-1)).unsqueeze(-1)
    # The scale sends no value beyond the top, so there is nothing to clamp.
    return rounded(x * codec.reciprocal(scale)).mul_(scale)


def _round_integer(unit: Tensor) -> Tensor:
    return unit.round_().add_(0.0)  # no code means -0


def _round_e1m2(unit: Tensor) -> Tensor:
    return unit.mul_(2.0).round_().mul_(0.5)


def _round_e2m1(unit: Tensor) -> Tensor:
    """Values in [-6, 6] to the nearest of 0 .5 1 1.5 2 3 4 6 and their negatives.

    The step is half the power of two at or below the magnitude, held between 1/2 and 2. Adding 1.5 * 2**23 steps leaves
    fp32 no bits below one step, so the addition itself rounds, to nearest even; subtracting them is exact.
    """
    power = (unit.view(torch.int32) & 0x7F800000).view(torch.float32).clamp_(1.0, 4.0)
    shift = power.mul_(0.5 * 1.5 * 2.0**23)
    return (unit + shift).sub_(shift).copysign_(unit)


_E1M2 = (0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5)
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_HALVES: dict[tuple[float, ...], Callable[[Tensor], Tensor]] = {_E1M2: _round_e1m2, _E2M1: _round_e2m1}


def _arithmetic(fmt: Format) -> Callable[[Tensor], Tensor] | None:
    """What rounds units of the scale to a format's grid, ties to the even code; None where it takes a search."""
    if fmt.kind == "integer" and fmt.signed and not fmt.square:
        return _round_integer
    return _HALVES.get(fmt.table[:8]) if fmt.sign_magnitude and fmt.bits == 4 and fmt.ties == "even" else None
