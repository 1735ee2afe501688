"""Stochastic rounding is a function, not a stream.

The random bits of an element depend on (seed, step, tensor, operand, element) and on nothing else: not on the device,
the number of threads, the order of work or what was drawn before. Two neighbouring elements share one 32-bit hash, so
a hash is spent on every second value; element `i` uses the 16-bit half `i % 2` of hash `i // 2` (which is how a
little-endian machine sees an array of hashes as an array of 16-bit numbers).

The mixing function is the two-round multiply-xorshift "lowbias32" of Chris Wellons' hash prospector
(https://nullprogram.com/blog/2018/07/31/), with one key added before the first round and another xored in before the
second (added there, two streams with close first keys would differ by a constant). Philox-4x32-10
spends five wide multiplications on a 32-bit word where this spends two, and a step is bound by instructions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def mix(x: int) -> int:
    """The 32-bit hash of one number, on the host."""
    x = x & _MASK
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


def key(seed: int, step: int | Tensor, tensor: int | Tensor, operand: int) -> tuple[int, int]:
    """Two independent 32-bit keys of a stream of random bits, mixed on the host.

    Where only a device knows the step, or a compiler is not to know a number, it is an int64 tensor [], and the keys
    are such tensors too: nobody waits for it.
    """
    words: list[Any] = [w & _MASK for w in (seed, seed >> 32, step, step >> 32, tensor, operand)]
    keys = []
    for start in (0, 0x5BF03635):
        mixed: Any = start
        for word in words:
            mixed = mix((mixed * 0x9E3779B9 & _MASK) + word + 1)
        keys.append(mixed)
    return keys[0], keys[1]


def _signed(x: int) -> int:
    """The int32 with these 32 bits: torch has no uint32 arithmetic, and int32 multiplication wraps the same way."""
    x &= _MASK
    return x - (1 << 32) if x >> 31 else x


def bits16(keys: tuple[int, int], start: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """16 random bits for elements start .. start + count - 1, as int32 in [0, 65536).

    Elements beyond 2**33 fold their high bits into the second key.
    """
    pair, last = start // 2, (start + count + 1) // 2
    index = torch.arange(pair, last, dtype=torch.int64, device=device)
    x = (index + keys[0]).to(torch.int32)  # the conversion keeps the low 32 bits
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D
    x = x ^ ((x >> 15) & 0x1FFFF)
    x = x ^ ((index >> 32) * 0x9E3779B1 + keys[1]).to(torch.int32)
    x = x * _signed(0x846CA68B)
    x = x ^ ((x >> 16) & 0xFFFF)
    halves = x.view(torch.int16).to(torch.int32) & 0xFFFF
    return halves[start % 2 : start % 2 + count]


def uniform(bits: Tensor) -> Tensor:
    """16 random bits as the middle of one of 65,536 equal cells of (0, 1): never 0, never 1."""
    return (bits.float() + 0.5) * 2.0**-16


def narrow(x: Tensor, dtype: torch.dtype, bits: Tensor | None = None) -> Tensor:
    """fp32 to bf16 or fp16, to nearest-even, or stochastically with 16 random bits per value.

    Stochastic: the dropped part of the magnitude, plus the random bits, carries into the kept part. Exact values stay,
    the expectation is exact for bf16 and for fp16's normal numbers, and infinities and NaNs pass through. What is too
    large for the format becomes infinite, as in IEEE rounding.
    """
    if bits is None or dtype == torch.float32:
        return x.to(dtype)
    raw = x.view(torch.int32)
    if dtype == torch.bfloat16:
        moved = ((raw + bits) & ~0xFFFF).view(torch.float32)
    elif dtype == torch.float16:
        normal = ((raw + (bits >> 3)) & ~0x1FFF).view(torch.float32)
        # Below 2**-14 fp16 is a fixed grid of 2**-24; scaling by a power of two is exact.
        grid = x.abs() * 2.0**24
        floor = torch.floor(grid)
        up = (grid - floor + bits.float() * 2.0**-16) >= 1
        small = torch.copysign((floor + up) * 2.0**-24, x)
        moved = torch.where(x.abs() < 2.0**-14, small, normal)
    else:
        raise TypeError(f"parameters are stored in float32, bfloat16 or float16, not {dtype}")
    return torch.where(torch.isfinite(x), moved, x).to(dtype)
