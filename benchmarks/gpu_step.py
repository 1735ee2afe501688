"""Steps of optimizers on a GPU: torch's, ours and three rivals', on one large matrix and on the parameters of models.

Gradients have the parameters' dtype, and all optimizers of one dtype share parameters, so that a billion of them fit.
"""

from __future__ import annotations

import argparse
import gc
import math
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import gpu_tables
import timing
import torch
from gpu_timing import PATIENCE, Memory, Timed, probes, start
from many_tensors import llama

from lowbit import backends
from lowbit.optim import AdamS, AdamW, Rule, StableSPAM

FP32, BF16 = torch.float32, torch.bfloat16

Maker = tuple[torch.dtype, Callable[..., torch.optim.Optimizer]]
Shapes = list[tuple[int, ...]]

TORCH: dict[str, Maker] = {
    gpu_tables.YARDSTICK: (FP32, partial(torch.optim.AdamW, fused=True)),
    "torch AdamW fused, bf16 p": (BF16, partial(torch.optim.AdamW, fused=True)),
    "torch AdamW foreach": (FP32, partial(torch.optim.AdamW, foreach=True)),
}
OURS: dict[str, Maker] = {
    "lowbit AdamW fp32": (FP32, partial(AdamW, states="fp32")),
    "lowbit AdamW 8bit": (FP32, partial(AdamW, states="8bit")),
    "lowbit AdamW 4bit": (FP32, partial(AdamW, states="4bit")),
    "lowbit AdamW 8bit, bf16 p": (BF16, partial(AdamW, states="8bit")),
    "lowbit AdamW 4bit, bf16 p": (BF16, partial(AdamW, states="4bit")),
    "lowbit AdamW 8bit, bf16 p, master": (BF16, partial(AdamW, states="8bit", master="split8")),
    "lowbit StableSPAM 8bit, bf16 p": (BF16, partial(StableSPAM, states="8bit")),
    "lowbit StableSPAM 4bit, bf16 p": (BF16, partial(StableSPAM, states="4bit")),
    "lowbit AdamS 8bit, bf16 p": (BF16, partial(AdamS, states="8bit")),
}


def torchao() -> dict[str, Maker]:
    """It compiles its step for each shape with `torch.compile`; 16-bit parameters are rounded stochastically."""
    import torchao.optim as its

    made: dict[str, Maker] = {}
    for name in ("AdamW8bit", "AdamW4bit"):
        kind = getattr(its, name)
        made[f"torchao {name}"] = FP32, kind
        made[f"torchao {name}, bf16 p"] = BF16, partial(kind, bf16_stochastic_round=True)
    return made


def bitsandbytes() -> dict[str, Maker]:
    """16-bit parameters are rounded to nearest."""
    from bitsandbytes.optim import AdamW8bit

    return {"bitsandbytes AdamW8bit": (FP32, AdamW8bit), "bitsandbytes AdamW8bit, bf16 p": (BF16, AdamW8bit)}


def flashoptim() -> dict[str, Maker]:
    """16-bit parameters have a master of 8 more bits, or none and are rounded to nearest."""
    from flashoptim import FlashAdamW

    bare = partial(FlashAdamW, master_weight_bits=None)
    return {
        "FlashOptim AdamW": (FP32, bare),
        "FlashOptim AdamW, bf16 p": (BF16, bare),
        "FlashOptim AdamW, bf16 p, master": (BF16, partial(FlashAdamW, master_weight_bits=24)),
    }


RIVALS = {"torchao": torchao, "bitsandbytes": bitsandbytes, "flashoptim": flashoptim}


def step(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """One large matrix, and the parameters of two models."""
    if args.smoke:
        lists = {"one matrix": [(64, 1024)], "60M LLaMA": llama(64, 64, 1, 96)}
    else:
        lists = {"one matrix": [(8192, 8192)], "60M LLaMA": llama(), "1B LLaMA": llama(32000, 2048, 18, 5461)}
    results = start(args, device)
    for title, shapes in lists.items():
        few = title == "one matrix" or (title == "60M LLaMA" and not args.quick)
        makers = {**TORCH, **OURS}
        missing = {}
        for rival in RIVALS if few else set(RIVALS) - {"torchao"}:  # which would compile for minutes
            if rival not in args.without:
                try:
                    makers |= RIVALS[rival]()
                except Exception as error:
                    missing[rival] = timing.reason(error)
        if title == "1B LLaMA":
            makers.pop("torch AdamW foreach")  # its temporaries are as large as the model, several times over
        made = steps(title, shapes, makers, args, device)
        made["failed"] |= missing
        timing.add(results, made, args)
    timing.add(results, host(args, device), args)
    return results


def parameters(shapes: Shapes, dtypes: set[torch.dtype], device: torch.device) -> dict[torch.dtype, list[Any]]:
    """Of each dtype: parameters with gradients."""
    torch.manual_seed(0)
    made: dict[torch.dtype, list[Any]] = {}
    for dtype in dtypes:
        made[dtype] = [torch.nn.Parameter(torch.randn(s, device=device, dtype=dtype) * 0.02) for s in shapes]
        for p in made[dtype]:
            p.grad = torch.randn_like(p) * 1e-3
    return made


def steps(
    title: str, shapes: Shapes, makers: dict[str, Maker], args: argparse.Namespace, device: torch.device
) -> dict[str, Any]:
    """Time a step of each optimizer; the first one, which compiles and allocates, apart."""
    count = sum(math.prod(shape) for shape in shapes)
    params = parameters(shapes, {dtype for dtype, _ in makers.values()}, device)
    copies = probes(device, 1 << 12 if args.smoke else 1 << 28)
    cases: dict[str, timing.Case] = {name: case for name, (case, _) in copies.items()}
    about: dict[str, dict[str, Any]] = {name: {"bytes": size} for name, (_, size) in copies.items()}
    failed, slow = {}, {}
    for name, (dtype, maker) in makers.items():
        try:
            case, about[name] = first_step(maker, params[dtype], count, device)
            cases[name] = case
            if (took := case.took()) > PATIENCE:
                slow[name] = took
                del cases[name], case
        except Exception as error:
            if name.startswith("lowbit"):
                raise
            failed[name] = timing.reason(error)
        print(f"{title}: {name}: {about.get(name) or failed[name]}", file=sys.stderr)
    keys = {key for its in about.values() for key in its}
    made = timing.group(
        title, cases, args, **{k: {n: its[k] for n, its in about.items() if k in its} for k in sorted(keys)}
    )
    del cases, params, copies
    gc.collect()
    made["failed"] |= failed
    return {**made, "parameters": count, "tensors": len(shapes), "slow": slow}


def first_step(maker: Callable[..., Any], params: list[Any], count: int, device: torch.device) -> tuple[Timed, dict]:
    """An optimizer after a step, and what is known of it: bytes per parameter, seconds of the first step."""
    gc.collect()
    memory, began = Memory(device), time.perf_counter()
    opt = maker(params, lr=1e-4)
    case = Timed(opt.step, device)
    case.took()
    first = time.perf_counter() - began
    states = memory.more()
    if states is None:
        tensors = [v for state in opt.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
        states = sum(v.nbytes for v in tensors)
    again = Memory(device)
    case.took()
    sweeps, backend = 1, None
    if isinstance(opt, Rule):
        program = opt.program(opt.param_groups[0])
        sweeps, backend = program.sweeps, backends.for_program(program, device).__name__.rpartition(".")[2]
    size = params[0].element_size()
    return case, {
        "bytes": count * size * (2 + sweeps) + 2 * states,  # p and states to and fro, the gradient once a sweep
        "state_bytes": states,
        "peak_bytes": again.more("peak"),  # beyond parameters, gradients and states
        "first_seconds": first,
        "backend": backend,
    }


def host(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """A step of 75 tensors with nearly nothing in them: what a step costs when there is nothing to compute."""
    chosen = {name: maker for name, maker in {**TORCH, **OURS}.items() if maker[0] == FP32}
    params = parameters([(64,)] * 75, {FP32}, device)[FP32]
    cases = {name: Timed(maker(params, lr=1e-4).step, device) for name, (_, maker) in chosen.items()}
    return timing.group(gpu_tables.HOST, cases, args)
