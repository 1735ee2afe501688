"""A rule outside the package on the native backend: compiled at first use, kept, and done without where it must be."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from native_cases import libraries

from lowbit.native import build
from lowbit.native.library import _shipped
from lowbit.native.printer import print_stage
from lowbit.optim.adamw import adamw

RULE = """
import hashlib, os, torch
from lowbit.optim import Moment, Rule, fold, measure, update
from lowbit.words import lerp, maximum, sqrt, where

DAMP = 0.5

def pulled(z, g, c):
    return lerp(z, where(g > 0, g, g * DAMP), c.pull)

@measure("max", over="row")
def furthest(g, z):
    return g - z

@fold("w")
def reach(x, w, c):
    return maximum(w * c.keep, x)

@measure("mean")
def spread(g, w, c):
    return g * g / (w + c.floor)

@fold
def note(x, s, c):
    s.spread = lerp(s.spread, x, c.pull)

@update("p z")
def go(p, g, z, w, s, c):
    z = pulled(z, g, c)
    return p - c.lr * z / (w * sqrt(s.spread) + c.floor), z

@update("p z")
def squared(p, g, z):
    z = g ** 2
    return p - z, z

class Mine(Rule):
    moments = {"z": Moment("displacement"), "w": Moment("reach", signed=False, over="row")}
    scalars = {"spread": 0.0}
    stages = (furthest, reach, spread, note, go)

    def constants(self, group, t):
        return {"lr": group["lr"], "pull": 0.3, "keep": 0.9, "floor": 1e-3}

class Unprintable(Mine):
    stages = (squared,)

def run(rule, backend):
    os.environ["LOWBIT_BACKEND"] = backend
    torch.manual_seed(0)
    named = [(f"p{k}", torch.nn.Parameter(torch.randn(shape))) for k, shape in enumerate([(70, 65), (33, 300), (9,)])]
    opt = rule(named, {"lr": 0.01}, states="4bit", state_rounding="stochastic")
    for _ in range(3):
        for _, p in named:
            p.grad = torch.randn(p.shape)
        opt.step()
    found = [x for _, p in named for x in (p.detach(), *opt.state[p].values()) if isinstance(x, torch.Tensor)]
    return hashlib.sha256(b"".join(x.numpy().tobytes() for x in found)).hexdigest()
"""
RUN = """
import sys, warnings, own
for name in sys.argv[1:]:
    rule = getattr(own, name)
    expected = own.run(rule, "reference")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert own.run(rule, "") == expected
    print(len(said), *(str(warning.message).replace("\\n", " ") for warning in said))
"""


def process(folder: Path, *rules: str, **env: str) -> list[str]:
    """One line per rule: how many warnings there were, and which."""
    (folder / "own.py").write_text(RULE)
    own = {
        "LOWBIT_CACHE": str(folder),
        "TMPDIR": str(folder),
        "PYTHONPATH": f"{folder}{os.pathsep}{build.HERE.parents[1]}",
    }
    command = [sys.executable, "-c", RUN, *rules]
    done = subprocess.run(command, env={**os.environ, **own, **env}, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache with nothing in it but the library."""
    found = next(iter(libraries().values())).found
    if found.origin != "shipped":
        shutil.copy(found.path, tmp_path)
    return tmp_path


def test_a_rule_of_ones_own_is_compiled_once(cache: Path):
    if not (cxx := build.compiler()):
        pytest.skip("no C++ compiler")
    wrapper, log = cache / "cxx", cache / "log"
    wrapper.write_text(f'#!/bin/sh\necho "$@" >> "{log}"\nexec {cxx} "$@"\n')
    wrapper.chmod(0o755)

    def compiled() -> list[str]:
        lines = (line for line in log.read_text().splitlines() if " -c " in line and f"{cache}/" in line)
        stems = (Path(line.split(" -c ")[1].split()[0]).stem for line in lines)
        return sorted(stem for stem in stems if stem != "probe")

    assert process(cache, "Mine", CXX=str(wrapper)) == ["0"]
    first = compiled()
    assert first == [f"own_{name}" for name in ("furthest", "go", "note", "reach", "spread")]
    assert process(cache, "Mine", CXX=str(wrapper)) == ["0"]
    assert compiled() == first


def test_without_a_compiler_or_words_the_reference_does_it_and_says_so_once(cache: Path):
    mine, unprintable = process(cache, "Mine", "Unprintable", CXX="", PATH="/nowhere")
    assert mine.startswith("1 a rule runs on the reference backend") and "there is no C++ compiler" in mine
    line = RULE[: RULE.index("z = g ** 2")].count("\n") + 1
    assert unprintable.startswith("1 a rule runs on the reference backend")
    assert f"own.py:{line}" in unprintable and "g ** 2" in unprintable


def test_another_rule_of_the_same_name_is_not_taken_for_ours():
    printed = print_stage(adamw, frozenset("v"))
    assert _shipped(printed) and printed.helpers
    name, text = next(iter(printed.helpers.items()))
    other = replace(printed, helpers={**printed.helpers, name: text.replace("rate1", "rate2")})
    assert not _shipped(other)  # the stage is the same text, what it calls is not
