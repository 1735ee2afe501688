"""What any optimizer can put in front of its update: AdaClip, AdaGN, MomentumReset, SpikeClip, GlobalClip.

The first three are Stable-SPAM (https://arxiv.org/abs/2502.17055v1, Algorithm 1); SpikeClip is SPAM's
(https://arxiv.org/abs/2501.06842); GlobalClip is clipping to a global norm (Pascanu et al. 2013,
https://arxiv.org/abs/1211.5063). AdaGN alone is GradientStabilizer (2502.17055v4).

Every average starts at 0 and keeps its accumulated weight beside it: `w <- lerp(w, 1, rate)`, debias by dividing by w.
That is exact when the rate changes over time and when steps are skipped. The released Stable-SPAM instead divides by
1 - gamma**k with a counter k that momentum resets restart; `closed_form=True` reproduces that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch

from ..stages import fold, measure, update
from ..words import abs, binade, lerp, minimum, reciprocal, sign, sqrt, where
from .annealing import annealing
from .base import Stabilizer


def _fraction(group: Mapping[str, Any], *names: str) -> None:
    for name in names:
        if not 0 <= group[name] < 1:
            raise ValueError(f"{name} must be in [0, 1), not {group[name]}")


def whole(group: Mapping[str, Any], name: str, zero: str = "") -> None:
    """Raise unless a hyper-parameter is a whole number of at least 0."""
    if not (group[name] >= 0 and float(group[name]).is_integer()):
        raise ValueError(f"{name} must be a whole number >= 0{zero}, not {group[name]}")


@measure("max", plain=True)
def peak(g):
    """The tensor's largest gradient."""
    return abs(g)


@fold
def weigh_peak(s, c):
    """The weight of the average so far."""
    s.m_max_weight = lerp(s.m_max_weight, 1.0, c.peak_rate)


@fold
def peak_weight(s, c):
    """The released code's 1 - gamma3**k."""
    s.m_max_weight = c.peak_weight


@fold
def limit(x, s, c):
    """The average largest gradient, spikes included, and what a spike is multiplied by."""
    s.m_max_t = lerp(s.m_max_t, x, c.peak_rate)
    s.clip_limit = s.m_max_t / s.m_max_weight
    s.clip_share = s.clip_limit / where(x > 0, x, c.one)
    top = minimum(x, s.clip_limit)
    s.unit = reciprocal(binade(where(top <= c.largest, top, c.one)))  # 1 when there is no finite maximum


@update("g", above="clip_limit")
def clip_spikes(g, s):
    """Values above the limit become their share of it."""
    return where(abs(g) > s.clip_limit, g * s.clip_share, g)


class AdaClip(Stabilizer):
    """Clip each tensor's spikes to a moving average of its largest gradient. One sweep.

    A value above the limit becomes its share of the largest one times the limit, as the paper has it.
    """

    scalars: ClassVar = {"m_max_t": 0.0, "m_max_weight": 0.0}

    def __init__(self, gamma3: float = 0.999, closed_form: bool = False):
        super().__init__(gamma3=gamma3)
        weight = peak_weight if closed_form else weigh_peak
        self.stages = (peak, weight, limit, clip_spikes)

    def check(self, group: Mapping[str, Any]) -> None:
        """See `Stabilizer.check`."""
        _fraction(group, "gamma3")

    def constants(self, group: Mapping[str, Any], t: int) -> dict[str, float]:
        """See `Part.constants`."""
        return {
            "one": 1.0,
            "largest": torch.finfo(torch.float32).max,
            "peak_rate": 1 - group["gamma3"],
            "peak_weight": 1 - group["gamma3"] ** t,
        }


@measure("sum", unit="unit")
def energy(g, s):
    """The squared norm, in squares of `unit`."""
    g = g * s.unit
    return g * g


@fold
def weigh_norm(s, c):
    """The weights of the averages so far."""
    s.m_norm_weight = lerp(s.m_norm_weight, 1.0, c.norm_rate)
    s.v_norm_weight = lerp(s.v_norm_weight, 1.0, c.energy_rate)


@fold
def norm_weight(s, c):
    """The released code's 1 - gamma**k."""
    s.m_norm_weight = c.norm_weight
    s.v_norm_weight = c.energy_weight


@fold
def gain(x, s, c):
    """The average norm over the root mean squared norm, for a gradient of norm 1."""
    norm = sqrt(x) / s.unit
    s.m_norm_t = lerp(s.m_norm_t, norm, c.norm_rate)
    s.v_norm_t = lerp(s.v_norm_t, norm * norm, c.energy_rate)
    wanted = (s.m_norm_t / s.m_norm_weight) / (sqrt(s.v_norm_t / s.v_norm_weight) + c.norm_eps)
    s.norm_gain = where(x > 0, wanted / sqrt(where(x > 0, x, c.one)), reciprocal(s.unit))


@update("g")
def normalize(g, s):
    """Rescale; a zero gradient stays zero."""
    return g * s.unit * s.norm_gain


class AdaGN(Stabilizer):
    """Give each tensor's gradient the norm that its own history suggests: an average norm over a root mean square.

    One sweep. The gradient's own norm no longer matters, only its direction: norms come out near 1. Behind AdaClip the
    largest value is known, and squares are taken in units of its power of two (`s.unit`). A norm above 1.8e19, whose
    square is no fp32 number, leaves the tensor alone.
    """

    scalars: ClassVar = {"m_norm_t": 0.0, "v_norm_t": 0.0, "m_norm_weight": 0.0, "v_norm_weight": 0.0}
    temporaries: ClassVar = {"unit": 1.0}

    def __init__(self, gamma1: float = 0.7, gamma2: float = 0.9, closed_form: bool = False):
        super().__init__(gamma1=gamma1, gamma2=gamma2)
        self.stages = (energy, norm_weight if closed_form else weigh_norm, gain, normalize)

    def check(self, group: Mapping[str, Any]) -> None:
        """See `Stabilizer.check`."""
        _fraction(group, "gamma2", *(("gamma1",) if group["gamma1"] != -1 else ()))
        if group["gamma1"] == -1 and "betas" not in group:
            raise ValueError("gamma1=-1 takes betas[0], and this optimizer has no betas")

    def constants(self, group: Mapping[str, Any], t: int) -> dict[str, float]:
        """See `Part.constants`."""
        gamma1 = group["betas"][0] if group["gamma1"] == -1 else group["gamma1"]
        gamma1, gamma2 = gamma1 * annealing(group), group["gamma2"]
        return {
            "one": 1.0,
            "norm_eps": group.get("eps", 1e-8),
            "norm_rate": 1 - gamma1,
            "energy_rate": 1 - gamma2,
            "norm_weight": 1 - gamma1**t,
            "energy_weight": 1 - gamma2**t,
        }


class GradientStabilizer(AdaGN):
    """AdaGN alone, with the defaults of GradientStabilizer (https://arxiv.org/abs/2502.17055v4), for any optimizer.

    As in its released code the averages are debiased; eps is the stabilizer's own. Released, a gradient of zeros leaves
    the averages alone; here it counts, as a norm of 0. Non-finite gradients leave the tensor alone.

    >>> import torch
    >>> from lowbit.optim import Lion
    >>> Lion([torch.nn.Parameter(torch.ones(8))], stabilize=(GradientStabilizer(),)).stabilize
    (GradientStabilizer(gamma1=0.6, gamma2=0.999, norm_eps=1e-12),)
    """

    def __init__(self, gamma1: float = 0.6, gamma2: float = 0.999, norm_eps: float = 1e-12):
        super().__init__(gamma1, gamma2)
        self.hyper["norm_eps"] = norm_eps

    def check(self, group: Mapping[str, Any]) -> None:
        """See `Stabilizer.check`."""
        super().check(group)
        if not (math.isfinite(group["norm_eps"]) and group["norm_eps"] >= 0):
            raise ValueError(f"norm_eps must be a finite number >= 0, not {group['norm_eps']}")

    def constants(self, group: Mapping[str, Any], t: int) -> dict[str, float]:
        """See `Part.constants`."""
        return {**super().constants(group, t), "norm_eps": group["norm_eps"]}


class MomentumReset(Stabilizer):
    """Set all moments to zero every `reset_interval` steps (0: never), before they are used; debiasing restarts.

    No sweep: a reset writes zero codes and scales, to every tensor of the group, whether or not it has a (finite)
    gradient in that step. `late` is the released code's order: the step of the reset still
    uses the old moments.
    """

    def __init__(self, reset_interval: int = 1000, late: bool = False):
        super().__init__(reset_interval=reset_interval)
        self.late = late

    def check(self, group: Mapping[str, Any]) -> None:
        """See `Stabilizer.check`."""
        whole(group, "reset_interval", " (0: never)")

    def resets(self, group: Mapping[str, Any]) -> Literal["", "before", "after"]:
        """See `Part.resets`."""
        interval = group["reset_interval"]
        due = interval > 0 and group["steps"] % interval == 0
        return ("after" if self.late else "before") if due else ""


def brought_down(g, v, c):
    """SPAM's clip at threshold times the second moment."""
    limit = c.spike_threshold * v
    return where(g * g > limit, sign(g) * sqrt(limit), g)


@update("g")
def clip_to_moment(g, v, c):
    """Where there is a second moment."""
    return where(v > 0, brought_down(g, v, c), g)


@update("g")
def clip_and_freeze(g, v, c):
    """As released: where there is none yet, the gradient becomes 0."""
    return brought_down(g, v, c)


class SpikeClip(Stabilizer):
    """SPAM's clip: a value whose square is over `threshold` times its second moment is brought down to that. No sweep.

    A threshold of 0 never clips. Nothing is clipped in the first `grace_steps` steps, nor in as many from each momentum
    reset, when the second moment is still small. Where it is still 0 nothing is clipped either: the released SPAM clips
    such values to 0, so that v stays 0 and the parameter is frozen; `freeze` reproduces that.
    """

    def __init__(self, threshold: float = 5000.0, grace_steps: int = 0, freeze: bool = False):
        super().__init__(threshold=threshold, grace_steps=grace_steps)
        self.stages = (clip_and_freeze if freeze else clip_to_moment,)

    def check(self, group: Mapping[str, Any]) -> None:
        """See `Stabilizer.check`."""
        if not group["threshold"] >= 0:
            raise ValueError(f"threshold must be at least 0 (0: never), not {group['threshold']}")
        whole(group, "grace_steps")

    def constants(self, group: Mapping[str, Any], t: int) -> dict[str, float]:
        """See `Part.constants`."""
        interval = group.get("reset_interval", 0)
        since = group["steps"] % interval if interval else group["steps"]
        clips = group["threshold"] and since >= group["grace_steps"]
        return {"spike_threshold": group["threshold"] if clips else math.inf}


@measure("sum", over="all")
def energy_of_all(g):
    """The squared norm over all tensors."""
    return g * g


@fold
def share(x, s, c):
    """1, or what brings the norm down to max_norm."""
    s.global_share = minimum(c.one, c.max_norm / (sqrt(x) + c.norm_floor))


@update("g")
def scale_all(g, s):
    """Scale the gradient."""
    return g * s.global_share


class GlobalClip(Stabilizer):
    """Scale all gradients together so that their common norm is at most `max_norm`. One sweep.

    As `torch.nn.utils.clip_grad_norm_`, but gradients are not written to, and a tensor with a non-finite gradient is
    left out instead of spoiling all.
    """

    def __init__(self, max_norm: float = 1.0):
        super().__init__(max_norm=max_norm)
        self.stages = (energy_of_all, share, scale_all)

    def check(self, group: Mapping[str, Any]) -> None:
        """See `Stabilizer.check`."""
        if not group["max_norm"] > 0:
            raise ValueError(f"max_norm must be above 0, not {group['max_norm']}")

    def constants(self, group: Mapping[str, Any], t: int) -> dict[str, float]:
        """See `Part.constants`."""
        return {"one": 1.0, "max_norm": group["max_norm"], "norm_floor": 1e-6}
