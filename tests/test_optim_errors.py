"""What an optimizer refuses, before anything has changed and naming the culprit; and what it may keep alive."""

import gc
import math

import pytest
import torch
from cases import CASES, COMPRESSED, assert_same, everything, gradient, parameters, train
from cases import old_objects_left_alone as old_objects_left_alone
from cases import one_thread as one_thread
from torch import Tensor, nn
from torch.nn import Parameter

import lowbit
from lowbit.optim import SCALE, SPAM, AdaClip, AdamMini, AdamW, GlobalClip, SlimAdam, SpikeClip, StableSPAM

INF, NAN = math.inf, math.nan

OUT_OF_RANGE = [
    ({"lr": -1e-3}, "lr must be"), ({"lr": NAN}, "lr must be"), ({"lr": INF}, "lr must be"),
    ({"lr": torch.tensor(-1.0)}, "lr must be"), ({"lr": torch.tensor(NAN)}, "lr must be"),
    ({"betas": (1.0, 0.9)}, "betas must be"), ({"betas": (0.9, -0.1)}, "betas must be"),
    ({"betas": (0.9, NAN)}, "betas must be"), ({"betas": (0.9,)}, "betas must be two"),
    ({"betas": (0.9, 0.9, 0.9)}, "betas must be two"), ({"betas": 0.9}, "betas must be"),
    ({"eps": -1e-8}, "eps must be"), ({"eps": NAN}, "eps must be"), ({"eps": INF}, "eps must be"),
    ({"weight_decay": -0.1}, "weight_decay must be"), ({"weight_decay": NAN}, "weight_decay must be"),
    ({"states": "8bti"}, "unknown states '8bti' .did you mean '8bit'"),
    ({"master": "split9"}, "unknown master 'split9' .did you mean 'split"),
    ({"master": "kahn"}, "unknown master 'kahn' .did you mean 'kahan'"),
    ({"rounding": "nearst"}, "unknown rounding 'nearst' .did you mean 'nearest'"),
    ({"state_rounding": "auto"}, "unknown state_rounding 'auto'"),
    ({"rounding": "stochastic", "master": "split8"}, "contradict"),
]  # fmt: skip


@pytest.mark.parametrize("options, message", OUT_OF_RANGE, ids=str)
@pytest.mark.parametrize("optimizer", [AdamW, StableSPAM, AdamMini, SlimAdam, SCALE])
def test_options_out_of_range(optimizer, options: dict, message: str):
    """As an argument, for a group of the first list, and for a group added later."""
    p, q = Parameter(torch.ones(4)), Parameter(torch.ones(4))
    with pytest.raises(ValueError, match=message):
        optimizer([p], **options)
    with pytest.raises(ValueError, match=message):
        optimizer([{"params": [p]}, {"params": [q], **options}])
    opt = optimizer([p])
    before = everything(opt)
    with pytest.raises(ValueError, match=message):
        opt.add_param_group({"params": [q], **options})
    assert_same(everything(opt), before)
    assert q not in opt.state and q not in opt._slots


@pytest.mark.parametrize(
    "part, message",
    [
        (lambda: AdaClip(1.0), "gamma3 must be in"),
        (lambda: SpikeClip(-1.0), "threshold must be at least 0"),
        (lambda: SpikeClip(NAN), "threshold must be at least 0"),
        (lambda: GlobalClip(-1.0), "max_norm must be above 0"),
    ],
)
def test_stabilizers_out_of_range(part, message: str):
    with pytest.raises(ValueError, match=message):
        AdamW([Parameter(torch.ones(4))], stabilize=(part(),))


@pytest.mark.parametrize("optimizer", [AdamW, StableSPAM, SPAM])
@pytest.mark.parametrize("wrong", [AdaClip, (AdaClip,), "AdaClip", None, 5, (None,)], ids=repr)
def test_what_is_no_stabilizer(optimizer, wrong):
    with pytest.raises(TypeError, match=r"stabilize: .* is not a stabilizer, such as lowbit.optim.AdaClip\(\)"):
        optimizer([Parameter(torch.ones(4))], stabilize=wrong)


def test_two_stabilizers_with_one_hyper_parameter():
    with pytest.raises(ValueError, match=r"'max_norm' of GlobalClip.* is already a hyper-parameter"):
        AdamW([Parameter(torch.ones(4))], stabilize=(GlobalClip(1.0), GlobalClip(2.0)))


@pytest.mark.parametrize(
    "params, error, message",
    [
        (lambda p: p, TypeError, "params must be a list of tensors"),
        (lambda p: [], ValueError, "empty"),
        (lambda p: None, TypeError, "params must be a list of tensors, .* not None"),
        (lambda p: [{"lr": 0.1}], TypeError, "group 0 must be a dict with .params., not {'lr': 0.1}"),
        (lambda p: ["w"], TypeError, "takes tensors, not str"),
        (lambda p: [p, 3], TypeError, "parameter 1 of group 0: an optimizer takes tensors, not int"),
        (lambda p: [("w", p), ("x", None)], TypeError, "x: an optimizer takes tensors, not NoneType"),
        (lambda p: [Parameter(torch.ones(2, dtype=torch.long), requires_grad=False)], TypeError, "not torch.int64"),
        (lambda p: [("w", Parameter(p.detach().double()))], TypeError, "w: parameters must be .*, not torch.float64"),
        (lambda p: [("w", Parameter(p.detach().to(torch.complex64)))], TypeError, "w: .*not torch.complex64"),
        (lambda p: [("w", p * 2)], ValueError, "w: not a leaf tensor"),
        (lambda p: [("w", p), ("x", p)], ValueError, r"x: given twice \(first as w\)"),
        (lambda p: [p, p], ValueError, r"parameter 1 of group 0: given twice \(first as parameter 0 of group 0\)"),
        (lambda p: [{"params": [p]}, {"params": [p]}], ValueError, "parameter 0 of group 1: given twice"),
    ],
)
def test_parameters_that_cannot_be(params, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        AdamW(params(Parameter(torch.ones(4))))


def test_a_parameter_given_again_later():
    p, q = Parameter(torch.ones(4)), Parameter(torch.ones(4))
    opt = AdamW([("w", p)])
    before = everything(opt)
    with pytest.raises(ValueError, match=r"again: given twice \(first as w\)"):
        opt.add_param_group({"params": [("q", q), ("again", p)]})
    assert_same(everything(opt), before)
    assert q not in opt.state
    with pytest.raises(ValueError, match="names"):
        opt.add_param_group({"params": [q]})
    assert q not in opt.state and len(opt.param_groups) == 1


def sparse(p: Parameter) -> Tensor:
    return torch.sparse_coo_tensor(
        torch.tensor([[1]]), torch.ones(1, p.shape[1]), tuple(p.shape), check_invariants=True
    )


@pytest.mark.parametrize("optimizer", [AdamW, StableSPAM])
def test_a_sparse_gradient_is_refused_before_anything_changes(optimizer):
    named = parameters([(64, 64), (64, 64)])
    opt = optimizer(named)
    train(opt, named, range(1, 3))
    named[1][1].grad = sparse(named[1][1])
    before = everything(opt)
    with pytest.raises(TypeError, match=r"p1: sparse gradients are not supported; use nn.Embedding\(sparse=False\)"):
        opt.step()
    assert_same(everything(opt), before)


def test_an_integer_gradient_is_refused_before_anything_changes():
    p, q = Parameter(torch.ones(4)), Parameter(torch.ones(4))
    opt = AdamW([("p", p), ("q", q)])
    p.grad, before = torch.ones(4), everything(opt)
    q.grad_dtype = None
    q.grad = torch.ones(4, dtype=torch.int32)
    with pytest.raises(TypeError, match=r"q: the gradient is torch.int32; it must be float32, bfloat16 or float16"):
        opt.step()
    assert_same(everything(opt), before)


def test_a_parameter_that_changed_is_refused_before_anything_changes():
    """half() or a resize after the optimizer was built, with the message that says what to do."""
    model = nn.Linear(64, 64)
    opt = AdamW(model.named_parameters())
    for change in ("dtype", "shape"):
        if change == "dtype":
            model.half()
        else:
            model.float()
            model.bias.data = torch.zeros(3)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        before = everything(opt)
        name, text = ("weight", "float16") if change == "dtype" else ("bias", r"\(3,\)")
        with pytest.raises(
            RuntimeError, match=rf"{name}: was torch.float32, cpu, .* and is .*{text}.* now; change the model's dtype"
        ):
            opt.step()
        assert_same(everything(opt), before)


def test_an_unknown_backend_is_refused_before_anything_changes(monkeypatch: pytest.MonkeyPatch):
    named = parameters([(64, 64)])
    opt = StableSPAM(named, reset_interval=2)
    train(opt, named, range(1, 2))
    before = everything(opt)
    monkeypatch.setenv("LOWBIT_BACKEND", "refernce")
    with pytest.raises(ValueError, match=r"LOWBIT_BACKEND='refernce' is no backend .did you mean 'reference'"):
        opt.step()
    assert_same(everything(opt), before)


@pytest.mark.parametrize("seed", ["one", 1.5, None])
def test_a_seed_is_an_int(seed):
    with pytest.raises(TypeError, match="seed must be an int"):
        AdamW([Parameter(torch.ones(4))], seed=seed)


@pytest.mark.parametrize("argument", ["maximize", "foreach", "capturable", "beta1"])
def test_arguments_it_does_not_have(argument: str):
    with pytest.raises(TypeError, match=argument):
        AdamW([Parameter(torch.ones(4))], **{argument: True})


# --- what stays alive ----------------------------------------------------------------------------------------------


def floats_alive(at_least: int) -> list[Tensor]:
    gc.collect()
    return [
        x for x in gc.get_objects() if issubclass(type(x), Tensor) and x.is_floating_point() and x.numel() >= at_least
    ]


LAYOUTS = ["plain", "bf16 with a companion", "transposed"]
EVERYWHERE = [(case, states, layout) for case in CASES for states in ("8bit", "4bit") for layout in LAYOUTS]
EVERY_FORMAT = [(CASES[0], states, "plain") for states in COMPRESSED]


@pytest.mark.parametrize("case, states, layout", EVERYWHERE + EVERY_FORMAT, ids=str)
def test_no_float_image_of_a_state_outlives_the_step(case, states: str, layout: str):
    """The heap holds p, its gradient and the declared companion, and no other float tensor of half its size."""
    others = floats_alive(64 * 257 // 2)  # tables of other tests; held here, so that their ids stay theirs
    data = torch.randn(64, 257)
    if layout == "transposed":
        data = torch.randn(257, 64).t()
    p = Parameter(data.bfloat16() if "bf16" in layout else data)
    opt = case.build([("p", p)], states=states, master="fp32" if "bf16" in layout else "none")
    del data
    for t in range(1, 3):
        p.grad = gradient((64, 257), t, dtype=p.dtype)
        opt.step()
    declared = [p, p.grad, *(v for k, v in opt.state[p].items() if k == "master")]
    known = {x.data_ptr() for x in declared}
    alive = [x for x in floats_alive(p.numel() // 2) if not any(x is other for other in others)]
    extra = [x for x in alive if x.data_ptr() not in known]
    assert extra == [], [(x.shape, x.dtype) for x in extra]
    assert opt.state_bytes() == sum(v.nbytes for s in opt.state.values() for v in s.values() if isinstance(v, Tensor))


def test_the_heap_scan_sees_what_fp32_states_are():
    p = Parameter(torch.randn(64, 257))
    opt = AdamW([p], states="fp32")
    assert sum(x is v for x in floats_alive(p.numel()) for v in opt.state[p].values()) == 2


def test_what_a_state_was_made_for_cannot_change_under_it():
    p = Parameter(torch.zeros(64, 64))
    opt = AdamW([("w", p)], states="8bit")
    p.grad = torch.ones_like(p)
    opt.step()
    for name, value in (("states", "4bit"), ("amsgrad", True), ("master", "fp32")):
        before = opt.param_groups[0][name]
        opt.param_groups[0][name] = value
        with pytest.raises(RuntimeError, match="changed since the state was made"):
            opt.step()
        opt.param_groups[0][name] = before
    opt.step()
    assert opt.state[p]["step"] == 2


def test_a_step_that_fails_counts_nothing():
    p = Parameter(torch.zeros(64, 64))
    opt = AdamW([("w", p)])
    p.grad = torch.ones_like(p)
    for lr, error in ((None, TypeError), (math.nan, ValueError)):
        opt.param_groups[0]["lr"] = lr
        with pytest.raises(error):
            opt.step()
    assert opt.param_groups[0]["steps"] == 0 and opt.state[p]["step"] == 0


def test_one_name_twice_has_random_bits_of_its_own():
    a, b = (Parameter(torch.ones(64, 64, dtype=torch.bfloat16)) for _ in range(2))
    opt = AdamW([{"params": [("w", a)]}, {"params": [("w", b)]}], lr=1e-3)
    a.grad, b.grad = torch.ones_like(a), torch.ones_like(b)
    opt.step()
    assert not torch.equal(a, b)


def test_an_argument_that_is_none_is_named_with_its_neighbour():
    p = Parameter(torch.ones(2, 2))
    with pytest.raises(TypeError, match=r"AdamW has no argument 'state'.*'states'.*it has: params, lr, betas"):
        AdamW([p], state="4bit")
    with pytest.raises(TypeError, match=r"GaLore has no argument 'r'.*it has: params"):
        lowbit.optim.GaLore([("p", p)], r=4)
    with pytest.raises(TypeError, match=r"not a module: pass model.named_parameters\(\)"):
        AdamW(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="lr must be a number, not None"):
        AdamW([p], lr=None)


def test_one_stabilizer_needs_no_tuple():
    opt = AdamW([Parameter(torch.ones(2, 2))], stabilize=lowbit.optim.AdaClip())
    assert len(opt.stabilize) == 1


@pytest.mark.parametrize("name", ["Muon", "SCALE", "GaLore", "AdamMini"])
def test_names_are_asked_for_where_tensors_are_treated_differently(name: str):
    with pytest.warns(UserWarning, match=rf"{name} treats embeddings.*Pass model.named_parameters\(\)"):
        getattr(lowbit.optim, name)([Parameter(torch.ones(2, 2))])
    getattr(lowbit.optim, name)([Parameter(torch.ones(2))])  # vectors only: nothing to be taken for something else
    AdamW([Parameter(torch.ones(2, 2))])
