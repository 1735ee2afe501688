"""LoRA (https://arxiv.org/abs/2106.09685) on quantized layers with peft (https://github.com/huggingface/peft).

peft takes our layers for the linear layers that they are, and trains adapters on them. Merging is another matter: peft
would add the adapter to the weight, which a stored weight rounds to its codes again. Here a merged layer is a plain
`nn.Linear` that holds what the base multiplied with, plus the adapter: W = dequantized + scaling B A, added in fp32 and
rounded once. So it computes what was trained, and not what the 16-bit weight from before would have given
(https://github.com/huggingface/peft/issues/2321). Unmerging puts the very codes back.

Activations of a merged layer are not quantized, whatever the recipe says, as after `lowbit.to_dense_`.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn

from ..nn import QuantLinear
from . import weights


def get_peft_model(model: nn.Module, config: Any, **options: Any) -> Any:
    """As `peft.get_peft_model`, with layers that merge exactly. Takes its arguments, returns its `PeftModel`.

    Raises:
        ImportError: peft is not installed.
    """
    return weights.library("peft").get_peft_model(model, prepared(config), **options)


def from_pretrained(model: nn.Module, path: str, **options: Any) -> Any:
    """As `peft.PeftModel.from_pretrained`: saved adapters on a model with quantized layers."""
    peft = weights.library("peft")
    config = options.pop("config", None) or peft.PeftConfig.from_pretrained(path)
    config.inference_mode = not options.get("is_trainable", False)
    return peft.PeftModel.from_pretrained(model, path, config=prepared(config), **options)


def prepared(config: Any) -> Any:
    """A `LoraConfig` that tells peft of our layers, for whoever calls peft; the same object."""
    config._register_custom_module({QuantLinear: lora_layer()})
    return config


@cache
def lora_layer() -> type[nn.Module]:
    """The class of adapted layers: made when peft is there to derive it from."""
    lora = weights.library("peft.tuners.lora.layer")
    adapters = weights.library("peft.tuners.tuners_utils").check_adapters_to_merge

    class LoraQuantLinear(lora.Linear):
        """peft's LoRA layer around a quantized one."""

        def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
            names = adapters(self, adapter_names)
            if not names:
                return
            if not self.merged:
                # Beside the modules: it is no part of the model while it is merged.
                layer: Any = self.base_layer
                self.__dict__["quantized"] = layer
                self.base_layer = _dense(layer)
            dense, dtype = self.base_layer, self.quantized.weight.dtype
            try:
                _as(dense, torch.float32)
                super().merge(safe_merge, names)
            except BaseException:
                if not self.merged:
                    self.base_layer = self.__dict__.pop("quantized")
                raise
            finally:
                _as(dense, dtype)

        def unmerge(self) -> None:
            if self.merged:
                self.base_layer = self.__dict__.pop("quantized")
                self.merged_adapters.clear()

    return LoraQuantLinear


@torch.no_grad()
def _dense(layer: QuantLinear) -> nn.Linear:
    """A plain layer with what the quantized one multiplies with, in fp32."""
    dense = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    dense.weight = nn.Parameter(layer.quantized_weight().clone(), requires_grad=False)
    dense.bias = None if layer.bias is None else nn.Parameter(layer.bias.clone(), layer.bias.requires_grad)  # pyright: ignore[reportAttributeAccessIssue]
    return dense.train(layer.training)


def _as(dense: nn.Linear, dtype: torch.dtype) -> None:
    for parameter in dense.parameters():
        parameter.data = parameter.data.to(dtype)
