"""SWAN.

Ma et al. 2024, https://arxiv.org/abs/2412.13148, Algorithm 1 (GradNorm, then GradWhitening). No official code was
released; iterations and scale are as the paper describes them, and not compared with anybody's run.

Each row of a matrix's gradient is normalized to mean 0 and deviation 1, the result is made orthogonal, and it gets its
norm back. Matrices have no state at all. Embeddings, the head and what is no matrix are stepped by AdamW, at the same
learning rate, as the paper's memory counts have it. Whitening runs in fp32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from ..stages import Moment, Stage, matrix
from . import adamw
from .adamw import AdamW
from .base import Options, Params, Rule
from .galore import check_whole
from .matrices import is_matrix, is_stack
from .muon import descend


def normalized(g: Tensor) -> Tensor:
    """Rows of mean 0 and deviation 1; a row of one value over and over becomes 0."""
    g = g / g.abs().amax().clamp(min=torch.finfo(torch.float32).tiny)  # of any magnitude
    centred = g - g.mean(-1, keepdim=True)
    deviation = centred.square().mean(-1, keepdim=True).sqrt()
    return centred / deviation.clamp(min=1e-6)


def whitened(g: Tensor, steps: int) -> Tensor:
    """(g g')^(-1/2) g by Newton-Schulz: singular values go to 1, those of 0 stay."""
    wide = g.shape[-2] <= g.shape[-1]
    x = g if wide else g.mT
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    for _ in range(steps):
        gram = x @ x.mT  # x <- (15 x - 10 x x'x + 3 (x x')^2 x) / 8
        x = 1.875 * x + (0.375 * gram @ gram - 1.25 * gram) @ x
    return x if wide else x.mT


@matrix("u")
def whiten(g, c, shape):
    """The direction: normalized, whitened, and as long as before the whitening; of each expert, if there are any."""
    rows = normalized(g.view(shape) if c.experts else g.mT if c.transposed else g)
    u = whitened(rows, int(c.ns_steps))
    before, length = (torch.linalg.matrix_norm(x, keepdim=True) for x in (rows, u))
    u = u * (before / length.clamp(min=torch.finfo(torch.float32).tiny))
    return u.mT if c.transposed else u.view(g.shape)


class SWAN(Rule):
    """Normalized and whitened gradients, without a state; AdamW for what is no matrix.

    Tensors of more than two dimensions are flattened to (first, rest), but those of the role "expert" hold a matrix for
    each expert.

    Args:
        params: see `lowbit.optim.Rule`, as all keyword arguments not listed here.
        lr: learning rate, of all tensors.
        ns_steps: Newton-Schulz iterations of the whitening.
        betas, eps: AdamW's.
        weight_decay: decoupled, for all tensors.
        **options: states, seed, master, rounding, state_rounding, stabilize, policy, roles.
    """

    by_role: ClassVar = True
    kinds: ClassVar = ("matrix", "transposed", "experts", "other")
    scalars: ClassVar = AdamW.scalars

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        ns_steps: int = 10,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **options: Unpack[Options],
    ):
        hyper = {"lr": lr, "ns_steps": ns_steps, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, hyper, **options)

    def check_group(self, group: Mapping[str, Any]) -> None:
        """See `Rule.check_group`."""
        if len(group["betas"]) != 2:
            raise ValueError(f"betas must be two numbers, not {group['betas']!r}")
        check_whole(group, "ns_steps", 1)

    def kind(self, group: Mapping[str, Any], name: str, shape: tuple[int, ...], role: str) -> str:
        """See `Rule.kind`."""
        if is_stack(shape, role):
            return "experts"
        return "other" if not is_matrix(shape, role) else "transposed" if name in self.transposed else "matrix"

    def plan(self, group: Mapping[str, Any], kind: str = "") -> tuple[Mapping[str, Moment], tuple[Stage, ...]]:
        """See `Rule.plan`."""
        return (AdamW.moments, (*AdamW.folds, adamw.adamw)) if kind == "other" else ({}, (whiten, descend))

    def constants(self, group: Mapping[str, Any], t: int) -> dict[str, float]:
        """See `Part.constants`."""
        return self.kind_constants(group, t, "matrix")

    def kind_constants(self, group: Mapping[str, Any], t: int, kind: str) -> dict[str, float]:
        """See `Rule.kind_constants`."""
        adam = adamw.constants(group["lr"], group["betas"], group["eps"], group["weight_decay"])
        return {**adam, "ns_steps": group["ns_steps"], **{k: kind == k for k in ("experts", "transposed")}}
