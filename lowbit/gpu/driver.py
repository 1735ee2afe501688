"""The CUDA driver, by ctypes: modules, launches and copies, in the context and on the streams that torch uses.

Every machine with an NVIDIA GPU has this library, and its C interface stays: nothing is built for a version of torch,
Python or CUDA. NVIDIA's cuda-bindings wraps the same functions. It is not used: it would be a second way through all of
this, and on a machine without a GPU a test could not run it, for it takes no other library in the driver's place.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import CDLL, POINTER, byref, c_char_p, c_int, c_size_t, c_uint, c_void_p
from typing import Any

LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
INSTALL = "https://www.nvidia.com/drivers"

# https://docs.nvidia.com/cuda/cuda-driver-api/: name, and the types of the arguments. All return a CUresult.
_OUT, _SIZE_OUT, _INT_OUT, _TEXT_OUT = POINTER(c_void_p), POINTER(c_size_t), POINTER(c_int), POINTER(c_char_p)
_FUNCTIONS: dict[str, list[Any]] = {
    "cuInit": [c_uint],
    "cuDriverGetVersion": [_INT_OUT],
    "cuDeviceGet": [_INT_OUT, c_int],
    "cuDevicePrimaryCtxRetain": [_OUT, c_int],
    "cuCtxGetCurrent": [_OUT],
    "cuCtxPushCurrent_v2": [c_void_p],
    "cuCtxPopCurrent_v2": [_OUT],
    "cuModuleLoadData": [_OUT, c_char_p],
    "cuModuleGetFunction": [_OUT, c_void_p, c_char_p],
    "cuFuncGetAttribute": [_INT_OUT, c_int, c_void_p],
    "cuFuncSetAttribute": [c_void_p, c_int, c_int],
    "cuLaunchKernel": [c_void_p, *[c_uint] * 7, c_void_p, c_void_p, c_void_p],
    "cuMemcpyHtoDAsync_v2": [c_void_p, c_void_p, c_size_t, c_void_p],
    "cuMemAllocHost_v2": [_OUT, c_size_t],
    "cuEventCreate": [_OUT, c_uint],
    "cuEventRecord": [c_void_p, c_void_p],
    "cuEventQuery": [c_void_p],
    "cuStreamIsCapturing": [c_void_p, _INT_OUT],
    "cuGetErrorName": [c_int, _TEXT_OUT],
    "cuGetErrorString": [c_int, _TEXT_OUT],
}
# Drivers of CUDA 12.4 and later have it: https://docs.nvidia.com/cuda/cuda-driver-api/group__CUDA__EXEC.html
_PARAMETER = "cuFuncGetParamInfo"
_INVALID_VALUE, _NOT_READY = 1, 600
_NO_TIMING = 2
THREADS, SHARED, CONSTANT, LOCAL, REGISTERS, DYNAMIC = 0, 1, 2, 3, 4, 8  # attributes of a function

CAPTURING = "do one step before the graph is captured: it loads and prepares what a replay needs"
LOST = "the device's context is lost, so start the process again; CUDA_LAUNCH_BLOCKING=1 shows which call it was"
HINTS = {
    2: "the device's memory is full",
    100: "no NVIDIA GPU is visible: look at nvidia-smi and CUDA_VISIBLE_DEVICES",
    200: "the driver cannot read what was compiled",
    209: "what was compiled is not for this GPU",
    218: "the driver cannot read what was compiled",
    222: "the driver is older than the compiler",
    700: LOST,
    701: "the block is larger than the kernel allows, or needs more registers or shared memory than there are",
    716: LOST,
    719: LOST,
    803: f"the driver's library and the kernel module of the system differ in version: restart, or {INSTALL}",
    900: CAPTURING,
    901: CAPTURING,
    906: CAPTURING,
}


class DriverError(RuntimeError):
    """What the driver refused; `code` is its CUresult."""

    def __init__(self, code: int, name: str, text: str, doing: str):
        hint = HINTS.get(code)
        super().__init__(f"{doing}: {text} ({name})" + (f"; {hint}" if hint else ""))
        self.code, self.name = code, name


class NoDriver(RuntimeError):
    """There is no CUDA driver on this machine, or it lacks what is needed."""


class Driver:
    """The driver's library; another than NVIDIA's may be named for tests."""

    def __init__(self, library: str = LIBRARY):
        try:
            handle = CDLL(library)
        except OSError as error:
            raise NoDriver(
                f"there is no CUDA driver here ({error}): install NVIDIA's ({INSTALL}), or use CPU tensors"
            ) from None
        self._functions: dict[str, Any] = {}
        for name, arguments in _FUNCTIONS.items():
            function = getattr(handle, name, None)
            if function is None:
                raise NoDriver(f"the CUDA driver {library} has no {name}: install a newer one ({INSTALL})")
            function.argtypes, function.restype = arguments, c_int
            self._functions[name] = function
        self._parameter = getattr(handle, _PARAMETER, None)
        if self._parameter is not None:
            self._parameter.argtypes = [c_void_p, c_size_t, _SIZE_OUT, _SIZE_OUT]
        self.library = handle
        self.launch = self._functions["cuLaunchKernel"]  # bare, for speed: who calls looks at what it returns
        self._get_current = self._functions["cuCtxGetCurrent"]
        self.call("cuInit", 0, doing="starting the CUDA driver")

    def call(self, name: str, *arguments: Any, doing: str) -> None:
        """Call an entry point; `doing` is how an error begins."""
        if code := self._functions[name](*arguments):
            raise self.error(code, doing)

    def error(self, code: int, doing: str) -> DriverError:
        """What a CUresult means."""

        def ask(what: str) -> str:
            text = c_char_p()
            self._functions[what](code, byref(text))
            return (text.value or b"").decode(errors="replace")

        name = ask("cuGetErrorName") or f"error {code}"
        return DriverError(code, name, ask("cuGetErrorString") or "the driver has no words for it", doing)

    def version(self) -> tuple[int, int]:
        """The CUDA version up to which this driver goes: (13, 0)."""
        number = c_int()
        self.call("cuDriverGetVersion", byref(number), doing="asking the CUDA driver's version")
        return number.value // 1000, number.value % 1000 // 10

    def primary_context(self, index: int) -> int:
        """The context of a device that torch and all other libraries share."""
        device, context = c_int(), c_void_p()
        self.call("cuDeviceGet", byref(device), index, doing=f"looking for cuda:{index}")
        self.call("cuDevicePrimaryCtxRetain", byref(context), device, doing=f"taking the context of cuda:{index}")
        return context.value or 0

    @contextmanager
    def within(self, context: int) -> Iterator[None]:
        """Make a context current in this thread, as it is not in one that torch has not used yet."""
        here = c_void_p()
        self._get_current(byref(here))
        if here.value == context:
            yield
            return
        self.call("cuCtxPushCurrent_v2", context, doing="making the device current")
        try:
            yield
        finally:
            self.call("cuCtxPopCurrent_v2", byref(here), doing="leaving the device")

    def is_current(self, context: int) -> bool:
        """Whether a context is current in this thread."""
        here = c_void_p()
        self._get_current(byref(here))
        return here.value == context

    def load(self, image: bytes) -> int:
        """The handle of a module, from what was compiled."""
        module = c_void_p()
        self.call("cuModuleLoadData", byref(module), image, doing="loading a compiled kernel")
        return module.value or 0

    def function(self, module: int, name: str) -> int:
        """The handle of a kernel."""
        function = c_void_p()
        self.call("cuModuleGetFunction", byref(function), module, name.encode(), doing=f"looking for the kernel {name}")
        return function.value or 0

    def attribute(self, function: int, which: int) -> int:
        """One of the numbers that a compiled kernel has, such as `REGISTERS`."""
        value = c_int()
        self.call("cuFuncGetAttribute", byref(value), which, function, doing="asking about a kernel")
        return value.value

    def allow_dynamic(self, function: int, size: int) -> None:
        """Let a kernel have more dynamic shared memory than the 48 KiB that all may have."""
        doing = f"asking for {size} bytes of shared memory"
        self.call("cuFuncSetAttribute", function, DYNAMIC, size, doing=doing)

    def parameter_sizes(self, function: int) -> list[int] | None:
        """The size of each argument of a kernel, where the driver tells."""
        if self._parameter is None:
            return None
        sizes, offset, size = [], c_size_t(), c_size_t()
        while (code := self._parameter(function, len(sizes), byref(offset), byref(size))) == 0:
            sizes.append(size.value)
        if code != _INVALID_VALUE:
            raise self.error(code, "asking for the arguments of a kernel")
        return sizes

    def write(self, target: int, source: int, size: int, stream: int) -> None:
        """Copy from the host; `source` is pinned memory, which must stay as it is until that is done."""
        self.call("cuMemcpyHtoDAsync_v2", target, source, size, stream, doing=f"copying {size} bytes to the device")

    def pinned(self, size: int) -> int:
        """Host memory that copies can read by themselves."""
        pointer = c_void_p()
        self.call("cuMemAllocHost_v2", byref(pointer), size, doing=f"allocating {size} bytes of pinned memory")
        return pointer.value or 0

    def event(self) -> int:
        """A point in the work of a stream, to be recorded."""
        event = c_void_p()
        self.call("cuEventCreate", byref(event), _NO_TIMING, doing="creating an event")
        return event.value or 0

    def record(self, event: int, stream: int) -> None:
        """The event is what the stream has been given so far."""
        self.call("cuEventRecord", event, stream, doing="recording an event")

    def reached(self, event: int) -> bool:
        """Whether that much is done."""
        code = self._functions["cuEventQuery"](event)
        if code not in (0, _NOT_READY):
            raise self.error(code, "asking whether a copy is done")
        return code == 0

    def capturing(self, stream: int) -> bool:
        """Whether a graph is being captured on the stream."""
        status = c_int()
        self.call("cuStreamIsCapturing", stream, byref(status), doing="asking whether a graph is captured")
        return status.value != 0


def pointers(arguments: Any) -> Any:
    """What a launch takes: an array of the addresses of ctypes values."""
    return (c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
