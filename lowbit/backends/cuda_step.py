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

import itertools
from collections.abc import Iterator, Sequence
from ctypes import addressof, c_float, c_uint64, sizeof, string_at
from dataclasses import dataclass
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ..gpu import jobs as structs
from ..gpu.machine import Function, Machine, Module, machine, sources
from ..gpu.specialise import Special, print_spec, special
from ..layout import row_stride
from ..native import abi
from ..stages import Job, Program, Stage

THREADS, UNITS = 256, 4  # as in cuda/operands.h
TILE = 512  # rows that a sum over a column adds one after the other
CONSTANTS = 4 * abi.CONSTANTS  # bytes


@torch.no_grad()
def step(jobs: list[Job]) -> None:
    """Step every job: parameters, moments, scalars and skip counts, in place."""
    kept: list[Tensor] = []  # contiguous copies, for as long as the kernels work on them
    back: list[tuple[Tensor, Tensor]] = []
    plan = _plan(jobs)
    plan.run(jobs)
    increment_version([job.param for job in jobs])  # a graph that saved an old value must notice


def _plan(jobs: list[Job]) -> _Plan:
    plan = _plans.get(jobs[0])
    if plan is None or not plan.fits(jobs):
        plan = _plans[jobs[0]] = _Plan(jobs)
    return plan


def _pattern(jobs: list[Job]) -> list[tuple[torch.dtype, int]]:
    """What of the jobs decides on buckets and may differ from step to step: who shares constants with whom."""
    numbers: dict[int, int] = {}
    return [(job.grad.dtype, numbers.setdefault(id(job.constants), len(numbers))) for job in jobs]


@dataclass
class _Bucket:
    """Jobs that are stepped by the same launches."""

    special: Special
    numbers: list[int]  # of its jobs
    constants: tuple[str, ...]  # names, in the kernels' order
    modules: dict[str, Module]
    owner: Tensor  # of each chunk: the job it is of
    at: int  # where its constants lie in the plan's buffer


class _Plan:
    """A list of jobs on one device, ready to be launched."""

    def __init__(self, jobs: list[Job]):
        self.device = jobs[0].param.device
        self.machine: Machine = machine(self.device)
        self.jobs = [ref(job) for job in jobs]
        self.pattern = _pattern(jobs)
        kinds: dict[Any, list[int]] = {}
        for number, (job, (_, constants)) in enumerate(zip(jobs, self.pattern, strict=True)):
            kinds.setdefault((special(job), constants), []).append(number)
        table = (structs.Job * len(jobs))()
        size = sizeof(structs.Run) * len(jobs)
        for target, job in zip(table, jobs, strict=True):
            size = _fill(target, job, size)
        self.workspace_bytes = size
        ...

    def fits(self, jobs: list[Job]) -> bool:
        """Whether it was made for these jobs, as they are now."""
        return (
            len(jobs) == len(self.jobs)
            and all(known() is job for known, job in zip(self.jobs, jobs, strict=True))
            and _pattern(jobs) == self.pattern
        )


_plans: WeakKeyDictionary[Job, _Plan] = WeakKeyDictionary()


def _fill(target: structs.Job, job: Job, at: int) -> int:
    """Point a struct to a job's tensors, and lay out its part of the workspace from byte `at` on; returns its end."""
    target.param, target.skipped = job.param.data_ptr(), job.skipped.data_ptr()
    target.companion = None if job.companion is None else job.companion.data_ptr()
    for k, letter in enumerate(job.program.values):
        parts = job.moments[letter]
        target.codes[k] = parts["codes"].data_ptr()
        target.scale[k] = parts["scale"].data_ptr() if "scale" in parts else None
        target.base[k] = parts["base"].data_ptr() if "base" in parts else None
    for k, name in enumerate(job.program.scalars):
        target.scalars[k] = job.scalars[name].data_ptr()
    target.rows, target.cols, target.group_rows = job.rows, job.cols, job.group_rows
    target.tensor = job.stream[2] & 0xFFFFFFFF
    persistent = [letter for letter in job.program.moments if letter not in job.program.values]
    temporary = [letter for letter in job.program.vectors if letter not in persistent]
    for k, letter in enumerate((*persistent, *temporary)):
        if letter in persistent:
            target.vectors[k] = job.vectors[letter].data_ptr()
        target.work_vectors[k] = at
        at += _padded(4 * _elements(job, job.program.vectors[letter]))
    measures = job.program.measures
    target.x = at
    at += _padded(4 * max((_elements(job, stage.over) for stage in measures), default=0))
    ...
    return at
