"""A quantized linear layer as operators of torch, which a compiler leaves as they are.

What a compiler made of the reference would be slow (searches in tables, hashes) and, fused, could round a value to
another code. As operators the layer's forward and backward pass are what they are without a compiler, kernels and bits
included; and the numbers of a call and of its layer are a tensor on the CPU, so that new random bits need no new graph,
and blocks that are compiled one by one share theirs.

To a compiler a stored weight is its parts (`StoredWeight.__tensor_flatten__`). The operators take those as they are, so
that codes, and no dense weight, are what a graph keeps for the backward pass, and no table becomes a part of it.

Importing this module registers them; that happens when a compiler first traces a layer.
"""

from __future__ import annotations

from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from .. import stored
from .recipe import Recipe
from .stored import StoredWeight
from .stored_ops import LIST_RULES, dense_call
from .three import Call, as_matrix

_recipes: dict[str, Recipe] = {}
_PART = "weight."  # before the names of a stored weight's parts
ALIASES = ("x", "weight")  # of what is kept, the arguments themselves: an operator may not return them


def handle(recipe: Recipe) -> str:
    """A name for a recipe, made of what it says: a graph that is cached on disk finds the same one again."""
    name = f"{recipe.name or 'recipe'}-{crc32(repr(recipe).encode()):08x}"
    _recipes[name] = recipe
    return name


def _call(recipe: str, dtype: torch.dtype, number: Tensor | None) -> Call:
    return Call(_recipes[recipe], dtype, *(0, 0) if number is None else map(int, number))


def _layer(x: Tensor, weight: Tensor, bias: Tensor | None, call: Call, needs: tuple[bool, bool]) -> list[Tensor]:
    y, kept = call.forward(x, weight, bias, needs)
    return [y, *(kept[name] for name in call.keeps(needs, x.numel() == 0) if name not in ALIASES)]


@torch.library.custom_op("lowbit::linear_layer", mutates_args=())
def linear_layer(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    recipe: str,
    dtype: torch.dtype,
    number: Tensor | None,
    needs_x: bool,
    needs_weight: bool,
) -> list[Tensor]:
    """y [rows, outputs] of x [rows, features], and what else is kept for the backward pass."""
    return _layer(x, weight, bias, _call(recipe, dtype, number), (needs_x, needs_weight))


@linear_layer.register_fake
def _shapes(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    recipe: str,
    dtype: torch.dtype,
    number: Tensor | None,
    needs_x: bool,
    needs_weight: bool,
) -> list[Tensor]:
    call = _call(recipe, dtype, None)
    shapes = call.kept_shapes((x.shape[0], x.shape[1]), (needs_x, needs_weight))
    made = [x.new_empty(shape, dtype=dtype) for shape, dtype in shapes.values()]
    return [x.new_empty(x.shape[0], weight.shape[0], dtype=dtype), *made]


@torch.library.custom_op("lowbit::stored_linear_layer", mutates_args=())
def stored_linear_layer(
    x: Tensor,
    parts: list[Tensor],
    names: str,
    tag: int,
    bias: Tensor | None,
    recipe: str,
    dtype: torch.dtype,
    number: Tensor | None,
    needs_x: bool,
    needs_weight: bool,
) -> list[Tensor]:
    """`linear_layer` of a weight that is stored in the format of this tag, whose parts have these names."""
    weight = _whole(dict(zip(names.split(","), parts, strict=True)), tag, x.shape[1])
    return _layer(x, weight, bias, _call(recipe, dtype, number), (needs_x, needs_weight))


@stored_linear_layer.register_fake
def _(
    x: Tensor,
    parts: list[Tensor],
    names: str,
    tag: int,
    bias: Tensor | None,
    recipe: str,
    dtype: torch.dtype,
    number: Tensor | None,
    needs_x: bool,
    needs_weight: bool,
) -> list[Tensor]:
    codes = parts[names.split(",").index("codes")]  # one row for each output
    return _shapes(x, codes, bias, recipe, dtype, number, needs_x, needs_weight)


@torch.library.custom_op("lowbit::linear_layer_backward", mutates_args=())
def linear_layer_backward(
    gy: Tensor,
    kept: list[Tensor],
    names: str,
    tag: int,
    cols: int,
    recipe: str,
    dtype: torch.dtype,
    number: Tensor | None,
    needs_x: bool,
    needs_weight: bool,
) -> list[Tensor]:
    """The gradients of x and of the weight, those that are needed; `tag` is the format's of a stored weight, or 0."""
    call, named = _call(recipe, dtype, number), dict(zip(names.split(","), kept, strict=True))
    if tag:
        parts = {name.removeprefix(_PART): named.pop(name) for name in list(named) if name.startswith(_PART)}
        named["weight"] = _whole(parts, tag, cols)
    found = [call.dgrad(gy, named, cols)] if needs_x else []
    found += [call.wgrad(gy, named, cols)] if needs_weight else []
    return [g.contiguous() for g in found]


@linear_layer_backward.register_fake
def _(
    gy: Tensor,
    kept: list[Tensor],
    names: str,
    tag: int,
    cols: int,
    recipe: str,
    dtype: torch.dtype,
    number: Tensor | None,
    needs_x: bool,
    needs_weight: bool,
) -> list[Tensor]:
    shapes = [(gy.shape[0], cols)] * needs_x + [(gy.shape[1], cols)] * needs_weight
    return [gy.new_empty(shape, dtype=dtype) for shape in shapes]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, weight, bias, recipe, dtype, number, needs_x, needs_weight = inputs
    call = _call(recipe, dtype, None)
    names = call.keeps((needs_x, needs_weight), x.numel() == 0)
    made = dict(zip((name for name in names if name not in ALIASES), output[1:], strict=True))
    ctx.save_for_backward(number, *({"x": x, "weight": weight, **made}[name] for name in names))
    ctx.first, ctx.last = (",".join(names), 0, x.shape[1], recipe, dtype), (needs_x, needs_weight)
    ctx.dtypes = x.dtype, weight.dtype, None if bias is None else bias.dtype


def _gradients(ctx: Any, grads: list[Tensor]) -> tuple[Tensor | None, ...]:
    (number, *kept), (needs_x, needs_weight) = ctx.saved_tensors, ctx.last
    x_dtype, weight_dtype, bias_dtype = ctx.dtypes
    gy = grads[0].contiguous()
    gx = gw = gb = None
    if needs_x or needs_weight:
        found = linear_layer_backward(gy, kept, *ctx.first, number, *ctx.last)
        gx = found[0].to(x_dtype) if needs_x else None
        gw = found[-1].to(weight_dtype) if needs_weight else None
    if ctx.needs_input_grad[2]:
        gb = gy.sum(0).to(bias_dtype)
    return gx, gw, gb, None, None, None, None, None


linear_layer.register_autograd(_gradients, setup_context=_keep)


def _whole(parts: dict[str, Tensor], tag: int, cols: int) -> StoredWeight:
    """The stored weight that has these parts."""
    store = stored.store_of(tag, "rest" in parts)
    assert store is not None
    return StoredWeight(store.format, parts, (len(parts["codes"]), cols))


def _stored_layer(func: Any, args: Any, kwargs: Any) -> Any:
    x, weight, *others = args
    if not isinstance(weight, StoredWeight):
        return dense_call(func, args, kwargs)
    names, parts = zip(*weight.parts.items(), strict=True)
    return stored_linear_layer(x, list(parts), ",".join(names), weight.format.tag, *others, **kwargs)


def _stored_layer_backward(func: Any, args: Any, kwargs: Any) -> Any:
    gy, kept, names, _, *others = args
    named = dict(zip(names.split(","), kept, strict=True))
    weight = named.pop("weight", None)
    if not isinstance(weight, StoredWeight):
        return dense_call(func, args, kwargs)
    named |= {_PART + part: tensor for part, tensor in weight.parts.items()}
    return func(gy, list(named.values()), ",".join(named), weight.format.tag, *others, **kwargs)


LIST_RULES.update({"lowbit::linear_layer": _stored_layer, "lowbit::linear_layer_backward": _stored_layer_backward})


def apply(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    recipe: str,
    dtype: torch.dtype,
    number: Tensor | None,
) -> Tensor:
    """The layer in a graph that is being traced; `recipe` is its handle."""
    grad = torch.is_grad_enabled()
    needs = grad and x.requires_grad, grad and weight.requires_grad
    y = torch.ops.lowbit.linear_layer(as_matrix(x), weight, bias, recipe, dtype, number, *needs)[0]
    return y.reshape(*x.shape[:-1], weight.shape[0])
