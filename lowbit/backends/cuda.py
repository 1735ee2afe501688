"""The CUDA backend: kernels that are compiled for what they are to do, and launched on torch's current stream.

What they compute is what `reference` says, bit for bit. This file has codecs of whole matrices (cuda/codec.cu).
"""

from __future__ import annotations

from ctypes import Structure, c_int64, c_uint32, c_void_p
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from .. import eden
from ..formats import Format, format
from ..gpu import Module, machine, sources
from ..gpu.formats import print_format
from ..layout import row_bytes, row_stride, step_width
from ..native.abi import DTYPE
from ..rotation import Rotation, rotate_back
from ..rotation import rotate as turn
from ..rows import Measured, part_shapes, unpack
from ..scales import Scales, Tiles, best, block_of, multiplier
from .cuda_step import capture as capture
from .cuda_step import prepare as prepare
from .cuda_step import step as step
from .cuda_step import uncapturable as uncapturable
from .cuda_step import unprepared as unprepared
from .cuda_step import unsupported as unsupported
from .reference_matrix import inside

THREADS = 256
VALUES = 8  # of a lane
WARP = 32 * VALUES
EXTRA = {"affine": "zero", "log": "base"}
_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
assert set(DTYPE) == {str(dtype).removeprefix("torch.") for dtype in _NAMES}


def find(device: torch.device) -> None:
    """Find what kernels need; raises a `RuntimeError` or `ValueError` with what is missing and the way out."""
    machine(device)


def takes(fmt: Format, live: bool = False) -> bool:
    """Whether this backend codes and decodes a format; `live` as for `encode`."""
    return fmt.plain or (_is_given(fmt) and not live)


def _is_given(fmt: Format) -> bool:
    """Whether kernels are given the scales of a format, which `scales` makes."""
    fixed = fmt.kind in ("integer", "codebook") and fmt.signed and not fmt.square
    return not fmt.plain and fixed and 8 % fmt.bits == 0


class Matrix(Structure):
    """As in cuda/codec.cu."""

    _fields_ = [
        ("values", c_void_p),
        ("codes", c_void_p),
        ("scale", c_void_p),
        ("inverse", c_void_p),
        ("extra", c_void_p),
        ("rows", c_int64),
        ("cols", c_int64),
        ("stride", c_int64),
        ("row_bytes", c_int64),
        ("scales", c_int64),
        ("across", c_int64),
        ("tile", c_int64),
        ("width", c_int64),
        ("key", c_uint32 * 2),
        ("signs", c_uint32 * 2),
    ]


@lru_cache(maxsize=1024)
def print_spec(
    fmt: Format,
    dtype: torch.dtype,
    stochastic: bool = False,
    live: bool = False,
    rotation: int = 0,
    out: torch.dtype = torch.float32,
) -> str:
    """The text of spec.h for cuda/codec.cu."""
    constants = {
        "bool STOCHASTIC": stochastic,
        "bool LIVE": live,
        "bool GIVEN": _is_given(fmt),
        "int ROTATION": rotation,
    }
    lines = [f"constexpr {name} = {str(value).lower()};\n" for name, value in constants.items()]
    types = (fmt, "Fmt"), (format(_NAMES[dtype]), "Values"), (format(_NAMES[out]), "Out")
    printed = "".join(print_format(one, name) for one, name in types)
    return f'#pragma once\n#include "arithmetic.h"\n{printed}{"".join(lines)}'


@lru_cache(maxsize=1)
def _texts() -> dict[str, str]:
    return sources()


def _module(
    device: torch.device,
    fmt: Format,
    dtype: torch.dtype,
    stochastic: bool = False,
    live: bool = False,
    rotation: int = 0,
    out: torch.dtype = torch.float32,
) -> Module:
    texts = _texts()
    headers = {name: texts[name] for name in HEADERS}
    spec = print_spec(fmt, dtype, stochastic, live, rotation, out)
    return machine(device).module(texts["codec.cu"], {**headers, "spec.h": spec})


HEADERS = ("stdint.h", "abi.h", "words.h", "arithmetic.h", "device.h", "quick.h", "formats.h")


def _at_once(fmt: Format) -> bool:
    """Whether a warp finds a block's scale by itself."""
    block = fmt.block[1]
    return not fmt.compressed or (fmt.plain and VALUES <= block <= WARP and block & (block - 1) == 0)


def _matrix(
    fmt: Format,
    values: Tensor,
    parts: dict[str, Tensor],
    noise: tuple[int, int] | None = None,
    rotation: Rotation | None = None,
) -> tuple[Matrix, int]:
    """The argument of a kernel, and how many lanes there are.

    `parts` are codes, scales and their kin; of scales that are given, `inverse` and `multiplier` instead.
    """
    rows, cols = values.shape
    tile, block = block_of(fmt, rows, cols) if fmt.compressed else (1, VALUES)
    scales = -(-cols // block)
    # Lanes that share a scale, or rotate values together, are neighbours.
    run = max(block if _at_once(fmt) else VALUES, rotation.size if rotation else 0)
    stride = row_stride(cols)
    whole = cols % step_width(cols) == 0 and cols % run == 0 and cols % block == 0
    if rows > 1 and tile == 1 and whole and not rotation:
        rows, cols, stride, scales = 1, rows * cols, rows * cols, rows * scales  # one long row: no division
    across = -(-cols // run) * run // VALUES
    matrix = Matrix(values=values.data_ptr(), rows=rows, cols=cols, stride=stride, scales=scales, across=across)
    matrix.row_bytes, matrix.tile, matrix.width = row_bytes(cols, fmt.bits), tile, block
    matrix.key[:], matrix.signs[:] = noise or (0, 0), rotation.keys if rotation else (0, 0)
    pointers = {"codes": "codes", "scale": "scale", "inverse": "inverse", EXTRA.get(fmt.kind, ""): "extra"}
    if _is_given(fmt):
        pointers = {"codes": "codes", "multiplier": "scale", "inverse": "inverse"}
    for part, field in pointers.items():
        if part in parts:
            setattr(matrix, field, parts[part].data_ptr())
    return matrix, rows * across


def _launch(module: Module, name: str, lanes: int, *arguments: object) -> None:
    module.machine.launch(module.function(name), -(-lanes // THREADS), THREADS, arguments)


def _empty(fmt: Format, x: Tensor) -> dict[str, Tensor]:
    shapes = part_shapes(fmt, (x.shape[0], x.shape[1]))
    return {part: torch.empty(shape, dtype=dtype, device=x.device) for part, (shape, dtype) in shapes.items()}


def _encode(
    name: str,
    fmt: Format,
    x: Tensor,
    parts: dict[str, Tensor],
    noise: tuple[int, int] | None,
    live: bool,
    rotation: Rotation | None,
    out: Tensor | None = None,
) -> None:
    size, dtype = rotation.size if rotation else 0, torch.float32 if out is None else out.dtype
    module = _module(x.device, fmt, x.dtype, noise is not None, live, size, dtype)
    if not _at_once(fmt) and not _is_given(fmt):
        matrix, _ = _matrix(fmt, x, parts)
        blocks = matrix.rows * matrix.scales
        threads = THREADS if fmt.block[1] > WARP else 32
        module.machine.launch(module.function("scales"), blocks, threads, (matrix,))
    matrix, lanes = _matrix(fmt, x, parts, noise, rotation)
    _launch(module, name, lanes, matrix, *(() if out is None else (c_void_p(out.data_ptr()),)))


def _ready(fmt: Format, x: Tensor, rotation: Rotation | None) -> tuple[Tensor, Rotation | None]:
    """Contiguous; and rotated already where a block takes two passes."""
    x = x.detach().resolve_neg().contiguous()
    if rotation is not None:
        x = pad(x, (0, rotation.padded(x.shape[1]) - x.shape[1]))
        if rotation.seed is None:  # the kernels always change signs
            return turn(x, rotation), None
        if not _at_once(fmt):
            return fake(format("fp32"), x, rotation=rotation), None
    return x, rotation


def _given(fmt: Format, x: Tensor) -> Scales:
    """The scales that kernels are given: torch makes them, on the device."""
    found = best(fmt, Tiles(fmt, x))
    return Scales(found.inverse.contiguous(), found.multiplier.contiguous(), found.parts)


def _pointed(found: Scales, codes: Tensor | None = None) -> dict[str, Tensor]:
    parts = {} if codes is None else {"codes": codes}
    return {**parts, "inverse": found.inverse, "multiplier": found.multiplier}


def encode(
    fmt: Format,
    x: Tensor,
    noise: tuple[int, int] | None = None,
    *,
    live: bool = False,
    rotation: Rotation | None = None,
    run: int = 0,
) -> dict[str, Tensor]:
    """See `backends.encode`. With a rotation, of the matrix as `rotation.rotate` leaves it."""
    if run:
        assert noise is not None
        return eden.encode(fmt, measured(fmt, x, rotation=rotation), noise, run)
    x, rotation = _ready(fmt, x, rotation)
    if _is_given(fmt):
        return _encode_given(fmt, x, _given(fmt, x), noise)
    parts = _empty(fmt, x)
    if x.numel():
        _encode("encode", fmt, x, parts, noise, live, rotation)
    return parts


def _encode_given(fmt: Format, x: Tensor, found: Scales, noise: tuple[int, int] | None) -> dict[str, Tensor]:
    codes = torch.empty(part_shapes(fmt, tuple(x.shape))["codes"][0], dtype=torch.uint8, device=x.device)
    if x.numel():
        _encode("encode", fmt, x, _pointed(found, codes), noise, False, None)
    return {"codes": codes, **found.parts}


def decode(fmt: Format, parts: dict[str, Tensor], cols: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """See `backends.decode`."""
    parts = {part: tensor.contiguous() for part, tensor in parts.items()}
    codes = parts["codes"]
    rows = codes.shape[0] if fmt.compressed or not cols else codes.numel() // cols
    if _is_given(fmt) and rows * cols:
        parts = {"codes": codes, "multiplier": multiplier(fmt, parts).contiguous()}
    return _decode(fmt, parts, rows, cols, dtype)


def _decode(fmt: Format, parts: dict[str, Tensor], rows: int, cols: int, dtype: torch.dtype) -> Tensor:
    values = torch.empty(rows, cols, dtype=dtype, device=parts["codes"].device)
    if values.numel():
        matrix, lanes = _matrix(fmt, values, parts)
        _launch(_module(values.device, fmt, dtype), "decode", lanes, matrix)
    return values


def fake(
    fmt: Format,
    x: Tensor,
    noise: tuple[int, int] | None = None,
    *,
    rotation: Rotation | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """See `backends.fake`."""
    x, rotation = _ready(fmt, x, rotation)
    values = torch.empty(x.shape, dtype=dtype, device=x.device)
    if x.numel():
        parts = _pointed(_given(fmt, x)) if _is_given(fmt) else {} if _at_once(fmt) else _empty(fmt, x)
        _encode("fake", fmt, x, parts, noise, False, rotation, values)
    return values


def measured(fmt: Format, x: Tensor, *, rotation: Rotation | None = None) -> Measured:
    """See `backends.measured`: by torch, not by kernels."""
    return Measured(fmt, x if rotation is None else rotate(x, rotation))


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
    """See `backends.quantized`: two launches, one for the codes and one for what they stand for."""
    values, parts = _quantized(fmt, x, noise, rotation, dtype, run)
    if edge is not None:
        parts["inside"] = inside(measured(fmt, x, rotation=rotation), edge)
    return values, parts


def _quantized(
    fmt: Format, x: Tensor, noise: tuple[int, int] | None, rotation: Rotation | None, dtype: torch.dtype, run: int
) -> tuple[Tensor, dict[str, Tensor]]:
    rows, cols = x.shape[0], rotation.padded(x.shape[1]) if rotation else x.shape[1]
    if run or not _is_given(fmt):
        parts = encode(fmt, x, noise, rotation=rotation, run=run)
        return decode(fmt, parts, cols, dtype), parts
    x, _ = _ready(fmt, x, rotation)
    found = _given(fmt, x)
    parts = _encode_given(fmt, x, found, noise)
    return _decode(fmt, _pointed(found, parts["codes"]), rows, cols, dtype), parts


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
    if mask is not None:
        x = x * unpack(mask, 1, x.shape[1]).to(x.dtype)
    if back:
        return rotate_back(pad(x.detach(), (0, rotation.padded(x.shape[1]) - x.shape[1])), rotation).to(dtype)
    return fake(format("fp32"), x, rotation=rotation, dtype=dtype)
