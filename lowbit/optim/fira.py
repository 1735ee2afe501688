"""Fira.

Chen et al. 2024, https://arxiv.org/abs/2410.01623, Algorithm 1.

GaLore, plus what the projector leaves out of the gradient, scaled channel by channel as Adam scales what it keeps, and
held back where its norm would grow by more than 1 % from step to step.

Paper and released code differ: the paper adds g - P P'g; the code multiplies the second term by `scale` first, and so
were the published results made. `variant="official"` (the default) and `variant="paper"` are these. The released
limiter takes a norm of 0 as the last one for ever after; here the next gradient begins anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from ..formats import nearest
from ..stages import Stage, fold, matrix, measure, update
from ..words import maximum, sqrt, where
from .adamw import weigh
from .base import Options, Params
from .galore import GaLore, adam, back, is_tall, project, refresh, stride

VARIANTS = ("official", "paper")


def channels(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The norm of each channel, along the rank."""
    return torch.linalg.vector_norm(x, dim=1 if is_tall(shape) else 0, keepdim=True)


@matrix("u e")
def restore(g, r, n, q, c, shape):
    """Adam's direction, and what is left of the gradient, scaled like it."""
    left = g - c.taken * back(r, q, shape)
    return c.scale * back(n, q, shape), left * (channels(n, shape) / (channels(r, shape) + 1e-8))


@measure("sum")
def energy(e):
    """The squared norm of what has to grow slowly."""
    return e * e


@fold
def limit(x, s, c):
    """What to divide by, so that the norm grows by 1 % at most."""
    norm = sqrt(x)
    growth = maximum(norm / (s.limited_norm + c.norm_eps), c.growth) / c.growth
    s.limiter = where(s.limited_norm > 0, growth, c.one)
    s.limited_norm = norm / s.limiter


@update("p")
def descend(p, u, e, s, c):
    """Down by both, then decay."""
    p = p - s.step_size * (u + e / s.limiter)
    return p - c.decay * p


class Fira(GaLore):
    """GaLore, and the rest of the gradient with Adam's scale.

    Args:
        params: see `lowbit.optim.Rule`, as all keyword arguments not listed here.
        lr: learning rate.
        rank, update_interval, scale, cos_threshold, gamma_proj: see `GaLore`.
        betas, eps: Adam's.
        weight_decay: decoupled, after the update.
        variant: "official" or "paper" (see the module).
        beta1_annealing, eta_min: a cosine on betas[0], as in `AdamW`.
        **options: states, seed, master, rounding, state_rounding, stabilize, policy, roles.
    """

    scalars: ClassVar = {**GaLore.scalars, "limited_norm": 0.0}
    apart: ClassVar = True
    stages: tuple[Stage, ...] = (refresh, project, weigh, adam, restore, energy, limit, stride, descend)

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        rank: int = 128,
        update_interval: int = 200,
        scale: float = 0.25,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        cos_threshold: float | None = None,
        gamma_proj: float = 2.0,
        variant: str = "official",
        beta1_annealing: int | None = None,
        eta_min: float = 0.5,
        **options: Unpack[Options],
    ):
        hyper = {"lr": lr, "rank": rank, "update_interval": update_interval, "scale": scale, "betas": betas, "eps": eps}
        hyper.update(weight_decay=weight_decay, cos_threshold=cos_threshold, gamma_proj=gamma_proj, variant=variant)
        hyper.update(beta1_annealing=beta1_annealing, eta_min=eta_min)
        super(GaLore, self).__init__(params, hyper, **options)

    def check_group(self, group: Mapping[str, Any]) -> None:
        """See `Rule.check_group`."""
        super().check_group(group)
        if group["variant"] not in VARIANTS:
            hint = nearest(str(group["variant"]), VARIANTS)
            raise ValueError(f"unknown variant {group['variant']!r}{hint}; known: {', '.join(VARIANTS)}")

    def constants(self, group: Mapping[str, Any], t: int) -> dict[str, float]:
        """See `Part.constants`."""
        taken = group["scale"] if group["variant"] == "official" else 1.0
        return {**super().constants(group, t), "taken": taken, "growth": 1.01, "norm_eps": 1e-8, "one": 1.0}
