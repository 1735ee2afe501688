"""SPAM with momentum for a part of each matrix: what is drawn, what moves, what is stored."""

import copy
import gc
import math
import pickle
from itertools import pairwise

import numpy as np
import oracles_optim
import pytest
import torch
from cases import assert_same, every_preset, everything, gradient, parameters, train
from cases import old_objects_left_alone as old_objects_left_alone
from cases import one_thread as one_thread
from torch import Tensor
from torch.nn import Parameter

from lowbit.optim import SPAM, AdaClip, GlobalClip, load_optimizer, save_optimizer

ORACLES = {"official": oracles_optim.spam_official, "paper": oracles_optim.spam_paper}
HYPER = {"lr": 1e-3, "threshold": 300.0, "reset_interval": 5, "warmup_steps": 2, "grace_steps": 1, "weight_decay": 0.1}
SHAPES = [(64, 256), (33, 301), (50,), (7, 33)]
both_variants = pytest.mark.parametrize("variant", ORACLES)


def chosen(opt: SPAM, p: Parameter) -> np.ndarray:
    """Which values have moments, by numpy's own unpacking."""
    bits = np.unpackbits(opt.state[p]["mask"].numpy(), axis=1, bitorder="little")
    assert not bits[:, p.shape[1] :].any()
    return bits[:, : p.shape[1]].astype(bool)


@both_variants
@pytest.mark.parametrize("density", [0.25, 0.5, 0.9])
def test_chosen_values_take_dense_steps_and_the_others_none(variant: str, density: float):
    """The dense statement on the chosen values; released code decays none of them, though it means to."""
    p = Parameter(parameters([(9, 41)])[0][1].detach())
    opt = SPAM([("w", p)], **HYPER, density=density, variant=variant, states="fp32")
    own = {**HYPER, "weight_decay": 0.0} if variant == "official" else HYPER
    x, kept = p.detach().double().numpy().copy(), round(density * 41)
    s = oracles_optim.fresh(np.zeros((9, kept)))
    moved = np.zeros((9, 41), dtype=bool)
    for t in range(1, 21):
        p.grad = gradient((9, 41), t)
        before, g = x.copy(), p.grad.clone()
        opt.step()
        mask = chosen(opt, p)
        assert (mask.sum(1) == kept).all() and torch.equal(p.grad, g)
        x[mask] = ORACLES[variant](
            before[mask].reshape(9, kept), g.double().numpy()[mask].reshape(9, kept), s, t, **own
        ).reshape(-1)
        np.testing.assert_allclose(p.detach(), x, rtol=0, atol=1e-6, err_msg=f"step {t}")
        moved |= mask
    assert moved.mean() > 1 - (1 - density) ** 5 - 0.1  # drawn five times
    np.testing.assert_allclose(opt.state[p]["exp_avg"], s["exp_avg"], rtol=1e-4, atol=1e-8)


def test_the_mask_is_drawn_anew_at_every_reset_and_only_then():
    p = Parameter(torch.zeros(8, 64))
    opt = SPAM([("w", p)], reset_interval=3, density=0.5)
    masks = [chosen(opt, p)]
    for t in range(1, 8):
        p.grad = gradient((8, 64), t) if t != 6 else None  # a reset does not wait for a gradient
        opt.step()
        masks.append(chosen(opt, p))
    changed = [not np.array_equal(a, b) for a, b in pairwise(masks)]
    assert changed == [False, False, True, False, False, True, False]
    overlap = (masks[0] & masks[3]).mean()
    assert 0.17 < overlap < 0.33  # independent draws of a half share a quarter


def test_the_mask_depends_on_seed_and_name_only():
    def drawn(names: list[str], seed: int) -> dict[str, np.ndarray]:
        named = [(n, Parameter(torch.zeros(16, 64))) for n in names]
        opt = SPAM(named, density=0.25, seed=seed)
        return {n: chosen(opt, p) for n, p in named}

    a, b, c = drawn(["x", "y"], 0), drawn(["y", "x"], 0), drawn(["x"], 1)
    assert np.array_equal(a["x"], b["x"]) and np.array_equal(a["y"], b["y"])
    assert not np.array_equal(a["x"], a["y"]) and not np.array_equal(a["x"], c["x"])


def test_every_value_is_as_likely_as_any_other():
    p = Parameter(torch.zeros(64, 40))
    opt = SPAM([("w", p)], reset_interval=1, density=0.25)
    counts = np.zeros((64, 40))
    for _ in range(100):
        p.grad = torch.zeros_like(p)
        opt.step()
        counts += chosen(opt, p)
    assert counts.mean() == 25 and np.abs(counts.mean(0) - 25).max() < 3  # 6400 draws a column: sigma 0.54
    assert 3 < counts.std() < 5.5  # binomial: 4.3


@pytest.mark.parametrize("states, moments", [("fp32", 8.0), ("bf16", 4.0), ("8bit", 2.032), ("4bit", 1.0625)])
def test_the_part_is_what_costs_memory(states: str, moments: float):
    """A quarter of the moments, and a bit per value for the mask."""
    p = Parameter(torch.zeros(256, 1024))
    opt = SPAM([("w", p)], density=0.25, states=states)
    assert opt.state_bytes() / p.numel() == pytest.approx(0.25 * moments + 0.125, rel=0.01)
    assert opt.explain().state_bytes == opt.state_bytes() and opt.explain().rows[0].kind == "sparse"


def test_what_is_dense_all_the_same():
    """Vectors, embeddings, tensors of other dimensions, rows of one value; a density of 1 is no mask at all."""
    shapes = {
        "w": (4, 64),
        "embed_tokens.weight": (64, 64),
        "norm": (64,),
        "conv": (4, 4, 3, 3),
        "one": (64, 1),
        "none": (0, 4),
    }
    named = [(n, Parameter(torch.zeros(shape))) for n, shape in shapes.items()]
    opt = SPAM(named, density=0.5)
    assert [n for n, p in named if "mask" in opt.state[p]] == ["w"]
    assert all("mask" not in s for s in SPAM(named, density=1.0).state.values())


@every_preset
@both_variants
@pytest.mark.parametrize("master", ["none", "split8", "split16", "kahan", "fp32"])
def test_sparse_states_resume_as_if_never_stopped(states: str, variant: str, master: str, tmp_path):
    """Past resets, rounding stochastically, through a file, deepcopy and pickle."""
    options = {**HYPER, "density": 0.3, "variant": variant, "state_rounding": "stochastic", "states": states}
    named = parameters(SHAPES, torch.bfloat16)
    opt = SPAM(named, **options, master=master)
    train(opt, named, range(1, 7))
    other = [(n, Parameter(p.detach().clone())) for n, p in named]
    fresh = SPAM(other, variant=variant, states=states, master=master, seed=5, density=0.3)
    save_optimizer(opt, tmp_path / "x")
    load_optimizer(fresh, tmp_path / "x")
    copies = [copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))]
    theirs = [[(n, p) for (n, _), p in zip(named, twin.param_groups[0]["params"], strict=True)] for twin in copies]
    for one, params in ((opt, named), (fresh, other), *zip(copies, theirs, strict=True)):
        train(one, params, range(7, 13))
    for twin in (fresh, *copies):
        assert_same(everything(opt), everything(twin))


def test_a_sparse_state_loads_into_another_format_and_density():
    """The density is the checkpoint's, as every hyper-parameter is; a format is converted."""
    named = parameters([(64, 256)])
    opt = SPAM(named, density=0.5, states="fp32")
    train(opt, named, range(1, 4))
    other = [(n, Parameter(p.detach().clone())) for n, p in named]
    fresh = SPAM(other, density=0.25, states="8bit")
    fresh.load_state_dict(opt.state_dict())
    p, q = named[0][1], other[0][1]
    assert torch.equal(opt.state[p]["mask"], fresh.state[q]["mask"])
    assert fresh.state[q]["exp_avg"].shape == (64, 128) and fresh.state[q]["exp_avg"].dtype == torch.uint8
    train(opt, named, range(4, 5))
    train(fresh, other, range(4, 5))
    assert 0 < float((p - q).detach().abs().mean()) < 5e-5  # of a learning rate of 1e-3
    damaged = opt.state_dict()
    damaged["state"] = {0: {k: v for k, v in damaged["state"][0].items() if k != "mask"}}
    with pytest.raises(ValueError, match="p0: the checkpoint's 'mask' is missing"):
        fresh.load_state_dict(damaged)


@pytest.mark.parametrize("max_norm", [0.01, 1.0])
def test_global_clip_sees_the_chosen_values_of_every_tensor(max_norm: float):
    """Its norm is of what is stepped; dense and sparse tensors are clipped together."""
    named = [("w", Parameter(torch.zeros(8, 40))), ("b", Parameter(torch.zeros(30)))]
    opt = SPAM(named, density=0.5, stabilize=(GlobalClip(max_norm),), states="fp32", lr=0.1)
    for n, p in named:
        p.grad = gradient(tuple(p.shape), 1, len(n)) + 0.01
    w, b = (p for _, p in named)
    part = w.grad.numpy()[chosen(opt, w)]
    norm = math.sqrt(float((part**2).sum()) + float(b.grad.square().sum()))
    opt.step()
    share = min(1.0, max_norm / norm)
    np.testing.assert_allclose(opt.state[w]["exp_avg"].flatten(), 0.1 * share * part, rtol=1e-4)
    np.testing.assert_allclose(opt.state[b]["exp_avg"], 0.1 * share * b.grad, rtol=1e-4)


def test_transposed_parameters_and_gradients_have_sparse_momentum_too():
    plain = parameters([(64, 80)], torch.bfloat16)
    odd = [("p0", Parameter(plain[0][1].detach().t().contiguous().t()))]
    one, two = (SPAM(named, density=0.25, reset_interval=2, lr=0.01) for named in (plain, odd))
    for t in range(1, 6):
        plain[0][1].grad = gradient((64, 80), t, dtype=torch.bfloat16)
        odd[0][1].grad = plain[0][1].grad.t().contiguous().t()
        one.step()
        two.step()
    assert_same(everything(one), everything(two))
    assert not odd[0][1].is_contiguous()


def test_a_bad_gradient_among_the_chosen_harms_nothing_and_elsewhere_is_not_seen():
    p = Parameter(torch.zeros(4, 64))
    opt = SPAM([("w", p)], density=0.5, stabilize=(AdaClip(),), states="fp32")
    mask = torch.from_numpy(chosen(opt, p))
    p.grad = torch.ones(4, 64).masked_fill(~mask, math.nan)
    opt.step()
    assert opt.counters()["skipped_tensors"] == 0 and bool((p.detach() != 0).eq(mask).all())
    before = p.detach().clone()
    p.grad[mask] = math.inf
    opt.step()
    assert opt.counters()["skipped_tensors"] == 1 and torch.equal(p.detach(), before)


def test_copies_of_the_chosen_values_do_not_outlive_the_step():
    def floats() -> list[Tensor]:
        gc.collect()
        return [x for x in gc.get_objects() if issubclass(type(x), Tensor) and x.numel() >= 64 * 128]

    p = Parameter(torch.randn(64, 256))
    opt = SPAM([("w", p)], density=0.5, states="8bit")
    p.grad = gradient((64, 256), 1)
    before = floats()
    opt.step()
    assert [x.shape for x in floats() if not any(x is y for y in before)] == []


def test_a_sparse_state_that_does_not_fit_is_refused_before_anything_changes():
    named = parameters([(64, 256), (50,)])
    opt = SPAM(named, density=0.5, reset_interval=2)
    train(opt, named, range(1, 2))
    opt.state[named[0][1]]["exp_avg"] = torch.zeros(3)
    before = everything(opt)
    with pytest.raises(ValueError, match="p0: its state 'exp_avg' is"):
        train(opt, named, range(2, 3))
    assert_same(everything(opt), before)


@pytest.mark.parametrize("density", [0, -0.5, 1.5, math.nan, math.inf])
def test_density_out_of_range(density: float):
    with pytest.raises(ValueError, match="density must be above 0 and at most 1"):
        SPAM([Parameter(torch.ones(4, 8))], density=density)


def test_density_cannot_change_under_the_state():
    p = Parameter(torch.ones(4, 8))
    opt = SPAM([p], density=0.5)
    opt.param_groups[0]["density"] = 0.25
    p.grad = torch.ones(4, 8)
    with pytest.raises(RuntimeError, match="density of its group changed since the state was made"):
        opt.step()
