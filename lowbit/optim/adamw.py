"""AdamW.

Kingma & Ba 2015, https://arxiv.org/abs/1412.6980, Algorithm 1, with the decoupled decay of
Loshchilov & Hutter 2019, https://arxiv.org/abs/1711.05101, Algorithm 2; AMSGrad is
Reddi et al. 2018, https://openreview.net/forum?id=ryQu7f-RZ, Algorithm 2, as torch has it (the maximum
before debiasing).

The averages are debiased by their accumulated weight rather than by 1 - beta**t: the same number while beta is
constant, and the right one when it is not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from typing_extensions import Unpack

from ..stages import Moment, Stage, fold, update
from ..words import lerp, maximum, reciprocal, sqrt
from .annealing import AnnealedBetas
from .base import Options, Params


def average(m, v, g, c):
    """The moments, one gradient on."""
    return lerp(m, g, c.rate1), lerp(v, g * g, c.rate2)


def descend(p, m, v, c, s):
    """Down the debiased average over its root mean square."""
    return p - s.step_size * (m / (sqrt(v) * s.root + c.eps))


@fold
def weigh(s, c):
    """Each average's accumulated weight."""
    s.exp_avg_weight = lerp(s.exp_avg_weight, 1.0, c.rate1)
    s.exp_avg_sq_weight = lerp(s.exp_avg_sq_weight, 1.0, c.rate2)


@fold
def debias(s, c):
    """What the update needs of the averages' weights."""
    s.step_size = c.lr / s.exp_avg_weight
    s.root = reciprocal(sqrt(s.exp_avg_sq_weight))


@update("p m v")
def adamw(p, g, m, v, c, s):
    """Algorithm 2 of the AdamW paper."""
    m, v = average(m, v, g, c)
    p = descend(c.keep * p, m, v, c, s)
    return p, m, v


@update("p m v h")
def amsgrad(p, g, m, v, h, c, s):
    """The same with the largest second moment so far."""
    m, v = average(m, v, g, c)
    h = maximum(h, v)
    p = descend(c.keep * p, m, h, c, s)
    return p, m, v, h


def constants(lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> dict[str, float]:
    """What the stages above call `c`."""
    beta1, beta2 = betas
    return {"lr": lr, "keep": 1 - lr * weight_decay, "rate1": 1 - beta1, "rate2": 1 - beta2, "eps": eps}


class AdamW(AnnealedBetas):
    """Adam with decoupled weight decay and states in any format.

    Args:
        params: see `lowbit.optim.Rule`, as all keyword arguments not listed here.
        lr: learning rate, a float or a 0-d tensor; one on the parameters' device is read there, by no step on the host.
        betas: decay of the first and of the second moment.
        eps: added to the denominator.
        weight_decay: decoupled: p shrinks by lr * weight_decay each step, before the update.
        amsgrad: use the largest second moment so far.
        beta1_annealing: length in steps of a cosine on beta1, from betas[0] down to eta_min * betas[0], where it stays;
            None leaves beta1 constant.
        eta_min: where that cosine ends, as a share.
        **options: states, seed, master, rounding, state_rounding, stabilize, policy, roles.

    >>> import torch
    >>> w = torch.nn.Parameter(torch.ones(64, 64))
    >>> opt = AdamW([("w", w)], lr=0.1, states="4bit")
    >>> w.sum().backward()
    >>> opt.step()
    >>> round(w[0, 0].item(), 4), opt.state[w]["exp_avg"].dtype
    (0.899, torch.uint8)
    """

    moments: ClassVar = {
        "m": Moment("exp_avg", weight="exp_avg_weight"),
        "v": Moment("exp_avg_sq", signed=False, weight="exp_avg_sq_weight"),
    }
    scalars: ClassVar = {"exp_avg_weight": 0.0, "exp_avg_sq_weight": 0.0}
    folds: tuple[Stage, ...] = (weigh, debias)

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        beta1_annealing: int | None = None,
        eta_min: float = 0.5,
        **options: Unpack[Options],
    ):
        hyper = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad}
        hyper.update(beta1_annealing=beta1_annealing, eta_min=eta_min)
        super().__init__(params, hyper, **options)

    def plan(self, group: Mapping[str, Any], kind: str = "") -> tuple[Mapping[str, Moment], tuple[Stage, ...]]:
        """See `Rule.plan`."""
        if not group["amsgrad"]:
            return self.moments, (*self.folds, adamw)
        largest = {"h": Moment("max_exp_avg_sq", signed=False)}
        return {**self.moments, **largest}, (*self.folds, amsgrad)

    def constants(self, group: Mapping[str, Any], t: int) -> dict[str, float]:
        """See `Part.constants`."""
        return constants(group["lr"], self.betas(group), group["eps"], group["weight_decay"])
