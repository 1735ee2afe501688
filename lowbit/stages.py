"""What an optimizer computes, as data: stages, moments, and the program and jobs a backend runs.

A rule is a short ordered list of stages, each a small pure function in the words of `lowbit.words`:

    @measure("max" | "sum" | "mean", over="tensor" | "all" | "row" | "column" | "group")
                   per value, reduced to one number for each tensor, for all tensors together, or for each row, column
                   or group of rows of each tensor; reads p, g, moments, vectors, `s`, `c`
    @fold          once per tensor: reads constants `c` and what was last measured over tensors, `x`; assigns to the
                   tensor's scalars `s`
    @fold("v n")   once per element of what was last measured, which must be rows, columns or groups: reads that
                   element's `x`, vectors over the same, `s`, `c`; returns what it writes, each a vector
    @update("p m") per value: reads p, g, moments, vectors, `s`, `c`; returns what it writes
    @matrix("u")   once per tensor, in torch: reads g, moments and what earlier stages wrote, all as whole fp32 matrices
                   (rows x cols), and `c` as floats, `host`, `key`, `shape`; returns what it writes, each a matrix

The arguments' names are the operands: `p` and `g`, a letter for each moment, `s`, `c` and `x`. A vector has one fp32
number per row, column or group: a moment that is declared so is kept from step to step, any other letter that a fold
writes lasts for this step. Updates and measures read vectors broadcast over their values. A group is a number of
consecutive rows (`Rule.group_rows`); the last may be short.

A measurement costs one sweep over the gradient, in which the updates before it are repeated, so a program costs
`1 + len(measures)` sweeps. The functions are what a backend runs (or prints); nothing else in the library states a
formula.

Matrix stages cut a program into segments of printed stages, each a program that any backend runs. A letter that must
pass a cut and is no moment is a whole fp32 matrix for as long as it is needed, one tensor after the other. A segment is
over the matrices that its stages name, which need not have the parameter's shape (`Rule.shapes`). Scalars pass a cut if
they are declared; vectors if they are moments; `g` is the tensor's gradient everywhere. `host` are numbers that the
host knows without asking a device (`Rule.host`); `key` is the tensor's, the step's and the seed's own random number;
`shape` is the parameter's.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import groupby
from operator import attrgetter
from typing import Any, Literal, overload

import torch
from torch import Tensor

from .formats import Format
from .layout import row_stride
from .shards import Shard, local
from .tape import Traced

Reduce = Literal["max", "sum", "mean"]
Vector = Literal["row", "column", "group"]
Over = Literal["tensor", "all"] | Vector
VECTORS = ("row", "column", "group")


@dataclass(frozen=True)
class Moment:
    """One state of an optimizer: its torch name, its sign, the scalar that debiases it, if any, and what it is over.

    One number per value can be stored in any format; one per row, column or group of rows is a plain fp32 vector.
    `lasting`: no average of gradients, so a momentum reset leaves it (a projector).
    """

    name: str
    signed: bool = True
    weight: str = ""
    over: Literal["value"] | Vector = "value"
    lasting: bool = False


@dataclass(frozen=True)
class Stage:
    """One function of a rule. `reduce` and `over` are a measure's; a fold with `writes` is one over vectors.

    What saves a backend work, where a stage declares it. `plain`: a measure's value is the magnitude of g. `unit`: it
    is the square of g times this scalar, which is a power of two. `above`: an update of g leaves a value as it is whose
    magnitude is at most this scalar.
    """

    kind: Literal["measure", "fold", "update", "matrix"]
    function: Callable[..., Any]
    reads: tuple[str, ...]
    writes: tuple[str, ...] = ()
    reduce: Reduce | Literal[""] = ""
    over: Over = "tensor"
    plain: bool = False
    unit: str = ""
    above: str = ""
    chain: tuple[Stage, ...] = ()  # the updates that this one is made of

    @property
    def reduce_over(self) -> Literal["sum", "max"]:
        """How what parts of a tensor have measured is brought together."""
        return "max" if self.reduce == "max" else "sum"

    def __call__(self, operands: Mapping[str, Any]) -> Any:
        return self.function(*(operands[name] for name in self.reads))

    def written(self, operands: Mapping[str, Any]) -> dict[str, Any]:
        """What the function returns, by letter."""
        result = self(operands)
        return dict(zip(self.writes, result if len(self.writes) > 1 else (result,), strict=True))

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        # The decorator took the function's name, so what pickle finds there is the stage.
        return _named, (self.function.__module__, self.function.__qualname__)

    def __deepcopy__(self, memo: Any) -> Stage:
        return self


def _named(module: str, name: str) -> Stage:
    return attrgetter(name)(importlib.import_module(module))


def _reads(function: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)


def measure(reduce: Reduce, over: Over = "tensor", *, plain: bool = False, unit: str = "") -> Callable[..., Stage]:
    """Decorator: the function's value, reduced to one number for each of what it is over; "max" is of magnitudes.

    `plain`, `unit`: see `Stage`.
    """
    if reduce == "mean" and over == "all":
        raise ValueError('measure("mean", over="all"): over all tensors there are "max" and "sum" only')

    def decorate(function: Callable[..., Any]) -> Stage:
        return Stage("measure", function, _reads(function), reduce=reduce, over=over, plain=plain, unit=unit)

    return decorate


@overload
def fold(function: Callable[..., Any], /) -> Stage: ...
@overload
def fold(writes: str, /) -> Callable[..., Stage]: ...
def fold(function: Callable[..., Any] | str, /) -> Stage | Callable[..., Stage]:
    """Decorator: once per tensor, assigning to `s`; or, given letters as in `update`, per row, column or group."""
    if not isinstance(function, str):
        return Stage("fold", function, _reads(function))
    writes = tuple(function.split())
    return lambda function: Stage("fold", function, _reads(function), writes)


def update(writes: str, *, above: str = "") -> Callable[..., Stage]:
    """Decorator: per value; `writes` names what the function returns, in order, such as "p m v".

    `above`: see `Stage`.
    """

    def decorate(function: Callable[..., Any]) -> Stage:
        return Stage("update", function, _reads(function), writes=tuple(writes.split()), above=above)

    return decorate


@cache
def together(first: Stage, last: Stage) -> Stage:
    """Two updates as one, for a backend that would go over memory twice: g as `first` leaves it is not written."""
    reads = tuple(dict.fromkeys((*last.reads, *first.reads)))

    def both(*values: Any) -> Any:
        operands = dict(zip(reads, values, strict=True))
        return last({**operands, **first.written(operands)})

    both.__module__ = last.function.__module__
    return Stage("update", both, reads, last.writes, chain=(first, last))


def matrix(writes: str) -> Callable[..., Stage]:
    """Decorator: a torch function of whole matrices; a letter that it returns as it got it stays as it was stored."""

    def decorate(function: Callable[..., Any]) -> Stage:
        return Stage("matrix", function, _reads(function), writes=tuple(writes.split()))

    return decorate


class Namespace(dict):
    """Scalars or constants by attribute: `s.norm`, `c.eps`."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no scalar or constant named {name!r}; there are: {', '.join(self)}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value


@dataclass(frozen=True, eq=False)
class Program:
    """The stages of one optimizer, in order, with the moments (by letter) and persistent scalars they use.

    `guarded`: non-finite values harm nothing (DESIGN §5). Released code that lets them through is reproduced with
    `guarded=False`. `vectors` tells what each letter of a vector, persistent or temporary, is over. `parts` are the
    segments and matrix stages of a program that has any, in order; such a program is stepped by `optim.matrices`.

    Raises `ValueError` for stages that do not fit together.
    """

    stages: tuple[Stage, ...]
    moments: Mapping[str, Moment]
    scalars: Mapping[str, float]
    guarded: bool = True
    temporaries: Mapping[str, float] = field(default_factory=dict)  # scalars that each step begins with anew
    vectors: Mapping[str, Vector] = field(init=False)
    parts: tuple[Program | Stage, ...] = field(init=False, default=())

    def __post_init__(self) -> None:
        if any(stage.kind == "matrix" for stage in self.stages):
            object.__setattr__(self, "parts", _cut(self))
            object.__setattr__(self, "vectors", {k: m.over for k, m in self.moments.items() if m.over != "value"})
        else:
            object.__setattr__(self, "vectors", _checked_vectors(self))

    @cached_property
    def values(self) -> Mapping[str, Moment]:
        """The moments that have one number per value."""
        return {letter: moment for letter, moment in self.moments.items() if moment.over == "value"}

    @property
    def measures(self) -> tuple[Stage, ...]:
        """The measurements, in order."""
        return tuple(stage for stage in self.stages if stage.kind == "measure")

    @property
    def sweeps(self) -> int:
        """How many times a step goes over the gradient; over matrices of any shape, where there are matrix stages."""
        return sum(part.sweeps for part in self.parts if isinstance(part, Program)) or 1 + len(self.measures)

    @cached_property
    def named(self) -> frozenset[str]:
        """Every letter that a stage reads or writes."""
        return frozenset(letter for stage in self.stages for letter in (*stage.reads, *stage.writes))


def _checked_vectors(program: Program) -> dict[str, Vector]:
    """What each vector is over; follows the stages as a backend runs them."""
    vectors: dict[str, Vector] = {k: m.over for k, m in program.moments.items() if m.over != "value"}
    values = {"p", "g", *program.values}
    over, repeated = "", set[str]()  # what was last measured; what updates, which later sweeps repeat, have read
    for stage in program.stages:
        name = f"{stage.kind} {stage.function.__name__!r}"
        if stage.kind == "fold" and not stage.writes:
            readable = {"x"} if over in ("tensor", "all") else set()
            taken = set[str]()
        elif stage.kind == "fold":
            if over not in VECTORS:
                needed = "a measure over rows, columns or groups before it"
                raise ValueError(f"{name} writes {stage.writes[0]!r} for each element, which takes {needed}")
            alike = {letter for letter, its in vectors.items() if its == over}
            readable = {"x", *alike}
            taken = {*values, *(vectors.keys() - alike), *repeated}
        else:
            readable = {*values, *vectors}
            taken = set(vectors)
        for letter in stage.reads:
            if letter not in {"s", "c", *readable}:
                known = ", ".join(sorted({"s", "c", *readable}))
                raise ValueError(f"{name} reads {letter!r}, which it cannot at this place; it can: {known}")
        for letter in stage.writes:
            if letter in {"s", "c", "x", *taken}:
                raise ValueError(f"{name} writes {letter!r}, which is something else or was read by an earlier update")
        if stage.kind == "measure":
            over = stage.over
        elif stage.kind == "update":
            values.update(stage.writes)
            repeated.update(stage.reads)
        elif over in VECTORS:
            vectors.update(dict.fromkeys(stage.writes, over))
    return vectors


CARRIED = "carried"  # the gradient as stabilizers left it, where later segments or matrix stages read g


def _cut(program: Program) -> tuple[Program | Stage, ...]:
    """The segments between matrix stages, each with the moments it names, and the matrix stages."""
    runs: list[list[Stage]] = []
    for is_matrix, run in groupby(program.stages, lambda stage: stage.kind == "matrix"):
        stages = list(run)
        runs += [[stage] for stage in stages] if is_matrix else [stages]
    parts: list[Program | Stage] = []
    whole, lost = set[str](), False  # letters that are whole matrices by now; whether g is no longer what was written
    for index, run in enumerate(runs):
        later = {letter for stages in runs[index + 1 :] for stage in stages for letter in stage.reads}
        written = {letter for stage in run for letter in stage.writes if stage.kind in ("update", "matrix")}
        read = {letter for stage in run for letter in stage.reads}
        name = f"{run[0].kind} {run[0].function.__name__!r}"
        if lost and "g" in read:
            raise ValueError(f"{name} reads 'g', which an update before a matrix stage wrote; give that a letter")
        if run[0].kind == "matrix":
            known = {"g", "c", "host", "key", "shape", *program.values, *whole}
            for letter in run[0].reads:
                if letter not in known:
                    known_here = ", ".join(sorted(known))
                    raise ValueError(f"{name} reads {letter!r}, which it cannot at this place; it can: {known_here}")
            vectors = program.moments.keys() - program.values.keys()
            if taken := written & ({"p", "g", "s", "c", "host", "key", "shape"} | vectors):
                raise ValueError(f"{name} writes {min(taken)!r}, which is no matrix of its own")
            parts.append(run[0])
        else:
            if index and any(stage.over == "all" for stage in run):
                raise ValueError(f"{name}: what is measured over all tensors comes before the first matrix stage")
            moments = {letter: m for letter, m in program.moments.items() if letter in read | written}
            passing = (read & whole) | (written & later) | (written & ({CARRIED} if "g" in later else set()))
            moments |= {k: Moment(k) for k in sorted(passing - moments.keys() - {"p", "g"})}
            parts.append(Program(tuple(run), moments, program.scalars, program.guarded, program.temporaries))
        lost |= "g" in written and CARRIED not in written
        whole |= written - program.moments.keys() - {"p", "g"}
    return tuple(parts)


@dataclass(eq=False)
class Turn:
    """What tensors that are stepped alike share in a step: constants, and seed and step of their random bits.

    `traced` are constants that only a device knows.
    """

    constants: dict[str, float] = field(default_factory=dict)
    seed: int = 0
    step: int = 0
    traced: dict[str, Traced] = field(default_factory=dict)

    def known(self) -> dict[str, float]:
        """All constants as numbers. Waits for a device that knows one, once."""
        for name in self.traced.keys() - self.constants.keys():
            self.constants[name] = self.traced[name].value(Tensor.item)
        return self.constants


@dataclass(eq=False)
class Job:
    """One tensor in a step; p and its states are written in place.

    `moments` are those that have one number per value, as parts of `rows`; `vectors` the others, contiguous 1-D fp32
    tensors by letter; scalars are 0-d fp32 tensors. Random bits are those of `rounding.key(*stream, operand)`: operand
    0 is p, and those in `moments` are 1, 2 … in order.

    A parameter that is `stored` is a format and parts as in `lowbit.stored`: these are what is read and written, and
    `param` says no more than its gradient, shape and device. It has no master.

    Of a tensor that is sharded (`shard`), all of these are what this rank has, but for vectors over columns or groups,
    which every rank has whole; `whole` is the DTensor, whose gradient is looked up.

    A job lasts: only the gradient and the turn's numbers are those of one step. Whoever replaces or moves a tensor
    makes a new job, so a backend may keep in `prepared` what it made of all else. Jobs of one `kind` are stepped alike.
    """

    param: Tensor
    moments: dict[str, dict[str, Tensor]]
    formats: dict[str, Format]
    scalars: dict[str, Tensor]
    skipped: Tensor
    rows: int
    cols: int
    program: Program
    turn: Turn = field(default_factory=Turn)
    tensor: int = 0  # its number in random bits
    master: str = "none"
    companion: Tensor | None = None
    noise: frozenset[str] = frozenset()  # the operands that round stochastically: p, and letters of moments
    vectors: dict[str, Tensor] = field(default_factory=dict)
    group_rows: int = 1
    gathered: Tensor | None = None  # the gradient, where it is not the parameter's own
    stored: tuple[Format, dict[str, Tensor]] | None = None
    shard: Shard | None = None
    whole: Tensor | None = None
    prepared: Any = None  # a backend's own
    kind: tuple[Program, torch.device] = field(init=False)

    def __post_init__(self) -> None:
        self.kind = self.program, self.param.device

    @property
    def constants(self) -> dict[str, float]:
        """What does not depend on the value, by name."""
        return self.turn.known() if self.turn.traced else self.turn.constants

    @property
    def stream(self) -> tuple[int, int, int]:
        """Of random bits: seed, step, tensor."""
        return self.turn.seed, self.turn.step, self.tensor

    @property
    def written(self) -> tuple[Tensor, ...]:
        """The parameter, and the parts of a stored one: what autograd must be told of."""
        return (self.param,) if self.stored is None else (self.param, *self.stored[1].values())

    @property
    def grad(self) -> Tensor:
        """The gradient: the parameter's, unless another is given."""
        if self.gathered is not None:
            return self.gathered
        grad = (self.param if self.whole is None else self.whole).grad
        assert grad is not None
        return grad if self.whole is None else local(grad)  # every step asks: no question that the job can answer

    @property
    def first(self) -> int:
        """The number of its first row in the whole tensor."""
        return 0 if self.shard is None else self.shard.first

    @property
    def first_value(self) -> int:
        """The number, for random bits, of its first value in the whole tensor."""
        return self.first * row_stride(self.cols)

    @property
    def all_rows(self) -> int:
        """How many rows the whole tensor has."""
        return self.rows if self.shard is None else self.shard.total


class Batch(list[Job]):
    """The jobs of a step for one backend, with their gradients.

    `kept` is the same object in every step that has the same jobs, which share turns as before and have gradients of
    the same dtypes and strides: a place for what a backend made.
    """

    def __init__(self, jobs: list[Job], grads: list[Tensor], kept: Kept):
        super().__init__(jobs)
        self.grads, self.kept = grads, kept


class Kept:
    """What a backend keeps for as long as steps are alike."""

    plan: Any = None
    plain: bool | None = None  # whether all gradients are contiguous, and none is a lazy negative
