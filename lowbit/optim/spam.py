"""SPAM.

Huang et al. 2025, https://arxiv.org/abs/2501.06842, Algorithm 1: Adam with two stabilizers in front, SpikeClip and
MomentumReset, and a warm-up of the learning rate after each reset. The clip's grace period is the released code's.

Paper and released code (github.com/TianjinYellow/SPAM-Optimizer, commit e8185fb) differ:

    variant="paper"     the averages are debiased anew after a reset; eps is added to the debiased root; weight decay is
                        decoupled and comes first; a value whose second moment is still 0 is not clipped; non-finite
                        gradients leave the block alone
    variant="official"  debiasing goes on as if there had been no reset, so that the first steps after one would be too
                        long, by up to 3.2 times, but for the warm-up; eps is added to the root before debiasing; decay
                        comes last; a value whose second moment is still 0 when the grace is over is clipped to 0, so
                        its weight is frozen until the next reset; non-finite values spread. `p.grad` is never written.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from typing_extensions import Unpack

from ..stages import Moment, Stage, update
from ..words import sqrt
from .adamw import AdamW, adamw, average, debias, weigh
from .base import Options, Params
from .stabilizers import MomentumReset, SpikeClip, whole
from .variants import Variants


@update("p m v")
def released(p, g, m, v, c):
    """The released code's Adam, of constants alone."""
    m, v = average(m, v, g, c)
    p = p - c.step_size * (m / (sqrt(v) + c.eps))
    return p - c.decay * p, m, v


class SPAM(Variants, AdamW):
    """Adam that clips gradients far above their second moment, and now and then forgets its momentum.

    Args:
        params: see `lowbit.optim.Rule`, as all keyword arguments not listed here.
        lr: learning rate.
        betas: decay of the moments.
        eps: added to the denominator.
        weight_decay: decoupled.
        threshold: a gradient whose square is over `threshold` times its second moment is brought down to that; 0:
            never.
        reset_interval: steps between momentum resets; 0 means never.
        warmup_steps: length of the learning rate's cosine from 1 % to all of it, which every reset starts; the first
            step of all does not.
        grace_steps: so many steps from the start and from each reset are not clipped.
        variant: "paper" or "official" (see the module).
        beta1_annealing: length in steps of a cosine on beta1, as in `AdamW`.
        eta_min: where that cosine ends, as a share.
        **options: states, seed, master, rounding, state_rounding, policy, roles, and `stabilize` for more stabilizers,
            which go first.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        threshold: float = 5000.0,
        reset_interval: int = 500,
        warmup_steps: int = 150,
        grace_steps: int = 20,
        variant: str = "paper",
        beta1_annealing: int | None = None,
        eta_min: float = 0.5,
        **options: Unpack[Options],
    ):
        official = self.choose(variant)
        parts = SpikeClip(threshold, grace_steps, freeze=official), MomentumReset(reset_interval)
        hyper = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "warmup_steps": warmup_steps}
        hyper.update(variant=variant, beta1_annealing=beta1_annealing, eta_min=eta_min)
        options["stabilize"] = (*options.get("stabilize", ()), *parts)
        super(AdamW, self).__init__(params, hyper, **options)

    def check_group(self, group: Mapping[str, Any]) -> None:
        """See `Rule.check_group`."""
        super().check_group(group)
        whole(group, "warmup_steps")

    def plan(self, group: Mapping[str, Any], kind: str = "") -> tuple[Mapping[str, Moment], tuple[Stage, ...]]:
        """See `Rule.plan`."""
        return self.moments, (weigh, debias, adamw) if self.guarded else (released,)

    def warmth(self, group: Mapping[str, Any]) -> float:
        """The factor on the learning rate: 0.01 in a reset's step, then along a cosine to 1."""
        interval, steps = group["reset_interval"], group["steps"]
        since = steps % interval if interval and steps >= interval else math.inf
        if since >= group["warmup_steps"]:
            return 1.0
        return 1 - 0.99 * (1 + math.cos(math.pi * since / (group["warmup_steps"] + 1))) / 2

    def constants(self, group: Mapping[str, Any], t: int) -> dict[str, float]:
        """See `Part.constants`."""
        constants = super().constants(group, t)
        beta1, beta2 = self.betas(group)
        lr = constants["lr"] * self.warmth(group)
        step_size = lr * math.sqrt(1 - beta2**t) / (1 - beta1**t)
        return {**constants, "lr": lr, "step_size": step_size, "decay": 1 - constants["keep"]}
