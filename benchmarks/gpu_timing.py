"""Timing on a GPU: by CUDA events, with a copy of memory beside it; and what the machine is.

The rules of `timing.py` hold: what is compared is timed in turn, in one process, in shuffled order.
"""

from __future__ import annotations

import argparse
import math
import subprocess
from collections.abc import Callable, Sequence
from typing import Any

import gpu_tables
import timing
import torch

from lowbit.bench import machine

LEAST = 0.02  # seconds: what one sample takes at least
PATIENCE = 0.5  # seconds: what takes longer is timed once, not in rounds
PACKAGES = ("triton", "torchao", "bitsandbytes", "flashoptim")


class Timed:
    """A case of a call: the mean of as many calls as take LEAST, by CUDA events; on a CPU by its clock."""

    def __init__(self, work: Callable[[], Any], device: torch.device):
        self.work, self.device, self.repeat = work, device, 0

    def __call__(self) -> float:
        if not self.repeat:
            self.took()  # after the first call proper, allocators and caches still settle
            self.repeat = min(64, max(1, math.ceil(LEAST / self.took())))
        return self.took(self.repeat)

    def took(self, repeat: int = 1) -> float:
        if self.device.type == "cpu":
            return timing.timed(self.work, repeat)()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        begin.record()
        for _ in range(repeat):
            self.work()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / repeat


class Replayed(Timed):
    """The mean of several works in one CUDA graph: what the device takes for them, without the host (but on a CPU)."""

    def __init__(self, works: Sequence[Callable[[], Any]], device: torch.device):
        self.results = [work() for work in works]  # kernels are loaded before a graph is captured
        if device.type == "cpu":
            return super().__init__(lambda: [work() for work in works], device)
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.results = [work() for work in works]
        super().__init__(graph.replay, device)

    def took(self, repeat: int = 1) -> float:
        return super().took(repeat) / len(self.results)


class Memory:
    """What the allocator was asked for, and at most, since this began; nothing is known on a CPU."""

    def __init__(self, device: torch.device):
        self.known = device.type == "cuda"
        if self.known:
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            self.before = self._of("current")

    def _of(self, what: str) -> int:
        return torch.cuda.memory_stats()[f"requested_bytes.all.{what}"]

    def more(self, what: str = "current") -> int | None:
        return self._of(what) - self.before if self.known else None


def probes(device: torch.device, count: int) -> dict[str, tuple[timing.Case, int]]:
    """Memory at its best, and the bytes it moves: a copy (one stream read, one written), and a triad (two, one)."""
    a, b, c = (torch.ones(count, device=device) for _ in range(3))
    return {
        gpu_tables.COPY: (Timed(lambda: b.copy_(a), device), 2 * a.nbytes),
        "probe: triad": (Timed(lambda: torch.add(a, b, alpha=0.5, out=c), device), 3 * a.nbytes),
    }


def start(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Results with nothing measured yet."""
    packages = {name: machine.version(name) for name in PACKAGES}
    found = {**machine.describe(), **packages, "gpu": gpu(device), "commit": timing.commit()}
    return timing.start(args, found, quick=args.quick)


def gpu(device: torch.device) -> dict[str, Any]:
    """The card, and how it is set."""
    if device.type == "cpu":
        return {"name": "none: the CPU"}
    asked = [
        "driver_version",
        "clocks.sm",
        "clocks.max.sm",
        "clocks.mem",
        "power.limit",
        "power.draw",
        "temperature.gpu",
    ]
    command = ["nvidia-smi", f"--query-gpu={','.join(asked)}", "--format=csv,noheader", f"--id={device.index or 0}"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip().split(", ")
    except (OSError, subprocess.CalledProcessError):
        said = []
    its = torch.cuda.get_device_properties(device)
    about = {"name": its.name, "memory_bytes": its.total_memory, "multiprocessors": its.multi_processor_count}
    about |= {"capability": f"{its.major}.{its.minor}", "cuda": torch.version.cuda}
    return about | dict(zip(asked, said, strict=False))
