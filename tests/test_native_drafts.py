"""Fused loops: every way to store what they read and write, and every number that must send a block the other way."""

import itertools
import math

import pytest
import torch
from native_cases import libraries, using
from torch import Tensor
from torch.nn import Parameter

import lowbit
from lowbit.native.tables import table
from lowbit.optim import AdamW, Rule, StableSPAM

OPTIMIZERS = {
    "adamw": (AdamW, {"weight_decay": 0.1}),
    "amsgrad": (AdamW, {"amsgrad": True}),
    "high-betas": (AdamW, {"betas": (0.2, 0.4)}),  # weights above 1/2: the other side of lerp
    "stablespam": (StableSPAM, {"reset_interval": 2}),
}
STATES = ["fp32", "8bit", "4bit", {"exp_avg": "int8:128", "exp_avg_sq": "sqrt8:128"}, {"exp_avg": "int8"}, "dyn8"]
# With fewer than 4,096 values states are fp32. The others: blocks at the end of a row are short, made of 32s or not, and
# have one scale or two; rows begin anywhere.
SHAPES = [(16, 256), (4, 1024), (6, 700), (6, 736), (7, 608), (5, 857)]
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
        if fault != "none" and shape != SHAPES[1 + list(FAULTS).index(fault) % 5]:
            continue
        with using("reference"):
            expected = bits(steps(optimizer, states, shape, DTYPES[dtypes], fault))
        assert states == "fp32" or expected["exp_avg"].dtype == torch.uint8
        for isa in libraries():
            with using("native", isa):
                found = bits(steps(optimizer, states, shape, DTYPES[dtypes], fault))
            wrong = [key for key, value in expected.items() if not torch.equal(value, found[key])]
            assert not wrong, f"{isa}, {states}, {shape}, {fault}: {wrong} differ"


# ---- a norm that the sweep before has found out

# What a first sweep cannot be sure of: squares that lose bits in units of 1, or in the final unit; spikes.
SIZES = [1e-38, 1e-21, 1e-12, 1e6, 1e18, 1e30]
SPIKES = {
    "none": [],
    "few": [(3, 50.0), (700, -3.0)],
    "faint": [(5, 1e-25), (900, 1e-19)],
    "zeros": [(slice(0, 600), 0.0)],
}


@pytest.mark.parametrize(
    ("shape", "dtype"), [((7, 1024), FLOAT), ((1, 4096), HALF), ((6, 700), FLOAT), ((40, 24), HALF)]
)
def test_a_norm_without_a_sweep_has_the_references_bits(shape: tuple[int, int], dtype: torch.dtype):
    for size, spike in itertools.product(SIZES, SPIKES):
        variant = "official" if spike == "few" else "paper"
        generator = torch.Generator().manual_seed(2)
        start = torch.randn(shape, generator=generator)
        grads = [size * torch.randn(shape, generator=generator) for _ in range(3)]
        for at, factor in SPIKES[spike]:
            grads[1].view(-1)[at] *= factor

        def run(start: Tensor = start, grads: list[Tensor] = grads, variant: str = variant) -> dict[str, Tensor]:
            p = Parameter(start.to(dtype, copy=True))
            opt = StableSPAM([("p", p)], lr=1e-2, states="8bit", variant=variant)
            for g in grads:
                p.grad = g.to(dtype)
                opt.step()
            return bits(opt)

        with using("reference"):
            expected = run()
        for isa in libraries():
            with using("native", isa, 3):
                found = run()
            wrong = [key for key, value in expected.items() if not torch.equal(value, found[key])]
            assert not wrong, f"{isa}, {size}, {spike}, {variant}: {wrong} differ"


# ---- codes by arithmetic


def moments(g: Tensor, isa: str) -> tuple[Tensor, Tensor]:
    """The codes of m = g and v = g * g, both in dynamic maps; g has blocks of 256 with a largest magnitude of 1."""
    p = Parameter(torch.zeros_like(g))
    opt = AdamW([("p", p)], states="dyn8", betas=(0.0, 0.0))
    p.grad = g
    with using("native", isa):
        opt.step()
    assert bool((opt.state[p]["exp_avg_scale"] == 1).all())
    return opt.state[p]["exp_avg"], opt.state[p]["exp_avg_sq"]


def in_blocks(values: Tensor) -> Tensor:
    """With a 1 in each row of 256."""
    rows = max(16, -(-len(values) // 255))  # smaller tensors have states in fp32
    padded = torch.cat([values, torch.zeros(rows * 255 - len(values))]).view(rows, 255)
    return torch.cat([padded, torch.ones(rows, 1)], 1).contiguous()


def codes(name: str, values: Tensor) -> Tensor:
    """How many thresholds are below each value; of what is above 0, at least one where the format has no sign."""
    fmt = lowbit.format(name)
    found = torch.searchsorted(torch.tensor(fmt.thresholds), values)
    return (found if fmt.signed else torch.where(values > 0, found.clamp(min=1), found)).to(torch.uint8)


def around(numbers: list[float], ulps: int) -> Tensor:
    bits = torch.tensor(numbers).view(torch.int32).unsqueeze(1) + torch.arange(-ulps, ulps + 1, dtype=torch.int32)
    return bits.view(torch.float32).flatten().clamp(-1, 1)


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_codes_by_arithmetic_are_right_on_both_sides_of_every_threshold(isa: str):
    if isa not in libraries():
        pytest.skip(f"this CPU has no {isa}")
    signed, unsigned = (list(lowbit.format(name).thresholds) for name in ("dyn8", "udyn8"))
    for values in (around(signed, 40), around([math.sqrt(t) for t in unsigned], 40), torch.tensor([0.0, -0.0, 1e-30])):
        g = in_blocks(values)
        m, v = moments(g, isa)
        assert torch.equal(m, codes("dyn8", g))
        assert torch.equal(v, codes("udyn8", g * g))


@pytest.mark.slow
def test_codes_by_arithmetic_are_right_for_every_number():
    for sign, low in itertools.product((1.0, -1.0), range(101, 127)):  # binades from 2**-26 to 1
        values = sign * torch.arange(low << 23, (low + 1) << 23, dtype=torch.int32).view(torch.float32)
        g = in_blocks(values)
        m, v = moments(g, list(libraries())[-1])
        assert torch.equal(m, codes("dyn8", g)), low
        assert torch.equal(v, codes("udyn8", g * g)), low


def test_the_dynamic_maps_are_cut_into_pieces_and_other_codebooks_are_not():
    cut = {name: table(fmt).pieces for name in lowbit.formats() if (fmt := lowbit.format(name)).kind == "codebook"}
    assert {name for name, pieces in cut.items() if pieces} == {"dyn8", "udyn8"}
    assert all(0 < table(lowbit.format(name)).piece_near < 1e-3 for name in ("dyn8", "udyn8"))
