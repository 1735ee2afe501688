"""Paired statistics. Runs of one seed share initial weights and batches, so differences are taken seed by seed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import mean, stdev

# Student's t, 97.5 %, for 1 … 30 degrees of freedom (any textbook's table); beyond that the normal value will do.
_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


def t_quantile(df: int) -> float:
    """The 97.5 % point of Student's t with `df` degrees of freedom."""
    if df < 1:
        raise ValueError(f"degrees of freedom must be at least 1, not {df}")
    return _T[df - 1] if df <= len(_T) else 1.96


@dataclass(frozen=True)
class Difference:
    """A mean of paired differences; negative means the first of the two is lower, which for a loss is better."""

    mean: float
    low: float | None
    high: float | None
    n: int
    better: int

    @property
    def verdict(self) -> str:
        """What may be said about it."""
        if self.low is None or self.high is None:
            return "one seed: no interval"
        if self.low <= 0 <= self.high:
            return "not significant"
        return "better" if self.high < 0 else "worse"

    def describe(self) -> dict:
        """As plain data."""
        return {**asdict(self), "verdict": self.verdict}


def paired(first: Mapping[int, float], second: Mapping[int, float]) -> Difference | None:
    """First minus second over the seeds that both have, with its 95 % t-interval; None without a common seed."""
    seeds = sorted(first.keys() & second.keys())
    if not seeds:
        return None
    differences = [first[s] - second[s] for s in seeds]
    centre, better = mean(differences), sum(d < 0 for d in differences)
    if len(differences) == 1:
        return Difference(centre, None, None, 1, better)
    half = t_quantile(len(differences) - 1) * stdev(differences) / math.sqrt(len(differences))
    return Difference(centre, centre - half, centre + half, len(differences), better)


def steps_to(curve: Sequence[Sequence[float | None]], target: float) -> int | None:
    """The first evaluated step at which the validation loss is at or below the target; None if it never is."""
    return next((int(step or 0) for step, value in curve if value is not None and value <= target), None)


def spread(values: Sequence[float]) -> float | None:
    """Sample standard deviation, if there is one."""
    return stdev(values) if len(values) > 1 else None
