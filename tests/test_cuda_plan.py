"""What the host keeps from step to step for CUDA steps: structs, buckets, tables; when they are made, and freed."""

import copy
import gc
import re
import subprocess
import weakref
from collections.abc import Iterator
from ctypes import c_char_p, sizeof
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import CASES, assert_same, everything, gradient, parameters, train
from cases import one_thread as one_thread
from cuda_cases import Counting, device, needs_compiler, stepping
from test_jobs import SEEN, UNSEEN, Named, lay, run
from torch import Tensor
from torch.nn import Parameter

from lowbit import backends, tape
from lowbit.backends import cuda, cuda_step
from lowbit.gpu import CompileError, jobs, machine, sources, stages
from lowbit.gpu.specialise import print_spec, special
from lowbit.native import abi, build
from lowbit.optim import AdamW, GlobalClip, StableSPAM
from lowbit.stages import Job

pytestmark = needs_compiler

# ---- what is stated twice

STRUCTS = {"Job": jobs.Job, "Dynamic": jobs.Dynamic, "Run": jobs.Run, "Node": jobs.Node}


def python_layout() -> dict[str, int]:
    layout = {}
    for name, struct in STRUCTS.items():
        layout[f"sizeof({name})"] = sizeof(struct)
        for field in struct._fields_:
            its = getattr(struct, field[0])
            layout |= {f"offsetof({name}, {field[0]})": its.offset, f"sizeof((({name} *)0)->{field[0]})": its.size}
    return layout


def test_structs_are_the_compilers(tmp_path: Path):
    if not (cxx := build.compiler()):
        pytest.skip("no C++ compiler")
    layout = python_layout()
    text = '#include <stddef.h>\n#include <stdio.h>\n#include "job.h"\nint main() {\n'
    text += "".join(f'  printf("%d\\n", (int)({name}));\n' for name in layout) + "}\n"
    (tmp_path / "layout.cpp").write_text(text)
    folders = [f"-I{folder}" for folder in (build.HERE, build.device_sources())]
    subprocess.run([cxx, *folders, tmp_path / "layout.cpp", "-o", tmp_path / "layout"], check=True)
    said = subprocess.run([tmp_path / "layout"], check=True, capture_output=True, text=True).stdout.split()
    assert dict(zip(layout, map(int, said), strict=True)) == layout
    declared = sources()["job.h"].split("struct ")[1:]
    for name, text in zip(STRUCTS, declared, strict=True):  # and no field is missing at an end
        fields = [line for line in text.split("};")[0].splitlines()[1:] if ";" in line]
        names = sum(line.partition(";")[0].count(",") + 1 for line in fields)
        assert text.startswith(name) and names == len(STRUCTS[name]._fields_)


def a_job(states: str = "8bit") -> Job:
    """AdamW's, of a matrix."""
    named = parameters([(64, 256)], torch.bfloat16)
    opt = AdamW(named, states=states)
    with stepping():
        train(opt, named, range(1, 2))
    return opt._slots[named[0][1]]._job


NUMBERS = {
    "step.cu": [
        ("lb::THREADS", cuda_step.THREADS),
        ("lb::UNITS", cuda_step.UNITS),
        ("lb::UPDATERS", cuda_step.UPDATERS),
    ],
    "measure.cu": [("lb::TILE", stages.TILE), ("lb::STRIPS", stages.STRIPS), ("lb::NARROW", stages.NARROW)],
    "constants.cu": [
        ("LB_NODES", tape.NODES),
        ("LB_CONSTANTS", abi.CONSTANTS),
        ("LB_FROM_FLOAT32", tape.FLOAT32),
        ("LB_FROM_FLOAT64", tape.FLOAT64),
        *(
            (f"LB_{name}", getattr(tape, name))
            for name in ["LITERAL", "ADD", "SUBTRACT", "MULTIPLY", "DIVIDE", "LEAST", "STORE"]
        ),
    ],
    "codec.cu": [("THREADS", cuda.THREADS), ("V", cuda.VALUES)],
}


@pytest.mark.parametrize("file", NUMBERS)
def test_numbers_of_host_and_kernels_agree(file: str):
    texts = sources()
    spec = print_spec(special(a_job()))
    if file == "codec.cu":
        spec = cuda.print_spec(cuda.format("int8"), torch.float32)
    headers = {**{name: text for name, text in texts.items() if name.endswith(".h")}, "spec.h": spec}
    for more in (0, 1):
        said = "".join(f'static_assert({name} == {value + more}, "differs");\n' for name, value in NUMBERS[file])
        if not more:
            device().binary(texts[file] + said, headers)
        else:
            with pytest.raises(CompileError) as error:
                device().binary(texts[file] + said, headers)
            assert str(error.value).count("static assertion failed") == len(NUMBERS[file])


def test_no_kernel_has_variables_of_its_own():
    """They would be one for all optimizers, and two captured graphs could not be replayed at the same time."""
    for name, text in {**sources(), "spec.h": print_spec(special(a_job()))}.items():
        assert "__constant__" not in text and not re.search(r"^__device__[^(]*;", text, re.MULTILINE), name


def test_a_gradient_that_is_not_aligned_demotes_nothing_else():
    """Rows of whole blocks stay such; a parameter or state that is not aligned takes the course of ragged rows."""
    job = a_job()
    room = torch.zeros(64 * 256 + 1, dtype=torch.bfloat16)
    askew = room[1:].view(64, 256)
    assert askew.data_ptr() % 4 == 2
    kinds = {}
    for what in ("gathered", "param"):  # `gathered` is a gradient that is not the parameter's own
        other = copy.copy(job)
        other.gathered = job.grad
        setattr(other, what, askew)
        kinds[what] = special(other)
    assert kinds["gathered"] == special(job) and kinds["gathered"].linear and not kinds["param"].linear


# ---- when a plan is made


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The plans that were made."""
    plans: list[Any] = []

    class Plan(cuda_step._Plan):
        def __init__(self, jobs: list[Job]):
            super().__init__(jobs)
            plans.append(weakref.ref(self))

    monkeypatch.setattr(cuda_step, "_Plan", Plan)
    return plans


@pytest.fixture
def emulated() -> Iterator[Counting]:
    with stepping() as its:
        yield its


def give(named: Named, t: int, dtype: torch.dtype | None = None) -> None:
    for k, (_, p) in enumerate(named):
        p.grad = None
        p.grad_dtype = dtype or p.dtype
        p.grad = gradient(tuple(p.shape), t, k, dtype or p.dtype)


SHAPES = [(64, 256), (33, 300), (50,)]


def test_a_plan_is_made_once(made: list[Any], emulated: Counting, monkeypatch: pytest.MonkeyPatch):
    named = parameters(SHAPES, torch.bfloat16)
    opt = StableSPAM(named, states="4bit")
    give(named, 1)
    opt.step()
    assert len(made) == 1
    monkeypatch.setattr(emulated, "module", None)  # nothing is compiled any more, nor looked up
    for t in range(2, 6):
        give(named, t)
        for group in opt.param_groups:
            group["lr"] *= 0.9
        opt.step()
    assert len(made) == 1


def test_a_gradient_of_another_dtype_is_another_plan(made: list[Any], emulated: Counting):
    named = parameters(SHAPES, torch.bfloat16)
    opt = AdamW(named)
    for t, dtype in enumerate([torch.bfloat16, torch.float32, torch.float32, torch.bfloat16], 1):
        give(named, t, dtype)
        opt.step()
    assert len(made) == 2  # the last step finds the first one's


def test_who_shares_constants_is_seen_anew(made: list[Any], emulated: Counting):
    """A third group comes later; until then and from then on a plan lasts."""
    named = parameters(SHAPES, torch.bfloat16)
    opt = AdamW([{"params": named[:1]}, {"params": named[1:2], "lr": 0.1}])
    give(named, 1)
    opt.step()
    assert [len(bucket.numbers) for bucket in made[0]().buckets] == [1, 1]
    opt.add_param_group({"params": named[2:], "lr": 0.3})
    for t in (2, 3):
        give(named, t)
        opt.step()
    assert len(made) == 2 and len(made[1]().buckets) == 3


def test_alike_tensors_are_one_bucket(made: list[Any], emulated: Counting):
    named = parameters([(64, 256), (32, 512), (7, 256)], torch.bfloat16)
    opt = AdamW(named, policy=None)
    train(opt, named, range(1, 2))
    (plan,) = (ref() for ref in made)
    assert emulated.launched["update"] == emulated.launched["again"] == len(plan.buckets) < 3


def test_one_launch_begins_all_that_have_the_same_folds(made: list[Any], emulated: Counting):
    """Of one group; another one has its own constants."""
    named = parameters([(64, 256), (33, 300), (50,), (32, 256)], torch.bfloat16)
    opt = AdamW([{"params": named[:3]}, {"params": named[3:], "lr": 0.1}])
    train(opt, named, range(1, 2))
    (plan,) = (ref() for ref in made)
    assert emulated.launched["begin"] == 2 and emulated.launched["update"] == len(plan.buckets) > 2


# ---- what is kept from step to step, and others might have changed


def alone(lr: float, between: Any = None) -> dict[str, Any]:
    named = parameters(SHAPES, torch.bfloat16)
    opt = AdamW(named, lr=lr, weight_decay=lr)
    for t in range(1, 5):
        give(named, t)
        opt.step()
        if between is not None:
            between(t)
    return everything(opt)


def test_another_optimizer_of_the_same_kernels_may_step_in_between(emulated: Counting):
    """On this stream or another: constants are a module's, and are the optimizer's own whenever it steps."""
    expected = alone(1e-2)
    for stream in (0, 7):
        others = parameters(SHAPES, torch.bfloat16)
        other = AdamW(others, lr=0.5, weight_decay=0.5)

        def step(t: int, stream: int = stream, other: Any = other, others: Named = others) -> None:
            emulated.current = stream
            give(others, t)
            other.step()
            emulated.current = 0

        assert_same(alone(1e-2, step), expected)


def test_the_stream_is_asked_for_in_every_step(emulated: Counting):
    named = parameters(SHAPES, torch.bfloat16)
    opt = AdamW(named)
    library = emulated.library
    library.emulator_calls.restype = c_char_p
    for t, stream in enumerate((0, 3, 3, 4, 0), 1):
        give(named, t)
        emulated.current = stream
        library.emulator_note_calls(1)
        try:
            opt.step()
            calls = library.emulator_calls().decode().splitlines()
        finally:
            library.emulator_note_calls(0)
            emulated.current = 0
        work = [call for call in calls if call.startswith(("launch", "copy", "write"))]
        assert work and all(call.endswith(f" on {stream}") for call in work)


# ---- what happens between steps, as in test_jobs.py

KEPT = [case for case in CASES if case.name in ("adamw", "stablespam", "adafactor", "adammini")]
OPTIONS = [(torch.float32, {}), (torch.bfloat16, {"master": "kahan"}), (torch.bfloat16, {})]


@pytest.mark.parametrize("case", [KEPT[0], *(pytest.param(c, marks=pytest.mark.slow) for c in KEPT[1:])], ids=str)
@pytest.mark.parametrize("event", [*UNSEEN, *SEEN], ids=lambda event: event.__name__)
@pytest.mark.filterwarnings("ignore:lr=.* is below the resolution")
def test_what_happens_between_steps(case: Any, event: Any):
    for dtype, options in OPTIONS[KEPT.index(case) % 3 :][:1]:
        with stepping():
            found = run(case, event, "native", dtype, options)
        assert_same(found, run(case, event, "reference", dtype, options))


@pytest.mark.slow
@pytest.mark.parametrize("case", KEPT[:2], ids=str)
def test_gradients_come_and_go(case: Any, monkeypatch: pytest.MonkeyPatch):
    """Any subset of tensors, and gradients laid out in any way, of any dtype."""

    def trained() -> dict[str, Any]:
        named = parameters([(64, 64), (33, 300), (50,), (7, 5, 16), (1,)])
        groups = [{"params": named[:2]}, {"params": named[2:], "lr": 1e-2}]
        opt = case.build(groups, states="4bit", stabilize=(GlobalClip(0.5),))
        for t, some in enumerate([31, 1, 30, 0, 7, 7, 24, 31, 12, 31, 31, 31], 1):
            for k, (_, p) in enumerate(named):
                p.grad_dtype = None
                p.grad = lay(gradient(tuple(p.shape), t, k), t) if some >> k & 1 else None
            opt.step()
        return everything(opt)

    with stepping(schedule=2):
        found = trained()
    monkeypatch.setenv("LOWBIT_BACKEND", "reference")
    assert_same(found, trained())


# ---- what stays alive


@pytest.mark.parametrize("rule", [AdamW, StableSPAM])
def test_nothing_of_an_optimizer_outlives_it(rule: Any, made: list[Any], emulated: Counting):
    named = [*parameters(SHAPES), ("p3", Parameter(torch.ones(64, 32).t()))]
    opt = rule(named)
    train(opt, named, range(1, 4))
    kept: list[Any] = [opt, *(p for _, p in named)]
    kept += [opt._slots[p]._job for _, p in named]
    kept += [x for _, p in named for x in opt.state[p].values() if isinstance(x, Tensor)]
    seen = [weakref.ref(x) for x in kept] + made
    assert len(made) == 1 and made[0]() is not None
    del opt, kept, named
    gc.collect()
    assert [x() for x in seen if x() is not None] == []


@pytest.mark.parametrize("lay_out", [lambda g: g, lambda g: g.t().contiguous().t()], ids=["plain", "transposed"])
def test_a_gradient_does_not_outlive_its_step(lay_out: Any, emulated: Counting):
    named = parameters([(64, 64)])
    opt = AdamW(named)
    for t in (1, 2):
        named[0][1].grad = lay_out(gradient((64, 64), t, 0))
        opt.step()
    seen = weakref.ref(named[0][1].grad)
    opt.zero_grad()
    assert seen() is None


def test_a_plan_goes_with_its_optimizer(made: list[Any], emulated: Counting):
    """Without waiting for the garbage collector: it has tables and buffers on the device."""
    before = len(cuda_step._plans)
    named = parameters(SHAPES)
    opt = AdamW(named)
    train(opt, named, range(1, 2))
    assert len(cuda_step._plans) == before + 1
    job = opt._slots[named[0][1]]._job
    opt._slots.clear()
    opt._roster = None
    gc.disable()
    try:
        del job
        assert len(cuda_step._plans) == before and made[0]() is None
    finally:
        gc.enable()


def test_each_gpu_has_a_plan_of_its_own(monkeypatch: pytest.MonkeyPatch):
    """A launch is for one; and what is measured over all tensors cannot be on two."""
    named = parameters([(8, 8)])
    programs = [rule.program(rule.param_groups[0]) for rule in (AdamW(named), AdamW(named, stabilize=GlobalClip()))]
    devices = [torch.device("cuda", k) for k in (0, 1, 0)]
    jobs = {n: [SimpleNamespace(kind=(p, d), shard=None) for d in devices] for n, p in enumerate(programs)}
    monkeypatch.setattr(backends, "for_program", lambda program, device: cuda)
    first, second, third = jobs[0]
    assert backends.share(jobs[0]) == [(cuda, [first, third]), (cuda, [second])]
    with pytest.raises(ValueError, match="over all tensors must be on one GPU, and these are on cuda:0, cuda:1"):
        backends.share(jobs[1])
    assert backends.share(jobs[1][::2]) == [(cuda, jobs[1][::2])]


def test_plans_of_steps_that_alternate_are_kept_but_not_all(made: list[Any], emulated: Counting):
    named = parameters([(4, 64)] * 7, torch.float32)
    opt = AdamW(named)
    for t in range(1, 9):  # one tensor has a gradient in every other step only
        give(named, t, torch.float32)
        if t % 2:
            named[-1][1].grad = None
        opt.step()
    assert len(made) == 2
    for absent in range(1, len(named)):  # each of these is a plan of its own
        give(named, absent, torch.float32)
        named[absent][1].grad = None
        opt.step()
    assert len(made) == 8  # the last of them is as one before, which is gone by now
    assert sum(ref() is not None for ref in made) == cuda_step.EAGER


def test_a_step_that_fails_is_no_step(emulated: Counting, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: Any) -> None:
        raise CompileError("a kernel", "no compiler today")

    named, like = parameters([(4, 64)], torch.float32), parameters([(4, 64)], torch.float32)
    opt, other = AdamW(named, states="bf16"), AdamW(like, states="bf16")
    for its in (named, like):
        give(its, 1, torch.float32)
    with monkeypatch.context() as patch:
        patch.setattr(type(machine(torch.device("cpu"))), "prefetch", refuse)
        with pytest.raises(CompileError, match="no compiler today"):
            opt.step()
    assert opt.param_groups[0]["steps"] == 0
    opt.step()
    other.step()
    assert torch.equal(named[0][1], like[0][1]) and opt.state[named[0][1]]["step"] == 1


def test_a_constant_beyond_fp32_is_infinite(emulated: Counting):
    named = parameters([(4, 64)], torch.float32)
    opt = AdamW(named, lr=1e39)
    give(named, 1, torch.float32)
    before = named[0][1].detach().clone()
    opt.step()
    assert torch.equal(named[0][1], before) and opt.counters()["skipped_blocks"] == 4
