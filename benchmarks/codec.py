"""How long does it take to quantize on a CPU? A 4096 × 4096 fp32 matrix in blocks of 128, against two libraries.

    python benchmarks/codec.py [--rounds 9] [--without torchao,bitsandbytes]

Everything is called as its users call it, and so makes its result anew. A new 64 MB tensor comes from the system page
by page, which costs more than decoding into it: hence two groups. `fresh memory` is what a user gets; for `kept memory`
the C library is told to keep what is freed (glibc's mallopt), for all cases alike, so that only the work is timed.

`layers` times what lowbit's layers do to an activation, as a share of the matmul that follows. `fake` is encoding and
decoding at once.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any

import cpu_tables
import timing
import torch

import lowbit
from lowbit import backends
from lowbit.nn.fake import fake_quantize
from lowbit.rounding import key

FORMATS = {"e2m1": "e2m1:128", "int4": "int4", "nf4": "nf4:128", "int8": "int8:128", "dyn8": "dyn8:128", "e4m3": "e4m3"}
BLOCK = 128
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h


def ours(x: torch.Tensor) -> dict[str, timing.Case]:
    """Four directions of each format."""
    cases = {}
    for name, asked in FORMATS.items():
        fmt = lowbit.format(asked)
        packed = lowbit.quantize(x, fmt)
        cases[f"lowbit {name} nearest"] = timing.timed(lambda fmt=fmt: lowbit.quantize(x, fmt))
        cases[f"lowbit {name} stochastic"] = timing.timed(lambda fmt=fmt: lowbit.quantize(x, fmt, stochastic=True))
        cases[f"lowbit {name} dequantize"] = timing.timed(packed.dequantize)
        cases[f"lowbit {name} fake"] = timing.timed(lambda fmt=fmt: backends.choose(x.device).fake(fmt, x))
    return cases


def bitsandbytes(x: torch.Tensor) -> dict[str, timing.Case]:
    """Its two 4-bit formats, and the 8-bit dynamic map (our dyn8)."""
    import bitsandbytes.functional as F

    cases = {}
    for name in ("fp4", "nf4"):
        codes, state = F.quantize_4bit(x, blocksize=BLOCK, quant_type=name)
        cases[f"bitsandbytes {name} quantize"] = timing.timed(
            lambda name=name: F.quantize_4bit(x, blocksize=BLOCK, quant_type=name)
        )
        cases[f"bitsandbytes {name} dequantize"] = timing.timed(lambda c=codes, s=state: F.dequantize_4bit(c, s))
    codes, state = F.quantize_blockwise(x, blocksize=BLOCK)
    cases["bitsandbytes blockwise quantize"] = timing.timed(lambda: F.quantize_blockwise(x, blocksize=BLOCK))
    cases["bitsandbytes blockwise dequantize"] = timing.timed(lambda: F.dequantize_blockwise(codes, state))
    return cases


def torchao(x: torch.Tensor) -> dict[str, timing.Case]:
    """Symmetric int4 (left unpacked, one code a byte), and MX FP4, which has blocks of 32. Run eagerly."""
    from torchao.prototype.mx_formats.mx_tensor import MXTensor
    from torchao.quantization.quant_primitives import (
        MappingType,
        choose_qparams_affine,
        dequantize_affine,
        quantize_affine,
    )

    block, limits = (1, BLOCK), (-8, 7)

    def quantize() -> tuple[torch.Tensor, ...]:
        scale, zero = choose_qparams_affine(x, MappingType.SYMMETRIC, block, torch.int8, *limits)
        return quantize_affine(x, block, scale, zero, torch.int8, *limits), scale, zero

    def dequantize() -> torch.Tensor:
        return dequantize_affine(codes, block, scale, zero, torch.int8, *limits)

    def mx() -> Any:
        return MXTensor.to_mx(x, torch.float4_e2m1fn_x2, block_size=32)

    codes, scale, zero = quantize()
    packed = mx()
    return {
        "torchao int4 quantize": timing.timed(quantize),
        "torchao int4 dequantize": timing.timed(dequantize),
        "torchao MX fp4 quantize": timing.timed(mx),
        "torchao MX fp4 dequantize": timing.timed(lambda: packed.dequantize(torch.float32)),
    }


def layers(n: int) -> dict[str, timing.Case]:
    """A layer's activation quantized as its recipe says, by the backend alone, and the matmul it is for."""
    x, w = torch.randn(n, n), torch.randn(n, n)
    noise, backend = key(0, 0, 0, 0), backends.choose(x.device)
    cases = {"torch matmul": timing.timed(lambda: torch.nn.functional.linear(x, w))}
    for name in ("int4", "fp4", "stablespam-int4", "stablespam-fp4"):
        operand = lowbit.nn.presets.presets()[name].forward[0]
        cases[f"layers {name}"] = timing.timed(lambda operand=operand: fake_quantize(x, operand))
    for asked in ("int4:16", "e2m1:16"):
        fmt = lowbit.format(asked)
        cases[f"lowbit fake {asked}"] = timing.timed(lambda fmt=fmt: backend.fake(fmt, x))
        cases[f"lowbit fake {asked} stochastic"] = timing.timed(lambda fmt=fmt: backend.fake(fmt, x, noise))
    return cases


def keep_memory() -> bool:
    """Tell the C library to keep what is freed, if it can be told."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))


def main() -> None:
    parser = timing.arguments(__doc__, "cpu_codec.json")
    args = timing.parse(parser)
    size, layer = (256, 128) if args.smoke else (4096, 2048)
    x = torch.randn(size, size) * 0.02
    rivals = [rival for rival in (bitsandbytes, torchao) if rival.__name__ not in args.without]
    cases = {"torch clone": timing.timed(x.clone), **ours(x)}
    for rival in rivals:
        cases |= rival(x)
    results = timing.start(args, shape=[size, size], block=BLOCK, layer=layer)
    timing.add(results, timing.group(cpu_tables.FRESH, cases, args), args)
    timing.add(results, timing.group(cpu_tables.LAYERS, layers(layer), args, 2 * args.rounds), args)
    if keep_memory():  # last, as there is no way back
        timing.add(results, timing.group(cpu_tables.KEPT, cases, args), args)
    cpu_tables.show("codec", results)


if __name__ == "__main__":
    sys.exit(main())
