"""SGD, Lion and AdamS: one moment at most. Their authors' numbers, and what each paper promises."""

import copy
import math

import numpy as np
import oracles_optim
import pytest
import torch
from cases import (
    PRESETS,
    SHAPES,
    assert_close,
    assert_same,
    every_preset,
    everything,
    feed,
    gradient,
    parameters,
    train,
    twins,
)  # fmt: skip
from cases import one_thread as one_thread
from golden_mha import follow
from torch import Tensor, nn
from torch.nn import Parameter

from lowbit.optim import SGD, AdaClip, AdaGN, AdamS, Lion, MomentumReset, Rule, SpikeClip

NAN, INF = math.nan, math.inf

# --- the authors' numbers ------------------------------------------------------------------------------------------


def test_sgd_equals_the_recorded_run():
    follow(lambda named: SGD(named, momentum=0.9, weight_decay=0.01, states="fp32"), "sgd")


def test_lion_equals_the_released_code():
    follow(lambda named: Lion(named, betas=(0.9, 0.99), weight_decay=0.1, states="fp32"), "lion")


def test_adams_equals_the_released_code():
    def build(named: list[tuple[str, Parameter]]) -> AdamS:
        groups = [
            {"params": [(n, p) for n, p in named if p.dim() >= 2], "weight_decay": 0.1},
            {"params": [(n, p) for n, p in named if p.dim() < 2], "weight_decay": 0.0},
        ]
        return AdamS(groups, betas=(0.9, 0.95), eps=1e-6, states="fp32")

    follow(build, "adams")


# --- SGD is torch's ------------------------------------------------------------------------------------------------

SGDS = {
    "plain": {},
    "decay": {"weight_decay": 0.3},
    "momentum": {"momentum": 0.9},
    "dampening": {"momentum": 0.8, "dampening": 0.3, "weight_decay": 0.1},
    "dampening 1": {"momentum": 0.8, "dampening": 1.0},
    "nesterov": {"momentum": 0.95, "nesterov": True, "weight_decay": 0.05},
    "tensor lr": {"lr": torch.tensor(2e-4), "momentum": 0.5},
}


@pytest.mark.parametrize("options", SGDS.values(), ids=SGDS)
def test_sgd_is_torchs(options: dict):
    mine, theirs = twins()
    options = {"lr": 1e-3, **options}
    opt, ref = SGD(mine, states="fp32", **options), torch.optim.SGD(theirs, **options)
    for t in range(1, 61):
        feed(t, mine, theirs)
        for p in (*mine, *theirs):
            p.grad.clamp_(-1, 1)
        opt.step()
        ref.step()
        assert_close(mine, theirs)
    if options.get("momentum"):
        for p, q in zip(mine, theirs, strict=True):
            buffer = ref.state[q]["momentum_buffer"]
            torch.testing.assert_close(opt.state[p]["momentum_buffer"], buffer, rtol=1e-5, atol=1e-6)


@every_preset
def test_sgd_without_momentum_keeps_no_moment(states: str):
    p = Parameter(torch.ones(64, 128))
    opt = SGD([("w", p)], lr=0.5, states=states)
    assert set(opt.state[p]) == {"step", "skipped"} and opt.state_bytes() < 32
    p.grad = torch.ones_like(p)
    opt.step()
    assert torch.equal(p.detach(), torch.full_like(p, 0.5)) and "sgd" in str(opt.explain()).lower()


def test_momentum_may_change_but_not_between_none_and_some():
    for before, after in ((0.0, 0.9), (0.9, 0.0)):
        p = Parameter(torch.ones(4))
        opt = SGD([p], momentum=before)
        opt.param_groups[0]["momentum"] = after
        p.grad = torch.ones(4)
        with pytest.raises(RuntimeError, match="momentum, nesterov of its group changed since the state was made"):
            opt.step()
        assert torch.equal(p.detach(), torch.ones(4))
    opt = SGD([p], momentum=0.9)
    opt.param_groups[0]["momentum"] = 0.5
    opt.step()


@pytest.mark.parametrize("options", [SGDS["dampening"], SGDS["nesterov"], SGDS["decay"]], ids=str)
def test_torchs_sgd_goes_on_here(options: dict):
    """From a torch.optim.SGD checkpoint, whose states count no steps; dampening does not spare a second gradient."""
    mine, theirs = twins()
    ref = torch.optim.SGD(theirs, lr=1e-3, **options)
    for t in range(1, 6):
        feed(t, theirs)
        ref.step()
    for p, q in zip(mine, theirs, strict=True):
        p.data.copy_(q.data)
    opt = SGD(mine, lr=0.5, states="fp32", momentum=options.get("momentum", 0.0))
    saved = ref.state_dict()
    kept = copy.deepcopy(saved)
    opt.load_state_dict(saved)
    assert saved["param_groups"] == kept["param_groups"] and saved["state"].keys() == kept["state"].keys()
    for t in range(6, 12):
        feed(t, mine, theirs)
        opt.step()
        ref.step()
    for p, q in zip(mine, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


def test_another_optimizers_checkpoint_is_not_taken_for_sgds():
    (p,), (q,) = twins(((4, 5),))
    ref = torch.optim.AdamW([q])
    feed(1, [q])
    ref.step()
    opt = SGD([p], momentum=0.9)
    before = everything(opt)
    with pytest.raises(ValueError, match="saved by AdamW, and this is SGD"):
        opt.load_state_dict(ref.state_dict())
    assert_same(everything(opt), before)


# --- AdamS ---------------------------------------------------------------------------------------------------------


def moves(opt: Rule, p: Parameter, gradients: list[Tensor]) -> list[Tensor]:
    """How far each step goes, in learning rates."""
    found = []
    for g in gradients:
        before, p.grad = p.detach().clone(), g
        opt.step()
        found.append((before - p.detach()) / opt.param_groups[0]["lr"])
    return found


@pytest.mark.parametrize("beta2, size", [(0.95, 4.4721), (0.999, 31.623)])
@pytest.mark.parametrize("bias_correction", [True, False])
def test_adams_first_step_is_the_sign_over_the_root_of_rate2(beta2: float, size: float, bias_correction: bool):
    p, g = Parameter(torch.zeros(8, 40)), gradient((8, 40), 1)
    g = g.sign() * (g.abs() + 1e-3)
    opt = AdamS([p], lr=1.0, betas=(0.9, beta2), eps=1e-12, bias_correction=bias_correction, states="fp32")
    [moved] = moves(opt, p, [g])
    share = 1.0 if bias_correction else 0.1  # the printed form does not debias the numerator
    torch.testing.assert_close(moved, g.sign() * size * share, rtol=1e-4, atol=0)


def bound(t: int, beta1: float = 0.9, beta2: float = 0.95) -> float:
    """Cauchy-Schwarz, for any momentum before the step."""
    c = 1 - beta1**t
    return math.sqrt(beta1**2 / beta2 + ((1 - beta1) / c) ** 2 / (1 - beta2))


def test_adams_bound_is_the_papers():
    assert bound(2) == pytest.approx(2.53, abs=0.01) and bound(10**6) == pytest.approx(1.026, abs=1e-3)


@pytest.mark.parametrize("states", [*PRESETS, "int4:256", "e3m0"])
def test_adams_steps_are_bounded_in_every_format(states: str):
    """Spikes of a thousand, a tensor that falls to nothing, an embedding row seen once in a while."""
    p = Parameter(torch.zeros(64, 256))
    opt = AdamS([("w", p)], lr=1e-3, weight_decay=0.0, states=states)
    gradients = []
    for t in range(1, 41):
        g = gradient((64, 256), t) * 10.0 ** ((5 * t) % 11 - 6)
        g[:8] *= t % 7 == 0
        gradients.append(g)
    reached = [float(moved.abs().max()) for moved in moves(opt, p, gradients)]
    assert all(found <= bound(t) * 1.001 for t, found in enumerate(reached, start=1)), reached
    assert max(reached[20:]) > 0.9  # the bound is not idle


def test_adams_bound_holds_for_any_stored_momentum_because_it_is_the_same_twice():
    """Momentum spoilt at random before each step, by factors up to 1e6 and to zero: a bad quantizer."""
    p = Parameter(torch.zeros(16, 64))
    opt = AdamS([p], lr=1e-3, weight_decay=0.0, states="fp32")
    generator = torch.Generator().manual_seed(0)
    for t in range(1, 60):
        m = opt.state[p]["exp_avg"]
        wrong = 10.0 ** (12 * torch.rand(m.shape, generator=generator) - 6)
        m.mul_(wrong * torch.randint(-1, 2, m.shape, generator=generator))
        [moved] = moves(opt, p, [gradient((16, 64), t)])
        assert float(moved.abs().max()) <= bound(t) * 1.001


def test_adams_step_from_a_momentum_stored_as_zero():
    p = Parameter(torch.zeros(4, 64))
    opt = AdamS([p], lr=1.0, weight_decay=0.0, eps=1e-12, states="fp32")
    train(opt, [("p0", p)], range(1, 200))
    opt.state[p]["exp_avg"].zero_()
    [moved] = moves(opt, p, [torch.ones(4, 64)])
    torch.testing.assert_close(moved, torch.full_like(moved, 0.1 / math.sqrt(0.05)), rtol=1e-4, atol=0)


def test_adams_debiases_the_old_momentum_by_the_new_weight():
    """By hand, t = 2: 1 - 0.9**2 under both, not 1 - 0.9 under the old one; and the normalizer has the old momentum."""
    p = Parameter(torch.zeros(1, 1))
    opt = AdamS([p], lr=1.0, eps=0.0, weight_decay=0.0, states="fp32")
    _, second = moves(opt, p, [torch.full((1, 1), 1.0), torch.full((1, 1), 3.0)])
    c, before, after = 0.19, 0.1, 0.9 * 0.1 + 0.1 * 3
    assert second.item() == pytest.approx((after / c) / math.sqrt(0.95 * (before / c) ** 2 + 0.05 * 9), rel=1e-5)


@pytest.mark.parametrize("shape", [(50,), (5, 300)], ids=str)
@pytest.mark.parametrize("hyper", [{}, {"betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.0}], ids=str)
def test_adams_in_the_printed_form(shape: tuple[int, ...], hyper: dict):
    p = Parameter(parameters([shape])[0][1].detach())
    opt = AdamS([p], lr=1e-3, states="fp32", bias_correction=False, **hyper)
    x, s = p.detach().double().numpy().copy(), oracles_optim.fresh(p.detach().double().numpy())
    for t in range(1, 30):
        p.grad = gradient(shape, t)
        opt.step()
        x = oracles_optim.adams(x, p.grad.double().numpy(), s, t, lr=1e-3, bias_correction=False, **hyper)
        np.testing.assert_allclose(p.detach(), x, rtol=0, atol=1e-6)


def test_adams_form_cannot_change_under_its_state():
    p = Parameter(torch.ones(4))
    opt = AdamS([p])
    opt.param_groups[0]["bias_correction"] = False
    p.grad = torch.ones(4)
    with pytest.raises(RuntimeError, match="bias_correction of its group changed"):
        opt.step()


# --- all three -----------------------------------------------------------------------------------------------------

MAKERS = {
    "sgd": lambda params, **kw: SGD(params, lr=1e-2, momentum=0.9, **kw),
    "lion": lambda params, **kw: Lion(params, lr=1e-3, **kw),
    "adams": lambda params, **kw: AdamS(params, lr=1e-3, **kw),
}
every_maker = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


@every_maker
@pytest.mark.parametrize("states, limit", [("fp32", 4.01), ("bf16", 2.01), ("8bit", 1.02), ("4bit", 0.54)])
def test_one_state_is_half_of_adams(make, states: str, limit: float):
    opt = make([Parameter(torch.zeros(256, 1024))], states=states)
    assert limit - 0.02 < opt.state_bytes() / (256 * 1024) <= limit


@every_maker
@every_preset
def test_one_moment_trains_a_model(make, states: str):
    torch.manual_seed(0)
    model = nn.ModuleDict({"embed_tokens": nn.Embedding(33, 96), "lm_head": nn.Linear(96, 33)})
    opt, x = make(model.named_parameters(), states=states), torch.randint(0, 33, (64,))
    for group in opt.param_groups:
        group["lr"] *= 10
    losses = []
    for _ in range(30):
        loss = nn.functional.cross_entropy(model["lm_head"](model["embed_tokens"](x)), x)
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


@every_maker
def test_spike_clip_needs_a_second_moment(make):
    with pytest.raises(ValueError, match=r"stabilize: SpikeClip.* reads 'v', which \w+ has not"):
        make([Parameter(torch.ones(4))], stabilize=(SpikeClip(),))


@every_maker
@every_preset
def test_momentum_reset_zeroes_the_one_moment(make, states: str):
    """After a reset a step is the first of a fresh optimizer; codes and scales are zeros where no gradient came."""
    named, others = parameters([(64, 64), (64, 128)]), parameters([(64, 64), (64, 128)])
    opt = make(named, states=states, stabilize=(MomentumReset(4),))
    train(opt, named, range(1, 4))
    for (_, p), (_, q) in zip(named, others, strict=True):
        q.data.copy_(p.data)
    fresh = make(others, states=states)
    named[0][1].grad = others[0][1].grad = gradient((64, 64), 4)
    named[1][1].grad = None
    opt.step()
    fresh.step()
    assert torch.equal(named[0][1], others[0][1])
    [name] = [moment.name for moment in opt._slots[named[0][1]].program.moments.values()]
    ours, theirs, idle = (opt.state[named[0][1]], fresh.state[others[0][1]], opt.state[named[1][1]])
    parts = [key for key in ours if key.startswith(name) and isinstance(ours[key], Tensor)]
    assert all(torch.equal(ours[key], theirs[key]) and not idle[key].any() for key in parts)


@pytest.mark.parametrize("base, oracle", [(SGD, "sgd"), (Lion, "lion"), (AdamS, "adams")])
def test_ada_clip_and_ada_gn_are_one_line(base: type[Rule], oracle: str):
    """Lion with both is the paper's Table 3: a straight-line statement of clip, normalize, update."""
    hyper = {"lr": 1e-3, "weight_decay": 0.1, **({"momentum": 0.9} if base is SGD else {})}
    p = Parameter(parameters([(7, 33)], seed=2)[0][1].detach())
    opt = base([p], **hyper, states="fp32", stabilize=(AdaClip(), AdaGN()))
    x, s = p.detach().double().numpy().copy(), oracles_optim.fresh(p.detach().double().numpy())
    peaks = norms = squares = 0.0
    for t in range(1, 31):
        p.grad = gradient((7, 33), t)
        opt.step()
        g = p.grad.double().numpy()
        peak = np.abs(g).max()
        peaks = 0.999 * peaks + 0.001 * peak
        g = oracles_optim.spam_clip(g, peaks / (1 - 0.999**t), peak)
        norm = np.sqrt((g * g).sum())
        norms, squares = 0.7 * norms + 0.3 * norm, 0.9 * squares + 0.1 * norm**2
        eps = hyper.get("eps", opt.param_groups[0].get("eps", 1e-8))
        g = g / norm * (norms / (1 - 0.7**t)) / (np.sqrt(squares / (1 - 0.9**t)) + eps)
        x = getattr(oracles_optim, oracle)(x, g, s, t, **hyper)
        np.testing.assert_allclose(p.detach(), x, rtol=0, atol=1e-6, err_msg=f"step {t}")
    assert opt.explain().sweeps == 3


@every_preset
def test_lion_moves_every_weight_by_lr(states: str):
    named = parameters(SHAPES)
    opt = Lion(named, lr=1e-3, states=states)
    for t in range(1, 5):
        before = [p.detach().clone() for _, p in named]
        train(opt, named, range(t, t + 1))
        for (_, p), old in zip(named, before, strict=True):
            moved = (p.detach() - old).abs()
            assert bool(((moved - 1e-3).abs() < 1e-6).logical_or(moved == 0).all())


@pytest.mark.parametrize(
    "make, change, message",
    [
        (SGD, {"momentum": -0.1}, "momentum must be a finite number"),
        (SGD, {"momentum": NAN}, "momentum must be a finite number"),
        (SGD, {"momentum": INF}, "momentum must be a finite number"),
        (SGD, {"dampening": INF}, "dampening must be a finite number"),
        (SGD, {"dampening": -1}, "dampening must be a finite number"),
        (SGD, {"nesterov": True}, "nesterov=True needs momentum above 0 and dampening=0"),
        (SGD, {"nesterov": True, "momentum": 0.9, "dampening": 0.1}, "nesterov=True needs momentum"),
        (SGD, {"lr": -1}, "lr must be a finite number"),
        (SGD, {"weight_decay": NAN}, "weight_decay must be a finite number"),
        (SGD, {"states": {"exp_avg": "8bit"}}, "no moment of this optimizer"),
        (Lion, {"betas": (0.9,)}, "betas must be two numbers"),
        (Lion, {"betas": (0.9, 1.0)}, "betas must be numbers in"),
        (Lion, {"lr": INF}, "lr must be a finite number"),
        (AdamS, {"betas": (0.9, 0.95, 0.99)}, "betas must be two numbers"),
        (AdamS, {"betas": (-0.1, 0.95)}, "betas must be numbers in"),
        (AdamS, {"eps": -1e-8}, "eps must be a finite number"),
        (AdamS, {"weight_decay": -0.1}, "weight_decay must be a finite number"),
    ],
    ids=str,
)
def test_one_moment_arguments_out_of_range(make: type[Rule], change: dict, message: str):
    with pytest.raises(ValueError, match=message):
        make([Parameter(torch.ones(2))], **change)
    opt = make([Parameter(torch.ones(2))])
    with pytest.raises(ValueError, match=message):
        opt.add_param_group({"params": [Parameter(torch.ones(2))], **change})
    assert len(opt.param_groups) == 1
