"""Where the work runs. A backend is a module with three functions: `encode`, `decode` and `step`.

`reference` is torch on any device and defines every bit. `LOWBIT_BACKEND` forces a backend; it is never changed
silently.
"""

from __future__ import annotations

import os
from types import ModuleType

import torch
from torch import Tensor

from ..formats import Format, nearest
from ..stages import Job
from . import reference

BACKENDS = {"reference": reference}


def choose(device: torch.device) -> ModuleType:
    """The backend for tensors on a device.

    Raises `ValueError` when `LOWBIT_BACKEND` names no backend.
    """
    forced = os.environ.get("LOWBIT_BACKEND", "")
    if forced and forced not in BACKENDS:
        known = ", ".join(BACKENDS)
        raise ValueError(
            f"LOWBIT_BACKEND={forced!r} is no backend{nearest(forced, list(BACKENDS))}; there are: {known}"
        )
    return BACKENDS[forced or "reference"]


def encode(fmt: Format, x: Tensor, noise: tuple[int, int] | None = None, *, live: bool = False) -> dict[str, Tensor]:
    """A float matrix [rows, cols] to packed parts (see `rows`); `noise` is the key of stochastic rounding."""
    return choose(x.device).encode(fmt, x, noise, live=live)


def decode(fmt: Format, parts: dict[str, Tensor], cols: int) -> Tensor:
    """The inverse of `encode`: fp32 [rows, cols]."""
    return choose(parts["codes"].device).decode(fmt, parts, cols)


def step(jobs: list[Job]) -> None:
    """Step every job, each backend once: what is measured over all tensors sees all tensors of its backend."""
    chosen = [choose(job.param.device) for job in jobs]
    for backend in dict.fromkeys(chosen):
        backend.step([job for job, its in zip(jobs, chosen, strict=True) if its is backend])
