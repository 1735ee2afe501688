"""Runs behind the tables of losses: they go on where they stopped, pair what they compare, and say what diverged."""

import json
import math
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import nano
import optimizer_losses
import optimizers
import recipes

from lowbit.bench import data


@pytest.fixture(scope="module")
def corpus() -> data.Corpus:
    return data.load()


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch, corpus: data.Corpus):
    threads = torch.get_num_threads()
    monkeypatch.setattr(nano, "WINDOWS", 4)
    monkeypatch.setattr(nano.data, "load", lambda: corpus)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", optimizer_losses.OPTIMIZERS)
def test_every_optimizer_trains_with_states_in_few_bits(name: str, corpus: data.Corpus):
    """And what is asked for is what the layers' matrices get, however small."""
    runs = [nano.Run(3, name, s, optimizer_losses.OPTIMIZERS[name][1], 8) for s in optimizer_losses.STATES]
    assert nano.train(runs[-1], optimizer_losses.build, corpus)["loss"] < 10
    sizes = [optimizer_losses.build(run)[1].state_bytes() for run in runs]
    if name in optimizer_losses.NO_STATES:
        assert len(set(sizes)) == 1
    else:
        assert sizes[0] > 2 * sizes[1] and sizes[1] > 1.15 * sizes[2]


def test_losses_go_on_where_they_stopped(tmp_path: Path):
    """A second call runs nothing; after one that was killed while it wrote, only what is missing."""
    out = tmp_path / "losses.jsonl"
    words = ["--only", "AdamW;Adafactor", "--states", "fp32,4bit", "--rates", "--steps", "1", "--processes", "0"]
    optimizer_losses.main([*words, "--out", str(out)])
    whole = out.read_text()
    optimizer_losses.main([*words, "--out", str(out)])
    assert out.read_text() == whole
    out.write_text(whole[:-20])
    optimizer_losses.main([*words, "--out", str(out)])
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    (tmp_path / "whole").write_text(whole)
    first, again = nano.Results(tmp_path / "whole"), nano.Results(out)
    assert len(lines) == len(whole.splitlines()) + 1  # the machine that went on
    assert {r: v["loss"] for r, v in first.runs.items()} == {r: v["loss"] for r, v in again.runs.items()}
    trained = [run for run in again.runs if run.seed in optimizer_losses.SEEDS]
    assert len(trained) == 3 * 3 * 3  # rates × seeds × (two formats of AdamW, one of Adafactor)
    assert again.environments[0]["commit"] and again.environments[0]["corpus"]["sha256"]


def test_processes_give_what_one_gives(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.undo()  # other processes would not know of it
    run, found = nano.Run(0, "AdamW", "4bit", 1e-3, 1), []
    for processes in (0, 1):
        results = nano.Results(None)
        results.do([run], optimizer_losses.build, processes)
        found.append(results.runs[run]["loss"])
    assert found[0] == found[1]


def test_a_run_that_fails_does_not_lose_the_others(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.undo()
    good, results = nano.Run(0, "Lion", "fp32", 1e-3, 1), nano.Results(None)
    with pytest.raises(ValueError, match="lr"):
        results.do([nano.Run(0, "Lion", "fp32", -1.0, 1), good], optimizer_losses.build, 1)
    assert list(results.runs) == [good]


class Valley(nano.Results):
    """Losses with their lowest point at one learning rate, and divergence beyond another."""

    def __init__(self, lowest: float, cliff: float):
        super().__init__(None)
        self.lowest, self.cliff = lowest, cliff

    def do(self, runs: Iterable[nano.Run], build: nano.Builder, processes: int) -> None:
        for run in runs:
            loss = abs(math.log2(run.lr / self.lowest))
            self.append({**vars(run), "loss": loss, "why": "beyond the cliff" if run.lr > self.cliff else ""})


@pytest.mark.parametrize(("lowest", "cliff"), [(1.0, 99.0), (4.0, 99.0), (0.25, 99.0), (4.0, 1.0)])
def test_screening_ends_between_two_worse_learning_rates(lowest: float, cliff: float):
    (found,) = nano.screen(Valley(lowest, cliff), [nano.Run(0, "a", "b", 1.0)], optimizer_losses.build, 0)
    assert found.lr == min(lowest, cliff)


def lines(case: str, variant: str, lr: float, losses: list[float | None], seed: int = 10) -> list[dict]:
    return [
        {"seed": seed + k, "case": case, "variant": variant, "lr": lr, "steps": 400,
         "loss": loss, "why": "" if loss else "training loss 31 at step 7"}
        for k, loss in enumerate(losses)
    ]  # fmt: skip


def results_of(*every: list[dict]) -> nano.Results:
    results = nano.Results(None)
    for line in (line for some in every for line in some):
        results.append(line)
    return results


def test_the_table_of_states_pairs_seeds_and_shows_what_diverged():
    made = optimizers.Losses(results_of(
        lines("AdamW", "fp32", 1e-3, [2.0, 2.1, 2.2]), lines("AdamW", "fp32", 2e-3, [1.0, None, 1.0]),
        lines("AdamW", "4bit", 1e-3, [2.1, 2.2, 2.3]), lines("AdamW", "4bit", 5e-4, [3.0, 3.0, 3.0]),
        lines("Lion", "fp32", 1e-4, [None, None, None]),
        lines("AdamW", "4bit", 1e-3, [9.9], seed=optimizer_losses.SCREENING),
    ))  # fmt: skip
    assert made.cell("AdamW", "fp32") == "2.100 ± 0.100 (0.001)"  # the rate at which a seed diverged is no best one
    assert made.cost("AdamW", "4bit") == "+0.100 [+0.100, +0.100]"
    assert made.cell("Lion", "fp32") == "diverged" and made.cell("SWAN", "4bit") == "not run"
    assert made.cell("Adafactor", "4bit") == "as fp32" and made.cost("Adafactor", "4bit") == ""
    said = made.divergences()
    assert "AdamW, fp32, lr 0.002, seed 11: training loss 31 at step 7" in said and "Lion, fp32" in said
    assert made.rates("AdamW", "4bit") == (False, 5e-4, 1e-3, 1e-3) and not made.rates("SWAN", "fp32")[0]


def test_the_table_of_recipes_pairs_seeds_with_float_and_with_a_master():
    losses = {"float": [2.0, 2.1, 2.2], "int4": [2.1, 2.2, 2.3], "store int4": [2.3, 2.3, 2.5], "fp4": [2.1, None, 2.1]}
    losses["master, int4 codes"] = [2.1, 2.1, 2.3]
    made = recipes.Costs(results_of(
        *(lines(case, "Muon", 0.02, its) for case, its in losses.items()),
        lines("float", "Muon", 0.01, [2.5, 2.5]), lines("int4", "Muon", 0.01, [2.0, 2.0]),
        lines("float", "Muon", 0.04, [2.5, 2.5]), lines("int4", "Muon", 0.04, [2.5, 2.5]),
    ))  # fmt: skip
    assert made.cell("int4", "Muon") == "**+0.100 [+0.100, +0.100], 3/3**"
    assert made.cell("fp4", "Muon") == "diverged, 1 of 3: training loss 31 at step 7"
    assert made.same_codes("store int4", "Muon") == "**+0.200 [+0.200, +0.200], 3/3**"
    assert made.cell("int4", "AdamW") == "not run"
    assert made.best_lr("int4") == "0.01 (-0.150)" and made.best_lr("float") == "0.02"
    assert made.contrasts(["int4", "store int4", "nvfp4"]).startswith("Contrasts: 3, of which 3 are significant")
