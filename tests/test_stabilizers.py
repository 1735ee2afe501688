"""Stabilizers in front of any optimizer, and Stable-SPAM as AdamW with three of them."""

import math

import numpy as np
import oracles_optim
import pytest
import torch
from cases import (
    SHAPES,
    assert_close,
    assert_same,
    every_preset,
    feed,
    gradient,
    parameters,
    train,
    twins,
)  # fmt: skip
from cases import one_thread as one_thread
from torch import nn
from torch.nn import Parameter

from lowbit.optim import (
    SGD,
    AdaClip,
    AdaGN,
    AdamS,
    AdamW,
    GlobalClip,
    GradientStabilizer,
    Lion,
    MomentumReset,
    Rule,
    SpikeClip,
    StableSPAM,
    stabilizers,
)  # fmt: skip
from lowbit.stages import Namespace, Stage

NAN, INF = math.nan, math.inf


@every_preset
def test_stable_spam_is_adamw_with_three_stabilizers(states: str):
    first, second = parameters([*SHAPES, (50,)]), parameters([*SHAPES, (50,)])
    parts = (AdaClip(), AdaGN(), MomentumReset(7))
    a = StableSPAM(first, reset_interval=7, states=states)
    b = AdamW(second, stabilize=parts, weight_decay=0.0, states=states)
    train(a, first, range(1, 9))
    train(b, second, range(1, 9))
    for (_, p), (_, q) in zip(first, second, strict=True):
        assert torch.equal(p, q)
        assert_same(dict(a.state[p]), dict(b.state[q]))


@pytest.mark.parametrize("max_norm", [0.01, 1.0, 1e6])
def test_global_clip_is_clip_grad_norm(max_norm: float):
    mine, theirs = twins(((17, 33), (50,), (3, 300), (0,), ()))
    opt, ref = AdamW(mine, states="fp32", stabilize=(GlobalClip(max_norm),)), torch.optim.AdamW(theirs)
    for t in range(1, 41):
        feed(t, mine, theirs)
        before = [p.grad.clone() for p in mine]
        opt.step()
        assert all(torch.equal(g, p.grad) for g, p in zip(before, mine, strict=True))
        nn.utils.clip_grad_norm_(theirs, max_norm)
        ref.step()
    assert_close(mine, theirs)


def test_global_clip_sees_the_tensors_of_every_group():
    """One norm over all groups, also where they run different programs."""
    mine, theirs = twins(((17, 33), (17, 33)))
    own = [{"params": mine[:1], "amsgrad": True}, {"params": mine[1:]}]
    ref = torch.optim.AdamW([{"params": theirs[:1], "amsgrad": True}, {"params": theirs[1:]}])
    opt = AdamW(own, states="fp32", stabilize=(GlobalClip(0.1),))
    for t in range(1, 21):
        feed(t, mine, theirs)
        opt.step()
        nn.utils.clip_grad_norm_(theirs, 0.1)
        ref.step()
    assert_close(mine, theirs)


@pytest.mark.parametrize("bad", [NAN, INF, 1e25])
def test_global_clip_leaves_out_a_bad_tensor(bad: float):
    """The norm is that of the others, and they are stepped as without it."""
    (a, b), (c, d) = twins(((17, 33), (50,)))
    opt = AdamW([a, b], states="fp32", stabilize=(GlobalClip(0.01),))
    ref = AdamW([d], states="fp32", stabilize=(GlobalClip(0.01),))
    feed(1, [a, b], [c, d])
    a.grad.fill_(bad)
    d.grad = b.grad.clone()
    opt.step()
    ref.step()
    assert torch.equal(a, c) and torch.equal(b, d) and not torch.equal(b, twins(((17, 33), (50,)))[0][1])
    assert opt.counters()["skipped_tensors"] == 1


def test_spike_clip_is_spams():
    """g**2 > threshold * v: sign(g) * sqrt(threshold * v), with v before the step; where v is 0 nothing is clipped."""
    threshold, (p,), (q,) = 4.0, *twins(((20, 30),))
    opt = AdamW([p], states="fp32", stabilize=(SpikeClip(threshold),), weight_decay=0.1)
    x, s = q.detach().double().numpy(), oracles_optim.fresh(q.detach().double().numpy())
    clipped = 0
    for t in range(1, 31):
        p.grad = gradient((20, 30), t)
        g = p.grad.double().numpy()
        spike = (s["exp_avg_sq"] > 0) & (g * g > threshold * s["exp_avg_sq"])
        clipped += int(spike.sum())
        g = np.where(spike, np.sign(g) * np.sqrt(threshold * s["exp_avg_sq"]), g)
        x = oracles_optim.adamw(x, g, s, t, weight_decay=0.1)
        opt.step()
        np.testing.assert_allclose(p.detach(), x, rtol=0, atol=1e-6)
    assert 0 < clipped < 30 * 600


def test_ada_gn_alone_gives_gradients_the_norm_of_their_history():
    """GradientStabilizer: g * (average norm / root mean square of norms) / norm, averages debiased by weight."""
    p = Parameter(torch.zeros(6, 40))
    opt = AdamW(
        [p], lr=1.0, betas=(0.5, 0.5), eps=1e-12, weight_decay=0.0, states="fp32", stabilize=(AdaGN(0.6, 0.99),)
    )
    m = n = wm = wn = 0.0
    expected = np.zeros((6, 40))
    for t in range(1, 10):
        p.grad = gradient((6, 40), t)
        opt.step()
        norm = float(p.grad.double().norm())
        m, wm = 0.6 * m + 0.4 * norm, 0.6 * wm + 0.4
        n, wn = 0.99 * n + 0.01 * norm**2, 0.99 * wn + 0.01
        expected = 0.5 * expected + 0.5 * p.grad.double().numpy() / norm * (m / wm) / math.sqrt(n / wn)
        np.testing.assert_allclose(opt.state[p]["exp_avg"], expected, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("rule", [AdamW, AdamS, Lion, SGD], ids=lambda rule: rule.__name__)
def test_gradient_stabilizer_is_ada_gn_alone_with_its_own_defaults(rule: type[Rule]):
    """The wrapper's statement, whatever the optimizer behind it; its eps is its own and acts even when theirs is 1."""
    p, q = (Parameter(parameters([(6, 40)])[0][1].detach()) for _ in range(2))
    eps = {} if rule in (Lion, SGD) else {"eps": 1.0}
    opt, plain = rule([p], lr=0.1, states="fp32", stabilize=(GradientStabilizer(),), **eps), rule([q], lr=0.1, **eps)
    m = n = 0.0
    for t in range(1, 10):
        p.grad = gradient((6, 40), t)
        g = p.grad.double()
        norm = float(g.norm())
        m, n = 0.6 * m + 0.4 * norm, 0.999 * n + 0.001 * norm**2
        q.grad = (g * (m / (1 - 0.6**t)) / (math.sqrt(n / (1 - 0.999**t)) + 1e-12) / norm).float()
        opt.step()
        plain.step()
        torch.testing.assert_close(p.detach(), q.detach(), rtol=0, atol=2e-6)


@pytest.mark.parametrize("bad", [-1.0, NAN, INF])
def test_gradient_stabilizer_out_of_range(bad: float):
    with pytest.raises(ValueError, match="norm_eps must be a finite number"):
        AdamW([Parameter(torch.ones(2))], stabilize=(GradientStabilizer(norm_eps=bad),))
    with pytest.raises(ValueError, match="gamma1 must be in"):
        AdamW([Parameter(torch.ones(2))], stabilize=(GradientStabilizer(gamma1=bad + 0.5),))


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_stabilizers_run_in_the_order_given(order: tuple[int, int]):
    """Clipping to a global norm before or after normalizing is not the same."""
    parts = [AdaGN(), GlobalClip(0.5)]
    p = Parameter(torch.zeros(4, 8))
    opt = AdamW([p], states="fp32", stabilize=[parts[i] for i in order], betas=(0.0, 0.999))
    p.grad = torch.full((4, 8), 10.0)
    opt.step()
    norm = float(opt.state[p]["exp_avg"].norm())
    assert norm == pytest.approx(0.5 if order == (0, 1) else 1.0, rel=1e-4)
    assert opt.explain().sweeps == 3


# ---- what stages declare, so that a backend may save work


def declared(what: str) -> list[tuple[Stage, str]]:
    known = [(stage, getattr(stage, what)) for stage in vars(stabilizers).values() if isinstance(stage, Stage)]
    return [(stage, value) for stage, value in known if value]


def test_what_stages_declare_of_themselves_is_true():
    g = torch.randn(1000) ** 5
    for stage, _ in declared("plain"):
        assert torch.equal(stage({"g": g}), g.abs())
    for stage, unit in declared("unit"):
        for power in (2.0**-20, 1.0, 2.0**30):
            assert torch.equal(stage({"g": g, "s": Namespace({unit: torch.tensor(power)})}), (g * power) * (g * power))
    for stage, limit in declared("above"):
        scalars = Namespace({name: torch.tensor(0.25) for name in (limit, "clip_share")})
        written = stage.written({"g": g, "s": scalars})["g"]
        assert torch.equal(written == g, g.abs() <= scalars[limit])
    assert [len(declared(what)) for what in ("plain", "unit", "above")] == [1, 1, 1]
