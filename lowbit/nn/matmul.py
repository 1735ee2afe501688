"""Where two operands are multiplied.

On a CPU always in fp32 (float64 for float64 models): matrix units for bf16 and int8 are rare there, and without them
torch's bf16 matmul took 6 times and `torch._int_mm` 26 times as long as fp32 on an EPYC with AVX2 (512 × 1024 × 1024,
one thread, torch 2.13). The result has the dtype that the layer computes in.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from ..compiler import constant


def product(a: Tensor, b: Tensor, dtype: torch.dtype, bias: Tensor | None = None) -> Tensor:
    """a bᵀ + bias of [m, k] and [n, k], in `dtype`."""
    inside = torch.float32 if a.device.type == "cpu" and dtype != torch.float64 else dtype
    with torch.autocast(a.device.type, enabled=False) if has_autocast(a.device.type) else nullcontext():
        return F.linear(a.to(inside), b.to(inside), None if bias is None else bias.to(inside)).to(dtype)


@constant  # compilers before torch 2.13 do not trace the question
def has_autocast(device: str) -> bool:
    """Whether torch has autocast for a kind of device."""
    return torch.amp.is_autocast_available(device)
