"""What multiplies a gradient on its way through the rounding of a forward operand, value by value.

Rounding is flat almost everywhere, so its true slope is 0 and useless. The straight-through estimator ("ste") takes 1.
The others depend on u, a value in units of its block's scale, of which g is the nearest grid point and `top` the last:

    clip    1 where |u| <= top, else 0: what was clipped learns nothing. The mask M of Quartet's algorithm 1
            (https://arxiv.org/abs/2505.14669).
    trust   1 where |u| <= top + half the last step, else 0: QuEST's trust mask |Q(x) - x| <= T (equation 3 and section
            3.2 of https://arxiv.org/abs/2502.05003); T is the release's, half a step, which only clipping exceeds.
    dge     min(3, |2t - 1|^(1/k - 1) / k) with k = 5, where t is how far u has come from one grid point to the next:
            equations 7 and 8 of https://arxiv.org/abs/2501.17116, in each interval of the grid. It is steep half way,
            where a small change of the value changes its code. Beyond the top t is 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends, scales
from ..formats import Format
from .operand import Operand

STEEPNESS, STEEPEST = 5, 3.0
ROUNDED = 2.0**-20  # a block's largest value over its own scale may come out a few ulps above the top: not clipped


def edge(operand: Operand | None) -> float | None:
    """How far from 0 a value in units of its scale may be for its gradient to pass; None where that is no question."""
    if operand is None or operand.estimator not in ("clip", "trust"):
        return None
    assert operand.codes is not None
    (before, _), (last, _) = operand.codes.ladder[-2:]
    return (last if operand.estimator == "clip" else last + (last - before) / 2) * (1 + ROUNDED)


def factor(x: Tensor, operand: Operand) -> Tensor:
    """fp32, like the matrix x, which is what is rounded (turned already): what multiplies each value's gradient."""
    fmt, last = operand.codes, edge(operand)
    assert fmt is not None
    u = in_units(fmt, x.float())
    return _slope(fmt, u) if last is None else (u.abs() <= last).float()


def in_units(fmt: Format, x: Tensor) -> Tensor:
    """A matrix in units of each block's scale, as it is before rounding; 0 where the scale is 0."""
    if not x.numel():
        return x
    blocks = backends.measured(fmt, x)
    return blocks.units(scales.best(fmt, blocks).inverse)


def _slope(fmt: Format, u: Tensor) -> Tensor:
    grid = torch.tensor([value for value, _ in fmt.ladder], dtype=torch.float32, device=u.device)
    u = (u.abs() if fmt.sign_magnitude else u).clamp(float(grid[0]), float(grid[-1])).contiguous()
    low = (torch.bucketize(u, grid, right=True) - 1).clamp(0, len(grid) - 2)
    t = (u - grid[low]) / (grid[low + 1] - grid[low])
    return ((2 * t - 1).abs() ** (1 / STEEPNESS - 1) / STEEPNESS).clamp(max=STEEPEST)
