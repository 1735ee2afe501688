"""Random bits as a function, and what they do to a parameter that is written in 16 bits."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import around, bits16_at, chunks, floats
from torch import Tensor

from lowbit.rounding import bits16, key, mix, narrow, uniform

KEYS = key(1, 2, 3, 4)
N = 1 << 20
ALL_BITS = torch.arange(1 << 16, dtype=torch.int32)
HALVES = [torch.bfloat16, torch.float16]


def correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.double(), b.double()]))[0, 1])


# --- the hash ------------------------------------------------------------------------------------------------------


def test_the_host_hash_is_lowbias32():
    # The constants and one chain of values, computed with the C function of https://nullprogram.com/blog/2018/07/31/.
    def lowbias32(x: np.uint32) -> np.uint32:
        with np.errstate(over="ignore"):
            x ^= x >> np.uint32(16)
            x *= np.uint32(0x7FEB352D)
            x ^= x >> np.uint32(15)
            x *= np.uint32(0x846CA68B)
            x ^= x >> np.uint32(16)
        return x

    for x in (0, 1, 2, 12345, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF):
        assert mix(x) == int(lowbias32(np.array([x], dtype=np.uint32))[0])
    assert mix(2**32 + 5) == mix(5)


@given(
    st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1)),
    st.one_of(st.integers(0, 2**12), st.integers(2**31 - 9, 2**35), st.sampled_from([2**33, 2**34, 2**40])),
    st.integers(-5, 5),
    st.integers(0, 40),
)
def test_bits_equal_a_statement_in_plain_integers(keys: tuple[int, int], start: int, nudge: int, count: int):
    start = max(0, start + nudge)
    got = bits16(keys, start, count)
    assert got.dtype == torch.int32 and got.shape == (count,)
    assert got.tolist() == [bits16_at(keys, i) for i in range(start, start + count)]


@pytest.mark.parametrize(
    "around_here", [0, 2**31, 2**32, 2**33, 2**34], ids=lambda x: f"2**{x.bit_length() - 1}" if x else "0"
)
def test_bits_across_every_place_where_a_counter_could_wrap(around_here: int):
    start = max(0, around_here - 33)
    for first in (start, start + 1):
        assert bits16(KEYS, first, 100).tolist() == [bits16_at(KEYS, i) for i in range(first, first + 100)]


@given(st.lists(st.integers(0, 97), max_size=30), st.integers(0, 2**34))
def test_bits_do_not_depend_on_how_the_work_is_cut(sizes: list[int], start: int):
    pieces = [bits16(KEYS, start + first, count) for first, count in chunks(1000, sizes)]
    assert torch.equal(torch.cat(pieces), bits16(KEYS, start, 1000))


def test_bits_are_uniform_in_both_halves():
    bits = bits16(KEYS, 0, N)
    assert int(bits.min()) >= 0 and int(bits.max()) < 1 << 16
    for half in (bits[::2], bits[1::2]):
        for byte in (half >> 8, half & 0xFF):
            count = torch.bincount(byte, minlength=256).double()
            expected = len(half) / 256
            chi2 = float(((count - expected) ** 2 / expected).sum())
            assert 150 < chi2 < 375  # 255 degrees of freedom: mean 255, deviation 22.6
        ones = (half.unsqueeze(1) >> torch.arange(16, dtype=torch.int32)) & 1
        assert (ones.double().mean(0) - 0.5).abs().max() < 5 * 0.5 / len(half) ** 0.5


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 5, 7, 8, 16, 64, 256, 4096])
def test_neighbouring_elements_are_not_correlated(lag: int):
    bits = bits16(KEYS, 0, N)
    for parity in (0, 1):
        a, b = bits[:-lag][parity::2], bits[lag:][parity::2]
        assert abs(correlation(a, b)) < 5 / len(a) ** 0.5
        assert abs(correlation(a & 0xFF, b & 0xFF)) < 5 / len(a) ** 0.5
        assert abs(correlation(a >> 15, b >> 15)) < 5 / len(a) ** 0.5


BASE = (7, 100, 0x12345678, 2)
OTHERS = [tuple(v + (i == j) * d for j, v in enumerate(BASE)) for i in range(4) for d in (1, -1)]


@pytest.mark.parametrize("other", [*OTHERS, (7 + 2**32, *BASE[1:]), (7, 100 + 2**32, *BASE[2:])], ids=str)
def test_keys_that_differ_by_one_give_unrelated_bits(other: tuple[int, int, int, int]):
    a, b = bits16(key(*BASE), 0, N), bits16(key(*other), 0, N)
    assert abs(correlation(a, b)) < 5 / N**0.5
    assert int((a == b).sum()) < N / 65536 + 6 * 4
    for related in (a ^ b, (a - b) & 0xFFFF):  # a stream that is another one xor or plus a constant is no new stream
        count = torch.bincount(related >> 8, minlength=256).double()
        assert float(((count - N / 256) ** 2 / (N / 256)).sum()) < 375


def test_keys_do_not_collide_over_what_a_run_uses():
    grid = itertools.product((0, 1, 2**32, -1), range(50), range(20), range(8))
    keys = [key(*words) for words in grid]
    assert len(set(keys)) == len(keys)
    assert all(0 <= word < 2**32 for pair in keys for word in pair)
    swapped = {key(*p) for p in itertools.permutations((1, 2, 3, 4))}
    assert len(swapped) == 24  # the order of the words matters


@pytest.mark.parametrize("offset", [2**33, 2**34, 2**35], ids=["2**33", "2**34", "2**35"])
@pytest.mark.parametrize("parity", [0, 1], ids=["even", "odd"])
def test_elements_far_apart_are_unrelated(offset: int, parity: int):
    # "Elements beyond 2**33 fold their high bits into the second key."
    a, b = (bits16(KEYS, start, 1 << 17)[parity::2] for start in (0, offset))
    assert abs(correlation(a, b)) < 5 / len(a) ** 0.5
    assert len(((a - b) & 0xFFFF).unique()) > 10_000, "one stream is the other plus a constant"


@pytest.mark.parametrize("parity", [0, 1], ids=["even", "odd"])
def test_two_streams_whose_first_keys_are_close_are_unrelated(parity: int):
    # Among the many (step, tensor, operand) of a run some first keys lie within a tensor's length of each other.
    shift = 50
    other = ((KEYS[0] + shift) & 0xFFFFFFFF, KEYS[1] ^ 0x9A3F0C11)
    a, b = bits16(KEYS, 2 * shift, 1 << 17)[parity::2], bits16(other, 0, 1 << 17)[parity::2]
    assert abs(correlation(a, b)) < 5 / len(a) ** 0.5
    assert len(((a - b) & 0xFFFF).unique()) > 10_000, "one stream is the other plus a constant"


def test_uniform_is_the_middle_of_a_cell():
    u = uniform(ALL_BITS)
    assert u.dtype == torch.float32 and float(u.min()) > 0 and float(u.max()) < 1
    assert torch.equal(u.double(), (torch.arange(1 << 16).double() + 0.5) / 65536)  # exact
    assert torch.equal((1 - u).double(), 1 - u.double()) and float(u.double().mean()) == 0.5


# --- narrow: fp32 to 16 bits ---------------------------------------------------------------------------------------


def grid(dtype: torch.dtype) -> np.ndarray:
    """Every finite value of a 16-bit dtype with both infinities, ascending, in float64."""
    everything = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype).double()
    return np.unique(everything[~everything.isnan()].numpy() + 0.0)


def samples(dtype: torch.dtype) -> np.ndarray:
    """fp32 numbers at every exponent of the dtype, subnormals, exact values, the largest, and beside all of them."""
    info, rng = torch.finfo(dtype), np.random.default_rng(5)
    points = [0.0, 1.0, 1.5, float(info.max), float(info.tiny), 3e38]
    points += [2.0**-14, 2.0**-24, 2.0**-25, 3 * 2.0**-24, 2.0**-133]
    low, high = (-30, 15) if dtype == torch.float16 else (-149, 127)
    random = rng.choice([-1, 1], 30) * rng.uniform(1, 2, 30) * 2.0 ** rng.uniform(low, high, 30)
    return np.concatenate([around(points), random.astype(np.float32)])


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_nearest_is_torchs_cast(dtype: torch.dtype):
    x = torch.from_numpy(np.concatenate([floats(100_000), samples(dtype)]))
    assert torch.equal(narrow(x, dtype).view(torch.int16), x.to(dtype).view(torch.int16))
    assert torch.equal(narrow(x, torch.float32, torch.zeros_like(x, dtype=torch.int32)), x)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_stochastic_gives_one_of_the_two_neighbours_in_the_right_proportion(dtype: torch.dtype):
    line = grid(dtype)
    for x in samples(dtype):
        got = narrow(torch.full((1 << 16,), float(x)), dtype, ALL_BITS)
        result = got.double().numpy()
        low, high = (
            line[np.searchsorted(line, float(x), "right") - 1],
            line[min(np.searchsorted(line, float(x), "left"), len(line) - 1)],
        )
        assert set(np.unique(result)) <= {low, high}, (x, np.unique(result))
        if not np.isfinite([low, high]).all():
            continue
        # The mean over ALL random bits. Exact: 65,536 16-bit numbers add up exactly in float64.
        resolution = 0.0
        if dtype == torch.float16 and abs(x) < 2.0**-14:
            resolution = 2.0**-16 * 2.0**-24  # 16 random bits over one step of the subnormal grid
        elif dtype == torch.bfloat16:
            assert len(np.unique(result)) == (1 if low == high else 2)
        assert abs(float(np.mean(result)) - float(x)) <= resolution, x
        assert (np.signbit(got.float().numpy()) == np.signbit(x)).all(), "even 0 keeps the sign"


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_exact_values_stay(dtype: torch.dtype):
    everything = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    for bits in (0, 1, 0x7FFF, 0xFFFF):
        got = narrow(everything.float(), dtype, torch.full((1 << 16,), bits, dtype=torch.int32))
        same = (got.view(torch.int16) == everything.view(torch.int16)) | (got.isnan() & everything.isnan())
        assert same.all()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_infinity_nan_and_overflow(dtype: torch.dtype):
    x = torch.tensor([float("inf"), -float("inf"), float("nan")]).repeat_interleave(1 << 16)
    got = narrow(x, dtype, ALL_BITS.repeat(3)).view(3, -1)
    assert (got[0] == float("inf")).all() and (got[1] == -float("inf")).all() and got[2].isnan().all()
    top = float(torch.finfo(dtype).max)
    step = top - float(torch.nextafter(torch.tensor(top, dtype=dtype), torch.tensor(0.0, dtype=dtype)))
    beyond = torch.full((1 << 16,), top + step / 4)
    for sign in (1, -1):
        got = narrow(sign * beyond, dtype, ALL_BITS).double() * sign
        assert set(got.unique().tolist()) == {top, float("inf")}
        assert (got == float("inf")).double().mean() == 0.25
    assert narrow(torch.tensor([1e30]), torch.float16, torch.zeros(1, dtype=torch.int32)).item() == float("inf")


def test_more_random_bits_never_round_lower():
    for dtype in HALVES:
        for x in (0.1, 1.001, 65000.3, 3e-6, 1e-7):
            up = narrow(torch.full((1 << 16,), x), dtype, ALL_BITS).double()
            assert (up.diff() >= 0).all()


def test_another_dtype_is_refused():
    with pytest.raises(TypeError, match="float64"):
        narrow(torch.ones(2), torch.float64, torch.zeros(2, dtype=torch.int32))
