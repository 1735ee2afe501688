"""Which formats should "8bit" and "4bit" mean? Measured two ways, over candidates and formats of other libraries.

traces   Gradients of a real training run are recorded and replayed through AdamW with each pair of formats and with
         fp32 states. Reported per pair: how far each update is from the fp32 one (relative error of the update, median
         over steps and tensors after step 20), and how far the parameters are at the end (relative to how far they
         moved).
loss     The same model is trained for real with each pair, same initialisation and batches per seed; reported is the
         paired difference of the final validation loss to fp32 states.

    python benchmarks/state_formats.py --out benchmarks/results/state_formats.json
    python benchmarks/state_formats.py --table benchmarks/results/state_formats.json > docs/state-formats-table.md

A trace shows the error of the format alone; the loss shows whether it matters. Run it again when a format is added.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import lowbit.optim
from lowbit.bench import data, machine, stats
from lowbit.bench.model import PRESETS, Llama
from lowbit.formats import format as find_format

# (name, first moment, second moment, stochastic rounding, candidate: no 256-entry search and within the byte budget)
PAIRS: list[tuple[str, str, str, bool, bool]] = [
    ("bf16 + bf16", "bf16", "bf16", False, False),
    ("int8 + sqrt8", "int8", "sqrt8", False, True),
    ("int8 + sqrt8, stochastic", "int8", "sqrt8", True, True),
    ("dyn8 + udyn8 (bitsandbytes)", "dyn8", "udyn8", False, False),
    ("e4m3 + e4m3 (torchao fp8)", "e4m3:256", "e4m3:256", False, False),
    ("int4 + sqrt4", "int4", "sqrt4", False, True),
    ("int4 + log4", "int4", "log4", False, True),
    ("dyn4 + sqrt4", "dyn4", "sqrt4", False, True),
    ("dyn4 + ulin4 (torchao, lpmm)", "dyn4", "ulin4", False, True),
    ("dyn4 + log4", "dyn4", "log4", False, True),
    ("nf4 + sqrt4", "nf4:128", "sqrt4", False, True),
    ("nf4 + log4", "nf4:128", "log4", False, True),
    ("nf4 + log4, stochastic", "nf4:128", "log4", True, True),
    ("dyn4 + solo4", "dyn4", "solo4", False, False),
    ("dyn4 + solo2, stochastic (SOLO)", "dyn4", "solo2", True, False),
]
STEPS, LR, SEQ, BATCH = 400, 3e-3, 64, 8


def states(first: str, second: str) -> dict[str, str]:
    """What `states=` takes."""
    return {"exp_avg": first, "exp_avg_sq": second}


def per_value(first: str, second: str) -> float:
    """Bytes of state per parameter."""
    return find_format(first).bytes_per_value + find_format(second).bytes_per_value


def model_of(seed: int) -> Llama:
    """The nano preset of `lowbit bench`."""
    return Llama(PRESETS["nano"], 256, SEQ).initialise(seed)


def loss_of(model: Llama, corpus: data.Corpus, seed: int, step: int) -> torch.Tensor:
    """Training loss on the batch of a step."""
    x, y = corpus.batch(seed, step, BATCH, SEQ)
    return F.cross_entropy(model(x).flatten(0, 1), y.flatten())


def factor(step: int, steps: int) -> float:
    """Warm-up over a tenth, then a cosine to 0.1: as in `lowbit bench`."""
    from lowbit.bench.train import learning_rate

    return learning_rate(step, steps, 0.1)


def optimizer(name: str, named: Any, wanted: Any, stochastic: bool, seed: int, steps: int) -> Any:
    """One of the optimizers that the loss is measured with."""
    common = {"lr": LR, "states": wanted, "seed": seed, "state_rounding": "stochastic" if stochastic else "nearest"}
    if name == "StableSPAM":
        return lowbit.optim.StableSPAM(named, total_steps=steps, reset_interval=steps // 4, **common)
    beta2, clip = (0.999, ()) if name == "Adam" else (0.95, (lowbit.optim.GlobalClip(1.0),))
    return lowbit.optim.AdamW(named, betas=(0.9, beta2), weight_decay=0.0, stabilize=clip, **common)


def record(corpus: data.Corpus, steps: int) -> tuple[dict[str, torch.Tensor], list[dict[str, torch.Tensor]]]:
    """Initial weights, and the gradients of a run with fp32 states."""
    model = model_of(0)
    named = {n: p for n, p in model.named_parameters() if p.dim() == 2}
    start = {n: p.detach().clone() for n, p in named.items()}
    opt = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)
    traces = []
    for step in range(steps):
        opt.param_groups[0]["lr"] = LR * factor(step, steps)
        opt.zero_grad()
        loss_of(model, corpus, 0, step).backward()
        traces.append({n: p.grad.clone() for n, p in named.items() if p.grad is not None})
        opt.step()
    return start, traces


def replay(start: dict[str, torch.Tensor], traces: list[dict[str, torch.Tensor]], beta2: float) -> list[dict]:
    """Every pair over the same gradients, beside fp32 states."""

    def fresh(wanted: Any, stochastic: bool) -> tuple[dict[str, torch.nn.Parameter], Any]:
        named = {n: torch.nn.Parameter(p.clone()) for n, p in start.items()}
        rounding = "stochastic" if stochastic else "nearest"
        every = lowbit.Policy([("*", wanted)])  # also the embedding: this is about formats
        return named, lowbit.optim.AdamW(
            named.items(),
            lr=LR,
            betas=(0.9, beta2),
            weight_decay=0.0,
            states=wanted,
            state_rounding=rounding,
            policy=every,
        )

    exact = fresh("fp32", False)
    runs = {pair[0]: fresh(states(pair[1], pair[2]), pair[3]) for pair in PAIRS}
    errors: dict[str, list[float]] = {name: [] for name in runs}
    for step, gradients in enumerate(traces):
        updates: dict[str, dict[str, torch.Tensor]] = {}
        for name, (named, opt) in {"exact": exact, **runs}.items():
            before = {n: p.detach().clone() for n, p in named.items()}
            for n, p in named.items():
                p.grad = gradients[n]
            opt.param_groups[0]["lr"] = LR * factor(step, len(traces))
            opt.step()
            updates[name] = {n: p.detach() - before[n] for n, p in named.items()}
        for name in runs if step >= 20 else ():
            for n, u in updates["exact"].items():
                errors[name].append(((updates[name][n] - u).norm() / u.norm()).item())
    out = []
    for name, (named, _) in runs.items():
        moved = [(exact[0][n] - start[n]).norm() for n in start]
        apart = [(named[n] - exact[0][n]).norm() for n in start]
        end = statistics.median((a / m).item() for a, m in zip(apart, moved, strict=True))
        out.append({"pair": name, "beta2": beta2, "update_error": statistics.median(errors[name]), "end_error": end})
    return out


def final_loss(corpus: data.Corpus, opt_name: str, wanted: Any, stochastic: bool, seed: int) -> float:
    """Train the nano model; validation loss in nats per byte on 256 fixed windows."""
    model = model_of(seed)
    opt = optimizer(opt_name, model.named_parameters(), wanted, stochastic, seed, STEPS)
    for step in range(STEPS):
        opt.param_groups[0]["lr"] = LR * factor(step, STEPS)
        opt.zero_grad()
        loss_of(model, corpus, seed, step).backward()
        opt.step()
    with torch.no_grad():
        x, y = corpus.validation(256, SEQ)
        return F.cross_entropy(model(x).flatten(0, 1), y.flatten()).item()


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    optimizers = list(dict.fromkeys(row["optimizer"] for row in results["loss"]))
    seeds = sorted({row["seed"] for row in results["loss"]})
    trace = {(row["pair"], row["beta2"]): row for row in results["traces"]}
    loss = {(row["optimizer"], row["pair"], row["seed"]): row["loss"] for row in results["loss"]}
    head = ["first + second moment", "bytes/parameter", "candidate", "update error β2 .999", "update error β2 .95"]
    head += [f"Δloss {o}" for o in optimizers]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, first, second, _, candidate in PAIRS:
        row = [name, f"{per_value(first, second):.3f}", "yes" if candidate else ""]
        row += [f"{trace[name, beta2]['update_error']:.3f}" for beta2 in (0.999, 0.95)]
        for o in optimizers:
            mine = {s: loss[o, name, s] for s in seeds if (o, name, s) in loss}
            d = stats.paired(mine, {s: loss[o, "fp32", s] for s in seeds if (o, "fp32", s) in loss})
            row.append("–" if d is None or d.low is None else f"{d.mean:+.3f} [{d.low:+.3f}, {d.high:+.3f}]")
        lines.append("| " + " | ".join(row) + " |")
    base = ", ".join(
        f"{o} {statistics.mean(loss[o, 'fp32', s] for s in seeds if (o, 'fp32', s) in loss):.3f}" for o in optimizers
    )
    m = results["machine"]
    note = (
        f"nano preset, {STEPS} steps, lr {LR}, seeds {seeds}, corpus sha256 {results['corpus']['sha256'][:12]}; "
        f"fp32 states: {base} nats/byte; 95 % intervals of paired differences; {m.get('cpu')}, torch {m.get('torch')}."
    )
    return "\n".join([*lines, "", note])


def main() -> None:
    """Run, or print the table of a finished run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--optimizers", default="fair Adam,StableSPAM")
    args = parser.parse_args()
    if args.table:
        print(table(json.loads(args.table.read_text())))
        return
    torch.set_num_threads(1)
    corpus = data.load()
    results: dict[str, Any] = {"machine": machine.describe(), "corpus": corpus.describe(), "traces": [], "loss": []}
    if args.out and args.out.exists():
        results = json.loads(args.out.read_text())  # go on where an earlier run stopped

    def save() -> None:
        if args.out:
            args.out.write_text(json.dumps(results, indent=1))

    if not results["traces"]:
        start, traces = record(corpus, 200)
        for beta2 in (0.999, 0.95):
            results["traces"] += replay(start, traces, beta2)
        save()
    done = {(r["optimizer"], r["pair"], r["seed"]) for r in results["loss"]}
    for seed in range(20, 20 + args.seeds):
        for opt_name in args.optimizers.split(","):
            for name, wanted, stochastic in [
                ("fp32", "fp32", False),
                *((p[0], states(p[1], p[2]), p[3]) for p in PAIRS),
            ]:
                if (opt_name, name, seed) in done:
                    continue
                began = time.perf_counter()
                value = final_loss(corpus, opt_name, wanted, stochastic, seed)
                results["loss"].append({"optimizer": opt_name, "pair": name, "seed": seed, "loss": value})
                save()
                print(
                    f"{opt_name:12} {name:34} seed {seed}: {value:.4f} ({time.perf_counter() - began:.0f} s)",
                    file=sys.stderr,
                )
    print(table(results))


if __name__ == "__main__":
    main()
