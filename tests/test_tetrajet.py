"""What TetraJet-v2 does beside its layers: OutControl and OsciReset, against statements in float64."""

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from cases import one_thread as one_thread
from statements import nv
from test_nn_presets import FromLowbit, randn
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lowbit
from lowbit.nn import OsciReset, OutControl, QuantLinear, Recipe


def layer_of(outputs: int, features: int, recipe: str | Recipe = "tetrajet2") -> QuantLinear:
    layer = QuantLinear(features, outputs, bias=False, recipe=recipe, name="block.0")
    with torch.no_grad():
        layer.weight.copy_(randn(outputs, features, seed=1) / features**0.5)
    return layer


def chosen(layer: nn.Module, xs: list[Tensor], **options) -> OutControl:
    """After one step that is not recorded, these that are, and the choice."""
    control = OutControl(layer, start=0, steps=len(xs), **options)
    layer(xs[0] * 100)
    control.step()
    for x in xs:
        layer(x)
        control.step()
    return control


# --- OutControl ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "features", "outputs"), [(64, 320, 96), (75, 100, 52), (1, 33, 20)])
def test_the_three_matmuls_of_out_control_are_its_statement(tokens: int, features: int, outputs: int):
    layer, x, g = layer_of(outputs, features), randn(tokens, features, seed=2), randn(tokens, outputs, seed=3)
    x = x * torch.exp(randn(1, features, seed=4))
    chosen(layer, [x])
    norms, count = np.linalg.norm(x.double().numpy(), axis=0), round(0.1 * features)
    order = np.argsort(-norms, kind="stable")
    assert np.array_equal(layer.channels.order.numpy(), order) and layer.channels.count == count > 0
    layer._calls.count.zero_()
    given = x.clone().requires_grad_()
    y = layer(given)
    y.backward(g)
    values = (v.detach().double().numpy() for v in (x, layer.weight, g))
    expected = nv.out_control(*values, FromLowbit(layer), order[count:], order[:count])
    for what, a, b in zip(("y", "gx", "gW"), (y.detach(), given.grad, layer.weight.grad), expected, strict=True):
        scale = np.abs(b).max()
        np.testing.assert_allclose(a.numpy() / scale, b / scale, atol=2e-6, rtol=0, err_msg=what)


def test_channels_are_chosen_by_their_norms_over_the_steps_that_are_recorded():
    """In training only, each call counted once; until then the layer is the recipe's, bit for bit."""
    layer, plain, norms = layer_of(24, 64), layer_of(24, 64), np.zeros(64)
    control = OutControl(layer, start=3, steps=4, share=0.25)
    for step in range(10):
        assert (layer.channels is None) == (step < 8)
        xs = [randn(10, 64, seed=10 * step + i).view(2, 5, 64) for i in range(2)]
        for x in xs:  # two calls for one step
            y = layer(x)
            assert torch.equal(y, plain(x)) == (step < 8)
            if 4 <= step < 8:
                norms += np.linalg.norm(x.double().numpy().reshape(10, 64), axis=0)
        layer.eval()(randn(3, 64, seed=7) * 1e6)
        layer.train()
        control.step()
    assert layer.norms is None and layer.channels.count == 16
    assert set(layer.channels.outside.tolist()) == set(np.argsort(-norms)[:16].tolist())


def test_large_channels_are_more_exact_in_eight_bits():
    x, layer = randn(64, 128, seed=2), layer_of(32, 128)
    x[:, ::20] *= 30
    exact = x @ layer.weight.detach().t()
    before = (layer(x) - exact).square().mean()
    chosen(layer, [x])
    assert set(layer.channels.outside.tolist()) >= set(range(0, 128, 20))
    assert (layer(x) - exact).square().mean() < 0.2 * before


def test_a_model_with_chosen_channels_is_used_as_any_other():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 4), nn.Linear(4, 3))
    lowbit.quantize_(model, "tetrajet2")
    x = torch.randn(6, 96)
    control = chosen(model, [x])
    assert model[0].channels.count == 10 and model[3].channels is None  # a tenth of 4 is none
    twin, third = copy.deepcopy(model), copy.deepcopy(model)

    def gradients(net: nn.Module, run: Callable[[Tensor], Tensor]) -> list[Tensor]:
        given = x.clone().requires_grad_()
        y = run(given)
        y.square().sum().backward()
        return [y, given.grad, *(p.grad for p in net.parameters())]

    expected = gradients(model, model)
    assert all(map(torch.equal, expected, gradients(twin, lambda v: checkpoint(twin, v, use_reentrant=False))))
    torch._dynamo.reset()
    assert all(map(torch.equal, expected, gradients(third, torch.compile(third, fullgraph=True, backend="aot_eager"))))
    torch._dynamo.reset()

    fresh = nn.Sequential(nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 4), nn.Linear(4, 3))
    lowbit.quantize_(fresh, "tetrajet2")
    fresh.load_state_dict(model.state_dict())
    OutControl(fresh).load_state_dict(control.state_dict())
    assert torch.equal(fresh(x), model(x))
    used = model[0].quantized_weight()
    dense = lowbit.to_dense_(model, torch.float32)
    assert torch.equal(dense[0].weight, used) and vars(dense[0]).keys() == vars(nn.Linear(1, 1)).keys()
    w, order = fresh[0].weight.detach().double().numpy(), fresh[0].channels.order.numpy()
    np.testing.assert_allclose(used.numpy()[:, order[10:]], nv.double_block(w[:, order[10:]]), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(used.numpy()[:, order[:10]], nv.mxfp8(w[:, order[:10]]), rtol=1e-6, atol=1e-9)


def test_recording_goes_on_where_it_stopped():
    xs = [randn(5, 64, seed=i) for i in range(8)]
    whole, first, second = layer_of(24, 64), layer_of(24, 64), layer_of(24, 64)
    controls = [OutControl(layer, start=1, steps=5) for layer in (whole, first, second)]
    for i, x in enumerate(xs):
        if i == 4:
            controls[2].load_state_dict(copy.deepcopy(controls[1].state_dict()))
        for layer, control in ((whole, controls[0]), (first if i < 4 else second, controls[1 if i < 4 else 2])):
            layer(x)
            control.step()
    assert torch.equal(whole.channels.order, second.channels.order)


# --- OsciReset -------------------------------------------------------------------------------------------------------


def walked(layer: QuantLinear, seed: int) -> None:
    """Some masters swing, others drift or stay."""
    noise = randn(*layer.weight.shape, seed=seed)
    with torch.no_grad():
        layer.weight[:, 10:] += 1e-3 * noise[:, 10:]


@pytest.mark.parametrize("features", [160, 100])
def test_oscillating_masters_are_reset_as_the_statement_says(features: int):
    layer, window, masters = layer_of(48, features), 6, []
    reset = OsciReset(layer, start=10, period=10, window=window, threshold=8)
    counts = []
    for step in range(30):
        walked(layer, step)
        masters.append(layer.weight.detach().double().numpy().copy())
        counts.append(reset.step())
        if step == 10 + window + 1:
            expected = nv.osci_reset(masters[10:], 8)
            np.testing.assert_allclose(layer.weight.detach().numpy(), expected, rtol=1e-6, atol=0)
            moved = masters[-1] != layer.weight.detach().double().numpy()
            assert 50 < moved.sum() <= counts[-1] and not moved[:, :10].any()
    assert [step for step, count in enumerate(counts) if count] == [17, 27]


def test_a_master_between_two_codes_is_put_on_the_one_it_is_at():
    layer = layer_of(1, 16)
    reset = OsciReset(layer, start=0, period=6, window=4)
    for step in range(6):
        with torch.no_grad():
            layer.weight.copy_(torch.tensor([[6.0, 2.5 + (0.01 if step % 2 else -0.01), *[1.1] * 14]]) / 6)
        reset.step()
    assert torch.allclose(layer.weight[0, :3] * 6, torch.tensor([6.0, 3.0, 1.1]), rtol=1e-6)  # 2.51 is nearest to 3


def test_channels_in_eight_bits_are_not_reset():
    layer = layer_of(48, 160)
    chosen(layer, [randn(5, 160, seed=3) * torch.exp(randn(1, 160, seed=4))])
    reset, before = OsciReset(layer, start=0, period=8, window=6, threshold=1e-6), layer.weight.detach().clone()
    for step in range(8):
        with torch.no_grad():
            layer.weight.copy_(before * (1 + 0.01 * (step % 2)))
        count = reset.step()
    changed = (layer.weight != before * 1.01).any(0)
    assert count and not changed[layer.channels.outside].any() and changed[layer.channels.inside].any()


def test_measuring_goes_on_where_it_stopped():
    whole, first, second = layer_of(48, 160), layer_of(48, 160), layer_of(48, 160)
    resets = [OsciReset(layer, start=0, period=10, window=6) for layer in (whole, first, second)]
    for step in range(9):
        if step == 4:
            resets[2].load_state_dict(copy.deepcopy(resets[1].state_dict()))
            second.load_state_dict(first.state_dict())
        for layer, reset in ((whole, resets[0]), (first if step < 4 else second, resets[1 if step < 4 else 2])):
            walked(layer, step)
            reset.step()
    assert torch.equal(whole.weight, second.weight) and not resets[0].ways


def test_what_cannot_be_controlled_is_refused():
    for build in (OutControl, lambda model: OsciReset(model, start=0)):
        with pytest.raises(ValueError, match="no layer of this model is quantized"):
            build(nn.Linear(4, 4))
        with pytest.raises(ValueError, match=r"no master.*'int4'"):
            build(layer_of(16, 32, Recipe(weight="int4", store="int4")))
        for recipe in ("quartet", "mxfp4"):
            with pytest.raises(ValueError, match="must quantize its weight in the forward pass, and not rotate"):
                build(layer_of(16, 32, recipe))
    with pytest.raises(ValueError, match="share"):
        OutControl(layer_of(16, 32), share=1.5)
    with pytest.raises(ValueError, match="period=50"):
        OsciReset(layer_of(16, 32), start=0, period=50)
    control, reset = OutControl(layer_of(16, 32)), OsciReset(layer_of(16, 32), start=0)
    with pytest.raises(ValueError, match="fit no layer"):
        control.load_state_dict({"done": 3, "norms": {}, "orders": {"x": torch.arange(32)}})
    with pytest.raises(ValueError, match="not of this model"):
        reset.load_state_dict({"done": 3, "ways": {"x": {}}})
    assert control.done == reset.done == 0
