"""CUDA graphs, on the emulator: a captured step is replayed, and replays are steps, to the last bit."""

import contextlib
import io
import sys
from collections.abc import Callable, Iterator
from ctypes import byref, c_char_p, c_void_p
from pathlib import Path

import pytest
import torch
from cases import assert_same, everything, gradient, parameters
from cases import one_thread as one_thread
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parent / "emulator"))
from emulator import Emulator, compiler, installed

from lowbit import backends
from lowbit.backends import cuda
from lowbit.optim import SPAM, AdamW, GaLore, GlobalClip, Muon, Rule, StableSPAM

pytestmark = pytest.mark.skipif(compiler() is None, reason="there is no g++")

Named = list[tuple[str, Parameter]]
SHAPES = [(65, 257), (16, 260), (64, 64), (50,), ()]


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Emulator]:
    """CPU tensors are stepped by CUDA kernels, on stream 5."""
    monkeypatch.setitem(backends._NATIVE, "cpu", cuda)
    monkeypatch.setenv("LOWBIT_BACKEND", "native")
    with installed(schedule=2) as found:
        found.current = 5
        yield found


class Capturing(TorchDispatchMode):
    """torch while a graph is captured: what it allocates is the graph's, and what it computes would not be captured."""

    # Allocations, and what reads a number of the host's.
    ALLOWED = ("aten.empty.", "aten._local_scalar_dense.", "aten.lift_fresh.", "aten.detach.", "profiler.")

    def __init__(self, pool: list[object]):
        super().__init__()
        self.pool = pool

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        assert str(function).startswith(self.ALLOWED), f"{function} is called while a graph is captured"
        self.pool.append(result)
        return result


class Graph:
    """What torch.cuda.CUDAGraph is, for the emulator."""

    def __init__(self, machine: Emulator):
        self.machine, self.handle, self.pool = machine, c_void_p(), list[object]()

    @contextlib.contextmanager
    def captured(self) -> Iterator[None]:
        library, stream = self.machine.library, c_void_p(self.machine.current)
        assert library.cuStreamBeginCapture_v2(stream, 0) == 0
        try:
            with Capturing(self.pool):
                yield
        finally:
            assert library.cuStreamEndCapture(stream, byref(self.handle)) == 0

    def replay(self) -> None:
        with self.machine.driver.within(self.machine.context):
            stream = c_void_p(self.machine.current)
            assert self.machine.library.cuGraphLaunch(self.handle, stream) == 0


def made(shapes=SHAPES, dtype: torch.dtype = torch.bfloat16) -> Named:
    return parameters(list(shapes), dtype)


def give(named: Named, t: int) -> None:
    """Gradients of step t, each time elsewhere in memory."""
    for k, (_, p) in enumerate(named):
        p.grad = gradient(tuple(p.shape), t, k, p.dtype)


def after_steps(rule: Callable[[Named], Rule], named: Named, steps: int) -> Rule:
    opt = rule(named)
    for t in range(1, steps + 1):
        give(named, t)
        opt.step()
    return opt


def capture(opt: Rule, machine: Emulator) -> Graph:
    graph = Graph(machine)
    with graph.captured():
        opt.step()
    return graph


def two_groups(named: Named) -> list[dict[str, object]]:
    return [{"params": named[:2]}, {"params": named[2:], "lr": 3e-3, "weight_decay": 0.0}]


def adamw(named: Named) -> AdamW:
    """8 bits, everything rounded stochastically, two groups."""
    return AdamW(two_groups(named), lr=1e-2, weight_decay=0.1, states="8bit", state_rounding="stochastic", seed=3)


def stable_spam(named: Named) -> StableSPAM:
    """4 bits, measurements and folds, schedules of its own, resets at steps 7, 14 and 21, a norm over all tensors."""
    return StableSPAM(
        two_groups(named),
        states="4bit",
        reset_interval=7,
        total_steps=20,
        stabilize=[GlobalClip(0.5)],
        weight_decay=0.1,
    )


RULES = {"adamw": adamw, "stable_spam": stable_spam}
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


def scheduled(opt: Rule) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=20)


@every_rule
def test_20_replays_are_20_steps(rule, machine: Emulator):
    """With a learning-rate schedule; parameters, states, counters, groups and all that is written elsewhere."""
    eager, replayed = made(), made()
    opt, other = after_steps(rule, eager, 2), after_steps(rule, replayed, 2)
    before = everything(other)
    graph = capture(other, machine)
    assert_same(everything(other), before)  # nothing is counted before a replay
    schedules = scheduled(opt), scheduled(other)
    for t in range(3, 23):
        give(eager, t)
        opt.step()
        give(replayed, t)
        other.prepare_replay()
        graph.replay()
        for schedule in schedules:
            schedule.step()
        if t in (3, 14, 22):
            assert_same(everything(other), everything(opt))
    assert opt.param_groups[0]["steps"] == 22


@every_rule
def test_replays_eager_steps_and_checkpoints_mix(rule, machine: Emulator):
    """What is loaded into another optimizer needs a new graph; a step that differs is eager, and the graph is good."""
    eager, mixed = made(), made()
    opt, other = after_steps(rule, eager, 1), after_steps(rule, mixed, 1)
    graph = capture(other, machine)
    for t in range(2, 9):
        for named in (eager, mixed):
            give(named, t)
            if t == 4:  # of the second group no tensor has a gradient
                for _, p in named[2:]:
                    p.grad = None
        opt.step()
        if t in (3, 4, 6, 7):
            other.step()
        else:
            other.prepare_replay()
            graph.replay()
        if t == 6:
            file = io.BytesIO()
            torch.save(other.state_dict(), file)
            file.seek(0)
            other = rule(mixed)
            other.load_state_dict(torch.load(file, weights_only=True))
            with pytest.raises(RuntimeError, match="none was captured since the optimizer was made, loaded or moved"):
                other.prepare_replay()
            with pytest.raises(RuntimeError, match="it is not ready: do one step before"):
                capture(other, machine)
        if t == 7:
            graph = capture(other, machine)
    assert_same(everything(other), everything(opt))


def test_two_graphs_of_one_optimizer(machine: Emulator):
    """Of steps with other gradients: each finds its memory, however many eager steps lie between."""
    eager, replayed = made(), made()
    opt, other = adamw(eager), adamw(replayed)
    graphs: dict[int, Graph] = {}
    for t in range(1, 13):
        kind = t % 3  # all tensors; the first group's; its first
        for named in (eager, replayed):
            give(named, t)
            for _, p in named[len(named) if kind == 0 else 2 if kind == 1 else 0 :]:
                p.grad = None
        opt.step()
        if kind in graphs:
            other.prepare_replay()
            graphs[kind].replay()
        else:
            other.step()
            if kind < 2:
                graphs[kind] = capture(other, machine)
    assert len(graphs) == 2
    assert_same(everything(other), everything(opt))


@every_rule
def test_graphs_that_share_kernels_are_replayed_at_the_same_time(rule, machine: Emulator):
    """Launch by launch in turn, as two streams may have it: constants are each optimizer's own."""
    rates = 1e-2, 0.3
    opts = [[after_steps(rule, made(), 1) for _ in rates] for _ in ("eager", "replayed")]
    graphs = [capture(opt, machine) for opt in opts[1]]
    library = machine.library
    sizes = [library.emulator_graph_size(graph.handle) for graph in graphs]
    assert sizes[0] == sizes[1] > 2
    for t in (2, 3):
        for opt, rate in zip([*opts[0], *opts[1]], [*rates, *rates], strict=True):
            for group in opt.param_groups:
                group["lr"] = rate
            give([("", p) for group in opt.param_groups for p in group["params"]], t)
        for opt, other in zip(*opts, strict=True):
            opt.step()
            other.prepare_replay()
        with machine.driver.within(machine.context):
            for node in range(sizes[0]):
                assert [library.emulator_replay_node(graph.handle, node) for graph in graphs] == [0, 0]
    for opt, other in zip(*opts, strict=True):
        assert_same(everything(other), everything(opt))


def test_a_whole_training_step_is_replayed(machine: Emulator):
    """Gradients stay where the captured backward writes them, and are told once per step all the same."""
    eager, replayed = made(), made()
    opt, other = after_steps(adamw, eager, 1), after_steps(adamw, replayed, 1)
    graph = capture(other, machine)
    held = [p.grad.data_ptr() for _, p in replayed]
    for t in range(2, 6):
        give(eager, t)
        opt.step()
        for (_, p), (_, q) in zip(eager, replayed, strict=True):
            q.grad.copy_(p.grad)
        other.prepare_replay()
        graph.replay()
    assert [p.grad.data_ptr() for _, p in replayed] == held
    assert_same(everything(other), everything(opt))


def test_what_a_step_changes_is_one_copy(machine: Emulator):
    """However many tensors; and a replay reads it on the device."""
    opt = after_steps(stable_spam, made(), 1)
    capture(opt, machine)
    library = machine.library
    library.emulator_calls.restype = c_char_p
    library.emulator_note_calls(1)
    opt.prepare_replay()
    calls = library.emulator_calls().decode().splitlines()
    library.emulator_note_calls(0)
    assert calls == ["write on 5", "record on 5"]


def test_a_saved_old_value_is_noticed(machine: Emulator):
    """A replay changes parameters, and autograd must know."""
    named = made(dtype=torch.float32)
    opt = after_steps(adamw, named, 1)
    capture(opt, machine)
    _, p = named[0]
    loss = (p * p).sum()
    opt.prepare_replay()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def odd(name: str) -> tuple[Rule, Named]:
    """An optimizer whose steps cannot be captured, after one of them."""
    named = made([(64, 64), (50,)])
    rules: dict[str, Callable[[Named], Rule]] = {
        "matrix stages": Muon,
        "low rank": lambda its: GaLore(its, rank=4),
        "sparse": lambda its: SPAM(its, density=0.25),
        "late reset": lambda its: StableSPAM(its, variant="official"),
    }
    if name == "transposed":
        named[0] = "p0", Parameter(named[0][1].detach().t())
    return after_steps(rules.get(name, adamw_of_one_group), named, 1), named


def adamw_of_one_group(named: Named) -> AdamW:
    return AdamW(named, states="8bit")


CANNOT = {
    "matrix stages": r"p0 has matrix stages, where the host decides what comes next; step such an optimizer outside",
    "low rank": r"p0 has matrix stages",
    "sparse": r"with sparse momentum, a step works on copies",
    "late reset": r"MomentumReset\(reset_interval=1000\) resets moments after a step.*variant=\"paper\"",
    "transposed": r"p0: it is not contiguous, so a step works on a copy",
}


@pytest.mark.parametrize("name", CANNOT)
def test_what_cannot_be_captured(name: str, machine: Emulator):
    """Is an error that names it, and nothing has changed; eager steps go on."""
    opt, named = odd(name)
    give(named, 2)
    before = everything(opt)
    for attempt in (lambda: capture(opt, machine), opt.prepare_replay):
        with pytest.raises(RuntimeError, match=CANNOT[name]):
            attempt()
        assert_same(everything(opt), before)
    opt.step()


def test_a_late_reset_that_never_comes_is_none(machine: Emulator):
    opt = after_steps(lambda its: StableSPAM(its, variant="official", reset_interval=0), made(), 1)
    graph = capture(opt, machine)
    opt.prepare_replay()
    graph.replay()
    assert opt.param_groups[0]["steps"] == 2


def test_other_gradients_than_were_captured(machine: Emulator):
    named = made()
    opt = after_steps(adamw, named, 1)
    with pytest.raises(RuntimeError, match="none was captured since"):
        opt.prepare_replay()
    graph = capture(opt, machine)
    before = everything(opt)
    kept = [p.grad for _, p in named]
    for k in (0, 1):
        named[k][1].grad = None
        with pytest.raises(RuntimeError, match=r"no captured step can be replayed as this one: .* an eager step"):
            opt.prepare_replay()
        named[k][1].grad = kept[k]
        assert_same(everything(opt), before)
    named[0][1].grad = kept[0].t().contiguous().t()
    with pytest.raises(RuntimeError, match="p0: its gradient is not contiguous"):
        opt.prepare_replay()
    named[0][1].grad = kept[0]
    assert_same(everything(opt), before)
    opt.prepare_replay()
    graph.replay()


def test_what_is_not_ready_when_a_graph_is_captured(machine: Emulator):
    """Nothing is compiled, allocated or counted in a graph."""
    named = made()
    opt = adamw(named)
    give(named, 1)
    before = everything(opt)
    with pytest.raises(RuntimeError, match="not ready: do one step before"):
        capture(opt, machine)
    del opt.state[named[0][1]]
    with pytest.raises(RuntimeError, match="a parameter has no state"):
        capture(opt, machine)
    opt.init_state()
    assert_same(everything(opt), before)
    opt.step()
    graph = Graph(machine)
    with pytest.raises(RuntimeError, match="prepare_replay\\(\\) comes before each"), graph.captured():
        opt.prepare_replay()
    assert opt.param_groups[0]["steps"] == 1


def test_other_backends_cannot_be_captured(machine: Emulator, monkeypatch: pytest.MonkeyPatch):
    opt = after_steps(adamw, made(), 1)
    before = everything(opt)
    monkeypatch.setenv("LOWBIT_BACKEND", "reference")
    for attempt in (lambda: capture(opt, machine), opt.prepare_replay):
        with pytest.raises(RuntimeError, match="some of it runs on the reference backend, on cpu"):
            attempt()
        assert_same(everything(opt), before)


def test_all_kernels_are_compiled_at_the_same_time(machine: Emulator, monkeypatch: pytest.MonkeyPatch):
    """Of all buckets: formats and dtypes differ, and one call has all of their texts."""
    asked = []
    own = machine.prefetch
    monkeypatch.setattr(machine, "prefetch", lambda texts: asked.append(len(texts)) or own(texts))
    after_steps(adamw, [*made(), ("p5", Parameter(torch.ones(300)))], 1)
    assert len(asked) == 1 and asked[0] >= 6
