"""What users of other libraries ran into with low-bit layers, one test for each: none of it happens here.

The numbers in brackets are issues of the libraries' own trackers.
"""

import copy

import pytest
import torch
from torch import Tensor, nn

import lowbit
from lowbit.nn import QuantLinear, call_counts, load_call_counts_, recipes
from lowbit.nn.presets import find_recipe


@pytest.fixture(autouse=True)
def one_thread():
    """These matmuls are too small for two: on a busy machine, waking the second takes most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def layer(recipe: str, outputs: int = 24, features: int = 40, name: str = "") -> QuantLinear:
    torch.manual_seed(0)
    return QuantLinear(features, outputs, recipe=recipe, name=name)


def run(module: nn.Module, x: Tensor, g: Tensor | None = None) -> list[Tensor]:
    module.zero_grad()
    x = x.clone().requires_grad_()
    y = module(x)
    y.backward(torch.ones_like(y) if g is None else g)
    return [t for t in (y.detach(), x.grad, *(p.grad for p in module.parameters())) if t is not None]


@pytest.mark.parametrize("name", recipes())
@pytest.mark.parametrize(("tokens", "features", "outputs"), [(1, 1, 1), (3, 17, 5), (31, 33, 65), (130, 7, 257)])
def test_shapes_that_nothing_divides(name: str, tokens: int, features: int, outputs: int) -> None:
    """Elsewhere: divisible by 16, 32 or 128, tokens too (ao 571, 3111; TransformerEngine 1422, 2966; titan 1200)."""
    found = run(layer(name, outputs, features), torch.randn(tokens, features))
    assert [tuple(t.shape) for t in found[:3]] == [(tokens, outputs), (tokens, features), (outputs, features)]
    assert all(t.isfinite().all() for t in found)


@pytest.mark.parametrize("name", recipes())
def test_stochastic_gradients_are_not_all_zero(name: str) -> None:
    """Elsewhere stochastic rounding gave gradients that were all 0 on some GPUs, without an error (TE 3281)."""
    for scale in (1.0, 1e-4, 1e4):
        _, gx, gw, gb = run(layer(name), torch.randn(16, 40), scale * torch.randn(16, 24))
        assert all((t != 0).float().mean() > 0.5 for t in (gx, gw, gb)), scale


@pytest.mark.parametrize("name", recipes())
@pytest.mark.parametrize("tiny", [0.0, 1e-45, 1e-38, 1e-30])
def test_zero_and_subnormal_blocks_give_no_nan(name: str, tiny: float) -> None:
    """Elsewhere a run was lost to one division by a scale that had been flushed to 0 (CloverLM's report)."""
    made, x, g = layer(name), torch.randn(40, 40), torch.randn(40, 24)
    for tensor in (x, g):
        tensor[:33] *= tiny  # whole tiles
        tensor[:, :18] *= tiny
    with torch.no_grad():
        made.weight.copy_(torch.cat([made.weight[:17] * tiny, made.weight[17:] + 0]))
    assert all(t.isfinite().all() for t in run(made, x, g))
    everything = run(made, x * 0, g * 0)
    assert all(t.isfinite().all() for t in everything)
    assert all((t == 0).all() for t in everything[1:]) or name == "quest"  # whose grid has no zero, but scale 0


@pytest.mark.parametrize("name", recipes())
def test_wide_ranges_give_no_infinities(name: str) -> None:
    """Rows from 1e-20 to 1e15: squares, reciprocals and scales stay inside fp32."""
    scale = torch.logspace(-20, 15, 40).unsqueeze(1)
    found = run(layer(name), torch.randn(40, 40) * scale, torch.randn(40, 24) / scale.flip(0).sqrt())
    assert all(t.isfinite().all() for t in found)


@pytest.mark.parametrize("name", recipes())
def test_the_forward_pass_is_deterministic(name: str) -> None:
    """Elsewhere evaluation in between moved the stream of random numbers, or was noisy itself."""
    made, x = layer(name), torch.randn(16, 40)
    first = made(x)
    assert torch.equal(first, made(x)) and torch.equal(first, made.eval()(x))
    other = layer(name)
    run(other, x)
    with torch.no_grad():
        other.eval()(x)
    other.train()
    twin = layer(name)
    run(twin, x)
    assert all(map(torch.equal, run(other, x), run(twin, x)))


RANDOM = [name for name in recipes() if find_recipe(name).stochastic]


@pytest.mark.parametrize("name", RANDOM)
def test_layers_and_steps_do_not_share_random_bits(name: str) -> None:
    """Elsewhere one seed was used again and again (llm.c 597), or for every parameter (OneTrainer 804)."""
    x, g = torch.randn(64, 40), torch.randn(64, 24)
    made = layer(name, name="layers.0.q")
    first, second = run(made, x, g), run(made, x, g)
    other = run(layer(name, name="layers.1.q"), x, g)
    again = run(layer(name, name="layers.0.q"), x, g)
    for i in (1, 2):
        assert not torch.equal(first[i], second[i]) and not torch.equal(first[i], other[i])
        assert torch.equal(first[i], again[i])


@pytest.mark.parametrize("name", RANDOM)
def test_torchs_generator_is_neither_read_nor_moved(name: str) -> None:
    """So data loading and dropout do not depend on the recipe, and devices cannot drift apart (torchtitan 1194)."""
    x, made = torch.randn(16, 40), layer(name)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = run(made, x)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert all(map(torch.equal, first, run(layer(name), x)))


@pytest.mark.parametrize("name", ["mxfp4", "quartet2"])
def test_a_run_that_goes_on_has_the_bits_of_one_that_never_stopped(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 64), nn.Tanh(), nn.Linear(64, 8))
    lowbit.quantize_(model, name)
    optimizer = lowbit.optim.AdamW(model.named_parameters(), lr=1e-2)
    data = [torch.randn(16, 40) for _ in range(6)]

    def steps(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: list[Tensor]) -> None:
        for x in inputs:
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()

    steps(model, optimizer, data[:3])
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), call_counts(model)))
    assert set(saved[2].values()) == {3}
    steps(model, optimizer, data[3:])

    other = nn.Sequential(nn.Linear(40, 64), nn.Tanh(), nn.Linear(64, 8))
    lowbit.quantize_(other, name)
    opt = lowbit.optim.AdamW(other.named_parameters(), lr=1e-2)
    other.load_state_dict(saved[0])
    opt.load_state_dict(saved[1])
    load_call_counts_(other, saved[2])
    steps(other, opt, data[3:])
    assert all(map(torch.equal, model.parameters(), other.parameters()))
    with pytest.raises(ValueError, match="differ in '0'"):
        load_call_counts_(other, {"2": 1})


def test_every_recipe_runs_on_a_cpu() -> None:
    """Elsewhere "needs triton", a CUDA device at import, or sm_100 (ao, TransformerEngine, Quartet, vllm 17659)."""
    for name in recipes():
        assert run(layer(name), torch.randn(4, 40))[0].device.type == "cpu"
