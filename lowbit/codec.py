"""The torch arithmetic of formats: blocks of numbers to codes and back.

Everything here works on blocks: the last dimension of `x` holds values that share one scale. Where the blocks and the
packed codes of a tensor lie in memory is the business of `rows`. This is the reference that other backends must equal
bit for bit, so each step is a plain IEEE fp32 operation:

    scale = absmax / top (of sqrt(x) for square formats), at least 2**-126 unless the block is all zero
    u     = x * (1 / scale), one division per block
    code  = u rounded to the format's grid: nearest, or up when (u - low) >= (1 - U) * (high - low) for uniform U

A non-finite value makes its whole block NaN when decoded; optimizers never let it get that far.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from .compiler import constant
from .formats import TINY, Format
from .rounding import narrow
from .words import sqrt

# SOLO (https://arxiv.org/abs/2505.00347) puts the smallest level at this quantile of a block's live values.
LOG_QUANTILE = 0.1
ROOT_STEPS = 6


@constant
def _observed() -> bool:
    """Whether a mode watches operations: a compiler's fake tensors must not stay in a cache, nor meet real ones."""
    return torch._C._len_torch_dispatch_stack() > 0


def _tables(fmt: Format, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(value of each code, ladder values, ladder codes, thresholds) on a device."""
    return _made_tables.__wrapped__(fmt, device) if _observed() else _made_tables(fmt, device)


@lru_cache(maxsize=256)
def _made_tables(fmt: Format, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rungs, codes = zip(*fmt.ladder, strict=True)
    numbers = (fmt.values, rungs, fmt.thresholds)
    values, ladder, thresholds = (torch.tensor(t, dtype=torch.float32, device=device) for t in numbers)
    return values, ladder, torch.tensor(codes, dtype=torch.uint8, device=device), thresholds


def decode(fmt: Format, parts: dict[str, Tensor]) -> Tensor:
    """Codes [..., block] (one per byte) and scales [...] to fp32 values [..., block]."""
    codes = parts["codes"]
    if fmt.kind == "float":
        return codes.float()
    scale = parts["scale"]
    if fmt.kind == "affine":
        return (codes.float() - parts["zero"].float().unsqueeze(-1)) * scale.unsqueeze(-1)
    if fmt.kind == "log":
        levels = _levels(parts["base"], 1 << fmt.bits)
        return torch.gather(levels, -1, codes.long()) * scale.unsqueeze(-1)
    return values(fmt, codes, scale)


def values(fmt: Format, codes: Tensor, multiplier: Tensor) -> Tensor:
    """Codes [..., block] times one fp32 number per block: fp32 [..., block]. For formats with fixed values."""
    if fmt.kind == "integer" and fmt.signed:
        sign = 1 << (fmt.bits - 1)
        units = ((codes ^ sign).to(torch.int16) - sign).float()
    elif fmt.kind == "integer":
        units = codes.float()
    else:
        units = _tables(fmt, codes.device)[0][codes.int()]
    scaled = units * multiplier.unsqueeze(-1)
    return scaled * scaled if fmt.square else scaled


def encode(
    fmt: Format,
    x: Tensor,
    uniform: Tensor | None = None,
    *,
    live: bool = False,
    scale: Tensor | None = None,
    bits: Tensor | None = None,
) -> dict[str, Tensor]:
    """fp32 values [..., block] to parts: codes [..., block] (uint8, one per byte), scale [...], and what else there is.

    Args:
        fmt: the format; for float kinds the only part is `codes`, in the format's dtype.
        x: fp32 values; padding must be 0, which never changes a scale.
        uniform: numbers in (0, 1) like x for stochastic rounding (unbiased in the value, also for square formats);
            None rounds to nearest.
        live: x is non-negative and a value above 0 must not become 0 (second moments). Always so for unsigned formats.
        scale: use these scales instead of deriving them; values beyond the top saturate.
        bits: 16 random bits per value, for stochastic rounding of the float kinds.
    """
    if fmt.kind == "float":
        assert fmt.dtype is not None
        return {"codes": _kept_alive(narrow(x, fmt.dtype, bits), x) if live else narrow(x, fmt.dtype, bits)}
    if scale is not None and fmt.kind in ("log", "affine"):
        raise ValueError(f"format {fmt.name!r} derives its own scales; scale= cannot be given")
    if fmt.kind == "log":
        return _encode_log(fmt, x, uniform)
    if fmt.kind == "affine":
        return _encode_affine(fmt, x, uniform, live)
    root = sqrt(x) if fmt.square else x
    if scale is None:
        scale = derive_scale(fmt, root.abs().amax(-1))
    codes = nearby(fmt, root, reciprocal(scale), uniform)
    if live or not fmt.signed:
        codes = _keep_alive(fmt, codes, x)
    return {"codes": codes, "scale": scale}


def nearby(fmt: Format, x: Tensor, inverse: Tensor, uniform: Tensor | None = None) -> Tensor:
    """The codes of x [..., block] in units of one scale per block, given by its inverse; what is beyond saturates."""
    unit = (x * inverse.unsqueeze(-1)).nan_to_num(0.0)
    return (_integers if fmt.kind == "integer" else _search)(fmt, unit, uniform)


def derive_scale(fmt: Format, absmax: Tensor) -> Tensor:
    """absmax / top, held where its reciprocal and the top are finite; 0 for a block of zeros, NaN if not finite."""
    scale = (absmax / torch.full_like(absmax, fmt.top)).clamp(fmt.min_scale, fmt.max_scale)
    return torch.where(absmax == 0, 0.0, torch.where(torch.isfinite(absmax), scale, torch.nan))


def reciprocal(scale: Tensor) -> Tensor:
    """1 / scale, and 0 for a scale of 0 or NaN."""
    return torch.where(scale > 0, torch.ones_like(scale) / scale, 0.0)


def _integers(fmt: Format, unit: Tensor, uniform: Tensor | None) -> Tensor:
    if uniform is None:
        rounded = unit.round()
    else:
        low = unit.floor()
        if fmt.square:  # unbiased in the value: between low**2 and (low + 1)**2
            rounded = low + ((unit * unit - low * low) >= (1 - uniform) * (2 * low + 1))
        else:
            rounded = low + ((unit - low) >= (1 - uniform))
    least = -fmt.limit if fmt.signed else 0
    codes = rounded.clamp(least, fmt.limit).to(torch.int16) & ((1 << fmt.bits) - 1)
    return codes.to(torch.uint8)


def _search(fmt: Format, unit: Tensor, uniform: Tensor | None) -> Tensor:
    _, ladder, ladder_codes, thresholds = _tables(fmt, unit.device)
    u = (unit.abs() if fmt.sign_magnitude else unit).contiguous()
    if uniform is None:
        rank = torch.bucketize(u, thresholds, out_int32=True)
    else:
        rank = (torch.bucketize(u, ladder, right=True, out_int32=True) - 1).clamp(0, len(ladder) - 2)
        low, high = ladder[rank], ladder[rank + 1]
        rank = rank + ((u - low) >= (1 - uniform) * (high - low)).int()
    codes = ladder_codes[rank]
    if fmt.sign_magnitude:
        codes = codes | (torch.signbit(unit).to(torch.uint8) << (fmt.bits - 1))
    return codes


def _kept_alive(narrowed: Tensor, x: Tensor) -> Tensor:
    """The same for 16-bit floats: the smallest subnormal."""
    least = torch.ones((), dtype=torch.int16 if narrowed.itemsize == 2 else torch.int32, device=x.device)
    return torch.where((x > 0) & (narrowed == 0), least.view(narrowed.dtype), narrowed)


def _keep_alive(fmt: Format, codes: Tensor, x: Tensor) -> Tensor:
    """A value above 0 gets at least the smallest positive code: dividing by the root of a lost value would explode."""
    if fmt.zero_code is None:
        return codes
    least = next(code for value, code in fmt.ladder if value > 0)
    if not fmt.signed:
        return torch.where(x > 0, codes.clamp(min=least), codes)
    at_most_zero = _tables(fmt, codes.device)[0][codes.int()] <= 0
    return torch.where((x > 0) & at_most_zero, torch.full_like(codes, least), codes)


def _encode_affine(fmt: Format, x: Tensor, uniform: Tensor | None, live: bool) -> dict[str, Tensor]:
    """The range always holds 0: without that, a block of one sign saturates (AWQ's formula, as released)."""
    low, high = x.amin(-1).clamp(max=0), x.amax(-1).clamp(min=0)
    span = high - low
    scale = derive_scale(fmt, span)
    overflow = torch.isinf(span) & torch.isfinite(low) & torch.isfinite(high)
    scale = torch.where(overflow, high / fmt.limit - low / fmt.limit, scale)
    inverse = reciprocal(scale)
    zero = (-low * inverse).round().nan_to_num(0.0).clamp(0, fmt.limit)
    unit = (x * inverse.unsqueeze(-1)).nan_to_num(0.0)
    rounded = unit.round() if uniform is None else unit.floor() + ((unit - unit.floor()) >= (1 - uniform))
    codes = (rounded + zero.unsqueeze(-1)).clamp(0, fmt.limit)
    if live:
        codes = torch.where(x > 0, codes.maximum(zero.unsqueeze(-1) + 1), codes)
    return {"codes": codes.to(torch.uint8), "scale": scale, "zero": zero.to(torch.uint8)}


def _root(x: Tensor, n: int) -> Tensor:
    """The n-th root of float64 numbers in (0, 1], within 2 ulp for n = 3 and 15, by IEEE operations alone.

    `pow` is a library's own business. The bits of a float are nearly its logarithm: dividing their distance from those
    of 1 by n (an int64 division, rounding down) gives 4 good bits, and each Newton step doubles them.
    """
    one = 1023 << 52
    y = (one + torch.div(x.view(torch.int64) - one, n, rounding_mode="floor")).view(torch.float64)
    divisor = torch.full_like(x, n)
    for _ in range(ROOT_STEPS):
        power = y
        for _ in range(n - 2):  # y ** (n - 1), from left to right
            power = power * y
        y = y - (y - x / power) / divisor
    return y


def _levels(base: Tensor, count: int) -> Tensor:
    """1, base, base**2 … by repeated multiplication, which every machine rounds alike."""
    levels = [torch.ones_like(base)]
    for _ in range(count - 1):
        levels.append(levels[-1] * base)
    return torch.stack(levels, -1)


def _encode_log(fmt: Format, x: Tensor, uniform: Tensor | None) -> dict[str, Tensor]:
    """SOLO's levels absmax * base**k, the lowest at the 0.1 quantile of the block's values above 0.

    Differs from the paper where it leaves a hole: zeros do not count for the quantile (they would make the base 0), and
    rounding, nearest or stochastic, is in the value rather than in its logarithm.
    """
    count = 1 << fmt.bits
    scale = derive_scale(fmt, x.amax(-1))
    ordered = x.sort(-1).values
    alive = (x > 0).sum(-1)
    rank = x.shape[-1] - alive + ((alive - 1).clamp(min=0) * LOG_QUANTILE).long()
    low = torch.gather(ordered, -1, rank.clamp(max=x.shape[-1] - 1).unsqueeze(-1)).squeeze(-1)
    ratio = (low.double() / scale.double()).clamp(TINY, 1.0)
    base = torch.where(scale == 0, 1.0, _root(ratio, count - 1)).float()
    levels = _levels(base, count)
    unit = x * reciprocal(scale).unsqueeze(-1)
    codes = torch.zeros_like(x, dtype=torch.uint8)
    for k in range(count - 1):
        high, low_level = levels[..., k : k + 1], levels[..., k + 1 : k + 2]
        gap = high - low_level
        up = (unit - low_level) > gap * 0.5 if uniform is None else (unit - low_level) >= (1 - uniform) * gap
        codes += ~up
    return {"codes": codes, "scale": scale, "base": base}
