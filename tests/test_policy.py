"""Which tensor's state is stored how, why, and how much it takes."""

import warnings

import pytest
import torch
from cases import COMPRESSED, STATE_FORMATS, every_case, every_preset, gradient, train
from cases import one_thread as one_thread
from torch import nn
from torch.nn import Parameter

import lowbit
from lowbit import Policy
from lowbit.optim import AdamW, StableSPAM
from lowbit.policy import PRESETS, resolve


def one(shape: tuple[int, ...], name: str = "w", **options) -> dict[str, str]:
    return AdamW([(name, Parameter(torch.zeros(shape)))], **options).explain().rows[0].formats


@pytest.mark.parametrize(
    "shape, compressed",
    [
        ((4096,), False), ((100_000,), False), ((100_000, 1), False), ((), False), ((0, 64), False), ((64, 0), False),
        ((63, 64), False), ((64, 64), True), ((65, 63), False), ((1, 4096), True), ((4096, 64), True),
        ((64, 8, 8), True),
        ((1000, 7, 9), False), ((16, 4, 4, 4, 4), True), ((4, 1023), False), ((4, 1024), True),
    ],
)  # fmt: skip
@pytest.mark.parametrize("states", ["8bit", "4bit", "int8:32"])
def test_small_and_narrow_tensors_are_fp32(shape: tuple[int, ...], compressed: bool, states: str):
    """1-D, fewer than 4,096 values, fewer than 64 columns."""
    formats = one(shape, states=states)
    assert all(lowbit.format(f).compressed == compressed for f in formats.values())
    assert compressed or set(formats.values()) == {"fp32"}


@pytest.mark.parametrize(
    ("globs", "said"),
    [
        (["layer.*"], ["layer.*"]),
        (["layers.*", "*norm", "head"], ["*norm", "head"]),
        (["layers.*", "*", "@head", "layers.0.norm.weight"], []),
    ],
)
def test_a_glob_that_matches_nothing_is_warned_of(globs: list[str], said: list[str]):
    named = [(f"module.layers.0.{name}.weight", Parameter(torch.zeros(4, 4))) for name in ("norm", "proj")]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        AdamW(named, policy=Policy([(glob, "fp32") for glob in globs]))
    assert [str(one.message).split("'")[1] for one in caught] == said
    assert all("none of the 2 parameters" in str(one.message) and one.filename == __file__ for one in caught)


def test_a_float_format_is_what_was_asked_for_whatever_the_shape():
    assert one((3,), states="bf16") == {"exp_avg": "bf16", "exp_avg_sq": "bf16"}


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "wte.weight", "transformer.wpe.weight"])
def test_embeddings_have_8_bits_at_least(name: str):
    assert one((64, 64), name, states="4bit") == dict(zip(("exp_avg", "exp_avg_sq"), PRESETS["8bit"], strict=True))
    assert one((64, 64), name, states="8bit") == dict(zip(("exp_avg", "exp_avg_sq"), PRESETS["8bit"], strict=True))
    assert one((64, 64), name, states="4bit", policy=Policy([("@embedding", "4bit")])) == one((64, 64), states="4bit")


def test_the_users_rules_come_first_in_their_order():
    """Globs on names, roles, functions of name and shape; the first match decides, over every built-in rule."""
    policy = Policy([
        ("*.norm.weight", "bf16"),
        ("@router", {"exp_avg": "int4:32", "exp_avg_sq": "8bit"}),
        (lambda name, shape: shape[-1] == 100, "int8:64"),
        ("layers.*", "4bit"),
        ("*", "fp32"),
    ])  # fmt: skip
    named = [
        ("a.norm.weight", (64,)), ("table", (64, 64)), ("layers.0.w", (64, 100)), ("layers.1.w", (64, 64)),
        ("layers.1.embedding.b", (8, 8)), ("head", (64, 64)),
    ]  # fmt: skip
    opt = AdamW([(n, Parameter(torch.zeros(s))) for n, s in named], policy=policy, roles={"tab*": "router"})
    rows = {row.name: row for row in opt.explain().rows}
    assert rows["a.norm.weight"].formats == {"exp_avg": "bf16", "exp_avg_sq": "bf16"}
    assert (
        rows["table"].formats == {"exp_avg": "int4:32", "exp_avg_sq": PRESETS["8bit"][1]}
        and rows["table"].role == "router"
    )
    assert rows["layers.0.w"].formats == {"exp_avg": "int8:64", "exp_avg_sq": "sqrt8:64"}
    assert rows["layers.1.w"].formats == rows["layers.1.embedding.b"].formats == one((64, 64), states="4bit")
    assert rows["head"].why == "policy '*'" and set(rows["head"].formats.values()) == {"fp32"}
    train_once = [(f"p{i}", p) for i, p in enumerate(opt.param_groups[0]["params"])]
    train(opt, train_once, range(1, 3))


@every_case
@every_preset
def test_explain_lists_everything_and_its_bytes_are_the_states(case, states: str):
    model = nn.Sequential(nn.Embedding(100, 64), nn.Linear(64, 100), nn.LayerNorm(100), nn.Conv2d(8, 64, 3))
    model[2].bias.requires_grad_(False)
    opt = case.build(model.named_parameters(), states=states, roles={"0.*": "embedding"})
    table = opt.explain()
    assert [row.name for row in table.rows] == [n for n, _ in model.named_parameters()]
    assert [row.shape for row in table.rows] == [tuple(p.shape) for p in model.parameters()]
    by_hand = sum(
        v.numel() * v.element_size() for s in opt.state.values() for v in s.values() if isinstance(v, torch.Tensor)
    )
    assert table.state_bytes == opt.state_bytes() == by_hand
    assert table.parameters == sum(p.numel() for p in model.parameters())
    assert all(row.why for row in table.rows)
    assert table.sweeps == case.sweeps
    for row in table.rows:
        assert row.name in str(table) and (row.why == "frozen") == (row.name == "2.bias")
    for p in opt.state:
        p.grad = gradient(tuple(p.shape), 1)
    before = opt.state_bytes()
    opt.step()
    assert opt.state_bytes() == before  # everything is there from the start


@pytest.mark.parametrize("states, limit", [("8bit", 2.04), ("4bit", 1.07), ("bf16", 4.01), ("fp32", 8.01)])
def test_bytes_per_parameter(states: str, limit: float):
    for optimizer in (AdamW, StableSPAM):
        opt = optimizer([Parameter(torch.zeros(256, 1024))], states=states)
        assert limit - 0.02 < opt.state_bytes() / (256 * 1024) <= limit


@pytest.mark.parametrize("name", STATE_FORMATS)
def test_a_format_or_its_partner_stores_every_moment(name: str):
    formats = one((64, 64), states=name)
    signed, unsigned = (lowbit.format(formats[m]) for m in ("exp_avg", "exp_avg_sq"))
    assert signed.signed and name in (signed.name, unsigned.name)
    fmt = lowbit.format(name)
    assert not unsigned.signed or not fmt.partner
    if fmt.compressed and fmt.kind != "log":
        other = resolve(f"{name}:32", "exp_avg_sq" if fmt.signed else "exp_avg", not fmt.signed)
        assert other.block == (1, 32) and resolve(f"{name}:32", "m", fmt.signed).block == (1, 32)


def test_groups_have_their_own_states():
    a, b, c = (Parameter(torch.zeros(64, 64)) for _ in range(3))
    opt = AdamW([{"params": [a], "states": "4bit"}, {"params": [b], "states": {"exp_avg": "bf16"}}, {"params": [c]}])
    first, second, third = (row.formats for row in opt.explain().rows)
    assert (first, third) == (one((64, 64), states="4bit"), one((64, 64), states="8bit"))
    assert second == {"exp_avg": "bf16", "exp_avg_sq": "fp32"}


@pytest.mark.parametrize(
    "states, message",
    [
        ("8bits", "unknown states '8bits' .did you mean '8bit'"),
        ("int9", "unknown states 'int9' .did you mean 'int[84]'"),
        ("int8:0", "block length"),
        ("int8:x", "block length"),
        ("fp32:8", "has no blocks"),
        ("int8:96", "block must divide 256; 'int8:96' has 96"),
        ("int4:512", "block must divide 256"),
        ("int4-affine", "'int4-affine' is for weights"),
        (
            "mxfp4",
            "'mxfp4' is for weights, activations and gradients; a state has an fp32 scale for each block of a row",
        ),
        ("nf4-dq", "'nf4-dq' is for weights"),
        ("int8:row", "'int8:row' is for weights"),
        ("e2m3", "'e2m3' is for weights.* codes of 2, 4 or 8 bits"),
        ({"exp_avg_sq": "int4:16x16"}, "'sqrt4:16x16' is for weights"),
        ({"exp_avgg": "8bit"}, "names 'exp_avgg', which is no moment of this optimizer .did you mean 'exp_avg'"),
        ({"max_exp_avg_sq": "8bit"}, "no moment of this optimizer"),
        ({"exp_avg": "8bti"}, "unknown states '8bti' .did you mean '8bit'"),
        ({"exp_avg": "sqrt8"}, "'exp_avg' is signed and format 'sqrt8' is not"),
        ({"exp_avg": "ulin4:64"}, "'exp_avg' is signed and format 'ulin4:64' is not"),
        (lowbit.Format("mine", 4, False, "", "integer", limit=15), "'exp_avg' is signed and format 'mine' is not"),
    ],
    ids=str,
)
@pytest.mark.parametrize("where", ["argument", "group", "policy"])
def test_storage_that_cannot_be(states, message: str, where: str):
    opt = AdamW([Parameter(torch.zeros(64, 64))])
    with pytest.raises(ValueError, match=message):
        if where == "argument":
            AdamW([Parameter(torch.zeros(64, 64))], states=states)
        elif where == "group":
            opt.add_param_group({"params": [Parameter(torch.zeros(64, 64))], "states": states})
        else:
            AdamW([Parameter(torch.zeros(64, 64))], policy=Policy([("*", states)]))
    assert len(opt.param_groups) == len(opt.state) == 1


@pytest.mark.parametrize("states", [4, None, ["8bit"]])
def test_storage_of_another_type(states):
    with pytest.raises(TypeError, match="states must be a name, a Format or a dict"):
        AdamW([Parameter(torch.zeros(64, 64))], states=states)


@pytest.mark.parametrize("rules", ["8bit", {"*": "8bit"}, None, [("*",)], ["*8bit"], [(5, "8bit")]], ids=repr)
def test_what_is_no_rule(rules):
    with pytest.raises(TypeError, match=r"Policy takes a list of \(match, storage\)|Policy: a rule is "):
        Policy(rules)


@pytest.mark.parametrize("policy", [[("*", "8bit")], "8bit", {"*": "8bit"}, Policy], ids=repr)
def test_what_is_no_policy(policy):
    with pytest.raises(TypeError, match=r"policy must be a lowbit.Policy\("):
        AdamW([Parameter(torch.zeros(64, 64))], policy=policy)


def test_rules_that_go_by_name_need_names():
    nameless = [Parameter(torch.zeros(64, 64))]
    for options in ({"policy": Policy([("*.bias", "bf16")])}, {"policy": Policy([("@embedding", "bf16")])}):
        with pytest.raises(ValueError, match="named_parameters"):
            AdamW(nameless, **options)
    with pytest.raises(ValueError, match="roles 'table'"):
        AdamW(nameless, roles={"table": "embedding"})
    everywhere = AdamW(nameless, policy=Policy([("*", "bf16"), (lambda name, shape: True, "fp32")]))
    assert everywhere.explain().rows[0].formats == {"exp_avg": "bf16", "exp_avg_sq": "bf16"}


def test_a_rule_for_a_role_that_there_is_not():
    with pytest.raises(ValueError, match=r"Policy '@embeding': unknown role 'embeding' .did you mean 'embedding'"):
        Policy([("@embeding", "bf16")])


def test_every_compressed_format_is_tested_somewhere():
    assert len(COMPRESSED) >= 15 and "fp32" in STATE_FORMATS
