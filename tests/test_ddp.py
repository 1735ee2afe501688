"""Under DistributedDataParallel an optimizer does what it does alone: gradients are the only thing that is shared."""

import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lowbit.optim import StableSPAM


def run(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 80), nn.Tanh(), nn.Linear(80, 64)).bfloat16()
    wrapped = DistributedDataParallel(model) if world > 1 else model
    opt = StableSPAM(wrapped.named_parameters(), lr=1e-2, states="4bit", reset_interval=3)
    for step in range(5):
        x = torch.randn(16, 64, generator=torch.Generator().manual_seed(step)).bfloat16()  # the same on every rank
        opt.zero_grad()
        wrapped(x).square().mean().backward()
        opt.step()
    codes = [state["exp_avg"] for state in opt.state.values()]
    torch.save({"p": list(model.parameters()), "codes": codes}, Path(folder) / f"{world}-{rank}.pt")
    if world > 1:
        dist.destroy_process_group()


def test_two_ranks_equal_one_process_bit_for_bit(tmp_path: Path):
    """Names lose DDP's prefix, so stochastic rounding draws the same bits wrapped and bare."""
    run(0, 1, str(tmp_path))
    os.environ.setdefault("MASTER_ADDR", "localhost")
    mp.spawn(run, args=(2, str(tmp_path)), nprocs=2)
    alone, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("1-0", "2-0", "2-1"))
    for kind in ("p", "codes"):
        for a, b, c in zip(alone[kind], first[kind], second[kind], strict=True):
            assert torch.equal(a, b) and torch.equal(b, c)
