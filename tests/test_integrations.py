"""Weights to and from bitsandbytes, torchao and compressed-tensors: what they decode is what we decode, bit for bit."""

import copy
import importlib
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import one_thread as one_thread
from torch import Tensor, nn

import lowbit
from lowbit.integrations import bitsandbytes as to_bnb
from lowbit.integrations import compressed_tensors as to_ct
from lowbit.integrations import torchao as to_ao
from lowbit.nn.stored import StoredWeight
from lowbit.packed import Packed


def values(shape: tuple[int, int], seed: int = 0) -> Tensor:
    """Rows of all magnitudes, and a block of zeros."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * torch.exp(2 * torch.randn(shape[0], 1, generator=generator))
    x[0, :64] = 0.0
    return x


def same(a: Packed, b: Packed) -> None:
    assert (a.format, a.shape, a.parts.keys()) == (b.format, b.shape, b.parts.keys())
    for name, part in a.parts.items():
        assert part.dtype == b.parts[name].dtype and torch.equal(part, b.parts[name]), name


# ---- bitsandbytes

bnb_case = pytest.mark.parametrize(
    "name, shape",
    [
        ("nf4", (48, 128)),
        ("nf4:128", (48, 256)),
        ("nf4-dq", (48, 128)),
        ("nf4-dq", (300, 192)),  # more than one block of scales, the last one short
        ("nf4", (1, 100)),  # a row that ends in a short block
        ("nf4", (4, 96)),  # blocks of 32, which both have
        ("nf4-dq", (4, 96)),
        ("nf4:32", (3, 33 * 32)),
        ("bnb-fp4", (16, 64)),
    ],
)


def decoded(data: Tensor, state: Any) -> Tensor:
    """What bitsandbytes decodes, asked for one long row.

    Where rows are not whole blocks, the CPU kernel of 0.50.2 reads scales of other blocks: of a Gaussian 30 × 96 in
    blocks of 64 the mean error is .18 instead of .074. A flat tensor has no rows.
    """
    from bitsandbytes.functional import dequantize_4bit

    flat = copy.copy(state)
    flat.shape = torch.Size((1, state.shape.numel()))
    return dequantize_4bit(data, flat).view(state.shape)


@pytest.mark.rivals
@bnb_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bitsandbytes_decodes_what_we_decode(name: str, shape: tuple[int, int], dtype: torch.dtype):
    from bitsandbytes.functional import dequantize_4bit

    weight = lowbit.quantize(values(shape), name)
    data, state = to_bnb.export_weight(weight, dtype)
    assert data.dtype == torch.uint8 and data.shape == ((shape[0] * shape[1] + 1) // 2, 1)
    assert torch.equal(dequantize_4bit(data, state), weight.dequantize(dtype))
    assert state.nested == (name == "nf4-dq" and shape[1] != 96)


@pytest.mark.rivals
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("shape, block", [((48, 128), 64), ((30, 96), 64), ((2, 4096), 4096), ((64, 32), 128)])
def test_we_decode_what_bitsandbytes_made(nested: bool, kind: str, shape: tuple[int, int], block: int):
    from bitsandbytes.functional import quantize_4bit

    data, state = quantize_4bit(values(shape), blocksize=block, quant_type=kind, compress_statistics=nested)
    weight = to_bnb.import_weight(data, state)
    assert torch.equal(weight.dequantize(), decoded(data, state))
    whole = shape[1] % block == 0
    assert weight.format.name.startswith("nf4-dq") == (nested and whole and kind == "nf4")
    if whole and (kind == "nf4" or not nested):
        again, about = to_bnb.export_weight(weight, torch.float32)
        assert torch.equal(again, data) and torch.equal(about.absmax, state.absmax)


@pytest.mark.rivals
def test_nibbles_and_codes_are_bitsandbytes_own():
    """Where nothing is a tie, quantizing there and here gives the same bytes, in the order of each."""
    from bitsandbytes.functional import quantize_4bit

    x = values((64, 256))
    data, state = quantize_4bit(x, blocksize=64, quant_type="nf4", compress_statistics=False)
    ours, about = to_bnb.export_weight(lowbit.quantize(x, "nf4"))
    assert torch.equal(ours, data) and torch.equal(about.absmax, state.absmax)
    low, high = lowbit.quantize(x, "nf4").codes[1, 0] & 15, lowbit.quantize(x, "nf4").codes[1, 0] >> 4
    assert data[128, 0] == (low << 4) | high


@pytest.mark.rivals
def test_what_bitsandbytes_has_not():
    with pytest.raises(ValueError, match="rows of 100 values in blocks of 64 have no counterpart"):
        to_bnb.export_weight(lowbit.quantize(values((4, 100)), "nf4"))
    with pytest.raises(ValueError, match="no 4-bit weights in format int4"):
        to_bnb.export_weight(lowbit.quantize(values((4, 128)), "int4"))
    with pytest.raises(ValueError, match="no 4-bit weight of bitsandbytes yet"):
        to_bnb.import_weight(torch.zeros(8, 1), None)
    from bitsandbytes.functional import quantize_4bit

    with pytest.raises(ValueError, match="rows of 33 values in flat blocks of 64 have no counterpart"):
        to_bnb.import_weight(*quantize_4bit(values((4, 33)), blocksize=64, quant_type="nf4"))


class Small(nn.Module):
    """Two linear layers, one of them with a bias, and a head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(128, 192)
        self.inner = nn.ModuleDict({"second": nn.Linear(192, 128, bias=False)})
        self.lm_head = nn.Linear(128, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.lm_head(self.inner["second"](torch.relu(self.first(x))))


def stored(store: str) -> Small:
    model = Small().requires_grad_(store != "nf4-dq")  # which is for weights that are not trained
    lowbit.quantize_(model, lowbit.Recipe(store=store))
    return model


X = torch.randn(5, 128, generator=torch.Generator().manual_seed(1))


@pytest.mark.rivals
@pytest.mark.parametrize("store", ["nf4", "nf4-dq"])
def test_a_models_layers_become_linear4bit_and_come_back(store: str, tmp_path: Path):
    import bitsandbytes as bnb

    model = stored(store)
    before, wanted = copy.deepcopy(model), model(X)
    to_bnb.export_(model)
    assert isinstance(model.first, bnb.nn.Linear4bit) and isinstance(model.inner["second"], bnb.nn.Linear4bit)
    assert type(model.lm_head) is nn.Linear
    torch.testing.assert_close(model(X), wanted, atol=1e-5, rtol=1e-5)
    theirs = dict(model.state_dict())  # as their own layers write it
    exported = to_bnb.export_state_dict(before)
    assert theirs.keys() == exported.keys() and all(torch.equal(theirs[k], exported[k]) for k in theirs)

    to_bnb.import_(model)
    assert isinstance(model.first.weight, StoredWeight) and not model.first.weight.requires_grad
    assert torch.equal(model(X), wanted)
    same_state(before.state_dict(), model.state_dict())

    fresh = stored(store)
    for p in fresh.parameters():
        p.data = torch.zeros_like(p)
    fresh.load_state_dict(to_bnb.import_state_dict(theirs), strict=True)
    assert torch.equal(fresh(X), wanted)
    with pytest.raises(ValueError, match="no layer of this model is bitsandbytes' Linear4bit"):
        to_bnb.import_(Small())


def same_state(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.rivals
def test_linear4bit_of_others_is_trained_here():
    import bitsandbytes as bnb

    model = nn.Sequential(
        bnb.nn.Linear4bit(128, 128, quant_type="nf4", compute_dtype=torch.float32, compress_statistics=False)
    )
    model.to("cpu")
    wanted = model(X)
    to_bnb.import_(model)
    torch.testing.assert_close(model(X), wanted, atol=1e-4, rtol=1e-4)
    assert model[0].weight.store == "nf4"
    model[0].weight.requires_grad_(True)
    codes = model[0].weight.parts["codes"].clone()
    opt = lowbit.optim.AdamW(model.named_parameters(), lr=1e-1)
    model(X).square().mean().backward()
    opt.step()
    assert not torch.equal(codes, model[0].weight.parts["codes"])


# ---- torchao


@pytest.mark.rivals
@pytest.mark.parametrize(
    "name", ["int8:row", "int8:32", "int4:32", "int4:64", "int4-bf16", "int4:row", "mxfp4", "mxfp4-even", "mxfp8",
             "mxfp8-e5m2", "nvfp4", "nvfp4-te", "nvfp4-46"],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torchao_decodes_what_we_decode(name: str, dtype: torch.dtype):
    weight = lowbit.quantize(values((48, 128)), name)
    theirs = to_ao.export_weight(weight, dtype)
    assert theirs.shape == (48, 128)
    alone = type(theirs).__name__ == "Int8QuantizedTrainingLinearWeight"  # its dtype is its scale's
    found = theirs.dequantize() if alone else theirs.dequantize().to(dtype)
    assert torch.equal(found.to(dtype), weight.dequantize(dtype))
    back = to_ao.import_weight(theirs)
    assert torch.equal(back.dequantize(), weight.dequantize()) and torch.equal(back.codes, weight.codes)


@pytest.mark.rivals
def test_we_decode_what_torchao_made():
    from torchao.prototype.mx_formats.mx_tensor import MXTensor
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale
    from torchao.prototype.quantized_training.int8 import Int8QuantizedTrainingLinearWeight
    from torchao.quantization import IntxUnpackedToInt8Tensor
    from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import to_nf4

    x = values((64, 256))
    scale = per_tensor_amax_to_scale(x.abs().max())
    made = [
        MXTensor.to_mx(x, torch.float4_e2m1fn_x2, 32),
        MXTensor.to_mx(x, torch.float8_e4m3fn, 32),
        MXTensor.to_mx(x, torch.float8_e5m2, 32),
        NVFP4Tensor.to_nvfp4(x, 16, per_tensor_scale=scale),
        NVFP4Tensor.to_nvfp4(x, 16),
        Int8QuantizedTrainingLinearWeight.from_float(x),
        IntxUnpackedToInt8Tensor.from_hp(x, (1, 32), torch.int4),  # its codes reach -8
        IntxUnpackedToInt8Tensor.from_hp(x, (1, 64), torch.int8),
    ]
    for theirs in made:
        assert torch.equal(to_ao.import_weight(theirs).dequantize(), theirs.dequantize().float()), type(theirs)
    with pytest.raises(ValueError, match="NF4Tensor is no tensor of torchao that can be imported: its table"):
        to_ao.import_weight(to_nf4(x, 64, 256))


@pytest.mark.rivals
def test_what_torchao_has_not():
    for name, shape, message in (
        ("nf4", (4, 128), "torchao has no tensor for format nf4"),
        ("int4:32", (4, 100), "rows that are whole blocks"),
        ("nvfp4", (4, 100), "rows that are whole blocks of 16; these have 100 values"),
    ):
        with pytest.raises(ValueError, match=message):
            to_ao.export_weight(lowbit.quantize(values(shape), name))
    from torchao.quantization import IntxUnpackedToInt8Tensor, MappingType

    shifted = IntxUnpackedToInt8Tensor.from_hp(
        values((4, 64)) + 1, (1, 32), torch.int4, mapping_type=MappingType.ASYMMETRIC
    )
    with pytest.raises(ValueError, match="zero points"):
        to_ao.import_weight(shifted)
    with pytest.raises(ValueError, match="Tensor is no tensor of torchao"):
        to_ao.import_weight(torch.zeros(4, 4))


@pytest.mark.rivals
@pytest.mark.parametrize("store", ["int4:32", "mxfp4", "nvfp4"])
def test_a_plain_model_takes_torchaos_checkpoint(store: str):
    """nn.Linear with torchao's tensors computes what our layers compute, where torchao can on a CPU."""
    model = stored(store)
    state = to_ao.export_state_dict(model)
    assert type(state["first.weight"]).__module__.startswith("torchao.")
    plain = Small()
    plain.load_state_dict(state, assign=True)
    if store == "int4:32":  # torchao's products with FP4 weights alone want a GPU, or are not there yet
        torch.testing.assert_close(plain(X), model(X), atol=1e-5, rtol=1e-4)
    fresh = stored(store)
    fresh.load_state_dict(to_ao.import_state_dict(state), strict=True)
    assert torch.equal(fresh(X), model(X))


# ---- compressed-tensors


def compressor(kind: str):
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own imports
        return importlib.import_module("compressed_tensors.compressors").BaseCompressor.get_value_from_registry(kind)


def scheme(model: nn.Module):
    from compressed_tensors.quantization import QuantizationScheme

    return QuantizationScheme(**to_ct.config(model)["config_groups"]["group_0"])


CT = [("int4", "pack-quantized"), ("int4:64", "pack-quantized"), ("int8:64", "pack-quantized"),
      ("int4:row", "pack-quantized"), ("mxfp4", "mxfp4-pack-quantized"), ("nvfp4", "nvfp4-pack-quantized")]  # fmt: skip


@pytest.mark.parametrize("name, kind", CT)
def test_compressed_tensors_decode_what_we_decode(name: str, kind: str):
    theirs = compressor(kind)
    layer = nn.Sequential(nn.Linear(128, 48, bias=False))
    layer[0].weight.data = values((48, 128))
    lowbit.quantize_(layer, lowbit.Recipe(weight=name))
    assert to_ct.config(layer)["format"] == kind
    weight = lowbit.quantize(values((48, 128)), name)
    tensors = to_ct.export_weight(weight)
    found = theirs.decompress(tensors, scheme(layer))["weight"].float()
    if name == "nvfp4":  # they compute in bf16 here
        torch.testing.assert_close(found, weight.dequantize(), rtol=2**-7, atol=0)
    else:
        assert torch.equal(found, weight.dequantize())
    back = to_ct.import_weight(tensors)
    scale = back.parts["scale"]
    assert torch.equal(back.codes, weight.codes) and torch.equal(scale, weight.parts["scale"].to(scale.dtype))


@pytest.mark.parametrize("name, kind", CT)
def test_we_decode_what_compressed_tensors_made(name: str, kind: str):
    """Their compressor, given the scales, stores the codes that ours stores."""
    theirs = compressor(kind)
    layer = nn.Sequential(nn.Linear(128, 48, bias=False))
    lowbit.quantize_(layer, lowbit.Recipe(weight=name))
    weight = lowbit.quantize(values((48, 128)), name)
    ours = to_ct.export_weight(weight)
    given = {"weight": weight.dequantize(), "weight_scale": ours["weight_scale"].float()}
    if kind == "mxfp4-pack-quantized":
        given["weight_scale"] = torch.exp2(ours["weight_scale"].float() - 127)
    if "weight_global_scale" in ours:
        given["weight_global_scale"] = ours["weight_global_scale"]
    made = theirs.compress(given, scheme(layer))
    assert torch.equal(made["weight_scale"].float(), ours["weight_scale"].float())
    if kind == "pack-quantized":  # FP4 has two zeros, and they keep the sign of one that is given
        assert torch.equal(made["weight_packed"], ours["weight_packed"])
    made = {k: v for k, v in made.items() if k in to_ct.PARTS}
    torch.testing.assert_close(to_ct.import_weight(made).dequantize(), weight.dequantize(), rtol=3e-7, atol=0)


def test_what_compressed_tensors_have_not():
    with pytest.raises(ValueError, match="no layout for format nf4"):
        to_ct.export_weight(lowbit.quantize(values((4, 128)), "nf4"))
    with pytest.raises(ValueError, match="whole blocks of 32; these have 100 values"):
        to_ct.export_weight(lowbit.quantize(values((4, 100)), "int4:32"))
    good = to_ct.export_weight(lowbit.quantize(values((4, 128)), "int4:32"))
    for change, message in (
        ({"weight_zero_point": torch.ones(1)}, "zero points"),
        ({"weight_shape": torch.tensor([4, 99])}, "which 4 or 8 bits of 4 x 99 values are not"),
        ({"weight_packed": good["weight_packed"].float()}, "must be int32 or uint8"),
    ):
        with pytest.raises(ValueError, match=message):
            to_ct.import_weight({**good, **change})
    for part in ("weight_scale", "weight_shape"):
        with pytest.raises(ValueError, match=f"{part} is missing"):
            to_ct.import_weight({k: v for k, v in good.items() if k != part})
    mixed = Small()
    lowbit.quantize_(mixed.first, "int4")
    lowbit.quantize_(mixed.inner["second"], lowbit.Recipe(weight="int8:32"))
    with pytest.raises(ValueError, match="stored in several formats: int4:16, int8:32"):
        to_ct.config(mixed)


def test_state_dicts_come_back():
    model = stored("int4:32")
    state = to_ct.export_state_dict(model)
    assert {"first.weight_packed", "first.weight_scale", "first.weight_shape", "first.bias"} <= state.keys()
    fresh = stored("int4:32")
    for p in fresh.parameters():
        p.data = torch.zeros_like(p)
    fresh.load_state_dict(to_ct.import_state_dict(state, torch.float32), strict=True)
    assert torch.equal(fresh(X), model(X))
    with pytest.raises(ValueError, match="no layer of this model is quantized"):
        to_ct.export_state_dict(Small())


def test_a_float_master_is_exported_as_its_forward_pass_sees_it():
    model = Small()
    lowbit.quantize_(model, "int4")
    again = Small()
    lowbit.quantize_(again, lowbit.Recipe(store="int4:16", activation="int4:16"))
    again.load_state_dict(to_ct.import_state_dict(to_ct.export_state_dict(model), torch.float32))
    assert torch.equal(again(X), model(X))
    released = Small()
    lowbit.quantize_(released, "stablespam-fp4")
    with pytest.raises(ValueError, match="which no codes hold"):
        to_ct.export_state_dict(released)


# ---- Hugging Face checkpoints, from end to end


def tiny_llama():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=96, max_position_embeddings=32, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.filterwarnings("ignore")  # of the libraries
@pytest.mark.parametrize("store", ["int4:32", "mxfp4"])
def test_transformers_read_what_was_saved(store: str, tmp_path: Path):
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    model = tiny_llama()
    lowbit.quantize_(model, lowbit.Recipe(store=store))
    to_ct.save_pretrained(model, tmp_path)
    told = json.loads((tmp_path / "config.json").read_text())
    assert told["quantization_config"]["ignore"] == ["lm_head"]
    dtype = torch.float32 if store == "int4:32" else torch.bfloat16  # what they decode MXFP4 to
    read = type(model).from_pretrained(tmp_path, dtype=dtype).to(dtype)
    tokens = torch.arange(10).unsqueeze(0)
    with torch.no_grad():
        theirs, ours = read(tokens).logits, lowbit.to_dense_(model, dtype).to(dtype)(tokens).logits
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-4)
    found = read.model.layers[1].mlp.up_proj.weight
    assert torch.equal(found, model.model.layers[1].mlp.up_proj.weight)


def test_a_library_that_is_missing_is_named():
    from lowbit.integrations.weights import library

    with pytest.raises(ImportError, match="this needs no-such-library: pip install no-such-library"):
        library("no_such_library.part")
