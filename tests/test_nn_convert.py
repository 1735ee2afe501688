"""quantize_, to_dense_ and the report: what is converted, what is refused and why, and that nothing else changes."""

import copy
import json
import warnings
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from lowbit.nn import Operand, QuantLinear, Recipe, Report, quantize_, recipes, to_dense_
from lowbit.nn.fake import fake_quantize
from lowbit.nn.presets import find_recipe


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.up_proj, self.norm = nn.Linear(32, 32, bias=False), nn.Linear(32, 64), nn.LayerNorm(32)

    def forward(self, x: Tensor) -> Tensor:
        return self.up_proj(self.q_proj(self.norm(x)))[..., :32]


class Decoder(nn.Module):
    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(10, 32)
        self.layers = nn.ModuleList(Block() for _ in range(layers))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed_tokens(tokens)
        for block in self.layers:
            x = block(x)
        return x


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model, self.lm_head = Decoder(), nn.Linear(32, 10, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.lm_head(self.model(tokens))


TOKENS = torch.arange(10).view(2, 5)


def kinds(model: nn.Module) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules()}


# --- What is converted -----------------------------------------------------------------------------------------------


def test_linears_are_converted_and_the_head_is_not() -> None:
    model = Model()
    report = quantize_(model, "int4")
    names = [f"model.layers.{i}.{proj}" for i in range(3) for proj in ("q_proj", "up_proj")]
    assert list(report.converted) == names == [n for n, k in kinds(model).items() if k is QuantLinear]
    assert report.skipped == {"model.embed_tokens": "embeddings stay dense", "lm_head": "skip='lm_head'"}
    assert type(model.lm_head) is nn.Linear


def test_objects_stay_the_same() -> None:
    model = Model()
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    state = {k: v.clone() for k, v in model.state_dict().items()}
    calls = []
    model.model.layers[0].q_proj.register_forward_hook(lambda *_: calls.append(1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    quantize_(model, "int4")
    assert all(module is modules[name] for name, module in model.named_modules())
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    model(TOKENS).sum().backward()
    optimizer.step()
    assert calls == [1] and not torch.equal(model.model.layers[0].q_proj.weight, state["model.layers.0.q_proj.weight"])


def test_training_mode_and_frozen_weights_are_kept() -> None:
    model = Model().eval()
    model.model.layers[1].q_proj.weight.requires_grad_(False)
    quantize_(model, "int4")
    assert not any(module.training for module in model.modules())
    assert not model.model.layers[1].q_proj.weight.requires_grad


@pytest.mark.parametrize(
    ("skip", "kept"),
    [
        ((), []),
        ("lm_head", ["lm_head"]),
        (["q_proj", "lm_head"], ["model.layers.0.q_proj", "model.layers.1.q_proj", "model.layers.2.q_proj", "lm_head"]),
        (["layers.0"], ["model.layers.0.q_proj", "model.layers.0.up_proj"]),
        (["layers.1.*"], ["model.layers.1.q_proj", "model.layers.1.up_proj"]),
        (["model.layers.[01].up*"], ["model.layers.0.up_proj", "model.layers.1.up_proj"]),
        (["proj", "head", "ayers.0"], []),
    ],
)
def test_skip(skip, kept: list[str]) -> None:
    model = Model()
    report = quantize_(model, "int4", skip=skip)
    assert [n for n, k in kinds(model).items() if k is nn.Linear] == kept
    assert [n for n in report.skipped if n != "model.embed_tokens"] == kept


def test_unused_skips_are_noted() -> None:
    report = quantize_(Model(), "int4", skip=["lm_haed", "layers.0"])
    assert report.unused_skips == ("lm_haed",)
    assert "note: skip='lm_haed' matched nothing" in str(report)
    assert "note" not in str(quantize_(Decoder(), "int4"))  # the default may match nothing


def test_filter_fn() -> None:
    model, asked = Model(), []

    def square(module: nn.Module, name: str) -> bool:
        asked.append(name)
        assert isinstance(module, nn.Linear)
        return module.in_features == module.out_features

    report = quantize_(model, "int4", filter_fn=square)
    assert list(report.converted) == [f"model.layers.{i}.q_proj" for i in range(3)]
    assert report.skipped["model.layers.0.up_proj"] == "filter_fn returned False"
    assert "lm_head" not in asked and "model.embed_tokens" not in asked


def test_a_linear_itself_and_a_custom_recipe() -> None:
    model = nn.Linear(32, 8)
    report = quantize_(model, Recipe(weight=Operand("nf4", block=32)))
    assert type(model) is QuantLinear and list(report.converted) == [""] and "the model" in str(report)
    assert torch.equal(model.quantized_weight(), fake_quantize(model.weight.detach(), Operand("nf4", block=32)))


def test_parts_may_have_recipes_of_their_own() -> None:
    model = Model()
    quantize_(model.model.layers[0], "int4")
    quantize_(model.model.layers[1], "fp4")
    found = [m.recipe.name for m in model.modules() if isinstance(m, QuantLinear)]
    assert found == ["int4", "int4", "fp4", "fp4"]


def test_layers_have_random_bits_of_their_own() -> None:
    model = Model()
    quantize_(model, "int4")
    ids = [m._layer_id for m in model.modules() if isinstance(m, QuantLinear)]
    assert len(set(ids)) == len(ids) == 6


# --- What is refused -------------------------------------------------------------------------------------------------


class MyLinear(nn.Linear):
    pass


class Conv1D(nn.Module):  # as in transformers
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(32, 64))


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(4, 32, 64))


def replaced_forward() -> nn.Linear:
    made = nn.Linear(32, 32)
    made.forward = lambda x: x  # type: ignore[method-assign]
    return made


def old_weight_norm() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and still in use
        return torch.nn.utils.weight_norm(nn.Linear(32, 32))


def subclassed_weight() -> nn.Linear:
    class Mine(nn.Parameter):
        pass

    made = nn.Linear(32, 32)
    made.weight = Mine(made.weight.detach())
    return made


@pytest.mark.parametrize(
    ("make", "name", "reason"),
    [
        (lambda: MyLinear(32, 32), "odd", "MyLinear is a subclass of nn.Linear"),
        (Conv1D, "odd", "Conv1D keeps its weight transposed"),
        (Experts, "odd.gate_up_proj", "fused experts"),
        (lambda: nn.Conv2d(3, 8, 3), "odd", "convolutions"),
        (lambda: nn.Bilinear(4, 4, 4), "odd", "Bilinear is not nn.Linear"),
        (lambda: nn.LSTM(4, 4), "odd.weight_ih_l0", "LSTM is not nn.Linear"),
        (replaced_forward, "odd", "its forward was replaced"),
        (old_weight_norm, "odd", "its weight is not a parameter"),
        (lambda: torch.nn.utils.parametrizations.weight_norm(nn.Linear(32, 32)), "odd", "ParametrizedLinear"),
        (subclassed_weight, "odd", "its weight is a Mine"),
        (lambda: nn.Linear(32, 32, dtype=torch.complex64), "odd", "complex64, not floating point"),
        (lambda: nn.EmbeddingBag(32, 32), "odd", "embeddings stay dense"),
    ],
)
def test_refused_with_a_reason(make, name: str, reason: str) -> None:
    model = nn.ModuleDict({"odd": make(), "fine": nn.Linear(32, 32)})
    before = kinds(model)
    report = quantize_(model, "int4")
    assert list(report.converted) == ["fine"]
    assert reason in report.skipped[name] and reason in str(report)
    assert {**before, "fine": QuantLinear} == kinds(model)


def test_modules_that_read_weights_without_calling_the_layer() -> None:
    model = nn.ModuleDict(
        {
            "attention": nn.MultiheadAttention(32, 4),
            "encoder": nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2),
            "decoder": nn.TransformerDecoderLayer(32, 4, 64, batch_first=True),
        }
    )
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        before = model["encoder"].eval()(x)
    report = quantize_(model, "int4")
    # The decoder layer calls its feed-forward layers, and only those.
    assert list(report.converted) == ["decoder.linear1", "decoder.linear2"]
    for name in ("attention.out_proj", "attention.in_proj_weight", "decoder.self_attn.out_proj"):
        assert "nn.MultiheadAttention" in report.skipped[name]
    for name in ("encoder.layers.0.linear1", "encoder.layers.1.linear2"):
        assert "fast path" in report.skipped[name]
    with torch.no_grad():
        assert torch.equal(model["encoder"](x), before)
    quantized, dense = model["decoder"].eval(), copy.deepcopy(model["decoder"])
    to_dense_(dense, dtype=torch.float32)
    assert not torch.equal(quantized(x, x), dense(x, x))  # activations were quantized: the forward is really called


def test_tied_weights() -> None:
    model = Model()
    model.lm_head.weight = model.model.embed_tokens.weight
    report = quantize_(model, "int4", skip=())
    assert report.skipped["lm_head"] == "its weight is tied to model.embed_tokens, which stays dense"
    assert type(model.lm_head) is nn.Linear and len(report.converted) == 6
    assert report.parameters == sum(p.numel() for p in model.parameters())


def test_tied_linears_are_converted_together_or_not_at_all() -> None:
    def tied() -> nn.ModuleDict:
        model = nn.ModuleDict({"a": nn.Linear(32, 32), "b": nn.Linear(32, 32), "c": nn.Linear(32, 32)})
        model["b"].weight = model["a"].weight
        return model

    model = tied()
    with torch.no_grad():
        model["a"].weight.copy_(torch.randn(32, 32, generator=torch.Generator().manual_seed(0)))
    report = quantize_(model, "int4")  # rounded to bfloat16, its values change when they are quantized a second time
    assert list(report.converted) == ["a", "b", "c"] and model["a"].weight is model["b"].weight
    assert report.quantized_parameters == 2 * 32 * 32
    expected = model["a"].quantized_weight()
    to_dense_(model)
    assert model["a"].weight is model["b"].weight and torch.equal(model["a"].weight, expected.bfloat16())
    report = quantize_(tied(), "int4", skip=["b"])
    assert report.skipped["a"] == "its weight is tied to b, which stays dense" and list(report.converted) == ["c"]


def test_one_module_in_two_places() -> None:
    shared = nn.Linear(32, 32)
    model = nn.ModuleDict({"a": shared, "b": shared})
    assert list(quantize_(model, "int4").converted) == ["a"]
    assert type(model["b"]) is QuantLinear


def test_errors_come_before_changes() -> None:
    model = Model()
    for wrong, error, words in [
        (lambda: quantize_(model, "int44"), ValueError, "did you mean 'int4'"),
        (lambda: quantize_(model, 4), TypeError, "name or a Recipe"),  # type: ignore[arg-type]
        (lambda: quantize_(model.parameters(), "int4"), TypeError, "torch.nn.Module"),  # type: ignore[arg-type]
        (lambda: quantize_(model, "int4", filter_fn=lambda m, n: 1 / 0 > 1), ZeroDivisionError, "zero"),
        (lambda: to_dense_(model), ValueError, "no layer of this model is quantized"),
    ]:
        with pytest.raises(error, match=words):
            wrong()
        assert QuantLinear not in kinds(model).values()
    quantize_(model.model.layers[2], "fp4")
    before = kinds(model)
    with pytest.raises(ValueError, match=r"model\.layers\.2\.q_proj is quantized already"):
        quantize_(model, "int4")
    with pytest.raises(ValueError, match="the model is quantized already"):
        quantize_(model.model.layers[2].q_proj, "int4")
    with pytest.raises(ValueError, match="floating-point dtype"):
        to_dense_(model, torch.int8)
    assert kinds(model) == before


def test_converting_nothing_warns() -> None:
    with pytest.warns(UserWarning, match=r"converted nothing. 0: skip='\*'; 1: skip='\*'"):
        report = quantize_(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), "int4", skip="*")
    assert not report.converted and report.share == 0
    with pytest.warns(UserWarning, match="no nn.Linear"):
        quantize_(nn.LayerNorm(4), "int4")


# --- Back to dense ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", recipes())
def test_to_dense_holds_the_weights_that_forward_used(name: str) -> None:
    model = Model()
    keys = list(model.state_dict())
    quantize_(model, replace(find_recipe(name), dense=(0, 0)))
    layer = model.model.layers[0].up_proj
    used, parameter, optimizer = layer.quantized_weight(), layer.weight, torch.optim.SGD(model.parameters(), lr=0.1)
    others = {n: p.clone() for n, p in model.named_parameters() if "proj" not in n}
    assert to_dense_(model) is model
    assert QuantLinear not in kinds(model).values() and type(layer) is nn.Linear
    assert layer.weight is parameter and torch.equal(layer.weight, used.bfloat16())
    assert layer.bias.dtype == layer.weight.dtype == torch.bfloat16
    assert all(torch.equal(p, dict(model.named_parameters())[n]) for n, p in others.items())
    assert list(model.state_dict()) == keys and set(vars(layer)) == set(vars(nn.Linear(1, 1)))
    model.to(torch.float32)(TOKENS).sum().backward()
    optimizer.step()
    quantize_(model, "int4")


def test_to_dense_dtypes() -> None:
    for dtype, expected in ((None, torch.float16), (torch.float32, torch.float32)):
        model = nn.Linear(32, 8).half()
        quantize_(model, "int4")
        model(torch.randn(3, 32).half()).sum().backward()
        to_dense_(model, dtype)
        assert model.weight.dtype == model.bias.dtype == expected
        assert (model.weight.grad is None) == (dtype is not None)
        model(torch.randn(3, 32).to(expected)).sum().backward()


# --- The report ------------------------------------------------------------------------------------------------------


def test_report_counts_and_serialises() -> None:
    model = Model()
    report = quantize_(model, "int4")
    assert isinstance(report, Report)
    assert report.parameters == sum(p.numel() for p in model.parameters())
    assert report.quantized_parameters == 3 * (32 * 32 + 64 * 32)
    assert report.share == report.quantized_parameters / report.parameters
    back = json.loads(json.dumps(report.to_dict()))
    assert back["converted"]["model.layers.2.up_proj"] == [64, 32] and back["skipped"] == report.skipped
    assert back["parameters"] == report.parameters and back["recipe"] == str(report.recipe)


def test_report_is_a_short_table() -> None:
    text = str(quantize_(Decoder(layers=48), "fp4"))
    lines = text.splitlines()
    assert len(lines) == 7
    assert lines[0].startswith("96 of 97 weights") and "in 4-bit matmuls" in lines[0]
    assert lines[1].startswith("fp4: forward e2m1")
    assert [line.split()[:2] for line in lines[4:6]] == [["layers.*.q_proj", "×48"], ["layers.*.up_proj", "×48"]]
    assert lines[4].endswith("quantized") and f"{48 * 32 * 32:,}" in lines[4] and "32 × 32" in lines[4]
    assert "norms, biases" in lines[6] and lines[6].endswith("unchanged")
    widths = {line.index(word) for line, word in zip(lines[3:6], ("embeddings", "quantized", "quantized"), strict=True)}
    assert len(widths) == 1  # columns line up


def test_report_of_lazy_and_meta_models() -> None:
    model = nn.Sequential(nn.LazyLinear(4), nn.Linear(8, 4, device="meta"))
    report = quantize_(model, "int4")
    assert list(report.converted) == ["1"] and "LazyLinear" in report.skipped["0"]
    assert str(report)
