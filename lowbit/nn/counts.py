"""The numbers of layers' calls, to go on where a run stopped: random bits depend on them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from .linear import QuantLinear


def call_counts(model: nn.Module) -> dict[str, int]:
    """How many calls each quantized layer has numbered, by the layer's name.

    State dicts of models stay what they were, so this is not in them. Save it beside the optimizer's: with it, a run
    that goes on has the random bits of one that never stopped.
    """
    return {n: int(m._calls.count) for n, m in model.named_modules() if isinstance(m, QuantLinear)}


def load_call_counts_(model: nn.Module, counts: Mapping[str, int]) -> None:
    """Let quantized layers number their calls from here on.

    Args:
        model: after `quantize_`, with the layers that the counts were taken of.
        counts: what `call_counts` gave.

    Raises:
        ValueError: the layers are not the same ones. Nothing has been changed.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, QuantLinear)}
    apart = sorted(layers.keys() ^ counts.keys())
    if apart:
        raise ValueError(f"load_call_counts_: counts and quantized layers differ in {', '.join(map(repr, apart[:5]))}")
    for name, layer in layers.items():
        layer._calls.count.fill_(counts[name])
