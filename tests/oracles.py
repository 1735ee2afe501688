"""Second opinions: what the library should compute, stated independently of how it computes it.

Slow, exact and short: searches in float64, which holds the middle of any two codes exactly, and hashes in plain Python
integers. Nothing here calls the library's arithmetic; a `Format` is only read for its values and its tie rule.
"""

import math
from collections.abc import Iterable, Iterator

import numpy as np

from lowbit.formats import Format

FLT_MAX = float(np.finfo(np.float32).max)
TINY = float(np.finfo(np.float32).tiny)  # the smallest normal number
ULP = 2.0**-23


def floats(count: int, seed: int = 0) -> np.ndarray:
    """Finite fp32 numbers with random bits: every exponent, subnormals and both zeros."""
    raw = np.random.default_rng(seed).integers(0, 1 << 32, count, dtype=np.uint64).astype(np.uint32)
    x = raw.view(np.float32)
    return np.where(np.isfinite(x), x, np.float32(0))


def around(points: Iterable[float]) -> np.ndarray:
    """Each point in fp32, the number below it and the number above it, with both signs."""
    p = np.asarray(list(points), dtype=np.float32)
    three = np.concatenate([np.nextafter(p, np.float32(-np.inf)), p, np.nextafter(p, np.float32(np.inf))])
    return np.concatenate([three, -three])


def values(fmt: Format) -> np.ndarray:
    """The value of each code in float64."""
    return np.asarray(fmt.values, dtype=np.float64)


def rungs(fmt: Format) -> list[tuple[float, int]]:
    """(value, code) in ascending order, without what encoding never gives: NaN, infinities, -0, -2**(bits-1)."""
    usable = [(v, k) for k, v in enumerate(fmt.values) if math.isfinite(v) and not (v == 0 and math.copysign(1, v) < 0)]
    if fmt.kind == "integer":
        usable = [(v, k) for v, k in usable if abs(v) <= fmt.limit]
    return sorted(usable)


def middles(fmt: Format) -> np.ndarray:
    """Half way between neighbouring values, exactly."""
    v = np.asarray([value for value, _ in rungs(fmt)])
    return (v[1:] + v[:-1]) / 2


def nearest(fmt: Format, u: np.ndarray) -> np.ndarray:
    """The code nearest to u (fp32, in units of the scale); sign-magnitude formats keep the sign of what becomes 0.

    A tie goes to the even code, or to the smaller magnitude or value. The tie is where fp32 sees it: at the middle
    rounded to fp32, which is what bitsandbytes and torchao compare with.
    """
    assert u.dtype == np.float32
    x = np.abs(u) if fmt.sign_magnitude else u
    ladder = rungs(fmt)
    if fmt.sign_magnitude:
        ladder = [(v, k) for v, k in ladder if k < 1 << (fmt.bits - 1)]
    v, codes = np.asarray([v for v, _ in ladder]), np.asarray([k for _, k in ladder])
    middle = ((v[1:] + v[:-1]) / 2).astype(np.float32).astype(np.float64)
    rank = np.searchsorted(middle, x.astype(np.float64), side="left")  # the count of middles < u
    if fmt.ties == "even":
        tie = (rank < len(middle)) & (middle[np.minimum(rank, len(middle) - 1)] == x)
        rank = rank + (tie & (codes[rank] % 2 == 1))
    code = codes[rank]
    if fmt.sign_magnitude:
        code = code | (np.signbit(u).astype(np.int64) << (fmt.bits - 1))
    if not fmt.signed and fmt.values[0] == 0:  # a live value of an unsigned format is never lost
        code = np.where(x > 0, np.maximum(code, ladder[1][1]), code)
    return code.astype(np.uint8)


def near_a_middle(fmt: Format, u: np.ndarray, ulps: int = 1) -> np.ndarray:
    """Whether u is at a middle or so many fp32 steps beside one: where rivals that round differently may disagree."""
    points = middles(fmt).astype(np.float32)
    points = np.sort(np.concatenate([points, -points]))
    at = np.clip(np.searchsorted(points, u), 1, len(points) - 1)
    gap = np.minimum(np.abs(points[at] - u), np.abs(points[at - 1] - u)).astype(np.float64)
    return gap <= ulps * np.spacing(np.maximum(np.abs(u), np.float32(1e-30))).astype(np.float64)


def bit_stream(codes: Iterable[int], bits: int, length: int) -> list[int]:
    """Codes as one little-endian number, in bytes."""
    number = sum(int(code) << (bits * i) for i, code in enumerate(codes))
    return list(number.to_bytes(length, "little"))


def bits16_at(keys: tuple[int, int], element: int) -> int:
    """The 16 random bits of one element: half `element % 2` of the 32-bit hash of `element // 2`."""
    word = 0xFFFFFFFF
    pair = element // 2
    x = (pair + keys[0]) & word
    x ^= x >> 16
    x = (x * 0x7FEB352D) & word
    x ^= x >> 15
    x ^= ((pair >> 32) * 0x9E3779B1 + keys[1]) & word
    x = (x * 0x846CA68B) & word
    x ^= x >> 16
    return (x >> (16 * (element % 2))) & 0xFFFF


def chunks(total: int, sizes: Iterable[int]) -> Iterator[tuple[int, int]]:
    """(start, count) pieces of the given sizes, in order, until `total` is covered."""
    start = 0
    for size in sizes:
        count = min(size, total - start)
        yield start, count
        start += count
    if start < total:
        yield start, total - start
