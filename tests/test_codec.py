"""Numbers to codes and back, for every format, against searches in float64 and against other libraries."""

import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import oracles
import pytest
import torch
from oracles import FLT_MAX, TINY, ULP, around
from torch import Tensor

from lowbit import codec
from lowbit.formats import PLAIN, Format, format, formats
from lowbit.rounding import uniform

ALL = [format(name) for name in formats() if format(name).scaling == PLAIN]
COMPRESSED = [f for f in ALL if f.compressed]
FIXED = [f for f in ALL if f.kind in ("integer", "codebook")]
WITH_ZERO = [f for f in COMPRESSED if f.kind == "affine" or f.zero_code is not None]
# Their tables have a 1 but no -1 (so has bitsandbytes): a block whose largest magnitude is negative is stored short.
LOPSIDED = [f for f in FIXED if f.signed and -f.top not in f.values]

every_compressed = pytest.mark.parametrize("fmt", COMPRESSED, ids=str)
every_fixed = pytest.mark.parametrize("fmt", FIXED, ids=str)
both_roundings = pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])

ALL_U = uniform(torch.arange(1 << 16, dtype=torch.int32))
INF, NAN = float("inf"), float("nan")


def units(fmt: Format, u: np.ndarray | Tensor, noise: Tensor | None = None) -> Tensor:
    """Codes of numbers given in units of the scale (for square formats: of roots)."""
    x = torch.as_tensor(u).unsqueeze(0)
    one = torch.ones(1)
    return codec.encode(replace(fmt, square=False), x, None if noise is None else noise.unsqueeze(0), scale=one)[
        "codes"
    ][0]


def worth(fmt: Format, codes: Tensor, scale: float = 1.0) -> Tensor:
    return codec.decode(fmt, {"codes": codes.unsqueeze(0), "scale": torch.tensor([scale])})[0]


def random_blocks(fmt: Format, count: int, seed: int = 0, spread: float = 8.0) -> Tensor:
    """Normal values, a different magnitude for every block, some of them exactly 0, and one block all 0."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(count, fmt.block[1], generator=g) * torch.exp(spread * torch.randn(count, 1, generator=g))
    x *= torch.rand(x.shape, generator=g) > 0.1
    x[0] = 0
    return x if fmt.signed else x * x.sign() * torch.rand(x.shape, generator=g)


def random_noise(x: Tensor, seed: int = 1) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return uniform(torch.randint(0, 1 << 16, x.shape, generator=g, dtype=torch.int32))


def roundtrip(fmt: Format, x: Tensor, stochastic: bool = False, *, live: bool = False) -> Tensor:
    return codec.decode(fmt, codec.encode(fmt, x, random_noise(x) if stochastic else None, live=live))


def interesting_units(fmt: Format, count: int) -> np.ndarray:
    """Values, middles and their fp32 neighbours; numbers all over and beyond the range; random bit patterns."""
    rng = np.random.default_rng(3)
    finite = [v for v in fmt.values if math.isfinite(v)]
    spread = rng.uniform(-1.3 * fmt.top, 1.3 * fmt.top, count // 2)
    logs = fmt.top * np.exp2(rng.uniform(-30, 1, count // 4)) * rng.choice([-1, 1], count // 4)
    u = np.concatenate(
        [around(finite), around(oracles.middles(fmt)), spread, logs, oracles.floats(count // 4, 9)]
    ).astype(np.float32)
    return u if fmt.signed else np.abs(u)


# --- meaning -------------------------------------------------------------------------------------------------------


@every_fixed
@pytest.mark.parametrize("scale", [1.0, 0.3, 7e-30])
def test_a_code_means_its_value_times_the_scale(fmt: Format, scale: float):
    codes = torch.arange(1 << fmt.bits).to(torch.uint8)
    expected = np.asarray(fmt.values, dtype=np.float32) * np.float32(scale)
    expected = expected * expected if fmt.square else expected
    np.testing.assert_array_equal(worth(fmt, codes, scale).numpy(), expected)


@every_fixed
def test_every_value_encodes_to_itself(fmt: Format):
    pairs = oracles.rungs(fmt)
    v, codes = torch.tensor([v for v, _ in pairs]), torch.tensor([k for _, k in pairs], dtype=torch.uint8)
    assert torch.equal(units(fmt, v), codes)
    for noise in (ALL_U[0], ALL_U[-1]):  # an exact value is never moved by stochastic rounding
        assert torch.equal(units(fmt, v, noise.expand(len(v))), codes)
    if fmt.sign_magnitude:
        assert math.copysign(1, worth(fmt, units(fmt, torch.tensor([-0.0]))).item()) == -1


@every_fixed
def test_nearest_is_the_float64_search(fmt: Format):
    # Every value, every middle, the fp32 numbers on both sides of each, and 300,000 more.
    u = interesting_units(fmt, 300_000)
    wrong = np.flatnonzero(units(fmt, u).numpy() != oracles.nearest(fmt, u))
    assert len(wrong) == 0, (u[wrong[:5]], units(fmt, u[wrong[:5]]), oracles.nearest(fmt, u[wrong[:5]]))


@every_fixed
def test_thresholds_say_the_same(fmt: Format):
    # The definition for other backends: rank = count of thresholds below u.
    u = interesting_units(fmt, 20_000)
    magnitude = np.abs(u) if fmt.sign_magnitude else u
    rank = np.searchsorted(np.asarray(fmt.thresholds, dtype=np.float32), magnitude, side="left")
    codes = np.asarray([k for _, k in fmt.ladder])[rank] | (fmt.sign_magnitude * np.signbit(u)).astype(np.int64) << (
        fmt.bits - 1
    )
    if not fmt.signed and fmt.zero_code is not None:
        codes = np.where(u > 0, np.maximum(codes, 1), codes)
    assert np.array_equal(codes, oracles.nearest(fmt, u))


@pytest.mark.parametrize("fmt", [f for f in FIXED if f.square], ids=str)
def test_square_formats_round_the_root(fmt: Format):
    x = np.abs(oracles.floats(300_000, 4))
    x = x[(x < 1e30) & (x > 1e-30)].reshape(-1)
    x = x[: len(x) // 256 * 256].reshape(-1, 256)
    parts = codec.encode(fmt, torch.from_numpy(x))
    root = np.sqrt(x)
    scale = root.max(-1) / np.float32(fmt.top)
    assert np.array_equal(parts["scale"].numpy(), scale)
    u = root * (np.float32(1) / scale)[:, None]
    assert np.array_equal(parts["codes"].numpy(), oracles.nearest(replace(fmt, square=False), u))


@every_compressed
@both_roundings
def test_a_block_depends_on_nothing_but_itself(fmt: Format, stochastic: bool):
    x = random_blocks(fmt, 40)
    before, noise = x.clone(), random_noise(x) if stochastic else None
    together = codec.encode(fmt, x, noise)
    assert torch.equal(x, before), "encode changed its input"
    for i in (0, 7, 39):
        alone = codec.encode(fmt, x[i : i + 1].clone(), None if noise is None else noise[i : i + 1])
        assert all(torch.equal(alone[part][0], together[part][i]) for part in fmt.parts)
    assert set(together) == set(fmt.parts)
    assert together["codes"].dtype == torch.uint8 and int(together["codes"].max()) < 1 << fmt.bits
    deeper = codec.encode(fmt, x.view(2, 4, 5, -1), None if noise is None else noise.view(2, 4, 5, -1))
    assert all(torch.equal(deeper[part].flatten(0, 2), together[part]) for part in fmt.parts)


# --- scales --------------------------------------------------------------------------------------------------------


@every_fixed
def test_the_scale_is_the_largest_magnitude_over_the_top(fmt: Format):
    x = random_blocks(fmt, 500).numpy()
    largest = np.abs(x).max(-1)
    largest = np.sqrt(largest) if fmt.square else largest
    expected = np.where(largest == 0, np.float32(0), np.maximum(largest / np.float32(fmt.top), np.float32(TINY)))
    parts = codec.encode(fmt, torch.from_numpy(x))
    assert parts["scale"].dtype == torch.float32 and np.array_equal(parts["scale"].numpy(), expected)
    assert parts["scale"][0] == 0 and not codec.decode(fmt, parts)[0].any()


@every_compressed
@both_roundings
def test_a_block_of_one_value_keeps_it(fmt: Format, stochastic: bool):
    # 127 * fl(a / 127) is within two roundings of a; squaring doubles that. Blocks below 2**-100 have a test of their
    # own.
    x = torch.zeros(500, fmt.block[1])
    x[:, 3] = 2.0 ** torch.empty(500).uniform_(-100, 120, generator=torch.Generator().manual_seed(2))
    got = roundtrip(fmt, x, stochastic)
    assert ((got[:, 3] - x[:, 3]).abs() <= 2 * ULP * x[:, 3]).all()
    if fmt.signed and fmt not in LOPSIDED:
        assert torch.equal(roundtrip(fmt, -x, stochastic).abs(), got)


@every_compressed
def test_nothing_of_ordinary_size_is_far_off(fmt: Format):
    # Half of the widest step between codes, times the scale.
    x = random_blocks(fmt, 300)
    got, largest = roundtrip(fmt, x), x.abs().amax(-1, keepdim=True)
    if fmt.kind == "log":
        bound = 0.5 * largest * (1 - codec.encode(fmt, x)["base"].unsqueeze(-1)) + 1e-6 * largest
        bound = torch.where(
            x >= got.amin(-1, keepdim=True), bound, INF
        )  # the smallest tenth is lifted to the lowest level
    elif fmt.kind == "affine":
        bound = (x.amax(-1, keepdim=True).clamp(min=0) - x.amin(-1, keepdim=True).clamp(max=0)) / fmt.limit * 1.0001
    else:
        values = np.asarray([v * abs(v) if fmt.square else v for v, _ in oracles.rungs(fmt)])
        step = np.diff(values).max() / (
            1 if fmt.square else 2
        )  # rounding the root is not quite half a step in the value
        short = max(0.0, fmt.top + values.min()) if fmt.signed else values.min()  # -1 in dyn4, 0 in ulin4
        bound = max(step, short) / values.max() * largest * 1.0001
    assert ((got - x).abs() <= bound).all()


@every_compressed
@both_roundings
@pytest.mark.parametrize("largest", [1e-45, 1e-42, 1e-40, TINY, 1e-37, 1e-30], ids=str)
def test_tiny_blocks_stay_finite_and_near(fmt: Format, stochastic: bool, largest: float):
    # Scales stop at the smallest normal number: below it a block loses precision, but is never blown up.
    x = torch.linspace(0, 1, fmt.block[1]).unsqueeze(0) * largest
    for y in (x, -x) if fmt.signed else (x,):
        parts = codec.encode(fmt, y, random_noise(y) if stochastic else None)
        got = codec.decode(fmt, parts)
        assert got.isfinite().all() and parts["scale"] > 0
        assert got.abs().max() <= max(largest * 1.0001, fmt.top * TINY if fmt.kind != "log" else TINY)
        assert (got - y).abs().max() <= max(largest, TINY)


@every_compressed
@both_roundings
def test_huge_blocks_stay_finite(fmt: Format, stochastic: bool):
    x = torch.linspace(0, 3e38, fmt.block[1]).repeat(2, 1)
    if fmt.signed:
        x[1] *= -1
    got = roundtrip(fmt, x, stochastic)
    assert got.isfinite().all() and (got - x).abs().max() <= 3e38 / 2


@every_compressed
def test_the_largest_numbers_there_are_do_not_become_infinite(fmt: Format):
    # top * fl(absmax / top) may round to more than absmax; at the very end of fp32 that must not be infinity.
    ends = (torch.tensor(FLT_MAX).view(torch.int32) - torch.arange(4096, dtype=torch.int32)).view(torch.float32)
    x = torch.zeros(len(ends), fmt.block[1])
    x[:, 0] = ends
    bad = ~roundtrip(fmt, x).isfinite().all(-1)
    assert not bad.any(), f"{int(bad.sum())} values, for example {ends[bad][0].item():.9g}"


@pytest.mark.parametrize("fmt", [f for f in COMPRESSED if f.signed], ids=str)
def test_a_block_from_one_end_of_fp32_to_the_other_stays_finite(fmt: Format):
    x = torch.linspace(-3e38, 3e38, fmt.block[1], dtype=torch.float64).float().unsqueeze(0)
    assert roundtrip(fmt, x).isfinite().all()


# --- promises ------------------------------------------------------------------------------------------------------


@every_compressed
def test_encoding_what_was_decoded_changes_nothing(fmt: Format):
    x = random_blocks(fmt, 1000)
    if fmt in LOPSIDED:  # with a negative largest magnitude the block shrinks to the most negative value, once
        x = torch.where(x.amax(-1, keepdim=True) < -x.amin(-1, keepdim=True), -x, x)
    first = codec.encode(fmt, x)
    again = codec.encode(fmt, codec.decode(fmt, first))
    assert torch.equal(first["codes"], again["codes"])
    if fmt.kind == "affine":  # (high - low) is rounded in a different place
        assert ((first["scale"] - again["scale"]).abs() <= 2 * ULP * first["scale"]).all()
    else:
        assert torch.equal(first["scale"], again["scale"])
    if fmt.kind == "log":
        assert ((first["base"] - again["base"]).abs() <= ULP * first["base"]).all()


@pytest.mark.parametrize("fmt", [f for f in FIXED if f not in LOPSIDED], ids=str)
def test_the_scale_survives_whatever_its_mantissa(fmt: Format):
    # No drift: a state that is decoded and encoded without being changed keeps its scale for ever.
    a = (torch.arange(1 << 23, dtype=torch.int32) + 0x3F800000).view(torch.float32)
    a = a[1::3].unsqueeze(-1)  # every third: a minute for all of them is too long, and all of them were tried once
    alone = replace(fmt, block=(1, 1))
    first = codec.encode(alone, a)
    assert torch.equal(codec.encode(alone, codec.decode(alone, first))["scale"], first["scale"])


@pytest.mark.parametrize("fmt", LOPSIDED, ids=str)
def test_a_lopsided_block_shrinks_every_time(fmt: Format):
    # Known, and inherited with the table: where the largest magnitude is negative, each decode-encode multiplies it by
    # the most negative value (0.993 in dyn8, 0.8875 in dyn4). An EMA stored so decays faster than its beta.
    x = torch.zeros(1, fmt.block[1])
    x[0, 0] = -1
    for times in range(1, 5):
        x = roundtrip(fmt, x)
        assert x[0, 0].item() == pytest.approx(-((-min(fmt.values)) ** times), rel=1e-6)


@pytest.mark.parametrize("fmt", WITH_ZERO, ids=str)
@both_roundings
def test_zero_stays_zero(fmt: Format, stochastic: bool):
    for scale in (1e-44, 1e-20, 1.0, 1e20):
        x = random_blocks(fmt, 20, spread=0) * scale
        x[1, 1:] = 0
        assert not roundtrip(fmt, x, stochastic)[x == 0].any()
        assert not roundtrip(fmt, x.abs(), stochastic, live=True)[x == 0].any()
    nothing = torch.zeros(2, fmt.block[1])
    nothing[1] = -0.0
    parts = codec.encode(fmt, nothing, random_noise(nothing) if stochastic else None)
    assert not parts["scale"].any() and not codec.decode(fmt, parts).any()


@pytest.mark.parametrize("fmt", [f for f in COMPRESSED if f not in WITH_ZERO], ids=str)
@both_roundings
def test_without_a_zero_only_a_block_of_zeros_is_zero(fmt: Format, stochastic: bool):
    x = random_blocks(fmt, 200)
    got = roundtrip(fmt, x, stochastic)
    assert not got[0].any() and (got[1:] > 0).all()


def live_blocks(fmt: Format) -> Tensor:
    """Second moments spread over 30 decades below the largest, all of them above 0."""
    columns = fmt.block[1] if fmt.compressed else 32
    g = torch.Generator().manual_seed(5)
    x = 10.0 ** -(30 * torch.rand(200, columns, generator=g))
    x[:, 0] = 1
    return x


@pytest.mark.parametrize("fmt", ALL, ids=str)
@both_roundings
def test_a_live_value_never_becomes_zero(fmt: Format, stochastic: bool):
    # Formats for second moments, and signed formats when told that this is one. A root of a lost value divides by eps
    # alone.
    x = live_blocks(fmt)
    bits = torch.zeros_like(x, dtype=torch.int32)  # float formats: the bits that round down
    parts = codec.encode(fmt, x, random_noise(x) if stochastic else None, live=True, bits=bits if stochastic else None)
    got = codec.decode(fmt, parts)
    assert (got > 0).all(), f"{int((got <= 0).sum())} of {got.numel()} lost, the largest {x[got <= 0].max().item():.2g}"


@pytest.mark.parametrize("fmt", [f for f in COMPRESSED if not f.signed], ids=str)
@both_roundings
def test_unsigned_formats_keep_live_values_without_being_told(fmt: Format, stochastic: bool):
    x = live_blocks(fmt)
    codes = codec.encode(fmt, x, random_noise(x) if stochastic else None)["codes"]
    assert fmt.zero_code is None or (codes >= 1).all()
    assert torch.equal(codes, codec.encode(fmt, x, random_noise(x) if stochastic else None, live=True)["codes"])


@pytest.mark.parametrize("fmt", [f for f in FIXED if not f.signed], ids=str)
def test_live_values_of_subnormal_blocks_survive(fmt: Format):
    x = torch.full((300, fmt.block[1]), 2.0**-149)
    x[:, 0] = torch.arange(1, 301) * 700 * 2.0**-149
    for noise in (None, torch.full_like(x, float(ALL_U[0]))):
        parts = codec.encode(fmt, x, noise)
        assert (parts["codes"] >= (fmt.zero_code is not None)).all()
        lost = (codec.decode(fmt, parts) == 0).any(-1)
        assert not lost.any(), f"largest of the block {x[lost][0, 0].item():.3g}"


@pytest.mark.parametrize("fmt", [f for f in COMPRESSED if f.signed], ids=str)
def test_live_changes_only_what_would_be_zero(fmt: Format):
    x = random_blocks(fmt, 200).abs()
    plain, live = (codec.encode(fmt, x, live=flag) for flag in (False, True))
    lost = (codec.decode(fmt, plain) <= 0) & (x > 0)
    assert torch.equal(plain["scale"], live["scale"])
    assert torch.equal(plain["codes"][~lost], live["codes"][~lost])


@every_compressed
@both_roundings
def test_a_non_finite_value_spoils_its_block_and_no_other(fmt: Format, stochastic: bool):
    keep = torch.tensor([0, 1, 3, 4])
    for bad in (INF, -INF, NAN) if fmt.signed else (INF, NAN):
        for where in (0, -1):
            x = random_blocks(fmt, 5, spread=0)
            expected = roundtrip(fmt, x, stochastic)
            x[2, where] = bad
            got = roundtrip(fmt, x, stochastic)
            assert torch.equal(got[keep], expected[keep])
            other = got[2][~got[2].isnan()]
            assert not len(other), f"{bad} in column {where}: {len(other)} values are not NaN: {other[:3].tolist()}"


@every_fixed
def test_a_given_scale_is_used_and_the_rest_saturates(fmt: Format):
    x = torch.tensor([[-3.0, -0.5, 0.0, 0.5, 1.0, 100.0]]) * (fmt.top**2 if fmt.square else fmt.top)
    x = x if fmt.signed else x.clamp(min=0)
    scale = torch.tensor([0.5])
    parts = codec.encode(fmt, x, scale=scale)
    assert torch.equal(parts["scale"], scale)
    got = codec.decode(fmt, parts)[0]
    most = (fmt.top * 0.5) ** (2 if fmt.square else 1)
    assert got[-1] == got[-2] == torch.tensor(most)
    if fmt.signed:
        assert got[0] == min(v for v, _ in oracles.rungs(fmt)) * 0.5
    for noise in (ALL_U[0], ALL_U[-1]):
        assert codec.decode(fmt, codec.encode(fmt, x, noise.expand(x.shape), scale=scale))[0, -1] == torch.tensor(most)


@pytest.mark.parametrize("fmt", [f for f in COMPRESSED if f not in FIXED], ids=str)
def test_a_scale_that_cannot_be_used_is_not_ignored(fmt: Format):
    scale = torch.tensor([0.5])
    with pytest.raises(ValueError, match="derives its own scales"):
        codec.encode(fmt, torch.linspace(0, 1, fmt.block[1]).unsqueeze(0), scale=scale)


# --- stochastic rounding -------------------------------------------------------------------------------------------


@every_fixed
def test_stochastic_rounding_is_unbiased(fmt: Format):
    # The mean over ALL 65,536 random bits. Resolution: U has 2**16 cells, so the mean of a step is right to 2**-17 of
    # the step; square formats compare squares, whose own rounding (to 2**-24 of up to 255**2, over a step of 2 * 255)
    # adds as much again.
    ladder = np.asarray([v for v, _ in oracles.rungs(fmt)])
    pick = np.unique(np.linspace(0, len(ladder) - 2, 6).astype(int))
    part = np.random.default_rng(6).uniform(0, 1, (len(pick), 2))
    u = (ladder[pick, None] + part * (ladder[pick + 1] - ladder[pick])[:, None]).astype(np.float32).reshape(-1)
    low, high = np.repeat(ladder[pick], 2), np.repeat(ladder[pick + 1], 2)
    x = (u * u if fmt.square else u).astype(np.float32)
    if not fmt.signed and fmt.zero_code is not None:
        alive = low > 0  # below the first step a value is kept alive, so it is biased upward
        u, low, high, x = u[alive], low[alive], high[alive], x[alive]
    if fmt.square:
        low, high = low**2, high**2
    block = torch.from_numpy(x).unsqueeze(-1).expand(-1, 1 << 16)
    parts = codec.encode(fmt, block, ALL_U.expand(len(x), -1), scale=torch.ones(len(x)))
    got = codec.decode(fmt, parts).double()
    for i in range(len(x)):
        outcomes = np.unique(got[i].numpy())
        assert set(outcomes) <= {np.float32(low[i]), np.float32(high[i])}, "only the two neighbours"
        order = got[i].abs() if fmt.sign_magnitude else got[i]
        assert (order.diff() >= 0).all(), "a larger U never rounds lower (sign-magnitude: never nearer to 0)"
    bias = np.abs(got.mean(-1).numpy() - x)
    assert (bias <= (high - low) * 2.0 ** (-15 if fmt.square else -17) * 1.01 + 2.0**-24 * np.abs(x)).all()


def test_stochastic_affine_is_unbiased():
    fmt = format("int4-affine")
    x = torch.tensor([-3.0, 12.0, 0.0, 0.3, 1.6, -2.75, 11.9, 1e-3, -1e-3]).expand(1 << 16, -1)  # scale 1, zero 3
    parts = codec.encode(fmt, x, ALL_U.unsqueeze(-1).expand_as(x))
    assert (parts["scale"] == 1).all() and (parts["zero"] == 3).all()
    assert (codec.decode(fmt, parts).double().mean(0) - x[0]).abs().max() <= 2.0**-17 + 1e-7


@pytest.mark.parametrize("fmt", [f for f in ALL if f.kind == "log"], ids=str)
def test_stochastic_log_is_unbiased(fmt: Format):
    count = 1 << fmt.bits
    low = 2.0 ** (1 - count)  # base 1/2
    x = torch.tensor([1.0, 0.99, 0.7, 0.5, 0.3, 0.2, *[low] * 4, (low + 0.5) / 2]).expand(1 << 16, -1)
    parts = codec.encode(fmt, x, ALL_U.unsqueeze(-1).expand_as(x))
    assert (parts["base"] - 0.5).abs().max() < 1e-7
    assert (codec.decode(fmt, parts).double().mean(0) - x[0]).abs().max() <= 2.0**-18 + 1e-6


@every_compressed
def test_stochastic_and_nearest_share_the_scale(fmt: Format):
    x = random_blocks(fmt, 50)
    a, b = codec.encode(fmt, x), codec.encode(fmt, x, random_noise(x))
    assert all(torch.equal(a[part], b[part]) for part in fmt.parts if part != "codes")


# --- the formats with a rule of their own --------------------------------------------------------------------------


def test_affine_formula():
    fmt = format("int4-affine")
    x = random_blocks(fmt, 500, seed=8)
    low, high = x.numpy().min(-1).clip(max=0), x.numpy().max(-1).clip(min=0)
    with np.errstate(divide="ignore"):
        scale = (high - low) / np.float32(15)
        inverse = np.where(scale == 0, np.float32(0), np.float32(1) / scale)
    zero = np.round(-low * inverse)
    codes = np.clip(np.round(x.numpy() * inverse[:, None]) + zero[:, None], 0, 15)
    parts = codec.encode(fmt, x)
    assert np.array_equal(parts["scale"].numpy(), scale)
    assert np.array_equal(parts["zero"].numpy(), zero) and np.array_equal(parts["codes"].numpy(), codes)
    assert (codec.decode(fmt, parts) - x).abs().amax(-1).le(parts["scale"] * 1.001).all()


@pytest.mark.parametrize("sign", [1, -1])
def test_affine_blocks_of_one_sign_do_not_saturate(sign: int):
    # AWQ's formula as released clips such a block to one end; ours always holds 0 in the range.
    x = sign * torch.linspace(100, 101, 32).unsqueeze(0)
    assert (roundtrip(format("int4-affine"), x) - x).abs().max() <= 101 / 15 / 2


@pytest.mark.parametrize("fmt", [f for f in ALL if f.kind == "log"], ids=str)
def test_log_levels(fmt: Format):
    x = random_blocks(fmt, 300, spread=3)[1:]
    parts = codec.encode(fmt, x)
    count = 1 << fmt.bits
    for block, scale, base in zip(x.numpy(), parts["scale"].numpy(), parts["base"].numpy(), strict=True):
        alive = np.sort(block[block > 0])
        lowest = alive[int((len(alive) - 1) * 0.1)]
        assert scale == alive[-1]
        assert base == pytest.approx((float(lowest) / float(scale)) ** (1 / (count - 1)), rel=1e-6)
    levels = parts["base"].double().unsqueeze(-1) ** torch.arange(count)
    got = codec.decode(fmt, parts)
    best = (levels.unsqueeze(1) * parts["scale"].double()[:, None, None] - x.double().unsqueeze(-1)).abs().amin(-1)
    assert ((got.double() - x).abs() <= best + 4e-6 * parts["scale"].unsqueeze(-1)).all()
    assert got.amax(-1).equal(x.amax(-1))


@pytest.mark.parametrize("n", [3, 15])
def test_roots_are_within_two_ulp(n: int):
    rng = np.random.default_rng(n)
    x = np.concatenate([2.0 ** rng.uniform(-126, 0, 500), 2.0 ** -np.arange(127.0), [1 - 2.0**-53]])
    y = codec._root(torch.from_numpy(x), n).numpy()
    np.testing.assert_allclose(y, x ** (1 / n), rtol=1e-14)
    for root, power in zip(y, x, strict=True):
        low, high = (Fraction(root) + step * Fraction(np.spacing(root)) for step in (-2, 2))
        assert low**n <= Fraction(power) <= high**n


@pytest.mark.parametrize("fmt", [f for f in ALL if f.kind == "log"], ids=str)
def test_log_blocks_with_zeros_or_one_value_have_a_usable_base(fmt: Format):
    x = torch.zeros(4, fmt.block[1])
    x[1, 5] = 3.0
    x[2, :] = 2.0
    x[3, 0], x[3, 1] = 1.0, 1e-30
    parts = codec.encode(fmt, x)
    got = codec.decode(fmt, parts)
    assert got.isfinite().all() and parts["base"].isfinite().all() and (parts["base"] > 0).all()
    assert not got[0].any() and got[1, 5] == 3 and (got[2] == 2).all() and got[3, 0] == 1
    assert got[3, 1].item() == pytest.approx(1e-30, rel=1e-3)


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16"])
def test_plain_formats_are_casts(name: str):
    fmt = format(name)
    x = torch.from_numpy(oracles.floats(10_000).reshape(10, -1))
    parts = codec.encode(fmt, x)
    assert list(parts) == ["codes"] and parts["codes"].dtype == fmt.dtype
    assert torch.equal(parts["codes"], x.to(fmt.dtype)) and torch.equal(
        codec.decode(fmt, parts), x.to(fmt.dtype).float()
    )


# --- other libraries -----------------------------------------------------------------------------------------------


@pytest.mark.rivals
@pytest.mark.parametrize(("name", "e", "m"), [("e2m1", 2, 1), ("e1m2", 1, 2), ("e3m0", 3, 0)])
def test_fp4_is_torchaos(name: str, e: int, m: int):
    from torchao.prototype.custom_fp_utils import _f32_to_floatx_unpacked, _floatx_unpacked_to_f32

    fmt, codes = format(name), torch.arange(16, dtype=torch.uint8)
    assert torch.equal(worth(fmt, codes).view(torch.int32), _floatx_unpacked_to_f32(codes, e, m).view(torch.int32))
    u = torch.from_numpy(interesting_units(fmt, 1_000_000))
    assert torch.equal(units(fmt, u), _f32_to_floatx_unpacked(u, e, m))


@pytest.mark.rivals
def test_e2m1_and_its_packing_are_torchaos_mx():
    from torchao.prototype.mx_formats import kernels

    from lowbit.rows import pack, unpack

    fmt = format("e2m1")
    u = torch.from_numpy(interesting_units(fmt, 1_000_000))
    u = u[: len(u) // 64 * 64]
    codes = units(fmt, u)
    assert torch.equal(codes, kernels.f32_to_f4_unpacked(u))
    assert torch.equal(worth(fmt, codes), kernels.f4_unpacked_to_f32(codes))
    matrix = codes.view(-1, 64)
    assert torch.equal(pack(matrix, 4), kernels.pack_uint4(matrix))
    assert torch.equal(unpack(pack(matrix, 4), 4, 64), kernels.unpack_uint4(pack(matrix, 4)))


@pytest.mark.parametrize("name", ["e4m3", "e5m2"])
def test_fp8_is_torchs(name: str):
    fmt, dtype = format(name), {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}[name]
    codes = torch.arange(256, dtype=torch.uint8)
    np.testing.assert_array_equal(worth(fmt, codes).numpy(), codes.view(dtype).float().numpy())
    u = torch.from_numpy(interesting_units(fmt, 1_000_000)).clamp(
        -fmt.top, fmt.top
    )  # beyond it we saturate, torch's e5m2 overflows
    assert torch.equal(units(fmt, u), u.to(dtype).view(torch.uint8))


def bnb_4bit(x: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(x.reshape(-1), blocksize=64, quant_type=kind, compress_statistics=False)
    high_first = torch.stack(
        [packed.view(-1) >> 4, packed.view(-1) & 15], -1
    )  # bitsandbytes: element 0 in the HIGH nibble
    return high_first.reshape(x.shape), state.absmax


@pytest.mark.rivals
@pytest.mark.parametrize(("name", "kind"), [("nf4", "nf4"), ("bnb-fp4", "fp4")])
def test_4_bit_codebooks_are_bitsandbytes(name: str, kind: str):
    from bitsandbytes.functional import get_4bit_type

    fmt = format(name)
    assert torch.equal(torch.tensor(fmt.values), get_4bit_type(kind, device="cpu"))
    u = torch.from_numpy(interesting_units(fmt, 500_000)).clamp(-1, 1)
    u = torch.cat(
        [torch.ones(len(u) // 63, 1), u[: len(u) // 63 * 63].view(-1, 63)], -1
    )  # absmax 1 in every block of 64
    g = torch.Generator().manual_seed(3)
    for x in (u, torch.randn(8192, 64, generator=g) * torch.exp(8 * torch.randn(8192, 1, generator=g))):
        theirs, absmax = bnb_4bit(x, kind)
        parts = codec.encode(fmt, x)
        assert torch.equal(parts["scale"], absmax)
        ours, same = parts["codes"], torch.ones_like(x, dtype=torch.bool)
        if name == "bnb-fp4":
            # Two reasons to differ, both bitsandbytes' CPU searching the signed table (its CUDA kernel, like us, takes
            # the sign off first): -0 and +0 are neighbours there, so small numbers of either sign get code 0 or 8; and
            # a negative number exactly half way goes to the larger magnitude.
            ours, theirs = ours.where(ours != 8, 0), theirs.where(theirs != 8, 0)
            unit = (x * (1 / absmax).unsqueeze(-1)).numpy()
            middle = oracles.middles(fmt).astype(np.float32)
            same = torch.from_numpy(~((unit < 0) & np.isin(unit, middle)))
        assert torch.equal(ours[same], theirs[same])


@pytest.mark.rivals
@pytest.mark.parametrize(
    ("name", "signed", "exponents", "bits"), [("dyn8", True, 7, 8), ("udyn8", False, 7, 8), ("dyn4", True, 3, 4)]
)
def test_dynamic_maps_are_bitsandbytes_and_torchaos(name: str, signed: bool, exponents: int, bits: int):
    from bitsandbytes import functional
    from torchao.optim.quant_utils import create_dynamic_map

    ours = torch.tensor(format(name).values)
    assert torch.equal(ours, torch.tensor(create_dynamic_map(signed, exponents, bits)))
    if bits == 8:  # bitsandbytes pads shorter maps with zeros to 256
        assert torch.equal(ours, functional.create_dynamic_map(signed, exponents, bits))


@pytest.mark.rivals
@pytest.mark.parametrize("name", ["dyn8", "udyn8"])
def test_dynamic_codes_are_bitsandbytes_generic_formula(name: str):
    # Not quantize_blockwise of an fp32 tensor: on a CPU its lookup table sends 0 to code 131 (dyn8) or 7 (udyn8), loses
    # everything below 2e-5 of the largest, and 0.1 % of the other codes are not the nearest. float64 takes the generic
    # path: argmin |x - map| in fp32, whose subtraction may see a tie where there is none, so the ulps around middles
    # are left out.
    import bitsandbytes  # noqa: F401

    fmt = format(name)
    u = np.clip(interesting_units(fmt, 100_000), -1 if fmt.signed else 0, 1)
    u = np.concatenate([np.ones((len(u) // 255, 1), np.float32), u[: len(u) // 255 * 255].reshape(-1, 255)], -1)
    code = torch.tensor(fmt.values)
    theirs, absmax = torch.ops.bitsandbytes.quantize_blockwise(torch.from_numpy(u).double().reshape(-1), code, 256)
    parts = codec.encode(fmt, torch.from_numpy(u))
    assert torch.equal(parts["scale"], absmax)
    ours, theirs = parts["codes"].numpy(), theirs.reshape(u.shape).numpy()
    # fp32 subtraction of numbers near 1 resolves 2**-24: relative to u that is many ulps where u is small, none where
    # it matters.
    clear = ~oracles.near_a_middle(fmt, u, 2)
    if not fmt.signed:
        clear &= (theirs > 0) | (u == 0)  # they lose live values, we do not
    assert clear.mean() > 0.7 and np.array_equal(ours[clear], theirs[clear])


@pytest.mark.rivals
@pytest.mark.parametrize("name", ["dyn4", "ulin4", "dyn8", "udyn8"])
def test_dynamic_codes_are_torchaos(name: str):
    # torchao compares a difference with half a difference and sends ties up: apart from the ulps around middles it is
    # the same.
    from torchao.optim import quant_utils

    fmt = format(name)
    theirs = quant_utils.quantize_4bit_with_qmap if fmt.bits == 4 else quant_utils.quantize_8bit_with_qmap
    u = interesting_units(fmt, 300_000)
    expected = theirs(torch.from_numpy(u), torch.tensor(fmt.values)).numpy()
    clear = ~oracles.near_a_middle(fmt, u, 2)
    if fmt.zero_code == 0:
        clear &= (expected > 0) | (u == 0)  # they lose live values, we do not
    assert clear.mean() > 0.5 and np.array_equal(units(fmt, u).numpy()[clear], expected[clear])


@pytest.mark.rivals
def test_ulin4_is_lpmms_and_torchaos_map():
    assert torch.equal(torch.tensor(format("ulin4").values), torch.linspace(0, 1, 17)[1:])


@pytest.mark.rivals
def test_int8_is_torchaos_rowwise():
    from torchao.prototype.quantized_training.int8 import quantize_int8_rowwise

    x = random_blocks(format("int8"), 2000, seed=11, spread=3)
    theirs, scale = quantize_int8_rowwise(x)
    parts = codec.encode(format("int8"), x)
    assert torch.equal(parts["scale"], scale) and torch.equal(parts["codes"].view(torch.int8), theirs)


@pytest.mark.rivals
@pytest.mark.parametrize(("name", "limit"), [("int8", 127), ("int4", 7)])
def test_integers_are_torchaos_affine(name: str, limit: int):
    from torchao.quantization.quant_primitives import dequantize_affine, quantize_affine

    fmt = format(name)
    x = random_blocks(fmt, 2000, seed=12)[1:]
    scale = x.abs().amax(-1, keepdim=True) / limit
    block, nothing = (1, fmt.block[1]), torch.zeros_like(scale, dtype=torch.int32)
    theirs = quantize_affine(x, block, scale, nothing, torch.int8, -limit, limit)
    parts = codec.encode(fmt, x)
    assert torch.equal(parts["scale"], scale[:, 0])
    assert torch.equal(parts["codes"], theirs.view(torch.uint8) & ((1 << fmt.bits) - 1))
    assert torch.equal(
        codec.decode(fmt, parts), dequantize_affine(theirs, block, scale, nothing, torch.int8, -limit, limit)
    )


@pytest.mark.rivals
def test_int4_affine_is_torchaos():
    from torchao.quantization.quant_primitives import (
        MappingType,
        choose_qparams_affine,
        dequantize_affine,
        quantize_affine,
    )

    fmt, block = format("int4-affine"), (1, 32)
    x = random_blocks(fmt, 5000, seed=13, spread=2)[1:]
    x[:100] = x[:100].abs()
    x[100:200] = -x[100:200].abs()
    scale, zero = choose_qparams_affine(
        x, MappingType.ASYMMETRIC, block, torch.uint8, 0, 15, eps=1e-30, zero_point_dtype=torch.int32
    )
    # They divide by the scale where we multiply by its reciprocal: a zero point half way between two integers may
    # differ.
    ideal = (-x.amin(-1).clamp(max=0).double() / scale.view(-1).double()).numpy()
    clear = torch.from_numpy(np.abs(ideal - np.floor(ideal) - 0.5) > 1e-5)
    assert clear.double().mean() > 0.99
    theirs = quantize_affine(x, block, scale, zero, torch.uint8, 0, 15)
    decoded = dequantize_affine(theirs, block, scale, zero, torch.uint8, 0, 15)
    parts = codec.encode(fmt, x)
    assert torch.equal(parts["scale"], scale.view(-1))
    assert torch.equal(parts["zero"].int()[clear], zero.view(-1)[clear])
    assert torch.equal(parts["codes"][clear], theirs[clear])
    assert torch.equal(codec.decode(fmt, parts)[clear], decoded[clear])
