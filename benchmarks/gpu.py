"""How long does a step take on a GPU? Against torch, torchao, bitsandbytes and FlashOptim, and a copy of memory.

    python benchmarks/gpu.py [--quick] [--sections copy,step] [--without torchao] [--out DIR]

Each section writes `gpu_SECTION.json` and prints a table; `gpu_tables.py` makes docs/gpu-speed.md of them. Times are
those of CUDA events around as many calls as take a fiftieth of a second, in turn and in shuffled order, with a copy of
memory in every round (`timing.py` says why). Gradients have the parameters' dtype; all optimizers of one dtype share
their parameters, so that a billion of them fit. A rival that is not installed or fails is named; it stops nothing.

`--quick` leaves out what takes minutes (a billion parameters, torchao's compiler on many shapes). `--smoke` is for
machines without a GPU: tiny sizes on the CPU, to see that it runs; its times mean nothing.
"""

from __future__ import annotations

import argparse
import gc
import math
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gpu_tables
import timing
import torch
from many_tensors import llama

from lowbit import backends
from lowbit.bench import machine
from lowbit.optim import AdamS, AdamW, Rule, StableSPAM

FP32, BF16 = torch.float32, torch.bfloat16
LEAST = 0.02  # seconds: what one sample takes at least
PATIENCE = 1.0  # seconds: a step that takes longer is timed once, not in rounds

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


class Timed:
    """A case of a call: the mean of as many calls as take LEAST, by CUDA events; on a CPU by its clock."""

    def __init__(self, work: Callable[[], Any], device: torch.device):
        self.work, self.device, self.repeat = work, device, 0

    def __call__(self) -> float:
        if not self.repeat:
            self.took()  # after the first call proper, allocators and caches still settle
            self.repeat = min(64, max(1, math.ceil(LEAST / self.took())))
        return self.took(self.repeat)

    def took(self, repeat: int = 1) -> float:
        if self.device.type == "cpu":
            return timing.timed(self.work, repeat)()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        begin.record()
        for _ in range(repeat):
            self.work()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / repeat


class Memory:
    """What the allocator was asked for, and at most, since this began; nothing is known on a CPU."""

    def __init__(self, device: torch.device):
        self.known = device.type == "cuda"
        if self.known:
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            self.before = self._of("current")

    def _of(self, what: str) -> int:
        return torch.cuda.memory_stats()[f"requested_bytes.all.{what}"]

    def more(self, what: str = "current") -> int | None:
        return self._of(what) - self.before if self.known else None


def probes(device: torch.device, count: int) -> dict[str, tuple[timing.Case, int]]:
    """Memory at its best, and the bytes it moves: a copy (one stream read, one written), and a triad (two, one)."""
    a, b, c = (torch.ones(count, device=device) for _ in range(3))
    return {
        gpu_tables.COPY: (Timed(lambda: b.copy_(a), device), 2 * a.nbytes),
        "probe: triad": (Timed(lambda: torch.add(a, b, alpha=0.5, out=c), device), 3 * a.nbytes),
    }


def copy(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Copies of several sizes: small ones stay in the cache."""
    results = start(args, device)
    sizes = [1 << k for k in ((16, 18) if args.smoke else (20, 22, 24, 26, 28, 29))]
    cases, moved = {}, {}
    for count in sizes:
        for name, (case, size) in probes(device, count).items():
            cases[f"{name}, {size / 2**20:.0f} MiB"] = case
            moved[f"{name}, {size / 2**20:.0f} MiB"] = size
    timing.add(results, timing.group("copy", cases, args, bytes=moved), args)
    return results


def step(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """One large matrix, and the parameters of two models."""
    if args.smoke:
        lists = {"one matrix": [(64, 1024)], "60M LLaMA": llama(64, 64, 1, 96)}
    else:
        lists = {"one matrix": [(8192, 8192)], "60M LLaMA": llama(), "1B LLaMA": llama(32000, 2048, 18, 5461)}
    if args.quick:
        lists.pop("1B LLaMA", None)
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


def start(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Results with nothing measured yet."""
    packages = {name: machine.version(name) for name in ("triton", *RIVALS)}
    found = {**machine.describe(), **packages, "gpu": gpu(device), "commit": timing.commit()}
    return timing.start(args, found, quick=args.quick)


def gpu(device: torch.device) -> dict[str, Any]:
    """The card, and how it is set."""
    if device.type == "cpu":
        return {"name": "none: the CPU"}
    asked = [
        "driver_version",
        "clocks.sm",
        "clocks.max.sm",
        "clocks.mem",
        "power.limit",
        "power.draw",
        "temperature.gpu",
    ]
    command = ["nvidia-smi", f"--query-gpu={','.join(asked)}", "--format=csv,noheader", f"--id={device.index or 0}"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip().split(", ")
    except (OSError, subprocess.CalledProcessError):
        said = []
    its = torch.cuda.get_device_properties(device)
    about = {"name": its.name, "memory_bytes": its.total_memory, "multiprocessors": its.multi_processor_count}
    about |= {"capability": f"{its.major}.{its.minor}", "cuda": torch.version.cuda}
    return about | dict(zip(asked, said, strict=False))


SECTIONS: dict[str, Callable[[argparse.Namespace, torch.device], dict[str, Any]]] = {"copy": copy, "step": step}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", default=",".join(SECTIONS), help="default: %(default)s")
    parser.add_argument("--without", default="", help=f"rivals to leave out: {','.join(RIVALS)}")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="leave out what takes minutes")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on the CPU, to see that it runs")
    parser.add_argument("--out", type=Path, help="a folder for the results; default: benchmarks/results, smoke: none")
    args = parser.parse_args()
    args.sections, args.without = (list(filter(None, text.split(","))) for text in (args.sections, args.without))
    for given, known in ((args.sections, SECTIONS), (args.without, RIVALS)):
        if unknown := [name for name in given if name not in known]:
            parser.error(f"{unknown[0]!r} is none of {', '.join(known)}")
    if not args.smoke and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device; --smoke runs tiny sizes on the CPU")
    args.folder = args.out or (None if args.smoke else timing.RESULTS)
    args.threads = [torch.get_num_threads()]
    if args.smoke:
        args.rounds = 2
    return args


def main() -> int:
    args = arguments()
    device = torch.device("cpu" if args.smoke else "cuda")
    if not args.smoke:
        torch.cuda.init()
    broken = 0
    if args.folder:
        args.folder.mkdir(parents=True, exist_ok=True)
    done = {}
    for name in args.sections:
        args.out = args.folder and args.folder / f"gpu_{name}.json"
        try:
            done[name] = SECTIONS[name](args, device)
        except Exception:  # the time on a GPU is dear: the other sections can still be had
            traceback.print_exc()
            broken += 1
    for name, results in done.items():
        gpu_tables.show(name, results)
    return broken


if __name__ == "__main__":
    sys.exit(main())
