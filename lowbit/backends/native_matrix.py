"""The native backend's whole matrices: to codes, to what codes stand for, to both at once, and back (CPU only).

Where scales are absmax / top of a part of a row, or are stored in bytes, the library derives them on its way. Others
are made here, by `scales`, from what the library has measured of each block, and given to it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from ctypes import addressof, byref
from typing import Literal

import torch
from torch import Tensor

from ..blocks import halve
from ..formats import PLAIN, Format
from ..formats import format as find_format
from ..layout import row_bytes, row_stride
from ..native import abi
from ..native.library import load
from ..native.tables import ALL, derives, stores, table
from ..rotation import Rotation
from ..rows import part_shapes
from ..scales import Scales, best, block_of, every_byte, multiplier, outer_scale, statistic, times

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
EXTRA = {"affine": "zero", "log": "base"}


def takes(fmt: Format, live: bool = False) -> bool:
    """Whether this backend codes and decodes a format; `live` as for `encode`."""
    linear = fmt.kind in ("integer", "codebook") and fmt.signed and not fmt.square
    return (derives(fmt) or linear) if not live else (derives(fmt) and fmt.scaling == PLAIN)


def _across(cols: int, width: int) -> int:
    """Blocks of a row."""
    if cols > ALL:
        raise ValueError(
            f"a row of {cols} values is too long for the native backend: LOWBIT_BACKEND=reference takes it"
        )
    return -(-cols // width)


class _Matrix:
    """A matrix that is to be encoded, rotated first if that is asked: the library's struct, and what can be measured.

    A rotation appends zeros to rows, up to a multiple of its size.
    """

    def __init__(
        self,
        fmt: Format,
        x: Tensor,
        noise: tuple[int, int] | None = None,
        rotation: Rotation | None = None,
        run: int = 0,
    ):
        rows, filled = x.shape
        cols = rotation.padded(filled) if rotation else filled
        self.fmt, self.shape = fmt, (rows, cols)
        self.block = block_of(fmt, rows, cols) if fmt.compressed else (1, 1)
        self.struct = m = abi.Matrix(rows=rows, cols=cols, filled=filled, stride=row_stride(cols), tile=self.block[0])
        m.stochastic, m.key[:] = noise is not None, noise or (0, 0)
        if rotation is not None:
            m.rotation, m.flips = rotation.size, rotation.seed is not None
            m.signs[:] = (0, 0) if rotation.seed is None else rotation.keys
        m.packed.format, m.packed.scales = addressof(table(fmt)), _across(cols, self.block[1])
        if run:  # what is drawn are scales
            m.run, m.stochastic, m.stride = run, False, row_stride(m.packed.scales)
        x = x.detach().resolve_neg()
        self._point(x if 1 in x.stride() else x.contiguous())

    def _point(self, x: Tensor) -> None:
        self.x, m = x, self.struct  # alive for as long as this is
        m.values, m.dtype, m.columns = x.data_ptr(), DTYPES[x.dtype], x.stride(1) != 1
        m.step = x.stride(1 if m.columns else 0)

    def encode(
        self,
        dtype: torch.dtype | None,
        parts: dict[str, Tensor] | None,
        live: bool = False,
        edge: float | None = None,
        own: bool = False,
    ) -> Tensor | None:
        """Fill the parts, if there are any, and return what codes stand for, if it has a dtype.

        With an edge, one more part is `inside`, made here. Values take the place of the matrix if that is one's own.
        """
        m, given, found = self.struct, self.x, None
        m.packed.live = live
        if stores(self.fmt):
            self._find_outer(parts)
        elif not derives(self.fmt):
            found = best(self.fmt, self)
        if parts is not None:
            parts |= found.parts if found else {}
            m.packed.codes, m.packed.row_bytes = parts["codes"].data_ptr(), row_bytes(self.shape[1], self.fmt.bits)
            m.packed.scale = m.bytes = parts["scale"].data_ptr() if self.fmt.compressed else None
            m.packed.extra = parts[EXTRA[self.fmt.kind]].data_ptr() if self.fmt.kind in EXTRA else None
            if self.fmt.scaling.outer and stores(self.fmt):
                m.outers = parts["tensor_scale"].data_ptr()
            if edge is not None:
                parts["inside"] = torch.zeros(self.shape[0], row_bytes(self.shape[1], 1), dtype=torch.uint8)
                m.mask, m.edge = parts["inside"].data_ptr(), edge
        values = None
        if dtype is not None:
            own = (own or self.x is not given) and dtype == torch.float32  # what is a copy may be overwritten
            values = self.x if own else torch.empty(self.shape, dtype=dtype)
            m.out, m.out_dtype = values.data_ptr(), DTYPES[dtype]
        with self._given(found) if found else contextlib.nullcontext():
            self._run(load().encode)
        return values

    def _find_outer(self, parts: dict[str, Tensor] | None) -> None:
        """What is left to say where the library derives scales that are stored in bytes."""
        outer, m = None, self.struct
        if self.fmt.scaling.outer:  # it finds those, too
            return
        if self.fmt.scaling.peak:
            outer = outer_scale(self.fmt, times(self._largest(), self.fmt.scaling.gain))
            m.outer = float(outer)
            if parts is not None:
                parts["tensor_scale"] = outer
        self.table = every_byte(self.fmt, outer)  # alive for as long as this is
        m.multipliers, m.inverses = self.table.multiplier.data_ptr(), self.table.inverse.data_ptr()

    def _largest(self) -> Tensor:
        """The largest statistic of all blocks, [1, 1], or all of them: it is found at once where it is finite."""
        if self.fmt.scaling.statistic == "absmax" and self.x.numel():
            largest = self.absmax().amax().view(1, 1)
            if math.isfinite(largest):
                return largest
        return statistic(self.fmt, self)

    @contextlib.contextmanager
    def _given(self, found: Scales) -> Iterator[None]:
        inverse, multiplier = found.inverse.contiguous(), found.multiplier.contiguous()
        self.struct.inverse, self.struct.packed.scale = inverse.data_ptr(), multiplier.data_ptr()
        yield
        self.struct.inverse = self.struct.packed.scale = None

    def _run(self, function: Callable[..., int], *arguments: object) -> None:
        if self.x.numel() and function(byref(self.struct), *arguments, torch.get_num_threads()):
            raise MemoryError("the native library found no memory for a block")

    # ---- scales.Measured

    def absmax(self) -> Tensor:
        m = self.struct
        if not m.columns and not m.rotation:
            return self._peaks()
        turned = torch.empty(self.shape)  # rows in fp32, rotated, to be read from then on
        m.out, m.out_dtype = turned.data_ptr(), DTYPES[turned.dtype]
        found = self._peaks()
        m.out, m.rotation, m.filled = None, 0, m.cols
        self._point(turned)
        return found

    def _peaks(self) -> Tensor:
        found = self._by_block("absmax", torch.float32)
        return found.amax(1) if self.block[0] > 1 else found.squeeze(1)

    def total(self, of: Literal["squares", "magnitudes"], inverse: Tensor) -> Tensor:
        with self._given(Scales(inverse, inverse, {})):
            return halve(self._by_block(of, torch.float64).transpose(1, 2))

    def losses(self, found: Scales) -> Tensor:
        with self._given(found):
            return halve(self._by_block("losses", torch.float64).transpose(1, 2))

    def products(self, inverse: Tensor) -> Tensor:
        with self._given(Scales(inverse, inverse, {})):
            return halve(self._by_block("products", torch.float64).transpose(1, 2))

    def units(self, inverse: Tensor) -> Tensor:
        values, m = torch.empty(self.shape), self.struct
        m.out, m.out_dtype = values.data_ptr(), DTYPES[values.dtype]
        with self._given(Scales(inverse, inverse, {})):
            self._run(load().measure, abi.STATISTIC["units"], None)
        m.out = None
        return values

    def codes(self, found: Scales) -> Tensor:
        parts = {"codes": torch.empty(self.shape[0], row_bytes(self.shape[1], self.fmt.bits), dtype=torch.uint8)}
        self.struct.packed.codes, self.struct.packed.row_bytes = parts["codes"].data_ptr(), parts["codes"].shape[1]
        with self._given(found):
            self._run(load().encode)
        return parts["codes"]

    def _by_block(self, what: str, dtype: torch.dtype) -> Tensor:
        """A statistic of each row in each block: [block rows, rows of a block, block columns]."""
        height, across = self.block[0], self.struct.packed.scales
        each = torch.zeros(-(-self.shape[0] // height) * height, across, dtype=dtype)
        self._run(load().measure, abi.STATISTIC[what], each.data_ptr())
        return each.unflatten(0, (-1, height))


def encode(
    fmt: Format,
    x: Tensor,
    noise: tuple[int, int] | None = None,
    *,
    live: bool = False,
    rotation: Rotation | None = None,
    run: int = 0,
) -> dict[str, Tensor]:
    """See `backends.encode`."""
    matrix = _Matrix(fmt, x, noise, rotation, run)
    parts = _parts(fmt, matrix.shape)
    matrix.encode(None, parts, live)
    return parts


def fake(
    fmt: Format,
    x: Tensor,
    noise: tuple[int, int] | None = None,
    *,
    rotation: Rotation | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """See `backends.fake`."""
    values = _Matrix(fmt, x, noise, rotation).encode(dtype, None)
    assert values is not None
    return values


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
    """See `backends.quantized`."""
    matrix = _Matrix(fmt, x, noise, rotation, run)
    parts = _parts(fmt, matrix.shape)
    values = matrix.encode(dtype, parts, edge=edge)
    assert values is not None
    return values, parts


def measured(fmt: Format, x: Tensor, *, rotation: Rotation | None = None) -> _Matrix:
    """See `backends.measured`."""
    return _Matrix(fmt, x, None, rotation)


def rotate(
    x: Tensor,
    rotation: Rotation,
    *,
    back: bool = False,
    dtype: torch.dtype = torch.float32,
    mask: Tensor | None = None,
    own: bool = False,
) -> Tensor:
    """See `backends.rotate`."""
    matrix = _Matrix(find_format("fp32"), x, None, rotation)
    if back:
        matrix.struct.rotation = -rotation.size
        matrix.struct.mask = None if mask is None else mask.data_ptr()
    own = own and x.is_contiguous() and x.dtype == torch.float32 and x.shape == matrix.shape
    values = matrix.encode(dtype, None, own=own)
    assert values is not None
    return values


def _parts(fmt: Format, shape: tuple[int, int]) -> dict[str, Tensor]:
    shapes = part_shapes(fmt, shape)
    # Where the library is given scales, they are made with them.
    made = shapes if derives(fmt) or stores(fmt) else {"codes": shapes["codes"]}
    return {part: torch.empty(shape, dtype=dtype) for part, (shape, dtype) in made.items()}


def decode(fmt: Format, parts: dict[str, Tensor], cols: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """See `backends.decode`."""
    parts = {part: tensor.contiguous() for part, tensor in parts.items()}
    codes = parts["codes"]
    rows = codes.shape[0] if fmt.compressed or not cols else codes.numel() // cols
    values = torch.empty(rows, cols, dtype=dtype)
    m = abi.Matrix(out=values.data_ptr(), out_dtype=DTYPES[dtype], rows=rows, cols=cols, tile=1)
    m.packed.format, m.packed.codes = addressof(table(fmt)), codes.data_ptr()
    if fmt.compressed:
        m.tile, width = block_of(fmt, rows, cols)
        m.packed.row_bytes, m.packed.scales = codes.shape[1], _across(cols, width)
        if fmt.scaling.outer and stores(fmt):
            m.bytes, m.outers = parts["scale"].data_ptr(), parts["tensor_scale"].data_ptr()
        elif fmt.scaling.stored in ("e8m0", "e4m3") and not fmt.scaling.outer:
            scale = every_byte(fmt, parts.get("tensor_scale")).multiplier
            m.bytes, m.multipliers = parts["scale"].data_ptr(), scale.data_ptr()
        else:
            scale = parts["scale"] if derives(fmt) else multiplier(fmt, parts).contiguous()
            m.packed.scale = scale.data_ptr()
        m.packed.extra = parts[EXTRA[fmt.kind]].data_ptr() if fmt.kind in EXTRA else None
    if values.numel() and load().decode(byref(m), torch.get_num_threads()):
        raise MemoryError("the native library found no memory for a block")
    return values
