"""What runs kernels: a compiler, the driver, and one device's context and stream.

A kernel's text is compiled once per machine and kept on disk (cache.py), loaded once per process, and launched on the
stream that torch is using. Tests put an emulator in the place of a GPU: `machines[torch.device("cpu")] = ...`; it is
this same class, with another compiler and another library for the driver.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from ctypes import addressof, c_void_p, sizeof
from threading import Lock, local
from typing import Any, Protocol

import torch

from ..native.build import fingerprint
from . import cache, nvrtc
from .driver import LOCAL, REGISTERS, SHARED, THREADS, Driver, DriverError

_FREE_SHARED = 48 << 10  # bytes of shared memory that need not be asked for
_LEAST_STAGE = 4 << 10


class Compiler(Protocol):
    """What makes machine code of a kernel's text. `key`: whatever else the outcome depends on."""

    arch: str
    key: str

    def compile(self, source: str, headers: Mapping[str, str]) -> bytes:
        """Returns what `cuModuleLoadData` takes; raises `CompileError` with the compiler's words."""
        ...


class Arguments(list[Any]):
    """Of a launch, as the driver takes them: made once for launches that are repeated, between which values may change.

    A launch copies the values, so `argument.value = ...` is for later launches only.
    """

    def __init__(self, values: Iterable[Any]):
        super().__init__(values)
        self.types = tuple(map(type, self))
        self.pointers = (c_void_p * len(self))(*map(addressof, self))


class Function:
    """A kernel. A launch compares the sizes of its arguments, once for each combination of types."""

    def __init__(self, module: Module, name: str):
        self.module, self.name = module, name
        driver = module.machine.driver
        self.handle = driver.function(module.handle, name)
        self.sizes = driver.parameter_sizes(self.handle)
        self.dynamic = _FREE_SHARED
        self.seen: set[tuple[type, ...]] = set()

    def check(self, arguments: Arguments) -> None:
        """That these are ctypes values of the sizes that the kernel's arguments have."""
        given = [sizeof(x) for x in arguments]
        if self.sizes is not None and given != self.sizes:
            raise TypeError(f"{self.name} takes arguments of {self.sizes} bytes, not of {given}")
        self.seen.add(arguments.types)

    def resources(self) -> dict[str, int]:
        """What a thread or block of the kernel takes: registers, bytes of local and static shared memory, threads."""
        ask, context = self.module.machine.driver.attribute, self.module.machine.context
        names = {"registers": REGISTERS, "local": LOCAL, "shared": SHARED, "threads": THREADS}
        with self.module.machine.driver.within(context):
            return {name: ask(self.handle, which) for name, which in names.items()}


class Module:
    """A compiled text on one device, with its kernels. It has no variables, so any streams may run it side by side."""

    def __init__(self, machine: Machine, handle: int):
        self.machine, self.handle = machine, handle
        self._functions: dict[str, Function] = {}

    def function(self, name: str) -> Function:
        """The kernel of this name."""
        if name not in self._functions:
            with self.machine.driver.within(self.machine.context):
                self._functions[name] = Function(self, name)
        return self._functions[name]


class _Held(local):
    """The stream that a thread has said it keeps to, if it has."""

    stream: int | None = None


_NOTHING = nullcontext()


class Machine:
    """One device. `stream` gives the handle of the stream to work on, `context` is the driver's."""

    def __init__(self, driver: Driver, compiler: Compiler, context: int, stream: Callable[[], int]):
        self.driver, self.compiler, self.context, self.stream = driver, compiler, context, stream
        self.arch = compiler.arch
        self._modules: dict[object, Future[Module]] = {}
        self._lock = Lock()
        self._staging = _Staging(driver)
        self._held = _Held()

    # ---- kernels

    def module(self, source: str, headers: Mapping[str, str]) -> Module:
        """The module of a text: from memory, else from the disk, else compiled.

        Raises `CompileError` for what cannot be compiled and `DriverError` for what cannot be loaded.
        """
        key = (source, frozenset(headers.items()))
        ours: Future[Module] = Future()
        with self._lock:
            first = self._modules.setdefault(key, ours)
        if first is not ours:
            return first.result()  # which another thread may still be making
        try:
            ours.set_result(made := self._load(self.binary(source, headers)))
        except BaseException as error:
            with self._lock:
                del self._modules[key]  # to be tried again
            ours.set_exception(error)
            raise
        return made

    def prefetch(self, texts: Iterable[tuple[str, Mapping[str, str]]]) -> list[Module]:
        """The modules of several texts, which are compiled at the same time."""
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return list(pool.map(lambda text: self.module(*text), texts))

    def binary(self, source: str, headers: Mapping[str, str]) -> bytes:
        """What a text is compiled to, from the disk if it is there."""
        texts = [part for name in sorted(headers) for part in (name, headers[name])]
        key = fingerprint([], self.compiler.key, source, *texts)
        return cache.kept(f"kernel-{self.arch}", key, lambda: self.compiler.compile(source, headers))

    def _load(self, image: bytes) -> Module:
        try:
            with self.driver.within(self.context):
                return Module(self, self.driver.load(image))
        except DriverError as error:
            major, minor = self.driver.version()
            raise RuntimeError(
                f"{error}. Made for {self.arch} by {self.compiler.key.splitlines()[0]}; this driver goes up to CUDA "
                f"{major}.{minor}. If the compiler is newer, update the driver or install torch for CUDA {major}"
            ) from error

    def launch(self, function: Function, grid: int, block: int, arguments: Sequence[Any], shared: int = 0) -> None:
        """Launch `grid` blocks of `block` threads, with `shared` bytes of dynamic shared memory."""
        if not isinstance(arguments, Arguments):
            arguments = Arguments(arguments)
        if arguments.types not in function.seen:
            function.check(arguments)
        if self._held.stream is None and not self.driver.is_current(self.context):
            with self.driver.within(self.context):
                return self.launch(function, grid, block, arguments, shared)
        if shared > function.dynamic:
            self.driver.allow_dynamic(function.handle, shared)
            function.dynamic = shared
        stream = self._stream()
        code = self.driver.launch(function.handle, grid, block, shared, stream, arguments.pointers)
        if code:
            what = f"{grid} blocks of {block} threads with {shared} bytes of dynamic shared memory"
            raise self.driver.error(code, f"launching {function.name}, {what}")

    # ---- memory

    def write(self, pointer: int, data: bytes) -> None:
        """Copy bytes to the device, after what the stream has been given so far. `data` may be dropped at once."""
        if not data:
            return
        stream = self._stream()
        if self.driver.capturing(stream):
            raise RuntimeError(
                "host values cannot be written while a CUDA graph is captured: every replay would write them again. "
                "Write them before"
            )
        with self._within():
            self._staging.write(pointer, data, stream)

    def capturing(self) -> bool:
        """Whether a CUDA graph is being captured on the current stream."""
        return self.driver.capturing(self._stream())

    # ---- what is asked once for many launches

    @contextmanager
    def held(self) -> Iterator[None]:
        """For what this thread does within, the stream and the context stay: torch and the driver are asked once."""
        before = self._held.stream
        with self.driver.within(self.context):
            self._held.stream = self.stream()
            try:
                yield
            finally:
                self._held.stream = before

    def _stream(self) -> int:
        held = self._held.stream
        return self.stream() if held is None else held

    def _within(self) -> AbstractContextManager[None]:
        return _NOTHING if self._held.stream is not None else self.driver.within(self.context)


class _Staging:
    """Pinned memory from which copies to the device are made.

    From other memory the driver may copy only after waiting for all that the stream has to do before:
    https://docs.nvidia.com/cuda/cuda-driver-api/api-sync-behavior.html
    """

    def __init__(self, driver: Driver):
        self.driver, self.lock = driver, Lock()
        self.stages: list[list[int]] = []  # address, size, event: the copy from it is done

    def write(self, pointer: int, data: bytes, stream: int) -> None:
        with self.lock:
            address, _, event = self._free(len(data))
            ctypes.memmove(address, data, len(data))
            self.driver.write(pointer, address, len(data), stream)
            self.driver.record(event, stream)

    def _free(self, size: int) -> list[int]:
        for stage in self.stages:
            if stage[1] >= size and self.driver.reached(stage[2]):
                return stage
        room = max(_LEAST_STAGE, 1 << (size - 1).bit_length())
        self.stages.append([self.driver.pinned(room), room, self.driver.event()])
        return self.stages[-1]


# By device. Tests put others here.
machines: dict[torch.device, Machine] = {}
_making = Lock()


def machine(device: torch.device) -> Machine:
    """The machine of a device, made when it is first asked for.

    Raises `NoDriver`, `NoCompiler` or `ValueError` with what is missing and the way out.
    """
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    if (found := machines.get(device)) is not None:
        return found
    if device.type != "cuda":
        raise ValueError(f"CUDA kernels run on CUDA tensors, and these are on {device}")
    with _making:
        if device not in machines:
            machines[device] = _of(device)
        return machines[device]


def runs(device: torch.device) -> bool:
    """Whether kernels can run on a device, and read what lies there."""
    return device.type == "cuda" or device in machines


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured on torch's current stream of a device."""
    if (found := machines.get(device)) is not None:
        return found.capturing()
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _of(device: torch.device) -> Machine:
    torch.cuda.init()
    driver = Driver()
    compiler = nvrtc.compiler(torch.cuda.get_device_capability(device), driver.version())
    return Machine(
        driver, compiler, driver.primary_context(device.index), lambda: torch.cuda.current_stream(device).cuda_stream
    )
