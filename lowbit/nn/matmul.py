"""Where two operands are multiplied: as the values that codes stand for, or as codes, where a matrix unit takes them.

As values, unless `LOWBIT_MATMUL=codes` asks for codes. On a CPU that is always in fp32 (float64 for float64 models):
matrix units for bf16 and int8 are rare there, and without them torch's bf16 matmul took 6 times and `torch._int_mm` 26
times as long as fp32 on an EPYC with AVX2 (512 x 1024 x 1024, one thread, torch 2.13). On NVIDIA GPUs codes should be
faster (torchao measured 17,000 to 29,000 tokens a second from int8 and 10 to 25 per cent from fp8:
https://github.com/pytorch/ao, READMEs of quantized_training and float8), but nobody has measured these layers there, so
they are not the default: time your model with and without.

`torch._int_mm` sums products of int8 codes exactly (from compute capability 8.0 on), `torch._scaled_mm` those of fp8
codes in fp32 (8.9); the blocks' scales come after, so blocks must be whole rows or the whole tensor. MXFP8 and NVFP4
codes are multiplied with their block scales (10.0: `blockwise`). All give the product of the values up to the rounding
of fp32 sums (tests hold them to 1e-5 of the largest result). What has no such kernel is multiplied as values.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import scales
from ..compiler import constant
from ..formats import Format
from ..rows import unpack
from . import blockwise
from .fake import decode
from .operand import Operand

Kind = Literal["int8", "fp8", "mxfp8", "nvfp4"]
FP8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
LEAST = {"int8": (8, 0), "fp8": (8, 9)}  # compute capability
TILE = 16  # on a GPU, what the sizes of codes must be multiples of


@dataclass(frozen=True)
class Coded:
    """An operand as codes: a matrix whose rows have `cols` values, or its transpose if `across`."""

    operand: Operand
    parts: dict[str, Tensor]
    cols: int
    across: bool = False

    def values(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """What the codes stand for, rounded once."""
        found = decode(self.parts, self.operand, self.cols, dtype)
        return found.t() if self.across else found

    def t(self) -> Coded:
        """The transpose."""
        return Coded(self.operand, self.parts, self.cols, not self.across)


def product(a: Tensor | Coded, b: Tensor | Coded, dtype: torch.dtype, bias: Tensor | None = None) -> Tensor:
    """a bᵀ + bias of [m, k] and [n, k], in `dtype`."""
    if isinstance(a, Coded) and isinstance(b, Coded) and (kind := multiplied_as(a, b)):
        y = _of_codes(kind, a, b)
        return (y if bias is None else y + bias).to(dtype)
    device = (a.parts["codes"] if isinstance(a, Coded) else a).device
    inside = multiplied_in(device, dtype)
    a, b = (v.values(inside) if isinstance(v, Coded) else v for v in (a, b))
    with torch.autocast(device.type, enabled=False) if has_autocast(device.type) else nullcontext():
        return F.linear(a.to(inside), b.to(inside), None if bias is None else bias.to(inside)).to(dtype)


def multiplied_in(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The dtype of the values in a product that is to have this dtype: what makes values may round them at once."""
    return torch.float32 if device.type == "cpu" and dtype != torch.float64 else dtype


def multiplied_as(a: Coded, b: Coded) -> Kind | None:
    """How these two are multiplied as codes; None where they are not."""
    return kind_of(a.operand, b.operand, a.parts["codes"].device, a.across, b.across)


def kind_of(
    a: Operand | None, b: Operand | None, device: torch.device, a_across: bool = False, b_across: bool = False
) -> Kind | None:
    """How operands [m, k] and [n, k] are multiplied as codes on a device, if they are asked to be and can be.

    Raises `ValueError` if `LOWBIT_MATMUL` is none of auto, codes and values.
    """
    mode = os.environ.get("LOWBIT_MATMUL", "") or "auto"
    if mode not in ("auto", "codes", "values"):
        raise ValueError(f"LOWBIT_MATMUL={mode!r}: it may be codes, or values, which is what auto means")
    if mode != "codes" or a is None or b is None or a.codes is None or b.codes is None:
        return None
    if not (_scaled_after(a.codes, a_across) and _scaled_after(b.codes, b_across)):
        return blockwise.kind_of(a.codes, b.codes, a_across, b_across, device)
    kind: Kind | None = None
    if a.codes.kind == b.codes.kind == "integer":
        kind = "int8"
    elif (one := _fp8(a.codes)) and (two := _fp8(b.codes)) and (one, two) != (torch.float8_e5m2,) * 2:
        kind = "fp8"
    too_old = kind and device.type == "cuda" and torch.cuda.get_device_capability(device) < LEAST[kind]
    return None if too_old else kind


def _scaled_after(fmt: Format, across: bool) -> bool:
    """Whether scales can be multiplied with after the sum: one for each row (or for all) of what is summed along."""
    if fmt.scaling.stored not in ("fp32", "bf16"):
        return False
    return fmt.block == (0, 0) or (fmt.block == (1, 0) and not across)


def _fp8(fmt: Format) -> torch.dtype | None:
    return FP8.get(fmt.name.partition(":")[0])


def _of_codes(kind: Kind, a: Coded, b: Coded) -> Tensor:
    if kind == "mxfp8" or kind == "nvfp4":
        return blockwise.product(kind, a, b)
    (first, x), (second, w) = _codes(a), _codes(b)
    m, n = x.shape[0], w.shape[0]
    if x.device.type == "cuda":
        x, w = _filled(x, 2 * TILE), _filled(w, TILE)
    if kind == "int8":
        sums = torch._int_mm(x, w.t()).float()  # pyright: ignore
    else:
        one = torch.ones((), dtype=torch.float32, device=x.device)
        sums = torch._scaled_mm(x, w.t(), one, one, out_dtype=torch.float32)  # pyright: ignore
    return sums[:m, :n] * first * second.t()


def _filled(codes: Tensor, least: int) -> Tensor:
    """With rows and columns of zeros up to what a GPU takes: whole tiles, at least so many rows."""
    rows, cols = codes.shape
    down, across = max(least, rows + -rows % TILE) - rows, -cols % TILE
    return F.pad(codes.view(torch.uint8), (0, across, 0, down)).view(codes.dtype) if down or across else codes


def _codes(coded: Coded) -> tuple[Tensor, Tensor]:
    """(fp32 scales [rows, 1] or [1, 1], codes one per element in a dtype that torch multiplies)."""
    fmt = coded.operand.codes
    assert fmt is not None
    codes = unpack(coded.parts["codes"], fmt.bits, coded.cols)
    if fmt.kind == "integer":
        sign = 1 << (fmt.bits - 1)
        codes = codes.view(torch.int8) if fmt.bits == 8 else ((codes ^ sign).to(torch.int8) - sign)
    else:
        dtype = _fp8(fmt)
        assert dtype is not None
        codes = codes.view(dtype)
    return scales.multiplier(fmt, coded.parts), (codes.t() if coded.across else codes).contiguous()


@constant  # compilers before torch 2.13 do not trace the question
def has_autocast(device: str) -> bool:
    """Whether torch has autocast for a kind of device."""
    return torch.amp.is_autocast_available(device)
