"""Recipes are values: what they say, what they refuse."""

import copy
import pickle

import pytest

import lowbit
from lowbit.nn import Operand, Recipe, recipes
from lowbit.nn.presets import find_recipe


def test_presets() -> None:
    assert {"int4", "fp4", "stablespam-int4", "stablespam-fp4"} <= set(recipes())
    for name in recipes():
        recipe = find_recipe(name)
        assert recipe.name == name
        assert str(recipe).startswith(f"{name}: forward ") and "\n" not in str(recipe)
        assert pickle.loads(pickle.dumps(recipe)) == copy.deepcopy(recipe) == recipe
        assert hash(recipe) == hash(copy.deepcopy(recipe))


def test_our_presets_use_groups_of_16_to_32() -> None:
    for name, fmt in (("int4", "int4"), ("fp4", "e2m1")):
        for operand in find_recipe(name).forward:
            assert operand is not None and operand.format == fmt and operand.block in (16, 32)


def test_released_presets_are_the_papers() -> None:
    fp4, int4 = find_recipe("stablespam-fp4").forward, find_recipe("stablespam-int4").forward
    assert fp4 == (Operand("stablespam-fp4"), Operand("stablespam-fp4"))
    assert int4 == (Operand("stablespam-int4-activation"), Operand("stablespam-int4-weight"))
    for operand in (*fp4, int4[0]):
        assert operand is not None and (operand.block, operand.outliers, operand.flat) == (256, 2, True)
    assert int4[1] is not None and int4[1].outliers == 0


def test_shorthands() -> None:
    gradient = Operand("int8", rounding="stochastic")
    short = Recipe(weight="int4:32", activation="e2m1", gradient=gradient)
    int4, e2m1 = Operand("int4", block=32), Operand("e2m1")
    assert short == Recipe(forward=(e2m1, int4), dgrad=(gradient, "forward"), wgrad=(gradient, "forward"))
    assert short.stochastic and not Recipe(weight="int4").stochastic
    assert Recipe(weight="int4").dgrad == (None, "forward")
    assert Recipe(forward=("int4", None)).forward == (Operand("int4"), None)
    assert Recipe(gradient="int8").bits is None


def test_what_is_stored_is_not_called_a_float() -> None:
    assert Recipe(store="int4").matmuls.startswith("forward float × stored, dgrad float × forward")
    assert Recipe(store="int4", dgrad=("int8", None)).matmuls.endswith("dgrad int8:256 × stored, wgrad float × forward")
    assert Recipe(activation="int8").matmuls.startswith("forward int8:256 × float")
    assert find_recipe("switchback").matmuls.endswith("wgrad float × float")


def test_operands_normalise() -> None:
    assert Operand("int4:32") == Operand("int4", block=32) == Operand(lowbit.format("int4:32")).__class__("int4:32")
    assert Operand("int4").block == lowbit.format("int4").block[1]
    assert Operand(lowbit.format("e2m1")).spec == lowbit.format("e2m1")
    assert Operand("bf16").block is None
    assert str(Operand("int4:32", outliers=2, rounding="stochastic")) == "int4:32 +2 outliers stochastic"
    assert str(Operand(lowbit.format("e2m1:16"))) == "e2m1:16"
    assert str(Operand("int4", block=64, flat=True)) == "int4:64 flat"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: find_recipe("int44"), ["int44", "did you mean 'int4'"]),
        (lambda: find_recipe("stablespam-fp8"), ["did you mean 'stablespam-fp4'"]),
        (lambda: Recipe(weight="int44"), ["forward", "int44", "did you mean 'int4'"]),
        (lambda: Recipe(gradient="in8"), ["dgrad", "did you mean 'int8'"]),
        (lambda: Recipe(weight="int4", store="int5"), ["store", "int5", "did you mean 'int8'"]),
        (lambda: Recipe(store="fp8"), ["unknown store 'fp8'", "did you mean 'e4m3' or 'mxfp8'", "nvfp4", "split8"]),
        (lambda: Recipe(store="nvfp"), ["unknown store 'nvfp'", "did you mean 'nvfp4'"]),
        (lambda: Recipe(embedding="fp4"), ["did you mean 'e2m1' or 'mxfp4' or 'nvfp4'"]),
        (lambda: Recipe(weight="fp8"), ["forward", "did you mean 'e4m3' or 'mxfp8'"]),
        (lambda: find_recipe("int4:32"), ["'int4:32' is a format and no recipe", "Recipe(weight='int4:32')"]),
        (lambda: find_recipe("nf4"), ["is a format", "Recipe(weight='nf4')", "known: int4"]),
        (lambda: Recipe(), ["quantizes nothing"]),
        (lambda: Recipe(forward=("int4", "int4"), weight="int4"), ["weight=", "forward="]),
        (lambda: Recipe(weight="int4", dgrad=("int8", "forward"), gradient="int8"), ["gradient=", "dgrad="]),
        (lambda: Recipe(forward="int4"), ["pair"]),
        (lambda: Recipe(forward=("int4", "forward")), ["unknown format 'forward'"]),
        (lambda: Recipe(weight=Operand("int4", rounding="stochastic")), ["forward", "nearest"]),
        (lambda: Recipe(weight="int4", seed="x"), ["seed"]),
        (lambda: Operand("sqrt8"), ["sqrt8", "unsigned"]),
        (lambda: Operand("int4", rounding="up"), ["rounding", "'up'"]),
        (lambda: Operand("int4", block=0), ["block"]),
        (lambda: Operand("stablespam-fp4", block=0), ["block"]),
        (lambda: Operand("int4", outliers=-1), ["outliers"]),
        (lambda: Operand("int4:16", block=32), ["block=32"]),
        (lambda: Operand("bf16", block=32), ["bf16", "no blocks"]),
        (lambda: Operand("stablespam-fp4", rounding="stochastic"), ["rounds to nearest"]),
        (lambda: Operand("stablespam-fp4", hadamard=16), ["as released", "hadamard"]),
        (lambda: Operand("int4", hadamard=24), ["hadamard", "16, 32, 64, 128", "24"]),
        (lambda: Operand("int4", signs="none"), ["signs='none'", "hadamard is 0"]),
        (lambda: Operand("int4", hadamard=16, signs="new"), ["signs must be 'auto', 'fixed' or 'none'"]),
        (lambda: Operand("int4", hadamard=16, flat=True), ["flat", "hadamard"]),
        (lambda: Operand("int4", prescale=1.5), ["prescale", "1.5"]),
        (lambda: Operand("int4-affine", prescale=0.5), ["int4-affine", "prescale"]),
        (lambda: Operand("bf16", prescale=0.5), ["bf16", "no blocks"]),
        (lambda: Operand("int4", estimator="soft"), ["estimator", "'soft'"]),
        (lambda: Operand("int4", outliers=1, estimator="dge"), ["estimator='dge'", "outliers"]),
        (lambda: Operand("bf16", estimator="clip"), ["estimator='clip'", "grid"]),
        (lambda: Operand("int8:row", outliers=2), ["outliers", "(1, 0)"]),
        (lambda: Operand("nvfp4-eden", rounding="eden"), ["eden", "hadamard"]),
        (lambda: Operand("mxfp4", rounding="eden", hadamard=32), ["eden", "e4m3", "mxfp4"]),
        (lambda: Operand("nvfp4-128", block=48), ["128", "divide"]),
        (lambda: Recipe(weight=Operand("int4", of="forward")), ["forward", "of='forward'"]),
        (lambda: Recipe(gradient=Operand("int4", of="forward")), ["dgrad", "forward pass has no gradient"]),
        (lambda: Recipe(gradient=Operand("int4", estimator="clip")), ["dgrad", "estimator='clip'"]),
        (lambda: Recipe(weight=Operand("int4", hadamard=16)), ["forward", "rotated alike", "hadamard=16", "none"]),
        (lambda: Recipe(gradient=Operand("int4", hadamard=16)), ["dgrad", "rotated alike"]),
        (
            lambda: Recipe(wgrad=(Operand("int4", hadamard=16), Operand("int4", hadamard=16, signs="fixed"))),
            ["wgrad", "signs='auto'", "signs='fixed'"],
        ),
    ],
)
def test_refusals(make, words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        make()
    assert all(word in str(error.value) for word in words), str(error.value)


def test_wrong_types() -> None:
    with pytest.raises(TypeError, match="name or a Recipe"):
        find_recipe(4)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="forward"):
        Recipe(weight=4)  # type: ignore[arg-type]
