"""Every optimizer's kernels, as its steps ask for them, through the compilers: nothing spilled on any architecture."""

import warnings
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from test_cuda_build import COMPILERS, REGISTERS, SHIPPED, compiler
from torch.nn import Parameter

from lowbit import backends, optim
from lowbit.backends import reference
from lowbit.gpu.cost import ARCHITECTURES, read
from lowbit.gpu.inspect import Specialisation
from lowbit.gpu.specialise import print_spec, special
from lowbit.stages import Job

FOUND = [getattr(optim, name) for name in optim.__all__]
RULES = [one.__name__ for one in FOUND if isinstance(one, type) and issubclass(one, optim.Rule) and one != optim.Rule]
SHAPES = {"aligned": (64, 1024), "ragged": (64, 300)}
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


@pytest.mark.slow
@pytest.mark.parametrize("lie", SHAPES)
@pytest.mark.parametrize("states", ["8bit", "4bit"])
@pytest.mark.parametrize("rule", RULES)
def test_nothing_of_any_optimizer_is_spilled(rule: str, states: str, lie: str):
    for k, (file, spec) in enumerate(dict.fromkeys(asked(rule, states, SHAPES[lie]))):
        special = Specialisation(f"{rule} {states} {lie}", file, spec, {})
        for j, arch in enumerate(ARCHITECTURES):
            cubin, log = compiler(COMPILERS[(RULES.index(rule) + j + k) % len(COMPILERS)])(special, arch)
            for one in read(special, arch, cubin, log):
                taken = one.resources
                assert (taken.spills, taken.stack) == (0, 0), (one.kernel, arch)
                most = MOST if one.kernel == "update" else REGISTERS.get(one.kernel, 64)
                assert 0 < taken.registers <= most, (one.kernel, arch)
