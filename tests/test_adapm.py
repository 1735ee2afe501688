"""AdaPM: the properties of the reconstruction (lowbit/optim/adapm.py says which parts are the paper's)."""

import copy
import math

import numpy as np
import oracles_matrix
import oracles_optim
import pytest
import torch
from cases import assert_close, assert_same, everything, gradient, parameters, train
from cases import one_thread as one_thread
from torch.nn import Parameter

from lowbit.optim import AdamW, AdaPM, MomentumReset

SHAPES = [(20, 30), (30, 20)]


def run(params: list[tuple[str, Parameter]], opt, steps: int = 12) -> list[Parameter]:
    train(opt, params, range(1, steps + 1))
    return [p for _, p in params]


@pytest.mark.parametrize("rank", [20, 1000])
@pytest.mark.parametrize("states", ["fp32", "8bit"])
def test_a_rank_of_no_less_than_the_shorter_side_is_adamw(rank: int, states: str):
    """Bit for bit, and said by explain."""
    one, two = parameters([*SHAPES, (64, 20)]), parameters([*SHAPES, (64, 20)])
    opt, ref = AdaPM(one, rank=rank, states=states), AdamW(two, states=states)
    assert {row.kind for row in opt.explain().rows} == {"full rank"}
    assert_close(run(one, opt), run(two, ref), atol=0)


def test_rank_0_is_adamw_without_momentum():
    one, two = parameters(SHAPES), parameters(SHAPES)
    opt, ref = AdaPM(one, rank=0, states="fp32"), AdamW(two, betas=(0.0, 0.999), states="fp32")
    assert_close(run(one, opt), run(two, ref), atol=1e-7)
    assert all("exp_avg" not in state and "exp_avg_left" not in state for state in opt.state.values())


@pytest.mark.parametrize("interval", [1, 4])
@pytest.mark.parametrize("rank", [1, 5, 19])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_gradient_that_never_changes_is_followed_exactly(shape: tuple[int, int], rank: int, interval: int):
    """The momentum is the gradient in every step, so AdamW's step is lr in every value, decay aside."""
    [(_, p)], [(_, q)] = parameters([shape]), parameters([shape])
    opt = AdaPM([("p", p)], rank=rank, update_interval=interval, states="fp32", lr=0.01)
    ref = AdamW([("p", q)], states="fp32", lr=0.01)
    g = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    g = torch.where(g.abs() < 0.05, 0.05, g)
    for _ in range(10):
        p.grad = q.grad = g
        opt.step()
        ref.step()
        assert_close([p], [q], atol=4e-6)


def test_the_residual_is_what_makes_it_exact():
    [(_, p)], [(_, q)] = parameters([(20, 30)]), parameters([(20, 30)])
    opt = AdaPM([("p", p)], rank=2, residual_scale=0.0, states="fp32", lr=0.01)
    ref = AdamW([("p", q)], states="fp32", lr=0.01)
    for _ in range(3):
        p.grad = q.grad = gradient((20, 30), 1)
        opt.step()
        ref.step()
    assert float((p - q).detach().abs().max()) > 0.01


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_the_straight_line_statement(shape: tuple[int, int]):
    [(_, p)] = named = parameters([shape])
    x, s = p.detach().double().numpy(), oracles_optim.fresh(p.detach().double().numpy())
    opt = AdaPM(named, rank=4, states="fp32", lr=0.01)
    for t in range(1, 9):
        p.grad = torch.randn(shape, generator=torch.Generator().manual_seed(t))
        opt.step()
        x = oracles_matrix.adapm(x, p.grad.double().numpy(), s, t, lr=0.01, rank=4)
        np.testing.assert_allclose(p.detach(), x, atol=5e-6)


def test_the_product_follows_the_momentum_of_low_rank_gradients():
    """Gradients of one subspace of the rank: L R is the momentum itself, the residual nothing."""
    torch.manual_seed(0)
    p = Parameter(torch.zeros(20, 30))
    opt, left, m = AdaPM([("p", p)], rank=3, states="fp32"), torch.randn(20, 3), torch.zeros(20, 30)
    for _ in range(20):
        p.grad = left @ torch.randn(3, 30)
        m = 0.9 * m + 0.1 * p.grad
        opt.step()
    state = opt.state[p]
    torch.testing.assert_close(state["exp_avg_left"].mT @ state["exp_avg_right"], m, rtol=0, atol=1e-5)


def test_between_fits_the_left_factor_stays():
    [(_, p)] = named = parameters([(20, 30)])
    opt, moved = AdaPM(named, rank=4, update_interval=3, states="fp32"), []
    for t in range(1, 8):
        old = opt.state[p]["exp_avg_left"].clone()
        train(opt, named, range(t, t + 1))
        moved.append(not torch.equal(old, opt.state[p]["exp_avg_left"]))
    assert moved == [True, False, False, True, False, False, True]


ROLES = {
    "emb": "embedding",
    "*.q": "q",
    "*.k": "k",
    "*.v": "v",
    "*.o": "o",
    "*.up": "up",
    "head": "head",
    "*.qkv": "qkv",
}


def test_momentum_goes_by_role():
    shapes = {
        "emb": (50, 20), "a.q": (20, 20), "a.k": (20, 20), "a.v": (20, 20), "a.o": (20, 20), "a.up": (40, 20),
        "a.qkv": (60, 20), "b.qkv": (20, 60), "c.qkv": (40, 20), "norm": (20,), "head": (50, 20), "other": (20, 30),
    }  # fmt: skip
    named = [(n, Parameter(torch.zeros(s))) for n, s in shapes.items()]
    low, fused, full, none = "low rank", "low rank qkv", "full momentum", "no momentum"
    opt = AdaPM(named, rank=4, roles=ROLES)
    kinds = {row.name: row.kind for row in opt.explain().rows}
    assert kinds == {
        "emb": none, "a.q": low, "a.k": low, "a.v": full, "a.o": none, "a.up": low, "a.qkv": fused, "b.qkv": fused,
        "c.qkv": full, "norm": full, "head": full, "other": low,
    }  # fmt: skip
    states = {n: {k for k in opt.state[p] if k.startswith("exp_avg") and "weight" not in k} for n, p in named}
    assert states["a.q"] == {"exp_avg_left", "exp_avg_right", "exp_avg_sq"}
    assert states["a.o"] == {"exp_avg_sq"} and states["a.v"] == {"exp_avg", "exp_avg_sq"}
    for lm_head, kind in (("lowrank", low), ("none", none)):
        assert AdaPM(named, rank=4, lm_head=lm_head, roles=ROLES).explain().rows[-2].kind == kind


@pytest.mark.parametrize("tall", [True, False])
def test_a_fused_projection_is_queries_and_keys_beside_values(tall: bool):
    """Two thirds of a Linear's rows, or of a Conv1D's columns, as if they were alone; the rest as AdamW has it."""
    whole = Parameter(torch.zeros((60, 20) if tall else (20, 60)))
    low, value = Parameter(torch.zeros((40, 20) if tall else (20, 40))), Parameter(torch.zeros(20, 20))
    opt = AdaPM([("a.qkv", whole)], rank=4, roles={"*.qkv": "qkv"}, states="fp32", lr=0.01)
    apart = AdaPM([("a.q", low)], rank=4, roles={"*.q": "q"}, states="fp32", lr=0.01)
    ref = AdamW([("v", value)], states="fp32", lr=0.01)
    for t in range(1, 6):
        whole.grad = gradient(tuple(whole.shape), t)
        low.grad, value.grad = (x.clone() for x in whole.grad.tensor_split((40,), 0 if tall else 1))
        for each in (opt, apart, ref):
            each.step()
    a, b = whole.detach().tensor_split((40,), 0 if tall else 1)
    torch.testing.assert_close(a, low.detach(), rtol=0, atol=2e-6)
    torch.testing.assert_close(b, value.detach(), rtol=0, atol=1e-6)
    assert opt.state[whole]["exp_avg"].shape == (20, 20)


def test_mini_has_one_second_moment_per_row_or_head():
    named = [
        ("a.q", Parameter(torch.zeros(20, 30))),
        ("a.up", Parameter(torch.zeros(20, 30))),
        ("n", Parameter(torch.zeros(9))),
    ]
    opt = AdaPM(
        named, rank=2, second_moment="mini", head_dim=5, roles={"a.q": "q", "a.up": "up"}, lr=0.01, betas=(0.9, 0.99)
    )
    (q, up, n) = (p for _, p in named)
    for t in range(1, 4):
        for _, p in named:
            p.grad = gradient(tuple(p.shape), t)
        opt.step()
    assert [tuple(opt.state[p]["exp_avg_sq"].shape) for p in (q, up, n)] == [(4,), (20,), (1,)]
    v = torch.zeros(4)
    for t in range(1, 4):
        v = 0.99 * v + 0.01 * gradient((20, 30), t).square().view(4, -1).mean(1)
    torch.testing.assert_close(opt.state[q]["exp_avg_sq"], v)


def test_momentum_reset_starts_the_factors_anew():
    """Zero codes, and the next fit is a first one: exact for a gradient that never changes."""
    for late in (False, True):
        p, q = Parameter(torch.zeros(70, 80)), Parameter(torch.zeros(70, 80))
        hyper = {"stabilize": (MomentumReset(3, late=late),), "lr": 0.01}
        opt, ref = (
            AdaPM([("p", p)], rank=64, states="8bit", **hyper),
            AdaPM([("p", q)], rank=64, states="fp32", **hyper),
        )
        for t in range(1, 9):
            p.grad = q.grad = gradient((70, 80), 1 if t < 3 else 2)
            opt.step()
            ref.step()
            if late and t == 3:
                assert not opt.state[p]["exp_avg_left"].any() and not opt.state[p]["exp_avg_left_scale"].any()
        state = ref.state[q]
        product = state["exp_avg_left"].mT @ state["exp_avg_right"] / state["exp_avg_weight"]
        u, s, vt = torch.linalg.svd(gradient((70, 80), 2), full_matrices=False)
        torch.testing.assert_close(product, (u[:, :64] * s[:64]) @ vt[:64], rtol=0, atol=1e-4 * float(s[0]))


@pytest.mark.parametrize("bad", [0.0, math.nan])
def test_the_first_fit_waits_for_a_gradient(bad: float):
    p = Parameter(torch.zeros(20, 30))
    opt = AdaPM([("p", p)], rank=4, states="fp32")
    p.grad = torch.full((20, 30), bad)
    opt.step()
    assert float(opt.state[p]["fitted"]) == 0 and not p.any()
    train(opt, [("p0", p)], range(2, 3))
    assert float(opt.state[p]["fitted"]) == 1 and p.isfinite().all() and p.any()


@pytest.mark.parametrize("states", ["8bit", "4bit"])
def test_factors_are_stored_in_low_bits_and_resume(states: str):
    named = parameters([(140, 300), (300, 140)])
    opt = AdaPM(named, rank=32, states=states, second_moment="mini", state_rounding="stochastic")
    assert {opt.state[p]["exp_avg_left"].dtype for _, p in named} == {torch.uint8}
    train(opt, named, range(1, 5))
    other = [(n, Parameter(p.detach().clone())) for n, p in named]
    fresh = AdaPM(other, rank=32, states=states, second_moment="mini", state_rounding="stochastic")
    fresh.load_state_dict(copy.deepcopy(opt.state_dict()))
    train(opt, named, range(5, 9))
    train(fresh, other, range(5, 9))
    assert_same(everything(opt), everything(fresh))


def gpt2(layers: int, d: int, vocab: int) -> list[tuple[str, Parameter]]:
    shapes = {"wte": (vocab, d), "wpe": (1024, d)}
    for i in range(layers):
        shapes |= {f"{i}.qkv": (d, 3 * d), f"{i}.o": (d, d), f"{i}.up": (d, 4 * d), f"{i}.down": (4 * d, d)}
        shapes |= {f"{i}.n1": (d,), f"{i}.n2": (d,), f"{i}.bias": (3 * d,)}
    return [(n, Parameter(torch.empty(s, device="meta"))) for n, s in shapes.items()]


def test_over_90_percent_of_the_momentum_is_gone_at_gpt2_1_5b():
    """On meta tensors; embeddings have none at all, as published; and with Adam-mini's v the whole state is 5 %."""
    named = gpt2(48, 1600, 50257)
    roles = {"w*": "embedding", "*.qkv": "qkv", "*.o": "o", "*.up": "up", "*.down": "down", "*.bias": "bias"}
    opt = AdaPM(named, rank=30, roles=roles, states="fp32", second_moment="mini")
    count = sum(p.numel() for _, p in named)
    assert 1.5e9 < count < 1.6e9
    momentum = sum(
        opt.state[p][k].nbytes
        for _, p in named
        for k in ("exp_avg", "exp_avg_left", "exp_avg_right")
        if k in opt.state[p]
    )
    assert momentum < 0.1 * 4 * count
    body = sum(p.numel() for n, p in named if not n.startswith("w"))
    assert momentum < 0.1 * 1.12 * 4 * body  # 1600 values and 14 * 30 of 12 * 1600
    assert opt.state_bytes() < 0.06 * 8 * count


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rank": -1}, "rank must be a whole number of at least 0, not -1"),
        ({"rank": 1.5}, "rank must be a whole number of at least 0, not 1.5"),
        ({"update_interval": 0}, "update_interval must be a whole number of at least 1"),
        ({"residual_scale": -1.0}, "residual_scale must be a finite number >= 0"),
        ({"residual_scale": math.inf}, "residual_scale must be a finite number >= 0"),
        ({"update_clip": 0.0}, "update_clip must be above 0"),
        ({"lm_head": "half"}, "unknown lm_head 'half'"),
        ({"second_moment": "row"}, "unknown second_moment 'row'"),
        ({"head_dim": 0}, "head_dim must be a whole number of at least 1"),
        ({"head_dim": 3, "roles": {"w": "q"}}, "w: its 4 rows are not heads of head_dim=3 rows"),
        ({"betas": (0.9,)}, "betas must be two numbers"),
    ],
)
def test_bad_arguments(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        AdaPM([("w", Parameter(torch.ones(4, 4)))], **options)


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("hyper", [{"rank": 0}, {"rank": 4, "roles": {"w": "embedding"}}], ids=str)
def test_tensors_without_momentum_step_on_every_backend(monkeypatch, backend: str, hyper: dict):
    monkeypatch.setenv("LOWBIT_BACKEND", backend)
    p = Parameter(torch.ones(7, 300))
    opt = AdaPM([("w", p)], lr=0.5, weight_decay=0.0, **hyper)
    p.grad = torch.ones(7, 300)
    opt.step()
    torch.testing.assert_close(p.detach(), torch.full((7, 300), 0.5))


@pytest.mark.parametrize("spike", [1e18, 1e25, 3e38])
@pytest.mark.parametrize("at", [0, 5])
def test_a_huge_gradient_does_not_stop_later_steps(spike: float, at: int):
    p, moved = Parameter(torch.ones(16, 64)), 0
    opt = AdaPM([("w", p)], rank=4, states="fp32")
    for t in range(20):
        p.grad = torch.randn(16, 64, generator=torch.Generator().manual_seed(t))
        if t == at:
            p.grad[3, 3] = spike
        before = p.detach().clone()
        opt.step()
        moved += not torch.equal(before, p.detach())
    assert moved >= 19 and opt.counters()["skipped_tensors"] <= 1 and p.isfinite().all()
