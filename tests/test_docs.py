"""What the documents say is true: code in them runs, tables come from results, named tests exist."""

import argparse
import ast
import inspect
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lowbit
from lowbit.bench import cli_bench

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_run(path: Path, capsys):
    for needed in re.findall(r"^# needs: (\w+)$", path.read_text(), re.MULTILINE):
        pytest.importorskip(needed, reason=f"{needed} is not installed")
    threads = torch.get_num_threads()
    runpy.run_path(str(path), run_name="__main__")
    torch.set_num_threads(threads)
    assert capsys.readouterr().out


def test_readme_python_runs(capsys):
    """The first lines a user types, on a model of theirs."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 64))
    names = {"model": model}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    out = capsys.readouterr().out
    assert "2 of 2 weights" in out and "exp_avg_sq log4" in out


def test_the_page_on_stored_weights_runs(capsys, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    page = (ROOT / "docs" / "stored-weights.md").read_text().partition("## Memory")[0]  # what follows needs a model
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(compile(block, "stored-weights.md", "exec"), names)
    assert "stored as int4, 4.50 bits" in capsys.readouterr().out and (tmp_path / "model.pt").stat().st_size > 0
    assert names["model"][7].weight.store == "int4"


def test_tables_are_current():
    done = subprocess.run([sys.executable, "benchmarks/readme.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_features_name_existing_tests():
    page = (ROOT / "docs" / "features.md").read_text()
    named = set(re.findall(r"`(test_\w+)`", page)) - {path.stem for path in (ROOT / "tests").glob("test_*.py")}
    functions = {
        node.name
        for path in (ROOT / "tests").glob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    }
    assert not named - functions
    assert len(named) > 80
    assert not re.findall(r"^\|[^|]*\|\s*\|$", page, re.MULTILINE), "a feature without a test"


def test_make_targets_are_commands_that_exist():
    """`make bench` and `make bench-full` must get past the command line; what they run has tests of its own."""
    makefile = (ROOT / "Makefile").read_text()
    full = re.search(r"^FULL\s*\?= (\S+)", makefile, re.MULTILINE)[1]
    commands = re.findall(r"lowbit bench (.*) \$\(ARGS\)", makefile)
    assert len(commands) == 2
    for command in commands:
        words = command.replace("$(FULL)", full).split()
        parser = argparse.ArgumentParser()
        cli_bench.arguments(parser)
        args = parser.parse_args(words)
        assert args.demo or cli_bench._folder(args).parts[:2] == ("benchmarks", "results")


def test_public_names_are_documented():
    public = [getattr(lowbit, name) for name in lowbit.__all__]
    public += [getattr(lowbit.optim, name) for name in lowbit.optim.__all__]
    for thing in public:
        assert inspect.getdoc(thing), thing
        if inspect.isclass(thing):
            own = [v for k, v in vars(thing).items() if inspect.isfunction(v) and not k.startswith("_")]
            assert all(function.__doc__ for function in own), thing
