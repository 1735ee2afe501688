"""Write the tables of docs/gpu-speed.md from the committed results of gpu.py.

python benchmarks/gpu_tables.py            write them
python benchmarks/gpu_tables.py --check    fail if they are not what the results say (a test does this)
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from typing import Any

import cpu_tables
import timing
from cpu_tables import NONE, extent, spread

from lowbit.bench.tables import Grid

PAGE = timing.ROOT / "docs" / "gpu-speed.md"
YARDSTICK = "torch AdamW fused"
COPY = "probe: copy"
HOST = "host"
CODEC, LAYERS = "codec", "layers"
DENSE = "torch bf16 linear"
IN_GRAPH = ", in a graph"
STEP_CAPTION = (
    "Picoseconds a parameter: median [quartiles] of the rounds; × torch fused: time over that of torch's fused fp32 "
    "AdamW, median of the ratios within each round. B/parameter: what must be moved at least (parameter and states to "
    "and fro, the gradient once a sweep), what that makes in GB/s, and that as a share of what the copy moved in the "
    "same round. States, and what a step needs beyond them, in bytes per parameter. First: seconds of the first step, "
    "which compiles and allocates."
)


def times(case: dict[str, Any]) -> list[float]:
    """Its seconds, one a round."""
    (found,) = case["seconds"].values()
    return found


def check(results: dict[str, Any]) -> list[Grid]:
    """How many of the checks found the reference's bits, and which did not."""
    verdicts = results["groups"][0]["verdicts"]
    rows = []
    for kind in dict.fromkeys(name.split()[0] for name in verdicts):
        its = [said for name, said in verdicts.items() if name.startswith(f"{kind} ")]
        rows.append([f"{kind}s with the reference's bits", f"{its.count('equal')} of {len(its)}"])
    rows += [[name, said] for name, said in verdicts.items() if said != "equal"]
    return [Grid("The same bits as the reference on the CPU", ["check", "result"], rows)]


def copy(results: dict[str, Any]) -> list[Grid]:
    """What memory can do, by size."""
    rows = []
    for name, case in results["groups"][0]["cases"].items():
        rates = [case["bytes"] / s for s in times(case)]
        rows.append([name, spread(times(case), 1e6), spread(rates, 1e-9), extent(rates, 1e-9)])
    caption = "Bytes read and written; median [quartiles]. Small ones stay in the cache."
    return [Grid("Copies of memory", ["copy", "µs", "GB/s", "min–max"], rows, caption)]


def step(results: dict[str, Any]) -> list[Grid]:
    """A table for each list of parameters, and what a step costs the host."""
    heads = ["step", "ps/parameter", "× torch fused", "B/parameter", "GB/s", "× copy", "states B", "more B"]
    made = []
    for group in results["groups"]:
        if group["title"] == HOST:
            rows = [[name, spread(times(case), 1e6)] for name, case in group["cases"].items()]
            caption = "75 tensors of 64 values, fp32: median [quartiles]."
            made.append(Grid("What a step costs where there is nothing to compute", ["step", "µs"], rows, caption))
            continue
        n, probe = group["parameters"], group["cases"][COPY]
        yardstick = group["cases"].get(YARDSTICK)
        rows = []
        for name, case in group["cases"].items():
            own, rate = times(case), case["bytes"] / statistics.median(times(case)) / 1e9
            share = timing.median_ratio(times(probe), own) * case["bytes"] / probe["bytes"]
            if name.startswith("probe"):
                rows.append([name, *[NONE] * 3, f"{rate:.0f}", f"{share:.2f}", *[NONE] * 3])
                continue
            ratio = f"{timing.median_ratio(own, times(yardstick)):.2f}" if yardstick else NONE
            speed = [spread(own, 1e12 / n), ratio]
            moved = [f"{case['bytes'] / n:.2f}", f"{rate:.0f}", f"{share:.2f}"]
            more = case["peak_bytes"]
            held = [f"{case['state_bytes'] / n:.2f}", NONE if more is None else f"{more / n:.2f}"]
            rows.append([name, *speed, *moved, *held, f"{case['first_seconds']:.1f}"])
        title = (
            f"{group['title']}: a step of {n:,} parameters in {group['tensors']} tensor{'s'[: group['tensors'] > 1]}"
        )
        made.append(Grid(title, [*heads, "first s"], rows, "" if made else STEP_CAPTION))
    return made


def codec(results: dict[str, Any]) -> list[Grid]:
    """Time and rate of each direction of each format."""
    (group,) = results["groups"]
    rows, cols = results["shape"]
    probe, body = group["cases"][COPY], []
    for name, case in group["cases"].items():
        own = times(case)
        share = timing.median_ratio(times(probe), own) * case["bytes"] / probe["bytes"]
        rate = case["bytes"] / statistics.median(own) / 1e9
        body.append([name, spread(own, 1e6), f"{case['bytes'] / rows / cols:.2f}", f"{rate:.0f}", f"{share:.2f}"])
    caption = (
        f"Microseconds: median [quartiles]; bytes a value that must be moved at least, what that makes in GB/s, and "
        f"that as a share of what the copy moved in the same round. Blocks of {results['block']}; the copy is of 1 GiB."
    )
    title = f"Quantize and dequantize {rows} × {cols} bf16"
    return [Grid(title, ["codec", "µs", "B/value", "GB/s", "× copy"], body, caption)]


def layers(results: dict[str, Any]) -> list[Grid]:
    """A layer's forward and backward, and the same as a multiple of the dense layer's."""
    (group,) = results["groups"]
    dense = times(group["cases"][DENSE])
    flops = 6 * results["tokens"] * results["side"] ** 2
    rows = []
    for name, case in group["cases"].items():
        if not name.startswith("probe"):
            own = times(case)
            rate = f"{flops / statistics.median(own) / 1e12:.0f}"
            rows.append([name, spread(own, 1e3), f"{timing.median_ratio(own, dense):.2f}", rate])
    side = results["side"]
    title = f"Forward and backward of a layer of {side} × {side}, {results['tokens']} tokens, bf16"
    caption = "Simulated: operands are rounded to what 4-bit codes would stand for, then multiplied in bf16."
    return [Grid(title, ["layer", "ms", "× dense", "TFLOP/s"], rows, caption)]


def linear(results: dict[str, Any]) -> list[Grid]:
    """Products with a packed weight, by the number of rows."""
    side, body = results["side"], []
    for group in results["groups"]:
        flops = 2 * group["rows"] * side**2
        for name, case in group["cases"].items():
            if not name.startswith("probe"):
                own, dense = times(case), times(group["cases"][DENSE + IN_GRAPH * name.endswith(IN_GRAPH)])
                middle = statistics.median(own)
                ratio, rate = f"{timing.median_ratio(own, dense):.2f}", f"{case['bytes'] / middle / 1e9:.0f}"
                body.append([str(group["rows"]), name, spread(own, 1e6), ratio, rate, f"{flops / middle / 1e12:.0f}"])
    caption = "Microseconds: median [quartiles]; GB/s of the bytes that must be moved at least: rows, weight, result."
    title = f"Products of bf16 rows with a packed weight of {side} × {side}"
    return [Grid(title, ["rows", "product", "µs", "× torch bf16", "GB/s", "TFLOP/s"], body, caption)]


TABLES = {"check": check, "copy": copy, "step": step, "codec": codec, "layers": layers, "linear": linear}


def conditions(results: dict[str, Any]) -> str:
    """Where, with what and how long it was measured."""
    e, before, after = results["environment"], results["before"], results["after"]
    card = ", ".join(f"{k} {v}" if k != "name" else str(v) for k, v in e["gpu"].items())
    packages = ", ".join(
        f"{n} {e[n]}" for n in ("torch", "triton", "torchao", "bitsandbytes", "flashoptim") if e.get(n)
    )
    named = [its for g in results["groups"] for its in (g, *g["cases"].values())]
    backends = {its["backend"] for its in named if its.get("backend")}
    ran = f" lowbit's backend: {', '.join(sorted(backends))}." if backends else ""
    said = [f"{n} did not run: {why}." for g in results["groups"] for n, why in g["failed"].items()]
    said += [
        f"{g['title']}: {n} took {seconds:.2f} s and was timed once only."
        for g in results["groups"]
        for n, seconds in g.get("slow", {}).items()
    ]
    minutes = f"{(after['time'] - before['time']) / 60:.1f} minutes"
    rounds = f"{results['groups'][0]['rounds']} rounds"
    head = f"`{results['command']}`, commit {e['commit']}; {card}; {e['cpu']}, {e['cores']} cores; {packages}."
    return " ".join([f"{head} {rounds}, {minutes}.{ran}", *dict.fromkeys(said)])


def show(name: str, results: dict[str, Any]) -> None:
    """The tables on the terminal."""
    cpu_tables.show_grids(TABLES[name](results), conditions(results))


def section(name: str) -> str:
    """One section's part of the page."""
    path = timing.RESULTS / f"gpu_{name}.json"
    if not path.exists():
        return f"Not measured yet: `python benchmarks/gpu.py --sections {name}`."
    results = json.loads(path.read_text())
    return cpu_tables.prose(TABLES[name](results), conditions(results))


def main() -> int:
    """Write, or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    return cpu_tables.write(PAGE, {name: section(name) for name in TABLES}, parser.parse_args().check)


if __name__ == "__main__":
    sys.exit(main())
