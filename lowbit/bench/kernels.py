"""The kernels that are known before they are needed, in one list: what `lowbit doctor --arch` and the tests compile."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .. import optim
from ..gpu import linear
from ..gpu.inspect import Specialisation
from ..gpu.specialise import print_spec, special
from ..stages import Job

# Optimizers with a parameter and a gradient in bf16, rounded at random, and aligned rows.
_STEPS = [
    (optim.AdamW, "8bit"),
    (optim.AdamW, "4bit"),
    (optim.StableSPAM, "4bit"),
    (optim.Lion, "8bit"),
]


def shipped() -> list[Specialisation]:
    """All of them. `values` are those that a thread handles in a turn of the main loop."""
    return [*linear.shipped(), *(found for optimizer, states in _STEPS for found in _steps(optimizer, states))]


def _steps(optimizer: Callable[..., optim.Rule], states: str) -> list[Specialisation]:
    param = torch.nn.Parameter(torch.zeros(64, 1024, dtype=torch.bfloat16))
    param.grad = torch.zeros_like(param)
    made = optimizer([("weight", param)], lr=1e-3, states=states)
    job = made._slots[param].job(made.param_groups[0], made.state[param], {})
    assert isinstance(job, Job)
    kind, name = special(job), f"{type(made).__name__} {states}"
    found = [Specialisation(name, "step.cu", print_spec(kind), {"update": kind.values})]
    if kind.program.measures:
        found.append(Specialisation(f"{name} measures", "measure.cu", print_spec(kind), {}))
    return found
