"""Formats whose scales or blocks are not plain: any shape, any number, published errors, stochastic rounding."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import lowbit
from lowbit import backends, codec, rows, scales
from lowbit.blocks import matrix, tiles
from lowbit.formats import PLAIN, Format, format, formats
from lowbit.rounding import key, uniform

SCALED = [fmt for fmt in map(format, formats()) if fmt.compressed and fmt.scaling != PLAIN]
NAMES = ("int8:row", "int4:tensor", "e2m1:16x16", "int4-affine:16x16", "e2m3", "e3m2:3", "nf4:4x0")
BLOCKY = [format(name) for name in NAMES]
every = pytest.mark.parametrize("fmt", [*SCALED, *BLOCKY], ids=str)
every_scaled = pytest.mark.parametrize("fmt", SCALED, ids=str)
INF, NAN = math.inf, math.nan
ALL_U = uniform(torch.arange(1 << 16, dtype=torch.int32))


def ordinary(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def wide(shape: tuple[int, int], seed: int = 1, spread: float = 3.0) -> Tensor:
    """Every 16 columns of every row have a magnitude of their own, e**(3N)."""
    each = torch.exp(spread * ordinary((shape[0], -(-shape[1] // 16)), seed + 1)).repeat_interleave(16, 1)
    return ordinary(shape, seed) * each[:, : shape[1]]


def round_trip(fmt: Format, x: Tensor, noise: tuple[int, int] | None = None) -> Tensor:
    return rows.decode_rows(fmt, rows.encode_rows(fmt, x, noise), x.shape[1])


def measured(fmt: Format, x: Tensor) -> Tensor:
    return scales.statistic(fmt, scales.Tiles(fmt, x))


def relative_error(fmt: Format, x: Tensor) -> float:
    return float((round_trip(fmt, x) - x).double().square().sum() / x.double().square().sum())


# ---- everything that can be odd


SHAPES = [(0, 0), (0, 5), (3, 0), (1, 1), (1, 5461), (17, 33), (16, 16), (5, 300), (33, 1)]


@every
def test_any_shape_has_the_parts_it_declares_and_comes_back(fmt: Format):
    for shape, noise in ((shape, noise) for shape in SHAPES for noise in (None, key(1, 2, 3, 4))):
        x = wide(shape) if min(shape) else torch.zeros(shape)
        parts = rows.encode_rows(fmt, x, noise)
        assert {k: (tuple(p.shape), p.dtype) for k, p in parts.items()} == rows.part_shapes(fmt, shape)
        assert all(p.is_contiguous() for p in parts.values())
        back = rows.decode_rows(fmt, parts, shape[1])
        assert back.shape == shape and back.dtype == torch.float32 and back.isfinite().all()
        assert torch.equal(backends.fake(fmt, x, noise), back)
        assert all(
            torch.equal(a, b) for a, b in zip(backends.encode(fmt, x, noise).values(), parts.values(), strict=True)
        )
        assert torch.equal(backends.decode(fmt, parts, shape[1]), back)


@every
def test_zeros_stay_zeros(fmt: Format):
    assert torch.equal(round_trip(fmt, torch.zeros(20, 100)), torch.zeros(20, 100))
    if fmt.zero_code is not None:
        x = wide((32, 256))
        x[:16, 64:128] = 0.0
        x[20, 5] = -0.0
        assert (round_trip(fmt, x)[x == 0] == 0).all()
        assert (round_trip(fmt, x, key(0, 0, 0, 0))[x == 0] == 0).all()


@every
def test_what_is_not_finite_makes_its_block_nan_and_no_other(fmt: Format):
    x = wide((32, 512))
    spoilt = x.clone()
    spoilt[3, 5], spoilt[20, 300], spoilt[31, 511] = INF, NAN, -INF
    where = tiles((~spoilt.isfinite()).float(), scales.block_of(fmt, 32, 512))
    bad = where.amax((2, 3), keepdim=True).expand(where.shape)
    if fmt.scaling.stored == "double":
        bad = torch.ones_like(bad)  # 256 scales share one, and these are 256
    bad = matrix(bad, 32, 512) > 0
    for noise in (None, key(1, 1, 1, 1)):
        found = round_trip(fmt, spoilt, noise)
        assert torch.equal(found.isnan(), bad)
        if "tensor_scale" not in fmt.parts:
            assert torch.equal(found[~bad], round_trip(fmt, x, noise)[~bad])
    stored = rows.encode_rows(fmt, spoilt)["scale"]
    expected = {"e8m0": 255, "e4m3": 127}.get(fmt.scaling.stored)
    assert expected is None or int((stored == expected).sum()) == int((where.amax((2, 3)) > 0).sum())


def test_a_block_that_is_not_finite_leaves_the_tensors_scale_alone():
    x = wide((4, 64))
    spoilt = torch.cat([x, torch.full((1, 64), INF)])
    for name in ("nvfp4", "nvfp4-te", "nvfp4-46"):
        parts, want = (rows.encode_rows(format(name), v) for v in (spoilt, x))
        assert torch.equal(parts["tensor_scale"], want["tensor_scale"])
        assert torch.equal(parts["codes"][:4], want["codes"]) and torch.equal(parts["scale"][:4], want["scale"])


def test_a_spoilt_scale_spoils_the_256_that_it_is_stored_with():
    fmt = format("nf4-dq")
    x = ordinary((10, 4096))  # 64 scales a row
    spoilt = x.clone()
    spoilt[5, 100] = NAN
    found = round_trip(fmt, spoilt)
    assert found[4:8].isnan().all() and found[:4].isfinite().all() and found[8:].isfinite().all()


@every_scaled
def test_numbers_of_any_size_stay_finite(fmt: Format):
    sizes = [1e-45, 1e-40, 2.0**-126, 1e-36, 1e-20, 1e20, 1e38, 3.4028234663852886e38]
    for size, noise in ((size, noise) for size in sizes for noise in (None, key(1, 2, 3, 4))):
        x = torch.linspace(-1, 1, 512).view(2, 256) * size
        x[0, 0] = size
        found = round_trip(fmt, x, noise)
        assert found.isfinite().all() and (found.abs() <= size * 2 + 1e-37).all()
        if 1e-30 < size <= 1e38 and fmt.scaling.statistic == "absmax":  # headroom leaves less of the largest
            assert (found - x).abs().max() <= (0.3 if noise is None else 0.55) * size  # E2M1 has 4 and 6 at the top


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every_scaled
def test_halves_are_the_numbers_they_are(fmt: Format, dtype: torch.dtype):
    x = ordinary((20, 200)).to(dtype)
    a, b = rows.encode_rows(fmt, x), rows.encode_rows(fmt, x.float())
    assert all(torch.equal(a[part], b[part]) for part in b)
    assert torch.equal(lowbit.quantize(x, fmt).dequantize(), rows.decode_rows(fmt, b, 200))


@pytest.mark.parametrize("name", [n for n in formats() if n.startswith("mx") and n not in ("mxfp4-quest", "mxfp4-sr")])
def test_what_was_decoded_is_encoded_to_itself(name: str):
    once = round_trip(format(name), wide((64, 256)))
    assert torch.equal(round_trip(format(name), once), once)


@given(
    st.sampled_from([*SCALED, *BLOCKY]), st.integers(1, 40), st.integers(1, 70), st.integers(0, 2**31), st.floats(0, 6)
)
@settings(max_examples=80, deadline=None)
def test_the_nearest_code_is_taken(fmt: Format, height: int, width: int, seed: int, spread: float):
    """Of any matrix: each value is within half a step of what it became, in units of its scale, unless it clips."""
    if fmt.kind == "affine" or fmt.scaling.stored == "double":
        return
    x = wide((height, width), seed, spread)
    found = scales.best(fmt, scales.Tiles(fmt, x))
    inside = tiles(x, scales.block_of(fmt, height, width)).double()
    y = tiles(round_trip(fmt, x), scales.block_of(fmt, height, width)).double()
    scale = found.multiplier.double()[..., None, None]
    ladder = [value for value, _ in fmt.ladder]
    low, high = (-ladder[-1], ladder[-1]) if fmt.sign_magnitude else (ladder[0], ladder[-1])
    grid = torch.tensor(sorted({s * v for v in ladder for s in ((1, -1) if fmt.sign_magnitude else (1,))}))
    u = (inside / scale.where(scale > 0, 1.0)).clamp(low, high)
    apart = (u.unsqueeze(-1) - grid.double()).abs().amin(-1)
    live = (scale > 0).expand(u.shape)
    assert ((y / scale.where(scale > 0, 1.0) - u).abs()[live] <= apart[live] + 1e-5 * (1 + u.abs()[live])).all()


# ---- published errors

GAUSSIAN = ordinary((512, 2048), 7) * 0.02  # of a weight's size: errors of power-of-two scales depend on it


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("nvfp4", 0.0090), ("nvfp4-te", 0.0090), ("nvfp4-2d", 0.01239), ("nvfp4-46", 0.00756),
        ("mxfp4", 0.0130), ("mxfp4-even", 0.01256), ("mxfp4-rceil", 0.0140), ("mxfp4-ceil", 0.0187),
        ("mxfp8", 0.00086), ("mxfp8-ceil", 0.00070), ("mxfp8-even", 0.00077), ("mxfp8-rceil", 0.00070),
        ("nf4", 0.0085), ("nf4-dq", 0.0085), ("nf4:32", 0.00762), ("nf4:256", 0.00974),
        ("int4:16", 0.00727), ("int4:32", 0.00942), ("int4:64", 0.01161), ("int4:128", 0.01379), ("int4:256", 0.0160),
        ("e2m1:16", 0.00883), ("e2m1:32", 0.01019), ("e2m1:64", 0.01116), ("e2m1:256", 0.01237),
        ("e3m0:16", 0.0283), ("e3m0:64", 0.0355),
    ],
)  # fmt: skip
def test_errors_on_gaussians_are_the_published_ones(name: str, published: float):
    assert relative_error(format(name), GAUSSIAN) == pytest.approx(published, rel=0.01)


# ---- stochastic rounding


def units(fmt: Format, x: Tensor) -> Tensor:
    return (tiles(x, fmt.block) * scales.derive(fmt, measured(fmt, x)).inverse[..., None, None]).abs()


@pytest.mark.parametrize(
    ("name", "without"), [("mxfp4-sr", "mxfp4"), ("nvfp4-sr", "nvfp4"), ("mxfp4-rceil", "mxfp4"), ("int4-bf16", None)]
)
@pytest.mark.parametrize("spread", [0.0, 2.0])
def test_headroom_leaves_nothing_to_clip(name: str, without: str | None, spread: float):
    x = wide((512, 256), spread=spread)
    # An e4m3 scale that is not a normal number has no such precision.
    x = x.where(x.view(512, 16, 16).abs().amax(-1).repeat_interleave(16, 1) > x.abs().max() / 1e4, 0.0)
    assert units(format(name), x).max() <= format(name).top * (1 + 2.0**-22)
    if without:
        assert units(format(without), x).max() > format(without).top * 1.01, "or the headroom would be for nothing"


@pytest.mark.parametrize("name", ["mxfp4-sr", "nvfp4-sr", "mxfp8-rceil", "int4-bf16", "mxfp4-rceil"])
def test_headroom_makes_stochastic_rounding_unbiased(name: str):
    """The mean over all 65,536 random numbers that there are, for every value of two blocks."""
    fmt = format(name)
    x = ordinary((2, fmt.block[1]))
    found = scales.derive(fmt, measured(fmt, x))
    for block, inverse, multiplier in zip(x, found.inverse, found.multiplier, strict=True):
        many = block.unsqueeze(1).expand(-1, len(ALL_U))
        codes = codec.nearby(fmt, many, inverse.expand(len(many)), ALL_U.expand(many.shape))
        mean = codec.values(fmt, codes, multiplier.expand(len(many))).double().mean(-1)
        gap = max(b - a for (a, _), (b, _) in pairwise(fmt.ladder)) * float(multiplier)
        assert ((mean - block.double()).abs() <= gap * 2.0**-16).all()


def test_headroom_is_a_factor_between_codes_and_values():
    """MXFP4 training (https://arxiv.org/abs/2502.20586): same scales, 3/4 of each value, 4/3 undone."""
    x, mxfp4 = wide((64, 256)), format("mxfp4")
    plain, other = (rows.encode_rows(format(name), x) for name in ("mxfp4", "mxfp4-sr"))
    assert torch.equal(plain["scale"], other["scale"])
    shrunk = scales.derive(mxfp4, measured(mxfp4, x))
    codes = codec.nearby(mxfp4, tiles(x * 0.75, (1, 32)).flatten(2), shrunk.inverse)
    assert torch.equal(rows.unpack(other["codes"], 4, 256), codes.flatten(1))
    want = rows.decode_rows(mxfp4, other, 256).double() * 4 / 3
    assert torch.allclose(rows.decode_rows(format("mxfp4-sr"), other, 256).double(), want, rtol=2**-22)


def test_random_bits_are_those_of_the_element():
    """Blocks of several rows draw by element, as blocks in a row do."""
    x = ordinary((32, 64)).clamp(-2, 2)
    x[:, ::16] = 2.0  # every block, of whatever shape, has the same scale
    noise = key(5, 6, 7, 8)
    assert torch.equal(round_trip(format("e2m1:16x16"), x, noise), round_trip(format("e2m1:16"), x, noise))
