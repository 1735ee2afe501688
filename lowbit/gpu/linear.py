"""A linear layer's two products with a weight that is stored in at most 8 bits: y = x Wᵀ, and dx = dy W.

The weight is decoded tile by tile on its way to the tensor cores (cuda/linear.cu), so it never exists in 16 bits. Sums
are fp32; the weight's values and what is returned are rounded to bfloat16. In which order terms are added is up to the
hardware: results are held to a tolerance, not to bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from ctypes import c_int, c_void_p
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from ..compiler import constant
from ..formats import Format
from ..formats import format as find_format
from ..layout import row_bytes
from .formats import print_format
from .inspect import Specialisation
from .machine import Machine, Module, machine
from .nvrtc import sources

TILE, GROUP = 128, 16  # rows of a result that a block has, as in cuda/linear.h
FEW = 64  # up to so many rows, tiles would leave most of a GPU without work
EXTRA = {"affine": "zero", "log": "base"}  # the part that a kind of format has beside codes and scales
_MOST = 2**31 - 1024  # rows, columns


class Stored(Protocol):
    """A matrix in a format: what `lowbit.quantize` returns."""

    @property
    def format(self) -> Format: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def parts(self) -> dict[str, Tensor]: ...


def linear(x: Tensor, weight: Stored) -> Tensor:
    """x Wᵀ in bfloat16, for x [..., k] and W [n, k]. Differentiable in x; torch.compile traces it.

    Args:
        x: bfloat16, on the weight's device.
        weight: a matrix in a format of at most 8 bits, with blocks of a multiple of 8 along its rows.

    Raises:
        TypeError: x is not bfloat16.
        ValueError: shapes, devices or the weight's format do not fit.
    """
    from . import ops

    return ops.linear(x, *_operands(weight))


def linear_transposed(dy: Tensor, weight: Stored) -> Tensor:
    """Dy W in bfloat16, for dy [..., n] and W [n, k]: the gradient of `linear`'s x. As `linear` in all else."""
    from . import ops

    return ops.linear_transposed(dy, *_operands(weight))


def _operands(weight: Stored) -> tuple[Tensor, Tensor | None, Tensor | None, str, int]:
    """The weight as the arguments of a torch operator: codes, scale, extra, the format's name, k."""
    fmt, parts = weight.format, weight.parts
    if len(weight.shape) != 2:
        raise ValueError(f"linear: the weight must be a matrix, and its shape is {tuple(weight.shape)}")
    return parts["codes"], parts.get("scale"), parts.get(EXTRA.get(fmt.kind, "")), _name(fmt), weight.shape[1]


@constant
def _name(fmt: Format) -> str:
    """What the operators know a format by."""
    if find_format(fmt.name) != fmt:
        raise ValueError(f"linear: format {fmt.name!r} is not the one of that name in lowbit.formats()")
    return fmt.name


def check(name: str, x: Tensor, codes: Tensor, scale: Tensor | None, format: str, k: int, transposed: bool) -> int:
    """That a product exists and that there is a kernel for it; returns the columns of the result."""
    fmt = find_format(format)
    if not fmt.compressed:
        raise ValueError(f"{name}: format {format!r} stores the weight itself: use torch.nn.functional.linear")
    if fmt.block[0] != 1 or fmt.block[1] % 8:
        raise ValueError(
            f"{name}: format {format!r} has blocks of {fmt.block[0]} x {fmt.block[1]} values, and the kernel takes "
            "blocks of a multiple of 8 along rows"
        )
    if x.dtype != torch.bfloat16:
        raise TypeError(f"{name}: the input must be bfloat16, not {x.dtype}: convert it with .to(torch.bfloat16)")
    n = codes.shape[0]
    shape = (n, row_bytes(k, fmt.bits))
    blocks = (n, -(-k // fmt.block[1]))
    if tuple(codes.shape) != shape or scale is None or tuple(scale.shape) != blocks:
        raise ValueError(f"{name}: a weight [{n}, {k}] in {format!r} has codes {shape} and scales {blocks}")
    terms, columns = (n, k) if transposed else (k, n)
    if x.dim() == 0 or x.shape[-1] != terms:
        side = "rows" if transposed else "columns"
        raise ValueError(f"{name}: the input's shape is {tuple(x.shape)}, and the weight [{n}, {k}] has {terms} {side}")
    if x.device != codes.device or scale.device != codes.device:
        raise ValueError(f"{name}: the input is on {x.device}, and the weight on {codes.device}")
    return columns


def multiply(
    x: Tensor, codes: Tensor, scale: Tensor, extra: Tensor | None, fmt: Format, k: int, transposed: bool
) -> Tensor:
    """Launch the kernel for operands that have passed `check`."""
    n, terms = codes.shape[0], x.shape[-1]
    columns = k if transposed else n
    lead, x = x.shape[:-1], x.reshape(-1, terms).contiguous()
    m = x.shape[0]
    if max(m, n, k) > _MOST or tiles(m) * tiles(columns) > _MOST:
        raise ValueError(f"linear: {m} x {n} x {k} is more than one launch can do: give the input in parts")
    out = torch.empty((m, columns), dtype=torch.bfloat16, device=x.device)
    if not out.numel() or not terms:
        return out.zero_().reshape(*lead, columns)
    parts = [part.contiguous() for part in (codes, scale, extra) if part is not None]
    whole = n % 32 == 0 and k % 16 == 0 if transposed else n % 2 == 0 and k % max(32, 128 // fmt.bits) == 0
    whole = whole and all(tensor.data_ptr() % 16 == 0 for tensor in (x, parts[0], out))
    runs = machine(x.device)
    module = _module(runs, fmt, whole)
    addresses = [c_void_p(t.data_ptr()) for t in (x, *parts)] + [c_void_p(None)] * (extra is None)
    arguments = [*addresses, c_void_p(out.data_ptr()), c_int(m), c_int(n), c_int(k)]
    if transposed:
        runs.launch(module.function("linear_transposed"), tiles(m) * tiles(k), 128, arguments)
    elif m <= FEW:
        runs.launch(module.function("linear_few"), -(-m // GROUP) * -(-n // 16), 256, arguments)
    else:
        runs.launch(module.function("linear"), tiles(m) * tiles(n), 128, arguments)
    return out.reshape(*lead, columns)


def tiles(n: int) -> int:
    """Tiles along a side of n results."""
    return -(-n // TILE)


def specialise(fmt: Format, whole: bool) -> str:
    """`spec.h` of cuda/linear.cu."""
    return f"#pragma once\n{print_format(fmt, 'Weight')}constexpr bool WHOLE = {str(whole).lower()};\n"


@lru_cache(maxsize=256)
def _module(runs: Machine, fmt: Format, whole: bool) -> Module:
    return runs.module(sources()["linear.cu"], {**sources(), "spec.h": specialise(fmt, whole)})


def shipped() -> list[Specialisation]:
    """The kernels of common weights, aligned, with the values of W that a thread decodes in a turn of its loop."""
    found = []
    for name in ("int4", "int8", "nf4", "e2m1"):
        fmt = find_format(name)
        values: Mapping[str, int] = {"linear": 32, "linear_transposed": 32, "linear_few": 2 * 128 // fmt.bits}
        found.append(Specialisation(f"linear {name}", "linear.cu", specialise(fmt, True), values))
    return found
