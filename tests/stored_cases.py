"""What steps of stored weights are compared on: dimensions, settings that cover every pair of their values, a run."""

import zlib
from typing import Any, NamedTuple

import native_cases
import torch
from native_cases import OPTIMIZERS, SHAPES, AsAsked, pairwise, using
from torch import Tensor
from torch.nn import Parameter

from lowbit.nn.stored import StoredWeight

STORES = ["int8", "int4", "nf4", "mxfp4", "nvfp4", "split", "split8"]
OTHERS = ["int8:2", "int8:256", "int4:16", "nf4:128", "e2m1", "mxfp4-even", "mxfp8", "e4m3:64", "bnb-fp4", "nvfp4-te"]


def weight(store: str, shape: tuple[int, ...] = (9, 600), seed: int = 0, dtype=torch.float32) -> Parameter:
    value = 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return Parameter(StoredWeight.of(value.to(dtype), store))


def parts(p: Parameter) -> dict[str, Tensor]:
    return {name: part.clone() for name, part in p.parts.items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8)) for name in a)


class Setting(NamedTuple):
    optimizer: str
    store: str
    states: str
    p: str
    g: str
    rounding: str
    state_rounding: str
    shapes: str
    threads: int
    wrong: str

    def __str__(self) -> str:
        return "-".join(map(str, self))


DIMENSIONS = Setting(
    optimizer=list(OPTIMIZERS), store=[*STORES, *OTHERS],
    states=["fp32", "bf16", "8bit", "4bit", "int8:64", "dyn4", "solo4"], p=["f32", "bf16"], g=["f32", "bf16"],
    rounding=["auto", "nearest"], state_rounding=["nearest", "stochastic"], shapes=list(SHAPES), threads=[1, 2, 7],
    wrong=["clean", "nan", "huge", "broken"],
)  # fmt: skip
COVERING = [Setting(*row) for row in pairwise(DIMENSIONS)]
# What fused loops take, with every store.
DRAFTED = [
    Setting("adamw", store, states, p, g, "auto", "nearest", "large", 2, "clean")
    for k, store in enumerate([*STORES, *OTHERS])
    for states, p, g in [[("8bit", "f32", "f32"), ("4bit", "bf16", "bf16")][k % 2]]
]


def _few() -> list[Setting]:
    """The fused ones, and the first settings that have a value of some dimension that none before them has."""
    chosen, seen = list(DRAFTED), {pair for s in DRAFTED for pair in enumerate(s)}
    for s in COVERING:
        if s.shapes != "large" and (new := set(enumerate(s)) - seen):
            chosen.append(s)
            seen |= new
    return chosen


FEW = _few()
REST = [s for s in COVERING if s not in FEW]


def run(s: Setting, backend: str, isa: str = "", steps: int = 4, device: str = "cpu") -> dict[str, Any]:
    """Everything there is after a few steps."""
    own = native_cases.Setting(
        s.optimizer, "int8", "sqrt8", 0, s.p, s.g, s.rounding, s.state_rounding, s.shapes, s.threads, s.wrong
    )
    of, seed = OPTIMIZERS[s.optimizer], zlib.crc32(str(s._replace(threads=0)).encode())
    generator = torch.Generator().manual_seed(seed)
    named = []
    for k, (shape, _, _) in enumerate(SHAPES[s.shapes]):
        x = 0.1 * torch.randn(shape, generator=generator)
        if s.wrong == "broken" and k % 2 == 0 and x.numel():
            x.view(-1)[x.numel() // 2] = torch.nan
        named.append((f"p{k}", Parameter(StoredWeight.of(x.to(native_cases.DTYPES[s.p]).to(device), s.store))))
    with using(backend, isa, s.threads if backend == "native" else 1):
        params: Any = [{"params": named[::2]}, {"params": named[1::2], "amsgrad": True}] if of.split else named
        options = {"rounding": s.rounding, "state_rounding": s.state_rounding, "seed": seed, "states": s.states}
        opt = of.rule(params, **of.hyper, **options, policy=AsAsked())
        opt.advised = True  # of a learning rate below the resolution
        for t in range(1, steps + 1):
            native_cases.feed(own, named, t)
            opt.step()
    found: dict[str, Any] = {"counters": opt.counters()}
    for name, p in named:
        for states, items in (("", p.parts), ("state ", opt.state[p])):
            for k, x in items.items():
                found[f"{name} {states}{k}"] = x.cpu() if isinstance(x, Tensor) else x
    return found
