"""The native backend for tensors on a GPU: the kernels of cuda/, with the reference's bits."""

from __future__ import annotations

import torch

from ..gpu import machine
from . import reference
from .cuda_step import step, unsupported

encode, decode, fake = reference.encode, reference.decode, reference.fake


def find(device: torch.device) -> None:
    """Find what kernels need; raises a `RuntimeError` or `ValueError` with what is missing and the way out."""
    machine(device)


__all__ = ["decode", "encode", "fake", "find", "step", "unsupported"]
