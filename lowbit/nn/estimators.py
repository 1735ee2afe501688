"""What multiplies a gradient on its way through the rounding of an operand."""

from __future__ import annotations

from torch import Tensor

from ..rotation import Rotation
from .operand import Operand


def kept(x: Tensor, operand: Operand) -> dict[str, Tensor]:
    raise ValueError


def factor(kept: dict[str, Tensor], name: str, operand: Operand, rotation: Rotation | None, shape) -> Tensor:
    raise ValueError
