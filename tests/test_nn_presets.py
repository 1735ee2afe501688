"""Every preset against its own statement (tests/statements): all three matmuls, at any shape; and each is its own."""

from collections.abc import Callable
from itertools import combinations

import numpy as np
import pytest
import torch
from statements import gaussian, mx, nv, plain, released
from statements.common import Matmuls, Matrix
from torch import Tensor

from lowbit.nn import QuantLinear, recipes
from lowbit.nn.three import Call
from lowbit.rounding import uniform
from lowbit.rows import row_bits

STATEMENTS: dict[str, Callable[..., Matmuls]] = {
    "int4": plain.int4,
    "fp4": plain.fp4,
    "int8": plain.int8,
    "switchback": plain.switchback,
    "jetfire": plain.jetfire,
    "fp8": plain.fp8,
    "bitnet": plain.bitnet,
    "mxfp4": mx.mxfp4,
    "quartet": mx.quartet,
    "nvfp4": nv.nvidia,
    "quartet2": nv.quartet2,
    "tetrajet2": nv.tetrajet2,
    "qlora-nf4": gaussian.qlora,
    "quest": gaussian.quest,
    "luq": gaussian.luq,
    "stablespam-int4": released.int4,
    "stablespam-fp4": released.fp4,
}
OPERANDS = {"dgrad gradient": 1, "dgrad weight": 2, "wgrad gradient": 3, "wgrad activation": 4}


@pytest.fixture(autouse=True)
def one_thread():
    """These matmuls are too small for two: on a busy machine, waking the second takes most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class FromLowbit:
    """The random numbers of a layer's first call, and nothing else of lowbit."""

    def __init__(self, layer: QuantLinear) -> None:
        self.call = Call(layer.recipe, torch.float32, 1, layer._layer_id)

    def uniform(self, operand: str, rows: int, cols: int) -> Matrix:
        return uniform(row_bits(self.call.noise(OPERANDS[operand]), torch.empty(rows, cols))).double().numpy()

    def signs(self, matmul: str, size: int, cols: int) -> Matrix:
        rotation = self.call.rotation(matmul)
        assert rotation is not None and rotation.size == size
        return np.where(rotation.signs(-(-cols // size) * size).numpy(), -1.0, 1.0)[None, :]


def randn(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator) * torch.exp(0.7 * torch.randn(shape[0], 1, generator=generator))


def ours(layer: QuantLinear, x: Tensor, g: Tensor) -> list[Tensor]:
    layer.zero_grad()
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(g)
    assert x.grad is not None and layer.weight.grad is not None
    return [y.detach(), x.grad, layer.weight.grad]


def layer_of(name: str, outputs: int, features: int) -> QuantLinear:
    layer = QuantLinear(features, outputs, bias=False, recipe=name, name="block.0")
    with torch.no_grad():
        layer.weight.copy_(weight_of(outputs, features))
    return layer


def weight_of(outputs: int, features: int) -> Tensor:
    """What the layer is given; a layer that stores it has no more than its codes."""
    return randn(outputs, features, seed=1) / features**0.5


def test_every_preset_has_a_statement() -> None:
    assert set(STATEMENTS) == set(recipes())


@pytest.mark.parametrize(("tokens", "features", "outputs"), [(64, 128, 96), (75, 100, 52), (1, 33, 20)])
@pytest.mark.parametrize("name", STATEMENTS)
def test_the_three_matmuls_of_a_preset_are_its_statement(name: str, tokens: int, features: int, outputs: int) -> None:
    layer = layer_of(name, outputs, features)
    x, g = randn(tokens, features, seed=2), randn(tokens, outputs, seed=3)
    got = ours(layer, x, g)
    expected = STATEMENTS[name](*(v.double().numpy() for v in (x, weight_of(outputs, features), g)), FromLowbit(layer))
    for what, a, b in zip(("y", "gx", "gW"), got, expected, strict=True):
        scale = np.abs(b).max()
        np.testing.assert_allclose(a.numpy() / scale, b / scale, atol=2e-6, rtol=0, err_msg=f"{name} {what}")


def test_presets_differ_from_each_other() -> None:
    """On one input, no two presets have the same output and gradients; and the statements differ as much."""
    x, g = randn(96, 160, seed=4), randn(96, 64, seed=5)
    found = {name: ours(layer_of(name, 64, 160), x, g) for name in recipes()}
    for a, b in combinations(found, 2):
        differ = [not torch.equal(u, v) for u, v in zip(found[a], found[b], strict=True)]
        assert any(differ), (a, b)
        assert all(differ) or {a, b} & {"mxfp4", "switchback"}, (a, b, differ)
