"""One run and many: pairing, determinism, divergence, spikes, resume after a kill, crashed workers."""

import json
import math
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lowbit.bench import data, methods, train
from lowbit.bench.errors import BenchError
from lowbit.bench.folder import Folder
from lowbit.bench.methods import Method, parse_method
from lowbit.bench.model import preset
from lowbit.bench.pool import run_jobs
from lowbit.bench.runner import Plan, run, workers_and_threads
from lowbit.bench.spike import Spike
from lowbit.bench.train import Job, Settings, learning_rate

TINY = Settings(preset("nano"), steps=15, batch=4, micro_batch=4, seq=32, vocab=256, val_windows=8, val_points=5)
ADAM, FAIR, SPAM4 = (parse_method(n) for n in ("adam", "adam-fair", "stablespam-4bit"))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As in a worker process; on a busy machine two threads of such small work mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> data.Corpus:
    path = tmp_path_factory.mktemp("corpus") / "c.txt"
    path.write_text("the quick brown fox jumps over the lazy dog; " * 400)
    return data.load([str(path)])


def one(corpus: data.Corpus, method: Method, settings: Settings = TINY, lr: float = 3e-3, seed: int = 0) -> dict:
    return train.train(Job(method, lr, seed), settings, corpus)


@pytest.mark.parametrize("method", ["adam", "adam-fair", "stablespam-4bit", "adam/8bit/stablespam-fp4"])
def test_a_short_run_learns_and_reports(corpus: data.Corpus, method: str):
    m = parse_method(method)
    result = one(corpus, m)
    assert result["initial_val"] == pytest.approx(math.log(256), abs=0.2)
    assert result["final_val"] < result["initial_val"] - 1.5 and not result["diverged"]
    assert [s for s, _ in result["curve"]] == [0, 3, 6, 9, 12, 15]
    assert result["curve"][-1][1] == result["final_val"] and result["tokens"] == 15 * 4 * 32
    n = preset("nano").parameters()
    assert result["bytes"]["weights"] == result["bytes"]["gradients"] == 2 * n
    assert result["bytes"]["master"] == (0 if m.low_bit else 4 * n)
    per_value = result["bytes"]["states"] / n
    assert (
        per_value == pytest.approx(8, abs=0.01) if not m.low_bit else per_value < (1.4 if m.states == "4bit" else 2.3)
    )
    if m.recipe == "none":
        assert result["final_val_dense"] is None
    else:
        assert 0 < abs(result["final_val_dense"] - result["final_val"]) < 0.1, "plain layers, the same weights"
    assert 0 < result["grad_norm"]["median"] <= result["grad_norm"]["p99"] <= result["grad_norm"]["max"]
    assert result["peak_rss"] > 50e6 and result["cpu_seconds"] > 0 and "bf16-rounded storage" in result["compute"]
    json.dumps(result, allow_nan=False)


def test_the_same_run_twice_is_the_same_to_the_bit(corpus: data.Corpus):
    a, b = one(corpus, SPAM4), one(corpus, SPAM4)
    assert a["curve"] == b["curve"] and a["grad_norm"] == b["grad_norm"]
    assert one(corpus, SPAM4, seed=1)["curve"] != a["curve"]


def test_methods_of_a_seed_are_paired(corpus: data.Corpus, monkeypatch: pytest.MonkeyPatch):
    seen: dict[str, list] = {}
    original = data.Corpus.batch

    def spy(self: data.Corpus, seed: int, step: int, batch: int, seq: int):
        out = original(self, seed, step, batch, seq)
        seen[current].append(out[0].tolist())
        return out

    monkeypatch.setattr(data.Corpus, "batch", spy)
    starts = {}
    for current in ("adam", "adam-fair", "adam/4bit/none"):
        seen[current] = []
        starts[current] = one(corpus, parse_method(current))["initial_val"]
    assert seen["adam"] == seen["adam-fair"] == seen["adam/4bit/none"] and len(seen["adam"]) == 15
    assert len(set(starts.values())) == 1, "the same initial weights, rounded the same way"


def test_micro_batches_give_the_gradient_of_the_batch(corpus: data.Corpus):
    whole, parts = (one(corpus, FAIR, replace(TINY, micro_batch=m)) for m in (4, 2))
    assert parts["final_val"] == pytest.approx(whole["final_val"], abs=0.02)
    assert parts["grad_norm"]["max"] == pytest.approx(whole["grad_norm"]["max"], rel=0.02)


def test_a_run_that_blows_up_says_so(corpus: data.Corpus):
    result = one(corpus, parse_method("adam"), lr=1e30)
    assert result["diverged"] and result["final_val"] is None and "not finite at step" in result["diverged_why"]
    stuck = one(corpus, ADAM, lr=1e-9)
    assert stuck["diverged"] and "not 0.5 below" in stuck["diverged_why"] and stuck["final_val"] is not None
    rising = [3.0] * 5 + [4.5] * 50
    assert "50 steps" in train.diverged(5.5, 3.0, rising) and train.diverged(5.5, 3.0, rising[:-1]) == ""


def test_learning_rate_schedule():
    rates = [learning_rate(s, 100, 0.1) for s in range(100)]
    assert rates[0] == 0.1 and rates[9] == 1.0 and rates[10] == 1.0
    assert rates[55] == pytest.approx(0.55) and rates[99] == pytest.approx(0.1, abs=1e-3)
    assert learning_rate(0, 5, 0.0) == 1.0


def test_embedding_rate_reaches_the_optimizer(corpus: data.Corpus):
    frozen = one(corpus, FAIR, replace(TINY, embed_lr_mult=1e-6))["final_val"]
    assert frozen > one(corpus, FAIR)["final_val"] + 0.5, "without embedding and head a model learns little"


def test_spikes():
    p = torch.nn.Parameter(torch.ones(100, 100))
    spike = Spike.parse("whole:1000@50")
    hits = []
    for step in range(400):
        p.grad = torch.ones_like(p)
        if spike.apply(step, {"p": p}):
            hits.append(step)
            assert p.grad.unique().tolist() == [1000.0]
    assert hits == [100, 150, 200, 250, 300, 350]
    p.grad = torch.ones_like(p)
    assert Spike.parse("entries:0.01:1e3@10", seed=1).apply(20, {"p": p})
    assert 50 < (p.grad == 1000).sum() < 200 and ((p.grad == 1) | (p.grad == 1000)).all()
    assert not Spike.parse("").apply(100, {"p": p})
    for bad in ("whole:1000", "whole:x@5", "entries:2:10@5", "whole:-1@5", "half:2@3", "whole:1e@5", "whole:10@0"):
        with pytest.raises(BenchError, match="cannot read spike"):
            Spike.parse(bad)


def test_spikes_reach_the_training_and_clipping_removes_them(corpus: data.Corpus):
    spikes = replace(TINY, spike="whole:1000@3")
    hurt = {}
    for m in (ADAM, FAIR, parse_method("adam-fair-4bit"), SPAM4):
        plain, spiked = one(corpus, m), one(corpus, m, spikes)
        assert spiked["grad_norm"]["max"] > 300 * plain["grad_norm"]["max"], "norms are taken before clipping"
        hurt[m.name] = spiked["final_val"] - plain["final_val"]
    assert hurt.pop("adam") > 0.2 and all(abs(h) < 0.05 for h in hurt.values()), "by torch's clip, ours, and AdaClip"


def test_methods_by_name():
    assert parse_method("adam").uses_torch and not parse_method("adam").low_bit and parse_method("adam").master
    low = parse_method("stablespam-4bit")
    assert (low.optimizer, low.states, low.recipe, low.master) == ("stablespam", "4bit", "int4", False)
    assert low.counterpart == parse_method("stablespam") and not low.uses_torch
    assert parse_method("adam/8bit/fp4") == Method("adam/8bit/fp4", "adam", "8bit", "fp4")
    names = [m.name for m in methods.choose(["adam-fair", "stablespam"], ["8bit", "4bit"], ["none", "int4"])]
    assert names[:3] == ["adam", "adam-fair", "adam-4bit"], "the baselines are always there"
    assert {"stablespam", "stablespam/8bit/none", "stablespam-4bit", "adam-fair/8bit/int4"} < set(names)
    assert len(names) == len(set(names)) == 3 + 4 + 1 + 4


@pytest.mark.parametrize(
    ("names", "states", "recipes", "message"),
    [
        (["admw"], None, None, "unknown optimizer 'admw'.*did you mean"),
        (["adam"], ["4bitt"], None, "unknown state format '4bitt': did you mean '4bit'"),
        (["adam"], None, ["int44"], "unknown recipe 'int44': did you mean 'int4'"),
        (["adam-4bit"], ["8bit"], None, "says its states and recipe"),
        (["adam/8bit"], None, None, "cannot read method"),
        (["galore:rnk=8"], None, None, "unknown option of GaLore 'rnk': did you mean 'rank'"),
        (["galore:8"], None, None, "cannot read '8': options of an optimizer are written NAME=VALUE"),
        (["galore:rank=-1/8bit/none"], None, None, "galore:rank=-1: rank must be a whole number of at least 1, not -1"),
        (["muon:aux_lr=fast"], None, None, "muon:aux_lr=fast: aux_lr must be a number, not 'fast'"),
        (["galore:lr=1"], None, None, "lr is no option of an optimizer here: say --lr"),
        (["galore:states=4bit"], None, None, "states is no option of an optimizer here"),
        (["muon:betas=(0.9,0.95)", "muon:betas=0.9"], None, None, "betas must be"),
        (["galoer:rank=8"], None, None, "unknown optimizer 'galoer': did you mean 'GaLore'"),
    ],
)
def test_unknown_methods(names: list[str], states: list[str] | None, recipes: list[str] | None, message: str):
    with pytest.raises(BenchError, match=message):
        methods.choose(names, states, recipes)


def test_options_of_an_optimizer_are_part_of_its_name():
    def built(name: str):
        weights = [(n, torch.nn.Parameter(torch.ones(64, 64))) for n in ("layers.0.q_proj.weight", "lm_head.weight")]
        return methods.build(parse_method(name), [{"params": weights}], 1e-3, steps=400, seed=7)[0].param_groups[0]

    chosen = methods.choose(["galore:rank=8:scale=0.5", "galore:rank=16"], ["4bit"], ["none"])
    names = [m.name for m in chosen if "galore" in m.name]
    assert names == [
        *("galore:rank=8:scale=0.5", "galore:rank=8:scale=0.5/4bit/none", "galore:rank=16", "galore:rank=16/4bit/none")
    ]
    assert "rank=8, scale=0.5" in chosen[-3].describe()["about"]
    group = built("galore:rank=8:scale=0.5/4bit/none")
    assert (group["rank"], group["scale"], group["states"]) == (8, 0.5, "4bit")
    assert built("adammini:num_heads=4-4bit")["num_heads"] == 4
    assert built("muon:aux_lr=1e-3:head_lr=None")["aux_lr"] == 1e-3
    assert built("scale:norm=l2").items() >= {"norm": "l2"}.items()
    assert built("galore:betas=(0.9, 0.5)")["betas"] == (0.9, 0.5)
    assert not parse_method("adam:eps=1e-6").uses_torch and built("adam:eps=1e-6")["eps"] == 1e-6
    group = built("stablespam:reset_interval=3:betas=(0.8, 0.9)")
    assert (group["reset_interval"], group["betas"], group["total_steps"]) == (3, (0.8, 0.9), 400)


def test_hyper_parameters_reach_the_optimizers():
    def built(name: str):
        group = [{"params": [("w", torch.nn.Parameter(torch.ones(64, 64)))]}]
        return methods.build(parse_method(name), group, 1e-3, steps=400, seed=7)

    opt, clip = built("adam-fair")
    assert isinstance(opt, torch.optim.AdamW) and clip == 1.0
    assert opt.defaults["betas"] == (0.9, 0.95) and opt.defaults["weight_decay"] == 0
    assert built("adam")[1] is None and built("adam")[0].defaults["betas"] == (0.9, 0.999)
    opt, clip = built("adam-fair-4bit")
    assert clip is None and [type(s).__name__ for s in opt.stabilize] == ["GlobalClip"]
    group = built("stablespam-4bit")[0].param_groups[0]
    assert (group["betas"], group["reset_interval"], group["total_steps"]) == ((0.9, 0.999), 20, 400)
    assert (group["states"], group["seed"], group["weight_decay"]) == ("4bit", 7, 0.0)
    group = built("stablespam-b95")[0].param_groups[0]
    assert (group["betas"], group["reset_interval"], group["states"]) == ((0.9, 0.95), 0, "fp32")
    assert built("StableSPAM/8bit/none")[0].param_groups[0]["reset_interval"] == 1000, "a class by name: its defaults"


def plan(corpus: data.Corpus, **changes: object) -> Plan:
    base = {"methods": [ADAM, FAIR], "lrs": [3e-3], "seeds": [0, 1], "settings": TINY, "corpus": corpus}
    return Plan(**{**base, "command": "lowbit bench --x", **changes})  # type: ignore[arg-type]


def test_a_killed_benchmark_continues_and_ends_the_same(corpus: data.Corpus, tmp_path: Path):
    whole = run(plan(corpus), tmp_path / "whole", quiet=True)
    assert [(r["method"], r["seed"]) for r in whole] == [("adam", 0), ("adam-fair", 0), ("adam", 1), ("adam-fair", 1)]
    run(plan(corpus), tmp_path / "killed", quiet=True)
    results = tmp_path / "killed" / "results.jsonl"
    lines = results.read_text().splitlines(keepends=True)
    results.write_text("".join(lines[:2]) + lines[2][: len(lines[2]) // 2])  # killed while writing the third line
    assert len(Folder(tmp_path / "killed").results()) == 2, "a torn last line does not count"
    first_two = results.read_text().splitlines()[:2]
    again = run(plan(corpus), tmp_path / "killed", resume=True, quiet=True)
    assert results.read_text().splitlines()[:2] == first_two, "finished runs are not repeated"
    assert [json.loads(x)["seed"] for x in results.read_text().splitlines()] == [0, 0, 1, 1]
    assert {(r["method"], r["seed"]): r["curve"] for r in again} == {
        (r["method"], r["seed"]): r["curve"] for r in whole
    }


def test_a_folder_keeps_to_its_settings(corpus: data.Corpus, tmp_path: Path):
    folder = tmp_path / "f"
    run(plan(corpus, methods=[ADAM], seeds=[0]), folder, quiet=True)
    with pytest.raises(BenchError, match="already holds a benchmark: continue it with --resume"):
        run(plan(corpus), folder, quiet=True)
    with pytest.raises(BenchError, match=r"batch was 4, is 2.*it was made by: lowbit bench --x"):
        run(plan(corpus, settings=replace(TINY, batch=2)), folder, resume=True, quiet=True)
    with pytest.raises(BenchError, match="sha256 was"):
        run(plan(replace(corpus, sha256="f" * 64)), folder, resume=True, quiet=True)
    more = run(plan(corpus, methods=[FAIR], seeds=[0, 1]), folder, resume=True, quiet=True)
    assert {(r["method"], r["seed"]) for r in more} == {("adam", 0), ("adam-fair", 0), ("adam-fair", 1)}
    document = Folder(folder).document()
    assert [m["name"] for m in document["methods"]] == ["adam", "adam-fair"] and document["seeds"] == [0, 1]


def test_damaged_folders_are_refused(tmp_path: Path):
    with pytest.raises(BenchError, match="not a benchmark folder"):
        Folder(tmp_path).document()
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(BenchError, match="damaged"):
        Folder(tmp_path).document()
    (tmp_path / "settings.json").write_text('{"version": 99}')
    with pytest.raises(BenchError, match="another version"):
        Folder(tmp_path).document()
    (tmp_path / "results.jsonl").write_text('{"method": "a"\n{"method": "a", "lr": 1, "seed": 0, "status": "ok"}\n')
    with pytest.raises(BenchError, match="line 1 is damaged"):
        Folder(tmp_path).results()


def test_append_cuts_a_torn_line_and_the_last_line_of_a_run_counts(tmp_path: Path):
    folder = Folder(tmp_path)
    folder.append({"method": "a", "lr": 0.1, "seed": 0, "status": "error"})
    with folder.results_path.open("a") as file:
        file.write('{"method": "b", "lr"')
    assert folder.finished() == set()
    folder.append({"method": "a", "lr": 0.1, "seed": 0, "status": "ok"})
    assert folder.finished() == {("a", 0.1, 0)} and len(folder.results()) == 1
    assert folder.results_path.read_text().count("\n") == 2


def test_a_defect_in_one_method_loses_that_run_only(corpus: data.Corpus, tmp_path: Path):
    broken = Method("broken", "adam", "nosuch", "none")
    results = run(plan(corpus, methods=[broken, ADAM], seeds=[0]), tmp_path / "f", quiet=True)
    assert [r["status"] for r in results] == ["error", "ok"]
    assert "nosuch" in results[0]["error"] and "Traceback" in results[0]["traceback"]
    assert Folder(tmp_path / "f").finished() == {("adam", 3e-3, 0)}, "a crashed run is tried again on --resume"


class Suicidal(Method):
    """A method whose worker process is killed as if by the kernel: it happens where the method is first used."""

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        os.kill(os.getpid(), signal.SIGKILL)


def test_processes_run_in_parallel_and_one_may_die(corpus: data.Corpus, tmp_path: Path):
    handle = corpus.store(tmp_path / "tokens")
    jobs = [Job(Suicidal("doomed", "adam"), 3e-3, 0), *(Job(ADAM, 3e-3, s) for s in range(2))]
    results = [e.result for e in run_jobs(jobs, TINY, handle, workers=2, threads=1) if e.result is not None]
    by_key = {(r["method"], r["seed"]): r for r in results}
    assert set(by_key) == {("doomed", 0), ("adam", 0), ("adam", 1)}
    assert by_key["doomed", 0]["error"] == "the worker process died: signal SIGKILL (out of memory?)"
    assert by_key["adam", 1]["curve"] == one(corpus, ADAM, seed=1)["curve"], "the same run as in this process"


def test_small_models_get_one_thread_each(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lowbit.bench.machine.cores", lambda: 4)
    assert workers_and_threads(139_584, 10, None, "cpu") == (4, 1)
    assert workers_and_threads(139_584, 2, None, "cpu") == (2, 1)
    assert workers_and_threads(58_000_000, 10, None, "cpu") == (1, 4)
    assert workers_and_threads(139_584, 10, None, "cuda") == (1, 4)
    assert workers_and_threads(139_584, 10, 0, "cpu") == (0, 1)
