"""What stays in high precision: blocks, routers and heads by policy, and everything at the end of training."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lowbit
from lowbit.nn import QuantLinear, Recipe
from lowbit.nn.presets import find_recipe


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp, self.gate = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x) * self.gate(x).mean(-1, keepdim=True)


class Model(nn.Module):
    def __init__(self, count: int = 6) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 32)
        self.layers = nn.ModuleList(Block() for _ in range(count))
        self.embed_out = nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.embed_out(x)


def quantized_blocks(model: Model) -> list[int]:
    return [i for i, block in enumerate(model.layers) if isinstance(block.mlp[0], QuantLinear)]


@pytest.mark.parametrize(
    ("dense", "count", "kept"),
    [
        ((0, 0), 6, [0, 1, 2, 3, 4, 5]),
        ((2, 1), 6, [2, 3, 4]),
        ((0, 3), 6, [0, 1, 2]),
        ((0.5, 0), 5, [3, 4]),  # a part of all blocks, rounded up
        ((0, 0.13), 62, list(range(53))),
        ((2, 0.13), 8, [2, 3, 4, 5]),
    ],
)
def test_first_and_last_blocks_stay_dense(dense: tuple[float, float], count: int, kept: list[int]) -> None:
    model = Model(count)
    report = lowbit.quantize_(model, Recipe(weight="int4", dense=dense, name="mine"))
    assert quantized_blocks(model) == kept
    assert isinstance(model.embed, QuantLinear)  # outside the stack
    for i in set(range(count)) - set(kept):
        assert f"of {count} blocks, which mine skips" in report.skipped[f"layers.{i}.mlp.0"]


def test_nvidia_leaves_the_blocks_of_its_paper_dense() -> None:
    """62 blocks: the first 2 and the last 8 (https://arxiv.org/abs/2509.25149 says 2 and 8 for its model of 12B)."""
    recipe = find_recipe("nvfp4")
    assert recipe.dense[0] == 2 and 8 <= recipe.dense[1] * 62 <= 9
    model = Model(8)
    report = lowbit.quantize_(model, "nvfp4")
    assert quantized_blocks(model) == [2, 3, 4, 5]
    assert report.skipped["layers.0.mlp.0"].startswith("one of the first 2 of 8 blocks")
    assert "last 2 of 8" in str(report)
    everything = Model(8)
    lowbit.quantize_(everything, replace(recipe, dense=(0, 0)))
    assert quantized_blocks(everything) == list(range(8))


def test_routers_and_heads_of_any_name_stay_dense() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.experts = nn.Linear(32, 4), nn.ModuleList(nn.Linear(32, 32) for _ in range(4))

    model = nn.Module()
    model.block_sparse_moe, model.embed_out = Experts(), nn.Linear(32, 8)
    report = lowbit.quantize_(model, "int4")
    assert report.skipped["embed_out"] == "an output head, as skip='lm_head' means"
    assert report.skipped["block_sparse_moe.gate"] == "routers stay dense"
    assert len(report.converted) == 4
    other = nn.Module()
    other.embed_out = nn.Linear(32, 8)
    assert list(lowbit.quantize_(other, "int4", skip=()).converted) == ["embed_out"]


@pytest.mark.parametrize("wrong", [(1,), (1.5, 0), (-1, 0), ("a", 0), 3])
def test_dense_must_be_numbers_of_blocks(wrong) -> None:
    with pytest.raises(ValueError, match="dense"):
        Recipe(weight="int4", dense=wrong)


def test_high_precision_is_nn_linear_and_can_be_undone() -> None:
    torch.manual_seed(0)
    dense = Model(3)
    model = copy.deepcopy(dense)
    lowbit.quantize_(model, "int4")
    x = torch.randn(4, 8)
    before, modules, parameters = model(x), list(model.modules()), list(model.parameters())
    assert lowbit.high_precision_(model) is model
    assert torch.equal(model(x), dense(x)) and "high_precision" in repr(model)
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    model(x).sum().backward()
    dense(x).sum().backward()
    for a, b in zip(model.parameters(), dense.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None
        torch.testing.assert_close(a.grad, b.grad)
    assert torch.equal(copy.deepcopy(model)(x), dense(x))  # a copy is in the same state
    lowbit.high_precision_(model, on=False)
    assert torch.equal(model(x), before) and "high_precision" not in repr(model)


def test_high_precision_goes_on_training_the_masters() -> None:
    model, x = Model(2), torch.randn(4, 8)
    lowbit.quantize_(model, "int4")
    optimizer = lowbit.optim.AdamW(model.named_parameters(), lr=1e-2)
    for step in range(6):
        if step == 3:
            lowbit.high_precision_(model)
        before = model.layers[0].mlp[0].weight.clone()
        optimizer.zero_grad()
        F.mse_loss(model(x), x).backward()
        optimizer.step()
        assert not torch.equal(before, model.layers[0].mlp[0].weight)
    masters = model.layers[0].mlp[0].weight.clone()
    lowbit.to_dense_(model, None)
    assert torch.equal(model.layers[0].mlp[0].weight, masters)  # what the forward pass multiplied with


def test_high_precision_needs_a_quantized_layer() -> None:
    with pytest.raises(ValueError, match="call quantize_ first"):
        lowbit.high_precision_(Model(2))
