"""Beta1 along a cosine, for every optimizer with betas.

The released Stable-SPAM (https://github.com/TianjinYellow/StableSPAM) multiplies beta1 by a cosine that falls from 1 to
`eta_min`; no paper's algorithm has it. It is an option of the Adam family here, so that what it brings can be told from
what the rest of Stable-SPAM brings.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

from .base import Rule


def annealing(group: Mapping[str, Any], length: str = "total_steps") -> float:
    """The factor of this step: a cosine from 1 to `eta_min` over `group[length]` steps (None: 1), then constant.

    The released code lets Stable-SPAM's cosine rise again after the end; `variant="official"` keeps that.
    """
    total = group.get(length)
    if total is None:
        return 1.0
    rises = length == "total_steps" and group.get("variant") == "official"
    t = group["steps"] if rises else min(group["steps"], total + 1)
    return group["eta_min"] + (1 - group["eta_min"]) * (1 + math.cos(math.pi * t / (total + 1))) / 2


class AnnealedBetas(Rule):
    """A rule with two betas, the first of which may follow the cosine."""

    length: ClassVar[str] = "beta1_annealing"  # the hyper-parameter that tells how long the cosine is

    def check_group(self, group: Mapping[str, Any]) -> None:
        """See `Rule.check_group`."""
        if len(group["betas"]) != 2:
            raise ValueError(f"betas must be two numbers, not {group['betas']!r}")
        total, eta_min = group.get(self.length), group.get("eta_min", 0.5)
        if total is not None and not (total >= 1 and math.isfinite(total)):
            raise ValueError(f"{self.length} must be at least 1, or None, not {total}")
        if not 0 <= eta_min <= 1:
            raise ValueError(f"eta_min must be in [0, 1], not {eta_min}")

    def betas(self, group: Mapping[str, Any]) -> tuple[float, float]:
        """Beta1 and beta2 of this step."""
        beta1, beta2 = group["betas"]
        return beta1 * annealing(group, self.length), beta2
