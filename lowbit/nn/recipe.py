"""What a quantized linear layer does in its three matmuls.

    forward   y  = Q(x) Q(W)ᵀ       forward = (activation, weight)
    dgrad     gx = Q(gy) Q(W)       dgrad   = (gradient, weight)
    wgrad     gW = Q(gy)ᵀ Q(x)      wgrad   = (gradient, activation)

Each of the six is an `Operand` or None (not quantized). In the backward matmuls the weight or activation may also be
`"forward"`: the very values that the forward pass used. That is the default, the straight-through estimator of the
quantization-aware training literature. An `Operand` in its place quantizes afresh, in blocks along that matmul's own
contraction (output features for dgrad, tokens for wgrad), which is what a 4-bit matrix unit needs.

Choice: a recipe is a value. Everything that decides what a layer computes is in it, so it prints on one line, compares,
pickles and goes into a result file. Its price: whatever no field expresses cannot be asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from ..formats import Format
from ..stored import find_store
from .operand import Operand

FORWARD: Literal["forward"] = "forward"

Spec: TypeAlias = "str | Format | Operand | None"
Slot: TypeAlias = "Operand | None"
Reused: TypeAlias = 'Operand | Literal["forward"] | None'


@dataclass(frozen=True, init=False)
class Recipe:
    """What a quantized linear layer does in its three matmuls, how its weight is stored, and which blocks stay dense.

    Args:
        forward: (activation, weight), each a format name, an `Operand` or None.
        dgrad: (gradient, weight) of the matmul that gives the input's gradient; the weight may be "forward" (default).
        wgrad: (gradient, activation) of the one that gives the weight's; the activation may be "forward" (default).
        weight: short for the weight in every matmul: quantized once, in the forward pass.
        activation: short for the activation in every matmul, in the same way.
        gradient: short for the gradient in dgrad and wgrad, quantized along each one's own contraction.
        store: how the weight is kept between steps: "master", the float parameter stays as it is; or as codes and
            scales with no float copy, by the name of a store (`lowbit.nn.stored`: "int8", "int4", "split" …). Where the
            forward weight is None, or has the format of the store, the stored values are what it multiplies with.
        embedding: the name of a store for the tables of `nn.Embedding`, or None: they stay dense.
        frozen: `quantize_` freezes the weights of the layers that it converts: they are a base under adapters.
        dense: how many of a model's first and last blocks `quantize_` leaves alone: whole numbers, or below 1 a part
            of all blocks, rounded up.
        seed: of stochastic rounding and of the signs of rotations.
        name: what `str` and reports call it.

    Raises:
        ValueError: the operands of a matmul do not fit each other, or one does something that its place forbids.

    >>> print(Recipe(weight="int4:32", activation="int8"))
    forward int8:256 × int4:32, dgrad float × forward, wgrad float × forward, store master
    """

    forward: tuple[Slot, Slot]
    dgrad: tuple[Slot, Reused]
    wgrad: tuple[Slot, Reused]
    store: str
    embedding: str | None
    frozen: bool
    dense: tuple[float, float]
    seed: int
    name: str

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
        embedding: str | None = None,
        frozen: bool = False,
        dense: tuple[float, float] = (0, 0),
        seed: int = 0,
        name: str = "",
    ) -> None:
        _exclusive("forward", forward, weight=weight, activation=activation)
        _exclusive("dgrad", dgrad, gradient=gradient)
        _exclusive("wgrad", wgrad, gradient=gradient)
        if not isinstance(seed, int):
            raise ValueError(f"seed must be a whole number, not {seed!r}")
        values = {
            "forward": _pair("forward", (activation, weight) if forward is None else forward),
            "dgrad": _pair("dgrad", (gradient, FORWARD) if dgrad is None else dgrad),
            "wgrad": _pair("wgrad", (gradient, FORWARD) if wgrad is None else wgrad),
            "store": store if store == "master" else find_store(store).name,
            "embedding": None if embedding is None else find_store(embedding).name,
            "frozen": frozen,
            "dense": _dense(dense),
            "seed": seed,
            "name": name,
        }
        for key, value in values.items():
            object.__setattr__(self, key, value)
        if not self.operands and not self.stores:
            raise ValueError(
                "this recipe quantizes nothing: give weight=, activation=, gradient= or the matmuls, or store="
            )
        self._check()

    def _check(self) -> None:
        for operand in self.forward:
            if operand is not None and operand.rounding != "nearest":
                raise ValueError(
                    f"forward: {operand.rounding} rounding is for backward matmuls; a forward pass rounds to nearest, "
                    "so that evaluation is deterministic and recomputing it for gradient checkpointing gives the same "
                    "values"
                )
            if operand is not None and operand.of == "forward":
                raise ValueError("forward: of='forward' is for the weight or activation of a backward matmul")
        for matmul, pair in (("dgrad", self.dgrad), ("wgrad", self.wgrad)):
            gradient, other = pair
            if gradient is not None and gradient.of == "forward":
                raise ValueError(f"{matmul}: of='forward' is for its second operand; the forward pass has no gradient")
            for operand in (gradient, other):
                if isinstance(operand, Operand) and operand.estimator != "ste":
                    raise ValueError(
                        f"{matmul}: estimator={operand.estimator!r} is for an operand of the forward matmul: "
                        "nothing is differentiated through a backward one"
                    )
        for matmul, pair in (("forward", self.forward), ("dgrad", self.dgrad), ("wgrad", self.wgrad)):
            first, second = (_rotation(operand) for operand in pair)
            if first != second:
                raise ValueError(
                    f"{matmul}: both operands of a matmul must be rotated alike, or the rotations do not cancel; "
                    f"here the first has {_said(first)} and the second {_said(second)}"
                )

    @property
    def operands(self) -> tuple[Operand, ...]:
        """The operands that are quantized, in the order of the matmuls."""
        return tuple(o for pair in (self.forward, self.dgrad, self.wgrad) for o in pair if isinstance(o, Operand))

    @property
    def stores(self) -> bool:
        """Whether weights are kept as codes, with no float master."""
        return self.store != "master" or self.embedding is not None

    @property
    def stochastic(self) -> bool:
        """Whether gradients differ from call to call: stochastic rounding, or rotations drawn anew."""
        return any(o.random for pair in (self.dgrad, self.wgrad) for o in pair if isinstance(o, Operand))

    @property
    def bits(self) -> int | None:
        """The widest code of the forward matmul, or None if one of its operands is not quantized."""
        activation, weight = self.forward
        return None if activation is None or weight is None else max(activation.bits, weight.bits)

    @property
    def matmuls(self) -> str:
        """The operands on one line: `forward a × b, dgrad c × d, wgrad e × f`; "stored" are the store's own values."""
        kept = "float" if self.store == "master" else "stored"
        pairs = {"forward": (self.forward, kept), "dgrad": (self.dgrad, kept), "wgrad": (self.wgrad, "float")}
        return ", ".join(f"{name} {a or 'float'} × {b or other}" for name, ((a, b), other) in pairs.items())

    def __str__(self) -> str:
        first, last = self.dense
        dense = f", dense first {first:g} and last {last:g}" if first or last else ""
        tables = f", embeddings {self.embedding}" if self.embedding else ""
        tables += ", frozen" if self.frozen else ""
        return f"{self.name + ': ' if self.name else ''}{self.matmuls}, store {self.store}{tables}{dense}"


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


def _dense(dense: tuple[float, float]) -> tuple[float, float]:
    if not isinstance(dense, tuple | list) or len(dense) != 2:
        raise ValueError(f"dense must be a pair, (first, last), not {dense!r}")
    for count in dense:
        if not isinstance(count, int | float) or count < 0 or (count >= 1 and count != int(count)):
            raise ValueError(f"dense: a number of blocks is whole, or a part below 1 of all blocks, not {count!r}")
    return dense[0], dense[1]


def _rotation(operand: Reused) -> tuple[int, str]:
    return (operand.hadamard, operand.signs) if isinstance(operand, Operand) and operand.hadamard else (0, "")


def _said(rotation: tuple[int, str]) -> str:
    size, signs = rotation
    return f"hadamard={size}, signs={signs!r}" if size else "none"
