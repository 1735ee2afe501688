"""A step on a GPU: every tensor of an optimizer in a few launches, none of which waits for the host.

Jobs that the same kernels can step (one program, the same formats and types: `gpu.specialise.Special`) and that share
their constants are a bucket. A bucket's kernels are compiled for it and are launched once each for all of its tensors:

    begin      the working copies of scalars and vectors, and folds up to the first measurement
    measure    for each measurement a sweep over the gradient, then reductions, then folds
    judge      whether a tensor must be left as it is
    update     the sweep that writes
    finish     the scalars and vectors that persist

What a job is (pointers, shapes) is a table on the device for as long as the job's storage lasts. What a step changes
(gradients' addresses, seeds, step numbers, constants) is one small buffer, filled by one asynchronous copy: a captured
CUDA graph is replayed after that copy alone.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator
from ctypes import c_int32, c_uint64, sizeof
from itertools import accumulate
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ..gpu import jobs as structs
from ..gpu.machine import Machine, Module, machine
from ..gpu.nvrtc import sources
from ..gpu.specialise import Special, print_spec, special
from ..gpu.stages import TILE, Launch, elements, launches, lines, print_program, room
from ..layout import row_stride
from ..native import abi
from ..stages import Job, Program

THREADS, UNITS = 256, 4  # as in cuda/operands.h
CONSTANTS = 4 * abi.CONSTANTS  # bytes of a bucket's
ENOUGH = 2048  # blocks of threads that keep a GPU busy


@torch.no_grad()
def step(jobs: list[Job]) -> None:
    """Step every job: parameters, moments, scalars and skip counts, in place."""
    plan = _plans.get(jobs[0])
    if plan is None or not plan.fits(jobs):
        plan = _plans[jobs[0]] = _Plan(jobs)
    with torch.cuda.device(plan.device) if plan.device.type == "cuda" else contextlib.nullcontext():
        plan.refresh(jobs)
        plan.launch(jobs)
    increment_version([job.param for job in jobs])  # a graph that saved an old value must notice


def unsupported(program: Program) -> str:
    """Why a program cannot run here, or an empty string."""
    try:
        print_program(program)
    except ValueError as error:
        return str(error)
    return ""


def _pattern(jobs: list[Job]) -> list[tuple[torch.dtype, int]]:
    """What of the jobs decides on buckets and may differ from step to step: who shares constants with whom."""
    numbers: dict[int, int] = {}
    return [(job.grad.dtype, numbers.setdefault(id(job.constants), len(numbers))) for job in jobs]


class _Plan:
    """A list of jobs on one device, ready to be launched."""

    def __init__(self, jobs: list[Job]):
        self.device = jobs[0].param.device
        self.machine = machine(self.device)
        self.jobs, self.pattern = [ref(job) for job in jobs], _pattern(jobs)
        kinds: dict[tuple[Special, int], list[int]] = {}
        for number, (job, (_, constants)) in enumerate(zip(jobs, self.pattern, strict=True)):
            kinds.setdefault((special(job), constants), []).append(number)
        self.order = [number for numbers in kinds.values() for number in numbers]  # of the jobs in the device's tables
        self.places = {number: place for place, number in enumerate(self.order)}
        # A parameter that is not contiguous is worked on in a copy and written back.
        self.copies = {k: torch.empty(job.param.shape, dtype=job.param.dtype, device=self.device)
                       for k, job in enumerate(jobs) if not _is_plain(job.param)}
        table = (structs.Job * len(jobs))()
        end = sizeof(structs.Run) * len(jobs)
        for target, number in zip(table, self.order, strict=True):
            end = _fill(target, jobs[number], self.copies.get(number, jobs[number].param), end)
        self.workspace_bytes = end
        programs = dict.fromkeys(job.program for job in jobs)
        # What is measured over all tensors is added up program by program, in the order of the jobs.
        self.in_total = [k for program in programs for k, job in enumerate(jobs) if job.program is program]
        self.waiting: dict[tuple[int, ...], Tensor] = {}  # the jobs that wait for a total together
        changing = sizeof(structs.Dynamic) * len(jobs)
        self.buffer = torch.empty(changing + CONSTANTS * len(kinds), dtype=torch.uint8, device=self.device)
        self.dynamic, self.constants = self.buffer.data_ptr(), self.buffer.data_ptr() + changing
        self.buckets = [
            _Bucket(self, kind, numbers, [table[self.places[k]] for k in numbers], [jobs[k] for k in numbers])
            for (kind, _), numbers in kinds.items()
        ]
        self.table = _on_device(bytearray(table), self.device)

    def fits(self, jobs: list[Job]) -> bool:
        """Whether it was made for these jobs, as they are now."""
        return (
            len(jobs) == len(self.jobs)
            and all(known() is job for known, job in zip(self.jobs, jobs, strict=True))
            and _pattern(jobs) == self.pattern
        )

    def refresh(self, jobs: list[Job]) -> None:
        """Tell the device what this step changes: the gradients' addresses, seeds, step numbers, constants."""
        self.grads = [_plain(job.grad) for job in jobs]  # kept until the launches
        changed: list[int] = []
        for number in self.order:
            seed, step, _ = jobs[number].stream
            changed += (self.grads[number].data_ptr(), seed & _LOW, step & _LOW)
        constants = [value for bucket in self.buckets for value in bucket.packed(jobs[bucket.numbers[0]])]
        data = struct.pack(f"={len(changed)}Q{len(constants)}f", *changed, *constants)
        self.machine.write(self.buffer.data_ptr(), data)

    def launch(self, jobs: list[Job]) -> None:
        """Launch a step on what `refresh` has said."""
        for number, copy in self.copies.items():
            copy.copy_(jobs[number].param)
        workspace = torch.empty(self.workspace_bytes, dtype=torch.uint8, device=self.device)
        running = [(bucket, bucket.run(workspace.data_ptr())) for bucket in self.buckets]
        while running:
            waiting = [(bucket, run, stage) for bucket, run in running if (stage := next(run, None)) is not None]
            if waiting:
                self._total(workspace, [bucket for bucket, _, _ in waiting], waiting[0][2])
            running = [(bucket, run) for bucket, run, _ in waiting]
        for number, copy in self.copies.items():
            jobs[number].param.copy_(copy)

    def _total(self, workspace: Tensor, buckets: list[_Bucket], stage: Stage) -> None:
        """One number for all tensors of these buckets."""
        key = tuple(self.buckets.index(bucket) for bucket in buckets)
        if key not in self.waiting:
            theirs = {number for bucket in buckets for number in bucket.numbers}
            places = [self.places[number] for number in self.in_total if number in theirs]
            self.waiting[key] = torch.tensor(places, dtype=torch.int32).to(self.device)
        places = self.waiting[key]
        arguments = c_uint64(workspace.data_ptr()), c_uint64(places.data_ptr()), c_int32(len(places))
        function = buckets[0].measuring.function("total")
        self.machine.launch(function, 1, THREADS, (*arguments, c_int32(stage.reduce == "max")))


class _Bucket:
    """Jobs that are stepped by the same launches, one after the other in the plan's tables."""

    def __init__(self, plan: _Plan, kind: Special, numbers: list[int], table: list[structs.Job], jobs: list[Job]):
        self.plan, self.kind, self.numbers, self.index = plan, kind, numbers, len(plan.__dict__.get("buckets", ()))
        texts = sources()
        headers = {**{name: text for name, text in texts.items() if name.endswith(".h")}, "spec.h": print_spec(kind)}
        wanted = [(texts[name], headers) for name in ("measure.cu", "step.cu")]
        self.measuring, self.updating = plan.machine.prefetch(wanted)
        self.names = print_program(kind.program).constants
        shapes = [(job.rows, row_stride(job.cols)) for job in jobs]
        chunk = THREADS * kind.values * UNITS
        self.chunks = self._owners(table, "first_chunk", [-(-rows * stride // chunk) for rows, stride in shapes])
        tiles = [-(-rows // TILE) * (stride // kind.width) for rows, stride in shapes]
        over_columns = any(stage.over == "column" for stage in kind.program.measures)
        self.tiles = self._owners(table, "first_tile", tiles if over_columns else [0] * len(jobs))
        self.launches = [(launch, self._share(launch, jobs)) for launch in launches(kind.program)]

    def packed(self, job: Job) -> list[float]:
        """The constants of its jobs, padded to CONSTANTS."""
        values = [job.constants[name] for name in self.names]
        return values + [0.0] * (abi.CONSTANTS - len(values))

    def run(self, workspace: int) -> Iterator[Stage]:
        """Launch its kernels; yields where a number over all tensors is needed first."""
        ...

    def _owners(self, table: list[structs.Job], first: str, counts: list[int]) -> Tensor:
        """For each block of threads of a launch, the number of its job, which is told where its blocks begin."""
        start = 0
        for job, count in zip(table, counts, strict=True):
            setattr(job, first, start)
            start += count
        owners = torch.repeat_interleave(torch.arange(len(counts), dtype=torch.int32), torch.tensor(counts))
        return owners.to(self.plan.device)
