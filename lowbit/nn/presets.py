"""The recipes that have names: those of papers, with their source, and the house's own."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from types import MappingProxyType

from ..formats import nearest
from .operand import Operand
from .recipe import Recipe


@cache
def presets() -> Mapping[str, Recipe]:
    """The recipes that have names. Built at first use.

    `int4` (symmetric) and `fp4` (E2M1) quantize weights and activations in blocks of 16 along the contraction. Shorter
    blocks cost more scales and lose less: against float, a nano LLaMA trained with Muon loses .039 nats a byte with
    int4:16, .056 with int4:32 and .081 with int4:64; .048 with e2m1:16 and .056 with e2m1:32 (4 paired seeds; 16
    against 32 is -.018 [-.030, -.005] for int4 and -.008 [-.022, +.007], not significant, for E2M1, which follows so
    that the two differ in the grid alone). See benchmarks/recipe_blocks.py and its results. No outliers are kept: none
    were needed. Blocks of 16 with 16-bit scales are 5 bits a value.

    `stablespam-int4` and `stablespam-fp4` are the paper's, as released (`lowbit.nn.stablespam`), to compare with.
    """
    made = {
        "int4": Recipe(name="int4", weight="int4:16", activation="int4:16"),
        "fp4": Recipe(name="fp4", weight="e2m1:16", activation="e2m1:16"),
        "stablespam-int4": Recipe(
            name="stablespam-int4", weight="stablespam-int4-weight", activation="stablespam-int4-activation"
        ),
        "stablespam-fp4": Recipe(name="stablespam-fp4", weight="stablespam-fp4", activation="stablespam-fp4"),
    }
    return MappingProxyType(made)


def recipes() -> tuple[str, ...]:
    """The names of the recipes `quantize_` knows.

    >>> "int4" in recipes()
    True
    """
    return tuple(presets())


def find_recipe(recipe: str | Recipe) -> Recipe:
    """A recipe by name, or the recipe itself; `ValueError` with the nearest match for an unknown name."""
    if isinstance(recipe, Recipe):
        return recipe
    if not isinstance(recipe, str):
        raise TypeError(f"recipe must be a name or a Recipe, not {type(recipe).__name__}")
    if recipe not in presets():
        raise ValueError(f"unknown recipe {recipe!r}{nearest(recipe, recipes())}; known: {', '.join(recipes())}")
    return presets()[recipe]
