"""The quantizers of the Stable-SPAM release (2502.17055): groups of 256 of the flat tensor, two outliers left exact."""

from collections.abc import Callable

import numpy as np

from .common import Draws, Matmuls, Matrix
from .plain import straight_through


def groups(x: Matrix, each: Callable[[Matrix], Matrix]) -> Matrix:
    flat = x.reshape(-1)
    return np.concatenate([each(flat[i : i + 256]) for i in range(0, len(flat), 256)]).reshape(x.shape)


def without_two_largest(group: Matrix, levels: int) -> Matrix:
    kept = np.argsort(-np.abs(group))[:2]
    rest = group.copy()
    rest[kept] = 0
    top = max(np.abs(rest).max(), 1e-6)
    out = np.round(rest / top * levels) * top / levels
    out[kept] = group[kept]
    return out


def asymmetric(group: Matrix) -> Matrix:
    scale = max(group.max() - group.min(), 1e-5) / 15
    zero = np.clip(-np.round(group.min() / scale), 0, 15)
    return (np.clip(np.round(group / scale) + zero, 0, 15) - zero) * scale


def fp4(x: Matrix, w: Matrix, g: Matrix, draws: Draws) -> Matmuls:
    return straight_through(*(groups(v, lambda v: without_two_largest(v, 4)) for v in (x, w)), g)


def int4(x: Matrix, w: Matrix, g: Matrix, draws: Draws) -> Matmuls:
    return straight_through(groups(x, lambda v: without_two_largest(v, 7)), groups(w, asymmetric), g)
