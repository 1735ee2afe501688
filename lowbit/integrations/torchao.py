"""torchao's quantized tensors (https://github.com/pytorch/ao): plain integers, MX and NVFP4.

    int8 with one scale per row     Int8QuantizedTrainingLinearWeight, which trains there
    int4 and int8 in blocks         IntxUnpackedToInt8Tensor: one code to a byte, any device
    mxfp4, mxfp8                    MXTensor
    nvfp4 (every 1x16 variant)      NVFP4Tensor

Their tensors take the place of `nn.Linear.weight`. Codes lie as ours do: the first value is in the low half of a byte.
torchao's NF4Tensor is none of them: its table is rounded to four digits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..formats import catalogue
from ..formats import format as find_format
from ..packed import Packed
from . import weights

# Where torchao has its classes.
_INT8 = ("torchao.prototype.quantized_training.int8", "Int8QuantizedTrainingLinearWeight")
_INTX = ("torchao.quantization", "IntxUnpackedToInt8Tensor")
_MX = ("torchao.prototype.mx_formats.mx_tensor", "MXTensor")
_NVFP4 = ("torchao.prototype.mx_formats.nvfp4_tensor", "NVFP4Tensor")
_PREFERENCE = ("torchao.quantization.quantize_.common", "KernelPreference")
_WHY = {"NF4Tensor": ": its table is QLoRA's rounded to four digits, which no format here has; dequantize it"}

_FP8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def export_weight(weight: Packed, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A weight as a tensor subclass of torchao, of the outer dtype `dtype`.

    Raises:
        ValueError: torchao has nothing for the format, or wants rows to be whole blocks.
    """
    fmt, (_, cols) = weight.format, weight.shape
    if fmt.kind == "integer" and fmt.signed:
        return _integers(weight, dtype)
    if fmt.block[0] == 1 and fmt.scaling.stored in ("e8m0", "e4m3") and fmt.bits in (4, 8):
        if cols % fmt.block[1]:
            raise ValueError(f"torchao wants rows that are whole blocks of {fmt.block[1]}; these have {cols} values")
        return _mx(weight, dtype) if fmt.scaling.stored == "e8m0" else _nvfp4(weight, dtype)
    raise ValueError(f"torchao has no tensor for format {fmt}; it has those for int8, int4, mxfp4, mxfp8 and nvfp4")


def import_weight(theirs: Any) -> Packed:
    """A tensor of torchao: one of those that `export_weight` makes.

    Raises:
        ValueError: it is none of them, or has zero points, transposed data or swizzled scales.
    """
    kind = type(theirs).__name__
    shape = tuple(theirs.shape)
    if kind == _INT8[1]:
        return _packed_integers(theirs.int_data, theirs.scale.unsqueeze(1), 8, shape[1])
    if kind == _INTX[1]:
        bits = int(str(theirs.target_dtype).removeprefix("torch.int"))
        if theirs.zero_point is not None and bool((theirs.zero_point != 0).any()):
            raise ValueError("this tensor of torchao has zero points, which formats int4 and int8 have not")
        return _packed_integers(theirs.qdata, theirs.scale, bits, theirs.block_size[1])
    if kind in (_MX[1], _NVFP4[1]):
        if theirs.is_swizzled_scales or not theirs.qdata.is_contiguous():
            raise ValueError("this tensor of torchao is transposed or has swizzled scales: import it before")
        parts = {
            "codes": theirs.qdata.view(torch.uint8).clone(),
            "scale": theirs.scale.view(torch.uint8).view(shape[0], -1).clone(),
        }
        if kind == _MX[1]:
            return Packed(_mx_format(theirs), shape, parts)
        one = torch.ones(1, device=theirs.qdata.device)
        level = one if theirs.per_tensor_scale is None else theirs.per_tensor_scale.float().reshape(1)
        return Packed(find_format("nvfp4"), shape, {**parts, "tensor_scale": level.clone()})
    raise ValueError(f"{kind} is no tensor of torchao that can be imported{_WHY.get(kind, '')}")


def export_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """A state dict with torchao's tensors: `load_state_dict(..., assign=True)` of a plain model takes it."""

    def theirs(key: str, layer: nn.Module, weight: Packed) -> Mapping[str, Tensor]:
        return {key: export_weight(weight, layer.weight.dtype)}  # pyright: ignore[reportArgumentType]

    return weights.exported(model, theirs)


def import_state_dict(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict that has tensors of torchao, as ours; all others stay."""
    done: dict[str, Tensor] = {}
    for key, value in state.items():
        if type(value).__module__.startswith("torchao."):
            done.update(weights.imported(key, import_weight(value), value.dtype))
        else:
            done[key] = value
    return done


def _class(where: tuple[str, str]) -> Any:
    module, name = where
    return getattr(weights.library(module), name)


def _integers(weight: Packed, dtype: torch.dtype) -> Tensor:
    fmt, (_, cols) = weight.format, weight.shape
    length = fmt.block[1] or cols
    scale = weights.scales_of(weight)
    if fmt.block[0] != 1 or cols % length:
        raise ValueError(f"torchao wants blocks in rows that are whole blocks, and these are {fmt} of {cols} values")
    if fmt.bits == 8 and scale.shape[1] == 1:
        return _class(_INT8)(weights.integers(weight), scale.squeeze(1))
    target = getattr(torch, f"int{fmt.bits}")
    zero = torch.zeros_like(scale, dtype=torch.int8)
    return _class(_INTX)(weights.integers(weight), scale, zero, target, (1, length), dtype, None)


def _mx(weight: Packed, dtype: torch.dtype) -> Tensor:
    fmt = weight.format
    element = torch.float4_e2m1fn_x2
    if fmt.bits == 8:
        element = next(dtype for name, dtype in _FP8.items() if weights.same_codes(fmt, find_format(name)))
    codes = weight.codes.clone() if fmt.bits == 4 else weight.codes.clone().view(element)
    scale = weight.parts["scale"].clone().view(torch.float8_e8m0fnu)
    return _class(_MX)(codes, scale, element, fmt.block[1], dtype, _class(_PREFERENCE).EMULATED, None, False)


def _nvfp4(weight: Packed, dtype: torch.dtype) -> Tensor:
    scale = weight.parts["scale"].clone().view(torch.float8_e4m3fn)
    return _class(_NVFP4)(
        weight.codes.clone(), scale, weight.format.block[1], dtype, weight.parts["tensor_scale"].reshape(()).clone()
    )


def _mx_format(theirs: Any) -> Any:
    wanted = "e2m1" if theirs.elem_dtype == torch.float4_e2m1fn_x2 else None
    wanted = wanted or next((name for name, dtype in _FP8.items() if dtype == theirs.elem_dtype), "")
    for fmt in catalogue().values():  # the first is the OCP's rule; codes and scales say nothing about the rule
        if fmt.scaling.stored == "e8m0" and wanted and weights.same_codes(fmt, find_format(wanted)):
            return fmt.with_block(theirs.block_size)
    raise ValueError(f"no format has MX scales and elements of {theirs.elem_dtype}")


def _packed_integers(codes: Tensor, scale: Tensor, bits: int, length: int) -> Packed:
    if bits not in (4, 8):
        raise ValueError(f"weights are kept in 4 or 8 bits, not in {bits}")
    fmt, cols = find_format(f"int{bits}"), codes.shape[1]
    fmt = find_format(f"{fmt.name}:row") if length == cols else fmt.with_block(length)
    parts = {"codes": weights.from_integers(codes, bits), "scale": scale.float().contiguous()}
    return Packed(fmt, tuple(codes.shape), parts)
