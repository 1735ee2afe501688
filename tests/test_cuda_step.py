"""Optimizer steps on CUDA, run by the emulator: the bits of the reference, in every schedule."""

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import assert_same, everything, gradient, parameters
from cases import one_thread as one_thread
from cuda_cases import agree, needs_compiler, patched, stepping
from emulator import REVERSE
from native_cases import COVERING, DIMENSIONS, OPTIMIZERS, Setting, every_value
from test_native_own import RULE

from lowbit.backends import cuda_step
from lowbit.optim import AdamW, StableSPAM
from lowbit.policy import PRESETS

pytestmark = needs_compiler

# Every value of every dimension: optimizers, formats, blocks of 1 to 256 values, dtypes, ways to round and to keep a
# parameter, shapes, views, and what is wrong with the numbers. Every pair of them is in the slow tests.
FEW = every_value(COVERING)
REST = [s for s in COVERING if s not in FEW]
PLAIN = Setting("adamw", "int8", "sqrt8", 0, "bf16", "bf16", "auto", "nearest", "ragged", 1, "clean")


@pytest.mark.parametrize("k", range(len(FEW)), ids=lambda k: str(FEW[k]))
def test_a_step_has_the_references_bits(k: int):
    agree(FEW[k], schedule=k % 5)


def test_few_settings_have_every_pair_of_dtypes():
    assert {(s.p, s.g) for s in FEW} == {(p, g) for p in DIMENSIONS.p for g in DIMENSIONS.g}


@pytest.mark.slow
@pytest.mark.parametrize("k", range(len(REST)), ids=lambda k: str(REST[k]))
def test_every_pair_of_settings_has_the_references_bits(k: int):
    agree(REST[k], schedule=k % 5)


@pytest.mark.slow
@pytest.mark.parametrize("states", ["8bit", "4bit"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_presets_have_the_references_bits(optimizer: str, states: str):
    m, v = PRESETS[states]
    for p, shapes in (("f32", "ragged"), ("bf16", "large")):
        agree(PLAIN._replace(optimizer=optimizer, m=m, v=v, p=p, g=p, shapes=shapes))


SCHEDULED = {
    "stablespam": PLAIN._replace(optimizer="stablespam", m="int4", v="sqrt4", shapes="views", wrong="nan"),
    "adafactor": PLAIN._replace(optimizer="adafactor", m="nf4", state_rounding="stochastic", shapes="dense"),
    "vectors": PLAIN._replace(optimizer="vectors", m="dyn8", v="log4", rounding="stochastic", shapes="large"),
}


@pytest.mark.parametrize("schedule", [REVERSE, 2, 3])
@pytest.mark.parametrize("name", SCHEDULED)
def test_no_order_of_threads_and_blocks_changes_a_bit(name: str, schedule: int):
    agree(SCHEDULED[name], schedule)


# ---- what quick numbers (cuda/quick.h) are in doubt of


COUNTED = "if (!goes_on(place.count)) break;"


def trained_with_zeros(states: str, small: float) -> tuple[dict[str, Any], int]:
    """An embedding of whose rows and columns some are never touched; and how many blocks were said to be left alone."""
    weight = torch.nn.Parameter(gradient((48, 512), 0, 0, torch.bfloat16))
    opt = AdamW([("embed.weight", weight)], lr=1e-2, weight_decay=0.1, states=states, betas=(0.6, 0.6))
    for t in range(1, 6):
        weight.grad = gradient((48, 512), t, 1, torch.bfloat16)
        weight.grad[5:40] = small
        weight.grad[:, 100:107] = small
        opt.step()
    found = everything(opt)
    return found, int(opt.state[weight].pop("skipped")[0])


@pytest.mark.parametrize("states", ["8bit", "4bit"])
def test_what_is_zero_is_not_done_again(states: str, monkeypatch: pytest.MonkeyPatch):
    with stepping(), patched("step.cu", COUNTED, COUNTED + " if (lane() == 0) ++lost;"):
        assert trained_with_zeros(states, 0.0)[1] == 0
        assert trained_with_zeros(states, 1e-18)[1] > 0
    with stepping():
        found, _ = trained_with_zeros(states, 0.0)
    monkeypatch.setenv("LOWBIT_BACKEND", "reference")
    assert_same(found, trained_with_zeros(states, 0.0)[0])


@pytest.mark.parametrize("states", ["8bit", "4bit"])
def test_one_block_of_threads_does_many_chunks_again(states: str, monkeypatch: pytest.MonkeyPatch):
    with stepping() as device, monkeypatch.context() as patch:
        patch.setattr(cuda_step, "REVISERS", 1)
        found = trained_with_zeros(states, 1e-18)
        grids = device.grids["update"], device.grids["again"]
    monkeypatch.setenv("LOWBIT_BACKEND", "reference")
    assert_same(found[0], trained_with_zeros(states, 1e-18)[0])
    assert grids == (3, 1)


# ---- rules of a user's own


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module outside the package, with a rule of moments, measurements and folds that no other has, and one that
    cannot be printed."""
    (tmp_path / "own_rules.py").write_text(RULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("LOWBIT_BACKEND", "")  # the module sets it: to be put back
    yield importlib.import_module("own_rules")
    monkeypatch.delitem(sys.modules, "own_rules")


@pytest.mark.filterwarnings("error")
def test_a_rule_of_ones_own_has_the_references_bits(own: Any):
    expected = own.run(own.Mine, "reference")
    with stepping(schedule=2) as device:
        assert own.run(own.Mine, "native") == expected
    assert {"begin", "measure", "rows", "scalars", "update"} <= set(device.launched)


def test_a_rule_that_cannot_be_printed_runs_on_the_reference_and_says_so_once(own: Any):
    expected = own.run(own.Unprintable, "reference")
    with stepping() as device, pytest.warns(UserWarning, match="a rule runs on the reference backend") as said:
        assert own.run(own.Unprintable, "native") == expected
    line = RULE[: RULE.index("z = g ** 2")].count("\n") + 1
    assert len(said) == 1 and f"own_rules.py:{line}" in str(said[0].message) and "g ** 2" in str(said[0].message)
    assert not device.launched


# ---- groups, and parameters without a gradient


def trained(steps: int) -> dict[str, Any]:
    """Two groups of one program and two sets of constants; p1 has no gradient in every second step."""
    named = parameters([(64, 256), (33, 300), (5, 512), (70,)], torch.bfloat16)
    groups = [{"params": named[:2], "lr": 1e-2}, {"params": named[2:], "lr": 3e-3, "betas": (0.8, 0.95)}]
    opt = StableSPAM(groups, states="4bit", seed=3)
    for t in range(1, steps + 1):
        for k, (_, p) in enumerate(named):
            p.grad = None if k == 1 and t % 2 == 0 else gradient(tuple(p.shape), t, k, p.dtype)
        opt.step()
    return everything(opt)


def test_groups_have_their_own_constants_and_gradients_may_be_missing(monkeypatch: pytest.MonkeyPatch):
    with stepping(schedule=3):
        found = trained(4)
    monkeypatch.setenv("LOWBIT_BACKEND", "reference")
    assert_same(found, trained(4))
