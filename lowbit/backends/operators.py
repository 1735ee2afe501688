"""Fake quantization by a CUDA kernel as an operator of torch, which a compiler leaves as it is.

Importing this module registers it; that happens when a compiler first traces a layer on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..formats import format as find_format
from . import cuda


@torch.library.custom_op("lowbit::fake", mutates_args=())
def fake(x: Tensor, format: str, noise: Sequence[int], dtype: torch.dtype) -> Tensor:
    """See `backends.fake`; `noise` has two numbers, or none."""
    return cuda.fake(find_format(format), x, (noise[0], noise[1]) if noise else None, dtype=dtype)


@fake.register_fake
def _(x: Tensor, format: str, noise: Sequence[int], dtype: torch.dtype) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)
