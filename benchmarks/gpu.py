"""Is it right on this GPU, and how fast? Against torch, torchao, bitsandbytes and FlashOptim, and a copy of memory.

    python benchmarks/gpu.py [--quick] [--sections copy,step] [--without torchao] [--out DIR]

Each section writes `gpu_SECTION.json` and prints a table; `gpu_tables.py` makes docs/gpu-speed.md of them. Times are
those of CUDA events around as many calls as take a fiftieth of a second, in turn and in shuffled order, with a copy of
memory in every round (`timing.py` says why). Gradients have the parameters' dtype; all optimizers of one dtype share
their parameters, so that a billion of them fit. A rival that is not installed or fails is named; it stops nothing.

`--quick` leaves out what takes minutes: torchao's compiler on many shapes. `--smoke` is for
machines without a GPU: tiny sizes on the CPU, to see that it runs; its times mean nothing.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_check
import gpu_codec
import gpu_step
import gpu_tables
import timing
import torch
from gpu_timing import probes, start

from lowbit.gpu import runs


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


SECTIONS: dict[str, Callable[[argparse.Namespace, torch.device], dict[str, Any]]] = {
    "check": gpu_check.check,
    "copy": copy,
    "step": gpu_step.step,
    "codec": gpu_codec.codec,
    "layers": gpu_codec.layers,
    "linear": gpu_codec.linear,
}
RIVALS = ("torchao", "bitsandbytes", "flashoptim")


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
        if not runs(torch.device("cpu")):  # a CPU has no kernels for products; the tests' emulator does
            args.sections = [name for name in args.sections if name != "linear"]
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
