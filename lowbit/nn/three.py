"""The three matmuls of a quantized linear layer, as one autograd function.

    forward   y  = Q(x) Q(W)ᵀ + b     keeps what the backward pass needs of x, as codes, and W itself
    backward  gx = Q(gy) Q(W)         where x needs a gradient
              gW = Q(gy)ᵀ Q(x)        where W does: frozen weights keep no activations
              gb = sum of gy

What is kept of x: its codes where wgrad uses the values of the forward pass, or the codes of the operand that wgrad
makes of x, which the forward pass makes for it: its random bits depend on nothing but (seed, layer, call). So they take
the place of x in 4 to 9 bits a value. Where no codes hold the operand (outliers kept exact, flat groups, no
quantization at all) it is x itself, which the layer before often keeps anyway. Nothing is kept of W but the parameter:
its values are made again, for less than it takes to multiply with them.

A rotation R of the forward pass turns both x and W, so backward matmuls that use its values give gx R and gW R. They
are turned back last, after the mask of an estimator, which belongs to the turned values.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..rotation import Rotation
from ..rounding import key
from ..rows import part_shapes
from . import estimators
from .fake import encode, fake_quantize, padded, quantized, turned, turned_back
from .matmul import Coded, Kind, kind_of, multiplied_in, product
from .operand import Operand
from .recipe import FORWARD, Recipe, Reused
from .stored import decoded, is_stored

# Numbers in the key of the random bits: dgrad's and wgrad's two operands, and their rotations.
_DGRAD, _WGRAD, _ROTATIONS = (1, 2), (3, 4), {"dgrad": 5, "wgrad": 6}


def forward_rotation(recipe: Recipe) -> Rotation | None:
    """Of both operands of the forward matmul: the same in every call, so that evaluation is deterministic."""
    operand = recipe.forward[1]
    if operand is None or not operand.hadamard:
        return None
    return Rotation(operand.hadamard, None if operand.signs == "none" else recipe.seed)


def forward_weight(weight: Tensor, recipe: Recipe, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight as the forward matmul multiplies with it, turned (or the weight itself, if not quantized).

    It is computed in fp32, and rounded to `dtype` where that costs nothing.
    """
    operand, rotation = recipe.forward[1], forward_rotation(recipe)
    if is_stored(weight, operand) and rotation is None:  # rounding it once more could only move it
        return decoded(weight)
    return fake_quantize(decoded(weight), operand, rotation=rotation, dtype=dtype)


def _made(
    x: Tensor,
    operand: Operand | None,
    noise: tuple[int, int] | None,
    rotation: Rotation | None,
    kind: Kind | None,
    dtype: torch.dtype,
) -> Tensor | Coded:
    """An operand of a product: as codes where those are multiplied (`matmul.kind_of`), else as values of a dtype."""
    parts = encode(x, operand, noise, rotation) if kind and operand is not None else {}
    if parts and operand is not None:
        return Coded(operand, parts, padded(x.shape[1], rotation))
    return fake_quantize(x, operand, noise, rotation, dtype)


def as_matrix(x: Tensor) -> Tensor:
    """[..., cols] as [rows, cols]; a reshape by -1 would not know the rows of an empty tensor."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


@dataclass(frozen=True)
class Call:
    """One call of a layer: its recipe, the dtype it computes in, and what its random bits depend on."""

    recipe: Recipe
    dtype: torch.dtype
    number: int
    layer: int

    def noise(self, operand: int) -> tuple[int, int]:
        """The key of an operand's random bits."""
        return key(self.recipe.seed, self.number, self.layer, operand)

    def rotation(self, matmul: str) -> Rotation | None:
        """Of both operands of a backward matmul."""
        operand = {"dgrad": self.recipe.dgrad, "wgrad": self.recipe.wgrad}[matmul][0]
        if operand is None or not operand.hadamard:
            return None
        if operand.signs != "auto":
            return Rotation(operand.hadamard, self.recipe.seed if operand.signs == "fixed" else None)
        low, high = self.noise(_ROTATIONS[matmul])
        return Rotation(operand.hadamard, low | high << 32)

    def forward(
        self, rows: Tensor, weight: Tensor, bias: Tensor | None, needs: tuple[bool, bool]
    ) -> tuple[Tensor, dict]:
        """(y, what to keep for the backward pass), where (x, W) need gradients."""
        activation, other = self.recipe.forward[0], self.recipe.wgrad[1]
        needs_x, needs_weight = needs
        rotation, codes, mask = forward_rotation(self.recipe), {}, None
        kind = kind_of(*self.recipe.forward, rows.device)
        edge, reused = estimators.edge(activation) if needs_x else None, needs_weight and other == FORWARD
        again = needs_weight and isinstance(other, Operand) and other.of == FORWARD  # values are quantized once more
        inside = torch.float32 if again else multiplied_in(rows.device, self.dtype)
        if activation is not None and (reused or edge is not None):
            values, parts = quantized(rows, activation, rotation=rotation, edge=edge, dtype=inside)
            mask, codes = parts.pop("inside", None), parts if reused else {}
            first = Coded(activation, parts, padded(rows.shape[1], rotation)) if kind and parts else values
        else:
            first = _made(rows, activation, None, rotation, kind, inside)
        if needs_weight and isinstance(other, Operand):
            values = first.values() if isinstance(first, Coded) else first
            source = (values if other.of == FORWARD else rows).t()
            codes = encode(source, other, self.noise(_WGRAD[1]), self.rotation("wgrad"))
        kept = {f"x.{name}": part for name, part in codes.items()}
        if needs_weight and not codes:
            kept["x"] = rows
        if needs_x or (needs_weight and _estimated(self.recipe.forward[1])):
            kept["weight"] = weight
        if mask is not None:
            kept["mask"] = mask
        elif needs_x and _estimated(activation):
            kept["x"] = rows
        return product(
            first, self._weight(weight, kind, multiplied_in(rows.device, self.dtype)), self.dtype, bias
        ), kept

    def _weight(self, weight: Tensor, kind: Kind | None, dtype: torch.dtype) -> Tensor | Coded:
        """Of the forward matmul."""
        if kind is None or is_stored(weight, self.recipe.forward[1]):
            return forward_weight(weight, self.recipe, dtype)
        return _made(decoded(weight), self.recipe.forward[1], None, forward_rotation(self.recipe), kind, dtype)

    def keeps(self, needs: tuple[bool, bool], empty: bool) -> tuple[str, ...]:
        """The names of what `forward` keeps, of an input that has values or none."""
        activation, operand = self.recipe.forward
        needs_x, needs_weight = needs
        coded = self._coded() is not None and needs_weight and not empty
        names = [f"x.{part}" for part in _part_names(self._coded())] if coded else []
        mask = needs_x and not empty and estimators.edge(activation) is not None
        if (needs_weight and not coded) or (needs_x and _estimated(activation) and not mask):
            names.append("x")
        if needs_x or (needs_weight and _estimated(operand)):
            names.append("weight")
        return (*names, "mask") if mask else tuple(names)

    def kept_shapes(
        self, shape: tuple[int, int], needs: tuple[bool, bool]
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shapes and dtypes of what `forward` makes to keep, of x of this shape."""
        names, (tokens, cols) = self.keeps(needs, 0 in shape), shape
        turned_cols = padded(cols, forward_rotation(self.recipe))
        found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        if names and names[0].startswith("x."):
            operand, other = self._coded(), self.recipe.wgrad[1]
            assert operand is not None and operand.codes is not None
            coded = (tokens, turned_cols)
            if isinstance(other, Operand):
                coded = (turned_cols if other.of == FORWARD else cols, padded(tokens, self.rotation("wgrad")))
            found = {f"x.{part}": shape for part, shape in part_shapes(operand.codes, coded).items()}
        return found | ({"mask": ((tokens, -(-turned_cols // 8)), torch.uint8)} if "mask" in names else {})

    def _coded(self) -> Operand | None:
        """The operand whose codes are kept of x, if there is one."""
        operand = self.recipe.forward[0] if self.recipe.wgrad[1] == FORWARD else self.recipe.wgrad[1]
        return operand if isinstance(operand, Operand) and operand.codes is not None else None

    def dgrad(self, gy: Tensor, kept: dict[str, Tensor], cols: int) -> Tensor:
        """gx = Q(gy) Q(W), contracted over output features: [tokens, cols]."""
        gradient, other = self.recipe.dgrad
        rotation = self.rotation("dgrad")
        again, inside = other == FORWARD, multiplied_in(gy.device, self.dtype)
        second = self.recipe.forward[1] if again else other
        kind = kind_of(gradient, second, gy.device, b_across=again) if isinstance(second, Operand) else None
        if again:
            weight = self._weight_again(kept, inside, kind).t()
        else:
            source = self._weight_again(kept, torch.float32) if _of_forward(other) else decoded(kept["weight"])
            assert isinstance(source, Tensor) and (other is None or isinstance(other, Operand))  # no kind: no codes
            weight = _made(source.t(), other, self.noise(_DGRAD[1]), rotation, kind, inside)
        gx = product(_made(gy, gradient, self.noise(_DGRAD[0]), rotation, kind, inside), weight, self.dtype)
        return self._through(gx, self.recipe.forward[0], kept, "x", _of_forward(other), cols)

    def _weight_again(self, kept: dict[str, Tensor], dtype: torch.dtype, kind: Kind | None = None) -> Tensor | Coded:
        """Of the forward matmul, in a backward pass; the mask of its estimator goes to what is kept, for wgrad."""
        operand, rotation, weight = self.recipe.forward[1], forward_rotation(self.recipe), kept["weight"]
        edge = estimators.edge(operand)
        if operand is None or kind or edge is None or (is_stored(weight, operand) and rotation is None):
            return self._weight(weight, kind, dtype)
        values, parts = quantized(decoded(weight), operand, rotation=rotation, edge=edge, dtype=dtype)
        kept |= {"weight.mask": parts["inside"]} if parts else {}
        return values

    def wgrad(self, gy: Tensor, kept: dict[str, Tensor], cols: int) -> Tensor:
        """gW = Q(gy)ᵀ Q(x), contracted over tokens: [output features, cols]."""
        gradient, other = self.recipe.wgrad
        x = self._wgrad_activation(kept, gy.shape[0], cols)
        kind = kind_of(gradient, x.operand, gy.device, b_across=x.across) if isinstance(x, Coded) else None
        inside = multiplied_in(gy.device, self.dtype)
        g = _made(gy.t(), gradient, self.noise(_WGRAD[0]), self.rotation("wgrad"), kind, inside)
        return self._through(
            product(g, x, self.dtype), self.recipe.forward[1], kept, "weight", _of_forward(other), cols
        )

    def _wgrad_activation(self, kept: dict[str, Tensor], tokens: int, cols: int) -> Tensor | Coded:
        """Q(x) as wgrad multiplies with it, [features, tokens], from what was kept."""
        activation, other = self.recipe.forward[0], self.recipe.wgrad[1]
        codes = {name[2:]: part for name, part in kept.items() if name.startswith("x.")}
        if codes and isinstance(other, Operand):
            return Coded(other, codes, padded(tokens, self.rotation("wgrad")))
        if codes:
            assert activation is not None
            return Coded(activation, codes, padded(cols, forward_rotation(self.recipe))).t()
        x = kept["x"]
        if _of_forward(other):
            x = fake_quantize(x, activation, rotation=forward_rotation(self.recipe))
        if isinstance(other, Operand):
            return fake_quantize(x.t(), other, self.noise(_WGRAD[1]), self.rotation("wgrad"))
        return x.t()

    def _through(
        self, g: Tensor, operand: Operand | None, kept: dict[str, Tensor], name: str, is_turned: bool, cols: int
    ) -> Tensor:
        """A gradient on its way through the rounding of a forward operand, and through the rotation before it."""
        rotation = forward_rotation(self.recipe)
        if _estimated(operand):
            assert operand is not None
            g = g if is_turned else turned(g, rotation)
            mask = kept.get({"x": "mask", "weight": "weight.mask"}[name])
            if mask is not None:
                return turned_back(g, rotation, cols, mask)
            factor = estimators.factor(turned(decoded(kept[name]).detach(), rotation), operand)
            g, is_turned = g * factor.to(g.dtype), True
        return turned_back(g, rotation, cols) if is_turned else g


def _part_names(operand: Reused) -> tuple[str, ...]:
    assert isinstance(operand, Operand) and operand.codes is not None
    return operand.codes.parts if operand.codes.compressed else ("codes",)


def _of_forward(operand: Reused) -> bool:
    return operand == FORWARD or (isinstance(operand, Operand) and operand.of == FORWARD)


def _estimated(operand: Operand | None) -> bool:
    return operand is not None and operand.estimator != "ste"


class ThreeMatmuls(torch.autograd.Function):
    """y = x Wᵀ + b by a recipe; see the module."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, call: Call) -> Tensor:
        y, kept = call.forward(as_matrix(x), weight, bias, ctx.needs_input_grad[:2])
        if call.recipe.stochastic and not torch.compiler.is_compiling():
            # Where checkpointing repeats this call, what is kept is the repeated call's: so must be its random bits.
            kept["number"] = torch.tensor(call.number)
        ctx.call, ctx.kept, ctx.input_shape = call, tuple(kept), x.shape
        ctx.dtypes = x.dtype, weight.dtype, None if bias is None else bias.dtype
        ctx.save_for_backward(*kept.values())
        return y.reshape(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        kept = dict(zip(ctx.kept, ctx.saved_tensors, strict=True))
        call: Call = replace(ctx.call, number=int(kept["number"])) if "number" in kept else ctx.call
        x_dtype, weight_dtype, bias_dtype = ctx.dtypes
        gy, cols = as_matrix(grads[0]), ctx.input_shape[-1]
        gx = gw = gb = None
        if ctx.needs_input_grad[0]:
            gx = call.dgrad(gy, kept, cols).to(x_dtype).reshape(ctx.input_shape)
        if ctx.needs_input_grad[1]:
            gw = call.wgrad(gy, kept, cols).to(weight_dtype)
        if ctx.needs_input_grad[2]:
            gb = gy.sum(0).to(bias_dtype)
        return gx, gw, gb, None
