"""The quantizers of the Stable-SPAM release, bit for bit in fp32.

https://arxiv.org/abs/2502.17055v2, code of March 2025. They are here to compare with, not to recommend.
Written from their formulas, they do what the released code does, which is not always what the paper's names suggest:

- Groups are 256 values of the *flattened* tensor, so they cross rows where the width is no multiple of 256. The release
  refuses tensors that 256 does not divide; here the last group is simply shorter.
- "FP4 E1M2" has 9 uniform levels, alpha * {0, 1/4, 1/2, 3/4, 1} with both signs, where a 4-bit code has 15: the
  exponent bias does not fit and wastes the others. The two largest magnitudes of each group stay exact.
- INT4 weights are asymmetric, and their range need not hold 0 while the zero point is clamped: a group of one sign
  saturates (values in [5, 5.78] all become 0.78). INT4 activations are symmetric, two outliers a group stay exact.
- The release adds `q + w - w` in bf16 for its straight-through gradient, so a third of its weights leave the grid. That
  is an accident of bf16 and is not reproduced; neither is it in fp32.

The order of operations matters to the last bit, and follows the code where a formula leaves it open (INT4 activations
are multiplied by `7 * (1 / scale)`, not divided). Divisions are tensor by tensor, which is IEEE on every device.
Each function takes groups `[..., n]` in fp32, outliers already removed, and returns the values to use in their place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

GROUP = 256


def fp4(x: Tensor) -> Tensor:
    """(alpha / 4) * round(4 x / alpha), alpha the largest magnitude, at least 1e-6."""
    step = x.abs().amax(-1, keepdim=True).clamp(min=1e-6) * 0.25
    return (x / step).round_().mul_(step)


def int4_activation(x: Tensor) -> Tensor:
    """Symmetric -7..7 of the largest magnitude, at least 1e-6."""
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-6)
    codes = (x * (torch.ones_like(scale) / scale * 7)).round_().clamp_(-8, 7)
    return codes.mul_(scale).div_(torch.full_like(scale, 7))


def int4_weight_codes(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Asymmetric 0..15 between the least and the largest value: (codes, scale, zero), as floats."""
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    scale = (high - low).clamp(min=1e-5) / torch.full_like(low, 15)
    zero = (-(low / scale).round()).clamp(0, 15)
    codes = ((x / scale).round_() + zero).clamp_(0, 15)
    return codes, scale, zero


def int4_weight(x: Tensor) -> Tensor:
    """The values of `int4_weight_codes`: (codes - zero) * scale."""
    codes, scale, zero = int4_weight_codes(x)
    return (codes - zero).mul_(scale)


class Released(NamedTuple):
    """One released quantizer: its formula, and how many of the largest magnitudes of a group it leaves alone."""

    values: Callable[[Tensor], Tensor]
    outliers: int


RELEASED = {
    "stablespam-fp4": Released(fp4, 2),
    "stablespam-int4-weight": Released(int4_weight, 0),
    "stablespam-int4-activation": Released(int4_activation, 2),
}
