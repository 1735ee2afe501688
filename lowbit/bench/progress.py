"""Live progress: bars on a terminal, plain lines in a log. Always on stderr, so that `--json` owns stdout."""

from __future__ import annotations

import sys
import time
from typing import Protocol

from .pool import Event
from .train import Job

_HEARTBEAT = 30.0  # seconds between two plain lines when nothing has finished


class Progress(Protocol):
    """What the runner tells whoever is watching."""

    def __enter__(self) -> Progress: ...
    def __exit__(self, *exc: object) -> None: ...
    def event(self, event: Event) -> None:
        """Take note of what a worker said."""
        ...


def progress(total: int, done: int, steps: int, *, quiet: bool = False) -> Progress:
    """Bars if stderr is a terminal, lines if not, nothing if `quiet`."""
    if quiet:
        return Silent()
    return Bars(total, done, steps) if sys.stderr.isatty() else Lines(total, done, steps)


def name_of(job: Job) -> str:
    """A run in one short phrase."""
    return f"{job.method.name}  lr {job.lr:g}  seed {job.seed}"


def verdict(result: dict) -> str:
    """How a run ended, in one short phrase."""
    if result["status"] != "ok":
        return f"FAILED: {result['error']}"
    if result["final_val"] is None:
        return f"diverged: {result['diverged_why']}"
    flag = "  (diverged)" if result["diverged"] else ""
    return f"validation loss {result['final_val']:.4f}, {result['tokens_per_second']:,.0f} tokens/s{flag}"


class Silent:
    """No output at all."""

    def __enter__(self) -> Silent:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def event(self, event: Event) -> None:
        """Nothing to say."""


class Lines:
    """One line for each finished run, and a sign of life in between."""

    def __init__(self, total: int, done: int, steps: int):
        self.total, self.done, self.steps = total, done, steps
        self.started = self.spoke = time.monotonic()
        self.first = done
        self.at: dict[int, int] = {}

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def eta(self) -> str:
        """Time left, judged by the steps done so far."""
        work = (self.done - self.first) * self.steps + sum(self.at.values())
        if not work:
            return "?"
        left = ((self.total - self.first) * self.steps - work) * (time.monotonic() - self.started) / work
        return f"{int(left) // 60}:{int(left) % 60:02d}"

    def event(self, event: Event) -> None:
        """Print a line if a run ended, or if it has been quiet for long."""
        self.at[event.worker] = event.step
        if event.result is not None:
            self.done += 1
            self.at[event.worker] = 0
            self.say(f"[{self.done}/{self.total}] {name_of(event.job)}  {verdict(event.result)}  left {self.eta()}")
        elif time.monotonic() - self.spoke > _HEARTBEAT:
            where = f"step {event.step}/{self.steps}  loss {event.loss:.3f}"
            self.say(f"… {name_of(event.job)}  {where}  left {self.eta()}")

    def say(self, text: str) -> None:
        """One line, at once."""
        self.spoke = time.monotonic()
        print(text, file=sys.stderr, flush=True)


class Bars:
    """One bar for the whole benchmark and one for each worker."""

    def __init__(self, total: int, done: int, steps: int):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as RichProgress

        self.lines = Lines(total, done, steps)
        self.rich = RichProgress(
            TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"), TimeElapsedColumn(), console=Console(stderr=True),
        )  # fmt: skip
        self.whole = self.rich.add_task("[bold]runs", total=total, completed=done, note="left ?")
        self.tasks: dict[int, object] = {}

    def __enter__(self) -> Bars:
        self.rich.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.rich.stop()

    def event(self, event: Event) -> None:
        """Move the bar of the worker; print a line above the bars when its run ends."""
        lines = self.lines
        if event.worker not in self.tasks:
            self.tasks[event.worker] = self.rich.add_task("", total=lines.steps, note="")
        task = self.tasks[event.worker]
        note = f"loss {event.loss:.3f}" if event.step and event.result is None else ""
        self.rich.update(task, description=name_of(event.job), completed=event.step, note=note)  # pyright: ignore
        lines.at[event.worker] = event.step
        if event.result is not None:
            lines.done += 1
            lines.at[event.worker] = 0
            self.rich.console.print(f"{name_of(event.job)}  {verdict(event.result)}", highlight=False)
        elif event.step == 0:
            self.rich.reset(task)  # pyright: ignore
        self.rich.update(self.whole, completed=lines.done, note=f"left {lines.eta()}")
