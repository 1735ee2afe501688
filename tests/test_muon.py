"""Muon: the released code's trajectory, torch's, auxiliary AdamW by role, learning rates of its own."""

import math

import numpy as np
import oracles_matrix
import pytest
import torch
from cases import assert_close, gradient, parameters, train
from cases import one_thread as one_thread
from matrix_cases import HEAD, follow
from torch import nn
from torch.nn import Parameter

from lowbit.optim import AdamW, Muon, SpikeClip, param_groups
from lowbit.optim.muon import newton_schulz

nameless = pytest.mark.filterwarnings("ignore:.* treats embeddings")  # one matrix: no name needed


@pytest.mark.parametrize("precision, atol", [("bf16", 5e-4), ("fp32", 2.5e-3)])
def test_muon_follows_the_released_code(precision: str, atol: float):
    """In bf16 as released it is five times nearer than in fp32; what is no matrix agrees to 2e-7."""
    hyper = {"lr": 0.02, "weight_decay": 0.01, "aux_lr": 3e-3, "roles": HEAD, "states": "fp32"}
    opt, named, expected = follow(lambda ps: Muon(ps, precision=precision, **hyper), "muon", 0.02, atol)
    for n, p in named.items():
        if opt._slots[p].kind != "matrix":
            np.testing.assert_allclose(p.detach(), expected[f"p/20/{n}"], rtol=0, atol=2e-7)
        else:
            theirs = expected[f"state/{n}/momentum_buffer"]
            np.testing.assert_allclose(
                opt.state[p]["momentum_buffer"], theirs, rtol=0, atol=1e-6 * np.abs(theirs).max()
            )


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has Muon since 2.9")
@pytest.mark.parametrize("adjust", [None, "original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_is_torchs(adjust: str | None, nesterov: bool):
    shapes = [(32, 48), (48, 32), (40, 40)]
    mine, theirs = parameters(shapes), [Parameter(p.detach().clone()) for _, p in parameters(shapes)]
    hyper = {"lr": 5e-3, "weight_decay": 0.1, "nesterov": nesterov, "adjust_lr_fn": adjust}
    opt, ref = Muon(mine, states="fp32", **hyper), torch.optim.Muon(theirs, **hyper)
    for t in range(1, 11):
        for (_, p), q in zip(mine, theirs, strict=True):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(t))
            q.grad = p.grad.clone()
        opt.step()
        ref.step()
    moved = max(float((p - x).detach().abs().max()) for (_, p), (_, x) in zip(mine, parameters(shapes), strict=True))
    assert_close([p for _, p in mine], theirs, atol=0.02 * moved)  # bf16: torch fuses a sum that we round


@pytest.mark.parametrize("shape", [(7, 33), (33, 7), (20, 20), (3, 8, 12)], ids=str)
def test_newton_schulz_keeps_the_singular_vectors(shape: tuple[int, ...]):
    """Odd polynomials act on singular values alone; these end between 0.6 and 1.3, but for those that were tiny."""
    torch.manual_seed(0)
    g = torch.randn(shape)
    each = g.double().numpy().reshape(-1, *shape[-2:])
    expected = np.stack([oracles_matrix.quintic(x) for x in each]).reshape(shape)
    np.testing.assert_allclose(newton_schulz(g, 5, torch.float32), expected, atol=2e-5)
    values = torch.linalg.svdvals(newton_schulz(g, 5, torch.bfloat16).float())
    assert float(values.min()) > 0.5 and float(values.max()) < 1.35


def test_the_gradient_is_not_written_to():
    """The released nesterov step overwrites it."""
    [(_, p)] = parameters([(16, 24)])
    p.grad = gradient((16, 24), 1)
    before = p.grad.clone()
    Muon([("p", p)]).step()
    assert torch.equal(p.grad, before)


def test_what_is_stepped_how_goes_by_role_and_shape():
    model = nn.ModuleDict({
        "embed": nn.Embedding(10, 8), "lin": nn.Linear(8, 8), "conv": nn.Conv2d(3, 8, 3), "norm": nn.LayerNorm(8),
        "head": nn.Linear(8, 10, bias=False),
    })  # fmt: skip
    model["column"] = nn.Linear(1, 8, bias=False)
    opt = Muon(model.named_parameters(), roles={"head.*": "head", "embed.*": "embedding"})
    assert {row.name: row.kind for row in opt.explain().rows} == {
        "embed.weight": "embedding", "lin.weight": "matrix", "lin.bias": "other", "conv.weight": "matrix",
        "conv.bias": "other", "norm.weight": "other", "norm.bias": "other", "head.weight": "head",
        "column.weight": "other",
    }  # fmt: skip
    for p in model.parameters():
        kept = {name for name in ("momentum_buffer", "exp_avg", "exp_avg_weight") if name in opt.state[p]}
        matrix = opt._slots[p].kind == "matrix"
        assert kept == ({"momentum_buffer"} if matrix else {"exp_avg", "exp_avg_weight"})


@nameless
def test_a_convolution_is_flattened():
    a, b = Parameter(torch.ones(6, 3, 2, 2)), Parameter(torch.ones(6, 12))
    one, two = Muon([a]), Muon([b])
    for t in range(1, 4):
        a.grad = gradient((6, 3, 2, 2), t)
        b.grad = a.grad.view(6, 12).clone()
        one.step()
        two.step()
    assert torch.equal(a.view(6, 12), b)


@nameless
def test_each_expert_is_a_matrix_of_its_own():
    experts = Parameter(torch.ones(3, 8, 12))
    single = [Parameter(torch.ones(8, 12)) for _ in range(3)]
    opt, ref = Muon([("e", experts)], roles={"e": "expert"}, precision="fp32"), Muon(single, precision="fp32")
    for t in range(1, 4):
        experts.grad = gradient((3, 8, 12), t)
        for k, p in enumerate(single):
            p.grad = experts.grad[k].clone()
        opt.step()
        ref.step()
    assert opt.explain().rows[0].kind == "experts"
    assert_close(list(experts.detach().unbind()), single, atol=1e-5)
    flat = Muon([Parameter(torch.ones(3, 8, 12))])
    assert flat.explain().rows[0].kind == "matrix"


AUX = {"embed": "embedding", "head": "head"}


@pytest.mark.parametrize("which", ["embed", "head", "vector"])
def test_the_auxiliary_learning_rates_are_arguments(which: str):
    """Each is AdamW at its own rate, and follows the schedule of lr."""
    shape = (5,) if which == "vector" else (6, 5)
    p, q = Parameter(torch.ones(shape)), Parameter(torch.ones(shape))
    own = {"embedding_lr": 0.03, "head_lr": 0.02, "scalar_lr": 0.01}
    wanted = {"embed": 0.03, "head": 0.02, "vector": 0.01}[which]
    roles = {which: AUX[which]} if which in AUX else None
    opt = Muon([(which, p)], lr=0.1, aux_lr=0.5, roles=roles, weight_decay=0.1, states="fp32", **own)
    ref = AdamW([q], lr=wanted, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.1, states="fp32")
    for t in range(1, 11):
        p.grad = q.grad = gradient(shape, t)
        opt.step()
        ref.step()
        for group, lr in ((opt.param_groups[0], 0.1), (ref.param_groups[0], wanted)):
            group["lr"] = lr * (1 - t / 11)
    assert_close([p], [q])
    rest = Muon([(which, Parameter(torch.ones(shape)))], lr=0.1, aux_lr=0.5, roles=roles)
    constants = rest.kind_constants(rest.param_groups[0], 1, rest.explain().rows[0].kind)
    assert constants["lr"] == 0.5


def test_auxiliary_rates_follow_the_schedule_after_resuming():
    p = Parameter(torch.ones(5))
    opt = Muon([("p", p)], lr=0.1, aux_lr=0.5)
    opt.param_groups[0]["lr"] = 0.05
    fresh = Muon([("p", Parameter(torch.ones(5)))], lr=0.05, aux_lr=0.5)
    fresh.load_state_dict(opt.state_dict())
    for each in (opt, fresh):
        assert each.kind_constants(each.param_groups[0], 1, "other")["lr"] == 0.25


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1.0, 1e12, 1e30])
def test_the_update_does_not_depend_on_the_gradients_scale(scale: float):
    """Above what the released 1e-7 in the norm's denominator hides; and nothing overflows."""
    p = Parameter(torch.zeros(16, 24))
    opt = Muon([("p", p)], lr=1.0, precision="fp32", states="fp32")
    p.grad = gradient((16, 24), 1) * scale
    opt.step()
    assert p.isfinite().all()
    size = float(p.detach().square().sum())
    assert (size > 5) == (scale >= 1) and size < 30 and opt.counters()["skipped_tensors"] == 0


def test_a_zero_gradient_only_decays():
    p = Parameter(torch.ones(16, 24))
    opt = Muon([("p", p)], lr=0.1, weight_decay=0.5)
    p.grad = torch.zeros(16, 24)
    opt.step()
    torch.testing.assert_close(p.detach(), torch.full((16, 24), 0.95))


def test_float64_and_fp32_agree_over_a_run():
    [(_, p)] = parameters([(24, 40)])
    x, s = p.detach().double().numpy(), {"momentum_buffer": 0.0}
    opt = Muon([("p0", p)], lr=0.02, precision="fp32", states="fp32")
    for t in range(1, 21):
        train(opt, [("p0", p)], range(t, t + 1))
        x = oracles_matrix.muon(x, p.grad.double().numpy(), s, t, lr=0.02)
    np.testing.assert_allclose(p.detach(), x, atol=1e-5)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"momentum": 1.0}, "momentum must be in"),
        ({"ns_steps": 0}, "ns_steps must be a whole number of at least 1"),
        ({"ns_steps": 2.0}, "ns_steps must be a whole number"),
        ({"adjust_lr_fn": "match"}, "unknown adjust_lr_fn 'match'"),
        ({"precision": "fp16"}, "unknown precision 'fp16'"),
        ({"aux_lr": -1.0}, "aux_lr must be a finite number >= 0, not -1"),
        ({"embedding_lr": math.inf}, "embedding_lr must be a finite number"),
        ({"head_lr": math.nan}, "head_lr must be a finite number"),
        ({"scalar_lr": -0.5}, "scalar_lr must be a finite number"),
        ({"lr": -1.0}, "lr must be a finite number >= 0"),
        ({"betas": (0.9,)}, "betas must be two numbers"),
        ({"stabilize": (SpikeClip(),)}, "SpikeClip.* reads 'v', which Muon has not"),
    ],
)
def test_bad_arguments(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        Muon([Parameter(torch.ones(4, 4))], **options)


def test_multipliers_of_param_groups_reach_the_auxiliary_learning_rate():
    """embedding_lr and head_lr of param_groups multiply what Muon gives embedding and head, too."""

    def moves(**scales: float) -> dict[str, float]:
        named = [
            ("embed_tokens.weight", Parameter(torch.zeros(8, 4))),
            ("lm_head.weight", Parameter(torch.zeros(8, 4))),
        ]
        opt = Muon(param_groups(named, lr=0.02, weight_decay=0.0, **scales), aux_lr=1e-3)
        for _, p in named:
            p.grad = torch.ones_like(p)
        opt.step()
        return {n: -p[0, 0].item() for n, p in named}

    plain, scaled = moves(), moves(embedding_lr=0.5, head_lr=3.0)
    assert scaled["embed_tokens.weight"] == pytest.approx(0.5 * plain["embed_tokens.weight"])
    assert scaled["lm_head.weight"] == pytest.approx(3 * plain["lm_head.weight"])
