"""SCALE.

Glentis et al. 2025, https://arxiv.org/abs/2506.16659, Algorithm 1: each output's gradient is divided by its norm, and
only the last layer has momentum. The paper's columns are PyTorch's rows.

The released code divides by the root mean square, the paper by the L2 norm, so the paper's learning rate is the code's
times the root of what a norm is taken over (`norm=`). The code adds to Algorithm 1: embeddings are divided by norms
over the vocabulary (one per column); vectors take Adam with a learning rate of their own, and with eps before
debiasing; norms are held above 1e-8. It leaves a convolution flattened, which fails; here its shape stays.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

from typing_extensions import Unpack

from ..formats import nearest
from ..stages import Moment, Stage, fold, measure, update
from ..words import lerp, maximum, sqrt
from .adamw import AdamW, average, debias, weigh
from .base import Options, Params, Rule

NORMS = ("rms", "l2")


@measure("mean", over="row")
def mean_of_rows(g):
    """Each row's mean square."""
    return g * g


@measure("sum", over="row")
def sum_of_rows(g):
    """Each row's squared L2 norm."""
    return g * g


@measure("mean", over="column")
def mean_of_columns(g):
    """Each column's mean square."""
    return g * g


@measure("sum", over="column")
def sum_of_columns(g):
    """Each column's squared L2 norm."""
    return g * g


MEASURES = {
    "rms": {"row": mean_of_rows, "column": mean_of_columns},
    "l2": {"row": sum_of_rows, "column": sum_of_columns},
}


@fold("n")
def norm(x, c):
    """Not too small to divide by."""
    return maximum(sqrt(x), c.floor)


@update("m g")
def follow(m, g, c):
    """The last layer's average gradient, in place of the gradient; a norm needs no debiasing."""
    m = lerp(m, g, c.rate)
    return m, m


@update("p")
def descend(p, g, n, c):
    """Decay, then down the normalized gradient."""
    return c.keep * p - c.lr * (g / n)


@fold
def scalar_size(s, c):
    """Adam's step size for vectors."""
    s.scalar_size = c.scalar_lr / s.exp_avg_weight


@update("p m v")
def scalar_adam(p, g, m, v, c, s):
    """Adam for vectors, with eps before debiasing."""
    m, v = average(m, v, g, c)
    return c.scalar_keep * p - s.scalar_size * (m / ((sqrt(v) + c.eps) * s.root)), m, v


class SCALE(Rule):
    """Normalized gradients: no state but a momentum of the last layer, and Adam's for vectors.

    Which norm a tensor's gradient is divided by is decided by its role and shape, and shown by `explain()`: embeddings
    (also one tied to the head) by one per column, the head by one per row of its momentum, vectors by Adam's
    denominator, every other tensor by one per row; a convolution's row is all that makes one output channel.

    Args:
        params: see `lowbit.optim.Rule`, as all keyword arguments not listed here. With names, as roles need them.
        lr: learning rate of matrices.
        momentum: of the head's gradient.
        scalar_lr: learning rate of vectors that goes with the `lr` a group begins with: it is scaled like `lr` by
            whatever schedule. None: the same as `lr`. The authors' scripts use 20 times `lr` up to 350M parameters.
        betas: of Adam for vectors.
        eps: of Adam for vectors, added before debiasing.
        weight_decay: decoupled; of vectors too, as released.
        norm: "rms" as in the released code, or "l2" as in the paper, one for the whole optimizer.
        **options: states, seed, master, rounding, state_rounding, stabilize, policy, roles.

    >>> import torch
    >>> w, head = torch.nn.Parameter(torch.zeros(64, 96)), torch.nn.Parameter(torch.zeros(64, 96))
    >>> opt = SCALE([("w", w), ("out", head)], lr=0.1, roles={"out": "head"})
    >>> "exp_avg" in opt.state[w], "exp_avg" in opt.state[head]
    (False, True)
    """

    moments: ClassVar = AdamW.moments
    scalars: ClassVar = AdamW.scalars
    by_role: ClassVar = True
    kinds: ClassVar = ("row", "column", "row with momentum", "Adam")

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        momentum: float = 0.9,
        scalar_lr: float | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        norm: str = "rms",
        **options: Unpack[Options],
    ):
        if norm not in NORMS:
            raise ValueError(f"unknown norm {norm!r}{nearest(norm, NORMS)}; known: {', '.join(NORMS)}")
        self.norm = norm
        hyper = {"lr": lr, "momentum": momentum, "scalar_lr": scalar_lr, "betas": betas, "eps": eps}
        super().__init__(params, {**hyper, "weight_decay": weight_decay, "norm": norm}, **options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """See `Rule.add_param_group`; remembers the learning rate that `scalar_lr` goes with."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group.setdefault("scalar_lr_at", float(group.get("base_lr", group["lr"])))

    def check_group(self, group: Mapping[str, Any]) -> None:
        """See `Rule.check_group`."""
        if len(group["betas"]) != 2:
            raise ValueError(f"betas must be two numbers, not {group['betas']!r}")
        if not 0 <= group["momentum"] < 1:
            raise ValueError(f"momentum must be in [0, 1), not {group['momentum']}")
        scalar_lr = group["scalar_lr"]
        if scalar_lr is not None and not (math.isfinite(scalar_lr) and scalar_lr >= 0):
            raise ValueError(f"scalar_lr must be a finite number >= 0, or None, not {scalar_lr}")
        if scalar_lr and not float(group.get("scalar_lr_at", group["lr"])) > 0:
            raise ValueError("scalar_lr is scaled like lr, so lr must begin above 0")
        if group["norm"] != self.norm:
            raise ValueError(f"norm is one for the whole optimizer; a group (or checkpoint) asks {group['norm']!r}")

    def fixed(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """See `Rule.fixed`."""
        return {**super().fixed(group), "norm": group["norm"]}

    def kind(self, group: Mapping[str, Any], name: str, shape: tuple[int, ...], role: str) -> str:
        """See `Rule.kind`."""
        if len(shape) < 2 or role in ("norm", "bias"):
            return "Adam"
        return {"embedding": "column", "head": "row with momentum"}.get(
            role, "column" if name in self.transposed else "row"
        )

    def plan(self, group: Mapping[str, Any], kind: str = "") -> tuple[Mapping[str, Moment], tuple[Stage, ...]]:
        """See `Rule.plan`."""
        if kind == "Adam":
            return self.moments, (weigh, debias, scalar_size, scalar_adam)
        descent = (MEASURES[self.norm]["column" if kind == "column" else "row"], norm, descend)
        if kind == "row with momentum":
            return {"m": Moment("exp_avg")}, (follow, *descent)
        return {}, descent

    def constants(self, group: Mapping[str, Any], t: int) -> dict[str, float]:
        """See `Part.constants`."""
        lr, (beta1, beta2) = group["lr"], group["betas"]
        scalar_lr = lr * group["scalar_lr"] / group["scalar_lr_at"] if group["scalar_lr"] is not None else lr
        return {
            "lr": lr,
            "keep": 1 - lr * group["weight_decay"],
            "scalar_lr": scalar_lr,
            "scalar_keep": 1 - scalar_lr * group["weight_decay"],
            "rate": 1 - group["momentum"],
            "rate1": 1 - beta1,
            "rate2": 1 - beta2,
            "eps": group["eps"],
            "floor": 1e-8,
        }
