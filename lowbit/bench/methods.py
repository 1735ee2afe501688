"""What is compared. A method is an optimizer, how its state is stored, and what the linear layers do.

The high-precision Adam rows run `torch.optim.AdamW`, so that the rival is not our own code. Every 4-bit method has a
high-precision counterpart (the same optimizer, fp32 states, no quantized layers), because a report that shows only
"4-bit X against BF16 Adam" cannot say whether the optimizer or the bits made the difference.
"""

from __future__ import annotations

import ast
import inspect
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from .errors import BenchError, unknown

LOW_BIT_RECIPE = "int4"  # what "-4bit" in a method's name means for the linear layers
LOW_BIT_STATES = "4bit"  # and for the optimizer's state


@dataclass(frozen=True)
class OptimizerSpec:
    """A named optimizer with its hyper-parameters; `run_fraction` ones are scaled to the length of the run."""

    name: str
    cls: str
    about: str
    betas: tuple[float, float] | None = (0.9, 0.999)
    clip: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    reset_fraction: float | None = None
    anneal: bool = False


OPTIMIZERS = {
    o.name: o
    for o in (
        OptimizerSpec("adam", "AdamW", "Adam as the papers' baseline has it: β2 .999, no clipping"),
        OptimizerSpec("adam-fair", "AdamW", "Adam as people train: β2 .95, gradient norm clipped to 1",
                      betas=(0.9, 0.95), clip=1.0),
        OptimizerSpec("stablespam", "StableSPAM", "Stable-SPAM: the paper's betas and gammas; momentum reset every "
                      "twentieth of the run (the paper: 1000 of 20,000 steps); β1 and γ1 annealed, as the code can",
                      reset_fraction=1000 / 20_000, anneal=True),
        OptimizerSpec("stablespam-b95", "StableSPAM", "Stable-SPAM, β2 .95, no reset, β1 and γ1 annealed",
                      betas=(0.9, 0.95), extra={"reset_interval": 0}, anneal=True),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Method:
    """One row of the comparison."""

    name: str
    optimizer: str
    states: str = "fp32"
    recipe: str = "none"

    @property
    def spec(self) -> OptimizerSpec:
        """The optimizer's entry; a class of `lowbit.optim` that has none gets one with its own defaults."""
        return find_optimizer(self.optimizer)

    @property
    def master(self) -> bool:
        """Whether an fp32 copy of the weights is kept: yes with fp32 states (usual practice), no with smaller ones."""
        return self.states == "fp32"

    @property
    def low_bit(self) -> bool:
        """Whether anything is stored or computed in fewer bits than usual practice."""
        return self.states != "fp32" or self.recipe != "none"

    @property
    def uses_torch(self) -> bool:
        """Whether torch.optim does the step: Adam with fp32 states, so that the baseline is not our code."""
        return self.spec.cls == "AdamW" and self.states == "fp32" and not self.spec.extra

    @property
    def counterpart(self) -> Method:
        """The same optimizer in high precision."""
        return Method(self.optimizer, self.optimizer)

    @property
    def label(self) -> str:
        """What a table calls it."""
        if not self.low_bit:
            return f"BF16 {self.optimizer}"
        states = f"{self.states} states"
        layers = "" if self.recipe == "none" else f", {self.recipe} layers"
        return f"{self.optimizer}, {states}{layers}"

    def describe(self) -> dict:
        """What a result file records."""
        return {
            "name": self.name, "label": self.label, "optimizer": self.optimizer, "about": self.spec.about,
            "states": self.states, "recipe": self.recipe, "master": self.master, "low_bit": self.low_bit,
            "counterpart": self.counterpart.name, "by": "torch.optim.AdamW" if self.uses_torch
            else f"lowbit.optim.{self.spec.cls}",
        }  # fmt: skip


def find_optimizer(name: str) -> OptimizerSpec:
    """The optimizer called `name`: one of ours, or any class of `lowbit.optim` by its name (in any case).

    Options of its constructor may follow, each behind a colon: `galore:rank=8:scale=0.5`.
    """
    from .. import optim

    base, *options = name.split(":")
    spec = OPTIMIZERS.get(base)
    if spec is None:
        classes = {
            c.lower(): c for c in getattr(optim, "__all__", dir(optim))
            if c != "Rule" and inspect.isclass(k := getattr(optim, c)) and issubclass(k, torch.optim.Optimizer)
        }  # fmt: skip
        if base.lower() not in classes:
            raise unknown("optimizer", base, [*OPTIMIZERS, *classes.values()])
        cls = classes[base.lower()]
        spec = OptimizerSpec(base, cls, f"lowbit.optim.{cls} with its own defaults", betas=None)
    if not options:
        return spec
    given = dict(_option(spec.cls, option) for option in options)
    return replace(spec, name=name, about=f"{spec.about}; {', '.join(options)}", extra={**spec.extra, **given})


def _option(cls: str, option: str) -> tuple[str, Any]:
    """`rank=8` as a name and a value: a number, None, True, a tuple …, or else the word itself."""
    from .. import optim

    key, equals, text = option.partition("=")
    known = [n for n in inspect.signature(getattr(optim, cls)).parameters if n not in (*ELSEWHERE, *NOT_IN_WORDS)]
    if not equals:
        raise BenchError(f"cannot read {option!r}: options of an optimizer are written NAME=VALUE, as in galore:rank=8")
    if key in ELSEWHERE:
        raise BenchError(f"{key} is no option of an optimizer here: {ELSEWHERE[key]}")
    if key not in known:
        raise unknown(f"option of {cls}", key, known)
    try:
        return key, ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return key, text


def parse_method(name: str) -> Method:
    """A method from its name: `adam`, `adam-4bit`, or in full `adam/8bit/fp4` (optimizer/states/recipe).

    An optimizer may bring options: `galore:rank=8-4bit`, `muon:aux_lr=1e-3/8bit/none`.
    """
    if name.endswith("-4bit"):
        return Method(name, name.removesuffix("-4bit"), LOW_BIT_STATES, LOW_BIT_RECIPE)
    optimizer, *rest = name.split("/")
    if len(rest) not in (0, 2):
        raise BenchError(f"cannot read method {name!r}: write OPTIMIZER, OPTIMIZER-4bit or OPTIMIZER/STATES/RECIPE")
    return method(optimizer, *rest)


def method(optimizer: str, states: str = "fp32", recipe: str = "none") -> Method:
    """The method with these parts, under its shortest name."""
    if (states, recipe) == ("fp32", "none"):
        return Method(optimizer, optimizer)
    if (states, recipe) == (LOW_BIT_STATES, LOW_BIT_RECIPE):
        return Method(f"{optimizer}-4bit", optimizer, states, recipe)
    return Method(f"{optimizer}/{states}/{recipe}", optimizer, states, recipe)


# Arguments of optimizers that are said otherwise, and those that no word can say.
ELSEWHERE = {
    "params": "the model has them", "lr": "say --lr", "seed": "say --seeds",
    "states": "say --states, or OPTIMIZER/STATES/RECIPE", "master": "fp32 states have one, smaller ones none",
}  # fmt: skip
NOT_IN_WORDS = ("stabilize", "policy", "roles", "partition", "dims")

BASELINES = tuple(parse_method(n) for n in ("adam", "adam-fair", "adam-4bit"))


def choose(names: list[str], states: list[str] | None = None, recipes: list[str] | None = None) -> list[Method]:
    """The methods to run: the baselines, what was asked for, and the high-precision counterpart of each.

    `names` are methods; with `states` or `recipes` they are optimizers, each run in every combination.
    """
    if states or recipes:
        for name in names:
            if name.endswith("-4bit") or "/" in name:
                raise BenchError(f"{name!r} says its states and recipe: with --states or --recipe name optimizers")
        asked = [method(n, s, r) for n in names for s in states or ["fp32"] for r in recipes or ["none"]]
    else:
        asked = [parse_method(n) for n in names]
    chosen: dict[str, Method] = {}
    for m in (*BASELINES, *asked):
        chosen.setdefault(m.counterpart.name, m.counterpart)
        chosen.setdefault(m.name, m)
    for m in chosen.values():
        check(m)
    return list(chosen.values())


def check(m: Method) -> None:
    """Refuse a method whose optimizer, states or recipe does not exist, before anything is run."""
    spec = m.spec
    if not m.low_bit and m.uses_torch:
        return
    from .. import nn, optim
    from ..formats import formats

    if m.recipe != "none" and m.recipe not in nn.recipes():
        raise unknown("recipe", m.recipe, ["none", *nn.recipes()])
    known = {"fp32", "bf16", "8bit", "4bit", *formats()}
    if m.states not in known:
        raise unknown("state format", m.states, known)
    if not hasattr(optim, spec.cls):
        raise BenchError(f"{m.name} needs lowbit.optim.{spec.cls}, which this version does not have")
    if ":" in m.optimizer:  # options may be out of range
        try:
            build(m, [{"params": [("weight", torch.nn.Parameter(torch.zeros(2, 2)))]}], lr=1e-3, steps=100, seed=0)
        except (TypeError, ValueError) as error:
            raise BenchError(f"{m.name}: {error}") from error


def build(
    m: Method, groups: list[dict], lr: float, steps: int, seed: int
) -> tuple[torch.optim.Optimizer, float | None]:
    """The optimizer over named parameter groups, and the clip that the training loop must do itself (or None)."""
    spec = m.spec
    if m.uses_torch:
        betas = spec.betas or (0.9, 0.999)
        return torch.optim.AdamW(groups, lr=lr, betas=betas, weight_decay=0.0, fused=True), spec.clip
    from .. import optim

    cls = getattr(optim, spec.cls)
    wanted: dict[str, Any] = {"lr": lr, "states": m.states, "seed": seed, "weight_decay": 0.0}
    if spec.betas is not None:
        wanted["betas"] = spec.betas
    if spec.reset_fraction is not None:
        wanted["reset_interval"] = max(1, round(spec.reset_fraction * steps))
    if spec.anneal:
        wanted["total_steps"] = steps
    wanted |= spec.extra
    if spec.clip is not None:
        wanted["stabilize"] = (optim.GlobalClip(spec.clip),)
    if "weight_decay" not in inspect.signature(cls).parameters:
        del wanted["weight_decay"]  # a class named on the command line may have none
    return cls(groups, **wanted), None
