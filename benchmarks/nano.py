"""Many short runs of a nano LLaMA, one line of results each: what optimizer_losses.py and recipes.py share.

A script names its runs and says how to build the model and the optimizer of one; here are the loop and the processes.
Model, text and batches are those of `lowbit bench` (0.14M parameters, bytes of the Python standard library), parameters
are fp32, and runs of one seed have the same start and the same batches, so that differences can be taken in pairs.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path
from typing import Any

import timing
import torch
import torch.nn.functional as F

from lowbit.bench import data, machine, stats
from lowbit.bench.model import PRESETS, Llama
from lowbit.bench.train import diverged, learning_rate

SHAPE = PRESETS["nano"]
STEPS, BATCH, WARMUP, WINDOWS = 400, 8, 0.1, 512
WORST = 30.0  # nats: a loss beyond is not worth another step


@dataclass(frozen=True, order=True)
class Run:
    """One training run: a line of a table, one of its variants, a learning rate and a seed."""

    seed: int
    case: str
    variant: str
    lr: float
    steps: int = STEPS


Trained = tuple[torch.nn.Module, torch.optim.Optimizer]
Builder = Callable[[Run], Trained]


def model_of(seed: int) -> Llama:
    """The model at its start."""
    return Llama(SHAPE).initialise(seed)


def train(run: Run, build: Builder, corpus: data.Corpus) -> dict[str, Any]:
    """Do one run: the final validation loss in nats a byte, and why it counts as diverged, if it does."""
    began = time.thread_time()
    model, opt = build(run)
    peaks = [group["lr"] for group in opt.param_groups]
    initial, losses, final, why = evaluate(model, corpus), [], math.nan, ""
    for step in range(run.steps):
        factor = learning_rate(step, run.steps, WARMUP)
        for group, peak in zip(opt.param_groups, peaks, strict=True):
            group["lr"] = peak * factor
        x, y = corpus.batch(run.seed, step, BATCH, SHAPE.seq)
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        losses.append(loss.item())
        if not losses[-1] < WORST:
            why = f"training loss {losses[-1]:.3g} at step {step + 1}"
            break
        loss.backward()
        opt.step()
        opt.zero_grad()
    else:
        final = evaluate(model, corpus)
        why = diverged(initial, final, losses)
    seconds = round(time.thread_time() - began, 1)
    return {**asdict(run), "loss": final if math.isfinite(final) else None, "why": why, "seconds": seconds}


@torch.no_grad()
def evaluate(model: torch.nn.Module, corpus: data.Corpus) -> float:
    """Mean loss over the fixed windows."""
    model.eval()
    x, y = corpus.validation(WINDOWS, SHAPE.seq)
    parts = zip(x.split(64), y.split(64), strict=True)
    total = sum(F.cross_entropy(model(a).flatten(0, 1), b.flatten()).item() * len(a) for a, b in parts)
    model.train()
    return total / len(x)


_corpus: data.Corpus | None = None


def _begin() -> None:
    global _corpus
    torch.set_num_threads(1)
    _corpus = data.load()


def _attempt(run: Run, build: Builder) -> dict[str, Any]:
    assert _corpus is not None
    return train(run, build, _corpus)


class Results:
    """A file of lines, one a run, each after the line of the machine and the commit that made it; or no file."""

    def __init__(self, path: Path | None):
        self.path = path
        text = path.read_text() if path and path.exists() else ""
        self.torn = not text.endswith("\n") and bool(text)  # killed while it wrote
        self.lines = [json.loads(line) for line in text.split("\n")[:-1]]
        self.runs = {key(line): line for line in self.lines if "loss" in line}
        self.begun = False  # whether the machine is noted

    @property
    def environments(self) -> list[dict[str, Any]]:
        """Where the runs were done, each time the script was begun."""
        return [line["environment"] for line in self.lines if "environment" in line]

    def score(self, run: Run) -> float:
        """The loss of a run that is there; infinite if it diverged."""
        line = self.runs[run]
        return math.inf if line["why"] else line["loss"]

    def append(self, line: dict[str, Any]) -> None:
        """One more line, written at once."""
        self.lines.append(line)
        if "loss" in line:
            self.runs[key(line)] = line
        if self.path and self.torn:
            self.path.write_text("".join(json.dumps(line) + "\n" for line in self.lines))
        elif self.path:
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")
        self.torn = False

    def do(self, runs: Iterable[Run], build: Builder, processes: int) -> None:
        """Those of these runs that are not there yet, in so many processes; 0: in this one."""
        todo = [run for run in dict.fromkeys(runs) if run not in self.runs]
        if todo and not self.begun:
            about = {"steps": STEPS, "batch": BATCH, "seq": SHAPE.seq, "corpus": data.load().describe()}
            versions = {name: machine.version(name) for name in ("torchao", "bitsandbytes")}
            self.append({"environment": {**machine.describe(), **versions, "commit": timing.commit(), **about}})
            self.begun = True
        if todo and not processes:
            _begin()
            for run in todo:
                self.append(_attempt(run, build))
        elif todo:
            self._share(todo, build, processes)

    def _share(self, todo: Sequence[Run], build: Builder, processes: int) -> None:
        spawn = multiprocessing.get_context("spawn")
        failed = []
        with ProcessPoolExecutor(processes, mp_context=spawn, initializer=_begin) as pool:
            waiting = {pool.submit(_attempt, run, build): run for run in todo}
            while waiting:
                for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                    run, error = waiting.pop(future), future.exception()
                    if error is None:
                        self.append(line := future.result())
                        said = [line["loss"], line["why"], line["seconds"]]
                    else:  # a defect of one must not lose the others
                        failed.append(error)
                        said = [repr(error)]
                    print(*astuple(run), *said, f"{len(waiting)} left", file=sys.stderr, flush=True)
        if failed:
            raise failed[0]


def key(line: dict[str, Any]) -> Run:
    """Which run a line is of."""
    return Run(**{name: line[name] for name in Run.__dataclass_fields__})


def screen(results: Results, firsts: Sequence[Run], build: Builder, processes: int, most: int = 5) -> list[Run]:
    """For each of these runs the one with the best learning rate, powers of two apart: both neighbours lose more.

    All go downhill together, from their own learning rates, for at most so many steps.
    """
    found: dict[Run, dict[float, float]] = {first: {} for first in firsts}
    centres = {first: first.lr for first in firsts}
    for _ in range(most):
        wanted = [
            (first, lr) for first in firsts for lr in neighbours(centres[first]) if lr not in found[first]
        ]  # fmt: skip
        if not wanted:
            break
        results.do([replace(first, lr=lr) for first, lr in wanted], build, processes)
        for first, lr in wanted:
            found[first][lr] = results.score(replace(first, lr=lr))
        centres = {first: min(losses, key=losses.__getitem__) for first, losses in found.items()}
    return [replace(first, lr=lr) for first, lr in centres.items()]


def neighbours(lr: float) -> tuple[float, float, float]:
    """A learning rate between half and twice it."""
    return lr / 2, lr, lr * 2


def best(lines: Sequence[dict[str, Any]]) -> tuple[float, dict[int, float]] | None:
    """The learning rate with the lowest mean loss and its losses by seed; one at which a run diverged cannot be it."""
    found: dict[float, dict[int, float]] = {}
    for lr in {line["lr"] for line in lines}:
        its = [line for line in lines if line["lr"] == lr]
        if not any(line["why"] for line in its):
            found[lr] = {line["seed"]: line["loss"] for line in its}
    most = max(map(len, found.values()), default=0)
    whole = {lr: losses for lr, losses in found.items() if len(losses) == most}
    return min(whole.items(), key=lambda item: statistics.mean(item[1].values()), default=None)


def difference(d: stats.Difference | None) -> str:
    """The mean of paired differences and its 95 % interval."""
    if d is None:
        return "not run"
    return f"{d.mean:+.3f} " + ("(1 seed)" if d.low is None else f"[{d.low:+.3f}, {d.high:+.3f}]")
