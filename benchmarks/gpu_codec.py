"""Quantizing on a GPU: a bf16 matrix as users quantize it, beside two libraries; products with it; what layers cost.

Everything makes its result anew, as its users call it. torchao runs eagerly, and compiled where there is time for it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import gpu_tables
import timing
import torch
from gpu_timing import PATIENCE, Replayed, Timed, probes, start

import lowbit
from lowbit import backends

BF16 = torch.bfloat16
BLOCK = 128
WEIGHTS = 16  # of 8 MiB in 4 bits: more than a second cache holds
FORMATS = {"e2m1": "e2m1:128", "int4": "int4", "nf4": "nf4:128", "int8": "int8:128", "dyn8": "dyn8:128", "e4m3": "e4m3"}

Works = dict[str, tuple[Callable[[], Any], float]]  # what is done, and the bytes that it must move at least


def ours(x: torch.Tensor) -> Works:
    """Four directions of each format."""
    made: Works = {}
    for name, asked in FORMATS.items():
        fmt = lowbit.format(asked)
        packed = lowbit.quantize(x, fmt)
        moved = x.nbytes + packed.nbytes
        made[f"lowbit {name} quantize"] = lambda fmt=fmt: lowbit.quantize(x, fmt), moved
        made[f"lowbit {name} quantize, stochastic"] = lambda fmt=fmt: lowbit.quantize(x, fmt, stochastic=True), moved
        made[f"lowbit {name} dequantize"] = lambda packed=packed: packed.dequantize(x.dtype), moved
        fake = lambda fmt=fmt: backends.fake(fmt, x)  # noqa: E731
        made[f"lowbit {name} fake"] = fake, x.nbytes + 4 * x.numel()  # its result is fp32
    return made


def bitsandbytes(x: torch.Tensor, compiled: bool) -> Works:
    """Its two 4-bit formats, and the 8-bit dynamic map (our dyn8)."""
    import bitsandbytes.functional as F

    made: Works = {}
    for name in ("fp4", "nf4"):
        codes, state = F.quantize_4bit(x, blocksize=BLOCK, quant_type=name)
        moved = x.nbytes + codes.nbytes + state.absmax.nbytes
        quantize = lambda name=name: F.quantize_4bit(x, blocksize=BLOCK, quant_type=name)  # noqa: E731
        made[f"bitsandbytes {name} quantize"] = quantize, moved
        made[f"bitsandbytes {name} dequantize"] = lambda c=codes, s=state: F.dequantize_4bit(c, s), moved
    codes, state = F.quantize_blockwise(x, blocksize=BLOCK)
    moved = x.nbytes + codes.nbytes + state.absmax.nbytes
    made["bitsandbytes blockwise quantize"] = lambda: F.quantize_blockwise(x, blocksize=BLOCK), moved
    made["bitsandbytes blockwise dequantize"] = lambda: F.dequantize_blockwise(codes, state), moved
    return made


def torchao(x: torch.Tensor, compiled: bool) -> Works:
    """Symmetric int4 (left unpacked, one code a byte), and MX FP4, which has blocks of 32."""
    from torchao.prototype.mx_formats.mx_tensor import MXTensor
    from torchao.quantization.quant_primitives import (
        MappingType,
        choose_qparams_affine,
        dequantize_affine,
        quantize_affine,
    )

    block, limits = (1, BLOCK), (-8, 7)

    def quantize(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        scale, zero = choose_qparams_affine(x, MappingType.SYMMETRIC, block, torch.int8, *limits)
        return quantize_affine(x, block, scale, zero, torch.int8, *limits), scale, zero

    def dequantize(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        return dequantize_affine(codes, block, scale, zero, torch.int8, *limits, output_dtype=BF16)

    def mx(x: torch.Tensor) -> Any:
        return MXTensor.to_mx(x, torch.float4_e2m1fn_x2, block_size=32)

    parts, packed = quantize(x), mx(x)
    int4 = x.nbytes + sum(part.nbytes for part in parts)
    fp4 = x.nbytes + x.numel() * (1 / 2 + 1 / 32)
    made: Works = {
        "torchao int4 quantize": (lambda: quantize(x), int4),
        "torchao int4 dequantize": (lambda: dequantize(*parts), int4),
        "torchao MX fp4 quantize": (lambda: mx(x), fp4),
        "torchao MX fp4 dequantize": (lambda: packed.dequantize(BF16), fp4),
    }
    if compiled:
        fast, faster = torch.compile(quantize), torch.compile(mx)
        made["torchao int4 quantize, compiled"] = lambda: fast(x), int4
        made["torchao MX fp4 quantize, compiled"] = lambda: faster(x), fp4
    return made


RIVALS = {"torchao": torchao, "bitsandbytes": bitsandbytes}


def group(title: str, works: Works, failed: dict[str, str], args: argparse.Namespace, device: torch.device) -> dict:
    """Time works in turn with the copy; what takes too long is timed once."""
    cases: dict[str, timing.Case] = {}
    moved: dict[str, float] = {}
    slow: dict[str, float] = {}
    for name, (case, size) in probes(device, 1 << 12 if args.smoke else 1 << 28).items():
        cases[name], moved[name] = case, size
    for name, (work, size) in works.items():
        try:
            case = work if isinstance(work, Timed) else Timed(work, device)
            case.took()
            if (took := case.took()) > PATIENCE:
                slow[name] = took
            else:
                cases[name], moved[name] = case, size
            print(f"{title}: {name}: {took:.2g} s", file=sys.stderr)
        except Exception as error:
            if name.startswith("lowbit"):
                raise
            failed[name] = timing.reason(error)
    made = timing.group(title, cases, args, bytes=moved)
    made["failed"] |= failed
    return {**made, "slow": slow, "backend": backends.choose(device).__name__.rpartition(".")[2]}


def codec(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Quantize and dequantize one matrix."""
    side = 256 if args.smoke else 8192
    torch.manual_seed(0)
    x = torch.randn(side, side, device=device, dtype=BF16) * 0.02
    works, failed = ours(x), {}
    for name, rival in RIVALS.items():
        if name not in args.without:
            try:
                works |= rival(x, compiled=not (args.quick or args.smoke))
            except Exception as error:
                failed[name] = timing.reason(error)
    results = start(args, device)
    results |= {"shape": [side, side], "block": BLOCK}
    timing.add(results, group(gpu_tables.CODEC, works, failed, args, device), args)
    return results


def layers(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Forward and backward of one bf16 layer, dense and quantized by each preset; the matmuls stay bf16."""
    tokens, side = (64, 128) if args.smoke else (8192, 4096)
    torch.manual_seed(0)
    x = torch.randn(tokens, side, device=device, dtype=BF16, requires_grad=True)
    gy = torch.randn(tokens, side, device=device, dtype=BF16)

    def trained(recipe: str) -> Callable[[], None]:
        layer: Any = torch.nn.Linear(side, side, bias=False, device=device, dtype=BF16)
        if recipe:
            layer = torch.nn.Sequential(layer)
            lowbit.quantize_(layer, recipe)

        def work() -> None:
            x.grad = None
            layer.zero_grad()
            layer(x).backward(gy)

        return work

    # Bytes mean little here: what a dense layer's three matmuls read and write.
    moved = 3 * (x.nbytes + gy.nbytes + side * side * 2)
    works: Works = {gpu_tables.DENSE: (trained(""), moved)}
    works |= {f"lowbit {recipe}": (trained(recipe), moved) for recipe in lowbit.recipes()}
    results = start(args, device)
    results |= {"tokens": tokens, "side": side}
    timing.add(results, group(gpu_tables.LAYERS, works, {}, args, device), args)
    return results


def linear(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Products of bf16 rows with a packed weight, forward and backward, beside torch's with the weight in bf16.

    Few rows take less than the host needs for a call. So they are timed in a graph as well, one product with each of
    WEIGHTS equal weights: by the time a weight comes again, others are in the second cache.
    """
    from lowbit.gpu import linear as products

    side, counts = (128, (1, 32)) if args.smoke else (4096, (1, 16, 64, 512, 8192))
    torch.manual_seed(0)
    dense = [torch.randn(side, side, device=device, dtype=BF16) * 0.02]
    dense += [dense[0].clone() for _ in range(WEIGHTS - 1)]
    packed = {name: [lowbit.quantize(w, FORMATS[name]) for w in dense] for name in ("int4", "nf4", "int8")}
    results = start(args, device)
    results |= {"side": side}
    for m in counts:
        x = torch.randn(m, side, device=device, dtype=BF16)
        rows = 2 * x.nbytes
        ways: dict[str, tuple[list[Callable[[], Any]], float]] = {}
        ways[gpu_tables.DENSE] = [lambda x=x, w=w: x @ w.T for w in dense], rows + dense[0].nbytes
        for name, weights in packed.items():
            moved = rows + weights[0].nbytes
            ways[f"lowbit {name}"] = [lambda x=x, w=w: products.linear(x, w) for w in weights], moved
            back = [lambda x=x, w=w: products.linear_transposed(x, w) for w in weights]
            ways[f"lowbit {name}, transposed"] = back, moved
        works: Works = {name: (each[0], moved) for name, (each, moved) in ways.items()}
        if m <= products.FEW:
            works |= {
                name + gpu_tables.IN_GRAPH: (Replayed(each, device), moved) for name, (each, moved) in ways.items()
            }
        made = group(f"{m} rows", works, {}, args, device)
        timing.add(results, {**made, "rows": m}, args)
    return results
