"""Every optimizer's kernels, as its steps ask for them, through the compilers: nothing spilled on any architecture."""

import warnings
from collections.abc import Iterator
from types import ModuleType

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
from lowbit.stages import Job

FOUND = [getattr(optim, name) for name in optim.__all__]
RULES = [one.__name__ for one in FOUND if isinstance(one, type) and issubclass(one, optim.Rule) and one != optim.Rule]
SHAPES = {"aligned": (64, 1024), "ragged": (64, 300)}
BY = "nvrtc12", "nvrtc13"  # what users have; nvcc, which takes twice as long, is in test_cuda_build.py
MOST = 128  # registers of an update; with three moments (AdaPM) more than of those that most users take
NAMES = "layer.weight", "lm_head.weight", "embed.weight", "norm.weight"


def asked(rule: str, states: str, shape: tuple[int, int]) -> Iterator[tuple[str, str]]:
    """The kernel files that a step of matrices and a vector in bf16 needs, and their spec.h."""
    jobs: list[Job] = []

    def step(its: list[Job]) -> None:
        jobs.extend(its)
        reference.step(its)

    noting = ModuleType("noting")
    vars(noting).update(find=lambda device: None, unsupported=lambda program: "", takes=lambda *_: False, step=step)
    named = [(name, Parameter(torch.ones(shape if k < 3 else shape[1:]).bfloat16())) for k, name in enumerate(NAMES)]
    for k, (_, p) in enumerate(named):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(k)).bfloat16()
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setitem(backends._NATIVE, "cpu", noting)
        patch.setenv("LOWBIT_BACKEND", "native")
        getattr(optim, rule)(named, lr=1e-3, states=states).step()
    for kind in dict.fromkeys(map(special, jobs)):
        yield "step.cu", print_spec(kind)
        if kind.program.measures:
            yield "measure.cu", print_spec(kind.folds)


@pytest.mark.parametrize("name", ["AdamW 8bit", "SPAM 4bit", "StableSPAM 4bit"])
def test_what_is_shipped_is_what_a_step_asks_for(name: str):
    known = {(one.file, one.spec) for one in SHIPPED.values() if one.name.removesuffix(" measures") == name}
    assert known and known <= {*asked(*name.split(), SHAPES["aligned"])}


def faults(one: Specialisation, by: str, arch: str) -> Iterator[str]:
    """What a compiler warns of, spills among it; and kernels that take more registers than they may."""
    try:
        _, log = compiler(by)(one, arch)
    except CompileError as error:
        yield f"{by}: {error}"
        return
    for kernel, taken in inspect.resources(log).items():
        most = MOST if kernel == "update" else REGISTERS.get(kernel, 64)
        if taken.spills or taken.stack or not 0 < taken.registers <= most:
            yield f"{by}: {one.name} for {arch}: {kernel} may take {most} registers and takes {taken}"


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
def test_nothing_of_any_optimizer_is_spilled(rule: str):
    """Most kernels are asked for by states in 8 bits and in 4, in rows of both kinds; each is compiled once."""
    kinds: dict[tuple[str, str], str] = {}
    for lie, shape in SHAPES.items():
        for states in ("8bit", "4bit"):
            for kind in asked(rule, states, shape):
                kinds.setdefault(kind, f"{rule} {states} {lie}")
    kernels = [Specialisation(name, file, spec, {}) for (file, spec), name in kinds.items()]
    found = [fault for one in kernels for arch in ARCHITECTURES for by in BY for fault in faults(one, by, arch)]
    assert not found, "\n".join(found)
