"""How much memory a training step of a LLaMA of 1.3 billion parameters takes, with weights and states in 4 bits.

The model is built on the meta device and gets its memory block by block, as codes and scales; gradients are released
in backward (`lowbit.optim.step_in_backward`); states are 4-bit, embedding and head kept apart as the options say. Each
optimizer runs in a process of its own, with one thread, which measures its peak resident memory less what was resident
after `import torch`. The results hold what `lowbit plan` says of the same step, which is computed without running it.

python benchmarks/one_billion.py                 all of them, into results/one_billion.json, and the table in the docs
python benchmarks/one_billion.py --only AdamS    one of them, printed
python benchmarks/one_billion.py --check         fail if docs/stored-weights.md is not what the results say
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "one_billion.json"
PAGE = ROOT / "docs" / "stored-weights.md"
BEGIN, END = "<!-- one billion -->", "<!-- /one billion -->"
GOALS = {"AdamS": 2.2e9, "AdamW": 3.0e9, "AdamMini": 2.2e9, "StableSPAM": None}
TOKENS = 64


def status(key: str) -> int:
    """Bytes of resident memory, now (VmRSS) or at most so far (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key + ":"))


def child(optimizer: str, model: str, store: str, embedding: str) -> dict[str, Any]:
    """One step in this process, which has imported nothing yet."""
    import torch

    before = status("VmRSS")
    import torch.nn.functional as F

    import lowbit
    from lowbit.bench.model import PRESETS, Llama

    marks = {"torch": before, "lowbit": status("VmRSS")}
    recipe = lowbit.Recipe(store=store, embedding=embedding)
    with torch.device("meta"):
        llama = Llama(PRESETS[model], seq=TOKENS).bfloat16()
    lowbit.quantize_(llama, recipe)
    torch.manual_seed(0)
    lowbit.materialize_(llama)
    marks["weights"] = status("VmRSS")
    heads = {"num_heads": PRESETS[model].heads} if optimizer == "AdamMini" else {}
    opt = getattr(lowbit.optim, optimizer)(
        llama.named_parameters(), lr=1e-3, states="4bit", roles=lowbit.roles(llama), **heads
    )
    marks["states"] = status("VmRSS")
    tokens = torch.randint(0, PRESETS[model].vocab, (1, TOKENS + 1))

    def loss() -> torch.Tensor:
        return F.cross_entropy(llama(tokens[:, :-1]).flatten(0, 1).float(), tokens[:, 1:].flatten())

    start, losses = time.perf_counter(), []
    with lowbit.optim.step_in_backward(opt):
        for _ in range(2):  # the second with what the first has left behind
            value = loss()
            value.backward()
            opt.step()
            losses.append(value.item())
            del value
    seconds = (time.perf_counter() - start) / 2
    told = opt.explain()
    return {
        "peak": status("VmHWM") - before,
        "marks": {name: value - before for name, value in marks.items()},
        "weights": told.weight_bytes,
        "states": told.state_bytes,
        "parameters": told.parameters,
        "losses": losses,
        "seconds": seconds,
        "counters": opt.counters(),
        "threads": torch.get_num_threads(),
    }


def measured(optimizer: str, model: str, store: str, embedding: str) -> dict[str, Any]:
    """What a process of its own finds, and what the plan says."""
    words = [sys.executable, __file__, "--child", optimizer, model, store, embedding]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise RuntimeError(f"{optimizer}: {done.stderr.strip().splitlines()[-1]}")
    sys.path.insert(0, str(ROOT))
    from lowbit.bench.plan import Choice, plan

    planned = plan(Choice(model, optimizer, "4bit", store=store, embedding=embedding, batch=1, seq=TOKENS))
    return {**json.loads(done.stdout.splitlines()[-1]), "plan": asdict(planned)}


def table(results: dict[str, Any]) -> str:
    """The results in Markdown."""
    lines = [
        "| optimizer | weights, GB | states, GB | peak, GB | `lowbit plan` says | goal |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, run in results["runs"].items():
        goal = GOALS.get(name)
        met = goal is not None and run["peak"] <= goal
        verdict = "–" if goal is None else f"≤ {goal / 1e9:.1f}: {'reached' if met else '**missed**'}"
        said = run["plan"]["released"]
        sizes = " | ".join(f"{x / 1e9:.2f}" for x in (run["weights"], run["states"], run["peak"], said))
        lines.append(f"| {name} | {sizes} | {verdict} |")
    first = next(iter(results["runs"].values()))
    machine = results["machine"]
    lines += [
        "",
        f"{first['parameters'] / 1e9:.2f} billion parameters, linear layers kept as {results['store']}, the embedding "
        f"as {results['embedding']}, head and norms in bf16, states in 4 bits, batch 1 × {TOKENS} tokens, two steps, "
        f"gradients released in backward. The peak is of resident memory above `import torch`, the code that a step "
        f"needs included, on {machine['cpu']}, torch {machine['torch']}. Made by `python benchmarks/one_billion.py`.",
    ]
    return "\n".join(lines)


def page(results: dict[str, Any]) -> str:
    """docs/stored-weights.md with the table as it is now."""
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{table(results)}\n{END}{rest.split(END)[1]}"


def main() -> int:
    """Measure, write, or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", nargs=4, metavar="WORD", help=argparse.SUPPRESS)
    parser.add_argument("--only", choices=GOALS)
    parser.add_argument("--model", default="1b")
    parser.add_argument("--store", default="int4")
    parser.add_argument("--embedding", default="int8")
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(*args.child)))
        return 0
    if args.check:
        stale = page(json.loads(RESULTS.read_text())) != PAGE.read_text(encoding="utf-8")
        if stale:
            print(f"{PAGE.name} is not what {RESULTS.name} says; run benchmarks/one_billion.py", file=sys.stderr)
        return int(stale)
    how = {"model": args.model, "store": args.store, "embedding": args.embedding}
    if args.only:
        print(json.dumps(measured(args.only, **how), indent=1))
        return 0
    import timing  # the script beside this one

    results = {**how, "machine": timing.machine.describe(), "commit": timing.commit(), "runs": {}}
    for name in GOALS:
        results["runs"][name] = measured(name, **how)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        PAGE.write_text(page(results), encoding="utf-8")
    print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
