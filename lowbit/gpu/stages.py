"""Prints a program's stages as a GPU's kernels call them, and says what a step launches for each measurement.

The functors are those of `lowbit.native.printer`, so a rule outside the package runs too. Around them is printed what
the kernels of cuda/ need of a program, all of it known when they are compiled:

    Sweep<k>    the sweep of measurement k: the updates before it, on one value of every operand, then the measurement;
                Sweep<MEASURES> is the update, all updates one after the other
    Folds<k>    the folds before measurement k (and after the one before it), Folds<MEASURES> those after the last: on a
                tensor's scalars, or on one element of its vectors

Operands have slots: 0 is p, 1 is g, then the moments, then the vectors, then what updates write for later stages only.
Scalars are numbered as in `Program`, constants as stages name them.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from ..layout import row_stride, step_width
from ..native import abi, printer
from ..stages import VECTORS, Program, Stage

TILE = 512  # rows that a sum over a column adds one after the other
STRIPS, NARROW = 8192, 1024  # as in cuda/measure.cu
LONGEST = 1 << 23  # what its trees have levels for: rows, or step blocks of a row

HEAD = """#ifdef __GNUC__  // a rule need not use all it has
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-parameter"
#pragma GCC diagnostic ignored "-Wunused-variable"
#pragma GCC diagnostic ignored "-Wunused-but-set-parameter"
#pragma GCC diagnostic ignored "-Wunused-but-set-variable"
#endif
#ifdef __CUDACC__
#pragma nv_diagnostic push
#pragma nv_diag_suppress 177
#pragma nv_diag_suppress 550
#endif
namespace spec {
"""
END = """}  // namespace spec
#ifdef __CUDACC__
#pragma nv_diagnostic pop
#endif
#ifdef __GNUC__
#pragma GCC diagnostic pop
#endif
"""


@dataclass(frozen=True)
class Printed:
    """A program in C++, and the number of every name in it."""

    text: str
    slots: Mapping[str, int]
    vectors: tuple[str, ...]  # persistent ones first
    over: tuple[str, ...]  # of each vector
    scalars: tuple[str, ...]  # persistent ones first
    constants: tuple[str, ...]
    update_reads: int  # a bit per slot

    def packed(self, constants: Mapping[str, float]) -> list[float]:
        """Constants in the order of their numbers."""
        return [constants[name] for name in self.constants]


@lru_cache(maxsize=512)
def print_program(program: Program) -> Printed:
    """A program's part of spec.h, after what `specialise` prints.

    Raises `ValueError` for a program that has no place on a GPU: a stage that cannot be printed, too many names.
    """
    return _Printer(program).printed()


def segments(program: Program) -> list[list[int]]:
    """The folds before each measurement, and those after the last, as numbers of stages."""
    found: list[list[int]] = [[]]
    for i, stage in enumerate(program.stages):
        if stage.kind == "measure":
            found.append([])
        elif stage.kind == "fold":
            found[-1].append(i)
    return found


# ---- what is launched


@dataclass(frozen=True)
class Launch:
    """A kernel of measure.cu that a step launches, and how many blocks of threads it takes.

    `over`: "chunks" as an update, "tiles" of columns, "lines" (a number of blocks for each job), "jobs" (one block for
    each job), "all" (one block for all jobs of all programs that wait for a total).
    """

    kernel: str
    over: str
    measure: int


def launches(program: Program) -> list[Launch]:
    """What a step launches before the update, in order. After an "all" the programs of a step go on together."""
    found = [Launch("begin", "jobs", -1)]
    for k, stage in enumerate(program.measures):
        total = stage.over in ("tensor", "all")
        found.append(Launch(*(("measure_columns", "tiles") if stage.over == "column" else ("measure", "chunks")), k))
        if stage.over in ("row", "group") or (total and stage.reduce != "max"):
            found.append(Launch("rows", "lines", k))
        if stage.over in ("group", "column"):
            found.append(Launch("elements", "lines", k))
        if stage.over == "all":
            found += [Launch("subtotal", "jobs", k), Launch("total", "all", k)]
        folds = [program.stages[i] for i in segments(program)[k + 1]]
        if total or k + 1 == len(program.measures) or any(not fold.writes for fold in folds):
            found.append(Launch("scalars", "jobs", k))
    return found


def elements(over: str, rows: int, cols: int, group_rows: int) -> int:
    """How many numbers a vector has."""
    return {"row": rows, "column": cols, "group": -(-rows // group_rows)}[over]


def lines(launch: Launch, program: Program, rows: int, cols: int, group_rows: int) -> int:
    """How many lines, each summed up by some threads, a job has in a launch over "lines"."""
    stage = program.measures[launch.measure]
    if launch.kernel == "elements":
        return elements(stage.over, rows, cols, group_rows)
    return strips(rows, cols) if stage.over in ("tensor", "all") else rows


def strips(rows: int, cols: int) -> int:
    """How many doubles `rows` leaves of a tensor: strips of rows, but rows where these are wide."""
    return rows if row_stride(cols) // step_width(cols) > NARROW else min(rows, STRIPS)


def room(program: Program, rows: int, cols: int) -> tuple[int, int]:
    """How many floats (`Job.partial`) and doubles (`Job.sums`) a job needs for its measurements.

    Raises `ValueError` for a tensor larger than the trees of cuda/measure.cu.
    """
    across = row_stride(cols) // step_width(cols)
    flat = across == 1 and all(stage.over not in ("column", "group") for stage in program.measures)
    if program.measures and (across > LONGEST or rows > (LONGEST << 8 if flat else LONGEST)):
        raise ValueError(
            f"a tensor of {rows} rows of {cols} values is too large for what is measured on a GPU: split it"
        )
    blocks = sums = 0
    for stage in program.measures:
        if stage.over == "column":
            sums = max(sums, -(-rows // TILE) * cols)
        elif stage.over in VECTORS or stage.reduce != "max":
            blocks = rows * across
            if stage.over != "row":
                sums = max(sums, rows if stage.over == "group" else strips(rows, cols))
    return blocks, sums


# ---- printing


class _Printer:
    def __init__(self, program: Program):
        self.program, self.stages = program, program.stages
        unsigned = frozenset(letter for letter, moment in program.values.items() if not moment.signed)
        self.texts = [printer.print_stage(stage, unsigned) for stage in self.stages]
        self.moments = tuple(program.values)
        persistent = tuple(name for name in program.moments if name not in program.values)
        self.persistent = len(persistent)
        self.vectors = (*persistent, *(name for name in program.vectors if name not in persistent))
        named = dict.fromkeys(("p", "g", *self.moments, *self.vectors))
        for stage in self.stages:  # what updates write for later stages has the last slots
            named.update(dict.fromkeys(stage.writes))
        self.slots = {name: k for k, name in enumerate(named)}
        self.loaded = 2 + len(self.moments) + len(self.vectors)
        self.scalars = {name: k for k, name in enumerate((*program.scalars, *program.temporaries))}
        self.constants: dict[str, int] = {}
        for text in self.texts:
            for name in text.scalars:  # a scalar that a fold assigns need not be declared
                self.scalars.setdefault(name, len(self.scalars))
            for name in text.constants:
                self.constants.setdefault(name, len(self.constants))
        self.measures = [i for i, stage in enumerate(self.stages) if stage.kind == "measure"]
        for what, count, most in (
            ("moments", len(self.moments), abi.MOMENTS),
            ("operands", len(self.slots), abi.ARRAYS),
            ("scalars", len(self.scalars), abi.SCALARS),
            ("constants", len(self.constants), abi.CONSTANTS),
        ):
            if count > most:
                raise ValueError(f"a program of {count} {what}: the CUDA backend has room for {most}")

    def printed(self) -> Printed:
        over = tuple(self.program.vectors[name] for name in self.vectors)
        sweeps = [*self.measures, len(self.stages)]
        folds = segments(self.program)
        initial = [
            f"  if (scalar == {self.scalars[k]}) return {_float(v)};" for k, v in self.program.temporaries.items()
        ]
        lines = [
            HEAD,
            *(f"{text}\n" for text in self._functors().values()),
            "// The arguments of each stage, by slot.",
            *(line for i in range(len(self.stages)) for line in self._stage(i)),
            "",
            f"constexpr int SCALARS = {len(self.scalars)}, KEPT = {len(self.program.scalars)};  // in all; persistent",
            f"constexpr int KEPT_VECTORS = {self.persistent};",
            "LB_FN constexpr int over([[maybe_unused]] int vector) {",
            *(f"  if (vector == {k}) return LB_{kind.upper()};" for k, kind in enumerate(over)),
            "  return -1;",
            "}",
            "LB_FN float initial([[maybe_unused]] int scalar) {",
            *initial,
            "  return 0.0f;",
            "}",
            "",
            "template <int K, class F = float> struct Sweep;  // F: a number, as fast as it may be (cuda/quick.h)",
            *(line for k, end in enumerate(sweeps) for line in self._sweep(k, end)),
            "",
            "template <int K> struct Folds;",
            *(line for k, numbers in enumerate(folds) for line in self._folds(k, numbers)),
            END,
        ]
        return Printed(
            text="\n".join(lines),
            slots=self.slots,
            vectors=self.vectors,
            over=over,
            scalars=tuple(self.scalars),
            constants=tuple(self.constants),
            update_reads=self._reads(len(self.stages)),
        )

    def _functors(self) -> dict[str, str]:
        texts: dict[str, str] = {}
        for text in self.texts:
            for name, said in {**text.helpers, text.symbol: text.functor}.items():
                if texts.setdefault(name, said) != said:
                    raise ValueError(f"two functions would be {name} in C++: rename one of them, or its module")
        return texts

    def _stage(self, i: int) -> list[str]:
        """A stage under its number, with all its arguments made of slots, scalars and constants."""
        stage, text = self.stages[i], self.texts[i]
        order = [*text.reads, *(name for name in text.writes if name not in text.reads)]
        own, head = (f"Stage{i}<float>", "") if stage.kind == "fold" else (f"Stage{i}<F>", "template <class F> ")
        first = 2 + len(self.moments) if stage.kind == "fold" else 0
        arguments = [f"x[{self.slots[name] - first}]" for name in order] + ["measured"] * text.uses_x
        lines = [f"template <class F> using Stage{i} = {text.symbol}<F>;"]
        if "s" in stage.reads:
            members = ", ".join(f"s[{self.scalars[name]}]" for name in text.scalars)
            made = f"{head}LB_FN {'typename ' * bool(head)}{own}::S scalars{i}([[maybe_unused]] const float *s)"
            lines.append(f"{made} {{ return {{{members}}}; }}")
            arguments.append("own")
        if "c" in stage.reads:
            members = ", ".join(f"lb::unchanging(c + {self.constants[name]})" for name in text.constants)
            made = f"{head}LB_FN {'typename ' * bool(head)}{own}::C constants{i}([[maybe_unused]] const float *c)"
            lines.append(f"{made} {{ return {{{members}}}; }}")
            arguments.append(f"constants{i}{'<F>' * bool(head)}(c)")
        call = f"{own}::apply({', '.join(arguments)});"
        if stage.kind != "fold":
            kind, given = ("F", "return ") if stage.kind == "measure" else ("void", "")
            scalars = f", const typename {own}::S &own" if "s" in stage.reads else ""
            taken = f"[[maybe_unused]] F (&x)[SLOTS], [[maybe_unused]] const float *c{scalars}"
            return [*lines, f"{head}LB_FN {kind} {stage.kind}{i}({taken}) {{ {given}{call} }}"]
        vectors = "float (&x)[VECTORS + 1], " if stage.writes else ""
        lines.append(f"LB_FN void fold{i}({vectors}[[maybe_unused]] const float *c, [[maybe_unused]] float *s,")
        lines.append("  [[maybe_unused]] float measured) {")
        if "s" in stage.reads:
            lines.append(f"  {'' if text.assigns else 'const '}{own}::S own = scalars{i}(s);")
        lines.append(f"  {call}")
        lines += [f"  s[{self.scalars[name]}] = own.{name};" for name in text.assigns]
        return [*lines, "}"]

    def _updates(self, end: int) -> list[int]:
        return [i for i in range(end) if self.stages[i].kind == "update"]

    def _reads(self, end: int) -> int:
        """The slots that a sweep loads, a bit each: for an update all that is stored, else what is read as it was."""
        if end == len(self.stages):
            found, written = {"p", "g", *self.moments}, set[str]()
        else:
            found, written = {"g"} if self.program.guarded else set[str](), set[str]()
        for i in [*self._updates(end), *([end] if end < len(self.stages) else [])]:
            found.update(set(self.texts[i].reads) - written)
            written.update(self.stages[i].writes)
        return sum(1 << slot for name, slot in self.slots.items() if name in found and slot < self.loaded)

    def _sweep(self, k: int, end: int) -> list[str]:
        measure = self.stages[end] if end < len(self.stages) else None
        numbers = [*self._updates(end), *([end] if measure else [])]
        having = [i for i in numbers if "s" in self.stages[i].reads]
        made = ", ".join(f"scalars{i}<F>(s)" for i in having)
        lines = [
            f"template <class F> struct Sweep<{k}, F> {{",
            f"  static constexpr uint32_t READS = {self._reads(end):#x}u;  // a bit per slot",
            *([f"  static constexpr int {_what(measure)};"] if measure else []),
            "  struct Scalars {",
            *(f"    typename Stage{i}<F>::S s{i};" for i in having),
            "  };",
            f"  LB_FN Scalars scalars([[maybe_unused]] const float *s) {{ return {{{made}}}; }}",
            f"  LB_FN {'F' if measure else 'void'} run([[maybe_unused]] F (&x)[SLOTS],",
            "               [[maybe_unused]] const float *c, [[maybe_unused]] const Scalars &scalars) {",
        ]
        for i in numbers:
            scalars = f", scalars.s{i}" if i in having else ""
            lines.append(f"    {'return ' * (i == end)}{self.stages[i].kind}{i}(x, c{scalars});")
        return [*lines, "  }", "};"]

    def _folds(self, k: int, numbers: list[int]) -> list[str]:
        tensor = [i for i in numbers if not self.stages[i].writes]
        vector = [i for i in numbers if self.stages[i].writes]
        read = {name for i in vector for name in self.texts[i].reads}
        written = {name for i in vector for name in self.stages[i].writes}
        calls = [f"    fold{i}({'x, ' * (i in vector)}c, s, measured);" for i in numbers]
        return [
            f"template <> struct Folds<{k}> {{",
            f"  static constexpr bool ON_TENSOR = {str(bool(tensor)).lower()};",
            f"  static constexpr uint32_t READS = {self._mask(read):#x}u, WRITES = {self._mask(written):#x}u;"
            "  // a bit per vector",
            "  LB_FN void on_tensor([[maybe_unused]] const float *c, [[maybe_unused]] float *s,",
            "                       [[maybe_unused]] float measured) {",
            *(f"    fold{i}(c, s, measured);" for i in tensor),
            "  }",
            "  // With a copy of the scalars: what folds over the tensor assign is seen by those over vectors.",
            "  LB_FN void on_element([[maybe_unused]] float (&x)[VECTORS + 1], [[maybe_unused]] const float *c,",
            "                        [[maybe_unused]] float *s, [[maybe_unused]] float measured) {",
            *(calls if vector else []),
            "  }",
            "};",
        ]

    def _mask(self, names: set[str]) -> int:
        return sum(1 << k for k, name in enumerate(self.vectors) if name in names)


def _what(measure: Stage) -> str:
    return f"OVER = LB_{measure.over.upper()}, REDUCE = LB_{measure.reduce.upper()}"


def _float(x: float) -> str:
    """Any fp32 number, infinite ones too."""
    return f"lb::float_of({struct.unpack('I', struct.pack('f', x))[0]:#010x}u)"
