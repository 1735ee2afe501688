"""The products of linear.py as operators of torch, so that torch.compile(fullgraph=True) and autograd know them.

Importing this module registers them; linear.py imports it when the first product is asked for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .linear import check, known, multiply


@torch.library.custom_op("lowbit::linear", mutates_args=())
def linear(x: Tensor, codes: Tensor, scale: Tensor | None, extra: Tensor | None, format: str, k: int) -> Tensor:
    """X Wᵀ."""
    check("linear", x, codes, scale, known(format), k, False)
    assert scale is not None
    return multiply(x, codes, scale, extra, known(format), k, False)


@torch.library.custom_op("lowbit::linear_transposed", mutates_args=())
def linear_transposed(
    dy: Tensor, codes: Tensor, scale: Tensor | None, extra: Tensor | None, format: str, k: int
) -> Tensor:
    """Dy W."""
    check("linear_transposed", dy, codes, scale, known(format), k, True)
    assert scale is not None
    return multiply(dy, codes, scale, extra, known(format), k, True)


@linear.register_fake
def _(x: Tensor, codes: Tensor, scale: Tensor | None, extra: Tensor | None, format: str, k: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], check("linear", x, codes, scale, known(format), k, False)))


@linear_transposed.register_fake
def _(dy: Tensor, codes: Tensor, scale: Tensor | None, extra: Tensor | None, format: str, k: int) -> Tensor:
    return dy.new_empty((*dy.shape[:-1], check("linear_transposed", dy, codes, scale, known(format), k, True)))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, codes, scale, extra, *ctx.rest = inputs
    ctx.save_for_backward(codes, scale, extra)


def _derive(other: Any) -> Any:
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return other(dy, *ctx.saved_tensors, *ctx.rest), None, None, None, None, None

    return backward


# The weight is codes: it has no gradient here.
linear.register_autograd(_derive(linear_transposed), setup_context=_save)
linear_transposed.register_autograd(_derive(linear), setup_context=_save)
