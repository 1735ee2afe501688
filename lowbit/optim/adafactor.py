"""Adafactor.

Shazeer & Stern 2018, https://arxiv.org/abs/1804.04235, Algorithms 4 (matrices) and 5 (vectors), with the learning rate
from outside by default (transformers' `scale_parameter=False, relative_step=False`). Second moments are the product of
a row's and a column's, so a matrix of m x n values keeps m + n of them, in fp32.

transformers' differs from torch.optim.Adafactor in where eps goes (into the squares; torch holds the product above it)
and in the learning rate of the decay (scaled like the update's; torch's is not); here both are as in transformers. Its
averages are not debiased; the first step has weight 1, so this is the same unless momentum resets restart them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

from typing_extensions import Unpack

from ..stages import Moment, Stage, fold, measure, update
from ..tape import least
from ..words import lerp, maximum, reciprocal, sqrt
from .base import Options, Params, Rule


@fold
def weigh(s, c):
    """The averages' accumulated weight: 1, until a reset."""
    s.exp_avg_sq_weight = lerp(s.exp_avg_sq_weight, 1.0, c.rate2)


@measure("mean", over="row")
def rows_square(g, c):
    """Of each row."""
    return g * g + c.eps


@fold("r a")
def average_rows(x, r, s, c):
    """R, and what a row's values are multiplied by."""
    r = lerp(r, x, c.rate2)
    return r, reciprocal(sqrt(r / s.exp_avg_sq_weight))


@measure("mean")
def centre(r):
    """R's mean."""
    return r


@fold
def keep_centre(x, s):
    """For the columns."""
    s.centre = x


@measure("mean", over="column")
def columns_square(g, c):
    """Of each column."""
    return g * g + c.eps


@fold("k b")
def average_columns(x, k, s, c):
    """The paper's C, and what a column's values are multiplied by."""
    k = lerp(k, x, c.rate2)
    return k, sqrt(s.centre / k)


@update("g")
def factored(g, a, b):
    """Over the root of R C / mean(R)."""
    return g * a * b


@update("g v")
def full(g, v, c, s):
    """Over the root of the second moment."""
    v = lerp(v, g * g + c.eps, c.rate2)
    return g / sqrt(v / s.exp_avg_sq_weight), v


@measure("mean")
def size(p):
    """The parameter's mean square."""
    return p * p


@fold
def scale(x, s, c):
    """The rate is relative to this."""
    s.scale = maximum(sqrt(x), c.min_scale)


@measure("mean")
def energy(g):
    """The update's mean square."""
    return g * g


@fold
def clip(x, s, c):
    """The rate for an update whose root mean square is held at d."""
    s.shrink = c.decay * s.scale
    s.rate = c.lr * s.scale / maximum(c.one, sqrt(x) / c.d)


@update("p")
def descend(p, g, s):
    """Decay, then down."""
    return p - s.shrink * p - s.rate * g


@update("p m")
def descend_average(p, g, m, c, s):
    """The same along an average of the updates."""
    m = lerp(m, s.rate * g, c.rate1)
    return p - s.shrink * p - m, m


class Adafactor(Rule):
    """Adam's second moment from one number per row and one per column; no first moment unless asked for.

    Tensors of more than two dimensions are matrices as everywhere in this library: their first dimension, and the rest.
    Vectors keep a second moment for each value.

    Args:
        params: see `lowbit.optim.Rule`, as all keyword arguments not listed here.
        lr: learning rate; the largest one with `relative_step`.
        beta1: decay of an average of updates (a moment, stored in `states`); None: no average.
        beta2_decay: the second moments' rate in step t is t ** beta2_decay.
        eps: added to squares.
        d: the largest root mean square of an update, before the learning rate.
        weight_decay: decoupled.
        min_scale: the least size of a parameter for `scale_parameter`.
        scale_parameter: multiply the learning rate by the parameter's root mean square.
        relative_step: the learning rate of step t is at most 1 / sqrt(t). With both: the paper's relative step.
        **options: states, seed, master, rounding, state_rounding, stabilize, policy, roles.

    >>> import torch
    >>> w = torch.nn.Parameter(torch.ones(64, 96))
    >>> opt = Adafactor([("w", w)], lr=0.1)
    >>> w.sum().backward()
    >>> opt.step()
    >>> round(w[0, 0].item(), 4), opt.state[w]["exp_avg_sq_row"].shape, opt.state[w]["exp_avg_sq_col"].shape
    (0.9, torch.Size([64]), torch.Size([96]))
    """

    moments: ClassVar = {"m": Moment("exp_avg")}
    kinds: ClassVar = ("factored", "full")
    scalars: ClassVar = {"exp_avg_sq_weight": 0.0}
    temporaries: ClassVar = {"scale": 1.0}

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        beta1: float | None = None,
        beta2_decay: float = -0.8,
        eps: float = 1e-30,
        d: float = 1.0,
        weight_decay: float = 0.0,
        min_scale: float = 1e-3,
        scale_parameter: bool = False,
        relative_step: bool = False,
        **options: Unpack[Options],
    ):
        hyper = {"lr": lr, "beta1": beta1, "beta2_decay": beta2_decay, "eps": eps, "d": d, "weight_decay": weight_decay}
        hyper.update(min_scale=min_scale, scale_parameter=scale_parameter, relative_step=relative_step)
        super().__init__(params, hyper, **options)

    def check_group(self, group: Mapping[str, Any]) -> None:
        """See `Rule.check_group`."""
        if group["beta1"] is not None and not 0 <= group["beta1"] < 1:
            raise ValueError(f"beta1 must be in [0, 1), or None, not {group['beta1']}")
        if not (math.isfinite(group["beta2_decay"]) and group["beta2_decay"] <= 0):
            raise ValueError(f"beta2_decay must be a finite number <= 0, not {group['beta2_decay']}")
        if group["eps"] < 1e-37:
            raise ValueError(f"eps must be at least 1e-37, so that no second moment is 0, not {group['eps']}")
        for name in ("d", "min_scale"):
            if not (math.isfinite(group[name]) and group[name] > 0):
                raise ValueError(f"{name} must be a finite number above 0, not {group[name]}")

    def fixed(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """See `Rule.fixed`."""
        own = {"scale_parameter": group["scale_parameter"], "beta1 is None": group["beta1"] is None}
        return {**super().fixed(group), **own}

    def kind(self, group: Mapping[str, Any], name: str, shape: tuple[int, ...], role: str) -> str:
        """See `Rule.kind`."""
        return "factored" if len(shape) > 1 else "full"

    def plan(self, group: Mapping[str, Any], kind: str = "") -> tuple[Mapping[str, Moment], tuple[Stage, ...]]:
        """See `Rule.plan`."""

        def second(name: str, **over: Any) -> Moment:
            return Moment(name, signed=False, weight="exp_avg_sq_weight", **over)

        if kind == "full":
            moments = {"v": second("exp_avg_sq")}
            stages: tuple[Stage, ...] = (weigh, full)
        else:
            moments = {"r": second("exp_avg_sq_row", over="row"), "k": second("exp_avg_sq_col", over="column")}
            stages = (weigh, rows_square, average_rows, centre, keep_centre, columns_square, average_columns, factored)
        relative = (size, scale) if group["scale_parameter"] else ()
        averaged = group["beta1"] is not None
        if averaged:
            moments = {**self.moments, **moments}
        return moments, (*stages, *relative, energy, clip, descend_average if averaged else descend)

    def constants(self, group: Mapping[str, Any], t: int) -> dict[str, float]:
        """See `Part.constants`."""
        lr = group["lr"]
        lr = least(lr, t**-0.5) if group["relative_step"] else lr
        return {
            "lr": lr,
            "decay": lr * group["weight_decay"],
            "rate1": 1 - (group["beta1"] or 0.0),
            "rate2": t ** group["beta2_decay"],
            "eps": group["eps"],
            "min_scale": group["min_scale"],
            "d": group["d"],
            "one": 1.0,
        }
