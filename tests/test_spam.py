"""SPAM: the released code's numbers, the paper's algorithm, and where the two part."""

import math
from pathlib import Path

import numpy as np
import oracles_optim
import pytest
import torch
from cases import SMALL_SHAPES, assert_same, every_preset, gradient, parameters, train
from cases import one_thread as one_thread
from torch.nn import Parameter

from lowbit.optim import SPAM, AdamW, MomentumReset, SpikeClip

GOLDEN = Path(__file__).parent / "golden"
INF, NAN = math.inf, math.nan
ORACLES = {"official": oracles_optim.spam_official, "paper": oracles_optim.spam_paper}
both_variants = pytest.mark.parametrize("variant", ORACLES)

SETTINGS = {
    "default": {},
    "all of it": {"reset_interval": 7, "warmup_steps": 4, "grace_steps": 2, "threshold": 10, "weight_decay": 0.1},
    "warm-up longer than the interval": {"reset_interval": 5, "warmup_steps": 12, "grace_steps": 0, "threshold": 10},
    "never": {"reset_interval": 0, "threshold": 5, "grace_steps": 3},
    "every step": {"reset_interval": 1, "warmup_steps": 0},
    "no clip": {"threshold": 0, "reset_interval": 6, "warmup_steps": 2},
    "betas": {"betas": (0.8, 0.95), "eps": 1e-8, "threshold": 2, "grace_steps": 0, "reset_interval": 11},
}


def test_official_spam_equals_the_released_code():
    run, spiky = np.load(GOLDEN / "spam.npz"), np.load(GOLDEN / "stablespam.npz")
    params = {n: Parameter(torch.from_numpy(run[f"p0_{n}"])) for n in "BC"}
    kw = {"lr": 1e-3, "warmup_steps": 5, "threshold": 50, "grace_steps": 3, "reset_interval": 10}
    opt = SPAM(list(params.items()), **kw, variant="official", states="fp32")
    moments_at = run["moments_at"].tolist()
    for t in range(30):
        for name, p in params.items():
            p.grad = torch.from_numpy(spiky[f"grad_{name}"][t].copy())
        opt.step()
        assert opt.warmth(opt.param_groups[0]) == pytest.approx(run["scale"][t], rel=1e-12)
        for name, p in params.items():
            torch.testing.assert_close(p.detach(), torch.from_numpy(run[f"p_{name}"][t]), rtol=0, atol=2e-7)
            np.testing.assert_array_equal(p.grad, spiky[f"grad_{name}"][t])  # the released code clips it in place
            for moment in ("exp_avg", "exp_avg_sq") if t in moments_at else ():
                expected = run[f"{moment}_{name}"][moments_at.index(t)]
                np.testing.assert_allclose(opt.state[p][moment], expected, rtol=1e-5, atol=1e-9)


def compare(variant: str, shape: tuple[int, ...], hyper: dict, gradients: list) -> None:
    p = Parameter(parameters([shape], seed=3)[0][1].detach())
    opt = SPAM([("w", p)], lr=1e-3, variant=variant, states="fp32", **hyper)
    x, s = p.detach().double().numpy().copy(), oracles_optim.fresh(p.detach().double().numpy())
    for t, g in enumerate(gradients, start=1):
        p.grad = g
        opt.step()
        x = ORACLES[variant](x, g.double().numpy(), s, t, lr=1e-3, **hyper)
        np.testing.assert_allclose(p.detach(), x, rtol=0, atol=1e-6, err_msg=f"step {t}")


@both_variants
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("shape", [(50,), (5, 300)], ids=str)
def test_spam_equals_the_straight_line_statement(variant: str, setting: str, shape: tuple[int, ...]):
    compare(variant, shape, SETTINGS[setting], [gradient(shape, t) for t in range(1, 26)])


@both_variants
@pytest.mark.parametrize("shape", SMALL_SHAPES, ids=str)
def test_spam_of_any_shape(variant: str, shape: tuple[int, ...]):
    compare(variant, shape, SETTINGS["all of it"], [gradient(shape, t) for t in range(1, 10)])


@every_preset
def test_spam_is_adamw_with_two_stabilizers(states: str):
    """All that is left is the warm-up, here of no length."""
    first, second = parameters([(64, 64), (50,)]), parameters([(64, 64), (50,)])
    a = SPAM(first, threshold=10.0, grace_steps=2, reset_interval=4, warmup_steps=0, eps=1e-8, states=states)
    parts = (SpikeClip(10.0, grace_steps=2), MomentumReset(4))
    b = AdamW(second, weight_decay=0.0, stabilize=parts, states=states)
    train(a, first, range(1, 11))
    train(b, second, range(1, 11))
    for (_, p), (_, q) in zip(first, second, strict=True):
        assert torch.equal(p, q)
        assert_same(dict(a.state[p]), dict(b.state[q]))


def seen_late(variant: str, states: str) -> Parameter:
    """A row of an embedding whose first gradient comes after the grace is over."""
    p = Parameter(torch.zeros(64, 64))
    opt = SPAM([("w", p)], lr=0.1, grace_steps=3, reset_interval=100, variant=variant, states=states)
    for t in range(1, 21):
        p.grad = gradient((64, 64), t) + 0.01
        if t < 10:
            p.grad[5] = 0.0
        opt.step()
    return p.detach()


@every_preset
def test_a_row_first_seen_after_the_grace_is_frozen_as_released_only(states: str):
    released, ours = seen_late("official", states), seen_late("paper", states)
    assert not released[5].any() and released[4].all()
    assert (ours[5] != 0).float().mean() > 0.95


def test_the_grace_is_over_when_it_is_over():
    """A spike of a thousand in each step in turn: which of them the second moment sees whole."""
    whole = []
    for spiked in range(1, 21):
        p = Parameter(torch.zeros(1, 8))
        opt = SPAM([p], threshold=9.0, grace_steps=4, reset_interval=10, states="fp32")
        for t in range(1, spiked + 1):
            p.grad = torch.full((1, 8), 1000.0 if t == spiked else 1.0)
            opt.step()
        if float(opt.state[p]["exp_avg_sq"][0, 0]) > 900:
            whole.append(spiked)
    assert whole == [1, 2, 3, 10, 11, 12, 13, 20]


def test_what_a_spam_reset_does():
    """Constant gradients, so Adam steps by lr. Released: no new debiasing, so sqrt(1000) / 10 of a step; warmed up."""
    moved = {}
    for variant in ("official", "paper"):
        p = Parameter(torch.zeros(1, 16))
        opt = SPAM([p], lr=1.0, variant=variant, reset_interval=500, warmup_steps=9, states="fp32", eps=1e-12)
        steps = []
        for _ in range(511):
            before, p.grad = p.detach().clone(), torch.ones(1, 16)
            opt.step()
            steps.append(float((before - p.detach())[0, 0]))
        moved[variant] = steps
    warm = [1 - 0.99 * (1 + math.cos(math.pi * k / 10)) / 2 for k in range(9)]
    assert warm[0] == pytest.approx(0.01)
    assert moved["paper"][498] == pytest.approx(1, rel=1e-3) == moved["official"][498]
    assert moved["paper"][499:508] == pytest.approx(warm, rel=1e-3)
    assert moved["official"][499] == pytest.approx(0.01 * 0.1 / math.sqrt(0.001) * math.sqrt(1 - 0.999**500), rel=1e-3)
    assert moved["paper"][508:] == pytest.approx([1, 1, 1], rel=1e-3)


@pytest.mark.parametrize("variant, kept", [("official", True), ("paper", False)])
def test_a_reset_is_missed_by_what_has_no_gradient_as_released_only(variant: str, kept: bool):
    p, q = Parameter(torch.ones(4)), Parameter(torch.ones(4))
    opt = SPAM([p, q], variant=variant, reset_interval=2, states="fp32")
    for gradient_of_q in (torch.ones(4), None):
        p.grad, q.grad = torch.ones(4), gradient_of_q
        opt.step()
    assert opt.state[q]["exp_avg"].all() == kept
    assert float(opt.state[p]["exp_avg"][0]) == pytest.approx(0.1)


def test_spam_starts_without_a_warm_up():
    p = Parameter(torch.zeros(4))
    opt = SPAM([p], lr=0.1, warmup_steps=50)
    p.grad = torch.ones(4)
    opt.step()
    assert p.tolist() == pytest.approx([-0.1] * 4, rel=1e-4)


@pytest.mark.parametrize("bad", [NAN, INF])
def test_official_spam_lets_bad_values_through_and_paper_does_not(bad: float):
    left = {}
    for variant in ("official", "paper"):
        p = Parameter(torch.zeros(64, 64))
        opt = SPAM([("w", p)], variant=variant, states="fp32")
        for t in range(1, 4):
            p.grad = gradient((64, 64), t) + 0.1
            if t == 2:
                p.grad[3, 3] = bad
            opt.step()
        left[variant] = int(p.isnan().sum()), opt.counters()["skipped_blocks"]
    assert left == {"official": (1, 0), "paper": (0, 1)}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"variant": "offical"}, "unknown variant 'offical' .did you mean 'official'"),
        ({"threshold": -1}, "threshold must be at least 0"),
        ({"threshold": NAN}, "threshold must be at least 0"),
        ({"reset_interval": -1}, "reset_interval must be a whole number"),
        ({"reset_interval": 2.5}, "reset_interval must be a whole number"),
        ({"warmup_steps": -1}, "warmup_steps must be a whole number"),
        ({"warmup_steps": NAN}, "warmup_steps must be a whole number"),
        ({"warmup_steps": INF}, "warmup_steps must be a whole number"),
        ({"grace_steps": 0.5}, "grace_steps must be a whole number"),
        ({"grace_steps": -2}, "grace_steps must be a whole number"),
        ({"betas": (0.9,)}, "betas must be two numbers"),
        ({"eta_min": 2}, "eta_min must be in"),
        ({"beta1_annealing": 0}, "beta1_annealing must be at least 1"),
        ({"lr": -0.1}, "lr must be a finite number"),
    ],
    ids=str,
)
def test_spam_arguments_out_of_range(change: dict, message: str):
    with pytest.raises(ValueError, match=message):
        SPAM([Parameter(torch.ones(2))], **change)
    if "variant" not in change:
        opt = SPAM([Parameter(torch.ones(2))])
        with pytest.raises(ValueError, match=message):
            opt.add_param_group({"params": [Parameter(torch.ones(2))], **change})
        assert len(opt.param_groups) == 1


def test_one_spam_has_one_variant():
    with pytest.raises(ValueError, match="variant is one for the whole optimizer"):
        SPAM([{"params": [Parameter(torch.ones(2))], "variant": "official"}])
