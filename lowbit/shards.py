"""Tensors whose rows lie on several ranks: which rows this rank has, and numbers over all of them.

A sharded tensor is torch's `DTensor`. Blocks lie in rows, so one that is cut along dimension 0 is cut between blocks:
a rank steps the rows it has as if they were the tensor, but for three things. Random bits go by the number of the row
in the whole tensor; what is measured needs all ranks; and a rank without any row takes part in that all the same.

Numbers travel as bits: what a rank has not is zeros, and bits are added as integers, or their largest taken. So they
arrive as they were sent, and every rank folds the same numbers in the same order.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

WHOLE = 1 << 33  # values in a tensor's numbering from which on its rows cannot be numbered from a shard's first


@dataclass(frozen=True, eq=False)
class Shard:
    """The rows of a tensor that this rank has: so many from number `first` on, of `total`.

    `groups` are those over which rows are cut, one for each dimension of the mesh that cuts; none if each rank has all.
    `leads`: of the ranks that have rows of the same tensor, and not the same rows, this is the first.
    """

    first: int
    rows: int
    total: int
    mesh: Any
    placements: tuple[Any, ...]
    groups: tuple[Any, ...]
    leads: bool

    def take(self, whole: Tensor) -> Tensor:
        """The rows that this rank has of a whole tensor."""
        return whole[self.first : self.first + self.rows]

    def spread(self, own: Tensor) -> Tensor:
        """A tensor with as many rows, of which this rank has `own`, contiguous."""
        from torch.distributed.tensor import DTensor

        shape = torch.Size((self.total, *own.shape[1:]))
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(own, self.mesh, self.placements, run_check=False, shape=shape, stride=stride)

    def placed(self, own: Tensor) -> Tensor:
        """Numbers of own rows among zeros for all others: int64 or int32 bits, to be added or compared."""
        bits = torch.int64 if own.dtype == torch.float64 else torch.int32
        whole = torch.zeros((self.total, *own.shape[1:]), dtype=bits, device=own.device)
        self.take(whole).copy_(own.contiguous().view(bits))
        return whole


Together = tuple[Shard, Tensor, Literal["sum", "max"]]


def is_sharded(x: Tensor) -> bool:
    """Whether a tensor is a DTensor."""
    return hasattr(x, "device_mesh")


def local(x: Tensor) -> Tensor:
    """What this rank has of a tensor: plain, and the same memory."""
    return x._local_tensor if is_sharded(x) else x  # type: ignore[attr-defined]


def whole(x: Tensor) -> Tensor:
    """All rows of a tensor, gathered if need be; every rank must ask."""
    if x.dtype == torch.int16 and (shard := shard_of(x, "a tensor")) is not None:  # collectives know no such numbers
        octets = shard.spread(local(x).unsqueeze(-1).view(torch.uint8))
        return octets.full_tensor().view(torch.int16).squeeze(-1)  # type: ignore[attr-defined]
    return x.full_tensor() if is_sharded(x) else x  # type: ignore[attr-defined]


def shard_of(p: Tensor, label: str) -> Shard | None:
    """Which rows of a parameter this rank has; None for a plain tensor.

    Raises `ValueError` for one that is not cut between rows.
    """
    if not is_sharded(p):
        return None
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, placements = p.device_mesh, tuple(p.placements)  # type: ignore[attr-defined]
    following = 1  # parts into which later dimensions of the mesh cut rows
    for i, placement in reversed([*enumerate(placements)]):
        if placement.is_partial():
            raise ValueError(f"{label}: its placement {placement} is a sum that is not made yet; redistribute it first")
        if not placement.is_replicate() and getattr(placement, "dim", None) != 0:
            raise ValueError(
                f"{label}: it is cut along dimension {getattr(placement, 'dim', '?')} ({placement}), and states lie in "
                "blocks along rows: shard dimension 0, as fully_shard and ColwiseParallel do, or keep this parameter "
                "whole (Replicate), or give it to another optimizer"
            )
        if getattr(placement, "split_factor", following) != following:
            raise ValueError(
                f"{label}: the rows that a rank has of it do not follow each other ({placements}); apply tensor "
                "parallelism first and then fully_shard, on two dimensions of one mesh"
            )
        following *= 1 if placement.is_replicate() else mesh.size(i)
    cutting = [i for i, placement in enumerate(placements) if not placement.is_replicate()]
    shape, offset = compute_local_shape_and_global_offset(p.shape, mesh, placements)
    mine = local(p)
    if tuple(shape) != tuple(mine.shape) or not mine.is_contiguous():
        raise ValueError(
            f"{label}: this rank has {tuple(mine.shape)} of {tuple(p.shape)}, strides {mine.stride()}, where "
            f"{placements} make it {tuple(shape)}, contiguous; build the optimizer after any change of the model"
        )
    return Shard(
        first=min(offset[0], p.shape[0]) if offset else 0,
        rows=mine.shape[0] if mine.dim() else 1,
        total=p.shape[0] if p.dim() else 1,
        mesh=mesh,
        placements=placements,
        groups=tuple(mesh.get_group(i) for i in cutting),
        leads=all(mesh.get_local_rank(i) == 0 for i in cutting),
    )


def bring_together(asked: Iterable[Together]) -> None:
    """Add tensors over the ranks that have other rows, or take the largest, in place.

    One collective for all tensors of a kind; every rank must ask the same, in the same order.
    """
    kinds: dict[Any, list[Together]] = defaultdict(list)
    for one in asked:
        shard, x, how = one
        if shard.groups:
            kinds[shard.groups, shard.mesh.device_type, x.dtype, how].append(one)
    for (groups, device, _, how), alike in kinds.items():
        flat = torch.cat([x.flatten() for _, x, _ in alike]).to(device)  # a parameter may be offloaded, its group not
        for group in groups:
            dist.all_reduce(flat, dist.ReduceOp.SUM if how == "sum" else dist.ReduceOp.MAX, group=group)
        for (_, x, _), made in zip(alike, flat.split([x.numel() for _, x, _ in alike]), strict=True):
            x.copy_(made.view(x.shape))


def add_up(shards: Sequence[Shard], counts: list[Tensor]) -> None:
    """Add counts [2] over ranks, in place: of each rank's blocks, and of tensors, which all ranks have counted."""
    for shard, count in zip(shards, counts, strict=True):
        if not shard.leads:
            count[1] = 0
    bring_together((shard, count, "sum") for shard, count in zip(shards, counts, strict=True))
