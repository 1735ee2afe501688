"""The kernels that are known before they are needed, in one list: what `lowbit doctor --arch` and the tests compile."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from .. import optim
from ..backends import cuda
from ..backends.cuda_codec import VALUES, finder
from ..formats import format, formats
from ..gpu import linear
from ..gpu.inspect import Specialisation
from ..gpu.specialise import print_spec, special
from ..gpu.stages import launches
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

# Formats whose codes are drawn at random too; whose scales take a pass before, one of each kind; whose blocks are
# measured.
RANDOM = ("int4", "nf4", "e4m3", "mxfp4")
PASSES = ("int4:48", "sqrt8:7", "nf4:3", "int4-affine:5", "solo4:100", "nvfp4")
MEASURED = ("int8:row", "ternary", "nvfp4-2d", "mxfp6-e2m3", "e4m3:3x5")
_PASS = {
    "passes": {"scales": 1},
    "warp": {"largest_of_all": VALUES},
}  # values of a turn, by who finds a format's scales


def shipped() -> list[Specialisation]:
    """All of them. `values` are those that a thread handles in a turn of the main loop."""
    constants = Specialisation("constants", "constants.cu", "", {})  # that follow a learning rate on the device
    steps = [found for row in _STEPS for found in _steps(*row)]
    others = [
        found for more, options in _OTHERS.items() for found in _steps(optim.AdamW, "8bit", "weight", more, **options)
    ]
    return [*linear.shipped(), *_codecs(), *steps, *others, constants]


def _codecs() -> list[Specialisation]:
    """Of every format, for matrices in bf16, to the nearest value; what is longest; what scales are made from.

    Of `encode` the codes are counted, not what they stand for; `decode` writes that, in bf16.
    """
    print_spec = functools.partial(cuda.print_spec, dtype=torch.bfloat16, out=torch.bfloat16)
    spec = {name: print_spec(format(name), line=True) for name in formats()}
    random = {f"{name} stochastic": print_spec(format(name), stochastic=True, line=True) for name in RANDOM}
    eden = print_spec(format("nvfp4-eden"), stochastic=True, rotation=128, run=128)
    ragged = print_spec(format("nf4"))
    back = print_spec(format("fp32"), rotation=-128)
    made = {**spec, **random, "nf4 ragged rows": ragged, "nvfp4-eden corrected": eden, "rotation back": back}
    codecs = {name: ({"encode": VALUES, "decode": VALUES}, {"encode": frozenset({"STG 128"})}) for name in made}
    codecs |= {
        name: ({"encode": VALUES, "decode": VALUES}, {}) for name in ("fp32", "bf16", "fp16")
    }  # as wide as values
    codecs["rotation back"] = {"encode": VALUES}, {}  # its values are all that it writes
    before = [(name, print_spec(format(name), line=True)) for name in PASSES]
    given = [(name, print_spec(format(name), given=True)) for name in MEASURED]
    return [
        *(Specialisation(f"codec {name}", "codec.cu", text, *codecs[name]) for name, text in made.items()),
        *(Specialisation(f"passes {name}", "passes.cu", text, _PASS[finder(format(name))]) for name, text in before),
        *(Specialisation(f"statistic {name}", "statistic.cu", text, {"measure": VALUES}) for name, text in given),
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
    found = [Specialisation(name, "step.cu", print_spec(kind), {"update": kind.values, "again": kind.values})]
    if kind.program.measures:
        sweeps = {launch.kernel: kind.values for launch in launches(kind.program) if launch.over in ("chunks", "tiles")}
        found.append(Specialisation(f"{name} measures", "measure.cu", print_spec(kind), sweeps))
    return found
