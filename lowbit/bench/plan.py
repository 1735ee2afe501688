"""What a training step takes of memory, before there is a machine for it.

The model, the quantized layers and the optimizer are the real ones, on the meta device. What is kept from step to step
is what their tensors take, and what comes and goes is counted while a forward and backward pass runs (`live`): what
autograd keeps, gradients, dequantized weights, logits. No formula here says what a layer or an optimizer does.

Not seen: the CUDA context and its libraries (often half a gigabyte), fragmentation of an allocator, buffers inside of
kernels, and the data.
"""

from __future__ import annotations

import inspect
import json
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .errors import BenchError, need, unknown
from .live import FusedAttention, run
from .methods import find_optimizer
from .model import PRESETS, Llama, Preset

SEVEN = Preset("7b", 4096, 11008, 32, 32, 32000, 2048, 512, 1, 150_000, 2e-4)  # LLaMA's, and the GaLore paper's
MODELS = {**PRESETS, SEVEN.name: SEVEN}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Choice:
    """What is asked: a model, and how it is trained."""

    model: str
    optimizer: str = "AdamW"
    states: str = "8bit"
    recipe: str = "none"
    store: str = "master"
    embedding: str | None = None
    master: str = "none"
    dtype: str = "bf16"
    batch: int = 1
    seq: int | None = None
    checkpoint: bool = False
    clip: bool = False


@dataclass(frozen=True)
class Plan:
    """Bytes of one step of `batch` × `seq` tokens.

    `released` is the peak where `lowbit.optim.step_in_backward` frees each gradient; None where it cannot.
    """

    parameters: int
    batch: int
    seq: int
    weights: int
    states: int
    master: int
    gradients: int
    gradient: int
    activations: int
    temporary: int
    peak: int
    released: int | None


def plan(choice: Choice) -> Plan:
    """Run one step without memory, and count.

    Raises:
        BenchError: a name is not known, a file is no model's, or parts do not fit together.
    """
    if choice.dtype not in DTYPES:
        raise unknown("dtype", choice.dtype, DTYPES)
    model, heads, seq = _model(choice)
    try:
        _quantize(model, choice)
        opt = _optimizer(model, choice, heads)
    except (ValueError, TypeError) as error:
        raise BenchError(str(error)) from error
    if choice.checkpoint:
        _checkpoint(model)
    told = opt.explain()
    parts = [x for p in model.parameters() for x in _tensors(p)]
    known = [*parts, *model.buffers()]
    kept = sum(x.nbytes for x in known) + told.state_bytes
    tokens = torch.zeros(choice.batch, seq, dtype=torch.int64, device="meta")
    whole = run(model, tokens, known)
    params = [p for group in opt.param_groups for p in group["params"]]
    temporary = {p: row.temporary_bytes for p, row in zip(params, told.rows, strict=True)}
    freed = None if choice.clip else run(model, tokens, known, temporary)
    master = sum(state["master"].nbytes for state in opt.state.values() if "master" in state)
    return Plan(
        parameters=sum(p.numel() for p in model.parameters()),
        batch=choice.batch,
        seq=seq,
        weights=kept - told.state_bytes,
        states=told.state_bytes - master,
        master=master,
        gradients=whole.gradients,
        gradient=whole.gradient,
        activations=whole.activations,
        temporary=told.temporary_bytes,
        peak=kept + max(whole.most, whole.gradients + told.temporary_bytes),
        released=None if freed is None else kept + freed.most,
    )


def _tensors(p: Tensor) -> tuple[Tensor, ...]:
    from ..optim.slot import tensors_of

    return tensors_of(p)


def _model(choice: Choice) -> tuple[nn.Module, dict[str, int], int]:
    """A model on the meta device, its numbers of heads, and the sequence length."""
    if choice.model in MODELS:
        shape = MODELS[choice.model]
        seq = choice.seq or shape.seq
        with torch.device("meta"):
            model: Any = Llama(shape, seq=seq)
        return model.to(DTYPES[choice.dtype]), {"num_heads": shape.heads}, seq
    path = Path(choice.model)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise unknown("model (and there is no such config.json)", choice.model, MODELS)
    return _of_hugging_face(path, choice)


def _of_hugging_face(path: Path, choice: Choice) -> tuple[nn.Module, dict[str, int], int]:
    transformers = need("transformers", "hf")
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        config = transformers.AutoConfig.for_model(**told)
        config.use_cache = False
        transformers.AttentionInterface.register("lowbit-plan", _attention)  # asks for no mask, which needs values
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(
                config, dtype=DTYPES[choice.dtype], attn_implementation="lowbit-plan"
            )
    except (ValueError, TypeError, KeyError) as error:
        raise BenchError(f"{path} is not the config.json of a causal language model: {error}") from error
    model.train()
    names = {"num_heads": "num_attention_heads", "num_kv_heads": "num_key_value_heads", "head_dim": "head_dim"}
    heads = {ours: value for ours, its in names.items() if (value := getattr(config, its, None))}
    return model, heads, choice.seq or min(2048, getattr(config, "max_position_embeddings", 2048))


def _checkpoint(model: nn.Module) -> None:
    """Recompute each block: the members of the longest list of modules."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    modes = partial(tuple, (nullcontext(), FusedAttention()))  # of a forward pass do not last in the backward pass
    how = {"use_reentrant": False, "preserve_rng_state": False, "context_fn": modes}
    for block in max(lists, key=len, default=()):
        block.forward = partial(checkpoint, block.forward, **how)


def _attention(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: Any = None, **_: Any) -> Any:
    y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
    return y.transpose(1, 2).contiguous(), None


def _quantize(model: nn.Module, choice: Choice) -> None:
    from .. import nn as layers
    from ..nn.presets import find_recipe

    stored = {"store": choice.store, "embedding": choice.embedding}
    if choice.recipe == "none":
        if choice.store == "master" and choice.embedding is None:
            return
        recipe = layers.Recipe(**stored)
    elif choice.recipe in layers.recipes():
        recipe = replace(find_recipe(choice.recipe), **stored)
    else:
        raise unknown("recipe", choice.recipe, ["none", *layers.recipes()])
    layers.quantize_(model, recipe)


def _optimizer(model: nn.Module, choice: Choice, heads: dict[str, int]) -> Any:
    from .. import optim, roles

    known = find_optimizer(choice.optimizer.replace("-", "").replace("_", "")).cls
    cls = getattr(optim, known)
    taken = inspect.signature(cls).parameters
    wanted: dict[str, Any] = {"lr": 1e-3, **{name: value for name, value in heads.items() if name in taken}}
    return cls(
        model.named_parameters(),
        **wanted,
        states=choice.states,
        master=choice.master,
        roles=roles(model),
        stabilize=(optim.GlobalClip(1.0),) if choice.clip else (),
    )
