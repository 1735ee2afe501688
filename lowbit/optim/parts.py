"""What a program is put together from: rules, and stabilizers in front of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal

from ..stages import Stage


class Part:
    """What contributes stages to a program: a rule itself, or a stabilizer put in front of one."""

    scalars: ClassVar[dict[str, float]] = {}
    temporaries: ClassVar[dict[str, float]] = {}  # scalars that each step begins with anew, and their values
    stages: tuple[Stage, ...] = ()

    def constants(self, group: Mapping[str, Any], t: int) -> dict[str, float]:
        """What does not depend on the value: float64, rounded once to fp32. `t` counts this tensor's steps from 1.

        `group["lr"]` is a number, but not always one that is known by now: add, subtract, multiply and divide with it,
        and take `lowbit.tape.least` (see there).
        """
        return {}

    def resets(self, group: Mapping[str, Any]) -> Literal["", "before", "after"]:
        """Whether the moments are set to zero in the step that `group["steps"]` has just counted."""
        return ""


class Stabilizer(Part):
    """A part that any optimizer can put in front of its update: `stabilize=(AdaClip(), …)`.

    `hyper` become keys of the parameter groups, so they can differ per group and are part of the state dict.
    """

    def __init__(self, **hyper: Any):
        self.hyper = hyper

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v}' for k, v in self.hyper.items())})"

    def check(self, group: Mapping[str, Any]) -> None:
        """Raise `ValueError` for a hyper-parameter out of range."""


def stabilizers(given: Any) -> tuple[Stabilizer, ...]:
    """What `stabilize=` asks for, one or several; raises `TypeError` for anything that is none."""
    several = isinstance(given, Iterable) and not isinstance(given, str)
    parts: tuple[Any, ...] = tuple(given) if several else (given,)
    for part in parts:
        if not isinstance(part, Stabilizer):
            raise TypeError(f"stabilize: {part!r} is not a stabilizer, such as lowbit.optim.AdaClip()")
    return parts
