"""16-bit parameters: written stochastically without bias, or with a companion that keeps the low bits."""

import pytest
import torch
from cases import assert_same, every_case, everything, gradient, parameters, train
from cases import one_thread as one_thread
from native_cases import every_isa, need, using
from torch import Tensor
from torch.nn import Parameter

from lowbit import masters
from lowbit.optim import SGD, AdamW, StableSPAM
from lowbit.rounding import bits16, key

HALVES = [torch.bfloat16, torch.float16]
every_half = pytest.mark.parametrize("dtype", HALVES, ids=str)
every_master = pytest.mark.parametrize("master", ["split8", "split16", "kahan", "fp32"])
BYTES = {"none": 0, "split8": 1, "split16": 2, "kahan": 2, "fp32": 4}


def numbers(dtype: torch.dtype, count: int = 1 << 16) -> Tensor:
    """fp32 numbers in the format's range: every binade, subnormals, zeros, powers of two and ties."""
    generator = torch.Generator().manual_seed(0)
    low, high = (-130, 126) if dtype == torch.bfloat16 else (-23, 15)
    x = torch.ldexp(
        1 + torch.rand(count, generator=generator, dtype=torch.float64),
        torch.randint(low, high, (count,), generator=generator),
    )
    x[:100] = torch.ldexp(torch.ones(100, dtype=torch.float64), torch.arange(100) % (high - low) + low)
    x[100:200] *= 0
    x[200:400] = x[200:400].to(dtype).double() * (1 + 2.0**-9)
    return (x * (torch.rand(count, generator=generator) - 0.5).sign()).float()


# --- the schemes ---------------------------------------------------------------------------------------------------


@every_half
@every_master
def test_what_is_stored_comes_back(dtype: torch.dtype, master: str):
    """The nearest parameter, and the rest: exactly, to 1/254 of half an ulp, or to its own 8 or 11 bits."""
    x = numbers(dtype)
    p, rest = masters.store(master, x, dtype, None)
    assert rest is not None and rest.dtype == masters.companion_dtype(master, dtype)
    ulp = (torch.nextafter(p.abs(), torch.tensor(float("inf"), dtype=dtype)).double() - p.abs().double()).abs()
    assert ((p.double() - x.double()).abs() <= ulp / 2).all()
    if not (master == "split16" and dtype == torch.bfloat16):  # there ties go up, so that the rest fits
        assert torch.equal(p, x.to(dtype))
    back = masters.load(master, p, rest)
    assert back.dtype == torch.float32
    tolerance = {"split8": ulp / 2 / 254 * 1.01, "kahan": ulp * torch.finfo(dtype).eps / 4}.get(master, 0 * ulp)
    if dtype == torch.float16 and master == "split16":
        tolerance = ulp * 2.0**-14
    least = {torch.bfloat16: 2.0**-134, torch.float16: 2.0**-25}[dtype] if master == "kahan" else 1e-44
    assert ((back.double() - x.double()).abs() <= tolerance + least).all()


def test_split16_is_the_bits_of_fp32():
    raw = torch.randint(-(2**31), 2**31, (1 << 18,), dtype=torch.int64, generator=torch.Generator().manual_seed(0))
    x = raw.to(torch.int32).view(torch.float32)
    x = x[x.isfinite() & (x.abs() < 3.3e38)]
    p, rest = masters.store("split16", x, torch.bfloat16, None)
    assert torch.equal(masters.load("split16", p, rest).view(torch.int32), x.view(torch.int32))


@every_half
@every_isa
@pytest.mark.parametrize(("master", "apart"), [("split8", 1), ("split16", 255)])
@pytest.mark.parametrize("moved", [False, True])
def test_every_step_of_half_an_ulp_has_the_references_bits(
    dtype: torch.dtype, isa: str, master: str, apart: int, moved: bool
):
    """Each code of split8, some of split16, beside every exponent: loaded, perhaps moved by some ulps, stored again."""
    need(isa)
    ps = torch.arange(1 << 16).short()[::29].view(dtype)
    whole = ps[:, None].expand(-1, 256).contiguous()
    noise = torch.rand(whole.shape, generator=torch.Generator().manual_seed(1)) - 0.5
    grad = (noise * whole.float().abs() * 2.0**-6 * moved).to(dtype)
    found = {}
    for backend in ("reference", "native"):
        p = Parameter(whole.clone())
        p.grad = torch.zeros_like(p)
        opt = SGD([("w", p)], lr=1.0, master=master)
        opt.step()
        opt.state[p]["master"].copy_(torch.arange(-128, 128) * apart)
        p.grad = grad
        with using(backend, isa if backend == "native" else ""):
            opt.step()
        found[backend] = p.detach().view(torch.int16), opt.state[p]["master"]
    for own, expected in zip(found["native"], found["reference"], strict=True):
        assert torch.equal(own, expected)


@every_half
@every_master
@pytest.mark.parametrize("what", ["zero", "minus zero", "small", "large", "negative"])
def test_what_somebody_else_wrote_counts(dtype: torch.dtype, master: str, what: str):
    """Weights loaded, pruned or scaled after the last step: off by half an ulp at most, and never a NaN."""
    x = numbers(dtype)[400:]
    x = x[(x.abs() < 100) & (x.abs() > 0.01)]
    p, rest = masters.store(master, x, dtype, None)
    change = {
        "zero": 0.0 * p.abs(),
        "minus zero": -0.0 * p.abs(),
        "small": p * 2.0**-9,
        "large": p * 100,
        "negative": -p,
    }
    new = change[what].to(dtype)
    back = masters.load(master, new, rest)
    least = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    half_ulp = (torch.frexp(new.float())[0].abs() > 0) * torch.ldexp(
        torch.ones(len(new)), torch.frexp(new.float())[1] - 1
    ).float()
    half_ulp = (half_ulp * torch.finfo(dtype).eps / 2).clamp(min=least / 2)
    assert back.isfinite().all()
    assert ((back - new.float()).abs() <= half_ulp).all()


# --- in an optimizer -----------------------------------------------------------------------------------------------


def trained(dtype: torch.dtype, steps: int = 40, **options) -> tuple[AdamW, list]:
    named = [(n, Parameter(p.detach().bfloat16().to(dtype))) for n, p in parameters([(64, 65), (50,)])]
    opt = AdamW(named, lr=1e-3, states="fp32", **options)
    for t in range(1, steps + 1):
        for n, p in named:
            p.grad = gradient(tuple(p.shape), t, int(n[1]), torch.bfloat16).to(dtype)
        opt.step()
    return opt, named


@every_case
@pytest.mark.parametrize("states", ["fp32", "4bit"])
def test_split16_and_fp32_masters_of_bf16_are_the_fp32_trajectory(case, states: str):
    """Bit for bit: parameter plus companion, moments, scalars."""
    shapes = [(33, 300), (50,), (3, 4, 5)]
    exact = [(n, Parameter(p.detach().float())) for n, p in parameters(shapes, torch.bfloat16)]
    full = case.build(exact, states=states)
    for t in range(1, 13):
        for n, p in exact:
            p.grad = gradient(tuple(p.shape), t, int(n[1]), torch.bfloat16).float()
        full.step()
    for master in ("split16", "fp32"):
        named = parameters(shapes, torch.bfloat16)
        opt = case.build(named, states=states, master=master)
        train(opt, named, range(1, 13))
        for (_, p), (_, q) in zip(named, exact, strict=True):
            assert torch.equal(masters.load(master, p.detach(), opt.state[p]["master"]), q.detach())
            state = {k: v for k, v in opt.state[p].items() if k != "master"}
            assert_same(state, dict(full.state[q]))


@pytest.mark.parametrize("master, tolerance", [("split8", 1e-4), ("kahan", 1e-4), ("none", 2e-2)])
def test_how_close_the_others_come(master: str, tolerance: float):
    exact, half = trained(torch.float32)[1], trained(torch.bfloat16, master=master)
    worst = nearest = 0.0
    for (_, q), (_, p) in zip(exact, half[1], strict=True):
        value = masters.load(master, p.detach(), half[0].state[p].get("master"))
        worst = max(worst, float((value - q.detach()).abs().max()))
        nearest = max(nearest, float((q.detach().bfloat16().float() - q.detach()).abs().max()))
    assert worst < tolerance
    assert master == "none" or worst < nearest / 10


@every_half
def test_stochastic_rounding_has_no_bias(dtype: torch.dtype):
    """The mean over seeds of what is written is what fp32 would have written."""
    start = parameters([(64, 64)], dtype)[0][1].detach()
    g = gradient((64, 64), 1)
    exact = Parameter(start.float())
    exact.grad = g.to(dtype).float()
    AdamW([exact], lr=1e-4, states="fp32").step()
    total, seeds = torch.zeros(64, 64, dtype=torch.float64), 200
    for seed in range(seeds):
        p = Parameter(start.clone())
        p.grad = g.to(dtype)
        AdamW([("p", p)], lr=1e-4, states="fp32", seed=seed).step()
        total += p.detach().double()
    wanted = exact.detach().double() - start.double()
    error = total / seeds - start.double() - wanted
    ulp = (start.double().abs() * torch.finfo(dtype).eps).clamp(min=2.0**-24 if dtype == torch.float16 else 0.0)
    assert float(error.mean().abs()) < 0.02 * float(wanted.abs().mean())
    assert (error.abs() < 5 * ulp / (2 * seeds**0.5) + 1e-12).double().mean() > 0.999


@every_half
def test_rounding_is_a_function_of_seed_and_step(dtype: torch.dtype):
    def run(seed: int, steps: int = 3) -> Tensor:
        named = parameters([(64, 65)], dtype)
        opt = AdamW(named, lr=1e-4, states="8bit", seed=seed)
        train(opt, named, range(1, steps + 1))
        return named[0][1].detach()

    assert torch.equal(run(1), run(1)) and not torch.equal(run(1), run(2))
    moved = []
    p = Parameter(torch.full((64, 64), 1.0, dtype=dtype))
    opt = AdamW([("p", p)], lr=1e-3 * 2, states="fp32", weight_decay=0.0)
    for _ in range(2):
        with torch.no_grad():
            p.fill_(1.0)
        p.grad = torch.ones_like(p)
        opt.step()
        moved.append(p.detach() != 1)
    assert 0 < moved[0].float().mean() < 1 or dtype == torch.float16
    assert dtype == torch.float16 or not torch.equal(*moved)


def test_the_bits_are_those_of_the_global_element():
    """Row and column decide; a shard that starts at row 10 would draw the same."""
    p = Parameter(torch.full((20, 300), 1.0, dtype=torch.bfloat16))
    opt = AdamW([("w", p)], lr=2.0**-9, states="fp32", weight_decay=0.0, seed=5, eps=0.0)
    p.grad = torch.ones_like(p)
    opt.step()
    import zlib

    bits = bits16(key(5, 1, zlib.crc32(b"w"), 0), 0, 20 * 512).view(20, 512)[:, :300]
    up = ((torch.tensor(1.0 - 2.0**-9).view(torch.int32) + bits) & ~0xFFFF).view(torch.float32)
    assert (p.detach().float() != up).float().mean() < 1e-3


@every_half
def test_nearest_loses_what_stochastic_keeps(dtype: torch.dtype):
    lr = 0.02 * torch.finfo(dtype).eps
    moved = {}
    for rounding in ("nearest", "stochastic", "auto"):
        p = Parameter(torch.full((64, 64), 1.5, dtype=dtype))
        opt = AdamW([("p", p)], lr=lr, rounding=rounding, weight_decay=0.0)
        p.grad = torch.ones_like(p)
        if rounding == "nearest":
            with pytest.warns(UserWarning, match=r"lr=.* is below the resolution of p .*Use rounding="):
                opt.step()
        opt.step() if rounding != "nearest" else None
        for _ in range(20):
            opt.step()  # the warning comes once: a second one would be an error here
        moved[rounding] = float((1.5 - p.detach().float()).mean())
    assert moved["nearest"] == 0.0
    assert moved["stochastic"] == moved["auto"] == pytest.approx(21 * lr, rel=0.1)


@every_half
@every_master
def test_companions_count_and_fp32_parameters_have_none(dtype: torch.dtype, master: str):
    named = [*parameters([(64, 64)], dtype), ("q0", Parameter(torch.ones(64, 64)))]
    plain, kept = (AdamW([(n, Parameter(p.detach().clone())) for n, p in named], master=m) for m in ("none", master))
    assert kept.state_bytes() - plain.state_bytes() == BYTES[master] * 64 * 64
    p, q = kept.param_groups[0]["params"]
    assert kept.state[p]["master"].dtype == masters.companion_dtype(master, dtype) and "master" not in kept.state[q]


@every_half
@every_master
def test_an_optimizer_goes_on_from_what_somebody_else_wrote(dtype: torch.dtype, master: str):
    """Half of the weights pruned, the rest scaled: the next step starts there."""
    named = parameters([(64, 65)], dtype)
    opt = AdamW(named, lr=1e-3, master=master, weight_decay=0.0, states="8bit")
    train(opt, named, range(1, 6))
    p = named[0][1]
    with torch.no_grad():
        p.mul_(0.001)
        p[:32] = 0
    before = p.detach().float()
    train(opt, named, range(6, 7))
    moved = (p.detach().float() - before).abs()
    assert moved.max() < 4e-3 and (moved > 0).float().mean() > 0.9 and opt.counters()["skipped_blocks"] == 0


@every_half
@every_master
def test_a_bad_gradient_leaves_the_companion_alone(dtype: torch.dtype, master: str):
    named = parameters([(64, 65)], dtype)
    opt = StableSPAM(named, lr=1e-3, master=master)
    train(opt, named, range(1, 3))
    before = everything(opt)
    named[0][1].grad[3, 3] = float("nan")
    opt.step()
    after = everything(opt)
    changed = {k for k, v in before.items() if isinstance(v, Tensor) and not torch.equal(v, after[k])}
    assert changed == {"0.0 step", "0.0 skipped"}
