"""What a quantized linear layer costs on a CPU: forward and backward, against nn.Linear in fp32 and two libraries.

    python benchmarks/layers.py [--rounds 9] [--without torchao,bitsandbytes] [--recipes int4,nvfp4]

A layer of 2048 × 2048 on a batch of 2048, in fp32, without bias; input and weight need gradients. A case is one forward
and one backward pass with fresh gradients. Everything is multiplied in fp32: what a recipe costs is what it takes to
quantize, and to save and load codes. Rivals: torchao's int8 mixed-precision training, which multiplies in int8, and
bitsandbytes' Linear4bit, whose weight is frozen (no wgrad), beside our `qlora-nf4` with a frozen weight.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import cpu_tables
import timing
import torch
from torch import nn

import lowbit
from lowbit.nn import QuantLinear


def passes(layer: nn.Module, x: torch.Tensor, gy: torch.Tensor) -> Callable[[], None]:
    """Forward and backward, gradients made anew."""
    learned = [p for p in (*layer.parameters(), x) if p.requires_grad]

    def work() -> None:
        for p in learned:
            p.grad = None
        layer(x).backward(gy)

    return work


def ours(side: int, names: list[str]) -> dict[str, nn.Module]:
    """nn.Linear, and a layer of each recipe; `qlora-nf4` with a frozen weight, as it is used."""
    made: dict[str, nn.Module] = {cpu_tables.LINEAR: nn.Linear(side, side, bias=False)}
    for name in names:
        made[f"lowbit {name}"] = QuantLinear(side, side, bias=False, recipe=name)
    if "qlora-nf4" in names:
        made["lowbit qlora-nf4"].requires_grad_(False)  # as `quantize_` does
    return made


def torchao(side: int) -> nn.Module:
    """All three matmuls in int8, one scale a row."""
    from torchao.prototype.quantized_training import Int8MixedPrecisionTrainingConfig
    from torchao.quantization import quantize_

    layer = nn.Sequential(nn.Linear(side, side, bias=False))
    quantize_(layer, Int8MixedPrecisionTrainingConfig())
    return layer


def bitsandbytes(side: int) -> nn.Module:
    """A frozen NF4 weight: forward, and the input's gradient."""
    from bitsandbytes.nn import Linear4bit

    layer = Linear4bit(side, side, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    return layer.to("cpu")


RIVALS = {"torchao int8 mixed-precision": torchao, "bitsandbytes Linear4bit nf4": bitsandbytes}


def rivals(side: int, without: set[str]) -> dict[str, Callable[[], nn.Module]]:
    """Those that are not to be left out."""
    return {name: lambda make=make: make(side) for name, make in RIVALS.items() if name.split()[0] not in without}


def rival_case(make: Callable[[], nn.Module], x: torch.Tensor, gy: torch.Tensor) -> timing.Case:
    """Made at its first turn, so that a rival which cannot even be built is a result."""
    found: list[timing.Case] = []

    def case() -> float:
        if not found:
            found.append(timing.timed(passes(make(), x, gy)))
        return found[0]()

    return case


def main() -> None:
    parser = timing.arguments(__doc__, "cpu_layers.json")
    parser.add_argument("--recipes", default=",".join(lowbit.recipes()))
    args = timing.parse(parser)
    side = 128 if args.smoke else 2048
    torch.manual_seed(0)
    x, gy = torch.randn(side, side, requires_grad=True), torch.randn(side, side)
    layers = ours(side, args.recipes.split(","))
    cases = {name: timing.timed(passes(layer, x, gy)) for name, layer in layers.items()}
    results = timing.start(args, layer=side, batch=side)
    timing.add(results, timing.group(cpu_tables.PASSES, cases, args), args)
    slow = {cpu_tables.LINEAR: cases[cpu_tables.LINEAR]}
    slow |= {name: rival_case(make, x, gy) for name, make in rivals(side, args.without).items()}
    if len(slow) > 1:  # some take seconds
        timing.add(results, timing.group(cpu_tables.SLOW, slow, args, min(args.rounds, 3)), args)
    cpu_tables.show("layers", results)


if __name__ == "__main__":
    sys.exit(main())
