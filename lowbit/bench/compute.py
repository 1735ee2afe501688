"""Which arithmetic the matmuls use here: fp32, or bf16 autocast where that is measured to be faster.

A CPU without bf16 instructions runs bf16 matmuls tens of times slower than fp32, so "BF16 training" there means fp32
compute with bf16-rounded storage, and every table says so. Where the instructions exist a short probe decides.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from .machine import cpu_flags
from .model import Llama, Preset
from .storage import Weights

BF16_FLAGS = ("amx_bf16", "avx512_bf16")
_ENOUGH = 1.15  # bf16 must win by this much: a tie that flips from run to run would make runs incomparable


@dataclass(frozen=True)
class Compute:
    """Device and arithmetic of a whole benchmark, with the reason for the choice."""

    device: str = "cpu"
    autocast: bool = False
    reason: str = "chosen by hand"

    @property
    def label(self) -> str:
        """What every table, plot and file says about the arithmetic."""
        where = "bf16 autocast compute" if self.autocast else "fp32 compute"
        return f"{where}, bf16-rounded storage, {self.device.upper()}"


def choose_compute(shape: Preset, vocab: int, seq: int, wanted: str = "auto") -> Compute:
    """Pick the device and the arithmetic: `wanted` is auto, fp32 or bf16."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted != "auto":
        return Compute(device, wanted == "bf16", "asked for with --compute")
    flags = [f for f in BF16_FLAGS if f in cpu_flags()]
    if device == "cpu" and not flags:
        return Compute(device, False, "this CPU has no bf16 instructions (avx512_bf16, amx_bf16)")
    fp32, bf16 = (_milliseconds(shape, vocab, seq, device, autocast) for autocast in (False, True))
    what = "CUDA" if device == "cuda" else f"CPU with {', '.join(flags)}"
    reason = f"{what}; a probe of {shape.name} took {fp32:.1f} ms in fp32, {bf16:.1f} ms in bf16 autocast"
    return Compute(device, bf16 * _ENOUGH < fp32, reason)


def _milliseconds(shape: Preset, vocab: int, seq: int, device: str, autocast: bool) -> float:
    """Forward and backward of a few windows: the best of the repetitions that fit in about 20 ms (at least 3)."""
    model = Llama(shape, vocab, seq).to(torch.bfloat16).to(device)
    weights = Weights(model, master=False, autocast=autocast)
    tokens = torch.zeros(min(shape.micro_batch, 8), seq, dtype=torch.int64, device=device)
    best, spent, rounds = float("inf"), 0.0, -1  # the first round only warms up
    while rounds < 3 or spent < 20:
        start = time.perf_counter()
        weights.forward(tokens).sum().backward()
        if device == "cuda":
            torch.cuda.synchronize()
        elapsed = 1000 * (time.perf_counter() - start)
        rounds += 1
        if rounds:
            best, spent = min(best, elapsed), spent + elapsed
    return best
