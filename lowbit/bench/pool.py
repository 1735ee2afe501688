"""Worker processes for runs. Small runs are bound by call overhead: two one-thread processes beat two threads.

Processes are started afresh (spawn) and kept for many runs. A worker that dies (out of memory, a crash in native code)
costs its run, not the benchmark: the parent reports the run as failed and starts another worker.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess

from .data import Corpus
from .train import Job, Settings

_REPORT_EVERY = 0.25  # seconds between two progress messages of one worker


@dataclass(frozen=True)
class Event:
    """Something a worker said: progress (`result` is None), or a finished or failed run."""

    worker: int
    job: Job
    step: int = 0
    loss: float = 0.0
    result: dict | None = None


def run_jobs(
    jobs: list[Job], settings: Settings, handle: dict, workers: int, threads: int
) -> Generator[Event, None, None]:
    """Do the jobs in `workers` processes of `threads` threads each; yields what happens, results as they come.

    With `workers` = 0 the jobs are done in this process, one after the other (for debugging, and for tests).
    """
    if workers == 0:
        yield from _inline(jobs, settings, handle, threads)
        return
    pool = _Pool(settings, handle, threads)
    try:
        yield from pool.run(list(jobs), workers)
    finally:
        pool.stop()


def failure(job: Job, error: str, details: str = "") -> dict:
    """The result line of a run that did not finish because of a defect, not because of its numbers."""
    return {"method": job.method.name, "lr": job.lr, "seed": job.seed, "status": "error", "error": error,
            "traceback": details}  # fmt: skip


def _attempt(job: Job, settings: Settings, corpus: Corpus, progress: Callable[[int, float], None]) -> dict:
    from .train import train

    try:
        return train(job, settings, corpus, progress)
    except Exception as error:  # a defect in one method must not lose the others
        return failure(job, f"{type(error).__name__}: {error}", traceback.format_exc())


def _inline(jobs: list[Job], settings: Settings, handle: dict, threads: int) -> Iterator[Event]:
    import torch

    from .data import restore

    corpus, before = restore(handle), torch.get_num_threads()
    for job in jobs:
        yield Event(0, job)
        torch.set_num_threads(threads)
        try:
            result = _attempt(job, settings, corpus, lambda step, loss: None)
        finally:
            torch.set_num_threads(before)
        yield Event(0, job, settings.steps, result=result)


def _worker(pipe: Connection, settings: Settings, handle: dict, threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C means
    import torch

    from .data import restore

    torch.set_num_threads(threads)
    corpus = restore(handle)
    last = 0.0

    def progress(step: int, loss: float) -> None:
        nonlocal last
        if time.monotonic() - last > _REPORT_EVERY:
            last = time.monotonic()
            pipe.send((step, loss, None))

    try:
        while (job := pipe.recv()) is not None:
            pipe.send((settings.steps, 0.0, _attempt(job, settings, corpus, progress)))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the parent is gone


class _Pool:
    def __init__(self, settings: Settings, handle: dict, threads: int):
        self.settings, self.handle, self.threads = settings, handle, threads
        self.context = multiprocessing.get_context("spawn")
        self.processes: dict[int, tuple[SpawnProcess, Connection]] = {}
        self.running: dict[int, Job] = {}

    def start(self, number: int) -> None:
        ours, theirs = self.context.Pipe()
        arguments = (theirs, self.settings, self.handle, self.threads)
        process = self.context.Process(target=_worker, args=arguments, daemon=True)
        # The thread pools of a child read these when torch is imported, before it can set anything itself.
        old = {k: os.environ.get(k) for k in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        os.environ.update(dict.fromkeys(old, str(self.threads)))
        try:
            process.start()
        finally:
            for key, value in old.items():
                if value is None:
                    os.environ.pop(key, None)
                else:
                    os.environ[key] = value
        theirs.close()
        self.processes[number] = (process, ours)

    def run(self, jobs: list[Job], workers: int) -> Iterator[Event]:
        for number in range(min(workers, len(jobs))):
            self.start(number)
            yield self.give(number, jobs)
        while self.running:
            ready = wait([self.processes[n][1] for n in self.running], timeout=1.0)
            for number, job in list(self.running.items()):
                pipe = self.processes[number][1]
                if pipe not in ready:
                    continue
                try:
                    step, loss, result = pipe.recv()
                except (EOFError, ConnectionResetError):
                    result, step, loss = self.bury(number, job), 0, 0.0
                yield Event(number, job, step, loss, result)
                if result is not None:
                    del self.running[number]
                    if jobs:
                        if number not in self.processes:
                            self.start(number)
                        yield self.give(number, jobs)

    def give(self, number: int, jobs: list[Job]) -> Event:
        job = self.running[number] = jobs.pop(0)
        self.processes[number][1].send(job)
        return Event(number, job)

    def bury(self, number: int, job: Job) -> dict:
        process, pipe = self.processes.pop(number)
        process.join(timeout=10)
        pipe.close()
        code = process.exitcode
        why = f"signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
        hint = " (out of memory?)" if code == -9 else ""
        return failure(job, f"the worker process died: {why}{hint}")

    def stop(self) -> None:
        for process, pipe in self.processes.values():
            if self.running:
                process.terminate()
            else:
                try:
                    pipe.send(None)
                except OSError:
                    process.terminate()
        for process, pipe in self.processes.values():
            process.join(timeout=10)
            pipe.close()
