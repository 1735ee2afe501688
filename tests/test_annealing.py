"""Beta1 along a cosine: an option of every optimizer with betas, the same as Stable-SPAM's."""

import math

import numpy as np
import oracles_optim
import pytest
import torch
from cases import assert_same, every_preset, gradient, parameters, train
from cases import one_thread as one_thread
from torch.nn import Parameter

from lowbit.optim import SPAM, AdaClip, AdaGN, AdamS, AdamW, Lion, MomentumReset, Rule, StableSPAM

ORACLES = {
    AdamW: oracles_optim.adamw,
    AdamS: oracles_optim.adams,
    Lion: oracles_optim.lion,
    SPAM: oracles_optim.spam_paper,
}
every_rule = pytest.mark.parametrize("rule", ORACLES, ids=lambda rule: rule.__name__)


@every_rule
@pytest.mark.parametrize("total, eta_min", [(12, 0.5), (5, 0.0), (40, 0.9)])
def test_beta1_follows_the_cosine_and_stays(rule: type[Rule], total: int, eta_min: float):
    """Past its end too. Debiased by accumulated weights, so exactly, whatever beta1 was before."""
    p = Parameter(parameters([(7, 33)])[0][1].detach())
    opt = rule([p], lr=1e-3, betas=(0.8, 0.9), beta1_annealing=total, eta_min=eta_min, states="fp32")
    x, s = p.detach().double().numpy().copy(), oracles_optim.fresh(p.detach().double().numpy())
    decay = opt.param_groups[0]["weight_decay"]
    for t in range(1, 21):
        p.grad = gradient((7, 33), t)
        opt.step()
        done = min(t / (total + 1), 1.0)
        beta1 = 0.8 * (eta_min + (1 - eta_min) * (1 + math.cos(math.pi * done)) / 2)
        own = {"lr": 1e-3, "betas": (beta1, 0.9), "weight_decay": decay}
        x = ORACLES[rule](x, p.grad.double().numpy(), s, t, **own)
        np.testing.assert_allclose(p.detach(), x, rtol=0, atol=1e-6, err_msg=f"step {t}")


@every_preset
def test_it_is_stable_spams_cosine(states: str):
    """Stable-SPAM anneals gamma1 too, so with gamma1 = 0 nothing is left but beta1."""
    first, second = parameters([(64, 64), (50,)]), parameters([(64, 64), (50,)])
    a = StableSPAM(first, reset_interval=7, gamma1=0.0, total_steps=9, eta_min=0.3, states=states)
    parts = (AdaClip(), AdaGN(gamma1=0.0), MomentumReset(7))
    b = AdamW(second, stabilize=parts, weight_decay=0.0, beta1_annealing=9, eta_min=0.3, states=states)
    train(a, first, range(1, 13))
    train(b, second, range(1, 13))
    for (_, p), (_, q) in zip(first, second, strict=True):
        assert torch.equal(p, q)
        assert_same(dict(a.state[p]), dict(b.state[q]))


@every_rule
def test_without_it_beta1_stays(rule: type[Rule]):
    p, q = (Parameter(torch.ones(4, 8)) for _ in range(2))
    plain, flat = rule([p], states="fp32"), rule([q], states="fp32", beta1_annealing=3, eta_min=1.0)
    for t in range(1, 9):
        p.grad = q.grad = gradient((4, 8), t)
        plain.step()
        flat.step()
    assert torch.equal(p, q)


@every_rule
@pytest.mark.parametrize(
    "change, message",
    [
        ({"beta1_annealing": 0}, "beta1_annealing must be at least 1, or None"),
        ({"beta1_annealing": -3}, "beta1_annealing must be at least 1, or None"),
        ({"beta1_annealing": math.nan}, "beta1_annealing must be at least 1, or None"),
        ({"beta1_annealing": math.inf}, "beta1_annealing must be at least 1, or None"),
        ({"eta_min": -0.1}, "eta_min must be in"),
        ({"eta_min": math.nan}, "eta_min must be in"),
    ],
    ids=str,
)
def test_annealing_out_of_range(rule: type[Rule], change: dict, message: str):
    with pytest.raises(ValueError, match=message):
        rule([Parameter(torch.ones(2))], **change)


def test_annealing_may_differ_by_group():
    a, b = (Parameter(torch.ones(4, 8)) for _ in range(2))
    opt = Lion([{"params": [a]}, {"params": [b], "beta1_annealing": 2, "eta_min": 0.0}], states="fp32", lr=1.0)
    for t in range(1, 6):
        a.grad = b.grad = gradient((4, 8), t)
        before = b.detach().clone()
        opt.step()
    assert torch.equal(before - b.detach(), b.grad.sign())  # beta1 is 0 by now: the sign of the gradient alone
    assert not torch.equal(a, b)
