"""An operand of a matmul: the values that its codes stand for, in fp32, and the codes where they are kept.

What the values are is said by `codec` (and `stablespam`); how they are made is a backend's business. Outliers are taken
out before and put back after. A rotation comes before all this: `turned`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends
from ..backends.reference import blocks, joined
from ..rotation import Rotation, rotate, rotate_back
from . import eden
from .operand import Operand
from .stablespam import RELEASED

Noise = tuple[int, int]  # the key of an operand's random bits


def fake_quantize(x: Tensor, operand: Operand | None, noise: Noise | None = None) -> Tensor:
    """The matrix `x` as the operand's format would hold it, blocks along its rows, in fp32 (`x` itself if None).

    `noise` is the key of the random bits, needed where the operand rounds stochastically.
    """
    if operand is None or x.numel() == 0:
        return x
    rows = x.reshape(1, -1) if operand.flat else x
    taken: list[tuple[Tensor, Tensor]] = []
    if operand.outliers:
        rows = rows.float().clone(memory_format=torch.contiguous_format)
        for block in _blocks(rows, operand):
            where = _largest(block, operand.outliers)
            taken.append((where, block.gather(-1, where)))
            block.scatter_(-1, where, 0.0)
    if operand.spec is None:  # the formulas of the Stable-SPAM release are its own: no backend knows them
        values = RELEASED[str(operand.format)].values
        quantized = joined([values(block) for block in _blocks(rows.float().contiguous(), operand)])
    elif operand.rounding == "eden":
        quantized = decode(encode(x, operand, noise), operand, x.shape[1])
    elif operand.prescale != 1:
        noise = None if operand.rounding == "nearest" else noise
        quantized = backends.fake(operand.spec, rows.float() * operand.prescale, noise) * (1 / operand.prescale)
    else:
        quantized = backends.fake(operand.spec, rows, None if operand.rounding == "nearest" else noise)
    if taken:
        for block, (where, exact) in zip(_blocks(quantized, operand), taken, strict=True):
            block.scatter_(-1, where, exact)
    return quantized.reshape(x.shape)


def encode(x: Tensor, operand: Operand, noise: Noise | None = None) -> dict[str, Tensor]:
    """The parts of `x` in the operand's format, which `decode` gives the values of `fake_quantize` for, bit for bit.

    Empty where no codes hold them: outliers stay exact, flat groups cross rows, an empty matrix has no blocks.
    """
    if operand.codes is None or x.numel() == 0:
        return {}
    x = x.detach() if x.dtype in (torch.float32, torch.bfloat16, torch.float16) else x.detach().float()
    x = x if operand.prescale == 1 else x.float() * operand.prescale
    if operand.rounding == "eden":
        assert noise is not None
        return eden.encode(operand.codes, x.float(), operand.hadamard, noise)
    noise = None if operand.rounding == "nearest" else noise
    return (backends.reference if _traced(x) else backends).encode(operand.codes, x, noise)


def decode(parts: dict[str, Tensor], operand: Operand, cols: int) -> Tensor:
    """fp32 [rows, cols]: the inverse of `encode`."""
    assert operand.codes is not None
    backend = backends.reference if _traced(parts["codes"]) else backends
    values = backend.decode(operand.codes, parts, cols)
    return values if operand.prescale == 1 else values * (1 / operand.prescale)


def _traced(x: Tensor) -> bool:
    """Whether a native backend could not be pointed to its memory (see `backends.fake`)."""
    return torch.compiler.is_compiling() or x.is_meta or type(x) is not Tensor


def turned(x: Tensor, rotation: Rotation | None) -> Tensor:
    """A matrix rotated along its rows, in fp32 (`x` itself if None), with zeros appended up to a multiple of the size.

    Zeros in both operands add nothing to their product, and a rotation of both changes none.
    """
    if rotation is None:
        return x
    return rotate(F.pad(x.detach().float(), (0, padded(x.shape[1], rotation) - x.shape[1])), rotation)


def padded(cols: int, rotation: Rotation | None) -> int:
    """How many columns `turned` makes of so many."""
    return cols if rotation is None else -(-cols // rotation.size) * rotation.size


def turned_back(x: Tensor, rotation: Rotation | None, cols: int) -> Tensor:
    """The inverse of `turned` of a matrix of `cols` columns, up to rounding."""
    return x if rotation is None else rotate_back(x, rotation)[:, :cols]


def _blocks(rows: Tensor, operand: Operand) -> list[Tensor]:
    assert operand.block is not None
    return blocks(rows, operand.block)


def _largest(block: Tensor, count: int) -> Tensor:
    """Where the largest magnitudes of blocks [..., n] are: [..., count], or fewer in a shorter block.

    One masked maximum each, not topk, which is slow on a CPU for many short blocks. Of equal magnitudes the first is
    taken; topk may take others, which can show in the last bit of what is left.
    """
    magnitude, found = block.abs(), []
    for _ in range(min(count, block.shape[-1])):
        found.append(magnitude.argmax(-1, keepdim=True))
        magnitude.scatter_(-1, found[-1], -1.0)
    return torch.cat(found, -1)
