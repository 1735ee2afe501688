"""The full product, in `make test-all`: every optimizer, every pair of state formats, every way to store a parameter.

Small tensors, two steps, the instruction sets in turn: some 35 minutes of one core. It goes on where it was stopped:
what is done stands in the file $LOWBIT_MATRIX_STATE, else in pytest's cache; with other sources it begins anew.
$LOWBIT_MATRIX_SHARE="k/n" takes every n-th line only, for several processes.
"""

import json
import os
import time
import zlib
from itertools import product
from pathlib import Path

import pytest
from cases import STATE_FORMATS, injected
from cases import one_thread as one_thread
from native_cases import OPTIMIZERS, ROUNDINGS, SHAPES, SIGNED, Setting, differences, libraries, run

from lowbit.native import build

# Shorter than a step block and ragged; several rows in a span; longer than a step block.
TENSORS = [((5, 33), "plain", "offset"), ((9, 8), "offset", "plain"), ((3, 300), "plain", "plain")]
# A parameter's dtype and rounding; fp32 has no master and rounds nothing.
STORED = [("f32", "nearest"), *product(("bf16", "f16"), ROUNDINGS)]
# These go round, so that they meet everything too: coprime to each other and to the lengths of the rest.
BLOCKS, GRADIENTS = (0, 16, 64, 256, 2, 1, 128, 0, 32, 4, 0), ("f32", "bf16", "f16") * 4 + ("bf16",)
WRONG = ("clean", "nan", "huge", "broken", *["clean"] * 13)


def lines(optimizer: str) -> list[Setting]:
    made = []
    for k, (m, v, (p, rounding), states) in enumerate(
        product(SIGNED, STATE_FORMATS, STORED, ("nearest", "stochastic"))
    ):
        block, g, wrong = BLOCKS[k % len(BLOCKS)], GRADIENTS[k % len(GRADIENTS)], WRONG[k % len(WRONG)]
        made.append(Setting(optimizer, m, v, block, p, g, rounding, states, "matrix", 2, wrong))
    return made


def sources() -> str:
    """A mark of all that decides a bit."""
    package = build.HERE.parent
    files = [path for folder in ("", "backends", "optim", "native") for path in (package / folder).glob("*.*")]
    return build.fingerprint(sorted(path for path in files if path.suffix in (".py", ".h", ".cpp")))


class Progress:
    """How many of an optimizer's lines are done, in a file."""

    def __init__(self, config: pytest.Config, share: str):
        named = os.environ.get("LOWBIT_MATRIX_STATE")
        path = Path(named) if named else Path(config.cache.mkdir("native_matrix")) / "state.json"
        self.path = path if share == "0/1" else path.with_suffix(f".{share.replace('/', '-of-')}.json")
        self.state = json.loads(self.path.read_text()) if self.path.exists() else {}
        if self.state.get("sources") != (mark := sources()):
            self.state = {"sources": mark, "done": {}}
        self.done: dict[str, int] = self.state["done"]

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.state, indent=1) + "\n")


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_full_product(optimizer: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setitem(SHAPES, "matrix", TENSORS)
    share = os.environ.get("LOWBIT_MATRIX_SHARE", "0/1")
    progress, isas = Progress(request.config, share), list(libraries())
    first, each = map(int, share.split("/"))
    work, failed, start = lines(optimizer)[first::each], [], time.monotonic()
    before = progress.done.get(optimizer, 0)
    for k, setting in enumerate(work[before:], before + 1):
        isa = isas[zlib.crc32(str(setting).encode()) % len(isas)]
        tape: list = []
        with injected(tape, replay=False):
            expected = run(setting, "reference", steps=2)
        with injected(tape, replay=True):
            got = run(setting, "native", isa, steps=2)
        if found := differences(expected, got):
            failed.append(f"{setting} on {isa}: {'; '.join(found[:2])}")
        if not failed:
            progress.done[optimizer] = k
        if k % 500 == 0 or k == len(work) or len(failed) == 10:
            progress.save()
        if len(failed) == 10:
            break
    assert not failed, "\n".join(failed)
    with capsys.disabled():
        print(f"\n{optimizer}: {len(work):,} settings, {before:,} of them before; {time.monotonic() - start:.0f} s")


def test_the_product_is_complete():
    every = lines("adamw")
    assert len(every) == len(set(every)) == len(SIGNED) * len(STATE_FORMATS) * len(STORED) * 2
    for one, other in (
        ("m", "block"),
        ("v", "g"),
        ("rounding", "g"),
        ("p", "wrong"),
        ("block", "rounding"),
        ("v", "wrong"),
    ):
        pairs = {(getattr(s, one), getattr(s, other)) for s in every}
        assert pairs == set(product({a for a, _ in pairs}, {b for _, b in pairs}))
