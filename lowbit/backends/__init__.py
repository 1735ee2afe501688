"""Where the work runs. A backend is a module with a few functions: `encode`, `decode`, `fake` and `step`.

`reference` is torch on any device and defines every bit; `native` is C++, gives the same bits and is taken for tensors
on the CPU. `LOWBIT_BACKEND` forces a backend. Where the native one cannot be had (no compiler, a rule that cannot be
printed), the reference does the work and a warning says so, once.
"""

from __future__ import annotations

import os
import warnings
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from ..formats import Format, nearest
from ..native.build import BuildError
from ..native.library import load
from ..stages import Job, Program
from . import native, reference

BACKENDS = {"reference": reference, "native": native}


def choose(device: torch.device) -> ModuleType:
    """The backend for tensors on a device.

    Raises:
        ValueError: `LOWBIT_BACKEND` names no backend, or one that does not run on the device.
        RuntimeError: the native backend is asked for and cannot be had (a `BuildError`, which says what is missing).
    """
    forced = os.environ.get("LOWBIT_BACKEND", "")
    if forced and forced not in BACKENDS:
        known = ", ".join(BACKENDS)
        raise ValueError(
            f"LOWBIT_BACKEND={forced!r} is no backend{nearest(forced, list(BACKENDS))}; there are: {known}"
        )
    if forced == "native" and device.type != "cpu":
        raise ValueError(f"LOWBIT_BACKEND='native' runs on the CPU only, and a tensor is on {device}; unset it")
    if forced == "native":
        load()
    if forced:
        return BACKENDS[forced]
    return native if device.type == "cpu" and _available() else reference


@cache
def _available() -> bool:
    """Whether the native library can be had; if not, says why, once."""
    try:
        load()
    except BuildError as error:
        warnings.warn(f"lowbit works without its native library, 20 to 50 times slower: {error}", stacklevel=2)
        return False
    return True


def for_job(job: Job) -> ModuleType:
    """The backend for a tensor's step: rules that cannot be printed as C++ run on the reference."""
    backend = choose(job.param.device)
    if backend is native and (reason := native.unsupported(job.program)):
        _tell(job.program, reason)
        return reference
    return backend


_told: set[int] = set()


def _tell(program: Program, reason: str) -> None:
    if id(program) not in _told:
        _told.add(id(program))
        warnings.warn(f"a rule runs on the reference backend, 20 to 50 times slower: {reason}", stacklevel=2)


def encode(fmt: Format, x: Tensor, noise: tuple[int, int] | None = None, *, live: bool = False) -> dict[str, Tensor]:
    """A float matrix [rows, cols] to packed parts (see `rows`); `noise` is the key of stochastic rounding."""
    return choose(x.device).encode(fmt, x, noise, live=live)


def decode(fmt: Format, parts: dict[str, Tensor], cols: int) -> Tensor:
    """The inverse of `encode`: fp32 [rows, cols]."""
    return choose(parts["codes"].device).decode(fmt, parts, cols)


def step(jobs: list[Job]) -> None:
    """Step every job, each backend once: what is measured over all tensors sees all tensors of its backend."""
    chosen = [for_job(job) for job in jobs]
    for backend in dict.fromkeys(chosen):
        backend.step([job for job, its in zip(jobs, chosen, strict=True) if its is backend])
