"""The benchmark's model and the storage of its weights."""

import pytest
import torch
from torch import nn

from lowbit.bench.errors import BenchError
from lowbit.bench.model import PRESETS, Llama, preset, rotary_table, rotate
from lowbit.bench.storage import Weights, round_to_bf16

# Millions of parameters and share in the linear layers, from the papers' configurations.
PUBLISHED = {
    "nano": (0.14, 0.77),
    "60m": (58.1, 0.44),
    "130m": (134.1, 0.63),
    "350m": (368.0, 0.82),
    "1b": (1339.1, 0.90),
}


@pytest.mark.parametrize("name", PRESETS)
def test_preset_sizes(name: str):
    shape = PRESETS[name]
    with torch.device("meta"):
        model = Llama(shape)
    total = sum(p.numel() for p in model.parameters())
    assert total == shape.parameters()
    if name in PUBLISHED:
        millions, share = PUBLISHED[name]
        linear = sum(m.weight.numel() for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head")
        assert round(total / 1e6, 1 if millions > 1 else 2) == millions
        assert linear / total == pytest.approx(share, abs=0.008)


def test_fp16_memory_matches_the_published_column():
    """6 bytes per parameter (bf16 weights and two bf16 moments) give SCALE's printed gigabytes."""
    printed = {"60m": 0.35, "130m": 0.81, "350m": 2.21, "1b": 8.04}
    assert {n: round(6 * PRESETS[n].parameters() / 1e9, 2) for n in printed} == pytest.approx(printed, abs=0.011)


def test_unknown_preset_names_the_nearest():
    with pytest.raises(BenchError, match="did you mean 'nano'"):
        preset("nanno")


def test_module_names_are_hugging_faces():
    names = {n for n, _ in Llama(preset("nano")).named_parameters()}
    assert {"embed_tokens.weight", "lm_head.weight", "norm.weight", "layers.1.self_attn.q_proj.weight",
            "layers.0.mlp.gate_proj.weight", "layers.0.input_layernorm.weight"} <= names  # fmt: skip
    assert not any(n.endswith("bias") for n in names)


def test_model_is_causal():
    model = Llama(preset("nano")).initialise(0)
    tokens = torch.arange(64)[None] % 256
    other = tokens.clone()
    other[0, 40:] = 7
    a, b = model(tokens), model(other)
    assert a.shape == (1, 64, 256)
    assert torch.allclose(a[0, :40], b[0, :40], atol=1e-5) and not torch.allclose(a[0, 41:], b[0, 41:], atol=1e-3)


def test_rotary_scores_depend_on_distance_only():
    cos, sin = rotary_table(32, 16)
    q, k = torch.randn(16), torch.randn(16)
    turned_q, turned_k = (rotate(x.expand(32, 16), cos, sin) for x in (q, k))
    scores = turned_q @ turned_k.T
    assert torch.allclose(scores[10, 7], scores[20, 17], atol=1e-4)
    assert not torch.allclose(scores[10, 7], scores[10, 8], atol=1e-4)


def test_initial_values_depend_on_the_seed_only():
    a, b, c = (Llama(preset("nano")).initialise(s) for s in (1, 1, 2))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.lm_head.weight, c.lm_head.weight)
    assert a.lm_head.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert torch.equal(a.norm.weight, torch.ones(64))


def nano() -> torch.nn.Module:
    return round_to_bf16(Llama(preset("nano")).initialise(0))


@pytest.mark.parametrize("master", [True, False])
def test_weights_are_bf16_and_compute_is_fp32(master: bool):
    weights = Weights(nano(), master=master, autocast=False)
    tokens = torch.arange(64)[None]
    out = weights.forward(tokens)
    assert out.dtype == torch.float32
    plain = Llama(preset("nano")).initialise(0)
    with torch.no_grad():
        for p in plain.parameters():
            p.copy_(p.to(torch.bfloat16))
    assert torch.allclose(out, plain(tokens), atol=1e-6), "the same as an fp32 model whose weights were rounded"
    out.sum().backward()
    assert {g.dtype for g in weights.gradients()} == {torch.bfloat16}
    n = plain.lm_head.weight.numel() * 2
    assert weights.bytes(torch.optim.SGD([nn.Parameter(torch.ones(1))]))["weights"] >= n


def test_master_takes_the_step_and_the_stored_weights_follow():
    weights = Weights(nano(), master=True, autocast=False)
    opt = torch.optim.SGD(weights.groups(1.0), lr=2**-13)
    weights.forward(torch.arange(64)[None]).square().mean().backward()
    start = {n: p.clone() for n, p in weights.master.items()}
    weights.before_step()
    grads = {n: p.grad for n, p in weights.stored.items()}
    opt.step()
    for name, p in weights.master.items():
        assert torch.equal(p, start[name] - 2**-13 * grads[name].float())
    weights.after_step()
    assert all(torch.equal(p, weights.master[n].to(torch.bfloat16)) for n, p in weights.stored.items())
    assert weights.gradients() == []


def test_bytes_are_counted_from_the_tensors():
    shape = preset("nano")
    for master in (True, False):
        weights = Weights(nano(), master=master, autocast=False)
        opt = torch.optim.AdamW(weights.groups(1.0))
        weights.forward(torch.arange(64)[None]).sum().backward()
        counted = weights.bytes(opt)
        assert counted["weights"] == counted["gradients"] == 2 * shape.parameters()
        assert counted["master"] == (4 * shape.parameters() if master else 0) and counted["states"] == 0
        weights.before_step()
        opt.step()
        width, tensors = (4 if master else 2), len(weights.stored)
        assert weights.bytes(opt)["states"] == 2 * width * shape.parameters() + 4 * tensors  # and torch's step counters


def test_embedding_and_head_get_their_own_rate():
    groups = Weights(nano(), master=False, autocast=False).groups(5.0)
    assert [g["lr_mult"] for g in groups] == [1.0, 5.0]
    assert [n for n, _ in groups[1]["params"]] == ["embed_tokens.weight", "lm_head.weight"]
    assert len(groups[0]["params"]) == 2 * 9 + 1
