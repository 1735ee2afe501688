"""Formats as kernels take them: each printed as a C++ struct of constants, with the tables that its codes need.

A codebook's code is found in one of three ways, and the host chooses. With 16 rungs or fewer, if it can be done, the
range of u (a value in units of its scale) is cut into *bins* with at most one threshold each: a bin's number is cheap
to come by, and one comparison does the rest. Floats with few bits are a *grid*: an addition rounds to it, as the
machine rounds to its own. Else u is looked up by its leading bits in the *cells* that the CPU uses too
(lowbit/native/tables.py). The numbers of bins and cells never fall as |u| rises, so what lies in another one than u is
on the side of u where its bin or cell is; that is the whole proof, and tests/test_cuda_codec.py looks at every
threshold.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise
from struct import pack, unpack

from ..formats import Format
from ..native import abi
from ..native.tables import cells

INFINITE = 0x7F800000
ENTRY = 8  # bytes of a bin: a threshold, and the rung of what is not beyond it


def bits_of(x: float) -> int:
    """The bits of x as fp32. What is rounded here is exact, or far from a bin's edge."""
    return unpack("<I", pack("<f", x))[0]


@dataclass(frozen=True)
class Bins:
    """A cut of the range of u into equal bins. Byte `offset(u)` of the table of entries is where u's entry begins."""

    entries: tuple[tuple[float, int], ...]
    times: float
    plus: int

    def offset(self, u: float) -> int:
        """The low bits of fma(u, times, 2**23 + plus), a sum that is rounded to the nearest integer, half to even."""
        return round(Fraction(u) * Fraction(self.times)) + self.plus & -ENTRY


def alive(fmt: Format) -> tuple[float, ...]:
    """The thresholds that bins use: of an unsigned format with a zero, whatever is above 0 is beyond the first."""
    return (0.0, *fmt.thresholds[1:]) if not fmt.signed and fmt.zero_code is not None else fmt.thresholds


def _entries(places: Sequence[int], thresholds: Iterable[float], count: int) -> tuple[tuple[float, int], ...]:
    inside = dict(zip(places, thresholds, strict=True))
    return tuple((inside.get(ENTRY * k, float("inf")), sum(p < ENTRY * k for p in places)) for k in range(count))


@lru_cache(maxsize=256)
def bins(fmt: Format) -> Bins | None:
    """The smallest cut of a codebook's range into at most 64 bins with one threshold or none, if there is one."""
    if fmt.kind != "codebook" or len(fmt.thresholds) > 15:
        return None
    low = min(value for value, _ in fmt.ladder)
    if low < -fmt.top:
        return None
    for count in (8, 16, 32, 64):
        # Half an entry stays free at either end, for what rounding carries there.
        plus = ENTRY * count // 2 if low < 0 else ENTRY // 2
        times = unpack("<f", pack("<f", (ENTRY * count - ENTRY // 2 - plus) / fmt.top))[0]
        places = [Bins((), times, plus).offset(t) for t in alive(fmt)]
        if len(set(places)) == len(places):
            return Bins(_entries(places, alive(fmt), count), times, plus)
    return None


@lru_cache(maxsize=256)
def grid(fmt: Format) -> tuple[int, int] | None:
    """(Bits of the mantissa, exponent of the smallest normal number) of a format of floats that rounds half to even."""
    if not fmt.sign_magnitude:
        return None
    ladder = [Fraction(value) for value, _ in fmt.ladder]
    if len(ladder) < 2 or ladder[1].numerator & ladder[1].numerator - 1:  # steps are powers of two
        return None
    for mantissa in range(1, fmt.bits - 1):
        normal = 1 << mantissa
        if normal >= len(ladder):
            break
        made = [ladder[1] * (k if k < normal else normal + k % normal << k // normal - 1) for k in range(len(ladder))]
        middles = [float((low + high) / 2) for low, high in pairwise(made)]
        # What lies in the midst of two goes to the even one: a threshold itself belongs to the lower.
        half_to_even = tuple(middle if k % 2 == 0 else _below(middle) for k, middle in enumerate(middles))
        if made == ladder and half_to_even == fmt.thresholds:
            return mantissa, ladder[normal].numerator.bit_length() - ladder[normal].denominator.bit_length()
    return None


def _below(x: float) -> float:
    """The fp32 number below one that is above 0."""
    return unpack("<f", pack("<I", bits_of(x) - 1))[0]


def _number(x: float) -> str:
    return unpack("<f", pack("<f", x))[0].hex() + "f"


def _array(name: str, numbers: Sequence[int]) -> str:
    lines = [", ".join(f"{n:#x}u" for n in numbers[k : k + 10]) for k in range(0, len(numbers), 10)]
    return f"static __device__ const uint32_t {name}[{len(numbers)}] = {{\n    " + ",\n    ".join(lines) + "};\n"


def print_constants(constants: Mapping[str, int | bool | float], before: str = "") -> str:
    """One constexpr a line."""
    types = {bool: "bool", int: "int", float: "float"}
    numbers = {k: _number(v) if type(v) is float else str(v).lower() for k, v in constants.items()}
    return "".join(f"{before}constexpr {types[type(v)]} {k} = {numbers[k]};\n" for k, v in constants.items())


@lru_cache(maxsize=1024)
def print_format(fmt: Format, name: str) -> str:
    """A format as a C++ struct `name`, and its tables as arrays `name_…`, for cuda/formats.h.

    Of a block it says how many columns it has (0: all), not how many rows: kernels that know blocks of several rows are
    given their scales.
    """
    scaled = fmt.compressed
    constants: dict[str, int | bool | float] = {
        "KIND": abi.KIND[fmt.kind],
        "BITS": fmt.bits,
        "BLOCK": min(fmt.block[1], 2**31 - 1) if scaled else 1,
        "DTYPE": 0 if fmt.dtype is None else abi.DTYPE[str(fmt.dtype).removeprefix("torch.")],
        "LIMIT": fmt.limit,
        "SIGNED": fmt.signed,
        "SQUARE": fmt.square,
        "SIGN_MAGNITUDE": fmt.sign_magnitude,
        "HAS_ZERO": scaled and fmt.zero_code is not None,
        "TOP": fmt.top if scaled else 1.0,
        "MIN_SCALE": fmt.min_scale if scaled else 1.0,
        "MAX_SCALE": fmt.max_scale if scaled else 1.0,
    }
    arrays: dict[str, Sequence[int]] = {}
    if fmt.kind == "codebook":
        ladder, codes = zip(*fmt.ladder, strict=True)
        cut, floats = bins(fmt), grid(fmt)
        arrays["values"] = [bits_of(v) for v in fmt.values]
        arrays["ladder"] = [bits_of(v) for v in ladder]
        constants |= {
            "RUNGS": len(ladder),
            "LEAST": sum(v <= 0 for v in ladder),  # the rung of the smallest value above 0
            "SAME": codes == tuple(range(len(codes))),  # rung k has code k
            "BOTTOM": ladder[0],
            "BINS": len(cut.entries) if cut else 0,
            "MANTISSA": floats[0] if floats else 0,  # of a grid
            "NORMAL": floats[1] if floats else 0,
        }
        if not constants["SAME"]:
            arrays["codes"] = codes
        if cut:
            constants |= {"TIMES": cut.times, "PLUS": 2.0**23 + cut.plus}
            arrays["bins"] = [n for threshold, rung in cut.entries for n in (bits_of(threshold), rung)]
        elif not floats:
            found = cells(fmt.thresholds)
            constants |= {
                "CELLS": len(found.cells),
                "CELL_SHIFT": found.shift,
                "CELL_HALF": found.half,
                "CELL_LOW": found.low,
                "CELL_HIGH": found.high,
            }
            arrays["cells"] = found.cells
    printed = "".join(_array(f"{name}_{table}", numbers) for table, numbers in arrays.items())
    members = print_constants(constants, "  static ")
    tables = "".join(f"  LB_FN uint32_t {table}(int k) {{ return {name}_{table}[k]; }}\n" for table in arrays)
    return f"{printed}struct {name} {{  // {fmt.name}\n{members}{tables}}};\n"
