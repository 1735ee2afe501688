"""OutControl of TetraJet-v2: the channels of a layer's input with the largest values are multiplied in MXFP8.

TetraJet-v2, https://arxiv.org/abs/2510.27527, and its release, https://github.com/thu-ml/TetraJet-v2-NVFP4Training
(olmo2-training/olmo/quantization_real/linear_mix.py). The norms of each channel are summed over some steps early in
training; a tenth of the channels, those with the largest sums, then leave the recipe's format for 8 bits:

    y  = Q4(x) Q4(W)ᵀ + Q8(x) Q8(W)ᵀ       each of its own channels
    gx = Q(gy) Q(W')                       as the recipe says, W' the values of forward in all channels
    gW = Q(gy)ᵀ Q(Q4(x))                   as the recipe says, of its channels
         Q8(gy)ᵀ Q8(Q8(x))                 to nearest and not rotated, of the others

Channels are put in the order of their norms, so values of like size share a block, as in the release. It takes whole
runs of 128 channels, which its kernels want; here their number is rounded to nearest, as in the paper's simulation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .linear import QuantLinear
from .operand import Operand
from .recipe import Recipe
from .three import forward_rotation, forward_weight


@dataclass(frozen=True)
class Channels:
    """How a layer's input features are split. `order` [features] has those that leave the recipe's format first."""

    order: Tensor
    count: int
    recipe: Recipe

    @property
    def outside(self) -> Tensor:
        """Those with the largest norms."""
        return self.order[: self.count]

    @property
    def inside(self) -> Tensor:
        """Those that are multiplied as the layer's recipe says."""
        return self.order[self.count :]

    def multiplied(self, layer: QuantLinear, number: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The layer's output. Both parts draw the same random bits, so their gradient operand of dgrad is the same."""
        total = None
        for index, recipe in ((self.inside, layer.recipe), (self.outside, self.recipe)):
            index, bias = index.to(x.device), layer.bias if total is None else None
            operands = x.index_select(-1, index), layer.weight.index_select(1, index)
            y = layer.multiplied(recipe, number, *operands, bias, dtype)
            total = y if total is None else total + y
        assert total is not None
        return total

    def weight(self, weight: Tensor, recipe: Recipe) -> Tensor:
        """What the forward pass multiplies with, fp32, in the weight's own order."""
        values = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
        for index, each in ((self.inside, recipe), (self.outside, self.recipe)):
            values[:, index.to(weight.device)] = forward_weight(weight[:, index.to(weight.device)], each).float()
        return values


class OutControl:
    """Chooses the channels of a model's quantized layers that are multiplied in 8 bits from then on.

    Call `step()` after each step of the optimizer. The defaults are the release's. It is not in the model's state dict:
    save `state_dict()` beside it, also to evaluate the model.

    Args:
        model: after `quantize_`, with float masters and no rotation in the forward pass (`tetrajet2`, `nvfp4` …).
        share: how many of a layer's input features leave the recipe's format, as a part of them, rounded to nearest.
        start: the steps after which recording begins; with 501 the 503rd step is the first that is recorded.
        steps: how many steps are recorded; the layers change after the last of them.
        format: of those features, in blocks along each matmul's contraction.

    Raises:
        ValueError: no layer is quantized, one is stored without a master or rotated, or share is not between 0 and 1.
    """

    def __init__(
        self, model: nn.Module, *, share: float = 0.1, start: int = 501, steps: int = 50, format: str = "mxfp8-rceil"
    ) -> None:
        if not 0 < share < 1 or start < 0 or steps < 1:
            raise ValueError(
                f"OutControl: share is a part of all channels and steps at least 1, not {share!r} and {steps!r}"
            )
        self.layers = layers_with_masters(model, "OutControl")
        self.share, self.start, self.steps, self.format, self.done = share, start, steps, format, 0

    def step(self) -> None:
        """After a step of the optimizer: begins to record, or chooses the channels."""
        self.done += 1
        if self.done - 1 == self.start:
            for layer in self.layers.values():
                layer.norms = torch.zeros(layer.in_features, device=layer.weight.device)
        elif self.done - 1 == self.start + self.steps:
            for layer in self.layers.values():
                self._choose(layer)

    def _choose(self, layer: QuantLinear) -> None:
        norms, layer.norms = layer.norms, None
        assert norms is not None
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(norms)
        self._split(layer, norms.argsort(descending=True, stable=True))

    def _split(self, layer: QuantLinear, order: Tensor) -> None:
        count = round(self.share * layer.in_features)
        layer.channels = Channels(order, count, self._recipe(layer.recipe)) if count else None

    def _recipe(self, recipe: Recipe) -> Recipe:
        """Of the channels that are chosen."""
        wgrad = (Operand(self.format), Operand(self.format, of="forward"))
        operands = (self.format, self.format)
        return Recipe(forward=operands, dgrad=recipe.dgrad, wgrad=wgrad, seed=recipe.seed, name=f"{recipe.name}-out")

    def state_dict(self) -> dict[str, Any]:
        """What a run goes on from: numbers and plain tensors."""
        norms = {name: layer.norms for name, layer in self.layers.items() if layer.norms is not None}
        orders = {name: layer.channels.order for name, layer in self.layers.items() if layer.channels is not None}
        return {"done": self.done, "norms": norms, "orders": orders}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there.

        Raises:
            ValueError: the state is of other layers. Nothing has been changed.
        """
        for kind in ("norms", "orders"):
            for name, tensor in state[kind].items():
                if name not in self.layers or len(tensor) != self.layers[name].in_features:
                    raise ValueError(f"OutControl: the state's {kind} of {name!r} fit no layer of this model")
        self.done = int(state["done"])
        for name, layer in self.layers.items():
            norms, order = state["norms"].get(name), state["orders"].get(name)
            layer.norms = None if norms is None else norms.to(layer.weight.device, copy=True)
            layer.channels = None
            if order is not None:
                self._split(layer, order)


def layers_with_masters(model: nn.Module, what: str) -> dict[str, QuantLinear]:
    """A model's quantized layers by name, for what reads or writes their masters.

    Raises:
        ValueError: there is none, or one is stored without a master, quantizes no weight or rotates it.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    if not layers:
        raise ValueError(f"{what}: no layer of this model is quantized; call quantize_ first")
    for name, layer in layers.items():
        if layer.recipe.store != "master":
            raise ValueError(f"{what}: {name or 'the model'}.weight has no master, only {layer.recipe.store!r}")
        if layer.recipe.forward[1] is None or forward_rotation(layer.recipe) is not None:
            raise ValueError(
                f"{what}: {name or 'the model'} must quantize its weight in the forward pass, and not rotate it"
            )
    return layers
