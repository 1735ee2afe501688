"""A quantized linear layer as operators of torch, which a compiler leaves as they are.

What a compiler made of the reference would be slow (searches in tables, hashes) and, fused, could round a value to
another code. As operators the layer's forward and backward pass are what they are without a compiler, kernels and bits
included; and the number of a call is a tensor on the CPU, so that new random bits need no new graph.

Importing this module registers them; that happens when a compiler first traces a layer.
"""

from __future__ import annotations

from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from .recipe import Recipe
from .three import Call, as_matrix

_recipes: dict[str, Recipe] = {}
ALIASES = ("x", "weight")  # of what is kept, the arguments themselves: an operator may not return them


def handle(recipe: Recipe) -> str:
    """A name for a recipe, made of what it says: a graph that is cached on disk finds the same one again."""
    name = f"{recipe.name or 'recipe'}-{crc32(repr(recipe).encode()):08x}"
    _recipes[name] = recipe
    return name


def _int(number: Tensor | None) -> int:
    return 0 if number is None else int(number)


@torch.library.custom_op("lowbit::linear_layer", mutates_args=())
def linear_layer(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    recipe: str,
    dtype: torch.dtype,
    number: Tensor | None,
    layer: int,
    needs_x: bool,
    needs_weight: bool,
) -> list[Tensor]:
    """y [rows, outputs] of x [rows, features], and what else is kept for the backward pass."""
    call = Call(_recipes[recipe], dtype, _int(number), layer)
    y, kept = call.forward(x, weight, bias, (needs_x, needs_weight))
    return [y, *(kept[name] for name in call.keeps((needs_x, needs_weight), x.numel() == 0) if name not in ALIASES)]


@linear_layer.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    recipe: str,
    dtype: torch.dtype,
    number: Tensor | None,
    layer: int,
    needs_x: bool,
    needs_weight: bool,
) -> list[Tensor]:
    call = Call(_recipes[recipe], dtype, 0, layer)
    shapes = call.kept_shapes((x.shape[0], x.shape[1]), (needs_x, needs_weight))
    made = [x.new_empty(shape, dtype=dtype) for shape, dtype in shapes.values()]
    return [x.new_empty(x.shape[0], weight.shape[0], dtype=dtype), *made]


@torch.library.custom_op("lowbit::linear_layer_backward", mutates_args=())
def linear_layer_backward(
    gy: Tensor,
    kept: list[Tensor],
    names: str,
    cols: int,
    recipe: str,
    dtype: torch.dtype,
    number: Tensor | None,
    layer: int,
    needs_x: bool,
    needs_weight: bool,
) -> list[Tensor]:
    """The gradients of x and of the weight, those that are needed."""
    call, named = Call(_recipes[recipe], dtype, _int(number), layer), dict(zip(names.split(","), kept, strict=True))
    found = [call.dgrad(gy, named, cols)] if needs_x else []
    found += [call.wgrad(gy, named, cols)] if needs_weight else []
    return [g.contiguous() for g in found]


@linear_layer_backward.register_fake
def _(
    gy: Tensor,
    kept: list[Tensor],
    names: str,
    cols: int,
    recipe: str,
    dtype: torch.dtype,
    number: Tensor | None,
    layer: int,
    needs_x: bool,
    needs_weight: bool,
) -> list[Tensor]:
    shapes = [(gy.shape[0], cols)] * needs_x + [(gy.shape[1], cols)] * needs_weight
    return [gy.new_empty(shape, dtype=dtype) for shape in shapes]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, weight, bias, recipe, dtype, number, layer, needs_x, needs_weight = inputs
    call = Call(_recipes[recipe], dtype, 0, layer)
    names = call.keeps((needs_x, needs_weight), x.numel() == 0)
    made = dict(zip((name for name in names if name not in ALIASES), output[1:], strict=True))
    ctx.save_for_backward(number, *({"x": x, "weight": weight, **made}[name] for name in names))
    ctx.first, ctx.last = (",".join(names), x.shape[1], recipe, dtype), (layer, needs_x, needs_weight)
    ctx.dtypes = x.dtype, weight.dtype, None if bias is None else bias.dtype


def _gradients(ctx: Any, grads: list[Tensor]) -> tuple[Tensor | None, ...]:
    (number, *kept), (_, needs_x, needs_weight) = ctx.saved_tensors, ctx.last
    x_dtype, weight_dtype, bias_dtype = ctx.dtypes
    gy = grads[0].contiguous()
    gx = gw = gb = None
    if needs_x or needs_weight:
        found = linear_layer_backward(gy, kept, *ctx.first, number, *ctx.last)
        gx = found[0].to(x_dtype) if needs_x else None
        gw = found[-1].to(weight_dtype) if needs_weight else None
    if ctx.needs_input_grad[2]:
        gb = gy.sum(0).to(bias_dtype)
    return gx, gw, gb, None, None, None, None, None, None


linear_layer.register_autograd(_gradients, setup_context=_keep)


def apply(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    recipe: str,
    dtype: torch.dtype,
    number: Tensor | None,
    layer: int,
) -> Tensor:
    """The layer in a graph that is being traced; `recipe` is its handle."""
    grad = torch.is_grad_enabled()
    needs = grad and x.requires_grad, grad and weight.requires_grad
    y = torch.ops.lowbit.linear_layer(as_matrix(x), weight, bias, recipe, dtype, number, layer, *needs)[0]
    return y.reshape(*x.shape[:-1], weight.shape[0])
