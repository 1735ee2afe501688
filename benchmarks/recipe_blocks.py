"""Which block length do the recipes `int4` and `fp4` take? The loss of a nano LLaMA, paired by seed with float.

    python benchmarks/recipe_blocks.py [--seeds 4] [--out benchmarks/results/recipe_blocks.json]

Muon is the probe: with Adam at this size the formats' differences drown in the run-to-run noise (±0.03 nats), Muon's
runs repeat to ±0.01. All seven linears of each layer are quantized, weights and activations; the rest is fp32.
"""

import argparse
import json
import math
import platform
import statistics
import time

import torch
import torch.nn.functional as F

import lowbit.bench.data
from lowbit.bench.model import PRESETS, Llama
from lowbit.nn import Recipe, quantize_

CASES = ("float", "int4:16", "int4:32", "int4:64", "e2m1:16", "e2m1:32")
STEPS, BATCH, WARMUP = 400, 8, 40
MUON_LR, ADAM_LR = 1e-2, 3e-3


def run(case: str, seed: int, corpus: lowbit.bench.data.Corpus) -> float:
    shape = PRESETS["nano"]
    model = Llama(shape).initialise(seed)
    if case != "float":
        quantize_(model, Recipe(weight=case, activation=case))
    inner = [p for n, p in model.named_parameters() if p.dim() == 2 and n.startswith("layers.")]
    outer = [p for n, p in model.named_parameters() if p.dim() != 2 or not n.startswith("layers.")]
    optimizers = [
        torch.optim.Muon(inner, lr=MUON_LR, weight_decay=0.0),
        torch.optim.AdamW(outer, lr=ADAM_LR, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    for step in range(STEPS):
        x, y = corpus.batch(seed, step, BATCH, shape.seq)
        progress = max(0, step - WARMUP) / (STEPS - WARMUP)
        factor = min(1.0, (step + 1) / WARMUP) * (0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2)
        for optimizer, lr in zip(optimizers, (MUON_LR, ADAM_LR), strict=True):
            optimizer.param_groups[0]["lr"] = lr * factor
        F.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()
    x, y = corpus.validation(512, shape.seq)
    with torch.no_grad():
        return F.cross_entropy(model(x).flatten(0, 1), y.flatten()).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--out", default="benchmarks/results/recipe_blocks.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    corpus = lowbit.bench.data.load()
    loss: dict[str, list[float]] = {case: [] for case in CASES}
    for seed in range(arguments.seeds):
        for case in CASES:
            began = time.perf_counter()
            loss[case].append(run(case, seed, corpus))
            cost = loss[case][-1] - loss["float"][seed]
            print(
                f"seed {seed}  {case:8}  {loss[case][-1]:.4f}  {cost:+.4f}  {time.perf_counter() - began:.0f} s",
                flush=True,
            )
    cost = {c: [a - b for a, b in zip(loss[c], loss["float"], strict=True)] for c in CASES[1:]}
    for case, values in cost.items():
        spread = statistics.stdev(values) if len(values) > 1 else math.nan
        print(f"{case:8}  cost {statistics.mean(values):+.4f} ± {spread:.4f} nats a byte, n = {len(values)}")
    result = {
        "what": "validation loss, nats a byte; nano LLaMA, Muon 1e-2 and AdamW 3e-3, 400 steps of 8 × 64 bytes",
        "corpus": corpus.describe(), "torch": torch.__version__, "machine": platform.processor() or platform.machine(),
        "loss": loss, "cost_against_float": cost,
    }  # fmt: skip
    with open(arguments.out, "w") as file:
        file.write(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
