"""Formats with scales of their own against torchao and bitsandbytes, to the last bit."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lowbit import rows
from lowbit.formats import Rounding, Scaling, format

pytestmark = pytest.mark.rivals


def ordinary(shape: tuple[int, int] = (64, 512), seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def wide(shape: tuple[int, int] = (64, 512), seed: int = 1, spread: float = 3.0) -> Tensor:
    """Blocks of 16 whose magnitudes are e**(3N): the largest is a billion times the smallest."""
    g = torch.Generator().manual_seed(seed)
    each = torch.exp(spread * torch.randn(shape[0], shape[1] // 16, generator=g)).repeat_interleave(16, 1)
    return ordinary(shape, seed) * each


def edges(top: float) -> Tensor:
    """Blocks of 32 whose largest magnitude is at, just above and just below where rules change their mind."""
    turns = torch.tensor([1.0, 1.25, 1.5, 1.75, top, top * 1.0625, 1.9375, 1.875, 1.96875, 1.125])
    turns = torch.cat([turns, torch.nextafter(turns, turns * 2), torch.nextafter(turns, turns * 0)])
    turns = (turns * 2.0 ** torch.arange(-100, 101, 20).view(-1, 1)).flatten()
    return ordinary((len(turns), 32), 2).clamp(-1, 1) / 3 * turns[:, None] + torch.eye(1, 32) * turns[:, None]


def with_zeros(x: Tensor) -> Tensor:
    x = x.clone()
    x[0] = 0.0
    x[1, 32:64], x[2, :16], x[3, 5] = 0.0, -0.0, -0.0
    return x


def mx_types() -> dict:
    from torchao.prototype.mx_formats.constants import DTYPE_FP6_E2M3, DTYPE_FP6_E3M2

    floats = {"mxfp4": torch.float4_e2m1fn_x2, "mxfp8": torch.float8_e4m3fn, "mxfp8-e5m2": torch.float8_e5m2}
    return {**floats, "mxfp6-e2m3": DTYPE_FP6_E2M3, "mxfp6-e3m2": DTYPE_FP6_E3M2}


@pytest.mark.parametrize("rounding", ["floor", "ceil", "even", "up"])
@pytest.mark.parametrize("name", ["mxfp4", "mxfp8", "mxfp8-e5m2", "mxfp6-e2m3", "mxfp6-e3m2"])
def test_mx_is_torchaos_in_every_mode(name: str, rounding: Rounding):
    from torchao.prototype.mx_formats.mx_tensor import ScaleCalculationMode, to_dtype, to_mx

    mode = ScaleCalculationMode[{"up": "rceil"}.get(rounding, rounding).upper()]
    fmt = replace(format(name), scaling=Scaling("e8m0", rounding=rounding))
    data = {
        "ordinary": ordinary(),
        "wide": with_zeros(wide()),
        "edges": edges(fmt.top),
        "tiny": wide(spread=20) * 1e-18,
    }
    for what, x in data.items():
        if rounding == "up":  # their log2 does not see an ulp above a power of two; the hardware they stand for does
            x = x[((x.view(len(x), -1, 32).abs().amax(-1) / fmt.top).view(torch.int32) & 0x7FFFFF != 1).all(1)]
        cols = x.shape[1]
        scale, codes = to_mx(x, mx_types()[name], 32, mode)
        parts = rows.encode_rows(fmt, x)
        assert torch.equal(parts["scale"], scale.view(torch.uint8)), what
        # A scale of 2**-127 is encoded with 2**-126 there (with 1 by RCEIL), and decoded with 2**-127.
        sure = (parts["scale"] > 0).repeat_interleave(32, 1) | (x == 0)
        theirs = codes.view(torch.uint8)
        theirs = rows.unpack(theirs, 4, cols) if fmt.bits == 4 else theirs  # FP6 comes one to a byte
        assert torch.equal(rows.unpack(parts["codes"], fmt.bits, cols)[sure], theirs[sure]), what
        back = to_dtype(codes, scale, mx_types()[name], 32, torch.float32)
        assert torch.equal(rows.decode_rows(fmt, parts, cols)[sure], back[sure]), what


@pytest.mark.parametrize("name", ["mxfp4", "mxfp4-ceil", "mxfp4-even", "mxfp4-rceil", "mxfp8"])
def test_packed_bytes_are_torchaos(name: str):
    from torchao.prototype.mx_formats.mx_tensor import ScaleCalculationMode, to_mx

    mode = ScaleCalculationMode[(name.partition("-")[2] or "floor").upper()]
    x = wide()
    scale, codes = to_mx(x, mx_types()[name.partition("-")[0]], 32, mode)
    parts = rows.encode_rows(format(name), x)
    assert torch.equal(parts["codes"], codes.view(torch.uint8))
    assert torch.equal(parts["scale"], scale.view(torch.uint8))


def test_nvfp4_is_torchaos():
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, nvfp4_quantize, per_tensor_amax_to_scale

    fmt, one_level = format("nvfp4"), replace(format("nvfp4"), scaling=Scaling("e4m3", least=2.0**-6))
    for x in (ordinary(), with_zeros(wide()), wide(spread=8), edges(6.0)[:300], ordinary() * 1e-30):
        whole = per_tensor_amax_to_scale(x.abs().max())
        scale, codes = nvfp4_quantize(x, 16, whole)
        parts = rows.encode_rows(fmt, x)
        assert torch.equal(parts["tensor_scale"], whole.view(1))
        assert torch.equal(parts["scale"], scale.view(torch.uint8))
        assert torch.equal(parts["codes"], codes.view(torch.uint8))
        back = NVFP4Tensor.to_nvfp4(x, 16, per_tensor_scale=whole).dequantize(torch.float32)
        assert torch.equal(rows.decode_rows(fmt, parts, x.shape[1]), back)
        scale, codes = nvfp4_quantize(x, 16)
        parts = rows.encode_rows(one_level, x)
        assert set(parts) == {"codes", "scale"}
        assert torch.equal(parts["scale"], scale.view(torch.uint8)) and torch.equal(
            parts["codes"], codes.view(torch.uint8)
        )


def test_int8_rows_are_torchaos():
    from torchao.prototype.quantized_training.int8 import quantize_int8_rowwise

    for x in (ordinary(), with_zeros(wide())):
        codes, scale = quantize_int8_rowwise(x)
        parts = rows.encode_rows(format("int8:row"), x)
        assert torch.equal(parts["scale"].flatten(), scale) and torch.equal(parts["codes"].view(torch.int8), codes)


def even_absmax(shape: tuple[int, int]) -> Tensor:
    """Values whose blocks of 64 have a largest magnitude on a coarse grid, so that its mean is exact in fp32."""
    x = ordinary(shape, 5).clamp(-2.9, 2.9)
    g = torch.Generator().manual_seed(6)
    largest = 3 + torch.randint(0, 64, (shape[0], shape[1] // 64), generator=g) / 64
    x.view(shape[0], -1, 64)[..., 7] = largest
    return x


def test_double_quantization_is_bitsandbytes():
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    fmt, byte = format("nf4-dq"), format("dyn8")
    even = [even_absmax((128, 512)), even_absmax((8, 1024))]
    for k, x in enumerate([*even, ordinary((128, 512)), wide((128, 512))]):
        theirs, state = quantize_4bit(x, blocksize=64, quant_type="nf4", compress_statistics=True)
        parts = rows.encode_rows(fmt, x)
        swapped = (parts["codes"] << 4) | (parts["codes"] >> 4)  # bitsandbytes: element 0 in the high nibble
        assert torch.equal(swapped.flatten(), theirs.flatten())
        absmax = x.view(-1, 64).abs().amax(-1)
        # Their fp32 mean of an uneven sum may be an ulp away: ours is the float64 sum, rounded once.
        assert abs(float(parts["scale_offset"]) - float(state.offset)) <= 2**-23 * float(absmax.mean())
        if k < len(even):
            assert torch.equal(parts["scale_offset"], state.offset.view(1))
            assert torch.equal(parts["scale_scale"], state.state2.absmax)
            # float64 takes their generic formula. fp32 takes a table that misses the nearest code now and then.
            apart = (absmax - state.offset).double()
            codes, _ = torch.ops.bitsandbytes.quantize_blockwise(apart, torch.tensor(byte.values), 256)
            assert torch.equal(parts["scale"].flatten(), codes)
            assert (parts["scale"].flatten() != state.absmax).float().mean() < 0.01
        # Whatever codes they chose, we decode them as they do.
        read = {
            "codes": parts["codes"], "scale": state.absmax.view(parts["scale"].shape),
            "scale_scale": state.state2.absmax, "scale_offset": state.offset.view(1),
        }  # fmt: skip
        assert torch.equal(rows.decode_rows(fmt, read, x.shape[1]), dequantize_4bit(theirs, state))
    assert math.isclose(fmt.bytes_per_value * 8, 4.127, abs_tol=1e-4)
