"""A tensor stored in a format: `quantize` makes it, `Packed` holds it. `rows` says where its codes lie."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import backends
from .formats import Format
from .formats import format as find_format
from .layout import rows_of
from .rounding import key


@dataclass(frozen=True, eq=False)
class Packed:
    """A tensor stored in a format: named plain tensors, its format and its shape. Not a tensor subclass."""

    format: Format
    shape: tuple[int, ...]
    parts: dict[str, Tensor] = field(repr=False)

    @property
    def codes(self) -> Tensor:
        """uint8 [rows, ceil(cols * bits / 8)], or the tensor itself for float formats."""
        return self.parts["codes"]

    @property
    def scale(self) -> Tensor | None:
        """One number per block, [rows, ceil(cols / block)]; None for float formats.

        fp32, or as the format stores scales: bf16, or a byte (`Format.scaling`). Blocks of several rows have fewer.
        """
        return self.parts.get("scale")

    @property
    def nbytes(self) -> int:
        """Bytes of all parts together."""
        return sum(part.nbytes for part in self.parts.values())

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The tensor the codes stand for, in its own shape, computed in fp32 and then rounded to `dtype`."""
        cols = _row_shape(self.shape)[1]
        return backends.decode(self.format, self.parts, cols, dtype).reshape(self.shape)


def quantize(x: Tensor, format: str | Format, *, stochastic: bool = False, seed: int = 0) -> Packed:
    """Store a tensor in a format.

    Args:
        x: any shape, float32, bfloat16 or float16. Blocks run along the last dimensions of each `x[i]`; a vector is one
            row. A non-finite value makes its block decode to NaN.
        format: a name (`lowbit.formats()`), a `Format`, or a name with a block: `int4:32` (values of a row),
            `e2m1:16x16` (rows and columns), `int8:row`, `int8:tensor`.
        stochastic: round up or down at random, unbiased, instead of to nearest.
        seed: of the random bits; equal seeds give equal codes on every machine.

    Returns:
        A `Packed` whose `codes` are uint8 (a torch dtype's own tensor for fp32, bf16, fp16).

    Raises:
        TypeError: x is not a floating-point tensor.
        ValueError: the format is unknown, or unsigned while x holds a negative value.

    >>> packed = quantize(torch.tensor([[0.0, -1.0, 3.0, 6.0]]), "e2m1")
    >>> packed.codes.tolist(), packed.dequantize().tolist()
    ([[160, 117]], [[0.0, -1.0, 3.0, 6.0]])
    """
    fmt = find_format(format)
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"quantize: x must be float32, bfloat16 or float16, not {x.dtype}")
    if fmt.compressed and not fmt.signed and bool((x < 0).any()):
        raise ValueError(f"quantize: x holds negative values and {fmt.name!r} is unsigned; use {fmt.partner!r}")
    noise = key(seed, 0, 0, 0) if stochastic else None
    rows, cols = _row_shape(tuple(x.shape))
    parts = backends.encode(fmt, x.detach().reshape(rows, cols), noise)
    if not fmt.compressed:
        parts["codes"] = parts["codes"].reshape(x.shape)
    return Packed(fmt, tuple(x.shape), parts)


def _row_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Like `rows_of`, but a vector is one row: on its own it has no rows to shard by."""
    return (1, shape[0]) if len(shape) == 1 else rows_of(shape)
