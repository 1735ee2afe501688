"""What a parameter is for: every family's names and shapes, module types before names, and what cannot be placed."""

import pytest
import torch
from cases import gradient
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import Parameter

import lowbit
from lowbit.optim import SCALE, SWAN, AdamMini, AdamW, Muon, SlimAdam, StableSPAM
from lowbit.roles import OF_VECTORS, ROLES, role_of

D, F, V, KV = 64, 160, 500, 16  # hidden, MLP, vocabulary, and the rows of k and v where heads share them

Table = list[tuple[str, tuple[int, ...], str]]


def under(prefix: str, table: Table) -> Table:
    return [(prefix + name, shape, role) for name, shape, role in table]


QKVO = [("q_proj.weight", (D, D), "q"), ("k_proj.weight", (KV, D), "k"), ("v_proj.weight", (KV, D), "v")]
ATTN = [*QKVO, ("o_proj.weight", (D, D), "o")]
SWIGLU = [("gate_proj.weight", (F, D), "gate"), ("up_proj.weight", (F, D), "up"), ("down_proj.weight", (D, F), "down")]
ENDS = [("model.embed_tokens.weight", (V, D), "embedding"), ("lm_head.weight", (V, D), "head")]
NORMS = [("input_layernorm.weight", (D,), "norm"), ("post_attention_layernorm.weight", (D,), "norm")]
L = "model.layers.0."

FAMILIES: dict[str, Table] = {
    "LLaMA, Mistral": [
        *ENDS, *under(L + "self_attn.", ATTN), *under(L + "mlp.", SWIGLU), *under(L, NORMS),
        ("model.norm.weight", (D,), "norm"), (L + "self_attn.q_proj.bias", (D,), "bias"),
    ],
    "Qwen 2 and 3": [
        *ENDS, *under(L + "self_attn.", [*ATTN, ("q_norm.weight", (16,), "norm"), ("k_norm.weight", (16,), "norm")]),
        (L + "self_attn.q_proj.bias", (D,), "bias"), (L + "self_attn.k_proj.bias", (KV,), "bias"),
    ],
    "Gemma": [
        *ENDS, *under(L + "mlp.", SWIGLU), (L + "self_attn.q_proj.weight", (4 * D, D), "q"),
        (L + "self_attn.o_proj.weight", (D, 4 * D), "o"), (L + "pre_feedforward_layernorm.weight", (D,), "norm"),
        ("model.embed_vision.embedding_projection.weight", (D, F), ""),
    ],
    "Phi 1 and 2": [
        *ENDS, *under(L + "self_attn.", [*QKVO, ("dense.weight", (D, D), "o"), ("dense.bias", (D,), "bias")]),
        (L + "mlp.fc1.weight", (F, D), "up"), (L + "mlp.fc2.weight", (D, F), "down"),
        ("model.final_layernorm.weight", (D,), "norm"), ("model.final_layernorm.bias", (D,), "bias"),
        ("lm_head.bias", (V,), "bias"),
    ],
    "Phi 3": [
        (L + "self_attn.qkv_proj.weight", (3 * D, D), "qkv"), (L + "self_attn.o_proj.weight", (D, D), "o"),
        (L + "mlp.gate_up_proj.weight", (2 * F, D), "mlp"), (L + "mlp.down_proj.weight", (D, F), "down"),
    ],
    "GPT-2": [
        ("transformer.wte.weight", (V, D), "embedding"), ("transformer.wpe.weight", (128, D), "embedding"),
        ("transformer.h.0.ln_1.weight", (D,), "norm"), ("transformer.h.0.ln_1.bias", (D,), "bias"),
        ("transformer.h.0.attn.c_attn.weight", (D, 3 * D), "qkv"),
        ("transformer.h.0.attn.c_attn.bias", (3 * D,), "bias"),
        ("transformer.h.0.attn.c_proj.weight", (D, D), "o"), ("transformer.h.0.mlp.c_fc.weight", (D, F), "up"),
        ("transformer.h.0.mlp.c_proj.weight", (F, D), "down"), ("transformer.ln_f.weight", (D,), "norm"),
        ("transformer.h.0.crossattention.c_attn.weight", (D, 2 * D), ""),
        ("transformer.h.0.crossattention.q_attn.weight", (D, D), "q"), ("lm_head.weight", (V, D), "head"),
    ],
    "nanoGPT": [
        ("transformer.wte.weight", (V, D), "embedding"), ("transformer.wpe.weight", (128, D), "embedding"),
        *under("transformer.h.11.", [
            ("attn.c_attn.weight", (3 * D, D), "qkv"), ("attn.c_proj.weight", (D, D), "o"),
            ("mlp.c_fc.weight", (F, D), "up"), ("mlp.c_proj.weight", (D, F), "down"), ("ln_2.weight", (D,), "norm"),
        ]),
        ("lm_head.weight", (V, D), "head"),
    ],
    "GPT-NeoX, Pythia": [
        ("gpt_neox.embed_in.weight", (V, D), "embedding"), ("embed_out.weight", (V, D), "head"),
        *under("gpt_neox.layers.0.", [
            ("attention.query_key_value.weight", (3 * D, D), "qkv"), ("attention.dense.weight", (D, D), "o"),
            ("mlp.dense_h_to_4h.weight", (F, D), "up"), ("mlp.dense_4h_to_h.weight", (D, F), "down"),
            ("mlp.dense_4h_to_h.bias", (D,), "bias"), *NORMS,
        ]),
        ("gpt_neox.final_layer_norm.weight", (D,), "norm"), ("gpt_neox.final_layer_norm.bias", (D,), "bias"),
    ],
    "OPT": [
        ("model.decoder.embed_tokens.weight", (V, D), "embedding"),
        ("model.decoder.embed_positions.weight", (130, D), "embedding"),
        ("model.decoder.project_in.weight", (D, 32), ""), ("model.decoder.final_layer_norm.weight", (D,), "norm"),
        *under("model.decoder.layers.0.self_attn.", [*QKVO, ("out_proj.weight", (D, D), "o")]),
        *under("model.decoder.layers.0.", [
            ("self_attn_layer_norm.weight", (D,), "norm"), ("fc1.weight", (F, D), "up"), ("fc2.weight", (D, F), "down"),
            ("fc2.bias", (D,), "bias"), ("final_layer_norm.weight", (D,), "norm"),
        ]),
    ],
    "GPT-J, CodeGen, Falcon, BLOOM, MPT": [
        ("transformer.h.0.mlp.fc_in.weight", (F, D), "up"), ("transformer.h.0.mlp.fc_out.weight", (D, F), "down"),
        ("transformer.h.0.attn.out_proj.weight", (D, D), "o"),
        ("transformer.h.0.self_attention.query_key_value.weight", (D + 2 * KV, D), "qkv"),
        ("transformer.h.0.self_attention.dense.weight", (D, D), "o"), ("transformer.h.0.ln_mlp.weight", (D,), "norm"),
        ("transformer.word_embeddings.weight", (V, D), "embedding"),
        ("transformer.word_embeddings_layernorm.weight", (D,), "norm"),
        ("transformer.blocks.0.attn.Wqkv.weight", (3 * D, D), "qkv"),
        ("transformer.blocks.0.ffn.up_proj.weight", (F, D), "up"), ("transformer.blocks.0.norm_1.weight", (D,), "norm"),
    ],
    "Mixtral": [
        *under(L + "block_sparse_moe.", [
            ("gate.weight", (8, D), "router"), ("experts.7.w1.weight", (F, D), "gate"),
            ("experts.7.w2.weight", (D, F), "down"), ("experts.7.w3.weight", (F, D), "up"),
        ]),
    ],
    "experts fused": [
        *under(L + "mlp.", [
            ("experts.gate_up_proj", (8, 2 * F, D), "expert"), ("experts.down_proj", (8, D, F), "expert"),
            ("experts.gate_up_proj_bias", (8, 2 * F), "bias"), ("router.weight", (8, D), "router"),
            ("router.bias", (8,), "bias"), ("gate.weight", (8, D), "router"),
        ]),
        (L + "feed_forward.experts.gate_up_proj", (8, D, 2 * F), "expert"), (L + "moe.experts.w1", (8, F, D), "expert"),
        (L + "feed_forward.router.weight", (8, D), "router"),
        (L + "block_sparse_moe.input_linear.weight", (8, 2 * F, D), "expert"),
        (L + "block_sparse_moe.router.layer.weight", (8, D), "router"),
    ],
    "Qwen-MoE, DeepSeek": [
        *under(L + "mlp.experts.3.", SWIGLU), *under(L + "mlp.shared_expert.", SWIGLU),
        *under(L + "mlp.shared_experts.", SWIGLU), (L + "mlp.gate.weight", (60, D), "router"),
        (L + "mlp.gate.e_score_correction_bias", (60,), "bias"),
        (L + "mlp.shared_expert_gate.weight", (1, D), "router"),
        (L + "self_attn.q_a_proj.weight", (24, D), ""), (L + "self_attn.q_b_proj.weight", (2 * D, 24), "q"),
        (L + "self_attn.q_a_layernorm.weight", (24,), "norm"), (L + "self_attn.kv_b_proj.weight", (D, 24), ""),
        (L + "self_attn.kv_a_proj_with_mqa.weight", (32, D), ""), (L + "self_attn.o_proj.weight", (D, D), "o"),
        (L + "shared_head.head.weight", (V, D), "head"),
    ],
    "original LLaMA": [
        ("tok_embeddings.weight", (V, D), "embedding"), ("output.weight", (V, D), "head"),
        ("norm.weight", (D,), "norm"),
        *under("layers.0.", [
            ("attention.wq.weight", (D, D), "q"), ("attention.wk.weight", (KV, D), "k"),
            ("attention.wv.weight", (KV, D), "v"), ("attention.wo.weight", (D, D), "o"),
            ("feed_forward.w1.weight", (F, D), "gate"), ("feed_forward.w2.weight", (D, F), "down"),
            ("feed_forward.w3.weight", (F, D), "up"), ("attention_norm.weight", (D,), "norm"),
            ("ffn_norm.weight", (D,), "norm"),
        ]),
    ],
    "torch.nn.Transformer": [
        *under("encoder.layers.0.", [
            ("self_attn.in_proj_weight", (3 * D, D), "qkv"), ("self_attn.in_proj_bias", (3 * D,), "bias"),
            ("self_attn.out_proj.weight", (D, D), "o"), ("self_attn.out_proj.bias", (D,), "bias"),
            ("linear1.weight", (F, D), "up"), ("linear1.bias", (F,), "bias"), ("linear2.weight", (D, F), "down"),
            ("norm1.weight", (D,), "norm"), ("norm1.bias", (D,), "bias"),
        ]),
        ("decoder.layers.0.multihead_attn.q_proj_weight", (D, D), "q"), ("decoder.norm.weight", (D,), "norm"),
        ("decoder.layers.0.multihead_attn.bias_k", (1, 1, D), "bias"),
    ],
    "BERT": [
        *under("bert.embeddings.", [
            ("word_embeddings.weight", (V, D), "embedding"), ("position_embeddings.weight", (512, D), "embedding"),
            ("token_type_embeddings.weight", (2, D), "embedding"), ("LayerNorm.weight", (D,), "norm"),
            ("LayerNorm.gamma", (D,), "norm"),
        ]),
        *under("bert.encoder.layer.0.", [
            ("attention.self.query.weight", (D, D), "q"), ("attention.self.key.weight", (D, D), "k"),
            ("attention.self.value.weight", (D, D), "v"), ("attention.output.dense.weight", (D, D), "o"),
            ("attention.output.dense.bias", (D,), "bias"), ("attention.output.LayerNorm.weight", (D,), "norm"),
            ("intermediate.dense.weight", (F, D), "up"), ("output.dense.weight", (D, F), "down"),
            ("output.dense.bias", (D,), "bias"), ("output.LayerNorm.bias", (D,), "bias"),
        ]),
        ("bert.pooler.dense.weight", (D, D), ""), ("cls.predictions.transform.dense.weight", (D, D), ""),
        ("cls.predictions.decoder.weight", (V, D), "head"), ("cls.predictions.bias", (V,), "bias"),
        ("classifier.weight", (3, D), "head"), ("lm_head.dense.weight", (D, D), ""),
    ],
    "T5": [
        ("shared.weight", (V, D), "embedding"),
        *under("encoder.block.0.layer.0.SelfAttention.", [
            ("q.weight", (D, D), "q"), ("k.weight", (D, D), "k"), ("v.weight", (D, D), "v"), ("o.weight", (D, D), "o"),
            ("relative_attention_bias.weight", (32, 4), "embedding"),
        ]),
        ("decoder.block.0.layer.1.EncDecAttention.q.weight", (D, D), "q"),
        *under("encoder.block.0.layer.1.DenseReluDense.", [
            ("wi.weight", (F, D), "up"), ("wi_0.weight", (F, D), "gate"), ("wi_1.weight", (F, D), "up"),
            ("wo.weight", (D, F), "down"),
        ]),
        ("encoder.block.0.layer.1.layer_norm.weight", (D,), "norm"),
        ("encoder.block.0.layer.1.mlp.router.classifier.weight", (8, D), "router"),
    ],
    "ModernBERT": [
        ("layers.0.attn.Wqkv.weight", (3 * D, D), "qkv"), ("layers.0.attn.Wo.weight", (D, D), "o"),
        ("layers.0.mlp.Wi.weight", (2 * F, D), "mlp"), ("layers.0.mlp.Wo.weight", (D, F), "down"),
    ],
    "ViT, CLIP": [
        ("patch_embed.proj.weight", (D, 3, 16, 16), "conv"), ("pos_embed", (1, 197, D), "embedding"),
        ("cls_token", (1, 1, D), ""), ("blocks.0.attn.qkv.weight", (3 * D, D), "qkv"),
        ("blocks.0.attn.proj.weight", (D, D), "o"), ("blocks.0.mlp.fc1.weight", (F, D), "up"),
        ("blocks.0.ls1.gamma", (D,), ""), ("blocks.0.norm1.weight", (D,), "norm"), ("head.weight", (10, D), "head"),
        ("vit.encoder.layer.0.attention.attention.query.weight", (D, D), "q"),
        ("vision_model.embeddings.class_embedding", (D,), ""), ("logit_scale", (), ""),
        ("vision_model.embeddings.patch_embedding.weight", (D, 3, 16, 16), "conv"),
    ],
    "convolutions": [
        ("conv1.weight", (D, 3, 7, 7), "conv"), ("layer1.0.downsample.0.weight", (D, D, 1, 1), "conv"),
        ("layer1.0.bn1.weight", (D,), "norm"), ("encoder.conv1.weight", (D, 80, 3), "conv"),
        ("layers.0.mixer.conv1d.weight", (F, 1, 4), "conv"), ("layers.0.mixer.in_proj.weight", (2 * F, D), ""),
        ("layers.0.mixer.A_log", (F, 16), ""),
    ],
    "traps": [  # what crashes the official Adam-mini, or is found in other words
        ("mlp.weight", (D,), ""), ("linear.weight", (D,), ""), ("output", (D,), ""), ("final_layernorm", (D,), "norm"),
        ("layers.0.mlp.scale", (D,), ""), ("q_proj.weight", (D,), ""), ("kiln.weight", (D,), ""), ("lm_head", (D,), ""),
        ("vlnx.ln_2.weight", (D, D), ""), ("layers.0.self_attn.q_proj.lora_A.default.weight", (8, D), ""),
        ("layers.0.mlp.up_proj.lora_A.weight", (8, D), ""),
        ("block_sparse_moe.gate.weight", (2 * D, D), "router"),  # more experts than hidden units
        ("layers.0.self_attn.q_proj.base_layer.weight", (D, D), "q"), ("module.lm_head.weight", (V, D), "head"),
        ("layers.0._orig_mod.mlp._orig_mod.up_proj.weight", (F, D), "up"), ("adaln.norm1.linear.weight", (D, D), ""),
        ("self_attn.q_proj.parametrizations.weight.original", (D, D), "q"), ("classifier.1.weight", (D, D), ""),
        ("blocks.0.sa.heads.0.key.weight", (16, D), "k"), ("memory.key.weight", (16, D), ""),
        ("blocks.0.mlp.0.weight", (F, D), "mlp"), ("fc1.weight", (F, D), "mlp"), ("mlp.gate.weight", (F, D), "gate"),
        ("norm.weight", (8, 8), "norm"), ("rnn.weight_ih_l0", (F, D), ""), ("rnn.bias_ih_l0", (F,), "bias"),
        ("", (D, D), ""), ("", (D,), ""), ("", (), ""), ("", (D, 3, 3, 3), "conv"), ("unembed.weight", (V, D), "head"),
        ("decoder.weight", (V, D), "head"), ("blocks.0.ffn.experts.gate.weight", (8, D), "gate"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_names_and_shapes_of_the_families(family: str):
    table = FAMILIES[family]
    assert [(name, shape, role_of(name, shape)) for name, shape, _ in table] == table


def test_every_role_is_in_the_table():
    assert {role for table in FAMILIES.values() for _, _, role in table} == set(ROLES)


TELLING = ("q_proj mlp linear output embed_tokens lm_head experts 0 7 ln norm bias weight gate attn c_proj conv w1 .",
           "in_proj_weight router layer head lora_A .. Wi é _orig_mod module")  # fmt: skip
WORDS = st.sampled_from(" ".join(TELLING).split())
NAMES = st.one_of(st.text(max_size=30), st.lists(st.one_of(WORDS, st.text(max_size=5)), max_size=6).map(".".join))
SHAPES = st.lists(st.integers(0, 300), max_size=6).map(tuple)


@given(NAMES, SHAPES)
def test_no_name_and_no_shape_crashes(name: str, shape: tuple[int, ...]):
    role = role_of(name, shape)
    assert role in ROLES and (len(shape) > 1 or role in OF_VECTORS)
    assert role_of("module." + name, shape) == role or name.startswith("module.")


@given(NAMES, SHAPES, st.dictionaries(st.one_of(NAMES, st.just("*")), st.sampled_from(ROLES), max_size=3))
def test_no_map_crashes_or_makes_a_matrix_of_a_vector(name: str, shape: tuple[int, ...], told: dict[str, str]):
    role = role_of(name, shape, told)
    assert role in ROLES and (len(shape) > 1 or role in OF_VECTORS)


def test_the_users_map_comes_first():
    told = {"*.attn.*": "q", "a.attn.x[0]": "k", "*": "head", "n": "norm"}
    assert role_of("a.attn.k_proj.weight", (4, 4), told) == "q"
    assert role_of("a.attn.x[0]", (4, 4), told) == "k"  # the name itself, before the glob that stands first
    assert role_of("a.up_proj.weight", (4, 4), told) == "head"
    assert role_of("a.attn.q_proj.bias", (4,), told) == "bias"  # a matrix's role is not for a vector
    assert role_of("n", (4,), told) == role_of("module.n", (4,), told) == "norm"
    assert role_of("lm_head.weight", (4, 4), {"lm_*": ""}) == ""


# ---- whole models


class RMSNorm(nn.Module):
    def __init__(self, size: int):
        super().__init__()
        self.weight = Parameter(torch.ones(size))


class LlamaRMSNorm(RMSNorm):
    pass


class Conv1D(nn.Module):
    """transformers' linear layer of GPT-2: the weight is (in, out)."""

    def __init__(self, outputs: int, inputs: int):
        super().__init__()
        self.weight, self.bias = Parameter(torch.zeros(inputs, outputs)), Parameter(torch.zeros(outputs))


class MixtralExperts(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = Parameter(torch.zeros(4, F, D)), Parameter(torch.zeros(4, D, F))


class Config:
    def __init__(self, **values):
        self.__dict__.update(values)


TABLES = {"embed_tokens", "wte", "wpe", "embed_in", "embed_positions", "tok_embeddings", "word_embeddings", "shared"}
TABLES |= {"position_embeddings", "token_type_embeddings", "relative_attention_bias"}


def tree(table: Table) -> nn.Module:
    """A family's names and shapes in modules: Embedding and Linear for a 2-D `weight`, nothing to go by elsewhere."""
    root = nn.Module()
    for name, shape, _ in table:
        *path, own = name.split(".")
        at = root
        for depth, part in enumerate(path, start=1):
            if part not in at._modules:
                holds = nn.Module()
                if depth == len(path) and own == "weight" and len(shape) == 2:
                    size = shape if part in TABLES else shape[::-1]
                    holds = (nn.Embedding if part in TABLES else nn.Linear)(*size, device="meta")
                    holds._parameters.pop("bias", None)
                at.add_module(part, holds)
            at = at._modules[part]
        setattr(at, own, Parameter(torch.zeros(shape, device="meta")))
    return root


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "traps"])
def test_a_model_with_the_names_of_a_family(family: str):
    """Without any type to go by but Linear and Embedding, types and names agree."""
    table = FAMILIES[family]
    found = lowbit.roles(tree(table))
    assert {name: found[name] for name, _, _ in table} == {name: role for name, _, role in table}
    assert set(found.unplaced) == {name for name, shape, role in table if not role and len(shape) > 1}
    assert found["module." + table[0][0]] == table[0][2]


class FusedMoE(nn.Module):
    def __init__(self):
        super().__init__()
        self.mine = Parameter(torch.zeros(4, F, D))


class TopKRouter(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = Parameter(torch.zeros(2 * D, D))


class Odd(nn.Module):
    """Names that say nothing, or the wrong thing: only the types tell."""

    def __init__(self):
        super().__init__()
        self.lookup = nn.Embedding(V, D)
        self.linear = nn.LayerNorm(D)
        self.mlp = LlamaRMSNorm(D)
        self.output = nn.BatchNorm2d(8)
        self.a = nn.MultiheadAttention(D, 4, add_bias_kv=True)
        self.b = nn.MultiheadAttention(D, 4, kdim=32, vdim=48)
        self.c = nn.TransformerEncoderLayer(D, 4, F)
        self.time_embed = nn.Sequential(nn.Linear(8, D), nn.SiLU(), nn.Linear(D, D))
        self.q_proj = nn.Conv2d(8, 8, 3)
        self.line = nn.Conv1d(8, 8, 3)
        self.many = MixtralExperts()
        self.fused = FusedMoE()
        self.gate = TopKRouter()
        self.ffn = nn.ModuleDict({"w1": nn.Linear(D, F), "w2": nn.Linear(F, D)})
        self.free = Parameter(torch.zeros(3, 3))
        self.last = nn.Linear(D, V)


def test_module_types_come_before_names():
    found = lowbit.roles(Odd())
    expected = {
        "lookup.weight": "embedding", "linear.weight": "norm", "linear.bias": "bias", "mlp.weight": "norm",
        "output.weight": "norm", "a.in_proj_weight": "qkv", "a.in_proj_bias": "bias", "a.bias_k": "bias",
        "a.out_proj.weight": "o", "b.q_proj_weight": "q", "b.k_proj_weight": "k", "b.v_proj_weight": "v",
        "c.self_attn.in_proj_weight": "qkv", "c.linear1.weight": "up", "c.linear2.weight": "down",
        "c.norm1.weight": "norm", "c.linear1.bias": "bias", "time_embed.0.weight": "", "q_proj.weight": "conv",
        "line.weight": "conv", "many.first": "expert", "many.second": "expert", "fused.mine": "expert",
        "gate.weight": "router", "ffn.w1.weight": "up",
        "ffn.w2.weight": "down", "free": "", "last.weight": "head",
    }  # fmt: skip
    assert {name: found[name] for name in expected} == expected
    assert found.unplaced == ("free", "time_embed.0.weight", "time_embed.2.weight")
    assert "rows" in found.why["last.weight"] and found.why["mlp.weight"] == "module: LlamaRMSNorm"


def test_the_table_lists_everything_and_what_was_not_placed():
    net = nn.Module()
    net.layers = nn.ModuleList(nn.ModuleDict({"attn": Conv1D(3 * D, D), "x[b]": nn.Linear(D, 5)}) for _ in range(12))
    net.single = nn.Linear(3, 4)
    found = lowbit.roles(net, {"layers.0.attn.weight": "qkv"})
    text = str(found)
    lines = [line.split("│")[1:-1] for line in text.splitlines() if line.startswith("│")]
    cells = {line[0].strip(): [cell.strip() for cell in line[1:]] for line in lines}
    assert cells["layers.*.attn.weight  ×11"] == [f"{D}×{3 * D}", "–", "not placed"]
    assert cells["layers.0.attn.weight"] == [f"{D}×{3 * D}", "qkv", "override 'layers.0.attn.weight'"]
    assert cells["single.weight"][1:] == ["–", "not placed"] and cells["layers.*.x[b].bias  ×12"][1] == "bias"
    assert len(found.unplaced) == 24 and "Not placed (24 matrices): layers.0.x[b].weight" in text
    assert "single.weight. Say what they are with overrides=" in text
    assert "Not placed" not in str(lowbit.roles(nn.Embedding(3, 4)))
    assert found.transposed == {f"layers.{i}.attn.weight" for i in range(12)}


def test_a_tied_weight_is_an_embedding_and_the_table_says_so():
    for order in ("wte", "lm_head"), ("lm_head", "wte"):
        net = nn.Module()
        for name in order:
            net.add_module(name, nn.Embedding(V, D) if name == "wte" else nn.Linear(D, V, bias=False))
        net.lm_head.weight = net.wte.weight
        found = lowbit.roles(net)
        assert dict(found) == {f"{order[0]}.weight": "embedding"}
        assert "it is also the head, lm_head.weight" in found.why[f"{order[0]}.weight"]
        assert found.tied == {f"{order[0]}.weight": (f"{order[1]}.weight",)}
        assert "also the head, lm_head.weight" in str(found)


def test_a_shape_is_no_head_where_a_name_says_otherwise():
    net = nn.ModuleDict({"wte": nn.Embedding(D, D), "mlp": nn.ModuleDict({"down_proj": nn.Linear(D, D)})})
    assert lowbit.roles(net)["mlp.down_proj.weight"] == "down"
    net = nn.Sequential(nn.Embedding(V, D), nn.Linear(D, V), nn.Linear(V, D))  # not the last
    assert lowbit.roles(net)["1.weight"] == ""


@pytest.mark.parametrize(
    "config, heads",
    [
        (dict(num_attention_heads=8, num_key_value_heads=2, head_dim=16), (8, 2, 16)),
        (dict(num_attention_heads=8, hidden_size=D), (8, 8, 12)),  # by the rows of q, which are not hidden_size
        (dict(n_head=4, n_embd=D), (4, 4, 24)),
        (dict(num_attention_heads=4, qk_head_dim=24, head_dim=8), (4, 4, 24)),
        (dict(text_config=Config(num_attention_heads=8, head_dim=12), num_attention_heads=3), (8, 8, 12)),
        (dict(num_attention_heads=7, num_key_value_heads=None), (7, 7, None)),
        (dict(num_attention_heads=True, head_dim="wide"), (None, None, None)),
        ({}, (None, None, None)),
    ],
)
def test_heads_are_the_configs(config: dict, heads: tuple):
    net = nn.ModuleDict({"self_attn": nn.ModuleDict({"q_proj": nn.Linear(D, 96)})})
    assert lowbit.roles(net).num_heads is None
    net.config = Config(**config)
    found = lowbit.roles(net)
    assert (found.num_heads, found.num_kv_heads, found.head_dim) == heads
    assert ("query heads" in str(found)) == (heads[0] is not None)
    net.config = config  # a dict is read alike
    gpt2 = nn.ModuleDict({"c_attn": nn.Linear(D, 3 * D)})  # without a q of its own
    for width in ("n_embd", "hidden_size"):
        gpt2.config = {"n_head": 4, width: D}
        assert lowbit.roles(gpt2).head_dim == D // 4
    assert "text_config" in config or lowbit.roles(net).num_heads == heads[0]


def test_heads_of_torchs_modules():
    net = nn.Transformer(32, 4, 1, 1, 64, batch_first=True)
    found = lowbit.roles(net)
    assert (found.num_heads, found.num_kv_heads, found.head_dim) == (4, 4, 8)
    opt = AdamMini(net.named_parameters(), num_heads=found.num_heads, roles=found)
    assert opt.state[net.encoder.layers[0].self_attn.in_proj_weight]["exp_avg_sq"].shape == (12,)
    two = nn.ModuleList([nn.MultiheadAttention(32, heads) for heads in (4, 8)])
    assert lowbit.roles(two).num_heads is None


# ---- as an optimizer's argument


def gpt() -> nn.Module:
    torch.manual_seed(0)
    layer = {"c_attn": nn.Linear(D, 3 * D), "x[0]": nn.Linear(D, D), "x0": nn.Linear(D, D), "ln_1": nn.LayerNorm(D)}
    return nn.ModuleDict(
        {"tab": nn.Embedding(V, D), "h": nn.ModuleList([nn.ModuleDict(layer)]), "out": nn.Linear(D, V)}
    )


@pytest.mark.parametrize("optimizer", [AdamW, StableSPAM])
def test_roles_of_a_model_go_into_any_optimizer(optimizer):
    model = gpt()
    found = lowbit.roles(model, {"h.0.x[[]0].weight": "o"})
    assert found["h.0.x0.weight"] == ""
    opt = optimizer(model.named_parameters(), lr=1e-3, roles=found)
    assert {row.name: row.role for row in opt.explain().rows} == dict(found)
    plain = optimizer(model.named_parameters(), lr=1e-3)
    assert {row.name: row.role for row in plain.explain().rows}["tab.weight"] == ""
    optimizer([("tab.weight", model["tab"].weight)], lr=1e-3, roles=found)  # a part of the model is enough


@pytest.mark.parametrize("optimizer", [AdamMini, SlimAdam, SCALE, Muon, SWAN])
def test_a_conv1d_is_stepped_as_a_linear(optimizer):
    """Weights that are stored (in, out) end where those do that are stored (out, in)."""
    nets = [nn.ModuleDict({"mlp": nn.ModuleDict({"c_fc": layer})}) for layer in (Conv1D(96, D), nn.Linear(D, 96))]
    weights = [net["mlp"]["c_fc"].weight for net in nets]
    for weight in weights:
        weight.detach().fill_(0.5)
    opts = [optimizer(net.named_parameters(), lr=0.1, states="fp32", roles=lowbit.roles(net)) for net in nets]
    for t in range(1, 4):
        weights[0].grad = gradient((D, 96), t)
        weights[1].grad = weights[0].grad.t()
        for opt in opts:
            opt.step()
    torch.testing.assert_close(weights[0].t(), weights[1], rtol=0, atol=1e-6)
    untold = optimizer([("mlp.c_fc.weight", weights[0])], lr=0.1, roles={"*": "up"})
    assert untold.explain().rows[0].kind != opts[0].explain().rows[0].kind


def test_a_name_with_brackets_stands_for_itself():
    """As a glob, `x[0]` would be x0."""
    model = gpt()
    found = lowbit.roles(model, {"h.0.x[0].weight": "o", "h.0.x0.weight": "k"})
    assert (found["h.0.x[0].weight"], found["h.0.x0.weight"]) == ("o", "k")
    found = lowbit.roles(nn.ModuleDict({"x[0]": nn.Linear(D, D)}), {"x[0].weight": "o"})
    opt = AdamW(model["h"][0].named_parameters(), roles=found)
    roles = {row.name: row.role for row in opt.explain().rows}
    assert (roles["x[0].weight"], roles["x0.weight"]) == ("o", "")


BAD = [
    ({"embed_token.weight": "embedding"}, "'embed_token.weight' names no parameter .near names: embed_tokens.weight"),
    ({"*.embed": "embedding"}, "'.*.embed' names no parameter"),
    ({"*": "q", "table*": "q"}, r"'table\*' names no parameter"),
    (
        {"embed_tokens.weight": "embeding"},
        ".*unknown role 'embeding' .did you mean 'embedding'.*known: embedding, head",
    ),
    ({"embed_tokens.weight": None}, ".*unknown role None"),
    ({"ln_f.*": "q"}, r"'ln_f.\*' names vectors only .ln_f.weight …., which cannot be 'q'"),
]


@pytest.mark.parametrize("told, message", BAD, ids=str)
def test_a_map_that_names_no_parameter_or_no_role(told: dict, message: str):
    model = nn.ModuleDict({"embed_tokens": nn.Embedding(V, D), "ln_f": nn.LayerNorm(D)})
    with pytest.raises(ValueError, match="roles " + message):
        AdamW(model.named_parameters(), roles=told)
    with pytest.raises(ValueError, match="overrides " + message):
        lowbit.roles(model, told)
    a, b = model.named_parameters(), nn.Linear(D, D).named_parameters()
    with pytest.raises(ValueError, match="roles " + message):
        AdamW([{"params": a}, {"params": b}], roles=told)


def test_a_map_may_name_parameters_of_any_group():
    a, b = nn.Linear(D, D), nn.Linear(D, D)
    groups = [{"params": [("a", a.weight)]}, {"params": [("b", b.weight)]}]
    opt = AdamW(groups, roles={"a": "q", "b": "k"})
    opt.add_param_group({"params": [("c", a.bias)]})
    assert [row.role for row in opt.explain().rows] == ["q", "k", ""]
    with pytest.raises(ValueError, match="roles names no parameter of this optimizer"):
        AdamW(groups, roles=lowbit.roles(nn.Sequential(nn.Linear(3, 3))))


@pytest.mark.parametrize("told", [["a"], "q", 3])
def test_a_map_of_another_type(told):
    with pytest.raises(TypeError, match="roles must be a dict"):
        AdamW([("a", Parameter(torch.zeros(3, 3)))], roles=told)
    with pytest.raises(TypeError, match="overrides must be a dict"):
        lowbit.roles(nn.Linear(3, 3), told)


def test_models_that_cannot_be():
    with pytest.raises(TypeError, match=r"must be a torch.nn.Module, not generator"):
        lowbit.roles(nn.Linear(3, 3).named_parameters())
    with pytest.raises(TypeError, match="a name or glob is a str, not int"):
        lowbit.roles(nn.Linear(3, 3), {0: "q"})
    with pytest.raises(ValueError, match=r"1.weight has no shape yet; run the model once"):
        lowbit.roles(nn.Sequential(nn.Linear(3, 3), nn.LazyLinear(3)))
    assert dict(lowbit.roles(nn.Identity())) == {} and str(lowbit.roles(nn.Identity()))


def test_what_the_policy_keeps_in_8_bits_is_not_the_head_nor_a_norm():
    """The built-in rule for embeddings goes by role, so `embed_out`, GPT-NeoX's head, is stored as asked."""
    named = [
        ("gpt_neox.embed_in.weight", (V, D)),
        ("embed_out.weight", (V, D)),
        ("embed_norm.weight", (V * D,)),
    ]
    opt = AdamW([(n, Parameter(torch.zeros(s))) for n, s in named], states="4bit")
    assert [row.formats["exp_avg"] for row in opt.explain().rows] == ["int8", "nf4:128", "fp32"]
