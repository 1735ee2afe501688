"""What optimizers compute, for every parameter and gradient they may meet, with states in every format."""

import math
from typing import ClassVar

import numpy as np
import oracles_optim
import pytest
import torch
from cases import (
    COMPRESSED,
    PRESETS,
    SHAPES,
    SMALL_SHAPES,
    STATE_FORMATS,
    Case,
    assert_same,
    every_case,
    every_preset,
    everything,
    gradient,
    guarded_cases,
    parameters,
    train,
)  # fmt: skip
from cases import one_thread as one_thread
from torch import Tensor, nn
from torch.nn import Parameter

import lowbit
from lowbit import packed
from lowbit.optim import (
    AdaClip,
    AdaGN,
    AdamW,
    GlobalClip,
    Moment,
    MomentumReset,
    Rule,
    SpikeClip,
    StableSPAM,
    fold,
    measure,
    update,
)  # fmt: skip
from lowbit.words import abs, lerp, maximum, sign, where

NAN, INF = math.nan, math.inf

# --- AdamW is torch's ----------------------------------------------------------------------------------------------

ADAMW = {
    "default": {},
    "no decay": {"weight_decay": 0.0, "lr": 3e-3},
    "decay": {"weight_decay": 0.5, "eps": 1e-3},
    "betas": {"betas": (0.5, 0.95), "lr": 2e-3},
    "beta1 0": {"betas": (0.0, 0.9)},
    "amsgrad": {"amsgrad": True, "lr": 2e-3},
    "tensor lr": {"lr": torch.tensor(2e-3)},
}


def twins(shapes=((17, 33), (50,), ())) -> tuple[list[Parameter], list[Parameter]]:
    mine = [p for _, p in parameters(list(shapes))]
    return mine, [Parameter(p.detach().clone()) for p in mine]


def feed(t: int, *lists: list[Parameter]) -> None:
    for params in lists:
        for i, p in enumerate(params):
            p.grad = gradient(tuple(p.shape), t, i, p.dtype)


def assert_close(a: list[Parameter], b: list[Parameter], atol: float = 1e-6) -> None:
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x.detach(), y.detach(), rtol=0, atol=atol)


@pytest.mark.parametrize("options", ADAMW.values(), ids=ADAMW)
def test_adamw_is_torchs(options: dict):
    mine, theirs = twins()
    opt, ref = AdamW(mine, states="fp32", **options), torch.optim.AdamW(theirs, **options)
    for t in range(1, 121):
        feed(t, mine, theirs)
        opt.step()
        ref.step()
        assert_close(mine, theirs)
    for p, q in zip(mine, theirs, strict=True):
        for moment in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(opt.state[p][moment], ref.state[q][moment], rtol=1e-4, atol=1e-7)
        assert float(opt.state[p]["step"]) == 120


def test_adamw_groups_are_torchs():
    mine, theirs = twins()

    def groups(params: list[Parameter]) -> list[dict]:
        return [
            {"params": params[:1], "lr": 1e-2, "betas": (0.8, 0.9)},
            {"params": params[1:], "weight_decay": 0.3, "eps": 1e-4, "amsgrad": True},
        ]

    opt, ref = AdamW(groups(mine), states="fp32"), torch.optim.AdamW(groups(theirs))
    for t in range(1, 101):
        feed(t, mine, theirs)
        opt.step()
        ref.step()
    assert_close(mine, theirs)


@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("name", ["cosine", "lambda", "warmup"])
def test_schedulers_change_the_learning_rate(name: str, tensor_lr: bool):
    schedulers = {
        "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 50),
        "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda t: 1 / (t + 1)),
        "warmup": lambda o: torch.optim.lr_scheduler.LinearLR(o, 0.1, 1.0, 10),
    }
    mine, theirs = twins()
    lr = 2e-3
    opt = AdamW(mine, lr=torch.tensor(lr) if tensor_lr else lr, states="fp32")
    ref = torch.optim.AdamW(theirs, lr=lr)
    mine_s, theirs_s = schedulers[name](opt), schedulers[name](ref)
    for t in range(1, 41):
        feed(t, mine, theirs)
        for each in (opt, ref, mine_s, theirs_s):
            each.step()
        assert float(opt.param_groups[0]["lr"]) == pytest.approx(float(ref.param_groups[0]["lr"]), rel=1e-6)
    assert_close(mine, theirs)


@every_case
def test_betas_that_change_are_debiased_by_their_weight(case: Case):
    """OneCycleLR moves lr and beta1 every step; the reference keeps accumulated weights (float64)."""
    if case.unit == "none":
        pytest.skip("the released code debiases by a power of the current beta")
    [(_, p)] = named = parameters([(7, 33)])
    opt = case.build(named, states="fp32")
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, 1e-2, total_steps=60, cycle_momentum=True)
    x, s = p.detach().double().numpy(), oracles_optim.fresh(p.detach().double().numpy())
    seen = set()
    for t in range(1, 51):
        p.grad = gradient((7, 33), t)
        group = opt.param_groups[0]
        seen.add(group["betas"][0])
        x = case.oracle(x, p.grad.double().numpy(), s, t, **{**case.hyper, "lr": group["lr"], "betas": group["betas"]})
        opt.step()
        schedule.step()
        np.testing.assert_allclose(p.detach(), x, rtol=0, atol=3e-6)
    assert len(seen) > 10


def test_a_closure_is_called_with_gradients_on():
    p = Parameter(torch.ones(4))
    opt = AdamW([p], lr=0.1)

    def closure() -> Tensor:
        opt.zero_grad()
        loss = (p * p).sum()
        loss.backward()
        return loss

    assert opt.step(closure).item() == 4.0 and float(p.detach()[0]) < 1
    with torch.no_grad():
        assert opt.step(closure=closure).item() < 4.0


# --- every parameter and gradient ----------------------------------------------------------------------------------


@every_case
@every_preset
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_any_shape_steps_and_equals_its_reference(case: Case, states: str, dtype: torch.dtype):
    """All awkward shapes in one optimizer. Small tensors are stored exactly, so the reference is the plain rule."""
    named = parameters(SMALL_SHAPES, dtype)
    x = {n: p.detach().double().numpy().copy() for n, p in named}
    opt = case.build(
        named, states=states if states != "bf16" else "fp32", master="none" if dtype == torch.float32 else "fp32"
    )
    s = {n: oracles_optim.fresh(x[n]) for n in x}
    for t in range(1, 5):
        for n, p in named:
            p.grad = gradient(tuple(p.shape), t, 1, dtype)
            x[n] = case.oracle(x[n], p.grad.double().numpy(), s[n], t, **case.hyper)
        opt.step()
    for n, p in named:
        exact = opt.state[p]["master"] if dtype != torch.float32 else p.detach()
        np.testing.assert_allclose(exact, x[n], rtol=0, atol=1e-6, err_msg=n)
        assert torch.equal(p.detach(), exact.to(dtype))
        assert float(opt.state[p]["step"]) == 4


@every_case
@every_preset
def test_not_contiguous_and_unaligned(case: Case, states: str):
    """Transposed parameters, channels-last, and gradients that are views at odd offsets give the bits of plain ones."""
    shapes = [(65, 257), (16, 8, 6, 6), (64, 65)]
    plain, odd = parameters(shapes), parameters(shapes)
    [a, b, c] = [p for _, p in odd]
    a.data = a.data.t().contiguous().t()
    b.data = b.data.to(memory_format=torch.channels_last)
    assert not a.is_contiguous() and not b.is_contiguous()
    one, two = case.build(plain, states=states), case.build(odd, states=states)
    flat = torch.zeros(1 + c.numel())
    for t in range(1, 4):
        for _, p in plain:
            p.grad = gradient(tuple(p.shape), t)
        a.grad = plain[0][1].grad.t().contiguous().t()
        b.grad = plain[1][1].grad.clone()
        flat[1:] = plain[2][1].grad.view(-1)
        c.grad = flat[1:].view(c.shape)
        assert c.grad.data_ptr() % 16
        one.step()
        two.step()
    assert_same(everything(one), everything(two))
    assert not a.is_contiguous()


@every_case
def test_gradients_come_and_go(case: Case):
    """A tensor without a gradient is not stepped: its count, moments and scalars wait; the others go on."""
    named = parameters([(64, 64), (64, 64), (50,)])
    alone = [(n, Parameter(p.detach().clone())) for n, p in named]
    opt, single = case.build(named, states="8bit"), case.build(alone[:1], states="8bit")
    for t in range(1, 7):
        for i, (_, p) in enumerate(named):
            p.grad = None if (t + i) % 3 == 0 else gradient(tuple(p.shape), t, i)
        q = alone[0][1]
        q.grad = None if t % 3 == 0 else gradient((64, 64), t, 0)
        before = {k: v.clone() for k, v in opt.state[named[0][1]].items() if isinstance(v, Tensor)}
        opt.step()
        single.step()
        if t % 3 == 0:
            assert all(torch.equal(v, opt.state[named[0][1]][k]) for k, v in before.items())
    assert torch.equal(named[0][1], alone[0][1])
    assert [int(opt.state[p]["step"]) for _, p in named] == [4, 4, 4]


def test_mixed_dtypes_of_parameters_and_gradients():
    """Parameters of three dtypes, fp32 gradients for 16-bit ones and the reverse, in one optimizer, as if alone."""
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.float32, torch.bfloat16]
    grads = [torch.float32, torch.float32, torch.float16, torch.bfloat16, torch.bfloat16]
    named = [(f"p{i}", Parameter(parameters([(64, 128)])[0][1].detach().to(d))) for i, d in enumerate(dtypes)]
    alone = [(n, Parameter(p.detach().clone())) for n, p in named]
    together = AdamW(named, lr=1e-2, states="4bit")
    single = [AdamW([pair], lr=1e-2, states="4bit") for pair in alone]
    for t in range(1, 4):
        for (_, p), (_, q), d in zip(named, alone, grads, strict=True):
            p.grad_dtype = q.grad_dtype = d
            p.grad = gradient((64, 128), t).to(d)
            q.grad = p.grad.clone()
        together.step()
        for one in single:
            one.step()
    for (_, p), (_, q) in zip(named, alone, strict=True):
        assert torch.equal(p, q) and p.dtype == q.dtype


def test_frozen_and_unfrozen_and_frozen_again():
    named = parameters([(64, 64), (64, 64)])
    a, b = (p for _, p in named)
    b.requires_grad_(False)
    opt = AdamW(named, lr=0.1)
    assert a in opt.state and b not in opt.state
    assert [row.why for row in opt.explain().rows][1] == "frozen"
    before = b.detach().clone()
    train(opt, named[:1], range(1, 3))
    assert torch.equal(b, before)
    b.requires_grad_(True)
    train(opt, named, range(3, 5))
    assert int(opt.state[b]["step"]) == 2 and not torch.equal(b, before)
    b.requires_grad_(False)
    b.grad, before = None, b.detach().clone()
    train(opt, named[:1], range(5, 6))
    assert torch.equal(b, before) and int(opt.state[b]["step"]) == 2


def test_a_frozen_parameter_with_a_gradient_is_stepped_as_in_torch():
    p = Parameter(torch.ones(4), requires_grad=False)
    opt = AdamW([p], lr=0.1, weight_decay=0.0)
    p.grad = torch.ones(4)
    opt.step()
    assert p.tolist() == pytest.approx([0.9] * 4)


def test_tied_weights_are_one_parameter():
    model = nn.Sequential(nn.Embedding(64, 64), nn.Linear(64, 64, bias=False))
    model[1].weight = model[0].weight
    opt = AdamW(model.named_parameters(), lr=0.1)
    assert len(opt.param_groups[0]["params"]) == 1
    model(torch.arange(64)).sum().backward()
    opt.step()
    assert torch.equal(model[0].weight, model[1].weight)


def test_autograd_notices_that_a_parameter_was_stepped():
    """As with torch's: a graph that saved the old value may not be used any more."""
    p = Parameter(torch.ones(3))
    loss = (p * p).sum()
    p.grad = torch.ones(3)
    AdamW([p]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_add_param_group_in_the_middle():
    """The new group has its own state at once, counts from the optimizer's step, and one tensor will do as `params`."""
    a, b, c = (Parameter(torch.ones(64, 64)) for _ in range(3))
    opt = StableSPAM([a], lr=0.1, reset_interval=3)
    a.grad = gradient((64, 64), 1)
    opt.step()
    opt.add_param_group({"params": [b], "lr": 0.01, "states": "4bit"})
    opt.add_param_group({"params": c})
    assert b in opt.state and c in opt.state and opt.state[b]["exp_avg"].shape == (64, 32)
    assert [g["steps"] for g in opt.param_groups] == [1, 1, 1]
    for t in range(2, 4):
        a.grad = b.grad = gradient((64, 64), t)
        opt.step()
    assert opt.param_groups[1]["lr"] == 0.01 and int(opt.state[b]["step"]) == 2


def test_bf16_autocast_without_a_scaler():
    torch.manual_seed(0)
    model = nn.Linear(64, 64)
    opt = StableSPAM(model.named_parameters(), lr=1e-2, states="4bit")
    x, losses = torch.randn(32, 64), []
    for _ in range(30):
        opt.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = (model(x) - x).square().mean()
        loss.backward()
        with torch.autocast("cpu", torch.bfloat16):  # a step inside autocast is fp32 all the same
            opt.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_default_dtype_and_device_change_nothing(dtype: torch.dtype):
    found = []
    for default in (torch.float32, dtype):
        named = parameters([(64, 128), (33, 300)])
        grads = [gradient((64, 128), 1), gradient((33, 300), 1)]
        torch.set_default_dtype(default)
        try:
            with torch.device("meta") if default is dtype else torch.device("cpu"):
                opt = StableSPAM(named, lr=0.1, states="8bit", state_rounding="stochastic")
                for (_, p), g in zip(named, grads, strict=True):
                    p.grad = g
                opt.step()
        finally:
            torch.set_default_dtype(torch.float32)
        found.append(everything(opt))
    assert_same(*found)


# --- compressed states ---------------------------------------------------------------------------------------------


def dequantized(opt: Rule, p: Parameter, name: str) -> Tensor:
    state, fmt = opt.state[p], opt._slots[p].formats
    letter = {m.name: letter for letter, m in opt._slots[p].program.moments.items()}[name]
    parts = {part: state[name if part == "codes" else f"{name}_{part}"] for part in fmt[letter].parts}
    cols = packed.rows_of(p.shape)[1]
    return packed.decode_rows(fmt[letter], parts, cols).reshape(p.shape)


def as_reference(opt: Rule, p: Parameter, case: Case) -> dict:
    """A tensor's state as the float64 reference has it."""
    state = opt.state[p]
    s = oracles_optim.fresh(p.detach().double().numpy())
    for name in s:
        if name in case.signed:
            s[name] = dequantized(opt, p, name).double().numpy()
        elif name in state:
            s[name] = float(state[name])
    return s


@every_case
@pytest.mark.parametrize("name", COMPRESSED)
def test_a_step_is_decode_rule_encode(case: Case, name: str):
    """Every format, awkward shapes: p to 1e-6, and the new moments' nearest codes, but for ties that an ulp decides."""
    named = parameters(SHAPES)
    opt = case.build(named, states=name)
    train(opt, named, range(1, 3))
    wrong = total = 0
    for t in (3, 7):  # 7: a reset step
        before = {n: (p.detach().double().numpy().copy(), as_reference(opt, p, case)) for n, p in named}
        for group in opt.param_groups:
            group["steps"] = t - 1
        train(opt, named, range(t, t + 1))
        for n, p in named:
            x, s = before[n]
            expected = case.oracle(x, p.grad.double().numpy(), s, t, **case.hyper)
            np.testing.assert_allclose(p.detach(), expected, rtol=0, atol=1e-6, err_msg=n)
            for letter, moment in opt._slots[p].program.moments.items():
                fmt = opt._slots[p].formats[letter]
                assert fmt.compressed and (fmt.signed or not moment.signed)
                values = torch.from_numpy(s[moment.name]).float().reshape(packed.rows_of(p.shape))
                parts = packed.encode_rows(fmt, values, live=not moment.signed)
                wanted = packed.decode_rows(fmt, parts, values.shape[1]).reshape(p.shape)
                stored = dequantized(opt, p, moment.name)
                wrong += int(((stored - wanted).abs() > 1e-4 * wanted.abs()).sum())
                total += wanted.numel()
    assert wrong <= 2e-4 * total, f"{wrong} of {total}"


@pytest.mark.parametrize("chunk", [1, 5000])
@every_case
@pytest.mark.parametrize("states", ["8bit", "solo4"])
def test_how_the_work_is_cut_changes_no_bit(case: Case, states: str, chunk: int, monkeypatch: pytest.MonkeyPatch):
    found = []
    for size in (1 << 30, chunk):
        monkeypatch.setattr("lowbit.backends.reference.CHUNK", size)
        named = parameters([(33, 300), (65, 257), (50,), (16, 16, 17)], torch.bfloat16)
        opt = case.build(named, states=states, state_rounding="stochastic")
        train(opt, named, range(1, 3))
        found.append(everything(opt))
    assert_same(*found)


@every_case
@every_preset
def test_together_or_alone_and_in_any_order(case: Case, states: str):
    """Named tensors: neither their order nor their company changes a bit, stochastic rounding included."""
    options = {"states": states, "state_rounding": "stochastic"}
    together = parameters(SHAPES, torch.bfloat16)
    reverse, alone = parameters(SHAPES, torch.bfloat16), parameters(SHAPES, torch.bfloat16)
    opt, back = case.build(together, **options), case.build(reverse[::-1], **options)
    single = [case.build([pair], **options) for pair in alone]
    train(opt, together, range(1, 4))
    train(back, reverse, range(1, 4))
    for one, pair in zip(single, alone, strict=True):
        train(one, [pair], range(1, 4))
    for (_, p), (_, q), (_, r), one in zip(together, reverse, alone, single, strict=True):
        assert torch.equal(p, q) and torch.equal(p, r)
        assert_same(dict(opt.state[p]), dict(back.state[q]))
        assert_same(dict(opt.state[p]), dict(one.state[r]))


@every_case
def test_compressed_training_stays_near_fp32(case: Case):
    """A least-squares problem: the loss falls in every preset, and 8 bits end where 32 do."""
    ends = {}
    for states in PRESETS:
        torch.manual_seed(0)
        model, x, target = nn.Linear(64, 64), torch.randn(128, 64), torch.randn(128, 64)
        opt = case.build(model.named_parameters(), lr=1e-2, states=states, **(
            {"reset_interval": 0, "total_steps": None} if "reset_interval" in case.hyper else {}
        ))  # fmt: skip
        for _ in range(60):
            opt.zero_grad()
            loss = (model(x) - target).square().mean()
            loss.backward()
            opt.step()
        ends[states] = loss.item()
    assert ends["8bit"] == pytest.approx(ends["fp32"], rel=0.02)
    assert ends["4bit"] == pytest.approx(ends["fp32"], rel=0.1)


def test_stochastic_state_rounding_moves_small_averages():
    """To nearest, a moment that should fall by less than half a code step stays; stochastically it falls on average."""
    found = {}
    for rounding in ("nearest", "stochastic"):
        p = Parameter(torch.zeros(64, 128))
        opt = AdamW([("p", p)], states="4bit", state_rounding=rounding, betas=(0.9, 0.99))
        for t in range(120):
            p.grad = torch.full((64, 128), 1.0 if t == 0 else 0.5)
            p.grad[:, 0] = 1.0
            opt.step()
        found[rounding] = float(dequantized(opt, p, "exp_avg_sq")[:, 1:].mean())
    exact = 0.01 * 0.99**119 + 0.25 * (1 - 0.99**119)
    assert found["stochastic"] == pytest.approx(exact, rel=0.05)
    assert abs(torch.tensor(found["nearest"] - exact)) > 0.05 * exact


# --- stabilizers ---------------------------------------------------------------------------------------------------


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


# --- a rule of one's own -------------------------------------------------------------------------------------------


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


class Plain(Rule):
    """No moments and no scalars at all."""

    def plan(self, group):
        return {}, (update("p")(lambda p, g, c: p - c.lr * g),)

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

    def plan(self, group):
        step = update("p")((lambda p, g, c: p + c.lr * g) if group["up"] else (lambda p, g, c: p - c.lr * g))
        return {}, (step,)

    def constants(self, group, t):
        return {"lr": group["lr"]}


def test_groups_may_run_different_stages_on_the_same_moments():
    a, b = Parameter(torch.zeros(3)), Parameter(torch.zeros(3))
    opt = TwoPlans([{"params": [a]}, {"params": [b], "up": True}], {"lr": 1.0, "up": False})
    a.grad = b.grad = torch.ones(3)
    opt.step()
    assert a.tolist() == [-1] * 3 and b.tolist() == [1] * 3


def test_a_stabilizer_that_needs_a_moment_the_rule_has_not_is_refused():
    with pytest.raises(ValueError, match=r"SpikeClip.* reads 'v', which SignMomentum has not"):
        SignMomentum([Parameter(torch.ones(2))], stabilize=(SpikeClip(),))
    with pytest.raises(TypeError, match="is not a stabilizer"):
        AdamW([Parameter(torch.ones(2))], stabilize=(AdaClip,))


# --- promises ------------------------------------------------------------------------------------------------------


@guarded_cases
@pytest.mark.parametrize("name", STATE_FORMATS)
def test_a_coordinate_without_a_gradient_never_moves(case: Case, name: str):
    """Zero stays zero in every format: m is exactly 0, so p stays, whatever its neighbours do."""
    named = parameters([(64, 64), (33, 300)])
    opt = case.build(named, states=name, weight_decay=0.0, state_rounding="stochastic")
    start = {n: p.detach().clone() for n, p in named}
    dead = {n: torch.rand(p.shape, generator=torch.Generator().manual_seed(5)) < 0.3 for n, p in named}
    for t in range(1, 10):
        for n, p in named:
            p.grad = gradient(tuple(p.shape), t).masked_fill(dead[n], 0.0)
        opt.step()
    for n, p in named:
        assert torch.equal(p.detach()[dead[n]], start[n][dead[n]])
        assert (p.detach()[~dead[n]] != start[n][~dead[n]]).float().mean() > 0.9


@guarded_cases
@pytest.mark.parametrize(
    "name", ["fp32", "bf16", "fp16", "8bit", "4bit", "dyn8", "log4", "solo4", "solo2", "e5m2", "nf4"]
)
@pytest.mark.parametrize("bad", [NAN, -INF])
def test_a_bad_gradient_harms_nothing(case: Case, name: str, bad: float):
    """Its step block, or its tensor where the rule measures, is left to the last bit, and counted; the rest goes on."""
    named, others = parameters([(33, 300), (64, 64)]), parameters([(33, 300), (64, 64)])
    opt, clean = case.build(named, states=name), case.build(others, states=name)
    train(opt, named, range(1, 3))
    train(clean, others, range(1, 3))
    before = everything(opt)
    p, q = named[0][1], others[0][1]
    for (n, x), (_, y) in zip(named, others, strict=True):
        x.grad = gradient(tuple(x.shape), 3, int(n[1]))
        y.grad = x.grad.clone()
    p.grad[5, 20] = bad
    opt.step()
    clean.step()
    after, good = everything(opt), everything(clean)
    assert_same({k: v for k, v in after.items() if k[2:3] == "1"}, {k: v for k, v in good.items() if k[2:3] == "1"})
    kept = {k[4:]: v for k, v in before.items() if k.startswith("0.0 ") and isinstance(v, Tensor)}
    now = {k: v for k, v in [("p", p.detach()), *opt.state[p].items()] if isinstance(v, Tensor)}
    fine = {k: v for k, v in [("p", q.detach()), *clean.state[q].items()] if isinstance(v, Tensor)}
    if case.unit == "tensor":
        assert opt.counters()["skipped_tensors"] == 1
        assert {k for k in now if not torch.equal(now[k], kept[k])} == {"step", "skipped"}
        return
    assert opt.counters() == {"skipped_blocks": 1, "skipped_tensors": 0}
    formats = {m.name: opt._slots[p].formats[letter] for letter, m in opt._slots[p].program.moments.items()}
    for k, v in now.items():
        if v.dim() != 2:
            assert k in ("step", "skipped", "exp_avg_weight", "exp_avg_sq_weight")
            continue
        moment = next((m for m in formats if k.removesuffix("_scale").removesuffix("_base") == m), "")
        if k == "p" or not formats[moment].compressed:
            first = 256
        else:
            first = 256 * formats[moment].bits // 8 if k == moment else 256 // formats[moment].block[1]
        block = torch.zeros_like(v, dtype=torch.bool)
        block[5, :first] = True
        assert torch.equal(v[block], kept[k][block]) and torch.equal(v[~block], fine[k][~block]), k
        assert k not in ("p", "exp_avg") or not torch.equal(fine[k][block], kept[k][block])


@pytest.mark.parametrize("name", ["fp32", "bf16", "8bit", "4bit", "solo4", "e4m3", "fp16"])
def test_a_value_that_cannot_be_stored_leaves_its_block(name: str):
    """|g| = 1e25 is finite and its square is not."""
    p = Parameter(torch.zeros(64, 512))
    opt = AdamW([p], lr=0.1, states=name, weight_decay=0.0)
    p.grad = torch.ones(64, 512)
    p.grad[3, 300] = 1e25
    opt.step()
    moved = p.detach() != 0
    assert not moved[3, 256:].any() and moved.sum() == 64 * 512 - 256
    assert not opt.state[p]["exp_avg"][3, opt.state[p]["exp_avg"].shape[1] // 2 :].any()
    assert opt.counters() == {"skipped_blocks": 1, "skipped_tensors": 0}


@pytest.mark.parametrize("name", STATE_FORMATS)
def test_small_gradients_do_not_explode(name: str):
    """A second moment below the range of a format (1e-11 in fp16) is not stored as 0: its root divides the step."""
    p = Parameter(torch.zeros(64, 64))
    opt = AdamW([p], lr=1e-3, weight_decay=0.0, states=name)
    for t in range(1, 11):
        p.grad = 0.01 * gradient((64, 64), t).clamp(-0.01, 0.01)
        opt.step()
    assert p.detach().abs().max() < 0.1


@pytest.mark.parametrize("eps", [0.0, 1e-8])
def test_eps_zero_is_allowed(eps: float):
    """Beyond the end of a row 0 / 0 is no value."""
    mine, theirs = twins(((16, 300), (50,)))
    opt, ref = AdamW(mine, eps=eps, states="fp32"), torch.optim.AdamW(theirs, eps=eps)
    for t in range(1, 5):
        for p, q in zip(mine, theirs, strict=True):
            p.grad = gradient(tuple(p.shape), t).sign() + 0.5
            q.grad = p.grad.clone()
        opt.step()
        ref.step()
    assert_close(mine, theirs)
    assert opt.counters()["skipped_blocks"] == 0


def test_a_large_spike_is_forgotten_when_beta_is_zero():
    mine, theirs = twins(((4, 8),))
    opt, ref = AdamW(mine, betas=(0.0, 0.999), states="fp32"), torch.optim.AdamW(theirs, betas=(0.0, 0.999))
    for size in (1e5, 0.1, 1e-4):
        for p in (*mine, *theirs):
            p.grad = torch.full((4, 8), size)
        opt.step()
        ref.step()
    torch.testing.assert_close(opt.state[mine[0]]["exp_avg"], ref.state[theirs[0]]["exp_avg"], rtol=1e-6, atol=0)
