"""What kernels of whole matrices (cuda/codec.cu, passes.cu, statistic.cu) are told: constants, a struct at a launch."""

from __future__ import annotations

from ctypes import Structure, c_float, c_int32, c_int64, c_uint32, c_void_p
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from ..formats import PLAIN, Format, format
from ..gpu import Module, machine, sources
from ..gpu.formats import print_constants, print_format
from ..layout import row_bytes, row_stride, step_width
from ..native.abi import DTYPE, POWER, SCALED
from ..rotation import Rotation
from ..scales import block_of, exponents, last_power

THREADS = 256
VALUES = 8  # of a lane in a turn
ENOUGH, TURNS = 4096, 8  # blocks of threads: what goes beyond makes turns instead, so many at most
WARP = 32 * VALUES
EXTRA = {"affine": "zero", "log": "base"}
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
assert set(DTYPE) == {str(dtype).removeprefix("torch.") for dtype in NAMES}
HEADERS = (
    *("stdint.h", "abi.h", "words.h", "arithmetic.h", "scaling.h", "scale_bytes.h"),
    *("device.h", "quick.h", "formats.h", "sums.h", "places.h", "derive.h", "coding.h"),
)


# ---- where scales come from

Finder = Literal["warp", "passes", "host"]


@lru_cache(maxsize=1024)
def finder(fmt: Format) -> Finder:
    """Who finds a format's scales: the warp that encodes, a pass of kernels before it, or the host, who gives them."""
    height, width = fmt.block
    if not fmt.compressed:
        return "warp"
    if height == 1 and VALUES <= width <= WARP and _power_of_two(width) and (fmt.scaling == PLAIN or _derives(fmt)):
        return "warp"
    return "passes" if height == 1 and fmt.scaling == PLAIN else "host"


def _derives(fmt: Format) -> bool:
    """Whether cuda/derive.h has the rule of a format's scales."""
    way = fmt.scaling
    stored = way.stored in ("fp32", "bf16", "e8m0") or (way.stored == "e4m3" and way.rounding == "nearest")
    outer = not way.outer or (way.outer <= WARP and _power_of_two(way.outer))
    return stored and outer and way.statistic in ("absmax", "rms") and len(way.candidates) <= 2


def _power_of_two(n: int) -> bool:
    return n & (n - 1) == 0


def is_linear(fmt: Format) -> bool:
    """Whether kernels may be given a format's scales."""
    return fmt.kind in ("integer", "codebook") and fmt.signed and not fmt.square


def team(fmt: Format) -> int:
    """How many lanes measure a piece of a row together."""
    width = min(fmt.block[1] or WARP, WARP)
    return max(1, (1 << (width - 1).bit_length()) // VALUES)


# ---- what is compiled


@lru_cache(maxsize=1024)
def print_spec(
    fmt: Format,
    dtype: torch.dtype,
    stochastic: bool = False,
    live: bool = False,
    rotation: int = 0,
    out: torch.dtype = torch.float32,
    run: int = 0,
    given: bool | None = None,
    line: bool = False,
) -> str:
    """The text of spec.h for cuda/codec.cu, passes.cu and statistic.cu.

    `given`: formats whose scales the host finds always are; `line`: see `is_line`.
    """
    given = finder(fmt) == "host" if given is None else given
    constants = {
        "STOCHASTIC": stochastic,
        "LIVE": live,
        "GIVEN": given,
        "AT_ONCE": finder(fmt) == "warp" and not given,
        "PLAIN": fmt.scaling == PLAIN and not given,
        "ROTATION": rotation,
        "RUN": run,
        "TEAM": team(fmt),
        "LINEAR": line,
    }
    types = (fmt, "Fmt"), (format(NAMES[dtype]), "Values"), (format(NAMES[out]), "Out")
    printed = "".join(print_format(one, name) for one, name in types)
    way = f"struct Way {{\n{print_constants(_scaling(fmt), '  static ')}}};\n"
    return f'#pragma once\n#include "arithmetic.h"\n{printed}{way}{print_constants(constants)}'


def _scaling(fmt: Format) -> dict[str, int | bool | float]:
    """How a format's scales are found and stored, by the names of cuda/derive.h."""
    way = fmt.scaling
    exponent, mantissa = exponents(fmt) if fmt.kind in ("integer", "codebook") else (0, 0)
    return {
        "TILED": fmt.compressed and (fmt.block[0] != 1 or not fmt.block[1]),
        "STORED": SCALED.get(way.stored, SCALED["fp32"]),  # others the host reads
        "UP": way.rounding == "up",
        "POWER": POWER.get(way.rounding, 0),
        "EXPONENT": exponent,
        "MANTISSA": mantissa,
        "LAST": last_power(fmt) if way.stored == "e8m0" else 0,
        "RMS": way.statistic == "rms",
        "OUTER": way.outer,
        "PEAK": fmt.top * way.peak if way.peak else 0.0,
        "GAIN": way.gain,
        "LEAST": way.least,
        "HEADROOM": way.headroom,
        "UNROOM": 1 / way.headroom,
        "TRIES": len(way.candidates),
        "CANDIDATE": way.candidates[0],
        "OTHER": way.candidates[-1],
    }


@lru_cache(maxsize=1)
def _texts() -> dict[str, str]:
    return sources()


def module(device: torch.device, spec: str, file: str = "codec.cu") -> Module:
    """The compiled text of a file of cuda/ with a printed `spec.h`."""
    texts = _texts()
    return machine(device).module(texts[file], {**{name: texts[name] for name in HEADERS}, "spec.h": spec})


# ---- what is launched


class Divisor(Structure):
    """As in cuda/places.h: quotients of numbers below 2**31 by the round-up method (Granlund and Montgomery, 1994)."""

    _fields_ = [("magic", c_uint32), ("shift", c_uint32), ("by", c_int64)]

    @staticmethod
    def of(by: int) -> Divisor:
        """What divides by a number from 1 on.

        >>> seven = Divisor.of(7)
        >>> ((100 * seven.magic >> 32) + 100) >> seven.shift
        14
        """
        if by >= 1 << 31:  # of which all those quotients are 0
            return Divisor(0, 31, by)
        shift = (by - 1).bit_length()
        return Divisor(((1 << shift) - by << 32) // by + 1, shift, by)


class Matrix(Structure):
    """As in cuda/places.h."""

    _fields_ = [
        *(
            (name, c_void_p)
            for name in ("values", "out", "codes", "scale", "inverse", "extra", "outer", "most", "mask")
        ),
        *((name, c_int64) for name in ("rows", "cols", "filled", "stride", "row_bytes", "scales", "lanes")),
        *((name, Divisor) for name in ("across", "tile", "width")),
        *((name, c_uint32 * 2) for name in ("key", "signs")),
        ("flips", c_uint32),
        ("edge", c_float),
        ("turns", c_int32),
    ]


def matrix(
    fmt: Format, shape: tuple[int, int], run: int = VALUES, filled: int | None = None, alone: bool = False
) -> Matrix:
    """The struct of a matrix [rows, cols] with all but pointers and keys.

    Args:
        fmt: the format of its codes.
        shape: rows, columns.
        run: so many neighbouring values of a row are those of neighbours in a warp, a power of two.
        filled: the columns that are there; all if None.
        alone: rows may not be taken for one long row.
    """
    rows, cols = shape
    tile, block = block_of(fmt, rows, cols) if fmt.compressed else (1, VALUES)
    filled, stride, scales = cols if filled is None else filled, row_stride(cols), -(-cols // block)
    whole = not alone and filled == cols and cols % step_width(cols) == 0 and cols % run == 0 and cols % block == 0
    if rows > 1 and tile == 1 and whole:  # one long row: no division
        rows, cols, filled, stride, scales = 1, rows * cols, rows * cols, rows * cols, rows * scales
    made = Matrix(rows=rows, cols=cols, filled=filled, stride=stride, scales=scales)
    made.row_bytes, made.tile, made.width = row_bytes(cols, fmt.bits), Divisor.of(tile), Divisor.of(block)
    share(made, -(-cols // run) * run // VALUES)
    return made


def share(made: Matrix, across: int) -> None:
    """Give each row so many lanes; and what is beyond ENOUGH blocks of threads, to turns."""
    made.lanes, made.across = made.rows * across, Divisor.of(across)
    made.turns = max(1, min(-(-made.lanes // THREADS) // ENOUGH, TURNS))


def is_line(made: Matrix) -> bool:
    """Whether a matrix, its pointers set, is one line of whole lanes for kernels (LINEAR in cuda/places.h)."""
    whole = made.rows == 1 and made.cols == made.filled == made.lanes * VALUES and made.lanes < 1 << 31
    return whole and not any((pointer or 0) % 16 for pointer in (made.values, made.out, made.codes))


def turn(made: Matrix, rotation: Rotation) -> None:
    """Tell kernels the signs of a rotation."""
    made.flips = rotation.seed is not None
    made.signs[:] = rotation.keys if rotation.seed is not None else (0, 0)


def point(made: Matrix, **tensors: Tensor | None) -> None:
    """Set pointers to tensors that stay alive until the launch."""
    for name, tensor in tensors.items():
        if tensor is not None:
            setattr(made, name, tensor.data_ptr())


def launch(module: Module, name: str, made: Matrix, *arguments: object) -> None:
    """Launch a kernel on a matrix: one lane for VALUES values of each of its turns."""
    blocks = -(-made.lanes // (THREADS * made.turns))
    module.machine.launch(module.function(name), blocks, THREADS, (made, *arguments))
