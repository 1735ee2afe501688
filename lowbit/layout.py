"""The shape arithmetic of rows and blocks; `rows` says what it is for.

A step works on step blocks: 256 values of a row, or a whole shorter row. Formats' blocks divide them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

STEP_BLOCK = 256


def rows_of(shape: Sequence[int]) -> tuple[int, int]:
    """(rows, cols) of a tensor's shape: (n, 1) for a vector of n values, (1, 1) for a scalar.

    >>> rows_of((8, 3, 3, 3))
    (8, 27)
    """
    return (shape[0], math.prod(shape[1:])) if shape else (1, 1)


def row_bytes(cols: int, bits: int) -> int:
    """Bytes of one row of codes.

    >>> row_bytes(5, 4)
    3
    """
    return -(-cols * bits // 8)


def step_width(cols: int) -> int:
    """Values of a row that are worked on together, the step block: 256, or the next power of two for shorter rows.

    >>> step_width(5461), step_width(64), step_width(33), step_width(1)
    (256, 64, 64, 1)
    """
    return min(STEP_BLOCK, 1 << max(0, cols - 1).bit_length())


def row_stride(cols: int) -> int:
    """The element index of (row, col) is row * row_stride + col: whole step blocks, so it never depends on a shard.

    >>> row_stride(300), row_stride(64)
    (512, 64)
    """
    width = step_width(cols)
    return -(-cols // width) * width
