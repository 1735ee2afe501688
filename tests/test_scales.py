"""Scales that are not fp32 absmax / top, against statements of their own in float64 or in plain fp32 operations."""

import math
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowbit import codec, rows, scales
from lowbit.blocks import halve, matrix, tiles, total
from lowbit.formats import PLAIN, Format, Rounding, Scaling, format, formats
from lowbit.rounding import uniform

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


# ---- codes in blocks


@given(st.integers(1, 8), st.integers(0, 5), st.integers(0, 41), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_codes_are_a_little_endian_bit_stream(bits: int, height: int, cols: int, seed: int):
    codes = torch.randint(0, 1 << bits, (height, cols), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    packed = rows.pack(codes, bits)
    assert packed.is_contiguous() and packed.shape == (height, -(-cols * bits // 8))
    for line, stream in zip(codes.tolist(), packed.tolist(), strict=True):
        number = sum(code << (bits * k) for k, code in enumerate(line))
        assert bytes(stream) == number.to_bytes(len(stream), "little")
    assert torch.equal(rows.unpack(packed, bits, cols), codes)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 20), st.integers(0, 20))
@settings(max_examples=60, deadline=None)
def test_tiles_are_the_blocks_of_a_matrix(height: int, width: int, down: int, across: int):
    x = torch.arange(1.0, down * across + 1).view(down, across)
    found = tiles(x, (height, width))
    assert torch.equal(matrix(found, down, across), x)
    for i in range(found.shape[0]):
        for j in range(found.shape[1]):
            part = x[i * height : (i + 1) * height, j * width : (j + 1) * width]
            assert torch.equal(found[i, j][: part.shape[0], : part.shape[1]], part)
            assert found[i, j].sum() == part.sum()  # and zeros


@pytest.mark.parametrize("block", [(1, 32), (1, 300), (16, 16), (3, 1000), (7, 256)])
def test_a_sum_over_a_block_is_pieces_of_256_then_pieces_then_rows(block: tuple[int, int]):
    x = wide((7, 700)).abs()
    inside = tiles(x, block)
    want = torch.zeros(inside.shape[:2], dtype=torch.float64)
    for i in range(want.shape[0]):
        for j in range(want.shape[1]):
            lines = [[halve(piece).double() for piece in line.split(256)] for line in inside[i, j]]
            want[i, j] = halve(torch.stack([halve(torch.stack(line)) for line in lines]))
    assert torch.equal(total(inside), want)
    assert torch.allclose(want, inside.double().sum((2, 3)), rtol=1e-6)


# ---- stored scales: every rule against exact arithmetic


def some_numbers() -> Tensor:
    """Positive fp32 numbers of every exponent: powers of two, their neighbours, turning points, anything."""
    mantissas = torch.tensor([0, 1, 2, 0x200000, 0x400000, 0x5FFFFF, 0x600000, 0x700000, 0x780000, 0x7C0000, 0x7FFFFF])
    exponents = torch.arange(255).view(-1, 1)
    bits = (exponents << 23) | torch.cat([mantissas, mantissas[3:] - 1, mantissas[:-1] + 1])
    return bits.flatten().int().view(torch.float32).unique()


def octave(x: Fraction) -> int:
    """floor(log2(x)), exactly."""
    k = x.numerator.bit_length() - x.denominator.bit_length()
    return k if Fraction(2) ** k <= x else k - 1


@pytest.mark.parametrize("rounding", ["floor", "ceil", "even", "up"])
@pytest.mark.parametrize("name", ["mxfp4", "mxfp8", "mxfp8-e5m2", "mxfp6-e2m3", "mxfp6-e3m2"])
def test_powers_of_two_follow_their_rule(name: str, rounding: Rounding):
    fmt = replace(format(name), scaling=Scaling("e8m0", rounding=rounding))
    largest = math.floor(math.log2(fmt.top))
    mantissa = {"mxfp4": 1, "mxfp8": 3, "mxfp8-e5m2": 2, "mxfp6-e2m3": 3, "mxfp6-e3m2": 2}[name]
    top, last = Fraction(fmt.top), octave(Fraction(fmt.max_scale))
    numbers = some_numbers()[:: 1 if name == "mxfp4" else 7]
    found = scales.derive(fmt, numbers)
    for a, code in zip(numbers.tolist(), found.parts["scale"].tolist(), strict=True):
        exact = Fraction(a)
        if rounding == "up":  # of the quotient as fp32 has it, like the hardware instruction
            exact, shift = Fraction(float(np.float32(a) / np.float32(fmt.top))), 0
        else:
            shift = largest
        k = octave(exact) if exact else -200
        if rounding in ("ceil", "up"):
            k += exact > Fraction(2) ** k
        if rounding == "even":
            step = Fraction(2) ** (k - mantissa)
            k += exact >= Fraction(2) ** (k + 1) - step / 2
        assert code == min(max(k - shift, -127), last) + 127, a
        if rounding == "up" and -127 < k < last:
            assert Fraction(a) <= top * Fraction(2) ** (code - 127) * (1 + Fraction(1, 2**23))
    assert torch.equal(found.multiplier.double(), 2.0 ** (found.parts["scale"].double() - 127))
    assert torch.equal(found.inverse.double(), 2.0 ** (127 - found.parts["scale"].double()))


def test_e4m3_scales_are_the_nearest_and_up_is_up():
    values = [Fraction(v) for v in format("e4m3").values[:127]]
    fmt = Format("probe", 8, True, "", "integer", (1, 16), limit=1, scaling=Scaling("e4m3"))
    ends = torch.tensor([float((a + b) / 2) for a, b in pairwise(values)] + list(map(float, values)))
    x = torch.cat([ends, torch.nextafter(ends, ends * 2 + 1), torch.nextafter(ends, ends * 0 - 1)]).clamp(min=0)
    near, up = (scales.derive(fmt, x, rounding=r).parts["scale"].tolist() for r in ("nearest", "up"))
    for a, n, u in zip(map(Fraction, x.tolist()), near, up, strict=True):
        assert n == min(range(127), key=lambda k: (abs(values[k] - min(a, Fraction(448))), k % 2)), a
        assert u == next((k for k, v in enumerate(values) if v >= a), 126), a


def test_bf16_scales_are_rounded_up():
    fmt = format("int4-bf16")
    numbers = some_numbers()
    stored = scales.derive(fmt, numbers).parts["scale"]
    assert stored.dtype == torch.bfloat16
    quotient = (numbers / 7).clamp(min=2.0**-126) * (numbers > 0)
    below = (stored.view(torch.int16) - 1).view(torch.bfloat16)
    assert ((stored.float() >= quotient) & ((below.float() < quotient) | (numbers == 0))).all()


@every_scaled
def test_stored_scales_say_all(fmt: Format):
    """Parts alone give back what encoding multiplied by (a doubly quantized scale is not what it was)."""
    x = wide((40, 256))
    found = scales.derive(fmt, measured(fmt, x))
    assert torch.equal(scales.multiplier(fmt, found.parts), found.multiplier)
    if fmt.scaling.stored != "double":
        assert torch.equal(scales.inverse(fmt, found.parts), found.inverse)
        assert ((found.inverse * found.multiplier - 1).abs() < 1e-6).logical_or(found.multiplier == 0).all()


# ---- NVFP4


def fp32(x: float) -> np.float32:
    return np.float32(x)


def e2m1_nearest(u: np.ndarray) -> np.ndarray:
    """Signed values: nearest of the grid, ties to the even code, beyond 6 saturates."""
    grid = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    a = np.minimum(np.abs(u.astype(np.float64)), 6)[..., None]
    best = np.argmin(np.abs(a - grid) + 1e-9 * (np.arange(8) % 2), -1)
    return np.copysign(grid[best], u).astype(np.float32)


def e4m3_nearest(x: np.ndarray) -> np.ndarray:
    values = np.array(format("e4m3").values[:127])
    apart = np.abs(np.minimum(x.astype(np.float64), 448)[..., None] - values)
    return values[np.argmin(apart + 1e-12 * (np.arange(127) % 2) * values, -1)].astype(np.float32)


def two_levels(x: np.ndarray, factor: float, peak: float, least: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(stored scales, inverse, multiplier) of blocks [n, 16], fp32 operations as torchao has them."""
    absmax = np.abs(x).max(-1)
    g = absmax.max() / fp32(6 * peak)
    s = e4m3_nearest(np.clip(absmax / fp32(6) / g * fp32(factor), fp32(least), fp32(448)))
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.minimum(fp32(1) / g / s, np.finfo(np.float32).max)
    return s, inverse, g * s


@pytest.mark.parametrize(("name", "least"), [("nvfp4", 2.0**-6), ("nvfp4-te", 0.0)])
def test_tiny_block_scales_have_two_conventions(name: str, least: float):
    fmt = format(name)
    x = wide((300, 16), spread=4).numpy()
    s, inverse, multiplier = two_levels(x, 1, 448, least)
    parts = rows.encode_rows(fmt, torch.from_numpy(x))
    stored = parts["scale"].view(torch.float8_e4m3fn).float().flatten().numpy()
    np.testing.assert_array_equal(stored, s)
    with np.errstate(over="ignore"):
        want = e2m1_nearest(x * inverse[:, None]) * multiplier[:, None]
    np.testing.assert_array_equal(rows.decode_rows(fmt, parts, 16).numpy(), want)
    assert ((s == 0).mean() > 0.2) == (least == 0) and ((s == 2**-6).mean() > 0.2) == (least > 0)


def test_tiny_scales_are_transformer_engines():
    """TransformerEngine's reference, its order of operations: scales differ where a quotient is an ulp from a tie."""
    x = wide((4000, 16), spread=3).numpy()
    encode = fp32(448 * 6) / np.abs(x).max()
    wanted = np.abs(x).max(-1) / fp32(6) * encode
    theirs = e4m3_nearest(np.minimum(wanted, fp32(448)))
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.minimum(fp32(1) / (theirs * (fp32(1) / encode)), np.finfo(np.float32).max)
        codes = e2m1_nearest(x * inverse[:, None])
    parts = rows.encode_rows(format("nvfp4-te"), torch.from_numpy(x))
    ours = parts["scale"].view(torch.float8_e4m3fn).float().flatten().numpy()
    same = ours == theirs
    assert same.mean() > 0.999 and ((ours == 0) == (theirs == 0)).all() and (ours == 0).mean() > 0.2
    units = codec.values(format("e2m1"), rows.unpack(parts["codes"], 4, 16), torch.ones(len(x))).numpy()
    assert (units[same] == codes[same]).mean() > 0.9999
    assert (
        np.abs(units[(ours == 0) & (np.abs(x).max(-1) > 0)][x[(ours == 0) & (np.abs(x).max(-1) > 0)] != 0]) == 6
    ).all(), "a scale of 0 saturates, as there"


@pytest.mark.parametrize("spread", [0.0, 3.0])
def test_four_over_six_takes_the_better_scale(spread: float):
    x = wide((2000, 16), spread=spread).numpy()
    candidates = []
    for factor in (1.0, 1.5):
        s, inverse, multiplier = two_levels(x, factor, 256, 0.0)
        with np.errstate(over="ignore", invalid="ignore"):
            y = e2m1_nearest(x * inverse[:, None]) * multiplier[:, None]
        apart = (y - x) * (y - x)
        while apart.shape[1] > 1:
            apart = apart[:, : apart.shape[1] // 2] + apart[:, apart.shape[1] // 2 :]
        candidates.append((s, y, apart[:, 0]))
    four = candidates[1][2] < candidates[0][2]  # ties stay at six
    fmt = format("nvfp4-46")
    parts = rows.encode_rows(fmt, torch.from_numpy(x))
    stored = parts["scale"].view(torch.float8_e4m3fn).float().flatten().numpy()
    np.testing.assert_array_equal(stored, np.where(four, candidates[1][0], candidates[0][0]))
    want = np.where(four[:, None], candidates[1][1], candidates[0][1])
    np.testing.assert_array_equal(rows.decode_rows(fmt, parts, 16).numpy(), want)
    assert 0.2 < four.mean() < 0.8


@pytest.mark.parametrize("name", ["nvfp4-2d", "e2m1:16x16", "int8:16x16", "mxfp4:16x16"])
def test_square_tiles_are_the_same_transposed(name: str):
    fmt = format(name)
    for shape in ((48, 64), (50, 37), (3, 100)):
        x = wide(shape)
        assert torch.equal(round_trip(fmt, x.t().contiguous()), round_trip(fmt, x).t())


@pytest.mark.parametrize("name", ["e2m1:16x16", "int8:4x8", "mxfp4:16x16", "int4-affine:2x8", "nf4:8x4", "e3m2:16x4"])
def test_a_tile_is_quantized_as_if_it_were_alone(name: str):
    fmt = format(name)
    height, width = fmt.block
    x = wide((height * 2 + 1, width * 2 + 3))
    found = round_trip(fmt, x)
    for i in range(0, x.shape[0], height):
        for j in range(0, x.shape[1], width):
            part = x[i : i + height, j : j + width]
            flat = fmt.with_block(part.numel())
            alone = round_trip(flat, part.reshape(1, -1)).view(part.shape)
            assert torch.equal(found[i : i + height, j : j + width], alone)


def test_rows_and_tensors_are_blocks_that_are_long_enough():
    x = wide((5, 300))
    assert torch.equal(round_trip(format("int8:row"), x), round_trip(format("int8:300"), x))
    whole = round_trip(format("int4:1500"), x.reshape(1, -1)).view(5, 300)
    assert torch.equal(round_trip(format("int4:tensor"), x), whole)
    columns = round_trip(format("int8:0x1"), x)
    assert torch.equal(columns, round_trip(format("int8:row"), x.t().contiguous()).t())


# ---- statistics


def statistics(x: np.ndarray) -> dict[str, float]:
    x = x.astype(np.float64)
    root, mean = math.sqrt((x * x).mean()), np.abs(x).mean()
    return {"absmax": np.abs(x).max(), "rms": root, "absmean": mean, "sawb": max(0.0, 12.035 * root - 12.03 * mean)}


@pytest.mark.parametrize("block", [(1, 32), (1, 0), (0, 0), (16, 16)])
@pytest.mark.parametrize("kind", ["absmax", "rms", "absmean", "sawb"])
def test_statistics_are_those_of_float64(kind: str, block: tuple[int, int]):
    fmt = Format("probe", 8, True, "", "integer", block, limit=127, scaling=Scaling(statistic=kind))  # pyright: ignore
    for x in (wide((21, 300)), wide((21, 300)) * 1e30, ordinary((3, 17)) * 1e-38, ordinary((1, 1)), torch.zeros(4, 40)):
        found = measured(fmt, x)
        height, width = scales.block_of(fmt, *x.shape)
        for i in range(found.shape[0]):
            for j in range(found.shape[1]):
                part = x[i * height : (i + 1) * height, j * width : (j + 1) * width].numpy()
                want = statistics(part)
                near = 1e-5 * want["rms"] if kind == "sawb" else 2e-6 * want[kind]
                assert abs(float(found[i, j]) - want[kind]) <= near + 1e-44
        again = measured(fmt, x * 2.0**-3)
        assert torch.equal(again, found / 8) or float(x.abs().max()) < 1e-30


def test_ternary_is_bitnets():
    """BitNet b1.58, https://arxiv.org/abs/2402.17764, equations 1 to 3: RoundClip(W / mean |W|, -1, 1)."""
    x = ordinary((37, 81))
    gamma = x.double().abs().mean()
    units = (x.double() / gamma).clamp(-1, 1)
    clear = (units.abs() - 0.5).abs() > 1e-5
    want = units.round() * gamma
    found = round_trip(format("ternary"), x).double()
    assert clear.float().mean() > 0.99 and torch.allclose(found[clear], want[clear], rtol=1e-6)


def test_quest_is_its_formula():
    """QuEST, https://arxiv.org/abs/2502.05003: 16 levels in [-a, a] with a = 2.514 rms, halves of a step off zero."""
    x = ordinary((20, 128)) * torch.exp(ordinary((20, 1), 3))
    a = 2.513930578568423 * x.double().square().mean(-1, keepdim=True).sqrt()
    step = 2 * a / 15
    units = x.double().clamp(-a, a) / step + 0.5
    clear = (units - units.floor() - 0.5).abs() > 1e-5
    want = (units.round() - 0.5).clamp(-7.5, 7.5) * step
    found = round_trip(format("int4-quest"), x).double()
    assert clear.float().mean() > 0.99 and torch.allclose(found[clear], want[clear], rtol=1e-5)


def test_quartets_forward_scale_is_a_power_of_two_below_the_gaussian_clip():
    """Quartet, https://arxiv.org/abs/2505.14669: 2**floor(log2(2.92247856 / 6 * rms)), then E2M1."""
    x = wide((100, 64))
    wanted = 2.92247856 / 6 * x.double().view(100, 2, 32).square().mean(-1).sqrt()
    clear = (wanted.log2() - wanted.log2().round()).abs() > 1e-5
    parts = rows.encode_rows(format("mxfp4-quest"), x)
    assert (
        torch.equal((parts["scale"].double() - 127)[clear], wanted.log2().floor()[clear])
        and clear.float().mean() > 0.99
    )
    units = x.view(100, 2, 32).numpy() / (2.0 ** (parts["scale"].double() - 127)).unsqueeze(-1).numpy()
    want = e2m1_nearest(units.astype(np.float32)) * (2.0 ** (parts["scale"].double() - 127)).unsqueeze(-1).numpy()
    assert torch.equal(rows.decode_rows(format("mxfp4-quest"), parts, 64), torch.from_numpy(want).float().view(100, 64))


def test_sawb_is_near_the_clip_that_loses_least():
    """https://arxiv.org/abs/1807.06964: the coefficients are fitted so that of all clips this one loses about least."""
    x = ordinary((64, 512))
    fmt = format("int4-sawb")
    found = float(scales.derive(fmt, measured(fmt, x)).multiplier) * 7
    step = torch.linspace(1.5, 4.0, 51)
    losses = [float((x - (x / (a / 7)).round().clamp(-7, 7) * (a / 7)).square().mean()) for a in step]
    best = min(losses)
    assert relative_error(fmt, x) * float(x.square().mean()) < 1.03 * best and 2.2 < found < 3.0


# ---- scales for weights that are only codes


@pytest.mark.parametrize("name", ["mxfp4", "mxfp4-even", "mxfp8", "nvfp4", "nvfp4-te", "int4-bf16", "int8", "nf4"])
def test_covering_scales_clip_nothing_and_are_the_smallest(name: str):
    fmt = format(name)
    absmax = some_numbers()[::3]
    absmax = absmax[(absmax > 1e-30) & (absmax < 1e30)]
    ulp = Fraction(1) + Fraction(1, 2**21)
    if fmt.scaling.peak:
        whole = torch.tensor([2.0**10])
        absmax = absmax[absmax <= 448 * 6 * 2.0**10]
        found = scales.covering(fmt, absmax, whole)
        assert torch.equal(found.parts["tensor_scale"], whole), "the tensor's scale is given, and stays"
    else:
        found = scales.covering(fmt, absmax)
    for a, m in zip(absmax.tolist(), found.multiplier.tolist(), strict=True):
        assert Fraction(a) <= Fraction(m) * Fraction(fmt.top) * ulp
    stored = found.parts["scale"]
    if stored.dtype == torch.uint8:
        smaller = {**found.parts, "scale": (stored - 1)}
        room = (
            stored > (scales.derive(fmt, torch.zeros(1), tensor_scale=found.parts.get("tensor_scale")).parts["scale"])
        )
        assert room.any() and (scales.multiplier(fmt, smaller)[room] * fmt.top < absmax[room]).all()


def test_a_block_that_outgrows_the_tensors_scale_gets_the_largest():
    found = scales.covering(format("nvfp4"), torch.tensor([1e6, INF]), torch.tensor([1.0]))
    assert found.parts["scale"].tolist() == [126, 127] and found.multiplier[0] == 448


def test_a_given_tensor_scale_is_kept():
    x = wide((8, 64))
    fmt = format("nvfp4")
    own = scales.derive(fmt, measured(fmt, x))
    given = scales.derive(fmt, measured(fmt, x), tensor_scale=own.parts["tensor_scale"] * 2)
    assert torch.equal(given.parts["tensor_scale"], own.parts["tensor_scale"] * 2)
    assert (given.parts["scale"].view(torch.float8_e4m3fn).float().max()) == 224
