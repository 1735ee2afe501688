"""Recipes in MXFP4: Amazon's backward pass, and Quartet."""

import numpy as np

from .common import E2M1, Draws, Matmuls, Matrix, absmax, away, nearest, per_block, rms, rotated, rotated_back


def three_quarters(x: Matrix, uniform: Matrix) -> Matrix:
    """2502.20586, algorithm 2 without its last factor: OCP's shared exponent, then 3/4 so that nothing clips."""
    largest = per_block(x, (1, 32), absmax)
    shared = 2.0 ** (np.floor(np.log2(np.where(largest > 0, largest, 1))) - 2)
    return away(3 / 4 * x / shared, E2M1, uniform) * shared


def backward(name: str, a: Matrix, b: Matrix, size: int, draws: Draws, second: str) -> Matrix:
    """16/9 of the product of both operands, rotated with the same signs."""
    signs = draws.signs(name, size, a.shape[1])
    a, b = rotated(a, size, signs), rotated(b, size, signs)
    aq = three_quarters(a, draws.uniform(f"{name} gradient", *a.shape))
    bq = three_quarters(b, draws.uniform(f"{name} {second}", *b.shape))
    return 16 / 9 * aq @ bq.T


def mxfp4(x: Matrix, w: Matrix, g: Matrix, draws: Draws) -> Matmuls:
    """2502.20586, algorithm 3: high precision forward."""
    gx = backward("dgrad", g, w.T, 64, draws, "weight")
    return x @ w.T, gx, backward("wgrad", g.T, x.T, 64, draws, "activation")


def quest(x: Matrix) -> tuple[Matrix, Matrix]:
    """(values, what was not clipped), with the Gaussian's best clip 2.92247856 rms rounded down to a power of two."""
    root = per_block(x, (1, 32), rms)
    scale = 2.0 ** np.floor(np.log2(2.92247856 / 6 * np.where(root > 0, root, 1)))
    return nearest(x / scale, E2M1) * scale, np.abs(x / scale) <= 6


def quartet(x: Matrix, w: Matrix, g: Matrix, draws: Draws) -> Matmuls:
    """2505.14669, algorithm 1."""
    (xq, x_mask), (wq, w_mask) = quest(rotated(x, 32)), quest(rotated(w, 32))
    gx = backward("dgrad", g, wq.T, 32, draws, "weight") * x_mask
    gw = backward("wgrad", g.T, xq.T, 32, draws, "activation") * w_mask
    return xq @ wq.T, rotated_back(gx, 32, x.shape[1]), rotated_back(gw, 32, x.shape[1])
