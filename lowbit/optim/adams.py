"""AdamS: momentum itself can be the normalizer.

Zhang et al. 2025, https://arxiv.org/abs/2505.16363: Adam whose second moment is made, in each step, of the momentum
before the step and of the gradient, so there is one state.

Paper and released code (github.com/pku-huzhang/AdamS) differ:

    bias_correction=True    as released: the momentum is debiased, before and after the step alike by the weight it has
                            after the step
    bias_correction=False   as printed in the paper: not at all

Not to be confused with `pytorch_optimizer.AdamS`, which is Adam with stable weight decay, another method.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from typing_extensions import Unpack

from ..stages import Moment, Stage, fold, update
from ..words import lerp, sqrt
from .annealing import AnnealedBetas
from .base import Options, Params


@fold
def weigh(s, c):
    """The momentum's accumulated weight, this step's gradient included: 1 - beta1**t while beta1 is constant."""
    s.exp_avg_weight = lerp(s.exp_avg_weight, 1.0, c.rate1)


@fold
def unweighted(s, c):
    """No debiasing."""
    s.exp_avg_weight = c.one


@update("p m")
def adams(p, g, m, c, s):
    """Numerator and denominator have the same momentum: the one that was stored."""
    before = m / s.exp_avg_weight
    nu = c.beta2 * (before * before) + c.rate2 * (g * g)
    m = lerp(m, g, c.rate1)
    p = c.keep * p - c.lr * (m / s.exp_avg_weight / (sqrt(nu) + c.eps))
    return p, m


class AdamS(AnnealedBetas):
    """Adam without a second moment: the momentum normalizes itself. One state.

    A step is bounded whatever the stored momentum is, so also when it is stored coarsely: with the default betas no
    weight moves by more than 1.03 lr once the average has filled up. The first steps are larger: the first moves every
    weight by lr / sqrt(1 - beta2), which is 4.5 lr here and would be 32 lr with beta2 = 0.999, so warm up. A momentum
    reset makes such a first step again.

    Args:
        params: see `lowbit.optim.Rule`, as all keyword arguments not listed here.
        lr: learning rate.
        betas: decay of the momentum, and share of its square in the denominator.
        eps: added to the denominator; 1e-6 as in the released code's latest version, before that 1e-8.
        weight_decay: decoupled. The released constructor takes it and ignores it (0.1 by default); here it acts.
        bias_correction: debias the momentum, as released; False is the form printed in the paper.
        beta1_annealing: length in steps of a cosine on beta1, as in `AdamW`.
        eta_min: where that cosine ends, as a share.
        **options: states, seed, master, rounding, state_rounding, stabilize, policy, roles.

    >>> import torch
    >>> w = torch.nn.Parameter(torch.ones(64, 64))
    >>> opt = AdamS([("w", w)], lr=0.1, states="4bit", weight_decay=0.0)
    >>> w.sum().backward()
    >>> opt.step()
    >>> round(w[0, 0].item(), 4), [name for name in opt.state[w] if "avg" in name and "_scale" not in name]
    (0.5528, ['exp_avg', 'exp_avg_weight', 'exp_avg_format'])
    """

    moments: ClassVar = {"m": Moment("exp_avg", weight="exp_avg_weight")}
    scalars: ClassVar = {"exp_avg_weight": 0.0}

    def __init__(
        self,
        params: Params,
        lr: float = 3e-4,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-6,
        weight_decay: float = 0.1,
        bias_correction: bool = True,
        beta1_annealing: int | None = None,
        eta_min: float = 0.5,
        **options: Unpack[Options],
    ):
        hyper = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        hyper.update(bias_correction=bias_correction, beta1_annealing=beta1_annealing, eta_min=eta_min)
        super().__init__(params, hyper, **options)

    def plan(self, group: Mapping[str, Any], kind: str = "") -> tuple[Mapping[str, Moment], tuple[Stage, ...]]:
        """See `Rule.plan`."""
        return self.moments, (weigh if group["bias_correction"] else unweighted, adams)

    def fixed(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """See `Rule.fixed`."""
        return {**super().fixed(group), "bias_correction": group["bias_correction"]}

    def constants(self, group: Mapping[str, Any], t: int) -> dict[str, float]:
        """See `Part.constants`."""
        lr, (beta1, beta2) = group["lr"], self.betas(group)
        return {
            "one": 1.0,
            "lr": lr,
            "keep": 1 - lr * group["weight_decay"],
            "rate1": 1 - beta1,
            "beta2": beta2,
            "rate2": 1 - beta2,
            "eps": group["eps"],
        }
