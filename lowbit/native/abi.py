"""The structs and numbers of abi.h for ctypes; a test compares every one with what the compiler makes of that file."""

from __future__ import annotations

from ctypes import Structure, c_float, c_int32, c_int64, c_uint8, c_uint16, c_uint32, c_void_p

ARRAYS, SCALARS, CONSTANTS, STAGES, MOMENTS = 12, 32, 48, 32, 6
BLOCK = 256  # values of the largest step block
DTYPE = {"float32": 0, "bfloat16": 1, "float16": 2}
KIND = {"float": 0, "integer": 1, "codebook": 2, "affine": 3, "log": 4}
POWER = {"up": 0, "floor": 1, "ceil": 2, "even": 3}
MASTER = {"none": 0, "split8": 1, "split16": 2, "kahan": 3, "fp32": 4}
STAGE = {"measure": 0, "fold": 1, "update": 2}
REDUCE = {"": 0, "max": 0, "sum": 1, "mean": 2}
STATISTIC = {"absmax": 0, "squares": 1, "magnitudes": 2, "losses": 3, "products": 4, "units": 5}
SCALED = {"fp32": 0, "bf16": 1, "e8m0": 2, "e4m3": 3}
OVER = {"tensor": 0, "all": 1, "row": 2, "column": 3, "group": 4}


class Format(Structure):
    """How numbers are stored."""

    _fields_ = (
        *((name, c_int32) for name in ("kind", "bits", "is_signed", "square", "sign_magnitude", "dtype", "block")),
        *((name, c_int32) for name in ("limit", "rungs", "has_zero", "least", "same")),
        *((name, c_float) for name in ("top", "min_scale", "max_scale")),
        ("values", c_float * 256),
        ("ladder", c_float * 256),
        ("thresholds", c_float * 256),
        ("codes", c_uint8 * 256),
        ("tree", c_float * 32),
        *((name, c_int32) for name in ("bins", "bin_low")),
        *((name, c_float) for name in ("bin_times", "bin_plus")),
        ("bin_threshold", c_float * 32),
        ("bin_rung", c_int32 * 32),
        ("cells", c_void_p),
        ("cell_shift", c_int32),
        ("cell_half", c_int32),
        ("cell_low", c_uint32),
        ("cell_high", c_uint32),
        ("below", c_float * 32),
        ("gaps", c_float * 16),
        *((name, c_int32) for name in ("pieces", "middle")),
        ("piece_near", c_float),
        ("piece_end", c_float * 32),
        ("piece", c_int32 * 32),
        *((name, c_float * 16) for name in ("piece_slope", "piece_offset", "piece_most")),
        ("halves", c_uint16 * 256 * 2),
        ("grid_bits", c_int32),
        ("grid_least", c_float),
        *((name, c_int32) for name in ("stored", "power", "exponent", "mantissa", "last", "tries", "rms")),
        ("outer", c_int32),
        *((name, c_float) for name in ("peak", "gain", "smallest")),
        ("candidates", c_float * 2),
    )


class Operand(Structure):
    """One per-value moment of one tensor."""

    _fields_ = (
        *((name, c_void_p) for name in ("format", "codes", "scale", "extra")),
        ("row_bytes", c_int64),
        ("scales", c_int64),
        ("stochastic", c_int32),
        ("live", c_int32),
    )


class Stage(Structure):
    """One stage of a program."""

    _fields_ = (
        ("kernel", c_void_p),
        ("fused", c_void_p),
        *(
            (name, c_int32)
            for name in ("kind", "reduce", "over", "reads", "writes", "reads_g", "plain", "unit", "above")
        ),
        ("rootable", c_uint32),
        ("read", c_int32 * ARRAYS),
        ("write", c_int32 * ARRAYS),
        ("s", c_int32 * SCALARS),
        ("c", c_int32 * CONSTANTS),
    )


class Program(Structure):
    """The stages of one optimizer."""

    _fields_ = (
        ("stages", c_void_p),
        *((name, c_int32) for name in ("count", "guarded", "moments", "vectors", "temporaries", "scalars", "kept")),
        ("over", c_int32 * ARRAYS),
        ("initial", c_float * SCALARS),
    )


class Job(Structure):
    """One tensor in one step."""

    _fields_ = (
        *((name, c_void_p) for name in ("program", "param", "grad", "companion", "skipped")),
        *((name, c_int64) for name in ("rows", "cols", "group_rows")),
        *((name, c_int32) for name in ("param_dtype", "grad_dtype", "master", "stochastic")),
        *((name, c_int64) for name in ("seed", "step", "tensor", "first")),
        ("moments", Operand * MOMENTS),
        ("vectors", c_void_p * ARRAYS),
        ("scalars", c_void_p * SCALARS),
        ("constants", c_float * CONSTANTS),
        ("weight", Operand),
        *((name, c_void_p) for name in ("rest", "tensor_scale")),
        *((name, c_int32) for name in ("scaled", "last")),
        *((name, c_float) for name in ("headroom", "unroom", "least_scale")),
    )


class Matrix(Structure):
    """A whole matrix, its codes and what they stand for."""

    _fields_ = (
        *((name, c_void_p) for name in ("values", "out")),
        *((name, c_int64) for name in ("rows", "cols", "filled", "stride", "step")),
        *((name, c_int32) for name in ("columns", "dtype", "out_dtype", "stochastic", "rotation", "flips", "tile")),
        ("key", c_uint32 * 2),
        ("signs", c_uint32 * 2),
        ("inverse", c_void_p),
        ("packed", Operand),
        *((name, c_void_p) for name in ("bytes", "multipliers", "inverses", "outers", "mask")),
        *((name, c_float) for name in ("outer", "edge")),
        ("run", c_int32),
    )
