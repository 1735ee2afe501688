"""Launches all of a step but its update, as `lowbit.gpu.stages.launches` says, on whatever machine steps CPU tensors."""

from collections.abc import Sequence
from ctypes import addressof, c_float, c_int32, c_void_p, sizeof, string_at
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from lowbit.gpu import jobs as structs
from lowbit.gpu import machine, sources
from lowbit.gpu.specialise import Special, print_spec, special
from lowbit.gpu.stages import TILE, Launch, elements, launches, lines, print_program, room
from lowbit.layout import row_stride, step_width
from lowbit.native import abi
from lowbit.stages import Job

THREADS, UNITS = 256, 4  # as in cuda/operands.h


class Bucket:
    """Tensors that the same kernels measure."""

    def __init__(self, it: Special, jobs: Sequence[Job]):
        self.jobs, self.program = jobs, it.program
        self.printed = print_program(it.program)
        texts = sources()
        self.module = machine(torch.device("cpu")).module(texts["measure.cu"], {**texts, "spec.h": print_spec(it)})
        values = self.printed.packed(jobs[0].constants)
        machine(torch.device("cpu")).write(
            self.module.symbol("constants")[0], bytes((c_float * abi.CONSTANTS)(*values))
        )
        self.table, self.dynamic = (structs.Job * len(jobs))(), (structs.Dynamic * len(jobs))()
        self.runs = torch.full((len(jobs) * sizeof(structs.Run),), 255, dtype=torch.uint8)
        self.owners: dict[str, list[int]] = {"chunks": [], "tiles": []}
        size = 0
        for number, (target, now, job) in enumerate(zip(self.table, self.dynamic, jobs, strict=True)):
            size = self._fill(target, job, size)
            now.grad = job.grad.data_ptr()
            stride, width = row_stride(job.cols), step_width(job.cols)
            target.first_chunk, target.first_tile = len(self.owners["chunks"]), len(self.owners["tiles"])
            self.owners["chunks"] += [number] * -(-job.rows * stride // (THREADS * it.values * UNITS))
            self.owners["tiles"] += [number] * (-(-job.rows // TILE) * (stride // width))
        self.workspace = torch.full((size + 16,), 255, dtype=torch.uint8)
        # The kernels' arguments are copies that live as long as the bucket: an emulator reads them where they are.
        self.memory = [torch.frombuffer(bytearray(bytes(table)), dtype=torch.uint8) for table in (self.table, self.dynamic)]

    def _fill(self, target: structs.Job, job: Job, at: int) -> int:
        target.param, target.skipped = job.param.data_ptr(), job.skipped.data_ptr()
        for k, letter in enumerate(self.program.values):
            target.codes[k] = job.moments[letter]["codes"].data_ptr()
            if "scale" in job.moments[letter]:
                target.scale[k] = job.moments[letter]["scale"].data_ptr()
        for k, name in enumerate(self.program.scalars):
            target.scalars[k] = job.scalars[name].data_ptr()
        target.rows, target.cols, target.group_rows = job.rows, job.cols, job.group_rows
        for k, (name, over) in enumerate(zip(self.printed.vectors, self.printed.over, strict=True)):
            if name in job.vectors:
                target.vectors[k] = job.vectors[name].data_ptr()
            target.work_vectors[k] = at
            at += -(-4 * elements(over, job.rows, job.cols, job.group_rows) // 16) * 16
        floats, doubles = room(self.program, job.rows, job.cols)
        target.partial, target.sums = at, at + -(-4 * floats // 16) * 16
        return target.sums + 8 * doubles

    def launch(self, it: Launch, share: int) -> None:
        if it.over == "lines":
            most = max(lines(it, self.program, job.rows, job.cols, job.group_rows) for job in self.jobs)
            share = min(share, most)
        grids = {"jobs": len(self.jobs), "lines": share * len(self.jobs), **{k: len(v) for k, v in self.owners.items()}}
        owner = torch.tensor(self.owners.get(it.over, [0]), dtype=torch.int32)
        pointers = [x.data_ptr() for x in (*self.memory, self.runs, owner, self.workspace)]
        arguments = [*map(c_void_p, pointers), c_int32(it.measure), c_int32(share)]
        run = machine(torch.device("cpu")).launch
        run(self.module.function(it.kernel), grids[it.over], THREADS, arguments)

    def run(self, k: int) -> structs.Run:
        return structs.Run.from_buffer_copy(string_at(self.address(k), sizeof(structs.Run)))

    def address(self, k: int) -> int:
        return self.runs.data_ptr() + k * sizeof(structs.Run)


def measure(jobs: Sequence[Job], share: int = 3) -> list[Bucket]:
    """All but the update of a step; programs wait for each other at totals."""
    buckets = []
    for it, alike in groupby(sorted(jobs, key=lambda job: _order(jobs, job)), special):
        buckets.append(Bucket(it, list(alike)))
    waiting: list[Any] = [iter(launches(bucket.program)) for bucket in buckets]
    while any(waiting):
        asked = []
        for k, steps in enumerate(waiting):
            for it in steps or ():
                if it.over == "all":
                    asked.append((k, it))
                    break
                buckets[k].launch(it, share)
            else:
                waiting[k] = None
        if asked:
            _total(jobs, [buckets[k] for k, _ in asked], buckets[asked[0][0]].program.measures[asked[0][1].measure])
    return buckets


def _order(jobs: Sequence[Job], job: Job) -> Any:
    kinds: list[Any] = []
    for each in jobs:
        if special(each) not in kinds:
            kinds.append(special(each))
    return kinds.index(special(job))


def _total(jobs: Sequence[Job], buckets: list[Bucket], stage: Any) -> None:
    """Over all tensors, program by program in the order of the jobs."""
    places = {id(job): bucket.address(k) for bucket in buckets for k, job in enumerate(bucket.jobs)}
    programs = list(dict.fromkeys(job.program for job in jobs))
    ordered = sorted((job for job in jobs if id(job) in places), key=lambda job: programs.index(job.program))
    pointers: Tensor = torch.tensor([places[id(job)] for job in ordered])
    arguments = [c_void_p(pointers.data_ptr()), c_int32(len(pointers)), c_int32(stage.reduce == "max")]
    on = machine(torch.device("cpu"))
    on.launch(buckets[0].module.function("total"), 1, THREADS, arguments)


__all__ = ["Bucket", "addressof", "measure"]
