"""Presets of parameter groups: what is decayed, at which rate, and that every parameter is in one group."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import Parameter

from lowbit import Policy
from lowbit.optim import AdamW, StableSPAM, param_groups

OPTIMIZERS = [AdamW, StableSPAM, torch.optim.AdamW, torch.optim.SGD]


class Net(nn.Module):
    """A little of everything; the head is tied where asked."""

    def __init__(self, tied: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.wte = nn.Embedding(100, 64)
        self.up_proj = nn.Linear(64, 128)
        self.conv = nn.Conv1d(1, 2, 3, padding=1)
        self.scale = Parameter(torch.ones(()))
        self.down_proj = nn.Linear(256, 64, bias=False)
        self.ln_f = nn.LayerNorm(64)
        self.lm_head = nn.Linear(64, 100, bias=False)
        if tied:
            self.lm_head.weight = self.wte.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(self.up_proj(self.wte(x)).unsqueeze(1)).flatten(1) * self.scale
        return self.lm_head(self.ln_f(self.down_proj(x)))


def members(groups: list[dict]) -> dict[str, dict]:
    """name -> its group, without the parameters; every name once."""
    flat = [(name, {k: v for k, v in g.items() if k != "params"}) for g in groups for name, _ in g["params"]]
    assert len(flat) == len(dict(flat))
    return dict(flat)


def gives(model: nn.Module) -> list:
    """A model and its named parameters."""
    return [model, list(model.named_parameters())]


@pytest.mark.parametrize("which", [0, 1], ids=["model", "pairs"])
def test_vectors_are_not_decayed(which: int):
    model = Net()
    groups = param_groups(gives(model)[which])
    assert len(groups) == 2 and all("lr" not in g for g in groups)
    decayed = {name for name, g in members(groups).items() if g["weight_decay"] == 0.1}
    assert decayed == {name for name, p in model.named_parameters() if p.dim() > 1}
    spared = {name for name, g in members(groups).items() if g["weight_decay"] == 0.0}
    assert spared == {name for name, p in model.named_parameters() if p.dim() < 2} and "scale" in spared
    assert members(groups).keys() == dict(model.named_parameters()).keys()
    assert all(p is dict(model.named_parameters())[name] for g in groups for name, p in g["params"])


def test_which_roles_are_decayed_is_an_argument():
    found = members(param_groups(Net(), weight_decay=0.2, no_decay=("embedding", "bias")))
    assert {name for name, g in found.items() if not g["weight_decay"]} == {
        "wte.weight", "up_proj.bias", "conv.bias", "ln_f.bias", "scale"
    }  # fmt: skip
    assert found["ln_f.weight"]["weight_decay"] == 0.2
    assert {g["weight_decay"] for g in members(param_groups(Net(), no_decay=())).values()} == {0.1}
    assert not members(param_groups(Net(), no_decay="norm"))["ln_f.weight"]["weight_decay"]


@pytest.mark.parametrize("which", [0, 1], ids=["model", "pairs"])
def test_the_two_ends_have_their_own_learning_rates(which: int):
    found = members(param_groups(gives(Net())[which], lr=1e-3, embedding_lr=0.5, head_lr=0.25))
    assert found["wte.weight"]["lr"] == 5e-4 and found["lm_head.weight"]["lr"] == 2.5e-4
    assert {g["lr"] for name, g in found.items() if name not in ("wte.weight", "lm_head.weight")} == {1e-3}


def test_a_tied_weight_is_in_one_group_as_an_embedding():
    model = Net(tied=True)
    for params in (model, list(model.named_parameters(remove_duplicate=False))):
        found = members(param_groups(params, lr=1.0, embedding_lr=0.5, head_lr=0.25))
        assert found["wte.weight"]["lr"] == 0.5 and "lm_head.weight" not in found


def test_frozen_parameters_are_left_out():
    model = Net()
    model.wte.weight.requires_grad_(False)
    model.ln_f.requires_grad_(False)
    names = members(param_groups(model, overrides={"wte.*": {"lr": 1.0}})).keys()
    assert names == {n for n, p in model.named_parameters() if p.requires_grad} and "wte.weight" not in names
    opt = AdamW(param_groups(model))
    opt.add_param_group({"params": [("wte.weight", model.wte.weight.requires_grad_(True))]})
    with pytest.raises(ValueError, match="no parameter requires a gradient"):
        param_groups(model.requires_grad_(False))


def test_overrides_by_name_glob_and_role():
    overrides = {
        "up_proj.weight": {"lr": 0.3},
        "@conv": {"weight_decay": 0.7, "states": "fp32"},
        "*_proj.*": {"lr": 0.4, "weight_decay": 0.6},
    }
    found = members(param_groups(Net(), lr=1.0, overrides=overrides))
    assert found["up_proj.weight"] == {"lr": 0.3, "weight_decay": 0.6}  # of both, and the first of the two rates
    assert found["up_proj.bias"] == found["down_proj.weight"] == {"lr": 0.4, "weight_decay": 0.6}
    assert found["conv.weight"] == {"lr": 1.0, "weight_decay": 0.7, "states": "fp32"}
    assert found["wte.weight"] == {"lr": 1.0, "weight_decay": 0.1}
    assert overrides["@conv"] == {"weight_decay": 0.7, "states": "fp32"}  # untouched


def test_a_wrong_guess_is_put_right():
    pairs = [("table", Parameter(torch.zeros(9, 4))), ("scale", Parameter(torch.zeros(4)))]
    assert members(param_groups(pairs, lr=1.0, embedding_lr=0.5))["table"]["lr"] == 1.0
    found = members(param_groups(pairs, lr=1.0, embedding_lr=0.5, roles={"tab*": "embedding", "scale": "norm"}))
    assert found["table"]["lr"] == 0.5
    assert members(param_groups(Net(), roles={"up_proj.weight": "norm"}))["up_proj.weight"]["weight_decay"] == 0.0


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda o: f"{o.__module__.split('.')[0]}-{o.__name__}")
@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float", "tensor"])
def test_any_optimizer_and_scheduler_takes_them(optimizer, tensor_lr: bool):
    model = Net()
    lr = torch.tensor(0.01) if tensor_lr else 0.01
    groups = param_groups(model, lr=lr, embedding_lr=0.5, overrides={"scale": {"lr": 0.0}})
    assert len({id(group["lr"]) for group in groups}) == len(groups) or not tensor_lr  # schedulers write into each
    opt = optimizer(groups)
    assert sorted(n for g in opt.param_groups for n in g["param_names"]) == sorted(dict(model.named_parameters()))
    rates = [float(g["lr"]) for g in opt.param_groups]
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda t: 1 / (1 + t))
    assert [float(g["initial_lr"]) for g in opt.param_groups] == pytest.approx(rates)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    x = torch.arange(32)
    for _ in range(2):
        opt.zero_grad()
        nn.functional.cross_entropy(model(x), x).backward()
        opt.step()
        scheduler.step()
    assert [float(g["lr"]) for g in opt.param_groups] == pytest.approx([rate / 3 for rate in rates])
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == before.keys() - {"scale"}
    again = optimizer(param_groups(model, lr=0.01, embedding_lr=0.5, overrides={"scale": {"lr": 0.0}}))
    again.load_state_dict(opt.state_dict())
    assert [float(g["lr"]) for g in again.param_groups] == [float(g["lr"]) for g in opt.param_groups]


def test_groups_give_torchs_trajectory():
    """The options arrive where they should: lowbit's fp32 AdamW moves as torch's with the same groups."""
    ours, theirs = Net(), Net()
    a = AdamW(param_groups(ours, lr=1e-2, embedding_lr=3.0, head_lr=0.1, weight_decay=0.5), states="fp32")
    b = torch.optim.AdamW(param_groups(theirs, lr=1e-2, embedding_lr=3.0, head_lr=0.1, weight_decay=0.5))
    x = torch.arange(64)
    for _ in range(3):
        for model, opt in ((ours, a), (theirs, b)):
            opt.zero_grad()
            nn.functional.cross_entropy(model(x), x).backward()
            opt.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-5)


def test_embeddings_are_kept_out_of_4_bits():
    """The built-in policy does it by role; groups change nothing of that, and a policy or an override does."""
    opt = AdamW(param_groups(Net(), lr=1e-3), states="4bit")
    formats = {row.name: row.formats["exp_avg"] for row in opt.explain().rows}
    assert formats["wte.weight"] == "int8" and formats["lm_head.weight"] == formats["up_proj.weight"] == "nf4:128"
    opt = AdamW(param_groups(Net(), overrides={"@head": {"states": "8bit"}}), states="4bit")
    assert {row.name: row.formats["exp_avg"] for row in opt.explain().rows}["lm_head.weight"] == "int8"
    opt = AdamW(param_groups(Net()), states="4bit", policy=Policy([("@embedding", "4bit")]))
    assert {row.name: row.formats["exp_avg"] for row in opt.explain().rows}["wte.weight"] == "nf4:128"


def test_wrapped_models_give_the_same_groups():
    plain = members(param_groups(Net(), lr=1.0, embedding_lr=0.5, overrides={"up_proj.*": {"lr": 3.0}}))
    wrapped = nn.Module()
    wrapped.module = Net()
    found = members(param_groups(wrapped, lr=1.0, embedding_lr=0.5, overrides={"up_proj.*": {"lr": 3.0}}))
    assert found == {f"module.{name}": group for name, group in plain.items()}


WORDS = st.sampled_from(["wte", "norm", "bias", "weight", "0", "mlp", "lm_head", "x"])
PAIRS = st.dictionaries(
    st.lists(WORDS, max_size=3).map(".".join), st.tuples(st.lists(st.integers(0, 3), max_size=3), st.booleans())
)


@given(PAIRS, st.floats(0, 2), st.floats(0, 2), st.sampled_from([(), ("norm",), ("norm", "bias", "head")]))
def test_every_parameter_is_in_one_group(pairs, embedding_lr: float, head_lr: float, no_decay: tuple):
    named = [(n, Parameter(torch.zeros(shape), requires_grad=wants)) for n, (shape, wants) in pairs.items()]
    wanted = {n: p for n, p in named if p.requires_grad}
    if not wanted:
        return
    groups = param_groups(named, lr=1.0, embedding_lr=embedding_lr, head_lr=head_lr, no_decay=no_decay)
    assert members(groups).keys() == wanted.keys()
    assert all(wanted[name] is p for g in groups for name, p in g["params"])
    options = [{k: v for k, v in g.items() if k != "params"} for g in groups]
    assert all(a != b for i, a in enumerate(options) for b in options[:i])


INF, NAN = math.inf, math.nan
NUMBERS = ["lr", "weight_decay", "embedding_lr", "head_lr"]


@pytest.mark.parametrize("argument", NUMBERS)
@pytest.mark.parametrize("value", [-1e-3, INF, NAN, "0.1", True, torch.tensor(NAN)], ids=str)
def test_numbers_out_of_range(argument: str, value):
    with pytest.raises(ValueError, match=f"{argument} must be a finite number >= 0"):
        param_groups(Net(), **{"lr": 1.0, argument: value})


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"embedding_lr": 0.5}, ValueError, "embedding_lr=0.5 multiplies lr: pass lr="),
        ({"head_lr": 2}, ValueError, "head_lr=2 multiplies lr: pass lr="),
        ({"no_decay": ("norms",)}, ValueError, "no_decay: unknown role 'norms' .did you mean 'norm'"),
        ({"overrides": {"up.weight": {}}}, ValueError, "overrides 'up.weight' names no parameter .near names: .*up_p"),
        ({"overrides": {"@router": {}}}, ValueError, "overrides '@router' names no parameter"),
        ({"overrides": {"@rooter": {}}}, ValueError, "unknown role 'rooter' .did you mean 'router'"),
        ({"overrides": {"*": {"params": []}}}, ValueError, "said by the pattern alone"),
        ({"overrides": {"*": 1e-3}}, TypeError, "overrides must be {pattern: options}"),
        ({"overrides": [("*", {})]}, TypeError, "overrides must be {pattern: options}"),
        ({"roles": {"tabel": "embedding"}}, ValueError, "roles 'tabel' names no parameter"),
    ],
    ids=str,
)
@pytest.mark.parametrize("which", [0, 1], ids=["model", "pairs"])
def test_arguments_that_cannot_be(which: int, options: dict, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        param_groups(gives(Net())[which], **options)


def test_parameters_without_names_or_two_of_one():
    p = Parameter(torch.zeros(3, 3))
    for params in (Net().parameters(), [p], [("a", p, 1)], [("a", 3)], [{"params": [p]}]):
        with pytest.raises(TypeError, match=r"pass model.named_parameters\(\)"):
            param_groups(params)
    with pytest.raises(ValueError, match="'a' names two parameters"):
        param_groups([("a", p), ("a", Parameter(torch.zeros(3)))])
