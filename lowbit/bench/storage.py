"""Where a run keeps its weights: bf16 parameters, and for the high-precision rows an fp32 master copy beside them.

This is what "BF16 Adam" means on a machine without bf16 matmuls: the numbers that live between steps are real bf16
tensors of two bytes, while a step computes in fp32 on a temporary image of them. Gradients therefore arrive in bf16.
Everything the report says about memory is counted here, from the tensors that exist.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call


def round_to_bf16(model: nn.Module) -> nn.Module:
    """Turn every parameter into a bf16 tensor, in place; buffers (the rotary tables) stay in fp32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    return model


class Weights:
    """The parameters of one run, by name, and the way through the model with them."""

    def __init__(self, model: nn.Module, *, master: bool, autocast: bool):
        self.model = model
        self.autocast = autocast
        self.stored: dict[str, Tensor] = dict(model.named_parameters())
        # The master starts from the rounded weights, so that every method of a seed starts from the same function.
        self.master = {n: nn.Parameter(p.detach().float()) for n, p in self.stored.items()} if master else {}

    def forward(self, tokens: Tensor, model: nn.Module | None = None) -> Tensor:
        """Logits in fp32; `model` may be another module with the same parameter names."""
        model = model or self.model
        if self.autocast:
            with torch.autocast(tokens.device.type, torch.bfloat16):
                return functional_call(model, self.stored, (tokens,)).float()
        return functional_call(model, {n: p.float() for n, p in self.stored.items()}, (tokens,))

    def groups(self, embed_lr_mult: float) -> list[dict]:
        """Named parameter groups for the optimizer, over the master where there is one."""
        named = list((self.master or self.stored).items())
        if embed_lr_mult == 1.0:
            return [{"params": named}]
        outer = [(n, p) for n, p in named if n.split(".")[0] in ("embed_tokens", "lm_head")]
        inner = [(n, p) for n, p in named if n.split(".")[0] not in ("embed_tokens", "lm_head")]
        return [{"params": inner, "lr_mult": 1.0}, {"params": outer, "lr_mult": embed_lr_mult}]

    def gradients(self) -> list[Tensor]:
        """The gradients that exist now, in their storage format."""
        return [p.grad for p in self.stored.values() if p.grad is not None]

    def before_step(self) -> None:
        """Hand the bf16 gradients to the master; torch.optim wants them in the master's dtype."""
        for name, master in self.master.items():
            grad = self.stored[name].grad
            master.grad = None if grad is None else grad.float()

    @torch.no_grad()
    def after_step(self) -> None:
        """Round the master to the stored weights and let the gradients go."""
        for name, master in self.master.items():
            self.stored[name].copy_(master)
            master.grad = None
        for parameter in self.stored.values():
            parameter.grad = None

    def bytes(self, optimizer: torch.optim.Optimizer) -> dict[str, int]:
        """Bytes of weights, master, optimizer state and gradients; call it while the gradients exist."""
        return {
            "weights": sum(map(nbytes, self.stored.values())),
            "master": sum(map(nbytes, self.master.values())),
            "states": sum(nbytes(v) for state in optimizer.state.values() for v in tensors(state)),
            "gradients": sum(map(nbytes, self.gradients())),
        }


def nbytes(tensor: Tensor) -> int:
    """What a tensor's values occupy."""
    return tensor.numel() * tensor.element_size()


def tensors(value: object) -> list[Tensor]:
    """Every tensor inside a piece of optimizer state, however nested."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [t for v in value.values() for t in tensors(v)]
    if isinstance(value, (list, tuple)):
        return [t for v in value for t in tensors(v)]
    return []
