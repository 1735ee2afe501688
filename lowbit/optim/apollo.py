"""APOLLO and APOLLO-Mini.

Zhu et al. 2024, https://arxiv.org/abs/2412.05270, Algorithm 1.

Adam on a random projection of the gradient says how much each channel (or, in APOLLO-Mini, the tensor) should be
scaled; what moves the parameter is the gradient itself, so scaled, and held back as in Fira where its norm would grow
by more than 1 % from step to step.

The projector is drawn from a normal distribution with variance 1 / rank. Released: by torch's generator, from the
parameter's position; here: from the optimizer's seed, the parameter's name and the step, and the same on every device.
The released code keeps it between steps, as we do, though the paper's memory counts do not have it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from typing_extensions import Unpack

from ..formats import nearest
from ..stages import Stage, matrix, update
from .adamw import weigh
from .base import Options, Params
from .fira import channels, energy, limit
from .galore import GaLore, adam, project, refresh, stride

SCALE_TYPES = ("channel", "tensor")
PROJECTIONS = ("random", "svd")


@matrix("q")
def draw(q, c, host, key):
    """A random projector, when it is due."""
    if c.t < host.projector_due:
        return q
    host.projector_due = c.t + c.update_interval
    generator = torch.Generator("cpu").manual_seed(key)
    drawn = torch.randn(q.shape, generator=generator, dtype=torch.float32, device="cpu")
    return (drawn / math.sqrt(q.shape[0])).to(q.device)


@matrix("e")
def rescale(g, r, n, c, shape):
    """The gradient, scaled as Adam scales its projection."""
    if c.whole:
        share = torch.linalg.vector_norm(n) / (torch.linalg.vector_norm(r) + 1e-8)
    else:
        share = channels(n, shape) / (channels(r, shape) + 1e-8)
    return c.front * (g * share)


@update("p")
def descend(p, e, s, c):
    """Down, then decay."""
    p = p - s.step_size * (c.behind * (e / s.limiter))
    return p - c.decay * p


class APOLLO(GaLore):
    """The gradient, with a scale for each channel that Adam finds in a small random projection.

    Args:
        params: see `lowbit.optim.Rule`, as all keyword arguments not listed here.
        lr: learning rate.
        rank: of the projection; a matrix whose shorter side is no longer than this is stepped by Adam.
        update_interval: steps between two projectors.
        scale: the update is multiplied by its square root.
        scale_type: "channel" (of the longer side) or "tensor".
        proj: "random", or "svd" as GaLore's.
        scale_front: multiply by the scale before the growth of the norm is limited.
        limit_growth: limit it at all.
        betas, eps: Adam's.
        weight_decay: decoupled, after the update.
        beta1_annealing, eta_min: a cosine on betas[0], as in `AdamW`.
        **options: states, seed, master, rounding, state_rounding, stabilize, policy, roles.
    """

    scalars: ClassVar = {**GaLore.scalars, "limited_norm": 0.0}
    apart: ClassVar = True

    def __init__(
        self,
        params: Params,
        lr: float = 1e-2,
        rank: int = 256,
        update_interval: int = 200,
        scale: float = 1.0,
        scale_type: str = "channel",
        proj: str = "random",
        scale_front: bool = False,
        limit_growth: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        beta1_annealing: int | None = None,
        eta_min: float = 0.5,
        **options: Unpack[Options],
    ):
        hyper = {"lr": lr, "rank": rank, "update_interval": update_interval, "scale": scale, "scale_type": scale_type}
        hyper.update(proj=proj, scale_front=scale_front, limit_growth=limit_growth, betas=betas, eps=eps)
        hyper.update(weight_decay=weight_decay)
        hyper.update(beta1_annealing=beta1_annealing, eta_min=eta_min)
        super(GaLore, self).__init__(params, hyper, **options)

    def check_group(self, group: Mapping[str, Any]) -> None:
        """See `Rule.check_group`."""
        super().check_group(group)
        for name, known in (("scale_type", SCALE_TYPES), ("proj", PROJECTIONS)):
            if group[name] not in known:
                hint = nearest(str(group[name]), known)
                raise ValueError(f"unknown {name} {group[name]!r}{hint}; known: {', '.join(known)}")

    def plan(self, group: Mapping[str, Any], kind: str = "") -> tuple[Mapping[str, Any], tuple[Stage, ...]]:
        """See `Rule.plan`."""
        if kind != "projected":
            return super().plan(group, kind)
        projector = draw if group["proj"] == "random" else refresh
        return self.projected, (projector, project, weigh, adam, rescale, energy, limit, stride, descend)

    def constants(self, group: Mapping[str, Any], t: int) -> dict[str, float]:
        """See `Part.constants`."""
        root = math.sqrt(group["scale"])
        front, behind = (root, 1.0) if group["scale_front"] else (1.0, root)
        growth = 1.01 if group["limit_growth"] else torch.finfo(torch.float32).max
        own = {"whole": group["scale_type"] == "tensor", "front": front, "behind": behind, "growth": growth}
        return {**super().constants(group, t), **own, "norm_eps": 1e-8, "one": 1.0}


class APOLLOMini(APOLLO):
    """APOLLO-Mini: rank 1, one scale for the tensor, the update multiplied by the root of 128.

    The defaults are those of the authors' pretraining runs; at 130M parameters they take a scale of 192.

    Args:
        params: see `lowbit.optim.Rule`.
        lr: learning rate.
        rank, scale_type, scale: what makes it mini; see `APOLLO`.
        **options: those of `APOLLO`.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-2,
        rank: int = 1,
        scale_type: str = "tensor",
        scale: float = 128.0,
        **options: Any,
    ):
        super().__init__(params, lr, rank, scale_type=scale_type, scale=scale, **options)
