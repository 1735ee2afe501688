"""A job lasts from step to step, and nothing that happens between two steps makes it stale or keeps it alive."""

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import Case, assert_same, every_case, everything, gradient, parameters, train
from cases import one_thread as one_thread
from torch import Tensor
from torch.nn import Parameter

from lowbit.backends import native
from lowbit.native.build import BuildError
from lowbit.native.library import load
from lowbit.optim import AdamW, GlobalClip, Rule, StableSPAM, update

Named = list[tuple[str, Parameter]]
SHAPES = [(64, 64), (33, 300), (50,), (7, 5, 16), (1,)]


@pytest.fixture(autouse=True)
def on_the_native_backend(monkeypatch: pytest.MonkeyPatch):
    try:
        load()
    except BuildError as error:
        pytest.skip(f"no native library: {error}")
    monkeypatch.setenv("LOWBIT_BACKEND", "native")


def spoil(old: Tensor) -> None:
    """Whoever still works on this memory gives wrong numbers."""
    old.detach().fill_(77)


def replace_states(opt: Rule, named: Named) -> None:
    for state in opt.state.values():
        for name, value in state.items():
            if isinstance(value, Tensor):
                state[name] = value.clone()
                spoil(value)


def move_states(opt: Rule, named: Named) -> None:
    for state in opt.state.values():
        for value in state.values():
            if isinstance(value, Tensor):
                old = value.detach()
                value.data = value.data.clone()
                spoil(old)


def move_parameters(opt: Rule, named: Named) -> None:
    for _, p in named:
        old = p.detach()
        p.data = p.data.clone()
        spoil(old)


def replace_all(opt: Rule, named: Named) -> None:
    for state in list(opt.state):
        opt.state[state] = dict(opt.state[state])
    replace_states(opt, named)
    move_parameters(opt, named)


def load_own(opt: Rule, named: Named) -> None:
    olds = [value for state in opt.state.values() for value in state.values() if isinstance(value, Tensor)]
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    for old in olds:
        spoil(old)


def nothing(opt: Rule, named: Named) -> None:
    pass


def turn(opt: Rule, named: Named) -> None:
    """Matrices in the other order of memory; the second time, back in the first, at the same address."""
    for _, p in named:
        if p.dim() == 2:
            p.data = p.data.t().contiguous().t() if p.is_contiguous() else p.data.contiguous()


def turn_in_place(opt: Rule, named: Named) -> None:
    p = named[0][1]
    p.data = p.data.t()


def other_rounding(opt: Rule, named: Named) -> None:
    group = opt.param_groups[0]
    group["state_rounding"] = "nearest" if group["state_rounding"] == "stochastic" else "stochastic"
    group["rounding"] = "nearest" if group["rounding"] == "auto" else "auto"
    group["seed"] += 1 << 62
    group["lr"] /= 2


def other_counts(opt: Rule, named: Named) -> None:
    opt.state[named[0][1]]["step"].fill_(40)
    opt.state[named[1][1]]["step"] = torch.tensor(30.0)


def forget(opt: Rule, named: Named) -> None:
    opt.state[named[0][1]].clear()
    del opt.state[named[1][1]]


UNSEEN = [replace_states, move_states, move_parameters, replace_all, load_own]  # change no number
SEEN = [turn, turn_in_place, other_rounding, other_counts, forget]
Event = Callable[[Rule, Named], None]


def run(
    case: Case, event: Event, backend: str, dtype: torch.dtype, options: dict[str, Any], anew: bool = False
) -> dict[str, Any]:
    """Steps with an event between any two; `anew`: every step makes its jobs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOWBIT_BACKEND", backend)
        named = parameters(SHAPES, dtype)
        opt = case.build(named, **{"states": "8bit", "rounding": "nearest", **options})
        for t in range(1, 6):
            train(opt, named, range(t, t + 1))
            event(opt, named)
            for slot in opt._slots.values() if anew else ():
                slot._job = opt._roster = None
        return everything(opt)


@every_case
@pytest.mark.parametrize("event", [*UNSEEN, *SEEN], ids=lambda event: event.__name__)
@pytest.mark.filterwarnings("ignore:lr=.* is below the resolution")
def test_what_happens_between_steps(case: Case, event: Event):
    """The bits of the reference, and of jobs that every step makes; and what changes no number changes none."""
    for dtype, options in ((torch.float32, {}), (torch.bfloat16, {"master": "kahan"}), (torch.bfloat16, {})):
        got = run(case, event, "native", dtype, options)
        assert_same(got, run(case, event, "reference", dtype, options))
        assert_same(got, run(case, event, "native", dtype, options, anew=True))
        if event in UNSEEN:
            assert_same(got, run(case, nothing, "native", dtype, options))


def lay(g: Tensor, t: int) -> Tensor:
    """Gradients as they come: another dtype, a transposed or unaligned view, a sum spread over all values."""
    kinds = [
        lambda: g.clone(),
        lambda: g.bfloat16(),
        lambda: g.t().contiguous().t() if g.dim() == 2 else g,
        lambda: torch.cat([g.new_zeros(1), g.flatten()])[1:].view(g.shape),
        lambda: g.sum().expand(g.shape),
        lambda: torch._neg_view(-g),
    ]
    return kinds[t % len(kinds)]()


@every_case
def test_gradients_come_and_go(case: Case, monkeypatch: pytest.MonkeyPatch):
    """Any subset of tensors, in any order of subsets, and gradients laid out in any way."""
    found = []
    for backend in ("native", "reference"):
        monkeypatch.setenv("LOWBIT_BACKEND", backend)
        named = parameters(SHAPES)
        groups = [{"params": named[:2]}, {"params": named[2:], "lr": 1e-2}]
        opt = case.build(groups, states="4bit", stabilize=(GlobalClip(0.5),))
        for t, some in enumerate([31, 1, 30, 0, 7, 7, 24, 31, 12, 31, 31, 31], 1):
            for k, (_, p) in enumerate(named):
                p.grad_dtype = None
                p.grad = lay(gradient(tuple(p.shape), t, k), t) if some >> k & 1 else None
            opt.step()
        found.append(everything(opt))
    assert_same(*found)


@every_case
def test_a_copy_and_its_original_go_their_own_ways(case: Case, monkeypatch: pytest.MonkeyPatch):
    found = []
    for backend in ("native", "reference"):
        monkeypatch.setenv("LOWBIT_BACKEND", backend)
        named = parameters(SHAPES)
        opt = case.build(named, states="8bit")
        train(opt, named, range(1, 3))
        twin, theirs = copy.deepcopy((opt, named))
        train(opt, named, range(3, 6), seed=1)
        train(twin, theirs, range(3, 5), seed=2)
        opt.load_state_dict(twin.state_dict())
        train(opt, named, range(6, 8))
        train(twin, theirs, range(6, 8))
        found.append({**everything(opt), **{f"twin {k}": v for k, v in everything(twin).items()}})
    assert_same(*found)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize(
    "change",
    [lambda x: x[:3], lambda x: x.float(), lambda x: x.repeat(2, 2)[::2, ::2]],
    ids=["shape", "dtype", "layout"],
)
def test_a_state_that_does_not_fit_is_refused_before_anything_changes(backend: str, change, monkeypatch):
    monkeypatch.setenv("LOWBIT_BACKEND", backend)
    named = parameters([(64, 64), (33, 300)])
    opt = StableSPAM(named, reset_interval=2)
    train(opt, named, range(1, 2))
    state = opt.state[named[1][1]]
    state["exp_avg"] = change(torch.cat([state["exp_avg"], state["exp_avg"]])[: len(state["exp_avg"])])
    before = everything(opt)
    with pytest.raises(ValueError, match=r"p1: its state 'exp_avg' is .*; it must be torch.uint8, cpu, \(33, 300\)"):
        opt.step()
    assert_same(everything(opt), before)


# ---- what stays alive


class Unprintable(Rule):
    """Runs on the reference, and says so."""

    def plan(self, group, kind=""):
        return {}, (update("p")(lambda p, g, c: p - c.lr * g),)

    def constants(self, group, t):
        return {"lr": group["lr"]}


@pytest.mark.parametrize("build", [AdamW, StableSPAM, lambda named: Unprintable(named, {"lr": 0.1})])
@pytest.mark.filterwarnings("ignore:a rule runs on the reference backend")
def test_nothing_of_an_optimizer_outlives_it(build):
    named = parameters([(64, 64), (50,)])
    opt = build(named)
    train(opt, named, range(1, 4))
    slots = [opt._slots[p] for _, p in named]
    kept: list[Any] = [opt, *slots]
    for slot in slots:
        kept += [slot.program, slot._job, *(v for v in opt.state[slot.param].values() if isinstance(v, Tensor))]
    seen = [weakref.ref(x) for x in kept]
    programs = len(native._programs)
    del opt, slots, slot, kept
    gc.collect()
    assert [x() for x in seen if x() is not None] == [] and len(native._programs) < programs


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_gradient_does_not_outlive_its_step(backend: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LOWBIT_BACKEND", backend)
    named = parameters([(64, 64)])
    opt = AdamW(named)
    train(opt, named, range(1, 3))
    seen = weakref.ref(named[0][1].grad)
    opt.zero_grad()
    assert seen() is None


def test_a_job_is_made_once():
    """Also where gradients come and go; a tensor that moves costs its own job only."""
    named = parameters([(64, 64), (50,)])
    opt = AdamW(named)
    train(opt, named, range(1, 2))
    slots = [opt._slots[p] for _, p in named]
    made: list[Any] = [slot._job for slot in slots]
    structs = [job.prepared for job in made]
    train(opt, named[:1], range(2, 4))
    train(opt, named, range(4, 6))
    assert [slot._job for slot in slots] == made and [job.prepared for job in made] == structs
    named[0][1].data = named[0][1].data.clone()
    train(opt, named, range(6, 7))
    assert slots[0]._job is not made[0] and slots[1]._job is made[1]
