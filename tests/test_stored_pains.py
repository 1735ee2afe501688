"""What users of other libraries ran into with weights that are kept in few bits: none of it happens here.

The numbers in brackets are issues of the libraries' own trackers. `test_nn_pains` has those about layers' arithmetic.
"""

import copy
import io
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cases import one_thread as one_thread
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lowbit
from lowbit.nn import Operand, Recipe, StoredWeight, quantize_
from lowbit.rounding import mix

TRAINED = ["int8", "int4", "nf4", "mxfp4", "nvfp4", "split", "split8"]
X = torch.randn(64, 96, generator=torch.Generator().manual_seed(1))
Y = torch.randn(64, 8, generator=torch.Generator().manual_seed(2))


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(96, 128), nn.GELU(), nn.Linear(128, 8))


def stored(store: str, seed: int = 0) -> nn.Sequential:
    model = network(seed)
    if store == "nf4-dq":
        model.requires_grad_(False)
    quantize_(model, Recipe(store=store))
    return model


def train(model: nn.Module, opt: torch.optim.Optimizer, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        opt.zero_grad()
        loss = F.mse_loss(model(X), Y)
        loss.backward()
        opt.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("store", TRAINED)
def test_weights_in_four_and_eight_bits_are_finetuned_in_full(store: str):
    """Elsewhere: "cannot perform fine-tuning on purely quantized models" (unsloth 241, 1110; peft 1342)."""
    model = stored(store)
    before = [p.codes.clone() for p in model.parameters() if isinstance(p, StoredWeight)]
    losses = train(model, lowbit.optim.AdamW(model.named_parameters(), lr=1e-2, weight_decay=0.0), 60)
    after = [p.codes for p in model.parameters() if isinstance(p, StoredWeight)]
    assert losses[-1] < 0.5 * losses[0]
    assert all((a != b).float().mean() > 0.3 for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize("store", [*TRAINED, "nf4-dq"])
def test_a_model_loads_its_own_state_dict(store: str):
    """Elsewhere a 4-bit state dict could not be loaded strictly by the model it came from (bitsandbytes 1946)."""
    model, other = stored(store), stored(store, seed=1)
    saved = copy.deepcopy(model.state_dict())
    assert model.load_state_dict(saved, strict=True) == other.load_state_dict(saved, strict=True)
    assert torch.equal(other(X), model(X))


def test_loading_leniently_is_no_silent_garbage():
    """Elsewhere codes without their scales, loaded with strict=False, gave a model of noise (quanto 136, 293)."""
    model, saved = stored("int4"), stored("int4", seed=1).state_dict()
    before = model(X)
    for missing in ("0.weight_scale", "0.weight_format"):
        some = {key: value for key, value in saved.items() if key != missing and key.startswith("0.weight")}
        with pytest.raises(RuntimeError, match=r"0\.weight"):
            model.load_state_dict(some, strict=False)
        assert torch.equal(model(X), before)


@pytest.mark.parametrize("store", [*TRAINED, "nf4-dq", "e4m3", "mxfp8", "e2m1"])
def test_packed_codes_are_never_floats(store: str):
    """Elsewhere codes viewed as bf16 had their NaNs rewritten on the way through a collective (bitsandbytes 1945)."""
    parts = StoredWeight.of(torch.randn(12, 512), store).parts
    assert parts["codes"].dtype == torch.uint8
    for part, tensor in parts.items():  # floats are numbers: of whatever bits, none of them a NaN
        assert not tensor.is_floating_point() or (part != "codes" and tensor.isfinite().all())


def test_few_bits_take_few_bytes():
    """Elsewhere memory did not shrink: a 16-bit copy, or masters, stayed (TE 1688, unsloth 3859, OneTrainer 776)."""
    model = nn.Sequential(*(nn.Linear(512, 512, bias=False) for _ in range(4))).bfloat16()
    dense, count = sum(p.nbytes for p in model.parameters()), 4 * 512 * 512
    report = quantize_(model, Recipe(store="mxfp4"))
    opt = lowbit.optim.AdamS(model.named_parameters(), lr=1e-3, states="4bit")
    model(torch.randn(8, 512).bfloat16()).sum().backward()
    opt.step()
    kept = sum(part.nbytes for p in model.parameters() for part in p.parts.values())
    assert kept == report.stored_bytes == count * 4.25 / 8 and kept < 0.27 * dense
    states = sum(t.nbytes for s in opt.state.values() for t in s.values() if isinstance(t, Tensor))
    assert kept + states < 9 * count / 8


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's compiler does it
def test_a_compiled_model_has_no_graph_breaks():
    """Elsewhere 4-bit layers broke the graph, eleven times in a model (bitsandbytes 1184, 1578; axolotl 3721)."""
    model = nn.Sequential(nn.Embedding(50, 96), stored("nf4"))
    quantize_(model[0:1], Recipe(embedding="int8"))
    torch._dynamo.reset()
    found = torch._dynamo.explain(model)(torch.arange(12))
    assert found.graph_break_count == 0 and found.graph_count == 1
    torch._dynamo.reset()


def test_stochastic_rounding_is_there_wherever_low_bits_are_written():
    """Asked for elsewhere, in vain, for weights and states (bitsandbytes 1165; ao 3264, 3384; pytorch 37967)."""
    x = torch.full((1, 4096), 0.3).index_fill_(1, torch.tensor([0]), 7.0)
    assert abs(float(lowbit.quantize(x, "int4:256", stochastic=True).dequantize()[0, 1:256].mean()) - 0.3) < 0.1
    w = StoredWeight.of(torch.tensor([[7.0, *[0.0] * 255]] * 64), "int4:256")
    with torch.no_grad():
        w.add_(0.3)
    assert abs(float(w.dequantize()[:, 1:].mean()) - 0.3) < 0.05
    for dtype, store in ((torch.bfloat16, None), (torch.float32, "int8")):
        p = nn.Parameter(torch.ones(64, 256, dtype=dtype))
        if store:
            p = nn.Parameter(StoredWeight.of(p.detach(), store))
        for seed in range(20):  # each of a thousandth of the distance of two codes, or less
            p.grad = torch.ones(64, 256, dtype=dtype)
            lowbit.optim.SGD([("w", p)], lr=1e-5, seed=seed).step()
        assert abs(float((p.detach() + 0).float().mean()) - (1 - 20e-5)) < 1e-4
    p = nn.Parameter(torch.zeros(64, 256))
    p.grad = torch.full((64, 256), 0.3).index_fill_(1, torch.tensor([0, 128]), 7.0)
    opt = lowbit.optim.AdamW([p], lr=1e-3, betas=(0.5, 0.5), states="4bit", state_rounding="stochastic")
    opt.step()
    assert len(opt.state[p]["exp_avg"].unique()) > 2  # of equal values, some are up and some down


def test_ranks_that_hold_the_same_weights_stay_the_same():
    """Elsewhere each GPU drew bits of its own, and ranks drifted apart (Advanced_Optimizers 7, torchtitan 1194)."""
    ranks = [stored("int4") for _ in range(2)]
    for rank, model in enumerate(ranks):
        torch.manual_seed(mix(rank))  # whatever else a rank does with torch's generator
        train(model, lowbit.optim.AdamW(model.named_parameters(), lr=1e-2), 5)
    assert all(torch.equal(a + 0, b + 0) for a, b in zip(*(m.parameters() for m in ranks), strict=True))
    a, b = (p for p in ranks[0].parameters() if isinstance(p, StoredWeight))
    assert int(a.stream) != int(b.stream)  # and two weights have not the same bits


@pytest.mark.parametrize("recipe", ["nvfp4", "quartet2", "tetrajet2"])
def test_nvfp4_training_in_plain_pytorch(recipe: str):
    """Asked for elsewhere (ao 3293, 4369, 4851; TE 1701; Quartet 5): any torch optimizer, any machine."""
    model = network()
    quantize_(model, recipe if recipe != "nvfp4" else Recipe(**_matmuls(recipe)))
    assert len([m for m in model if type(m) is lowbit.nn.QuantLinear]) == 2
    losses = train(model, torch.optim.AdamW(model.parameters(), lr=3e-3), 60)
    assert losses[-1] < 0.6 * losses[0]


def _matmuls(name: str) -> dict:
    """A preset's matmuls, without the blocks that it leaves dense."""
    from lowbit.nn.presets import find_recipe

    found = find_recipe(name)
    return {"forward": found.forward, "dgrad": found.dgrad, "wgrad": found.wgrad}


@pytest.mark.parametrize("optimizer", ["SGD", "Adam", "AdamW", "Adagrad", "RMSprop", "NAdam", "Adamax"])
@pytest.mark.parametrize("store", ["int8", "nf4"])
def test_optimizers_do_not_crash_on_the_tensor_subclass(store: str, optimizer: str):
    """Elsewhere AdamW crashed on a quantized parameter, for want of one operation (torchao's README)."""
    model = stored(store)
    losses = train(model, getattr(torch.optim, optimizer)(model.parameters(), lr=1e-3), 10)
    assert losses[-1] < losses[0] and all(map(torch.isfinite, map(torch.tensor, losses)))


def test_masters_are_what_the_model_was_initialized_with():
    """Elsewhere masters were made of the 8-bit weights, and the low bits were lost (TE 1121, 1188, 1544, 2682)."""
    model = network()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    quantize_(model, "int8")
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    for store, bits in (("split", 11), ("split8", 15)):  # of the largest of each block
        model = stored(store)
        for name in ("0.weight", "2.weight"):
            held = dict(model.named_parameters())[name].load()
            assert (held - before[name]).abs().max() <= before[name].abs().max() * 2.0**-bits


@pytest.mark.parametrize("store", [*TRAINED, "nf4-dq"])
def test_tensor_subclasses_go_through_safetensors_and_weights_only(store: str, tmp_path: Path):
    """Elsewhere neither could save a trainable low-bit weight, or load it (transformers 40735; torchao's int8)."""
    model, other = stored(store), stored(store, seed=1)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(other(X), model(X))
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    stored(store, seed=2).load_state_dict(torch.load(file, weights_only=True))


def test_a_plain_module_needs_no_framework_around_it():
    """Elsewhere 4-bit layers came with one library's models only, and without a CPU (bitsandbytes 529, 564, 821)."""

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.ModuleDict({"a": nn.Linear(96, 33), "b": nn.Linear(33, 7, bias=False)})

        def forward(self, x: Tensor) -> Tensor:
            return self.inner["b"](self.inner["a"](x).tanh())

    model = Own()
    assert list(quantize_(model, Recipe(store="int4")).converted) == ["inner.a", "inner.b"]
    model(X).sum().backward()
    lowbit.optim.AdamW(model.named_parameters(), lr=1e-3).step()


@pytest.mark.parametrize("store", [*TRAINED, "nf4-dq"])
def test_resuming_does_not_quantize_what_is_quantized(store: str):
    """Elsewhere each resume rounded the stored weights once more, and they decayed (OneTrainer 1634)."""
    model = stored(store)
    if store != "nf4-dq":
        train(model, lowbit.optim.AdamW(model.named_parameters(), lr=1e-2), 5)
    parts = {name: {k: v.clone() for k, v in p.parts.items()} for name, p in _weights(model)}
    for seed in range(3):
        other = stored(store, seed)
        other.load_state_dict(model.state_dict())
        model = other
    for name, p in _weights(model):
        assert all(torch.equal(p.parts[part], tensor) for part, tensor in parts[name].items())
    with pytest.raises(ValueError, match="quantized already"):
        quantize_(model, Recipe(store=store))


def _weights(model: nn.Module) -> list[tuple[str, StoredWeight]]:
    return [(name, p) for name, p in model.named_parameters() if isinstance(p, StoredWeight)]


def test_hardware_that_is_not_there_is_no_reason_to_fail_or_to_be_wrong(monkeypatch: pytest.MonkeyPatch):
    """Elsewhere a missing matrix unit was an error, or a line printed and wrong numbers (TE 2255, 3281; QeRL 10)."""
    recipe = Recipe(activation="nvfp4", gradient=Operand("mxfp8", rounding="stochastic"), store="nvfp4")
    found = []
    for mode in ("values", "codes"):
        monkeypatch.setenv("LOWBIT_MATMUL", mode)
        model = network()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            quantize_(model, recipe)
            y = model(X)
            y.square().sum().backward()
        found.append([y, *(p.grad for p in model.parameters())])
    assert all(map(torch.equal, *found)) and all(t.abs().max() > 0 for t in found[0])
