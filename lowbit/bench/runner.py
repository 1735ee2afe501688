"""Many runs: which are still to be done, in which order, by how many processes, and where their results go."""

from __future__ import annotations

import tempfile
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from . import machine
from .data import Corpus
from .folder import VERSION, Folder
from .methods import Method
from .pool import run_jobs
from .progress import progress
from .train import Job, Settings

SMALL = 2_000_000  # parameters up to which one thread per run is fastest


@dataclass(frozen=True)
class Plan:
    """Everything a benchmark is: methods × learning rates × seeds under common settings."""

    methods: list[Method]
    lrs: list[float]
    seeds: list[int]
    settings: Settings
    corpus: Corpus
    reference: str = "adam-fair"
    title: str = "benchmark"
    command: str = ""

    def jobs(self) -> list[Job]:
        """Seed by seed, so that a benchmark stopped half way has whole pairs."""
        return [Job(m, lr, s) for s in self.seeds for lr in self.lrs for m in self.methods]

    def document(self) -> dict:
        """What `settings.json` records."""
        return {
            "version": VERSION, "title": self.title, "command": self.command, "reference": self.reference,
            "settings": self.settings.describe(), "compute": self.settings.compute.label,
            "corpus": self.corpus.describe(),
            "methods": [m.describe() for m in self.methods], "lrs": self.lrs, "seeds": self.seeds,
            "machine": machine.describe(),
        }  # fmt: skip


def workers_and_threads(parameters: int, runs: int, wanted: int | None, device: str) -> tuple[int, int]:
    """Processes, and threads in each: small models one thread per core, others all cores for one run."""
    cores = machine.cores()
    small = device == "cpu" and parameters <= SMALL
    workers = wanted if wanted is not None else min(cores, runs) if small else 1
    # Never two threads for small work: on a busy machine they mostly wait for each other (measured: 100 times slower).
    return workers, 1 if small else max(1, cores // max(1, workers))


def run(
    plan: Plan, out: Path, *, resume: bool = False, workers: int = 0, threads: int = 1, quiet: bool = False
) -> list[dict]:
    """Do what the folder `out` does not have yet; returns all results of the folder.

    Args:
        plan: what to run.
        out: the run folder; created, or continued with `resume`.
        resume: continue a folder that has runs already.
        workers: processes; 0 does the runs in this process.
        threads: of each process.
        quiet: no progress.
    """
    folder = Folder(out)
    folder.begin(plan.document(), resume=resume)
    finished = folder.finished()
    everything = plan.jobs()
    todo = [j for j in everything if j.key not in finished]
    if todo:
        watcher = progress(len(everything), len(everything) - len(todo), plan.settings.steps, quiet=quiet)
        with tempfile.TemporaryDirectory(prefix="lowbit-bench-") as scratch, watcher:
            handle = plan.corpus.store(Path(scratch) / "tokens")
            events = run_jobs(todo, plan.settings, handle, workers, threads)
            with closing(events):  # an interrupt must stop the processes before anything else is done
                for event in events:
                    watcher.event(event)
                    if event.result is not None:
                        folder.append(event.result)
    return folder.results()
