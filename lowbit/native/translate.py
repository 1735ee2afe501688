"""One Python function of a rule on its way to C++: its statements and expressions, name for name.

Arithmetic on numbers alone is done here, in float64, as Python does it; a number that meets a value is rounded to fp32
once, as torch does it.

Whatever could mean in C++ anything but what torch makes of it is refused, with its line. So numbers neither divide nor
are divided by (torch takes a reciprocal: for `1 / x` always, for `x / 3` on CUDA), and += is no assignment (in torch it
writes into the caller's tensor).
"""

from __future__ import annotations

import ast
import inspect
import math
import operator
import re
import struct
import textwrap
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from typing import Any, NamedTuple

from .. import words

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


class Term(NamedTuple):
    """A printed expression: a "float" or a "bool", and how tightly it binds."""

    kind: str
    text: str
    rank: int = ATOM

    def within(self, rank: int) -> str:
        return self.text if self.rank >= rank else f"({self.text})"


class Function:
    """One Python function on its way to C++: the lines so far, and what its names mean after them."""

    def __init__(self, function: Any, helpers: dict[Any, Function], callers: tuple[Any, ...] = ()):
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
        self.names: dict[str, Term | float] = {name: Term("float", name) for name in self.declared}
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
                self.bind(place, Term("float", place), at)
            return
        said = zip(value.elts if isinstance(value, ast.Tuple) else [value], places, strict=True)
        terms = [self.tensor(v) if results or "s." in place else self.expression(v) for v, place in said]
        for k, term in enumerate(terms):  # keep aside what an assignment before it would change
            before = "|".join(map(re.escape, places[:k]))
            if k and isinstance(term, Term) and re.search(rf"(?<![.\w])({before})\b", term.text):
                kept = f"kept{len(self.lines)}_"
                self.lines.append(f"const {TYPE[term.kind]} {kept} = {term.text};")
                terms[k] = Term(term.kind, kept)
        for place, term in zip(places, terms, strict=True):
            self.bind(place, term, at)

    def bind(self, place: str, term: Term | float, at: ast.stmt) -> None:
        if not isinstance(term, Term):  # stays a number until it meets a value
            self.names[place] = term
            return
        new = place not in self.declared
        if self.declared.setdefault(place, term.kind) != term.kind:
            raise self.refused(at, f"{place} is a value or a condition, not one after the other")
        if new:
            self.lines.append(f"{'const ' * (self.stores[place] == 1)}{TYPE[term.kind]} {place} = {term.text};")
        elif term.text != place:
            self.lines.append(f"{place} = {term.text};")
        self.names[place] = Term(term.kind, place)

    # ---- expressions

    def expression(self, node: ast.expr) -> Term | float:
        """A term; or a number, as long as it has met no value."""
        match node:
            case ast.Constant(int() | float() as number) if not isinstance(number, bool):
                return number
            case ast.Name(name):
                return self.meaning(name, node)
            case ast.Attribute(ast.Name(room), name) if room in self.fields:
                self.fields[room][self.own_name(name, node)] = None
                return Term("float", f"{room}.{name}")
            case ast.UnaryOp(ast.USub(), a):
                term = self.expression(a)
                return Term("float", f"-{self.value(term, a).within(ATOM)}", SIGN) if isinstance(term, Term) else -term
            case ast.UnaryOp(ast.Invert(), a):
                return Term("bool", f"!{self.condition(self.expression(a), a).within(ATOM)}", SIGN)
            case ast.BinOp(a, op, b) if type(op) in LOGICAL:
                terms = [self.condition(self.expression(each), each).within(SIGN) for each in (a, b)]
                return Term("bool", f" {LOGICAL[type(op)]} ".join(terms), LOGIC)
            case ast.BinOp(a, op, b) if type(op) in ARITHMETIC:
                sign, rank, fold = ARITHMETIC[type(op)]
                terms = [self.expression(a), self.expression(b)]
                numbers = [term for term in terms if not isinstance(term, Term)]
                if len(numbers) == 2:
                    try:
                        return fold(*numbers)
                    except ArithmeticError as error:
                        raise self.refused(node, f"{error}") from None
                if numbers and sign == "/":
                    raise self.refused(node, "torch takes a reciprocal here; multiply by a number, or say c.name")
                left, right = self.value(terms[0], a), self.value(terms[1], b)
                return Term("float", f"{left.within(rank)} {sign} {right.within(rank + 1)}", rank)
            case ast.Compare(a, [op], [b]) if type(op) in COMPARING:
                terms = self.some([self.expression(a), self.expression(b)], node)
                left, right = self.value(terms[0], a), self.value(terms[1], b)
                return Term("bool", f"{left.within(SUM)} {COMPARING[type(op)]} {right.within(SUM)}", COMPARISON)
            case ast.Call():
                return self.call(node)
        raise self.refused(node)

    def value(self, term: Term | float, node: ast.expr) -> Term:
        """An fp32 value; a number is rounded to one."""
        if isinstance(term, Term):
            if term.kind != "float":
                raise self.refused(node, "a condition is no value; say where(condition, a, b)")
            return term
        try:
            (number,) = struct.unpack("f", struct.pack("f", term))
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise self.refused(node, "numbers are finite in fp32")
        return Term("float", f"{number!r}f", SIGN if math.copysign(1, number) < 0 else ATOM)

    def condition(self, term: Term | float, node: ast.expr) -> Term:
        if not isinstance(term, Term) or term.kind != "bool":
            raise self.refused(node, "this must be a condition, such as a > b")
        return term

    def some(self, terms: list[Term | float], node: ast.expr) -> list[Term | float]:
        """The terms, where torch would not take numbers alone."""
        if terms and not any(isinstance(term, Term) for term in terms):
            raise self.refused(node, "a number alone is no tensor; say c.name")
        return terms

    def tensor(self, node: ast.expr) -> Term:
        return self.value(self.some([self.expression(node)], node)[0], node)

    # ---- names and calls

    def meaning(self, name: str, node: ast.expr) -> Term | float:
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

    def helper(self, node: ast.Call) -> Function | None:
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
            helper = Function(called, self.helpers, self.callers)
            helper.print(None)
            self.helpers[called] = helper
        return self.helpers[called]

    def call(self, node: ast.Call, outs: Collection[str] = ()) -> Term:
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
            return Term("float", f"lb::{word}({', '.join(texts)})")
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
        return Term("float", f"{helper.symbol}<F>({', '.join([*texts, *outs])})")

    # ---- text

    def outs(self) -> list[str]:
        return [f"out{k}_" for k in range(self.returns)] if self.returns > 1 else []

    def text(self) -> str:
        """As a helper: a template over the numbers, and the structs of whoever calls it."""
        params = [f"const {p.upper()} &{p}" if p in self.fields else f"F {p}" for p in self.params]
        params += [f"F &{name}" for name in self.outs()]
        template = f"template <{', '.join(['class F', *(f'class {room.upper()}' for room in self.fields)])}>"
        kind = "void" if self.outs() else "F"
        return "\n".join([template, f"LB_FN {kind} {self.symbol}({', '.join(params)}) {{", *indented(self.lines), "}"])


def symbol(function: Any) -> str:
    """A function's name in C++: its module's last part and its own name."""
    return re.sub(r"\W+", "_", f"{function.__module__.rpartition('.')[2]}_{function.__qualname__}")


def indented(lines: Iterable[str]) -> list[str]:
    """Lines of C++, one level further in."""
    return [f"  {line}" for line in lines]
