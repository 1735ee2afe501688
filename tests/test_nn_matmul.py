"""Operands multiplied as codes: torch's int8 and fp8 matmuls, forced on a CPU, where they exist but are slow."""

import pytest
import torch
from torch import Tensor

from lowbit.nn import Operand, QuantLinear, Recipe, recipes
from lowbit.nn.fake import encode, fake_quantize
from lowbit.nn.matmul import Coded, _filled, kind_of, multiplied_as, product

CPU = torch.device("cpu")


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def codes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWBIT_MATMUL", "codes")


def coded(x: Tensor, name: str) -> Coded:
    operand = Operand(name)
    return Coded(operand, encode(x, operand), x.shape[1])


PAIRS = [
    ("int8:row", "int8:row", "int8"),
    ("int8:row", "int8:tensor", "int8"),
    ("int8:row", "ternary", "int8"),
    ("int4:row", "int4-sawb", "int8"),
    ("e4m3:tensor", "e4m3:tensor", "fp8"),
    ("e5m2:tensor", "e4m3:row", "fp8"),
]


@pytest.mark.parametrize(("first", "second", "kind"), PAIRS)
@pytest.mark.parametrize("shape", [(17, 40, 24), (1, 33, 7), (5, 128, 1)])
def test_products_of_codes_are_those_of_the_values(codes: None, first: str, second: str, kind: str, shape) -> None:
    """To 1e-5 of the largest; int8 sums are exact, so only the scales' products are rounded."""
    m, k, n = shape
    x, w, bias = randn(m, k), randn(n, k, seed=1), randn(n, seed=2)
    a, b = coded(x, first), coded(w, second)
    assert multiplied_as(a, b) == kind
    y = product(a, b, torch.float32, bias)
    exact = fake_quantize(x, a.operand).double() @ fake_quantize(w, b.operand).double().T + bias
    assert (y - exact).abs().max() < 1e-5 * exact.abs().max()
    assert product(a, b, torch.bfloat16).dtype == torch.bfloat16


def test_a_whole_tensors_scale_lets_codes_be_read_across(codes: None) -> None:
    g, w = randn(9, 24), randn(24, 40, seed=1)
    a, b = coded(g, "int8:row"), coded(w, "int8:tensor").t()
    assert multiplied_as(a, b) == "int8"
    exact = a.values().double() @ w.double().div(w.abs().max() / 127).round() * (w.abs().max() / 127)
    assert (product(a, b, torch.float32) - exact).abs().max() < 1e-4
    assert multiplied_as(a, coded(w, "int8:row").t()) is None  # whose scales are along the sum
    torch.testing.assert_close(
        product(a, coded(w, "int8:row").t(), torch.float32), a.values() @ coded(w, "int8:row").values()
    )


@pytest.mark.parametrize("name", recipes())
def test_forced_codes_give_the_layers_results(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every preset, whichever of its matmuls have codes that torch multiplies; int8 and fp8 have all three."""
    layer, x, g = QuantLinear(40, 24, recipe=name), randn(19, 40), randn(19, 24, seed=1)
    found, asked = {}, []
    for mode in ("values", "codes"):
        monkeypatch.setenv("LOWBIT_MATMUL", mode)
        for function in ("_int_mm", "_scaled_mm"):
            real = getattr(torch, function)
            monkeypatch.setattr(torch, function, lambda *a, real=real, **k: asked.append(1) or real(*a, **k))
        layer.zero_grad()
        layer._calls.count.zero_()
        given = x.clone().requires_grad_()
        y = layer(given)
        y.backward(g)
        found[mode] = [y.detach(), given.grad, layer.weight.grad.clone()]
        monkeypatch.undo()
    for a, b in zip(found["values"], found["codes"], strict=True):
        assert (a - b).abs().max() <= 1e-5 * a.abs().max()
    expected = {"int8": 3, "fp8": 3, "switchback": 2, "bitnet": 1, "luq": 1}
    assert len(asked) == expected.get(name, 0)


def test_what_a_gpu_is_given_is_whole_tiles() -> None:
    for shape in ((1, 1), (16, 16), (17, 40), (33, 48)):
        x = torch.randint(-7, 8, shape, dtype=torch.int8)
        for least in (16, 32):
            y = _filled(x, least)
            assert y.shape[0] % 16 == y.shape[1] % 16 == 0 and y.shape[0] >= least and y.dtype == x.dtype
            assert torch.equal(y[: shape[0], : shape[1]], x) and y.count_nonzero() == x.count_nonzero()
    whole = torch.zeros(32, 16, dtype=torch.float8_e4m3fn)
    assert _filled(whole, 32) is whole


def test_non_finite_values_show(codes: None) -> None:
    x = randn(4, 32)
    x[1, 3] = torch.nan
    for name in ("int8:row", "e4m3:row"):
        y = product(coded(x, name), coded(randn(5, 32, seed=1), name), torch.float32)
        assert y[1].isnan().all() and y[[0, 2, 3]].isfinite().all()


def test_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    int8, fp8, e5m2 = Operand("int8:row"), Operand("e4m3:tensor"), Operand("e5m2:tensor")
    assert kind_of(int8, int8, CPU) is None  # on a CPU it would take many times as long
    capability = (9, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    gpu = torch.device("cuda", 0)
    assert (kind_of(int8, int8, gpu), kind_of(fp8, fp8, gpu), kind_of(e5m2, fp8, gpu)) == ("int8", "fp8", "fp8")
    capability = (8, 0)
    assert (kind_of(int8, int8, gpu), kind_of(fp8, fp8, gpu)) == ("int8", None)
    monkeypatch.setenv("LOWBIT_MATMUL", "values")
    assert kind_of(int8, int8, gpu) is None
    monkeypatch.setenv("LOWBIT_MATMUL", "codes")
    assert kind_of(int8, int8, CPU) == "int8"
    for other in (Operand("int8:32"), Operand("int4:16"), Operand("mxfp4"), Operand("nvfp4"), None, fp8):
        assert kind_of(int8, other, CPU) is None
    assert kind_of(e5m2, e5m2, CPU) is None  # no matrix unit has both
    monkeypatch.setenv("LOWBIT_MATMUL", "fast")
    with pytest.raises(ValueError, match="may be auto, codes or values"):
        QuantLinear(8, 8, recipe=Recipe(weight="int8:row", activation="int8:row"))(torch.ones(2, 8))
