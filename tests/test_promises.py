"""Zero stays zero, and a non-finite or enormous value harms nothing."""

import math

import pytest
import torch
from cases import (
    STATE_FORMATS,
    Case,
    assert_close,
    assert_same,
    everything,
    gradient,
    guarded_cases,
    parameters,
    train,
    twins,
)  # fmt: skip
from cases import one_thread as one_thread
from torch import Tensor
from torch.nn import Parameter

from lowbit.optim import (
    AdamW,
)  # fmt: skip

NAN, INF = math.nan, math.inf


@guarded_cases
@pytest.mark.parametrize("name", STATE_FORMATS)
def test_a_coordinate_without_a_gradient_never_moves(case: Case, name: str):
    """Zero stays zero in every format: m is exactly 0, so p stays, whatever its neighbours do."""
    if case.mixes:
        pytest.skip("a matrix function of its neighbours moves it: that is the method")
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
        assert k not in ("p", *list(case.signed)[:1]) or not torch.equal(fine[k][block], kept[k][block])


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
