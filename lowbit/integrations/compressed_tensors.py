"""Checkpoints of compressed-tensors (https://github.com/vllm-project/compressed-tensors), which vLLM and others read.

    pack-quantized          int4 and int8 in blocks or rows: int32 words with the first code in the low bits, offset
                            by half of the range; scales of any float dtype
    nvfp4-pack-quantized    E2M1 codes as here, E4M3 scales, and one number that scales are divided by: the reciprocal
                            of our `tensor_scale`
    mxfp4-pack-quantized    E2M1 codes and E8M0 scales, as here

Codes and block scales are the same numbers. So are decoded weights, but for nvfp4: there 1 / (1 / tensor_scale) may be
off by an ulp of fp32.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import rows
from ..formats import Format
from ..formats import format as find_format
from ..packed import Packed
from . import weights

PARTS = ("weight_packed", "weight_scale", "weight_shape", "weight_global_scale")


def export_weight(weight: Packed) -> dict[str, Tensor]:
    """The tensors of one weight: `weight_packed`, `weight_scale` and others.

    Raises:
        ValueError: there is no layout for the format, or for rows that are not whole blocks.
    """
    kind, cols = layout(weight.format), weight.shape[1]
    block = weight.format.block[1] or cols
    if cols % block:
        raise ValueError(f"compressed-tensors wants rows that are whole blocks of {block}; these have {cols} values")
    if kind == "pack-quantized":
        codes = weights.integers(weight).to(torch.int16) + (1 << (weight.format.bits - 1))
        return {
            "weight_packed": _words(rows.pack(codes.to(torch.uint8), weight.format.bits)),
            "weight_scale": weights.scales_of(weight).clone(),
            "weight_shape": torch.tensor(weight.shape),
        }
    scale = weight.parts["scale"].clone()
    if kind == "mxfp4-pack-quantized":
        return {"weight_packed": weight.codes.clone(), "weight_scale": scale}
    return {
        "weight_packed": weight.codes.clone(),
        "weight_scale": scale.view(torch.float8_e4m3fn),
        "weight_global_scale": weight.parts["tensor_scale"].reciprocal(),
    }


def import_weight(tensors: Mapping[str, Tensor]) -> Packed:
    """The inverse; which layout it is, is seen by the tensors.

    Raises:
        ValueError: a tensor is missing, or has a dtype or shape that none of the layouts has; or there are zero points.
    """
    if "weight_zero_point" in tensors:
        raise ValueError("these weights have zero points, which formats int4 and int8 have not")
    for part in ("weight_packed", "weight_scale"):
        if part not in tensors:
            raise ValueError(f"{part} is missing")
    codes, scale = tensors["weight_packed"], tensors["weight_scale"]
    if codes.dtype == torch.int32:
        return _integers(codes, scale, tensors)
    if codes.dtype != torch.uint8:
        raise ValueError(f"weight_packed is {codes.dtype}; it must be int32 or uint8")
    shape = codes.shape[0], 2 * codes.shape[1]
    parts = {"codes": codes.clone(), "scale": scale.view(torch.uint8).clone()}
    block = shape[1] // scale.shape[1]
    if "weight_global_scale" in tensors:
        parts["tensor_scale"] = tensors["weight_global_scale"].float().reshape(1).reciprocal()
        return Packed(find_format("nvfp4").with_block(block), shape, parts)
    return Packed(find_format("mxfp4").with_block(block), shape, parts)


def export_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of a model as compressed-tensors has it; `config` says what it is."""

    def theirs(key: str, layer: nn.Module, weight: Packed) -> Mapping[str, Tensor]:
        return {key.removesuffix("weight") + part: tensor for part, tensor in export_weight(weight).items()}

    return weights.exported(model, theirs)


def import_state_dict(state: Mapping[str, Tensor], dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """A checkpoint of compressed-tensors as ours; all other tensors stay. `dtype` is the stored weights' outer one."""
    done = dict(state)
    for key in [key for key in state if key.endswith("weight_packed")]:
        prefix = key.removesuffix("weight_packed")
        its = {k: done.pop(prefix + k) for k in (*PARTS, "weight_zero_point") if prefix + k in done}
        done.update(weights.imported(f"{prefix}weight", import_weight(its), dtype))
    return done


def config(model: nn.Module) -> dict[str, Any]:
    """What goes into `config.json` as `quantization_config` beside `export_state_dict`.

    Raises:
        ValueError: layers are stored in several formats, which one group cannot say.
    """
    layers = weights.quantized(model)
    formats = {weights.packed(layer, name).format for name, layer in layers.items()}
    if len(formats) > 1:
        raise ValueError(f"layers are stored in several formats: {', '.join(sorted(map(str, formats)))}")
    fmt = formats.pop()
    kind, block = layout(fmt), fmt.block[1]
    how: dict[str, Any] = {"num_bits": fmt.bits, "type": "int" if kind == "pack-quantized" else "float"}
    how |= {"symmetric": True, "strategy": "group" if block else "channel", "dynamic": False}
    how |= {"group_size": block} if block else {}
    if kind == "nvfp4-pack-quantized":
        how |= {"strategy": "tensor_group", "scale_dtype": "torch.float8_e4m3fn"}
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return {
        "quant_method": "compressed-tensors",
        "format": kind,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": how, "format": kind}},
        "ignore": sorted(linear - layers.keys()),
    }


def save_pretrained(model: Any, folder: str | Path) -> None:
    """Write a Hugging Face model with quantized layers as `from_pretrained` of transformers, and vLLM, read it.

    `config.json`, with `quantization_config`, and `model.safetensors`; the tokenizer is yours to add.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    state = export_state_dict(model)
    tied = getattr(model, "all_tied_weights_keys", {}) if model.config.tie_word_embeddings else {}
    told = {**model.config.to_dict(), "quantization_config": config(model)}
    folder.mkdir(parents=True, exist_ok=True)
    kept = {k: v.contiguous().clone() for k, v in state.items() if k not in tied}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    told["architectures"] = [type(model).__name__]
    (folder / "config.json").write_text(json.dumps(told, indent=2, default=str) + "\n", encoding="utf-8")


def layout(fmt: Format) -> str:
    """What compressed-tensors calls the layout of a format.

    Raises:
        ValueError: there is none.
    """
    if fmt.kind == "integer" and fmt.signed and fmt.bits in (4, 8) and fmt.block[0] == 1:
        return "pack-quantized"
    if weights.same_codes(fmt, find_format("e2m1")) and fmt.block == (1, 32) and fmt.scaling.stored == "e8m0":
        return "mxfp4-pack-quantized"
    if weights.same_codes(fmt, find_format("e2m1")) and fmt.block == (1, 16) and fmt.scaling.stored == "e4m3":
        return "nvfp4-pack-quantized"
    raise ValueError(f"compressed-tensors has no layout for format {fmt}; it has those of int4, int8, mxfp4 and nvfp4")


def _words(packed: Tensor) -> Tensor:
    """uint8 [rows, bytes] as int32 [rows, words], little-endian."""
    return torch.nn.functional.pad(packed, (0, -packed.shape[1] % 4)).contiguous().view(torch.int32)


def _integers(words: Tensor, scale: Tensor, tensors: Mapping[str, Tensor]) -> Packed:
    if "weight_shape" not in tensors:
        raise ValueError("weight_shape is missing")
    count, cols = (int(n) for n in tensors["weight_shape"])
    bits = next((b for b in (4, 8) if -(-cols * b // 32) == words.shape[1]), 0)
    if not bits or words.shape[0] != count or not scale.is_floating_point() or scale.dim() != 2:
        raise ValueError(f"weight_packed is {tuple(words.shape)}, which 4 or 8 bits of {count} x {cols} values are not")
    half = 1 << (bits - 1)
    codes = rows.unpack(words.contiguous().view(torch.uint8), bits, cols).to(torch.int16) - half
    block = cols // scale.shape[1]
    name = f"int{bits}:row" if block == cols else f"int{bits}:{block}"
    parts = {"codes": weights.from_integers(codes, bits), "scale": scale.float().contiguous()}
    return Packed(find_format(name), (count, cols), parts)
