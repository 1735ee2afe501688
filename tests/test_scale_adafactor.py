"""SCALE and Adafactor: what the released codes computed, the papers' forms, and the tensors they treat differently."""

import math

import numpy as np
import oracles_blocks
import oracles_optim
import pytest
import torch
from cases import assert_same, every_preset, everything, feed, gradient, parameters, twins
from cases import one_thread as one_thread
from golden_mha import follow
from llama_shapes import roles
from torch import nn
from torch.nn import Parameter

from lowbit.optim import SCALE, AdaClip, Adafactor, AdaGN, MomentumReset, SpikeClip

nameless = pytest.mark.filterwarnings("ignore:.* treats embeddings")  # one matrix: no name needed

# --- SCALE ---------------------------------------------------------------------------------------------------------


def test_scale_equals_the_released_code():
    follow(lambda named: SCALE(named, lr=3e-3, scalar_lr=1e-3, states="fp32", roles=roles(named)), "scale")


@pytest.mark.parametrize(
    "role, shape, expected",
    [
        ("embedding", (48, 32), ("column", [])),  # a tied head is one, too
        ("head", (48, 32), ("row with momentum", ["exp_avg"])),
        *((role, (48, 32), ("row", [])) for role in ("q", "k", "v", "o", "gate", "up", "down", "qkv", "router", "")),
        ("conv", (8, 3, 5, 5), ("row", [])),
        ("expert", (4, 8, 6), ("row", [])),
        *((role, (32,), ("Adam", ["exp_avg", "exp_avg_sq"])) for role in ("norm", "bias", "")),
        ("norm", (8, 8), ("Adam", ["exp_avg", "exp_avg_sq"])),
        ("", (), ("Adam", ["exp_avg", "exp_avg_sq"])),
    ],
)
def test_which_norm_and_state_each_tensor_has(role: str, shape: tuple[int, ...], expected: tuple[str, list[str]]):
    p = Parameter(torch.ones(shape))
    opt = SCALE([("w", p)], lr=0.1, roles={"w": role} if role else None)
    p.grad = torch.ones(shape)
    opt.step()
    torch.testing.assert_close(p.detach(), torch.full(shape, 0.9))
    [row] = opt.explain().rows
    assert (row.kind, sorted(row.formats)) == expected and row.kind in str(opt.explain())
    assert expected[1] or row.why == "no moments"


@pytest.mark.parametrize("norm", ["rms", "l2"])
@pytest.mark.parametrize("role, axis", [("embedding", 0), ("up", 1)])
@pytest.mark.parametrize("shape", [(48, 32), (7, 300), (6, 3, 5, 5)], ids=str)
def test_scale_equals_the_straight_line_statement(norm: str, role: str, axis: int, shape: tuple[int, ...]):
    [(_, p)] = parameters([shape])
    opt = SCALE([("w", p)], lr=1e-3, weight_decay=0.1, norm=norm, roles={"w": role})
    x = p.detach().double().numpy().copy()
    for t in range(1, 8):
        p.grad = gradient(shape, t)
        x = oracles_blocks.scale(x, p.grad.double().numpy(), {}, t, lr=1e-3, weight_decay=0.1, norm=norm, axis=axis)
        opt.step()
        np.testing.assert_allclose(p.detach(), x, rtol=0, atol=1e-6)
    assert p.shape == shape  # the released code leaves a convolution flattened


@pytest.mark.parametrize("role, over", [("embedding", 48), ("up", 32), ("head", 32)])
def test_the_papers_form_is_the_codes_at_another_rate(role: str, over: int):
    """L2 norms are root mean squares times the root of their number of values: the vocabulary, for an embedding."""
    (_, p), (_, q) = (parameters([(48, 32)])[0] for _ in range(2))
    code = SCALE([("w", p)], lr=1e-3, roles={"w": role})
    paper = SCALE([("w", q)], lr=1e-3 * math.sqrt(over), norm="l2", roles={"w": role})
    for t in range(1, 6):
        p.grad = gradient((48, 32), t)
        q.grad = p.grad.clone()
        code.step()
        paper.step()
    torch.testing.assert_close(p.detach(), q.detach(), rtol=0, atol=1e-6)


def test_the_size_of_a_rows_gradient_does_not_matter():
    """A spike of a whole row is divided away; a row of zeros stays where it is."""
    (_, p), (_, q) = (parameters([(8, 32)])[0] for _ in range(2))
    start = p.detach().clone()
    a, b = SCALE([("w", p)], lr=1e-2), SCALE([("w", q)], lr=1e-2)
    p.grad = gradient((8, 32), 1)
    p.grad[3] = 0
    q.grad = p.grad * torch.tensor([1.0, 1e3, 1e6, 1, 1, 1e-2, 1, 1])[:, None]
    a.step()
    b.step()
    torch.testing.assert_close(p.detach(), q.detach(), rtol=0, atol=1e-6)
    moved = p.detach() - start
    assert torch.equal(moved[3], torch.zeros(32))
    torch.testing.assert_close(moved.square().mean(1).sqrt()[[0, 1, 2, 4, 5, 6, 7]], torch.full((7,), 1e-2))


def test_vectors_follow_the_schedule_at_their_own_rate():
    """scalar_lr goes with the lr a group begins with; also after a resume, and in a group with another lr."""
    p, q = Parameter(torch.ones(64)), Parameter(torch.ones(64))
    opt = SCALE([{"params": [p]}, {"params": [q], "lr": 1e-2}], lr=1e-3, scalar_lr=2e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda t: 1 / (1 + t))
    for t in range(3):
        before = [x.detach().clone() for x in (p, q)]
        p.grad, q.grad = torch.ones(64), torch.ones(64)
        opt.step()
        for x, was in zip((p, q), before, strict=True):
            torch.testing.assert_close(was - x.detach(), torch.full((64,), 2e-2 / (1 + t)), rtol=1e-4, atol=0)
        schedule.step()
    fresh = SCALE([{"params": [p]}, {"params": [q]}], lr=1.0, scalar_lr=1.0)
    fresh.load_state_dict(opt.state_dict())
    before = p.detach().clone()
    fresh.step()
    torch.testing.assert_close(before - p.detach(), torch.full((64,), 2e-2 / 4), rtol=1e-4, atol=0)


def test_vectors_have_eps_before_debiasing():
    """A first gradient of eps moves by lr / (1 + 1 / sqrt(1 - beta2)), not by half of lr."""
    p = Parameter(torch.zeros(4))
    opt = SCALE([p], lr=1.0, eps=1e-3, betas=(0.9, 0.999))
    p.grad = torch.full((4,), 1e-3)
    opt.step()
    torch.testing.assert_close(p.detach(), torch.full((4,), -1 / (1 + 1 / math.sqrt(0.001))), rtol=1e-4, atol=0)


@nameless
def test_decay_reaches_vectors_as_released():
    p, w = Parameter(torch.ones(4)), Parameter(torch.ones(4, 4))
    opt = SCALE([p, w], lr=0.1, scalar_lr=0.5, weight_decay=0.5)
    p.grad, w.grad = torch.zeros(4), torch.zeros(4, 4)
    opt.step()
    assert p.tolist() == [0.75] * 4 and w.detach().unique().tolist() == [pytest.approx(0.95)]


@every_preset
def test_only_the_heads_momentum_is_stored(states: str):
    model = nn.ModuleDict(
        {
            "embed": nn.Embedding(100, 64),
            "up": nn.Linear(64, 200, bias=False),
            "lm_head": nn.Linear(64, 100, bias=False),
        }
    )
    opt = SCALE(model.named_parameters(), states=states, roles={"lm_head*": "head", "embed*": "embedding"})
    per_value = {"fp32": 4, "bf16": 2, "8bit": 1 + 4 / 64, "4bit": 0.5 + 4 / 64}[states]
    assert opt.state_bytes() == pytest.approx(per_value * 6400, abs=3 * 30)
    assert [list(row.formats) for row in opt.explain().rows] == [[], [], ["exp_avg"]]
    tied = nn.ModuleDict({"embed": nn.Embedding(100, 64), "lm_head": nn.Linear(64, 100, bias=False)})
    tied["lm_head"].weight = tied["embed"].weight
    [row] = SCALE(tied.named_parameters(), roles={"embed*": "embedding"}).explain().rows
    assert row.kind == "column" and not row.formats


@pytest.mark.parametrize(
    "options, message",
    [
        ({"norm": "rsm"}, "unknown norm 'rsm' .did you mean 'rms'"),
        ({"momentum": 1.0}, "momentum must be in"),
        ({"momentum": math.nan}, "momentum must be in"),
        ({"momentum": -0.1}, "momentum must be in"),
        ({"scalar_lr": -1e-3}, "scalar_lr must be a finite number"),
        ({"scalar_lr": math.inf}, "scalar_lr must be a finite number"),
        ({"scalar_lr": math.nan}, "scalar_lr must be a finite number"),
        ({"scalar_lr": 1e-3, "lr": 0.0}, "scalar_lr is scaled like lr, so lr must begin above 0"),
        ({"betas": (0.9,)}, "betas must be two"),
        ({"lr": -1.0}, "lr must be"),
        ({"weight_decay": math.nan}, "weight_decay must be"),
    ],
)
def test_scales_arguments_out_of_range(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        SCALE([Parameter(torch.ones(4, 4))], **options)


@nameless
def test_a_norm_is_one_for_the_whole_optimizer():
    p = Parameter(torch.ones(4, 4))
    opt = SCALE([p])
    before = everything(opt)
    with pytest.raises(ValueError, match=r"norm is one for the whole optimizer; a group .* asks 'l2'"):
        opt.add_param_group({"params": [Parameter(torch.ones(2))], "norm": "l2"})
    assert_same(everything(opt), before)


# --- Adafactor -----------------------------------------------------------------------------------------------------


def test_adafactor_equals_transformers():
    follow(lambda named: Adafactor(named, lr=3e-3, weight_decay=0.1, states="fp32"), "adafactor")


@pytest.mark.parametrize("lr", [1e-2, 1.0])
def test_the_relative_step_is_torchs(lr: float):
    """Where eps plays no part and nothing decays, the two packages' forms are one."""
    mine, theirs = twins(((17, 33), (50,), (7, 33)))
    opt = Adafactor(mine, lr=lr, scale_parameter=True, relative_step=True)
    ref = torch.optim.Adafactor(theirs, lr=lr)
    for t in range(1, 41):
        feed(t, mine, theirs)
        for p in (*mine, *theirs):
            p.grad += 1e-3 * p.detach()
        opt.step()
        ref.step()
    for p, q in zip(mine, theirs, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-5, atol=2e-6)


def test_squares_of_rank_one_are_exact():
    """Then the update is the gradient's sign."""
    torch.manual_seed(0)
    p = Parameter(torch.zeros(20, 30))
    opt = Adafactor([p], lr=0.1)
    size = torch.rand(20, 1) * torch.rand(1, 30)
    sign = torch.randn(20, 30).sign()
    p.grad = size * sign
    opt.step()
    torch.testing.assert_close(p.detach(), -0.1 * sign, rtol=1e-4, atol=0)


def test_an_update_is_held_at_d():
    """A gradient a thousand times its history gives an update of root mean square d, and its direction."""
    for d in (1.0, 0.5):
        p = Parameter(torch.zeros(16, 16))
        opt = Adafactor([p], lr=0.1, d=d)
        for t in range(1, 21):
            p.grad = gradient((16, 16), 1) * (1000 if t == 20 else 1)
            before = p.detach().clone()
            opt.step()
        moved = p.detach() - before
        assert float(moved.square().mean().sqrt()) == pytest.approx(0.1 * d, rel=1e-4)
        assert torch.equal(moved.sign(), -p.grad.sign())


def test_tensors_of_more_dimensions_are_rows():
    """transformers factors the last two dimensions and keeps the others; here a tensor is its rows, everywhere."""
    p = parameters([(6, 4, 5, 3)])[0][1]
    q = Parameter(p.detach().reshape(6, 60).clone())
    opt, flat = Adafactor([p], lr=0.1), Adafactor([q], lr=0.1)
    for t in range(1, 4):
        p.grad = gradient((6, 4, 5, 3), t)
        q.grad = p.grad.reshape(6, 60)
        opt.step()
        flat.step()
    assert torch.equal(p.detach().reshape(6, 60), q.detach())
    assert opt.state[p]["exp_avg_sq_row"].shape == (6,) and opt.state[p]["exp_avg_sq_col"].shape == (60,)


def test_adafactor_after_a_reset_starts_anew():
    """transformers' averages are not debiased; after a reset they would be too small (which d would hide)."""
    [(_, p)] = parameters([(8, 16)])
    q = Parameter(p.detach().clone())
    opt = Adafactor([p], lr=0.1, d=1e3, stabilize=(MomentumReset(5),))
    for t in range(1, 6):
        before = p.detach().clone()
        p.grad = gradient((8, 16), t)
        opt.step()
    start = q.detach().clone()
    q.grad = gradient((8, 16), 5)
    Adafactor([q], lr=0.1, d=1e3).step()
    torch.testing.assert_close(p.detach() - before, q.detach() - start, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("power", [0.0, 1e-25, 1e-12, 1e12])
def test_gradients_of_any_size(power: float):
    """Zero gradients move nothing; tiny ones count for what eps leaves of them; no step is not finite."""
    [(_, p)] = parameters([(8, 16)])
    opt = Adafactor([p], lr=0.1)
    x, s = p.detach().double().numpy().copy(), oracles_optim.fresh(p.detach().double().numpy())
    for t in range(1, 5):
        p.grad = gradient((8, 16), t) * power
        x = oracles_blocks.adafactor(x, p.grad.double().numpy(), s, t, lr=0.1)
        opt.step()
        np.testing.assert_allclose(p.detach(), x, rtol=0, atol=1e-6)
    assert opt.counters()["skipped_tensors"] == 0


@pytest.mark.parametrize("optimizer", [Adafactor, SCALE])
def test_stabilizers_in_front(optimizer):
    """A normalized gradient is what AdaGN makes of it, so only AdaClip changes SCALE; both equal the statement."""
    [(_, p)] = parameters([(16, 40)])
    opt = optimizer([("w", p)], lr=1e-2, stabilize=(AdaClip(0.9), AdaGN()))
    x = p.detach().double().numpy().copy()
    s = oracles_optim.fresh(x)
    mine = oracles_blocks.adafactor if optimizer is Adafactor else oracles_blocks.scale
    eps = {"eps": 1e-30} if optimizer is Adafactor else {}
    for t in range(1, 11):
        p.grad = gradient((16, 40), t)
        g = oracles_blocks.stabilized(p.grad.double().numpy(), s, gamma3=0.9, **eps)
        x = mine(x, g, s, t, lr=1e-2)
        opt.step()
        np.testing.assert_allclose(p.detach(), x, rtol=0, atol=2e-6)


@pytest.mark.parametrize("optimizer", [Adafactor, SCALE])
def test_spike_clip_in_front_is_refused(optimizer):
    with pytest.raises(ValueError, match="reads 'v', which"):
        optimizer([Parameter(torch.ones(4, 4))], stabilize=(SpikeClip(),))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"beta1": 1.0}, "beta1 must be in"), ({"beta1": math.nan}, "beta1 must be in"),
        ({"beta2_decay": 0.8}, "beta2_decay must be"), ({"beta2_decay": math.nan}, "beta2_decay must be"),
        ({"eps": 0.0}, "eps must be at least"), ({"eps": math.nan}, "eps must be"), ({"eps": -1.0}, "eps must be"),
        ({"d": 0.0}, "d must be a finite number above 0"), ({"d": math.inf}, "d must be"),
        ({"min_scale": -1.0}, "min_scale must be"), ({"lr": math.inf}, "lr must be"),
        ({"weight_decay": -0.1}, "weight_decay must be"),
    ],
)  # fmt: skip
def test_adafactors_arguments_out_of_range(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        Adafactor([Parameter(torch.ones(4, 4))], **options)
