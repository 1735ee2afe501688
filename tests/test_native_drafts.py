"""Fused loops: every way to store what they read and write, and every number that must send a block the other way."""

import itertools

import pytest
import torch
from native_cases import libraries, using
from torch import Tensor
from torch.nn import Parameter

from lowbit.optim import AdamW, Rule, StableSPAM

OPTIMIZERS = {
    "adamw": (AdamW, {"weight_decay": 0.1}),
    "amsgrad": (AdamW, {"amsgrad": True}),
    "high-betas": (AdamW, {"betas": (0.2, 0.4)}),  # weights above 1/2: the other side of lerp
    "stablespam": (StableSPAM, {"reset_interval": 2}),
}
STATES = ["fp32", "8bit", "4bit", {"exp_avg": "int8:128", "exp_avg_sq": "sqrt8:128"}, {"exp_avg": "int8"}, "dyn8"]
SHAPES = [(6, 256), (3, 1024), (2, 700)]  # the last: blocks at the end of a row are short, and rows begin anywhere
# Where in a tensor, and what: gradients that are not finite, values that overflow as they are computed or stored.
FAULTS = {
    "none": [],
    "nan": [("grad", 300, float("nan"))],
    "inf": [("grad", 5, float("inf")), ("grad", 255, -float("inf"))],
    "huge gradient": [("grad", 511, 3e38)],
    "huge parameter": [("param", 130, 3.38e38)],
    "parameter": [("param", 700, float("nan"))],
    "zeros": [("grad", slice(0, 600), 0.0)],
    "tiny": [("grad", slice(0, 600), 1e-30), ("grad", 3, 1.0)],
}


def steps(optimizer: str, states: object, shape: tuple[int, int], dtypes: tuple[torch.dtype, ...], fault: str) -> Rule:
    cls, hyper = OPTIMIZERS[optimizer]
    p_dtype, g_dtype, rounding = (*dtypes[:2], "nearest" if len(dtypes) > 2 else "auto")
    generator = torch.Generator().manual_seed(1)
    p = Parameter(torch.randn(shape, generator=generator).to(p_dtype))
    opt = cls([("p", p)], lr=1e-2, states=states, rounding=rounding, **hyper)
    for t in range(3):
        g = 0.1 * torch.randn(shape, generator=generator) ** 3
        for where, at, value in FAULTS[fault] if t == 1 else []:
            with torch.no_grad():
                (g if where == "grad" else p).view(-1)[at] = value
        p.grad = g.to(g_dtype) if g_dtype == p_dtype else None
        if p.grad is None:  # torch wants one dtype; a gradient that replaces it may have another
            p.grad = g.to(p_dtype)
            p.grad.data = g.to(g_dtype)
        opt.step()
    return opt


def bits(opt: Rule) -> dict[str, Tensor]:
    p = opt.param_groups[0]["params"][0]
    tensors = {"p": p.detach(), **{k: v for k, v in opt.state[p].items() if isinstance(v, Tensor)}}
    views = {torch.float32: torch.int32, torch.bfloat16: torch.int16}
    one_nan = {k: torch.where(v.isnan(), torch.nan, v) if v.is_floating_point() else v for k, v in tensors.items()}
    return {k: v.contiguous().view(views.get(v.dtype, v.dtype)) for k, v in one_nan.items()}


FLOAT, HALF = torch.float32, torch.bfloat16
DTYPES = {
    "fp32": (FLOAT, FLOAT),
    "bf16": (HALF, HALF),
    "bf16-nearest": (HALF, HALF, HALF),
    "mixed": (HALF, FLOAT),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("dtypes", DTYPES)
def test_fused_loops_have_the_references_bits(optimizer: str, dtypes: str):
    for states, shape, fault in itertools.product(STATES, SHAPES, FAULTS):
        if states == "dyn8" and (shape != SHAPES[1] or fault != "none"):
            continue
        with using("reference"):
            expected = bits(steps(optimizer, states, shape, DTYPES[dtypes], fault))
        for isa in libraries():
            with using("native", isa):
                found = bits(steps(optimizer, states, shape, DTYPES[dtypes], fault))
            wrong = [key for key, value in expected.items() if not torch.equal(value, found[key])]
            assert not wrong, f"{isa}, {states}, {shape}, {fault}: {wrong} differ"
