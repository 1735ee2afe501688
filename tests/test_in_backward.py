"""Steps inside of backward: the same bits as ordinary steps, gradients freed at once, refusals."""

import copy
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from cases import Case, assert_same, every_case, every_preset, everything
from cases import one_thread as one_thread
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.checkpoint import checkpoint

from lowbit.optim import AdamW, GlobalClip, MomentumReset, Muon, Rule, StableSPAM, step_in_backward

STEPS = 6


class Tied(nn.Module):
    """Matrices large enough for compressed states; a head that shares the embedding's weight; a parameter unused."""

    def __init__(self, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(70, 64)
        self.inner = nn.ModuleList([nn.Linear(64, 80), nn.Linear(80, 64)])
        self.norm = nn.LayerNorm(64)
        self.spare = nn.Parameter(torch.ones(64, 64))
        self.head = nn.Linear(64, 70, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor, spare: bool = False) -> Tensor:
        x = self.embed(tokens)
        x = x + self.inner[1](self.inner[0](x).tanh())
        return self.head(self.norm(x @ self.spare if spare else x))


def loss_of(model: nn.Module, t: int) -> Tensor:
    generator = torch.Generator().manual_seed(t)
    tokens = torch.randint(0, 70, (4, 17), generator=generator)
    logits = model(tokens[:, :-1], t % 3 == 1)
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


def train(model: nn.Module, opt: Rule, steps: int = STEPS) -> None:
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(opt, steps)
    for t in range(steps):
        opt.zero_grad()
        loss_of(model, t).backward()
        opt.step()
        scheduler.step()


def pair(build) -> Iterator[tuple[nn.Module, Rule]]:
    for _ in range(2):
        model = Tied()
        yield model, build(model.named_parameters())


@every_case
@every_preset
def test_the_bits_of_ordinary_steps(case: Case, states: str):
    """Every optimizer, schedules, resets, tied weights, and a parameter that has no gradient in most steps."""
    (one, ordinary), (two, fused) = pair(lambda named: case.build(named, states=states))
    train(one, ordinary)
    with step_in_backward(fused):
        train(two, fused)
    assert_same(everything(ordinary), everything(fused))
    assert all(p.grad is None for p in two.parameters())


@pytest.mark.parametrize("options", [{}, {"master": "split8"}, {"state_rounding": "stochastic"}], ids=str)
def test_random_bits_of_16_bit_parameters_are_the_same(options):
    models = [Tied().bfloat16(), Tied().bfloat16()]
    opts = [StableSPAM(m.named_parameters(), lr=1e-3, states="4bit", reset_interval=3, **options) for m in models]
    with step_in_backward(opts[1]):
        for model, opt in zip(models, opts, strict=True):
            train(model, opt)
    assert_same(everything(opts[0]), everything(opts[1]))


def test_groups_stabilizers_and_a_late_reset():
    def build(named):
        named = list(named)
        groups = [{"params": named[:2], "weight_decay": 0.3}, {"params": named[2:], "lr": 3e-3}]
        return StableSPAM(groups, lr=1e-3, reset_interval=2, variant="official")

    (one, ordinary), (two, fused) = pair(build)
    train(one, ordinary)
    with step_in_backward(fused):
        train(two, fused)
    assert_same(everything(ordinary), everything(fused))


def test_a_step_with_a_closure():
    (one, ordinary), (two, fused) = pair(lambda named: AdamW(named, lr=1e-3, states="4bit"))
    train(one, ordinary, 3)
    step_in_backward(fused)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(fused, 3)
    for t in range(3):

        def closure(t: int = t) -> Tensor:
            loss = loss_of(two, t)
            loss.backward()
            return loss

        assert fused.step(closure) > 0
        scheduler.step()
    assert_same(everything(ordinary), everything(fused))


def test_one_gradient_is_in_memory_at_a_time():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(8)))
    alive: list[int] = []

    def watch(p: Tensor) -> None:
        alive.append(sum(q.grad is not None for q in model.parameters()))

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(watch)
    opt = AdamW(model.named_parameters(), lr=1e-3)
    with step_in_backward(opt):
        model(torch.randn(4, 64)).sum().backward()
        opt.step()
    assert alive == [1] * 8


def test_what_was_frozen_or_added_later_is_stepped_by_step():
    (one, ordinary), (two, fused) = pair(lambda named: AdamW(list(named)[:-1], lr=1e-3))
    two.inner[0].requires_grad_(False)
    with step_in_backward(fused):
        two.inner[0].requires_grad_(True)
        for model, opt in ((one, ordinary), (two, fused)):
            model.extra = nn.Parameter(torch.ones(64))
            opt.add_param_group({"params": [("extra", model.extra)]})
            for t in range(3):
                opt.zero_grad()
                (loss_of(model, t) + model.extra.square().sum()).backward()
                opt.step()
    assert_same(everything(ordinary), everything(fused))


def test_steps_are_ordinary_again_afterwards():
    (one, ordinary), (two, fused) = pair(lambda named: Muon(named, lr=1e-3))
    train(one, ordinary)
    handle = step_in_backward(fused)
    loss_of(two, 0).backward()
    handle.remove()  # in the middle of a step, which step() still ends
    assert fused.in_backward is handle
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(fused, STEPS)
    fused.step()
    assert fused.in_backward is None
    scheduler.step()
    for t in range(1, STEPS):
        fused.zero_grad()
        loss_of(two, t).backward()
        assert two.norm.weight.grad is not None
        fused.step()
        scheduler.step()
    assert_same(everything(ordinary), everything(fused))


def test_checkpoints_and_copies_are_those_of_ordinary_steps(tmp_path: Path):
    (one, ordinary), (two, fused) = pair(lambda named: AdamW(named, lr=1e-3, states="4bit"))
    for t in range(4):
        ordinary.zero_grad()
        loss_of(one, t).backward()
        ordinary.step()
    with step_in_backward(fused):
        for t in range(4):
            if t == 2:
                torch.save(fused.state_dict(), tmp_path / "state.pt")
                fused.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
            loss_of(two, t).backward()
            fused.step()
        copied = copy.deepcopy(fused)
    assert copied.in_backward is None
    assert_same(everything(ordinary), everything(fused))


def test_a_second_gradient_in_a_step_is_an_error():
    """Accumulation, a forgotten step(), and reentrant checkpoints of a shared weight."""
    model = Tied()
    opt = AdamW(model.named_parameters(), lr=1e-3)
    step_in_backward(opt)
    loss_of(model, 0).backward()
    before = everything(opt)
    with pytest.raises(RuntimeError, match=r"a second gradient in one step. Call opt.step\(\) after each"):
        loss_of(model, 1).backward()
    assert_same(before, everything(opt))
    opt.zero_grad()
    opt.step()
    loss_of(model, 1).backward()
    opt.step()

    shared = nn.Linear(64, 64)
    opt = AdamW(shared.named_parameters(), lr=1e-3)
    step_in_backward(opt)
    x = torch.randn(4, 64, requires_grad=True)
    for _ in range(2):
        x = checkpoint(shared, x, use_reentrant=True)
    with pytest.raises(RuntimeError, match="checkpoint with use_reentrant=False"):
        x.sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool):
    models = [nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    opts = [AdamW(m.named_parameters(), lr=1e-3) for m in models]
    x = torch.randn(4, 64, requires_grad=True)
    with step_in_backward(opts[1]):
        for model, opt in zip(models, opts, strict=True):
            for _ in range(3):
                opt.zero_grad()
                for_each = [checkpoint(layer, x, use_reentrant=reentrant) for layer in model]
                sum(y.square().sum() for y in for_each).backward()
                opt.step()
    assert_same(everything(opts[0]), everything(opts[1]))


def test_a_gradient_that_cannot_be_stepped_is_no_step():
    model = nn.EmbeddingBag(70, 64, mode="sum", sparse=True)
    opt = AdamW(model.named_parameters(), lr=1e-3)
    before = everything(opt)
    with step_in_backward(opt), pytest.raises(TypeError, match="sparse gradients are not supported"):
        model(torch.tensor([[1, 2]])).sum().backward()
    assert_same(before, everything(opt))


def test_refusals():
    model = Tied()
    with pytest.raises(TypeError, match=r"an optimizer of lowbit.optim is needed, not Adam"):
        step_in_backward(torch.optim.Adam(model.parameters()))  # pyright: ignore
    for clipped in (AdamW, Muon):
        opt = clipped(model.named_parameters(), lr=1e-3, stabilize=[GlobalClip(1.0)])
        with pytest.raises(ValueError, match=r"measures 'energy_of_all' over all tensors.*use AdaClip"):
            step_in_backward(opt)
        assert opt.in_backward is None and not model.norm.weight._post_accumulate_grad_hooks
    opt = AdamW(model.named_parameters(), lr=1e-3, stabilize=[MomentumReset(3)])
    step_in_backward(opt)
    with pytest.raises(ValueError, match="steps in backward already"):
        step_in_backward(opt)


@pytest.mark.parametrize("unscale", [False, True])
def test_a_grad_scaler_is_refused(unscale: bool):
    model = Tied()
    opt = AdamW(model.named_parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    with step_in_backward(opt):
        scaler.scale(loss_of(model, 0)).backward()
        if unscale:
            scaler.unscale_(opt)
        with pytest.raises(RuntimeError, match="a GradScaler's scale was in the gradients"):
            scaler.step(opt)


@pytest.fixture
def two_ranks() -> Iterator[None]:
    """A process group of two, of which this is the first; the other answers nothing and is not missed."""
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield
    dist.destroy_process_group()


def test_several_ranks_are_refused(two_ranks: None):
    model = Tied()
    for named in (model.named_parameters(), DistributedDataParallel(model).named_parameters()):
        opt = AdamW(named, lr=1e-3)
        with pytest.raises(RuntimeError, match="DistributedDataParallel averages gradients only after"):
            step_in_backward(opt)
        assert opt.in_backward is None
    with step_in_backward(opt, averaged=True):
        loss_of(model, 0).backward()
        opt.step()
    assert model.norm.weight.grad is None


def test_ranks_that_meet_later_are_refused_before_a_step(request: pytest.FixtureRequest):
    model = Tied()
    opt = AdamW(model.named_parameters(), lr=1e-3)
    step_in_backward(opt)
    before = everything(opt)
    request.getfixturevalue("two_ranks")
    with pytest.raises(RuntimeError, match="there are several ranks"):
        loss_of(model, 0).backward()
    assert_same(before, everything(opt))


MANY_HOLES = """
import sys, torch, lowbit
model = torch.nn.Linear(64, 64)
if sys.argv[1] == "released":
    lowbit.optim.step_in_backward(lowbit.optim.AdamW(model.named_parameters(), lr=1e-3))
def resident():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS")) / 1024
torch.empty(31 << 20, dtype=torch.uint8).fill_(1)  # from now on glibc keeps what is smaller
before, large, kept = resident(), [], []
for _ in range(20):  # all at once: a small one that finds room in a hole leaves no hole below it
    large.append(torch.empty(4 << 20, dtype=torch.uint8).fill_(1))
    kept.append(torch.empty(1 << 18, dtype=torch.uint8).fill_(1))
large.clear()
print(resident() - before - 20 / 4)  # without those that are kept
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc is asked, which is on Linux")
def test_freed_memory_is_given_back():
    """Of 20 large blocks freed, between small ones that are kept: nothing stays, where 80 MB stay by default."""
    found = {}
    for what, threshold in (("released", None), ("usual", None), ("released", "33554432")):
        env = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
        env |= {"MALLOC_MMAP_THRESHOLD_": threshold} if threshold else {}
        words = [sys.executable, "-c", MANY_HOLES, what]
        done = subprocess.run(words, env=env, capture_output=True, text=True, check=True)
        found[what, threshold] = float(done.stdout)
    assert found["released", None] < 3
    assert min(found["usual", None], found["released", "33554432"]) > 40  # the user's threshold is left alone
