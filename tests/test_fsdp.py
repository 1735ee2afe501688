"""Under fully_shard an optimizer does what it does alone: the same bits of weights and states on 2 and on 3 ranks.

One start of each number of ranks runs every row; the tests look at what they have left behind.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from cases import assert_same
from cases import one_thread as one_thread
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_model_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

import lowbit
from lowbit import optim, shards
from lowbit.optim import Rule

STEPS = 4
BF16 = torch.bfloat16
pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch has no distributed")


class Model(nn.Module):
    """Rows that no number of ranks divides, one row for all of them, vectors, a head tied to its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(67, 64)
        self.up = nn.Linear(64, 130)
        self.down = nn.Linear(130, 64)
        self.wide = nn.Linear(64, 300, bias=False)
        self.back = nn.Linear(300, 64, bias=False)
        self.one = nn.Parameter(torch.randn(1, 4160))
        self.norm = nn.LayerNorm(64)
        self.head = nn.Linear(64, 67, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = x + self.down(self.up(x).tanh())
        x = x + self.back(self.wide(x).tanh()) * self.one.view(65, 64)[:1]
        return self.head(self.norm(x))


def row(cls: Callable[..., Rule], dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    options = {"lr": 1e-2, **options}
    return cls, dtype, options


ROWS = {
    "adamw-8bit": row(optim.AdamW),
    "adamw-4bit-bf16": row(optim.AdamW, BF16, states="4bit", state_rounding="stochastic"),
    "lion-kahan": row(optim.Lion, BF16, states="4bit", master="kahan", lr=1e-3),
    "adams-split8": row(optim.AdamS, BF16, master="split8"),
    "sgd-fp32-master": row(optim.SGD, BF16, states="bf16", master="fp32", momentum=0.9),
    "spam-sparse": row(optim.SPAM, BF16, density=0.25, reset_interval=3, threshold=50.0),
    "stablespam-4bit": row(optim.StableSPAM, BF16, states="4bit", reset_interval=3),
    "adammini": row(optim.AdamMini, states="4bit"),
    "adafactor": row(optim.Adafactor),
    "global-clip": row(optim.AdamW, stabilize=(optim.GlobalClip(0.1), optim.AdaClip())),
    "muon-4bit": row(optim.Muon, BF16, states="4bit"),
    "galore": row(optim.GaLore, rank=8, update_interval=2),
}
SLOW = {
    "adamw-amsgrad": row(optim.AdamW, amsgrad=True, states="fp32"),
    "adamw-4bit-split16": row(optim.AdamW, BF16, states="4bit", master="split16"),
    "scale": row(optim.SCALE, BF16),
    "slimadam": row(optim.SlimAdam),
    "adagn": row(optim.AdamW, stabilize=(optim.AdaGN(), optim.SpikeClip())),
    "stablespam-official": row(optim.StableSPAM, variant="official", reset_interval=3),
    "spam-global-clip": row(optim.SPAM, density=0.25, stabilize=(optim.GlobalClip(0.1),)),
    "adapm": row(optim.AdaPM, rank=4),
    "apollo": row(optim.APOLLO, rank=4, update_interval=2, states="4bit"),
    "fira": row(optim.Fira, rank=4, update_interval=2),
    "swan": row(optim.SWAN),
}
IN_BACKWARD = ["adamw-4bit-bf16", "stablespam-4bit", "muon-4bit"]
REPLICATED = ["adamw-4bit-bf16", "stablespam-4bit", "adafactor", "muon-4bit"]
SAVED = ["adamw-4bit-bf16", "spam-sparse", "stablespam-4bit", "adammini", "muon-4bit"]


def made(name: str, mesh: DeviceMesh | None = None) -> tuple[nn.Module, Rule]:
    """A model, sharded if there is a mesh, and its optimizer."""
    cls, dtype, options = {**ROWS, **SLOW}[name]
    torch.manual_seed(0)
    model = Model().to(dtype)
    if mesh is not None:
        for part in (model.up, model.down, model):
            fully_shard(part, mesh=mesh)
        for part in model.modules():
            if isinstance(part, FSDPModule):  # a mean over three would round
                part.set_gradient_divide_factor(1.0)
                part.set_force_sum_reduction_for_comms(True)
    return model, cls(model.named_parameters(), **options)


def gradients(model: nn.Module, t: int) -> None:
    """Only the first rank has data; in the second step one gradient is infinite."""
    sharded = shards.is_sharded(next(model.parameters()))
    tokens = torch.randint(0, 67, (4, 9), generator=torch.Generator().manual_seed(t))
    loss = nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1).float(), tokens[:, 1:].flatten())
    (loss * (0.0 if sharded and dist.get_rank() else 1.0)).backward()
    if t == 1:
        grad = model.get_parameter("up.weight").grad
        assert grad is not None
        mine, shard = shards.local(grad), shards.shard_of(grad, "")
        first = 0 if shard is None else shard.first
        if first <= 101 < first + len(mine):
            mine[101 - first] = torch.inf


def train(model: nn.Module, opt: Rule, first: int = 0) -> None:
    for t in range(first, STEPS):
        opt.zero_grad()
        gradients(model, t)
        opt.step()


def everything(model: nn.Module, opt: Rule) -> dict[str, Any]:
    """Whole tensors, as plain ones."""
    found: dict[str, Any] = {}
    for name, p in model.named_parameters():
        found[name] = shards.whole(p.detach())
        for key, value in opt.state[p].items():
            found[f"{name}.{key}"] = shards.whole(value) if isinstance(value, Tensor) else value
    return {**found, "steps": opt.param_groups[0]["steps"], **opt.counters()}


def started(name: str, mesh: DeviceMesh | None = None) -> dict[str, Any]:
    model, opt = made(name, mesh)
    train(model, opt)
    return everything(model, opt)


def in_backward(name: str, mesh: DeviceMesh | None = None) -> dict[str, Any]:
    """Steps in backward where there are ranks, ordinary ones where there are none."""
    model, opt = made(name, mesh)
    fused = None if mesh is None else optim.step_in_backward(opt)
    for t in range(STEPS):
        opt.zero_grad()
        gradients(model, 2 * t)  # none of them infinite
        if fused is not None:
            assert all(p.grad is None for p in model.parameters())
        opt.step()
    return everything(model, opt)


def clipped(mesh: DeviceMesh | None = None) -> Tensor:
    """What torch says it has clipped by."""
    model, opt = made("adamw-8bit", mesh)
    gradients(model, 0)
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    opt.step()
    return shards.whole(norm)


def saved(name: str, folder: Path, mesh: DeviceMesh) -> None:
    """Two steps, and a checkpoint."""
    model, opt = made(name, mesh)
    for t in range(2):
        opt.zero_grad()
        gradients(model, t)
        opt.step()
    of_model, of_opt = get_state_dict(model, opt)
    dcp.save({"model": of_model, "optim": of_opt}, checkpoint_id=folder / name, process_group=mesh.get_group())
    lowbit.save_optimizer(opt, folder / f"{name}.safetensors")


def resumed(name: str, folder: Path, mesh: DeviceMesh | None = None, ours: bool = False) -> dict[str, Any]:
    """The other two steps; states are from a file of ours, or from torch's."""
    model, opt = made(name, mesh)
    of_model, of_opt = get_state_dict(model, opt)
    kept = {"model": of_model, "optim": of_opt}
    dcp.load(kept, checkpoint_id=folder / name, no_dist=mesh is None)
    if ours:
        set_model_state_dict(model, of_model)
        lowbit.load_optimizer(opt, folder / f"{name}.safetensors")
    else:
        set_state_dict(model, opt, model_state_dict=of_model, optim_state_dict=of_opt)
    train(model, opt, 2)
    return everything(model, opt)


def ranks(rank: int, world: int, folder: Path) -> None:
    """Three ranks: the first two of them, and all. Four: as two replicas of two shards."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=300),
    )
    found: dict[str, Any] = {}
    if world == 4:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        found["2x2"] = {name: started(name, mesh) for name in REPLICATED}
        every = init_device_mesh("cpu", (4,))
        found["4"] = {name: started(name, every) for name in SLOW}
    else:
        two, three = DeviceMesh("cpu", [0, 1]), DeviceMesh("cpu", [0, 1, 2])
        for mesh in (two, three)[rank == 2 :]:
            its = found[str(mesh.size())] = {name: started(name, mesh) for name in ROWS}
            its |= {f"{name} in backward": in_backward(name, mesh) for name in IN_BACKWARD}
            its["norm"] = clipped(mesh)
            for name in SAVED if mesh is two else ():
                saved(name, folder, mesh)
        dist.barrier()
        found["3"] |= {f"{name} resumed": resumed(name, folder, three) for name in SAVED}
        found["3"]["ours"] = resumed(SAVED[0], folder, three, ours=True)
    torch.save(found, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def spawned(world: int, folder: Path) -> list[dict[str, Any]]:
    """What each rank has found."""
    mp.spawn(ranks, args=(world, folder), nprocs=world)
    return [torch.load(folder / f"{rank}.pt") for rank in range(world)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict[str, Any]]:
    return spawned(3, folder)


@pytest.fixture(scope="module")
def found_slowly(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return spawned(4, tmp_path_factory.mktemp("four"))


def assert_everywhere(alone: dict[str, Any], found: list[dict[str, Any]], name: str, *meshes: str) -> None:
    compared = [its[mesh][name] for its in found for mesh in meshes if mesh in its]
    assert len(compared) >= 3
    for other in compared:
        assert_same(alone, other)


@pytest.mark.parametrize("name", ROWS)
def test_the_bits_of_a_single_process(name: str, found: list[dict[str, Any]]):
    """Weights, codes, scales, scalars, counters: on every rank of two and of three."""
    alone = started(name)
    assert_everywhere(alone, found, name, "2", "3")
    assert alone["skipped_blocks"] + alone["skipped_tensors"] > 0  # the infinite gradient


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_the_bits_of_a_single_process_on_four_ranks(name: str, found_slowly: list[dict[str, Any]]):
    assert_everywhere(started(name), found_slowly, name, "4")


@pytest.mark.slow
@pytest.mark.parametrize("name", REPLICATED)
def test_the_bits_of_a_single_process_on_two_replicas_of_two_shards(name: str, found_slowly: list[dict[str, Any]]):
    assert_everywhere(started(name), found_slowly, name, "2x2")


@pytest.mark.parametrize("name", IN_BACKWARD)
def test_steps_in_backward(name: str, found: list[dict[str, Any]]):
    assert_everywhere(in_backward(name), found, f"{name} in backward", "2", "3")


def test_gradients_are_clipped_by_torch(found: list[dict[str, Any]]):
    for its in found:
        torch.testing.assert_close(its["3"]["norm"], clipped())


@pytest.mark.parametrize("name", SAVED)
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # so says a single process that loads, told or not
def test_a_checkpoint_of_two_ranks_goes_on_with_one_and_with_three(
    name: str, found: list[dict[str, Any]], folder: Path
):
    """By torch.distributed.checkpoint, into optimizers that have made no step."""
    uninterrupted = found[0]["2"][name]
    assert_same(uninterrupted, resumed(name, folder))
    assert_everywhere(uninterrupted, found, f"{name} resumed", "3")


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_safetensors_file_of_two_ranks_goes_on_with_one_and_with_three(found: list[dict[str, Any]], folder: Path):
    uninterrupted = found[0]["2"][SAVED[0]]
    assert_same(uninterrupted, resumed(SAVED[0], folder, ours=True))
    assert_everywhere(uninterrupted, found, "ours", "3")
