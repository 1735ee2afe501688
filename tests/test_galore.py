"""GaLore, Fira, APOLLO: the authors' trajectories, projectors, refresh, full rank, states in low bits."""

import copy
import itertools
import math
from typing import Any

import numpy as np
import oracles_matrix
import oracles_optim
import pytest
import torch
from cases import (
    COMPRESSED,
    assert_close,
    assert_same,
    dequantized,
    everything,
    gradient,
    parameters,
    train,
)  # fmt: skip
from cases import one_thread as one_thread
from matrix_cases import HEAD, follow
from torch import Tensor
from torch.nn import Parameter

from lowbit import backends, layout
from lowbit.optim import APOLLO, AdaClip, AdaGN, APOLLOMini, Fira, GaLore, Rule, SpikeClip
from lowbit.optim.galore import leading
from lowbit.policy import resolve

OPTIMIZERS = {"galore": GaLore, "fira": Fira, "apollo": APOLLO}
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


def inject(opt: Any, named: dict[str, Parameter], t: int, run: Any) -> None:
    """The authors' projectors, from the steps at which they began to use them."""
    for n, p in named.items():
        if f"proj/{n}/from_step_{t}" in run:
            opt.set_projector(p, torch.from_numpy(run[f"proj/{n}/from_step_{t}"]))


@every_optimizer
def test_projected_optimizers_follow_the_released_code(name: str):
    hyper = {"rank": 8, "update_interval": 7, "weight_decay": 0.05, "states": "fp32", "roles": HEAD}
    opt, named, run = follow(lambda ps: OPTIMIZERS[name](ps, **hyper), name, 3e-3, 2e-6, inject)
    for n, p in named.items():
        state = opt.state[p]
        np.testing.assert_allclose(state["exp_avg"], run[f"state/{n}/exp_avg"], rtol=0, atol=1e-7)
        np.testing.assert_allclose(state["exp_avg_sq"], run[f"state/{n}/exp_avg_sq"], rtol=1e-4, atol=1e-9)
        kept = [run[key] for key in run if key in (f"state/{n}/scaling_grad", f"state/{n}/scaled_grad")]
        if kept:
            assert float(state["limited_norm"]) == pytest.approx(float(kept[0]), rel=1e-5)
    assert {opt._slots[p].kind for p in named.values()} == {"projected", "other"}


def test_other_projectors_would_not_do():
    """What the comparison above rests on: another basis of the same gradients ends elsewhere."""
    hyper = {"rank": 8, "update_interval": 7, "weight_decay": 0.05, "states": "fp32", "roles": HEAD}
    with pytest.raises(AssertionError):
        follow(lambda ps: APOLLO(ps, **hyper), "apollo", 3e-3, 2e-6)


# --- the projector -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (12, 3, 5)], ids=str)
def test_the_projector_is_the_leading_singular_vectors(shape: tuple[int, ...]):
    [(_, p)] = named = parameters([shape])
    opt = GaLore(named, rank=4, states="fp32")
    train(opt, named, range(1, 2))
    rows, cols = layout.rows_of(shape)
    q = opt.state[p]["projector"].double()
    g = p.grad.double().reshape(rows, cols)
    assert q.shape == (4, min(rows, cols))
    u, _, vh = torch.linalg.svd(g, full_matrices=False)
    expected = vh[:4] if rows >= cols else u.mT[:4]
    torch.testing.assert_close((q @ expected.mT).abs(), torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-4)


@pytest.mark.parametrize("interval", [1, 3, 200])
def test_the_projector_is_refreshed_when_it_is_due(interval: int):
    """In steps 1, 1 + interval, ...; the moments stay as they are."""
    [(_, p)] = named = parameters([(20, 30)])
    opt, seen = GaLore(named, rank=4, update_interval=interval, states="fp32"), []
    for t in range(1, 8):
        before = opt.state[p]["projector"].clone()
        train(opt, named, range(t, t + 1))
        seen.append(not torch.equal(before, opt.state[p]["projector"]))
    assert seen == [(t - 1) % interval == 0 for t in range(1, 8)]


@every_optimizer
@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf])
def test_a_refresh_waits_for_a_gradient(name: str, bad: float):
    """Zeros, NaN and infinity do not crash SVD, nor give 200 steps of an arbitrary subspace."""
    [(_, p)] = named = parameters([(20, 30)])
    opt: Rule = OPTIMIZERS[name](named, rank=4, states="fp32", **({"proj": "svd"} if name == "apollo" else {}))
    before = p.detach().clone()
    for _ in range(2):
        p.grad = torch.full((20, 30), bad)
        opt.step()
    assert torch.equal(p, before) and not opt.state[p]["projector"].any()
    train(opt, named, range(3, 4))
    assert float(opt.state[p]["projector_due"]) == 203 and opt.state[p]["projector"].any()
    assert not torch.equal(p, before) and p.isfinite().all()


def test_svd_that_does_not_converge(monkeypatch: pytest.MonkeyPatch):
    g = gradient((20, 30), 1)
    expected = leading(g, 4)

    def fails(*_: Any, **__: Any) -> None:
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "svd", fails)
    torch.testing.assert_close((leading(g, 4) @ expected.mT).abs(), torch.eye(4), rtol=0, atol=1e-4)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_gradients_of_any_magnitude_have_a_subspace(scale: float):
    g = gradient((20, 30), 1)
    torch.testing.assert_close((leading(g * scale, 3) @ leading(g, 3).mT).abs(), torch.eye(3), rtol=0, atol=1e-3)


def test_lazy_refresh_waits_longer_where_the_subspace_stays():
    """The same gradients: after five similarities in a row the interval doubles; signs do not matter."""
    hyper = {"rank": 2, "update_interval": 2, "states": "fp32"}
    [(_, p)], [(_, q)] = parameters([(20, 30)]), parameters([(20, 30)])
    lazy, eager = GaLore([("p0", p)], cos_threshold=0.4, **hyper), GaLore([("p0", q)], cos_threshold=0.4, **hyper)
    for t in range(1, 16):
        p.grad = gradient((20, 30), 1) * (-1) ** t
        q.grad = gradient((20, 30), t)
        lazy.step()
        eager.step()
    # Refreshed in steps 1, 3, 5, 7, 9, 11 (the fifth similarity) and 15.
    assert float(lazy.state[p]["projector_patience"]) == 4 and float(lazy.state[p]["projector_due"]) == 15 + 8
    assert float(eager.state[q]["projector_patience"]) == 1


def test_a_gradient_that_turns_keeps_the_interval():
    [(_, p)] = named = parameters([(20, 30)])
    opt = GaLore(named, rank=2, update_interval=1, cos_threshold=0.999, states="fp32")
    train(opt, named, range(1, 12))
    assert float(opt.state[p]["projector_patience"]) == 1 and float(opt.state[p]["similarity_0"]) >= 0


def test_random_projectors_depend_on_seed_name_and_step_only():
    found = {}
    for seed, names in ((0, "ab"), (0, "ba"), (1, "ab")):
        params = {n: Parameter(torch.ones(20, 30)) for n in names}
        opt = APOLLO(list(params.items()), rank=4, update_interval=2, seed=seed, states="fp32")
        for t in range(1, 4):
            before = {n: opt.state[p]["projector"].clone() for n, p in params.items()}
            for p in params.values():
                p.grad = gradient((20, 30), t)
            opt.step()
            if t == 2:
                assert all(torch.equal(before[n], opt.state[p]["projector"]) for n, p in params.items())
        found[seed, names] = {n: (before[n], opt.state[p]["projector"]) for n, p in params.items()}
    for n in "ab":
        (old, new), (same_old, same_new), (other, _) = (each[n] for each in found.values())
        assert torch.equal(old, same_old) and torch.equal(new, same_new)
        assert not torch.equal(old, new) and not torch.equal(old, other)
    assert not torch.equal(found[0, "ab"]["a"][0], found[0, "ab"]["b"][0])


def test_a_random_projector_keeps_lengths_on_average():
    p = Parameter(torch.zeros(200, 300))
    opt = APOLLO([("p", p)], rank=100, states="fp32")
    p.grad = gradient((200, 300), 1)
    opt.step()
    q = opt.state[p]["projector"]
    assert float(q.square().sum(0).mean()) == pytest.approx(1.0, rel=0.03) and abs(float(q.mean())) < 0.003


def test_set_projector_takes_rows_or_columns_and_nothing_else():
    wide, tall, small = Parameter(torch.zeros(20, 30)), Parameter(torch.zeros(30, 20)), Parameter(torch.zeros(4, 9))
    opt = GaLore([("wide", wide), ("tall", tall), ("small", small)], rank=5, states="fp32")
    q = torch.randn(5, 20)
    for p in (wide, tall):
        for given in (q, q.mT):
            opt.set_projector(p, given)
            assert torch.equal(opt.state[p]["projector"], q)
    for given in (torch.zeros(5, 30), torch.zeros(100), torch.full((5, 20), math.nan)):
        with pytest.raises(ValueError, match=r"wide: a projector has shape \(5, 20\)"):
            opt.set_projector(wide, given)
    with pytest.raises(ValueError, match="small: has no projector in this optimizer"):
        opt.set_projector(small, torch.zeros(4, 4))
    with pytest.raises(ValueError, match="the parameter: has no projector"):
        opt.set_projector(Parameter(torch.zeros(20, 30)), q)


# --- full rank, kinds ----------------------------------------------------------------------------------------------


@every_optimizer
@pytest.mark.parametrize("shape", [(7, 33), (33, 7)], ids=str)
def test_a_rank_of_no_less_than_the_shorter_side_is_full_rank(name: str, shape: tuple[int, int]):
    """Plain Adam, said by explain; one less is projected."""
    for rank in (7, 100):
        [(_, p)], [(_, q)] = parameters([shape]), parameters([shape])
        opt = OPTIMIZERS[name]([("p0", p)], rank=rank, lr=0.01, weight_decay=0.1, states="fp32")
        assert opt.explain().rows[0].kind == "full rank" and "full rank" in str(opt.explain())
        x, s = q.detach().double().numpy(), {"exp_avg": 0, "exp_avg_sq": 0, "exp_avg_weight": 0, "exp_avg_sq_weight": 0}
        hyper = {"lr": 0.01, "rank": rank, "update_interval": 200, "scale": 0.25, "weight_decay": 0.1}
        for t in range(1, 6):
            train(opt, [("p0", p)], range(t, t + 1))
            x = oracles_matrix.galore(x, p.grad.double().numpy(), s, t, **hyper)
        np.testing.assert_allclose(p.detach(), x, atol=1e-6)
    assert OPTIMIZERS[name]([("p0", Parameter(torch.zeros(shape)))], rank=6).explain().rows[0].kind == "projected"


def test_embeddings_head_and_vectors_are_not_projected():
    shapes = {"emb": (50, 20), "head": (50, 20), "norm": (20,), "w": (20, 30), "conv": (12, 4, 5)}
    named = [(n, Parameter(torch.zeros(s))) for n, s in shapes.items()]
    opt = GaLore(named, rank=4, roles={"emb": "embedding", "head": "head"})
    assert [row.kind for row in opt.explain().rows] == ["other", "other", "other", "projected", "projected"]


@every_optimizer
def test_a_constant_gradient_in_its_own_subspace_moves_as_by_adam(name: str):
    """Rank 1 of a matrix of rank 1 loses nothing: GaLore's direction is Adam's in that direction."""
    g = torch.outer(torch.linspace(1, 2, 20), torch.linspace(-1, 1, 30))
    p = Parameter(torch.zeros(20, 30))
    opt = OPTIMIZERS[name](
        [("p", p)], rank=1, lr=0.1, scale=1.0, states="fp32", **({"proj": "svd"} if name == "apollo" else {})
    )
    p.grad = g
    opt.step()
    q = opt.state[p]["projector"][0]
    low = q @ g
    expected = torch.outer(q, low / (low.abs() + 1e-6 / 0.001**0.5)) * -0.1
    torch.testing.assert_close(p.detach(), expected, rtol=0, atol=1e-3)


# --- states --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMPRESSED)
@pytest.mark.parametrize("optimizer", ["galore", "fira"])
def test_low_rank_states_are_decoded_and_encoded(optimizer: str, name: str):
    """Both moments and the projector in every format: a step is decode, rule, encode."""
    if not resolve(name, "exp_avg", signed=False).compressed:
        pytest.skip("no block format")
    try:
        resolve(name, "exp_avg", signed=True)
    except ValueError:
        pytest.skip("for non-negative moments only")
    hyper = {"lr": 1e-2, "rank": 64, "update_interval": 3, "scale": 0.25, "weight_decay": 0.1}
    named = parameters([(70, 300), (300, 70), (80, 9, 10)])
    opt: Rule = OPTIMIZERS[optimizer](named, states=name, **hyper)
    train(opt, named, range(1, 3))
    for t in (3, 4):
        before = {n: (p.detach().double().numpy().copy(), dict(opt.state[p])) for n, p in named}
        old = {n: {m: dequantized(opt, p, m).double().numpy() for m in PROJECTED} for n, p in named}
        scalars = {
            n: {k: float(v) for k, v in s.items() if isinstance(v, Tensor) and not v.dim()}
            for n, (_, s) in before.items()
        }
        train(opt, named, range(t, t + 1))
        for n, p in named:
            assert all(fmt.compressed for fmt in opt._slots[p].formats.values())
            s = {**scalars[n], **old[n]}
            turned = p.shape[0] >= layout.rows_of(p.shape)[1]
            for m in ("exp_avg", "exp_avg_sq") if turned else ():
                s[m] = s[m].T
            if t == 4:  # a new projector is what is stored of it, in its own step
                s["projector"] = dequantized(opt, p, "projector").double().numpy()
            expected = getattr(oracles_matrix, optimizer)(before[n][0], p.grad.double().numpy(), s, 5, **hyper)
            np.testing.assert_allclose(p.detach(), expected, rtol=0, atol=3e-6, err_msg=f"{t} {n}")
            values = s["exp_avg"].T if turned else s["exp_avg"]
            fmt = opt._slots[p].formats["m"]
            wanted = backends.decode(
                fmt, backends.encode(fmt, torch.from_numpy(values).float().contiguous()), values.shape[1]
            )
            assert float(((dequantized(opt, p, "exp_avg") - wanted).abs() > 1e-4 * wanted.abs()).float().mean()) < 2e-3


PROJECTED = ("exp_avg", "exp_avg_sq", "projector")


def test_q_galores_states():
    """INT4 projector and INT8 moments: a fifth of GaLore's bytes, and the loss falls as with fp32 states."""
    ends, sizes = {}, {}
    small = {"exp_avg": "8bit", "exp_avg_sq": "8bit", "projector": "int4"}
    for name, states in (("fp32", "fp32"), ("q", small)):
        torch.manual_seed(0)
        w, x, y = Parameter(torch.zeros(128, 256)), torch.randn(512, 256), torch.randn(512, 128)
        opt = GaLore([("w", w)], lr=0.02, rank=64, update_interval=20, scale=1.0, states=states, cos_threshold=0.4)
        for _ in range(120):
            opt.zero_grad()
            loss = (x @ w.mT - y).square().mean()
            loss.backward()
            opt.step()
        ends[name], sizes[name] = loss.item(), opt.state_bytes()
    assert sizes["q"] < 0.25 * sizes["fp32"] and opt.state[w]["projector"].shape == (64, 64)
    assert ends["q"] == pytest.approx(ends["fp32"], rel=0.02) and ends["q"] < 0.7


@every_optimizer
def test_resuming_between_refreshes(name: str):
    hyper = {"rank": 64, "update_interval": 4, "states": "4bit", "state_rounding": "stochastic"}
    if name == "galore":
        hyper["cos_threshold"] = 0.1
    named = parameters([(70, 300), (300, 70)])
    opt: Rule = OPTIMIZERS[name](named, **hyper)
    train(opt, named, range(1, 7))
    other = [(n, Parameter(p.detach().clone())) for n, p in named]
    fresh: Rule = OPTIMIZERS[name](other, **hyper)
    fresh.load_state_dict(copy.deepcopy(opt.state_dict()))
    train(opt, named, range(7, 14))
    train(fresh, other, range(7, 14))
    assert_same(everything(opt), everything(fresh))


def test_states_load_into_another_format_and_another_rank_is_refused():
    named = parameters([(70, 300)])
    opt = GaLore(named, rank=64, states="fp32")
    train(opt, named, range(1, 4))
    p = named[0][1]
    other = GaLore([("p0", Parameter(p.detach().clone()))], rank=64, states="8bit")
    other.load_state_dict(opt.state_dict())
    q = other.param_groups[0]["params"][0]
    for moment in PROJECTED:
        exact, stored = opt.state[p][moment], dequantized(other, q, moment)
        assert 0 < float((stored - exact).norm() / exact.norm()) < 0.02
    wider = GaLore([("p0", Parameter(p.detach().clone()))], rank=69)
    wider.load_state_dict(opt.state_dict())  # the file's rank, as every hyper-parameter
    assert (
        wider.param_groups[0]["rank"] == 64
        and wider.state[wider.param_groups[0]["params"][0]]["projector"].shape[0] == 64
    )
    damaged = copy.deepcopy(opt.state_dict())
    damaged["state"][0]["projector"] = damaged["state"][0]["projector"][:10]
    with pytest.raises(ValueError, match=r"p0: the checkpoint's 'projector' has shape \(10, 70\)"):
        other.load_state_dict(damaged)
    opt.param_groups[0]["rank"] = 65
    with pytest.raises(RuntimeError, match="rank of its group changed since the state was made"):
        train(opt, named, range(4, 5))


@every_optimizer
@pytest.mark.parametrize("rank", [4, 100])
def test_beta1_may_follow_a_cosine(name: str, rank: int):
    """Debiased by accumulated weights, so exactly; in full rank too."""
    hyper = {"lr": 0.01, "rank": rank, "update_interval": 200, "scale": 0.25}
    [(_, p)] = named = parameters([(20, 30)])
    x, s = p.detach().double().numpy(), oracles_optim.fresh(p.detach().double().numpy())
    own = {"proj": "svd"} if name == "apollo" else {}
    opt: Rule = OPTIMIZERS[name](named, states="fp32", betas=(0.8, 0.9), beta1_annealing=6, eta_min=0.1, **hyper, **own)
    for t in range(1, 10):
        p.grad = torch.randn(20, 30, generator=torch.Generator().manual_seed(t))
        opt.step()
        beta1 = 0.8 * (0.1 + 0.9 * (1 + math.cos(math.pi * min(t / 7, 1.0))) / 2)
        x = getattr(oracles_matrix, name)(x, p.grad.double().numpy(), s, t, betas=(beta1, 0.9), **hyper)
        np.testing.assert_allclose(p.detach(), x, atol=1e-5, err_msg=str(t))


# --- growth, scales ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fira", "apollo"])
def test_the_norm_grows_by_one_percent_at_most(name: str):
    """Where it would grow by more; and a first gradient of zeros does not hold the next ones back for ever."""
    [(_, p)] = named = parameters([(20, 30)])
    opt: Rule = OPTIMIZERS[name](named, rank=4, lr=0.0, states="fp32", scale=1.0)
    p.grad = torch.zeros(20, 30)
    opt.step()
    norms = []
    for t in range(2, 12):
        p.grad = gradient((20, 30), t)
        opt.step()
        norms.append(float(opt.state[p]["limited_norm"]))
    growth = [new / old for old, new in itertools.pairwise(norms)]
    assert norms[0] > 1e-3 and max(growth) == pytest.approx(1.01, abs=1e-5)


def test_growth_may_be_left_free():
    [(_, p)] = named = parameters([(20, 30)])
    opt = APOLLO(named, rank=4, lr=0.0, states="fp32", limit_growth=False)
    norms = []
    for t in range(1, 12):
        train(opt, named, range(t, t + 1))
        norms.append(float(opt.state[p]["limited_norm"]))
    assert max(new / old for old, new in itertools.pairwise(norms)) > 1.05


def test_apollo_minis_defaults_are_those_of_its_runs():
    """Rank 1, one scale for the tensor, times the root of 128, lr 0.01, a projector every 200 steps, as released."""
    group = APOLLOMini([("w", Parameter(torch.ones(8, 6)))]).param_groups[0]
    names = ("lr", "rank", "scale_type", "scale", "update_interval", "weight_decay")
    assert [group[name] for name in names] == [0.01, 1, "tensor", 128.0, 200, 0.0]


def test_apollo_mini_is_apollo_of_rank_1():
    hyper = {"rank": 1, "scale_type": "tensor", "scale": 128.0}
    one, two = parameters([(20, 30), (9,)]), parameters([(20, 30), (9,)])
    mini, same = APOLLOMini(one, states="fp32"), APOLLO(two, states="fp32", **hyper)
    train(mini, one, range(1, 4))
    train(same, two, range(1, 4))
    assert_same(everything(mini), everything(same))
    p = one[0][1]
    assert opt_bytes(mini, p) < 4 * (2 * 30 + 20) + 100


def opt_bytes(opt: Rule, p: Parameter) -> int:
    return sum(v.nbytes for v in opt.state[p].values() if isinstance(v, Tensor))


@pytest.mark.parametrize("front", [False, True])
@pytest.mark.parametrize("scale_type", ["channel", "tensor"])
@pytest.mark.parametrize("shape", [(20, 30), (30, 20)], ids=str)
def test_apollos_scales(shape: tuple[int, int], scale_type: str, front: bool):
    hyper = {"lr": 0.01, "rank": 4, "update_interval": 1000, "scale": 3.0, "weight_decay": 0.1}
    [(_, p)] = named = parameters([shape])
    x, s = p.detach().double().numpy(), {"exp_avg_weight": 0.0, "exp_avg_sq_weight": 0.0}
    opt = APOLLO(named, states="fp32", scale_type=scale_type, scale_front=front, **hyper)
    s["projector"] = torch.randn(4, 20, generator=torch.Generator().manual_seed(0)).double().numpy()
    opt.set_projector(p, torch.from_numpy(s["projector"]).float())
    s["projector"] = opt.state[p]["projector"].double().numpy()
    for t in range(1, 6):
        train(opt, named, range(t, t + 1))
        if t == 1:
            s.update(exp_avg=0.0, exp_avg_sq=0.0, limited_norm=0.0)
        own = {**hyper, "whole": scale_type == "tensor", "front": front}
        x = oracles_matrix.apollo(x, p.grad.double().numpy(), s, t + 1, **own)
        np.testing.assert_allclose(p.detach(), x, atol=1e-6)


def test_firas_paper_form_leaves_out_the_whole_projection():
    """With scale 1 the two are the same; else not."""
    found = {}
    for scale in (1.0, 0.25):
        for variant in ("paper", "official"):
            named = parameters([(20, 30)])
            opt = Fira(named, rank=4, scale=scale, variant=variant, states="fp32", lr=0.01)
            train(opt, named, range(1, 4))
            found[scale, variant] = named[0][1].detach()
    assert torch.equal(found[1.0, "paper"], found[1.0, "official"])
    assert not torch.equal(found[0.25, "paper"], found[0.25, "official"])
    x, s = parameters([(20, 30)])[0][1].detach().double().numpy(), {"exp_avg_weight": 0.0, "exp_avg_sq_weight": 0.0}
    hyper = {"lr": 0.01, "rank": 4, "update_interval": 200, "scale": 0.25, "official": False}
    for t in range(1, 4):
        x = oracles_matrix.fira(x, gradient((20, 30), t).double().numpy(), s, t, **hyper)
    np.testing.assert_allclose(found[0.25, "paper"], x, atol=4e-6)


def test_stabilizers_in_front_of_a_projection():
    """The projector is of the gradient that the stabilizers left: AdaGN makes the scale of the gradient not matter."""
    found = []
    for scale in (1.0, 1024.0):
        [(_, p)] = parameters([(20, 30)])
        opt = GaLore([("p", p)], rank=4, states="fp32", stabilize=(AdaClip(), AdaGN()), lr=0.01)
        for t in range(1, 4):
            p.grad = gradient((20, 30), t) * scale
            opt.step()
        found.append(p)
    assert_close(found[:1], found[1:], atol=3e-4)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rank": 0}, "rank must be a whole number of at least 1, not 0"),
        ({"rank": -3}, "rank must be a whole number of at least 1, not -3"),
        ({"rank": 2.5}, "rank must be a whole number of at least 1, not 2.5"),
        ({"rank": True}, "rank must be a whole number"),
        ({"update_interval": 0}, "update_interval must be a whole number of at least 1"),
        ({"update_interval": 1.5}, "update_interval must be a whole number"),
        ({"scale": 0.0}, "scale must be a finite number > 0"),
        ({"scale": math.nan}, "scale must be a finite number > 0"),
        ({"lr": math.inf}, "lr must be a finite number"),
        ({"betas": (0.9,)}, "betas must be two numbers"),
        ({"states": {"projectr": "int4"}}, "names 'projectr', which is no moment .* .did you mean 'projector'"),
    ],
    ids=str,
)
@every_optimizer
def test_bad_arguments(name: str, options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        OPTIMIZERS[name]([Parameter(torch.ones(4, 4))], **options)


@pytest.mark.parametrize(
    "optimizer, options, message",
    [
        (GaLore, {"cos_threshold": 1.0}, "cos_threshold must be in"),
        (GaLore, {"cos_threshold": -0.1}, "cos_threshold must be in"),
        (
            GaLore,
            {"rank": 2, "stabilize": (SpikeClip(),)},
            r"SpikeClip.* reads 'v', which GaLore keeps as \(4, 2\)",
        ),
        (GaLore, {"gamma_proj": 0.5}, "gamma_proj must be a finite number >= 1"),
        (Fira, {"variant": "papr"}, "unknown variant 'papr' .did you mean 'paper'"),
        (APOLLO, {"scale_type": "row"}, "unknown scale_type 'row'"),
        (APOLLO, {"proj": "svdd"}, "unknown proj 'svdd' .did you mean 'svd'"),
    ],
)
def test_bad_arguments_of_one(optimizer: Any, options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        optimizer([Parameter(torch.ones(4, 4))], **options)
