"""Is what runs on this GPU what was tested? The bits of codecs and steps, against the reference on the CPU."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import timing
import torch
from gpu_timing import start

import lowbit
from lowbit import backends
from lowbit.optim import AdamS, AdamW, Lion, StableSPAM
from lowbit.rounding import key

SHAPES = [(512, 256), (33, 301), (3, 5461), (300,)]
STEPS = 5
RULES: dict[str, Callable[..., torch.optim.Optimizer]] = {
    f"{rule.__name__} {states}": partial(rule, lr=1e-3, states=states)
    for rule in (AdamW, StableSPAM, AdamS, Lion)
    for states in ("fp32", "8bit", "4bit")
}

Bits = dict[str, torch.Tensor]


@contextmanager
def by(backend: str | None) -> Iterator[None]:
    """Use a backend; None: what users get."""
    before = os.environ.pop("LOWBIT_BACKEND", None)
    try:
        if backend:
            os.environ["LOWBIT_BACKEND"] = backend
        yield
    finally:
        os.environ.pop("LOWBIT_BACKEND", None)
        if before is not None:
            os.environ["LOWBIT_BACKEND"] = before


def coded(name: str, stochastic: bool, device: torch.device) -> Bits:
    """A matrix with values of all magnitudes, encoded and decoded."""
    fmt, generator = lowbit.format(name), torch.Generator().manual_seed(0)
    x = torch.randn(65, 1023, generator=generator) ** 3 * torch.randn(65, 1, generator=generator).exp()
    x = (x if fmt.signed else x.abs()).to(device)
    parts = backends.encode(fmt, x, key(1, 2, 3, 4) if stochastic else None)
    return {**parts, "values": backends.decode(fmt, parts, x.shape[1])}


def stepped(name: str, device: torch.device) -> Bits:
    """A few steps of bf16 parameters, rounded stochastically; one gradient is not finite."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(s, generator=generator).to(device, torch.bfloat16)) for s in SHAPES]
    opt = RULES[name](params)
    for t in range(STEPS):
        for k, p in enumerate(params):
            g = torch.randn(p.shape, generator=generator)
            if t == 2 and k == 0:
                g.view(-1)[7] = torch.inf
            p.grad = g.to(device, torch.bfloat16)
        opt.step()
    found = {f"p{k}": p.detach() for k, p in enumerate(params)}
    for k, p in enumerate(params):
        found |= {f"p{k} {n}": v for n, v in opt.state[p].items() if isinstance(v, torch.Tensor)}
    return found


def verdict(work: Callable[[torch.device], Bits], device: torch.device) -> str:
    """Equal, or what differs first."""
    with by(None):
        found = {name: tensor.cpu() for name, tensor in work(device).items()}
    with by("reference"):
        expected = work(torch.device("cpu"))
    for name, tensor in expected.items():
        other = found[name]
        if tensor.dtype != other.dtype or tensor.shape != other.shape:
            return f"{name}: {other.dtype} {tuple(other.shape)}, not {tensor.dtype} {tuple(tensor.shape)}"
        a, b = (x.contiguous().flatten().view(torch.uint8) for x in (tensor, other))
        if not torch.equal(a, b):
            values = tensor.flatten() != other.flatten()
            return f"{name}: {int(values.sum())} of {values.numel()} values differ"
    return "equal"


def check(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Every format, and steps of a few optimizers."""
    works: dict[str, Callable[[torch.device], Bits]] = {}
    for name in lowbit.formats():
        works[f"codec {name}"] = partial(coded, name, False)
        works[f"codec {name}, stochastic"] = partial(coded, name, True)
    works |= {f"step {name}": partial(stepped, name) for name in RULES}
    results = start(args, device)
    with by(None):
        backend = backends.choose(device).__name__.rpartition(".")[2]
    verdicts = {name: verdict(work, device) for name, work in works.items()}
    made = {"title": "check", "rounds": 1, "cases": {}, "failed": {}, "verdicts": verdicts, "backend": backend}
    timing.add(results, made, args)
    return results
