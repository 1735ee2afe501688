"""Random Hadamard rotations: outliers spread over their neighbours before a block is quantized.

Runs of `size` neighbouring values of a row are multiplied by H·D / sqrt(size): D holds signs, one for each column, and
H is Hadamard's matrix in Sylvester's order. The rotation is orthogonal, so that of both operands of a contraction
cancels: (x R^T)(w R^T)^T = x w^T. What is computed is fixed to the bit: signs are flipped; then, for a distance of 1,
2, 4 … up to size / 2, each pair (a, b) at that distance becomes (a + b, a - b); then all is multiplied by
1 / sqrt(size), in fp32.

The sign of a column is a bit of the hash that stochastic rounding uses (rounding.py), so it depends on nothing but seed
and column. A seed of None changes no sign: the plain Hadamard rotation of QuEST. See QuaRot
(https://arxiv.org/abs/2404.00456) for what rotations are good for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .rounding import bits16, key

SIZES = (16, 32, 64, 128)
_OPERAND = 0x48614461  # a number that no operand of a step has


@dataclass(frozen=True)
class Rotation:
    """Runs of `size` values are rotated, with the signs of a seed, or with none changed.

    Raises `ValueError` for a size that is none of 16, 32, 64 and 128.
    """

    size: int
    seed: int | None = 0

    def __post_init__(self) -> None:
        if self.size not in SIZES:
            raise ValueError(f"a rotation mixes {', '.join(map(str, SIZES))} values, not {self.size}")

    @property
    def keys(self) -> tuple[int, int]:
        """Of the hash that signs come from. Raises `ValueError` where no sign changes."""
        if self.seed is None:
            raise ValueError("a rotation whose seed is None changes no sign, so it has no keys")
        return key(self.seed, 0, 0, _OPERAND)

    def padded(self, cols: int) -> int:
        """`cols`, or the next number of columns that can be rotated: zeros are appended to shorter rows."""
        return -(-cols // self.size) * self.size

    def check(self, cols: int) -> None:
        """Raises `ValueError` if rows of `cols` values cannot be rotated."""
        if cols % self.size:
            raise ValueError(
                f"rows of {cols} values cannot be cut into runs of {self.size} to rotate; choose a divisor"
            )

    def signs(self, cols: int, device: torch.device | str = "cpu") -> Tensor:
        """Whether each column changes its sign: bit c % 32 of hash c // 32."""
        if self.seed is None:
            return torch.zeros(cols, dtype=torch.bool, device=device)
        halves = bits16(self.keys, 0, -(-cols // 16), device)
        places = torch.arange(16, dtype=torch.int32, device=device)
        return ((halves.unsqueeze(-1) >> places) & 1).flatten()[:cols] == 1


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """A float matrix [rows, cols], rotated, in fp32: what the kernels compute, bit for bit."""
    rotation.check(x.shape[1])
    return _mixed(_flipped(x.float(), rotation), rotation.size)


def rotate_back(y: Tensor, rotation: Rotation) -> Tensor:
    """The inverse of `rotate`, up to rounding: H is symmetric, so the same sums come first and the signs after them."""
    rotation.check(y.shape[1])
    return _flipped(_mixed(y.float(), rotation.size), rotation)


def _flipped(x: Tensor, rotation: Rotation) -> Tensor:
    return x if rotation.seed is None else torch.where(rotation.signs(x.shape[1], x.device), -x, x)


def _mixed(x: Tensor, size: int) -> Tensor:
    """x H / sqrt(size), run by run."""
    runs = x.unflatten(1, (-1, size))
    apart = 1
    while apart < size:
        pairs = runs.unflatten(2, (-1, 2, apart))
        a, b = pairs.unbind(3)
        runs = torch.stack((a + b, a - b), 3).flatten(2)
        apart *= 2
    return (runs * torch.tensor(1 / math.sqrt(size), dtype=torch.float32, device=x.device)).flatten(1)
