"""Recipes whose scales are the best for a Gaussian: QuEST and LUQ; and QLoRA's grid, which is."""

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


NF4 = np.array([
    -1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0,
])  # fmt: skip


def dynamic_map() -> Matrix:
    """Dettmers 2015, as bitsandbytes builds it for 8 bits with a sign: 7 decades, each with twice the values."""
    values = [0.0, 1.0]
    for i in range(7):
        edges = np.linspace(0.1, 1, 2**i + 1)
        decade = 10.0 ** (i - 6) * (edges[:-1] + edges[1:]) / 2
        values += [*decade, *-decade]
    return np.sort(values)


def qlora(x: Matrix, w: Matrix, g: Matrix, draws: Draws) -> Matmuls:
    """2305.14314, section 3: NF4 per 64; scales less their mean in 8 bits, with one scale per 256 of them."""
    blocks = [row[j : j + 64] for row in w for j in range(0, len(row), 64)]
    scales = np.array([np.abs(block).max() for block in blocks])
    apart, doubled = scales - scales.mean(), []
    for i in range(0, len(apart), 256):
        inner = np.abs(apart[i : i + 256]).max()
        doubled.append(nearest(apart[i : i + 256] / inner, dynamic_map()) * inner + scales.mean())
    # The codes are those of the scales before they were quantized, as in bitsandbytes.
    values = [nearest(b / s, NF4) * d for b, s, d in zip(blocks, scales, np.concatenate(doubled), strict=True)]
    return straight_through(x, np.concatenate(values).reshape(w.shape), g)
