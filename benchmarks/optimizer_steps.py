"""How long does a step of each optimizer take on a CPU, beside torch's fused AdamW?

    python benchmarks/optimizer_steps.py [--rounds 5] [--threads 2] [--only "AdamW;Lion"]

The tensors of two layers of a 60M LLaMA and an embedding and a head of 4,096 tokens, 10.5M parameters in fp32. Each
optimizer is a group of rounds with its own yardstick. Not in the times: new projectors of GaLore, Fira and APOLLO,
which one step in 200 makes.
"""

from __future__ import annotations

import gc
import statistics
import sys
from dataclasses import replace
from typing import Any

import optimizer_losses
import timing
import torch

from lowbit.bench.model import Llama, Preset, preset
from lowbit.bench.report import markdown_grid
from lowbit.bench.tables import Grid

YARDSTICK = "torch AdamW fused"
LAYERS, VOCAB = 2, 4096
LR, STEPS = 1e-6, 10_000  # so that nothing grows, and no reset or projector is due


def group(name: str, shape: Preset, args: Any) -> dict[str, Any]:
    """Time an optimizer with states of each format, and the yardstick; all step the same parameters."""
    gc.collect()
    model = Llama(shape).initialise(0)
    for p in model.parameters():
        p.grad = torch.randn_like(p) * 1e-3
    make, _ = optimizer_losses.OPTIMIZERS[name]
    cases = {YARDSTICK: timing.timed(torch.optim.AdamW(model.parameters(), lr=LR, fused=True).step)}
    for states in optimizer_losses.STATES:
        setup = optimizer_losses.Setup(model, shape, LR, STEPS, {"states": states})
        cases[f"lowbit {states}"] = timing.timed(make(setup).step)
    return timing.group(name, cases, args)


def ratio(results: dict[str, Any], name: str, states: str) -> str:
    """The median ratio of an optimizer's step to the yardstick's."""
    for made in results["groups"]:
        if made["title"] == name:
            ours, its = (made["cases"][case]["seconds"] for case in (f"lowbit {states}", YARDSTICK))
            threads = next(iter(ours))
            return f"{timing.median_ratio(ours[threads], its[threads]):.2f}"
    return "not timed"


def table(results: dict[str, Any]) -> Grid:
    """Ratios by optimizer and format."""
    rows = [[n, *(ratio(results, n, s) for s in optimizer_losses.STATES)] for n in optimizer_losses.OPTIMIZERS]
    return Grid("", ["optimizer", *optimizer_losses.STATES], rows, conditions(results))


def conditions(results: dict[str, Any]) -> str:
    """Where and how it was timed."""
    e, groups = results["environment"], results["groups"]
    yardstick = [t for g in groups for t in next(iter(g["cases"][YARDSTICK]["seconds"].values()))]
    threads = next(iter(groups[0]["cases"][YARDSTICK]["seconds"]))
    return (
        f"`{results['command']}`, commit {e['commit']}; {e['cpu']}, {e['isa']}, torch {e['torch']}; {threads} threads, "
        f"{groups[0]['rounds']} rounds; a step of {YARDSTICK} takes {1000 * statistics.median(yardstick):.1f} ms."
    )


def main() -> None:
    """Time all, or some."""
    parser = timing.arguments(__doc__, "optimizer_steps.json", rounds=5)
    parser.add_argument("--only", help="optimizers, separated by semicolons")
    parser.set_defaults(threads=[2])
    args = timing.parse(parser)
    shape = replace(preset("60m"), layers=1 if args.smoke else LAYERS, vocab=256 if args.smoke else VOCAB)
    if args.smoke:
        shape = replace(shape, hidden=64, ff=192, heads=2)
    results = timing.start(args, parameters=shape.parameters())
    for name in args.only.split(";") if args.only else optimizer_losses.OPTIMIZERS:
        timing.add(results, group(name, shape, args), args)
    print(markdown_grid(table(results)), conditions(results), sep="\n")


if __name__ == "__main__":
    sys.exit(main())
