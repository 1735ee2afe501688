"""Optimizers step weights that are codes and scales: what a step is, and what it leaves alone, on every backend."""

from itertools import pairwise as neighbours
from typing import Any

import numpy as np
import oracles_optim
import pytest
import torch
from cases import CASES, Case, as_reference, assert_same, every_case, gradient, injected
from cases import one_thread as one_thread
from native_cases import differences, libraries, using
from stored_cases import FEW, OTHERS, REST, STORES, Setting, equal, parts, run, weight
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

from lowbit import scales, stored
from lowbit.backends import reference
from lowbit.layout import row_stride, rows_of
from lowbit.optim import SGD, SPAM, AdamW, Muon, Rule, StableSPAM
from lowbit.rounding import bits16, key

every_store = pytest.mark.parametrize("store", STORES)
both_backends = pytest.mark.parametrize("backend", ["reference", "native"])


# --- A step is load, rule, store -------------------------------------------------------------------------------------


def check_stored(p: Parameter, before: dict[str, Tensor], x: np.ndarray, u: np.ndarray | None) -> None:
    """The parts of p are those of float64 values x, written over others with these numbers in (0, 1).

    The optimizer computes in fp32: what an ulp decides may go either way, but no farther than to a neighbour.
    """
    fmt, (rows, cols) = p.format, rows_of(p.shape)
    block, many = min(fmt.block[1], cols), 256 if "rest" in before else 1
    x = np.pad(x.reshape(rows, cols), ((0, 0), (0, -cols % block))).reshape(rows, -1, block)
    old, new = (scales.multiplier(fmt, dict(each)).double().numpy() for each in (before, p.parts))
    reach = (fmt.top + (127 / 256 if many > 1 else 0)) * old
    peak = np.abs(x).max(-1)
    assert (new == old)[peak < reach * (1 - 1e-5)].all(), "a scale changed where nothing clips"
    assert (new > old)[peak > reach * (1 + 1e-5)].all(), "a scale stayed where a value clips"
    changed = (new != old) & (peak > 0)
    assert (fmt.top * new >= peak * (1 - 1e-6))[changed].all()
    if many > 1:
        ladder = np.arange(-256 * fmt.limit - 127, 256 * fmt.limit + 128) / 256
    else:
        ladder = np.array([value for value, _ in fmt.ladder])
    values = np.pad(p.load().detach().double().numpy().reshape(rows, cols), ((0, 0), (0, -cols % block)))
    units, found = (each.reshape(x.shape) / np.where(new > 0, new, 1)[..., None] for each in (x, values))
    if fmt.sign_magnitude:  # magnitudes are rounded
        units, found = abs(units), found * np.where(units < 0, -1, 1)
    low = np.clip(np.searchsorted(ladder, units, side="right") - 1, 0, len(ladder) - 2)
    gap = ladder[low + 1] - ladder[low]
    share = (units - ladder[low]) / gap
    from_here = 0.5 if u is None else 1 - np.pad(u, ((0, 0), (0, -cols % block))).reshape(x.shape)
    doubt = (1e-6 / np.where(new > 0, new, 1)[..., None] + 1e-5 * np.abs(units) + 1e-5) / gap
    sure = np.abs(share - from_here) > doubt
    assert np.abs(found - ladder[low + (share >= from_here)])[sure].max(initial=0) < 1e-5 * fmt.top
    assert (np.abs(found - units) <= np.diff(ladder).max() * (1 + doubt)).all()
    assert sure.mean() > (0.5 if many > 1 else 0.9)


def draws(opt: Rule, p: Parameter, step: int) -> np.ndarray:
    """Operand 0's numbers in (0, 1), by the element's index."""
    rows, cols = rows_of(p.shape)
    stride, slot = row_stride(cols), opt._slots[p]
    bits = bits16(key(opt.param_groups[0]["seed"], step, slot.id, 0), 0, rows * stride)
    return ((bits.double() + 0.5) / 65536).view(rows, stride)[:, :cols].numpy()


@every_case
@every_store
def test_a_step_is_load_rule_store(case: Case, store: str, monkeypatch: pytest.MonkeyPatch):
    """Every optimizer and store, on the reference: the loaded weight, the rule in float64, the store's own rounding."""
    monkeypatch.setenv("LOWBIT_BACKEND", "reference")
    shape = (24, 200)
    p = weight(store, shape)
    opt = case.build([("p0", p)], states="fp32", seed=5)
    s = oracles_optim.fresh(p.load().double().numpy())
    for t in range(1, 4):
        before, x = parts(p), p.load().detach().double().numpy()
        p.grad = gradient(shape, t)
        expected = case.oracle(x, p.grad.double().numpy(), s, t, **case.hyper)
        opt.step()
        segments = opt._slots[p].program.parts  # a matrix stage's neighbours have random bits of their own
        check_stored(p, before, expected, draws(opt, p, t + ((len(segments) - 1 if segments else 0) << 32)))


@pytest.mark.parametrize("states", ["8bit", "4bit"])
@pytest.mark.parametrize("store", [*STORES, *OTHERS])
def test_a_step_with_compressed_states_is_load_rule_store(store: str, states: str):
    case = CASES[0]
    p = weight(store, (33, 300))
    opt = case.build([("p0", p)], states=states)
    for t in range(1, 4):
        before, x, s = parts(p), p.load().detach().double().numpy(), as_reference(opt, p, case)
        p.grad = gradient((33, 300), t)
        expected = case.oracle(x, p.grad.double().numpy(), s, t, **case.hyper)
        opt.step()
        check_stored(p, before, expected, draws(opt, p, t))


@every_store
def test_to_nearest_a_step_needs_no_random_bits(store: str):
    """With a learning rate far above half a code."""
    case, found = CASES[0], []
    for seed in (1, 2):
        p = weight(store)
        opt = case.build([("p0", p)], states="fp32", seed=seed, rounding="nearest", lr=0.5)
        before, x = parts(p), p.load().detach().double().numpy()
        s = oracles_optim.fresh(x)
        p.grad = gradient((9, 600), 1)
        opt.step()
        check_stored(p, before, case.oracle(x, p.grad.double().numpy(), s, 1, **{**case.hyper, "lr": 0.5}), None)
        found.append(parts(p))
    assert equal(*found)


@every_store
def test_a_step_is_unbiased(store: str):
    """The mean over seeds is the value before it is stored, to what a few rare whole codes may make of it."""
    total, n = 0.0, 400
    for seed in range(n):
        p = weight(store, (4, 64))
        x = p.load().detach().double()
        p.grad = 0.02 * x.sign().float() - 0.01 * gradient((4, 64), 1).clamp(-1, 1)  # inwards: nothing clips
        SGD([p], lr=0.1, seed=seed, states="fp32").step()
        total = total + p.load().detach().double()
    moved = 0.1 * p.grad.double().abs()
    values = [value for value, _ in p.format.ladder]
    gap = max(b - a for a, b in neighbours(values)) * float(scales.multiplier(p.format, p.parts).max())
    error = torch.as_tensor(total / n) - (x - 0.1 * p.grad.double())
    assert (error.abs() <= 6 * (gap * moved / n).sqrt() + 6 * gap / n).all()
    assert error.abs().mean() < 2 * (gap * moved / n).sqrt().mean()


# --- What it leaves alone --------------------------------------------------------------------------------------------


@both_backends
@pytest.mark.parametrize("store", [*STORES, *OTHERS])
def test_without_an_update_no_code_changes(store: str, backend: str):
    """Learning rate 0, whatever the gradient and the random bits."""
    with using(backend):
        ps = [weight(store, shape) for shape in [(9, 600), (16, 256), (5, 33)]]
        before = [parts(p) for p in ps]
        opt = AdamW(ps, lr=0.0, weight_decay=0.0)
        for t in range(1, 21):
            for p in ps:
                p.grad = gradient(tuple(p.shape), t)
            opt.step()
        for p, old in zip(ps, before, strict=True):
            assert torch.equal(stored.load(p.format, old, rows_of(p.shape)[1]), p.load().detach())
            same = parts(p)
            if p.format.sign_magnitude:  # -0 - 0 * u may be 0
                del same["codes"]
            assert equal(same, old)


@every_store
def test_rows_without_gradients_do_not_drift_in_a_thousand_steps(store: str):
    """As in an embedding: some rows move all the time, and the others are what they were."""
    p = weight(store, (8, 256))
    before = parts(p)
    opt = AdamW([p], lr=1e-3, weight_decay=0.0, states="8bit")
    for t in range(1, 1001):
        p.grad = torch.zeros(8, 256)
        p.grad[:2] = gradient((2, 256), t)
        opt.step()
    after = parts(p)
    still = {k: x for k, x in after.items() if k != "tensor_scale"}
    assert equal({k: x[2:].contiguous() for k, x in still.items()}, {k: before[k][2:].contiguous() for k in still})
    assert not torch.equal(after["codes"][:2], before["codes"][:2])


@both_backends
@every_store
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_gradient_leaves_its_step_block_alone(store: str, bad: float, backend: str):
    """256 values of a row: codes, scales and rest alike; all other blocks go on."""
    with using(backend):
        good, p = weight(store), weight(store)
        for each, wrong in ((good, 0.01), (p, bad)):
            opt = AdamW([("p", each)], lr=1e-2)
            each.grad = gradient((9, 600), 1) + 0.01
            each.grad[3, 300] = wrong
            before = parts(each)
            opt.step()
        after, plain = p.load().detach(), good.load().detach()
        loaded = stored.load(p.format, before, 600)
        assert torch.equal(after[3, 256:512], loaded[3, 256:512])
        untouched = after == loaded
        after[3, 256:512] = plain[3, 256:512]
        assert torch.equal(after, plain) and not untouched[:3].all()
        assert opt.counters() == {"skipped_blocks": 1, "skipped_tensors": 0}


@both_backends
@every_store
def test_a_bad_gradient_leaves_the_whole_tensor_alone_where_it_is_measured(store: str, backend: str):
    for rule in (StableSPAM, Muon):
        with using(backend):
            p = weight(store)
            before = parts(p)
            opt = rule([("p", p)], lr=1e-2)
            p.grad = gradient((9, 600), 1)
            p.grad[0, 0] = torch.nan
            opt.step()
            assert equal(parts(p), before)
            assert opt.counters()["skipped_tensors"] == 1


@every_store
def test_sparse_momentum_leaves_the_other_values_their_codes(store: str):
    p = weight(store)
    before, loaded = parts(p), p.load().detach()
    opt = SPAM([("p", p)], lr=1e-2, density=0.25, warmup_steps=0, weight_decay=0.0)
    p.grad = 0.01 * loaded.sign()  # inwards: nothing clips
    opt.step()
    mask = np.unpackbits(opt.state[p]["mask"].numpy(), axis=1, bitorder="little")[:, :600].astype(bool)
    moved = (p.load().detach() != loaded).numpy()
    assert moved.any() and not moved[~mask].any()
    assert torch.equal(parts(p)["scale"].view(torch.uint8), before["scale"].view(torch.uint8))


# --- The same bits on every backend ----------------------------------------------------------------------------------


def agree(setting: Setting, isas: list[str]) -> None:
    """Matrix stages have no bits of their own: the reference's are replayed."""
    tape: list[Any] = []
    with injected(tape, replay=False):
        expected = run(setting, "reference")
    for isa in isas:
        with injected(tape, replay=True):
            found = differences(expected, run(setting, "native", isa))
        assert not found, f"{isa}: {found[:3]}"


@pytest.mark.parametrize("k", range(len(FEW)), ids=lambda k: str(FEW[k]))
def test_native_steps_have_the_references_bits(k: int):
    """Every optimizer, store, state format, dtype, rounding, shape, number of threads (1, 2, 7), and bad numbers."""
    *others, best = libraries()
    agree(FEW[k], [best, *others[k % max(1, len(others)) :][:1]])


@pytest.mark.slow
@pytest.mark.parametrize("k", range(len(REST)), ids=lambda k: str(REST[k]))
def test_every_pair_of_settings_has_the_references_bits(k: int):
    agree(REST[k], list(libraries()))


@pytest.mark.parametrize("chunk", [1, 3000])
@every_store
def test_how_the_work_is_cut_changes_no_bit(store: str, chunk: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LOWBIT_BACKEND", "reference")
    found = []
    for size in (1 << 30, chunk):
        monkeypatch.setattr(reference, "CHUNK", size)
        p = weight(store)
        opt = StableSPAM([("p", p)], lr=1e-2)
        for t in range(1, 3):
            p.grad = gradient((9, 600), t)
            opt.step()
        found.append(parts(p))
    assert equal(*found)


# --- Memory, checkpoints, messages -----------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The largest tensor that torch makes while it lasts, among those that were not there before."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (list, tuple)) else [out]:
            if isinstance(x, Tensor) and type(x) is Tensor and x.is_floating_point():
                self.numel = max(self.numel, x.untyped_storage().nbytes() // x.itemsize)
        return out


@every_store
@pytest.mark.parametrize("backend, most", [("native", 4096), ("reference", 4 << 18)])
def test_no_float_image_of_a_weight_is_made(store: str, backend: str, most: int):
    """Of a weight with 2 million values; bf16 gradients, so that they are no fp32 tensor of that size either."""
    p = weight(store, (512, 4096), dtype=torch.bfloat16)
    p.grad = gradient((512, 4096), 1, dtype=torch.bfloat16)
    small = weight(store, (2, 64))  # makes the jobs, and what is made once
    small.grad = torch.zeros(2, 64)
    with using(backend):
        AdamW([small], lr=1e-3).step()
        opt = AdamW([p], lr=1e-3)
        with Largest() as largest:
            opt.step()
    assert largest.numel <= most or largest.numel == p.grad.numel()


@pytest.mark.parametrize("store", STORES)
def test_the_heap_holds_no_float_image_after_a_step(store: str):
    import gc

    def alive() -> list[Tensor]:
        gc.collect()
        return [x for x in gc.get_objects() if type(x) in (Tensor, Parameter) and x.is_floating_point()]

    before = {id(x) for x in alive()}
    p = weight(store, (64, 1024))
    opt = AdamW([p], lr=1e-3)
    for t in (1, 2):
        p.grad = gradient((64, 1024), t)
        opt.step()
    large = [x for x in alive() if id(x) not in before and x.numel() >= p.numel() // 2]
    assert [x is p.grad for x in large] == [True]


@every_store
@pytest.mark.parametrize("rule", [AdamW, StableSPAM, Muon])
def test_resuming_is_never_having_stopped(store: str, rule: type[Rule], tmp_path):
    """Parts and state dict through torch.save, on to the bits of a run that was not cut."""

    def some(opt: Rule, p: Parameter, steps: range) -> None:
        for t in steps:
            p.grad = gradient((9, 600), t)
            opt.step()

    whole = weight(store)
    opt = rule([("p", whole)], lr=1e-2)
    some(opt, whole, range(1, 7))
    first = weight(store)
    cut = rule([("p", first)], lr=1e-2)
    some(cut, first, range(1, 4))
    torch.save({"parts": parts(first), "opt": cut.state_dict()}, tmp_path / "checkpoint")
    loaded = torch.load(tmp_path / "checkpoint", weights_only=True)
    rest = weight(store, seed=1)
    for part, x in rest.parts.items():
        x.copy_(loaded["parts"][part])
    again = rule([("p", rest)], lr=1e-2)
    again.load_state_dict(loaded["opt"])
    some(again, rest, range(4, 7))
    assert equal(parts(rest), parts(whole))
    assert_same(dict(again.state[rest]), dict(opt.state[whole]))


@both_backends
def test_parts_that_are_replaced_are_what_is_stepped(backend: str):
    """Between steps that are alike, when hardly anything is looked at."""
    with using(backend):
        found = []
        for replaced in (False, True):
            p = weight("int4")
            opt = AdamW([p], lr=1e-2)
            for t in range(1, 5):
                if replaced and t == 3:
                    old = dict(p.parts)
                    p.parts["codes"] = p.parts["codes"].clone()
                    p.parts["scale"] = p.parts["scale"].clone()
                    kept = {name: x.clone() for name, x in old.items()}
                p.grad = gradient((9, 600), t)
                opt.step()
            found.append(parts(p))
        assert equal(*found) and equal(old, kept)


@both_backends
def test_autograd_notices_a_step_between_forward_and_backward(backend: str):
    with using(backend):
        p, x = weight("int8"), torch.randn(3, 600, requires_grad=True)
        opt = AdamW([p], lr=1e-2)
        p.grad = gradient((9, 600), 1)
        y = x @ p.t()
        versions = p._version, *(part._version for part in p.parts.values())
        opt.step()
        assert all(a > b for a, b in zip((p._version, *(x._version for x in p.parts.values())), versions, strict=True))
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_explain_tells_how_weights_are_stored():
    named = [("a", weight("int4", (64, 256))), ("b", weight("split", (64, 256))), ("c", Parameter(torch.zeros(10)))]
    found = AdamW(named).explain()
    assert [row.dtype for row in found.rows] == ["int4", "split", "float32"]
    assert [row.weight_bytes for row in found.rows] == [64 * 256 // 32 * 18, 64 * 256 // 32 * 50, 40]
    assert found.weight_bytes == 64 * 256 // 32 * 68 + 40
    assert f"{found.weight_bytes:,} bytes" in str(found)


@pytest.mark.parametrize("master", ["split8", "split16", "kahan", "fp32"])
def test_a_master_is_refused_before_anything_is_made(master: str):
    p = weight("int4", dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"p0: master='\w+' .* stored as int4.*store=\"split\""):
        AdamW([("p0", p)], master=master)
    opt = AdamW([("p0", Parameter(torch.zeros(3)))])
    with pytest.raises(ValueError, match="stored as int4"):
        opt.add_param_group({"params": [("p1", p)], "master": master})
    assert len(opt.param_groups) == 1 and len(opt.state) == 1


def test_frozen_formats_are_refused():
    p = weight("nf4-dq")
    with pytest.raises(ValueError, match=r"p0: .*frozen"):
        AdamW([("p0", p)])
    p.requires_grad_(False)
    opt = AdamW([("p0", p)])
    p.grad = torch.zeros(9, 600)
    with pytest.raises(ValueError, match=r"p0: .*frozen"):
        opt.step()


def test_another_store_under_an_optimizer_is_noticed():
    p, other = weight("int4"), weight("nf4")
    opt = AdamW([("p0", p)])
    p.grad = torch.zeros(9, 600)
    opt.step()
    p.format, p.parts = other.format, other.parts
    with pytest.raises(RuntimeError, match=r"p0: was .*stored as int4.* and is .*stored as nf4"):
        opt.step()


def test_parts_of_another_shape_are_refused():
    p = weight("int4")
    p.parts["scale"] = p.parts["scale"][:, :-1].clone()
    with pytest.raises(ValueError, match=r"p0: its 'scale' is .* it must be"):
        AdamW([("p0", p)])
    del p.parts["scale"]
    with pytest.raises(ValueError, match=r"p0: .* has the parts codes, scale, not codes"):
        AdamW([("p0", p)])


def test_a_learning_rate_below_half_a_code_warns_once_and_only_to_nearest():
    for options, expected in (({"rounding": "nearest"}, 1), ({}, 0)):
        p = weight("int4")
        opt = AdamW([("p0", p)], lr=1e-4, **options)
        p.grad = torch.ones(9, 600)
        with pytest.warns(UserWarning) if expected else pytest.MonkeyPatch.context() as told:
            opt.step()
            opt.step()
        if expected:
            assert len(told) == 1 and "half a code" in str(told[0].message) and 'store="split"' in str(told[0].message)
