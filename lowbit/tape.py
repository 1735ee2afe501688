"""What is computed with a number that only a device knows: noted in order, to be computed there.

A learning rate may be a tensor on a GPU, which schedulers and captured graphs write and no step waits to read. A rule's
constants are Python (`Part.constants`: float64, rounded once to fp32), and that text is the only one there is of them.
So it runs as ever, with a `Traced` number in the rate's place that notes what is done with it. A kernel does it again
on the device (cuda/constants.cu), with the same operations in the same order and precision, so with the same bits.

Noted are + - * / and `least`, one IEEE operation each. All else is refused, by the name of who does it: a power has no
one result, and what is compared or rounded must be known now.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any, NoReturn

import torch
from torch import Tensor

# As in cuda/job.h: a literal; a number in memory; operations on two earlier numbers; one of them becomes a constant.
LITERAL, FLOAT32, FLOAT64, ADD, SUBTRACT, MULTIPLY, DIVIDE, LEAST, STORE = range(9)
NODES = 64  # room for the constants of tensors that are stepped alike
SOURCES = {torch.float32: FLOAT32, torch.float64: FLOAT64}


def least(a: Any, b: Any) -> Any:
    """The smaller of two numbers, a when neither is: what `min` is for numbers that may be traced.

    >>> least(3, 2.5)
    2.5
    """
    for x in (a, b):
        if isinstance(x, Traced):
            return x._noted(LEAST, a, b)
    return torch.where(b < a, b, a) if isinstance(a, Tensor) or isinstance(b, Tensor) else min(a, b)


_APPLIED: dict[int, Callable[[Any, Any], Any]] = {
    ADD: operator.add,
    SUBTRACT: operator.sub,
    MULTIPLY: operator.mul,
    DIVIDE: operator.truediv,
    LEAST: least,
}


def _refused(what: str) -> Callable[..., NoReturn]:
    def refuse(self: Traced, *_: Any) -> NoReturn:
        raise TypeError(
            f"{self.owner} {what} a learning rate that is a tensor on {self.device}: only + - * / and "
            "lowbit.tape.least can be done there. Pass lr as a float, or as a tensor on the CPU"
        )

    return refuse


class Traced:
    """A number on a device, or what became of it; `owner` is whose constants are being computed."""

    __slots__ = ("device", "op", "operands", "owner")
    __array_ufunc__ = None  # a number of numpy's on the left leaves it to us
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, owner: str, device: torch.device, op: int, *operands: Any):
        self.owner, self.device, self.op, self.operands = owner, device, op, operands

    @classmethod
    def of(cls, number: Tensor, owner: str) -> Traced:
        """A tensor of one number, of a dtype in SOURCES."""
        return cls(owner, number.device, SOURCES[number.dtype], number)

    def value(self, read: Callable[[Tensor], Any]) -> Any:
        """The number, where the tensor that it is made of is what `read` says: a float, or a tensor in float64."""
        if self.op in (FLOAT32, FLOAT64):
            return read(self.operands[0])
        return _APPLIED[self.op](*(x.value(read) if isinstance(x, Traced) else x for x in self.operands))

    def _noted(self, op: int, a: Any, b: Any) -> Traced:
        """What an operation gives; NotImplemented for what is no number."""
        if not all(isinstance(x, (Traced, Real)) for x in (a, b)):
            return NotImplemented
        return Traced(self.owner, self.device, op, *(x if isinstance(x, Traced) else float(x) for x in (a, b)))

    def __add__(self, x: Any) -> Traced:
        return self._noted(ADD, self, x)

    def __radd__(self, x: Any) -> Traced:
        return self._noted(ADD, x, self)

    def __sub__(self, x: Any) -> Traced:
        return self._noted(SUBTRACT, self, x)

    def __rsub__(self, x: Any) -> Traced:
        return self._noted(SUBTRACT, x, self)

    def __mul__(self, x: Any) -> Traced:
        return self._noted(MULTIPLY, self, x)

    def __rmul__(self, x: Any) -> Traced:
        return self._noted(MULTIPLY, x, self)

    def __truediv__(self, x: Any) -> Traced:
        return self._noted(DIVIDE, self, x)

    def __rtruediv__(self, x: Any) -> Traced:
        return self._noted(DIVIDE, x, self)

    def __neg__(self) -> Traced:
        return self._noted(MULTIPLY, self, -1.0)

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _refused("compares")
    __bool__ = _refused("decides by")
    __float__ = __int__ = __index__ = __round__ = __floor__ = __ceil__ = __trunc__ = _refused("asks for the value of")
    __pow__ = __rpow__ = _refused("takes a power with")
    __abs__ = _refused("takes the magnitude of")
    __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = _refused("divides with a remainder")


def notes(values: Mapping[Any, Traced]) -> list[tuple[int, int, int, float, Tensor | None]]:
    """What is to be done to have these numbers: operation, its two operands, a literal, a tensor.

    Operands are numbers of earlier nodes; of a STORE, the first is one and the second is the key under which its value
    was asked for.
    """
    found: list[tuple[int, int, int, float, Tensor | None]] = []
    known: dict[int, int] = {}  # nodes by id

    def node(x: Any) -> int:
        if not isinstance(x, Traced):
            found.append((LITERAL, 0, 0, x, None))
        elif id(x) in known:
            return known[id(x)]
        elif x.op in (FLOAT32, FLOAT64):
            found.append((x.op, 0, 0, 0.0, x.operands[0]))
        else:
            a, b = map(node, x.operands)
            found.append((x.op, a, b, 0.0, None))
        known[id(x)] = len(found) - 1
        return len(found) - 1

    for key, x in values.items():
        found.append((STORE, node(x), key, 0.0, None))
    return found


def traced(constants: Mapping[str, Any], owner: str) -> dict[str, Traced]:
    """Those of the constants that only a device knows. Raises `ValueError` for more than there is room for."""
    found = {name: x for name, x in constants.items() if isinstance(x, Traced)}
    if (needed := len(notes(found))) > NODES:
        raise ValueError(
            f"{owner}'s constants do {needed} operations with a learning rate on a device, and there is room for "
            f"{NODES}: pass lr as a float"
        )
    return found
