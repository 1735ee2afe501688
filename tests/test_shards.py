"""Shards, one rank after the other in one process: what is cut, what is drawn, what is refused."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import CASES, SHAPES, Case, assert_same, dequantized, gradient, parameters
from cases import one_thread as one_thread
from cuda_cases import needs_compiler, stepping
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard
from torch.nn import Parameter
from torch.testing._internal.distributed.fake_pg import FakeStore

from lowbit import Policy, shards
from lowbit.optim import AdamMini, AdamW, GlobalClip, Lion, Muon, Rule, StableSPAM

BF16 = torch.bfloat16
NUMBER = itertools.count()
# Fewer rows than ranks, an odd number of values before a shard, many ranks with no row.
CUT = [*SHAPES, (50,), (7, 33), (1, 4160)]


def each_rank(world: int) -> Iterator[DeviceMesh]:
    """This process as one rank after the other; nobody answers, and nobody is missed."""
    for rank in range(world):
        dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
        try:
            # A name of its own: torch remembers meshes that are equal, and the rank that it was.
            yield init_device_mesh("cpu", (world,), mesh_dim_names=(f"ranks{next(NUMBER)}",))
        finally:
            dist.destroy_process_group()


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """The first of eight ranks."""
    ranks = each_rank(8)
    yield next(ranks)
    ranks.close()


def cut(x: Tensor, mesh: DeviceMesh, *placements: Any) -> Tensor:
    return distribute_tensor(x, mesh, placements or [Shard(0)], src_data_rank=None)


def trained(build: Any, dtype: torch.dtype, mesh: DeviceMesh | None = None) -> dict[str, Any]:
    """Every tensor after three steps: what this rank has, and which rows those are."""
    named = parameters(CUT, dtype)
    if mesh is not None:
        named = [(name, Parameter(cut(p.detach(), mesh))) for name, p in named]
    opt: Rule = build(named)
    for t in range(1, 4):
        for k, (_, p) in enumerate(named):
            g = gradient(tuple(p.shape), t, k, dtype)
            g[-1] = torch.inf if t == 2 else g[-1]
            p.grad = g if mesh is None else cut(g, mesh)
        opt.step()
    found: dict[str, Any] = {}
    for name, p in named:
        for key, x in {"p": p.detach(), **opt.state[p]}.items():
            found[f"{name}.{key}"] = x
    return found


def assert_cut(build: Any, dtype: torch.dtype, world: int) -> None:
    whole = trained(build, dtype)
    lost = {k: torch.zeros_like(x) for k, x in whole.items() if k.endswith(".skipped")}
    for mesh in each_rank(world):
        for key, x in trained(build, dtype, mesh).items():
            if key in lost:
                lost[key] += x
            elif isinstance(x, Tensor) and shards.is_sharded(x):
                shard = shards.shard_of(x, key)
                assert shard is not None and x.shape == whole[key].shape
                assert_same({key: shards.local(x)}, {key: shard.take(whole[key])})
            else:
                assert_same({key: x}, {key: whole[key]})
    for key, count in lost.items():
        assert torch.equal(count, whole[key]), key


ELEMENTWISE = [case for case in CASES if case.unit == "block" and case.sweeps == 1]
WAYS = {
    "fp32": (torch.float32, {}),
    "stochastic": (BF16, {"state_rounding": "stochastic"}),
    "split8": (BF16, {"master": "split8"}),
    "fp16-kahan": (torch.float16, {"master": "kahan"}),
}


@pytest.mark.parametrize("world", [2, 8])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", ELEMENTWISE, ids=str)
def test_rows_are_stepped_where_they_lie(case: Case, way: str, world: int):
    """Any rule of values: the bits of a single process, rounding included, whatever rows a rank has."""
    dtype, options = WAYS[way]
    assert_cut(lambda named: case.build(named, states="4bit" if world == 8 else "8bit", **options), dtype, world)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", [case for case in CASES if case not in ELEMENTWISE and not case.mixes], ids=str)
def test_what_is_measured_is_folded_as_by_one_process(case: Case, way: str):
    """One rank, which takes the way of several: measurements in torch, updates in kernels. Ranks meet in test_fsdp."""
    dtype, options = WAYS[way]
    assert_cut(lambda named: case.build(named, states="4bit", **options), dtype, 1)


@needs_compiler
def test_cuda_kernels_draw_by_the_number_in_the_whole_tensor():
    with stepping() as device:
        assert_cut(lambda named: AdamW(named, lr=1e-2, states="4bit", state_rounding="stochastic"), BF16, 3)
    assert device.launched["update"]


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("optimizer", [AdamMini, StableSPAM])
def test_cuda_kernels_update_what_is_measured_in_torch(optimizer: type[Rule]):
    with stepping() as device:
        assert_cut(lambda named: optimizer(named, lr=1e-2, states="4bit"), BF16, 1)
    assert device.launched["update"]


# ---- formats, and what there is to say


def test_formats_go_by_the_whole_shape(mesh: DeviceMesh):
    p = Parameter(cut(torch.randn(64, 64), mesh))  # 512 values here would not be compressed
    opt = AdamW([("a.weight", p)], lr=1e-3)
    whole = AdamW([("a.weight", Parameter(torch.randn(64, 64)))], lr=1e-3)
    assert opt.explain().rows[0].formats == whole.explain().rows[0].formats
    assert opt.state[p]["exp_avg"].dtype == torch.uint8
    assert shards.local(opt.state[p]["exp_avg"]).shape == (8, 64)
    small = sum(x.nbytes for k, x in opt.state[p].items() if isinstance(x, Tensor) and not shards.is_sharded(x))
    assert opt.state_bytes() == small + (whole.state_bytes() - small) // 8
    assert opt.explain().state_bytes == whole.state_bytes()


def test_what_is_not_cut_between_rows_is_refused(mesh: DeviceMesh):
    partial = DTensor.from_local(torch.randn(64, 64), mesh, [Partial()], run_check=False)
    strided = DTensor.from_local(torch.randn(8, 64), mesh, [_StridedShard(0, split_factor=2)], run_check=False)
    for x, reason in (
        (cut(torch.randn(64, 64), mesh, Shard(1)), "cut along dimension 1"),
        (partial, "a sum that is not made yet"),
        (strided, "do not follow each other"),
    ):
        with pytest.raises(ValueError, match=f"^a.weight: .*{reason}"):
            AdamW([("a.weight", Parameter(x))], lr=1e-3)


def test_a_gradient_that_lies_otherwise_is_refused(mesh: DeviceMesh):
    p = Parameter(cut(torch.randn(64, 64), mesh))
    opt = Lion([("a.weight", p)], lr=1e-3)
    before = shards.local(p).clone()
    p.grad = cut(torch.randn(64, 64), mesh, Replicate())
    with pytest.raises(ValueError, match="the gradient is placed"):
        opt.step()
    assert torch.equal(shards.local(p), before) and opt.param_groups[0]["steps"] == 0


def test_a_clip_over_whole_matrices_is_refused(mesh: DeviceMesh):
    p = Parameter(cut(torch.randn(64, 64), mesh))
    with pytest.raises(ValueError, match="clip_grad_norm_"):
        Muon([("a.weight", p)], lr=1e-3, stabilize=(GlobalClip(1.0),))
    StableSPAM([("a.weight", p)], lr=1e-3, stabilize=(GlobalClip(1.0),))


def test_every_rank_may_have_all_of_it(mesh: DeviceMesh):
    """Replicate, as DDP over a mesh has it: states too."""
    whole = Parameter(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)))
    p = Parameter(cut(whole.detach().clone(), mesh, Replicate()))
    for param in (p, whole):
        opt = StableSPAM([("a.weight", param)], lr=1e-3, states="4bit")
        g = gradient((64, 64), 1)
        param.grad = cut(g, mesh, Replicate()) if param is p else g
        opt.step()
    assert torch.equal(shards.local(p), whole)


def test_a_single_process_checkpoint_is_loaded_by_rows_and_converted(mesh: DeviceMesh):
    params = [Parameter(torch.randn(64, 64)), Parameter(torch.randn(70))]
    whole = AdamW([(f"p{k}", p) for k, p in enumerate(params)], lr=1e-3, policy=Policy([("p1", "fp32")]))
    for k, p in enumerate(params):
        p.grad = gradient(tuple(p.shape), 1, k)
    whole.step()
    opt = AdamW([(f"p{k}", Parameter(cut(p.detach(), mesh))) for k, p in enumerate(params)], lr=1e-3)
    opt.load_state_dict(whole.state_dict())
    converted = AdamW([(f"p{k}", p) for k, p in enumerate(opt.param_groups[0]["params"])], lr=1e-3, states="fp32")
    converted.load_state_dict(whole.state_dict())
    for p, mine in zip(params, opt.param_groups[0]["params"], strict=True):
        for key, x in whole.state[p].items():
            found = opt.state[mine][key]
            cut_here = isinstance(found, Tensor) and shards.is_sharded(found)
            assert_same(
                {key: shards.local(found) if cut_here else found}, {key: x[: -(-len(p) // 8)] if cut_here else x}
            )
    mine = opt.param_groups[0]["params"][0]
    assert torch.equal(shards.local(converted.state[mine]["exp_avg"]), dequantized(whole, params[0], "exp_avg")[:8])
