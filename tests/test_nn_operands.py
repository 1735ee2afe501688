"""What the fields of an operand mean: rotations, prescale, estimators, MS-EDEN; and that what is random is unbiased."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

import lowbit
from lowbit import scales
from lowbit.formats import Scaling
from lowbit.nn import Operand, QuantLinear, Recipe
from lowbit.nn.estimators import edge, factor
from lowbit.nn.fake import decode, encode, fake_quantize, padded, quantized, turned, turned_back
from lowbit.nn.presets import find_recipe, recipes
from lowbit.rotation import SIZES, Rotation
from lowbit.rounding import key
from lowbit.rows import unpack


@pytest.fixture(autouse=True)
def one_thread():
    """These matmuls are too small for two: on a busy machine, waking the second takes most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- Rotations -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("cols", [1, 16, 100, 128, 333])
@pytest.mark.parametrize("seed", [None, 5])
def test_rotated_products_are_the_plain_ones(size: int, cols: int, seed: int | None) -> None:
    """Where the size does not divide the contraction, zeros are appended; they change no product."""
    rotation = Rotation(size, seed)
    x, w = randn(7, cols, seed=1), randn(5, cols, seed=2)
    a, b = turned(x, rotation), turned(w, rotation)
    assert a.shape == (7, padded(cols, rotation)) and padded(cols, rotation) % size == 0
    torch.testing.assert_close(a @ b.T, x @ w.T, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(turned_back(a, rotation, cols), x, rtol=1e-5, atol=1e-5)


def test_a_rotation_without_signs_is_sylvesters_matrix() -> None:
    h = np.array([[1.0]])
    while len(h) < 32:
        h = np.block([[h, h], [h, -h]])
    got = turned(torch.eye(32), Rotation(32, None)).double().numpy()
    np.testing.assert_allclose(got, h / np.sqrt(32), atol=1e-7)


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 40])
def test_a_rotated_layer_of_fine_operands_is_nn_linear(tokens: int) -> None:
    """All three matmuls rotated, with ragged contractions, at formats that lose next to nothing."""
    fine = Operand("bf16", hadamard=32)
    recipe = Recipe(forward=(fine, fine), dgrad=(fine, fine), wgrad=(fine, replace(fine, of="forward")))
    layer, dense = QuantLinear(77, 45, recipe=recipe), torch.nn.Linear(77, 45)
    dense.load_state_dict(layer.state_dict())
    x, g = randn(tokens, 77), randn(tokens, 45, seed=1)
    found = []
    for module in (layer, dense):
        given = x.clone().requires_grad_()
        y = module(given)
        y.backward(g)
        found.append([y, given.grad, module.weight.grad])
    for a, b in zip(*found, strict=True):
        assert (a - b).norm() < 0.006 * b.norm()


def test_backward_signs_are_new_in_each_call_and_forward_signs_are_not() -> None:
    rotated = Operand("int4:16", hadamard=16)
    layer = QuantLinear(64, 32, bias=False, recipe=Recipe(forward=(rotated, rotated), dgrad=(rotated, rotated)))
    x = randn(8, 64).requires_grad_()
    first, second = layer(x), layer(x)
    assert torch.equal(first, second)
    grads = [torch.autograd.grad(y, x, torch.ones_like(y))[0] for y in (first, second)]
    assert not torch.equal(*grads)
    for signs in ("fixed", "none"):
        same = replace(rotated, signs=signs)
        layer.recipe = Recipe(forward=(rotated, rotated), dgrad=(same, same))
        assert not layer.recipe.stochastic
        grads = [torch.autograd.grad(layer(x).sum(), x)[0] for _ in range(2)]
        assert torch.equal(*grads)
    assert not torch.equal(turned(x, Rotation(16, 0)), turned(x, Rotation(16, None)))


@pytest.mark.parametrize("size", SIZES)
def test_rotations_spread_outliers(size: int) -> None:
    """What they are for: of rows with one large value, E2M1 loses much less."""
    x = randn(64, 256)
    x[:, 17] = 60.0
    error = lambda v, q: ((v - q).square().mean() / x.square().mean()).item()  # noqa: E731
    plain = fake_quantize(x, Operand("int4:128"))
    rotation = Rotation(size, 3)
    rotated = turned_back(fake_quantize(x, Operand("int4:128"), rotation=rotation), rotation, 256)
    assert error(x, rotated) < 0.9 * error(x, plain)


# --- Prescale --------------------------------------------------------------------------------------------------------


def test_prescale_keeps_stochastic_rounding_from_clipping() -> None:
    """OCP's floor lets values up to 8 units stand above a top of 6: clipped, their mean is wrong; at 3/4 it is not."""
    x = torch.full((1, 32), 7.5)

    def mean(operand: Operand) -> float:
        draws = [fake_quantize(x, operand, key(s, 0, 0, 0)).mean().item() for s in range(200)]
        return sum(draws) / len(draws)

    assert mean(Operand("mxfp4", rounding="stochastic")) == pytest.approx(6.0)
    assert mean(Operand("mxfp4", rounding="stochastic", prescale=0.75)) == pytest.approx(7.5, abs=0.05)


def test_prescaled_codes_have_the_scale_of_the_values_themselves() -> None:
    """2502.20586, algorithm 2: the shared exponent is that of x, the codes are those of 3/4 x."""
    x = randn(16, 64, seed=3) * torch.exp(3 * randn(16, 1, seed=4))
    operand = Operand("mxfp4", prescale=0.75)
    parts = encode(x, operand)
    assert torch.equal(parts["scale"], lowbit.quantize(x, "mxfp4").parts["scale"])
    units = decode(parts, operand, 64) * 0.75 / 2.0 ** (parts["scale"].float() - 127).repeat_interleave(32, 1)
    assert set(units.abs().unique().tolist()) <= {0, 0.5, 1, 1.5, 2, 3, 4, 6}
    assert torch.equal(decode(parts, operand, 64), fake_quantize(x, operand))


# --- Codes and values ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "operand", sorted({o for name in recipes() for o in find_recipe(name).operands}, key=str), ids=str
)
def test_codes_stand_for_the_values(operand: Operand) -> None:
    rotation = Rotation(operand.hadamard, 7) if operand.hadamard else None
    for shape in ((33, 100), (1, 1), (16, 128), (2, 3)):
        x, noise = randn(*shape, seed=6), key(1, 2, 3, 4)
        values = fake_quantize(x, operand, noise, rotation)
        parts = encode(x, operand, noise, rotation)
        both = quantized(x, operand, noise, rotation)
        assert torch.equal(both[0], values)
        if operand.codes is None:
            assert not parts
            continue
        assert torch.equal(decode(parts, operand, padded(shape[1], rotation)), values)
        assert parts.keys() == both[1].keys() and all(torch.equal(parts[k], both[1][k]) for k in parts)


# --- Estimators ------------------------------------------------------------------------------------------------------


def test_masks_are_the_papers() -> None:
    """On E2M1 in absmax units nothing clips; at a scale that clips, the mask's edges are 6 and 7."""
    u = torch.tensor([[0.0, 5.99, 6.01, 6.99, 7.01, -6.5, -8.0, 1.0] + [4.0] * 24])
    fmt = replace(lowbit.format("mxfp4-quest"), scaling=scales_of_one())
    for estimator, last in (("clip", 6.0), ("trust", 7.0)):
        operand = Operand(fmt, estimator=estimator)
        expected = (u.abs() <= last).float()
        assert torch.equal(factor(u, operand), expected)
        bits = quantized(u, operand, edge=edge(operand))[1]["inside"]
        assert torch.equal(unpack(bits, 1, 32).float(), expected) and bits.shape == (1, 4)
    for estimator in ("clip", "trust"):
        assert factor(randn(8, 64), Operand("e2m1", estimator=estimator)).eq(1).all()


def scales_of_one() -> Scaling:
    """A power-of-two scale that is 1 for the values above: rms 3.98 there, times a gain that floors to 4 / 2^2."""
    return replace(lowbit.format("mxfp4-quest").scaling, gain=1.1)


def test_dge_is_the_derivative_of_the_papers_function() -> None:
    """2501.17116, equations 7 and 8: the slope of delta/2 (1 + sign(2x/delta - 1) |2x/delta - 1|^(1/k)), at most 3."""
    grid = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    x = torch.linspace(0.003, 5.997, 640).view(20, 32).double()
    x[:, 31] = 6.0  # every block has the scale 1
    got = factor(x.float(), Operand("e2m1", estimator="dge")).double()

    def smooth(v: Tensor) -> Tensor:
        out = torch.zeros_like(v)
        for low, high in pairwise(grid):
            delta = high - low
            t = 2 * (v - low) / delta - 1
            inside = (v >= low) & (v < high)
            out = torch.where(inside, low + delta / 2 * (1 + t.sign() * t.abs() ** (1 / 5)), out)
        return out

    x.requires_grad_()
    smooth(x).sum().backward()
    assert x.grad is not None
    np.testing.assert_allclose(got[:, :31], x.grad[:, :31].clamp(max=3), rtol=2e-3)


@pytest.mark.parametrize("estimator", ["clip", "trust", "dge"])
@pytest.mark.parametrize("hadamard", [0, 32])
def test_estimators_multiply_the_gradients_of_the_layer(estimator: str, hadamard: int) -> None:
    """Both operands' gradients, in the rotated space where there is one: written out with the matrices themselves."""
    operand = Operand("int4-quest", hadamard=hadamard, signs="none" if hadamard else "auto", estimator=estimator)
    layer = QuantLinear(64, 24, bias=False, recipe=Recipe(weight=operand, activation=operand))
    x, g, w = randn(10, 64, seed=1), randn(10, 24, seed=2), layer.weight.detach()
    r = turned(torch.eye(64), Rotation(32, None)) if hadamard else torch.eye(64)
    given = x.clone().requires_grad_()
    layer(given).backward(g)
    plain = Operand("int4-quest")
    xq, wq = fake_quantize(x @ r, plain), fake_quantize(w @ r, plain)
    gx = (g @ wq) * factor(x @ r, operand) @ r.T
    gw = (g.T @ xq) * factor(w @ r, operand) @ r.T
    torch.testing.assert_close(given.grad, gx, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.weight.grad, gw, rtol=1e-4, atol=1e-4)
    assert not torch.equal(factor(x @ r, operand), torch.ones_like(x))


def test_estimators_hold_where_the_backward_matmul_uses_the_original() -> None:
    """A mask belongs to rotated values: a gradient that is not rotated is rotated for it, and back."""
    operand = Operand("int4-quest", hadamard=32, signs="none", estimator="clip")
    recipe = Recipe(forward=(operand, operand), dgrad=(None, None), wgrad=(None, None))
    layer, x, g = QuantLinear(64, 24, bias=False, recipe=recipe), randn(10, 64).requires_grad_(), randn(10, 24, seed=2)
    layer(x).backward(g)
    r = turned(torch.eye(64), Rotation(32, None))
    expected = (g @ layer.weight.detach() @ r) * factor(x.detach() @ r, operand) @ r.T
    torch.testing.assert_close(x.grad, expected, rtol=1e-4, atol=1e-4)


# --- Unbiased --------------------------------------------------------------------------------------------------------

DRAWS = 400


def draws(name: str | Recipe, x: Tensor, w: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and W over many calls, [draws, ...]."""
    layer = QuantLinear(w.shape[1], w.shape[0], bias=False, recipe=name)
    with torch.no_grad():
        layer.weight.copy_(w)
    found = []
    for _ in range(DRAWS):
        given = x.clone().requires_grad_()
        layer.weight.grad = None
        layer(given).backward(g)
        found.append((given.grad, layer.weight.grad))
    return torch.stack([a for a, _ in found]), torch.stack([b for _, b in found])


def forward_values(name: str) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """What a preset's backward matmuls estimate the product with: the forward's values, or the originals."""
    recipe = find_recipe(name)

    def values(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        a, b = recipe.forward
        return fake_quantize(x, a), fake_quantize(w, b)

    return (lambda x, w: (x, w)) if recipe.forward == (None, None) else values


@pytest.mark.parametrize("name", ["jetfire", "mxfp4", "luq", "tetrajet2"])
def test_mean_gradients_approach_the_exact_ones(name: str) -> None:
    """The error of the mean of n calls falls as 1 / sqrt(n), to within what its own variance allows.

    TetraJet-v2's nearest E4M3 scales may clip a block's largest value (by less than 1/16 of it), so its inputs are such
    that they do not: magnitudes that are the same in all blocks but for signs.
    """
    x, w, g = randn(48, 64, seed=1), randn(32, 64, seed=2), randn(48, 32, seed=3)
    xq, wq = forward_values(name)(x, w)
    for got, exact in zip(draws(name, x, w, g), (g @ wq, g.T @ xq), strict=True):
        check_unbiased(got, exact, clips=name == "tetrajet2")


def check_unbiased(got: Tensor, exact: Tensor, clips: bool = False) -> None:
    error = got.mean(0) - exact
    deviation = got.std(0)
    z = error / (deviation / DRAWS**0.5 + 1e-9)
    if not clips:
        assert z.square().mean() == pytest.approx(1, abs=0.2), z.square().mean()
        assert z.abs().max() < 5.5
    half = got[: DRAWS // 4].mean(0) - exact
    assert error.norm() < 0.65 * half.norm()  # 1/2 is expected of four times as many calls
    assert error.norm() < 1.3 * (deviation.norm() / DRAWS**0.5) + (0.01 * exact.norm() if clips else 0)


def test_quartets_mean_gradient_is_the_masked_one() -> None:
    x, w, g = randn(48, 64, seed=1), randn(32, 64, seed=2), randn(48, 32, seed=3)
    operand = find_recipe("quartet").forward[0]
    assert operand is not None
    rotation = Rotation(32, None)
    xr, wr = turned(x, rotation), turned(w, rotation)
    gx = turned_back((g @ fake_quantize(wr, operand)) * factor(xr, operand), rotation, 64)
    gw = turned_back((g.T @ fake_quantize(xr, operand)) * factor(wr, operand), rotation, 64)
    for got, exact in zip(draws("quartet", x, w, g), (gx, gw), strict=True):
        check_unbiased(got, exact)


def test_nvidias_gradients_are_biased_only_by_what_clips() -> None:
    """A block scale rounded down in E4M3 clips the block's largest value by up to 1/16: SR cannot make up for that."""
    g = randn(64, 64, seed=3)
    operand = Operand("nvfp4", rounding="stochastic")
    mean = torch.stack([fake_quantize(g, operand, key(s, 0, 0, 0)) for s in range(DRAWS)]).double().mean(0)
    fmt = lowbit.format("nvfp4")
    found = scales.best(fmt, scales.Tiles(fmt, g))
    top = 6 * found.multiplier.repeat_interleave(16, 1)
    torch.testing.assert_close(mean.float(), g.clamp(-top, top), rtol=0, atol=0.02 * g.abs().max().item())
    clipped = (g.abs() > top * 1.0001).float().mean()
    assert 0 < clipped < 1 / 16  # only largest values, and not in every block
    sr = Operand("nvfp4-sr", rounding="stochastic")
    mean = torch.stack([fake_quantize(g, sr, key(s, 0, 0, 0)) for s in range(DRAWS)]).mean(0)
    torch.testing.assert_close(mean, g, rtol=0, atol=0.02 * g.abs().max().item())


def test_ms_eden_is_unbiased_over_rotations_with_half_the_error_of_stochastic_rounding() -> None:
    x = randn(32, 128, seed=5) * torch.exp(randn(32, 128, seed=6))
    eden = Operand("nvfp4-eden", rounding="eden", hadamard=128)
    other = Operand("nvfp4-sr", rounding="stochastic", hadamard=128)
    errors = {}
    for operand in (eden, other):
        total, squares = torch.zeros_like(x), 0.0
        for seed in range(DRAWS):
            rotation = Rotation(128, seed)
            values = turned_back(fake_quantize(x, operand, key(seed, 0, 0, 0), rotation), rotation, 128)
            total += values
            squares += ((values - x).square().sum() / x.square().sum()).item()
        mean = total / DRAWS
        errors[operand] = squares / DRAWS
        slope = ((mean * x).sum() / x.square().sum()).item()
        assert slope == pytest.approx(1, abs=2e-4)
        assert (mean - x).norm() / x.norm() < 1.2 * (squares / DRAWS / DRAWS) ** 0.5 + 1e-3
    assert errors[eden] < 0.55 * errors[other], errors
    nearest = fake_quantize(turned(x, Rotation(128, 0)), Operand("nvfp4-eden"))
    shrunk = (nearest * turned(x, Rotation(128, 0))).sum() / x.square().sum()
    assert shrunk < 0.996  # what S makes up for


def test_a_flushed_or_non_finite_block_stays_its_own_affair_in_ms_eden() -> None:
    x = randn(2, 256, seed=7)
    x[0, :16] = 1e-30
    x[1, 5] = torch.inf
    eden = Operand("nvfp4-eden", rounding="eden", hadamard=128)
    got = fake_quantize(x, eden, key(1, 2, 3, 4))
    assert got[0].isfinite().all() and (got[0, :16] == 0).all()
    assert got[1, :16].isnan().all() and got[1, 16:].isfinite().all()
    assert (got[0, 16:] - x[0, 16:]).abs().max() < 0.6
