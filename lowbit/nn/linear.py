"""The quantized linear layer: an `nn.Linear` whose three matmuls a recipe says (see `three`).

The gradient passes the rounding as if it were not there (straight through), or as the recipe's estimator says. On a
machine without matrix units for the operands' formats everything is simulated: operands are rounded in fp32 to values
that codes would have, then multiplied by the matmul that torch has (see `matmul`).

The layer is an `nn.Linear` in everything else: same parameters, same state dict, same shapes. It differs in one thing
to be lenient: operands of different dtypes are promoted, where nn.Linear raises.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..compiler import constant
from ..roles import clean_name
from .calls import Calls
from .fake import turned_back
from .matmul import has_autocast
from .presets import find_recipe
from .recipe import Recipe
from .stored_state import StoredState, store_parameter_
from .three import Call, ThreeMatmuls, as_matrix, forward_rotation, forward_weight

if TYPE_CHECKING:
    from .out_control import Channels


class QuantLinear(StoredState, nn.Linear):
    """An `nn.Linear` whose matmuls are quantized by a recipe.

    `quantize_` turns a model's layers into these; made by hand, it takes nn.Linear's arguments and a recipe.

    Args:
        in_features: as for nn.Linear.
        out_features: as for nn.Linear.
        bias: as for nn.Linear.
        device: as for nn.Linear.
        dtype: as for nn.Linear.
        recipe: a name (`lowbit.recipes()`) or a `Recipe`.
        name: tells this layer's random bits from other layers'.
    """

    recipe: Recipe
    high_precision = False  # see `lowbit.high_precision_`
    norms: Tensor | None = None  # of the input's features, while they are recorded, and
    channels: Channels | None = None  # those that were chosen by them: see `lowbit.nn.OutControl`

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        recipe: str | Recipe,
        name: str = "",
    ) -> None:
        found = find_recipe(recipe)
        super().__init__(in_features, out_features, bias, device, dtype)
        self._adopt(found, name)

    def _adopt(self, recipe: Recipe, name: str) -> None:
        self.recipe = recipe
        self._layer_id = zlib.crc32(clean_name(name).encode())
        self._calls = Calls(self._layer_id)
        if recipe.store != "master":
            store_parameter_(self.weight, recipe.store, self._layer_id)

    def forward(self, input: Tensor) -> Tensor:
        if not input.is_floating_point():
            raise TypeError(f"QuantLinear: input must be a floating-point tensor, not {input.dtype}")
        dtype = _compute_dtype(input, self.weight)
        if self.high_precision:
            bias = None if self.bias is None else self.bias.to(dtype)
            return F.linear(input.to(dtype), self.weight.to(dtype), bias)
        if self.norms is not None and self.training:
            self.norms += as_matrix(input.detach()).float().norm(dim=0)
        number: Any = 0
        if torch.compiler.is_compiling():
            number = self._calls.traced(self.training) if self.recipe.stochastic else None
        elif self.recipe.stochastic:
            number = self._calls.number(input, self.training)
        if self.channels is not None:
            return self.channels.multiplied(self, number, input, dtype)
        return self.multiplied(self.recipe, number, input, self.weight, self.bias, dtype)

    def multiplied(
        self, recipe: Recipe, number: Any, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """The three matmuls of this layer's call of a number, by a recipe, of these operands."""
        if torch.compiler.is_compiling():
            return _operators().apply(x, weight, bias, _handle(recipe), dtype, number)
        return ThreeMatmuls.apply(x, weight, bias, Call(recipe, dtype, number, self._layer_id))  # pyright: ignore

    def quantized_weight(self) -> Tensor:
        """The weight that the forward pass multiplies with, in fp32, a rotation undone."""
        if self.channels is not None:
            return self.channels.weight(self.weight.detach(), self.recipe)
        values = forward_weight(self.weight.detach(), self.recipe).float()
        return turned_back(values, forward_rotation(self.recipe), self.in_features)

    def extra_repr(self) -> str:
        high = ", high_precision" if self.high_precision else ""
        return f"{super().extra_repr()}, recipe={self.recipe.name or self.recipe.matmuls}{high}"


def _operators() -> Any:
    from . import operators  # not before it is needed: importing the library registers nothing

    return operators


@constant
def _handle(recipe: Recipe) -> str:
    return _operators().handle(recipe)


def _compute_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """What F.linear would compute in: autocast's dtype where it is on (float64 is left alone), else the wider one."""
    dtype = torch.promote_types(x.dtype, weight.dtype)
    device = x.device.type
    if dtype != torch.float64 and has_autocast(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return dtype
