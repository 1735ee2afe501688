"""Steps under torch.compile: one operator, with the bits of the eager step, that no schedule compiles anew."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.config
from cases import assert_same, everything, gradient
from cases import one_thread as one_thread
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import Parameter

import lowbit
from lowbit.optim import SPAM, AdamW, GlobalClip, Muon, Rule, StableSPAM, step_in_backward

# Its profiler's marks are no part of what is traced; the compiler says so, and uses what torch itself deprecates.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Profiler record function"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"),
]
STEPS = 6
X = torch.linspace(-1, 1, 4 * 64).reshape(4, 64)

RULES: dict[str, Callable[[Any], Rule]] = {
    "adamw": lambda its: AdamW(its, lr=1e-2, states="8bit", state_rounding="stochastic"),
    "stablespam": lambda its: StableSPAM(its, lr=1e-2, states="4bit", reset_interval=4, stabilize=GlobalClip(0.5)),
    "muon": lambda its: Muon(its, precision="fp32"),
    "spam": lambda its: SPAM(its, lr=1e-2, density=0.5, reset_interval=3),
}


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch):
    torch._dynamo.reset()
    monkeypatch.setattr(torch._dynamo.config, "trace_autograd_ops", True, raising=False)  # backward() in a graph
    yield
    torch._dynamo.reset()


def made(rule: str = "adamw") -> tuple[nn.Module, Rule, torch.optim.lr_scheduler.LRScheduler]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64)).to(torch.bfloat16)
    opt = RULES[rule](list(model.named_parameters()))
    return model, opt, torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=STEPS)


def feed(opt: Rule, t: int) -> None:
    for group in opt.param_groups:
        for k, p in enumerate(group["params"]):
            p.grad = gradient(tuple(p.shape), t, k, p.dtype)


@pytest.fixture(params=["native", "reference"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("LOWBIT_BACKEND", request.param)
    return request.param


@pytest.mark.skipif(not hasattr(torch._dynamo.config, "trace_autograd_ops"), reason="this torch traces no backward()")
@pytest.mark.parametrize("compiler", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
@pytest.mark.parametrize("rule", RULES)
def test_a_whole_training_step_compiles_in_one_graph(rule: str, compiler: str, backend: str):
    found = []
    for compiled in (False, True):
        model, opt, schedule = made(rule)

        def train(x: Tensor, model: nn.Module = model, opt: Rule = opt) -> Tensor:
            loss = model(x).float().square().sum()
            loss.backward()
            opt.step()
            opt.zero_grad()
            return loss.detach()

        counter = CompileCounterWithBackend(compiler)
        act = torch.compile(train, backend=counter, fullgraph=True) if compiled else train
        frames = []
        for _ in range(STEPS):
            act(X.bfloat16())
            schedule.step()
            frames.append(counter.frame_count)
        assert frames[2] == frames[-1] and bool(frames[-1]) == compiled, frames
        assert all(p.grad is None for p in model.parameters())
        found.append(everything(opt))
    assert_same(*found)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager", "inductor"])
def test_a_step_alone_compiles_in_one_graph(compiler: str, backend: str):
    """Also where a scheduler has come first; and gradients may come and go."""
    found = []
    for compiled in (False, True):
        _, opt, schedule = made()
        counter = CompileCounterWithBackend(compiler)
        step = torch.compile(opt.step, backend=counter, fullgraph=True) if compiled else opt.step
        for t in range(1, STEPS + 1):
            feed(opt, t)
            if t == STEPS:
                opt.param_groups[0]["params"][1].grad = None
            before = counter.frame_count
            step()
            schedule.step()
            assert t < 4 or t == STEPS or counter.frame_count == before, "compiled anew"
        found.append(everything(opt))
    assert_same(*found)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_what_is_around_a_step_sees_what_it_should(compiler: str):
    """Old values before it and new ones after it, written by others too; the compiler may hand over copies."""
    found = []
    for compiled in (False, True):
        _, opt, _ = made()
        p = opt.param_groups[0]["params"][0]

        def act(p: Tensor = p, opt: Rule = opt) -> tuple[Tensor, ...]:
            with torch.no_grad():
                p.mul_(0.5)
                old = p + 1
                opt.step()
                new = p + 1
                p.mul_(2)
            return old, new

        feed(opt, 1)
        results = (torch.compile(act, backend=compiler, fullgraph=True) if compiled else act)()
        found.append({**everything(opt), "old": results[0], "new": results[1]})
    assert_same(*found)


def test_an_operator_steps_its_own_optimizer():
    """A copy has a number of its own; and a closure's loss is returned."""
    _, opt, _ = made()
    other, third = copy.deepcopy(opt), copy.deepcopy(opt)
    feed(opt, 1)
    feed(other, 1)
    feed(third, 1)
    before = everything(opt)
    loss = torch.compile(other.step, backend="eager", fullgraph=True)(lambda: X.sum() + 2)
    assert torch.equal(loss, X.sum() + 2)
    assert_same(everything(opt), before)
    third.step()
    assert_same(everything(other), everything(third))


def test_a_step_that_fails_leaves_gradients_and_parameters():
    _, opt, _ = made()
    step = torch.compile(opt.step, backend="aot_eager", fullgraph=True)
    feed(opt, 1)
    grads = [p.grad for p in opt.param_groups[0]["params"]]
    before = everything(opt)
    opt.param_groups[0]["lr"] = -1.0
    with pytest.raises(ValueError, match="lr must be a finite number >= 0"):
        step()
    opt.param_groups[0]["lr"] = before["group 0 lr"]
    assert_same(everything(opt), before)
    assert all(p.grad is g for p, g in zip(opt.param_groups[0]["params"], grads, strict=True))


@pytest.mark.parametrize("kind", ["stored", "in backward"])
def test_other_steps_run_outside_of_what_is_compiled(kind: str):
    """Of stored weights, and those that only end what backward has done: not in one graph, with the same bits."""
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))
        if kind == "stored":
            lowbit.quantize_(model, lowbit.Recipe(store="int8"))
        opt = AdamW(list(model.named_parameters()), lr=1e-2)
        handle = step_in_backward(opt) if kind == "in backward" else None
        step = torch.compile(opt.step, backend="eager") if compiled else opt.step
        for _ in range(2):
            model(X).square().sum().backward()
            step()
            opt.zero_grad()
        assert handle is None or opt.param_groups[0]["steps"] == 2
        found.append({**everything(opt), "y": model(X).detach()})
    ours = [
        {k: x for k, x in its.items() if type(x) in (Tensor, Parameter) or not isinstance(x, Tensor)} for its in found
    ]
    assert_same(*ours)
