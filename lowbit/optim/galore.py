"""GaLore, and Q-GaLore's compressed projector and lazy refresh.

Zhao et al. 2024, https://arxiv.org/abs/2403.03507, Algorithm 2; Zhang et al. 2024 (Q-GaLore),
https://arxiv.org/abs/2407.08296, section 3.

Adam runs on r = P g or g P, the gradient in the span of its own leading singular vectors. P is computed anew every
`update_interval` steps; as released, the moments stay as they are when it changes. What is no matrix, embeddings and
the head are stepped by the same Adam without a projector, and so is a matrix of which `rank` is no smaller side
("full rank" in `explain()`). As released and in Hugging Face's AdamW of the time, eps is added before the debiasing
and weight decay comes after the update.

Where this differs from the released code: a gradient of zeros is no reason to compute P (SVD fails there, or gives an
arbitrary basis for 200 steps; GaLore issue 58), nor is one that is not finite: the refresh waits for the next
gradient. Q-GaLore compares the first singular vectors with their signs, which are arbitrary, and before they are
compressed; here the sign does not matter, and the old one is as it is stored. It refreshes in steps that are multiples
of the interval, so that a doubled one may be cut short; here an interval begins with its refresh. As released, the
interval doubles again on every refresh while the similarities stay high.

P is stored as `rank` rows, each a basis vector, as every other state: in any format, in checkpoints. Signs (and, for
equal singular values, more) are arbitrary, so a comparison with other code needs `set_projector`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from .. import backends
from ..layout import rows_of
from ..stages import Moment, Stage, fold, matrix, update
from ..words import sqrt
from .adamw import AdamW, average, weigh
from .annealing import AnnealedBetas
from .base import Options, Params
from .matrices import is_matrix, is_stack

QUEUE = 5  # similarities of subspaces that lazy refresh looks back on
NONE = -2.0  # where there is no similarity yet


def is_tall(shape: tuple[int, ...]) -> bool:
    """Whether the rows are the long side: P is of the short one."""
    rows, cols = rows_of(shape)
    return rows >= cols


def leading(g: Tensor, rank: int) -> Tensor:
    """The leading singular vectors of the short side, as rows."""
    tall = g if is_tall(g.shape) else g.mT
    tall = tall / tall.abs().amax().clamp(min=torch.finfo(torch.float32).tiny)  # of any magnitude
    try:
        return torch.linalg.svd(tall, full_matrices=False).Vh[:rank]
    except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage]
        # It can fail to converge; eigenvectors of the square are there all the same.
        return torch.linalg.eigh(tall.double().mT @ tall.double()).eigenvectors.mT.flip(0)[:rank].float()


def back(n: Tensor, q: Tensor, shape: tuple[int, ...]) -> Tensor:
    """From the subspace to the parameter's shape."""
    return n @ q if is_tall(shape) else q.mT @ n


@matrix("q")
def refresh(g, q, c, host):
    """The projector, when it is due."""
    if c.t < host.projector_due or not bool(g.any()):
        return q
    new = leading(g, q.shape[0])
    if c.cos_threshold < 1:
        patience(q[0], new[0], c, host)
    host.projector_due = c.t + math.floor(c.update_interval * host.projector_patience)
    return new


def patience(old: Tensor, new: Tensor, c: Any, host: Any) -> None:
    """Q-GaLore: where the subspace hardly changes, wait longer."""
    queue = [f"similarity_{k}" for k in range(QUEUE)]
    if bool(old.any()):
        similarity = float((old @ new).abs() / (old.norm() * new.norm()))
        host.update(zip(queue, [*(host[name] for name in queue[1:]), similarity], strict=True))
    known = [host[name] for name in queue]
    if min(known) > NONE and sum(known) / QUEUE >= c.cos_threshold:
        host.projector_patience *= c.gamma_proj


@matrix("r")
def project(g, q):
    """The gradient in the subspace."""
    return g @ q.mT if is_tall(g.shape) else q @ g


@update("n m v")
def adam(r, m, v, c):
    """Adam's direction in the subspace, not debiased."""
    m, v = average(m, v, r, c)
    return m / (sqrt(v) + c.eps), m, v


@matrix("u")
def restore(n, q, c, shape):
    """The direction in the parameter's shape."""
    return c.scale * back(n, q, shape)


@fold
def stride(s, c):
    """The learning rate, with both averages' debiasing."""
    s.step_size = c.lr * sqrt(s.exp_avg_sq_weight) / s.exp_avg_weight


@update("p")
def descend(p, u, s, c):
    """Down, then decay."""
    p = p - s.step_size * u
    return p - c.decay * p


@update("p m v")
def adam_full(p, g, m, v, s, c):
    """The same Adam without a projector."""
    m, v = average(m, v, g, c)
    p = p - s.step_size * (m / (sqrt(v) + c.eps))
    return p - c.decay * p, m, v


class GaLore(AnnealedBetas):
    """Adam in the leading subspace of each matrix's gradient.

    Q-GaLore's states are `states={"exp_avg": "8bit", "exp_avg_sq": "8bit", "projector": "int4"}` with
    `cos_threshold=0.4`.

    Args:
        params: see `lowbit.optim.Rule`, as all keyword arguments not listed here.
        lr: learning rate.
        rank: of the subspace; a matrix whose shorter side is no longer than this has full rank. Experts that are fused
            in one tensor have no subspace in common: Adam steps them.
        update_interval: steps between two projectors.
        scale: what the direction of projected matrices is multiplied by.
        betas, eps: Adam's.
        weight_decay: decoupled, after the update.
        cos_threshold: lazy refresh: when the first singular vectors of the last refreshes are this similar on average,
            wait longer for the next. None: never. On a GPU a refresh waits for the device; other steps do not.
        gamma_proj: how many times longer.
        beta1_annealing, eta_min: a cosine on betas[0], as in `AdamW`.
        **options: states, seed, master, rounding, state_rounding, stabilize, policy, roles.

    >>> import torch
    >>> w = torch.nn.Parameter(torch.zeros(128, 256))
    >>> states = {"exp_avg": "8bit", "exp_avg_sq": "8bit", "projector": "int4"}
    >>> opt = GaLore([("w", w)], lr=0.01, rank=64, states=states)
    >>> opt.state[w]["exp_avg"].shape, opt.state[w]["projector"].shape
    (torch.Size([64, 256]), torch.Size([64, 64]))
    """

    by_role: ClassVar = True
    kinds: ClassVar = ("projected", "full rank", "other")
    projected: ClassVar = {**AdamW.moments, "q": Moment("projector", lasting=True)}
    scalars: ClassVar = AdamW.scalars
    host: ClassVar = {
        "projector_due": 1.0,
        "projector_patience": 1.0,
        **{f"similarity_{k}": NONE for k in range(QUEUE)},
    }
    stages: tuple[Stage, ...] = (refresh, project, weigh, adam, restore, stride, descend)

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
        beta1_annealing: int | None = None,
        eta_min: float = 0.5,
        **options: Unpack[Options],
    ):
        hyper = {"lr": lr, "rank": rank, "update_interval": update_interval, "scale": scale, "betas": betas, "eps": eps}
        hyper.update(weight_decay=weight_decay, cos_threshold=cos_threshold, gamma_proj=gamma_proj)
        hyper.update(beta1_annealing=beta1_annealing, eta_min=eta_min)
        super().__init__(params, hyper, **options)

    def check_group(self, group: Mapping[str, Any]) -> None:
        """See `Rule.check_group`."""
        super().check_group(group)
        check_whole(group, "rank", 1)
        check_whole(group, "update_interval", 1)
        if not (math.isfinite(group["scale"]) and group["scale"] > 0):
            raise ValueError(f"scale must be a finite number > 0, not {group['scale']}")
        threshold = group.get("cos_threshold")
        if threshold is not None and not 0 <= threshold < 1:
            raise ValueError(f"cos_threshold must be in [0, 1), or None, not {threshold}")
        if not (math.isfinite(group.get("gamma_proj", 2.0)) and group.get("gamma_proj", 2.0) >= 1):
            raise ValueError(f"gamma_proj must be a finite number >= 1, not {group['gamma_proj']}")

    def kind(self, group: Mapping[str, Any], name: str, shape: tuple[int, ...], role: str) -> str:
        """See `Rule.kind`."""
        if is_stack(shape, role) or not is_matrix(shape, role):
            return "other"  # experts in one tensor have no subspace in common
        return "projected" if group["rank"] < min(rows_of(shape)) else "full rank"

    def plan(self, group: Mapping[str, Any], kind: str = "") -> tuple[Mapping[str, Moment], tuple[Stage, ...]]:
        """See `Rule.plan`."""
        return (self.projected, self.stages) if kind == "projected" else (AdamW.moments, (weigh, stride, adam_full))

    def shapes(self, group: Mapping[str, Any], kind: str, shape: tuple[int, ...]) -> Mapping[str, tuple[int, int]]:
        """See `Rule.shapes`: what is in the subspace, and the subspace."""
        (rows, cols), rank = rows_of(shape), group["rank"]
        low = (rows, rank) if is_tall(shape) else (rank, cols)
        return {**dict.fromkeys("rnmv", low), "q": (rank, min(rows, cols))}

    def fixed(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """See `Rule.fixed`."""
        return {**super().fixed(group), "rank": group["rank"]}

    def constants(self, group: Mapping[str, Any], t: int) -> dict[str, float]:
        """See `Part.constants`."""
        lr, (beta1, beta2) = group["lr"], self.betas(group)
        threshold = group.get("cos_threshold")
        return {
            "lr": lr,
            "decay": lr * group["weight_decay"],
            "rate1": 1 - beta1,
            "rate2": 1 - beta2,
            "eps": group["eps"],
            "scale": group["scale"],
            "t": t,
            "update_interval": group["update_interval"],
            "cos_threshold": 1.0 if threshold is None else threshold,
            "gamma_proj": group.get("gamma_proj", 1.0),
        }

    def set_projector(self, param: Tensor, projector: Tensor) -> None:
        """Give a matrix its projector, from its next step on, for `update_interval` steps.

        Args:
            param: one of this optimizer's parameters.
            projector: `rank` basis vectors of the parameter's shorter side, as rows or as columns.

        Raises:
            ValueError: the parameter is not projected, or the projector does not fit it.
        """
        slot = self._slots.get(param)
        if slot is None or slot.kind != "projected":
            raise ValueError(f"{slot.label if slot else 'the parameter'}: has no projector in this optimizer")
        shape = slot.shape_of("q")
        rows = projector if tuple(projector.shape) == shape else projector.mT if projector.dim() == 2 else projector
        if tuple(rows.shape) != shape or not bool(rows.isfinite().all()):
            raise ValueError(f"{slot.label}: a projector has shape {shape} and is finite; got {tuple(projector.shape)}")
        group = next(g for g in self.param_groups if any(p is param for p in g["params"]))
        state = self.state[param]
        given = rows.detach().to(device=param.device, dtype=torch.float32)
        coded = backends.encode(slot.formats["q"], given)
        for part, kept in slot.parts("q", state).items():
            kept.copy_(coded[part].view(kept.shape))
        state["projector_due"].fill_(float(state["step"]) + 1 + group["update_interval"])


def check_whole(group: Mapping[str, Any], name: str, least: int) -> None:
    """Raise unless a hyper-parameter is a whole number of at least so much."""
    value = group[name]
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, not {value!r}")
