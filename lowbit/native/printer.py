"""Prints the stages of rules as C++: what `lowbit/native/rules.h` and `kernels.h` hold, name for name.

    python -m lowbit.native.printer          writes both anew; a test says whether they are current

A stage becomes a functor, `adamw_adamw::apply(p, g, m, v, s, c)`, which CPU and CUDA kernels share, and a CPU kernel,
the loop around it. The plain functions it calls are printed before it. What a function may say: translate.py.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from types import ModuleType
from typing import Any

from ..stages import Stage
from .translate import Function, Unprintable, indented


@dataclass(frozen=True)
class Printed:
    """A stage in C++, and what its kernel finds in `lb_frame`, in that order."""

    symbol: str
    helpers: dict[str, str]  # symbol -> text of what the functor calls, each after what it calls itself
    functor: str
    kernel: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    scalars: tuple[str, ...]
    assigns: tuple[str, ...]  # the scalars that a fold writes
    constants: tuple[str, ...]
    uses_x: bool
    roots: int  # bit k: the kernel can write the square root of the k-th write


class _Chain:
    """Updates that are run one after the other on the same values, like a function that calls them."""

    def __init__(self, stages: Iterable[Stage], helpers: dict[Any, Function]):
        self.assigned: dict[str, None] = {}
        self.fields: dict[str, dict[str, None]] = {}
        self.lines: list[str] = []
        symbols: list[str] = []
        for stage in stages:
            f = _printed(stage, helpers)
            operands = [*_operands(f), *(name for name in stage.writes if name not in f.params)]
            rooms = [f"{{{', '.join(f'{room}.{name}' for name in names)}}}" for room, names in f.fields.items()]
            self.lines.append(f"{f.symbol}<F>::apply({', '.join([*operands, *rooms])});")
            symbols.append(f.symbol)
            for room, names in f.fields.items():
                self.fields.setdefault(room, {}).update(names)
        self.symbol = "_".join(symbols)
        *_, last = stages
        self.params = list(dict.fromkeys((*last.reads, *self.fields)))


def _operands(f: Function | _Chain) -> tuple[str, ...]:
    return tuple(name for name in f.params if name not in ("s", "c", "x"))


def _printed(stage: Stage, helpers: dict[Any, Function]) -> Function:
    """A stage's function, with its body printed."""
    f = Function(stage.function, helpers)
    if "x" in f.params and stage.kind != "fold":
        raise f.refused(f.node.args, "x is what was measured: only a fold has it", at=f.node)
    if _operands(f) and stage.kind == "fold" and not stage.writes:
        raise f.refused(f.node.args, "a fold over the tensor has s, c and x only", at=f.node)
    f.print(None if stage.kind == "measure" else stage.writes, fold=stage.kind == "fold" and not stage.writes)
    if stage.kind == "measure" and f.returns != 1:
        raise f.refused(f.node, "a measure returns one value")
    return f


def print_stage(stage: Stage, letters: Collection[str]) -> Printed:
    """Print a stage; `letters` are those of the program's unsigned moments, which may be stored as their roots."""
    helpers: dict[Any, Function] = {}
    f = _Chain(stage.chain, helpers) if stage.chain else _printed(stage, helpers)
    reads = _operands(f)
    roots = sum(1 << k for k, name in enumerate(stage.writes) if stage.kind == "update" and name in letters)
    return Printed(
        symbol=f.symbol,
        helpers={helper.symbol: helper.text() for helper in helpers.values()},
        functor=_functor(stage, f, reads),
        kernel=_kernel(stage, f, reads, roots) + _lanes(stage, f, reads, letters) * ("p" in stage.writes),
        reads=reads,
        writes=stage.writes,
        scalars=tuple(f.fields.get("s", ())),
        assigns=tuple(f.assigned),
        constants=tuple(f.fields.get("c", ())),
        uses_x="x" in f.params,
        roots=roots,
    )


def _functor(stage: Stage, f: Function | _Chain, reads: tuple[str, ...]) -> str:
    lines = ["template <class F>", f"struct {f.symbol} {{  // {stage.kind}, {stage.function.__module__}"]
    for room, names in f.fields.items():
        fields = f" lb::constant<F> {', '.join(names)}; " if names else ""
        lines.append(f"  struct {room.upper()} {{{fields}}};")
    params = [f"F {'&' * (name in stage.writes)}{name}" for name in reads]
    params += [f"F &{name}" for name in stage.writes if name not in reads]
    params += ["F x"] * ("x" in f.params)
    params += [f"{_const(f, room)}{room.upper()} &{room}" for room in f.fields]
    lines.append(f"  LB_FN {'F' if stage.kind == 'measure' else 'void'} apply({', '.join(params)}) {{")
    return "\n".join([*lines, *indented(indented(f.lines)), "  }", "};"])


def _kernel(stage: Stage, f: Function | _Chain, reads: tuple[str, ...], roots: int) -> str:
    """The functor on every value; with `roots`, once for each set of writes whose square roots are written."""
    lines = []
    for room, names in f.fields.items():
        loads = ", ".join(f"frame->{room}[frame->{room}i[{k}]]" for k in range(len(names)))
        lines.append(f"{_const(f, room)}{f.symbol}<float>::{room.upper()} {room} = {{{loads}}};")
    others = [name for name in stage.writes if name not in reads]
    call = f"{f.symbol}<float>::apply({', '.join([*reads, *others, *['x'] * ('x' in f.params), *f.fields])});"
    if stage.kind == "fold" and not stage.writes:
        lines += ["const float x = frame->x[0];"] * ("x" in f.params) + [call]
        order = list(f.fields.get("s", ()))
        lines += [f"frame->s[frame->si[{order.index(name)}]] = s.{name};" for name in f.assigned]
    else:
        lines += _loop(stage, reads, others, call, roots)
    head = f"LB_KERNEL({f.symbol})(const lb_frame *frame) {{"
    if not roots:
        return "\n".join([head, *indented(lines), "}"])
    run = f"template <uint32_t ROOTS>\nstatic void {f.symbol}_run(const lb_frame *frame) {{"
    cases = [f"case {k}: return {f.symbol}_run<{k}>(frame);" for k in range(1, roots + 1) if not k & ~roots]
    switch = ["switch (frame->roots) {", *indented([*cases, f"default: return {f.symbol}_run<0>(frame);"]), "}"]
    return "\n".join([run, *indented(lines), "}", head, *indented(switch), "}"])


def _lanes(stage: Stage, f: Function | _Chain, reads: tuple[str, ...], letters: Collection[str]) -> str:
    """How fused.h calls an update that writes p: with an array of operands, those it reads first."""
    order = [*reads, *(name for name in stage.writes if name not in reads)]
    roles = ["p" if n == "p" else "g" if n == "g" else "m" if n in stage.writes else "v" for n in reads]
    name, operands = f"{f.symbol}_lanes", [f"x[{k}]" for k in range(len(order))]
    makes = [
        f"{room}{{{', '.join(f'frame->{room}[frame->{room}i[{k}]]' for k in range(len(names)))}}}"
        for room, names in f.fields.items()
    ]
    lines = [
        f"using Stage = {f.symbol}<LB_SPACE::Lanes>;",
        f"static constexpr int READS = {len(reads)}, WRITES = {len(stage.writes)}, MOMENTS = {roles.count('m')};",
        f"static constexpr int GRADIENT = {reads.index('g') if 'g' in reads else -1};",
        f'static constexpr char ROLES[] = "{"".join(roles)}";',
        f"static constexpr bool UNSIGNED[] = {{{', '.join(str(name in letters).lower() for name in reads)}}};",
        f"static constexpr int PLACES[] = {{{', '.join(str(order.index(name)) for name in stage.writes)}}};",
        *(f"typename Stage::{room.upper()} {room};" for room in f.fields),
        f"explicit {name}([[maybe_unused]] const lb_frame *frame)" + " : " * bool(makes) + ", ".join(makes) + " {}",
        f"LB_FN void run(LB_SPACE::Lanes *x, [[maybe_unused]] const {name} &stage) {{",
        f"  Stage::apply({', '.join([*operands, *(f'stage.{room}' for room in f.fields)])});",
        "}",
    ]
    return "\n".join(
        ["", "#ifdef LB_FUSED", f"struct {name} {{", *indented(lines), "};", f"LB_FUSED({f.symbol})", "#endif"]
    )


def _loop(stage: Stage, reads: tuple[str, ...], others: list[str], call: str, roots: int) -> list[str]:
    """One value after the other, with the peaks. A fold's elements have none, and may be any number."""
    measure, fold = stage.kind == "measure", stage.kind == "fold"
    written = ["measured_"] if measure else list(stage.writes)
    count, peaks = len(written), [] if fold else [*written, *["g"] * ("g" in reads)]
    peak = [f"peaks[{k}] = lb::peak_of(peaks[{k}], {name});" for k, name in enumerate(peaks)]
    loop = [f"{'const ' * (n not in stage.writes)}float {n} = frame->in[{k}][at];" for k, n in enumerate(reads)]
    loop += ["const float x = frame->x[at];"] * ("x" in stage.reads) + [f"float {name};" for name in others]
    loop += [*peak[count:], "const float measured_ = " * measure + call]
    for k, name in enumerate(written):
        loop += [f"if (ROOTS & {1 << k}) {name} = lb::sqrt({name});"] * (roots >> k & 1)
        loop += [f"frame->out[{k}][at] = {name};", *peak[:count][k : k + 1]]
    if fold:
        return ["LB_IVDEP", "for (int64_t at = 0; at < frame->n; ++at) {", *indented(loop), "}"]
    piece = ["const int64_t stop = start + frame->piece < end ? start + frame->piece : end;"]
    piece += [f"int32_t peaks[{len(peaks)}] = {{}};"] * bool(peaks)
    piece += ["LB_IVDEP", "for (int64_t at = start; at < stop; ++at) {", *indented(loop), "}"]
    piece += [f"*found++ = (uint32_t)peaks[{k}];" for k in range(len(peaks))]
    lines = ["const int64_t end = frame->n & ~INT64_C(15);", *["uint32_t *found = frame->peaks;"] * bool(peaks)]
    return [*lines, "for (int64_t start = 0; start < end; start += frame->piece) {", *indented(piece), "}"]


def _const(f: Function | _Chain, room: str) -> str:
    return "" if room == "s" and f.assigned else "const "


RULES = """// Printed from lowbit/optim by `python -m lowbit.native.printer`; do not edit.
#pragma once
#include "words.h"

#ifdef __GNUC__  // a rule need not use all it has
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-parameter"
#pragma GCC diagnostic ignored "-Wunused-variable"
#pragma GCC diagnostic ignored "-Wunused-but-set-parameter"
#pragma GCC diagnostic ignored "-Wunused-but-set-variable"
#endif
"""
END = """#ifdef __GNUC__
#pragma GCC diagnostic pop
#endif
"""
KERNELS = """// Printed from lowbit/optim by `python -m lowbit.native.printer`; do not edit.
//
// For a file that defines LB_KERNEL(symbol): how the declaration of an exported function of that name begins.
#pragma once
#include "abi.h"
#include "rules.h"
"""


def rules_header(stages: Iterable[tuple[Stage, Collection[str]]]) -> str:
    """`rules.h`: the functors of stages, given with their programs' unsigned letters, and what these call."""
    texts: dict[str, str] = {}
    for stage, letters in stages:
        printed = print_stage(stage, letters)
        for name, text in {**printed.helpers, printed.symbol: printed.functor}.items():
            if texts.setdefault(name, text) != text:
                raise Unprintable(f"two functions would be {name} in C++: rename one of them, or its module")
    return "\n".join([RULES, *(f"{text}\n" for text in texts.values()), END])


def kernels_header(stages: Iterable[tuple[Stage, Collection[str]]]) -> str:
    """`kernels.h`: the CPU kernels of the same stages."""
    return "\n".join([KERNELS, *(f"{print_stage(*pair).kernel}\n" for pair in stages)])


def collect(package: ModuleType) -> list[tuple[Stage, frozenset[str]]]:
    """Every printed stage that the modules of a package define, with the letters that may be unsigned.

    These are all it writes but p, g and the moments that a rule in its module declares as signed. So a moment that only
    a `plan` declares counts as unsigned; if it is not, that costs a kernel that nobody runs.
    """
    found = []
    home = attrgetter("function.__module__")
    for name in sorted(info.name for info in pkgutil.iter_modules(package.__path__, f"{package.__name__}.")):
        module = vars(importlib.import_module(name)).values()
        declared = [getattr(value, "moments", {}) for value in module if isinstance(value, type)]
        signed = {letter for moments in declared for letter, moment in moments.items() if moment.signed}
        stages = [value for value in module if isinstance(value, Stage) and (value.chain or home(value) == name)]
        stages = [stage for stage in stages if stage.kind != "matrix"]
        found += [(stage, frozenset(stage.writes) - {"p", "g"} - signed) for stage in stages]
    return found


if __name__ == "__main__":
    # By name, as from the command line: the printer lives floors below the optimizers.
    for package in sys.argv[1:] or ["lowbit.optim"]:
        stages = collect(importlib.import_module(package))
        Path(__file__).with_name("rules.h").write_text(rules_header(stages))
        Path(__file__).with_name("kernels.h").write_text(kernels_header(stages))
