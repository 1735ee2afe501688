"""Matrix stages: how a program is cut, what passes a cut, what is left alone, what it takes."""

import gc
import math
from typing import ClassVar

import pytest
import torch
from cases import (
    COMPRESSED,
    STATE_FORMATS,
    assert_same,
    dequantized,
    every_preset,
    everything,
    gradient,
    injected,
    parameters,
    train,
)  # fmt: skip
from cases import one_thread as one_thread
from torch import Tensor
from torch.nn import Parameter

from lowbit.backends import native
from lowbit.optim import (
    AdaClip,
    AdaGN,
    AdamW,
    GlobalClip,
    Moment,
    MomentumReset,
    Muon,
    Rule,
    fold,
    matrix,
    measure,
    update,
)
from lowbit.stages import Program
from lowbit.words import lerp, sqrt

NAN, INF = math.nan, math.inf


@matrix("q")
def settle(g, q, c, host):
    """Keep the first gradient's leading rows; the host counts."""
    if host.due > c.t:
        return q
    host.due = c.t + c.every
    return g[: q.shape[0]].clone()


@matrix("r")
def down(g, q):
    """To few columns."""
    return g @ q.mT


@update("m n")
def low(r, m, c):
    """Momentum of what is small."""
    m = lerp(m, r, c.rate)
    return m, m


@matrix("u")
def up(n, q):
    """And back."""
    return n @ q


@measure("sum")
def energy(u):
    """Of the update."""
    return u * u


@fold
def size(x, s, c):
    """The norm so far, which a cut does not lose."""
    s.norm = lerp(s.norm, sqrt(x), c.rate)


@update("p")
def move(p, u, s, c):
    """Down."""
    return p - c.lr * u / (s.norm + c.one)


class Small(Rule):
    """Everything that matrix stages may do, in one rule: low-rank states, a projector, scalars, the host's numbers."""

    moments: ClassVar = {"m": Moment("low_avg"), "q": Moment("projector", lasting=True)}
    scalars: ClassVar = {"norm": 0.0}
    host: ClassVar = {"due": 0.0}
    stages = (settle, down, low, up, energy, size, move)

    def __init__(self, params, lr=0.01, few=64, **options):
        super().__init__(params, {"lr": lr, "few": few}, **options)

    def shapes(self, group, kind, shape):
        rows, cols = shape[0], math.prod(shape[1:])
        return {
            "r": (rows, group["few"]),
            "n": (rows, group["few"]),
            "m": (rows, group["few"]),
            "q": (group["few"], cols),
        }

    def constants(self, group, t):
        return {"lr": group["lr"], "rate": 0.25, "one": 1.0, "t": t, "every": 3}


SHAPES = [(128, 96), (300, 65), (70, 8, 12)]


def by_hand(x: Tensor, g: Tensor, s: dict, t: int, lr: float = 0.01) -> Tensor:
    """One step of `Small`, in float64."""
    x, g = x.double(), g.double().reshape(g.shape[0], -1)
    if s["due"] <= t:
        s["q"], s["due"] = g[:64], t + 3
    s["m"] = 0.75 * s["m"] + 0.25 * (g @ s["q"].T)
    u = s["m"] @ s["q"]
    s["norm"] = 0.75 * s["norm"] + 0.25 * float(u.square().sum()) ** 0.5
    return x - lr * u.reshape(x.shape) / (s["norm"] + 1)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_segments_and_matrices_are_the_rule(backend: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LOWBIT_BACKEND", backend)
    named = parameters(SHAPES)
    opt = Small(named, states="fp32")
    each = {n: (p.detach().double(), {"m": 0.0, "norm": 0.0, "due": 0}) for n, p in named}
    for t in range(1, 8):
        train(opt, named, range(t, t + 1))
        for n, p in named:
            x, s = each[n]
            each[n] = by_hand(x, p.grad, s, t), s
            torch.testing.assert_close(p.detach().double(), each[n][0], rtol=0, atol=1e-6)
            assert float(opt.state[p]["norm"]) == pytest.approx(s["norm"], rel=1e-5)
            assert float(opt.state[p]["due"]) == s["due"] == 1 + 3 * ((t + 2) // 3)


@pytest.mark.parametrize("name", [f for f in STATE_FORMATS if f not in ("sqrt8", "udyn8", "sqrt4", "ulin4", "log4")])
@pytest.mark.parametrize("options", [{}, {"state_rounding": "stochastic"}], ids=["nearest", "stochastic"])
def test_backends_agree_bit_for_bit_on_the_same_matrices(name: str, options: dict):
    """Low-rank moments and the projector in every format; parameters in bf16 with every companion."""
    for master in ("none", "split8", "kahan", "fp32"):
        tape: list = []
        found = []
        for backend, threads in (("reference", 1), ("native", 2)):
            with pytest.MonkeyPatch.context() as patch, injected(tape, replay=backend == "native"):
                patch.setenv("LOWBIT_BACKEND", backend)
                torch.set_num_threads(threads)
                named = parameters(SHAPES, torch.bfloat16)
                opt = Small(named, states=name, master=master, **options)
                train(opt, named, range(1, 5))
                torch.set_num_threads(1)
                found.append(everything(opt))
        assert_same(*found)
        if name in COMPRESSED:
            assert all(
                set(row.formats.values()) == {opt.explain().rows[0].formats["low_avg"]} for row in opt.explain().rows
            )


def test_a_segment_leaves_what_it_does_not_name_alone(monkeypatch: pytest.MonkeyPatch):
    """A moment is encoded once in a step, so stochastic rounding happens once; p is written once."""
    seen = []
    real = native.step

    def step(jobs):
        seen.extend((tuple(job.moments), job.param is p, job.gathered is not None, job.rows, job.cols) for job in jobs)
        real(jobs)

    monkeypatch.setenv("LOWBIT_BACKEND", "native")
    monkeypatch.setattr(native, "step", step)
    [(_, p)] = named = parameters([(128, 96)])
    opt = Small(named)
    train(opt, named, range(1, 2))
    assert seen == [(("m", "n", "r"), False, True, 128, 64), (("u",), True, True, 128, 96)]


@every_preset
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("optimizer", [Small, Muon])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gradient_that_is_not_finite_leaves_the_whole_tensor(
    optimizer, states: str, bad: float, backend: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    """Wherever it is, in the first step too: p, moments, scalars, projector and the host's numbers; counted once."""
    monkeypatch.setenv("LOWBIT_BACKEND", backend)
    named = parameters([(128, 96), (300, 65)], dtype)
    muon = {"state_rounding": "stochastic", "weight_decay": 0.1}
    companion = {"master": "none" if dtype == torch.float32 else "split8"}
    opt = optimizer(named, states=states, **(muon if optimizer is Muon else companion))
    for t in range(1, 6):
        kept = everything(opt)
        for i, (_, p) in enumerate(named):
            p.grad = gradient(tuple(p.shape), t, i, dtype)
        named[0][1].grad.view(-1)[[0, -1, 5000, 7, 77][t - 1]] = bad
        opt.step()
        now = everything(opt)
        mine = {k for k in kept if k.startswith("0.0 ")}
        changed = {k for k in mine if isinstance(kept[k], Tensor) and not torch.equal(kept[k], now[k])}
        assert changed == {"0.0 step", "0.0 skipped"}
        assert not torch.equal(kept["0.1 p"], now["0.1 p"])
    assert opt.counters() == {"skipped_blocks": 0, "skipped_tensors": 5}
    train(opt, named, range(6, 8))
    assert not torch.equal(kept["0.0 p"], everything(opt)["0.0 p"]) and opt.counters()["skipped_tensors"] == 5


class Loose(Small):
    """Lets through what is not finite, as released code does."""

    guarded = False


def test_a_rule_without_the_guard_lets_everything_through():
    one, two = parameters(SHAPES), parameters(SHAPES)
    opt, ref = Loose(one, states="8bit"), Small(two, states="8bit")
    train(opt, one, range(1, 5))
    train(ref, two, range(1, 5))
    assert_same(everything(opt), everything(ref))
    one[0][1].grad.view(-1)[5] = NAN
    opt.step()
    assert not one[0][1].isfinite().all() and opt.counters()["skipped_tensors"] == 0


@matrix("u")
def explode(u):
    """A result that is not finite."""
    return u / 0.0 if float(u.abs().max()) > 1 else u


@update("m u")
def gather(g, m, c):
    """A momentum."""
    m = lerp(m, g, c.rate)
    return m, m


@update("p")
def plain(p, u, c):
    """Down."""
    return p - c.lr * u


class Explosive(Rule):
    """Its matrix stage overflows for large gradients."""

    moments: ClassVar = {"m": Moment("avg")}
    stages = (gather, explode, plain)

    def constants(self, group, t):
        return {"lr": group["lr"], "rate": 0.5}


@update("m u")
def first(g, m, c):
    """A momentum, and the gradient to pass on."""
    return lerp(m, g, c.rate), g


@update("p n")
def last(p, u, n, c):
    """The same momentum."""
    return p - c.lr * u, lerp(n, u, c.rate)


@matrix("u")
def through(u):
    """As it was."""
    return u


class Twice(Explosive):
    """Two momenta of the same numbers, in two segments."""

    moments: ClassVar = {"m": Moment("avg"), "n": Moment("avg_again")}
    stages = (first, through, last)


def test_segments_draw_random_bits_of_their_own():
    named = parameters([(128, 96)])
    for rounding, alike in (("nearest", True), ("stochastic", False)):
        opt = Twice(named, {"lr": 0.1}, states="4bit", state_rounding=rounding)
        train(opt, named, range(1, 3))
        state = opt.state[named[0][1]]
        assert torch.equal(state["avg"], state["avg_again"]) == alike


def test_a_matrix_that_is_not_finite_leaves_the_parameter():
    named = parameters([(20, 30), (20, 30)])
    opt = Explosive(named, {"lr": 0.1}, states="fp32")
    before = [p.detach().clone() for _, p in named]
    named[0][1].grad, named[1][1].grad = torch.full((20, 30), 100.0), torch.full((20, 30), 0.1)
    opt.step()
    assert torch.equal(named[0][1], before[0]) and not torch.equal(named[1][1], before[1])
    assert opt.counters() == {"skipped_blocks": 0, "skipped_tensors": 1}


# --- stabilizers ---------------------------------------------------------------------------------------------------


@matrix("u")
def same(g):
    """The gradient itself: what a rule sees that begins with a matrix stage."""
    return g


class Descent(Rule):
    """Gradient descent by way of a matrix stage."""

    stages = (same, plain)

    def constants(self, group, t):
        return {"lr": group["lr"]}


@update("p")
def straight(p, g, c):
    """Down."""
    return p - c.lr * g


class Straight(Descent):
    """The same without one."""

    stages = (straight,)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_stabilizers_in_front_of_a_matrix_stage(backend: str, monkeypatch: pytest.MonkeyPatch):
    """The stage sees the gradient as they left it, measured over all tensors too, whatever kinds there are."""
    monkeypatch.setenv("LOWBIT_BACKEND", backend)
    for stabilize in ((AdaClip(0.9), AdaGN()), (GlobalClip(0.01),), (AdaGN(), GlobalClip(0.5), MomentumReset(2)), ()):
        one, two = parameters([(30, 40), (20, 300)]), parameters([(30, 40), (20, 300)])
        a = Descent(one, {"lr": 0.1}, states="fp32", stabilize=stabilize)
        b = Straight(two, {"lr": 0.1}, states="fp32", stabilize=stabilize)
        train(a, one, range(1, 6))
        train(b, two, range(1, 6))
        assert_same(everything(a), everything(b))
        assert ("carry" in str(a.explain())) == bool(stabilize)


def test_a_norm_over_all_tensors_counts_those_without_matrix_stages():
    one, two = parameters([(30, 40), (50,), (8, 9)]), parameters([(30, 40), (50,), (8, 9)])
    opt = Muon(one, lr=0.1, precision="fp32", states="fp32", stabilize=(GlobalClip(0.01),))
    ref = Muon(two, lr=0.1, precision="fp32", states="fp32")
    for t in range(1, 5):
        for i, ((_, p), (_, q)) in enumerate(zip(one, two, strict=True)):
            p.grad = gradient(tuple(p.shape), t, i)
            q.grad = p.grad.clone()
        torch.nn.utils.clip_grad_norm_([q for _, q in two], 0.01)
        opt.step()
        ref.step()
    for (_, p), (_, q) in zip(one, two, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=2e-5)


def test_momentum_reset_spares_what_is_no_momentum():
    named = parameters([(128, 96)])
    opt = Small(named, states="4bit", stabilize=(MomentumReset(4, late=True),))
    train(opt, named, range(1, 5))
    p = named[0][1]
    assert (
        not dequantized(
            opt,
            p,
            "low_avg",
        ).any()
        and opt.state[p]["projector"].any()
    )


# --- what cannot be ------------------------------------------------------------------------------------------------


@update("g m")
def change(g, m):
    """Writes g."""
    return g + m, m


@measure("max", over="all")
def top(u):
    """Too late."""
    return u


@matrix("u")
def unknown(w):
    """Reads what nobody wrote."""
    return w


@matrix("p")
def direct(g):
    """Writes p."""
    return g


@matrix("u")
def small(g):
    """Of another shape than was said."""
    return g[:1]


@update("p m")
def mixed(p, m, c):
    """Names matrices of different shapes."""
    return p + m, m


M = {"m": Moment("avg")}


@pytest.mark.parametrize(
    "stages, message",
    [
        (
            (unknown, plain),
            "matrix 'unknown' reads 'w', which it cannot at this place; it can: c, g, host, key, m, shape",
        ),
        ((direct,), "matrix 'direct' writes 'p', which is no matrix of its own"),
        ((gather, same, top, plain), "what is measured over all tensors comes before the first matrix stage"),
        ((change, same, plain), "reads 'g', which an update before a matrix stage wrote"),
        ((same, size, plain), "'size' reads 'x', which it cannot"),
    ],
)
def test_stages_that_do_not_fit_are_refused(stages: tuple, message: str):
    with pytest.raises(ValueError, match=message):
        Program(stages, M, {})


class Wrong(Rule):
    """Its stages do not fit its tensors."""

    moments: ClassVar = M

    def __init__(self, params, stages, **options):
        self.stages = stages
        super().__init__(params, {"lr": 0.1}, **options)

    def shapes(self, group, kind, shape):
        return {"m": (2, 3)}

    def constants(self, group, t):
        return {"lr": group["lr"], "rate": 0.5}


def test_matrices_of_the_wrong_shape_are_named():
    p = Parameter(torch.ones(4, 5))
    with pytest.raises(
        ValueError, match=r"w: 'mixed' and what follows it .* different shapes: {'m': .2, 3., 'p': .4, 5.}"
    ):
        Wrong([("w", p)], (same, mixed))
    opt = Wrong([("w", p)], (small, plain))
    p.grad = torch.ones(4, 5)
    with pytest.raises(ValueError, match=r"w: matrix 'small' returned 'u' of shape \(1, 5\); it must be \(4, 5\)"):
        opt.step()


# --- memory --------------------------------------------------------------------------------------------------------


def test_matrices_of_one_tensor_are_freed_before_the_next(monkeypatch: pytest.MonkeyPatch):
    """While one tensor is at its matrix stage, no other's whole matrices are alive; after the step none is."""
    alive: list[int] = []

    @matrix("u")
    def look(u):
        gc.collect()
        floats = [x for x in gc.get_objects() if issubclass(type(x), Tensor) and x.dtype == torch.float32]
        alive.append(sum(x.shape == (61, 67) and x.data_ptr() not in known for x in floats))
        return u

    class Looking(Explosive):
        stages = (gather, look, plain)

    named = parameters([(61, 67)] * 4)
    opt = Looking(named, {"lr": 0.1}, states="bf16")
    for i, (_, p) in enumerate(named):
        p.grad = gradient((61, 67), 1, i)
    known = {x.data_ptr() for _, p in named for x in (p, p.grad)}
    opt.step()
    assert len(alive) == 4 and len(set(alive)) == 1 and alive[0] <= 3
    gc.collect()
    floats = [x for x in gc.get_objects() if issubclass(type(x), Tensor) and x.dtype == torch.float32]
    assert not [x for x in floats if x.shape == (61, 67) and x.data_ptr() not in known]


def test_explain_tells_of_temporary_bytes():
    """Muon: u, a stand-in for p and the guarded gradient; the largest tensor counts, not the sum."""
    small, large = Parameter(torch.zeros(64, 64)), Parameter(torch.zeros(256, 128))
    rows = Muon([("a", small), ("b", large), ("v", Parameter(torch.zeros(9)))]).explain()
    assert [row.temporary_bytes for row in rows.rows] == [10 * 64 * 64, 10 * 256 * 128, 0]
    assert rows.temporary_bytes == 10 * 256 * 128 and "up to 327,680 bytes" in str(rows) and rows.sweeps == 2
    pair = [("a", small), ("b", large)]
    waiting = Muon(pair, stabilize=(GlobalClip(),)).explain()  # u of all tensors, and what stands in beside it
    assert waiting.temporary_bytes == 10 * (64 * 64 + 256 * 128) and "stages of all tensors" in str(waiting)
    assert AdamW([small]).explain().temporary_bytes == 0 and "whole matrices" not in str(AdamW([small]).explain())


def test_the_bytes_of_a_large_model_are_known_without_allocating_it():
    p = Parameter(torch.empty(8192, 28672, device="meta"))
    opt = Muon([("w", p)], states="bf16")
    assert opt.state_bytes() == pytest.approx(2 * 8192 * 28672, rel=1e-6)
    assert Small([("w", p)], states="4bit").state_bytes() < 64 * (8192 + 28672)
