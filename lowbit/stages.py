"""What an optimizer computes, as data: stages, moments, and the program and jobs a backend runs.

A rule is a short ordered list of stages, each a small pure function in the words of `lowbit.words`:

    measure   a value, reduced over the tensor (or over all tensors): reads g (and moments), returns one number
    fold      once per tensor: reads and writes the tensor's scalars `s`, reads constants `c` and what was measured, `x`
    update    per value: reads p, g, moments, `s`, `c`; returns what it writes

The arguments' names are the operands: `p` and `g`, a letter for each moment, `s`, `c` and `x`. A measurement costs one
sweep over the gradient, so a program costs `1 + len(measures)` sweeps. The functions are what a backend runs (or
prints); nothing else in the library states a formula.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, Literal

from torch import Tensor

from .formats import Format


@dataclass(frozen=True)
class Moment:
    """One per-value state of an optimizer: its torch name, its sign, and the scalar that debiases it, if any."""

    name: str
    signed: bool = True
    weight: str = ""


@dataclass(frozen=True)
class Stage:
    """One printed function of a rule."""

    kind: Literal["measure", "fold", "update"]
    function: Callable[..., Any]
    reads: tuple[str, ...]
    writes: tuple[str, ...] = ()
    reduce: Literal["max", "sum", ""] = ""
    over: Literal["tensor", "all"] = "tensor"

    def __call__(self, operands: Mapping[str, Any]) -> Any:
        return self.function(*(operands[name] for name in self.reads))

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        # The decorator took the function's name, so what pickle finds there is the stage.
        return _named, (self.function.__module__, self.function.__qualname__)

    def __deepcopy__(self, memo: Any) -> Stage:
        return self


def _named(module: str, name: str) -> Stage:
    return attrgetter(name)(importlib.import_module(module))


def _reads(function: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)


def measure(reduce: Literal["max", "sum"], over: Literal["tensor", "all"] = "tensor") -> Callable[..., Stage]:
    """Decorator: the function's value, reduced to one number per tensor, or to one over all tensors.

    What is maximised must not be negative: the end of a short row counts as 0.
    """

    def decorate(function: Callable[..., Any]) -> Stage:
        return Stage("measure", function, _reads(function), reduce=reduce, over=over)

    return decorate


def fold(function: Callable[..., None]) -> Stage:
    """Decorator: once per tensor, from the measured `x`, the scalars `s` and the constants `c`; assigns to `s`."""
    return Stage("fold", function, _reads(function))


def update(writes: str) -> Callable[..., Stage]:
    """Decorator: per value; `writes` names what the function returns, in order, such as "p m v"."""

    def decorate(function: Callable[..., Any]) -> Stage:
        return Stage("update", function, _reads(function), writes=tuple(writes.split()))

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


@dataclass(frozen=True)
class Program:
    """The stages of one optimizer, in order, with the moments (by letter) and persistent scalars they use.

    `guarded`: non-finite values harm nothing (DESIGN §5). Released code that lets them through is reproduced with
    `guarded=False`.
    """

    stages: tuple[Stage, ...]
    moments: Mapping[str, Moment]
    scalars: Mapping[str, float]
    guarded: bool = True
    temporaries: Mapping[str, float] = field(default_factory=dict)  # scalars that each step begins with anew

    @property
    def measures(self) -> tuple[Stage, ...]:
        """The measurements, in order."""
        return tuple(stage for stage in self.stages if stage.kind == "measure")

    @property
    def sweeps(self) -> int:
        """How many times a step reads the gradient."""
        return 1 + len(self.measures)


@dataclass(eq=False)
class Job:
    """One tensor in one step. Moments are the parts of `rows`; scalars are 0-d fp32 tensors, written in place.

    Random bits are those of `rounding.key(*stream, operand)`: operand 0 is p, and the moments are 1, 2 … in order.
    """

    param: Tensor
    grad: Tensor
    moments: dict[str, dict[str, Tensor]]
    formats: dict[str, Format]
    scalars: dict[str, Tensor]
    constants: dict[str, float]
    skipped: Tensor
    rows: int
    cols: int
    program: Program
    master: str = "none"
    companion: Tensor | None = None
    noise: frozenset[str] = frozenset()  # the operands that round stochastically: p, and letters of moments
    stream: tuple[int, int, int] = (0, 0, 0)  # of random bits: seed, step, tensor id
