"""What a quantized linear layer does in its three matmuls.

    forward   y  = Q(x) Q(W)ᵀ       forward = (activation, weight)
    dgrad     gx = Q(gy) Q(W)       dgrad   = (gradient, weight)
    wgrad     gW = Q(gy)ᵀ Q(x)      wgrad   = (gradient, activation)

Each of the six is an `Operand` or None (not quantized). In the backward matmuls the weight or activation may also be
`"forward"`: the very values that the forward pass used. That is the default, the straight-through estimator of the
quantization-aware training literature, and it costs nothing, since those values are saved anyway. An `Operand` in its
place quantizes the float original afresh, in blocks along that matmul's own contraction (output features for dgrad,
tokens for wgrad), which is what a 4-bit matrix unit would need.

Choice: a recipe is a value. Everything that decides what a layer computes is in it, so it prints on one line, compares,
pickles and goes into a result file. Its price: whatever no field expresses cannot be asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from types import MappingProxyType
from typing import Literal, TypeAlias

from ..formats import Format, formats, nearest
from ..formats import format as find_format
from .stablespam import GROUP, RELEASED

FORWARD: Literal["forward"] = "forward"


@dataclass(frozen=True)
class Operand:
    """How one operand of a matmul is quantized.

    Args:
        format: a signed format's name (`lowbit.formats()`; `"int4:16"` names the block too) or a `Format`, or one of
            the quantizers of the Stable-SPAM release (`lowbit.nn.stablespam`).
        block: values that share one scale, along the matmul's contraction; the format's own if None. The last block of
            a row may be shorter.
        rounding: "nearest", or "stochastic" (unbiased; backward matmuls only).
        outliers: how many of the largest magnitudes of each block are kept exact.
        flat: blocks run over the flattened tensor and may cross rows, as in the Stable-SPAM release.

    >>> print(Operand("int4", block=16, rounding="stochastic"))
    int4:16 stochastic
    """

    format: str | Format
    block: int | None = None
    rounding: Literal["nearest", "stochastic"] = "nearest"
    outliers: int | None = None
    flat: bool | None = None
    spec: Format | None = field(init=False, repr=False, compare=False)  # with this block; None for released quantizers

    def __post_init__(self) -> None:
        released = RELEASED.get(self.format) if isinstance(self.format, str) else None
        block = self._released_block() if released else self._format_block()
        defaults = {"block": block, "outliers": released.outliers if released else 0, "flat": released is not None}
        for name, value in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        object.__setattr__(self, "spec", None if released else self._spec())
        if self.rounding not in ("nearest", "stochastic"):
            raise ValueError(f"rounding must be 'nearest' or 'stochastic', not {self.rounding!r}")
        if not isinstance(self.outliers, int) or self.outliers < 0:
            raise ValueError(f"outliers must be a whole number, 0 or more, not {self.outliers!r}")
        if released and self.rounding == "stochastic":
            raise ValueError(f"{self.format!r} rounds to nearest, as released; for stochastic rounding use a format")

    def _released_block(self) -> int:
        block = GROUP if self.block is None else self.block
        if block < 1:
            raise ValueError(f"block must be at least 1, not {block}")
        return block

    def _format_block(self) -> int | None:
        """Check the format, move a block named in it ("int4:16") to `block`, and say which block it has."""
        if isinstance(self.format, str) and self.format.partition(":")[0] not in formats():
            known = (*formats(), *RELEASED)
            hint = nearest(self.format.partition(":")[0], known)
            raise ValueError(f"unknown format {self.format!r}{hint}; known: {', '.join(known)}")
        fmt = find_format(self.format)
        if not fmt.signed:
            raise ValueError(f"format {fmt.name!r} is unsigned and cannot hold weights, activations or gradients")
        if not fmt.compressed:
            if self.block is not None or self.outliers:
                raise ValueError(f"format {fmt.name!r} has no blocks, so block= and outliers= mean nothing")
            return None
        if isinstance(self.format, str) and ":" in self.format:
            if self.block not in (None, fmt.block[1]):
                raise ValueError(f"format {self.format!r} names a block, and block={self.block} another")
            object.__setattr__(self, "format", fmt.name.partition(":")[0])
        return fmt.with_block(fmt.block[1] if self.block is None else self.block).block[1]

    def _spec(self) -> Format:
        fmt = find_format(self.format)
        return fmt if self.block in (None, fmt.block[1]) else fmt.with_block(self.block)

    @property
    def bits(self) -> int:
        """The width of a code."""
        return 4 if self.spec is None else self.spec.bits

    def __str__(self) -> str:
        name = str(self.format) if self.block is None else f"{str(self.format).partition(':')[0]}:{self.block}"
        released = self.spec is None
        extras = [
            f"+{self.outliers} outliers" if self.outliers else "",
            "flat" if self.flat and not released else "",
            "stochastic" if self.rounding == "stochastic" else "",
        ]
        return " ".join([name, *filter(None, extras)])


Spec: TypeAlias = "str | Format | Operand | None"
Slot: TypeAlias = "Operand | None"
Reused: TypeAlias = 'Operand | Literal["forward"] | None'


@dataclass(frozen=True, init=False)
class Recipe:
    """What a quantized linear layer does in its three matmuls, and how its weight is stored.

    Args:
        forward: (activation, weight), each a format name, an `Operand` or None.
        dgrad: (gradient, weight) of the matmul that gives the input's gradient; the weight may be "forward" (default).
        wgrad: (gradient, activation) of the one that gives the weight's; the activation may be "forward" (default).
        weight: short for the weight in every matmul: quantized once, in the forward pass.
        activation: short for the activation in every matmul, in the same way.
        gradient: short for the gradient in dgrad and wgrad, quantized along each one's own contraction.
        store: how the weight is kept between steps. So far only "master": the float parameter stays as it is.
        seed: of stochastic rounding.
        name: what `str` and reports call it.

    >>> print(Recipe(weight="int4:32", activation="int8"))
    forward int8:256 × int4:32, dgrad float × forward, wgrad float × forward, store master
    """

    forward: tuple[Slot, Slot]
    dgrad: tuple[Slot, Reused]
    wgrad: tuple[Slot, Reused]
    store: str
    seed: int
    name: str = field(compare=False)

    def __init__(
        self,
        *,
        forward: tuple[Spec, Spec] | None = None,
        dgrad: tuple[Spec, Spec] | None = None,
        wgrad: tuple[Spec, Spec] | None = None,
        weight: Spec = None,
        activation: Spec = None,
        gradient: Spec = None,
        store: str = "master",
        seed: int = 0,
        name: str = "",
    ) -> None:
        _exclusive("forward", forward, weight=weight, activation=activation)
        _exclusive("dgrad", dgrad, gradient=gradient)
        _exclusive("wgrad", wgrad, gradient=gradient)
        if store != "master":
            raise ValueError(f"store={store!r}: only store='master', a float parameter, exists so far")
        if not isinstance(seed, int):
            raise ValueError(f"seed must be a whole number, not {seed!r}")
        values = {
            "forward": _pair("forward", (activation, weight) if forward is None else forward),
            "dgrad": _pair("dgrad", (gradient, FORWARD) if dgrad is None else dgrad),
            "wgrad": _pair("wgrad", (gradient, FORWARD) if wgrad is None else wgrad),
            "store": store,
            "seed": seed,
            "name": name,
        }
        for key, value in values.items():
            object.__setattr__(self, key, value)
        if not self.operands:
            raise ValueError("this recipe quantizes nothing: give weight=, activation=, gradient= or the matmuls")
        if any(operand is not None and operand.rounding == "stochastic" for operand in self.forward):
            raise ValueError(
                "forward: stochastic rounding is for backward matmuls; a forward pass rounds to nearest, so that "
                "evaluation is deterministic and recomputing it for gradient checkpointing gives the same values"
            )

    @property
    def operands(self) -> tuple[Operand, ...]:
        """The operands that are quantized, in the order of the matmuls."""
        return tuple(o for pair in (self.forward, self.dgrad, self.wgrad) for o in pair if isinstance(o, Operand))

    @property
    def stochastic(self) -> bool:
        """Whether any operand is rounded stochastically."""
        return any(operand.rounding == "stochastic" for operand in self.operands)

    @property
    def bits(self) -> int | None:
        """The widest code of the forward matmul, or None if one of its operands is not quantized."""
        activation, weight = self.forward
        return None if activation is None or weight is None else max(activation.bits, weight.bits)

    @property
    def matmuls(self) -> str:
        """The operands on one line: `forward a × b, dgrad c × d, wgrad e × f`."""
        pairs = {"forward": self.forward, "dgrad": self.dgrad, "wgrad": self.wgrad}
        return ", ".join(f"{k} {a or 'float'} × {b or 'float'}" for k, (a, b) in pairs.items())

    def __str__(self) -> str:
        return f"{self.name + ': ' if self.name else ''}{self.matmuls}, store {self.store}"


def _exclusive(name: str, given: object, **shorthands: object) -> None:
    for shorthand, value in shorthands.items():
        if given is not None and value is not None:
            raise ValueError(f"{shorthand}= is short for a part of {name}=: give one of them")


def _pair(name: str, pair: tuple[Spec, Spec]) -> tuple[Slot, Reused]:
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise ValueError(f"{name} must be a pair of operands, not {pair!r}")
    first, second = pair
    return _operand(name, first), FORWARD if second == FORWARD and name != "forward" else _operand(name, second)


def _operand(name: str, spec: Spec) -> Slot:
    if spec is None or isinstance(spec, Operand):
        return spec
    if not isinstance(spec, str | Format):
        raise TypeError(f"{name}: an operand is a format's name, an Operand or None, not {spec!r}")
    try:
        return Operand(spec)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


@cache
def presets() -> Mapping[str, Recipe]:
    """The recipes that have names. Built at first use.

    `int4` (symmetric) and `fp4` (E2M1) quantize weights and activations in blocks of 16 along the contraction. Shorter
    blocks cost more scales and lose less: against float, a nano LLaMA trained with Muon loses .039 nats a byte with
    int4:16, .056 with int4:32 and .081 with int4:64; .048 with e2m1:16 and .056 with e2m1:32 (4 paired seeds; 16
    against 32 is -.018 [-.030, -.005] for int4 and -.008 [-.022, +.007], not significant, for E2M1, which follows so
    that the two differ in the grid alone). See benchmarks/recipe_blocks.py and its results. No outliers are kept: none
    were needed. Blocks of 16 with 16-bit scales are 5 bits a value; nothing is packed yet, so no memory was at stake.

    `stablespam-int4` and `stablespam-fp4` are the paper's, as released (`lowbit.nn.stablespam`), to compare with.
    """
    made = {
        "int4": Recipe(name="int4", weight="int4:16", activation="int4:16"),
        "fp4": Recipe(name="fp4", weight="e2m1:16", activation="e2m1:16"),
        "stablespam-int4": Recipe(
            name="stablespam-int4", weight="stablespam-int4-weight", activation="stablespam-int4-activation"
        ),
        "stablespam-fp4": Recipe(name="stablespam-fp4", weight="stablespam-fp4", activation="stablespam-fp4"),
    }
    return MappingProxyType(made)


def recipes() -> tuple[str, ...]:
    """The names of the recipes `quantize_` knows.

    >>> "int4" in recipes()
    True
    """
    return tuple(presets())


def find_recipe(recipe: str | Recipe) -> Recipe:
    """A recipe by name, or the recipe itself; `ValueError` with the nearest match for an unknown name."""
    if isinstance(recipe, Recipe):
        return recipe
    if not isinstance(recipe, str):
        raise TypeError(f"recipe must be a name or a Recipe, not {type(recipe).__name__}")
    if recipe not in presets():
        raise ValueError(f"unknown recipe {recipe!r}{nearest(recipe, recipes())}; known: {', '.join(recipes())}")
    return presets()[recipe]
