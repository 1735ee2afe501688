"""Hyper-parameters of parameter groups: what is misspelt or of a wrong type is refused, by name."""

import inspect
import math

import pytest
import torch
from cases import CASES, Case, assert_same, every_case, everything, parameters
from torch.nn import Parameter

import lowbit
from lowbit.optim import AdamW, GaLore, GlobalClip, Lion, Rule, param_groups
from lowbit.optim.hyper import types_of

WRONG = {"int": ["8", True, [8], object()], "float": ["1e-3", True, (1e-3,), torch.ones(2)], "bool": ["yes", 2, None]}


@every_case
def test_a_wrong_type_is_an_error_that_names_the_argument(case: Case):
    """Every number and switch that an optimizer takes: for all parameters, and for a group added later."""
    asked = 0
    for name, annotation in types_of(case.optimizer).items():
        kind, *others = annotation.split(" | ")
        for wrong in WRONG.get(kind, ()) if name in inspect.signature(case.optimizer).parameters else ():
            if wrong is None and "None" in others:
                continue
            asked += 1
            with pytest.raises((TypeError, ValueError), match=rf"\b{name} must be"):
                case.build(parameters([(4, 6)]), **{name: wrong})
            opt = case.build(parameters([(4, 6)]))
            if name in opt.defaults and not name.startswith("seed"):
                before = everything(opt)
                with pytest.raises((TypeError, ValueError), match=rf"\b{name} must be"):
                    opt.add_param_group({"params": [("later", Parameter(torch.ones(3)))], name: wrong})
                assert_same(everything(opt), before)
    assert asked >= 4


@pytest.mark.parametrize("betas", [0.9, "0.9", ("0.9", "0.99"), (True, 0.9), (0.9,), None, {0.9: 0.99}], ids=repr)
def test_betas_are_two_numbers(betas):
    with pytest.raises(ValueError, match="betas must be"):
        AdamW([Parameter(torch.ones(3))], betas=betas)


@pytest.mark.parametrize("part", [lowbit.optim.AdaClip, lowbit.optim.AdaGN, GlobalClip, lowbit.optim.SpikeClip])
def test_stabilizers_arguments_too(part):
    name = next(n for n, kind in types_of(part).items() if kind == "float")
    with pytest.raises(TypeError, match=f"{name} must be a number, not '1'"):
        AdamW([Parameter(torch.ones(3))], stabilize=part(**{name: "1"}))


def test_a_type_that_goes_wrong_later_is_found_in_the_step():
    p = Parameter(torch.ones(3))
    opt = AdamW([p])
    p.grad = torch.ones(3)
    before = everything(opt)
    for name, wrong in (("lr", "1e-3"), ("lr", [1e-3]), ("eps", None), ("weight_decay", "0")):
        kept = opt.param_groups[0][name]
        opt.param_groups[0][name] = wrong
        with pytest.raises(TypeError, match=f"{name} must be a number"):
            opt.step()
        opt.param_groups[0][name] = kept
    assert_same(everything(opt), before)


def test_numbers_of_numpy_and_torch_are_numbers():
    """A checkpoint holds them as Python's."""
    import numpy as np

    p = Parameter(torch.ones(3))
    opt = AdamW([p], lr=torch.tensor(1e-3), eps=np.float64(1e-8), weight_decay=np.float32(0.5), amsgrad=np.bool_(True))
    p.grad = torch.ones(3)
    opt.step()
    assert opt.state[p]["step"] == 1
    later = {"params": [("w", Parameter(torch.ones(8, 6)))], "rank": np.int64(4), "betas": (np.float32(0.5), 0.9)}
    for each in (opt, GaLore([{**later, "seed": np.int64(3)}])):
        for group in each.state_dict()["param_groups"]:
            numbers = [group["lr"], group["eps"], group["weight_decay"], group["seed"], *group["betas"]]
            assert {type(number) for number in numbers} <= {float, int, torch.Tensor}


# --- keys of a group -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key, meant", [("weight_decat", "weight_decay"), ("beta", "betas"), ("learning_rate", ""), ("maximise", "maximize")]
)
def test_an_unknown_key_is_an_error_with_the_nearest_match(key: str, meant: str):
    p, q = Parameter(torch.ones(3)), Parameter(torch.ones(3))
    message = f"group 1: AdamW has no hyper-parameter '{key}'"
    with pytest.raises(ValueError, match=message):
        AdamW([{"params": [p]}, {"params": [q], key: 0.5}])
    opt = AdamW([p])
    before = everything(opt)
    with pytest.raises(ValueError, match=message) as caught:
        opt.add_param_group({"params": [q], key: 0.5})
    assert (f"did you mean '{meant}'" in str(caught.value)) == (meant in opt.defaults)
    assert_same(everything(opt), before)
    assert q not in opt.state


def test_another_optimizers_hyper_parameter_is_unknown():
    with pytest.raises(ValueError, match=r"Lion has no hyper-parameter 'eps'.*it has: lr, betas, weight_decay"):
        Lion([{"params": [Parameter(torch.ones(3))], "eps": 1e-8}])


def test_stabilizers_hyper_parameters_are_a_groups_own():
    p = Parameter(torch.ones(3))
    assert AdamW([{"params": [p], "max_norm": 2.0}], stabilize=GlobalClip()).param_groups[0]["max_norm"] == 2.0
    with pytest.raises(ValueError, match="no hyper-parameter 'max_norm'"):
        AdamW([{"params": [Parameter(torch.ones(3))], "max_norm": 2.0}])


def test_keys_that_people_carry_are_carried():
    """Labels, what schedulers write, what training loops read, and one's own."""
    carried = {"name": "decayed", "lr_scale": 0.5, "initial_lr": 1e-3, "_mine": [1, 2]}
    opt = AdamW([{"params": [Parameter(torch.ones(3))], **carried}])
    again = AdamW([{"params": [Parameter(torch.ones(3))], **carried}])
    again.load_state_dict(opt.state_dict())
    assert carried.items() <= again.param_groups[0].items()


def test_groups_of_torchs_optimizer_are_taken_unless_they_ask_for_what_is_not_there():
    p = Parameter(torch.ones(3))
    groups = torch.optim.AdamW([p], lr=0.5).param_groups
    assert AdamW(groups).param_groups[0]["lr"] == 0.5
    with pytest.raises(ValueError, match="no hyper-parameter 'maximize'"):
        AdamW(torch.optim.AdamW([p], maximize=True).param_groups)


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 1e-2, total_steps=9),
        lambda o: torch.optim.lr_scheduler.CyclicLR(o, 1e-4, 1e-2, cycle_momentum=False),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 9),
        lambda o: torch.optim.swa_utils.SWALR(o, 1e-3),
    ],
)
def test_what_schedulers_write_builds_another_optimizer(scheduler):
    opt = AdamW([Parameter(torch.ones(3))], lr=1e-3)
    scheduler(opt)
    AdamW([{**group, "params": [Parameter(torch.ones(3))]} for group in opt.param_groups])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_our_own_groups_are_taken_by_every_optimizer(case: Case):
    named = parameters([(8, 6), (6,)])
    opt = case.build(param_groups(named, lr=1e-3, embedding_lr=2.0))
    assert isinstance(opt, Rule) and math.isclose(float(opt.param_groups[0]["lr"]), 1e-3)
