"""What do states in few bits cost each optimizer? Final losses of a nano LLaMA, and the time of a step.

    python benchmarks/optimizer_losses.py [--processes 2] [--only "AdamW;Lion"] [--rates]

It looks for each optimizer's learning rate with fp32 states on a seed of its own (at least three, factors of two apart,
until both neighbours of the best lose more), then trains at that with three other seeds and every state format; with
`--rates` also at half and twice it, so that each format has the best of three of its own. One line of
optimizer_losses.jsonl a run; a second call goes on where the first stopped. optimizers.py writes the table.

Matrices of the layers get the states that are asked for even where they are small (the built-in policy would keep the
projected gradients of so small a model in fp32); embeddings' are in 8 bits at least and vectors' in fp32 as always.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import nano
import timing
import torch

from lowbit import Policy, optim
from lowbit.bench.model import Preset

STATES = ("fp32", "8bit", "4bit")
NO_STATES = ("Adafactor",)  # whose few numbers are kept in fp32 whatever is asked for
SCREENING, SEEDS = 0, (10, 11, 12)
CLIP = 1.0


@dataclass(frozen=True)
class Setup:
    """What an optimizer is made for: a model, a peak learning rate, a length of the run, states."""

    model: torch.nn.Module
    shape: Preset
    lr: float
    steps: int
    options: dict[str, Any]

    @property
    def named(self) -> list[tuple[str, torch.Tensor]]:
        """Parameters by name."""
        return list(self.model.named_parameters())


def plain(cls: Callable[..., optim.Rule], /, **hyper: Any) -> Callable[[Setup], optim.Rule]:
    """An optimizer with these hyper-parameters."""
    return lambda s: cls(s.named, lr=s.lr, **hyper, **s.options)


def projected(cls: Callable[..., optim.Rule]) -> Callable[[Setup], optim.Rule]:
    """A projection to a quarter of the width, as the papers' to 128 of 512, and eight projectors a run."""
    return lambda s: cls(s.named, lr=s.lr, rank=s.shape.hidden // 4, update_interval=s.steps // 8, **s.options)


def adapm(second_moment: str) -> Callable[[Setup], optim.Rule]:
    """Momentum of a rank of a sixteenth of the width."""
    return lambda s: optim.AdaPM(
        s.named, lr=s.lr, weight_decay=0.0, rank=s.shape.hidden // 16, second_moment=second_moment, **s.options
    )


def fair(s: Setup) -> optim.Rule:
    """Adam as people train."""
    clip = (optim.GlobalClip(CLIP),)
    return optim.AdamW(s.named, lr=s.lr, betas=(0.9, 0.95), weight_decay=0.0, stabilize=clip, **s.options)


def fair_ends(s: Setup) -> optim.Rule:
    """The same, five times as fast at the two ends."""
    groups = optim.param_groups(s.named, lr=s.lr, weight_decay=0.0, embedding_lr=5.0, head_lr=5.0)
    return optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0, stabilize=(optim.GlobalClip(CLIP),), **s.options)


def stable_spam(s: Setup) -> optim.Rule:
    """Stable-SPAM as the paper has it, with resets for the length of the run."""
    return optim.StableSPAM(s.named, lr=s.lr, reset_interval=s.steps // 4, total_steps=s.steps, **s.options)


def stable_spam_95(s: Setup) -> optim.Rule:
    """A shorter second moment, no resets."""
    return optim.StableSPAM(s.named, lr=s.lr, betas=(0.9, 0.95), reset_interval=0, total_steps=s.steps, **s.options)


def spam(s: Setup, density: float = 1.0) -> optim.Rule:
    """Resets, and warm-ups after them, for the length of the run."""
    resets = {"reset_interval": s.steps // 4, "warmup_steps": 3 * s.steps // 40}
    return optim.SPAM(s.named, lr=s.lr, density=density, **resets, **s.options)


def adam_mini(s: Setup) -> optim.Rule:
    """One second moment per head."""
    return optim.AdamMini(s.named, lr=s.lr, num_heads=s.shape.heads, **s.options)


def muon(s: Setup, aux: float) -> optim.Rule:
    """The rest of the model at its own learning rate. In fp32: bf16 matmuls are slow on this CPU."""
    return optim.Muon(s.named, lr=s.lr, aux_lr=aux * s.lr, precision="fp32", **s.options)


def scale(s: Setup) -> optim.Rule:
    """Vectors at 20 times the learning rate, as the authors' scripts up to 350M parameters."""
    return optim.SCALE(s.named, lr=s.lr, scalar_lr=20 * s.lr, **s.options)


def apollo_mini(s: Setup) -> optim.Rule:
    """The scale is 128 for the paper's smallest model, of width 512; a quarter of the width here."""
    return optim.APOLLOMini(s.named, lr=s.lr, scale=s.shape.hidden / 4, update_interval=s.steps // 8, **s.options)


# By name: how it is made, and the learning rate that the search begins with.
OPTIMIZERS: dict[str, tuple[Callable[[Setup], optim.Rule], float]] = {
    "AdamW": (plain(optim.AdamW, weight_decay=0.0), 2e-3),
    "AdamW, β2 .95, clip 1": (fair, 2e-3),
    "AdamW, β2 .95, clip 1, ends × 5": (fair_ends, 4e-3),
    "StableSPAM": (stable_spam, 2e-3),
    "StableSPAM, β2 .95, no resets": (stable_spam_95, 2e-3),
    "SPAM": (spam, 2e-3),
    "SPAM, density 1/4": (partial(spam, density=0.25), 4e-3),
    "AdamMini": (adam_mini, 2e-3),
    "SlimAdam": (plain(optim.SlimAdam, weight_decay=0.0), 2e-3),
    "AdamS": (plain(optim.AdamS, weight_decay=0.0), 1e-3),
    "Lion": (plain(optim.Lion), 4e-4),
    "SGD, momentum .9": (plain(optim.SGD, momentum=0.9), 0.5),
    "Adafactor": (plain(optim.Adafactor), 4e-3),
    "AdaPM": (adapm("full"), 2e-3),
    "AdaPM, Adam-mini's v": (adapm("mini"), 2e-3),
    "SCALE": (scale, 2e-3),
    "Muon, aux_lr = .3 lr": (partial(muon, aux=0.3), 1e-2),
    "Muon, aux_lr = 1.5 lr": (partial(muon, aux=1.5), 2e-2),
    "SWAN": (plain(optim.SWAN), 2e-3),
    "GaLore, rank d/4": (projected(optim.GaLore), 1e-2),
    "Fira, rank d/4": (projected(optim.Fira), 1e-2),
    "APOLLO, rank d/4": (projected(optim.APOLLO), 1e-2),
    "APOLLOMini": (apollo_mini, 1e-2),
}

# Others of the same optimizers.
VARIANTS = (
    "AdamW, β2 .95, clip 1, ends × 5", "StableSPAM, β2 .95, no resets", "SPAM, density 1/4", "AdaPM, Adam-mini's v",
    "Muon, aux_lr = .3 lr",
)  # fmt: skip


def build(run: nano.Run) -> nano.Trained:
    """A run's model and optimizer; its variant is a state format."""
    model = nano.model_of(run.seed)
    every = Policy([(in_layers, run.variant)])
    options = {"states": run.variant, "seed": run.seed, "policy": every}
    make, _ = OPTIMIZERS[run.case]
    return model, make(Setup(model, nano.SHAPE, run.lr, run.steps, options))


def in_layers(name: str, shape: tuple[int, ...]) -> bool:
    """What the states are asked for: matrices, and what belongs to them, in the layers."""
    return name.startswith("layers.") and len(shape) == 2


def main(words: Sequence[str] | None = None) -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=timing.RESULTS / "optimizer_losses.jsonl")
    parser.add_argument("--processes", type=int, default=1, help="of one thread each; 0: this one")
    parser.add_argument("--only", help="optimizers, separated by semicolons")
    parser.add_argument("--states", default=",".join(STATES))
    parser.add_argument("--rates", action="store_true", help="all three learning rates with every seed and format")
    parser.add_argument("--steps", type=int, default=nano.STEPS)
    args = parser.parse_args(words)
    names = args.only.split(";") if args.only else list(OPTIMIZERS)
    if unknown := set(names) - set(OPTIMIZERS):
        parser.error(f"no optimizer {sorted(unknown)}; there are: {'; '.join(OPTIMIZERS)}")
    results = nano.Results(args.out)
    firsts = [nano.Run(SCREENING, name, "fp32", OPTIMIZERS[name][1], args.steps) for name in names]
    found = nano.screen(results, firsts, build, args.processes)
    cells = [
        replace(run, variant=states)
        for states in args.states.split(",") for run in found if states == "fp32" or run.case not in NO_STATES
    ]  # fmt: skip
    # The middle rate first, seed by seed, variants after the optimizers: a script that is stopped has whole pairs.
    middle = [
        replace(run, seed=seed)
        for late in (False, True) for seed in SEEDS for run in cells if (run.case in VARIANTS) == late
    ]  # fmt: skip
    others = [replace(run, lr=lr) for run in middle for lr in nano.neighbours(run.lr)]
    results.do(others if args.rates else middle, build, args.processes)


if __name__ == "__main__":
    sys.exit(main())
