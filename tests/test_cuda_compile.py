"""torch.compile passes through quantized layers on a GPU with their kernels, on the emulator."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent / "emulator"))
from emulator import compiler, installed

from lowbit import backends, format, quantize_
from lowbit.backends import cuda
from lowbit.nn import Operand, Recipe

pytestmark = [
    pytest.mark.skipif(compiler() is None, reason="there is no g++ for the emulator"),
    # torch's own tracing of autograd functions does what it warns of.
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]
TABLES = Recipe(weight="nf4:32", activation="int8", gradient="int4:48")
NOISY = Recipe(weight="int4:32", activation="int4:32", gradient=Operand("int4:32", rounding="stochastic"), seed=3)

SIX = Recipe(weight="mxfp6-e2m3", activation="mxfp6-e3m2", gradient="nvfp4-46")  # codes across bytes, the better scale


@pytest.fixture(autouse=True)
def on_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """CPU tensors are for CUDA kernels."""
    monkeypatch.setitem(backends._NATIVE, "cpu", cuda)
    monkeypatch.setenv("LOWBIT_BACKEND", "native")
    torch._dynamo.reset()
    with installed():
        yield
    torch._dynamo.reset()


class Seen:
    """A compiler's backend that notes the operators it is given."""

    def __init__(self) -> None:
        self.operators: list[str] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]):
        from torch._dynamo.backends.common import aot_autograd
        from torch._functorch.aot_autograd import make_boxed_func

        def note(inner: torch.fx.GraphModule, inputs: list[Tensor]):
            self.operators += [str(node.target) for node in inner.graph.nodes if node.op == "call_function"]
            return make_boxed_func(inner.forward)

        return aot_autograd(fw_compiler=note)(graph, inputs)


def both_ways(recipe: str | Recipe, seen: Seen) -> list[list[Tensor]]:
    """What a model and its gradients are, as it is and compiled."""
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 48), nn.GELU(), nn.Linear(48, 16))
        quantize_(model, recipe)
        run = torch.compile(model, backend=seen, fullgraph=True) if compiled else model
        y = run(torch.randn(8, 64))
        y.square().sum().backward()
        found.append([y.detach(), *(p.grad for p in model.parameters())])
    return found


@pytest.mark.parametrize(
    "recipe",
    ["fp4", "stablespam-int4", "quest", "quartet2", TABLES, NOISY, SIX],  # masks; MS-EDEN
    ids=["fp4", "stablespam", "quest", "quartet2", "tables", "noisy", "six"],
)
def test_a_quantized_model_compiles_to_kernels(recipe: str | Recipe):
    """In one graph, with the very numbers of the model as it is, stochastic recipes too."""
    seen = Seen()
    assert all(map(torch.equal, *both_ways(recipe, seen)))
    assert seen.operators.count("lowbit.linear_layer.default") == 2
    assert seen.operators.count("lowbit.linear_layer_backward.default") == 2
    assert not any("bucketize" in name or "searchsorted" in name for name in seen.operators)


def test_the_operator_keeps_torch_s_rules():
    assert backends._is_operator(format("int4"), torch.device("cpu"))
    x = torch.randn(4, 96)
    for noise in ([], [1, 2]):
        torch.library.opcheck(torch.ops.lowbit.fake, (x, "int4:32", noise, torch.bfloat16))


def test_a_format_of_one_s_own_is_no_operator():
    """An operator of torch is told a format by name; the compiler traces the others."""
    for name in ("mine", "int4"):
        assert not backends._is_operator(replace(format("int4"), name=name, limit=5), torch.device("cpu"))


def test_on_a_cpu_it_is_the_same_operator(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.undo()
    seen = Seen()
    assert all(map(torch.equal, *both_ways("fp4", seen)))
    assert seen.operators.count("lowbit.linear_layer.default") == 2
