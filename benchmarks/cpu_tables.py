"""Write the tables of docs/cpu-speed.md from the committed results of step.py, codec.py, layers.py and many_tensors.py.

python benchmarks/cpu_tables.py            write them
python benchmarks/cpu_tables.py --check    fail if they are not what the results say (a test does this)
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timing

from lowbit.bench.report import markdown_grid
from lowbit.bench.tables import Grid

PAGE = timing.ROOT / "docs" / "cpu-speed.md"
YARDSTICK = "torch AdamW fused"
NONE = "n/a"


@dataclass(frozen=True)
class Goal:
    """A ratio of two cases of one group that was promised: at most `must`, or at least where `aim` is above it."""

    what: str
    group: str
    case: str
    against: str
    must: float
    aim: float

    def verdict(self, results: dict[str, Any], threads: str) -> str:
        cases = next((g["cases"] for g in results["groups"] if g["title"] == self.group), {})
        if self.case not in cases or self.against not in cases:
            return "not measured"
        value = timing.median_ratio(*(cases[n]["seconds"][threads] for n in (self.case, self.against)))
        sign = -1 if self.aim > self.must else 1
        if sign * value > sign * self.must:
            return f"**{value:.3g}, missed**"
        return f"{value:.3g}, reached" if sign * value > sign * self.aim else f"{value:.3g}, beyond the aim"


OURS, SLOW = "ours and torch", "slow rivals"
FRESH, KEPT, LAYERS = "fresh memory", "kept memory", "layers"
MANY, HOST = "58M parameters", "host"
PASSES, LINEAR = "forward and backward", "torch nn.Linear"
FORWARD_ONLY = ("int4", "fp4", "bitnet", "quest", "qlora-nf4")  # no operand of a backward matmul is quantized for it
ALL_THREE = ("int8", "jetfire", "fp8", "mxfp4", "nvfp4", "quartet", "quartet2", "tetrajet2", "luq")
GOALS = {
    "step": [
        Goal("AdamW 8bit / torch", OURS, "lowbit AdamW 8bit", YARDSTICK, 0.80, 0.55),
        Goal("AdamW 8bit, bf16 p / torch", OURS, "lowbit AdamW 8bit, bf16 p", YARDSTICK, 1.1, 0.70),
        Goal("AdamW 4bit / torch", OURS, "lowbit AdamW 4bit", YARDSTICK, 0.95, 0.65),
        Goal("AdamW 4bit, bf16 p / torch", OURS, "lowbit AdamW 4bit, bf16 p", YARDSTICK, 1.2, 0.80),
        Goal("AdamS 8bit / torch", OURS, "lowbit AdamS 8bit", YARDSTICK, 0.75, 0.50),
        *(
            Goal(f"StableSPAM {n} / AdamW {n}", OURS, f"lowbit StableSPAM {n}", f"lowbit AdamW {n}", 1.4, 1.25)
            for n in ("8bit", "4bit")
        ),
        Goal("bitsandbytes / AdamW dyn8", SLOW, "bitsandbytes AdamW8bit", "lowbit AdamW dyn8", 20, 30),
    ],
    "codec": [
        *(
            Goal(f"{rival} / {ours}, {memory}", memory, rival, ours, 40, 100)
            for rival, ours in (
                ("bitsandbytes fp4 quantize", "lowbit e2m1 nearest"),
                ("torchao int4 quantize", "lowbit int4 nearest"),
            )
            for memory in (FRESH, KEPT)
        ),
        *(
            Goal(f"{name} / matmul", LAYERS, name, "torch matmul", 0.05, 0.05)
            for name in ("layers int4", "layers fp4", "lowbit fake int4:16", "lowbit fake e2m1:16")
        ),
    ],
    "layers": [
        *(Goal(f"{n} / nn.Linear", PASSES, f"lowbit {n}", LINEAR, 1.10, 1.05) for n in FORWARD_ONLY),
        *(Goal(f"{n} / nn.Linear", PASSES, f"lowbit {n}", LINEAR, 1.25, 1.15) for n in ALL_THREE),
    ],
    "many_tensors": [
        Goal(f"lowbit {n}, {count} tensors / one", MANY, f"lowbit {n}, {count}", f"lowbit {n}, 1", 1.05, 1.01)
        for n in ("8bit", "4bit")
        for count in (75, 300)
    ],
}


def spread(values: list[float], scale: float) -> str:
    """The median and the quartiles."""
    low, middle, high = statistics.quantiles(values * 2 if len(values) == 1 else values, n=4, method="inclusive")
    return f"{middle * scale:.3g} [{low * scale:.3g}, {high * scale:.3g}]"


def extent(values: list[float], scale: float) -> str:
    """The least and the most."""
    return f"{min(values) * scale:.3g}–{max(values) * scale:.3g}"


STEP_CAPTION = (
    "Median [quartiles] of the rounds, and extent; × torch fused: time over that of torch's fused fp32 AdamW, median "
    "of the ratios within each round; cycles of each core for 8 parameters, by the clock of the same round; bytes a "
    "parameter that must be moved at least (parameter and states to and fro, the gradient once a sweep), what that "
    "makes in GB/s, and that as a share of what the Adam-like probe moved in the same round."
)


def step(results: dict[str, Any]) -> list[Grid]:
    """A table for each number of threads."""
    heads = ["step", "ns/parameter", "min–max", "× torch fused", "cycles per 8", "B/parameter", "GB/s", "× probe"]
    n = results["parameters"]
    made = []
    for threads in _threads(results):
        rows = []
        for group in results["groups"]:
            times = {name: case["seconds"][threads] for name, case in group["cases"].items()}
            clock, probe = times.get("probe: clock"), times.get("probe: Adam's traffic")
            for name, case in group["cases"].items():
                again = group["title"] != OURS and name in results["groups"][0]["cases"]
                if again or name in ("probe: clock", "probe: core"):
                    continue
                own, size = times[name], case["bytes"]
                turns = timing.median_ratio(own, clock) * timing.ADDS * int(threads) * 8 / n if clock else None
                speed = size * n / statistics.median(own) / 1e9 if size else None
                share = timing.median_ratio(probe, own) * size / 28 if probe and size else None
                ratio = timing.median_ratio(own, times[YARDSTICK])
                rest = [f"{ratio:.2f}", *(_number(x, f) for x, f in ((turns, ".1f"), (size, ".2f"), (speed, ".1f")))]
                rows.append([name, spread(own, 1e9 / n), extent(own, 1e9 / n), *rest, _number(share, ".2f")])
        caption = STEP_CAPTION
        if chain := results["groups"][0]["cases"].get("probe: clock"):
            caption += f" Clock: {timing.ADDS / statistics.median(chain['seconds'][threads]) / 1e9:.2f} GHz."
        if core := results["groups"][0]["cases"].get("probe: core"):
            each = spread(core["seconds"][threads], 1e9 / timing.WIDE_ADDS)
            caption += f" An addition of a vector, ns: {each}; it takes longer where a neighbour has part of a core."
        made.append(Grid(f"A step of {n:,} parameters, threads: {threads}", heads, rows, caption))
    return made


def codec(results: dict[str, Any]) -> list[Grid]:
    """Milliseconds, one column for each number of threads and kind of memory; and the layers' part."""
    groups = {g["title"]: g["cases"] for g in results["groups"]}
    rows, cols = results["shape"]
    columns = [(t, memory) for t in _threads(results) for memory in (FRESH, KEPT)]
    heads = [f"{rows} × {cols} fp32, ms", *(f"{memory}, threads: {t}" for t, memory in columns)]

    def cell(name: str, threads: str, memory: str) -> str:
        case = groups.get(memory, {}).get(name)
        return spread(case["seconds"][threads], 1e3) if case else NONE

    body = [[name, *(cell(name, *column) for column in columns)] for name in groups[FRESH]]
    side = results["layer"]
    layers = _by_threads(f"{side} × {side} fp32, ms", groups[LAYERS], 1e3, results)
    caption = f"Median [quartiles]; fresh or kept memory for the results. Blocks of {results['block']}."
    return [
        Grid("Quantize and dequantize", heads, body, caption),
        Grid("Fake quantization beside the matmul it is for", *layers, "An activation as a layer quantizes it."),
    ]


def many_tensors(results: dict[str, Any]) -> list[Grid]:
    """Nanoseconds a parameter for one tensor and for many; microseconds a step of nearly empty ones."""
    groups = {g["title"]: g["cases"] for g in results["groups"]}
    made = []
    for threads in _threads(results):
        rows = []
        for name in dict.fromkeys(n.rpartition(", ")[0] for n in groups[MANY]):
            times = {c: groups[MANY][f"{name}, {c}"]["seconds"][threads] for c in results["tensors"]}
            cells = [spread(times[c], 1e9) for c in results["tensors"]]
            over = [f"{timing.median_ratio(times[c], times['1']) - 1:+.1%}" for c in results["tensors"] if c != "1"]
            rows.append([name, *cells, *over])
        many = [c for c in results["tensors"] if c != "1"]
        heads = ["ns/parameter", *(f"tensors: {c}" for c in results["tensors"]), *(f"overhead of {c}" for c in many)]
        made.append(Grid(f"One tensor or many, threads: {threads}", heads, rows))
    host = _by_threads("75 tensors of 64 values, µs a step", groups[HOST], 1e6, results)
    return [*made, Grid("What a step costs the host", *host)]


def layers(results: dict[str, Any]) -> list[Grid]:
    """Forward and backward of a layer: milliseconds, and times nn.Linear's in the same round."""
    side, batch, threads = results["layer"], results["batch"], _threads(results)
    heads = [f"{side} × {side}, batch {batch}, fp32", *(f"{h}, threads: {t}" for t in threads for h in ("ms", "×"))]
    rows = []
    for group in results["groups"]:
        plain = group["cases"][LINEAR]["seconds"]
        for name, case in group["cases"].items():
            if name == LINEAR and group["title"] != PASSES:
                continue
            own = case["seconds"]
            cells = [(spread(own[t], 1e3), f"{timing.median_ratio(own[t], plain[t]):.3f}") for t in threads]
            rows.append([name, *(cell for pair in cells for cell in pair)])
    about = "Median [quartiles]; ×: time over that of nn.Linear, median of the ratios within each round."
    return [Grid("A layer forward and backward", heads, rows, about)]


def _by_threads(
    head: str, cases: dict[str, Any], scale: float, results: dict[str, Any]
) -> tuple[list[str], list[list[str]]]:
    """The heads and rows of a table with a column for each number of threads."""
    threads = _threads(results)
    rows = [[name, *(spread(case["seconds"][t], scale) for t in threads)] for name, case in cases.items()]
    return [head, *(f"threads: {t}" for t in threads)], rows


def goals(name: str, results: dict[str, Any]) -> Grid:
    """What was promised, and what is so."""
    heads = ["goal: median of the ratios", "must", "aim", *(f"threads: {t}" for t in _threads(results))]
    rows = []
    for goal in GOALS[name]:
        sign = "≥" if goal.aim > goal.must else "≤"
        verdicts = [goal.verdict(results, t) for t in _threads(results)]
        rows.append([goal.what, f"{sign} {goal.must:g}", f"{sign} {goal.aim:g}", *verdicts])
    return Grid("Goals", heads, rows)


def conditions(results: dict[str, Any]) -> str:
    """Where, with what and in which company it was measured."""
    e, before, after = results["environment"], results["before"], results["after"]
    packages = [f"{n} {e[n]}" for n in ("torch", "torchao", "bitsandbytes", "bitsandbytes-cpu-fork") if e.get(n)]
    load, later = (" ".join(f"{x:.1f}" for x in its["load_average"]) for its in (before, after))
    known = before["steal_seconds"] is not None
    stolen = f"; {after['steal_seconds'] - before['steal_seconds']:.1f} s stolen by other guests" if known else ""
    counts = ", ".join(f"{g['title']}: {g['rounds']}" for g in results["groups"])
    said = [f"{n} did not run: {why}." for g in results["groups"] for n, why in g["failed"].items()]
    machine = f"{e['cpu']}, {e['cores']} cores, {e['isa']}; {e['compiler'][0]}; {', '.join(packages)}"
    company = (
        f"Load average {load} before and {later} after {(after['time'] - before['time']) / 60:.1f} minutes{stolen}."
    )
    return " ".join([f"`{results['command']}`, commit {e['commit']}; {machine}. Rounds: {counts}. {company}", *said])


def _threads(results: dict[str, Any]) -> list[str]:
    return list(next(iter(results["groups"][0]["cases"].values()))["seconds"])


def _number(value: float | None, spec: str) -> str:
    return NONE if value is None else format(value, spec)


TABLES = {"step": step, "codec": codec, "layers": layers, "many_tensors": many_tensors}


def show(name: str, results: dict[str, Any]) -> None:
    """The tables on the terminal."""
    show_grids([*TABLES[name](results), goals(name, results)], conditions(results))


def show_grids(grids: list[Grid], said: str) -> None:
    """Tables on the terminal, and under what conditions they hold."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 160)
    for grid in grids:
        table = Table(title=grid.title, caption=escape(grid.caption), title_justify="left", box=SIMPLE_HEAD)
        for k, head in enumerate(grid.heads):
            table.add_column(head, justify="right" if k else "left", no_wrap=k == 0)
        for row in grid.rows:
            table.add_row(*(escape(cell.replace("**", "")) for cell in row))
        console.print(table, highlight=False)
    console.print(said, highlight=False, markup=False, soft_wrap=True)


def section(name: str) -> str:
    """One script's part of the page."""
    path = timing.RESULTS / f"cpu_{name}.json"
    if not path.exists():
        return f"Not measured yet: `python benchmarks/{name}.py`."
    results = json.loads(path.read_text())
    return prose([goals(name, results), *TABLES[name](results)], conditions(results))


def prose(grids: list[Grid], said: str) -> str:
    """Tables in Markdown, and under what conditions they hold."""
    parts = [f"**{g.title}.** {g.caption}".strip() + f"\n\n{markdown_grid(g).strip()}" for g in grids]
    return "\n\n".join([*parts, said])


def write(page: Path, sections: dict[str, str], check: bool) -> int:
    """Put each section between its marks on a page; to check is to change nothing and say whether it is current."""
    text = wanted = page.read_text(encoding="utf-8")
    for name, body in sections.items():
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        made = f"{begin}\n{body}\n{end}"
        wanted = re.sub(f"{begin}.*?{end}", lambda _, made=made: made, wanted, flags=re.DOTALL)
    if stale := text != wanted:
        if check:
            script = Path(sys.argv[0]).name
            print(f"docs/{page.name} is not what the results say: run python benchmarks/{script}", file=sys.stderr)
        else:
            page.write_text(wanted, encoding="utf-8")
    return int(stale and check)


def main() -> int:
    """Write, or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    return write(PAGE, {name: section(name) for name in TABLES}, parser.parse_args().check)


if __name__ == "__main__":
    sys.exit(main())
