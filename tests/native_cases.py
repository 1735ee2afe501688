"""What the native backend is compared on: dimensions, settings that cover every pair of their values, a run of one.

A setting is one row of a covering table: optimizer, formats, dtypes, rounding, shapes, threads, what is wrong with the
numbers. It is run by the reference once and by every instruction set this processor has, and all bits must agree.
"""

import contextlib
import random
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache, lru_cache
from itertools import combinations
from typing import Any, NamedTuple

import pytest
import torch
from cases import CASES, STATE_FORMATS, gradient
from native_rules import Loose, Vectors
from torch import Tensor
from torch.nn import Parameter

import lowbit
from lowbit.backends import native, native_matrix
from lowbit.native.build import BuildError
from lowbit.native.library import ISAS, Library, load
from lowbit.optim import (
    SGD,
    SPAM,
    AdaClip,
    AdaGN,
    AdamS,
    AdamW,
    AdaPM,
    GlobalClip,
    MomentumReset,
    Rule,
    SpikeClip,
    StableSPAM,
)
from lowbit.policy import Policy

# ---- the library, once for each instruction set


@cache
def libraries() -> dict[str, Library]:
    """Of every instruction set that this processor has; `asked` counts what was called."""
    try:
        own = load()
    except BuildError as error:
        pytest.skip(f"no native library: {error}")
    names = list(ISAS)
    found = {isa: Library(own.found, isa, own.best) for isa in names[: names.index(own.best) + 1]}
    for library in found.values():
        library.asked = Counter()
        for name in ("step", "encode", "decode", "measure"):
            setattr(library, name, _counted(getattr(library, name), name, library.asked))
    return found


def _counted(function: Callable[..., Any], name: str, asked: Counter) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        asked[name] += 1
        return function(*arguments)

    return call


@contextlib.contextmanager
def using(backend: str, isa: str = "", threads: int = 0) -> Iterator[None]:
    """Run on a backend; the native one for an instruction set, which must then be what was called."""
    before = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOWBIT_BACKEND", backend)
        if isa:
            library = libraries()[isa]
            for module in (native, native_matrix):
                patch.setattr(module, "load", lambda: library)
            count = library.asked.total()
        torch.set_num_threads(threads or before)
        try:
            yield
        finally:
            torch.set_num_threads(before)
    assert not isa or library.asked.total() > count, f"{isa} was not asked"


every_isa = pytest.mark.parametrize("isa", list(ISAS))


def need(isa: str) -> None:
    if isa not in libraries():
        pytest.skip(f"this processor has no {isa}")


# ---- equality


def same(a: Tensor, b: Tensor) -> bool:
    """The same bits, -0 and infinities too; any NaN is the same as any other."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    bits = {2: torch.int16, 4: torch.int32}[a.element_size()]
    x, y = a.contiguous().view(bits), b.contiguous().view(bits)
    return torch.equal(x, y) or bool(((x == y) | (a.isnan() & b.isnan())).all())


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Which tensors differ, and where first."""
    assert a.keys() == b.keys()
    found = []
    for key, x in a.items():
        y = b[key]
        if not isinstance(x, Tensor):
            if x != y:
                found.append(f"{key}: {x!r} and {y!r}")
        elif not same(x, y):
            x, y = x.flatten(), y.flatten()
            at = next(i for i in range(x.numel()) if not same(x[i : i + 1], y[i : i + 1]))
            found.append(f"{key} {tuple(a[key].shape)}: {x[at].item()!r} and {y[at].item()!r} at {at}")
    return found


# ---- optimizers: (class, hyper-parameters, moments)


TWO = {"exp_avg": True, "exp_avg_sq": False}
THREE = {**TWO, "max_exp_avg_sq": False}


class Optimizer(NamedTuple):
    rule: Callable[..., Rule]
    hyper: dict[str, Any]
    moments: dict[str, bool] = TWO  # whether each is signed; a third has a format of its own
    split: bool = False  # every second parameter in a group with amsgrad: two programs


def _own(rule: type[Rule]) -> Callable[..., Rule]:
    return lambda params, **options: rule(params, {"lr": 0.01}, **options)


ADAM, STABLE = {"lr": 0.01, "weight_decay": 0.1}, {"lr": 0.01, "reset_interval": 3, "total_steps": 3}
SPIKY = {"lr": 0.01, "weight_decay": 0.1, "threshold": 50.0, "reset_interval": 3, "warmup_steps": 2, "grace_steps": 1}
OPTIMIZERS = {
    # Resets and the end of the schedule fall into the four steps.
    **{
        case.name: Optimizer(
            case.optimizer,
            {
                **case.hyper,
                **case.options,
                "lr": 0.01,
                **({"reset_interval": 3} if "reset_interval" in case.hyper else {}),
            },
            case.signed,
        )
        for case in CASES
    },
    "official-amsgrad": Optimizer(StableSPAM, {**STABLE, "variant": "official", "amsgrad": True}, THREE),
    "stablespam-global": Optimizer(StableSPAM, {**STABLE, "stabilize": (GlobalClip(0.5),)}),
    "global": Optimizer(AdamW, {**ADAM, "stabilize": (GlobalClip(0.5),)}),
    "spike-ada": Optimizer(AdamW, {**ADAM, "stabilize": (SpikeClip(2.0), AdaClip(0.9))}),
    "gn": Optimizer(AdamW, {**ADAM, "stabilize": (AdaGN(),)}),
    "reset-late": Optimizer(AdamW, {**ADAM, "stabilize": (MomentumReset(2, late=True),)}),
    "all": Optimizer(
        AdamW,
        {**ADAM, "stabilize": (GlobalClip(0.5), SpikeClip(2.0), AdaClip(), AdaGN(gamma1=-1), MomentumReset(3))},
    ),
    "two-programs": Optimizer(AdamW, {**ADAM, "stabilize": (GlobalClip(0.5),)}, THREE, True),
    "sgd-plain": Optimizer(SGD, {"lr": 0.01, "weight_decay": 0.1, "stabilize": (AdaClip(), AdaGN())}, {}),
    "sgd-nesterov": Optimizer(SGD, {"lr": 0.01, "momentum": 0.9, "nesterov": True}, {"momentum_buffer": True}),
    "adams-paper": Optimizer(AdamS, {"lr": 0.01, "bias_correction": False}, {"exp_avg": True}),
    "spam-sparse": Optimizer(SPAM, {**SPIKY, "density": 0.3}),
    "spam-sparse-official": Optimizer(SPAM, {**SPIKY, "density": 0.6, "variant": "official"}),
    "adapm": Optimizer(AdaPM, {"lr": 0.01, "rank": 3}),
    "adapm-mini": Optimizer(AdaPM, {"lr": 0.01, "rank": 3, "second_moment": "mini", "stabilize": (AdaGN(),)}),
    "vectors": Optimizer(_own(Vectors), {}),
    "loose": Optimizer(_own(Loose), {}),
}

# ---- shapes: (shape, how the parameter lies in memory, how the gradient does)

PLAIN = ("plain", "plain")
SHAPES: dict[str, list[tuple[tuple[int, ...], str, str]]] = {
    "points": [((), *PLAIN), ((1,), *PLAIN), ((600,), *PLAIN), ((5, 1), *PLAIN), ((0, 5), *PLAIN), ((1100, 3), *PLAIN)],
    "ragged": [((7, 33), *PLAIN), ((3, 300), *PLAIN), ((4, 5461), *PLAIN), ((2, 3, 5, 7), *PLAIN)],
    "dense": [((1030, 8), *PLAIN), ((512, 16), *PLAIN), ((64, 64), *PLAIN), ((9, 2), *PLAIN), ((11, 128), *PLAIN)],
    "views": [
        ((96, 40), "transposed", "plain"), ((40, 72), "plain", "transposed"), ((9, 300), "plain", "offset"),
        ((12, 256), "plain", "offset"), ((5, 512), "offset", "plain"), ((7, 33), "offset", "strided"),
        ((6, 40), "plain", "expanded"), ((4, 4, 9), "transposed", "transposed"), ((10, 64), "negated", "negated"),
    ],
    "large": [((170, 400), *PLAIN), ((24, 2048), *PLAIN), ((9, 608), *PLAIN), ((2,), *PLAIN)],
}  # fmt: skip


def lay(x: Tensor, how: str) -> Tensor:
    """The same values elsewhere in memory."""
    if how == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if how == "offset":  # one element off any alignment
        made = x.new_zeros(x.numel() + 1)[1:].view(x.shape)
        return made.copy_(x)
    if how == "strided":
        return torch.stack([x, -x], -1)[..., 0]
    if how == "negated":  # a bit of the tensor and not of the memory
        return torch._neg_view(-x)
    if how == "expanded":
        return x[:1].expand(x.shape)
    return x


# ---- settings

SIGNED = [name for name in STATE_FORMATS if lowbit.format(name).signed]
ROUNDINGS = {
    "auto": {}, "nearest": {"rounding": "nearest"}, "stochastic": {"rounding": "stochastic"},
    **{master: {"master": master} for master in ("split8", "split16", "kahan", "fp32")},
}  # fmt: skip
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


class Setting(NamedTuple):
    optimizer: str
    m: str
    v: str
    block: int  # 0: each format's own
    p: str
    g: str
    rounding: str
    state_rounding: str
    shapes: str
    threads: int
    wrong: str

    def __str__(self) -> str:
        block = f"block{self.block}" if self.block else "own"
        return "-".join(str(x) for x in self._replace(block=block, threads=f"{self.threads}t"))


DIMENSIONS = Setting(
    optimizer=list(OPTIMIZERS), m=SIGNED, v=STATE_FORMATS, block=[0, 1, 2, 16, 64, 256], p=list(DTYPES), g=list(DTYPES),
    rounding=list(ROUNDINGS), state_rounding=["nearest", "stochastic"], shapes=list(SHAPES), threads=[1, 2, 7],
    wrong=["clean", "nan", "huge", "broken"],
)  # fmt: skip


def pairwise(dimensions: tuple[list[Any], ...], seed: int = 0) -> list[tuple[Any, ...]]:
    """Rows in which every pair of values of every two dimensions occurs: greedy, the same on every run."""
    rng = random.Random(seed)
    places = range(len(dimensions))
    missing = {
        (i, a, j, b)
        for i, j in combinations(places, 2)
        for a in range(len(dimensions[i]))
        for b in range(len(dimensions[j]))
    }
    order, rows = sorted(missing), []
    rng.shuffle(order)
    for start in order:
        if start not in missing:
            continue
        row = {start[0]: start[1], start[2]: start[3]}
        for place in rng.sample(list(places), len(places)):
            if place not in row:
                values = rng.sample(range(len(dimensions[place])), len(dimensions[place]))
                row[place] = max(values, key=lambda value: len(_pairs(row, place, value) & missing))
            missing -= _pairs(row, place, row[place])
        rows.append(tuple(dimensions[i][row[i]] for i in places))
    return rows


def _pairs(row: dict[int, int], place: int, value: int) -> set[tuple[int, int, int, int]]:
    return {(i, a, place, value) if i < place else (place, value, i, a) for i, a in row.items() if i != place}


COVERING = [Setting(*row) for row in pairwise(DIMENSIONS)]


def every_value(settings: list[Setting]) -> list[Setting]:
    """The first settings that have a value of some dimension that none before them has."""
    chosen, seen = [], set()
    for s in settings:
        if new := set(zip(Setting._fields, s, strict=True)) - seen:
            chosen.append(s)
            seen |= new
    assert len(seen) == sum(len(values) for values in DIMENSIONS)
    return chosen


# ---- one run

STEPS = 4


def stored(name: str, block: int) -> str:
    return f"{name}:{block}" if block and lowbit.format(name).compressed else name


def build(s: Setting, device: str = "cpu") -> tuple[Rule, list[tuple[str, Parameter]]]:
    of = OPTIMIZERS[s.optimizer]
    seed = zlib.crc32(str(s._replace(threads=0)).encode())
    generator = torch.Generator().manual_seed(seed)
    named = []
    for k, (shape, how, _) in enumerate(SHAPES[s.shapes]):
        x = 0.1 * torch.randn(shape, generator=generator)
        if s.wrong == "broken" and k % 2 == 0 and x.numel():
            x.view(-1)[x.numel() // 2] = (torch.nan, torch.inf, 7e4)[k // 2 % 3]
        if s.wrong == "tiny" and x.numel():
            x.view(-1)[::8] = 0  # so that a tiny update shows
        named.append((f"p{k}", Parameter(lay(x.to(device, DTYPES[s.p]), how))))
    third = STATE_FORMATS[seed % len(STATE_FORMATS)]
    every = {
        name: stored(third if name == "max_exp_avg_sq" else s.m if signed else s.v, s.block)
        for name, signed in of.moments.items()
    }
    states = {name: fmt for name, fmt in every.items() if not (of.split and name == "max_exp_avg_sq")}
    params: Any = named
    if of.split:
        params = [{"params": named[::2]}, {"params": named[1::2], "amsgrad": True, "states": every}]
    options = {**ROUNDINGS[s.rounding], "state_rounding": s.state_rounding, "seed": seed, "states": states}
    return of.rule(params, **of.hyper, **options, policy=AsAsked()), named


class AsAsked(Policy):
    """No tensor is too small to be compressed."""

    def decide(self, storage, moment, signed, name, shape, role=""):
        return super().decide(storage, moment, signed, name, (4096, 4096))


@lru_cache(maxsize=2 * STEPS)
def gradients(s: Setting, t: int, device: str = "cpu") -> list[Tensor | None]:
    """The same for every backend and instruction set; an optimizer does not write to them."""
    made: list[Tensor | None] = []
    for k, (shape, _, how) in enumerate(SHAPES[s.shapes]):
        g = gradient(shape, t, k) * 10.0 ** ((7 * k + 3 * t + len(s.m)) % 9 - 5)
        if s.wrong == "tiny" and g.numel():
            g.view(-1)[::8] *= 1e-25
        if g.numel() and t == 2 and k % 3 != 2 and s.wrong in SPOILT:
            g.view(-1)[g.numel() // 2] = SPOILT[s.wrong][k % 2]
        if t == 3 and k % 3 == 0:
            g.zero_()
        made.append(None if t == 4 and k % 4 == 1 else lay(g.to(device, DTYPES[s.g]), how))
    return made


SPOILT = {"nan": (torch.nan, torch.inf), "huge": (3e38, 5e4), "tiny": (torch.nan, torch.inf)}


def feed(s: Setting, named: list[tuple[str, Parameter]], t: int) -> None:
    for (_, p), g in zip(named, gradients(s, t, named[0][1].device.type), strict=True):
        p.grad = None
        if g is not None and g.dtype != p.dtype:
            if hasattr(p, "grad_dtype"):
                p.grad_dtype = g.dtype
            else:  # before torch 2.9 a gradient has its parameter's dtype
                g = g.to(p.dtype)
        p.grad = g


def run(s: Setting, backend: str, isa: str = "", steps: int = STEPS, device: str = "cpu") -> dict[str, Any]:
    """Everything an optimizer has after a few steps on a device, copied to the CPU."""
    with using(backend, isa, s.threads if backend == "native" else 1), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="lr=.* is below the resolution")
        opt, named = build(s, device)
        for t in range(1, steps + 1):
            feed(s, named, t)
            opt.step()
    found: dict[str, Any] = {"counters": opt.counters()}
    for name, p in named:
        found[f"{name} p"] = p.detach().clone().cpu()
        for key, value in opt.state[p].items():
            found[f"{name} {key}"] = value.cpu() if isinstance(value, Tensor) else value
    return found
