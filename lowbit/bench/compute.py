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
from .storage import Weights, round_to_bf16

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


def choose_device() -> str:
    """CUDA where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def choose_compute(shape: Preset, vocab: int, seq: int, threads: int, device: str, wanted: str = "auto") -> Compute:
    """Pick the arithmetic: `wanted` is auto, fp32 or bf16; `threads` is what a run will have."""
    if wanted != "auto":
        return Compute(device, wanted == "bf16", "asked for with --compute")
    flags = [f for f in BF16_FLAGS if f in cpu_flags()]
    if device == "cpu" and not flags:
        return Compute(device, False, "this CPU has no bf16 instructions (avx512_bf16, amx_bf16)")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        fp32, bf16 = probe(shape, vocab, seq, device)
    finally:
        torch.set_num_threads(before)
    what = "CUDA" if device == "cuda" else f"CPU with {', '.join(flags)}"
    reason = f"{what}; a probe of {shape.name} took {fp32:.1f} ms in fp32, {bf16:.1f} ms in bf16 autocast"
    return Compute(device, bf16 * _ENOUGH < fp32, reason)


def probe(shape: Preset, vocab: int, seq: int, device: str) -> tuple[float, float]:
    """Milliseconds of forward and backward of a few windows, in fp32 and in bf16 autocast.

    The two take turns, so that a busy machine slows both, and the best of several turns counts.
    """
    model = round_to_bf16(Llama(shape, vocab, seq).initialise(0)).to(device)
    tokens = torch.zeros(min(shape.micro_batch, 8), seq, dtype=torch.int64, device=device)
    ways = [Weights(model, master=False, autocast=autocast) for autocast in (False, True)]
    best, spent = [float("inf")] * 2, 0.0
    for turn in range(16):
        for i, weights in enumerate(ways):
            start = time.perf_counter()
            weights.forward(tokens).sum().backward()
            if device == "cuda":
                torch.cuda.synchronize()
            elapsed = 1000 * (time.perf_counter() - start)
            if turn:  # the first turn only warms up
                best[i] = min(best[i], elapsed)
            spent += elapsed
        if turn and spent > 500:
            break
    return best[0], best[1]
