"""A step on a GPU: every tensor of an optimizer in a few launches, none of which waits for the host.

Jobs that the same kernels can step (one program, the same formats and types: `gpu.specialise.Special`) and that share
their constants are a bucket. A bucket's kernels are compiled for it and are launched once each for all of its tensors:

    follow     the constants that only the device knows, of all buckets, where a learning rate is a tensor there
    begin      the working copies of scalars and vectors, and folds up to the first measurement
    measure    for each measurement a sweep over the gradient, then reductions, then folds
    judge      whether a tensor must be left as it is
    update     the sweep that writes, but for what its quick numbers doubt
    again      the same of that, with plain floats
    finish     the scalars and vectors that persist

What a job is (pointers, shapes) is a table on the device for as long as the job's storage lasts. What a step changes
(gradients' addresses, seeds, step numbers, constants) is one small buffer, filled by one asynchronous copy: a captured
CUDA graph is replayed after that copy alone.
"""

from __future__ import annotations

import contextlib
from array import array
from collections.abc import Iterator, Mapping
from ctypes import c_int32, c_uint64, sizeof
from functools import lru_cache
from weakref import WeakKeyDictionary, proxy, ref

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from .. import tape
from ..gpu import Arguments, Module, machine, sources
from ..gpu import jobs as structs
from ..gpu.specialise import Special, print_spec, special
from ..gpu.stages import TILE, Launch, elements, launches, lines, print_program, room
from ..layout import row_stride
from ..native import abi
from ..stages import Batch, Job, Kept, Program, Stage, Turn

THREADS, UNITS, UPDATERS = 256, 4, 128  # as in cuda/operands.h
CONSTANTS, NODES = 4 * abi.CONSTANTS, sizeof(structs.Node) * tape.NODES  # bytes of a bucket's
FOLLOWING = ("stdint.h", "abi.h", "job.h")  # headers of constants.cu
EAGER = 4  # plans that are kept for steps that begin with the same tensor
ENOUGH = 2048  # blocks of threads that keep a GPU busy
REVISERS = 2048  # blocks of threads that look for what is to be done again, or one for 8 chunks if that is more
_LOW = 2**64 - 1
_DYNAMIC = sizeof(structs.Dynamic) // 8  # numbers of a job's


@torch.no_grad()
def step(jobs: list[Job]) -> None:
    """Step every job: parameters, moments, scalars and skip counts, in place."""
    plan = _found(jobs)
    if plan is None:
        # Those that graphs were captured of are kept, and a few others: which tensors have gradients may alternate.
        known, plan = _plans.get(jobs[0], []), _Plan(jobs)
        eager = [its for its in known if not its.captured]
        _plans[jobs[0]] = [*(its for its in known if its.captured), *eager[1 - EAGER :], plan]
    with _on(plan.device), plan.machine.held():
        grads = plan.refresh(jobs)
        plan.launch(jobs)
        del grads  # contiguous copies were needed until now
    increment_version([x for job in jobs for x in job.written])  # a graph that saved an old value must notice


def uncapturable(jobs: list[Job]) -> str:
    """Why a CUDA graph cannot be captured of a step of these jobs (which need no copies), or an empty string."""
    if _found(jobs) is None:
        return "it is not ready: do one step before, with gradients for the same tensors, of the same dtype"
    return ""


@torch.no_grad()
def capture(jobs: list[Job]) -> None:
    """Put the launches of a step into the graph that is being captured. They read what `prepare` tells."""
    plan = _found(jobs)
    assert plan is not None
    plan.captured = True  # the graph has its addresses
    with _on(plan.device), plan.machine.held():
        plan.launch(jobs)
    increment_version([x for job in jobs for x in job.written])


def unprepared(jobs: list[Job]) -> str:
    """Why no captured step can be told to be this one, or an empty string."""
    plan = _found(jobs)
    if plan is not None and plan.captured:
        return ""
    if not any(known.captured for known in _plans.get(jobs[0], ())):
        return "none was captured since the optimizer was made, loaded or moved, of a step that began with this tensor"
    return (
        "which tensors have a gradient, its dtype, which of them have made equally many steps, or whether lr is a "
        "tensor on the device is not as captured"
    )


@torch.no_grad()
def prepare(jobs: list[Job]) -> None:
    """Tell the device what a captured step is to do when it is replayed next."""
    plan = _found(jobs)
    assert plan is not None
    with _on(plan.device), plan.machine.held():
        plan.refresh(jobs)
    increment_version([x for job in jobs for x in job.written])


def _found(jobs: list[Job]) -> _Plan | None:
    """The plan for these jobs, as they are now."""
    kept = jobs.kept if isinstance(jobs, Batch) else Kept()
    if kept.plan is None:
        kept.plan = next((plan for plan in _plans.get(jobs[0], ()) if plan.fits(jobs)), None)
    return kept.plan


def _gradients(jobs: list[Job]) -> list[Tensor]:
    return jobs.grads if isinstance(jobs, Batch) else [job.grad for job in jobs]


def _on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def unsupported(program: Program) -> str:
    """Why a program cannot run here, or an empty string."""
    try:
        print_program(program)
    except ValueError as error:
        return str(error)
    return ""


class _Plan:
    """A list of jobs on one device, ready to be launched."""

    def __init__(self, jobs: list[Job]):
        self.device = jobs[0].param.device
        self.machine = machine(self.device)
        self.captured = False  # in a graph, which is to find all memory where it was
        self.jobs, self.pattern = [ref(job) for job in jobs], _pattern(jobs)
        self.follows = any(traced for _, _, traced in self.pattern)  # constants that only the device knows
        kinds: dict[tuple[Special, int], list[int]] = {}
        for number, (job, (_, turn, _)) in enumerate(zip(jobs, self.pattern, strict=True)):
            kinds.setdefault((special(job), turn), []).append(number)
        # Jobs that the same folds are for follow each other in the tables: one launch begins them all.
        begun: dict[tuple[Special, int], int] = {}
        for (kind, turn), numbers in kinds.items():
            begun[kind.folds, turn] = begun.get((kind.folds, turn), 0) + len(numbers)
        alike = list(begun)
        kinds = dict(sorted(kinds.items(), key=lambda item: alike.index((item[0][0].folds, item[0][1]))))
        self.order = [number for numbers in kinds.values() for number in numbers]  # of the jobs in the tables
        self.places = {number: place for place, number in enumerate(self.order)}
        self.in_order = self.order == list(range(len(jobs)))
        # What is measured over all tensors is added up program by program, in the order of the jobs.
        programs = {program: k for k, program in enumerate(dict.fromkeys(job.program for job in jobs))}
        self.in_total = sorted(range(len(jobs)), key=lambda number: programs[jobs[number].program])
        self.totals: dict[tuple[int, ...], Tensor] = {}  # the places of the jobs of buckets that share a total
        # A parameter that is not contiguous is worked on in a copy and written back.
        odd = {k: job.param for k, job in enumerate(jobs) if job.stored is None and not _is_plain(job.param)}
        self.copies = {k: torch.empty(param.shape, dtype=param.dtype, device=self.device) for k, param in odd.items()}
        table = (structs.Job * len(jobs))()
        self.room = sizeof(structs.Run) * len(jobs)  # bytes of the workspace
        for target, number in zip(table, self.order, strict=True):
            self.room = _fill(target, jobs[number], self.copies.get(number), self.room)
        changing = sizeof(structs.Dynamic) * len(jobs)
        self.changing = array("Q", bytes(changing))
        room = changing + CONSTANTS * len(kinds), NODES * self.follows * len(kinds)
        self.buffer = torch.empty(sum(room), dtype=torch.uint8, device=self.device)
        constants = self.buffer.data_ptr() + changing
        texts = [text for kind, _ in kinds for text in (_text("step.cu", kind), _text("measure.cu", kind.folds))]
        texts += [(sources()["constants.cu"], {name: sources()[name] for name in FOLLOWING})] * self.follows
        modules = iter(self.machine.prefetch(texts))  # all at once: the first time, each takes seconds to compile
        self.buckets = []
        for index, ((kind, turn), numbers) in enumerate(kinds.items()):
            rows, begins = [table[self.places[k]] for k in numbers], begun.pop((kind.folds, turn), 0)
            bucket = _Bucket(self, kind, numbers, rows, begins, next(modules), next(modules), self.room)
            self.buckets.append(bucket)
            self.room += _padded(4 * len(bucket.chunks))
            for row in rows:
                row.constants = constants + index * CONSTANTS
        if self.follows:
            nodes = self.buffer.data_ptr() + room[0]
            self.following = next(modules).function("follow"), Arguments([c_uint64(nodes), c_uint64(constants)])
        self.table = torch.frombuffer(bytearray(table), dtype=torch.uint8).to(self.device)

    def fits(self, jobs: list[Job]) -> bool:
        """Whether it was made for these jobs, as they are now."""
        return (
            len(jobs) == len(self.jobs)
            and all(known() is job for known, job in zip(self.jobs, jobs, strict=True))
            and _pattern(jobs) == self.pattern
        )

    def refresh(self, jobs: list[Job]) -> list[Tensor]:
        """Tell the device what this step changes: gradients' addresses, seeds, step numbers, constants.

        Returns the gradients, contiguous, to be kept until the launches.
        """
        grads = _gradients(jobs)
        kept = jobs.kept if isinstance(jobs, Batch) else Kept()
        if kept.plain is None:
            kept.plain = all(map(_is_plain, grads))
        if not kept.plain:
            grads = [_plain(grad) for grad in grads]
        # The fields of structs.Dynamic, one for all jobs at a time.
        changing, addresses = self.changing, array("Q", map(Tensor.data_ptr, grads))
        changing[::_DYNAMIC] = addresses if self.in_order else array("Q", [addresses[number] for number in self.order])
        constants: list[float] = []
        for bucket in self.buckets:
            turn, count = jobs[bucket.numbers[0]].turn, len(bucket.numbers)
            rows = slice(_DYNAMIC * bucket.first, _DYNAMIC * (bucket.first + count))
            for field, number in ((1, turn.seed), (2, turn.step)):
                changing[rows.start + field : rows.stop : _DYNAMIC] = array("Q", [number & _LOW]) * count
            constants += bucket.packed(turn)
        data = changing.tobytes() + array("f", constants).tobytes()  # infinite beyond fp32
        if self.follows:
            data += b"".join(bucket.nodes(jobs[bucket.numbers[0]].turn.traced) for bucket in self.buckets)
        self.machine.write(self.buffer.data_ptr(), data)
        return grads

    def launch(self, jobs: list[Job]) -> None:
        """Launch a step, on what `refresh` has told."""
        for number, copy in self.copies.items():
            copy.copy_(jobs[number].param)
        if self.follows:
            follow, arguments = self.following
            self.machine.launch(follow, len(self.buckets), tape.NODES, arguments)
        workspace = torch.empty(self.room, dtype=torch.uint8, device=self.device)
        running = [(bucket, bucket.run(workspace.data_ptr())) for bucket in self.buckets]
        while running:
            waiting = [(bucket, run, stage) for bucket, run in running if (stage := next(run, None))]
            if waiting:
                self._total(workspace, [bucket for bucket, _, _ in waiting], waiting[0][2])
            running = [(bucket, run) for bucket, run, _ in waiting]
        for number, copy in self.copies.items():
            jobs[number].param.copy_(copy)

    def _total(self, workspace: Tensor, buckets: list[_Bucket], stage: Stage) -> None:
        """One number for all tensors of these buckets."""
        key = tuple(bucket.first for bucket in buckets)
        if key not in self.totals:
            theirs = {number for bucket in buckets for number in bucket.numbers}
            order = [self.places[number] for number in self.in_total if number in theirs]
            self.totals[key] = torch.tensor(order, dtype=torch.int32).to(self.device)
        places = self.totals[key]
        pointers = c_uint64(workspace.data_ptr()), c_uint64(places.data_ptr())
        numbers = c_int32(len(places)), c_int32(stage.reduce == "max")
        self.machine.launch(buckets[0].measuring.function("total"), 1, THREADS, (*pointers, *numbers))


class _Bucket:
    """Jobs that are stepped by the same launches; they follow each other in the plan's tables."""

    def __init__(
        self,
        plan: _Plan,
        kind: Special,
        numbers: list[int],
        table: list[structs.Job],
        begins: int,
        updating: Module,
        measuring: Module,
        marks_at: int,
    ):
        # Not a cycle of references: a plan's memory on the device is free as soon as its jobs are.
        self.plan, self.kind, self.numbers = proxy(plan), kind, numbers
        self.first = plan.places[numbers[0]]  # of its jobs in the tables
        self.names = print_program(kind.program).constants
        self.updating, self.measuring = updating, measuring
        strides = [(job.rows, row_stride(job.cols)) for job in table]
        chunk = THREADS * kind.values * UNITS
        self.chunks = _owners(table, "first_chunk", [-(-rows * stride // chunk) for rows, stride in strides])
        tiles = [-(-rows // TILE) * (stride // kind.width) for rows, stride in strides]
        self.owners = {"chunks": self.chunks.to(plan.device)}
        if any(stage.over == "column" for stage in kind.program.measures):
            self.owners["tiles"] = _owners(table, "first_tile", tiles).to(plan.device)
        self.begins = begins  # jobs, of this bucket and of those after it; or the one before has begun them
        asked = [launch for launch in launches(kind.program) if launch.kernel != "begin" or begins]
        self.launches = [(launch, _share(launch, kind.program, table)) for launch in asked]
        self.prepared: list[tuple[str, int, Arguments]] = []
        self.marks_at = marks_at  # in the workspace: of each chunk, what is to be done again

    def packed(self, turn: Turn) -> list[float]:
        """The constants of its jobs, with room for more, and for those that only the device knows."""
        constants = {**turn.constants, **dict.fromkeys(turn.traced, 0.0)} if turn.traced else turn.constants
        return [constants[name] for name in self.names] + [0.0] * (abi.CONSTANTS - len(self.names))

    def nodes(self, traced: Mapping[str, tape.Traced]) -> bytes:
        """How to find those of its constants that only the device knows."""
        notes = tape.notes({k: traced[name] for k, name in enumerate(self.names) if name in traced})
        rows = [(number, None if x is None else x.data_ptr(), op, a, b) for op, a, b, number, x in notes]
        return bytes((structs.Node * tape.NODES)(*rows))

    def _prepare(self) -> None:
        """Make the arguments of all launches; `runs` and `room` are the step's."""
        plan = self.plan
        self.runs, self.room, self.marks = c_uint64(), c_uint64(), c_uint64()
        tables = [
            c_uint64(plan.table.data_ptr() + self.first * sizeof(structs.Job)),
            c_uint64(plan.buffer.data_ptr() + self.first * sizeof(structs.Dynamic)),
            self.runs,
        ]
        for launch, share in self.launches:
            owner = self.owners.get(launch.over)
            grid = len(self.numbers) * share if owner is None else len(owner)
            grid = self.begins if launch.kernel == "begin" else grid
            pointers = [*tables, c_uint64(0 if owner is None else owner.data_ptr()), self.room]
            numbers = [c_int32(launch.measure), c_int32(share)]
            self.prepared.append((launch.kernel, grid, Arguments([*pointers, *numbers])))
        owner = self.owners["chunks"]
        updating, count = [*tables, c_uint64(owner.data_ptr()), self.room, self.marks], len(owner)
        self.prepared.append(("update", count, Arguments(updating)))
        grid = max(min(count, REVISERS), count // 8)
        self.prepared.append(("again", grid, Arguments([*updating, c_int32(count)])))

    def run(self, workspace: int) -> Iterator[Stage]:
        """Launch its kernels; yields where a number over all tensors must be made first."""
        if not self.prepared:
            self._prepare()
        self.runs.value, self.room.value = workspace + self.first * sizeof(structs.Run), workspace
        self.marks.value = workspace + self.marks_at
        *measuring, update, again = self.prepared
        for kernel, grid, arguments in measuring:
            if kernel == "total":
                yield self.kind.program.measures[arguments[5].value]
            else:
                self.plan.machine.launch(self.measuring.function(kernel), grid, THREADS, arguments)
        for kernel, grid, arguments in (update, again):
            self.plan.machine.launch(self.updating.function(kernel), grid, UPDATERS, arguments)


_plans: WeakKeyDictionary[Job, list[_Plan]] = WeakKeyDictionary()  # by the first job


def _pattern(jobs: list[Job]) -> list[tuple[torch.dtype, int, bool]]:
    """What of the jobs decides on launches and may differ from step to step: who shares a turn with whom."""
    numbers: dict[int, int] = {}
    return [
        (g.dtype, numbers.setdefault(id(job.turn), len(numbers)), bool(job.turn.traced))
        for job, g in zip(jobs, _gradients(jobs), strict=True)
    ]


def _is_plain(x: Tensor) -> bool:
    return x.is_contiguous() and not x.is_neg()


def _plain(x: Tensor) -> Tensor:
    return x if _is_plain(x) else x.detach().resolve_neg().contiguous()


@lru_cache(maxsize=512)  # a matrix rule makes its jobs, and so its plans, in every step
def _text(name: str, kind: Special) -> tuple[str, dict[str, str]]:
    """A kernel file and its headers."""
    texts = sources()
    headers = {header: text for header, text in texts.items() if header.endswith(".h")}
    return texts[name], {**headers, "spec.h": print_spec(kind)}


def _owners(table: list[structs.Job], first: str, counts: list[int]) -> Tensor:
    """For each block of threads of a launch the number of its job, which is told where its blocks begin."""
    start = 0
    for job, count in zip(table, counts, strict=True):
        setattr(job, first, start)
        start += count
    return torch.arange(len(counts), dtype=torch.int32).repeat_interleave(torch.tensor(counts))


def _share(launch: Launch, program: Program, table: list[structs.Job]) -> int:
    """How many blocks of threads share the lines of each job in a launch over lines: eight lines each are worth one."""
    if launch.over != "lines":
        return 1
    most = max(lines(launch, program, job.rows, job.cols, job.group_rows) for job in table)
    return max(1, min(-(-most // 8), ENOUGH // len(table)))


def _fill(target: structs.Job, job: Job, copy: Tensor | None, at: int) -> int:
    """Point a struct to a job's tensors and lay out its part of the workspace, from byte `at` on; returns the end.

    `copy` is what stands for a parameter that is not contiguous.
    """
    if job.stored is None:
        target.param = (job.param if copy is None else copy).data_ptr()
    else:
        parts = job.stored[1]
        target.param, target.param_scale = parts["codes"].data_ptr(), parts["scale"].data_ptr()
        for part in ("rest", "tensor_scale"):
            setattr(target, part, parts[part].data_ptr() if part in parts else None)
    target.skipped = job.skipped.data_ptr()
    target.companion = None if job.companion is None else job.companion.data_ptr()
    for k, letter in enumerate(job.program.values):
        parts = job.moments[letter]
        target.codes[k] = parts["codes"].data_ptr()
        target.scale[k] = parts["scale"].data_ptr() if "scale" in parts else None
        target.base[k] = parts["base"].data_ptr() if "base" in parts else None
    for k, name in enumerate(job.program.scalars):
        target.scalars[k] = job.scalars[name].data_ptr()
    target.rows, target.cols, target.group_rows = job.rows, job.cols, job.group_rows
    target.tensor, target.first = job.stream[2] & 0xFFFFFFFF, job.first_value
    for k, letter in enumerate(print_program(job.program).vectors):
        if letter in job.vectors:
            target.vectors[k] = job.vectors[letter].data_ptr()
        target.work_vectors[k] = at
        at += _padded(4 * elements(job.program.vectors[letter], job.rows, job.cols, job.group_rows))
    floats, doubles = room(job.program, job.rows, job.cols)
    target.partial, target.sums = at, at + _padded(4 * floats)
    return target.sums + _padded(8 * doubles)


def _padded(size: int) -> int:
    return -(-size // 16) * 16
