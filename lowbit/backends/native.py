"""The native backend: one call into a C++ library steps every tensor of every group (lowbit/native; CPU only).

What it computes is what `reference` says, bit for bit. This file fills the library's job table: the struct of a program
is made once, that of a tensor once for as long as its `Job` lasts, and a step fills in the gradient and its numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from ctypes import addressof, byref, c_float, sizeof
from itertools import groupby
from operator import attrgetter
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ..formats import Format
from ..formats import format as find_format
from ..layout import row_bytes, row_stride
from ..native import abi
from ..native.build import BuildError
from ..native.library import Library, load
from ..native.tables import table
from ..rotation import Rotation
from ..rows import part_shapes
from ..stages import Job, Program

EXTRA = {"affine": "zero", "log": "base"}


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
        self.stages = (abi.Stage * len(program.stages))()
        for target, stage in zip(self.stages, program.stages, strict=True):
            target.kernel, target.fused, printed = library.kernel(stage, unsigned)
            target.kind, target.reduce = abi.STAGE[stage.kind], abi.REDUCE[stage.reduce]
            target.over, target.rootable = abi.OVER[stage.over], printed.roots
            target.reads, target.writes = len(printed.reads), len(printed.writes)
            target.reads_g = "g" in printed.reads
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
    increment_version([job.param for job in jobs])  # a graph that saved an old value must notice
    increment_version([part for job in jobs if job.stored for part in job.stored[1].values()])


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
            fill_operand(target.weight, fmt, parts, job.cols)
            target.rest = parts["rest"].data_ptr() if "rest" in parts else None
        if job.companion is not None:
            target.master, target.companion = abi.MASTER[job.master], job.companion.data_ptr()
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


DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


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


def _laid_out(x: Tensor) -> tuple[Tensor, int, bool]:
    """A matrix whose rows or columns are contiguous; values from one to the next; whether they are columns."""
    x = x.detach().resolve_neg()
    if x.stride(1) != 1 and x.stride(0) != 1:
        x = x.contiguous()
    columns = x.stride(1) != 1
    return x, x.stride(1 if columns else 0), columns


def _empty_like(x: Tensor, columns: bool, dtype: torch.dtype) -> Tensor:
    rows, cols = x.shape
    return torch.empty(cols, rows, dtype=dtype).t() if columns else torch.empty(rows, cols, dtype=dtype)


def _encode(
    fmt: Format,
    x: Tensor,
    noise: tuple[int, int] | None,
    live: bool,
    rotation: Rotation | None,
    dtype: torch.dtype | None,
    parts: dict[str, Tensor] | None,
    back: bool = False,
) -> Tensor | None:
    """Fill parts, if there are any; and return what the codes stand for, if they have a dtype."""
    x, step, columns = _laid_out(x)
    rows, cols = x.shape
    if rotation is not None:
        rotation.check(cols)
    matrix = abi.Matrix(values=x.data_ptr(), rows=rows, cols=cols, stride=row_stride(cols), step=step, columns=columns)
    matrix.dtype, matrix.stochastic = DTYPES[x.dtype], noise is not None
    matrix.key[:] = noise or (0, 0)
    if rotation is not None:
        matrix.rotation, matrix.signs[:] = -rotation.size if back else rotation.size, rotation.keys
    values = None
    if dtype is not None:
        values = _empty_like(x, columns, dtype)
        matrix.out, matrix.out_dtype, matrix.out_step = values.data_ptr(), DTYPES[dtype], rows if columns else cols
    if parts is not None:
        fill_operand(matrix.packed, fmt, parts, cols)
    matrix.packed.format, matrix.packed.live = addressof(table(fmt)), live
    if x.numel() and load().encode(byref(matrix), torch.get_num_threads()):
        raise MemoryError("the native encoder found no memory for a block")
    return values


def _parts(fmt: Format, x: Tensor) -> dict[str, Tensor]:
    shapes = part_shapes(fmt, (x.shape[0], x.shape[1]))
    return {part: torch.empty(shape, dtype=dtype) for part, (shape, dtype) in shapes.items()}


def encode(
    fmt: Format,
    x: Tensor,
    noise: tuple[int, int] | None = None,
    *,
    live: bool = False,
    rotation: Rotation | None = None,
) -> dict[str, Tensor]:
    """See `backends.encode`."""
    parts = _parts(fmt, x)
    _encode(fmt, x, noise, live, rotation, None, parts)
    return parts


def fake(
    fmt: Format,
    x: Tensor,
    noise: tuple[int, int] | None = None,
    *,
    rotation: Rotation | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """See `backends.fake`."""
    values = _encode(fmt, x, noise, False, rotation, dtype, None)
    assert values is not None
    return values


def quantized(
    fmt: Format,
    x: Tensor,
    noise: tuple[int, int] | None = None,
    *,
    rotation: Rotation | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, dict[str, Tensor]]:
    """See `backends.quantized`."""
    parts = _parts(fmt, x)
    values = _encode(fmt, x, noise, False, rotation, dtype, parts)
    assert values is not None
    return values, parts


def rotate(x: Tensor, rotation: Rotation, *, back: bool = False, dtype: torch.dtype = torch.float32) -> Tensor:
    """See `backends.rotate`."""
    values = _encode(find_format("fp32"), x, None, False, rotation, dtype, None, back)
    assert values is not None
    return values


def decode(fmt: Format, parts: dict[str, Tensor], cols: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """See `backends.decode`."""
    parts = {part: tensor.contiguous() for part, tensor in parts.items()}
    codes = parts["codes"]
    rows = codes.shape[0] if fmt.compressed or not cols else codes.numel() // cols
    values = torch.empty(rows, cols, dtype=dtype)
    matrix = abi.Matrix(out=values.data_ptr(), out_dtype=DTYPES[dtype], rows=rows, cols=cols, out_step=cols)
    fill_operand(matrix.packed, fmt, parts, cols)
    if values.numel() and load().decode(byref(matrix), torch.get_num_threads()):
        raise MemoryError("the native decoder found no memory")
    return values
