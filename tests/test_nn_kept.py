"""What a layer keeps between its forward and its backward pass: codes of x, and W itself, once."""

import pytest
import torch
from torch import nn

import lowbit
from lowbit.nn import Operand, QuantLinear, Recipe, StoredWeight, recipes

TOKENS, FEATURES, OUTPUTS = 256, 512, 384


@pytest.fixture(autouse=True)
def one_thread():
    """These matmuls are too small for two: on a busy machine, waking the second takes most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def parts_of(t: torch.Tensor) -> list[torch.Tensor]:
    return list(t.parts.values()) if isinstance(t, StoredWeight) else [t]


def kept(layer: nn.Module, dtype: torch.dtype = torch.float32) -> tuple[int, int]:
    """(bytes that autograd keeps, bytes of them that are no parameter)."""
    x = torch.randn(TOKENS, FEATURES, dtype=dtype, requires_grad=True)
    found: dict[int, torch.Tensor] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        for part in parts_of(t):
            found[part.untyped_storage().data_ptr()] = part
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = layer(x)
    own = {part.untyped_storage().data_ptr() for p in layer.parameters() for part in parts_of(p)}
    y.sum().backward()
    sizes = {at: t.untyped_storage().nbytes() for at, t in found.items()}
    return sum(sizes.values()), sum(n for at, n in sizes.items() if at not in own)


# What is kept of x for each of its values, in bits: the format's own, and masks. None: x itself.
BITS = {
    "int4": 6, "fp4": 6, "int8": 8.2, "jetfire": 8.2, "fp8": 8.2, "bitnet": 8.2, "luq": 4.2,
    "mxfp4": 4.25, "nvfp4": 4.52, "quartet": 5.25, "quartet2": 4.52, "tetrajet2": 4.75, "quest": 5.1,
    "switchback": None, "stablespam-int4": None, "stablespam-fp4": None, "qlora-nf4": None,
}  # fmt: skip


@pytest.mark.parametrize("name", recipes())
def test_saved_activations_are_the_codes(name: str) -> None:
    """A quarter of what nn.Linear keeps in bfloat16 at 4 bits, half of it at 8; and the weight not twice."""
    layer, values = QuantLinear(FEATURES, OUTPUTS, recipe=name), TOKENS * FEATURES
    everything, of_x = kept(layer)
    assert everything - of_x == layer.weight.nbytes
    bits = BITS[name]
    assert of_x <= values * (bits or 32) / 8 + 200
    if bits is not None:
        dense, dense_x = kept(nn.Linear(FEATURES, OUTPUTS))
        assert dense_x == values * 4 and dense == dense_x + layer.weight.nbytes
        half = {4: 0.375, 8: 0.55}[4 if bits < 8 else 8]  # of bfloat16: .25 and .5, and scales
        assert of_x <= half * dense_x / 2


@pytest.mark.parametrize("name", recipes())
def test_frozen_weights_keep_no_activations(name: str) -> None:
    layer, x = QuantLinear(64, 16, recipe=name), torch.randn(4, 64, requires_grad=True)
    layer.weight.requires_grad_(False)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.shape), lambda t: t):
        sizes: list[torch.Size] = []
        layer(x)
    allowed = {torch.Size([16, 64]), torch.Size([])}  # the weight; the number of the call
    allowed |= {torch.Size([4, 8]), torch.Size([4, 16])} if name in ("quartet", "quest") else set()  # masks
    assert set(sizes) <= allowed
    y = layer(x)
    y.sum().backward()
    assert layer.weight.grad is None and x.grad is not None and layer.bias.grad is not None
    layer.requires_grad_(False)
    assert not layer(torch.randn(4, 64)).requires_grad


def test_an_input_without_gradient_keeps_no_weight() -> None:
    layer, shapes = QuantLinear(64, 16, recipe="int4"), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(t.shape), lambda t: t):
        layer(torch.randn(4, 64))
    assert torch.Size([16, 64]) not in shapes


def test_a_weight_changed_before_backward_is_an_error_as_in_nn_linear() -> None:
    for layer in (QuantLinear(64, 16, recipe="int4"), nn.Linear(64, 16)):
        y = layer(torch.randn(4, 64, requires_grad=True))
        with torch.no_grad():
            layer.weight.add_(1.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_codes_kept_give_the_values_that_the_forward_pass_used() -> None:
    """wgrad from codes is wgrad from the values that they stand for."""
    torch.manual_seed(0)
    x, g = torch.randn(24, 40), torch.randn(24, 8)
    for name in ("int4:16", "e2m1", "nf4", "mxfp4", "nvfp4", "int8:row", "e4m3:tensor", "bf16"):
        layer = QuantLinear(40, 8, bias=False, recipe=Recipe(activation=name))
        layer(x).backward(g)
        values = lowbit.quantize(x, name).dequantize()
        torch.testing.assert_close(layer.weight.grad, g.t() @ values, rtol=1e-6, atol=1e-5)


def test_what_no_codes_hold_is_made_again() -> None:
    """Outliers, flat groups, and operands of wgrad that have them: from x itself, with the same random bits."""
    torch.manual_seed(0)
    x, g = torch.randn(24, 40), torch.randn(24, 8)
    noisy = Operand("int4:16", rounding="stochastic")
    for second in (Operand("int4:8", outliers=1), Operand("int4:16", flat=True), "forward"):
        recipe = Recipe(activation=Operand("int4:16", outliers=1), weight="int4:16", dgrad=(noisy, "forward"),
                        wgrad=(noisy, second))  # fmt: skip
        layer = QuantLinear(40, 8, bias=False, recipe=recipe)
        layer(x).backward(g)
        assert layer.weight.grad is not None
        assert torch.nn.functional.cosine_similarity(layer.weight.grad.flatten(), (g.t() @ x).flatten(), 0) > 0.97
