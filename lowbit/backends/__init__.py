"""Where the work runs. A backend is a module with a few functions: `step`, and for matrices those named below.

`reference` is torch on any device and defines every bit. `native` gives the same bits much faster: C++ for tensors on
the CPU, CUDA for those on a GPU. `LOWBIT_BACKEND` forces one of the two. Where the native one cannot be had (no
compiler, no driver, a rule that cannot be printed), the reference does the work and a warning says so, once.
"""

from __future__ import annotations

import os
import warnings
from functools import cache
from itertools import groupby
from operator import attrgetter
from types import ModuleType
from weakref import WeakSet

import torch
from torch import Tensor

from ..compiler import constant
from ..formats import Format, nearest
from ..formats import format as find_format
from ..gpu import DriverError, NoCompiler, NoDriver
from ..native.build import BuildError
from ..rotation import Rotation
from ..scales import Coded
from ..stages import Job, Program
from . import cuda, native, reference, sharded

NAMES = ("reference", "native")


def choose(device: torch.device) -> ModuleType:
    """The backend for tensors on a device.

    Raises:
        ValueError: `LOWBIT_BACKEND` names no backend, or one that does not run on the device.
        RuntimeError: the native backend is asked for and cannot be had; says what is missing.
    """
    forced = os.environ.get("LOWBIT_BACKEND", "")
    if forced and forced not in NAMES:
        known = ", ".join(NAMES)
        raise ValueError(f"LOWBIT_BACKEND={forced!r} is no backend{nearest(forced, NAMES)}; there are: {known}")
    if forced == "reference" or (not forced and device.type not in _NATIVE):
        return reference
    if device.type not in _NATIVE:
        raise ValueError(f"LOWBIT_BACKEND='native' runs on the CPU and on CUDA, and a tensor is on {device}; unset it")
    backend = _NATIVE[device.type]
    if forced:
        backend.find(device)
        return backend
    return backend if _available(device) else reference


_NATIVE = {"cpu": native, "cuda": cuda}


@cache
def _available(device: torch.device) -> bool:
    """Whether the native backend can be had; if not, says why, once."""
    try:
        _NATIVE[device.type].find(device)
    except (BuildError, NoDriver, NoCompiler, DriverError, ValueError) as error:
        what = "without its native library" if device.type == "cpu" else f"without its kernels on {device}"
        warnings.warn(f"lowbit works {what}, 20 to 50 times slower: {error}", stacklevel=2)
        return False
    return True


def for_program(program: Program, device: torch.device) -> ModuleType:
    """The backend for steps of a program: rules that cannot be printed as C++ run on the reference."""
    backend = choose(device)
    if backend is not reference and (reason := backend.unsupported(program)):
        _tell(program, reason)
        return reference
    return backend


_told: WeakSet[Program] = WeakSet()


def _tell(program: Program, reason: str) -> None:
    if program not in _told:
        _told.add(program)
        warnings.warn(f"a rule runs on the reference backend, 20 to 50 times slower: {reason}", stacklevel=2)


def for_format(fmt: Format, device: torch.device, live: bool = False) -> ModuleType:
    """The backend that codes and decodes a format: the reference's where kernels know no such scales."""
    backend = choose(device)
    return backend if backend.takes(fmt, live) else reference


def encode(
    fmt: Format,
    x: Tensor,
    noise: tuple[int, int] | None = None,
    *,
    live: bool = False,
    rotation: Rotation | None = None,
    run: int = 0,
) -> dict[str, Tensor]:
    """A float matrix [rows, cols] to packed parts (see `rows`).

    Args:
        fmt: the format; its blocks run along rows. For blocks down the columns give `x.t()`: a transposed view costs
            no copy on a CPU.
        x: float32, bfloat16 or float16.
        noise: the key of stochastic rounding (`rounding.key`); None rounds to nearest.
        live: what is above 0 may not become 0.
        rotation: rotate the rows first (see `rotation`), with zeros appended up to a multiple of its size: then there
            are `rotation.padded(cols)` columns.
        run: so many values share a correction by MS-EDEN (see `eden`); then noise is for scales, and values round to
            nearest.
    """
    x = _plain(x)
    return _for_layers(x, fmt, live).encode(fmt, x, noise, live=live, rotation=rotation, run=run)


def decode(fmt: Format, parts: dict[str, Tensor], cols: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The inverse of `encode`: [rows, cols], computed in fp32 and then rounded to `dtype`."""
    return for_format(fmt, parts["codes"].device).decode(fmt, parts, cols, _made_in(dtype)).to(dtype)


def fake(
    fmt: Format,
    x: Tensor,
    noise: tuple[int, int] | None = None,
    *,
    rotation: Rotation | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """decode(encode(x)) of a matrix of any float dtype, without making the codes; no gradient.

    Arguments are those of `encode` and `decode`.

    A compiler on a GPU takes the CUDA kernel as one operator: what it makes of the reference may round a value to the
    next code, and searches in tables, and hashes, it makes slow. On a CPU it traces the reference, to fuse it with what
    is around it. Meta tensors and subclasses (fake tensors, DTensor) may have no memory that the native backend could
    be pointed to. The bits are the same.
    """
    x = _plain(x)
    if torch.compiler.is_compiling() and rotation is None and _is_operator(fmt, x.device):
        return torch.ops.lowbit.fake(x, fmt.name, [] if noise is None else list(noise), _made_in(dtype)).to(dtype)
    return _for_layers(x, fmt).fake(fmt, x, noise, rotation=rotation, dtype=_made_in(dtype)).to(dtype)


def quantized(
    fmt: Format,
    x: Tensor,
    noise: tuple[int, int] | None = None,
    *,
    rotation: Rotation | None = None,
    dtype: torch.dtype = torch.float32,
    run: int = 0,
    edge: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`fake` and `encode` at once: what a layer multiplies with, and the parts that it saves.

    With an edge there is one more part, `inside`: a bit for each value, uint8 [rows, ceil(columns / 8)], which is set
    where the value, in units of its block's scale and before it is rounded, is not farther than that from 0.
    """
    x = _plain(x)
    values, parts = _for_layers(x, fmt).quantized(
        fmt, x, noise, rotation=rotation, dtype=_made_in(dtype), run=run, edge=edge
    )
    return values.to(dtype), parts


def measured(fmt: Format, x: Tensor, *, rotation: Rotation | None = None) -> Coded:
    """A matrix in blocks, for those who make its scales themselves (`scales`), and then its codes.

    Its first question must be `absmax` (which `scales.best` asks): rows are rotated on the way to it.
    """
    x = _plain(x)
    return _for_layers(x, fmt).measured(fmt, x, rotation=rotation)


def rotate(
    x: Tensor,
    rotation: Rotation,
    *,
    back: bool = False,
    dtype: torch.dtype = torch.float32,
    mask: Tensor | None = None,
    own: bool = False,
) -> Tensor:
    """The rows of a matrix rotated (`rotation.rotate`), or rotated back (`rotation.rotate_back`).

    Before they are rotated back, values whose bit in a mask (like the part `inside`) is not set are multiplied by 0. A
    matrix that is one's own may be overwritten.
    """
    x, fmt = _plain(x), find_format("fp32")
    return _for_layers(x, fmt).rotate(x, rotation, back=back, dtype=_made_in(dtype), mask=mask, own=own).to(dtype)


def _plain(x: Tensor) -> Tensor:
    return x.detach().to(_made_in(x.dtype))


def _made_in(dtype: torch.dtype) -> torch.dtype:
    """What kernels read and write: other dtypes go by fp32."""
    return dtype if dtype in native.DTYPES else torch.float32


def _for_layers(x: Tensor, fmt: Format, live: bool = False) -> ModuleType:
    plain = not torch.compiler.is_compiling() and not x.is_meta and type(x) is Tensor
    return for_format(fmt, x.device, live) if plain else reference


@constant
def _is_operator(fmt: Format, device: torch.device) -> bool:
    """Whether `fake` is an operator of torch that can be told of the format; then it is registered."""
    fmt.settled()
    if _NATIVE.get(device.type) is not cuda or for_format(fmt, device) is not cuda:
        return False
    from . import operators  # noqa: F401  # not before it is needed: importing the library registers nothing

    try:
        return find_format(fmt.name) == fmt
    except ValueError:  # one's own
        return False


def share(jobs: list[Job]) -> list[tuple[ModuleType, list[Job]]]:
    """Which backend is to step which jobs, those of one kind in a row.

    Each backend once (CUDA for each GPU), so what is measured over all tensors sees all of its tensors. Sharded tensors
    go by `sharded` where kernels cannot step them alone; with them go all tensors, if something is measured over all.
    """
    kinds: dict[tuple[Program, torch.device, bool], list[Job]] = {}
    for (program, device), alike in groupby(jobs, attrgetter("kind")):
        for job in alike:
            meets = job.shard is not None and bool(program.measures or not sharded.suits_kernels(job))
            kinds.setdefault((program, device, meets), []).append(job)
    over_all = any(stage.over == "all" for program, _, _ in kinds for stage in program.measures)
    with_all = over_all and any(meets for _, _, meets in kinds)
    shares: dict[tuple[ModuleType, torch.device | None], list[Job]] = {}
    for (program, device, meets), alike in kinds.items():
        backend = sharded if meets or with_all else for_program(program, device)
        # A launch is for one GPU.
        shares.setdefault((backend, device if backend is cuda else None), []).extend(alike)
    apart = [device for backend, device in shares if backend is cuda]
    if len(apart) > 1 and over_all:
        where = ", ".join(map(str, apart))
        raise ValueError(
            f"what is measured over all tensors must be on one GPU, and these are on {where}: give each GPU's tensors "
            "an optimizer of their own, or clip gradients with torch and leave GlobalClip out"
        )
    return [(backend, jobs) for (backend, _), jobs in shares.items()]
