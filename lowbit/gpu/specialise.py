"""Prints `spec.h`: all that a step's kernels know when they are compiled.

The kernels of cuda/ are text over names that this header defines: the rule's stages as functors, the types of parameter
and gradient, the formats of the moments, how things are rounded, and how the tensor is cut. So every loop is unrolled,
every choice is made, and a table that no format needs does not exist.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from ..formats import PLAIN, Format, format
from ..layout import STEP_BLOCK, step_width
from ..native.abi import MOMENTS, SCALED
from ..scales import last_power
from ..stages import Job, Program
from .formats import print_format
from .stages import print_program

DTYPES = {torch.float32: "LB_FLOAT32", torch.bfloat16: "LB_BFLOAT16", torch.float16: "LB_FLOAT16"}
SIZES = {torch.float32: 4, torch.bfloat16: 2, torch.float16: 2}
FP32 = format("fp32")
LANE_VALUES = 8  # of a lane at most: two accesses of 16 bytes for fp32, one for bf16


@dataclass(frozen=True)
class Special:
    """What a step's kernels are compiled for."""

    program: Program
    width: int  # values of a step block
    linear: bool  # rows are whole step blocks and everything but the gradient begins on 16 bytes
    param: torch.dtype
    grad: torch.dtype
    master: str
    formats: tuple[Format, ...]  # of the moments that have one number per value, in the program's order
    noise: frozenset[str]  # the operands that round stochastically
    stored: Format | None = None  # of a parameter that is codes and scales
    rest: bool = False  # whether it keeps more than its codes

    @property
    def values(self) -> int:
        """Of a lane: no lane has values of two step blocks."""
        return min(LANE_VALUES, self.width)

    @property
    def folds(self) -> Special:
        """What measuring and folding are compiled for: for folds alone, none of what is stored matters."""
        if self.program.measures:
            return self
        plain = tuple(FP32 for _ in self.formats)
        return Special(self.program, STEP_BLOCK, True, torch.float32, torch.float32, "none", plain, frozenset())


def special(job: Job) -> Special:
    """What the kernels for one tensor must be."""
    own = [job.param] if job.stored is None else list(job.stored[1].values())
    addresses = [*own, job.companion, *(part for parts in job.moments.values() for part in parts.values())]
    aligned = all(tensor is None or tensor.data_ptr() % 16 == 0 for tensor in addresses)
    return Special(
        program=job.program,
        width=step_width(job.cols),
        linear=aligned and job.cols % STEP_BLOCK == 0,
        param=job.param.dtype if job.stored is None else torch.float32,
        grad=job.grad.dtype,
        master=job.master if job.companion is not None else "none",
        formats=tuple(job.formats[letter] for letter in job.program.values),
        noise=job.noise,
        stored=None if job.stored is None else job.stored[0],
        rest=job.stored is not None and "rest" in job.stored[1],
    )


@lru_cache(maxsize=512)
def print_spec(it: Special) -> str:
    """The text of spec.h.

    Raises `ValueError` for a program that cannot run on a GPU.
    """
    printed = print_program(it.program)
    letters = list(it.program.values)
    vectors = [f"LB_{over.upper()}" for over in printed.over]
    moments, formats = [], {}
    for k, (letter, fmt) in enumerate(zip(letters, it.formats, strict=True)):
        name = formats.setdefault(fmt, f"Format{len(formats)}")
        flags = f"STOCHASTIC = {_bool(letter in it.noise)}, LIVE = {_bool(not it.program.moments[letter].signed)}"
        moments.append(_moment(k, name, flags))
    if it.stored is not None:
        name = formats.setdefault(it.stored, f"Format{len(formats)}")
        moments.append(_moment(MOMENTS, name, "STOCHASTIC = false, LIVE = false"))
    lines = [
        "// Printed by lowbit/gpu/specialise.py.",
        "#pragma once",
        '#include "quick.h"',
        "",
        "namespace spec {",
        f"constexpr int WIDTH = {it.width}, V = {it.values};  // values of a step block and of a lane",
        f"constexpr int MOMENTS = {len(letters)}, VECTORS = {len(vectors)}, SLOTS = {len(printed.slots)};",
        f"constexpr int PARAM = {DTYPES[it.param]}, GRAD = {DTYPES[it.grad]}, MASTER = LB_{_master(it.master)};",
        f"constexpr bool LINEAR = {_bool(it.linear)}, GUARDED = {_bool(it.program.guarded)};",
        f"constexpr int MEASURES = {len(it.program.measures)};",
        f"constexpr bool STOCHASTIC = {_bool('p' in it.noise)}, DRAWS = {_bool(bool(it.noise))};",
        *_stored(it),
        f"constexpr int OVER[] = {{{', '.join(vectors) or '0'}}};  // of each vector",
        *(print_format(fmt, name) for fmt, name in formats.items()),
        "template <int K> struct Moment;",
        *moments,
        "}  // namespace spec",
        "",
        printed.text,
    ]
    return "\n".join(lines)


def _moment(number: int, fmt: str, flags: str) -> str:
    return f"template <> struct Moment<{number}> {{\n  using Format = {fmt};\n  static constexpr bool {flags};\n}};"


def _stored(it: Special) -> list[str]:
    """How a parameter that is codes and scales has them: lowbit/native/scaling.h."""
    way = PLAIN if it.stored is None else it.stored.scaling
    last = last_power(it.stored) if way.stored == "e8m0" and it.stored is not None else 0
    return [
        f"constexpr bool STORED = {_bool(it.stored is not None)}, REST = {_bool(it.rest)};",
        f"constexpr bool OUTER = {_bool(way.peak > 0)};  // whether there is a scale of the tensor",
        f"constexpr int SCALED = {SCALED[way.stored]}, LAST_POWER = {last};",
        f"constexpr float LEAST_SCALE = (float){way.least!r};",
    ]


def _bool(x: bool) -> str:
    return "true" if x else "false"


def _master(master: str) -> str:
    return {"none": "NONE", "fp32": "MASTER32"}.get(master, master.upper())
