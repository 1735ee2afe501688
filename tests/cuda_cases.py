"""Steps of CPU tensors on the CUDA backend: the emulator takes the place of the GPU, the rest is what a GPU runs."""

import contextlib
import ctypes
import functools
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import injected
from native_cases import Setting, differences, run

sys.path.insert(0, str(Path(__file__).parent / "emulator"))
from emulator import FORWARD, Emulator, compiler

from lowbit import backends
from lowbit.backends import cuda, cuda_step
from lowbit.gpu import machines, sources

needs_compiler = pytest.mark.skipif(compiler() is None, reason="kernels are compiled by g++ here, and there is none")


class Counting(Emulator):
    """Counts launches by the kernel's name, and notes the last one's blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.launched: Counter[str] = Counter()
        self.grids: dict[str, int] = {}

    def launch(self, function, grid, block, arguments, shared=0) -> None:
        self.launched[function.name] += self.driver.is_current(self.context)  # else this is called once more
        self.grids[function.name] = grid
        super().launch(function, grid, block, arguments, shared)


@functools.cache
def device() -> Counting:
    """One for all tests of a process: it keeps the modules that it has loaded."""
    return Counting()


@contextlib.contextmanager
def stepping(schedule: int = FORWARD) -> Iterator[Counting]:
    """Have the native backend of CPU tensors be the CUDA one."""
    its = device()
    its.schedule = schedule
    its.launched.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(machines, torch.device("cpu"), its)
        patch.setitem(backends._NATIVE, "cpu", cuda)
        patch.setenv("LOWBIT_BACKEND", "native")
        patch.setattr(torch, "empty", full_of_ones)
        yield its


def full_of_ones(*args: Any, empty: Callable[..., torch.Tensor] = torch.empty, **options: Any) -> torch.Tensor:
    """Memory that nobody has written yet, among it a step's workspace: fresh memory is often zero, a GPU's is not."""
    made = empty(*args, **options)
    if type(made) is torch.Tensor and made.dtype == torch.uint8 and made.is_cpu:
        ctypes.memset(made.data_ptr(), 0xFF, made.nbytes)  # and no operation, which a captured graph could not have
    return made


def wrong(s: Setting, schedule: int = FORWARD) -> list[str]:
    """Where steps of a setting differ from the reference's."""
    tape: list = []
    with injected(tape, replay=False):
        expected = run(s, "reference")
    with stepping(schedule) as its, injected(tape, replay=True):
        found = run(s, "native")
    assert its.launched["update"], "nothing was launched"
    return differences(expected, found)


def agree(s: Setting, schedule: int = FORWARD) -> None:
    found = wrong(s, schedule)
    assert not found, f"{len(found)} differ: {'; '.join(found[:4])}"


@contextlib.contextmanager
def patched(file: str, before: str, after: str) -> Iterator[None]:
    """Compile steps from a text with a fault in it."""
    texts: Mapping[str, str] = sources()
    assert texts[file].count(before) == 1, f"{file} no longer has {before!r}, or has it more than once"
    faulty = {**texts, file: texts[file].replace(before, after)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_step, "sources", lambda: faulty)
        cuda_step._text.cache_clear()
        yield
    cuda_step._text.cache_clear()
