"""NVRTC, the compiler that comes with torch for CUDA: kernels become machine code where there is no toolkit.

It makes a cubin, machine code for one architecture, and never PTX, which a driver older than the compiler would refuse.
NVRTC has no headers; a kernel's own, and a small <stdint.h>, are handed over as text.
"""

from __future__ import annotations

import ctypes
import functools
import glob
import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_void_p
from pathlib import Path
from typing import Any

from ..native import build

# Products and sums are not contracted; the others are NVRTC's own defaults, said because bits depend on them.
# A lambda in a kernel has no place to say that it is for the device.
OPTIONS = ["--std=c++17", "-fmad=false", "-ftz=false", "-prec-div=true", "-prec-sqrt=true", "-default-device"]

LEAST = (8, 0)  # what the kernels use: a warp's maximum in one instruction, bf16 in tensor cores

STDINT = """#pragma once
typedef signed char int8_t;
typedef short int16_t;
typedef int int32_t;
typedef long long int64_t;
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef unsigned long long uint64_t;
typedef long long intptr_t;
typedef unsigned long long uintptr_t;
#define INT64_C(x) x##LL
#define UINT64_C(x) x##ULL
#define UINT32_C(x) x##U
#define INT32_MAX 2147483647
#define UINT32_MAX 4294967295U
#define INT64_MAX 9223372036854775807LL
"""

_OUT, _SIZE_OUT, _INT_OUT = POINTER(c_void_p), POINTER(c_size_t), POINTER(c_int)
_TEXTS = POINTER(c_char_p)
# https://docs.nvidia.com/cuda/nvrtc/: name, and the types of the arguments. All return an nvrtcResult.
_FUNCTIONS: dict[str, list[Any]] = {
    "nvrtcVersion": [_INT_OUT, _INT_OUT],
    "nvrtcGetNumSupportedArchs": [_INT_OUT],
    "nvrtcGetSupportedArchs": [_INT_OUT],
    "nvrtcCreateProgram": [_OUT, c_char_p, c_char_p, c_int, _TEXTS, _TEXTS],
    "nvrtcDestroyProgram": [_OUT],
    "nvrtcCompileProgram": [c_void_p, c_int, _TEXTS],
    "nvrtcGetProgramLogSize": [c_void_p, _SIZE_OUT],
    "nvrtcGetProgramLog": [c_void_p, c_char_p],
    "nvrtcGetCUBINSize": [c_void_p, _SIZE_OUT],
    "nvrtcGetCUBIN": [c_void_p, c_char_p],
}
_COMPILATION = 6


class NoCompiler(RuntimeError):
    """There is no NVRTC, or none that this GPU and driver can use."""


class CompileError(RuntimeError):
    """A kernel's text is wrong; `log` is what the compiler says."""

    def __init__(self, name: str, log: str):
        super().__init__(f"compiling {name} failed:\n{log.strip()}")
        self.log = log


@functools.cache
def sources() -> dict[str, str]:
    """The texts of kernels and of all headers that they may include, by file name."""
    folders = (build.HERE, "*.h"), (build.device_sources(), "*.h"), (build.device_sources(), "*.cu")
    texts = {"stdint.h": STDINT}
    for folder, pattern in folders:
        for path in sorted(Path(folder).glob(pattern)):
            assert path.name not in texts, f"two files are called {path.name}"
            texts[path.name] = path.read_text(encoding="utf-8")
    return texts


class Nvrtc:
    """The library at a path."""

    def __init__(self, path: str):
        self.path = path
        # NVRTC looks for it by name where only the loader looks; what is loaded for all to see, it finds.
        folder, patterns = os.path.dirname(path), ("libnvrtc-builtins.so.*", "nvrtc-builtins*.dll")
        beside = [name for pattern in patterns if folder for name in glob.glob(os.path.join(folder, pattern))]
        try:
            for name in sorted(name for name in beside if ".alt." not in name):
                ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
            self._handle = ctypes.CDLL(path)
        except OSError as error:
            raise NoCompiler(f"NVRTC does not load: {error}") from None
        self._handle.nvrtcGetErrorString.restype = c_char_p
        for name, arguments in _FUNCTIONS.items():
            function = getattr(self._handle, name, None)
            if function is None:
                raise NoCompiler(f"{path} is too old, it has no {name}: install nvidia-cuda-nvrtc")
            function.argtypes, function.restype = arguments, c_int
        major, minor = c_int(), c_int()
        self._call("nvrtcVersion", byref(major), byref(minor))
        self.version = major.value, minor.value

    def _call(self, name: str, *arguments: Any) -> None:
        if code := getattr(self._handle, name)(*arguments):
            raise NoCompiler(f"NVRTC at {self.path}: {name}: {self._handle.nvrtcGetErrorString(code).decode()}")

    def architectures(self) -> list[int]:
        """What it can compile for: 90 is sm_90."""
        count = c_int()
        self._call("nvrtcGetNumSupportedArchs", byref(count))
        found = (c_int * count.value)()
        self._call("nvrtcGetSupportedArchs", found)
        return sorted(found)

    def compile(
        self, source: str, name: str, headers: Mapping[str, str], arch: str, options: Sequence[str] = ()
    ) -> tuple[bytes, str]:
        """The cubin of a text, and what the compiler says about it. Raises `CompileError`."""
        texts = _texts(headers.values())
        names = _texts(headers)
        flags = _texts([f"--gpu-architecture={arch}", *OPTIONS, *options])
        program = c_void_p()
        self._call("nvrtcCreateProgram", byref(program), source.encode(), name.encode(), len(headers), texts, names)
        try:
            code = self._handle.nvrtcCompileProgram(program, len(flags), flags)
            log = self._text(program, "nvrtcGetProgramLog").rstrip(b"\0").decode(errors="replace")
            if code == _COMPILATION:
                raise CompileError(f"{name} for {arch}", log)
            if code:
                said = self._handle.nvrtcGetErrorString(code).decode()
                raise NoCompiler(f"NVRTC {self.version[0]}.{self.version[1]} at {self.path}: {said}\n{log}".strip())
            return self._text(program, "nvrtcGetCUBIN"), log
        finally:
            self._call("nvrtcDestroyProgram", byref(program))

    def _text(self, program: c_void_p, name: str) -> bytes:
        size = c_size_t()
        self._call(f"{name}Size", program, byref(size))
        text = ctypes.create_string_buffer(size.value)
        self._call(name, program, text)
        return text.raw


def _texts(texts: Any) -> Any:
    encoded = [text.encode() for text in texts]
    return (c_char_p * len(encoded))(*encoded)


class Compiler:
    """NVRTC for one architecture, as machine.py wants it."""

    def __init__(self, nvrtc: Nvrtc, arch: str):
        self.nvrtc, self.arch = nvrtc, arch
        self.key = f"NVRTC {nvrtc.version[0]}.{nvrtc.version[1]}\n{arch} {' '.join(OPTIONS)}"

    def compile(self, source: str, headers: Mapping[str, str]) -> bytes:
        return self.nvrtc.compile(source, "kernel.cu", headers, self.arch)[0]


def compiler(capability: tuple[int, int], driver: tuple[int, int]) -> Compiler:
    """The compiler for a GPU and a driver, both by version. Raises `NoCompiler`."""
    nvrtc = find(driver[0])
    return Compiler(nvrtc, architecture(capability, nvrtc))


def architecture(capability: tuple[int, int], nvrtc: Nvrtc) -> str:
    """What to compile for: the GPU's own architecture, else an older one of the same generation, which it runs too."""
    major, minor = capability
    if capability < LEAST:
        raise NoCompiler(
            f"this GPU is of compute capability {major}.{minor}, and the kernels need {LEAST[0]}.{LEAST[1]} "
            "(A100, RTX 30 series) or newer: use LOWBIT_BACKEND=reference"
        )
    known = nvrtc.architectures()
    if major * 10 + minor in known:
        return f"sm_{major}{minor}{'a' if major >= 9 else ''}"
    older = [arch for arch in known if arch // 10 == major and arch % 10 < minor]
    if older:
        return f"sm_{max(older)}"
    raise NoCompiler(
        f"this GPU is of compute capability {major}.{minor}, and NVRTC {nvrtc.version[0]}.{nvrtc.version[1]} compiles "
        f"for {', '.join(f'{a // 10}.{a % 10}' for a in known)}: install a torch with a newer CUDA, or use "
        "LOWBIT_BACKEND=reference"
    )


@functools.cache
def find(newest: int | None = None) -> Nvrtc:
    """The first NVRTC there is, of a CUDA no newer than the driver's: a driver cannot load what a newer one makes.

    In this order: the one that torch has loaded; what NVIDIA's cuda-pathfinder finds; NVIDIA's packages for Python;
    $CUDA_HOME and $CUDA_PATH; wherever the loader looks. Raises `NoCompiler`.
    """
    problems = []
    for path in dict.fromkeys(places()):
        try:
            nvrtc = Nvrtc(path)
        except NoCompiler as error:
            problems.append(str(error))
            continue
        if newest is None or nvrtc.version[0] <= newest:
            return nvrtc
        problems.append(f"{path} is of CUDA {nvrtc.version[0]}, and the driver goes up to {newest}")
    package = "nvidia-cuda-nvrtc-cu12" if newest == 12 else "nvidia-cuda-nvrtc"
    way = f"torch for CUDA brings it, or pip install {package}"
    if newest is not None and newest < 12:
        way = "update the driver, to CUDA 12 or later"
    raise NoCompiler(
        f"kernels are compiled by NVRTC, and there is none ({'; '.join(problems) or 'nothing found'}): {way}"
    )


def _of_pathfinder() -> Iterator[str]:
    """What NVIDIA's own search finds (packages, conda, toolkits), where it is installed: torch for CUDA brings it.

    https://nvidia.github.io/cuda-python/cuda-pathfinder/latest/
    """
    try:
        found = importlib.import_module("cuda.pathfinder").load_nvidia_dynamic_lib("nvrtc")
    except (ImportError, RuntimeError, OSError):  # it is not installed, or finds none
        return
    if found.abs_path:
        yield found.abs_path


def places() -> Iterator[str]:
    """Where NVRTC may be."""
    if sys.platform == "linux":
        with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
            yield from (m[0] for line in maps if (m := re.search(r"/\S.*/libnvrtc\.so[.\d]*$", line.rstrip("\n"))))
    yield from _of_pathfinder()
    spec = importlib.util.find_spec("nvidia")
    roots = [Path(root) for root in (spec.submodule_search_locations or [])] if spec else []
    folders = [folder for root in roots for inner in ("cu13", "cuda_nvrtc", "cu*") for folder in root.glob(inner)]
    folders += [Path(home) for name in ("CUDA_HOME", "CUDA_PATH") if (home := os.environ.get(name))]
    for folder in folders:
        for inner in ("lib", "lib64", "bin", "bin/x86_64", "targets/*/lib"):
            for pattern in ("libnvrtc.so.*", "nvrtc64_*.dll"):
                found = sorted(folder.glob(f"{inner}/{pattern}"), key=lambda path: (len(path.name), path.name))
                yield from (str(path) for path in found if ".alt." not in path.name)
    for name in ("libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"):
        try:
            ctypes.CDLL(name)
        except OSError:
            continue
        yield name
