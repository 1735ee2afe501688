"""Recipes of absmax scales: the house's int4 and fp4, int8, SwitchBack, Jetfire, FP8, BitNet b1.58."""

import numpy as np

from .common import E2M1, E4M3, E5M2, INT4, INT8, Draws, Matmuls, Matrix, scaled


def straight_through(xq: Matrix, wq: Matrix, g: Matrix) -> Matmuls:
    """The forward's values in the backward matmuls, the gradient in high precision."""
    return xq @ wq.T, g @ wq, g.T @ xq


def int4(x: Matrix, w: Matrix, g: Matrix, draws: Draws) -> Matmuls:
    return straight_through(scaled(x, (1, 16), INT4), scaled(w, (1, 16), INT4), g)


def fp4(x: Matrix, w: Matrix, g: Matrix, draws: Draws) -> Matmuls:
    return straight_through(scaled(x, (1, 16), E2M1), scaled(w, (1, 16), E2M1), g)


def int8(x: Matrix, w: Matrix, g: Matrix, draws: Draws) -> Matmuls:
    """torchao's README: rows of both operands of every matmul, along what is summed over."""

    def times(a: Matrix, b: Matrix) -> Matrix:
        return scaled(a, (1, 0), INT8) @ scaled(b, (1, 0), INT8).T

    return times(x, w), times(g, w.T), times(g.T, x.T)


def switchback(x: Matrix, w: Matrix, g: Matrix, draws: Draws) -> Matmuls:
    """2304.13013, algorithm 1."""
    wq = scaled(w, (0, 0), INT8)
    return scaled(x, (1, 0), INT8) @ wq.T, scaled(g, (1, 0), INT8) @ wq, g.T @ x


def jetfire(x: Matrix, w: Matrix, g: Matrix, draws: Draws) -> Matmuls:
    """2403.12422, section 4: tiles of 32 x 32; gradients stochastically."""
    xq, wq = scaled(x, (32, 32), INT8), scaled(w, (32, 32), INT8)
    forward = scaled(g, (32, 32), INT8, draws.uniform("dgrad gradient", *g.shape))
    across = scaled(g.T, (32, 32), INT8, draws.uniform("wgrad gradient", *g.T.shape))
    return xq @ wq.T, forward @ wq, across @ xq


def fp8(x: Matrix, w: Matrix, g: Matrix, draws: Draws) -> Matmuls:
    """2209.05433, section 4: E4M3 forward, E5M2 for the gradient, a scale a tensor."""
    return straight_through(scaled(x, (0, 0), E4M3), scaled(w, (0, 0), E4M3), scaled(g, (0, 0), E5M2))


def bitnet(x: Matrix, w: Matrix, g: Matrix, draws: Draws) -> Matmuls:
    """2402.17764, equations 1 to 3."""
    gamma = np.abs(w).mean()
    return straight_through(scaled(x, (1, 0), INT8), np.clip(np.round(w / gamma), -1, 1) * gamma, g)
