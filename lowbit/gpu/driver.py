"""The CUDA driver: modules, launches and copies, in the context and on the streams that torch uses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .entries import INSTALL, Entries, no_driver, of_nvidia

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


class Driver:
    """The driver, by its entry points: those of this machine's, if no others are named. Raises `NoDriver`."""

    def __init__(self, entries: Entries | None = None):
        entries = entries or of_nvidia()
        self.by, self._functions = entries.by, entries.functions
        self._launch = self._functions["cuLaunchKernel"]
        self._current = self._functions["cuCtxGetCurrent"]
        try:
            code = self._functions["cuInit"](0)[0]
        except RuntimeError as error:  # cuda-bindings looks for the driver in the first call
            raise no_driver(error) from None
        if code:
            raise self.error(code, "starting the CUDA driver")

    def call(self, name: str, *inputs: Any, doing: str) -> int:
        """What an entry point puts out: a number, handle or address. `doing` is how an error begins."""
        code, *out = self._functions[name](*inputs)
        if code:
            raise self.error(code, doing)
        return int(out[0] or 0) if out else 0

    def error(self, code: int, doing: str) -> DriverError:
        """What a CUresult means."""

        def ask(what: str) -> str:
            try:
                return (self._functions[what](code)[1] or b"").decode(errors="replace")
            except ValueError:  # cuda-bindings does not know this one
                return ""

        name = ask("cuGetErrorName") or f"error {int(code)}"
        return DriverError(int(code), name, ask("cuGetErrorString") or "the driver has no words for it", doing)

    def version(self) -> tuple[int, int]:
        """The CUDA version up to which this driver goes: (13, 0)."""
        number = self.call("cuDriverGetVersion", doing="asking the CUDA driver's version")
        return number // 1000, number % 1000 // 10

    def primary_context(self, index: int) -> int:
        """The context of a device that torch and all other libraries share."""
        device = self.call("cuDeviceGet", index, doing=f"looking for cuda:{index}")
        return self.call("cuDevicePrimaryCtxRetain", device, doing=f"taking the context of cuda:{index}")

    @contextmanager
    def within(self, context: int) -> Iterator[None]:
        """Make a context current in this thread, as it is not in one that torch has not used yet."""
        if self.is_current(context):
            yield
            return
        self.call("cuCtxPushCurrent_v2", context, doing="making the device current")
        try:
            yield
        finally:
            self.call("cuCtxPopCurrent_v2", doing="leaving the device")

    def is_current(self, context: int) -> bool:
        """Whether a context is current in this thread."""
        return int(self._current()[1] or 0) == context

    def load(self, image: bytes) -> int:
        """The handle of a module, from what was compiled."""
        return self.call("cuModuleLoadData", image, doing="loading a compiled kernel")

    def function(self, module: int, name: str) -> int:
        """The handle of a kernel."""
        return self.call("cuModuleGetFunction", module, name.encode(), doing=f"looking for the kernel {name}")

    def attribute(self, function: int, which: int) -> int:
        """One of the numbers that a compiled kernel has, such as `REGISTERS`."""
        return self.call("cuFuncGetAttribute", which, function, doing="asking about a kernel")

    def allow_dynamic(self, function: int, size: int) -> None:
        """Let a kernel have more dynamic shared memory than the 48 KiB that all may have."""
        self.call("cuFuncSetAttribute", function, DYNAMIC, size, doing=f"asking for {size} bytes of shared memory")

    def parameter_sizes(self, function: int) -> list[int] | None:
        """The size of each argument of a kernel, where the driver tells."""
        ask = self._functions.get("cuFuncGetParamInfo")
        sizes: list[int] = []
        while ask is not None:
            try:
                code, _, size = ask(function, len(sizes))
            except RuntimeError:  # cuda-bindings has it, and the driver does not
                return None
            if code == _INVALID_VALUE:
                return sizes
            if code:
                raise self.error(code, "asking for the arguments of a kernel")
            sizes.append(size)
        return None

    def launch(self, function: int, grid: int, block: int, shared: int, stream: int, arguments: Any) -> int:
        """A CUresult: who calls looks at it. `arguments`: an array of addresses."""
        return self._launch(function, grid, 1, 1, block, 1, 1, shared, stream, arguments, 0)[0]

    def write(self, target: int, source: int, size: int, stream: int) -> None:
        """Copy from the host; `source` is pinned memory, which must stay as it is until that is done."""
        self.call("cuMemcpyHtoDAsync_v2", target, source, size, stream, doing=f"copying {size} bytes to the device")

    def pinned(self, size: int) -> int:
        """Host memory that copies can read by themselves."""
        return self.call("cuMemAllocHost_v2", size, doing=f"allocating {size} bytes of pinned memory")

    def event(self) -> int:
        """A point in the work of a stream, to be recorded."""
        return self.call("cuEventCreate", _NO_TIMING, doing="creating an event")

    def record(self, event: int, stream: int) -> None:
        """The event is what the stream has been given so far."""
        self.call("cuEventRecord", event, stream, doing="recording an event")

    def reached(self, event: int) -> bool:
        """Whether that much is done."""
        code = self._functions["cuEventQuery"](event)[0]
        if code not in (0, _NOT_READY):
            raise self.error(code, "asking whether a copy is done")
        return code == 0

    def capturing(self, stream: int) -> bool:
        """Whether a graph is being captured on the stream."""
        return self.call("cuStreamIsCapturing", stream, doing="asking whether a graph is captured") != 0
