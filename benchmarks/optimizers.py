"""Write the tables of docs/optimizers.md: memory, final losses and times of a step, by optimizer and state format.

python benchmarks/optimizers.py            write them
python benchmarks/optimizers.py --check    fail if they are not what the optimizers keep and the results say (a test)

Memory is that of a 60M LLaMA, whose tensors are on the meta device: nothing is allocated. The other two come from
committed results, of optimizer_losses.py and optimizer_steps.py.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from typing import Any

import cpu_tables
import nano
import optimizer_losses
import optimizer_steps
import timing
import torch
from optimizer_losses import NO_STATES, OPTIMIZERS, SEEDS, STATES

from lowbit.bench import stats
from lowbit.bench.model import Llama, preset
from lowbit.bench.report import markdown_grid
from lowbit.bench.tables import Grid

PAGE = timing.ROOT / "docs" / "optimizers.md"
LOSSES, STEPS = timing.RESULTS / "optimizer_losses.jsonl", timing.RESULTS / "optimizer_steps.json"
STORED = ("fp32", "bf16", "8bit", "4bit")


def memory() -> Grid:
    """Bytes of state per parameter in each format, and how often a step reads the gradient."""
    shape = preset("60m")
    with torch.device("meta"):
        model = Llama(shape)
    values = sum(p.numel() for p in model.parameters())
    rows = []
    for name, (make, _) in OPTIMIZERS.items():
        every = [make(optimizer_losses.Setup(model, shape, 1e-3, shape.steps, {"states": s})) for s in STORED]
        sweeps = str(every[0].explain().sweeps)
        rows.append([name, *(f"{opt.state_bytes() / values:.2f}" for opt in every), sweeps])
    return Grid("", ["optimizer", *STORED, "sweeps"], rows)


class Losses:
    """What the runs of optimizer_losses.py say."""

    def __init__(self, results: nano.Results):
        self.results = results
        self.by: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for run, line in results.runs.items():
            if run.seed in SEEDS:
                self.by.setdefault((run.case, run.variant), []).append(line)

    def best(self, name: str, states: str) -> tuple[float, dict[int, float]] | None:
        """The best of the learning rates, and losses by seed."""
        return nano.best(self.by.get((name, states), []))

    def cell(self, name: str, states: str) -> str:
        """The loss at the best of the learning rates."""
        if states != "fp32" and name in NO_STATES:
            return "as fp32"
        if (name, states) not in self.by:
            return "not run"
        if (found := self.best(name, states)) is None:
            return "diverged"
        lr, losses = found
        spread = f"± {statistics.stdev(losses.values()):.3f}" if len(losses) > 1 else "of 1 seed"
        return f"{statistics.mean(losses.values()):.3f} {spread} ({lr:g})"

    def cost(self, name: str, states: str) -> str:
        """Against fp32 states, each at its best learning rate."""
        found, exact = self.best(name, states), self.best(name, "fp32")
        if name in NO_STATES or not found or not exact:
            return ""
        return nano.difference(stats.paired(found[1], exact[1]))

    def costs(self, states: str) -> list[float]:
        """The mean cost of each optimizer over all learning rates and seeds that both formats finished."""
        found = []
        for name in OPTIMIZERS:
            exact = {(r["lr"], r["seed"]): r for r in self.by.get((name, "fp32"), [])}
            pairs = [(r, exact.get((r["lr"], r["seed"]))) for r in self.by.get((name, states), [])]
            whole = [r["loss"] - e["loss"] for r, e in pairs if e and not r["why"] and not e["why"]]
            found += [statistics.mean(whole)] if whole else []
        return found

    def table(self) -> Grid:
        """By optimizer."""
        heads = ["optimizer", "fp32", *(head for s in STATES[1:] for head in (s, f"{s} − fp32"))]
        rows = [
            [n, self.cell(n, "fp32"), *(text for s in STATES[1:] for text in (self.cell(n, s), self.cost(n, s)))]
            for n in OPTIMIZERS
        ]
        return Grid("", heads, rows)

    def summary(self) -> str:
        """How many of the differences are significant, and what a format costs over all optimizers."""
        said = []
        for states in STATES[1:]:
            every = [
                stats.paired(found[1], exact[1])
                for name in OPTIMIZERS if name not in NO_STATES
                if (found := self.best(name, states)) and (exact := self.best(name, "fp32"))
            ]  # fmt: skip
            verdicts = [d.verdict for d in every if d and d.low is not None]
            costs = self.costs(states)
            if not verdicts or len(costs) < 2:
                continue
            mean, half = statistics.mean(costs), stats.t_quantile(len(costs) - 1) * statistics.stdev(costs)
            half /= len(costs) ** 0.5
            said.append(
                f"- **{states}**: of {len(verdicts)} optimizers, {verdicts.count('worse')} are significantly worse "
                f"than with fp32 states and {verdicts.count('better')} better (by chance alone, about "
                f"{0.05 * len(verdicts):.1f} would be one or the other). Mean over optimizers, each over its learning "
                f"rates and seeds: {mean:+.4f} nats a byte, [{mean - half:+.4f}, {mean + half:+.4f}]."
            )
        return "\n".join(said)

    def divergences(self) -> str:
        """Every run that diverged, of the search too, and why."""
        by: dict[tuple[str, str, float], list[dict[str, Any]]] = {}
        for line in self.results.runs.values():
            if line["why"]:
                by.setdefault((line["case"], line["variant"], line["lr"]), []).append(line)
        if not by:
            return "No run diverged." if self.results.runs else ""
        said = [
            f"- {name}, {states}, lr {lr:g}, seed {', '.join(str(line['seed']) for line in lines)}: {lines[0]['why']}"
            for (name, states, lr), lines in sorted(by.items())
        ]
        return "\n".join(["Runs that diverged, with the first one's reason:", "", *said])

    def conditions(self) -> str:
        """The set-up, where and by which sources it was run."""
        every = self.results.environments
        if not every:
            return "Not run yet: `python benchmarks/optimizer_losses.py`."
        e, runs = every[-1], self.results.runs
        commits = ", ".join(dict.fromkeys(e["commit"] for e in every))
        cells = [self.rates(name, states) for name in OPTIMIZERS for states in STATES]
        ends = sum(best in (least, most) for whole, least, best, most in cells if whole)
        whole = sum(cell[0] for cell in cells)
        return (
            f"Nano LLaMA (0.14M parameters), {e['steps']} steps of {e['batch']} × {e['seq']} bytes, corpus sha256 "
            f"{e['corpus']['sha256'][:12]}; {len(runs)} runs, seeds {list(SEEDS)}; learning rates were looked for "
            f"with fp32 states and seed {optimizer_losses.SCREENING}. {whole} of the {len(cells)} cells have all seeds "
            f"at all three rates, and in {ends} of these the lowest or the highest is the best; the others have only "
            f"the rate that was found. Commits {commits}; {e['cpu']}, torch {e['torch']}."
        )

    def rates(self, name: str, states: str) -> tuple[bool, float, float, float]:
        """Whether all seeds were run at three learning rates; the lowest rate, the best one and the highest."""
        lines, found = self.by.get((name, states), []), self.best(name, states)
        lrs = sorted({line["lr"] for line in lines})
        if found is None:
            return False, 0.0, 0.0, 0.0
        return len(lines) == 3 * len(SEEDS), lrs[0], found[0], lrs[-1]

    def section(self) -> str:
        """All of it."""
        parts = [markdown_grid(self.table()).strip(), self.summary(), self.divergences(), self.conditions()]
        return "\n\n".join(filter(None, parts))


def steps() -> str:
    """Times of a step."""
    if not STEPS.exists():
        return "Not timed yet: `python benchmarks/optimizer_steps.py`."
    grid = optimizer_steps.table(json.loads(STEPS.read_text()))
    return f"{markdown_grid(grid).strip()}\n\n{grid.caption}"


def main() -> int:
    """Write, or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; fail if the page is not current")
    losses = Losses(nano.Results(LOSSES))
    sections = {"memory": markdown_grid(memory()).strip(), "losses": losses.section(), "steps": steps()}
    return cpu_tables.write(PAGE, sections, parser.parse_args().check)


if __name__ == "__main__":
    sys.exit(main())
