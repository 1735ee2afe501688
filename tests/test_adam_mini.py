"""Adam-mini and SlimAdam: the released codes' numbers, which tensor is cut how, what the released code trips over."""

import math

import numpy as np
import oracles_blocks
import oracles_optim
import pytest
import torch
from cases import assert_same, every_preset, everything, gradient, parameters
from cases import one_thread as one_thread
from golden_mha import follow
from llama_shapes import roles
from torch import nn
from torch.nn import Parameter

from lowbit.optim import SCALE, AdaClip, Adafactor, AdaGN, AdamMini, AdamW, MomentumReset, SlimAdam, SpikeClip

nameless = pytest.mark.filterwarnings("ignore:.* treats embeddings")  # one matrix: no name needed

HYPER = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
TRIPPING = [
    "final_layernorm.weight", "mlp.norm.weight", "linear1.bias", "attn.output.bias", "q_proj.bias", "wk", "output",
]  # fmt: skip


def test_adam_mini_equals_the_released_code():
    follow(lambda named: AdamMini(named, **HYPER, num_heads=4, states="fp32", roles=roles(named)), "adam_mini")


def test_slim_adam_equals_the_released_code():
    follow(lambda named: SlimAdam(named, **HYPER, states="fp32", roles=roles(named)), "slim_adam")


def zeros(*shape: int) -> Parameter:
    return Parameter(torch.zeros(shape))


def one(name: str, shape: tuple[int, ...], role: str = "", optimizer=AdamMini, **options):
    """The kind of a tensor, and how many second moments it has."""
    p = Parameter(torch.ones(shape))
    opt = optimizer([(name, p)], lr=0.1, **options, roles={"*": role} if role else None)
    p.grad = torch.ones(shape)
    opt.step()
    assert bool((p.detach() < 1).all())
    [row] = opt.explain().rows
    assert row.kind in str(opt.explain())
    return row.kind, opt.state[p]["exp_avg_sq"].numel()


@pytest.mark.parametrize(
    "role, shape, options, expected",
    [
        ("q", (32, 32), {"num_heads": 4}, ("head", 4)),
        ("k", (32, 32), {"num_heads": 4}, ("head", 4)),
        # GQA: the keys' heads are as large as the queries'
        ("k", (16, 32), {"num_heads": 4}, ("head", 2)),
        ("k", (16, 32), {"num_heads": 4, "num_kv_heads": 2}, ("head", 2)),
        ("k", (8, 32), {"num_heads": 4, "num_kv_heads": 1}, ("head", 1)),
        # head_dim is not dim / heads (Gemma, Qwen3): the released code cuts these 4 heads in 8
        ("q", (64, 32), {"num_heads": 4}, ("head", 4)),
        ("q", (64, 32), {"head_dim": 16}, ("head", 4)),
        ("q", (64, 32), {"head_dim": 16, "num_heads": 4, "num_kv_heads": 2}, ("head", 4)),
        ("k", (32, 32), {"head_dim": 16, "num_heads": 4, "num_kv_heads": 2}, ("head", 2)),
        # fused
        ("qkv", (96, 32), {"num_heads": 4}, ("head", 12)),
        ("qkv", (64, 32), {"num_heads": 4, "num_kv_heads": 2}, ("head", 8)),
        ("qkv", (64, 32), {"head_dim": 8}, ("head", 8)),
        ("qkv", (32, 96), {"num_heads": 4}, ("column", 96)),  # GPT-2's Conv1D
        # nobody said how many heads
        ("q", (32, 32), {}, ("row, for want of head counts", 32)),
        ("qkv", (96, 32), {}, ("row, for want of head counts", 96)),
        ("v", (16, 32), {"num_heads": 4}, ("row", 16)),
        ("v", (16, 32), {"v_per_tensor": True}, ("tensor", 1)),
        ("o", (32, 32), {"num_heads": 4}, ("row", 32)),
        ("gate", (64, 32), {}, ("row", 64)),
        ("down", (32, 64), {}, ("row", 32)),
        ("router", (8, 32), {}, ("row", 8)),
        ("embedding", (48, 32), {}, ("row", 48)),
        ("head", (48, 32), {}, ("row", 48)),
        ("", (48, 32), {}, ("row", 48)),
        ("conv", (16, 3, 5, 5), {}, ("row", 16)),
        ("expert", (4, 64, 32), {"num_heads": 4}, ("expert", 4)),
        ("norm", (32,), {}, ("tensor, no decay", 1)),
        ("norm", (8, 8), {}, ("tensor, no decay", 1)),
        ("bias", (32,), {}, ("value, no decay", 32)),
        ("", (32,), {}, ("value, no decay", 32)),
        ("", (), {}, ("value, no decay", 1)),
        ("norm", (32,), {"decay_1d": True}, ("tensor", 1)),
        ("bias", (32,), {"decay_1d": True}, ("value", 32)),
    ],
)
def test_what_each_tensor_is_cut_into(role: str, shape: tuple[int, ...], options: dict, expected: tuple[str, int]):
    assert one("some.weight", shape, role, **options) == expected


@pytest.mark.parametrize("name", TRIPPING)
def test_vectors_whose_names_tripped_the_released_code(name: str):
    """It takes any tensor whose name holds such a word for a matrix, and raises in the first step."""
    assert one(name, (32,), num_heads=4)[1] in (1, 32)
    assert one(name, (32,), partition={name: "row"})[1] == 32


@pytest.mark.parametrize("where, count", [("head", 4), ("row", 32), ("column", 48), ("tensor", 1), ("value", 32 * 48)])
def test_a_partition_of_the_users(where: str, count: int):
    assert one("a.b.weight", (32, 48), "up", num_heads=4, partition={"a.*": where, "*": "row"}) == (where, count)


def test_gpt2s_conv1d_by_column():
    """Its matrices are (in, out); the released code gives c_attn and attn.c_proj one number each, and does not tell."""
    columns = {"*c_fc*": "column", "*c_proj*": "column"}
    named = {"h.attn.c_attn.weight": (32, 96), "h.attn.c_proj.weight": (32, 32), "h.mlp.c_fc.weight": (32, 128)}
    roles = {"*c_attn*": "qkv", "*attn.c_proj*": "o", "*c_fc*": "up"}
    opt = AdamMini([(n, zeros(*s)) for n, s in named.items()], num_heads=4, partition=columns, roles=roles)
    assert [row.kind for row in opt.explain().rows] == ["column"] * 3
    assert [opt.state[p]["exp_avg_sq"].numel() for p in opt.state] == [96, 32, 128]


@pytest.mark.parametrize("rows, head", [(32, 8), (24, 8), (16, 16), (64, 1)])
@pytest.mark.parametrize("role", ["q", "k", "qkv"])
def test_heads_equal_the_straight_line_statement(role: str, rows: int, head: int):
    p = Parameter(parameters([(rows, 40)])[0][1].detach())
    opt = AdamMini([("w", p)], **HYPER, head_dim=head, states="fp32", roles={"w": role})
    x = p.detach().double().numpy().copy()
    s = oracles_optim.fresh(x)
    for t in range(1, 11):
        p.grad = gradient((rows, 40), t)
        x = oracles_blocks.adam_mini(x, p.grad.double().numpy(), s, t, axis=-head, **HYPER)
        opt.step()
        np.testing.assert_allclose(p.detach(), x, rtol=0, atol=1e-6)
    np.testing.assert_allclose(opt.state[p]["exp_avg_sq"], s["exp_avg_sq"][::head, 0], rtol=1e-5)


@pytest.mark.parametrize(
    "role, shape, options, message",
    [
        ("q", (30, 32), {"num_heads": 4}, r"w: its 30 rows are not 4 heads; pass the right head_dim"),
        ("q", (64, 32), {"head_dim": 24}, r"w: its 64 rows are not heads of 24 rows; pass"),
        ("q", (64, 32), {"head_dim": 16, "num_heads": 8}, r"w: its 64 rows are not 8 heads and heads of 16 rows"),
        ("k", (20, 32), {"num_heads": 4}, r"w: its 20 rows are not heads of 8 rows \(32 columns / num_heads=4\)"),
        ("k", (20, 30), {"num_heads": 4}, r"w: its 20 rows are not of 4 heads"),
        ("k", (20, 32), {"num_heads": 4, "num_kv_heads": 3}, r"w: its 20 rows are not 3 heads"),
        ("qkv", (64, 32), {"num_heads": 4}, r"w: its 64 rows are not 12 heads"),
        ("v", (64, 32), {"partition": {"w": "head"}}, r'w: partition "head" needs to know how many heads'),
        ("v", (30, 32), {"partition": {"w": "head"}, "num_heads": 4}, r"w: its 30 rows are not 4 heads"),
        ("", (64, 32), {"num_heads": 0}, "num_heads must be a whole number of at least 1, or None, not 0"),
        ("", (64, 32), {"num_heads": -4}, "num_heads must be a whole number"),
        ("", (64, 32), {"head_dim": 2.5}, "head_dim must be a whole number"),
        ("", (64, 32), {"head_dim": math.nan}, "head_dim must be a whole number"),
        ("", (64, 32), {"num_kv_heads": True}, "num_kv_heads must be a whole number"),
        ("k", (64, 32), {"num_kv_heads": 5}, "num_kv_heads alone tells no query's heads: pass num_heads or head_dim"),
        ("", (64, 32), {"partition": {"w": "heads"}}, r"partition: 'heads' for 'w' is unknown .did you mean 'head'"),
        ("", (64, 32), {"partition": {"v*": "row"}}, r"partition: 'v\*' fits no parameter"),
    ],
)
def test_heads_and_partitions_that_do_not_fit(role: str, shape: tuple[int, ...], options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        AdamMini([("w", zeros(*shape))], **options, roles={"w": role} if role else None)


def test_explain_reports_the_partition():
    tensors = {"q": (64, 32), "up": (96, 32), "norm": (32,), "table": (50, 32), "b": (7,), "c": (32, 96)}
    asked = {"q": "q", "up": "up", "norm": "norm", "table": "embedding", "c": "qkv"}
    opt = AdamMini([(n, zeros(*s)) for n, s in tensors.items()], head_dim=16, roles=asked)
    told = {row.name: (row.kind, row.why.split("; ")[-1]) for row in opt.explain().rows}
    assert told == {
        "q": ("head", "one per 16 rows: fp32"), "up": ("row", "one per row: fp32"),
        "norm": ("tensor, no decay", "one per tensor: fp32"), "table": ("row", "one per row: fp32"),
        "b": ("value, no decay", "1-D: fp32"), "c": ("column", "one per column: fp32"),
    }  # fmt: skip


@nameless
def test_a_partition_without_names():
    for optimizer, option in ((AdamMini, "partition"), (SlimAdam, "dims")):
        with pytest.raises(ValueError, match=f"{option} goes by names, and the parameters have none"):
            optimizer([zeros(3, 3)], **{option: {"w": "row"}})
        with pytest.raises(TypeError, match=rf"{option} must be a dict .* not \['row'\]"):
            optimizer([zeros(3, 3)], **{option: ["row"]})


def test_queries_and_keys_have_heads_of_one_size():
    """Qwen3: 32 columns, 4 heads of 16. What the keys' rows would be cut in without being told is refused."""
    q, k = ("q", zeros(64, 32)), ("k", zeros(32, 32))
    roles = {"q": "q", "k": "k"}
    with pytest.raises(ValueError, match="k: would have heads of 8 rows, q of 16: pass head_dim, or num_heads and"):
        AdamMini([q, k], num_heads=4, roles=roles)
    for told in ({"num_kv_heads": 2}, {"head_dim": 16}):
        opt = AdamMini([q, k], num_heads=4, **told, roles=roles)
        assert [opt.state[p]["exp_avg_sq"].numel() for p in (q[1], k[1])] == [4, 2]


def test_a_group_that_cannot_be_taken_changes_nothing():
    opt = AdamMini([("a", zeros(32, 32))], num_heads=4, roles={"?": "q"})
    before = everything(opt)
    bad = zeros(30, 32)
    for options in ({}, {"head_dim": 7}):
        with pytest.raises(ValueError, match=r"(b: its 30|c: its 4) rows are not"):
            opt.add_param_group({"params": [("c", zeros(4, 4)), ("b", bad)], **options})
        assert_same(everything(opt), before)
        assert len(opt.param_groups) == 1 and len(opt._slots) == len(opt.state) == 1
    opt.add_param_group({"params": [("b", bad)], "head_dim": 15, "num_heads": 2})
    assert opt.state[bad]["exp_avg_sq"].numel() == 2


@pytest.mark.parametrize("optimizer", [AdamMini, SlimAdam])
def test_norms_and_biases_have_no_weight_decay(optimizer):
    """As released, where it goes by the name; by shape and role here, and it can be asked for."""
    for decays, ends in ((False, [0.5, 1, 1, 1]), (True, [0.5, 0.5, 0.5, 0.5])):
        named = [(n, Parameter(torch.ones(s))) for n, s in (("w", (8, 8)), ("n", (8,)), ("b", (8,)), ("kiln", (8,)))]
        roles = {"w": "up", "n": "norm", "b": "bias"}
        opt = optimizer(named, lr=1.0, weight_decay=0.5, decay_1d=decays, states="fp32", roles=roles)
        for _, p in named:
            p.grad = torch.zeros_like(p)
        opt.step()
        assert [p.detach().unique().item() for _, p in named] == ends


@nameless
def test_the_second_moment_is_fp32_in_every_format():
    """The released code keeps it in bf16 for a bf16 model, where beta2 = 0.999 rounds away: it stays 1 for ever."""
    p = Parameter(torch.zeros(2, 64, dtype=torch.bfloat16))
    opt = AdamMini([p], states="bf16", lr=0.0)
    p.grad = torch.full_like(p, 4.0)
    opt.step()
    first = opt.state[p]["exp_avg_sq"].clone()
    p.grad.zero_()
    for _ in range(1000):
        opt.step()
    assert opt.state[p]["exp_avg_sq"].dtype == torch.float32 and opt.state[p]["exp_avg"].dtype == torch.bfloat16
    torch.testing.assert_close(opt.state[p]["exp_avg_sq"] / first, torch.full((2,), 0.999**1000), rtol=1e-4, atol=0)


@pytest.mark.parametrize("optimizer, axis", [(AdamMini, -8), (SlimAdam, 0)])
def test_stabilizers_are_one_line(optimizer, axis: int):
    """AdaClip and AdaGN in front, as in Stable-SPAM's Table 3, equal the straight-line statements put together."""
    [(_, p)] = parameters([(32, 40)])
    how = {"num_heads": 4, "roles": {"w": "q"}} if axis else {"dims": {"w": "column"}}
    opt = optimizer([("w", p)], **HYPER, **how, states="fp32", stabilize=(AdaClip(), AdaGN()))
    x = p.detach().double().numpy().copy()
    s = oracles_optim.fresh(x)
    mine = oracles_blocks.adam_mini if axis else oracles_blocks.slim_adam_column
    own = {"axis": axis} if axis else {}
    for t in range(1, 16):
        p.grad = gradient((32, 40), t)
        g = oracles_blocks.stabilized(p.grad.double().numpy(), s)
        x = mine(x, g, s, t, **own, **HYPER)
        opt.step()
        np.testing.assert_allclose(p.detach(), x, rtol=0, atol=1e-6)
    assert opt.explain().sweeps == 4


@nameless
def test_a_reset_starts_anew():
    """Moments and what debiases them: the step of a reset is a first step."""
    [(_, p)] = parameters([(8, 16)])
    q = Parameter(p.detach().clone())
    opt, fresh = AdamMini([p], lr=0.1, stabilize=(MomentumReset(3),)), AdamMini([q], lr=0.1)
    for t in range(1, 4):
        before = p.detach().clone()
        p.grad = gradient((8, 16), t)
        opt.step()
    q.grad = gradient((8, 16), 3)
    start = q.detach().clone()
    fresh.step()
    torch.testing.assert_close(p.detach() - before, q.detach() - start, rtol=1e-4, atol=1e-7)
    assert torch.equal(opt.state[p]["exp_avg_sq"], fresh.state[q]["exp_avg_sq"])


@pytest.mark.parametrize(
    "build, name, value",
    [
        (AdamMini, "num_heads", 2), (AdamMini, "head_dim", 8), (AdamMini, "num_kv_heads", 2),
        (AdamMini, "v_per_tensor", True), (AdamMini, "decay_1d", True), (SlimAdam, "decay_1d", True),
        (SCALE, "norm", "l2"), (Adafactor, "scale_parameter", True), (Adafactor, "beta1", 0.9),
    ],
)  # fmt: skip
def test_what_states_and_stages_were_made_for_may_not_change(build, name: str, value):
    p = zeros(8, 8)
    opt = build([("p", p)])
    p.grad = torch.ones(8, 8)
    opt.param_groups[0][name] = value
    with pytest.raises(RuntimeError, match=f"p: .*{name}.* of its group changed since the state was made"):
        opt.step()


def test_spike_clip_needs_a_second_moment_of_each_value():
    with pytest.raises(ValueError, match="reads 'v', which AdamMini has for each group only, not for each value"):
        AdamMini([zeros(4, 4)], stabilize=(SpikeClip(),))


@every_preset
def test_per_value_is_adamw(states: str):
    """`partition={"*": "value"}` is AdamW to the bit, annealed too, in every format; so is SlimAdam's `full`."""
    found = []
    for build in (AdamW, AdamMini, SlimAdam):
        named = parameters([(64, 65), (33, 300), (50,)])
        own = {AdamW: {}, AdamMini: {"partition": {"*": "value"}, "decay_1d": True}, SlimAdam: {"decay_1d": True}}
        opt = build(named, lr=1e-2, weight_decay=0.1, states=states, beta1_annealing=3, **own[build])
        for t in range(1, 5):
            for _, p in named:
                p.grad = gradient(tuple(p.shape), t)
            opt.step()
        found.append({f"{n} {k}": v for n, p in named for k, v in {"p": p.detach(), **opt.state[p]}.items()})
    assert_same(found[0], found[1])
    assert_same(found[0], found[2])


@pytest.mark.parametrize(
    "role, shape, expected",
    [
        *((role, (32, 48), ("row", 32)) for role in ("q", "k", "embedding", "head")),
        *((role, (32, 48), ("column", 48)) for role in ("v", "o", "gate", "up", "down", "mlp")),
        *((role, (32, 48), ("full", 32 * 48)) for role in ("qkv", "router", "")),
        ("norm", (32,), ("full, no decay", 32)), ("bias", (32,), ("full, no decay", 32)),
        ("conv", (8, 3, 5, 5), ("full", 600)), ("expert", (4, 6, 8), ("full", 192)),
    ],
)  # fmt: skip
def test_slim_adams_dimensions(role: str, shape: tuple[int, ...], expected: tuple[str, int]):
    """The other dimension than Adam-mini's for values, attention outputs and MLPs."""
    assert one("w", shape, role, SlimAdam) == expected
    for dim, count in (("row", shape[0]), ("column", math.prod(shape[1:])), ("full", math.prod(shape))):
        assert one("w", shape, role, SlimAdam, dims={"w": dim})[1] == count


def test_slim_adams_map_out_of_range():
    with pytest.raises(ValueError, match=r"dims: 'rows' for 'w' is unknown .did you mean 'row'"):
        SlimAdam([("w", zeros(3, 3))], dims={"w": "rows"})
    with pytest.raises(ValueError, match=r"dims: 'x' fits no parameter"):
        SlimAdam([("w", zeros(3, 3))], dims={"x": "row"})


def test_a_transformer_of_torchs_trains():
    """torch.nn's names (in_proj_weight, linear1) are others than the released code knows."""
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    roles = {"*in_proj_weight": "qkv", "*out_proj.weight": "o", "linear1.weight": "up", "linear2.weight": "down"}
    opt = AdamMini(model.named_parameters(), lr=3e-3, num_heads=4, states="8bit", roles=roles)
    assert (
        opt.explain().rows[0].kind == "head" and opt.state[model.self_attn.in_proj_weight]["exp_avg_sq"].numel() == 12
    )
    x, losses = torch.randn(16, 8, 32), []
    for _ in range(20):
        opt.zero_grad()
        loss = (model(x) - x.flip(1)).square().mean()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
