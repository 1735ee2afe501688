"""What all integrations share: the weights of a model as `Packed`, checkpoints of them, and blocks of other lengths."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from .. import rows
from ..formats import Format
from ..nn import QuantLinear
from ..nn.stored import StoredWeight
from ..nn.stored_state import plain
from ..packed import Packed, quantize
from ..scales import multiplier

SHORTEST = 8  # a block of fewer values is no longer worth the name


def library(module: str) -> Any:
    """Import a module of another library.

    Raises:
        ImportError: it is not installed.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        name = module.partition(".")[0].replace("_", "-")
        raise ImportError(f"this needs {name}: pip install {name}") from error


def packed(layer: nn.Module, name: str = "") -> Packed:
    """The weight of a quantized layer, as its forward pass multiplies with it.

    Of a stored weight the very codes; of a split store those that the forward pass sees. A float master is rounded as
    the recipe's forward operand says.

    Raises:
        TypeError: the layer is not quantized.
        ValueError: no codes hold what the recipe multiplies with (rotated weights, exact outliers, flat groups).
    """
    weight: Any = getattr(layer, "weight", None)
    if isinstance(weight, StoredWeight):
        return Packed(weight.format, tuple(weight.shape), {k: v for k, v in weight.parts.items() if k != "rest"})
    if not isinstance(layer, QuantLinear):
        raise TypeError(f"{name or 'this layer'} is a {type(layer).__name__}, which has no quantized weight")
    operand = layer.recipe.forward[1]
    if operand is None or operand.codes is None or operand.hadamard:
        raise ValueError(
            f"{name or 'this layer'} multiplies with {operand or 'its float weight'}, which no codes hold: use "
            "lowbit.to_dense_, or lowbit.quantize(layer.weight, FORMAT)"
        )
    return quantize(weight.detach(), operand.codes)


def quantized(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of a model that have a quantized weight, by name; a tied one once.

    Raises:
        ValueError: there are none.
    """
    found: dict[str, nn.Module] = {}
    seen = set[int]()
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if (isinstance(module, QuantLinear) or isinstance(weight, StoredWeight)) and id(weight) not in seen:
            found[name] = module
            seen.add(id(weight))
    if not found:
        raise ValueError("no layer of this model is quantized: nothing to export")
    return found


def exported(model: nn.Module, theirs: Callable[[str, nn.Module, Packed], Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """A state dict with `theirs` in place of each quantized weight: called with a key, a layer and its `Packed`."""
    layers = quantized(model)
    state = dict(model.state_dict())
    for name, layer in layers.items():
        key = f"{name}.weight" if name else "weight"
        weight = packed(layer, name)
        for k in [k for k in state if k == key or k.startswith(f"{key}_")]:
            del state[k]
        state.update(theirs(key, layer, weight))
    return state


def imported(key: str, weight: Packed, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The tensors of our state dict that stand for a weight."""
    return plain(StoredWeight(weight.format, weight.parts, weight.shape, dtype), key)


def integers(weight: Packed) -> Tensor:
    """Signed codes of an integer format, int8 [rows, cols]."""
    fmt, (_, cols) = weight.format, weight.shape
    sign = 1 << (fmt.bits - 1)
    return ((rows.unpack(weight.codes, fmt.bits, cols) ^ sign).to(torch.int16) - sign).to(torch.int8)


def from_integers(codes: Tensor, bits: int) -> Tensor:
    """The inverse: packed codes."""
    return rows.pack((codes.to(torch.int16) & ((1 << bits) - 1)).to(torch.uint8), bits)


def scales_of(weight: Packed) -> Tensor:
    """What the codes of each block are multiplied with, fp32 [rows, blocks]."""
    return multiplier(weight.format, weight.parts)


def shorter(blocks: Tensor, cols: int, length: int, wanted: int) -> Tensor:
    """Scales [rows, blocks] of blocks of `length` along rows of `cols` values, as those of blocks of `wanted`."""
    return blocks.repeat_interleave(length // wanted, 1)[:, : -(-cols // wanted)].contiguous()


def flat_block(cols: int, length: int) -> int:
    """The longest block that neither a row of `cols` nor a run of `length` over the flat tensor cuts."""
    return math.gcd(cols, length)


def same_codes(fmt: Format, other: Format) -> bool:
    """Whether two formats differ in blocks and scales alone."""
    return (fmt.kind, fmt.bits, fmt.limit, fmt.table) == (other.kind, other.bits, other.limit, other.table)
