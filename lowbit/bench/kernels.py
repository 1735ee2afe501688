"""The kernels that are known before they are needed, in one list: what `lowbit doctor --arch` and the tests compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .. import optim
from ..backends import cuda
from ..formats import format, formats
from ..gpu import linear
from ..gpu.inspect import Specialisation
from ..gpu.specialise import print_spec, special
from ..nn.stored import StoredWeight
from ..stages import Job, Turn

# Optimizers with a parameter and a gradient in bf16, rounded at random, and aligned rows; and the parameter's name.
_STEPS = [
    (optim.AdamW, "8bit", "weight"),
    (optim.AdamW, "4bit", "weight"),
    (optim.AdamW, "fp32", "weight"),
    (optim.StableSPAM, "4bit", "weight"),
    (optim.SPAM, "4bit", "weight"),
    (optim.Lion, "8bit", "weight"),
    (optim.AdamMini, "8bit", "weight"),
    (optim.SCALE, "8bit", "lm_head.weight"),  # its last layer has a momentum
    (optim.Muon, "8bit", "weight"),  # its momentum; a matrix stage follows
]

# And AdamW's in 8 bits where something is not so: (64, 300) has ragged rows.
_OTHERS: dict[str, dict[str, Any]] = {
    "ragged rows": {"shape": (64, 300)},
    "fp32 parameter": {"dtype": torch.float32},
    "master split8": {"master": "split8"},
    "stored nf4": {"store": "nf4"},
}

MEASURED = ("int8:row", "ternary", "nvfp4-2d", "mxfp6-e2m3", "e4m3:3x5")


def shipped() -> list[Specialisation]:
    """All of them. `values` are those that a thread handles in a turn of the main loop."""
    constants = Specialisation("constants", "constants.cu", "", {})  # that follow a learning rate on the device
    steps = [found for row in _STEPS for found in _steps(*row)]
    others = [
        found for more, options in _OTHERS.items() for found in _steps(optim.AdamW, "8bit", "weight", more, **options)
    ]
    return [*linear.shipped(), *_codecs(), *steps, *others, constants]


def _codecs() -> list[Specialisation]:
    """Of every format, for matrices in bf16, to the nearest value; what is longest; what scales are made from."""
    spec = {name: cuda.print_spec(format(name), torch.bfloat16) for name in formats()}
    eden = cuda.print_spec(format("nvfp4-eden"), torch.bfloat16, True, rotation=128, run=128)
    back = cuda.print_spec(format("fp32"), torch.bfloat16, rotation=-128)
    made = {**spec, "nvfp4-eden corrected": eden, "rotation back": back}
    given = [(name, cuda.print_spec(format(name), torch.bfloat16, given=True)) for name in MEASURED]
    return [
        *(Specialisation(f"codec {name}", "codec.cu", text, {}) for name, text in made.items()),
        *(Specialisation(f"statistic {name}", "statistic.cu", text, {}) for name, text in given),
    ]


def _steps(
    optimizer: Callable[..., optim.Rule],
    states: str,
    weight: str,
    more: str = "",
    shape: tuple[int, int] = (64, 1024),
    dtype: torch.dtype = torch.bfloat16,
    store: str | None = None,
    **options: Any,
) -> list[Specialisation]:
    value = torch.zeros(shape, dtype=dtype)
    param = torch.nn.Parameter(StoredWeight.of(value, store) if store else value)
    param.grad = torch.zeros_like(value)
    made = optimizer([(weight, param)], lr=1e-3, states=states, **options)
    job = made._slots[param].job(made.param_groups[0], made.state[param], Turn())
    if not isinstance(job, Job):  # a matrix rule in parts: what comes before the first matrix stage
        job = job.begin()
    kind, name = special(job), ", ".join(filter(None, [f"{type(made).__name__} {states}", more]))
    found = [Specialisation(name, "step.cu", print_spec(kind), {"update": kind.values})]
    if kind.program.measures:
        found.append(Specialisation(f"{name} measures", "measure.cu", print_spec(kind), {}))
    return found
