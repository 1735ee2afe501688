"""The scale of a block: from what is measured of it to what is stored, and to what kernels multiply by.

`Scaling` (in `formats`) says which rule a format has; here is its arithmetic, once, for every backend: plain IEEE
operations on small tensors with one number per block, on any device. Whatever the rule, a kernel needs three things:

    statistic   one fp32 number per block, of the values alone
    inverse     fp32, to encode: u = x * inverse, rounded to the format's grid and held inside it
    multiplier  fp32, to decode: value * multiplier

A block with a non-finite value has a NaN statistic, and decodes to NaN.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Literal, Protocol

import torch
from torch import Tensor

from . import codec
from .blocks import counts, halve, matrix, tiles, total
from .compiler import constant
from .formats import DOUBLE_BLOCK, TINY, Format, Rounding, Stored
from .formats import format as find_format
from .words import binade, reciprocal, sqrt

HUGE = 3.4028234663852886e38
E8M0_NAN, E4M3_NAN = 255, 0x7F
# Choi et al. 2018, https://arxiv.org/abs/1807.06964; the coefficients are those of IBM's fms-model-optimizer for the
# 15 levels -a, -6/7 a … a.
SAWB = (12.035, 12.03)


@dataclass(frozen=True)
class Scales:
    """What encoding and decoding multiply by, fp32 [block rows, block columns], and the parts that are stored."""

    inverse: Tensor
    multiplier: Tensor
    parts: dict[str, Tensor]


def shapes(fmt: Format, rows: int, cols: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each part beside the codes of a matrix."""
    blocks = grid(fmt, rows, cols)
    stored = {"fp32": torch.float32, "bf16": torch.bfloat16}.get(fmt.scaling.stored, torch.uint8)
    known = {
        "scale": (blocks, stored),
        "base": (blocks, torch.float32),
        "zero": (blocks, torch.uint8),
        "tensor_scale": ((blocks[0], -(-cols // fmt.scaling.outer)) if fmt.scaling.outer else (1,), torch.float32),
        "scale_scale": ((-(-math.prod(blocks) // DOUBLE_BLOCK),), torch.float32),
        "scale_offset": ((1,), torch.float32),
    }
    return {part: known[part] for part in fmt.parts if part != "codes"}


def block_of(fmt: Format, rows: int, cols: int) -> tuple[int, int]:
    """The (rows, columns) of a block of a matrix, at least 1: 0 in a format stands for all."""
    return max(1, fmt.block[0] or rows), max(1, fmt.block[1] or cols)


def grid(fmt: Format, rows: int, cols: int) -> tuple[int, int]:
    """How many blocks a matrix has, down and across."""
    height, width = block_of(fmt, rows, cols)
    return -(-rows // height), -(-cols // width)


class Measured(Protocol):
    """A matrix of which a backend can tell, block by block, what scales are made from."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows, columns."""
        ...

    def absmax(self) -> Tensor:
        """The largest magnitudes, fp32 [block rows, block columns]; not finite where a value is not."""
        ...

    def total(self, of: Literal["squares", "magnitudes"], inverse: Tensor) -> Tensor:
        """`blocks.total` of the squares, or of the magnitudes, of values times one number per block."""
        ...

    def losses(self, found: Scales) -> Tensor:
        """`blocks.total` of the squares of what rounding to nearest loses, with these scales."""
        ...

    def products(self, inverse: Tensor) -> Tensor:
        """`blocks.total` of values in units of their scales, times what they are rounded to."""
        ...

    def units(self, inverse: Tensor) -> Tensor:
        """Values in units of their scales, fp32 [rows, columns]; NaN, of a block that is not finite, is 0."""
        ...


class Coded(Measured, Protocol):
    """A matrix that can be measured, and encoded with scales that are given."""

    def codes(self, found: Scales) -> Tensor:
        """The part `codes`, to nearest with these scales."""
        ...


class Tiles:
    """A matrix in torch that can be measured."""

    def __init__(self, fmt: Format, x: Tensor):
        self.fmt, self.shape = fmt, (x.shape[0], x.shape[1])
        self.inside = tiles(x.float(), block_of(fmt, *self.shape))

    def absmax(self) -> Tensor:
        return self.inside.abs().flatten(2).amax(-1)

    def total(self, of: Literal["squares", "magnitudes"], inverse: Tensor) -> Tensor:
        scaled = self.inside * inverse[..., None, None]
        return total(scaled * scaled if of == "squares" else scaled.abs())

    def products(self, inverse: Tensor) -> Tensor:
        rounded = codec.values(self.fmt, self._nearby(inverse), torch.ones_like(inverse)).view(self.inside.shape)
        return total(self.inside * inverse[..., None, None] * rounded)

    def units(self, inverse: Tensor) -> Tensor:
        return matrix((self.inside * inverse[..., None, None]).nan_to_num(0.0), *self.shape)

    def _nearby(self, inverse: Tensor) -> Tensor:
        return codec.nearby(self.fmt, self.inside.flatten(2), inverse)

    def losses(self, found: Scales) -> Tensor:
        codes = self._nearby(found.inverse)
        apart = codec.values(self.fmt, codes, found.multiplier).view(self.inside.shape) - self.inside
        return total(apart * apart)


def statistic(fmt: Format, x: Measured) -> Tensor:
    """What the scale of each block of a matrix is made from: fp32 [block rows, block columns], >= 0.

    A sum over a block is that of `blocks.total`; a mean divides it in float64 and is then rounded to fp32. Values are
    squared in units of a power of two, absmax's binade, so that no square overflows.
    """
    absmax = x.absmax()
    kind = fmt.scaling.statistic
    if kind == "absmax":
        return torch.where(torch.isfinite(absmax), absmax, torch.nan)
    count = counts(*x.shape, block_of(fmt, *x.shape), absmax.device)
    unit = torch.where(absmax > 0, binade(absmax), 1.0)
    inverse = reciprocal(unit)
    root = sqrt((x.total("squares", inverse) / count).float()) if kind != "absmean" else unit
    mean = (x.total("magnitudes", inverse) / count).float() if kind != "rms" else unit
    found = {"rms": root, "absmean": mean, "sawb": (SAWB[0] * root - SAWB[1] * mean).clamp(min=0.0)}[kind]
    return torch.where(torch.isfinite(absmax), (found * unit).clamp(max=HUGE), torch.nan)


def best(fmt: Format, x: Measured) -> Scales:
    """The scales of a matrix, of several candidates those with which rounding to nearest loses least, block by block.

    The first of equals stays. The loss is the sum of the squares of fp32 differences, as `blocks.total` adds them.
    """
    measured = statistic(fmt, x)
    found, *others = [derive(fmt, measured, candidate=c) for c in fmt.scaling.candidates]
    if others:
        least = x.losses(found)
        for other in others:
            loss = x.losses(other)
            better = loss < least
            least = torch.where(better, loss, least)
            found = merged(better, other, found)
    return found


def derive(
    fmt: Format,
    statistic: Tensor,
    *,
    candidate: float = 1.0,
    tensor_scale: Tensor | None = None,
    rounding: Rounding | None = None,
) -> Scales:
    """Scales from the statistics [block rows, block columns] of a matrix.

    Args:
        fmt: a format with fixed values.
        statistic: of each block; NaN where it has a non-finite value.
        candidate: a factor of the scale, one of `fmt.scaling.candidates`.
        tensor_scale: use this instead of deriving it (fp32 [1]).
        rounding: of the stored scale, if not the format's own.
    """
    way = fmt.scaling
    rounding = rounding or way.rounding
    wanted = times(statistic, way.gain)
    if way.stored == "e4m3":
        return _e4m3(fmt, wanted, candidate, tensor_scale, rounding)
    wanted = times(wanted, candidate)
    if way.stored == "e8m0":
        parts = {"scale": _e8m0(fmt, wanted, rounding)}
        return Scales(inverse(fmt, parts), multiplier(fmt, parts), parts)
    scale = codec.derive_scale(fmt, wanted)
    if way.stored == "double":
        parts = _double(scale)
        return Scales(codec.reciprocal(scale), multiplier(fmt, parts), parts)
    if way.stored == "bf16":
        scale = _narrowed(scale, rounding)
    parts = {"scale": scale}
    held = multiplier(fmt, parts)
    return Scales(codec.reciprocal(held), held, parts)


def merged(choice: Tensor, chosen: Scales, other: Scales) -> Scales:
    """The first scales where the choice holds, the second elsewhere; both are of one tensor."""

    def pick(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(choice, a, b) if a.shape == choice.shape else a

    parts = {part: pick(found, other.parts[part]) for part, found in chosen.parts.items()}
    return Scales(pick(chosen.inverse, other.inverse), pick(chosen.multiplier, other.multiplier), parts)


def multiplier(fmt: Format, parts: dict[str, Tensor]) -> Tensor:
    """What stored scales stand for: fp32 [block rows, block columns]."""
    stored, scale = fmt.scaling.stored, parts["scale"]
    if stored == "fp32":
        return scale
    if stored == "e8m0":
        return torch.where(scale == E8M0_NAN, torch.nan, _power(scale.int())) * fmt.scaling.headroom
    if stored == "bf16":
        held = scale.float()
    elif stored == "e4m3":
        held = scale.view(torch.float8_e4m3fn).float()
        held = held * _spread(fmt, parts["tensor_scale"], scale) if fmt.scaling.peak else held
    else:
        blocks = torch.nn.functional.pad(scale.flatten(), (0, -scale.numel() % DOUBLE_BLOCK)).view(-1, DOUBLE_BLOCK)
        inner = codec.values(_dyn8(), blocks, parts["scale_scale"]).flatten()[: scale.numel()].view(scale.shape)
        held = inner + parts["scale_offset"]
    return torch.where(held > fmt.max_scale, fmt.max_scale, held)


def inverse(fmt: Format, parts: dict[str, Tensor]) -> Tensor:
    """What encodes with scales that are already stored."""
    if fmt.scaling.stored == "e8m0":
        return _power(254 - parts["scale"].int()) * (1 / fmt.scaling.headroom)
    if fmt.scaling.stored == "e4m3" and fmt.scaling.peak:
        scale = parts["scale"]
        return _two_level_inverse(scale.view(torch.float8_e4m3fn).float(), _spread(fmt, parts["tensor_scale"], scale))
    return codec.reciprocal(multiplier(fmt, parts)).clamp(max=HUGE)


def covering(fmt: Format, absmax: Tensor, tensor_scale: Tensor | None = None) -> Scales:
    """The smallest storable scales with which no value clips, for blocks of which these are the largest magnitudes.

    The format's own rule may let the largest values clip (it rounds to nearest, or floors); a weight that is only
    codes must not lose what an update adds. A scale of e4m3 ends at 448 times the tensor's, beyond which values clip.
    """
    up: dict[Stored, Rounding] = {"e8m0": "up", "e4m3": "up", "bf16": "up"}
    rounding = up.get(fmt.scaling.stored, "nearest")
    return derive(fmt, absmax, tensor_scale=tensor_scale, rounding=rounding)


def times(x: Tensor, factor: float) -> Tensor:
    """A product that stays finite."""
    return x if factor == 1 else (x * factor).clamp(max=HUGE)


def _power(field: Tensor) -> Tensor:
    """2**(field - 127) for int32 fields 0 .. 254, by the bits of fp32; 0 for what is below."""
    bits = torch.where(field > 0, field << 23, torch.where(field == 0, 1 << 22, 0))
    return bits.to(torch.int32).view(torch.float32)


def _e8m0(fmt: Format, statistic: Tensor, rounding: Rounding) -> Tensor:
    """The biased exponent, uint8, by one of the four rules that torchao's `ScaleCalculationMode` names.

    OCP Microscaling Formats (MX) Specification 1.0, section 6.3: the exponent of absmax less that of the largest
    element. torchao: https://github.com/pytorch/ao, torchao/prototype/mx_formats/mx_tensor.py.
    """
    own, mantissa = exponents(fmt)
    if rounding == "up":
        bits = (statistic / torch.full_like(statistic, fmt.top)).view(torch.int32)
        own = 0
    else:
        bits = statistic.contiguous().view(torch.int32)
    if rounding == "even":
        bits = bits + (1 << (22 - mantissa))
    code = (bits >> 23) - own
    if rounding in ("up", "ceil"):
        # Of subnormal numbers only those above 2**-127 need the next power.
        rest = bits & 0x7FFFFF
        code = code + (rest > torch.where(bits >> 23 == 0, 1 << 22, 0)).int()
    code = code.clamp(0, last_power(fmt)).to(torch.uint8)
    return torch.where(torch.isfinite(statistic), code, E8M0_NAN)


def last_power(fmt: Format) -> int:
    """The largest e8m0 scale with which no code decodes to infinity, as it is stored."""
    return 126 + math.frexp(fmt.max_scale / fmt.scaling.headroom)[1]


@cache
def exponents(fmt: Format) -> tuple[int, int]:
    """The exponent of a format's largest value, and how many mantissa bits it has below."""
    largest = math.frexp(fmt.top)[1] - 1
    below = sum(2.0 ** (largest - 1) <= value < 2.0**largest for value, _ in fmt.ladder)
    return largest, max(1, below).bit_length() - 1


def _e4m3(fmt: Format, wanted: Tensor, candidate: float, tensor_scale: Tensor | None, rounding: Rounding) -> Scales:
    """Two levels: the tensor's largest block has the stored scale `peak`, and other blocks less.

    The order of operations is torchao's `nvfp4_quantize`: absmax / 6, / tensor_scale, rounded; x * ((1 / tensor_scale)
    / scale).
    """
    way = fmt.scaling
    top = torch.full_like(wanted, fmt.top)
    block = wanted / top
    parts: dict[str, Tensor] = {}
    if way.peak:
        tensor_scale = outer_scale(fmt, wanted) if tensor_scale is None else tensor_scale
        parts["tensor_scale"] = tensor_scale
        tensor_scale = _spread(fmt, tensor_scale, wanted)
        block = torch.where(tensor_scale > 0, block / tensor_scale, block)
    held = times(block, candidate).clamp(way.least, 448.0)
    code = held.to(torch.float8_e4m3fn).view(torch.uint8)
    if rounding == "up":
        code = code + ((code.view(torch.float8_e4m3fn).float() < held) & (code < E4M3_NAN - 1)).to(torch.uint8)
    code = torch.where(torch.isfinite(wanted), code, E4M3_NAN)
    parts = {"scale": code, **parts}
    return Scales(inverse(fmt, parts), multiplier(fmt, parts), parts)


def outer_scale(fmt: Format, wanted: Tensor) -> Tensor:
    """`tensor_scale`, from statistics of blocks times the gain. Blocks that are not finite count not."""
    largest = _largest(fmt, torch.where(torch.isfinite(wanted), wanted, 0.0))
    scale = (largest / torch.full_like(largest, fmt.top * fmt.scaling.peak)).clamp(min=TINY)
    return torch.where(largest > 0, scale, 0.0)


def every_byte(fmt: Format, tensor_scale: Tensor | None = None) -> Scales:
    """What each of 256 bytes stands for, as the scale of a block: [1, 256]."""
    parts = {"scale": torch.arange(256, dtype=torch.uint8, device="cpu").unsqueeze(0)}
    if tensor_scale is not None:
        parts["tensor_scale"] = tensor_scale
    return Scales(inverse(fmt, parts), multiplier(fmt, parts), parts)


def _largest(fmt: Format, wanted: Tensor) -> Tensor:
    """The largest of the tensor's blocks, [1], or of those that share an outer scale."""
    if not fmt.scaling.outer:
        return wanted.max().view(1) if wanted.numel() else wanted.new_zeros(1)
    shared = fmt.scaling.outer // fmt.block[1]
    padded = torch.nn.functional.pad(wanted, (0, -wanted.shape[1] % shared))
    return padded.unflatten(1, (-1, shared)).amax(-1)


def _spread(fmt: Format, tensor_scale: Tensor, blocks: Tensor) -> Tensor:
    """Outer scales as one for each block."""
    if not fmt.scaling.outer:
        return tensor_scale
    return tensor_scale.repeat_interleave(fmt.scaling.outer // fmt.block[1], 1)[:, : blocks.shape[1]]


def _two_level_inverse(scale: Tensor, tensor_scale: Tensor) -> Tensor:
    """(1 / tensor_scale) / scale; 0 for a tensor of zeros and for NaN, finite for a scale of 0."""
    found = reciprocal(tensor_scale) / scale
    return torch.where((tensor_scale > 0) & (found == found), found, 0.0).clamp(max=HUGE)


def _narrowed(scale: Tensor, rounding: Rounding) -> Tensor:
    """fp32 to bf16, to nearest or up."""
    near = scale.to(torch.bfloat16)
    if rounding == "up":
        above = (near.view(torch.int16) + 1).view(torch.bfloat16)
        near = torch.where(near.float() < scale, above, near)
    return near


@constant
def _dyn8() -> Format:
    return find_format("dyn8").settled()


def _double(scale: Tensor) -> dict[str, Tensor]:
    """Scales less their mean, in the dynamic map with one scale per 256 (bitsandbytes' `compress_statistics`).

    Blocks of scales run over the whole tensor, row after row, as there. The mean is that of finite scales, summed by
    the halving tree in float64; a NaN makes the 256 blocks it shares a scale with decode to NaN.
    """
    flat = scale.flatten()
    finite = torch.isfinite(flat)
    offset = (halve(torch.where(finite, flat, 0.0).double().unsqueeze(0)) / finite.sum().clamp(min=1)).float()
    apart = torch.where(finite, flat - offset, torch.nan)
    blocks = torch.nn.functional.pad(apart, (0, -len(flat) % DOUBLE_BLOCK)).view(-1, DOUBLE_BLOCK)
    inner = codec.encode(_dyn8(), blocks)
    codes = inner["codes"].flatten()[: len(flat)].view(scale.shape)
    return {"scale": codes, "scale_scale": inner["scale"], "scale_offset": offset}
