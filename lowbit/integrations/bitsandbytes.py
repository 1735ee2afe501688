"""bitsandbytes' 4-bit weights: NF4 and FP4, with plain or double-quantized scales (https://arxiv.org/abs/2305.14314).

There, a weight is one flat run of values, two to a byte, the first in the HIGH half; blocks run over it without regard
to rows. Here, rows own their blocks, and the first value is in the low half. Where rows are whole blocks the two differ
in the halves of a byte alone. Elsewhere a block of the longest length that fits both takes their place, if bitsandbytes
has it; its scales then stand there more than once.

Codes, values and double-quantized scales are the same numbers in both; every weight decodes to the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import rows
from ..formats import DOUBLE_BLOCK
from ..formats import format as find_format
from ..nn import QuantLinear, Recipe
from ..nn.stored import StoredWeight
from ..packed import Packed
from . import weights

BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_KINDS = {"nf4": "nf4", "fp4": "bnb-fp4"}  # what bitsandbytes and we call the codes


def export_weight(weight: Packed, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Any]:
    """A weight as bitsandbytes keeps it: uint8 [n / 2, 1] and its `QuantState`.

    Args:
        weight: in format nf4, nf4-dq or bnb-fp4, with any block that fits.
        dtype: that bitsandbytes decodes to.

    Raises:
        ValueError: the format has no counterpart, or rows end where no block of bitsandbytes can.
    """
    make = weights.library("bitsandbytes.functional").QuantState
    kind = _kind(weight)
    (count, cols), length = weight.shape, weight.format.block[1]
    block = length if cols % length == 0 or count == 1 else weights.flat_block(cols, length)
    if block not in BLOCKS:
        raise ValueError(
            f"rows of {cols} values in blocks of {length} have no counterpart: bitsandbytes' blocks run on into the"
            f" next row and have {BLOCKS[0]} to {BLOCKS[-1]} values; quantize_4bit(weight.dequantize()) rounds anew"
        )
    codes = rows.unpack(weight.codes, 4, cols).flatten()
    codes = torch.nn.functional.pad(codes, (0, len(codes) % 2))
    data = ((codes[::2] << 4) | codes[1::2]).unsqueeze(1)
    about: dict[str, Any] = {"code": _table(weight, codes.device), "blocksize": block, "quant_type": kind}
    if "scale_scale" in weight.parts and block == length:
        nested = make(
            absmax=weight.parts["scale_scale"].clone(),
            code=torch.tensor(find_format("dyn8").table, device=codes.device),
            blocksize=DOUBLE_BLOCK,
            dtype=torch.float32,
        )
        offset = weight.parts["scale_offset"].reshape(()).clone()
        absmax = weight.parts["scale"].flatten().clone()
        state = make(absmax, torch.Size(weight.shape), dtype=dtype, offset=offset, state2=nested, **about)
    else:
        absmax = weights.shorter(weights.scales_of(weight), cols, length, block).flatten()
        state = make(absmax, torch.Size(weight.shape), dtype=dtype, **about)
    return data, state


def import_weight(data: Tensor, state: Any) -> Packed:
    """A weight of bitsandbytes: `linear.weight` (or its data) and `linear.weight.quant_state`.

    Raises:
        ValueError: it is no 4-bit weight, or its blocks cross rows at places where no block of ours can end.
    """
    if state is None or state.quant_type not in _KINDS:
        raise ValueError("this is no 4-bit weight of bitsandbytes yet; move its layer to a device, which quantizes it")
    count, cols = state.shape
    plain = data.detach().view(torch.uint8).flatten()
    codes = torch.stack((plain >> 4, plain & 15), 1).flatten()[: count * cols].view(count, cols)
    block = weights.flat_block(cols, state.blocksize)
    if block < weights.SHORTEST and count > 1:
        raise ValueError(
            f"rows of {cols} values in flat blocks of {state.blocksize} have no counterpart here, where rows own their "
            "blocks; dequantize it with bitsandbytes and quantize it anew"
        )
    block = state.blocksize if count == 1 else block
    parts = {"codes": rows.pack(codes, 4)}
    name = _KINDS[state.quant_type]
    nested, own = state.state2, torch.tensor(find_format("dyn8").table)
    if (
        nested is not None
        and (name, nested.blocksize, block) == ("nf4", DOUBLE_BLOCK, state.blocksize)
        and torch.equal(nested.code.cpu(), own)
    ):
        parts["scale"] = state.absmax.view(count, -1).clone()
        parts["scale_scale"], parts["scale_offset"] = nested.absmax.clone(), state.offset.reshape(1).clone()
        return Packed(find_format("nf4-dq").with_block(block), (count, cols), parts)
    absmax = _plain_scales(state)
    first = torch.arange(count * -(-cols // block), device=absmax.device) * block  # of each block, in the flat tensor
    parts["scale"] = absmax[first // state.blocksize].view(count, -1)
    return Packed(find_format(name).with_block(block), (count, cols), parts)


def export_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of a model with bitsandbytes' `Linear4bit` in place of our layers."""

    def theirs(key: str, layer: nn.Module, weight: Packed) -> Mapping[str, Tensor]:
        data, state = export_weight(weight, _dtype(layer))
        return {key: data, **{f"{key}.{name}": part for name, part in state.as_dict(packed=True).items()}}

    return weights.exported(model, theirs)


def import_state_dict(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint of a model with `Linear4bit` layers, as ours; all other tensors stay."""
    quant_state = weights.library("bitsandbytes.functional").QuantState
    marked = [key for key in state if ".quant_state.bitsandbytes__" in key]
    done = dict(state)
    for mark in marked:
        key = mark.partition(".quant_state.")[0]
        about = {k: done.pop(k) for k in [k for k in done if k.startswith(f"{key}.")]}
        data = done.pop(key)
        found = quant_state.from_dict({k.removeprefix(f"{key}."): v for k, v in about.items()}, data.device)
        done.update(weights.imported(key, import_weight(data, found), found.dtype))
    return done


def export_(model: nn.Module) -> nn.Module:
    """Put bitsandbytes' `Linear4bit`, frozen, in place of the quantized linear layers, in place.

    Raises as `export_weight`, before anything has changed.
    """
    bnb = weights.library("bitsandbytes")
    made: dict[str, nn.Module] = {}
    for name, layer in weights.quantized(model).items():
        if not isinstance(layer, nn.Linear):
            continue
        data, state = export_weight(weights.packed(layer, name), _dtype(layer))
        linear = bnb.nn.Linear4bit(
            layer.in_features,
            layer.out_features,
            bias=False,
            compute_dtype=_dtype(layer),
            compress_statistics=state.nested,
            quant_type=state.quant_type,
            device="meta",
        )
        stats = state.as_dict(packed=True)
        linear.weight = bnb.nn.Params4bit.from_prequantized(data, stats, device=str(data.device), module=linear)
        linear.bias = layer.bias
        made[name] = linear
    return _replaced(model, made)


def import_(model: nn.Module) -> nn.Module:
    """Put our layers, with frozen stored weights of the same values, in place of `Linear4bit` ones, in place.

    Set `requires_grad` of a weight to train it; no other copy of it is needed.

    Raises as `import_weight`, before anything has changed; and `ValueError` if there is none.
    """
    bnb = weights.library("bitsandbytes")
    made: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        layer: Any = module
        if isinstance(module, bnb.nn.Linear4bit):
            weight = import_weight(layer.weight, layer.weight.quant_state)
            dtype = layer.weight.quant_state.dtype
            stored = StoredWeight(weight.format, weight.parts, weight.shape, dtype)
            parameter = nn.Parameter(stored, requires_grad=False)
            made[name] = linear_of(parameter, layer.bias, name)
    if not made:
        raise ValueError("no layer of this model is bitsandbytes' Linear4bit")
    return _replaced(model, made)


def linear_of(weight: nn.Parameter, bias: nn.Parameter | None, name: str) -> QuantLinear:
    """A layer around a stored weight that is there already."""
    stored: Any = weight.data
    linear = QuantLinear(
        weight.shape[1], weight.shape[0], bias=False, device="meta", recipe=Recipe(store=stored.store), name=name
    )
    linear.weight, linear.bias = weight, bias  # pyright: ignore[reportAttributeAccessIssue]
    return linear


def _replaced(model: nn.Module, made: Mapping[str, nn.Module]) -> nn.Module:
    if "" in made:
        return made[""]
    for name, module in made.items():
        module.train(model.get_submodule(name).training)
        model.set_submodule(name, module)
    return model


def _kind(weight: Packed) -> str:
    for kind, name in _KINDS.items():
        if len(weight.shape) == 2 and weights.same_codes(weight.format, find_format(name)):
            return kind
    raise ValueError(f"bitsandbytes has no 4-bit weights in format {weight.format}; it has nf4, nf4-dq and bnb-fp4")


def _table(weight: Packed, device: torch.device) -> Tensor:
    return torch.tensor(weight.format.table, dtype=torch.float32, device=device)


def _plain_scales(state: Any) -> Tensor:
    if state.state2 is None:
        return state.absmax.float()
    functional = weights.library("bitsandbytes.functional")
    return functional.dequantize_blockwise(state.absmax, state.state2).float() + state.offset


def _dtype(layer: Any) -> torch.dtype:
    return layer.weight.dtype
