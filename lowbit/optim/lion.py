"""Lion.

Chen et al. 2023, https://arxiv.org/abs/2302.06675, Algorithm 2 (the sign of an interpolation; one moment, tracked with
a second, slower beta), as the authors' code has it: weight decay comes first, and nothing is debiased.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from typing_extensions import Unpack

from ..stages import Moment, Stage, update
from ..words import lerp, sign
from .annealing import AnnealedBetas
from .base import Options, Params


@update("p m")
def lion(p, g, m, c):
    """Algorithm 2."""
    u = sign(lerp(m, g, c.rate1))
    p = c.keep * p - c.lr * u
    m = lerp(m, g, c.rate2)
    return p, m


class Lion(AnnealedBetas):
    """Every weight moves by lr, in the direction that momentum and gradient vote for. One state.

    Its authors take a learning rate 3 to 10 times smaller than AdamW's and as much larger a weight decay.

    Args:
        params: see `lowbit.optim.Rule`, as all keyword arguments not listed here.
        lr: learning rate.
        betas: share of the momentum in the update's vote, and decay of the momentum.
        weight_decay: decoupled: p shrinks by lr * weight_decay each step, before the update.
        beta1_annealing: length in steps of a cosine on beta1, as in `AdamW`.
        eta_min: where that cosine ends, as a share.
        **options: states, seed, master, rounding, state_rounding, stabilize, policy, roles.

    >>> import torch
    >>> from lowbit.optim import AdaClip, AdaGN
    >>> w = torch.nn.Parameter(torch.ones(64, 64))
    >>> opt = Lion([("w", w)], lr=0.1, stabilize=(AdaClip(), AdaGN()))
    >>> w.sum().backward()
    >>> opt.step()
    >>> round(w[0, 0].item(), 4), opt.state[w]["exp_avg"].dtype
    (0.9, torch.uint8)
    """

    moments: ClassVar = {"m": Moment("exp_avg")}
    stages: tuple[Stage, ...] = (lion,)

    def __init__(
        self,
        params: Params,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        beta1_annealing: int | None = None,
        eta_min: float = 0.5,
        **options: Unpack[Options],
    ):
        hyper = {"lr": lr, "betas": betas, "weight_decay": weight_decay}
        super().__init__(params, {**hyper, "beta1_annealing": beta1_annealing, "eta_min": eta_min}, **options)

    def constants(self, group: Mapping[str, Any], t: int) -> dict[str, float]:
        """See `Part.constants`."""
        lr, (beta1, beta2) = group["lr"], self.betas(group)
        return {"lr": lr, "keep": 1 - lr * group["weight_decay"], "rate1": 1 - beta1, "rate2": 1 - beta2}
