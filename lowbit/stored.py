"""Weights that are kept as codes and scales, with no float master: what they mean, and how a new value is written.

Each step reads a weight, moves it a little, and writes it back. Three rules make that a training method:

- Rounding is stochastic, so that an update much smaller than the distance of two codes is not lost but happens, now and
  then, as a whole code (Gupta et al. 2015, https://arxiv.org/abs/1502.02551; Q-GaLore, https://arxiv.org/abs/2407.08296,
  trains INT8 weights so).
- A block keeps its scale until a value would clip. A scale derived anew at each step moves the grid under weights that
  have no update, and rounding then makes them walk at random.
- A value that a code stands for exactly gets that code, whatever the random bits: no update, no change. The fraction
  that is compared with them is therefore measured from the decoded value of the nearest code (`_integers`); the
  quotient value / scale is off by an ulp, and for 8 bits and more an ulp is seen by 16 random bits.

`split` keeps 8 bits more than the forward pass sees: k = 256 code + rest, with `code` the nearest to k / 256. The codes
are an ordinary weight; `rest` is what the optimizer would have lost. (FlashOptim's weight splitting and the bf16 + 16
bits of `masters` are the same idea at other widths.)

This is the reference: torch operations, any device. Parts lie as in `rows`; `rest` is int8 [rows, cols].
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from . import codec, rows, scales
from .formats import Format, catalogue, nearest
from .formats import format as find_format
from .layout import STEP_BLOCK, rows_of
from .rounding import uniform

WHOLE = ("tensor_scale", "scale_scale", "scale_offset")  # parts that belong to the whole tensor, not to a row
PARTS = ("scale", "rest", *WHOLE)  # all but the codes
REST = 256  # steps of `rest` to a code
PIECE = 1 << 20  # values written at a time
HEADROOM = 16.0  # how far a weight with a scale of the tensor may grow
_LEAST, _MOST = -128, 127


@dataclass(frozen=True)
class Store:
    """A way to keep a weight: the format of its codes, and whether a rest is kept beside them."""

    name: str
    format: Format
    rest: bool = False

    def part_shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each part of a weight of this shape."""
        shapes = rows.part_shapes(self.format, shape)
        return {**shapes, "rest": (rows_of(shape), torch.int8)} if self.rest else shapes

    def __str__(self) -> str:
        return self.name


@cache
def stores() -> Mapping[str, Store]:
    """The stores that have names. Built at first use."""
    named = ("int8", "nf4", "mxfp4", "nvfp4", "nf4-dq")
    listed = [
        Store("int4", find_format("int4-bf16")),
        *(Store(name, find_format(name)) for name in named),
        Store("split", find_format("int4-bf16"), rest=True),
        Store("split8", find_format("int8"), rest=True),
    ]
    return {store.name: store for store in listed}


def find_store(name: str) -> Store:
    """A store by name; also `format:block`, for any format in which a weight can be kept.

    Raises:
        ValueError: nothing is called so, or weights cannot be kept in that format; says why.
    """
    if name in stores():
        return stores()[name]
    try:
        fmt = find_format(name)
    except ValueError:
        known = ("master", *stores())
        others = [fmt.name for fmt in catalogue().values() if fmt.name not in known and not _unfit(fmt)]
        raise ValueError(
            f"unknown store {name!r}{nearest(name, [*known, *others])}; known: {', '.join(known)}, and the formats "
            f"{', '.join(others)}"
        ) from None
    if reason := _unfit(fmt):
        raise ValueError(f"a weight cannot be kept as {name!r}: {reason}; use one of {', '.join(stores())}")
    return Store(fmt.name, fmt)


def name_of(fmt: Format, rest: bool) -> str:
    """What the store with this format of codes is called."""
    return next((store.name for store in stores().values() if (store.format, store.rest) == (fmt, rest)), fmt.name)


@cache
def _by_tag() -> Mapping[int, Format]:
    """Every format that a weight can be kept in, by the number that names it in a checkpoint."""
    blocks = [1 << i for i in range(9)]  # all that `_unfit` lets pass
    made = [fmt.with_block(n) for fmt in catalogue().values() if not _unfit(fmt) for n in blocks]
    return {fmt.tag: fmt for fmt in (*made, *(store.format for store in stores().values()))}


def store_of(tag: int, rest: bool) -> Store | None:
    """The store whose codes have this `Format.tag`; None if there is none."""
    fmt = _by_tag().get(tag)
    return None if fmt is None else Store(name_of(fmt, rest), fmt, rest)


def same_grid(a: Format, b: Format) -> bool:
    """Whether two formats have the same codes in the same blocks, however their scales are found and kept."""
    return (a.kind, a.bits, a.block, a.limit, a.table) == (b.kind, b.bits, b.block, b.limit, b.table)


def _unfit(fmt: Format) -> str | None:
    if not fmt.compressed:
        return "it has no codes"
    if not fmt.signed:
        return "it has no sign"
    if fmt.kind not in ("integer", "codebook") or fmt.bits not in (4, 8):
        return "it is none of the formats with 16 or 256 fixed values"
    if fmt.block[0] != 1 or not fmt.block[1] or STEP_BLOCK % fmt.block[1]:
        return f"blocks must lie in rows and divide {STEP_BLOCK}"
    way = fmt.scaling
    if (way.statistic, way.gain, way.candidates, way.outer) != ("absmax", 1.0, (1.0,), 0):
        return "its scales are not made from the largest magnitude alone, so values may clip"
    return None


def load(fmt: Format, parts: Mapping[str, Tensor], cols: int) -> Tensor:
    """The weight that an optimizer sees, fp32 [rows, cols]: code times scale, or (code + rest / 256) times scale."""
    return _cut(decode(fmt, _blocks(fmt, parts, cols)), cols)


@torch.no_grad()
def store_(fmt: Format, parts: Mapping[str, Tensor], value: Tensor, noise: tuple[int, int] | None) -> None:
    """Write a matrix to parts, in place.

    A block's scale changes only if a value of it would clip, and is then the smallest with which none does. (An e4m3
    scale ends at 448 times the tensor's: there is room for HEADROOM times the largest value that `assign_` saw, and
    what is beyond clips.) A value that is not finite makes its block NaN. Nothing is allocated that outlives the call.

    Args:
        fmt: the format of the codes.
        parts: `codes`, `scale` …, and `rest` for a split store; of a [rows, cols] weight.
        value: [rows, cols], of any float dtype.
        noise: the key of stochastic rounding; None rounds to nearest.

    Raises:
        ValueError: a scale of this format cannot change without others (double quantization).
    """
    if reason := frozen(fmt):
        raise ValueError(reason)
    for first, some in _in_pieces(value):
        own = _of_rows(parts, first, len(some))
        u = None if noise is None else _into_blocks(fmt, uniform(rows.row_bits(noise, some, first)))
        _write(fmt, own, encode(fmt, _blocks(fmt, own, value.shape[1]), _into_blocks(fmt, some), u), value.shape[1])


def _in_pieces(value: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(first row, rows in fp32) of a matrix, PIECE values at a time: temporaries are not as large as the weight."""
    traced = torch.compiler.is_compiling() or type(value) is not Tensor  # a loop would be unrolled
    count = len(value) if traced else max(1, PIECE // max(1, value.shape[1]))
    for first in range(0, len(value), max(1, count)):
        yield first, value[first : first + count].float().contiguous()


def _of_rows(parts: Mapping[str, Tensor], first: int, count: int) -> dict[str, Tensor]:
    return {part: x if part in WHOLE else x[first : first + count] for part, x in parts.items()}


def _write(fmt: Format, parts: Mapping[str, Tensor], new: dict[str, Tensor], cols: int) -> None:
    new["codes"] = rows.pack(_cut(new["codes"], cols), fmt.bits)
    if "rest" in new:
        new["rest"] = _cut(new["rest"], cols)
    for part, tensor in new.items():
        parts[part].copy_(tensor)


def decode(fmt: Format, parts: Mapping[str, Tensor]) -> Tensor:
    """`load` of blocks: codes (one per byte) and rest [..., block], scale [...], to values [..., block]."""
    if "rest" not in parts:
        return codec.values(fmt, parts["codes"], scales.multiplier(fmt, dict(parts)))
    sign = 1 << (fmt.bits - 1)
    k = ((parts["codes"] ^ sign).int() - sign) * REST + parts["rest"].int()
    return k.float() / REST * scales.multiplier(fmt, dict(parts)).unsqueeze(-1)


def encode(fmt: Format, old: Mapping[str, Tensor], x: Tensor, u: Tensor | None) -> dict[str, Tensor]:
    """`store_` of blocks: the parts that change, for values x [..., block] and numbers u in (0, 1), or None."""
    absmax = x.abs().amax(-1)
    kept = {"scale": old["scale"]}
    held = scales.multiplier(fmt, dict(old))
    keeps = absmax <= _reach(fmt, old) * held  # false where either is NaN
    found = scales.merged(
        keeps,
        scales.Scales(scales.inverse(fmt, dict(old)), held, kept),
        scales.covering(fmt, torch.where(torch.isfinite(absmax), absmax, torch.nan), old.get("tensor_scale")),
    )
    return {**_rounded(fmt, x, found, u, "rest" in old), **found.parts}


def _rounded(fmt: Format, x: Tensor, found: scales.Scales, u: Tensor | None, rest: bool) -> dict[str, Tensor]:
    """The codes, and the rest, of blocks under these scales."""
    if fmt.kind != "integer":
        return {"codes": codec.nearby(fmt, x, found.inverse, u)}
    k = _integers(fmt, x, found, u, REST if rest else 1)
    if not rest:
        return {"codes": _codes(fmt, k)}
    code = torch.div(k - _LEAST, REST, rounding_mode="floor")
    return {"codes": _codes(fmt, code), "rest": (k - REST * code).to(torch.int8)}


@torch.no_grad()
def rescale_(fmt: Format, parts: Mapping[str, Tensor], cols: int) -> None:
    """Derive every scale anew and round the codes to nearest: scales otherwise only ever grow."""
    assign_(fmt, parts, load(fmt, parts, cols))


@torch.no_grad()
def assign_(fmt: Format, parts: Mapping[str, Tensor], value: Tensor) -> None:
    """Write another matrix to parts, in place: scales by the format's own rule, rounded to nearest.

    The same values as `lowbit.quantize` makes, but where an fp32 scale of the tensor leaves room for weights to grow:
    HEADROOM is a power of two, so block scales lose nothing by it until they are subnormal.
    """
    if not value.numel():
        return
    absmax = torch.cat([_absmax(fmt, some) for _, some in _in_pieces(value)])
    found = scales.derive(fmt, absmax)
    if "tensor_scale" in parts:
        roomy = found.parts["tensor_scale"] * HEADROOM
        roomy = torch.where(roomy > 0, roomy, 2.0**-10)  # of zeros: up to 2.6, in steps of 2**-16
        found = scales.derive(fmt, absmax, tensor_scale=roomy)
    for part, tensor in found.parts.items():
        parts[part].copy_(tensor)
    for first, some in _in_pieces(value):
        own = scales.Scales(found.inverse[first : first + len(some)], found.multiplier[first : first + len(some)], {})
        new = _rounded(fmt, _into_blocks(fmt, some), own, None, "rest" in parts)
        _write(fmt, _of_rows(parts, first, len(some)), new, value.shape[1])


def _absmax(fmt: Format, value: Tensor) -> Tensor:
    absmax = _into_blocks(fmt, value).abs().amax(-1)
    return torch.where(torch.isfinite(absmax), absmax, torch.nan)


def frozen(fmt: Format) -> str | None:
    """Why a weight in this format cannot be trained; None if it can."""
    if fmt.scaling.stored != "double":
        return None
    return (
        f"the scales of {fmt.name!r} are quantized together, so a block's cannot change alone: it is for frozen "
        "weights (requires_grad_(False), or Recipe(frozen=True)); a weight that is trained can be kept as 'nf4'"
    )


def resolution(fmt: Format, parts: Mapping[str, Tensor]) -> float:
    """The mean distance of two neighbouring codes of a weight, or of two steps of its rest."""
    values = [value for value, _ in fmt.ladder]
    each = (values[-1] - values[0]) / (len(values) - 1) / (REST if "rest" in parts else 1)
    return each * float(scales.multiplier(fmt, dict(parts)).mean())


def _integers(fmt: Format, x: Tensor, found: scales.Scales, u: Tensor | None, steps: int) -> Tensor:
    """x / scale in units of 1 / steps, rounded: int32, -limit to limit.

    q is the nearest, and r = (x - decode(q)) / scale what is missing, in [-1/2, 1/2]: up when r + U >= 1, down when
    r + U < 0. Where x is the decoded value of a code, r is 0 and neither can happen, since 0 < U < 1.
    """
    inverse, scale = found.inverse.unsqueeze(-1), found.multiplier.unsqueeze(-1)
    q = ((x * inverse) * steps).nan_to_num(0.0).round()
    if u is not None:
        r = ((x - (q / steps) * scale) * inverse) * steps
        q = q + (r + u).floor().nan_to_num(0.0)
    limit = fmt.limit * steps + (_MOST if steps > 1 else 0)
    return q.clamp(-limit, limit).to(torch.int32)


def _codes(fmt: Format, k: Tensor) -> Tensor:
    """Integers as codes, in two's complement."""
    return (k & ((1 << fmt.bits) - 1)).to(torch.uint8)


def _reach(fmt: Format, parts: Mapping[str, Tensor]) -> float:
    """The largest magnitude that does not clip, in units of the scale."""
    return fmt.top + (_MOST / REST if "rest" in parts else 0.0)


def _blocks(fmt: Format, parts: Mapping[str, Tensor], cols: int) -> dict[str, Tensor]:
    """Parts of a matrix as `decode` takes them."""
    codes = {"codes": rows.unpack(parts["codes"], fmt.bits, cols)}
    codes.update({part: parts[part] for part in ("rest",) if part in parts})
    return {**parts, **{part: _into_blocks(fmt, x) for part, x in codes.items()}}


def _into_blocks(fmt: Format, x: Tensor) -> Tensor:
    """[rows, cols] as [rows, blocks, block], padded with zeros."""
    return F.pad(x, (0, -x.shape[1] % fmt.block[1])).unflatten(1, (-1, fmt.block[1]))


def _cut(x: Tensor, cols: int) -> Tensor:
    """The inverse of `_into_blocks`."""
    return x.flatten(1)[:, :cols].contiguous()
