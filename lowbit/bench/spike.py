"""Gradient spikes on purpose: the stress test that separates optimizers which clip from those which do not."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import BenchError

_FORM = re.compile(r"(?:(whole)|entries:([0-9.eE+-]+)):([0-9.eE+-]+)@([0-9]+)")


@dataclass(frozen=True)
class Spike:
    """Every `every` steps, from the second multiple on, the gradient or a share of its entries times `factor`."""

    share: float = 1.0
    factor: float = 1.0
    every: int = 0
    seed: int = 0

    @staticmethod
    def parse(text: str, seed: int = 0) -> Spike:
        """Read `whole:FACTOR@EVERY` or `entries:SHARE:FACTOR@EVERY`; nothing means no spikes."""
        if not text:
            return Spike()
        match = _FORM.fullmatch(text)
        try:
            if match is None:
                raise ValueError
            share, factor, every = float(match[2] or 1.0), float(match[3]), int(match[4])
            if not (0 < share <= 1 and factor > 0 and every > 0):
                raise ValueError
        except ValueError:
            raise BenchError(
                f"cannot read spike {text!r}: write whole:FACTOR@EVERY or entries:SHARE:FACTOR@EVERY, "
                "for example whole:1000@50"
            ) from None
        return Spike(share, factor, every, seed)

    @torch.no_grad()
    def apply(self, step: int, parameters: dict[str, Tensor]) -> bool:
        """Change the gradients in place if a spike is due at `step` (from 0); says whether it was."""
        if not self.every or step % self.every or step < 2 * self.every:
            return False
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        for parameter in parameters.values():
            if parameter.grad is not None and self.share == 1.0:
                parameter.grad.mul_(self.factor)
            elif parameter.grad is not None:
                hit = torch.rand(parameter.shape, generator=generator) < self.share
                parameter.grad.mul_(torch.where(hit, self.factor, 1.0).to(parameter.grad))
        return True
