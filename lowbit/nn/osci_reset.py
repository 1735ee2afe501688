"""OsciReset of TetraJet-v2: master weights that swing between two codes are put on the code they are at.

TetraJet-v2, https://arxiv.org/abs/2510.27527, and its release, https://github.com/thu-ml/TetraJet-v2-NVFP4Training
(olmo2-training/olmo/quantization_real/oscillation_reset.py). Late in training a master moves little, but one that lies
between two codes moves its quantized value by a whole code, to and fro. Every `period` steps the ways of both are
measured over `window` steps, and where their ratio is large, the master is reset to the middle of its bin:

    R = Σ |Q(w_t) − Q(w_{t−1})| / Σ |w_t − w_{t−1}|       0 where w has not moved
    w ← Q(w)                                              where R ≥ threshold
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .linear import QuantLinear
from .out_control import layers_with_masters
from .three import forward_weight


class Ways(NamedTuple):
    """How far a layer's masters and their quantized values have come, and where they were; all fp32."""

    master: Tensor
    quantized: Tensor
    last_master: Tensor
    last_quantized: Tensor


class OsciReset:
    """Resets oscillating master weights of a model's quantized layers.

    Call `step()` after each step of the optimizer. Defaults are the release's, which starts after 60 to 70 per cent of
    all steps. Channels that OutControl has taken out of the recipe's format are left alone, as there. While ways are
    measured it needs four fp32 values for each weight. An optimizer that keeps masters of its own for bf16 parameters
    (`master="fp32"` …) would undo a reset: train fp32 parameters.

    Args:
        model: after `quantize_`, with float masters and no rotation of weights in the forward pass.
        start: the step from which on it measures, counted from 0.
        period: steps from one measurement to the next, which begins at multiples of it.
        window: how many steps a measurement takes; less than period - 1.
        threshold: of R.

    Raises:
        ValueError: no layer is quantized, one has no master or rotates its weight, or the numbers do not fit.
    """

    def __init__(
        self, model: nn.Module, *, start: int, period: int = 200, window: int = 50, threshold: float = 8.0
    ) -> None:
        if start < 0 or window < 1 or period < window + 2:
            raise ValueError(
                f"OsciReset: a period has a first step, a window and a reset, so period={period} must be at least "
                f"window + 2, with window={window} and start={start} not negative"
            )
        self.layers = layers_with_masters(model, "OsciReset")
        self.start, self.period, self.window, self.threshold = start, period, window, threshold
        self.done, self.ways = 0, dict[str, Ways]()

    @torch.no_grad()
    def step(self) -> int:
        """After a step of the optimizer: measures, or resets.

        Returns:
            How many weights were reset; 0 in most steps.
        """
        phase, self.done = self.done % self.period, self.done + 1
        if phase == 0 and self.done > self.start:
            self.ways = {name: self._begun(layer) for name, layer in self.layers.items()}
        elif self.ways and phase <= self.window:
            self.ways = {name: self._moved(self.layers[name], ways) for name, ways in self.ways.items()}
        elif self.ways:
            ways, self.ways = self.ways, {}
            return sum(self._reset(self.layers[name], each) for name, each in ways.items())
        return 0

    def _begun(self, layer: QuantLinear) -> Ways:
        master, quantized = _values(layer)
        return Ways(torch.zeros_like(master), torch.zeros_like(master), master, quantized)

    def _moved(self, layer: QuantLinear, ways: Ways) -> Ways:
        master, quantized = _values(layer)
        way = ways.master + (master - ways.last_master).abs()
        return Ways(way, ways.quantized + (quantized - ways.last_quantized).abs(), master, quantized)

    def _reset(self, layer: QuantLinear, ways: Ways) -> int:
        master, quantized = _values(layer)
        ratio = torch.where(ways.master > 0, ways.quantized / ways.master, 0.0)
        swings = ratio >= self.threshold
        values = torch.where(swings, quantized, master).to(layer.weight.dtype)
        layer.weight[:, _columns(layer)] = values
        return int(swings.sum())

    def state_dict(self) -> dict[str, Any]:
        """What a run goes on from: numbers and plain tensors."""
        return {"done": self.done, "ways": {name: ways._asdict() for name, ways in self.ways.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there.

        Raises:
            ValueError: the state is of other layers. Nothing has been changed.
        """
        if state["ways"] and state["ways"].keys() != self.layers.keys():
            raise ValueError(f"OsciReset: the state is of layers {', '.join(state['ways'])}, and not of this model's")
        self.done = int(state["done"])
        self.ways = {name: Ways(**{k: v.clone() for k, v in ways.items()}) for name, ways in state["ways"].items()}


def _columns(layer: QuantLinear) -> Tensor | slice:
    """Those of the weight that are in the recipe's format."""
    return slice(None) if layer.channels is None else layer.channels.inside.to(layer.weight.device)


def _values(layer: QuantLinear) -> tuple[Tensor, Tensor]:
    """fp32 copies of (master, quantized)."""
    master = layer.weight.detach()[:, _columns(layer)]
    return master.float().clone(), forward_weight(master, layer.recipe).float()
