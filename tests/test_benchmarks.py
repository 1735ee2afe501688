"""The benchmarks run, pair what they compare, and their tables are what their results say."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import cpu_tables
import gpu
import gpu_check
import gpu_codec
import gpu_tables
import timing
import torch
from cuda_cases import stepping
from emulator import compiler

ROOT = timing.ROOT


def run(script: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, f"benchmarks/{script}.py", *arguments], cwd=ROOT, capture_output=True, text=True
    )


@pytest.mark.parametrize("script", ["cpu_tables", "gpu_tables", "one_billion", "optimizers", "recipes"])
def test_tables_are_current(script: str):
    done = run(script, "--check")
    assert done.returncode == 0, done.stderr


def test_rounds_are_alternating_shuffled_and_complete():
    order: list[str] = []
    cases = {name: lambda name=name: order.append(name) or len(order) for name in "abcdef"}
    seconds, failed = timing.rounds(cases, 3, [1], warm=1)
    turns = ["".join(order[k : k + 6]) for k in range(0, len(order), 6)]
    assert len(turns) == 4 and len(set(turns)) > 1 and not failed
    assert all(sorted(turn) == list("abcdef") for turn in turns)
    assert seconds["a"]["1"] == [k + 1 for k, name in enumerate(order) if name == "a"][1:]  # without the warm-up


def test_a_rival_that_fails_is_a_result_and_ours_an_error():
    def fails() -> float:
        raise RuntimeError("no kernel\nmore")

    seconds, failed = timing.rounds({"rival": fails, "lowbit": lambda: 1.0}, 2, [1])
    assert list(seconds) == ["lowbit"] and failed == {"rival": "RuntimeError: no kernel"}
    with pytest.raises(RuntimeError):
        timing.rounds({"lowbit": fails}, 2, [1])


@pytest.mark.parametrize(
    ("must", "aim", "verdict"),
    [(0.4, 0.3, "**0.5, missed**"), (0.6, 0.4, "0.5, reached"), (0.8, 0.6, "0.5, beyond the aim"),
     (0.6, 0.7, "**0.5, missed**"), (0.4, 0.6, "0.5, reached"), (0.3, 0.4, "0.5, beyond the aim")],
)  # fmt: skip
def test_a_goal_is_judged_by_the_median_of_the_ratios_within_rounds(must: float, aim: float, verdict: str):
    seconds = {
        "ours": [1.0, 3.0, 10.0],
        "theirs": [2.0, 6.0, 10.0],
    }  # the ratio of the medians is 0.5 too; of means not
    cases = {name: {"seconds": {"1": values}} for name, values in seconds.items()}
    goal = cpu_tables.Goal("", "group", "ours", "theirs", must, aim)
    assert goal.verdict({"groups": [{"title": "group", "cases": cases}]}, "1") == verdict
    assert goal.verdict({"groups": []}, "1") == "not measured"


@pytest.mark.slow
@pytest.mark.parametrize("script", cpu_tables.TABLES)
def test_benchmarks_run(script: str, tmp_path: Path):
    out = tmp_path / "results.json"
    done = run(script, "--smoke", "--without", "torchao,bitsandbytes", "--out", str(out))
    assert done.returncode == 0, done.stderr
    results = json.loads(out.read_text())
    assert results["environment"]["commit"] and results["after"]["load_average"]
    grids = [*cpu_tables.TABLES[script](results), cpu_tables.goals(script, results)]
    assert all(grid.title in done.stdout and grid.rows for grid in grids)
    assert {len(row) - len(grid.heads) for grid in grids for row in grid.rows} == {0}
    goals = [
        goal for goal in cpu_tables.GOALS[script] if "bitsandbytes" not in goal.case and "torchao" not in goal.case
    ]
    assert goals and all("measured" not in goal.verdict(results, "1") for goal in goals)


def test_the_benchmark_of_steps_runs(tmp_path: Path):
    out = tmp_path / "results.json"
    done = run("optimizer_steps", "--smoke", "--only", "Lion", "--out", str(out))
    assert done.returncode == 0, done.stderr
    results = json.loads(out.read_text())
    assert set(results["groups"][0]["cases"]) == {"torch AdamW fused", "lowbit fp32", "lowbit 8bit", "lowbit 4bit"}
    assert "| AdamW | not timed |" in done.stdout and "| Lion | not timed |" not in done.stdout


# Products with packed weights have kernels for GPUs only.
ON_NO_GPU = {name: table for name, table in gpu_tables.TABLES.items() if name != "linear"}


@pytest.fixture(scope="module")
def on_no_gpu(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, dict]]:
    """What every section of gpu.py says and writes in tiny sizes on the CPU."""
    folder = tmp_path_factory.mktemp("gpu")
    done = run("gpu", "--smoke", "--without", "torchao,bitsandbytes,flashoptim", "--out", str(folder))
    assert done.returncode == 0, done.stderr
    return done.stdout, {name: json.loads((folder / f"gpu_{name}.json").read_text()) for name in ON_NO_GPU}


def test_the_gpu_benchmark_runs(on_no_gpu: tuple[str, dict[str, dict]]):
    said, every = on_no_gpu
    for name, table in ON_NO_GPU.items():
        results, grids = every[name], table(every[name])
        assert results["environment"]["commit"] and results["environment"]["gpu"]["name"]
        assert all(grid.title in said and grid.rows for grid in grids)
        assert {len(row) - len(grid.heads) for grid in grids for row in grid.rows} == {0}
        assert not any(group["failed"] for group in results["groups"])
    verdicts = every["check"]["groups"][0]["verdicts"]
    assert len(verdicts) > 50 and set(verdicts.values()) == {"equal"}


@pytest.mark.skipif(compiler() is None, reason="kernels are compiled by g++ here, and there is none")
def test_the_gpu_benchmark_runs_on_the_emulator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Bits of codecs and steps, and products, which a CPU has no kernels for: the sections as a GPU would run them."""
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--smoke", "--sections", "check,linear", "--out", str(tmp_path)])
    monkeypatch.setattr(gpu_check, "RULES", {"AdamW 8bit": gpu_check.RULES["AdamW 8bit"]})
    monkeypatch.setattr(gpu_check.lowbit, "formats", lambda: ("int4", "nf4"))
    monkeypatch.setattr(gpu_codec, "WEIGHTS", 2)
    with stepping() as emulator:
        assert gpu.main() == 0
    assert {"update", "encode", "linear_few", "linear_transposed"} <= {*emulator.launched}
    checked, products = (json.loads((tmp_path / f"gpu_{name}.json").read_text()) for name in ("check", "linear"))
    verdicts = checked["groups"][0]["verdicts"]
    assert len(verdicts) == 5 and set(verdicts.values()) == {"equal"} and checked["groups"][0]["backend"] == "cuda"
    assert [group["title"] for group in products["groups"]] == ["1 rows", "32 rows"]
    assert not any(group["failed"] for group in products["groups"])


def test_the_gpu_benchmark_finds_wrong_bits():
    cpu, right = torch.device("cpu"), gpu_check.coded("int4", False, torch.device("cpu"))
    assert gpu_check.verdict(lambda device: right, cpu) == "equal"

    def wrong(device: torch.device) -> gpu_check.Bits:
        values = right["values"].clone()
        values[3, 5] += "LOWBIT_BACKEND" in os.environ
        return {**right, "values": values}

    assert gpu_check.verdict(wrong, cpu) == f"values: 1 of {65 * 1023} values differ"


def test_the_bytes_of_a_step_are_what_must_be_moved(on_no_gpu: tuple[str, dict[str, dict]]):
    """8-bit states of 16-bit parameters: 2 + 2 for p, 2 for g, 2 · 2 for the codes, 2 · 2 · 4 / 256 for the scales."""
    group = on_no_gpu[1]["step"]["groups"][0]
    moved = {name: case["bytes"] / group["parameters"] for name, case in group["cases"].items()}
    assert moved["torch AdamW fused"] == pytest.approx(28, abs=0.01)
    assert moved["lowbit AdamW 8bit, bf16 p"] == pytest.approx(10.06, abs=0.01)
    assert moved["lowbit StableSPAM 4bit, bf16 p"] == pytest.approx(12.12, abs=0.01)  # its gradient is read 3 times


def test_the_gpu_benchmark_says_what_is_wrong():
    done = run("gpu", "--smoke", "--sections", "stpe")
    assert done.returncode == 2 and "'stpe' is none of check, copy, step" in done.stderr
    if not torch.cuda.is_available():
        done = run("gpu")
        assert done.returncode == 2 and "torch finds no CUDA device" in done.stderr
