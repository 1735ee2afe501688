"""The native library in this process: found or built, loaded, and its functions for one instruction set.

`LOWBIT_ISA` forces baseline, avx2 or avx512; without it the library's own choice holds.
"""

from __future__ import annotations

import os
from ctypes import CDLL, POINTER, c_char_p, c_int32, c_void_p, cast
from functools import cache
from pathlib import Path
from typing import Any

from ..formats import nearest
from ..stages import Stage
from . import abi, build
from .printer import Printed, print_stage

# What each instruction set needs said before any code.
ISAS = {
    "baseline": "",
    "avx2": '#pragma GCC target("arch=x86-64-v3")\n#define LB_AVX2',
    "avx512": '#pragma GCC target("arch=x86-64-v4")\n#define LB_AVX2\n#define LB_AVX512',
}


class Library:
    """The functions of the library for one instruction set."""

    def __init__(self, found: build.Found, isa: str, best: str):
        self.found, self.isa, self.best = found, isa, best
        self.handle = CDLL(str(found.path))
        self._kernels: dict[tuple[Stage, frozenset[str]], tuple[int, int, Printed]] = {}
        self._extras: list[CDLL] = []
        self.step = self._function("step", [POINTER(abi.Job), c_int32, c_int32], c_int32)
        self.encode = self._function("encode", [POINTER(abi.Matrix), c_int32], c_int32)
        self.decode = self._function("decode", [POINTER(abi.Matrix), c_int32], c_int32)
        self.measure = self._function("measure", [POINTER(abi.Matrix), c_int32, c_void_p, c_int32], c_int32)

    def _function(self, name: str, arguments: list[Any], result: Any) -> Any:
        function = getattr(self.handle, f"lb_{name}_{self.isa}")
        function.argtypes, function.restype = arguments, result
        return function

    def ships(self, stage: Stage, letters: frozenset[str]) -> bool:
        """Whether a stage's kernel is in the library, so that nothing has to be compiled."""
        return self._has(print_stage(stage, letters))

    def _has(self, printed: Printed) -> bool:
        return _shipped(printed) and hasattr(self.handle, f"lb_{printed.symbol}_{self.isa}")

    def kernel(self, stage: Stage, letters: frozenset[str]) -> tuple[int, int, Printed]:
        """The addresses of a stage's kernel, and of what chooses an update's fused loops (0: nothing does).

        From the library where it is shipped, else printed, compiled and cached.

        Raises `translate.Unprintable` for what cannot be printed and `build.BuildError` for what cannot be compiled.
        """
        if (stage, letters) not in self._kernels:
            printed = print_stage(stage, letters)
            name = f"lb_{printed.symbol}_{self.isa}"
            handle = self.handle
            if not self._has(printed):
                handle = CDLL(str(build.compile_extra(_source(printed, self.isa), printed.symbol)))
                self._extras.append(handle)
            kernel = _address(handle, name)
            fused = _address(handle, f"lb_{printed.symbol}_fused_{self.isa}")
            assert kernel
            self._kernels[stage, letters] = kernel, fused, printed
        return self._kernels[stage, letters]


def _address(handle: CDLL, name: str) -> int:
    """Of a function; 0 if there is none."""
    return cast(getattr(handle, name), c_void_p).value or 0 if hasattr(handle, name) else 0


@cache
def _rules() -> str:
    return (Path(__file__).parent / "rules.h").read_text(encoding="utf-8")


def _shipped(printed: Printed) -> bool:
    """Whether the library's kernel of this name is this very text, and not another rule's of the same name."""
    return all(text in _rules() for text in (printed.functor, *printed.helpers.values()))


def _source(printed: Printed, isa: str) -> str:
    """A kernel of its own: what a rule outside the package becomes."""
    return "\n".join(
        [
            ISAS[isa],
            f'#define LB_KERNEL(name) extern "C" __attribute__((visibility("default"))) void lb_##name##_{isa}',
            f"#define LB_SPACE {isa}",
            '#include "exports.h"',
            *printed.helpers.values(),
            printed.functor,
            printed.kernel,
            "",
        ]
    )


@cache
def load() -> Library:
    """The library, found or built; raises `build.BuildError` with what is missing.

    Raises `ValueError` for a LOWBIT_ISA that does not exist or that this processor lacks.
    """
    found = build.find()
    handle = CDLL(str(found.path))
    handle.lb_best.restype = c_char_p
    best = handle.lb_best().decode()
    isa = os.environ.get("LOWBIT_ISA", "") or best
    if isa not in ISAS:
        raise ValueError(
            f"LOWBIT_ISA={isa!r} is no instruction set{nearest(isa, list(ISAS))}; known: {', '.join(ISAS)}"
        )
    if list(ISAS).index(isa) > list(ISAS).index(best):
        raise ValueError(f"LOWBIT_ISA={isa!r}: this processor has {best} at best")
    return Library(found, isa, best)
