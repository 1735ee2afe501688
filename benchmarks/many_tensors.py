"""What does it cost that a model's parameters are many tensors? A 60M LLaMA in 1, 75 and 300 of them.

    python benchmarks/many_tensors.py [--rounds 15]

75 tensors: vocabulary 32,000, width 512, 8 layers, feed-forward 1376, a head of its own. 300: each of them cut into
four, by rows. 1: a matrix of 8192 rows with as many values, or nearly: whole blocks of 256; times are per parameter.
`host` is a step of 75 tensors with 64 values each: what is left of a step when there is nothing to compute.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

import cpu_tables
import timing
import torch

from lowbit.optim import AdamW

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "torch fused": partial(torch.optim.AdamW, fused=True),
    "torch foreach": partial(torch.optim.AdamW, foreach=True),
    "lowbit 8bit": partial(AdamW, states="8bit"),
    "lowbit 4bit": partial(AdamW, states="4bit"),
}
HOST_STEPS = 20  # a sample


def llama(vocab: int = 32000, dim: int = 512, layers: int = 8, ffn: int = 1376) -> list[tuple[int, ...]]:
    """The shapes of its parameters."""
    layer = [(dim,), *[(dim, dim)] * 4, (dim,), (ffn, dim), (ffn, dim), (dim, ffn)]
    return [(vocab, dim), *layer * layers, (dim,), (vocab, dim)]


def cases(shapes: list[tuple[int, ...]]) -> dict[str, tuple[Callable[[], object], int]]:
    """Each optimizer's step over parameters of these shapes, and how many values they have; all share them."""
    params = [torch.nn.Parameter(torch.randn(shape) * 0.02) for shape in shapes]
    for p in params:
        p.grad = torch.randn_like(p) * 1e-3
    count = sum(p.numel() for p in params)
    return {name: (maker(params, lr=1e-3).step, count) for name, maker in OPTIMIZERS.items()}


def per_parameter(work: Callable[[], object], count: int) -> timing.Case:
    """Seconds a parameter."""
    case = timing.timed(work)
    return lambda: case() / count


def main() -> None:
    args = timing.parse(timing.arguments(__doc__, "cpu_many_tensors.json", rounds=15))
    shapes = llama(vocab=256, dim=128, layers=8, ffn=192) if args.smoke else llama()
    quarters = [(shape[0] // 4, *shape[1:]) for shape in shapes for _ in range(4)]
    count = sum(torch.Size(shape).numel() for shape in shapes)
    rows = 256 if args.smoke else 8192
    layouts = {"1": [(rows, -(-count // (rows * 256)) * 256)], "75": shapes, "300": quarters}
    assert [len(its) for its in layouts.values()] == [1, 75, 300]
    many = {
        f"{name}, {layout}": per_parameter(*case)
        for layout, its in layouts.items()
        for name, case in cases(its).items()
    }
    host = {name: timing.timed(work, HOST_STEPS) for name, (work, _) in cases([(64,)] * 75).items()}
    results = timing.start(args, parameters=count, tensors=list(layouts))
    timing.add(results, timing.group(cpu_tables.MANY, many, args), args)
    timing.add(results, timing.group(cpu_tables.HOST, host, args), args)
    cpu_tables.show("many_tensors", results)


if __name__ == "__main__":
    sys.exit(main())
