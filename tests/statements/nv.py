"""Recipes in NVFP4: NVIDIA's, Quartet II and TetraJet-v2, and what TetraJet-v2 does beside its layers."""

import numpy as np

from .common import E2M1, E4M3, Draws, Matmuls, Matrix, absmax, away, divided, nearest, per_block, rotated, stochastic

ROW, TILE = (1, 16), (16, 16)


def two_levels(x: Matrix, block: tuple[int, int], peak: float = 448, least: float = 2.0**-6) -> tuple[Matrix, float]:
    """(stored block scales, tensor scale): the largest block's scale is stored as `peak`."""
    tensor = absmax(x) / (6 * peak)
    return nearest(np.clip(per_block(x, block, absmax) / 6 / tensor, least, 448), E4M3), tensor


def nvfp4(x: Matrix, block: tuple[int, int], uniform: Matrix | None = None) -> Matrix:
    """2509.25149, appendix B, with torchao's least block scale."""
    stored, tensor = two_levels(x, block)
    u = divided(x, stored * tensor)
    return (nearest(u, E2M1) if uniform is None else away(u, E2M1, uniform)) * stored * tensor


def nvidia(x: Matrix, w: Matrix, g: Matrix, draws: Draws) -> Matmuls:
    """2509.25149, section 4: tiles of weights, stochastic gradients, rotations of 16 for the weight's gradient."""
    xq, wq = nvfp4(x, ROW), nvfp4(w, TILE)
    gq = nvfp4(g, ROW, draws.uniform("dgrad gradient", *g.shape))
    signs = draws.signs("wgrad", 16, len(g))
    gr, xr = rotated(g.T, 16, signs), rotated(x.T, 16, signs)
    return xq @ wq.T, gq @ wq, nvfp4(gr, ROW, draws.uniform("wgrad gradient", *gr.shape)) @ nvfp4(xr, ROW).T


def four_over_six(x: Matrix) -> Matrix:
    """Of the block scale absmax/6 and 1.5 times it, the one with the lower squared error (2512.02010)."""
    tensor = absmax(x) / (6 * 256)
    wanted = per_block(x, ROW, absmax) / 6 / tensor
    tried = []
    for factor in (1.0, 1.5):
        stored = nearest(wanted * factor, E4M3)
        tried.append(nearest(divided(x, stored * tensor), E2M1) * stored * tensor)
    errors = [per_block((q - x) ** 2, ROW, np.sum) for q in tried]
    return np.where(errors[1] < errors[0], tried[1], tried[0])


def ms_eden(x: Matrix, size: int, uniform: Matrix) -> Matrix:
    """2601.22813, section 4: nearest codes; the run's correction into the scales, which are rounded stochastically."""
    val_max = 6 / (17 / 16 * 0.93)
    tensor = absmax(x) / 255.99 / val_max
    stored = nearest(per_block(x, ROW, absmax) / val_max / tensor, E4M3)
    u = divided(x, stored * tensor)
    q = nearest(u, E2M1)
    squares, products = (per_block(v, (1, size), np.sum) for v in (x * x, x * q * stored * tensor))
    correction = np.where(products > 0, divided(squares, products), 1)
    return q * stochastic(stored * correction, E4M3, np.repeat(uniform, 16, axis=1)) * tensor


def quartet2(x: Matrix, w: Matrix, g: Matrix, draws: Draws) -> Matmuls:
    """2601.22813, section 5."""
    xq, wq = four_over_six(x), four_over_six(w)

    def product(name: str, a: Matrix, b: Matrix, second: str) -> Matrix:
        signs = draws.signs(name, 128, a.shape[1])
        a, b = rotated(a, 128, signs), rotated(b, 128, signs)
        aq = ms_eden(a, 128, draws.uniform(f"{name} gradient", len(a), a.shape[1] // 16))
        return aq @ ms_eden(b, 128, draws.uniform(f"{name} {second}", len(b), b.shape[1] // 16)).T

    return xq @ wq.T, product("dgrad", g, wq.T, "weight"), product("wgrad", g.T, xq.T, "activation")


def double_block(x: Matrix, uniform: Matrix | None = None) -> Matrix:
    """2510.27527, section 4: an fp32 scale for 128 values of a row, an E4M3 scale for 16."""
    outer = per_block(x, (1, 128), absmax) / (6 * 448)
    stored = nearest(np.maximum(divided(per_block(x, ROW, absmax) / 6, outer), 2.0**-9), E4M3)
    u = divided(x, stored * outer)
    return (nearest(u, E2M1) if uniform is None else away(u, E2M1, uniform)) * stored * outer


def tetrajet2(x: Matrix, w: Matrix, g: Matrix, draws: Draws) -> Matmuls:
    """2510.27527, TJv2-base: rotations of 16, all four backward operands stochastically, the forward's values again."""
    xq, wq = double_block(x), double_block(w)

    def product(name: str, a: Matrix, b: Matrix, second: str) -> Matrix:
        signs = draws.signs(name, 16, a.shape[1])
        a, b = rotated(a, 16, signs), rotated(b, 16, signs)
        aq = double_block(a, draws.uniform(f"{name} gradient", *a.shape))
        return aq @ double_block(b, draws.uniform(f"{name} {second}", *b.shape)).T

    return xq @ wq.T, product("dgrad", g, wq.T, "weight"), product("wgrad", g.T, xq.T, "activation")


def mxfp8(x: Matrix) -> Matrix:
    """E4M3 in blocks of 32, whose scale is absmax / 448 rounded up to a power of two."""
    largest = per_block(x, (1, 32), absmax)
    scale = 2.0 ** np.ceil(np.log2(np.where(largest > 0, largest, 448) / 448))
    return nearest(x / scale, E4M3) * scale


def out_control(x: Matrix, w: Matrix, g: Matrix, draws: Draws, inside: Matrix, outside: Matrix) -> Matmuls:
    """2510.27527, OutControl: `tetrajet2` of the channels inside, MXFP8 of those outside, but for dgrad."""
    gx, gw = np.empty_like(x), np.empty_like(w)
    y, gx[:, inside], gw[:, inside] = tetrajet2(x[:, inside], w[:, inside], g, draws)
    xq, wq = mxfp8(x[:, outside]), mxfp8(w[:, outside])
    signs = draws.signs("dgrad", 16, g.shape[1])
    gr, wr = rotated(g, 16, signs), rotated(wq.T, 16, signs)
    gq = double_block(gr, draws.uniform("dgrad gradient", *gr.shape))
    gx[:, outside] = gq @ double_block(wr, draws.uniform("dgrad weight", *wr.shape)).T
    gw[:, outside] = mxfp8(g.T) @ mxfp8(xq.T).T
    return y + xq @ wq.T, gx, gw


def osci_reset(ws: list[Matrix], threshold: float) -> Matrix:
    """2510.27527, OsciReset: the last of the masters of some steps, at its code where that swung more than the master.

    The last step is not measured: it is the one at which weights are reset.
    """
    qs = [double_block(w) for w in ws]
    w_way, q_way = (np.abs(np.diff(np.stack(values[:-1]), axis=0)).sum(0) for values in (ws, qs))
    return np.where(divided(q_way, w_way) >= threshold, qs[-1], ws[-1])
