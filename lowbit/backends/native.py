"""The native backend: one call into a C++ library steps every tensor of every group (lowbit/native; CPU only).

What it computes is what `reference` says, bit for bit. This file fills the library's job table: the struct of a program
is made once, that of a tensor once for as long as its `Job` lasts, and a step fills in the gradient and its numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from ctypes import addressof, c_float, sizeof
from itertools import groupby
from operator import attrgetter
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ..formats import Format
from ..layout import row_bytes
from ..native import abi
from ..native.build import BuildError
from ..native.library import Library, load
from ..native.tables import table
from ..scales import last_power
from ..stages import Job, Program, Stage, together
from .native_matrix import DTYPES, EXTRA
from .native_matrix import decode as decode
from .native_matrix import encode as encode
from .native_matrix import fake as fake
from .native_matrix import measured as measured
from .native_matrix import quantized as quantized
from .native_matrix import rotate as rotate
from .native_matrix import takes as takes


class _Program:
    """A program as the library takes it: its stages' kernels, and the number of every name."""

    def __init__(self, program: Program, library: Library):
        self.moments = tuple(program.values)
        self.persistent = tuple(name for name in program.moments if name not in program.values)
        temporary = tuple(name for name in program.vectors if name not in self.persistent)
        slots = {name: k for k, name in enumerate(("p", "g", *self.moments, *self.persistent, *temporary))}
        scalars = {name: k for k, name in enumerate((*program.scalars, *program.temporaries))}
        constants: dict[str, int] = {}

        def number(names: tuple[str, ...], known: dict[str, int]) -> list[int]:
            return [known.setdefault(name, len(known)) for name in names]

        unsigned = frozenset(letter for letter, moment in program.values.items() if not moment.signed)
        stages = _joined(program.stages, library, unsigned)
        self.stages = (abi.Stage * len(stages))()
        for target, stage in zip(self.stages, stages, strict=True):
            target.kernel, target.fused, printed = library.kernel(stage, unsigned)
            target.kind, target.reduce = abi.STAGE[stage.kind], abi.REDUCE[stage.reduce]
            target.over, target.rootable = abi.OVER[stage.over], printed.roots
            target.reads, target.writes = len(printed.reads), len(printed.writes)
            target.reads_g = "g" in printed.reads
            target.plain = stage.plain
            target.unit, target.above = (scalars[name] if name else -1 for name in (stage.unit, stage.above))
            for field, numbers in (
                (target.read, number(printed.reads, slots)),
                (target.write, number(printed.writes, slots)),
                (target.s, number(printed.scalars, scalars)),
                (target.c, number(printed.constants, constants)),
            ):
                if len(numbers) > len(field) or max(numbers, default=0) >= len(field):
                    raise ValueError(f"{stage.kind} {stage.function.__name__!r}: too many names for the native backend")
                field[: len(numbers)] = numbers
        self.constants = tuple(constants)
        self.scalars = tuple(program.scalars)
        self.struct = abi.Program(
            stages=addressof(self.stages),
            count=len(self.stages),
            guarded=program.guarded,
            moments=len(self.moments),
            vectors=len(self.persistent),
            temporaries=len(temporary),
            scalars=len(scalars),
            kept=len(self.scalars),
        )
        for k, name in enumerate((*self.persistent, *temporary)):
            self.struct.over[k] = abi.OVER[program.vectors[name]]
        for name, value in program.temporaries.items():
            self.struct.initial[scalars[name]] = value

    def packed(self, constants: Mapping[str, float]) -> bytes:
        """Constants as a job has them."""
        return bytes((c_float * abi.CONSTANTS)(*(constants[name] for name in self.constants)))


def _joined(stages: tuple[Stage, ...], library: Library, letters: frozenset[str]) -> tuple[Stage, ...]:
    """The stages, with the last two updates as one if the library has that and the first writes no more than g."""
    updates = [k for k, stage in enumerate(stages) if stage.kind == "update"][-2:]
    between = stages[updates[0] + 1 : updates[-1]] if len(updates) == 2 else ()
    if len(updates) < 2 or any(stage.kind == "measure" for stage in between):
        return stages
    first, last = (stages[k] for k in updates)
    if (
        first.writes != ("g",)
        or {*first.reads} - {"g", "s", "c"}
        or not library.ships(both := together(first, last), letters)
    ):
        return stages
    return (*stages[: updates[0]], *between, both, *stages[updates[1] + 1 :])


# Of each program and of one library: what that takes, or why the program cannot run here.
_programs: WeakKeyDictionary[Program, tuple[Library, _Program | str]] = WeakKeyDictionary()


def _program(program: Program) -> _Program | str:
    library, known = load(), _programs.get(program)
    if known is None or known[0] is not library:
        try:
            known = library, _Program(program, library)
        except (ValueError, BuildError) as error:
            known = library, str(error)
        _programs[program] = known
    return known[1]


def find(device: torch.device) -> None:
    """Find or build the library; raises `BuildError` with what is missing."""
    load()


def unsupported(program: Program) -> str:
    """Why a program cannot run here, or an empty string."""
    made = _program(program)
    return made if isinstance(made, str) else ""


@torch.no_grad()
def step(jobs: list[Job]) -> None:
    """Step every job, those of a program in a row: parameters, moments, scalars and skip counts, in place."""
    structs: list[bytearray] = []
    kept: list[Tensor] = []  # contiguous copies, for as long as the library works on them
    back: list[tuple[Tensor, Tensor]] = []
    for program, alike in groupby(jobs, attrgetter("program")):
        made = _program(program)
        if isinstance(made, str):
            raise ValueError(made)
        packed: dict[int, bytes] = {}  # constants, of which many jobs share one dict
        for job in alike:
            constants = packed.get(id(job.constants))
            if constants is None:
                constants = packed[id(job.constants)] = made.packed(job.constants)
            struct = job.prepared
            if struct is None or struct.program is not made:
                struct = job.prepared = _Struct(job, made)
            struct.refresh(job, constants, kept, back)
            structs.append(struct.memory)
    table = (abi.Job * len(jobs)).from_buffer(bytearray().join(structs))
    if load().step(table, len(jobs), torch.get_num_threads()):
        raise MemoryError("the native step found no memory for its measurements; nothing has been changed")
    for original, copy in back:
        original.copy_(copy)
    increment_version([x for job in jobs for x in job.written])  # a graph that saved an old value must notice


CONSTANTS = slice(abi.Job.constants.offset, abi.Job.constants.offset + abi.Job.constants.size)


class _Struct:
    """A job's struct: filled once for as long as the job lasts, but for what a step changes."""

    def __init__(self, job: Job, program: _Program):
        self.program = program  # the struct holds its address
        self.memory = bytearray(sizeof(abi.Job))
        self.constants = memoryview(self.memory)[CONSTANTS]
        self.job = target = abi.Job.from_buffer(self.memory)
        self.contiguous = job.stored is not None or (job.param.is_contiguous() and not job.param.is_neg())
        target.program, target.skipped = addressof(program.struct), job.skipped.data_ptr()
        target.rows, target.cols, target.group_rows = job.rows, job.cols, job.group_rows
        target.stochastic = "p" in job.noise
        if job.stored is None:
            target.param, target.param_dtype = job.param.data_ptr(), DTYPES[job.param.dtype]
        else:
            fmt, parts = job.stored
            _fill_weight(target, fmt, parts, job.cols)
        if job.companion is not None:
            target.master, target.companion = abi.MASTER[job.master], job.companion.data_ptr()
        target.first = job.first_value
        for k, letter in enumerate(program.moments):
            fill_operand(target.moments[k], job.formats[letter], job.moments[letter], job.cols)
            target.moments[k].stochastic = letter in job.noise
            target.moments[k].live = not job.program.moments[letter].signed
        for k, name in enumerate(program.persistent):
            target.vectors[k] = job.vectors[name].data_ptr()
        for k, name in enumerate(program.scalars):
            target.scalars[k] = job.scalars[name].data_ptr()

    def refresh(self, job: Job, constants: bytes, kept: list[Tensor], back: list[tuple[Tensor, Tensor]]) -> None:
        """Fill in what is this step's."""
        grad, target = job.grad, self.job
        if not self.contiguous:
            copy = job.param.detach().resolve_neg().contiguous()
            back.append((job.param, copy))
            target.param = copy.data_ptr()
        if not grad.is_contiguous() or grad.is_neg():
            grad = grad.detach().resolve_neg().contiguous()
            kept.append(grad)
        target.grad, target.grad_dtype = grad.data_ptr(), DTYPES[grad.dtype]
        target.seed, target.step, target.tensor = job.stream  # ctypes takes the low 64 bits
        self.constants[:] = constants


def _fill_weight(target: abi.Job, fmt: Format, parts: dict[str, Tensor], cols: int) -> None:
    fill_operand(target.weight, fmt, parts, cols)
    way = fmt.scaling
    target.scaled, target.last = abi.SCALED[way.stored], last_power(fmt)
    target.headroom, target.unroom, target.least_scale = way.headroom, 1 / way.headroom, way.least
    for part in ("rest", "tensor_scale"):
        setattr(target, part, parts[part].data_ptr() if part in parts else None)


def fill_operand(target: abi.Operand, fmt: Format, parts: dict[str, Tensor], cols: int) -> None:
    """Point an operand to its parts."""
    target.format = addressof(table(fmt))
    target.codes = parts["codes"].data_ptr()
    if not fmt.compressed:
        return
    target.scale = parts["scale"].data_ptr()
    if fmt.kind in EXTRA:
        target.extra = parts[EXTRA[fmt.kind]].data_ptr()
    target.row_bytes = row_bytes(cols, fmt.bits)
    target.scales = -(-cols // fmt.block[1])
