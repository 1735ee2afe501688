"""Recipes whose scales are the best for a Gaussian: QuEST and LUQ; and QLoRA's base."""

import numpy as np

from .common import E3M0, INT4, Draws, Matmuls, Matrix, nearest, per_block, rms, rotated, rotated_back, scaled
from .plain import straight_through


def quest(x: Matrix, w: Matrix, g: Matrix, draws: Draws) -> Matmuls:
    """2502.05003, algorithm 1, 4 bits: alpha* rms at the top of 16 even levels; trust |q - x| <= half a step."""

    def values(v: Matrix) -> tuple[Matrix, Matrix]:
        v = rotated(v, 128)
        root = per_block(v, (1, 0), rms)
        top = 2.513930578568423 * root
        step = 2 * top / 15
        q = (np.floor(np.clip(v, -top * (1 - 1e-12), top * (1 - 1e-12)) / step) + 0.5) * step
        return q, np.abs(q - v) <= root * 2.513930578568423 / 15 + 1e-12

    (xq, x_mask), (wq, w_mask) = values(x), values(w)
    back = lambda m: rotated_back(m, 128, x.shape[1])  # noqa: E731
    return xq @ wq.T, back(g @ wq * x_mask), back(g.T @ xq * w_mask)


def luq(x: Matrix, w: Matrix, g: Matrix, draws: Draws) -> Matmuls:
    """2112.10769, section 4. SAWB's clip c1 rms - c2 mean|v| for 15 levels, in IBM's coefficients."""

    def sawb(v: Matrix) -> Matrix:
        clip = 12.035 * rms(v) - 12.03 * np.abs(v).mean()
        return nearest(v / (clip / 7), INT4) * clip / 7

    xq, wq = sawb(x), sawb(w)
    down = scaled(g, (0, 0), E3M0, draws.uniform("dgrad gradient", *g.shape))
    across = scaled(g.T, (0, 0), E3M0, draws.uniform("wgrad gradient", *g.T.shape))
    return xq @ wq.T, down @ wq, across @ xq
