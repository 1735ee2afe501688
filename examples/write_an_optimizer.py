"""An optimizer of your own in a page: sign momentum with a per-tensor trust ratio, in every state format.

python examples/write_an_optimizer.py
"""

from typing import ClassVar

import torch

from lowbit.optim import Moment, Rule, fold, measure, update
from lowbit.words import lerp, sign, sqrt


@measure("sum")
def energy(g):
    """The squared norm of the gradient: one more sweep over it."""
    return g * g


@fold
def remember(x, s, c):
    """Once per tensor: a running average of the norm."""
    s.norm = lerp(s.norm, sqrt(x), c.rate)


@update("p m")
def move(p, g, m, c, s):
    """Once per value: the sign of the momentum, less far where gradients are small."""
    m = lerp(m, g, c.rate)
    p = p - c.lr * sign(m) * (s.norm / (1 + s.norm))
    return p, m


class SignMomentum(Rule):
    """Declare what is kept and what is computed; formats, groups, checkpoints and checks are the library's."""

    moments: ClassVar = {"m": Moment("momentum_buffer")}
    scalars: ClassVar = {"norm": 0.0}
    stages = (energy, remember, move)

    def __init__(self, params, lr=1e-3, momentum=0.9, **options):
        super().__init__(params, {"lr": lr, "momentum": momentum}, **options)

    def constants(self, group, t):
        """What is the same for every value of a step."""
        return {"lr": group["lr"], "rate": 1 - group["momentum"]}


w = torch.nn.Parameter(torch.randn(128, 128, generator=torch.Generator().manual_seed(0)))
for states in ("fp32", "8bit", "4bit"):
    p = torch.nn.Parameter(w.detach().clone())
    optimizer = SignMomentum([("w", p)], lr=1e-2, states=states)
    for _ in range(50):
        optimizer.zero_grad()
        p.square().sum().backward()
        optimizer.step()
    print(f"{states}: {optimizer.state_bytes() / p.numel():.2f} bytes of state per parameter, |w| = {p.norm():.2f}")
    assert p.norm() < w.norm()
