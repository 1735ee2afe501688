import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import around, floats
from torch import Tensor

from lowbit import words

INF, NAN = float("inf"), float("nan")
fp32 = st.floats(width=32)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal bit patterns; any NaN equals any NaN."""
    assert a.dtype == b.dtype == torch.float32
    return bool(((a.view(torch.int32) == b.view(torch.int32)) | (a.isnan() & b.isnan())).all())


def test_sqrt_is_correctly_rounded():
    # NumPy's float32 root is the machine's sqrtss, correctly rounded by IEEE 754.
    x = np.concatenate([np.abs(floats(1_000_000)), around([0.0, 1.0, 2.0, 4.0, 2.0**-126, 2.0**-149, 3e38])])
    x = np.abs(x[np.isfinite(x)])
    assert same_bits(words.sqrt(torch.from_numpy(x)), torch.from_numpy(np.sqrt(x)))


def test_sqrt_over_two_binades_exhaustively():
    x = (np.arange(1 << 24, dtype=np.uint32) + 0x3F800000).view(
        np.float32
    )  # [1, 4): every mantissa, both exponent parities
    assert same_bits(words.sqrt(torch.from_numpy(x)), torch.from_numpy(np.sqrt(x)))


def test_sqrt_of_what_is_not_a_positive_number():
    got = words.sqrt(torch.tensor([0.0, -0.0, INF, -1.0, NAN]))
    assert same_bits(got, torch.tensor([0.0, -0.0, INF, NAN, NAN]))


def test_lerp_is_the_plain_formula():
    a, b, w = (torch.from_numpy(np.random.default_rng(i).standard_normal(100_000).astype(np.float32)) for i in range(3))
    na, nb, nw = a.numpy(), b.numpy(), w.numpy()
    plain = np.where(nw < 0.5, na + nw * (nb - na), nb - (1 - nw) * (nb - na))
    assert same_bits(words.lerp(a, b, w), torch.from_numpy(plain))
    assert torch.equal(words.lerp(a, b, torch.zeros(())), a)
    assert torch.equal(words.lerp(1e8 * a, b, torch.ones(())), b)
    # Broadcasting, and a weight that is a scalar tensor: rounded once to fp32, not carried in double.
    c = torch.tensor(0.1)
    assert same_bits(words.lerp(a, b, c), torch.from_numpy(na + np.float32(0.1) * (nb - na)))


def test_a_lerp_of_something_that_is_not_finite_is_not_finite():
    one = torch.ones(())
    for a, b in ((NAN, 1.0), (1.0, NAN), (INF, 1.0), (1.0, -INF), (INF, INF)):
        assert not words.lerp(torch.tensor(a), torch.tensor(b), one * 0.5).isfinite()


def test_abs_clears_the_sign_bit():
    x = torch.tensor([-0.0, 0.0, -1.0, -INF, 2.0**-149])
    assert same_bits(words.abs(x), torch.tensor([0.0, 0.0, 1.0, INF, 2.0**-149]))
    assert words.abs(torch.tensor(NAN)).isnan()


def test_sign():
    x = torch.tensor([-INF, -(2.0**-149), 0.0, 2.0**-149, INF, NAN])
    assert same_bits(words.sign(x), torch.tensor([-1.0, -1.0, 0.0, 1.0, 1.0, NAN]))
    assert words.sign(torch.tensor(-0.0)) == 0 and words.sign(x).dtype == torch.float32


def test_where_chooses_and_does_not_mix():
    got = words.where(torch.tensor([True, False]), torch.tensor([1.0, NAN]), torch.tensor([INF, 2.0]))
    assert got.tolist() == [1.0, 2.0]


@given(fp32, fp32)
def test_maximum_and_minimum_keep_a_unless_b_is_beyond_it(a: float, b: float):
    ta, tb = torch.tensor(a, dtype=torch.float32), torch.tensor(b, dtype=torch.float32)
    assert same_bits(words.maximum(ta, tb), tb if b > a else ta)
    assert same_bits(words.minimum(ta, tb), tb if b < a else ta)


@pytest.mark.parametrize("word", [words.maximum, words.minimum])
def test_a_nan_in_a_stays_and_a_nan_in_b_is_passed_over(word):
    nan, one = torch.tensor(NAN), torch.tensor(1.0)
    assert word(nan, one).isnan() and word(one, nan) == 1


@given(fp32, fp32, fp32)
def test_clip_holds_between(a: float, low: float, high: float):
    low, high = sorted((low, high)) if low == low and high == high else (-1.0, 1.0)
    got = words.clip(*(torch.tensor(v, dtype=torch.float32) for v in (a, low, high)))
    expected = a if a != a else min(max(a, low), high)
    assert same_bits(got, torch.tensor(expected, dtype=torch.float32)) or got == expected
