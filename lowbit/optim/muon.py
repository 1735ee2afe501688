"""Muon.

Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/ (the algorithm box; no arXiv number); the learning rate
that fits AdamW's (`adjust_lr_fn="match_rms_adamw"`) is Liu et al. 2025, https://arxiv.org/abs/2502.16982, section 2.2.

The momentum of a matrix is made orthogonal by five Newton-Schulz iterations and scaled by sqrt(max(1, rows / cols)).
The official code runs them in bf16, so trajectories agree within about 2.5e-3 after 20 steps and not to the bit;
`precision="fp32"` is the option for who wants one. The official nesterov step overwrites `p.grad`; this one does not.

What is no matrix, the embedding and the head are stepped by AdamW (official: Adam with a learning rate of its own).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from ..formats import nearest
from ..stages import Moment, Stage, matrix, update
from ..words import binade, lerp
from . import adamw
from .adamw import AdamW
from .base import Options, Params, Rule
from .matrices import is_matrix, is_stack

QUINTIC = (3.4445, -4.7750, 2.0315)  # slope at zero as steep as it can be; singular values end near 1, not at it
ADJUST = (None, "original", "match_rms_adamw")
PRECISIONS = ("bf16", "fp32")
MATRICES = ("matrix", "transposed", "experts")  # the kinds that are made orthogonal; (in, out) is transposed


@update("m u")
def average(g, m, c):
    """The momentum, an average, and what is made orthogonal."""
    m = lerp(m, g, c.rate)
    return m, m


@update("m u")
def nesterov(g, m, c):
    """The same, looking one step ahead."""
    m = lerp(m, g, c.rate)
    return m, lerp(g, m, c.momentum)


@matrix("u")
def orthogonalize(u, c, shape):
    """The nearest matrix with orthonormal rows or columns, nearly; of each expert, where a tensor holds several."""
    each = u.view(shape) if c.experts else u
    each = each / (binade(u.abs().amax()) * 2.0**-40).clamp(min=1.0)  # the norm of what is huge would overflow
    o = newton_schulz(each, int(c.ns_steps), torch.float32 if c.fp32 else torch.bfloat16)
    rows, cols = each.shape[-2:] if not c.transposed else each.shape[::-1]
    scale = 0.2 * math.sqrt(max(rows, cols)) if c.match_rms else math.sqrt(max(1.0, rows / cols))
    return (scale * o).float().view(u.shape)


def newton_schulz(g: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
    """Odd polynomials of a matrix (or of each of many), which drive its singular values towards 1."""
    a, b, c = QUINTIC
    wide = g.shape[-2] <= g.shape[-1]
    x = (g if wide else g.mT).to(dtype)
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + (c * gram) @ gram) @ x
    return x if wide else x.mT


@update("p")
def descend(p, u, c):
    """Decay, then down."""
    return c.keep * p - c.lr * u


class Muon(Rule):
    """Momentum, made orthogonal; AdamW for the embedding, the head and what is no matrix.

    Which tensor is which goes by role and shape; `roles=` overrides it, and `explain()` shows it. Tensors of more than
    two dimensions are flattened to (first, rest), but those of the role "expert" hold a matrix for each expert.

    Args:
        params: see `lowbit.optim.Rule`, as all keyword arguments not listed here.
        lr: learning rate of matrices.
        momentum: decay of the average gradient.
        nesterov: look one step ahead.
        ns_steps: Newton-Schulz iterations.
        weight_decay: decoupled, for all tensors.
        adjust_lr_fn: None or "original": a matrix's update is scaled by sqrt(max(1, rows / cols)); "match_rms_adamw":
            by 0.2 * sqrt(max(rows, cols)), so that AdamW's lr and decay fit.
        precision: of Newton-Schulz: "bf16" (as released) or "fp32".
        aux_lr: AdamW's learning rate when `lr` is what it was at the start; it follows the schedule of `lr`.
        embedding_lr, head_lr, scalar_lr: the same for embeddings, for the head, and for all else; None takes `aux_lr`.
        betas, eps: AdamW's.
        **options: states, seed, master, rounding, state_rounding, stabilize, policy, roles.

    >>> import torch
    >>> w = torch.nn.Parameter(torch.zeros(64, 64))
    >>> opt = Muon([("w", w)], lr=0.02, states="4bit")
    >>> w.diagonal().sum().backward()
    >>> opt.step()
    >>> sorted(opt.state[w])[:3], opt.explain().rows[0].kind
    (['momentum_buffer', 'momentum_buffer_format', 'momentum_buffer_scale'], 'matrix')
    """

    by_role: ClassVar = True
    kinds: ClassVar = (*MATRICES, "embedding", "head", "other")
    matrices: ClassVar = {"m": Moment("momentum_buffer")}
    scalars: ClassVar = AdamW.scalars

    def __init__(
        self,
        params: Params,
        lr: float = 0.02,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        weight_decay: float = 0.0,
        adjust_lr_fn: str | None = None,
        precision: str = "bf16",
        aux_lr: float = 3e-4,
        embedding_lr: float | None = None,
        head_lr: float | None = None,
        scalar_lr: float | None = None,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-10,
        **options: Unpack[Options],
    ):
        hyper = {"lr": lr, "momentum": momentum, "nesterov": nesterov, "ns_steps": ns_steps}
        hyper.update(weight_decay=weight_decay, adjust_lr_fn=adjust_lr_fn, precision=precision, aux_lr=aux_lr)
        hyper.update(embedding_lr=embedding_lr, head_lr=head_lr, scalar_lr=scalar_lr, betas=betas, eps=eps)
        super().__init__(params, hyper, **options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """See `Rule.add_param_group`; what `lr` is now is what the other learning rates follow it from."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group.setdefault("base_lr", float(group["lr"]))

    def check_group(self, group: Mapping[str, Any]) -> None:
        """See `Rule.check_group`."""
        if len(group["betas"]) != 2:
            raise ValueError(f"betas must be two numbers, not {group['betas']!r}")
        if not 0 <= group["momentum"] < 1:
            raise ValueError(f"momentum must be in [0, 1), not {group['momentum']}")
        steps = group["ns_steps"]
        if not isinstance(steps, int) or steps < 1:
            raise ValueError(f"ns_steps must be a whole number of at least 1, not {steps!r}")
        for name, known in (("adjust_lr_fn", ADJUST), ("precision", PRECISIONS)):
            if group[name] not in known:
                hint = nearest(str(group[name]), [str(value) for value in known])
                raise ValueError(f"unknown {name} {group[name]!r}{hint}; known: {', '.join(map(repr, known))}")
        for name in ("aux_lr", "embedding_lr", "head_lr", "scalar_lr"):
            value = group[name]
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be a finite number >= 0, not {value}")

    def kind(self, group: Mapping[str, Any], name: str, shape: tuple[int, ...], role: str) -> str:
        """See `Rule.kind`."""
        if role in ("embedding", "head"):
            return role
        if is_stack(shape, role):
            return "experts"
        return "other" if not is_matrix(shape, role) else "transposed" if name in self.transposed else "matrix"

    def plan(self, group: Mapping[str, Any], kind: str = "") -> tuple[Mapping[str, Moment], tuple[Stage, ...]]:
        """See `Rule.plan`."""
        if kind in MATRICES:
            return self.matrices, (nesterov if group["nesterov"] else average, orthogonalize, descend)
        return AdamW.moments, (*AdamW.folds, adamw.adamw)

    def constants(self, group: Mapping[str, Any], t: int) -> dict[str, float]:
        """See `Part.constants`."""
        return self.kind_constants(group, t, "matrix")

    def kind_constants(self, group: Mapping[str, Any], t: int, kind: str) -> dict[str, float]:
        """See `Rule.kind_constants`."""
        lr = group["lr"]
        if kind in MATRICES:
            return {
                "lr": lr,
                "keep": 1 - lr * group["weight_decay"],
                "momentum": group["momentum"],
                "rate": 1 - group["momentum"],
                "ns_steps": group["ns_steps"],
                "experts": kind == "experts",
                "transposed": kind == "transposed",
                "match_rms": group["adjust_lr_fn"] == "match_rms_adamw",
                "fp32": group["precision"] == "fp32",
            }
        own = group["scalar_lr" if kind == "other" else f"{kind}_lr"]
        own = group["aux_lr"] if own is None else own
        scheduled = own * lr / group["base_lr"] if group["base_lr"] else own
        return adamw.constants(scheduled, group["betas"], group["eps"], group["weight_decay"])
