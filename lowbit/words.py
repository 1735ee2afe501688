"""The words a rule may say, and what they mean in torch.

A rule (`lowbit.optim`) is written once, in Python, with these words and the operators + - * / and comparisons. Their
torch meaning below is the reference; other backends must give the same bits. So each word is a fixed sequence of IEEE
operations. Some torch functions are not, measured on a CPU: `torch.sqrt` is off by an ulp for 16 % of values, and
`lerp`, `addcmul` and `scalar / tensor` round differently from the plain formula. That is why `lerp` is spelled out and
`sqrt` goes through float64 (where a root rounded twice is still correctly rounded).
"""

from __future__ import annotations

import torch
from torch import Tensor


def lerp(a: Tensor, b: Tensor | float, weight: Tensor) -> Tensor:
    """From a to b by a share: a + weight * (b - a), or from b back when the weight is 1/2 or more.

    So a weight of 1 gives exactly b, however large a was; torch's own `lerp` does the same, with other roundings.
    """
    apart = b - a
    return torch.where(weight < 0.5, a + weight * apart, b - (1 - weight) * apart)


def sqrt(a: Tensor) -> Tensor:
    """The correctly rounded square root."""
    return a.double().sqrt().float()


def reciprocal(a: Tensor) -> Tensor:
    """1 / a, by one IEEE division."""
    return torch.ones_like(a) / a


def binade(a: Tensor) -> Tensor:
    """The largest power of two that is not above a, for positive a; at least 2**-126.

    >>> binade(torch.tensor([5.0, 1.0, 0.3])).tolist()
    [4.0, 1.0, 0.25]
    """
    return (a.view(torch.int32) & 0x7F800000).view(torch.float32).clamp(min=2.0**-126)


def abs(a: Tensor) -> Tensor:
    """The magnitude: clears the sign bit."""
    return a.abs()


def sign(a: Tensor) -> Tensor:
    """-1, 0 or 1; NaN stays NaN."""
    return torch.where(a > 0, 1.0, torch.where(a < 0, -1.0, a))


def where(condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """a where the condition holds, else b."""
    return torch.where(condition, a, b)


def maximum(a: Tensor, b: Tensor) -> Tensor:
    """The larger; a when neither is larger (so a NaN in a stays, a NaN in b is passed over)."""
    return torch.where(b > a, b, a)


def minimum(a: Tensor, b: Tensor) -> Tensor:
    """The smaller; a when neither is smaller."""
    return torch.where(b < a, b, a)


def clip(a: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """A value held between low and high."""
    return minimum(maximum(a, low), high)
