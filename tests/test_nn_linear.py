"""The layer: its three matmuls, its gradients, and everything around them that nn.Linear can do."""

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager as aot
from torch.utils.checkpoint import checkpoint

from lowbit.nn import Operand, QuantLinear, Recipe, quantize_, recipes
from lowbit.nn.fake import fake_quantize
from lowbit.rounding import key


@pytest.fixture(autouse=True)
def one_thread():
    """These matmuls are too small for two: on a busy machine, waking the second takes most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


NOISY = Recipe(weight="int4:32", activation="int4:32", gradient=Operand("int4:32", rounding="stochastic"), seed=3)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer(recipe: str | Recipe, cols: int, rows: int, bias: bool = True, **kwargs) -> QuantLinear:
    made = QuantLinear(cols, rows, bias, recipe=recipe, **kwargs)
    with torch.no_grad():
        made.weight.copy_(randn(rows, cols, seed=1) / cols**0.5)
        if bias:
            made.bias.copy_(randn(rows, seed=2))
    return made


# --- The three matmuls; those of each preset are in tests/test_nn_presets.py ------------------------------------------


def test_backward_operands_are_quantized_along_their_own_contraction() -> None:
    """Every slot an operand of its own: blocks run along output features in dgrad, along tokens in wgrad."""
    recipe = Recipe(forward=("int8:16", "int4:16"), dgrad=("e2m1:8", "nf4:8"), wgrad=("int4:4", "e2m1:4"))
    made = layer(recipe, 48, 20)
    x, gy = randn(14, 48, seed=6).requires_grad_(), randn(14, 20, seed=7)
    made(x).backward(gy)

    def q(t: Tensor, name: str) -> Tensor:
        return fake_quantize(t.detach().contiguous(), Operand(name))

    torch.testing.assert_close(x.grad, q(gy, "e2m1:8") @ q(made.weight.t(), "nf4:8").t())
    torch.testing.assert_close(made.weight.grad, q(gy.t(), "int4:4") @ q(x.t(), "e2m1:4").t())


def test_operands_left_out_are_float() -> None:
    x, gy = randn(6, 40, seed=8), randn(6, 24, seed=9)
    made = layer(Recipe(forward=(None, "int4"), dgrad=(None, None), wgrad=("int8:8", None)), 40, 24)
    made(x.requires_grad_()).backward(gy)
    torch.testing.assert_close(x.grad, gy @ made.weight.detach())
    torch.testing.assert_close(made.weight.grad, fake_quantize(gy.t(), Operand("int8:8")) @ x.detach())


# --- Stochastic gradients ---------------------------------------------------------------------------------------------


def gradients(made: nn.Module, x: Tensor, gy: Tensor, run: Callable | None = None) -> list[Tensor]:
    made.zero_grad()
    x = x.clone().requires_grad_()
    (run or made)(x).backward(gy)
    assert x.grad is not None
    return [x.grad, *(p.grad.clone() for p in made.parameters() if p.grad is not None)]


def test_stochastic_gradients_are_unbiased_and_differ_from_call_to_call() -> None:
    made, x, gy = layer(NOISY, 32, 32, bias=False), randn(8, 32, seed=10), randn(8, 32, seed=11)
    exact = gradients(layer(Recipe(weight="int4:32", activation="int4:32"), 32, 32, bias=False), x, gy)
    draws = [gradients(made, x, gy) for _ in range(400)]
    assert not torch.equal(draws[0][0], draws[1][0])
    for i in range(2):
        stack = torch.stack([draw[i] for draw in draws])
        error = (stack.mean(0) - exact[i]) / (stack.std(0) / 400**0.5 + 1e-6)
        assert error.abs().max() < 4.5 and error.square().mean() == pytest.approx(1, abs=0.25)


def test_the_random_bits_are_a_function_of_seed_layer_and_call() -> None:
    x, gy = randn(4, 64, seed=12), randn(4, 64, seed=13)
    first = gradients(layer(NOISY, 64, 64, name="a"), x, gy)
    assert all(map(torch.equal, first, gradients(layer(NOISY, 64, 64, name="a"), x, gy)))
    assert not torch.equal(first[0], gradients(layer(NOISY, 64, 64, name="b"), x, gy)[0])
    other = Recipe(forward=NOISY.forward, dgrad=NOISY.dgrad, wgrad=NOISY.wgrad, seed=4)
    assert not torch.equal(first[0], gradients(layer(other, 64, 64, name="a"), x, gy)[0])
    # dgrad and wgrad round the same gradient with different bits, and evaluation in between changes nothing.
    made = layer(NOISY, 64, 64, name="a")
    g = made.recipe.dgrad[0]
    layer_id = made._layer_id
    with torch.no_grad():
        made.eval()(x)
    got = gradients(made.train(), x, gy)
    rounded = fake_quantize(gy, g, key(3, 1, layer_id, 1))
    torch.testing.assert_close(got[0], rounded @ made.quantized_weight())
    rounded = fake_quantize(gy.t(), g, key(3, 1, layer_id, 3))
    torch.testing.assert_close(got[1], rounded @ fake_quantize(x, made.recipe.forward[0]))


class Looped(nn.Module):
    """Two layers, the first used three times in one pass, so that a call has to be told from its siblings."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.shared, self.last, self.reentrant = nn.Linear(64, 64), nn.Linear(64, 32), reentrant

    def forward(self, x: Tensor) -> Tensor:
        for step in (self.shared, self.shared, self.shared, self.last):
            block = nn.Sequential(step, nn.Tanh())
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return x


@pytest.mark.parametrize("name", [*recipes(), "noisy"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(name: str, reentrant: bool) -> None:
    plain = Looped(None)
    quantize_(plain, NOISY if name == "noisy" else name)
    saving = copy.deepcopy(plain)
    saving.reentrant = reentrant
    for step in range(3):
        x, gy = randn(4, 64, seed=step), randn(4, 32, seed=10 + step)
        expected = gradients(plain, x, gy)
        assert all(map(torch.equal, expected, gradients(saving, x, gy)))
        with torch.no_grad():  # evaluation of one of them must not shift its random bits
            saving.reentrant = None
            saving.eval()(x)
        saving.train().reentrant = reentrant


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_a_whole_model_and_accumulating(reentrant: bool) -> None:
    plain = Looped(None)
    quantize_(plain, NOISY)
    saving = copy.deepcopy(plain)
    for step in range(4):
        x, gy = randn(4, 64, seed=step), randn(4, 32, seed=10 + step)
        plain(x.requires_grad_()).backward(gy)
        checkpoint(saving, x, use_reentrant=reentrant).backward(gy)
    for a, b in zip(plain.parameters(), saving.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None and torch.equal(a.grad, b.grad)


# --- Everything nn.Linear does ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(33,), (1, 33), (0, 33), (2, 0, 3, 33), (2, 3, 4, 33)])
@pytest.mark.parametrize("name", [*recipes(), "noisy"])
def test_leading_dimensions(name: str, shape: tuple[int, ...]) -> None:
    made = layer(NOISY if name == "noisy" else name, 33, 7)
    x = randn(*shape).requires_grad_()
    y = made(x)
    y.sum().backward()
    assert y.shape == (*shape[:-1], 7)
    assert x.grad is not None and x.grad.shape == x.shape
    assert made.weight.grad is not None and made.weight.grad.shape == (7, 33)
    if len(shape) > 2 and x.numel():  # rows know nothing of the dimensions before them, unless groups are flat
        torch.testing.assert_close(y.flatten(0, -2), made(x.flatten(0, -2)))


@pytest.mark.parametrize("name", recipes())
def test_wide_odd_layers(name: str) -> None:
    made = layer(name, 5461, 3)
    x = randn(2, 5461).requires_grad_()
    made(x).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()
    dense = F.linear(x, made.weight, made.bias)
    assert F.cosine_similarity(made(x).flatten(), dense.flatten(), 0) > 0.95


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", recipes())
def test_dtypes(name: str, dtype: torch.dtype) -> None:
    made = layer(name, 64, 16).to(dtype)
    x = randn(4, 64).to(dtype).requires_grad_()
    y = made(x)
    y.float().sum().backward()
    assert y.dtype == dtype and made.weight.grad is not None and x.grad is not None
    assert made.weight.grad.dtype == x.grad.dtype == made.bias.grad.dtype == dtype
    exact = layer(name, 64, 16)
    exact.load_state_dict(made.state_dict())
    tolerance = {torch.bfloat16: 0.05, torch.float16: 0.01, torch.float64: 1e-4}[dtype]
    torch.testing.assert_close(y.float(), exact(x.float()), rtol=tolerance, atol=tolerance)


def test_mixed_dtypes_are_promoted() -> None:
    made, x = layer("int4", 64, 16), randn(4, 64).bfloat16().requires_grad_()
    y = made(x)
    y.sum().backward()
    assert y.dtype == torch.float32 and x.grad is not None and x.grad.dtype == torch.bfloat16
    assert made.weight.grad is not None and made.weight.grad.dtype == torch.float32
    made.bias = nn.Parameter(made.bias.detach().bfloat16())
    made(randn(4, 64)).sum().backward()
    assert made.bias.grad is not None and made.bias.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("name", [*recipes(), "noisy"])
def test_autocast(name: str) -> None:
    made, x = layer(NOISY if name == "noisy" else name, 64, 16), randn(4, 64).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = made(x)
        assert y.dtype == F.linear(x, made.weight).dtype == torch.bfloat16
    y.float().sum().backward()
    assert made.weight.grad is not None and x.grad is not None
    assert made.weight.grad.dtype == x.grad.dtype == torch.float32
    # Quantized from the float32 master, not from its bfloat16 copy: only the result is rounded.
    torch.testing.assert_close(y, layer(made.recipe, 64, 16)(x).bfloat16())
    with torch.autocast("cpu", enabled=False):
        assert made(x).dtype == torch.float32


@pytest.mark.parametrize("name", [*recipes(), "noisy"])
def test_evaluation_is_quantized_and_deterministic(name: str) -> None:
    made, x = layer(NOISY if name == "noisy" else name, 64, 16), randn(4, 64)
    train = made(x)
    with torch.no_grad():
        assert torch.equal(made.eval()(x), train)
        assert torch.equal(made.eval()(x), train)
    # mxfp4 quantizes the backward pass only, and of qlora-nf4 the weight is what is stored.
    assert torch.equal(train, F.linear(x, made.weight, made.bias)) == (name in ("mxfp4", "qlora-nf4"))


def test_wrong_input() -> None:
    made = layer("int4", 64, 16)
    with pytest.raises(TypeError, match="floating-point"):
        made(torch.ones(4, 64, dtype=torch.int64))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        made(randn(4, 63))
    with pytest.raises(ValueError, match="did you mean"):
        QuantLinear(4, 4, recipe="int44")
    y = made(randn(4, 64).requires_grad_()).square().sum()
    (grad,) = torch.autograd.grad(y, made.weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_meta_device() -> None:
    for recipe in (*recipes(), NOISY):
        made = QuantLinear(33, 7, recipe=recipe, device="meta")
        x = torch.empty(2, 33, device="meta", requires_grad=True)
        made(x).sum().backward()
        assert made(x).shape == (2, 7) and x.grad is not None


def test_copies_and_checkpoints() -> None:
    made = layer(NOISY, 64, 16, name="block.0")
    x, gy = randn(4, 64), randn(4, 16)
    gradients(made, x, gy)
    file = io.BytesIO()
    torch.save(made, file)
    file.seek(0)
    copies = [copy.deepcopy(made), pickle.loads(pickle.dumps(made)), torch.load(file, weights_only=False)]
    expected = gradients(made, x, gy)
    for other in copies:
        assert other.recipe == made.recipe and "recipe=" in repr(other)
        assert all(map(torch.equal, expected, gradients(other, x, gy)))
    dense = nn.Linear(64, 16)
    assert list(made.state_dict()) == list(dense.state_dict()) == ["weight", "bias"]
    dense.load_state_dict(made.state_dict())
    made.load_state_dict(dense.state_dict())


# torch 2.13's own tracing of autograd functions does what it warns of.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("name", [*recipes(), "noisy"])
def test_compiles_in_one_graph(name: str) -> None:
    """The bits of the layer without a compiler, call after call, with one recompilation for the numbers of calls."""
    recipe = NOISY if name == "noisy" else name
    made, plain = layer(recipe, 64, 16), layer(recipe, 64, 16)
    graphs = 0
    torch._dynamo.reset()  # other layers' graphs count too, up to a limit

    def count(graph, inputs):
        nonlocal graphs
        graphs += 1
        return aot(graph, inputs)

    compiled = torch.compile(made, backend=count, fullgraph=True)
    for step in range(5):
        x, gy = randn(3, 4, 64, seed=step), randn(3, 4, 16, seed=50 + step)
        assert all(map(torch.equal, gradients(made, x, gy, lambda x: compiled(x)), gradients(plain, x, gy)))
    with torch.no_grad():
        assert torch.equal(torch.compile(made.eval(), backend=aot, fullgraph=True)(x), plain(x))
    assert graphs <= 2


@pytest.mark.parametrize("name", [*recipes(), "noisy"])
def test_training_lowers_the_loss(name: str) -> None:
    model = nn.Sequential(nn.Linear(32, 96), nn.Tanh(), nn.Linear(96, 8))
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(randn(*p.shape, seed=20 + i) / p.shape[-1] ** 0.5)
    x, y = randn(64, 32, seed=30), randn(64, 8, seed=31)
    quantize_(model, NOISY if name == "noisy" else name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = F.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    frozen = not model[0].weight.requires_grad  # biases alone are trained
    assert losses[-1] < (0.9 if frozen else 0.5) * losses[0], losses[::10]
