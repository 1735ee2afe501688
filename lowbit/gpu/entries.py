"""The CUDA driver's entry points: by NVIDIA's cuda-bindings where those are installed, else by ctypes.

Either way an entry point takes the inputs of its C function, in their order, and returns a tuple: the CUresult and then
what else came out. torch's CUDA wheels bring cuda-bindings, which knows where the driver lies on every system. Without
it nothing is missing: the C interface stays as it is, so nothing is built here for a version of torch, Python or CUDA.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Mapping
from ctypes import CDLL, POINTER, byref, c_char_p, c_int, c_size_t, c_uint, c_void_p
from dataclasses import dataclass
from typing import Any

LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
INSTALL = "https://www.nvidia.com/drivers"
# With it, cuda-bindings takes stream 0 for one of each thread, and torch for the one of all threads.
PER_THREAD = "CUDA_PYTHON_CUDA_PER_THREAD_DEFAULT_STREAM"


class NoDriver(RuntimeError):
    """There is no CUDA driver on this machine, or it lacks what is needed."""


def no_driver(error: Exception) -> NoDriver:
    """What is said where there is none."""
    reason = str(error).splitlines()[0]
    return NoDriver(f"there is no CUDA driver here ({reason}): install NVIDIA's ({INSTALL}), or use CPU tensors")


@dataclass(frozen=True)
class Out:
    """An argument that points to where the driver puts something."""

    type: Any


@dataclass(frozen=True)
class Enumerated:
    """An argument that is a number to C, and to cuda-bindings one of the enumeration of this name."""

    name: str


_ATTRIBUTE, _RESULT = Enumerated("CUfunction_attribute"), Enumerated("CUresult")
_POINTER, _SIZE, _INT, _TEXT = Out(c_void_p), Out(c_size_t), Out(c_int), Out(c_char_p)

# https://docs.nvidia.com/cuda/cuda-driver-api/: name and arguments. All return a CUresult.
FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "cuInit": (c_uint,),
    "cuDriverGetVersion": (_INT,),
    "cuDeviceGet": (_INT, c_int),
    "cuDevicePrimaryCtxRetain": (_POINTER, c_int),
    "cuCtxGetCurrent": (_POINTER,),
    "cuCtxPushCurrent_v2": (c_void_p,),
    "cuCtxPopCurrent_v2": (_POINTER,),
    "cuModuleLoadData": (_POINTER, c_char_p),
    "cuModuleGetFunction": (_POINTER, c_void_p, c_char_p),
    "cuFuncGetAttribute": (_INT, _ATTRIBUTE, c_void_p),
    "cuFuncSetAttribute": (c_void_p, _ATTRIBUTE, c_int),
    "cuFuncGetParamInfo": (c_void_p, c_size_t, _SIZE, _SIZE),
    "cuLaunchKernel": (c_void_p, *[c_uint] * 7, c_void_p, c_void_p, c_void_p),
    "cuMemcpyHtoDAsync_v2": (c_void_p, c_void_p, c_size_t, c_void_p),
    "cuMemAllocHost_v2": (_POINTER, c_size_t),
    "cuEventCreate": (_POINTER, c_uint),
    "cuEventRecord": (c_void_p, c_void_p),
    "cuEventQuery": (c_void_p,),
    "cuStreamIsCapturing": (c_void_p, _INT),
    "cuGetErrorName": (_RESULT, _TEXT),
    "cuGetErrorString": (_RESULT, _TEXT),
}
# Drivers of CUDA 12.4 and later have it: https://docs.nvidia.com/cuda/cuda-driver-api/group__CUDA__EXEC.html
LATER = frozenset({"cuFuncGetParamInfo"})


@dataclass(frozen=True)
class Entries:
    """Entry points by their names in C. `by`: what reaches them, for people to read."""

    by: str
    functions: Mapping[str, Callable[..., tuple[Any, ...]]]


def of_nvidia() -> Entries:
    """Those of the driver of this machine. Raises `NoDriver`."""
    return of_bindings() or of_library(LIBRARY)


def of_bindings() -> Entries | None:
    """Those that cuda-bindings has, if it is installed and means the same by stream 0 as torch does."""
    if os.environ.get(PER_THREAD, "0") != "0":
        return None
    try:
        bindings = importlib.import_module("cuda.bindings.driver")  # cuda-bindings 12.6 and later
        version = getattr(importlib.import_module("cuda.bindings"), "__version__", "of no version")
    except ImportError:
        return None
    functions = {name: _of_bindings(bindings, name, arguments) for name, arguments in FUNCTIONS.items()}
    return Entries(f"cuda-bindings {version}", functions)


def _of_bindings(bindings: Any, name: str, arguments: tuple[Any, ...]) -> Callable[..., tuple[Any, ...]]:
    function = getattr(bindings, name.removesuffix("_v2"))
    inputs = [x for x in arguments if not isinstance(x, Out)]
    if not any(isinstance(x, Enumerated) for x in inputs):
        return function
    types = [getattr(bindings, x.name) if isinstance(x, Enumerated) else None for x in inputs]
    return lambda *given: function(*(made(x) if made else x for made, x in zip(types, given, strict=True)))


def of_library(path: str) -> Entries:
    """Those of a library, by ctypes. Raises `NoDriver` without it, or if it has not all that is needed."""
    try:
        library = CDLL(path)
    except OSError as error:
        raise no_driver(error) from None
    functions = {}
    for name, arguments in FUNCTIONS.items():
        if (function := getattr(library, name, None)) is not None:
            functions[name] = _of_library(function, arguments)
        elif name not in LATER:
            raise NoDriver(f"the CUDA driver {path} has no {name}: install a newer one ({INSTALL})")
    return Entries("ctypes", functions)


def _of_library(function: Any, arguments: tuple[Any, ...]) -> Callable[..., tuple[Any, ...]]:
    plain = {Enumerated: lambda x: c_int, Out: lambda x: POINTER(x.type)}
    function.argtypes = [plain[type(x)](x) if type(x) in plain else x for x in arguments]
    function.restype = c_int
    kinds = [x.type for x in arguments if isinstance(x, Out)]
    if not kinds:
        return lambda *given: (function(*given),)
    at = next(k for k, x in enumerate(arguments) if isinstance(x, Out))  # they lie side by side

    def entry(*given: Any) -> tuple[Any, ...]:
        out = [kind() for kind in kinds]
        code = function(*given[:at], *map(byref, out), *given[at:])
        return code, *[x.value for x in out]

    return entry
