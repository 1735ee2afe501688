"""What optimizers compute, for every parameter and gradient they may meet, with states in every format."""

import math

import numpy as np
import oracles_optim
import pytest
import torch
from cases import (
    COMPRESSED,
    PRESETS,
    SHAPES,
    SMALL_SHAPES,
    Case,
    as_reference,
    assert_close,
    assert_same,
    dequantized,
    every_case,
    every_preset,
    everything,
    feed,
    gradient,
    parameters,
    train,
    twins,
)  # fmt: skip
from cases import one_thread as one_thread
from torch import Tensor, nn
from torch.nn import Parameter

from lowbit import backends, layout
from lowbit.optim import (
    AdamW,
    StableSPAM,
)  # fmt: skip
from lowbit.words import abs

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
    if not {"betas", "momentum"} & opt.defaults.keys():
        pytest.skip("has neither betas nor a momentum")
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, 1e-2, total_steps=60, cycle_momentum=True)
    x, s = p.detach().double().numpy(), oracles_optim.fresh(p.detach().double().numpy())
    seen = set()
    for t in range(1, 51):
        p.grad = gradient((7, 33), t)
        group = opt.param_groups[0]
        now = {k: group[k] for k in ("lr", "betas", "momentum") if k in group}
        seen.add(now["betas"][0] if "betas" in now else now["momentum"])
        x = case.oracle(x, p.grad.double().numpy(), s, t, **{**case.hyper, **now})
        opt.step()
        schedule.step()
        np.testing.assert_allclose(p.detach(), x, rtol=2e-6, atol=3e-6)
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


@every_case
@pytest.mark.parametrize("name", COMPRESSED)
def test_a_step_is_decode_rule_encode(case: Case, name: str):
    """Every format, awkward shapes: p to 1e-6, and the new moments' nearest codes, but for ties that an ulp decides."""
    if case.low_rank:
        pytest.skip("states of other shapes: test_low_rank_states_are_decoded_and_encoded")
    named = parameters(SHAPES)
    opt = case.build(named, states=name)
    train(opt, named, range(1, 3))
    wrong = total = 0
    for t in (3, 7):  # 7: a reset step
        for _, p in named:
            opt.state[p]["step"].fill_(t - 1)
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
                if moment.over != "value":
                    np.testing.assert_allclose(dequantized(opt, p, moment.name), s[moment.name], rtol=1e-5, err_msg=n)
                    continue
                assert fmt.compressed and (fmt.signed or not moment.signed)
                values = torch.from_numpy(s[moment.name]).float().reshape(layout.rows_of(p.shape))
                parts = backends.encode(fmt, values, live=not moment.signed)
                wanted = backends.decode(fmt, parts, values.shape[1]).reshape(p.shape)
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
        without = {k: v for k, v in {"reset_interval": 0, "total_steps": None}.items() if k in case.hyper}
        opt = case.build(model.named_parameters(), lr=1e-2, states=states, **without)
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
