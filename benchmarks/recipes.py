"""What does each recipe cost, and what does a weight without a master? Losses of a nano LLaMA, paired by seed.

    python benchmarks/recipes.py [--processes 2] [--only "int4;store int4"] [--seeds 5]
    python benchmarks/recipes.py --rates        the same with other learning rates
    python benchmarks/recipes.py --write        the tables of docs/recipe-costs.md, from the committed results
    python benchmarks/recipes.py --check        fail if they are not what the results say (a test does this)

Muon is the probe: its runs repeat to .01 nats a byte, Adam's to .03, which hides most formats' differences. Learning
rates are those that are best in float (looked for with a seed of its own); `--rates` runs every recipe also at half and
twice Muon's, with two seeds, to see whether that wrongs it. All seven linears of each layer are quantized, of both
layers (a recipe's wish to keep the first and last blocks dense would leave nothing here); embedding, norms and head are
not. States are fp32. One line of recipes.jsonl a run; a second call goes on where the first stopped.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import cpu_tables
import nano
import timing

from lowbit import optim
from lowbit.bench import stats
from lowbit.bench.report import markdown_grid
from lowbit.bench.tables import Grid
from lowbit.nn import Recipe, quantize_, recipes
from lowbit.nn.convert import find_recipe

PAGE, RESULTS = timing.ROOT / "docs" / "recipe-costs.md", timing.RESULTS / "recipes.jsonl"
FLOAT = "float"
SCREENING, FIRST, SEEDS, FEW = 0, 10, 5, 2
NOT_TRAINED = ("qlora-nf4",)  # its base is frozen: there is nothing to train from scratch
FORMATS = {"int8": "int8", "int4": "int4:32", "nf4": "nf4", "mxfp4": "mxfp4", "nvfp4": "nvfp4"}  # of a store

# What is compared with float, by name; the stores also with a master whose forward pass sees the same codes.
PRESETS: dict[str, Callable[[], Recipe | str]] = {
    name: partial(str, name) for name in recipes() if name not in NOT_TRAINED
}
MASTERS: dict[str, Callable[[], Recipe | str]] = {
    f"master, {name} codes": partial(Recipe, weight=spec) for name, spec in FORMATS.items()
}
STORES: dict[str, Callable[[], Recipe | str]] = {
    f"store {name}": partial(Recipe, store=name) for name in (*FORMATS, "split", "split8")
}
SAME_CODES = {f"store {name}": f"master, {name} codes" for name in FORMATS}
SAME_CODES |= {"store split": "master, int4 codes", "store split8": "master, int8 codes"}
CASES = {**PRESETS, **MASTERS, **STORES}

# By name: how it is made, the learning rate that the search begins with, and what is run with it.
OPTIMIZERS: dict[str, tuple[Callable[[Any, nano.Run], optim.Rule], float, tuple[str, ...]]] = {
    "Muon": (
        lambda named, run: optim.Muon(
            named, lr=run.lr, aux_lr=1.5 * run.lr, precision="fp32", states="fp32", seed=run.seed
        ),
        2e-2,
        tuple(CASES),
    ),
    "AdamW": (
        lambda named, run: optim.AdamW(
            named, lr=run.lr, betas=(0.9, 0.95), weight_decay=0.0, stabilize=(optim.GlobalClip(1.0),),
            states="fp32", seed=run.seed,
        ),
        2e-3,
        (*MASTERS, *STORES),
    ),
}  # fmt: skip


def build(run: nano.Run) -> nano.Trained:
    """A run's model and optimizer; its variant is the optimizer."""
    model = nano.model_of(run.seed)
    if run.case != FLOAT:
        recipe = find_recipe(CASES[run.case]())
        matmuls = {"forward": recipe.forward, "dgrad": recipe.dgrad, "wgrad": recipe.wgrad}
        quantize_(model, Recipe(**matmuls, store=recipe.store, seed=run.seed))  # all blocks: see above
    make, *_ = OPTIMIZERS[run.variant]
    return model, make(list(model.named_parameters()), run)


def plan(results: nano.Results, names: list[str], args: argparse.Namespace) -> None:
    """Run what is missing: learning rates in float, then all seeds; or other learning rates."""
    firsts = [nano.Run(SCREENING, FLOAT, o, lr, args.steps) for o, (_, lr, _) in OPTIMIZERS.items()]
    found = nano.screen(results, firsts, build, args.processes)
    wanted = [
        replace(run, seed=FIRST + k, case=case)
        for k in range(args.seeds) for run in found for case in (FLOAT, *names)
        if case == FLOAT or case in OPTIMIZERS[run.variant][2]
    ]  # fmt: skip
    muon = next(run for run in found if run.variant == "Muon")
    others = [
        replace(muon, seed=FIRST + k, case=case, lr=lr)
        for k in range(min(FEW, args.seeds)) for case in (FLOAT, *names) for lr in (muon.lr / 2, muon.lr * 2)
    ]  # fmt: skip
    results.do(others if args.rates else wanted, build, args.processes)


class Costs:
    """What the runs say."""

    def __init__(self, results: nano.Results):
        self.results = results
        self.by: dict[tuple[str, str, float], dict[int, dict[str, Any]]] = {}
        for run, line in results.runs.items():
            if run.seed >= FIRST:
                self.by.setdefault((run.case, run.variant, run.lr), {})[run.seed] = line
        whole = [(len(its), lr, o) for (case, o, lr), its in self.by.items() if case == FLOAT]
        self.lr = {
            o: max((n, lr) for n, lr, its in whole if its == o)[1] for o in OPTIMIZERS if o in {w[2] for w in whole}
        }

    def losses(self, case: str, optimizer: str, lr: float | None = None) -> dict[int, float]:
        """By seed, at float's learning rate or another; without runs that diverged."""
        lines = self.by.get((case, optimizer, self.lr.get(optimizer, 0.0) if lr is None else lr), {})
        return {seed: line["loss"] for seed, line in lines.items() if not line["why"]}

    def cost(self, case: str, optimizer: str, against: str = FLOAT) -> stats.Difference | None:
        """The paired difference to float, or to another case."""
        return stats.paired(self.losses(case, optimizer), self.losses(against, optimizer))

    def cell(self, case: str, optimizer: str, against: str = FLOAT) -> str:
        """The same in words, with the count of seeds in which it was higher."""
        lines = self.by.get((case, optimizer, self.lr.get(optimizer, 0.0)), {})
        if why := next((line["why"] for line in lines.values() if line["why"]), ""):
            bad = sum(bool(line["why"]) for line in lines.values())
            return f"diverged, {bad} of {len(lines)}: {why}"
        d = self.cost(case, optimizer, against)
        if d is None or d.low is None:
            return nano.difference(d)
        said = f"{nano.difference(d)}, {d.n - d.better}/{d.n}"
        return said if d.verdict == "not significant" else f"**{said}**"

    def best_lr(self, case: str) -> str:
        """The learning rate of the three with the lowest mean over the few seeds, and its gain over float's."""
        centre = self.lr.get("Muon", 0.0)
        seeds = range(FIRST, FIRST + FEW)
        means = {}
        for lr in nano.neighbours(centre):
            its = self.losses(case, "Muon", lr)
            if all(seed in its for seed in seeds):
                means[lr] = statistics.mean(its[seed] for seed in seeds)
        if len(means) < 3 and not (centre in means and self._diverged(case)):
            return "not run"
        best = min(means, key=means.__getitem__)
        return f"{best:g}" if best == centre else f"{best:g} ({means[best] - means[centre]:+.3f})"

    def _diverged(self, case: str) -> bool:
        lines = [line for (c, _, _), its in self.by.items() if c == case for line in its.values()]
        return any(line["why"] for line in lines)

    def presets(self) -> Grid:
        """What each recipe costs."""
        order = sorted(PRESETS, key=lambda case: d.mean if (d := self.cost(case, "Muon")) else 9.0)
        rows = [[case, self.cell(case, "Muon"), self.best_lr(case)] for case in order]
        return Grid("", ["recipe", "cost, Muon", "its best learning rate"], rows, self.conditions(tuple(PRESETS)))

    def stores(self) -> Grid:
        """What a weight without a master costs."""
        rows = [
            [case, *(cell for o in OPTIMIZERS for cell in (self.cell(case, o), self.same_codes(case, o)))]
            for case in (*MASTERS, *STORES)
        ]
        heads = [head for o in OPTIMIZERS for head in (f"cost, {o}", f"against its master, {o}")]
        return Grid("", ["weights", *heads], rows, self.conditions((*MASTERS, *STORES)))

    def same_codes(self, case: str, optimizer: str) -> str:
        """A store against a master whose forward pass sees the same kind of codes."""
        return self.cell(case, optimizer, SAME_CODES[case]) if case in SAME_CODES else ""

    def conditions(self, cases: tuple[str, ...]) -> str:
        """The set-up, how many contrasts were looked at, where and by which sources it was run."""
        every = self.results.environments
        if not every or not self.lr:
            return "Not run yet: `python benchmarks/recipes.py`."
        e = every[-1]
        commits = ", ".join(dict.fromkeys(e["commit"] for e in every))
        levels = "; ".join(
            f"{o} at lr {lr:g}, {statistics.mean(its.values()):.3f}"
            for o, lr in self.lr.items() if (its := self.losses(FLOAT, o))
        )  # fmt: skip
        return (
            f"Float: {levels} nats a byte. {self.contrasts(cases)} Nano LLaMA, {e['steps']} steps of "
            f"{e['batch']} × {e['seq']} bytes, corpus sha256 {e['corpus']['sha256'][:12]}. Commits {commits}; "
            f"{e['cpu']}, torch {e['torch']}."
        )

    def contrasts(self, cases: Iterable[str]) -> str:
        """How many contrasts these cases are, and how many are significant."""
        pairs = [(case, FLOAT) for case in cases] + [(case, SAME_CODES[case]) for case in cases if case in SAME_CODES]
        every = [d for case, other in pairs for o in OPTIMIZERS if (d := self.cost(case, o, other))]
        every = [d for d in every if d.low is not None]
        if not every:
            return "No contrast has two seeds yet."
        found = sum(d.verdict != "not significant" for d in every)
        return (
            f"Contrasts: {len(every)}, of which {found} are significant at 5 % (bold); by chance alone about "
            f"{0.05 * len(every):.1f} would be."
        )

    def sections(self) -> dict[str, str]:
        """The parts of the page."""
        grids = {"recipe costs": self.presets(), "store costs": self.stores()}
        return {name: f"{markdown_grid(grid).strip()}\n\n{grid.caption}" for name, grid in grids.items()}


def main(words: Sequence[str] | None = None) -> int:
    """Run, write or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--processes", type=int, default=1, help="of one thread each; 0: this one")
    parser.add_argument("--only", help="cases, separated by semicolons")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--steps", type=int, default=nano.STEPS)
    parser.add_argument("--rates", action="store_true", help="the other learning rates, with two seeds")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args(words)
    results = nano.Results(args.out)
    if not (args.write or args.check):
        names = args.only.split(";") if args.only else list(CASES)
        if unknown := set(names) - set(CASES):
            parser.error(f"no case {sorted(unknown)}; there are: {'; '.join(CASES)}")
        plan(results, names, args)
        return 0
    return cpu_tables.write(PAGE, Costs(results).sections(), args.check)


if __name__ == "__main__":
    sys.exit(main())
