"""The CUDA backend: kernels that are compiled for what they are to do, and launched on torch's current stream.

What they compute is what `reference` says, bit for bit. This file has whole matrices: to codes, to what codes stand
for, to both at once, and back (cuda/codec.cu); and what the host makes scales from (cuda/statistic.cu).
"""

from __future__ import annotations

from ctypes import c_int, c_void_p
from typing import Literal

import torch
from torch import Tensor

from .. import eden
from ..blocks import halve
from ..formats import PLAIN, Format, format
from ..gpu import machine
from ..layout import STEP_BLOCK, row_bytes, row_stride
from ..native.abi import STATISTIC
from ..rotation import Rotation
from ..rows import part_shapes
from ..scales import Scales, best, block_of, multiplier
from .cuda_codec import EXTRA as EXTRA
from .cuda_codec import THREADS as THREADS
from .cuda_codec import VALUES as VALUES
from .cuda_codec import (
    WARP,
    finder,
    is_line,
    is_linear,
    launch,
    matrix,
    module,
    point,
    print_spec,
    share,
    team,
    turn,
)
from .cuda_codec import Matrix as Matrix
from .cuda_step import capture as capture
from .cuda_step import prepare as prepare
from .cuda_step import step as step
from .cuda_step import uncapturable as uncapturable
from .cuda_step import unprepared as unprepared
from .cuda_step import unsupported as unsupported
from .reference_matrix import inside

Noise = tuple[int, int]
FLOATS = format("fp32")


def find(device: torch.device) -> None:
    """Find what kernels need; raises a `RuntimeError` or `ValueError` with what is missing and the way out."""
    machine(device)


def takes(fmt: Format, live: bool = False) -> bool:
    """Whether this backend codes and decodes a format; `live` as for `encode`."""
    if live or not fmt.signed:  # kernels keep what is above 0 alive
        return fmt.scaling == PLAIN and finder(fmt) != "host"
    return finder(fmt) != "host" or is_linear(fmt)


# ---- to codes, and to values


def _encode(
    fmt: Format,
    x: Tensor,
    parts: dict[str, Tensor] | None,
    dtype: torch.dtype | None,
    noise: Noise | None = None,
    live: bool = False,
    rotation: Rotation | None = None,
    run: int = 0,
    edge: float | None = None,
) -> tuple[Tensor | None, dict[str, Tensor]]:
    """(What the codes stand for, if it has a dtype, [rows, columns], the parts, if any are to be filled).

    `parts`: None, or an empty dict.
    """
    x, how = x.detach().resolve_neg().contiguous(), finder(fmt)
    cols = rotation.padded(x.shape[1]) if rotation else x.shape[1]
    if rotation is not None and how != "warp":  # a block takes two passes
        x, rotation = rotate(x, rotation), None
    shape = x.shape[0], cols
    if parts is not None:
        parts |= _empty(fmt, shape, x.device, scales=how != "host" or not x.numel())
        if edge is not None:
            parts["inside"] = torch.empty(shape[0], row_bytes(cols, 1), dtype=torch.uint8, device=x.device)
    values = None if dtype is None else torch.empty(shape, dtype=dtype, device=x.device)
    if not x.numel():
        return values, parts or {}
    together = fmt.block[1] if how == "warp" and fmt.compressed else VALUES
    made = matrix(
        fmt,
        shape,
        max(together, fmt.scaling.outer if how == "warp" else 0, rotation.size if rotation else 0),
        x.shape[1],
        bool(run or rotation),
    )
    made.key[:] = noise or (0, 0)
    if run:
        made.stride = row_stride(made.scales)  # what is drawn are scales
    if rotation:
        turn(made, rotation)
    own = parts if parts is not None else _empty(fmt, shape, x.device, codes=False, scales=how == "passes")
    point(made, values=x, out=values, codes=own.get("codes"), mask=own.get("inside"))
    made.edge = edge or 0.0
    random, turned = noise is not None and not run, rotation.size if rotation else 0
    spec = print_spec(fmt, x.dtype, random, live, turned, dtype or torch.float32, run, line=is_line(made))
    if how == "host":
        found = best(fmt, _Measured(fmt, x))
        inverse, held = found.inverse.contiguous(), found.multiplier.contiguous()
        point(made, scale=held, inverse=inverse)
        own |= found.parts
    else:
        point(made, scale=own.get("scale"), extra=own.get(EXTRA.get(fmt.kind, "")), outer=own.get("tensor_scale"))
    if how == "passes":
        before, threads = module(x.device, spec, "passes.cu"), THREADS if made.width.by > WARP else 32
        before.machine.launch(before.function("scales"), made.rows * made.scales, threads, (made,))
    if how == "warp" and fmt.scaling.peak and not fmt.scaling.outer:
        most = torch.zeros(1, dtype=torch.int32, device=x.device)
        point(made, most=most)
        launch(module(x.device, spec, "passes.cu"), "largest_of_all", made)
    launch(module(x.device, spec), "encode", made)
    return values, own if parts is not None else {}


def _empty(
    fmt: Format, shape: tuple[int, int], device: torch.device, codes: bool = True, scales: bool = True
) -> dict[str, Tensor]:
    """Parts to be filled; those of an empty matrix have what is known without values."""
    make = torch.empty if shape[0] * shape[1] else torch.zeros
    known = part_shapes(fmt, shape).items()
    asked = {part: what for part, what in known if (codes if part == "codes" else scales)}
    return {part: make(size, dtype=dtype, device=device) for part, (size, dtype) in asked.items()}


def encode(
    fmt: Format,
    x: Tensor,
    noise: Noise | None = None,
    *,
    live: bool = False,
    rotation: Rotation | None = None,
    run: int = 0,
) -> dict[str, Tensor]:
    """See `backends.encode`. With a rotation, of the matrix as `rotation.rotate` leaves it."""
    if run and not _is_corrected(fmt, run):
        assert noise is not None
        return eden.encode(fmt, measured(fmt, x, rotation=rotation), noise, run)
    return _encode(fmt, x, {}, None, noise, live, rotation, run)[1]


def _is_corrected(fmt: Format, run: int) -> bool:
    """Whether a warp has all of a run whose scales MS-EDEN corrects."""
    return finder(fmt) == "warp" and run <= WARP and run % fmt.block[1] == 0


def fake(
    fmt: Format,
    x: Tensor,
    noise: Noise | None = None,
    *,
    rotation: Rotation | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """See `backends.fake`."""
    values, _ = _encode(fmt, x, None, dtype, noise, rotation=rotation)
    assert values is not None
    return values


def quantized(
    fmt: Format,
    x: Tensor,
    noise: Noise | None = None,
    *,
    rotation: Rotation | None = None,
    dtype: torch.dtype = torch.float32,
    run: int = 0,
    edge: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """See `backends.quantized`."""
    if run and not _is_corrected(fmt, run):
        parts = encode(fmt, x, noise, rotation=rotation, run=run)
        values = decode(fmt, parts, rotation.padded(x.shape[1]) if rotation else x.shape[1], dtype)
        if edge is not None:
            parts["inside"] = inside(fmt, measured(fmt, x, rotation=rotation), edge)
        return values, parts
    values, parts = _encode(fmt, x, {}, dtype, noise, False, rotation, run, edge)
    assert values is not None
    return values, parts


def decode(fmt: Format, parts: dict[str, Tensor], cols: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """See `backends.decode`."""
    parts = {part: tensor.contiguous() for part, tensor in parts.items()}
    codes = parts["codes"]
    rows = codes.shape[0] if fmt.compressed or not cols else codes.numel() // cols
    values = torch.empty(rows, cols, dtype=dtype, device=codes.device)
    if values.numel():
        scale = multiplier(fmt, parts).contiguous() if fmt.scaling.stored == "double" else parts.get("scale")
        made = matrix(fmt, (rows, cols), max(VALUES, fmt.scaling.outer))
        point(made, out=values, codes=codes, scale=scale, outer=parts.get("tensor_scale"))
        point(made, extra=parts.get(EXTRA.get(fmt.kind, "")))
        spec = print_spec(fmt, torch.float32, out=dtype, line=is_line(made))
        launch(module(values.device, spec), "decode", made)
    return values


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
    x = x.detach().resolve_neg().contiguous()
    values = torch.empty(x.shape[0], rotation.padded(x.shape[1]), dtype=dtype, device=x.device)
    if x.numel():
        made = matrix(FLOATS, (values.shape[0], values.shape[1]), rotation.size, x.shape[1], alone=True)
        turn(made, rotation)
        point(made, values=x, out=values, mask=None if mask is None else (mask := mask.contiguous()))
        spec = print_spec(FLOATS, x.dtype, rotation=-rotation.size if back else rotation.size, out=dtype)
        launch(module(x.device, spec), "encode", made)
    return values


# ---- what scales are made from


def measured(fmt: Format, x: Tensor, *, rotation: Rotation | None = None) -> _Measured:
    """See `backends.measured`."""
    return _Measured(fmt, x if rotation is None else rotate(x, rotation))


class _Measured:
    """A matrix of which kernels measure the blocks (`scales.Coded`)."""

    def __init__(self, fmt: Format, x: Tensor):
        self.fmt, self.x = fmt, x.detach().resolve_neg().contiguous()
        self.shape = x.shape[0], x.shape[1]
        self.block = block_of(fmt, *self.shape)

    def absmax(self) -> Tensor:
        return self._by_piece("absmax").amax((1, 3)).float()

    def total(self, of: Literal["squares", "magnitudes"], inverse: Tensor) -> Tensor:
        return self._total(of, Scales(inverse, inverse, {}))

    def losses(self, found: Scales) -> Tensor:
        return self._total("losses", found)

    def products(self, inverse: Tensor) -> Tensor:
        return self._total("products", Scales(inverse, inverse, {}))

    def units(self, inverse: Tensor) -> Tensor:
        values = torch.empty(self.shape, device=self.x.device)
        self._measure("units", Scales(inverse, inverse, {}), out=values)
        return values

    def codes(self, found: Scales) -> Tensor:
        parts = _empty(self.fmt, self.shape, self.x.device, scales=False)
        if self.x.numel():
            made = matrix(self.fmt, self.shape)
            inverse, held = found.inverse.contiguous(), found.multiplier.contiguous()
            point(made, values=self.x, scale=held, inverse=inverse, codes=parts["codes"])
            spec = print_spec(self.fmt, self.x.dtype, given=True, line=is_line(made))
            launch(module(self.x.device, spec), "encode", made)
        return parts["codes"]

    def _total(self, what: str, found: Scales) -> Tensor:
        return halve(halve(self._by_piece(what, found)).transpose(1, 2))

    def _by_piece(self, what: str, found: Scales | None = None) -> Tensor:
        """A statistic of each piece of a row in a block: float64 [block rows, its rows, block columns, pieces]."""
        (rows, cols), (height, width) = self.shape, self.block
        down, across, pieces = -(-rows // height), -(-cols // width), -(-min(width, max(cols, 1)) // STEP_BLOCK)
        each = torch.zeros(down * height, across, pieces, dtype=torch.float64, device=self.x.device)
        self._measure(what, found, pieces, to=each)
        return each.unflatten(0, (down, height))

    def _measure(
        self, what: str, found: Scales | None, pieces: int = 0, out: Tensor | None = None, to: Tensor | None = None
    ) -> None:
        if not self.x.numel():
            return
        pieces = pieces or -(-min(self.block[1], self.shape[1]) // STEP_BLOCK)
        made = matrix(self.fmt, self.shape, alone=True)
        share(made, made.scales * pieces * team(self.fmt))
        if found is not None:
            inverse, held = found.inverse.contiguous(), found.multiplier.contiguous()
            point(made, scale=held, inverse=inverse)
        point(made, values=self.x, out=out)
        kernels = module(self.x.device, print_spec(self.fmt, self.x.dtype, given=True), "statistic.cu")
        pointer = c_void_p(None if to is None else to.data_ptr())
        launch(kernels, "measure", made, c_int(STATISTIC[what]), c_int(pieces), pointer)
