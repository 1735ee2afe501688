"""Measures over rows, columns, groups of rows and tensors, and the vectors that folds make of them."""

import copy
import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from cases import assert_same, everything, gradient, parameters, train
from cases import one_thread as one_thread
from torch.nn import Parameter

import lowbit
from lowbit.optim import AdamW, Moment, MomentumReset, Rule, fold, measure, update
from lowbit.optim.base import Stabilizer
from lowbit.stages import Program
from lowbit.words import lerp, maximum, sqrt

SHAPES = [(33, 300), (7, 33), (50,), (), (1030, 65), (5, 4, 6), (3, 5461)]

# ---- rules, each with its statement in float64 on a matrix g [rows, cols], a dict of states and the group size


@measure("mean", over="group")
def mean_square(g):
    """Adam-mini's."""
    return g * g


@fold("v")
def average(x, v, c):
    """One second moment per group."""
    return lerp(v, x, c.rate)


@update("p m")
def descend(p, m, g, v, c):
    """Adam without debiasing."""
    m = lerp(m, g, c.rate)
    return p - c.lr * m / (sqrt(v) + c.eps), m


class Constants(Rule):
    moments: ClassVar = {}
    stages = ()

    def constants(self, group, t):
        return {"lr": group["lr"], "rate": 0.1, "eps": 1e-3, "one": 1.0}

    def group_rows(self, group, name, shape, role):
        return 4


class Mini(Constants):
    """A moment per value and one per group of rows."""

    moments: ClassVar = {"m": Moment("exp_avg"), "v": Moment("exp_avg_sq", signed=False, over="group")}
    stages = (mean_square, average, descend)


def mini(p, g, s):
    starts = np.arange(0, len(g), 4)
    means = np.add.reduceat((g * g).mean(1), starts) / np.diff([*starts, len(g)])
    s["exp_avg_sq"] += 0.1 * (means - s["exp_avg_sq"])
    s["exp_avg"] += 0.1 * (g - s["exp_avg"])
    return p - 0.01 * s["exp_avg"] / (np.sqrt(s["exp_avg_sq"]) + 1e-3).repeat(4)[: len(g), None]


@measure("sum", over="column")
def energy(g):
    """Of a column."""
    return g * g


@fold("n")
def norm(x, c):
    """A vector of this step."""
    return sqrt(x) + c.eps


@fold("n")
def doubled(n):
    """Of the temporary itself."""
    return n + n


@update("p")
def normalized(p, g, n, c):
    """SCALE's."""
    return p - c.lr * g / n


class Scale(Constants):
    """Columns, no state at all."""

    stages = (energy, norm, doubled, normalized)


def scale(p, g, s):
    return p - 0.01 * g / (2 * (np.sqrt((g * g).sum(0)) + 1e-3))


@measure("max", over="row")
def top(g):
    """Signed: the magnitude counts."""
    return g


@fold("r n")
def largest(x, r, c):
    """Two letters at once."""
    return maximum(r, x), x + c.eps


@update("g")
def shrink(g, r, c):
    """Persistent, over the same rows."""
    return g / (r + c.eps)


@measure("mean")
def mean_of_shrunk(g, n):
    """After an update, reading a vector."""
    return g * g * n


@fold
def remember(x, s, c):
    """Once per tensor."""
    s.mean = lerp(s.mean, x, c.rate)


@update("p")
def follow(p, g, s, c):
    """By what was remembered."""
    return p - c.lr * g * (s.mean + c.one)


class RowMax(Constants):
    """A vector that is kept, one that is not, an update, a number per tensor."""

    moments: ClassVar = {"r": Moment("largest", signed=False, over="row")}
    scalars: ClassVar = {"mean": 0.0}
    stages = (top, largest, shrink, mean_of_shrunk, remember, follow)


def row_max(p, g, s):
    x = np.abs(g).max(1)
    s["largest"] = np.maximum(s["largest"], x)
    g = g / (s["largest"] + 1e-3)[:, None]
    s["mean"] += 0.1 * ((g * g * (x + 1e-3)[:, None]).mean() - s["mean"])
    return p - 0.01 * g * (s["mean"] + 1)


@measure("mean", over="row")
def row_mean(g):
    """Adafactor's row."""
    return g * g


@fold("r")
def keep_rows(x, r, c):
    """Averaged."""
    return lerp(r, x, c.rate)


@measure("mean", over="column")
def column_mean(g, r, c):
    """Of rows that are brought to one size."""
    return g * g / (r + c.eps)


@fold("q")
def keep_columns(x, q, c):
    """Averaged."""
    return lerp(q, x, c.rate)


@update("p")
def factored(p, g, r, q, c):
    """Both kinds of vectors."""
    return p - c.lr * g / (sqrt((r + c.eps) * q) + c.eps)


class Factored(Constants):
    """Rows and columns; a measure that reads a vector."""

    moments: ClassVar = {
        "q": Moment("column", signed=False, over="column"),
        "r": Moment("row", signed=False, over="row"),
    }
    stages = (row_mean, keep_rows, column_mean, keep_columns, factored)


def both(p, g, s):
    s["row"] += 0.1 * ((g * g).mean(1) - s["row"])
    s["column"] += 0.1 * ((g * g / (s["row"] + 1e-3)[:, None]).mean(0) - s["column"])
    return p - 0.01 * g / (np.sqrt(np.outer(s["row"] + 1e-3, s["column"])) + 1e-3)


@dataclass(frozen=True)
class Case:
    rule: type[Rule]
    statement: Callable[..., Any]
    vectors: dict[str, str]
    sweeps: int

    def __str__(self) -> str:
        return self.rule.__name__


CASES = [
    Case(Mini, mini, {"v": "group"}, 2),
    Case(Scale, scale, {"n": "column"}, 2),
    Case(RowMax, row_max, {"r": "row", "n": "row"}, 3),
    Case(Factored, both, {"q": "column", "r": "row"}, 3),
]
every_case = pytest.mark.parametrize("case", CASES, ids=str)


def matrix(x: torch.Tensor) -> np.ndarray:
    return x.detach().double().numpy().reshape(len(x) if x.dim() else 1, -1).copy()


@every_case
def test_vectors_equal_the_straight_line_statement(case: Case):
    named = parameters(SHAPES)
    opt = case.rule(named, {"lr": 0.01}, states="fp32")
    expected = {n: matrix(p) for n, p in named}
    states: dict[str, dict[str, Any]] = {n: {} for n, _ in named}
    for n, p in named:
        for k, v in opt.state[p].items():
            states[n][k] = matrix(v) if k == "exp_avg" else v.double().numpy().copy()
    for t in range(1, 5):
        train(opt, named, range(t, t + 1))
        for n, p in named:
            expected[n] = case.statement(expected[n], matrix(p.grad), states[n])
            np.testing.assert_allclose(matrix(p), expected[n], rtol=1e-6, atol=1e-6, err_msg=n)
            for moment in case.rule.moments.values():
                got, wanted = opt.state[p][moment.name].numpy(), states[n][moment.name]
                np.testing.assert_allclose(got.reshape(wanted.shape), wanted, rtol=1e-5, atol=1e-7, err_msg=n)
    program = opt._slots[named[0][1]].program
    assert program.vectors == case.vectors and program.sweeps == opt.explain().sweeps == case.sweeps
    assert opt.counters() == {"skipped_blocks": 0, "skipped_tensors": 0}


# ---- sums, bit for bit


def tree(x: np.ndarray) -> np.ndarray:
    """The halving tree over the last axis."""
    n = 1 << (x.shape[-1] - 1).bit_length()
    x = np.concatenate([x, np.zeros((*x.shape[:-1], n - x.shape[-1]), x.dtype)], -1)
    while n > 1:
        n //= 2
        x = x[..., :n] + x[..., n:]
    return x[..., 0]


def row_sums(g: np.ndarray) -> np.ndarray:
    rows, cols = g.shape
    width = min(256, 1 << (cols - 1).bit_length())
    padded = np.zeros((rows, -(-cols // width) * width), np.float32)
    padded[:, :cols] = g
    return tree(tree(padded.reshape(rows, -1, width)).astype(np.float64))


def column_sums(g: np.ndarray) -> np.ndarray:
    tiles = []
    for first in range(0, len(g), 512):
        total = g[first].astype(np.float64)
        for row in g[first + 1 : first + 512]:
            total = total + row.astype(np.float64)
        tiles.append(total)
    return tree(np.stack(tiles, -1))


def reduced(g: np.ndarray, reduce: str, over: str, group: int) -> np.ndarray:
    """Sums, means and maxima as `reference.py` says them."""
    parts = [g[i : i + group] for i in range(0, len(g), group)] if over == "group" else [g]
    if reduce == "max":
        axis = {"row": 1, "column": 0}.get(over)
        return np.atleast_1d(np.concatenate([np.atleast_1d(np.abs(part).max(axis)) for part in parts]))
    if over == "column":
        sums, counts = column_sums(g), np.float64(len(g))
    elif over == "row":
        sums, counts = row_sums(g), np.float64(g.shape[1])
    else:
        sums = np.array([tree(row_sums(part)) for part in parts])
        counts = np.array([part.size for part in parts], np.float64)
    return (sums / counts if reduce == "mean" else sums).astype(np.float32)


def same(g):
    return g


def vector(x):
    return x


class Record(Constants):
    """Keeps what it measures."""

    scalars: ClassVar = {"kept": 0.0}

    def plan(self, group, kind=""):
        over = group["over"]
        value = measure(group["reduce"], over=over)(same)

        def assign(x, s):
            s.kept = x

        if over == "tensor":
            return {}, (value, fold(assign))
        return {"v": Moment("vector", over=over)}, (value, fold("v")(vector))

    def group_rows(self, group, name, shape, role):
        return group["rows"]


@pytest.mark.parametrize("over", ["row", "column", "group", "tensor"])
@pytest.mark.parametrize("reduce", ["sum", "mean", "max"])
def test_sums_have_the_bits_of_their_order(over: str, reduce: str, monkeypatch: pytest.MonkeyPatch):
    """However the rows are cut, next to other tensors, for groups that end short."""
    shapes = [(5, 33), (7, 300), (1300, 3), (1025, 257), (50,), (2, 5461)]
    for chunk in (1 << 18, 3000):
        monkeypatch.setattr("lowbit.backends.reference.CHUNK", chunk)
        for rows in (1, 4, 700) if over == "group" else (1,):
            named = parameters(shapes)
            opt = Record(named, {"lr": 0.0, "reduce": reduce, "over": over, "rows": rows})
            train(opt, named, range(1, 2))
            for _, p in named:
                got = opt.state[p]["kept" if over == "tensor" else "vector"].numpy()
                wanted = reduced(p.grad.numpy().reshape(len(p), -1), reduce, over, rows)
                assert np.array_equal(np.atleast_1d(got), wanted), (tuple(p.shape), chunk, rows)


def test_the_mean_over_all_tensors_is_refused():
    with pytest.raises(ValueError, match='over="all"'):
        measure("mean", over="all")


# ---- states


@every_case
def test_how_the_work_is_cut_changes_no_vector(case: Case, monkeypatch: pytest.MonkeyPatch):
    found = []
    for chunk in (1 << 18, 5000, 1):
        monkeypatch.setattr("lowbit.backends.reference.CHUNK", chunk)
        named = parameters([(33, 300), (40, 65), (70, 64), (9,)], torch.bfloat16)
        opt = case.rule(named, {"lr": 0.01}, states="8bit", state_rounding="stochastic")
        train(opt, named, range(1, 4))
        found.append(everything(opt))
    assert_same(found[0], found[1])
    assert_same(found[0], found[2])


def test_vectors_are_plain_fp32_and_listed():
    named = parameters([(64, 65), (66, 5, 13), (50,), (0, 5), (3, 0)])
    opt = Mini(named, {"lr": 0.01}, states="4bit")
    shapes = [tuple(opt.state[p]["exp_avg_sq"].shape) for _, p in named]
    assert shapes == [(16,), (17,), (13,), (0,), (1,)]
    assert {opt.state[p]["exp_avg_sq"].dtype for _, p in named} == {torch.float32}
    assert opt.state[named[0][1]]["exp_avg"].dtype == torch.uint8
    row = opt.explain().rows[0]
    assert row.formats == {"exp_avg": "nf4:128", "exp_avg_sq": "fp32"} and "one per 4 rows: fp32" in row.why
    tensors = [v for p in opt.state.values() for v in p.values() if isinstance(v, torch.Tensor)]
    assert opt.state_bytes() == sum(v.nbytes for v in tensors)
    train(opt, named, range(1, 3))
    with pytest.raises(ValueError, match="p1: group_rows must be a whole number of at least 1, not 0"):
        Record([("p1", Parameter(torch.ones(3, 3)))], {"lr": 0.0, "reduce": "sum", "over": "group", "rows": 0})


@every_case
def test_momentum_reset_zeroes_vectors(case: Case):
    named = parameters([(33, 300), (50,)])
    opt = case.rule(named, {"lr": 0.01}, states="8bit", stabilize=(MomentumReset(3, late=True),))
    names = [m.name for m in case.rule.moments.values()]
    for t in range(1, 4):
        train(opt, named, range(t, t + 1))
        assert all(bool(opt.state[p][name].any()) == (t < 3) for _, p in named for name in names)


@every_case
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3e38])
def test_a_bad_gradient_leaves_tensor_scalars_and_vectors(case: Case, bad: float):
    """3e38 is finite; its square, which only a vector shows, is not."""
    named = parameters([(33, 300), (50,), (7, 33)])
    opt = case.rule(named, {"lr": 0.01}, states="8bit")
    train(opt, named, range(1, 3))
    before = everything(opt)
    for n, p in named:
        p.grad = gradient(tuple(p.shape), 3, int(n[1]))
    named[0][1].grad[20, 260] = bad
    opt.step()
    after = everything(opt)
    same = {k for k in before if k.startswith("0.0 ") and not k.endswith((" step", " skipped"))}
    if bad != 3e38 or case.rule is not RowMax:  # where nothing is squared
        assert_same({k: before[k] for k in same}, {k: after[k] for k in same})
        assert opt.counters()["skipped_tensors"] == 1
    changed = [k for k in before if k.startswith(("0.1 ", "0.2 ")) and not torch.equal(before[k], after[k])]
    assert {"0.1 p", "0.2 p"} <= set(changed)


@every_case
def test_vectors_resume_and_convert(case: Case, tmp_path):
    named = parameters([(33, 300), (64, 64), (50,), (0,), ()], torch.bfloat16)
    opt = case.rule(named, {"lr": 0.01}, states="8bit")
    train(opt, named, range(1, 4))
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    lowbit.save_optimizer(opt, tmp_path / "opt.safetensors")
    again = [[(n, Parameter(p.detach().clone())) for n, p in named] for _ in range(3)]
    twins = [case.rule(params, {"lr": 0.5}, states="8bit") for params in again[:2]]
    file.seek(0)
    twins[0].load_state_dict(torch.load(file, weights_only=True))
    lowbit.load_optimizer(twins[1], tmp_path / "opt.safetensors")
    other = case.rule(again[2], {"lr": 0.01}, states="4bit")
    other.load_state_dict(opt.state_dict())
    vectors = [m.name for m in case.rule.moments.values() if m.over != "value"]
    for (_, p), (_, q) in zip(named, again[2], strict=True):
        assert all(torch.equal(opt.state[p][name], other.state[q][name]) for name in vectors)
    copied, params = copy.deepcopy((opt, named))
    train(opt, named, range(4, 6))
    for twin, its in ((twins[0], again[0]), (twins[1], again[1]), (copied, params)):
        train(twin, its, range(4, 6))
        assert_same(everything(opt), everything(twin))


class Threes(Mini):
    """The same with other groups."""

    def group_rows(self, group, name, shape, role):
        return 3


def test_a_vector_of_another_length_is_refused():
    opt, other = (rule([("w", Parameter(torch.ones(12, 4)))], {"lr": 0.0}) for rule in (Mini, Threes))
    before = everything(opt)
    changes = (
        lambda s: None,
        lambda s: s.pop("exp_avg_sq"),
        lambda s: s.update(exp_avg_sq=torch.zeros(12)),
    )
    for change in changes:
        saved = copy.deepcopy(other.state_dict())
        change(saved["state"][0])
        with pytest.raises(ValueError, match=r"w: the checkpoint's 'exp_avg_sq' .* must have shape \(3,\)"):
            opt.load_state_dict(saved)
    saved["state"][0]["exp_avg_sq"] = torch.zeros(3, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"w: the checkpoint's 'exp_avg_sq' is torch.uint8; it must be torch.float32"):
        opt.load_state_dict(saved)
    assert_same(before, everything(opt))


# ---- what fits together


@update("g")
def over_norm(g, n):
    return g / n


class RowClip(Stabilizer):
    """A stabilizer with a vector of its own (`eps` is the optimizer's)."""

    stages = (row_mean, norm, over_norm)


def test_a_stabilizer_may_have_vectors():
    p = Parameter(torch.zeros(5, 40))
    opt = AdamW([p], stabilize=(RowClip(),), betas=(0.0, 0.0), eps=1e-3, weight_decay=0.0, states="fp32")
    p.grad = gradient((5, 40), 1)
    opt.step()
    g = p.grad.double()
    np.testing.assert_allclose(opt.state[p]["exp_avg"], g / (g.square().mean(1, keepdim=True).sqrt() + 1e-3), rtol=1e-6)


ROW = {"r": Moment("row", over="row")}
unread = update("p")(lambda p, g: p - g)


@pytest.mark.parametrize(
    ("stages", "moments", "said"),
    [
        ((norm,), {}, "fold 'norm' writes 'n' for each element"),
        ((measure("sum")(lambda g: g), norm), {}, "fold 'norm' writes 'n' for each element"),
        ((energy, remember), {}, "fold 'remember' reads 'x'"),
        ((remember,), {}, "fold 'remember' reads 'x'"),
        ((normalized,), {}, "update 'normalized' reads 'n'"),
        ((normalized, energy, norm), {}, "update 'normalized' reads 'n'"),
        ((energy, doubled, norm, normalized), {}, "fold 'doubled' reads 'n'"),
        ((energy, keep_rows), ROW, "fold 'keep_rows' reads 'r'"),
        ((energy, fold("r")(lambda x: x)), ROW, "writes 'r'"),
        ((energy, fold("p")(lambda x: x)), {}, "writes 'p'"),
        ((top, largest, shrink, top, largest), ROW, "fold 'largest' writes 'r'"),
        ((energy, norm, row_mean, norm), {}, "fold 'norm' writes 'n'"),
        ((update("r")(lambda g: g),), ROW, "writes 'r'"),
        ((update("s")(lambda g: g),), {}, "writes 's'"),
        ((unread, measure("sum", over="row")(lambda g, m: g * m)), {}, "reads 'm'"),
    ],
)
def test_stages_that_do_not_fit_are_refused_by_name(stages, moments, said: str):
    with pytest.raises(ValueError) as raised:
        Program(stages, moments, {})
    assert said in str(raised.value)


def test_a_rule_that_does_not_fit_is_refused_before_it_has_parameters():
    class Broken(Constants):
        stages = (normalized,)

    with pytest.raises(ValueError, match="update 'normalized' reads 'n', which it cannot at this place"):
        Broken([Parameter(torch.ones(3))], {"lr": 1.0})
