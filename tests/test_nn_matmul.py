"""Operands multiplied as codes: torch's int8 and fp8 matmuls, forced on a CPU, where they exist but are slow.

Those with block scales exist on no CPU. Here the call is answered by a statement of what it computes, in float64.
"""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit.nn import Operand, QuantLinear, Recipe, blockwise, recipes
from lowbit.nn.blockwise import swizzled
from lowbit.nn.fake import encode, fake_quantize
from lowbit.nn.matmul import Coded, _filled, _of_codes, kind_of, multiplied_as, product

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


@pytest.fixture
def gpu(codes: None, monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], torch.device]:
    """A GPU of a compute capability, to be asked about."""

    def of(major: int, minor: int) -> torch.device:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, minor))
        return torch.device("cuda", 0)

    return of


MX, MX5, NV, TILES = (Operand(name) for name in ("mxfp8-rceil", "mxfp8-e5m2", "nvfp4", "nvfp4-2d"))


def test_values_are_multiplied_unless_codes_are_asked_for(
    gpu: Callable[[int, int], torch.device], monkeypatch: pytest.MonkeyPatch
) -> None:
    int8, fp8, device = Operand("int8:row"), Operand("e4m3:tensor"), gpu(12, 0)
    for pair in ((int8, int8), (fp8, fp8), (MX, MX), (NV, NV)):
        assert kind_of(*pair, device) is not None
        for mode in ("", "auto", "values"):
            monkeypatch.setenv("LOWBIT_MATMUL", mode)
            assert kind_of(*pair, device) is kind_of(*pair, CPU) is None
        monkeypatch.setenv("LOWBIT_MATMUL", "codes")


def test_the_choice(gpu: Callable[[int, int], torch.device], monkeypatch: pytest.MonkeyPatch) -> None:
    int8, fp8, e5m2 = Operand("int8:row"), Operand("e4m3:tensor"), Operand("e5m2:tensor")
    pairs = [(int8, int8), (fp8, fp8), (e5m2, fp8), (MX, MX), (MX5, MX), (NV, NV), (NV, TILES)]
    for capability, known in (((7, 5), 0), ((8, 0), 1), ((8, 9), 3), ((9, 0), 3), ((10, 0), 7), ((12, 0), 7)):
        found = [kind_of(*pair, gpu(*capability)) for pair in pairs]
        assert found == ["int8", "fp8", "fp8", "mxfp8", "mxfp8", "nvfp4", "nvfp4"][:known] + [None] * (7 - known)
    assert [kind_of(*pair, CPU) for pair in pairs] == ["int8", "fp8", "fp8", None, None, None, None]
    device = gpu(10, 0)
    assert kind_of(NV, TILES, device, b_across=True) == "nvfp4"
    refused = [(MX5, MX5), (MX, NV), (NV, fp8), (MX, None)]
    refused += [(NV, Operand(name)) for name in ("mxfp4", "nvfp4-128", "e2m1:16", "e4m3:32")]
    refused += [(MX, Operand("mxfp8", block=16)), (MX, Operand("mxfp8", prescale=0.5))]
    assert [kind_of(*pair, device) for pair in refused] == [None] * len(refused)
    assert kind_of(NV, NV, device, b_across=True) is kind_of(MX, MX, device, a_across=True) is None
    for other in (Operand("int8:32"), Operand("int4:16"), Operand("mxfp4"), NV, None, fp8):
        assert kind_of(int8, other, CPU) is None
    assert kind_of(e5m2, e5m2, CPU) is None  # no matrix unit has both
    monkeypatch.setenv("LOWBIT_MATMUL", "fast")
    with pytest.raises(ValueError, match="may be codes, or values"):
        QuantLinear(8, 8, recipe=Recipe(weight="int8:row", activation="int8:row"))(torch.ones(2, 8))


# --- Block scales ----------------------------------------------------------------------------------------------------

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


@pytest.mark.rivals
@pytest.mark.parametrize("shape", [(128, 4), (256, 4), (128, 12), (384, 8)])
def test_scales_are_in_the_order_of_torchaos_to_blocked(shape: tuple[int, int]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        utils = pytest.importorskip("torchao.prototype.mx_formats.utils")
    scale = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(swizzled(scale), utils.to_blocked(scale))


def scaled_mm(a: Tensor, b: Tensor, a_scale: Tensor, a_recipe: Any, b_scale: Tensor, b_recipe: Any, **given: Any):
    """What torch documents of the call, in float64, and what its checks on a GPU ask of its arguments."""
    assert given.keys() == {"swizzle_a", "swizzle_b", "output_dtype"} and given["output_dtype"] == torch.float32
    assert given["swizzle_a"] == given["swizzle_b"] == F.SwizzleType.SWIZZLE_32_4_4
    assert a.is_contiguous() and b.t().is_contiguous()
    fp4 = a.dtype == torch.float4_e2m1fn_x2
    assert a_recipe == b_recipe == (F.ScalingType.BlockWise1x16 if fp4 else F.ScalingType.BlockWise1x32)
    values = []
    for x, scale in ((a, a_scale), (b.t(), b_scale)):
        assert x.dtype in ((a.dtype,) if fp4 else (torch.float8_e4m3fn, torch.float8_e5m2))
        assert scale.dtype == (torch.float8_e4m3fn if fp4 else torch.float8_e8m0fnu) and scale.is_contiguous()
        rows, bytes_, block = len(x), x.shape[1], 16 if fp4 else 32
        cols = 2 * bytes_ if fp4 else bytes_
        assert rows % 16 == 0 and bytes_ % 16 == 0
        across = -(-cols // block // 4) * 4
        assert scale.shape == (-(-rows // 128) * 128 * across,)
        held = torch.empty(rows, cols, dtype=torch.float64)
        raw = x.contiguous().view(torch.uint8)
        for i in range(rows):
            for j in range(cols // block):  # the tile of 128 x 4, and the place in it
                at = (i // 128 * (across // 4) + j // 4) * 512 + i % 32 * 16 + i % 128 // 32 * 4 + j % 4
                some = slice(j * block, (j + 1) * block)
                if fp4:
                    codes = [raw[i, k // 2] >> 4 * (k % 2) & 15 for k in range(some.start, some.stop)]
                    found = torch.tensor([E2M1[c & 7] * (-1 if c & 8 else 1) for c in map(int, codes)])
                else:
                    found = x[i, some].float()
                held[i, some] = found.double() * scale[at].double()
        values.append(held)
    return (values[0] @ values[1].t()).float()


@pytest.mark.parametrize("shape", [(17, 40, 24), (1, 33, 7), (130, 192, 5)])
@pytest.mark.parametrize(
    ("first", "second", "kind"),
    [("mxfp8-rceil", "mxfp8", "mxfp8"), ("mxfp8-e5m2", "mxfp8-rceil", "mxfp8"), ("nvfp4", "nvfp4-46", "nvfp4"),
     ("nvfp4", "nvfp4-2d", "nvfp4")],
)  # fmt: skip
def test_products_of_codes_with_block_scales_are_those_of_the_values(
    first: str, second: str, kind: str, shape, gpu: Callable[[int, int], torch.device], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu(10, 0)
    monkeypatch.setattr(F, "scaled_mm", scaled_mm)
    m, k, n = shape
    a, b = coded(randn(m, k), first), coded(randn(n, k, seed=1), second)
    exact = a.values().double() @ b.values().double().t()
    assert (_of_codes(kind, a, b) - exact).abs().max() < 1e-6 * exact.abs().max()
    if second == "nvfp4-2d":  # a tile is the same seen across
        across = coded(randn(k, n, seed=2), second).t()
        exact = a.values().double() @ across.values().double().t()
        assert (_of_codes(kind, a, across) - exact).abs().max() < 1e-6 * exact.abs().max()


def test_a_layer_on_such_a_gpu_takes_the_call(
    gpu: Callable[[int, int], torch.device], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The preset's forward pass and dgrad; the device of the tensors is made out to be a GPU's."""
    device, asked, results = gpu(10, 0), [], {}
    monkeypatch.setattr(F, "scaled_mm", lambda *a, **k: asked.append(a[0].dtype) or scaled_mm(*a, **k))
    real = blockwise.kind_of
    for recipe, calls in (("nvfp4", 3), (Recipe(weight="mxfp8", activation="mxfp8"), 1)):
        for where in (CPU, device):
            monkeypatch.setattr(blockwise, "kind_of", lambda *a, where=where: real(*a[:4], where))
            asked.clear()
            torch.manual_seed(0)
            layer, x = QuantLinear(40, 24, recipe=recipe), randn(19, 40).requires_grad_()
            y = layer(x)
            y.backward(randn(19, 24, seed=1))
            results[where] = [y.detach(), x.grad, layer.weight.grad]
            assert len(asked) == (0 if where is CPU else calls)
        for a, b in zip(*results.values(), strict=True):
            assert (a - b).abs().max() <= 1e-5 * a.abs().max()
