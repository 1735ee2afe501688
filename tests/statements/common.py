"""What the statements share: grids, blocks, scales and rotations in float64, by their definitions. No lowbit here.

A statement is a function `(x, w, g, draws) -> (y, gx, gw)` of float64 matrices x [tokens, features], w [outputs,
features] and g [tokens, outputs], written from the equations of a paper. What is random is given to it: `draws.uniform`
are numbers in (0, 1) of an operand's shape, `draws.signs` the signs ±1 of a rotation's columns.
"""

from collections.abc import Callable
from typing import Protocol

import numpy as np

Matrix = np.ndarray
Matmuls = tuple[Matrix, Matrix, Matrix]


class Draws(Protocol):
    def uniform(self, operand: str, rows: int, cols: int) -> Matrix: ...
    def signs(self, matmul: str, size: int, cols: int) -> Matrix: ...


class Nothing:
    """For statements in which nothing is random."""


def both_signs(magnitudes: list[float]) -> Matrix:
    return np.array(sorted({s * m for m in magnitudes for s in (1, -1)}))


def minifloat(exponent_bits: int, mantissa_bits: int, bias: int, top: float) -> Matrix:
    """All (-1)^s m 2^e of a small float with subnormals, up to `top`."""
    found = []
    for e in range(2**exponent_bits):
        for m in range(2**mantissa_bits):
            fraction = m / 2**mantissa_bits
            found.append((1 + fraction) * 2.0 ** (e - bias) if e else fraction * 2.0 ** (1 - bias))
    return both_signs([v for v in found if v <= top])


INT4, INT8 = np.arange(-7.0, 8), np.arange(-127.0, 128)
E2M1, E3M0 = minifloat(2, 1, 1, 6), both_signs([0, *(2.0**k for k in range(-2, 5))])
E4M3, E5M2 = minifloat(4, 3, 7, 448), minifloat(5, 2, 15, 57344)


def nearest(u: Matrix, grid: Matrix) -> Matrix:
    middle = (grid[1:] + grid[:-1]) / 2
    return grid[np.searchsorted(middle, u)]


def stochastic(u: Matrix, grid: Matrix, uniform: Matrix) -> Matrix:
    """Up with the probability of the distance from below; what is beyond the grid saturates."""
    u = np.clip(u, grid[0], grid[-1])
    low = np.clip(np.searchsorted(grid, u, side="right") - 1, 0, len(grid) - 2)
    part = (u - grid[low]) / (grid[low + 1] - grid[low])
    return grid[low + (part >= 1 - uniform)]


def away(u: Matrix, grid: Matrix, uniform: Matrix) -> Matrix:
    """The same for the magnitudes of a grid with a sign bit: a low number leaves the smaller magnitude."""
    return np.sign(u) * stochastic(np.abs(u), grid[grid >= 0], uniform)


def divided(a: Matrix, b: Matrix | float) -> Matrix:
    """a / b, and 0 where b is 0: a block of zeros has the scale 0."""
    return np.divide(a, b, out=np.zeros(np.broadcast(a, b).shape), where=np.asarray(b) != 0)


def per_block(x: Matrix, block: tuple[int, int], each: Callable[[Matrix], float]) -> Matrix:
    """A matrix like x with each block's number in its places; 0 in `block` stands for all."""
    rows, cols = block[0] or len(x), block[1] or x.shape[1]
    out = np.empty_like(x)
    for i in range(0, len(x), rows):
        for j in range(0, x.shape[1], cols):
            out[i : i + rows, j : j + cols] = each(x[i : i + rows, j : j + cols])
    return out


def absmax(x: Matrix) -> float:
    return float(np.abs(x).max())


def rms(x: Matrix) -> float:
    return float(np.sqrt(np.mean(x**2)))


def scaled(x: Matrix, block: tuple[int, int], grid: Matrix, uniform: Matrix | None = None) -> Matrix:
    """Rounded to a grid whose top is the largest magnitude of each block."""
    scale = per_block(x, block, absmax) / grid[-1]
    u = divided(x, scale)
    if uniform is None:
        return nearest(u, grid) * scale
    return (stochastic if grid is INT8 else away)(u, grid, uniform) * scale


def hadamard(size: int) -> Matrix:
    """Sylvester's construction, made orthogonal."""
    h = np.ones((1, 1))
    while len(h) < size:
        h = np.block([[h, h], [h, -h]])
    return h / np.sqrt(size)


def rotated(x: Matrix, size: int, signs: Matrix | float = 1.0) -> Matrix:
    """Runs of `size` values of a row, after zeros up to a multiple of it, times signs and the Hadamard matrix."""
    x = np.pad(x, ((0, 0), (0, -x.shape[1] % size))) * signs
    return (x.reshape(len(x), -1, size) @ hadamard(size)).reshape(x.shape)


def rotated_back(y: Matrix, size: int, cols: int) -> Matrix:
    """The inverse, where no sign was changed."""
    return (y.reshape(len(y), -1, size) @ hadamard(size)).reshape(y.shape)[:, :cols]
