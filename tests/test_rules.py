"""Rules of a user's own: what the base class promises to whoever writes one."""

import math
from typing import ClassVar

import pytest
import torch
from cases import (
    STATE_FORMATS,
    dequantized,
    parameters,
    train,
)  # fmt: skip
from cases import one_thread as one_thread
from torch.nn import Parameter

import lowbit
from lowbit.optim import (
    AdaClip,
    AdamW,
    Moment,
    Rule,
    SpikeClip,
    fold,
    measure,
    update,
)  # fmt: skip
from lowbit.words import abs, lerp, maximum, sign, where

NAN, INF = math.nan, math.inf


@measure("max")
def top(g):
    """The largest gradient."""
    return abs(g)


@fold
def remember(x, s, c):
    """The largest so far."""
    s.largest = maximum(s.largest, x)
    s.share = where(s.largest > 0, x / where(s.largest > 0, s.largest, c.one), c.one)


@update("p b")
def vote(p, g, b, s, c):
    """Signs, weighted by how large the tensor's gradient is."""
    b = lerp(b, sign(g) * s.share, c.rate)
    return p - c.lr * b, b


class SignMomentum(Rule):
    """What a user writes: a moment with a new name, a measurement, a fold and an update."""

    moments: ClassVar = {"b": Moment("sign_avg")}
    scalars: ClassVar = {"largest": 0.0}
    stages = (top, remember, vote)

    def __init__(self, params, lr=1e-3, beta=0.9, **options):
        self.note = "kept by copies"
        super().__init__(params, {"lr": lr, "beta": beta}, **options)

    def constants(self, group, t):
        return {"lr": group["lr"], "rate": 1 - group["beta"], "one": 1.0}


@pytest.mark.parametrize("name", STATE_FORMATS)
def test_a_rule_of_ones_own_has_every_format(name: str):
    if not lowbit.format(name).signed:
        opt = SignMomentum(parameters([(33, 300)]), states=name)
        assert lowbit.format(next(iter(opt.explain().rows[0].formats.values()))).signed
        return
    named = parameters([(33, 300), (7, 5461), (50,)])
    opt = SignMomentum(named, lr=0.01, states=name)
    largest = dict.fromkeys((n for n, _ in named), 0.0)
    for t in range(1, 5):
        before = {n: p.detach().double() for n, p in named}
        moments = {
            n: opt.state[p]["sign_avg"].double()
            if "sign_avg_scale" not in opt.state[p]
            else dequantized(opt, p, "sign_avg").double()
            for n, p in named
        }
        train(opt, named, range(t, t + 1))
        for n, p in named:
            x = float(p.grad.abs().max())
            largest[n] = max(largest[n], x)
            b = 0.9 * moments[n] + 0.1 * p.grad.double().sign() * x / largest[n]
            torch.testing.assert_close(p.detach().double(), before[n] - 0.01 * b, rtol=0, atol=1e-6)
            assert float(opt.state[p]["largest"]) == pytest.approx(largest[n])
    assert opt.explain().sweeps == 2 and opt.state_bytes() > 0


@measure("sum")
def mean_square_distance(g, c):
    """Not 0 for the zeros beyond the end of a row."""
    return (g - c.centre) * (g - c.centre)


@fold
def take(x, s):
    """Keep it."""
    s.distance = x


@update("p b")
def drift(p, b, g, c):
    """A moment and a step that a zero would not keep at zero; 1 / 0 where the gradient is 0."""
    return p - c.lr * (b + c.centre), b + c.centre + c.one / g - c.one / g


class Padding(Rule):
    """Nothing it computes for a zero is zero."""

    moments: ClassVar = {"b": Moment("total")}
    scalars: ClassVar = {"distance": 0.0}
    stages = (mean_square_distance, take, drift)

    def constants(self, group, t):
        return {"lr": group["lr"], "centre": 100.0, "one": 1.0}


@pytest.mark.parametrize("states", ["fp32", "int8", "int4:16"])
@pytest.mark.parametrize("shape", [(16, 257), (64, 65), (9, 700)], ids=str)
def test_what_lies_beyond_the_end_of_a_row_counts_nowhere(shape: tuple[int, int], states: str):
    """Neither in a sum, nor in a scale, nor in the check for values that are not finite."""
    p = Parameter(torch.zeros(shape))
    opt = Padding([("p", p)], {"lr": 0.01}, states=states)
    p.grad = torch.full(shape, 99.0)
    opt.step()
    assert float(opt.state[p]["distance"]) == p.numel()
    assert opt.counters() == {"skipped_blocks": 0, "skipped_tensors": 0}
    torch.testing.assert_close(p.detach(), torch.full(shape, -1.0))


@update("p")
def down(p, g, c):
    return p - c.lr * g


@update("p")
def up(p, g, c):
    return p + c.lr * g


class Plain(Rule):
    """No moments and no scalars at all."""

    stages = (down,)

    def constants(self, group, t):
        return {"lr": group["lr"]}


def test_a_rule_without_any_state():
    named = parameters([(33, 300), (0,), (5,)], torch.bfloat16)
    opt = Plain(named, {"lr": 0.5}, states="4bit", rounding="nearest")
    before = {n: p.detach().float() for n, p in named}
    train(opt, named, range(1, 2))
    for n, p in named:
        assert torch.equal(p.detach(), (before[n] - 0.5 * p.grad.float()).bfloat16())
    assert sorted(opt.state[named[0][1]]) == ["skipped", "step"] and "sgd" not in str(opt.explain())


class TwoPlans(Rule):
    """Groups with the same moments and different stages."""

    def plan(self, group, kind=""):
        return {}, (up if group["up"] else down,)

    def constants(self, group, t):
        return {"lr": group["lr"]}


def test_groups_may_run_different_stages_on_the_same_moments():
    a, b = Parameter(torch.zeros(3)), Parameter(torch.zeros(3))
    opt = TwoPlans([{"params": [a]}, {"params": [b], "up": True}], {"lr": 1.0, "up": False})
    a.grad = b.grad = torch.ones(3)
    opt.step()
    assert a.tolist() == [-1] * 3 and b.tolist() == [1] * 3


class TwoKinds(Rule):
    """Matrices go down without a state, all else goes up and keeps one."""

    kinds: ClassVar = ("matrix", "other")

    def kind(self, group, name, shape, role):
        return role or ("matrix" if len(shape) == 2 else "other")

    def plan(self, group, kind=""):
        return ({}, (down,)) if kind == "matrix" else ({"b": Moment("total")}, (climb,))

    def constants(self, group, t):
        return {"lr": group["lr"]}


@update("p b")
def climb(p, b, g, c):
    return p + c.lr * g, b + g


def test_tensors_of_one_group_may_be_of_different_kinds():
    a, b = Parameter(torch.zeros(2, 3)), Parameter(torch.zeros(3))
    opt = TwoKinds([("a", a), ("b", b)], {"lr": 1.0}, states={"total": "bf16"})
    a.grad, b.grad = torch.ones(2, 3), torch.ones(3)
    opt.step()
    assert a.tolist() == [[-1] * 3] * 2 and b.tolist() == [1] * 3
    assert "total" not in opt.state[a] and opt.state[b]["total"].tolist() == [1] * 3
    told = opt.explain()
    assert [row.kind for row in told.rows] == ["matrix", "other"] and "down or, for other tensors, climb" in str(told)
    with pytest.raises(ValueError, match="a: TwoKinds has no kind 'norm'; it has: matrix, other"):
        TwoKinds([("a", a)], {"lr": 1.0}, roles={"a": "norm"})


def test_a_stabilizer_that_needs_a_moment_the_rule_has_not_is_refused():
    with pytest.raises(ValueError, match=r"SpikeClip.* reads 'v', which SignMomentum has not"):
        SignMomentum([Parameter(torch.ones(2))], stabilize=(SpikeClip(),))
    with pytest.raises(TypeError, match="is not a stabilizer"):
        AdamW([Parameter(torch.ones(2))], stabilize=(AdaClip,))
