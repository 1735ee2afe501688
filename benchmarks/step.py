"""How long does a step of an optimizer take on a CPU? 64M parameters, against torch, torchao and bitsandbytes.

    python benchmarks/step.py [--rounds 9] [--slow-rounds 5] [--without torchao] [--fork-python VENV/bin/python]

Four groups, each with its own rounds and its own fp32 AdamW of torch, fused, as the yardstick: ours and torch's;
weights that are codes and scales, beside parameters in bf16, which are rounded stochastically as well; the rivals that
take seconds a step, beside ours (rounds of their own, since a minute between a step and its yardstick says little); and
bitsandbytes-cpu-fork, which calls itself `bitsandbytes` and so runs in a second interpreter, in turn with the first.
Gradients have the parameters' dtype. Needs 12 GB.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import cpu_tables
import timing
import torch

from lowbit.nn.stored import StoredWeight
from lowbit.optim import AdamS, AdamW, Rule, StableSPAM
from lowbit.stages import Program

FP32, BF16 = torch.float32, torch.bfloat16


Maker = tuple[torch.dtype, Callable[..., torch.optim.Optimizer]]
STORES = ("int8", "int4", "nf4", "mxfp4", "nvfp4", "split")  # of weights without a master

TORCH: dict[str, Maker] = {
    cpu_tables.YARDSTICK: (FP32, partial(torch.optim.AdamW, fused=True)),
    "torch AdamW fused, bf16 p": (BF16, partial(torch.optim.AdamW, fused=True)),
    "torch AdamW foreach": (FP32, partial(torch.optim.AdamW, foreach=True)),
}
OURS: dict[str, Maker] = {
    "lowbit AdamW fp32": (FP32, partial(AdamW, states="fp32")),
    "lowbit AdamW bf16": (FP32, partial(AdamW, states="bf16")),
    "lowbit AdamW 8bit": (FP32, partial(AdamW, states="8bit")),
    "lowbit AdamW 4bit": (FP32, partial(AdamW, states="4bit")),
    "lowbit AdamW int4 + sqrt4": (FP32, partial(AdamW, states="int4")),
    "lowbit AdamW dyn8": (FP32, partial(AdamW, states="dyn8")),
    "lowbit AdamW 8bit, bf16 p": (BF16, partial(AdamW, states="8bit")),
    "lowbit AdamW 4bit, bf16 p": (BF16, partial(AdamW, states="4bit")),
    "lowbit AdamW int4 + sqrt4, bf16 p": (BF16, partial(AdamW, states="int4")),
    "lowbit StableSPAM 8bit": (FP32, partial(StableSPAM, states="8bit")),
    "lowbit StableSPAM 4bit": (FP32, partial(StableSPAM, states="4bit")),
    "lowbit AdamS 8bit": (FP32, partial(AdamS, states="8bit")),
    "lowbit AdamS 8bit, bf16 p": (BF16, partial(AdamS, states="8bit")),
}


def stored() -> dict[str, Maker]:
    """Weights that are codes and scales, with the states that suit them, beside parameters in bf16."""
    made: dict[str, Maker] = {}
    for states in ("8bit", "4bit"):
        made[f"lowbit AdamW {states}, bf16 p"] = BF16, partial(AdamW, states=states)
        made |= {f"lowbit AdamW {states}, {store} p": (BF16, partial(AdamW, states=states)) for store in STORES}
    return made


def parameter(name: str, shape: tuple[int, int], dtype: torch.dtype) -> torch.nn.Parameter:
    """Of a case: its name ends with how the parameter is kept."""
    value = (torch.randn(shape) * 0.02).to(dtype)
    store = name.rpartition(", ")[2].removesuffix(" p")
    return torch.nn.Parameter(StoredWeight.of(value, store) if store in STORES else value)


def slow(without: set[str]) -> dict[str, Maker]:
    """The rivals that take seconds a step."""
    made: dict[str, Maker] = {}
    if "bitsandbytes" not in without:
        import bitsandbytes.optim

        made["bitsandbytes AdamW8bit"] = FP32, bitsandbytes.optim.AdamW8bit
    if "torchao" not in without:
        import torchao.optim

        for name in ("AdamW8bit", "AdamW4bit"):
            kind = getattr(torchao.optim, name)
            made[f"torchao {name}"] = FP32, kind
            made[f"torchao {name}, bf16 p"] = BF16, partial(kind, bf16_stochastic_round=True)
    return made


def group(title: str, makers: dict[str, Maker], more: dict[str, timing.Case], args: Any, rounds: int = 0) -> dict:
    """Time a group's optimizers, which live no longer than it."""
    gc.collect()  # the last group's optimizers
    shape = args.rows, args.cols
    grads = {dtype: (torch.randn(shape) * 1e-3).to(dtype) for dtype in {dtype for dtype, _ in makers.values()}}
    cases: dict[str, timing.Case] = {**timing.probes(args.rows * args.cols), **more}
    optimizers = {}
    for name, (dtype, maker) in makers.items():
        p = parameter(name, shape, dtype)
        p.grad = grads[dtype]
        optimizers[name] = maker([p], lr=1e-3)
        cases[name] = timing.timed(optimizers[name].step)
    made = timing.group(title, cases, args, rounds)
    moved = {name: traffic(opt) for name, opt in optimizers.items()}
    moved |= {name: case.moved for name, case in more.items() if isinstance(case, Fork)}
    moved |= {"probe: read + write": 8.0, "probe: Adam's traffic": 28.0}
    for name, case in made["cases"].items():
        case["bytes"] = moved.get(name)
    return made


def traffic(opt: torch.optim.Optimizer) -> float:
    """The bytes a parameter that a step must move at least: p and states to and fro, the gradient once a sweep."""
    (p,) = (p for g in opt.param_groups for p in g["params"])
    sweeps = 1 + _measuring(opt.program(opt.param_groups[0])) if isinstance(opt, Rule) else 1
    values = [value for state in opt.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    parts = [part for value in values for part in ((value.codes, value.scale) if hasattr(value, "codes") else (value,))]
    states = sum(part.nbytes for part in parts if part.numel() > 256)  # scalars and tables aside
    own = p.nbytes / p.numel()
    return 2 * own + p.grad.element_size() * sweeps + 2 * states / p.numel()


def _measuring(program: Program) -> int:
    """Sweeps that measure: the sweep for a largest value finds out a norm as well."""
    plain = any(stage.plain for stage in program.measures)
    return sum(not (plain and stage.unit) for stage in program.measures)


class Fork:
    """A case in another interpreter: it steps when told to, and says how long that took."""

    CHILD = """
import json, sys, time
said, sys.stdout = sys.stdout, sys.stderr  # what a library prints is no answer
import bitsandbytes, torch
rows, cols, threads = map(int, sys.argv[2:])
torch.set_num_threads(threads)
p = torch.nn.Parameter(torch.randn(rows, cols) * 0.02)
p.grad = torch.randn(rows, cols) * 1e-3
opt = getattr(bitsandbytes.optim, sys.argv[1])([p], lr=1e-3)
for _ in sys.stdin:
    began = time.perf_counter()
    opt.step()
    seconds = time.perf_counter() - began
    tensors = [v for s in opt.state.values() for v in s.values() if isinstance(v, torch.Tensor) and v.numel() > 256]
    states = sum(v.nbytes for v in tensors) / p.numel()
    answer = {"seconds": seconds, "bytes": 12 + 2 * states, "version": bitsandbytes.__version__}
    print(json.dumps(answer), file=said, flush=True)
"""

    def __init__(self, python: str, kind: str, args: Any, **environment: str):
        self.children, self.moved, self.version = {}, 0.0, ""
        for t in args.threads:  # a library with an OpenMP of its own takes the number from the environment
            settings = {**os.environ, **environment, "OMP_NUM_THREADS": str(t)}
            command = [python, "-c", self.CHILD, kind, str(args.rows), str(args.cols), str(t)]
            pipe = subprocess.PIPE
            self.children[t] = subprocess.Popen(command, env=settings, stdin=pipe, stdout=pipe, text=True)

    def __call__(self) -> float:
        child = self.children[torch.get_num_threads()]
        child.stdin.write("step\n")
        child.stdin.flush()
        if not (line := child.stdout.readline()):
            raise RuntimeError(f"the other interpreter ended with {child.wait()}")
        answer = json.loads(line)
        self.moved, self.version = answer["bytes"], answer["version"]
        return answer["seconds"]

    def close(self) -> None:
        for child in self.children.values():
            child.stdin.close()
            child.wait()


def main() -> None:
    parser = timing.arguments(__doc__, "cpu_step.json")
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--cols", type=int, default=8192)
    parser.add_argument("--slow-rounds", type=int, default=5, help="of torchao and bitsandbytes")
    parser.add_argument("--fork-python", help="an interpreter whose `bitsandbytes` is bitsandbytes-cpu-fork")
    args = timing.parse(parser)
    if args.smoke:
        args.rows, args.cols, args.slow_rounds = 64, 1024, 2
    results = timing.start(args, parameters=args.rows * args.cols, shape=[args.rows, args.cols])
    timing.add(results, group("ours and torch", {**TORCH, **OURS}, {}, args), args)
    yardstick = {cpu_tables.YARDSTICK: TORCH[cpu_tables.YARDSTICK]}
    timing.add(results, group("weights that are codes", {**yardstick, **stored()}, {}, args), args)
    beside = yardstick | {name: OURS[name] for name in OURS if name.startswith("lowbit AdamW") and "int4" not in name}
    if rivals := slow(args.without):
        timing.add(results, group("slow rivals", {**beside, **rivals}, {}, args, args.slow_rounds), args)
    if args.fork_python:
        start = partial(Fork, args.fork_python, args=args)
        avx2 = {"BNB_CPU_DISABLE_AVX512": "1"}  # its library for AVX-512 knows one thread only, says its documentation
        forks = {
            "bitsandbytes-cpu-fork AdamW8bit": start("AdamW8bit"),
            "bitsandbytes-cpu-fork AdamW8bit, AVX2": start("AdamW8bit", **avx2),
            "bitsandbytes-cpu-fork AdamW4bit, AVX2": start("AdamW4bit", **avx2),
        }
        made = group("bitsandbytes-cpu-fork", beside, forks, args)
        results["environment"]["bitsandbytes-cpu-fork"] = next(iter(forks.values())).version
        timing.add(results, made, args)
        for fork in forks.values():
            fork.close()
    cpu_tables.show("step", results)


if __name__ == "__main__":
    sys.exit(main())
