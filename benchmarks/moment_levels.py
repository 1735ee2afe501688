"""Which levels should a 4-bit moment have? One moment in 4 bits, the other in fp32, over recorded gradients.

    python benchmarks/moment_levels.py --out benchmarks/results/moment_levels.json

Reported is the error of an AdamW update against fp32 states, as in `state_formats.py`: median over tensors and over
steps after step 20. The winners became `log4` and `nf4:128` (docs/decisions/001-state-formats.md).
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import state_formats
import torch

import lowbit.optim
from lowbit.bench import data, machine
from lowbit.formats import Format
from lowbit.formats import format as find_format


def levels(name: str, values: list[float]) -> Format:
    """An unsigned 4-bit codebook."""
    return Format(name, 4, False, "", table=tuple(values), ties="down")


def octaves(step: float, zero: bool) -> list[float]:
    """Sixteen levels `step` octaves apart up to 1, the lowest an exact 0 if wanted."""
    spaced = [2.0 ** (-k * step) for k in range(15 - zero, -1, -1)]
    return [0.0, *spaced] if zero else spaced


SECOND = [
    *(find_format(name) for name in ("sqrt4", "ulin4", "solo4")),
    *(levels(f"0 and steps of {s:.3g} octaves", octaves(s, True)) for s in (1.0, 0.5, 0.4, 1 / 3, 0.3, 0.25)),
    levels("steps of 0.333 octaves", octaves(1 / 3, False)),
    levels("(k/15)^1.5", [(k / 15) ** 1.5 for k in range(16)]),
    levels("(k/15)^3", [(k / 15) ** 3 for k in range(16)]),
]
FIRST = [find_format(name) for name in ("int4", "dyn4", "nf4:128", "e2m1:128")]


def measure(beta2: float, start: dict, traces: list) -> list[dict]:
    """Every candidate over the same gradients, beside fp32 states."""
    cases = [("fp32", "fp32"), *(("fp32", v) for v in SECOND), *((m, "fp32") for m in FIRST)]
    runs = []
    for first, second in cases:
        named = {n: torch.nn.Parameter(p.clone()) for n, p in start.items()}
        wanted = {"exp_avg": first, "exp_avg_sq": second}
        every = lowbit.Policy([("*", wanted)])
        options = {"lr": state_formats.LR, "betas": (0.9, beta2), "weight_decay": 0.0, "states": wanted}
        runs.append((named, lowbit.optim.AdamW(named.items(), policy=every, **options)))
    errors: list[list[float]] = [[] for _ in cases]
    for step, gradients in enumerate(traces):
        updates = []
        for named, opt in runs:
            before = {n: p.detach().clone() for n, p in named.items()}
            for n, p in named.items():
                p.grad = gradients[n]
            opt.param_groups[0]["lr"] = state_formats.LR * state_formats.factor(step, len(traces))
            opt.step()
            updates.append({n: p.detach() - before[n] for n, p in named.items()})
        for found, update in zip(errors, updates, strict=True):
            if step >= 20:
                found += [((update[n] - u).norm() / u.norm()).item() for n, u in updates[0].items()]
    rows = []
    for (first, second), found in zip(cases, errors, strict=True):
        rows.append({"first": str(first), "second": str(second), "beta2": beta2, "error": statistics.median(found)})
    return rows


def main() -> None:
    """Run and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    torch.set_num_threads(1)
    corpus = data.load()
    start, traces = state_formats.record(corpus, 120)
    rows = [row for beta2 in (0.999, 0.95) for row in measure(beta2, start, traces)]
    out.write_text(json.dumps({"machine": machine.describe(), "corpus": corpus.describe(), "rows": rows}, indent=1))
    for row in rows:
        print(f"β2 {row['beta2']:<5}  m {row['first']:9} v {row['second']:28} {row['error']:.3f}")


if __name__ == "__main__":
    main()
