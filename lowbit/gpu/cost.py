"""What a specialisation's kernels cost on an architecture: compiled, and read by inspect.py.

`lowbit doctor --arch sm_90a` prints it of lowbit/bench/kernels.py's list, on any machine that has NVRTC; the tests
compile the list with every compiler for every architecture, and hold it to budgets.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from . import inspect
from .inspect import Mix, Resources, Specialisation
from .nvrtc import Nvrtc, sources

# What NVIDIA sells now or sold lately, oldest first: A100; RTX 30; RTX 40, L40; H100; B200; RTX 50.
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120")


def texts(special: Specialisation) -> tuple[str, dict[str, str]]:
    """A specialisation as compilers take it: the kernel file's text, and that of every header."""
    return sources()[special.file], {**sources(), "spec.h": special.spec}


@dataclass(frozen=True)
class Report:
    """What one kernel of a specialisation costs. `mix` is None where the main loop is not counted."""

    specialisation: str
    kernel: str
    arch: str
    resources: Resources
    mix: Mix | None
    values: int

    @property
    def per_value(self) -> float | None:
        """Instructions of a thread for each value that it handles."""
        return self.mix.instructions / self.values if self.mix else None

    def as_dict(self) -> dict[str, Any]:
        """All of it as plain values."""
        return {**asdict(self), "per_value": self.per_value}


def report(special: Specialisation, arch: str, nvrtc: Nvrtc) -> list[Report]:
    """Compile a specialisation and read what its kernels cost; without nvdisasm, no instructions are counted.

    Raises `CompileError` for what cannot be compiled.
    """
    source, headers = texts(special)
    cubin, log = nvrtc.compile(source, special.file, headers, arch, inspect.VERBOSE)
    return [*read(special, arch, cubin, log)]


def read(special: Specialisation, arch: str, cubin: bytes, log: str) -> Iterator[Report]:
    """The costs of a specialisation's kernels, from what a compiler has made of it and said about it."""
    code = inspect.disassemble(cubin) if special.values and inspect.nvdisasm() else {}
    for kernel, taken in sorted(inspect.resources(log).items()):
        values = special.values.get(kernel, 0)
        apart = special.apart.get(kernel, frozenset())
        mix = Mix.of(inspect.hot_loop(code[kernel], apart)) if values and code else None
        yield Report(special.name, kernel, arch, taken, mix, values)
