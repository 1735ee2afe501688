"""The parameters of the LLaMA models that memory tables are about: names, as Hugging Face gives them, and shapes."""

from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch.nn import Parameter

VOCABULARY = 32000


class Llama(NamedTuple):
    hidden: int
    ff: int
    layers: int
    heads: int


# The configurations of the GaLore papers; 7b is LLaMA's and Llama 2's.
LLAMAS = {
    "60m": Llama(512, 1376, 8, 8),
    "130m": Llama(768, 2048, 12, 12),
    "350m": Llama(1024, 2736, 24, 16),
    "1b": Llama(2048, 5461, 24, 32),
    "7b": Llama(4096, 11008, 32, 32),
}

ROLES = {
    "*embed_tokens*": "embedding", "lm_head*": "head", "*norm*": "norm",
    "*q_proj*": "q", "*k_proj*": "k", "*v_proj*": "v", "*o_proj*": "o",
    "*gate_proj*": "gate", "*up_proj*": "up", "*down_proj*": "down",
}  # fmt: skip


def shapes(size: str) -> dict[str, tuple[int, ...]]:
    """Every parameter of a model; the head is not tied."""
    hidden, ff, layers, _ = LLAMAS[size]
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, hidden)}
    for layer in range(layers):
        own = dict.fromkeys((f"self_attn.{x}_proj" for x in "qkvo"), (hidden, hidden))
        own |= {"mlp.gate_proj": (ff, hidden), "mlp.up_proj": (ff, hidden), "mlp.down_proj": (hidden, ff)}
        norms = dict.fromkeys(("input_layernorm", "post_attention_layernorm"), (hidden,))
        found |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in {**own, **norms}.items()}
    return {**found, "model.norm.weight": (hidden,), "lm_head.weight": (VOCABULARY, hidden)}


def on_meta(size: str, dtype: torch.dtype = torch.bfloat16) -> list[tuple[str, Parameter]]:
    """The parameters, without memory."""
    return [(n, Parameter(torch.empty(s, dtype=dtype, device="meta"))) for n, s in shapes(size).items()]


def roles(named: list[tuple[str, Parameter]]) -> dict[str, str]:
    """What these parameters are for."""
    return {glob: role for glob, role in ROLES.items() if any(fnmatchcase(n, glob) for n, _ in named)}


def gigabytes(opt: Any) -> tuple[float, float]:
    """Of parameters and of states, a gigabyte being 1e9 bytes, as the papers count."""
    return sum(p.nbytes for group in opt.param_groups for p in group["params"]) / 1e9, opt.state_bytes() / 1e9
