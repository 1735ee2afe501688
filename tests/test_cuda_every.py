"""Every optimizer's kernels, as its steps ask for them, through the compilers: nothing spilled on any architecture."""

import functools
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from test_cuda_build import REGISTERS, SHIPPED, compiler
from torch.nn import Parameter

from lowbit import backends, optim
from lowbit.backends import reference
from lowbit.gpu import CompileError, inspect
from lowbit.gpu.cost import ARCHITECTURES
from lowbit.gpu.inspect import Specialisation
from lowbit.gpu.specialise import print_spec, special
from lowbit.nn.stored import StoredWeight
from lowbit.stages import Job

FOUND = [getattr(optim, name) for name in optim.__all__]
RULES = [one.__name__ for one in FOUND if isinstance(one, type) and issubclass(one, optim.Rule) and one != optim.Rule]
SHAPES = {"aligned": (64, 1024), "ragged": (64, 300)}
# What has other kernels than the defaults: one moment, three, other parameters, a master copy, other states, weights
# that are codes; and ranks below those of these matrices, which would else be stepped by Adam.
OPTIONS: dict[str, dict[str, Any]] = {
    "SGD momentum": {"momentum": 0.9},
    "AdamW amsgrad": {"amsgrad": True},
    "AdamW fp32": {"dtype": torch.float32},
    "AdamW master": {"master": "fp32"},
    "AdamW kahan": {"master": "kahan"},
    "AdamS fp32": {"dtype": torch.float32},
    "AdamS split16": {"master": "split16"},
    "SPAM fp16": {"dtype": torch.float16},
    "SPAM split8": {"master": "split8"},
    "StableSPAM fp32": {"dtype": torch.float32},
    "StableSPAM split8": {"master": "split8"},
    "Muon master": {"master": "fp32"},
    "AdamW states": {"states": "fp32"},
    "AdamS states": {"states": "fp32", "dtype": torch.float32},
    "AdamS halves": {"states": "fp32", "dtype": torch.float16},
    "StableSPAM states": {"states": "fp32", "master": "fp32"},
    "AdamW amsgrad master": {"amsgrad": True, "master": "fp32"},
    "AdamW blocks": {"states": "int8:16"},
    "AdamW stochastic": {"state_rounding": "stochastic"},
    "StableSPAM stochastic": {"state_rounding": "stochastic", "master": "fp32"},
    "AdamW int8": {"store": "int8"},
    "AdamW nf4": {"store": "nf4"},
    "AdamS mxfp4": {"store": "mxfp4"},
    "AdamS nvfp4": {"store": "nvfp4"},
    "StableSPAM split": {"store": "split"},
    "StableSPAM nvfp4": {"store": "nvfp4"},
    "AdamMini int4": {"store": "int4"},
    "AdamW amsgrad split8": {"store": "split8", "amsgrad": True},
    "AdaPM mini": {"second_moment": "mini", "stabilize": (optim.AdaGN(),)},
    "APOLLO": {"rank": 32},
    "Fira": {"rank": 32},
    "GaLore": {"rank": 32},
}
BY = "nvrtc12", "nvrtc13"  # what users have; nvcc, which takes twice as long, is in test_cuda_build.py
NAMES = "layer.weight", "lm_head.weight", "embed.weight", "norm.weight"


def asked(case: str, states: str, shape: tuple[int, int]) -> Iterator[tuple[str, str]]:
    """The kernel files that a step of matrices and a vector needs, and their spec.h: of a rule, in bf16, or of a case
    of `OPTIONS`."""
    jobs: list[Job] = []

    def step(its: list[Job]) -> None:
        jobs.extend(its)
        reference.step(its)

    noting = ModuleType("noting")
    vars(noting).update(find=lambda device: None, unsupported=lambda program: "", takes=lambda *_: False, step=step)
    options = {"dtype": torch.bfloat16, "states": states, "store": None, **OPTIONS.get(case, {})}
    dtype, store = options.pop("dtype"), options.pop("store")
    named = [(name, Parameter(torch.ones(shape if k < 3 else shape[1:], dtype=dtype))) for k, name in enumerate(NAMES)]
    if store:
        named = [(name, Parameter(StoredWeight.of(p.detach(), store))) for name, p in named[:3]]
    for k, (_, p) in enumerate(named):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(k)).to(dtype)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setitem(backends._NATIVE, "cpu", noting)
        patch.setenv("LOWBIT_BACKEND", "native")
        getattr(optim, case.split()[0])(named, lr=1e-3, **options).step()
    assert jobs
    for kind in dict.fromkeys(map(special, jobs)):
        assert (kind.stored is not None) == bool(store)
        yield "step.cu", print_spec(kind)
        if kind.program.measures:
            yield "measure.cu", print_spec(kind.folds)


@pytest.mark.parametrize("name", ["AdamW 8bit", "SPAM 4bit", "StableSPAM 4bit"])
def test_what_is_shipped_is_what_a_step_asks_for(name: str):
    known = {(one.file, one.spec) for one in SHIPPED.values() if one.name.removesuffix(" measures") == name}
    assert known and known <= {*asked(*name.split(), SHAPES["aligned"])}


@functools.cache  # many rules have kernels in common
def compiled(file: str, spec: str, by: str, arch: str) -> dict[str, inspect.Resources] | CompileError:
    """What each kernel takes, or what a compiler warns of."""
    try:
        return inspect.resources(compiler(by)(Specialisation(file, file, spec, {}), arch)[1])
    except CompileError as error:
        return error


def faults(file: str, spec: str, by: str, arch: str) -> list[str]:
    """What a compiler warns of, spills among it; and kernels that take more registers than they may."""
    found = compiled(file, spec, by, arch)
    if isinstance(found, CompileError):
        return [f"{by}: {found}"]
    many = "LINEAR = true" not in spec and int(spec.partition("MOMENTS = ")[2][0]) > 2  # ragged rows of three moments
    most = {kernel: REGISTERS.get(kernel, 64) for kernel in found} | {"update": 72 if many else 64}
    return [
        f"{by}: {kernel} of {file} for {arch} may take {most[kernel]} registers, and takes {taken}"
        for kernel, taken in found.items()
        if taken.spills or taken.stack or not 0 < taken.registers <= most[kernel]
    ]


@pytest.mark.slow
@pytest.mark.parametrize("case", dict.fromkeys([*RULES, *OPTIONS]))
def test_nothing_of_any_optimizer_is_spilled(case: str):
    """Of states in 8 bits and in 4, in rows of both kinds; what several of them ask for is compiled once."""
    found: list[str] = []
    for lie, shape in SHAPES.items():
        for states in ("8bit", "4bit"):
            for file, spec in asked(case, states, shape):
                said = [fault for arch in ARCHITECTURES for by in BY for fault in faults(file, spec, by, arch)]
                found += [f"{states}, {lie}: {fault}" for fault in said]
    assert not found, "\n".join(found)
