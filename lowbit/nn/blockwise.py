"""Products of MXFP8 and of NVFP4 codes, on matrix units that multiply block scales too: NVIDIA's from 10.0 on.

`torch.nn.functional.scaled_mm` takes codes and scales as they are stored here, but for two things. Scales come in tiles
of 128 rows and 4 columns, of which a row r has its place at 16 (r mod 32) + 4 (r div 32)
(https://docs.nvidia.com/cuda/cublas/index.html#d-block-scaling-factors-layout); and sizes must be whole tiles, so zeros
are appended. Products are exact and sums fp32; NVFP4's two scales of the tensors are multiplied with after them.

Nobody has run this on such a GPU yet: tests have it multiply on an emulation of the call, in float64.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..formats import Format
from ..rows import pack, unpack

if TYPE_CHECKING:
    from .matmul import Coded

Kind = Literal["mxfp8", "nvfp4"]
LEAST = (10, 0)  # compute capability
TILE = 128  # rows and, here, values along the contraction
RECIPES = {"mxfp8": "BlockWise1x32", "nvfp4": "BlockWise1x16"}


def kind_of(a: Format, b: Format, a_across: bool, b_across: bool, device: torch.device) -> Kind | None:
    """How two operands are multiplied, if a device has matrix units for them."""
    if device.type != "cuda" or not hasattr(F, "scaled_mm") or torch.cuda.get_device_capability(device) < LEAST:
        return None
    kind = _kind(a, a_across)
    both_wide = kind == "mxfp8" and _element(a) == _element(b) == torch.float8_e5m2  # which no matrix unit has
    return kind if kind == _kind(b, b_across) and not both_wide else None


def _kind(fmt: Format, across: bool) -> Kind | None:
    """Of one operand. Blocks along a row are of no use across; tiles are the same from either side."""
    way = fmt.scaling
    if way.stored == "e8m0" and way.headroom == 1 and fmt.bits == 8 and fmt.block == (1, 32) and not across:
        return "mxfp8"
    if way.stored == "e4m3" and way.peak and not way.outer and fmt.bits == 4 and fmt.top == 6:
        return "nvfp4" if fmt.block == (16, 16) or (fmt.block == (1, 16) and not across) else None
    return None


def _element(fmt: Format) -> torch.dtype:
    return torch.float8_e4m3fn if fmt.top == 448 else torch.float8_e5m2


def product(kind: Kind, a: Coded, b: Coded) -> Tensor:
    """a bᵀ of [m, k] and [n, k], fp32."""
    torch_f: Any = F
    recipe, swizzle = getattr(torch_f.ScalingType, RECIPES[kind]), torch_f.SwizzleType.SWIZZLE_32_4_4
    (x, x_scale), (w, w_scale) = tiled(kind, a), tiled(kind, b)
    y = torch_f.scaled_mm(
        x, w.t(), x_scale, recipe, w_scale, recipe, swizzle_a=swizzle, swizzle_b=swizzle, output_dtype=torch.float32
    )
    y = y[: _rows(a), : _rows(b)]
    return y * (a.parts["tensor_scale"] * b.parts["tensor_scale"]) if kind == "nvfp4" else y


def _rows(coded: Coded) -> int:
    return coded.cols if coded.across else len(coded.parts["codes"])


def tiled(kind: Kind, coded: Coded) -> tuple[Tensor, Tensor]:
    """(codes [rows, k], or two to an element for NVFP4; scales in the matrix unit's order), of whole tiles."""
    fmt, scale = coded.operand.codes, coded.parts["scale"]
    assert fmt is not None
    if fmt.block[0] > 1:  # a tile's scale is that of each of its rows; seen across, rows are columns
        scale = (scale.t() if coded.across else scale).repeat_interleave(fmt.block[0], 0)[: _rows(coded)]
    codes = unpack(coded.parts["codes"], fmt.bits, coded.cols)
    codes = _filled(codes.t() if coded.across else codes, TILE)
    scale = _filled(scale, codes.shape[1] // {"mxfp8": 32, "nvfp4": 16}[kind], exact=True)
    if kind == "mxfp8":
        return codes.contiguous().view(_element(fmt)), swizzled(scale).view(torch.float8_e8m0fnu)
    return pack(codes, fmt.bits).view(torch.float4_e2m1fn_x2), swizzled(scale).view(torch.float8_e4m3fn)


def _filled(x: Tensor, width: int, *, exact: bool = False) -> Tensor:
    """With zeros up to whole tiles of rows, and to a multiple of `width` columns, or to just so many."""
    rows, cols = x.shape
    return F.pad(x, (0, width - cols if exact else -cols % width, 0, -rows % TILE))


def swizzled(scale: Tensor) -> Tensor:
    """Scales [rows, columns] of whole tiles of 128 x 4, flat, in the order of the matrix unit."""
    rows, cols = scale.shape
    return scale.reshape(rows // TILE, 4, 32, cols // 4, 4).permute(0, 3, 2, 1, 4).flatten()
