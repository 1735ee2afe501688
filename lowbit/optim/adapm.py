"""AdaPM: a reconstruction.

Zhang, Liu, Fang 2025, https://arxiv.org/abs/2510.09103, Algorithm 1. No code was released and the paper leaves open
how the factors are fitted, what its update interval T means and what it clips. This file is a reconstruction with
these properties, which tests assert: a rank of no less than the shorter side is AdamW, a gradient that never changes
is followed exactly, rank 0 is AdamW without momentum.

What is certain: embeddings and the attention's output projection have no momentum, values have a full one, queries,
keys and the MLP have a product of two factors, L R, and a correction by what it misses. Reconstructed: with
M = beta1 L R + (1 - beta1) g, the factors are fitted to M by one alternating least-squares step from the last ones
every `update_interval` steps, R alone in between, and

    m = L R / weight + residual_scale * (M - L R)

where the residual is not accumulated, so that 1 / (1 - beta1) (`residual_scale=None`) debiases it; 1 is plain error
feedback. The first fit, and that after a momentum reset, is by SVD. The head has a full momentum unless `lm_head` says
otherwise (SCALE finds that momentum matters most there). The paper clips something, somehow; `update_clip` bounds the
low-rank tensors' steps, value by value, and is off by default. Where no gradient ever was, nothing moves.

`second_moment="mini"` is Adam-mini's (https://arxiv.org/abs/2406.16793) for the sake of memory: one number per row, or
per head of queries and keys, kept fp32; with it nearly all of the state is gone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from ..formats import nearest
from ..layout import rows_of
from ..stages import Moment, Stage, fold, matrix, update
from ..words import clip, lerp, reciprocal, sqrt, where
from . import adamw
from .adam_mini import average_square, mean_square
from .adamw import AdamW, debias, descend, weigh
from .annealing import AnnealedBetas
from .base import Options, Params
from .galore import check_whole, is_tall, leading
from .matrices import is_matrix, is_stack

HEADS = ("full", "lowrank", "none")
SECONDS = ("full", "mini")
BARE, FULL = ("embedding", "o"), ("v", "router", "conv")  # roles without momentum, and with a full one


@update("v")
def second(v, g, c):
    """Adam's second moment."""
    return lerp(v, g * g, c.rate2)


@fold
def weigh_second(s, c):
    """The second moment's accumulated weight, where there is no other."""
    s.exp_avg_sq_weight = lerp(s.exp_avg_sq_weight, 1.0, c.rate2)


@fold
def debias_second(s):
    """What the step needs of it."""
    s.root = reciprocal(sqrt(s.exp_avg_sq_weight))


def basis_of(m: Tensor, r: Tensor) -> Tensor:
    """Orthonormal rows that span what m makes of r's, whatever their magnitudes."""
    tiny = torch.finfo(torch.float32).tiny
    m, r = (x / x.abs().amax().clamp(min=tiny) for x in (m, r))
    return torch.linalg.qr(m @ r.mT).Q.mT


def fitted(m: Tensor, old_l: Tensor, old_r: Tensor, c: Any, host: Any) -> tuple[Tensor, Tensor]:
    """Factors of a matrix: L's columns (here rows) orthonormal, so that R = L' M is the best R."""
    if c.cold or not host.fitted:
        host.fitted = float(bool(m.any()))
        q = leading(m, old_l.shape[0])
        basis = basis_of(m, q) if is_tall(m.shape) else q
    elif (c.t - 1) % c.update_interval == 0:
        basis = basis_of(m, old_r)
    else:
        basis = old_l
    return basis, basis @ m


@matrix("l r a w")
def refit(g, l, r, c, host):
    """The factors one gradient on; their product, and what it was fitted to."""
    w = c.beta1 * (l.mT @ r) + c.rate1 * g
    l, r = fitted(w, l, r, c, host)
    # A gradient whose square overflows is as bad for the second moment as one that is not finite: then all is NaN, and
    # the tensor stays as it was.
    bad = 0.0 * g.abs().amax().square() if g.numel() else 0.0
    return l + bad, r + bad, l.mT @ r + bad, w + bad


@matrix("l r m a w")
def refit_qkv(g, l, r, m, c, host):
    """The same for queries and keys of a fused projection, whose values have a full momentum."""
    dim = 0 if is_tall(g.shape) else 1
    g, value = g.tensor_split((2 * g.shape[dim] // 3,), dim)
    m = c.beta1 * m + c.rate1 * value
    l, r, a, w = refit.function(g, l, r, c, host)
    return l, r, m, torch.cat([a, m], dim), torch.cat([w, m], dim)


@fold
def share(s, c):
    """What the debiased product has besides its residual_scale; nothing in the first step, unless that is given."""
    s.accumulated = reciprocal(s.exp_avg_weight) - c.residual_scale


@update("p")
def descend_low(p, v, a, w, c, s):
    """AdamW's step by the product and its residual: a / weight + residual_scale * (w - a)."""
    m = c.residual_scale * w + s.accumulated * a
    u = clip(m / (sqrt(v) * s.root + c.eps), -c.update_clip, c.update_clip)
    return c.keep * p - c.lr * where(v > 0, u, c.zero)  # a product of factors is not 0 where no gradient ever was


@update("p m")
def descend_full(p, g, m, v, c, s):
    """AdamW's step."""
    m = lerp(m, g, c.rate1)
    return descend(c.keep * p, m, v, c, s), m


@update("p")
def descend_bare(p, g, v, c, s):
    """AdamW's step with beta1 = 0."""
    return c.keep * p - c.lr * (g / (sqrt(v) * s.root + c.eps))


class AdaPM(AnnealedBetas):
    """AdamW whose momentum is left out, low-rank or full, by the role of the tensor (see the module).

    Roles decide (`roles=` overrides them, `explain()` shows them): embeddings and attention outputs "no momentum";
    values, vectors, routers, convolutions, experts in one tensor and the head "full momentum"; all other matrices
    "low rank", of a fused qkv projection only queries and keys. A matrix whose shorter side is no longer than `rank` is
    "full rank".

    Args:
        params: see `lowbit.optim.Rule`, as all keyword arguments not listed here.
        lr: learning rate.
        betas, eps: Adam's.
        weight_decay: decoupled.
        rank: of the momentum; 0 leaves it out.
        update_interval: steps between two fits of both factors; in the others L stays.
        residual_scale: of what the factors miss; None: 1 / (1 - betas[0]).
        update_clip: the most that a value of a low-rank tensor moves in a step, in units of lr; None: any.
        lm_head: momentum of the head: "full", "lowrank" or "none".
        second_moment: "full", or "mini": one number per row, as Adam-mini.
        head_dim: rows of a head; with "mini", those of queries and keys share a number. None: each has its own.
        beta1_annealing, eta_min: a cosine on betas[0], as in `AdamW`.
        **options: states, seed, master, rounding, state_rounding, stabilize, policy, roles.
    """

    by_role: ClassVar = True
    kinds: ClassVar = ("low rank", "low rank qkv", "full rank", "full momentum", "no momentum")
    factors: ClassVar = {
        "l": Moment("exp_avg_left"),
        "r": Moment("exp_avg_right", weight="exp_avg_weight"),
    }
    full: ClassVar = {"m": AdamW.moments["m"]}
    scalars: ClassVar = AdamW.scalars
    host: ClassVar = {"fitted": 0.0}

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        rank: int = 32,
        update_interval: int = 1,
        residual_scale: float | None = None,
        update_clip: float | None = None,
        lm_head: str = "full",
        second_moment: str = "full",
        head_dim: int | None = None,
        beta1_annealing: int | None = None,
        eta_min: float = 0.5,
        **options: Unpack[Options],
    ):
        hyper = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "rank": rank}
        hyper.update(update_interval=update_interval, residual_scale=residual_scale, update_clip=update_clip)
        hyper.update(lm_head=lm_head, second_moment=second_moment, head_dim=head_dim)
        hyper.update(beta1_annealing=beta1_annealing, eta_min=eta_min)
        super().__init__(params, hyper, **options)

    def check_group(self, group: Mapping[str, Any]) -> None:
        """See `Rule.check_group`."""
        super().check_group(group)
        check_whole(group, "rank", 0)
        check_whole(group, "update_interval", 1)
        if group["head_dim"] is not None:
            check_whole(group, "head_dim", 1)
        scale = group["residual_scale"]
        if scale is not None and not (math.isfinite(scale) and scale >= 0):
            raise ValueError(f"residual_scale must be a finite number >= 0, or None, not {scale}")
        if group["update_clip"] is not None and not group["update_clip"] > 0:
            raise ValueError(f"update_clip must be above 0, or None, not {group['update_clip']}")
        for name, known in (("lm_head", HEADS), ("second_moment", SECONDS)):
            if group[name] not in known:
                hint = nearest(str(group[name]), known)
                raise ValueError(f"unknown {name} {group[name]!r}{hint}; known: {', '.join(known)}")

    def kind(self, group: Mapping[str, Any], name: str, shape: tuple[int, ...], role: str) -> str:
        """See `Rule.kind`."""
        if role == "head":
            wanted = group["lm_head"]
        elif role in BARE:
            wanted = "none"
        else:
            wanted = "full" if role in FULL or not is_matrix(shape, role) else "lowrank"
        if wanted == "none" or (wanted == "lowrank" and group["rank"] == 0):
            return "no momentum"
        if wanted == "full" or is_stack(shape, role):
            return "full momentum"
        rows, cols = rows_of(shape)
        if group["rank"] >= min(rows, cols):
            return "full rank"
        thirds = role == "qkv" and max(rows, cols) == 3 * min(rows, cols)
        return "low rank qkv" if thirds else "full momentum" if role == "qkv" else "low rank"

    def plan(self, group: Mapping[str, Any], kind: str = "") -> tuple[Mapping[str, Moment], tuple[Stage, ...]]:
        """See `Rule.plan`."""
        mini = group["second_moment"] == "mini"
        v = AdamW.moments["v"]
        seconds = {"v": Moment(v.name, v.signed, v.weight, "group") if mini else v}
        before = (mean_square, average_square) if mini else (second,)
        if kind.startswith("low rank"):
            fused = kind == "low rank qkv"
            front, own = refit_qkv if fused else refit, {**self.factors, **(self.full if fused else {})}
            return {**own, **seconds}, (front, *before, weigh, debias, share, descend_low)
        if kind == "no momentum":
            return seconds, (*before, weigh_second, debias_second, descend_bare)
        return {**self.full, **seconds}, (*before, weigh, debias, descend_full)

    def shapes(self, group: Mapping[str, Any], kind: str, shape: tuple[int, ...]) -> Mapping[str, tuple[int, int]]:
        """See `Rule.shapes`: the factors, as `rank` rows each, and a fused projection's values."""
        (rows, cols), rank = rows_of(shape), group["rank"]
        if kind != "low rank qkv":
            return {"l": (rank, rows), "r": (rank, cols)}
        side = min(rows, cols)
        low = (2 * side, side) if is_tall(shape) else (side, 2 * side)
        return {"l": (rank, low[0]), "r": (rank, low[1]), "m": (side, side)}

    def group_rows(self, group: Mapping[str, Any], name: str, shape: tuple[int, ...], role: str) -> int:
        """See `Rule.group_rows`: rows that share a second moment."""
        if len(shape) < 2:
            return max(1, rows_of(shape)[0])
        head_dim = group["head_dim"] or 1 if role in ("q", "k") else 1
        if shape[0] % head_dim:
            raise ValueError(f"{name}: its {shape[0]} rows are not heads of head_dim={head_dim} rows")
        return head_dim

    def fixed(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """See `Rule.fixed`."""
        own = ("rank", "lm_head", "second_moment", "head_dim")
        return {**super().fixed(group), **{name: group[name] for name in own}}

    def constants(self, group: Mapping[str, Any], t: int) -> dict[str, float]:
        """See `Part.constants`."""
        beta1, beta2 = self.betas(group)
        scale, last = group["residual_scale"], {**group, "steps": group["steps"] - 1}
        cold = [part.resets(group) == "before" or part.resets(last) == "after" for part in self.stabilize]
        return {
            **adamw.constants(group["lr"], (beta1, beta2), group["eps"], group["weight_decay"]),
            "beta1": beta1,
            "residual_scale": 1 / (1 - beta1) if scale is None else scale,
            "update_clip": group["update_clip"] or torch.finfo(torch.float32).max,
            "zero": 0.0,
            "t": t,
            "update_interval": group["update_interval"],
            "cold": any(cold),
        }
