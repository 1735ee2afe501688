"""Where the codes of a tensor lie in memory: rows own their blocks.

A tensor is seen as rows, `(shape[0], prod(shape[1:]))`. Blocks run along a row and never cross into the next; the last
block of a row may be short. Codes are one uint8 tensor [rows, ceil(cols * bits / 8)], a little-endian bit stream per
row (element 0 in the low bits), unused bits 0. Scales, and every other part, are [rows, ceil(cols / block)].

Formats that no optimizer state has may have blocks of several rows, or one for all: their scales are
[ceil(rows / height), ceil(cols / width)]. What belongs to the whole tensor (`tensor_scale`) is a vector.

Why rows: a compressed state is then plain tensors that are sharded on dimension 0 exactly like their parameter, so
FSDP2, DCP, `torch.save` and safetensors need no tensor subclass; and rows are the contraction axis of a linear layer.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import codec, scales
from .blocks import matrix, tiles
from .formats import PLAIN, Format
from .layout import row_bytes, row_stride, rows_of
from .rounding import bits16, uniform


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [rows, cols], one per byte, to [rows, ceil(cols * bits / 8)].

    >>> pack(torch.tensor([[1, 2, 3]], dtype=torch.uint8), 4).tolist()
    [[33, 3]]
    """
    if bits == 8:
        return codes.contiguous()
    if 8 % bits:
        return _pack_across(codes, bits)
    per_byte = 8 // bits
    lanes = F.pad(codes, (0, -codes.shape[1] % per_byte)).unflatten(1, (-1, per_byte))
    packed = lanes[..., 0].clone()
    for lane in range(1, per_byte):
        packed |= lanes[..., lane] << (bits * lane)
    return packed


def unpack(packed: Tensor, bits: int, cols: int) -> Tensor:
    """The inverse of `pack`: [rows, cols] codes, one per byte."""
    if bits == 8:
        return packed
    if 8 % bits:
        return _unpack_across(packed, bits, cols)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    lanes = (packed.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
    return lanes.flatten(1)[:, :cols]


def _pack_across(codes: Tensor, bits: int) -> Tensor:
    """`pack` where codes lie across bytes: 8 codes are one number of `bits` bytes."""
    places = torch.arange(8, dtype=torch.int64, device=codes.device)
    lanes = F.pad(codes, (0, -codes.shape[1] % 8)).unflatten(1, (-1, 8)).long()
    words = (lanes << (bits * places)).sum(-1, keepdim=True)
    packed = (words >> (8 * places[:bits])) & 0xFF
    return packed.to(torch.uint8).flatten(1)[:, : row_bytes(codes.shape[1], bits)].contiguous()


def _unpack_across(packed: Tensor, bits: int, cols: int) -> Tensor:
    places = torch.arange(8, dtype=torch.int64, device=packed.device)
    lanes = F.pad(packed, (0, -packed.shape[1] % bits)).unflatten(1, (-1, bits)).long()
    words = (lanes << (8 * places[:bits])).sum(-1, keepdim=True)
    codes = (words >> (bits * places)) & ((1 << bits) - 1)
    return codes.to(torch.uint8).flatten(1)[:, :cols]


def part_shapes(fmt: Format, shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each part of a tensor of this shape; float formats keep the tensor's own shape."""
    if not fmt.compressed:
        assert fmt.dtype is not None
        return {"codes": (tuple(shape), fmt.dtype)}
    rows, cols = rows_of(shape)
    return {
        "codes": ((rows, row_bytes(cols, fmt.bits)), torch.uint8),
        **scales.shapes(fmt, rows, cols),
    }


def zeros(fmt: Format, shape: tuple[int, ...], device: torch.device) -> dict[str, Tensor]:
    """The parts of a tensor of zeros (a scale of 0 decodes every code to 0). For plain formats."""
    return {part: torch.zeros(s, dtype=d, device=device) for part, (s, d) in part_shapes(fmt, shape).items()}


class Measured(scales.Tiles):
    """A matrix in torch of which scales are made, and codes with those."""

    def codes(self, found: scales.Scales) -> Tensor:
        codes = codec.nearby(self.fmt, self.inside.flatten(2), found.inverse)
        return pack(matrix(codes.view(self.inside.shape), *self.shape), self.fmt.bits)


def encode_rows(
    fmt: Format, x: Tensor, noise: tuple[int, int] | None = None, *, live: bool = False
) -> dict[str, Tensor]:
    """A float matrix [rows, cols] to packed parts; `noise` is the key of stochastic rounding."""
    if x.is_meta:  # there are shapes, and nothing to compute
        return {part: x.new_empty(shape, dtype=dtype) for part, (shape, dtype) in part_shapes(fmt, x.shape).items()}
    bits = None if noise is None else row_bits(noise, x)
    if not fmt.compressed:
        return codec.encode(fmt, x.to(torch.float32, copy=True).contiguous(), bits=bits, live=live)
    shape = scales.block_of(fmt, *x.shape)
    inside = tiles(x.float().contiguous(), shape)
    draws = None if bits is None else tiles(uniform(bits), shape).flatten(2)
    if fmt.scaling == PLAIN:
        parts = codec.encode(fmt, inside.flatten(2), draws, live=live)
    else:
        found = scales.best(fmt, scales.Tiles(fmt, x))
        parts = {"codes": codec.nearby(fmt, inside.flatten(2), found.inverse, draws), **found.parts}
    codes = matrix(parts["codes"].view(inside.shape), *x.shape)
    parts["codes"] = pack(codes, fmt.bits)
    return parts


def decode_rows(fmt: Format, parts: dict[str, Tensor], cols: int) -> Tensor:
    """The inverse of `encode_rows`: fp32 [rows, cols]."""
    codes = parts["codes"]
    if codes.is_meta:
        return codes.new_empty((codes.shape[0], cols), dtype=torch.float32)
    if not fmt.compressed:
        return codes.to(torch.float32, copy=True).reshape(codes.numel() // cols if cols else codes.shape[0], cols)
    rows = codes.shape[0]
    inside = tiles(unpack(codes, fmt.bits, cols), scales.block_of(fmt, rows, cols))
    if fmt.scaling == PLAIN:
        values = codec.decode(fmt, {**parts, "codes": inside.flatten(2)})
    else:
        values = codec.values(fmt, inside.flatten(2), scales.multiplier(fmt, parts))
    return matrix(values.view(inside.shape), rows, cols).contiguous()


def row_bits(noise: tuple[int, int], x: Tensor, first: int = 0) -> Tensor:
    """16 random bits for each value of a matrix, by its element index; `first` is the number of its first row."""
    rows, cols = x.shape
    stride = row_stride(cols)
    return bits16(noise, first * stride, rows * stride, x.device).view(rows, stride)[:, :cols]
