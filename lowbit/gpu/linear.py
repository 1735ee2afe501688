"""A linear layer's two products with a weight that is stored in at most 8 bits: y = x Wᵀ, and dx = dy W.

The weight is decoded tile by tile on its way to the tensor cores (cuda/linear.cu), so it never exists in 16 bits. Sums
are fp32; the weight's values and what is returned are rounded to bfloat16. In which order terms are added is up to the
hardware: results are held to a tolerance, not to bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from ctypes import c_int, c_int64, c_void_p
from dataclasses import dataclass
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

TILE = 128  # rows and columns of a result that a block has, as in cuda/linear.h
FEW = 64  # up to so many rows of x, W streams (cuda/few.cu)
BLOCKS = 256  # among which few rows are divided, if there are terms for them: about two for each multiprocessor
EXTRA = {"affine": "zero", "log": "base"}  # the part that a kind of format has beside codes and scales
NAMES = ("linear", "linear_transposed")
_MOST = 2**30  # rows, columns


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
    return _product(x, weight, False)


def linear_transposed(dy: Tensor, weight: Stored) -> Tensor:
    """Dy W in bfloat16, for dy [..., n] and W [n, k]: the gradient of `linear`'s x. As `linear` in all else."""
    return _product(dy, weight, True)


def _product(x: Tensor, weight: Stored, transposed: bool) -> Tensor:
    """By an operator where a compiler or autograd looks on: it costs the host as much as all the rest."""
    fmt, parts = weight.format, weight.parts
    if len(weight.shape) != 2:
        raise ValueError(f"linear: the weight must be a matrix, and its shape is {tuple(weight.shape)}")
    codes, scale, extra = parts["codes"], parts.get("scale"), parts.get(EXTRA.get(fmt.kind, ""))
    if torch.compiler.is_compiling() or type(x) is not Tensor or (x.requires_grad and torch.is_grad_enabled()):
        from . import ops

        return (ops.linear_transposed if transposed else ops.linear)(
            x, codes, scale, extra, _name(fmt), weight.shape[1]
        )
    check(NAMES[transposed], x, codes, scale, fmt, weight.shape[1], transposed)
    assert scale is not None
    return multiply(x, codes, scale, extra, fmt, weight.shape[1], transposed)


@constant
def _name(fmt: Format) -> str:
    """What the operators know a format by."""
    if known(fmt.name) != fmt:
        raise ValueError(f"linear: format {fmt.name!r} is not the one of that name in lowbit.formats()")
    return fmt.name


@lru_cache(maxsize=256)
def known(name: str) -> Format:
    """The format of a name, which takes longer to make than a product with few rows."""
    return find_format(name)


@lru_cache(maxsize=256)
def _refused(fmt: Format) -> str:
    """Why there is no kernel for a format, if there is none."""
    if not fmt.compressed:
        return "stores the weight itself: use torch.nn.functional.linear"
    if fmt.plain and fmt.block[1] % 8 == 0:
        return ""
    return (
        f"has {fmt.bits} bits, blocks of {fmt.block[0]} x {fmt.block[1]} values and {fmt.scaling.stored} scales, and "
        "the kernel takes 2, 4 or 8 bits, blocks of a multiple of 8 along rows and fp32 scales: decode it first, "
        "weight.dequantize(torch.bfloat16)"
    )


def check(name: str, x: Tensor, codes: Tensor, scale: Tensor | None, fmt: Format, k: int, transposed: bool) -> int:
    """That a product exists and that there is a kernel for it; returns the columns of the result."""
    if wrong := _refused(fmt):
        raise ValueError(f"{name}: format {fmt.name!r} {wrong}")
    if x.dtype != torch.bfloat16:
        raise TypeError(f"{name}: the input must be bfloat16, not {x.dtype}: convert it with .to(torch.bfloat16)")
    n = codes.shape[0]
    shape = (n, row_bytes(k, fmt.bits))
    blocks = (n, -(-k // fmt.block[1]))
    if tuple(codes.shape) != shape or scale is None or tuple(scale.shape) != blocks:
        raise ValueError(f"{name}: a weight [{n}, {k}] in {fmt.name!r} has codes {shape} and scales {blocks}")
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
    m = x.numel() // terms if terms else 0
    out = torch.empty((*x.shape[:-1], columns), dtype=torch.bfloat16, device=x.device)
    if not m or not columns:
        return out.zero_()
    if max(m, n, k) > _MOST or tiles(m) * tiles(columns) > _MOST:
        raise ValueError(f"linear: {m} x {n} x {k} is more than one launch can do: give the input in parts")
    parts = [part.contiguous() for part in (x, codes, scale, extra) if part is not None]
    places = [part.data_ptr() for part in (*parts, out)]
    whole = n % 32 == 0 and k % 16 == 0 if transposed else n % 2 == 0 and k % max(32, 128 // fmt.bits) == 0
    whole = whole and not (places[0] | places[1] | places[-1]) % 16
    if extra is None:
        places.insert(3, 0)
    addresses, sizes = [*map(c_void_p, places)], [c_int(m), c_int(n), c_int(k)]
    runs = machine(x.device)
    if transposed or m > FEW:
        kernel = _module(runs, "linear.cu", specialise(fmt, whole)).function(NAMES[transposed])
        runs.launch(kernel, tiles(m) * tiles(columns), 128, [*addresses, *sizes])
        return out
    plan = few(fmt, m, n, k)
    module = _module(runs, "few.cu", specialise_few(fmt, whole and k % plan.turn == 0, plan.groups))
    sums = torch.empty((plan.parts, m, n), dtype=torch.float32, device=x.device) if plan.parts > 1 else None
    partial = c_void_p(None if sums is None else sums.data_ptr())
    arguments = [*addresses, partial, *sizes, c_int(plan.span)]
    runs.launch(module.function("linear_few"), plan.blocks, 256, arguments)
    if sums is not None:
        arguments = [partial, addresses[-1], c_int64(m * n), c_int(plan.parts)]
        runs.launch(module.function("linear_sum"), -(-m * n // 256), 256, arguments)
    return out


def tiles(n: int) -> int:
    """Tiles along a side of n results."""
    return -(-n // TILE)


@dataclass(frozen=True)
class Few:
    """How few rows are divided: the grid of cuda/few.cu. Terms are in parts of `span`."""

    groups: int  # of eight rows of x, of a block
    blocks: int
    parts: int
    span: int
    turn: int  # terms of a warp at a time


@lru_cache(maxsize=4096)
def few(fmt: Format, m: int, n: int, k: int, blocks: int = BLOCKS) -> Few:
    """The grid, of one card as of another: so are the sums. Terms are divided where there are few tiles."""
    groups = min(1 << (-(-m // 8) - 1).bit_length(), 4)
    tiles = -(-m // (8 * groups)) * -(-n // (16 if groups <= 2 else 32))
    turn = 4 * (128 // fmt.bits)
    sweep = 8 * turn  # of the warps of a block
    sweeps = -(-k // sweep)
    room = blocks if groups <= 2 else blocks // 2  # a multiprocessor has one block with more rows
    span = -(-sweeps // max(1, min(room // tiles, sweeps))) * sweep
    parts = -(-k // span)
    return Few(groups, tiles * parts, parts, span, turn)


@lru_cache(maxsize=256)
def specialise(fmt: Format, whole: bool) -> str:
    """`spec.h` of cuda/linear.cu."""
    return f"#pragma once\n{print_format(fmt, 'Weight')}constexpr bool WHOLE = {str(whole).lower()};\n"


@lru_cache(maxsize=256)
def specialise_few(fmt: Format, whole: bool, groups: int) -> str:
    """`spec.h` of cuda/few.cu."""
    return f"{specialise(fmt, whole)}constexpr int GROUPS = {groups};\n"


@lru_cache(maxsize=256)
def _module(runs: Machine, file: str, spec: str) -> Module:
    return runs.module(sources()[file], {**sources(), "spec.h": spec})


# Few rows of common weights: rows of x, and turns that are under way (AHEAD in cuda/few.h).
_FEW = [("int4", 8, 4), ("int4", 16, 4), ("int4", 32, 2), ("nf4", 8, 4), ("nf4", 32, 2), ("int8", 8, 4), ("e2m1", 8, 4)]


def shipped() -> list[Specialisation]:
    """The kernels of common weights, aligned, with the values of W that a thread decodes in a turn of its loop."""
    found = []
    for name in ("int4", "int8", "nf4", "e2m1"):
        values: Mapping[str, int] = {"linear": 32, "linear_transposed": 32}
        found.append(Specialisation(f"linear {name}", "linear.cu", specialise(find_format(name), True), values))
    for name, rows, turns in _FEW:
        fmt, groups = find_format(name), rows // 8
        values = {"linear_few": turns * (2 if groups <= 2 else 4) * (128 // fmt.bits)}
        found.append(Specialisation(f"few {name}, {rows} rows", "few.cu", specialise_few(fmt, True, groups), values))
    return found
