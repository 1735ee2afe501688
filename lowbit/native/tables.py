"""Formats as the native library takes them: lowbit.formats' values, with what fast encoding needs made ready."""

from __future__ import annotations

import math
from ctypes import addressof, c_uint32
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from struct import pack, unpack

from ..formats import Format
from ..scales import exponents, last_power
from . import abi

INFINITE = math.inf
ALL = 2**31 - 128  # values of a row: one block
MOST_OUTER = 4 * abi.BLOCK  # values that are worked on together


@lru_cache(maxsize=256)
def table(fmt: Format) -> abi.Format:
    """The struct of a format; kept, because jobs point to it."""
    made = abi.Format(
        kind=abi.KIND[fmt.kind],
        bits=fmt.bits,
        is_signed=fmt.signed,
        square=fmt.square,
        sign_magnitude=fmt.sign_magnitude,
        block=min(fmt.block[1], ALL) or ALL,
        limit=fmt.limit,
    )
    if fmt.dtype is not None:
        made.dtype = abi.DTYPE[str(fmt.dtype).removeprefix("torch.")]
        return made
    made.top, made.min_scale, made.max_scale = fmt.top, fmt.min_scale, fmt.max_scale
    if fmt.kind in ("integer", "codebook"):
        made.has_zero = fmt.zero_code is not None
        made.least = next(code for value, code in fmt.ladder if value > 0)
        made.values[: len(fmt.values)] = fmt.values
    if fmt.kind == "codebook":
        _codebook(made, fmt)
    made.rms, made.gain = fmt.scaling.statistic == "rms", fmt.scaling.gain
    if stores(fmt):
        _scaling(made, fmt)
    return made


def derives(fmt: Format) -> bool:
    """Whether the library derives a format's scales, and stores them in fp32."""
    way, simple = fmt.scaling, fmt.scaling.statistic in ("absmax", "rms") and fmt.scaling.candidates == (1.0,)
    return not fmt.compressed or (fmt.block[0] == 1 and way.stored == "fp32" and simple)


def stores(fmt: Format) -> bool:
    """Whether the library derives a format's scales, and stores them in a byte each."""
    way, (rows, columns) = fmt.scaling, fmt.block
    known = way.stored == "e8m0" or (way.stored == "e4m3" and way.rounding == "nearest" and way.outer <= MOST_OUTER)
    short = rows == 1 and columns % 8 == 0 and 0 < columns <= abi.BLOCK
    return known and short and way.statistic in ("absmax", "rms") and len(way.candidates) <= 2


def _scaling(made: abi.Format, fmt: Format) -> None:
    way = fmt.scaling
    made.stored, made.power = abi.SCALED[way.stored], abi.POWER.get(way.rounding, 0)
    made.outer, made.peak = way.outer, fmt.top * way.peak
    made.exponent, made.mantissa = exponents(fmt)
    made.last, made.tries = last_power(fmt), len(way.candidates)
    made.smallest = way.least
    made.candidates[: made.tries] = way.candidates


def _codebook(made: abi.Format, fmt: Format) -> None:
    ladder, codes = zip(*fmt.ladder, strict=True)
    made.rungs, made.same = len(ladder), codes == tuple(range(len(codes)))
    made.ladder[:] = (*ladder, *[INFINITE] * (256 - len(ladder)))
    made.thresholds[:] = (*fmt.thresholds, *[INFINITE] * (256 - len(fmt.thresholds)))
    made.codes[: len(codes)] = codes
    made.grid_bits, made.grid_least = _minifloat(fmt)
    if len(ladder) <= 16:  # those of a small float too: weights that are stored in it are drawn by them (weight.h)
        made.tree[:] = _tree(made.thresholds[:15])
        rungs = [_rounded(value) for value in ladder]
        unused = [math.nan] * (17 - len(rungs))  # an infinite number would be above infinite thresholds
        made.below[:] = _tree([*rungs[1:-1], *unused])
        made.gaps[: len(rungs) - 1] = [_rounded(high - low) for low, high in pairwise(rungs)]
        if made.same and not fmt.sign_magnitude:
            _bins(made, fmt)
    elif not made.grid_bits:
        _cells(made, fmt.thresholds)
        _pieces(made, fmt)


def _minifloat(fmt: Format) -> tuple[int, float]:
    """(bits of the mantissa, smallest normal number) of a codebook that is a small float's; (0, 0.0) for others."""
    rungs = [value for value, _ in fmt.ladder]
    codes = [code for _, code in fmt.ladder]
    if not fmt.sign_magnitude or fmt.ties != "even" or codes != list(range(len(codes))):
        return 0, 0.0
    for bits in range(1, fmt.bits - 1):
        fine, least = 1 << bits, rungs[1] * (1 << bits)
        floats = [(k % fine + fine * (k >= fine)) * 2.0 ** max(k // fine - 1, 0) * rungs[1] for k in codes]
        if rungs == floats:
            return bits, least
    return 0, 0.0


def _tree(numbers: list[float]) -> list[float]:
    """15 numbers to search: step k looks at every (16 >> k)-th, from the (8 >> k)-th on, by minus the rung so far."""
    tree = [0.0] * 32
    for level in range(4):
        step = 16 >> level
        for rung, number in enumerate(numbers[step // 2 - 1 :: step]):
            tree[8 * level + -rung % 8] = number
    return tree


def _rounded(x: float) -> float:
    """To fp32. What is rounded here is exact in float64 or far from a part's edge."""
    return unpack("<f", pack("<f", x))[0]


def _bits(x: float) -> int:
    return unpack("<I", pack("<f", x))[0]


def _bins(made: abi.Format, fmt: Format) -> None:
    """Cut the range of u, a codebook's scaled value, into 32 parts with at most one threshold each, if that can be.

    A part's number never falls as u rises, so a threshold in another part than u's is below u where its part is.
    """
    top = max(map(abs, fmt.values))
    times, plus = (15.5 / top, 16.0) if fmt.signed else (31.0 / top, 0.5)

    def by_multiplication(t: float) -> int:
        return int(_rounded(_rounded(times) * t + plus))

    low = (_bits(top) >> 21) - 31

    def by_bits(t: float) -> int:
        return max(0, (_bits(t) >> 21) - low)

    for number, first in ((by_multiplication, 0), *([] if fmt.signed else [(by_bits, low)])):
        places = [number(t) for t in fmt.thresholds]
        if len(set(places)) < len(places):
            continue
        made.bins, made.bin_low, made.bin_times, made.bin_plus = 32, first, times, plus
        made.bin_threshold[:] = [INFINITE] * 32
        for place, threshold in zip(places, fmt.thresholds, strict=True):
            made.bin_threshold[place] = threshold
        made.bin_rung[:] = [sum(place < at for place in places) for at in range(32)]
        return


def _pieces(made: abi.Format, fmt: Format) -> None:
    """Cut magnitudes into up to 16 pieces with evenly spaced thresholds, at most two to a binade, if that can be.

    Within a piece the sum never falls as the magnitude rises, so a magnitude on the other side of a threshold than its
    sum is has a sum that is no further from a whole number than the threshold's.
    """
    middle = sum(t < 0 for t in fmt.thresholds)
    above = fmt.thresholds[middle:]
    mirrored = fmt.thresholds[:middle] == tuple(-t for t in above[:middle])[::-1]
    if not (mirrored and made.same and middle in (0, 127)):
        return
    runs: list[list[int]] = [[]]  # each: the thresholds inside a piece; the one between two runs ends the first piece
    ends = []
    for k, t in enumerate(above):
        run = runs[-1]
        even = len(run) < 2 or abs((t - above[run[-1]]) / (above[run[1]] - above[run[0]]) - 1) < 1e-3
        run.append(k) if even else (ends.append(k), runs.append([]))
    binades = [(_bits(above[k]) >> 23) - 96 for k in ends]
    if len(runs) > 16 or len(set(binades)) < len(binades) or not 0 <= min(binades) <= max(binades) < 32 or fmt.top > 1:
        return
    made.piece_end[:] = [INFINITE] * 32
    made.piece[:] = [sum(b < binade for b in binades) for binade in range(32)]
    farthest = 0.0
    for number, run in enumerate(runs):
        if number < len(ends):
            made.piece_end[binades[number]] = above[ends[number]]
        first = run[0] if run else len(above)
        slope = (run[-1] - first) / (above[run[-1]] - above[first]) if len(run) > 1 else 0.0
        slope = _rounded(slope)
        offset = _rounded(first + 1 - slope * above[first] if run else first + 0.5)
        made.piece_slope[number], made.piece_offset[number] = slope, offset
        made.piece_most[number] = first + len(run) + 0.5
        begin = above[ends[number - 1]] if number else 0.0
        farthest = max(farthest, first - _rounded(slope * begin + offset))
        farthest = max([farthest, *(abs(_rounded(slope * above[k] + offset) - (k + 1)) for k in run)])
    if farthest > 1e-3 or any(len(run) == 1 for run in runs):
        return
    made.piece_near = 2 * farthest + 2**-16
    made.pieces, made.middle = len(runs), middle
    for code, value in enumerate(fmt.values):
        made.halves[0][code], made.halves[1][code] = _bits(value) & 0xFFFF, _bits(value) >> 16


@dataclass(frozen=True)
class Cells:
    """Ranges of magnitudes with at most one threshold each, for either sign; see `cells` in abi.h."""

    cells: tuple[int, ...]
    shift: int
    half: int
    low: int
    high: int


@lru_cache(maxsize=64)
def cells(thresholds: tuple[float, ...]) -> Cells:
    """Cut magnitudes into the widest equal ranges of bits with at most one threshold each, for either sign."""
    assert 0 not in thresholds
    sides = [sorted(_bits(abs(t)) for t in thresholds if (t < 0) is negative) for negative in (False, True)]
    every = sorted(sides[0] + sides[1])
    shift = next(s for s in range(23, 0, -1) if all(a >> s != b >> s for side in sides for a, b in pairwise(side)))
    width = 1 << shift
    low = (every[0] & -width) - width  # the first cell is for all that is smaller than any threshold
    half = (every[-1] + 1 - low) // width + 1
    made = []
    for side, negative in zip(sides, (False, True), strict=True):
        for number in range(half):
            start = low + number * width
            inside = [bits for bits in side if start <= bits < start + width]
            # Going up in magnitude, a positive number passes a threshold after it, a negative one when it gets there.
            turn = inside[0] % width + (not negative) if inside else width
            smaller = sum(bits < start for bits in side)
            larger = len(side) - smaller
            rung = larger if negative else len(sides[1]) + smaller
            made.append(rung << 24 | turn)
    return Cells(tuple(made), shift, half, low, every[-1] + 1)


def _cells(made: abi.Format, thresholds: tuple[float, ...]) -> None:
    found = cells(thresholds)
    made.cell_shift, made.cell_half = found.shift, found.half
    made.cell_low, made.cell_high = found.low, found.high
    made.array = (c_uint32 * len(found.cells))(*found.cells)  # kept with the struct, which holds its address only
    made.cells = addressof(made.array)
