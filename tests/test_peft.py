"""peft's LoRA on quantized layers: it trains, saves and loads, merges exactly, and unmerges to the very codes."""

import copy
import warnings
from pathlib import Path

import pytest
import torch
from cases import one_thread as one_thread
from torch import Tensor, nn

import lowbit
from lowbit.integrations import peft as ours
from lowbit.nn import QuantLinear
from lowbit.nn.stored import StoredWeight

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    peft = pytest.importorskip("peft", reason="peft is not installed")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

X = torch.randn(6, 64, generator=torch.Generator().manual_seed(1))
RECIPES = {
    "stored": lowbit.Recipe(store="nf4-dq"),
    "int4": lowbit.Recipe(store="int4"),
    "qlora-nf4": "qlora-nf4",
    "master": lowbit.Recipe(weight="nf4"),  # the float weight is still there, and must not be what is merged with
    "a4": lowbit.Recipe(store="nf4", activation="int8"),
}


class Net(nn.Module):
    """An embedding, two projections and a head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.q_proj = nn.Linear(64, 96)
        self.v_proj = nn.Linear(96, 64, bias=False)
        self.lm_head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.lm_head(x + self.v_proj(self.q_proj(x).tanh()))


def based(recipe: str, dtype: torch.dtype = torch.float32) -> Net:
    net = Net().to(dtype).requires_grad_(False)
    lowbit.quantize_(net, RECIPES[recipe])
    return net


def adapted(recipe: str, dtype: torch.dtype = torch.float32, **options):
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], **options)
    torch.manual_seed(3)
    return ours.get_peft_model(based(recipe, dtype), config)


def train(model: nn.Module, steps: int = 5) -> list[float]:
    opt = lowbit.optim.AdamW([(n, p) for n, p in model.named_parameters() if p.requires_grad], lr=3e-2)
    target, losses = torch.randn(6, 10, generator=torch.Generator().manual_seed(2)), []
    for _ in range(steps):
        opt.zero_grad()
        loss = nn.functional.mse_loss(model(X.to(next(model.parameters()).dtype)).float(), target)
        loss.backward()
        opt.step()
        losses.append(loss.item())
    return losses


def codes(model: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            weight = module.weight
            parts = weight.parts if isinstance(weight, StoredWeight) else {"weight": weight.detach()}
            found |= {f"{name}.{part}": x.clone() for part, x in parts.items()}
    return found


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a and a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)


every_recipe = pytest.mark.parametrize("recipe", RECIPES)


@every_recipe
def test_adapters_train_on_a_frozen_quantized_base(recipe: str):
    model = adapted(recipe)
    before = codes(model)
    base = based(recipe)
    assert torch.equal(model(X), base(X))  # B is zero
    losses = train(model)
    assert losses[-1] < 0.9 * losses[0]
    assert {n.split(".")[-3] for n, p in model.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    assert all(p.grad is None for n, p in model.named_parameters() if "lora" not in n)
    same(before, codes(model))


@every_recipe
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_is_exact_to_the_stored_weight(recipe: str, dtype: torch.dtype):
    """dense = what the base multiplied with + scaling B A, added in fp32; never the weight from before quantization."""
    model = adapted(recipe, dtype)
    train(model)
    wanted = {}
    for name in ("q_proj", "v_proj"):
        layer = getattr(model.base_model.model, name)
        delta = layer.get_delta_weight("default").float()
        wanted[name] = (layer.base_layer.quantized_weight().float() + delta).to(dtype)
    expected = model(X.to(dtype))
    merged = model.merge_and_unload()
    for name, weight in wanted.items():
        layer = getattr(merged, name)
        assert type(layer) is nn.Linear and layer.weight.dtype == dtype
        assert torch.equal(layer.weight, weight), name
        assert not torch.equal(layer.weight, getattr(Net().to(dtype), name).weight)
    if recipe != "a4" and dtype == torch.float32:
        torch.testing.assert_close(merged(X), expected, atol=1e-4, rtol=1e-4)


@every_recipe
@pytest.mark.parametrize("safe", [False, True])
def test_unmerging_restores_the_codes_bit_for_bit(recipe: str, safe: bool):
    model = adapted(recipe)
    train(model)
    before, expected = codes(model), model(X)
    for _ in range(2):
        model.merge_adapter(safe_merge=safe)
        assert not codes(model)
        model.unmerge_adapter()
    same(before, codes(model))
    assert torch.equal(model(X), expected)


def test_a_merge_that_fails_changes_nothing():
    model = adapted("stored")
    before = codes(model)
    model.base_model.model.q_proj.lora_B["default"].weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaNs detected"):
        model.base_model.model.q_proj.merge(safe_merge=True)
    same(before, codes(model))


def test_two_adapters_and_disabling_them():
    model = adapted("stored")
    train(model)
    model.add_adapter("second", ours.prepared(peft.LoraConfig(r=2, target_modules=["q_proj"])))
    layer = model.base_model.model.q_proj
    layer.lora_B["second"].weight.data.normal_(std=0.1)
    layer.set_adapter(["default", "second"])
    wanted = layer.base_layer.quantized_weight() + sum(layer.get_delta_weight(n) for n in ("default", "second"))
    layer.merge()
    torch.testing.assert_close(layer.get_base_layer().weight, wanted)
    base = based("stored")
    with model.disable_adapter():
        torch.testing.assert_close(model(X), base(X))


def test_adapters_are_saved_and_loaded(tmp_path: Path):
    model = adapted("stored")
    train(model)
    model.save_pretrained(tmp_path)
    saved = (tmp_path / "adapter_model.safetensors").stat().st_size
    assert saved < 20_000  # adapters alone
    again = ours.from_pretrained(based("stored"), str(tmp_path))
    assert torch.equal(again(X), model(X))
    assert not any(p.requires_grad for p in again.parameters())
    merged, wanted = again.merge_and_unload(), copy.deepcopy(model).merge_and_unload()
    assert torch.equal(merged.q_proj.weight, wanted.q_proj.weight)


def test_peft_alone_trains_our_layers_too():
    model = peft.get_peft_model(based("stored"), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    losses = train(model)
    assert losses[-1] < 0.9 * losses[0]
