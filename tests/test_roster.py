"""What a step takes over from the last one, and that it is seen when it must not be."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import assert_same, everything, gradient, parameters
from cases import one_thread as one_thread
from torch.nn import Parameter

from lowbit.optim import AdamW, Rule, StableSPAM, roster

Named = list[tuple[str, Parameter]]
SHAPES = [(64, 64), (33, 300), (50,), (0, 5)]


@pytest.fixture(params=["torch's", "ours"], autouse=True)
def guards(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors are compared by torch, or as they are where torch cannot."""
    if request.param == "ours":
        monkeypatch.setattr(roster, "_guards", lambda tensors: roster.Guards(*tensors))


def give(named: Named, t: int) -> None:
    for k, (_, p) in enumerate(named):
        p.grad = gradient(tuple(p.shape), t, k, p.dtype)


def stepped(steps: int = 2) -> tuple[Rule, Named]:
    named = parameters(SHAPES)
    named[1][1].requires_grad_(False)  # never stepped, and without a state
    opt = AdamW([{"params": named[:2]}, {"params": named[2:], "lr": 1e-2}], states="8bit")
    for t in range(1, steps + 1):
        give(named, t)
        named[1][1].grad = None
        opt.step()
    return opt, named


def test_torch_can_compare_many_tensors_at_once():
    """Else every step is slower, and nothing else would tell."""
    assert not isinstance(roster.Guards(torch.ones(1)), type(roster_guards([torch.ones(1)])))


roster_guards = roster._guards


def same(opt: Rule, named: Named) -> None:
    pass


def other_lr(opt: Rule, named: Named) -> None:
    opt.param_groups[0]["lr"] *= 0.5
    opt.param_groups[1]["weight_decay"] = 0.2


def equal_counts(opt: Rule, named: Named) -> None:
    for _, p in named:
        if opt.state.get(p):
            opt.state[p]["step"].fill_(17)


@pytest.mark.parametrize("event", [same, other_lr, equal_counts], ids=lambda event: event.__name__)
def test_a_roster_lasts(event: Callable[[Rule, Named], None]):
    opt, named = stepped()
    found = opt._roster
    assert found is not None
    for t in (3, 4):
        event(opt, named)
        give(named, t)
        named[1][1].grad = None
        opt.step()
    assert opt._roster is found


def moved_count(opt: Rule, named: Named) -> None:
    count = opt.state[named[0][1]]["step"]
    count.data = count.data.clone()


def wide_count(opt: Rule, named: Named) -> None:
    opt.state[named[0][1]]["step"] = torch.tensor(2.0, dtype=torch.float64)


def one_count(opt: Rule, named: Named) -> None:
    opt.state[named[2][1]]["step"].fill_(40)
    opt.state[named[3][1]]["step"].fill_(41)


def moved_state(opt: Rule, named: Named) -> None:
    codes = opt.state[named[2][1]]["exp_avg"]
    old, codes.data = codes.data, codes.data.clone()
    old.fill_(77)


def transposed_gradient(opt: Rule, named: Named) -> None:
    named[0][1].grad = named[0][1].grad.t().contiguous().t()


def negative_gradient(opt: Rule, named: Named) -> None:
    named[0][1].grad = torch._neg_view(-named[0][1].grad)


def gradient_of_another_dtype(opt: Rule, named: Named) -> None:
    named[0][1].grad_dtype = None
    named[0][1].grad = named[0][1].grad.bfloat16()


def no_gradient(opt: Rule, named: Named) -> None:
    named[2][1].grad = None


def unfrozen(opt: Rule, named: Named) -> None:
    named[1][1].requires_grad_(True)


def thawed_with_a_gradient(opt: Rule, named: Named) -> None:
    named[1][1].grad = gradient((33, 300), 9, 1)


def another_rounding(opt: Rule, named: Named) -> None:
    opt.param_groups[0]["state_rounding"] = "stochastic"


def turned(opt: Rule, named: Named) -> None:
    named[0][1].data = named[0][1].data.t()


def a_new_group(opt: Rule, named: Named) -> None:
    named.append(("p4", Parameter(torch.ones(8, 8))))
    named[-1][1].grad = gradient((8, 8), 3, 4)
    opt.add_param_group({"params": named[-1:], "lr": 0.1})


CHANGES = [
    *(moved_count, wide_count, one_count, moved_state, transposed_gradient, negative_gradient),
    *(gradient_of_another_dtype, no_gradient, unfrozen, thawed_with_a_gradient, another_rounding, turned, a_new_group),
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_changes_is_seen(change: Callable[[Rule, Named], None], monkeypatch: pytest.MonkeyPatch):
    """And the steps are those of an optimizer that takes nothing over."""
    ends = []
    for anew in (False, True):
        opt, named = stepped()
        before = opt._roster
        for t in (3, 4, 5):
            give(named, t)
            named[1][1].grad = None
            if t == 3:
                change(opt, named)
            if anew:
                opt._roster = None
            opt.step()
            assert opt._roster is not before
        ends.append(everything(opt))
    assert_same(*ends)


ERRORS: dict[str, tuple[Callable[[Named], None], type[Exception], str]] = {
    "sparse": (lambda its: setattr(its[0][1], "grad", its[0][1].grad.to_sparse()), TypeError, "sparse gradients"),
    "shape": (lambda its: setattr(its[0][1].grad, "data", torch.ones(32, 64)), ValueError, "gradient is .32, 64."),
    "parameter": (
        lambda its: setattr(its[0][1], "data", its[0][1].data.view(-1)),
        RuntimeError,
        r"is torch.float32, cpu, .4096,. now",
    ),
    "lr": (lambda its: None, ValueError, "lr must be a finite number"),
}


@pytest.mark.parametrize("what", ERRORS)
def test_what_is_wrong_is_still_an_error(what: str):
    opt, named = stepped()
    act, kind, said = ERRORS[what]
    give(named, 3)
    named[1][1].grad = None
    act(named)
    if what == "lr":
        opt.param_groups[1]["lr"] = -1.0
    before = everything(opt)
    with pytest.raises(kind, match=said):
        opt.step()
    assert_same(everything(opt), before)


@pytest.mark.parametrize("rule", [AdamW, StableSPAM])
def test_copies_and_checkpoints_take_nothing_over(rule: Any):
    named = parameters(SHAPES[:3])
    opt = rule(named)
    for t in (1, 2):
        give(named, t)
        opt.step()
    found = opt._roster
    twin, theirs = copy.deepcopy((opt, named))
    assert twin._roster is None
    opt.load_state_dict(twin.state_dict())
    for t in (3, 4):
        for each, its in ((opt, named), (twin, theirs)):
            give(its, t)
            each.step()
    assert opt._roster is not found
    assert_same(everything(opt), everything(twin))


def test_a_gradient_is_not_kept():
    opt, _ = stepped(3)
    assert opt._roster is not None and opt._roster.grads == []


ALIKE = torch.arange(12.0).view(3, 4)
UNLIKE = {
    "dtype": ALIKE.double(),
    "shape": ALIKE.view(4, 3),
    "strides": ALIKE.t().contiguous().t(),
    "negative": torch._neg_view(ALIKE.clone()),
    "layout": ALIKE.to_sparse(),
    "device": ALIKE.to("meta"),
}


@pytest.mark.parametrize("what", UNLIKE)
def test_guards_tell_what_differs(what: str):
    check = roster._guards([ALIKE, ALIKE]).check
    assert check(ALIKE.clone(), ALIKE.clone())
    try:
        assert not check(ALIKE, UNLIKE[what])
    except RuntimeError as error:  # a sparse tensor has no strides, and a roster takes that for a difference
        assert what == "layout", error
