"""A learning rate that is a tensor on the device, on the emulator: kernels read it there, and nobody waits for it."""

import math
import textwrap
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import CASES, Case, assert_same, everything, parameters
from cases import one_thread as one_thread
from cuda_cases import Counting, needs_compiler, patched, stepping
from emulator import sanitized
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cuda_graph import capture, give
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

from lowbit import tape
from lowbit.backends import cuda_step
from lowbit.gpu import sources
from lowbit.optim import SCALE, AdamW, Rule, StableSPAM, matrix, update
from lowbit.optim import Moment as Moment
from lowbit.tape import Traced, least

pytestmark = needs_compiler

Named = list[tuple[str, Parameter]]
SHAPES = [(64, 64), (50,)]
RATES = [1e-3, 3e-3, 0.1, 0.0, 7e-4]


@pytest.fixture
def machine() -> Iterator[Counting]:
    with stepping() as its:
        its.current = 5
        yield its
        its.current = 0


class Unread(TorchDispatchMode):
    """An error where the host reads a tensor, or makes another of it."""

    def __init__(self, tensor: Tensor):
        super().__init__()
        self.address = tensor.data_ptr()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        read = [x for x in arguments if isinstance(x, Tensor) and x.numel() and x.data_ptr() == self.address]
        assert not read, f"{function} reads the learning rate"
        return function(*arguments, **(options or {}))


def trained(case: Any, rates: list[float], tensor: torch.dtype | None, **options: Any) -> tuple[dict[str, Any], Rule]:
    """Steps with these rates, as floats or in a tensor that is written in place."""
    named = parameters(SHAPES)
    exact = [torch.tensor(rate, dtype=tensor).item() if tensor else rate for rate in rates]
    lr = torch.tensor(rates[0], dtype=tensor) if tensor else exact[0]
    opt = case.build(named, **{**options, "lr": lr})
    for t, rate in enumerate(exact, 1):
        give(named, t)
        if isinstance(lr, Tensor):
            lr.fill_(rate)
            with Unread(lr):
                opt.step()
        else:
            opt.param_groups[0]["lr"] = rate
            opt.step()
    found = everything(opt)
    return {k: float(x) if k.endswith(" lr") else x for k, x in found.items()}, opt


def of_fp32(rates: list[float]) -> list[float]:
    return [torch.tensor(rate).item() for rate in rates]


VARIANTS = "adamw-amsgrad", "stablespam-amsgrad", "spam-official", "adammini-tensor", "scale-head-l2"
EACH = [pytest.param(c, marks=[pytest.mark.slow] * (c.name in VARIANTS)) for c in CASES]


@pytest.mark.parametrize("case", EACH, ids=str)
def test_a_rate_on_the_device_is_a_rate(case: Case, machine: Counting):
    """Every optimizer: the bits of steps with the same floats. fp32 and fp64; what a rule makes of it is its own."""
    dtype, rates = ((torch.float32, of_fp32(RATES)), (torch.float64, RATES))[CASES.index(case) % 2]
    expected, _ = trained(case, rates[:3], None, states="bf16")
    machine.launched.clear()
    found, opt = trained(case, rates[:3], dtype, states="bf16")
    assert_same(found, expected)
    assert machine.launched["follow"] >= 3 and opt.param_groups[0]["lr"].dtype == dtype


CASE = next(case for case in CASES if case.name == "adamw")


def test_a_planted_fault_shows_in_a_rate():
    rates = of_fp32(RATES[:3])
    with stepping():
        expected, _ = trained(CASE, rates, None, states="bf16")
    with patched("constants.cu", "a - b", "b - a"), stepping() as machine:
        machine._modules.clear()
        found, _ = trained(CASE, rates, torch.float32, states="bf16")
    with pytest.raises(AssertionError):
        assert_same(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["thread", "address"])
def test_sanitizers_find_nothing_where_a_rate_is_followed(sanitizer: str):
    done = sanitized(sanitizer, WATCHED)
    assert done.returncode == 0 and "well" in done.stdout, done.stderr[-4000:]


def test_a_missing_barrier_is_found_where_a_rate_is_followed():
    before, after = "                                          : mine.number;\n  __syncthreads();", "  : mine.number;"
    code = f"with patched('constants.cu', {before!r}, {after!r}):\n" + textwrap.indent(
        WATCHED.partition("\n")[2], "    "
    )
    done = sanitized("thread", WATCHED.partition("\n")[0] + "\n" + code)
    assert done.returncode and "data race" in done.stderr and "Traceback" not in done.stderr, done.stderr[-4000:]


WATCHED = """from test_cuda_rate import *
with stepping(schedule=2) as machine:
    trained(CASE, of_fp32(RATES[:2]), torch.float32, states="bf16")
    assert machine.launched["follow"]
print("well")
"""


def test_rates_and_schedules_come_and_go(machine: Counting):
    """A float, a tensor, another tensor, a schedule that writes into it; groups differ."""
    opts = []
    for on_device in (False, True):
        named = parameters([(64, 64), (33, 300), (50,)], torch.bfloat16)
        groups = [{"params": named[:1]}, {"params": named[1:], "lr": 0.25}]
        opt = StableSPAM(groups, lr=0.5, weight_decay=0.1, total_steps=9, reset_interval=3)
        opts.append(opt)
        schedule = None
        for t in range(1, 9):
            give(named, t)
            if t in (2, 3, 5):
                rate = {2: 0.125, 3: 0.5, 5: 0.25}[t]
                as_tensor = on_device and t != 5
                opt.param_groups[0]["lr"] = torch.tensor(rate, dtype=torch.float64) if as_tensor else rate
            if t == 6:
                opt.param_groups[0]["lr"] = torch.tensor(0.25, dtype=torch.float64) if on_device else 0.25
                schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 0.5**step)
            opt.step()
            if schedule is not None:
                schedule.step()
    first, second = ({k: x for k, x in everything(opt).items() if not k.endswith("lr")} for opt in opts)
    assert_same(first, second)
    assert [float(g["lr"]) for g in opts[0].param_groups] == [float(g["lr"]) for g in opts[1].param_groups]


@pytest.mark.parametrize("case", [c for c in CASES if c.name in ("adamw", "stablespam", "spam", "scale")], ids=str)
def test_a_replay_reads_the_rate_when_it_runs(case: Case, machine: Counting):
    """What is written after `prepare_replay` counts; what else the constants depend on is the step's."""
    rates = of_fp32(RATES)
    expected, _ = trained(case, rates, None)
    named, lr = parameters(SHAPES), torch.tensor(rates[0])
    opt = case.build(named, lr=lr)
    give(named, 1)
    opt.step()
    graph = capture(opt, machine)
    for t, rate in enumerate(rates[1:], 2):
        give(named, t)
        with Unread(lr):
            opt.prepare_replay()
        lr.fill_(rate)
        graph.replay()
    found = {k: float(x) if k.endswith(" lr") else x for k, x in everything(opt).items()}
    assert_same(found, expected)


def test_a_graph_of_a_float_is_not_one_of_a_tensor(machine: Counting):
    """And the other way round."""
    for first, then in ((1e-3, torch.tensor(1e-3)), (torch.tensor(1e-3), 1e-3)):
        named = parameters(SHAPES)
        opt = AdamW(named, lr=first)
        give(named, 1)
        opt.step()
        graph = capture(opt, machine)
        opt.param_groups[0]["lr"] = then
        before = everything(opt)
        with pytest.raises(RuntimeError, match="or whether lr is a tensor on the device is not as captured"):
            opt.prepare_replay()
        assert_same(everything(opt), before)
        opt.param_groups[0]["lr"] = first
        opt.prepare_replay()
        graph.replay()
        assert opt.param_groups[0]["steps"] == 2


def test_a_checkpoint_leaves_the_rate_on_its_device(machine: Counting):
    named = parameters(SHAPES)
    for saved in (torch.tensor(0.5), 0.5):
        other = AdamW(parameters(SHAPES), lr=saved)
        opt = AdamW(named, lr=torch.tensor(1e-3, dtype=torch.float64))
        opt.load_state_dict(other.state_dict())
        assert isinstance(opt.param_groups[0]["lr"], Tensor) and opt.param_groups[0]["lr"].item() == 0.5


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_backends_that_are_no_gpu_take_its_value(backend: str, machine: Counting, monkeypatch: pytest.MonkeyPatch):
    """They wait for it; the bits are those of the float."""
    from lowbit import backends
    from lowbit.backends import native

    monkeypatch.setitem(backends._NATIVE, "cpu", native)
    monkeypatch.setenv("LOWBIT_BACKEND", backend)
    found = []
    for lr in (0.1, torch.tensor(0.1, dtype=torch.float64)):
        named = parameters(SHAPES)
        opt = SCALE(named, lr=lr, scalar_lr=0.2, weight_decay=0.1)
        for t in (1, 2):
            give(named, t)
            opt.step()
        found.append({k: x for k, x in everything(opt).items() if not k.endswith(" lr")})
    assert_same(*found)


# ---- rules of one's own


@update("p")
def descend(p, g, c):
    return p - c.lr * g


class Own(Rule):
    """What a rule may do with a rate: `how` says it."""

    stages = (descend,)

    def __init__(self, params, lr=1e-3, how=lambda lr: lr, **options):
        self.how = how
        super().__init__(params, {"lr": lr}, **options)

    def constants(self, group, t):
        return {"lr": self.how(group["lr"])}


REFUSED = {
    "Own compares a learning rate that is a tensor on cpu": lambda lr: max(lr, 0.1),
    "Own decides by": lambda lr: lr or 0.1,
    "Own asks for the value of": lambda lr: math.sqrt(lr),
    "Own asks for the value": lambda lr: float(lr),
    "Own takes a power with": lambda lr: lr**2,
    "Own takes the magnitude of": lambda lr: abs(lr),
    "Own divides with a remainder": lambda lr: lr % 0.5,
    r"Own's constants do 102 operations .* room for 64: pass lr as a float": lambda lr: sum([lr] * 99),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_done_on_the_device_is_refused(message: str, machine: Counting):
    """By the rule's name, and nothing has changed; with a float it can be done."""
    named, lr = parameters(SHAPES), torch.tensor(0.25)
    opt = Own(named, lr=lr, how=REFUSED[message])
    give(named, 1)
    before = everything(opt)
    with pytest.raises((TypeError, ValueError), match=message):
        opt.step()
    assert_same(everything(opt), before)
    opt.param_groups[0]["lr"] = 0.25
    opt.step()


@matrix("u")
def scaled(g, c):
    """A matrix stage that needs the rate."""
    return g * (1 + c.lr)


@update("p")
def subtract(p, u, c):
    return p - c.lr * u


class Matrices(Own):
    stages = (scaled, subtract)


def test_a_matrix_stage_has_the_rate_as_a_tensor(machine: Counting):
    found = []
    for lr in (0.3, torch.tensor(0.3, dtype=torch.float64)):
        named = parameters([(64, 64)])
        opt = Matrices(named, lr=lr, how=lambda lr: 2 * lr)
        for t in (1, 2):
            give(named, t)
            opt.step()
        found.append({k: x for k, x in everything(opt).items() if not k.endswith(" lr")})
    assert_same(*found)


# ---- what is refused before anything has changed


def test_tensors_elsewhere_or_of_other_kinds_are_refused(machine: Counting):
    named = parameters(SHAPES)
    wrong = {
        r"lr is a tensor on meta, and every step would wait for it": {"lr": torch.tensor(1.0, device="meta")},
        r"lr is a tensor on cpu, of 1 values in torch.bfloat16: kernels read": {"lr": torch.tensor(1.0).bfloat16()},
        r"weight_decay is a tensor on cpu, and every step would wait": {"weight_decay": torch.tensor(0.1)},
        r"lr must be a finite number >= 0, not -1.0": {"lr": torch.tensor(-1.0)},
    }
    opt = AdamW(named)
    give(named, 1)
    before = everything(opt)
    for message, hyper in wrong.items():
        with pytest.raises((TypeError, ValueError), match=message):
            AdamW(parameters(SHAPES), **hyper)
        if "finite" not in message:  # a device's number is looked at once, when it comes
            kept = {k: opt.param_groups[0][k] for k in hyper}
            opt.param_groups[0].update(hyper)
            with pytest.raises((TypeError, ValueError), match=message):
                opt.step()
            opt.param_groups[0].update(kept)
    assert_same(everything(opt), before)


def test_parameters_on_another_device_are_refused(machine: Counting, monkeypatch: pytest.MonkeyPatch):
    """Kernels of one device do not read another's memory; those on the CPU take the value."""
    from lowbit import gpu
    from lowbit.optim import hyper

    monkeypatch.setattr(gpu, "runs", lambda device: device.type == "meta")
    group = {"params": [torch.ones(3), ("w", torch.ones(3, device="meta"))], "lr": torch.tensor(1.0, device="meta")}
    hyper.check_common(group)
    monkeypatch.setattr(gpu, "runs", lambda device: True)
    with pytest.raises(ValueError, match="lr is a tensor on cpu, and there are parameters on meta: give each device's"):
        hyper.check_common({**group, "lr": torch.tensor(1.0)})


# ---- the kernel

OPERATIONS = [
    lambda a, b: a + b,
    lambda a, b: a - b,
    lambda a, b: a * b,
    lambda a, b: a / b if isinstance(b, Traced) or b else a,
    least,
    lambda a, b: -a,
]
NUMBERS = st.floats(allow_nan=False, min_value=-1e30, max_value=1e30).filter(lambda x: x == 0 or abs(x) > 1e-30)

PROGRAMS = st.lists(st.tuples(st.integers(0, 5), NUMBERS, st.integers(0, 8)), min_size=1, max_size=9)


@settings(max_examples=60, deadline=None)
@given(st.floats(1e-12, 1e3), PROGRAMS)
def test_the_kernel_does_what_python_did(rate: float, program: list[tuple[int, float, int]]):
    """Any course of operations, on a literal or on what an earlier one gave, to the last bit of fp32."""
    with stepping() as machine:
        lr = torch.tensor(rate, dtype=torch.float64)
        values: list[Any] = [Traced.of(lr, "a test")]
        for op, literal, earlier in program:
            other = values[earlier] if earlier < len(values) else literal
            values.append(OPERATIONS[op](values[-1], other) if op != 1 else OPERATIONS[op](other, values[-1]))
        try:
            expected = [x.value(Tensor.item) for x in values]
        except ZeroDivisionError:  # the host's own error
            return
        bucket = object.__new__(cuda_step._Bucket)
        bucket.names = tuple(map(str, range(len(values))))
        nodes = torch.frombuffer(bytearray(bucket.nodes({str(k): x for k, x in enumerate(values)})), dtype=torch.uint8)
        to = torch.full((48,), -7.0)
        module = machine.module(sources()["constants.cu"], {name: sources()[name] for name in cuda_step.FOLLOWING})
        pointers = [cuda_step.c_uint64(x.data_ptr()) for x in (nodes, to)]
        machine.launch(module.function("follow"), 1, tape.NODES, pointers)
        assert torch.equal(to[: len(values)], torch.tensor(expected, dtype=torch.float64).float())
        assert (to[len(values) :] == -7).all()
        assert [x.value(Tensor.double).item() for x in values] == expected
