"""Stable-SPAM.

Huang et al. 2025, https://arxiv.org/abs/2502.17055v1 and v2, Algorithm 1 (the arXiv number's v3 and later are another
method, GradientStabilizer, which is AdaGN alone).

Stable-SPAM *is* AdamW with three stabilizers in front: AdaClip, AdaGN and MomentumReset. What this file adds is the
cosine that the released code puts on beta1 and gamma1 when `total_steps` is given, and the released code's behaviour.

Paper and released code differ (measured: specs of this project, and docs/decisions/003-stable-spam-variants.md):

    variant="paper"     a reset takes effect in its own step; each average has its own accumulated weight; the cosine
                        stays at eta_min after total_steps; non-finite gradients leave the tensor alone; fp32 scalars
    variant="official"  at a reset the old moments are used once more, with the debiasing of a first step, and dropped
                        after; one counter debiases everything and a reset sets it to 1, which switches AdaClip off for
                        hundreds of steps; the cosine rises again; non-finite values spread. `p.grad` is never written.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from typing_extensions import Unpack

from ..stages import Stage, fold, together
from .adamw import AdamW, adamw, debias
from .base import Options, Params
from .parts import stabilizers
from .stabilizers import AdaClip, AdaGN, MomentumReset, normalize
from .variants import Variants


@fold
def closed_form(s, c):
    """Weights of 1 - beta**k, with the released code's counter k."""
    s.exp_avg_weight = c.weight1
    s.exp_avg_sq_weight = c.weight2


normalized = together(normalize, adamw)  # as the CPU library runs them


class StableSPAM(Variants, AdamW):
    """AdamW that stays stable in 4 bits: spikes clipped, gradient norms tracked, momentum reset now and then.

    Args:
        params: see `lowbit.optim.Rule`, as all keyword arguments not listed here.
        lr: learning rate.
        betas: decay of the moments.
        eps: added to the denominators of Adam and AdaGN.
        weight_decay: decoupled.
        amsgrad: use the largest second moment so far.
        gamma1: decay of the average gradient norm; -1 takes betas[0], as released.
        gamma2: decay of the average squared norm.
        gamma3: decay of the average largest gradient.
        reset_interval: steps between momentum resets; 0 means never.
        total_steps: length of the cosine on beta1 and gamma1; None leaves them constant.
        eta_min: where the cosine ends, as a share.
        variant: "paper" or "official" (see the module).
        **options: states, seed, master, rounding, state_rounding, policy, roles, and `stabilize` for more stabilizers,
            which go first.
    """

    length: ClassVar = "total_steps"

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        gamma1: float = 0.7,
        gamma2: float = 0.9,
        gamma3: float = 0.999,
        reset_interval: int = 1000,
        total_steps: int | None = None,
        eta_min: float = 0.5,
        variant: str = "paper",
        **options: Unpack[Options],
    ):
        official = self.choose(variant)
        self.folds: tuple[Stage, ...] = (closed_form, debias) if official else AdamW.folds
        parts = (
            AdaClip(gamma3, closed_form=official),
            AdaGN(gamma1, gamma2, closed_form=official),
            MomentumReset(reset_interval, late=official),
        )
        hyper = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad}
        hyper.update(total_steps=total_steps, eta_min=eta_min, variant=variant)
        options["stabilize"] = (*stabilizers(options.get("stabilize", ())), *parts)
        super(AdamW, self).__init__(params, hyper, **options)

    def _official_reset(self, group: Mapping[str, Any]) -> bool:
        return not self.guarded and any(part.resets(group) for part in self.stabilize)

    def constants(self, group: Mapping[str, Any], t: int) -> dict[str, float]:
        """See `Part.constants`."""
        beta1, beta2 = self.betas(group)
        k = 1 if self._official_reset(group) else t
        return {**super().constants(group, t), "weight1": 1 - beta1**k, "weight2": 1 - beta2**k}

    def step_after(self, group: Mapping[str, Any], t: int) -> int:
        """See `Rule.step_after`; the released code's counter restarts at a reset."""
        return 1 if self._official_reset(group) else t
