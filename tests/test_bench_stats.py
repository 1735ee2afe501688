"""Paired statistics against values computed by hand, and the summary built on them."""

import math

import pytest

from lowbit.bench.stats import paired, spread, steps_to, t_quantile
from lowbit.bench.summary import summarize


def test_t_quantiles():
    assert [t_quantile(df) for df in (1, 2, 4, 9, 30, 31, 1000)] == [12.706, 4.303, 2.776, 2.262, 2.042, 1.96, 1.96]
    with pytest.raises(ValueError, match="at least 1"):
        t_quantile(0)


def test_paired_interval_by_hand():
    d = paired({0: 1.0, 1: 2.0, 2: 3.0, 9: 7.0}, {0: 1.1, 1: 2.3, 2: 3.2})
    # differences -.1 -.3 -.2: mean -.2, sd .1, half width 4.303 * .1 / sqrt(3) = .24844
    assert d is not None and (d.n, d.better) == (3, 3), "seed 9 has no partner"
    assert d.mean == pytest.approx(-0.2)
    assert (d.low, d.high) == (pytest.approx(-0.44844, abs=1e-5), pytest.approx(0.04844, abs=1e-5))
    assert d.verdict == "not significant"


def test_verdicts():
    better = paired({0: 1.0, 1: 1.01, 2: 0.99}, {0: 2.0, 1: 2.0, 2: 2.0})
    worse = paired({0: 2.0, 1: 2.0, 2: 2.0}, {0: 1.0, 1: 1.01, 2: 0.99})
    single = paired({4: 1.0}, {4: 2.0})
    assert better and worse and single
    assert (better.verdict, worse.verdict, single.verdict) == ("better", "worse", "one seed: no interval")
    assert single.mean == -1.0 and single.low is None and single.describe()["verdict"] == "one seed: no interval"
    assert paired({0: 1.0}, {1: 1.0}) is None


def test_steps_to_target_and_spread():
    curve = [[0, 5.0], [10, 3.0], [20, None], [30, 2.0], [40, 1.9]]
    assert steps_to(curve, 3.0) == 10 and steps_to(curve, 2.5) == 30 and steps_to(curve, 1.0) is None
    assert spread([1.0]) is None and spread([1.0, 3.0]) == pytest.approx(math.sqrt(2))


def document(methods: list[tuple[str, str, bool]], lrs: list[float], seeds: list[int], reference: str = "ref") -> dict:
    return {
        "title": "benchmark", "command": "lowbit bench", "compute": "fp32 compute, bf16-rounded storage, CPU",
        "reference": reference, "corpus": {"name": "c", "sha256": "0" * 64, "unit": "byte", "tokens": 9},
        "settings": {"steps": 100, "batch": 8, "seq": 64, "spike": "", "embed_lr_mult": 1.0, "warmup": 0.1,
                     "preset": {"name": "nano"}, "compute": {"reason": "because"}},
        "machine": {"cpu": "x", "torch": "2"}, "seeds": seeds, "lrs": lrs,
        "methods": [{"name": n, "label": n, "about": n, "optimizer": counterpart, "counterpart": counterpart, "recipe":
                     "int4" if low else "none", "states": "4bit" if low else "fp32", "low_bit": low, "master": not low,
                     "by": "x"} for n, counterpart, low in methods],
    }  # fmt: skip


def line(method: str, lr: float, seed: int, final: float | None, **more: object) -> dict:
    return {
        "method": method, "lr": lr, "seed": seed, "status": "ok", "final_val": final, "final_val_dense": None,
        "curve": [[0, 5.5], [50, None if final is None else final + 1], [100, final]], "diverged": final is None,
        "diverged_why": "training loss not finite at step 7" if final is None else "", "tokens_per_second": 10.0,
        "cpu_seconds": 1.0, "ms_model": 1.0, "ms_optimizer": 1.0, "parameters": 100, "peak_rss": 1,
        "peak_device": None, "torch": "2", "bytes": {"weights": 200, "master": 0, "states": 100, "gradients": 200},
        "grad_norm": {"median": 1.0, "p99": 2.0, "max": 3.0}, **more,
    }  # fmt: skip


METHODS = [("ref", "ref", False), ("hp", "hp", False), ("hp-4bit", "hp", True)]


def test_the_three_columns_are_kept_apart_and_add_up():
    lines = [line("ref", 1e-3, s, 2.0 + 0.1 * s) for s in range(3)]
    lines += [line("hp", 1e-3, s, 1.9 + 0.1 * s) for s in range(3)]  # the optimizer gains .1
    lines += [line("hp-4bit", 1e-3, s, 1.93 + 0.1 * s) for s in range(3)]  # the bits cost .03
    summary = summarize(document(METHODS, [1e-3], [0, 1, 2]), lines)
    (column,) = summary["columns"]
    assert column["name"] == "hp-4bit" and column["counterpart"] == "hp"
    assert [round(column[k]["mean"], 9) for k in ("gain", "cost", "sum")] == [-0.1, 0.03, -0.07]
    assert (column["gain"]["verdict"], column["cost"]["verdict"]) == ("better", "worse")


def test_best_learning_rate_is_chosen_by_mean_and_said_so():
    lines = [line("ref", lr, s, 2.0 + lr) for lr in (0.1, 0.2) for s in (0, 1)]
    lines += [line("hp", 0.1, 0, 1.0), line("hp", 0.1, 1, None)]  # lower, but one run was lost
    lines += [line("hp", 0.2, 0, 1.5), line("hp", 0.2, 1, 1.7)]
    lines += [line("hp-4bit", 0.1, 0, 1.0)]  # unfinished: one seed of two
    lines += [line("hp-4bit", 0.2, s, 1.8) for s in (0, 1)]
    summary = summarize(document(METHODS, [0.1, 0.2], [0, 1]), lines)
    assert {r["name"]: r["lr"] for r in summary["methods"]} == {"ref": 0.1, "hp": 0.2, "hp-4bit": 0.2}
    assert {r["name"]: r["loss"] for r in summary["methods"]}["hp"] == pytest.approx(1.6)
    assert summary["sweep"]["hp"][0]["diverged"] == 1
    notes = " ".join(summary["notes"])
    assert "chosen on these same seeds" in notes and "edge" in notes


def test_lost_and_failed_runs_are_shown_not_dropped():
    lines = [line("ref", 0.1, 0, 2.0), line("hp", 0.1, 0, None), {"method": "hp-4bit", "lr": 0.1, "seed": 0,
             "status": "error", "error": "ValueError: x"}]  # fmt: skip
    summary = summarize(document(METHODS, [0.1], [0]), lines)
    rows = {r["name"]: r for r in summary["methods"]}
    assert set(rows) == {"ref", "hp"} and rows["hp"]["loss"] is None and rows["hp"]["diverged"] == 1
    assert rows["hp"]["vs_reference"] is None and summary["failed"][0]["error"] == "ValueError: x"
    assert "One seed" in " ".join(summary["notes"])


def test_steps_to_target_over_seeds():
    lines = [line("ref", 0.1, s, 2.0) for s in (0, 1)] + [line("hp", 0.1, 0, 1.0), line("hp", 0.1, 1, 2.5)]
    rows = {r["name"]: r for r in summarize(document(METHODS, [0.1], [0, 1]), lines)["methods"]}
    assert rows["ref"]["to_target"] == {"reached": 2, "of": 2, "steps": 100}
    assert rows["hp"]["to_target"] == {"reached": 1, "of": 2, "steps": None}, "seed 0 at step 50, seed 1 never"
