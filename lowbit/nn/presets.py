"""The recipes that have names: those of papers, each with its source, and the house's own.

Where a paper and its released code differ, the comment says which is followed. What all have in common: master weights
and everything outside linear layers stay in the model's own precision, and so do the output head, embeddings and
routers; the forward pass rounds to nearest; sums are fp32. Signs of rotations differ from run to run along a row, where
most papers repeat one vector of signs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from types import MappingProxyType

from ..formats import format as find_format
from ..formats import nearest
from .operand import Operand
from .recipe import FORWARD, Recipe


def _own() -> Iterator[Recipe]:
    """The house's own, where a question was measured here.

    `int4` (symmetric) and `fp4` (E2M1) quantize weights and activations in blocks of 16 along the contraction. Shorter
    blocks cost more scales and lose less: against float, a nano LLaMA trained with Muon loses .039 nats a byte with
    int4:16, .056 with int4:32 and .081 with int4:64; .048 with e2m1:16 and .056 with e2m1:32 (4 paired seeds; 16
    against 32 is -.018 [-.030, -.005] for int4 and -.008 [-.022, +.007], not significant, for E2M1, which follows so
    that the two differ in the grid alone). See benchmarks/recipe_blocks.py and its results. No outliers are kept: none
    were needed. Blocks of 16 with fp32 scales are 6 bits a value.
    """
    yield Recipe(name="int4", weight="int4:16", activation="int4:16")
    yield Recipe(name="fp4", weight="e2m1:16", activation="e2m1:16")


def _eight_bits() -> Iterator[Recipe]:
    # One scale for each row of either operand along the contraction, to nearest, in all three matmuls, as torchao's
    # Int8MixedPrecisionTrainingConfig: https://github.com/pytorch/ao, torchao/prototype/quantized_training/README.md.
    int8 = ("int8:row", "int8:row")
    yield Recipe(name="int8", forward=int8, dgrad=int8, wgrad=int8)

    # SwitchBack, https://arxiv.org/abs/2304.13013, algorithm 1: rows of X and of the gradient, the whole of W; the
    # weight's gradient "switches back" to high precision, so X itself is kept.
    yield Recipe(
        name="switchback", forward=("int8:row", "int8:tensor"), dgrad=("int8:row", FORWARD), wgrad=(None, None)
    )

    # Jetfire, https://arxiv.org/abs/2403.12422, section 4: tiles of 32 x 32, which are the same seen from either side.
    # Gradients are rounded stochastically, as the released layers do (Jetfire/Linear/linear_bwd.py); in the INT8 data
    # flow the layer behind has done that, here the layer does it itself, once for each matmul.
    tile = Operand("int8:32x32", rounding="stochastic")
    yield Recipe(name="jetfire", weight="int8:32x32", activation="int8:32x32", gradient=tile)

    # FP8 hybrid, https://arxiv.org/abs/2209.05433, section 4: E4M3 for weights and activations, E5M2 for gradients, one
    # scale a tensor, from this tensor (current scaling; the delayed scaling of some libraries guesses from the past).
    yield Recipe(name="fp8", weight="e4m3:tensor", activation="e4m3:tensor", gradient="e5m2:tensor")

    # BitNet b1.58, https://arxiv.org/abs/2402.17764, equations 1 to 3: W / mean |W| rounded to -1, 0, 1 for the whole
    # tensor; activations to 8 bits a token; straight through. The norm before the layer is the model's business.
    yield Recipe(name="bitnet", weight="ternary", activation="int8:row")


def _four_bits() -> Iterator[Recipe]:
    # Training LLMs with MXFP4, https://arxiv.org/abs/2502.20586, algorithms 2 and 3: high precision forward; backward,
    # both operands of both matmuls are rotated in runs of 64, multiplied by 3/4 so that nothing clips, and rounded
    # stochastically; the product is multiplied by 16/9.
    backward = Operand("mxfp4", rounding="stochastic", hadamard=64, prescale=3 / 4)
    yield Recipe(name="mxfp4", forward=(None, None), dgrad=(backward, backward), wgrad=(backward, backward))

    # Pretraining LLMs with NVFP4, https://arxiv.org/abs/2509.25149, section 4 and appendix C: 1 x 16 blocks, 16 x 16
    # for weights, so that W and its transpose are the same; a rotation of 16 with fixed signs for the operands of wgrad
    # only; gradients alone are rounded stochastically. 2 first and 8 last of 62 blocks stay in high precision (the
    # 12B model): here the last 13 per cent.
    gradient = Operand("nvfp4", rounding="stochastic")
    rotated = {"hadamard": 16, "signs": "fixed"}
    yield Recipe(
        name="nvfp4",
        forward=("nvfp4", "nvfp4-2d"),
        dgrad=(gradient, FORWARD),
        wgrad=(Operand("nvfp4", rounding="stochastic", **rotated), Operand("nvfp4", **rotated)),
        dense=(2, 0.13),
    )

    # Quartet, https://arxiv.org/abs/2505.14669, algorithm 1: forward, Hadamard 32 and the clipping scale that is best
    # for a Gaussian, of which the backward pass gets the mask; backward, the forward's values and the gradient are
    # rotated with new signs, multiplied by 3/4 and rounded stochastically. The release takes a block's standard
    # deviation where QuEST and this have the root mean square: rotated values have a mean near 0.
    forward = Operand("mxfp4-quest", hadamard=32, signs="none", estimator="clip")
    gradient = Operand("mxfp4", rounding="stochastic", hadamard=32, prescale=3 / 4)
    again = Operand("mxfp4", rounding="stochastic", hadamard=32, prescale=3 / 4, of="forward")
    yield Recipe(name="quartet", forward=(forward, forward), dgrad=(gradient, again), wgrad=(gradient, again))

    # Quartet II, https://arxiv.org/abs/2601.22813, section 5: forward, Four Over Six in 1 x 16 blocks and no rotation;
    # backward, MS-EDEN with rotations of 128 of the gradient and of the forward's values. .93 * 17/16 is the release's.
    gradient = Operand("nvfp4-eden", rounding="eden", hadamard=128)
    again = Operand("nvfp4-eden", rounding="eden", hadamard=128, of="forward")
    yield Recipe(name="quartet2", forward=("nvfp4-46", "nvfp4-46"), dgrad=(gradient, again), wgrad=(gradient, again))

    # TetraJet-v2, https://arxiv.org/abs/2510.27527, section 4, the release's TJv2-base: 1 x 16 blocks whose E4M3
    # scales share one fp32 scale in 128 values (double-block); backward, rotations of 16, stochastic rounding of both
    # operands, and the forward's values quantized again (aligned activations). Its two other parts belong to a training
    # loop, not to a layer: OutControl (`out_control`) chooses the channels that are multiplied in MXFP8 from then on,
    # OsciReset (`osci_reset`) writes master weights.
    gradient = Operand("nvfp4-128", rounding="stochastic", hadamard=16)
    again = Operand("nvfp4-128", rounding="stochastic", hadamard=16, of="forward")
    yield Recipe(name="tetrajet2", forward=("nvfp4-128", "nvfp4-128"), dgrad=(gradient, again), wgrad=(gradient, again))

    # QuEST, https://arxiv.org/abs/2502.05003, algorithm 1 with 4 bits: Hadamard 128, 16 even levels around 0 that are
    # best for a Gaussian of the row's root mean square, trust mask; backward in high precision with the forward's
    # values. The grid has no zero, as in the release (HalfHadamardTrustQuantizer).
    quest = Operand("int4-quest", hadamard=128, signs="none", estimator="trust")
    yield Recipe(name="quest", weight=quest, activation=quest)

    # LUQ, https://arxiv.org/abs/2112.10769, section 4: forward INT4 clipped by SAWB, one scale a tensor; gradients on a
    # grid of powers of two whose top is the largest (E3M0), rounded stochastically both between powers and below the
    # smallest one (stochastic underflow). The paper's second sample for wgrad (SMP) is not taken, nor its 2 x 16-bit
    # first and last layers.
    yield Recipe(
        name="luq", weight="int4-sawb", activation="int4-sawb", gradient=Operand("e3m0:tensor", rounding="stochastic")
    )

    # QLoRA, https://arxiv.org/abs/2305.14314, section 3: a base that is kept as NF4 in blocks of 64, with scales
    # that are quantized again, and is not trained; activations and gradients stay in high precision.
    yield Recipe(name="qlora-nf4", store="nf4-dq", frozen=True)


def _released() -> Iterator[Recipe]:
    # Stable-SPAM, https://arxiv.org/abs/2502.17055v2, as released (`lowbit.nn.stablespam`), to compare with.
    yield Recipe(name="stablespam-int4", weight="stablespam-int4-weight", activation="stablespam-int4-activation")
    yield Recipe(name="stablespam-fp4", weight="stablespam-fp4", activation="stablespam-fp4")


@cache
def presets() -> Mapping[str, Recipe]:
    """The recipes that have names. Built at first use."""
    groups = (_own(), _eight_bits(), _four_bits(), _released())
    return MappingProxyType({recipe.name: recipe for group in groups for recipe in group})


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
        known = f"known: {', '.join(recipes())}"
        try:
            fmt = find_format(recipe)
        except ValueError:
            raise ValueError(f"unknown recipe {recipe!r}{nearest(recipe, recipes())}; {known}") from None
        example = f"Recipe(weight={fmt.name!r})"
        raise ValueError(f"{recipe!r} is a format and no recipe: recipes are made of it, such as {example}; {known}")
    return presets()[recipe]
