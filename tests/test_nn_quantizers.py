"""Values: the released quantizers against their own outputs, every operand against the codec and on every backend, odd
shapes and values."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import lowbit
from lowbit import backends, codec
from lowbit.native.build import BuildError
from lowbit.native.library import load
from lowbit.nn import Operand, stablespam
from lowbit.nn.fake import fake_quantize
from lowbit.nn.presets import find_recipe, recipes
from lowbit.rounding import key
from lowbit.rows import decode_rows, encode_rows

GOLDEN = np.load(Path(__file__).parent / "golden" / "quant_ref_small.npz")
SIGNED = [name for name in lowbit.formats() if lowbit.format(name).signed]


@pytest.fixture(autouse=True)
def one_thread():
    """These tensors are too small for two: on a busy machine, waking the second takes most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def golden(name: str) -> Tensor:
    return torch.from_numpy(GOLDEN[name])


# --- The release, bit for bit --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("operand", "expected"),
    [("stablespam-fp4", "fp4_e1m2_top2_f32"), ("stablespam-int4-activation", "int4a_deq_f32")],
)
def test_released_values(operand: str, expected: str) -> None:
    assert torch.equal(fake_quantize(golden("x"), Operand(operand)), golden(expected))


def test_released_int4_weight() -> None:
    x = golden("x")
    codes, scale, zero = stablespam.int4_weight_codes(x.view(-1, 256))
    assert torch.equal(codes.view_as(x).to(torch.uint8), golden("int4w_codes_f32"))
    assert torch.equal(scale, golden("int4w_scale_f32"))
    assert torch.equal(zero, golden("int4w_zero_f32"))
    values = (golden("int4w_codes_f32").float().view(-1, 256) - golden("int4w_zero_f32")) * golden("int4w_scale_f32")
    assert torch.equal(fake_quantize(x, Operand("stablespam-int4-weight")), values.view_as(x))


def reference_fp4(group: np.ndarray) -> np.ndarray:
    """The formula of the FP4 quantizer on one group of at most 256, in float64."""
    kept = np.argsort(-np.abs(group), kind="stable")[:2]
    rest = group.astype(np.float64)
    rest[kept] = 0
    alpha = max(np.abs(rest).max(initial=0), float(np.float32(1e-6)))
    out = alpha / 4 * np.round(4 * rest / alpha)
    out[kept] = group[kept]
    return out


def reference_int4_activation(group: np.ndarray) -> np.ndarray:
    kept = np.argsort(-np.abs(group), kind="stable")[:2]
    rest = group.astype(np.float64)
    rest[kept] = 0
    scale = max(np.abs(rest).max(initial=0), float(np.float32(1e-6)))
    out = np.clip(np.round(rest * 7 / scale), -8, 7) * scale / 7
    out[kept] = group[kept]
    return out


def reference_int4_weight(group: np.ndarray) -> np.ndarray:
    group = group.astype(np.float64)
    scale = max(group.max() - group.min(), float(np.float32(1e-5))) / 15
    zero = np.clip(-np.round(group.min() / scale), 0, 15)
    return (np.clip(np.round(group / scale) + zero, 0, 15) - zero) * scale


REFERENCES = {
    "stablespam-fp4": reference_fp4,
    "stablespam-int4-activation": reference_int4_activation,
    "stablespam-int4-weight": reference_int4_weight,
}


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize("shape", [(3, 5461), (7, 33), (1, 1), (1, 2), (1, 257), (256, 1), (4, 64)])
def test_released_groups_run_over_the_flat_tensor(name: str, shape: tuple[int, int]) -> None:
    """Groups cross rows, the last one is shorter: what each group becomes is checked against the formula."""
    generator = torch.Generator().manual_seed(shape[1])
    x = torch.randn(shape, generator=generator)
    flat = x.flatten().numpy()
    expected = np.concatenate([REFERENCES[name](flat[i : i + 256]) for i in range(0, len(flat), 256)])
    got = fake_quantize(x, Operand(name)).flatten().numpy()
    np.testing.assert_allclose(got, expected, rtol=3e-7, atol=1e-12)


def test_a_group_of_one_sign_saturates_as_released_but_not_in_our_format() -> None:
    x = torch.linspace(5.0, 5.78, 256).view(1, 256)
    released = fake_quantize(x, Operand("stablespam-int4-weight"))
    assert released.unique().numel() == 1
    assert released[0, 0].item() == pytest.approx(0.78, abs=0.002)
    ours = fake_quantize(x, Operand("int4-affine", block=256))
    assert (ours - x).abs().max() < 5.78 / 15 / 2 * 1.01


def test_fp4_of_the_release_has_nine_levels() -> None:
    x = torch.randn(1, 256 * 200, generator=torch.Generator().manual_seed(0))
    groups, values = x.view(-1, 256), fake_quantize(x, Operand("stablespam-fp4")).view(-1, 256)
    outliers = groups.abs().topk(2).indices
    assert torch.equal(values.gather(1, outliers), groups.gather(1, outliers))
    alpha = groups.scatter(1, outliers, 0).abs().amax(-1, keepdim=True)
    levels = values.scatter(1, outliers, 0) / (alpha / 4)
    torch.testing.assert_close(levels, levels.round(), rtol=1e-6, atol=0)
    assert levels.round().unique().tolist() == list(range(-4, 5))


@given(st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, 3.0, -3.0, 1e-7, 1e-40, 0.25]), min_size=3, max_size=256))
def test_equal_magnitudes_may_be_taken_in_any_order(values: list[float]) -> None:
    """The release takes two of several equal maxima, ours the first two: only the last bit of INT4 can tell."""
    x = torch.tensor([values])
    for name in ("stablespam-fp4", "stablespam-int4-activation"):
        got = fake_quantize(x, Operand(name))[0].sort().values
        expected = torch.from_numpy(REFERENCES[name](x[0].numpy())).sort().values
        torch.testing.assert_close(got.double(), expected, rtol=3e-7, atol=1e-12)


# --- Operands of formats -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SIGNED)
@pytest.mark.parametrize("shape", [(5, 5461), (3, 33), (1, 1), (2, 7), (4, 256)])
def test_operands_are_what_the_format_would_store(name: str, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(shape, generator=generator) * torch.exp(3 * torch.randn(shape[0], 1, generator=generator))
    stored = lowbit.quantize(x, name).dequantize()
    assert torch.equal(fake_quantize(x, Operand(name)), stored)


@pytest.mark.parametrize("name", ["int4:16", "e2m1:16", "e2m1:32", "nf4", "int8", "bf16", "fp16", "int4-affine"])
def test_stochastic_operands_are_what_the_format_would_store(name: str) -> None:
    x = torch.randn(9, 77, generator=torch.Generator().manual_seed(2))
    noise = key(5, 6, 7, 8)
    operand = Operand(name, rounding="stochastic")
    fmt = lowbit.format(name)
    stored = decode_rows(fmt, encode_rows(fmt, x, noise), 77)
    assert torch.equal(fake_quantize(x, operand, noise), stored)
    assert not torch.equal(fake_quantize(x, operand, key(5, 6, 7, 9)), stored)


def _edges(fmt: lowbit.Format) -> Tensor:
    """All grid points, all half-way points and their neighbours, in units of the scale."""
    middles = torch.tensor(fmt.thresholds)
    points = torch.cat([middles, torch.tensor([v for v, _ in fmt.ladder])])
    points = torch.cat(
        [points, torch.nextafter(points, torch.tensor(9e9)), torch.nextafter(points, -torch.tensor(9e9))]
    )
    return torch.cat([points, -points]).clamp(-fmt.top, fmt.top)


@pytest.mark.parametrize("name", ["int4", "int8", "e2m1", "e1m2"])
@pytest.mark.parametrize("scale", [1.0, 0.37, 3e-38, 1e-44, 2e36])
def test_short_cuts_round_like_the_codec(name: str, scale: float) -> None:
    fmt = lowbit.format(name)
    x = _edges(fmt) * scale
    x = torch.cat([x, torch.tensor([fmt.top * scale])]).view(1, -1)
    fmt = fmt.with_block(x.shape[1])
    expected = codec.decode(fmt, codec.encode(fmt, x.unsqueeze(1))).squeeze(1)
    assert torch.equal(fake_quantize(x, Operand(fmt.name)), expected)


@pytest.mark.parametrize("name", ["int4", "e2m1", "e1m2", "nf4", "e4m3"])
def test_a_non_finite_value_shows_in_its_whole_block_and_nowhere_else(name: str) -> None:
    for bad in (float("nan"), float("inf"), -float("inf")):
        x = torch.ones(2, 64)
        x[0, 3] = bad
        got = fake_quantize(x, Operand(name, block=32))
        assert got[0, :32].isnan().all()
        assert torch.equal(got[0, 32:], x[0, 32:]) and torch.equal(got[1], x[1])


finite = st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=True)


@given(
    st.sampled_from(["int4", "e2m1", "e1m2", "nf4", "int4-affine", *REFERENCES]),
    st.integers(1, 4), st.integers(1, 70), st.integers(1, 40), st.data(),
)  # fmt: skip
def test_any_shape_and_value(name: str, rows: int, cols: int, block: int, data: st.DataObject) -> None:
    """Shape kept, input untouched, zeros stay zero, every error at most half the format's widest step."""
    bound = finite.filter(lambda v: abs(v) < 1e30)
    values = data.draw(st.lists(bound, min_size=rows * cols, max_size=rows * cols))
    x = torch.tensor(values).view(rows, cols)
    before = x.clone()
    operand = Operand(name, block=block)
    y = fake_quantize(x, operand)
    assert y.shape == x.shape and y.dtype == torch.float32 and torch.equal(x, before)
    assert y.isfinite().all()
    if name != "stablespam-int4-weight":  # whose zero is not always a level
        assert (y[x == 0] == 0).all()
        assert (y - x).abs().max() <= x.abs().max() * 0.34 + 1e-5  # NF4's widest cell is .30 of the top


def test_outliers_of_any_format_stay_exact_and_leave_the_scale() -> None:
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(3))
    x[:, 10] = 100.0
    got = fake_quantize(x, Operand("int4", block=64, outliers=1))
    assert torch.equal(got[:, 10], x[:, 10])
    rest = x.clone()
    rest[:, 10] = 0
    expected = fake_quantize(rest, Operand("int4", block=64))
    expected[:, 10] = 100.0
    assert torch.equal(got, expected)


def test_flat_blocks_cross_rows() -> None:
    x = torch.randn(6, 10, generator=torch.Generator().manual_seed(4))
    got = fake_quantize(x, Operand("int4", block=32, flat=True))
    expected = fake_quantize(x.view(1, 60), Operand("int4", block=32)).view(6, 10)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_rounding_is_done_in_fp32(dtype: torch.dtype) -> None:
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(5)).to(dtype)
    assert torch.equal(fake_quantize(x, Operand("e2m1")), fake_quantize(x.float(), Operand("e2m1")))


def test_strided_and_empty_inputs() -> None:
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(6))
    for name in ("int4", "e2m1", "stablespam-fp4"):
        operand = Operand(name, block=16)
        assert torch.equal(fake_quantize(x.t(), operand), fake_quantize(x.t().contiguous(), operand))
        for shape in ((0, 5), (5, 0), (0, 0)):
            assert fake_quantize(torch.empty(shape), operand).shape == shape


# --- The backends --------------------------------------------------------------------------------------------------


@pytest.fixture(params=["reference", "native"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("LOWBIT_BACKEND", request.param)
    if request.param == "native":
        try:
            load()
        except BuildError as error:
            pytest.skip(f"no native library: {error}")
    return request.param


def assert_same(got: Tensor, expected: Tensor) -> None:
    """Bit for bit, signs of zeros too; one NaN is as good as another."""
    assert got.shape == expected.shape and got.dtype == expected.dtype == torch.float32
    differ = got.view(torch.int32) != expected.contiguous().view(torch.int32)
    assert not (differ & ~(got.isnan() & expected.isnan())).any()


def stored(fmt: lowbit.Format, x: Tensor, noise: tuple[int, int] | None) -> Tensor:
    return decode_rows(fmt, encode_rows(fmt, x, noise), x.shape[1])


def with_odd_values(x: Tensor) -> Tensor:
    """Zeros of either sign, subnormals, the very large and the very small beside others, NaNs and infinities."""
    x = x.clone()
    flat = x.view(-1)
    flat[:20] = 0.0
    flat[3:40:4] *= -0.0
    flat[40:60] *= 1e-42
    flat[60:80] *= 2e37
    flat[81::7] *= 1e-3
    flat[100::257], flat[333::1001], flat[334::1003] = torch.nan, torch.inf, -torch.inf
    return x


OPERANDS = sorted({operand for name in recipes() for operand in find_recipe(name).operands}, key=str)
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = [(5, 300), (1, 17_001), (3, 33), (9, 64), (2, 5461), (3, 300), (1, 1), (130, 3), (0, 5), (5, 0)]


@pytest.mark.parametrize("name", [*SIGNED, "int4:16", "e2m1:16", "e1m2:5", "int8:1000", "nf4:7", "e4m3:32"])
@pytest.mark.parametrize("noise", [None, key(1, 2, 3, 4)], ids=["nearest", "stochastic"])
def test_fake_is_decode_of_encode(backend: str, name: str, noise: tuple[int, int] | None) -> None:
    fmt = lowbit.format(name)
    for dtype, shape in zip(itertools.cycle(DTYPES), SHAPES):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(shape[1])).to(dtype)
        for values in (x, with_odd_values(x)):
            assert_same(backends.fake(fmt, values, noise), stored(fmt, values.float(), noise))


anything = st.floats(width=32, allow_nan=True, allow_infinity=True, allow_subnormal=True)


@given(
    st.sampled_from(SIGNED), st.integers(1, 300), st.booleans(),
    st.integers(1, 4), st.lists(st.one_of(st.sampled_from([0.0, -0.0, 0.25]), anything), min_size=1, max_size=300),
)  # fmt: skip
def test_the_backends_agree(name: str, block: int, stochastic: bool, rows: int, values: list[float]) -> None:
    fmt = lowbit.format(name)
    fmt = fmt.with_block(block) if fmt.compressed else fmt
    x = torch.tensor(values * rows).view(rows, -1)
    noise = key(5, 6, 7, 8) if stochastic else None
    assert_same(backends.fake(fmt, x, noise), backends.reference.fake(fmt, x, noise))


@pytest.mark.parametrize("operand", OPERANDS, ids=str)
def test_every_recipe_is_the_same_on_every_backend(operand: Operand, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outliers, flat groups and released quantizers too; blocks longer than a row; transposed and narrow inputs."""
    plain = operand.spec is not None and isinstance(operand.block, int) and not operand.hadamard
    kept = [operand, Operand(operand.format, outliers=2, flat=True)] if plain else [operand]
    kept += (
        [Operand(operand.format, block=2000, outliers=3)]
        if operand.spec is None or (plain and not operand.spec.scaling.outer)
        else []
    )
    for shape in SHAPES[:6]:
        x = with_odd_values(torch.randn(shape, generator=torch.Generator().manual_seed(shape[1])))
        for values in (x, x.t(), x.bfloat16(), x.double()):
            for each in kept:
                whole = values[:, : values.shape[1] // each.hadamard * each.hadamard] if each.hadamard else values
                monkeypatch.setenv("LOWBIT_BACKEND", "reference")
                expected = fake_quantize(whole, each, key(1, 2, 3, 4))
                monkeypatch.delenv("LOWBIT_BACKEND")
                assert_same(fake_quantize(whole, each, key(1, 2, 3, 4)).float().contiguous(), expected.float())


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("noise", [None, key(9, 8, 7, 6)], ids=["nearest", "stochastic"])
def test_any_number_of_threads_gives_the_same_bits(backend: str, threads: int, noise: tuple[int, int] | None) -> None:
    for name, shape in (("int4:16", (1, 40_001)), ("nf4:7", (1, 40_001)), ("e2m1", (300, 129))):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(9))
        torch.set_num_threads(1)
        one = backends.fake(lowbit.format(name), x, noise)
        torch.set_num_threads(threads)
        assert_same(backends.fake(lowbit.format(name), x, noise), one)


def test_flat_blocks_number_their_random_bits_along_the_flat_tensor(backend: str) -> None:
    x = torch.randn(7, 333, generator=torch.Generator().manual_seed(7))
    noise = key(1, 2, 3, 4)
    got = fake_quantize(x, Operand("e2m1:32", rounding="stochastic", flat=True), noise)
    assert_same(got, stored(lowbit.format("e2m1:32"), x.view(1, -1), noise).view_as(x))


def test_what_has_no_memory_is_the_business_of_the_reference(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    def refuse(*_: object, **__: object) -> Tensor:
        raise AssertionError("asked")

    monkeypatch.setattr(backends.native, "fake", refuse)
    operand = Operand("int4:16", outliers=1)
    assert fake_quantize(torch.empty(4, 33, device="meta"), operand).shape == (4, 33)
    with FakeTensorMode():
        assert fake_quantize(torch.ones(4, 33), operand).shape == (4, 33)
    if backend == "native":
        with pytest.raises(AssertionError, match="asked"):
            fake_quantize(torch.nn.Parameter(torch.ones(4, 33)), operand)


def test_a_negative_view_is_what_it_shows(backend: str) -> None:
    x = torch.tensor([[2.0 + 3.0j]]).conj().imag
    assert x.is_neg() and x.is_contiguous()
    assert backends.fake(lowbit.format("int4"), x).item() == -3.0
