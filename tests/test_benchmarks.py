"""The benchmarks run, pair what they compare, and their tables are what their results say."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import cpu_tables
import timing

ROOT = timing.ROOT


def run(script: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, f"benchmarks/{script}.py", *arguments], cwd=ROOT, capture_output=True, text=True
    )


def test_cpu_tables_are_current():
    done = run("cpu_tables", "--check")
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
