"""The model of the benchmark: a small LLaMA (RMSNorm, RoPE, SwiGLU, untied head) with Hugging Face's module names.

The quantized layers, the policies and the optimizers see what they would see in a real model: separate q/k/v/o and
gate/up/down projections without bias, an embedding, a head, and one-dimensional norms.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import unknown


@dataclass(frozen=True)
class Preset:
    """A model size and the training set-up that goes with it; 60m … 1b are shapes of the GaLore papers."""

    name: str
    hidden: int
    ff: int
    layers: int
    heads: int
    vocab: int
    seq: int
    batch: int
    micro_batch: int
    steps: int
    lr: float

    def parameters(self, vocab: int | None = None) -> int:
        """How many parameters the model has (with another vocabulary than the preset's, if given)."""
        layer = 4 * self.hidden**2 + 3 * self.hidden * self.ff + 2 * self.hidden
        return 2 * (vocab or self.vocab) * self.hidden + self.layers * layer + self.hidden


PRESETS = {
    p.name: p
    for p in (
        #      name    hidden  ff  layers heads vocab  seq batch micro  steps   lr
        Preset("nano", 64, 192, 2, 2, 256, 64, 8, 8, 800, 3e-3),
        Preset("micro", 128, 384, 4, 4, 256, 128, 8, 8, 1500, 2e-3),
        Preset("mini", 256, 704, 4, 4, 2048, 128, 16, 16, 2000, 1e-3),
        Preset("60m", 512, 1376, 8, 8, 32000, 256, 512, 64, 10_000, 1e-3),
        Preset("130m", 768, 2048, 12, 12, 32000, 256, 512, 64, 20_000, 1e-3),
        Preset("350m", 1024, 2736, 24, 16, 32000, 256, 512, 32, 60_000, 4e-4),
        Preset("1b", 2048, 5461, 24, 32, 32000, 256, 512, 16, 100_000, 2e-4),
    )
}


def preset(name: str) -> Preset:
    """The preset called `name`, or an error with the nearest match."""
    if name not in PRESETS:
        raise unknown("preset", name, PRESETS)
    return PRESETS[name]


class RMSNorm(nn.Module):
    """Root-mean-square norm, computed in fp32 whatever the dtype of its input."""

    def __init__(self, hidden: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden))

    def reset_parameters(self) -> None:
        """As made."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), (x.shape[-1],), self.weight.float(), 1e-6).to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention with rotary positions."""

    def __init__(self, hidden: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(hidden, hidden, bias=False)
        self.k_proj = nn.Linear(hidden, hidden, bias=False)
        self.v_proj = nn.Linear(hidden, hidden, bias=False)
        self.o_proj = nn.Linear(hidden, hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, seq, hidden = x.shape
        q, k, v = (
            proj(x).view(batch, seq, self.heads, -1).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        y = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True)
        return self.o_proj(y.transpose(1, 2).reshape(batch, seq, hidden))


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, hidden: int, ff: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden, ff, bias=False)
        self.up_proj = nn.Linear(hidden, ff, bias=False)
        self.down_proj = nn.Linear(ff, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One pre-norm decoder layer."""

    def __init__(self, hidden: int, ff: int, heads: int):
        super().__init__()
        self.input_layernorm = RMSNorm(hidden)
        self.self_attn = Attention(hidden, heads)
        self.post_attention_layernorm = RMSNorm(hidden)
        self.mlp = MLP(hidden, ff)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """Token ids `[batch, seq]` to logits `[batch, seq, vocab]`."""

    cos: Tensor
    sin: Tensor

    def __init__(self, shape: Preset, vocab: int | None = None, seq: int | None = None):
        super().__init__()
        vocab, seq = vocab or shape.vocab, seq or shape.seq
        self.embed_tokens = nn.Embedding(vocab, shape.hidden)
        self.layers = nn.ModuleList(Block(shape.hidden, shape.ff, shape.heads) for _ in range(shape.layers))
        self.norm = RMSNorm(shape.hidden)
        self.lm_head = nn.Linear(shape.hidden, vocab, bias=False)
        cos, sin = rotary_table(seq, shape.hidden // shape.heads)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def reset_parameters(self) -> None:
        """The rotary tables, where the model was made on the meta device."""
        for buffer, values in zip((self.cos, self.sin), rotary_table(*self.cos.shape), strict=True):
            buffer.copy_(values)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed_tokens(tokens)
        cos, sin = self.cos[: tokens.shape[1]].to(x.dtype), self.sin[: tokens.shape[1]].to(x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.lm_head(self.norm(x))

    @torch.no_grad()
    def initialise(self, seed: int) -> Llama:
        """Normal(0, 0.02) for every matrix, 1 for the norms, drawn from `seed` alone: the same for every method."""
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, 0.02, generator=generator)
        return self


def rotary_table(seq: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position times every frequency, `[seq, head_dim]`, the two halves alike."""
    frequency = 10_000.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angle = torch.outer(torch.arange(seq, dtype=torch.float32), frequency).repeat(1, 2)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (i, i + head_dim/2) of `x` by its position's angle."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
