"""Stable-SPAM: the released code's numbers, the paper's algorithm, and where the two part."""

import json
import math
from pathlib import Path

import numpy as np
import oracles_optim
import pytest
import torch
from cases import SMALL_SHAPES, gradient, parameters
from cases import one_thread as one_thread
from torch.nn import Parameter

from lowbit.optim import StableSPAM

GOLDEN = dict(np.load(Path(__file__).parent / "golden" / "stablespam.npz"))
RENAMED = {"update_proj_gap": "reset_interval", "total_T": "total_steps"}
SCALARS = ["m_max_t", "m_norm_t", "v_norm_t"]
INF, NAN = math.inf, math.nan

ORACLES = {"official": oracles_optim.stablespam_official, "paper": oracles_optim.stablespam_paper}
both_variants = pytest.mark.parametrize("variant", ["official", "paper"])

SETTINGS = {
    "default": {},
    "resets": {"reset_interval": 7},
    "never": {"reset_interval": 0},
    "every step": {"reset_interval": 1},
    "schedule": {"total_steps": 30, "reset_interval": 10, "weight_decay": 0.1},
    "past the end": {"total_steps": 8, "eta_min": 0.2, "reset_interval": 9},
    "eta_min 0": {"total_steps": 20, "eta_min": 0.0},
    "amsgrad": {"amsgrad": True, "reset_interval": 6},
    "gamma1=-1": {"gamma1": -1, "betas": (0.8, 0.99), "total_steps": 20, "reset_interval": 11},
    "bf16 paper": {"gamma1": 0.85, "gamma2": 0.99999, "gamma3": 0.99, "reset_interval": 10, "eps": 1e-6},
}


@pytest.mark.parametrize("setting", ["default", "gap7", "gap10_T30_wd"])
def test_official_equals_the_released_code(setting: str):
    kw = {RENAMED.get(k, k): v for k, v in json.loads(str(GOLDEN[f"{setting}/kw"])).items()}
    params = {n: Parameter(torch.from_numpy(GOLDEN[f"{setting}/p0_{n}"])) for n in "BC"}
    opt = StableSPAM(list(params.items()), **kw, variant="official", states="fp32")
    moments_at = GOLDEN["moments_at"].tolist()
    for t in range(30):
        for name, p in params.items():
            p.grad = torch.from_numpy(GOLDEN[f"grad_{name}"][t].copy())
        opt.step()
        for name, p in params.items():
            torch.testing.assert_close(
                p.detach(), torch.from_numpy(GOLDEN[f"{setting}/p_{name}"][t]), rtol=0, atol=1e-6
            )
            np.testing.assert_array_equal(p.grad, GOLDEN[f"grad_{name}"][t])  # the released code clips it in place
            state = opt.state[p]
            assert int(state["step"]) == GOLDEN[f"{setting}/step_{name}"][t]
            for scalar in SCALARS:
                assert float(state[scalar]) == pytest.approx(GOLDEN[f"{setting}/{scalar}_{name}"][t], rel=1e-5), scalar
            if t in moments_at:
                for moment in ("exp_avg", "exp_avg_sq"):
                    expected = GOLDEN[f"{setting}/{moment}_{name}"][moments_at.index(t)]
                    np.testing.assert_allclose(state[moment], expected, rtol=2e-5, atol=1e-8)


def compare(variant: str, shape: tuple[int, ...], hyper: dict, gradients: list, tolerance: float = 1e-6) -> None:
    """The optimizer against the straight-line statement in float64, after every step."""
    p = Parameter(parameters([shape], seed=3)[0][1].detach())
    opt = StableSPAM([("w", p)], lr=1e-3, variant=variant, states="fp32", **hyper)
    expected, s = p.detach().double().numpy().copy(), oracles_optim.fresh(p.detach().double().numpy())
    for t, g in enumerate(gradients, start=1):
        p.grad = g
        opt.step()
        expected = ORACLES[variant](expected, g.double().numpy(), s, t, lr=1e-3, **hyper)
        np.testing.assert_allclose(p.detach(), expected, rtol=0, atol=tolerance, err_msg=f"step {t}")
        if p.numel():
            for name in SCALARS:
                if math.isfinite(s[name]):
                    np.testing.assert_allclose(
                        float(opt.state[p][name]), s[name], rtol=1e-5, atol=1e-44, err_msg=f"{t}: {name}"
                    )
                else:
                    assert not math.isfinite(float(opt.state[p][name])), name


@both_variants
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("shape", [(50,), (5, 300)], ids=str)
def test_equals_the_straight_line_statement(variant: str, setting: str, shape: tuple[int, ...]):
    compare(variant, shape, SETTINGS[setting], [gradient(shape, t) for t in range(1, 23)])


@both_variants
@pytest.mark.parametrize("shape", [*SMALL_SHAPES, (3, 5461), (2, 3, 100)], ids=str)
def test_any_shape(variant: str, shape: tuple[int, ...]):
    compare(variant, shape, SETTINGS["schedule"], [gradient(shape, t) for t in range(1, 14)])


@both_variants
@pytest.mark.parametrize("zeros", [range(1, 4), range(7, 10), range(1, 20)], ids=["at the start", "later", "always"])
def test_zero_gradients(variant: str, zeros: range):
    """The whole gradient is zero, at first, at a reset, or always; weight decay still acts."""
    hyper = {"reset_interval": 8, "weight_decay": 0.1, "total_steps": 12}
    compare(variant, (7, 33), hyper, [gradient((7, 33), t) * (t not in zeros) for t in range(1, 20)])


@both_variants
@pytest.mark.parametrize("power", [1e-30, 1e-15, 1e-8, 1e8, 1e15])
def test_gradients_of_any_size(variant: str, power: float):
    """The norm is taken in units of the largest gradient, so its square neither overflows nor vanishes."""
    compare(variant, (7, 33), {"reset_interval": 7}, [gradient((7, 33), t) * power for t in range(1, 12)])


def test_a_norm_whose_square_is_no_float_leaves_the_tensor_alone():
    """The squared norm is an average the rule keeps; it may not become infinite."""
    p = Parameter(torch.zeros(8, 40))
    opt = StableSPAM([p], lr=0.1, states="fp32")
    p.grad = torch.full_like(p, 1e25)
    opt.step()
    assert not p.detach().any() and opt.counters()["skipped_tensors"] == 1
    assert (
        float(opt.state[p]["m_max_t"]) == float(opt.state[p]["v_norm_t"]) == float(opt.state[p]["v_norm_weight"]) == 0
    )
    p.grad = torch.ones_like(p)
    opt.step()
    torch.testing.assert_close(p.detach(), torch.full_like(p, -0.1), rtol=1e-4, atol=0)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("when", [1, 3, 7], ids=["first step", "later", "reset step"])
@pytest.mark.parametrize("shape", [(50,), (7, 33)], ids=str)
def test_official_lets_bad_values_spread_as_released(bad: float, when: int, shape: tuple[int, ...]):
    """NaN: one value is lost in its step, all in the next. Inf: all at once. The scalars stay spoiled."""
    gradients = [gradient(shape, t) for t in range(1, 11)]
    gradients[when - 1].view(-1)[4] = bad
    compare("official", shape, {"reset_interval": 7}, gradients)
    p = Parameter(torch.ones(shape))
    opt = StableSPAM([p], variant="official", states="fp32")
    lost = []
    for g in gradients[: when + 1]:
        p.grad = g
        opt.step()
        lost.append(int(p.isnan().sum()))
    assert lost[when - 1 :] == ([1, p.numel()] if math.isnan(bad) else [p.numel()] * 2)
    assert opt.counters() == {"skipped_blocks": 0, "skipped_tensors": 0}


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("setting", ["resets", "schedule", "amsgrad"])
def test_paper_leaves_a_tensor_with_a_bad_value_alone(bad: float, setting: str):
    """And goes on as if that step had not happened to it; the cosine and the resets keep counting."""
    gradients = [gradient((7, 33), t) for t in range(1, 20)]
    for t in (1, 5, 12, 13):
        gradients[t - 1].view(-1)[t] = bad
    compare("paper", (7, 33), SETTINGS[setting], gradients)


def test_a_reset_that_is_due_happens_to_a_tensor_with_a_bad_value_too():
    p = Parameter(torch.ones(4, 8))
    opt = StableSPAM([p], states="fp32", reset_interval=3)
    for t in range(1, 4):
        p.grad = gradient((4, 8), t)
        if t == 3:
            p.grad[0, 0] = NAN
            before = p.detach().clone(), float(opt.state[p]["m_norm_t"])
        opt.step()
    assert torch.equal(p.detach(), before[0]) and float(opt.state[p]["m_norm_t"]) == before[1]
    assert not opt.state[p]["exp_avg"].any() and not opt.state[p]["exp_avg_sq"].any()


def test_what_a_reset_does_in_its_own_step():
    """Constant gradients, so Adam steps by lr. Official: old moments, a first step's weights. Paper: a new start."""
    steps = {}
    for variant in ("official", "paper"):
        p = Parameter(torch.zeros(1, 16))
        opt = StableSPAM([p], lr=1.0, variant=variant, reset_interval=100, states="fp32", eps=1e-12)
        moved = []
        for _ in range(101):
            before = p.detach().clone()
            p.grad = torch.ones(1, 16)
            opt.step()
            moved.append(float((before - p.detach())[0, 0]))
        steps[variant] = moved
    m, v = 1 - 0.9**100, 1 - 0.999**100
    assert steps["official"][98] == pytest.approx(1, rel=1e-3)
    assert steps["official"][99] == pytest.approx((m / 0.1) / math.sqrt(v / 0.001), rel=1e-3)
    assert steps["official"][100] == pytest.approx((0.1 / (1 - 0.9**2)) / math.sqrt(0.001 / (1 - 0.999**2)), rel=0.05)
    assert steps["paper"][98:] == pytest.approx([1, 1, 1], rel=1e-3)


def test_the_clip_threshold_survives_a_reset_in_the_paper_variant_only():
    """After a reset the released counter is 1, so 1 - gamma3**k is tiny and nothing is clipped."""
    moved = {}
    for variant in ("official", "paper"):
        p = Parameter(torch.zeros(1, 64))
        opt = StableSPAM([p], lr=1.0, variant=variant, reset_interval=50, states="fp32", gamma1=0.0, gamma2=0.0)
        for t in range(1, 61):
            p.grad = torch.ones(1, 64)
            if t == 60:
                p.grad[0, 0] = 1000.0
                opt.state[p]["exp_avg"].zero_()
            opt.step()
        m = opt.state[p]["exp_avg"]
        moved[variant] = float(m[0, 0] / m[0, 1])
    average = 0.999 * (1 - 0.999**59) + 0.001 * 1000
    assert moved["official"] == pytest.approx(average / (1 - 0.999**11), rel=1e-3)  # ten steps after the reset
    assert moved["paper"] == pytest.approx(average / (1 - 0.999**60), rel=1e-3)


def test_weight_decay_comes_first_and_is_decoupled():
    p = Parameter(torch.full((4,), 2.0))
    opt = StableSPAM([p], lr=0.1, weight_decay=0.5, states="fp32")
    p.grad = torch.zeros(4)
    opt.step()
    assert p.tolist() == pytest.approx([2 * (1 - 0.1 * 0.5)] * 4)


def test_groups_have_their_own_hyper_parameters_and_clock():
    a, b = (Parameter(torch.ones(4, 8)) for _ in range(2))
    opt = StableSPAM([{"params": [a], "reset_interval": 2, "lr": 0.1}, {"params": [b], "gamma1": 0.5}], states="fp32")
    alone = [Parameter(torch.ones(4, 8)) for _ in range(2)]
    single = [
        StableSPAM([alone[0]], reset_interval=2, lr=0.1, states="fp32"),
        StableSPAM([alone[1]], gamma1=0.5, states="fp32"),
    ]
    for t in range(1, 6):
        for p, q in zip((a, b), alone, strict=True):
            p.grad = gradient((4, 8), t)
            q.grad = p.grad.clone()
        opt.step()
        for one in single:
            one.step()
    assert torch.equal(a, alone[0]) and torch.equal(b, alone[1]) and not torch.equal(a, b)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"variant": "papper"}, "unknown variant 'papper' .did you mean 'paper'"),
        ({"gamma1": 1.0}, "gamma1 must be in"),
        ({"gamma1": -0.5}, "gamma1 must be in"),
        ({"gamma2": -1}, "gamma2 must be in"),
        ({"gamma3": NAN}, "gamma3 must be in"),
        ({"reset_interval": -1}, "reset_interval must be a whole number"),
        ({"reset_interval": 1.5}, "reset_interval must be a whole number"),
        ({"reset_interval": INF}, "reset_interval must be a whole number"),
        ({"total_steps": 0}, "total_steps must be at least 1"),
        ({"eta_min": 1.5}, "eta_min must be in"),
        ({"eta_min": NAN}, "eta_min must be in"),
    ],
    ids=str,
)
def test_hyper_parameters_out_of_range(change: dict, message: str):
    with pytest.raises(ValueError, match=message):
        StableSPAM([Parameter(torch.ones(2))], **change)
    if "variant" not in change:
        opt = StableSPAM([Parameter(torch.ones(2))])
        with pytest.raises(ValueError, match=message):
            opt.add_param_group({"params": [Parameter(torch.ones(2))], **change})
        assert len(opt.param_groups) == 1


def test_one_optimizer_has_one_variant():
    with pytest.raises(ValueError, match="variant is one for the whole optimizer"):
        StableSPAM([{"params": [Parameter(torch.ones(2))], "variant": "official"}])
