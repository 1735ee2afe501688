"""How the low bits of a bf16 or fp16 parameter are kept: the `master=` argument of every optimizer.

An optimizer computes in fp32. What it writes to a 16-bit parameter loses 16 (or 13) bits; a companion tensor can keep
them. Each scheme is a pair: `load` (parameter, companion) -> fp32 and `store` fp32 -> (parameter, companion).

    none      no companion: the parameter is rounded, stochastically unless told otherwise      0 bytes/parameter
    split8    the error in 1/127 of half an ulp, int8: about 24 bits in all (FlashOptim)        1
    split16   the error exactly: bf16 and int16 are the fp32 bits, cut in two                    2
    kahan     the error in the parameter's own dtype (compensated summation)                    2
    fp32      a full fp32 copy                                                                   4

With a companion the parameter is rounded to nearest. If somebody else writes to the parameter (loads weights), the
fp32 copy is ignored wherever it no longer rounds to the parameter; the other companions are off by half an ulp at most.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .rounding import narrow

MASTERS = ("none", "split8", "split16", "kahan", "fp32")


def companion_dtype(master: str, dtype: torch.dtype) -> torch.dtype | None:
    """The companion's dtype, or None: fp32 parameters have nothing to keep."""
    if master == "none" or dtype == torch.float32:
        return None
    return {"split8": torch.int8, "split16": torch.int16, "kahan": dtype, "fp32": torch.float32}[master]


def _half_ulp(p: Tensor) -> Tensor:
    """Half the distance between neighbours of a 16-bit number, as fp32; a power of two."""
    mantissa, least = (7, -126) if p.dtype == torch.bfloat16 else (10, -14)
    exponent = torch.frexp(p.float()).exponent - 1  # |p| in [2**exponent, 2**(exponent + 1))
    exponent = torch.where(p == 0, least, exponent).clamp(min=least)
    return torch.ldexp(torch.ones_like(exponent, dtype=torch.float64), exponent - mantissa - 1).float()


def load(master: str, p: Tensor, companion: Tensor | None) -> Tensor:
    """The fp32 value that a stored parameter and its companion stand for."""
    if companion is None:
        return p.float()
    if master == "fp32":
        return torch.where(companion.to(p.dtype) == p, companion, p.float())
    if master == "kahan":  # more than half an ulp belongs to what the parameter was before somebody else wrote to it
        error = companion.float()
        return p.float() + torch.where(error.abs() <= _half_ulp(p), error, 0.0)
    if master == "split16" and p.dtype == torch.bfloat16:
        low = torch.where((p == 0) & (companion < 0), 0, companion.int())  # below the bits of 0 are those of NaNs
        return (p.float().view(torch.int32) + low).view(torch.float32)
    steps = 127 if master == "split8" else 2**13
    return p.float() + companion.float() / steps * _half_ulp(p)


def store(master: str, value: Tensor, dtype: torch.dtype, bits: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """What to write for an fp32 value: (parameter, companion)."""
    if companion_dtype(master, dtype) is None:
        return narrow(value, dtype, bits), None
    if master == "split16" and dtype == torch.bfloat16:
        raw = torch.where(value == value, value.view(torch.int32), 0x7FC00000)  # no NaN carries into the sign
        high = (raw + 0x8000) & ~0xFFFF  # ties go up, so that what is left fits int16
        return high.view(torch.float32).to(dtype), (raw - high).to(torch.int16)
    p = value.to(dtype)
    error = value - p.float()
    if master == "fp32":
        return p, value
    if master == "kahan":
        return p, error.to(dtype)
    steps, kind = (127, torch.int8) if master == "split8" else (2**13, torch.int16)
    share = (error / _half_ulp(p)).nan_to_num(0.0).clamp(-1, 1)
    return p, (share * steps).round().to(kind)
