"""Tensors that several ranks share, of a rule that measures: ranks meet in the reference, kernels update the values.

A kernel cannot wait for other ranks in the midst of a step. But when all that a rule asks for is measured and folded,
what is left is a program of updates alone, which any backend runs: scalars and vectors are given, and no measurement is
left in it. Groups of rows may be cut by a shard, so a number for each becomes one for each row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..layout import row_stride, step_width
from ..shards import WHOLE
from ..stages import Job, Moment, Program, Stage
from . import reference


def suits_kernels(job: Job) -> bool:
    """Whether kernels can update a tensor's rows.

    They want some (without any, scalars go on as everywhere), and draw 16 random bits from halves of a hash, of which
    they begin with the first.
    """
    odd = job.first_value % 2 or job.all_rows * row_stride(job.cols) > WHOLE
    plain = job.stored is not None or job.param.is_contiguous()
    return bool(job.rows) and plain and not (job.noise and odd)


def step(jobs: list[Job]) -> None:
    """Step every job, in place; every rank that has rows of one of its tensors must come here."""
    reference.step(jobs, _update)


def _update(run: reference.Sweeps, stages: list[Stage]) -> set[int]:
    """The last sweep, as far as there are kernels for it; returns which of the jobs it has updated."""
    from . import for_program  # this module is one of those that it chooses from

    rest = _rest(run, stages)
    backend = for_program(rest, run.device)
    mine = {k for k, job in enumerate(run.jobs) if suits_kernels(job)} if backend is not reference else set[int]()
    lost = torch.zeros(len(run.jobs), 2, dtype=torch.int64, device=run.device)
    jobs = []
    for k, (job, skip) in enumerate(zip(run.jobs, run.skip.tolist() if mine else run.skip, strict=True)):
        if k in mine and skip:
            lost[k, 0] = job.rows * (row_stride(job.cols) // step_width(job.cols))
        elif k in mine:
            scalars = {name: run.scalars[name][k] for name in rest.scalars}
            vectors = {letter: _by_row(run.vectors[letter][k], run.program, letter, job) for letter in rest.vectors}
            made = replace(job, program=rest, scalars=scalars, vectors=vectors, skipped=lost[k], prepared=None)
            jobs.append(made)
    if jobs:
        backend.step(jobs)
    run.lost += lost[:, 0]
    return mine


def _by_row(vector: Tensor, program: Program, letter: str, job: Job) -> Tensor:
    if program.vectors[letter] != "group":
        return vector
    rows = torch.arange(job.first, job.first + job.rows, device=vector.device)
    return vector[rows // job.group_rows]


_rests: WeakKeyDictionary[Program, Program] = WeakKeyDictionary()


def _rest(run: reference.Sweeps, stages: list[Stage]) -> Program:
    """The updates of a program, with all that was measured given."""
    program = run.program
    if program not in _rests:
        read = {letter for stage in stages for letter in stage.reads}
        given: Mapping[str, Moment] = {
            letter: Moment(letter, over="column" if over == "column" else "row")
            for letter, over in program.vectors.items()
            if letter in read
        }
        scalars = dict.fromkeys(run.scalars, 0.0)  # those that folds have made, too
        _rests[program] = Program(tuple(stages), {**program.values, **given}, scalars, program.guarded)
    return _rests[program]
