"""SlimAdam.

Kalra et al. 2025, https://arxiv.org/abs/2503.01843: Adam whose second moment is averaged over the dimension along which
it hardly varies, in the static form of the released code, where roles tell the dimension. Mind that it is the other one
than Adam-mini's for values, attention outputs and MLPs: one number per input (a column), not per output.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from typing_extensions import Unpack

from ..stages import Moment, Stage
from .adam_mini import UNDECAYED, check_matches, check_patterns, chosen, has_decay, shared_second_moment
from .adamw import AdamW
from .base import Options, Params

DIMS = ("row", "column", "full")
BY_ROLE = {
    **dict.fromkeys(("q", "k", "embedding", "head"), "row"),
    **dict.fromkeys(("v", "o", "gate", "up", "down", "mlp"), "column"),
}


class SlimAdam(AdamW):
    """Adam with one second moment per row or per column where little is lost by it.

    Queries, keys, embeddings and the head have one per row; values, attention outputs and MLPs one per column; all
    else (norms, fused or unknown matrices, anything that is not two-dimensional) one per value. `explain()` shows it.

    Args:
        params: see `lowbit.optim.Rule`, as all keyword arguments not listed here. With names, as roles need them.
        lr: learning rate.
        betas: decay of the first and of the second moment.
        eps: added to the denominator.
        weight_decay: decoupled; of matrices only (see `decay_1d`).
        dims: {glob on names: "row", "column" or "full"}, before the roles.
        decay_1d: decay norms, biases and other vectors too; the released code does not.
        beta1_annealing: length in steps of a cosine on beta1, as in `AdamW`; None leaves beta1 constant.
        eta_min: where that cosine ends, as a share.
        **options: states, seed, master, rounding, state_rounding, stabilize, policy, roles.

    >>> import torch
    >>> up = torch.nn.Parameter(torch.zeros(64, 32))
    >>> SlimAdam([("up_proj", up)], dims={"up_*": "column"}).state[up]["exp_avg_sq"].shape
    torch.Size([32])
    """

    by_role: ClassVar = True
    kinds: ClassVar = tuple(dim + decay for dim in ("full", "row", "column") for decay in ("", UNDECAYED))

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        dims: Mapping[str, str] | None = None,
        decay_1d: bool = False,
        beta1_annealing: int | None = None,
        eta_min: float = 0.5,
        **options: Unpack[Options],
    ):
        self.dims = check_patterns("dims", dims or {}, DIMS)
        hyper = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "decay_1d": decay_1d}
        hyper.update(beta1_annealing=beta1_annealing, eta_min=eta_min)
        super(AdamW, self).__init__(params, hyper, **options)
        check_matches("dims", self.dims, self)

    def fixed(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """See `Rule.fixed`."""
        return {**super().fixed(group), "decay_1d": group["decay_1d"]}

    def kind(self, group: Mapping[str, Any], name: str, shape: tuple[int, ...], role: str) -> str:
        """What its second moments are over, and whether the tensor is decayed."""
        found = BY_ROLE.get(role, "full") if len(shape) == 2 else "full"
        if name in self.transposed:
            found = {"row": "column", "column": "row"}.get(found, found)
        dim = chosen(self.dims, name) or found
        return dim if has_decay(group, shape, role) else dim + UNDECAYED

    def plan(self, group: Mapping[str, Any], kind: str = "") -> tuple[Mapping[str, Moment], tuple[Stage, ...]]:
        """See `Rule.plan`."""
        dim = kind.removesuffix(UNDECAYED)
        return shared_second_moment({"row": "group", "column": "column"}.get(dim, "value"), kind == dim)
