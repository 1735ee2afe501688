"""How numbers are stored: a format is a value, not a class.

A format says what each code means, in units of a scale; how long a block shares one scale; and which parts a packed
tensor has. fp32, bf16 and fp16 are formats too, so that "compressed" is never a special case. The torch arithmetic
that turns numbers into codes is in `codec`; where the codes of a tensor lie in memory is in `rows`.

Choice: the catalogue is a list of literals, each with its source. Adding a format is adding one literal; the tests find
it, every optimizer can store its state in it, and every recipe can use it.
"""

from __future__ import annotations

import contextlib
import difflib
import math
import struct
import zlib
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any, Literal

import torch

Kind = Literal["float", "integer", "codebook", "affine", "log"]
Stored = Literal["fp32", "bf16", "e8m0", "e4m3", "double"]
Statistic = Literal["absmax", "rms", "absmean", "sawb"]
Rounding = Literal["nearest", "up", "floor", "ceil", "even"]

# The smallest scale: below it 1/scale would overflow fp32. 2**-126 is fp32's smallest normal number.
TINY = 2.0**-126
_MAX = 3.4028234663852886e38  # fp32's largest number
DOUBLE_BLOCK = 256  # scales that share one scale, where scales are quantized themselves


@dataclass(frozen=True)
class Scaling:
    """How the scale of a block is found and stored; `scales` holds the arithmetic.

    The wanted scale is `gain * statistic / top`, where `top` is the format's largest value. It is stored rounded, and
    what decoding multiplies by is the stored one.

    What belongs here is what decides a tensor's scales, and hence its bits, on its own: it is the same whoever uses the
    format, and so a format stays one literal. What looks at more is the recipe's: rotations, masks, outliers, which
    operands are rounded stochastically, and MS-EDEN, which corrects stored scales by what a rotated run has lost.

    Args:
        stored: fp32 or bf16; e8m0, a power of two in a byte (255: NaN); e4m3, a byte; double, 8-bit codes of the
            scales less their mean, in blocks of 256 (QLoRA, https://arxiv.org/abs/2305.14314, section 3).
        statistic: what of a block makes its scale. absmax; rms, the root of the mean square; absmean; sawb, the clip
            12.035 rms - 12.03 absmean that is best for 15 even levels (https://arxiv.org/abs/1807.06964).
        rounding: of the stored scale. nearest (fp32 is exact); up, so that no value clips; and for e8m0 the rules of
            the OCP microscaling formats, which look at the statistic's own exponent: floor (the standard's), ceil, and
            even (the statistic is first rounded to the element's mantissa). NVIDIA's rceil is up.
        gain: of the statistic, before its scale is rounded: above 1 leaves headroom, below 1 clips.
        headroom: of an e8m0 scale, after it is rounded: codes times 2**k stand for 1/headroom of the values. With 4/3,
            stochastic rounding to MXFP4 never clips: floor puts absmax at 4 to 8 of 6, and 3/4 of it at 3 to 6
            (https://arxiv.org/abs/2502.20586, algorithm 2, where the product is multiplied by 16/9 instead). The same
            factor on the values beforehand would move the scale, too, and help nothing.
        candidates: factors of the scale that are tried for each block; the least squared error wins, the first of
            equals. (1, 1.5) is Four Over Six (https://arxiv.org/abs/2512.02010).
        peak: the stored e4m3 scale of the tensor's largest block: `tensor_scale` is what makes it so. 0: there is none.
        least: the smallest stored e4m3 scale. torchao's is 2**-6, the smallest normal number; TransformerEngine has
            none, so that blocks far below the tensor's largest get the scale 0.
        outer: how many values of a row share one `tensor_scale`, a multiple of the block; 0: the whole tensor does.
    """

    stored: Stored = "fp32"
    statistic: Statistic = "absmax"
    rounding: Rounding = "nearest"
    gain: float = 1.0
    headroom: float = 1.0
    candidates: tuple[float, ...] = (1.0,)
    peak: float = 0.0
    least: float = 0.0
    outer: int = 0

    def __post_init__(self) -> None:
        allowed = {"e8m0": ("up", "floor", "ceil", "even"), "e4m3": ("nearest", "up"), "bf16": ("nearest", "up")}
        if self.rounding not in allowed.get(self.stored, ("nearest",)):
            raise ValueError(f"Scaling: a scale stored as {self.stored} cannot be rounded {self.rounding!r}")
        if (self.peak or self.least) and self.stored != "e4m3":
            raise ValueError(f"Scaling: peak and least are for scales stored as e4m3, not {self.stored}")
        if self.outer and not self.peak:
            raise ValueError("Scaling: outer is what shares a tensor_scale, which needs a peak")
        if self.headroom != 1 and self.stored != "e8m0":
            raise ValueError(f"Scaling: headroom is for scales stored as e8m0; with {self.stored} use gain")
        if not min(self.gain, self.headroom) > 0 or not self.candidates or min(self.candidates) <= 0:
            raise ValueError("Scaling: gain and headroom must be above 0, and there must be candidates, all above 0")

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts beside the codes that such scales take."""
        if self.stored == "double":
            return ("scale", "scale_scale", "scale_offset")
        return ("scale", "tensor_scale") if self.peak else ("scale",)


PLAIN = Scaling()


@dataclass(frozen=True)
class Format:
    """One way to store a number.

    A code `k` of a block with scale `s` stands for `values[k] * s`, or `(values[k] * s)**2` where `square` is set.
    `bits` is the width of a code, `block` the (rows, columns) that share one scale (0: all of them), `ties` where a
    value half way between two codes goes: to the even code (IEEE) or down to the smaller value (bitsandbytes'
    codebooks). `scaling` says how the scale is found and stored.

    Kinds: `float` (a torch dtype, no scale), `integer` (values are the code itself, two's complement when signed),
    `codebook` (values listed), `affine` ((code - zero) * scale) and `log` (scale * base**code, base per block).
    """

    name: str
    bits: int
    signed: bool
    about: str
    kind: Kind = "codebook"
    block: tuple[int, int] = (1, 128)
    square: bool = False
    ties: Literal["even", "down"] = "even"
    limit: int = 0  # integer kinds: the largest code in use
    table: tuple[float, ...] = ()  # codebook kinds: the value of each code, in code order
    dtype: torch.dtype | None = None  # float kinds
    partner: str = ""  # what stores a non-negative operand when this signed format is asked for, and the reverse
    parts: tuple[str, ...] = ("codes", "scale")
    scaling: Scaling = PLAIN

    def __post_init__(self) -> None:
        if self.scaling != PLAIN and (self.kind not in ("integer", "codebook") or self.square):
            raise ValueError(f"format {self.name!r}: only linear codes can have a scaling of their own")
        outer, (rows, cols) = self.scaling.outer, self.block
        if outer and (rows != 1 or not cols or outer % cols):
            raise ValueError(
                f"format {self.name!r}: {outer} values share an outer scale, so its block must divide that"
            )
        if self.kind in ("integer", "codebook"):
            object.__setattr__(self, "parts", ("codes", *self.scaling.parts))

    @cached_property
    def values(self) -> tuple[float, ...]:
        """What each code stands for, in code order and in units of the scale (before squaring)."""
        if self.kind == "integer" and self.signed:
            half = 1 << (self.bits - 1)
            return tuple(float(k if k < half else k - 2 * half) for k in range(2 * half))
        if self.kind == "integer":
            return tuple(float(k) for k in range(1 << self.bits))
        if self.kind == "codebook":
            return self.table
        raise ValueError(f"format {self.name!r} is {self.kind}: its codes have no fixed values")

    @cached_property
    def top(self) -> float:
        """The value that a block's largest magnitude is mapped to: scale = absmax / top."""
        if self.kind in ("integer", "affine"):
            return float(self.limit)
        return 1.0 if self.kind == "log" else max(v for v in self.values if math.isfinite(v))

    @cached_property
    def max_scale(self) -> float:
        """The largest scale with which the top code does not decode to infinity."""
        scale = _fp32((math.sqrt(_MAX) if self.square else _MAX) / self.top)
        while self.top * scale > _MAX or (self.square and _fp32(self.top * scale) ** 2 > _MAX):
            scale = _below(scale)
        return scale

    @cached_property
    def min_scale(self) -> float:
        """The smallest scale: its reciprocal must not overflow, and code 1 must not decode to 0."""
        return 2.0**-74 if self.square else TINY

    @cached_property
    def sign_magnitude(self) -> bool:
        """Whether the top bit of a code is a sign (so that -0 is a code of its own)."""
        if self.kind != "codebook" or not self.signed:
            return False
        half = 1 << (self.bits - 1)
        return all(a == -b or (a != a and b != b) for a, b in zip(self.values[:half], self.values[half:], strict=True))

    @cached_property
    def ladder(self) -> tuple[tuple[float, int], ...]:
        """The finite (value, code) pairs, ascending, that encoding chooses from; magnitudes for sign-magnitude."""
        count = 1 << (self.bits - 1) if self.sign_magnitude else 1 << self.bits
        if self.kind == "integer":
            pairs = [(v, k) for k, v in enumerate(self.values) if abs(v) <= self.limit]
        else:
            pairs = [(v, k) for k, v in enumerate(self.values[:count]) if math.isfinite(v)]
        return tuple(sorted(pairs))

    @cached_property
    def thresholds(self) -> tuple[float, ...]:
        """fp32 numbers t such that the rank of u on the ladder is the count of t < u, ties included.

        A tie that goes up is a threshold one ulp lower. This is the meaning of rounding to nearest for every format
        with fixed values; arithmetic that is faster must agree with it everywhere (tests/test_codec.py).
        """
        out = []
        for (low, low_code), (high, _) in zip(self.ladder, self.ladder[1:], strict=False):
            middle = _fp32((_fp32(low) + _fp32(high)) / 2)
            goes_up = self.ties == "even" and low_code % 2 == 1
            out.append(_below(middle) if goes_up else middle)
        return tuple(out)

    @cached_property
    def zero_code(self) -> int | None:
        """The code that means exactly 0, or None when the format has no zero."""
        if self.kind in ("affine", "log"):
            return None
        return next((k for k, v in enumerate(self.values) if v == 0), None)

    @cached_property
    def tag(self) -> int:
        """A number that names this format in a checkpoint (states may hold numbers, not strings)."""
        text = f"{self.name}/{self.bits}/{self.block}"
        return zlib.crc32((text if self.scaling == PLAIN else f"{text}/{self.scaling}").encode()) & 0x7FFFFFFF

    def settled(self) -> Format:
        """Itself, with all found that is otherwise found when it is asked for: some compilers cannot trace how."""
        for name, value in vars(Format).items():
            if isinstance(value, cached_property):
                with contextlib.suppress(ValueError):
                    getattr(self, name)
        return self

    @property
    def compressed(self) -> bool:
        """Whether values are stored as uint8 codes with a scale, rather than as a torch dtype."""
        return self.kind != "float"

    @property
    def plain(self) -> bool:
        """Whether it is one that kernels of optimizer states take: fp32 scales, absmax / top, of blocks in a row."""
        return not self.compressed or (
            self.scaling == PLAIN and self.block[0] == 1 and self.block[1] > 0 and 8 % self.bits == 0
        )

    @property
    def bytes_per_value(self) -> float:
        """Storage per value with full blocks; what rows or a tensor have once costs nothing a value."""
        if not self.compressed:
            return self.bits / 8
        scale = {"fp32": 4.0, "bf16": 2.0, "e8m0": 1.0, "e4m3": 1.0, "double": 1.0}[self.scaling.stored]
        shared, outer = self.block[0] * self.block[1], self.scaling.outer
        sizes = {"scale": scale, "base": 4.0, "zero": 1.0, "scale_scale": 4 / DOUBLE_BLOCK}
        sizes["tensor_scale"] = 4 * shared / outer if outer else 0.0
        return self.bits / 8 + (sum(sizes.get(part, 0.0) for part in self.parts) / shared if shared else 0.0)

    def with_block(self, block: int | tuple[int, int]) -> Format:
        """The same format with one scale per `block` values along the row, named `name:block`, or per (rows, columns).

        In a pair, 0 stands for all rows or columns.
        """
        rows, columns = pair = (1, block) if isinstance(block, int) else block
        if isinstance(block, int) and block < 1:
            raise ValueError(f"block must be at least 1, not {block}")
        if min(pair) < 0:
            raise ValueError(f"block must be two numbers that are not negative, not {rows} x {columns}")
        if not self.compressed:
            raise ValueError(f"format {self.name!r} has no blocks")
        base = self.name.partition(":")[0]
        known = catalogue().get(base)
        if known is not None and known.block == pair:
            made = replace(self, block=pair, name=base)
            return known if made == known else made
        whole = {(1, 0): "row", (0, 0): "tensor"}
        text = whole.get(pair) or (str(columns) if rows == 1 else f"{rows}x{columns}")
        return replace(self, block=pair, name=f"{base}:{text}")

    def __reduce__(self) -> Any:
        # Catalogue formats travel by name: tables with NaNs (fp8) would not equal themselves after a copy.
        base = catalogue().get(self.name.partition(":")[0])
        if base is not None and self in (base, base.with_block(self.block) if base.compressed else base):
            return format, (self.name,)
        return super().__reduce__()

    def __hash__(self) -> int:  # steps look formats up all the time, and a table has up to 256 values
        return hash((self.name, self.bits, self.block))

    def __str__(self) -> str:
        return self.name


def _fp32(x: float) -> float:
    return struct.unpack("f", struct.pack("f", x))[0]


def _below(x: float) -> float:
    """The next fp32 number toward minus infinity."""
    # Dtype and device are spelled out here and below: torch's defaults may be anything when a table is first made.
    number, down = (torch.tensor(v, dtype=torch.float32, device="cpu") for v in (x, -math.inf))
    return torch.nextafter(number, down).item()


def _with_negatives(magnitudes: tuple[float, ...]) -> tuple[float, ...]:
    return magnitudes + tuple(-v for v in magnitudes)


def _fp8(dtype: torch.dtype) -> tuple[float, ...]:
    return tuple(torch.arange(256, dtype=torch.uint8, device="cpu").view(dtype).float().tolist())


def _minifloat(exponent_bits: int, mantissa_bits: int, bias: int) -> tuple[float, ...]:
    """The values of a small IEEE-like float with subnormals and no NaN or infinity, in code order, positive first."""
    fine = 1 << mantissa_bits
    steps = ((k % fine, k // fine) for k in range(fine << exponent_bits))
    return _with_negatives(tuple((m / fine + (e > 0)) * 2.0 ** (max(e, 1) - bias) for m, e in steps))


def _dynamic_map(signed: bool, exponent_bits: int, bits: int) -> tuple[float, ...]:
    """The dynamic-exponent tree of Dettmers 2015 (https://arxiv.org/abs/1511.04561), as bitsandbytes builds it.

    Decade `i` of `exponent_bits` has twice the values of the one below; each is the middle of a linear cell of [.1, 1].
    Computed in fp32 as there, so that the tables are equal to the last bit.
    """
    values = [0.0, 1.0]
    for i in range(exponent_bits):
        cells = 2 ** (i + bits - 1 - exponent_bits + (0 if signed else 1))
        edges = torch.linspace(0.1, 1, cells + 1, dtype=torch.float32, device="cpu")
        decade = (10 ** (i - exponent_bits + 1) * ((edges[:-1] + edges[1:]) / 2)).tolist()
        values += decade + ([-v for v in decade] if signed else [])
    return tuple(sorted(values))


# QLoRA's NormalFloat, https://arxiv.org/abs/2305.14314, appendix E, with bitsandbytes' fp32 values.
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


# QuEST's grid (https://arxiv.org/abs/2502.05003): 16 levels around zero without a zero, two's complement less a half.
_HALVES = tuple((k if k <= 8 else k - 16) - 0.5 for k in range(16))


@cache
def catalogue() -> dict[str, Format]:
    """Every named format, by name. Built at first use: nothing is computed at import."""
    f = Format
    e2m1, e4m3, e5m2 = _minifloat(2, 1, 1), _fp8(torch.float8_e4m3fn), _fp8(torch.float8_e5m2)
    e2m3, e3m2 = _minifloat(2, 3, 1), _minifloat(3, 2, 3)
    mx, nv = (1, 32), (1, 16)
    listed = [
        # What torch stores natively.
        f("fp32", 32, True, "IEEE single precision", "float", dtype=torch.float32),
        f("bf16", 16, True, "bfloat16", "float", dtype=torch.bfloat16),
        f("fp16", 16, True, "IEEE half precision", "float", dtype=torch.float16),
        # 8-bit states. Arithmetic codes: no codebook search (docs/decisions/001-state-formats.md).
        f("int8", 8, True, "-127..127 times absmax/127", "integer", (1, 256), limit=127, partner="sqrt8"),
        f("sqrt8", 8, False, "linear in the root: (k/255)^2", "integer", (1, 256), True, limit=255, partner="int8"),
        f("dyn8", 8, True, "bitsandbytes' signed dynamic map", block=(1, 256), ties="down",
          table=_dynamic_map(True, 7, 8), partner="udyn8"),
        f("udyn8", 8, False, "bitsandbytes' unsigned dynamic map", block=(1, 256), ties="down",
          table=_dynamic_map(False, 7, 8), partner="dyn8"),
        # 4-bit and 2-bit states.
        f("int4", 4, True, "-7..7 times absmax/7", "integer", limit=7, partner="sqrt4"),
        f("sqrt4", 4, False, "linear in the root: (k/15)^2", "integer", square=True, limit=15, partner="int4"),
        f("dyn4", 4, True, "lpmm's and torchao's signed dynamic map", ties="down",
          table=_dynamic_map(True, 3, 4), partner="ulin4"),
        f("ulin4", 4, False, "(k+1)/16: lpmm's and torchao's map without a zero", ties="down",
          table=tuple((k + 1) / 16 for k in range(16)), partner="dyn4"),
        f("log4", 4, False, "0 and 15 levels a third of an octave apart: 2^-4.67..1", ties="down",
          table=(0.0, *(_fp32(2.0 ** (-k / 3)) for k in range(14, -1, -1))), partner="nf4"),
        f("solo4", 4, False, "SOLO: absmax * base^k, base per block", "log", parts=("codes", "scale", "base"),
          partner="dyn4"),
        f("solo2", 2, False, "SOLO: absmax * base^k, base per block", "log", parts=("codes", "scale", "base"),
          partner="dyn4"),
        # Weights and activations.
        f("int4-affine", 4, True, "(code - zero) * scale, the range always holding 0", "affine", (1, 32),
          limit=15, parts=("codes", "scale", "zero")),
        f("e2m1", 4, True, "OCP FP4: 0 .5 1 1.5 2 3 4 6", block=(1, 32),
          table=e2m1),
        f("e1m2", 4, True, "FP4 with 2 mantissa bits: 0 .5 .. 3.5, a uniform grid", block=(1, 32),
          table=_with_negatives(tuple(k / 2 for k in range(8)))),
        f("e3m0", 4, True, "FP4 of powers of two: 0 .25 .. 16", block=(1, 32),
          table=_with_negatives((0.0, *(2.0**k for k in range(-2, 5))))),
        f("nf4", 4, True, "NormalFloat (QLoRA)", block=(1, 64), ties="down", table=_NF4, partner="log4"),
        f("bnb-fp4", 4, True, "bitsandbytes' own FP4, not E2M1", block=(1, 64), ties="down",
          table=_with_negatives(tuple(_fp32(v / 12) for v in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)))),
        f("e4m3", 8, True, "FP8 E4M3 (no infinity, max 448)", table=e4m3),
        f("e5m2", 8, True, "FP8 E5M2 (max 57344)", table=e5m2),
        f("e2m3", 6, True, "OCP FP6 E2M3 (max 7.5)", block=mx, table=e2m3),
        f("e3m2", 6, True, "OCP FP6 E3M2 (max 28)", block=mx, table=e3m2),
        # OCP microscaling formats 1.0: a power of two per 32 values; the rules for it are torchao's four.
        f("mxfp4", 4, True, "OCP MXFP4: E2M1, scale 2^k (floor)", block=mx, table=e2m1,
          scaling=Scaling("e8m0", rounding="floor")),
        f("mxfp4-ceil", 4, True, "MXFP4, scale rounded up from absmax's exponent", block=mx, table=e2m1,
          scaling=Scaling("e8m0", rounding="ceil")),
        f("mxfp4-even", 4, True, "MXFP4, absmax rounded to the element's mantissa first", block=mx, table=e2m1,
          scaling=Scaling("e8m0", rounding="even")),
        f("mxfp4-rceil", 4, True, "MXFP4, absmax/6 rounded up (NVIDIA): never clips", block=mx, table=e2m1,
          scaling=Scaling("e8m0", rounding="up")),
        f("mxfp4-sr", 4, True, "MXFP4 at 3/4 of its size: stochastic rounding never clips", block=mx, table=e2m1,
          scaling=Scaling("e8m0", rounding="floor", headroom=4 / 3)),
        f("mxfp6-e2m3", 6, True, "OCP MXFP6 E2M3 (floor)", block=mx, table=e2m3,
          scaling=Scaling("e8m0", rounding="floor")),
        f("mxfp6-e3m2", 6, True, "OCP MXFP6 E3M2 (floor)", block=mx, table=e3m2,
          scaling=Scaling("e8m0", rounding="floor")),
        f("mxfp8", 8, True, "OCP MXFP8 E4M3 (floor)", block=mx, table=e4m3,
          scaling=Scaling("e8m0", rounding="floor")),
        f("mxfp8-ceil", 8, True, "MXFP8 E4M3, scale rounded up from absmax's exponent", block=mx, table=e4m3,
          scaling=Scaling("e8m0", rounding="ceil")),
        f("mxfp8-even", 8, True, "MXFP8 E4M3, absmax rounded to the element's mantissa first", block=mx, table=e4m3,
          scaling=Scaling("e8m0", rounding="even")),
        f("mxfp8-rceil", 8, True, "MXFP8 E4M3, absmax/448 rounded up (NVIDIA)", block=mx, table=e4m3,
          scaling=Scaling("e8m0", rounding="up")),
        f("mxfp8-e5m2", 8, True, "OCP MXFP8 E5M2 (floor)", block=mx, table=e5m2,
          scaling=Scaling("e8m0", rounding="floor")),
        # NVIDIA's FP4: an E4M3 scale per 16 values, one fp32 scale per tensor (https://arxiv.org/abs/2509.25149).
        f("nvfp4", 4, True, "NVFP4: E2M1, E4M3 scale per 16, fp32 per tensor (as torchao)", block=nv, table=e2m1,
          scaling=Scaling("e4m3", peak=448, least=2.0**-6)),
        f("nvfp4-te", 4, True, "NVFP4, tiny block scales as in TransformerEngine", block=nv, table=e2m1,
          scaling=Scaling("e4m3", peak=448)),
        f("nvfp4-46", 4, True, "NVFP4, Four Over Six: the better of two scales", block=nv, table=e2m1,
          scaling=Scaling("e4m3", peak=256, candidates=(1.0, 1.5))),
        f("nvfp4-2d", 4, True, "NVFP4, one block scale per 16x16 tile", block=(16, 16), table=e2m1,
          scaling=Scaling("e4m3", peak=448, least=2.0**-6)),
        f("nvfp4-sr", 4, True, "NVFP4 with headroom 17/16: stochastic rounding never clips", block=nv, table=e2m1,
          scaling=Scaling("e4m3", gain=17 / 16, peak=256)),
        # Scales that cost less, and grids that clip.
        f("int4-bf16", 4, True, "-7..7 times a bf16 scale, absmax/7 rounded up", "integer", (1, 32), limit=7,
          scaling=Scaling("bf16", rounding="up")),
        f("nf4-dq", 4, True, "NormalFloat with double-quantized scales (QLoRA)", block=(1, 64), ties="down",
          table=_NF4, scaling=Scaling("double")),
        # Grids whose scale is chosen for a Gaussian: what lies beyond the top clips.
        f("int4-sawb", 4, True, "-7..7, clipped where a Gaussian loses least (SAWB)", "integer", (0, 0), limit=7,
          scaling=Scaling(statistic="sawb")),
        f("int4-quest", 4, True, "QuEST: ±1/2 .. ±15/2, 2.514 rms at the top", block=(1, 0), table=_HALVES,
          scaling=Scaling(statistic="rms", gain=2.513930578568423)),
        f("mxfp4-quest", 4, True, "Quartet: MXFP4, scale 2^floor(log2(2.92 rms / 6))", block=mx, table=e2m1,
          scaling=Scaling("e8m0", statistic="rms", rounding="floor", gain=2.92247856 / 6 * 4)),
        f("nvfp4-128", 4, True, "NVFP4 with the fp32 scale per 128 values (TetraJet-v2)", block=nv, table=e2m1,
          scaling=Scaling("e4m3", peak=448, least=2.0**-9, outer=128)),
        f("nvfp4-eden", 4, True, "NVFP4 for MS-EDEN: scales up to 256, .988 of absmax/6", block=nv, table=e2m1,
          scaling=Scaling("e4m3", gain=17 / 16 * 0.93, peak=255.99)),
        f("ternary", 2, True, "-1, 0, 1 times the mean magnitude (BitNet b1.58)", "integer", (0, 0), limit=1,
          scaling=Scaling(statistic="absmean")),
    ]  # fmt: skip
    return {fmt.name: fmt for fmt in listed}


def formats() -> tuple[str, ...]:
    """The names `format` knows.

    >>> "nf4" in formats()
    True
    """
    return tuple(catalogue())


def format(name: str | Format) -> Format:
    """Look a format up by name; `name:n` is the same format with one scale per n values along a row.

    `name:16x16` has one per tile of 16 rows and 16 columns, `name:row` one per row, `name:tensor` one in all.

    Raises `ValueError` with the nearest match for an unknown name.

    >>> format("e2m1").values[:8]
    (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
    >>> format("int4:32").block, format("int8:row").block, format("e2m1:16x16").block
    ((1, 32), (1, 0), (16, 16))
    """
    if isinstance(name, Format):
        return name
    base, colon, text = str(name).partition(":")
    if base not in catalogue():
        raise ValueError(f"unknown format {name!r}{nearest(base, formats())}; known: {', '.join(formats())}")
    found = catalogue()[base]
    if not colon:
        return found
    if not found.compressed:
        raise ValueError(f"format {base!r} has no blocks, so {name!r} means nothing")
    block = _block(text)
    if block is None:
        raise ValueError(
            f"format {name!r}: what follows the colon is a block length, a positive whole number, or rows and "
            "columns ('16x16'), or 'row' or 'tensor'"
        )
    return found.with_block(block)


def _block(text: str) -> tuple[int, int] | None:
    """The (rows, columns) that a name's text after the colon means, or None."""
    if text in ("row", "tensor"):
        return (1 if text == "row" else 0, 0)
    numbers = text.split("x")
    if not all(n.isascii() and n.isdecimal() for n in numbers):
        return None
    if len(numbers) == 1:
        return (1, int(text)) if int(text) > 0 else None
    return (int(numbers[0]), int(numbers[1])) if len(numbers) == 2 else None


# What people say, and the formats they may mean.
_USUAL = {"fp8": ("e4m3", "mxfp8"), "fp6": ("e2m3", "mxfp6-e2m3"), "fp4": ("e2m1", "mxfp4", "nvfp4")}


def nearest(word: str, known: tuple[str, ...] | list[str]) -> str:
    """` (did you mean 'x'?)` for the closest known word, or an empty string."""
    usual = [name for name in _USUAL.get(str(word), ()) if name in known]
    match = usual or difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.5)
    return f" (did you mean {' or '.join(map(repr, match))}?)" if match else ""
