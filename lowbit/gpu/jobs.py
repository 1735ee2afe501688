"""The structs of cuda/job.h for ctypes; a test compares every one with what the compiler makes of that file."""

from __future__ import annotations

from ctypes import Structure, c_double, c_float, c_int32, c_int64, c_uint32, c_void_p

from ..native.abi import ARRAYS, MOMENTS, SCALARS


class Job(Structure):
    """One tensor, as long as it keeps its storage."""

    _fields_ = (
        ("param", c_void_p),
        ("companion", c_void_p),
        ("codes", c_void_p * MOMENTS),
        ("scale", c_void_p * MOMENTS),
        ("base", c_void_p * MOMENTS),
        ("vectors", c_void_p * ARRAYS),
        ("scalars", c_void_p * SCALARS),
        ("skipped", c_void_p),
        ("constants", c_void_p),
        *((name, c_int64) for name in ("rows", "cols", "group_rows", "tensor", "first", "first_chunk", "first_tile")),
        ("work_vectors", c_int64 * ARRAYS),
        *((name, c_int64) for name in ("partial", "sums")),
        *((name, c_void_p) for name in ("param_scale", "rest", "tensor_scale")),
    )


class Dynamic(Structure):
    """What a step changes about a tensor."""

    _fields_ = (("grad", c_void_p), ("seed", c_int64), ("step", c_int64))


class Run(Structure):
    """One tensor while a step runs."""

    _fields_ = (
        ("scalars", c_float * SCALARS),
        ("total", c_double),
        ("most", c_uint32),
        ("skip", c_uint32),
    )


class Node(Structure):
    """One of `tape.notes`."""

    _fields_ = (
        ("number", c_double),
        ("from", c_void_p),
        ("op", c_int32),
        ("first", c_int32),
        ("second", c_int32),
    )
