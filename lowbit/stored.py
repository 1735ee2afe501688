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

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from . import codec, rows
from .formats import Format, nearest
from .formats import format as find_format
from .layout import STEP_BLOCK, rows_of
from .rounding import uniform

REST = 256  # steps of `rest` to a code
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
    listed = [
        Store("int8", find_format("int8")),
        Store("int4", find_format("int4:32")),
        Store("nf4", find_format("nf4")),
        Store("split", find_format("int4:32"), rest=True),
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
        raise ValueError(f"unknown store {name!r}{nearest(name, known)}; known: {', '.join(known)}") from None
    if reason := _unfit(fmt):
        raise ValueError(f"a weight cannot be kept as {name!r}: {reason}; use one of {', '.join(stores())}")
    return Store(fmt.name, fmt)


def name_of(fmt: Format, rest: bool) -> str:
    """What the store with this format of codes is called."""
    return next((store.name for store in stores().values() if (store.format, store.rest) == (fmt, rest)), fmt.name)


def _unfit(fmt: Format) -> str | None:
    if not fmt.compressed:
        return "it has no codes"
    if not fmt.signed:
        return "it has no sign"
    if fmt.kind not in ("integer", "codebook"):
        return "its scales cannot be kept from one step to the next"
    if fmt.block[0] != 1 or STEP_BLOCK % fmt.block[1]:
        return f"blocks must lie in rows and divide {STEP_BLOCK}"
    return None


def load(fmt: Format, parts: Mapping[str, Tensor], cols: int) -> Tensor:
    """The weight that an optimizer sees, fp32 [rows, cols]: code times scale, or (code + rest / 256) times scale."""
    return _cut(decode(fmt, _blocks(fmt, parts, cols)), cols)


@torch.no_grad()
def store_(fmt: Format, parts: Mapping[str, Tensor], value: Tensor, noise: tuple[int, int] | None) -> None:
    """Write a matrix to parts, in place.

    A block's scale changes only if a value of it would clip, and is then derived as for a new tensor. A value that is
    not finite makes its block NaN. Nothing is allocated that outlives the call.

    Args:
        fmt: the format of the codes.
        parts: `codes`, `scale` …, and `rest` for a split store; of a [rows, cols] weight.
        value: [rows, cols], of any float dtype.
        noise: the key of stochastic rounding; None rounds to nearest.
    """
    cols = value.shape[1]
    value = value.float().contiguous()
    u = None if noise is None else _into_blocks(fmt, uniform(rows.row_bits(noise, value)))
    new = encode(fmt, _blocks(fmt, parts, cols), _into_blocks(fmt, value), u)
    new["codes"] = rows.pack(_cut(new["codes"], cols), fmt.bits)
    if "rest" in new:
        new["rest"] = _cut(new["rest"], cols)
    for part, tensor in new.items():
        parts[part].copy_(tensor)


def decode(fmt: Format, parts: Mapping[str, Tensor]) -> Tensor:
    """`load` of blocks: codes (one per byte) and rest [..., block], scale [...], to values [..., block]."""
    if "rest" not in parts:
        return codec.decode(fmt, dict(parts))
    sign = 1 << (fmt.bits - 1)
    k = ((parts["codes"] ^ sign).int() - sign) * REST + parts["rest"].int()
    return k.float() / REST * _multiplier(fmt, parts).unsqueeze(-1)


def encode(fmt: Format, old: Mapping[str, Tensor], x: Tensor, u: Tensor | None) -> dict[str, Tensor]:
    """`store_` of blocks: the parts that change, for values x [..., block] and numbers u in (0, 1), or None."""
    absmax = x.abs().amax(-1)
    keeps = absmax <= _reach(fmt, old) * _multiplier(fmt, old)  # false where either is NaN
    scale = torch.where(keeps, old["scale"], codec.derive_scale(fmt, absmax))
    if fmt.kind != "integer":
        return codec.encode(fmt, x, u, scale=scale)
    k = _integers(fmt, x, scale.unsqueeze(-1), u, REST if "rest" in old else 1)
    if "rest" not in old:
        return {"codes": _codes(fmt, k), "scale": scale}
    code = torch.div(k - _LEAST, REST, rounding_mode="floor")
    return {"codes": _codes(fmt, code), "scale": scale, "rest": (k - REST * code).to(torch.int8)}


@torch.no_grad()
def rescale_(fmt: Format, parts: Mapping[str, Tensor], cols: int) -> None:
    """Derive every scale anew and round the codes to nearest: scales otherwise only ever grow."""
    value = load(fmt, parts, cols)
    parts["scale"].zero_()  # so that whatever is not 0 would clip
    store_(fmt, parts, value, None)


def resolution(fmt: Format, parts: Mapping[str, Tensor]) -> float:
    """The mean distance of two neighbouring codes of a weight, or of two steps of its rest."""
    values = [value for value, _ in fmt.ladder]
    each = (values[-1] - values[0]) / (len(values) - 1) / (REST if "rest" in parts else 1)
    return each * float(_multiplier(fmt, parts).mean())


def _integers(fmt: Format, x: Tensor, scale: Tensor, u: Tensor | None, steps: int) -> Tensor:
    """x / scale in units of 1 / steps, rounded: int32, -limit to limit.

    q is the nearest, and r = (x - decode(q)) / scale what is missing, in [-1/2, 1/2]: up when r + U >= 1, down when
    r + U < 0. Where x is the decoded value of a code, r is 0 and neither can happen, since 0 < U < 1.
    """
    inverse = codec.reciprocal(scale)
    q = ((x * inverse) * steps).nan_to_num(0.0).round()
    if u is not None:
        r = ((x - (q / steps) * scale) * inverse) * steps
        q = q + (r + u).floor()
    limit = fmt.limit * steps + (_MOST if steps > 1 else 0)
    return q.clamp(-limit, limit).to(torch.int32)


def _codes(fmt: Format, k: Tensor) -> Tensor:
    """Integers as codes, in two's complement."""
    return (k & ((1 << fmt.bits) - 1)).to(torch.uint8)


def _reach(fmt: Format, parts: Mapping[str, Tensor]) -> float:
    """The largest magnitude that does not clip, in units of the scale."""
    return fmt.top + (_MOST / REST if "rest" in parts else 0.0)


def _multiplier(fmt: Format, parts: Mapping[str, Tensor]) -> Tensor:
    """What a code's value is multiplied with, fp32, one number per block."""
    return parts["scale"]


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
