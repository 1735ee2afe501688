"""Prints the stages of rules as C++: what `lowbit/native/rules.h` and `kernels.h` hold, name for name.

    python -m lowbit.native.printer          writes both anew; a test says whether they are current

A stage becomes a functor, `adamw_adamw::apply(p, g, m, v, s, c)`, which CPU and CUDA kernels share, and a CPU kernel,
the loop around it. The plain functions it calls are printed before it. Arithmetic on numbers alone is done here, in
float64, as Python does it; a number that meets a value is rounded to fp32 once, as torch does it.

Whatever could mean in C++ anything but what torch makes of it is refused, with its line. So numbers neither divide nor
are divided by (torch takes a reciprocal: for `1 / x` always, for `x / 3` on CUDA), and += is no assignment (in torch it
writes into the caller's tensor).
"""

from __future__ import annotations

import ast
import importlib
import inspect
import math
import operator
import pkgutil
import re
import struct
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from .. import words
from ..stages import Stage

# What a word's arguments may be: a condition, a value, any (a number too), or some (numbers too, but not all of them).
WORDS = {"lerp": "ssv", "where": "css", "maximum": "ss", "minimum": "ss", "clip": "vaa"}
WORDS.update(dict.fromkeys(["sqrt", "reciprocal", "binade", "abs", "sign"], "v"))

# What names are declared as: F is a number, float or several at once; a condition is whatever comparing them gives.
TYPE = {"float": "F", "bool": "auto"}
LOGIC, COMPARISON, SUM, PRODUCT, SIGN, ATOM = range(6)  # how tightly a printed expression binds
ARITHMETIC: dict[type, tuple[str, int, Callable[[Any, Any], Any]]] = {
    ast.Add: ("+", SUM, operator.add),
    ast.Sub: ("-", SUM, operator.sub),
    ast.Mult: ("*", PRODUCT, operator.mul),
    ast.Div: ("/", PRODUCT, operator.truediv),
}
LOGICAL: dict[type, str] = {ast.BitAnd: "&", ast.BitOr: "|"}
COMPARING: dict[type, str] = {ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=", ast.Eq: "==", ast.NotEq: "!="}

MAY_SAY = (
    "a rule may assign to names (a fold to s.name), return at its end, and say its arguments, s.name, c.name, numbers, "
    f"+ - * /, comparisons, & | ~, plain functions by position, and of lowbit.words {', '.join(WORDS)}"
)
ADVICE: dict[type, str] = {
    ast.IfExp: "say where(condition, a, b)",
    ast.If: "say where(condition, a, b)",
    ast.BoolOp: "say & or |",
    ast.Not: "say ~",
    ast.Pow: "say a * a",
    ast.AugAssign: "in torch this writes into the caller's tensor; say a = a + b",
}
# Names that the printed code needs; one that ends in _ is the printer's too.
TAKEN = re.compile(
    "alignas|alignof|and_eq|asm|auto|bitand|bitor|bool|case|catch|char|compl|const|constexpr|const_cast|decltype|default|"
    "delete|do|double|dynamic_cast|enum|explicit|export|extern|false|float|friend|goto|inline|int|long|mutable|namespace|"
    "new|noexcept|not_eq|nullptr|operator|or_eq|private|protected|public|register|reinterpret_cast|short|signed|sizeof|"
    "static|static_assert|static_cast|struct|switch|template|this|thread_local|throw|true|typedef|typeid|typename|typeof|"
    "union|unsigned|using|virtual|void|volatile|wchar_t|xor|xor_eq|lb|F|S|C|ROOTS|apply|frame|at|end|peaks|.*_"
)


class Unprintable(ValueError):
    """A rule says what has no C++ with the same bits; the message names the line and what may be said."""


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


class _Term(NamedTuple):
    """A printed expression: a "float" or a "bool", and how tightly it binds."""

    kind: str
    text: str
    rank: int = ATOM

    def within(self, rank: int) -> str:
        return self.text if self.rank >= rank else f"({self.text})"


class _Function:
    """One Python function on its way to C++: the lines so far, and what its names mean after them."""

    def __init__(self, function: Any, helpers: dict[Any, _Function], callers: tuple[Any, ...] = ()):
        self.function, self.helpers, self.callers = function, helpers, (*callers, function)
        name = getattr(function, "__qualname__", repr(function))
        if not inspect.isfunction(function) or hasattr(function, "__wrapped__") or function.__name__ == "<lambda>":
            raise Unprintable(f"{name} is no plain function: say def, without decorators of your own")
        self.file, self.symbol = function.__code__.co_filename, symbol(function)
        try:
            source, self.first = inspect.getsourcelines(function)
            node = ast.parse(textwrap.dedent("".join(source))).body[0]
        except (OSError, SyntaxError) as error:
            raise Unprintable(f"{self.file}: cannot read the source of {name} ({error}): keep it in a file") from None
        if not isinstance(node, ast.FunctionDef):
            raise self.refused(node, "say def")
        self.node, given = node, node.args
        if given.vararg or given.kwarg or given.kwonlyargs or given.defaults:
            raise self.refused(given, "arguments are operands, without defaults, * and **", at=node)
        self.params = [self.own_name(argument.arg, argument) for argument in given.posonlyargs + given.args]
        self.fields: dict[str, dict[str, None]] = {room: {} for room in "sc" if room in self.params}  # ordered sets
        self.assigned: dict[str, None] = {}
        self.declared = {name: "float" for name in self.params if name not in self.fields}
        self.names: dict[str, _Term | float] = {name: _Term("float", name) for name in self.declared}
        self.stores = Counter(n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store))
        self.lines: list[str] = []
        self.returns = 0

    def refused(self, node: ast.AST, advice: str = "", at: ast.AST | None = None) -> Unprintable:
        line = self.first - 1 + getattr(at or node, "lineno", 1)
        advice = advice or ADVICE.get(type(getattr(node, "op", None)), ADVICE.get(type(node), MAY_SAY))
        said = next(text for text in ast.unparse(node).splitlines() if not text.startswith("@"))
        return Unprintable(f"{self.file}:{line}: a rule cannot say `{said}`: {advice}")

    def own_name(self, name: str, node: ast.AST) -> str:
        if TAKEN.fullmatch(name):
            raise self.refused(node, f"the printed C++ needs the name {name!r}: choose another")
        return name

    # ---- statements

    def print(self, outputs: Collection[str] | None, fold: bool = False) -> None:
        """Print the body. Results go to `outputs`; without these, one is returned, several are out-parameters."""
        self.declared.update((self.own_name(name, self.node), "float") for name in outputs or ())
        body = self.node.body[ast.get_docstring(self.node, clean=False) is not None :]
        last = body.pop() if body and not fold and isinstance(body[-1], ast.Return) else None
        for statement in body:
            match statement:
                case ast.Assign([target], value):
                    targets = target.elts if isinstance(target, ast.Tuple) else [target]
                    self.assign([self.place(t, fold) for t in targets], value, statement)
                case ast.Return() if fold:
                    raise self.refused(statement, "a fold over the tensor assigns to s.name and returns nothing")
                case _:
                    raise self.refused(statement)
        if fold:
            return
        if not isinstance(last, ast.Return) or last.value is None:
            raise self.refused(self.node, "its last line must return what it computes")
        self.returns = self.count(last.value)
        if outputs is None and self.returns == 1:
            self.lines.append(f"return {self.tensor(last.value).text};")
            return
        places = self.outs() if outputs is None else list(outputs)
        self.declared.update(dict.fromkeys(places, "float"))
        self.assign(places, last.value, last, results=True)

    def place(self, target: ast.expr, fold: bool) -> str:
        """What is assigned to: a name, or a scalar."""
        match target:
            case ast.Name(name) if name not in self.fields:
                return self.own_name(name, target)
            case ast.Attribute(ast.Name("s"), name) if fold and "s" in self.fields:
                self.fields["s"][self.own_name(name, target)] = self.assigned[name] = None
                self.declared[f"s.{name}"] = "float"
                return f"s.{name}"
        raise self.refused(target, "assign to a name or, in a fold over the tensor, to s.name")

    def count(self, value: ast.expr) -> int:
        """How many values an expression has: those of a tuple, or of a function that returns one."""
        if isinstance(value, ast.Tuple):
            return len(value.elts)
        helper = self.helper(value) if isinstance(value, ast.Call) else None
        return helper.returns if helper else 1

    def assign(self, places: list[str], value: ast.expr, at: ast.stmt, results: bool = False) -> None:
        """All values first, then all places, as in Python."""
        if self.count(value) != len(places):
            raise self.refused(at, f"{self.count(value)} values for {len(places)} names")
        if isinstance(value, ast.Call) and len(places) > 1:
            if new := [place for place in places if place not in self.declared]:
                self.lines.append(f"F {', '.join(new)};")
            self.lines.append(f"{self.call(value, places).text};")
            self.declared.update(dict.fromkeys(new, "float"))
            for place in places:
                self.bind(place, _Term("float", place), at)
            return
        said = zip(value.elts if isinstance(value, ast.Tuple) else [value], places, strict=True)
        terms = [self.tensor(v) if results or "s." in place else self.expression(v) for v, place in said]
        for k, term in enumerate(terms):  # keep aside what an assignment before it would change
            before = "|".join(map(re.escape, places[:k]))
            if k and isinstance(term, _Term) and re.search(rf"(?<![.\w])({before})\b", term.text):
                kept = f"kept{len(self.lines)}_"
                self.lines.append(f"const {TYPE[term.kind]} {kept} = {term.text};")
                terms[k] = _Term(term.kind, kept)
        for place, term in zip(places, terms, strict=True):
            self.bind(place, term, at)

    def bind(self, place: str, term: _Term | float, at: ast.stmt) -> None:
        if not isinstance(term, _Term):  # stays a number until it meets a value
            self.names[place] = term
            return
        new = place not in self.declared
        if self.declared.setdefault(place, term.kind) != term.kind:
            raise self.refused(at, f"{place} is a value or a condition, not one after the other")
        if new:
            self.lines.append(f"{'const ' * (self.stores[place] == 1)}{TYPE[term.kind]} {place} = {term.text};")
        elif term.text != place:
            self.lines.append(f"{place} = {term.text};")
        self.names[place] = _Term(term.kind, place)

    # ---- expressions

    def expression(self, node: ast.expr) -> _Term | float:
        """A term; or a number, as long as it has met no value."""
        match node:
            case ast.Constant(int() | float() as number) if not isinstance(number, bool):
                return number
            case ast.Name(name):
                return self.meaning(name, node)
            case ast.Attribute(ast.Name(room), name) if room in self.fields:
                self.fields[room][self.own_name(name, node)] = None
                return _Term("float", f"{room}.{name}")
            case ast.UnaryOp(ast.USub(), a):
                term = self.expression(a)
                return (
                    _Term("float", f"-{self.value(term, a).within(ATOM)}", SIGN) if isinstance(term, _Term) else -term
                )
            case ast.UnaryOp(ast.Invert(), a):
                return _Term("bool", f"!{self.condition(self.expression(a), a).within(ATOM)}", SIGN)
            case ast.BinOp(a, op, b) if type(op) in LOGICAL:
                terms = [self.condition(self.expression(each), each).within(SIGN) for each in (a, b)]
                return _Term("bool", f" {LOGICAL[type(op)]} ".join(terms), LOGIC)
            case ast.BinOp(a, op, b) if type(op) in ARITHMETIC:
                sign, rank, fold = ARITHMETIC[type(op)]
                terms = [self.expression(a), self.expression(b)]
                numbers = [term for term in terms if not isinstance(term, _Term)]
                if len(numbers) == 2:
                    try:
                        return fold(*numbers)
                    except ArithmeticError as error:
                        raise self.refused(node, f"{error}") from None
                if numbers and sign == "/":
                    raise self.refused(node, "torch takes a reciprocal here; multiply by a number, or say c.name")
                left, right = self.value(terms[0], a), self.value(terms[1], b)
                return _Term("float", f"{left.within(rank)} {sign} {right.within(rank + 1)}", rank)
            case ast.Compare(a, [op], [b]) if type(op) in COMPARING:
                terms = self.some([self.expression(a), self.expression(b)], node)
                left, right = self.value(terms[0], a), self.value(terms[1], b)
                return _Term("bool", f"{left.within(SUM)} {COMPARING[type(op)]} {right.within(SUM)}", COMPARISON)
            case ast.Call():
                return self.call(node)
        raise self.refused(node)

    def value(self, term: _Term | float, node: ast.expr) -> _Term:
        """An fp32 value; a number is rounded to one."""
        if isinstance(term, _Term):
            if term.kind != "float":
                raise self.refused(node, "a condition is no value; say where(condition, a, b)")
            return term
        try:
            (number,) = struct.unpack("f", struct.pack("f", term))
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise self.refused(node, "numbers are finite in fp32")
        return _Term("float", f"{number!r}f", SIGN if math.copysign(1, number) < 0 else ATOM)

    def condition(self, term: _Term | float, node: ast.expr) -> _Term:
        if not isinstance(term, _Term) or term.kind != "bool":
            raise self.refused(node, "this must be a condition, such as a > b")
        return term

    def some(self, terms: list[_Term | float], node: ast.expr) -> list[_Term | float]:
        """The terms, where torch would not take numbers alone."""
        if terms and not any(isinstance(term, _Term) for term in terms):
            raise self.refused(node, "a number alone is no tensor; say c.name")
        return terms

    def tensor(self, node: ast.expr) -> _Term:
        return self.value(self.some([self.expression(node)], node)[0], node)

    # ---- names and calls

    def meaning(self, name: str, node: ast.expr) -> _Term | float:
        if name in self.names:
            return self.names[name]
        found = self.outer(name)
        if isinstance(found, bool) or not isinstance(found, (int, float)):
            raise self.refused(node, f"{name} is no argument, no name assigned above and no number; {MAY_SAY}")
        return found

    def outer(self, name: str) -> Any:
        """What a name means outside the function."""
        code = self.function.__code__
        if name in code.co_freevars:
            return self.function.__closure__[code.co_freevars.index(name)].cell_contents
        return None if name in code.co_varnames else self.function.__globals__.get(name)

    def helper(self, node: ast.Call) -> _Function | None:
        """The function that is called, printed; None for a word."""
        name = node.func.id if isinstance(node.func, ast.Name) and not node.keywords else ""
        called = self.outer(name)
        if any(called is getattr(words, word) for word in WORDS):
            return None
        if not inspect.isfunction(called):
            raise self.refused(node, f"from lowbit.words import {name}" if name in WORDS else "")
        if called in self.callers:
            raise self.refused(node, "a function cannot call itself")
        if called not in self.helpers:
            helper = _Function(called, self.helpers, self.callers)
            helper.print(None)
            self.helpers[called] = helper
        return self.helpers[called]

    def call(self, node: ast.Call, outs: Collection[str] = ()) -> _Term:
        helper, given, name = self.helper(node), node.args, ast.unparse(node.func)
        word = next((word for word in WORDS if self.outer(name) is getattr(words, word)), "")
        wanted = helper.params if helper else WORDS[word]
        if len(given) != len(wanted):
            raise self.refused(node, f"{name} takes {len(wanted)} arguments")
        texts = []
        if helper is None:
            terms = [self.expression(argument) for argument in given]
            self.some([term for kind, term in zip(wanted, terms, strict=True) if kind == "s"], node)
            for kind, term, argument in zip(wanted, terms, given, strict=True):
                self.some([term] * (kind == "v"), argument)
                texts.append((self.condition if kind == "c" else self.value)(term, argument).text)
            return _Term("float", f"lb::{word}({', '.join(texts)})")
        if helper.returns > 1 and not outs:
            raise self.refused(node, f"{helper.returns} values; say a, b = {name}(…)")
        for argument, param in zip(given, wanted, strict=True):
            if param not in helper.fields:
                texts.append(self.tensor(argument).text)
            elif param in self.fields and ast.unparse(argument) == param:
                texts.append(param)
                self.fields[param].update(helper.fields[param])
            else:
                raise self.refused(argument, f"{name} takes {param} here", at=node)
        return _Term("float", f"{helper.symbol}<F>({', '.join([*texts, *outs])})")

    # ---- text

    def outs(self) -> list[str]:
        return [f"out{k}_" for k in range(self.returns)] if self.returns > 1 else []

    def text(self) -> str:
        """As a helper: a template over the numbers, and the structs of whoever calls it."""
        params = [f"const {p.upper()} &{p}" if p in self.fields else f"F {p}" for p in self.params]
        params += [f"F &{name}" for name in self.outs()]
        template = f"template <{', '.join(['class F', *(f'class {room.upper()}' for room in self.fields)])}>"
        kind = "void" if self.outs() else "F"
        return "\n".join([template, f"LB_FN {kind} {self.symbol}({', '.join(params)}) {{", *_in(self.lines), "}"])


class _Chain:
    """Updates that are run one after the other on the same values, like a function that calls them."""

    def __init__(self, stages: Iterable[Stage], helpers: dict[Any, _Function]):
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


def _operands(f: _Function | _Chain) -> tuple[str, ...]:
    return tuple(name for name in f.params if name not in ("s", "c", "x"))


def _printed(stage: Stage, helpers: dict[Any, _Function]) -> _Function:
    """A stage's function, with its body printed."""
    f = _Function(stage.function, helpers)
    if "x" in f.params and stage.kind != "fold":
        raise f.refused(f.node.args, "x is what was measured: only a fold has it", at=f.node)
    if _operands(f) and stage.kind == "fold" and not stage.writes:
        raise f.refused(f.node.args, "a fold over the tensor has s, c and x only", at=f.node)
    f.print(None if stage.kind == "measure" else stage.writes, fold=stage.kind == "fold" and not stage.writes)
    if stage.kind == "measure" and f.returns != 1:
        raise f.refused(f.node, "a measure returns one value")
    return f


def symbol(function: Any) -> str:
    """A function's name in C++: its module's last part and its own name."""
    return re.sub(r"\W+", "_", f"{function.__module__.rpartition('.')[2]}_{function.__qualname__}")


def print_stage(stage: Stage, letters: Collection[str]) -> Printed:
    """Print a stage; `letters` are those of the program's unsigned moments, which may be stored as their roots."""
    helpers: dict[Any, _Function] = {}
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


def _functor(stage: Stage, f: _Function | _Chain, reads: tuple[str, ...]) -> str:
    lines = ["template <class F>", f"struct {f.symbol} {{  // {stage.kind}, {stage.function.__module__}"]
    for room, names in f.fields.items():
        fields = f" lb::constant<F> {', '.join(names)}; " if names else ""
        lines.append(f"  struct {room.upper()} {{{fields}}};")
    params = [f"F {'&' * (name in stage.writes)}{name}" for name in reads]
    params += [f"F &{name}" for name in stage.writes if name not in reads]
    params += ["F x"] * ("x" in f.params)
    params += [f"{_const(f, room)}{room.upper()} &{room}" for room in f.fields]
    lines.append(f"  LB_FN {'F' if stage.kind == 'measure' else 'void'} apply({', '.join(params)}) {{")
    return "\n".join([*lines, *_in(_in(f.lines)), "  }", "};"])


def _kernel(stage: Stage, f: _Function | _Chain, reads: tuple[str, ...], roots: int) -> str:
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
        return "\n".join([head, *_in(lines), "}"])
    run = f"template <uint32_t ROOTS>\nstatic void {f.symbol}_run(const lb_frame *frame) {{"
    cases = [f"case {k}: return {f.symbol}_run<{k}>(frame);" for k in range(1, roots + 1) if not k & ~roots]
    switch = ["switch (frame->roots) {", *_in([*cases, f"default: return {f.symbol}_run<0>(frame);"]), "}"]
    return "\n".join([run, *_in(lines), "}", head, *_in(switch), "}"])


def _lanes(stage: Stage, f: _Function | _Chain, reads: tuple[str, ...], letters: Collection[str]) -> str:
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
    return "\n".join(["", "#ifdef LB_FUSED", f"struct {name} {{", *_in(lines), "};", f"LB_FUSED({f.symbol})", "#endif"])


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
        return ["LB_IVDEP", "for (int64_t at = 0; at < frame->n; ++at) {", *_in(loop), "}"]
    piece = ["const int64_t stop = start + frame->piece < end ? start + frame->piece : end;"]
    piece += [f"int32_t peaks[{len(peaks)}] = {{}};"] * bool(peaks)
    piece += ["LB_IVDEP", "for (int64_t at = start; at < stop; ++at) {", *_in(loop), "}"]
    piece += [f"*found++ = (uint32_t)peaks[{k}];" for k in range(len(peaks))]
    lines = ["const int64_t end = frame->n & ~INT64_C(15);", *["uint32_t *found = frame->peaks;"] * bool(peaks)]
    return [*lines, "for (int64_t start = 0; start < end; start += frame->piece) {", *_in(piece), "}"]


def _const(f: _Function | _Chain, room: str) -> str:
    return "" if room == "s" and f.assigned else "const "


def _in(lines: Iterable[str]) -> list[str]:
    return [f"  {line}" for line in lines]


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
