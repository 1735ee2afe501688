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
                        its weight is frozen until the next reset; a reset is missed by what has no gradient in its
                        step; weights with sparse momentum do not decay; non-finite values spread. `p.grad` is never
                        written.

With `density` below 1 (the paper's sparse momentum) only a random part of each matrix has moments and moves until the
next reset. The moments are stored for that part alone, with a bit per value that says where (`sparse.py`). The part is
the same number of values in every row; the released code draws over the whole matrix, with a byte per value.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

from typing_extensions import Unpack

from ..stages import Moment, Stage, update
from ..words import sqrt
from .adamw import AdamW, adamw, average, debias, weigh
from .base import Options, Params
from .parts import stabilizers
from .stabilizers import MomentumReset, SpikeClip, whole
from .variants import Variants


def undecayed(p, g, m, v, c):
    """The released code's Adam, of constants alone."""
    m, v = average(m, v, g, c)
    return p - c.step_size * (m / (sqrt(v) + c.eps)), m, v


@update("p m v")
def released(p, g, m, v, c):
    """Decay comes last."""
    p, m, v = undecayed(p, g, m, v, c)
    return p - c.decay * p, m, v


@update("p m v")
def released_sparse(p, g, m, v, c):
    """With sparse momentum it is lost: the code decays a copy."""
    p, m, v = undecayed(p, g, m, v, c)
    return p, m, v


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
        density: share of each row of a matrix that has momentum and moves, chosen at random and anew at every reset;
            embeddings, heads and what is no matrix are dense. The rest of the matrix is left alone, decay included.
        variant: "paper" or "official" (see the module).
        beta1_annealing: length in steps of a cosine on beta1, as in `AdamW`.
        eta_min: where that cosine ends, as a share.
        **options: states, seed, master, rounding, state_rounding, policy, roles, and `stabilize` for more stabilizers,
            which go first.
    """

    kinds: ClassVar = ("", "sparse")

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
        density: float = 1.0,
        variant: str = "paper",
        beta1_annealing: int | None = None,
        eta_min: float = 0.5,
        **options: Unpack[Options],
    ):
        official = self.choose(variant)
        parts = SpikeClip(threshold, grace_steps, freeze=official), MomentumReset(reset_interval)
        hyper = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "warmup_steps": warmup_steps}
        hyper.update(density=density, variant=variant, beta1_annealing=beta1_annealing, eta_min=eta_min)
        options["stabilize"] = (*stabilizers(options.get("stabilize", ())), *parts)
        super(AdamW, self).__init__(params, hyper, **options)

    def check_group(self, group: Mapping[str, Any]) -> None:
        """See `Rule.check_group`."""
        super().check_group(group)
        whole(group, "warmup_steps")
        if not 0 < group["density"] <= 1:
            raise ValueError(f"density must be above 0 and at most 1, not {group['density']}")

    def kept(self, group: Mapping[str, Any], name: str, shape: tuple[int, ...], role: str) -> int:
        """See `Rule.kept`."""
        if len(shape) != 2 or role in ("embedding", "head") or 0 in shape:
            return 0
        return max(1, round(group["density"] * shape[1])) % shape[1]

    def kind(self, group: Mapping[str, Any], name: str, shape: tuple[int, ...], role: str) -> str:
        """See `Rule.kind`."""
        return "sparse" if self.kept(group, name, shape, role) else ""

    def fixed(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """See `Rule.fixed`."""
        return {**super().fixed(group), "density": group["density"]}

    def plan(self, group: Mapping[str, Any], kind: str = "") -> tuple[Mapping[str, Moment], tuple[Stage, ...]]:
        """See `Rule.plan`."""
        if self.guarded:
            return self.moments, (weigh, debias, adamw)
        return self.moments, (released_sparse if kind == "sparse" else released,)

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
