"""The native backend: one call into a C++ library steps every tensor of every group (lowbit/native; CPU only).

What it computes is what `reference` says, bit for bit. This file fills the library's job table; the struct of a program
is made once, that of a tensor once for as long as its `Job` lives, and a step refreshes addresses and constants.
"""

from __future__ import annotations

from ctypes import addressof, byref
from typing import Any

import torch
from torch import Tensor

from ..formats import Format
from ..layout import row_bytes, row_stride
from ..native import abi
from ..native.build import BuildError
from ..native.library import Library, load
from ..native.tables import table
from ..rows import part_shapes
from ..stages import Job, Program

EXTRA = {"affine": "zero", "log": "base"}
_programs: dict[int, _Program] = {}
_refused: dict[int, tuple[Program, str]] = {}  # programs that were looked at, and why they cannot run here


class _Program:
    """A program as the library takes it: its stages' kernels, and the number of every name."""

    def __init__(self, program: Program, library: Library):
        self.of = program  # kept alive: its id is the key
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
            target.kernel, printed = library.kernel(stage, unsigned)
            target.kind, target.reduce = abi.STAGE[stage.kind], abi.REDUCE[stage.reduce]
            target.over, target.rootable = abi.OVER[stage.over], printed.roots
            target.reads, target.writes = len(printed.reads), len(printed.writes)
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


def _program(program: Program) -> _Program:
    if id(program) not in _programs:
        _programs[id(program)] = _Program(program, load())
    return _programs[id(program)]


def unsupported(program: Program) -> str:
    """Why a program cannot run here, or an empty string."""
    if id(program) not in _refused:
        try:
            _program(program)
            _refused[id(program)] = program, ""
        except (ValueError, BuildError) as error:
            _refused[id(program)] = program, str(error)
    return _refused[id(program)][1]


@torch.no_grad()
def step(jobs: list[Job]) -> None:
    """Step every job: parameters, moments, scalars and skip counts are written in place."""
    programs: dict[int, list[Job]] = {}
    for job in jobs:
        programs.setdefault(id(job.program), []).append(job)
    ordered = [job for same in programs.values() for job in same]
    table = (abi.Job * len(ordered))()
    kept: list[Any] = []  # contiguous copies, for as long as the library works on them
    back: list[tuple[Tensor, Tensor]] = []
    for target, job in zip(table, ordered, strict=True):
        _fill(target, job, kept, back)
    if load().step(table, len(ordered), torch.get_num_threads()):
        raise MemoryError("the native step found no memory for its measurements; nothing has been changed")
    for original, copy in back:
        original.copy_(copy)


def _fill(target: abi.Job, job: Job, kept: list[Any], back: list[tuple[Tensor, Tensor]]) -> None:
    program = _program(job.program)
    param, grad = job.param.detach(), job.grad.detach()
    if not param.is_contiguous():
        copy = param.contiguous()
        back.append((param, copy))
        param = copy
    if not grad.is_contiguous():
        grad = grad.contiguous()
        kept.append(grad)
    target.program = addressof(program.struct)
    target.param, target.grad, target.skipped = param.data_ptr(), grad.data_ptr(), job.skipped.data_ptr()
    target.rows, target.cols, target.group_rows = job.rows, job.cols, job.group_rows
    target.param_dtype, target.grad_dtype = DTYPES[param.dtype], DTYPES[grad.dtype]
    if job.companion is not None:
        target.master, target.companion = abi.MASTER[job.master], job.companion.data_ptr()
    target.stochastic = "p" in job.noise
    target.seed, target.step, target.tensor = (_signed(number) for number in job.stream)
    for k, letter in enumerate(program.moments):
        fill_operand(target.moments[k], job.formats[letter], job.moments[letter], job.cols)
        target.moments[k].stochastic = letter in job.noise
        target.moments[k].live = not job.program.moments[letter].signed
    for k, name in enumerate(program.persistent):
        target.vectors[k] = job.vectors[name].data_ptr()
    for k, name in enumerate(program.scalars):
        target.scalars[k] = job.scalars[name].data_ptr()
    for k, name in enumerate(program.constants):
        target.constants[k] = job.constants[name]


DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def _signed(number: int) -> int:
    """The int64 with the low 64 bits of an int."""
    return (number & (1 << 64) - 1) - (1 << 64) * (number >> 63 & 1)


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


def _matrix(fmt: Format, values: Tensor, parts: dict[str, Tensor], noise: tuple[int, int] | None) -> abi.Matrix:
    rows, cols = values.shape
    matrix = abi.Matrix(values=values.data_ptr(), rows=rows, cols=cols, stride=row_stride(cols))
    matrix.dtype, matrix.stochastic = DTYPES[values.dtype], noise is not None
    matrix.key[:] = noise or (0, 0)
    fill_operand(matrix.packed, fmt, parts, cols)
    return matrix


def encode(fmt: Format, x: Tensor, noise: tuple[int, int] | None = None, *, live: bool = False) -> dict[str, Tensor]:
    """See `backends.encode`."""
    x = x.detach().contiguous()
    rows, cols = x.shape
    parts = {
        part: torch.empty(shape, dtype=dtype) for part, (shape, dtype) in part_shapes(fmt, (rows, cols)).items()
    }
    if x.numel():
        matrix = _matrix(fmt, x, parts, noise)
        matrix.packed.live = live
        if load().encode(byref(matrix), None, torch.get_num_threads()):
            raise MemoryError("the native encoder found no memory for a block")
    return parts


def decode(fmt: Format, parts: dict[str, Tensor], cols: int) -> Tensor:
    """See `backends.decode`."""
    parts = {part: tensor.contiguous() for part, tensor in parts.items()}
    codes = parts["codes"]
    rows = codes.shape[0] if fmt.compressed or not cols else codes.numel() // cols
    values = torch.empty(rows, cols, dtype=torch.float32)
    if values.numel():
        load().decode(byref(_matrix(fmt, values, parts, None)), torch.get_num_threads())
    return values


def fake(fmt: Format, x: Tensor, noise: tuple[int, int] | None = None) -> Tensor:
    """decode(encode(x)), without making the codes."""
    x = x.detach().contiguous()
    values = torch.empty(x.shape, dtype=torch.float32)
    if x.numel():
        matrix = _matrix(fmt, x, {"codes": x, "scale": x, "zero": x, "base": x}, noise)
        if load().encode(byref(matrix), values.data_ptr(), torch.get_num_threads()):
            raise MemoryError("the native encoder found no memory for a block")
    return values
