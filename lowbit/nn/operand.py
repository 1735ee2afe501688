"""How one operand of a matmul is quantized: a value with a field for each thing that a paper decides."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

from ..formats import PLAIN, Format, formats, nearest
from ..formats import format as find_format
from ..rotation import SIZES
from .stablespam import GROUP, RELEASED

Rounding: TypeAlias = Literal["nearest", "stochastic", "eden"]
Signs: TypeAlias = Literal["auto", "fixed", "none"]
Estimator: TypeAlias = Literal["ste", "clip", "trust", "dge"]
Source: TypeAlias = Literal["original", "forward"]
Block: TypeAlias = "int | tuple[int, int]"


@dataclass(frozen=True)
class Operand:
    """How one operand of a matmul is quantized.

    Args:
        format: a signed format's name (`lowbit.formats()`; `"int4:16"` names the block too) or a `Format`, or one of
            the quantizers of the Stable-SPAM release (`lowbit.nn.stablespam`).
        block: values that share one scale, along the matmul's contraction, or (rows, columns) of them, where 0 stands
            for all; the format's own if None. The last block of a row may be shorter.
        rounding: "nearest", or, in backward matmuls only, "stochastic" (unbiased) or "eden" (MS-EDEN of Quartet II:
            `lowbit.nn.eden`).
        outliers: how many of the largest magnitudes of each block are kept exact.
        flat: blocks run over the flattened tensor and may cross rows, as in the Stable-SPAM release.
        hadamard: 16, 32, 64 or 128 values along the contraction are mixed by a Hadamard rotation before they are
            quantized (`lowbit.rotation`); 0: none. Both operands of a matmul must have the same. Where the size does
            not divide the contraction, zeros are appended to it: that changes no product.
        signs: of the rotation: "auto" draws them anew in each backward pass and keeps them in the forward pass; "fixed"
            keeps them always; "none" changes no sign.
        prescale: what values are multiplied by before they are rounded, and divided by after, at the scale that they
            have without it: less than 1 leaves room under the format's top for stochastic rounding (3/4 in
            https://arxiv.org/abs/2502.20586).
        estimator: what multiplies the gradient on its way through the rounding (`lowbit.nn.estimators`): "ste" nothing,
            "clip" and "trust" a mask, "dge" the slope of a smooth step. For operands of the forward matmul.
        of: what a backward matmul quantizes: the "original" weight or activation, or the values that the "forward"
            matmul used (double quantization).

    >>> print(Operand("int4", block=16, rounding="stochastic", hadamard=64))
    int4:16 stochastic rht64
    """

    format: str | Format
    block: Block | None = None
    rounding: Rounding = "nearest"
    outliers: int | None = None
    flat: bool | None = None
    hadamard: int = 0
    signs: Signs = "auto"
    prescale: float = 1.0
    estimator: Estimator = "ste"
    of: Source = "original"
    spec: Format | None = field(init=False, repr=False, compare=False)  # with this block; None for released quantizers

    def __post_init__(self) -> None:
        released = RELEASED.get(self.format) if isinstance(self.format, str) else None
        block = self._released_block() if released else self._format_block()
        defaults = {"block": block, "outliers": released.outliers if released else 0, "flat": released is not None}
        for name, value in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        object.__setattr__(self, "spec", None if released else self._spec())
        if released:
            self._check_released()
        self._check_choices()
        if not isinstance(self.outliers, int) or self.outliers < 0:
            raise ValueError(f"outliers must be a whole number, 0 or more, not {self.outliers!r}")

    def _check_choices(self) -> None:
        for name, alias in (("rounding", Rounding), ("signs", Signs), ("estimator", Estimator), ("of", Source)):
            choices = alias.__args__
            if getattr(self, name) not in choices:
                listed = ", ".join(map(repr, choices[:-1])) + f" or {choices[-1]!r}"
                raise ValueError(f"{name} must be {listed}, not {getattr(self, name)!r}")
        if self.hadamard not in (0, *SIZES):
            raise ValueError(f"hadamard must be 0 or one of {', '.join(map(str, SIZES))}, not {self.hadamard!r}")
        if not self.hadamard and self.signs != "auto":
            raise ValueError(f"signs={self.signs!r} are a rotation's, and hadamard is 0")
        if (self.outliers or self.flat) and not isinstance(self.block, int):
            raise ValueError(f"outliers= and flat= are for blocks along a row, and this one is {self.block}")
        if self.estimator != "ste" and (self.codes is None or self.codes.kind not in ("integer", "codebook")):
            raise ValueError(
                f"estimator={self.estimator!r} asks how far a value is from a grid: it needs a scaled grid "
                "without outliers= and flat="
            )
        if self.hadamard and self.flat:
            raise ValueError("flat blocks cross rows, and a rotation does not: give one of flat= and hadamard=")
        if self.rounding == "eden":
            self._check_eden()
        if not 0 < self.prescale <= 1:
            raise ValueError(f"prescale must be above 0 and at most 1, not {self.prescale!r}")

    def _check_eden(self) -> None:
        fmt = self.codes
        if not self.hadamard:
            raise ValueError("rounding='eden' is unbiased over random rotations: give hadamard= too")
        if fmt is None or fmt.scaling.stored != "e4m3" or fmt.block[0] != 1 or self.hadamard % max(1, fmt.block[1]):
            raise ValueError(
                "rounding='eden' rounds stored scales: it needs a format with e4m3 scales (nvfp4-eden), whose block "
                f"divides hadamard={self.hadamard}, not {fmt or self.format}"
            )

    def _check_released(self) -> None:
        plain = {"rounding": "nearest", "hadamard": 0, "prescale": 1.0, "estimator": "ste"}
        for name, value in plain.items():
            if getattr(self, name) != value:
                raise ValueError(
                    f"{self.format!r} is a quantizer as released: it rounds to nearest and nothing else, "
                    f"so {name}={getattr(self, name)!r} cannot be had; use a format"
                )

    def _released_block(self) -> Block:
        block = GROUP if self.block is None else self.block
        if not isinstance(block, int) or block < 1:
            raise ValueError(f"block must be at least 1, not {block}")
        return block

    def _format_block(self) -> Block | None:
        """Check the format, move a block named in it ("int4:16") to `block`, and say which block it has."""
        if isinstance(self.format, str) and self.format.partition(":")[0] not in formats():
            known = (*formats(), *RELEASED)
            hint = nearest(self.format.partition(":")[0], known)
            raise ValueError(f"unknown format {self.format!r}{hint}; known: {', '.join(known)}")
        fmt = find_format(self.format)
        if not fmt.signed:
            raise ValueError(f"format {fmt.name!r} is unsigned and cannot hold weights, activations or gradients")
        if not fmt.compressed:
            if self.block is not None or self.outliers or self.prescale != 1:
                raise ValueError(f"format {fmt.name!r} has no blocks, so block=, outliers= and prescale= mean nothing")
            return None
        if isinstance(self.format, str) and ":" in self.format:
            if self.block not in (None, _short(fmt.block)):
                raise ValueError(f"format {self.format!r} names a block, and block={self.block} another")
            object.__setattr__(self, "format", fmt.name.partition(":")[0])
        return _short((fmt if self.block is None else fmt.with_block(self.block)).block)

    def _spec(self) -> Format:
        fmt = find_format(self.format)
        fmt = fmt if self.block in (None, _short(fmt.block)) else fmt.with_block(self.block)
        if self.prescale == 1:
            return fmt
        if fmt.kind not in ("integer", "codebook"):
            raise ValueError(f"format {fmt.name!r} is {fmt.kind}, and prescale= is for scaled grids")
        way = fmt.scaling
        if way.stored == "e8m0":  # a power of two is found first, and the factor is apart from it
            way = replace(way, headroom=way.headroom / self.prescale)
        else:
            way = replace(way, gain=way.gain / self.prescale)
        return replace(fmt, scaling=way, name=f"{fmt.name}×{self.prescale:g}")

    @property
    def bits(self) -> int:
        """The width of a code."""
        return 4 if self.spec is None else self.spec.bits

    @property
    def random(self) -> bool:
        """Whether what it becomes in a backward matmul differs from call to call."""
        return self.rounding != "nearest" or (self.hadamard > 0 and self.signs == "auto")

    @property
    def codes(self) -> Format | None:
        """The format whose codes hold what the operand becomes; None where something is left that no code holds."""
        return None if self.outliers or self.flat else self.spec

    def __str__(self) -> str:
        signs = {"auto": "rht", "fixed": "fixed rht", "none": "hadamard"}
        extras = [
            f"+{self.outliers} outliers" if self.outliers else "",
            "flat" if self.flat and self.spec is not None else "",
            self.rounding if self.rounding != "nearest" else "",
            f"{signs[self.signs]}{self.hadamard}" if self.hadamard else "",
            f"×{self.prescale:g}" if self.prescale != 1 else "",
            self.estimator if self.estimator != "ste" else "",
            "of forward" if self.of == "forward" else "",
        ]
        return " ".join([self._name(), *filter(None, extras)])

    def _name(self) -> str:
        """The format and its block, unless that is part of what the format is."""
        if self.spec is None or not self.spec.compressed or self.spec.scaling != PLAIN:
            return str(self.spec or self.format).partition("×")[0] + (f":{self.block}" if self.spec is None else "")
        base = self.spec.name.partition(":")[0]
        return f"{base}:{self.block}" if isinstance(self.block, int) else self.spec.name


def _short(block: tuple[int, int]) -> Block:
    """Values along a row as a number, other blocks as they are."""
    return block[1] if block[0] == 1 and block[1] > 0 else block
