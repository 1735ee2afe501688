"""One table: every optimizer, with hyper-parameters that reach all of it, and its independent reference.

A new optimizer is one row. All tests of optimizers draw from here.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import oracles_matrix
import oracles_optim
import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import lowbit
from lowbit import backends, layout
from lowbit.optim import APOLLO, SWAN, AdamW, Fira, GaLore, Muon, Rule, StableSPAM
from lowbit.stages import Stage


@dataclass(frozen=True)
class Case:
    """`unit`: what a non-finite gradient leaves alone: the 256-value block, the tensor, or nothing (released code)."""

    name: str
    optimizer: type[Rule]
    hyper: dict[str, Any]
    oracle: Callable[..., Any]
    unit: str = "block"
    signed: dict[str, bool] = field(default_factory=lambda: {"exp_avg": True, "exp_avg_sq": False})
    options: dict[str, Any] = field(default_factory=dict)  # what the oracle need not know
    sweeps: int = 0  # of its longest program; 0: one for a unit of blocks, else Stable-SPAM's three
    low_rank: bool = False  # has states of other shapes than the parameter's
    mixes: bool = False  # what one value does depends on all of its matrix
    clips: bool = True  # has a second moment for SpikeClip to go by

    def __str__(self) -> str:
        return self.name

    def build(self, params: Any, **changes: Any) -> Rule:
        return self.optimizer(params, **{**self.hyper, **self.options, **changes})


AMSGRAD = {"exp_avg": True, "exp_avg_sq": False, "max_exp_avg_sq": False}
SPAM = {"lr": 1e-3, "reset_interval": 7, "total_steps": 9, "weight_decay": 0.1}
# One projector for as long as the tests take: another's signs would be arbitrary beside the old moments.
LOW_RANK = {"lr": 1e-3, "rank": 3, "update_interval": 1000, "scale": 0.25, "weight_decay": 0.1}
PROJECTED = {"exp_avg": True, "exp_avg_sq": False, "projector": True}

CASES = [
    Case("adamw", AdamW, {"lr": 1e-3, "weight_decay": 0.1}, oracles_optim.adamw),
    Case("adamw-amsgrad", AdamW, {"lr": 1e-3, "amsgrad": True}, oracles_optim.adamw, signed=AMSGRAD),
    Case("stablespam", StableSPAM, SPAM, oracles_optim.stablespam_paper, "tensor"),
    Case(
        "stablespam-amsgrad", StableSPAM, {**SPAM, "amsgrad": True}, oracles_optim.stablespam_paper, "tensor", AMSGRAD
    ),
    Case(
        "stablespam-official", StableSPAM, SPAM, oracles_optim.stablespam_official, "none",
        options={"variant": "official"},
    ),
    Case(
        "muon", Muon, {"lr": 1e-3, "weight_decay": 0.1, "aux_lr": 1e-3}, oracles_matrix.muon, "tensor",
        {"momentum_buffer": True, "exp_avg": True, "exp_avg_sq": False}, {"precision": "fp32"},
        sweeps=2, clips=False, mixes=True,
    ),
    Case(
        "galore", GaLore, LOW_RANK, oracles_matrix.galore, "tensor", PROJECTED,
        sweeps=2, clips=False, low_rank=True, mixes=True,
    ),
    Case(
        "fira", Fira, LOW_RANK, oracles_matrix.fira, "tensor", PROJECTED,
        sweeps=3, clips=False, low_rank=True, mixes=True,
    ),
    Case(
        "apollo", APOLLO, LOW_RANK, oracles_matrix.apollo, "tensor", PROJECTED, {"proj": "svd"},
        sweeps=3, clips=False, low_rank=True,
    ),
    Case(
        "swan", SWAN, {"lr": 1e-3, "weight_decay": 0.1}, oracles_matrix.swan, "tensor",
        sweeps=1, clips=False, mixes=True,
    ),
]  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread():
    """For modules that import it: tensors are small, and a second thread costs time and changes no bit of a step."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


every_case = pytest.mark.parametrize("case", CASES, ids=str)
guarded_cases = pytest.mark.parametrize("case", [c for c in CASES if c.unit != "none"], ids=str)

# What a state can be stored in: every format but those that are for weights.
STATE_FORMATS = [name for name in lowbit.formats() if lowbit.format(name).kind != "affine"]
COMPRESSED = [name for name in STATE_FORMATS if lowbit.format(name).compressed]
PRESETS = ["fp32", "bf16", "8bit", "4bit"]
every_preset = pytest.mark.parametrize("states", PRESETS)

# At least 4,096 values and 64 columns, so that states are compressed; none a multiple of a step block but the first.
SHAPES = [(64, 64), (33, 300), (7, 5461), (65, 257), (16, 16, 17), (8, 16, 6, 6)]
SMALL_SHAPES = [(1,), (), (50,), (7, 33), (4, 5, 6), (2, 3, 4, 5), (0,), (0, 5), (3, 0)]


def gradient(shape: tuple[int, ...], t: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Heavy tails, rows of all magnitudes, exact zeros, a spike now and then; a function of (shape, t, seed)."""
    generator = torch.Generator().manual_seed(1000 * seed + t)
    g = torch.randn(shape, generator=generator) ** 3
    if g.dim() > 1:
        g *= torch.exp(2 * torch.randn(shape[0], *[1] * (g.dim() - 1), generator=generator))
    g *= torch.rand(shape, generator=generator) > 0.05
    if t % 5 == 0:
        g *= torch.where(torch.rand(shape, generator=generator) < 0.02, 1000.0, 1.0)
    return (0.01 * g).to(dtype)


def parameters(
    shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float32, seed: int = 0
) -> list[tuple[str, Parameter]]:
    generator = torch.Generator().manual_seed(seed)
    return [(f"p{i}", Parameter((0.1 * torch.randn(s, generator=generator)).to(dtype))) for i, s in enumerate(shapes)]


def train(opt: Rule, named: list[tuple[str, Parameter]], steps: range, seed: int = 0) -> None:
    """Gradients depend on the step and the name only, so a run can be cut anywhere."""
    for t in steps:
        for name, p in named:
            p.grad = gradient(tuple(p.shape), t, seed + int(name.strip("p")), p.dtype)
        opt.step()


@contextlib.contextmanager
def injected(tape: list[Any], replay: bool) -> Iterator[None]:
    """While it lasts, matrix stages are recorded; or, once what they are given has the same bits, not run again.

    A matmul has no bits of its own: they change with the number of threads.
    """
    own, rest = Stage.written, iter(tape)

    def written(self: Stage, operands: dict[str, Any]) -> dict[str, Any]:
        if self.kind != "matrix":
            return own(self, operands)
        given = {k: x.clone() if isinstance(x, Tensor) else copy.copy(x) for k, x in operands.items()}
        if not replay:
            result = own(self, operands)
            kept = {k: None if x is operands.get(k) else x.clone() for k, x in result.items()}
            tape.append((given, dict(operands["host"]), kept))
            return result
        expected, host, result = next(rest)
        assert_same(given, expected)
        operands["host"].update(host)
        return {k: operands[k] if x is None else x.clone() for k, x in result.items()}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stage, "written", written)
        yield


def everything(opt: Rule) -> dict[str, Any]:
    """Every bit an optimizer has: parameters, states, groups, copied."""
    found: dict[str, Any] = {}
    for index, group in enumerate(opt.param_groups):
        for key, value in group.items():
            if key != "params":
                found[f"group {index} {key}"] = value.clone() if isinstance(value, Tensor) else value
        for i, p in enumerate(group["params"]):
            found[f"{index}.{i} p"] = p.detach().clone()
            for name, value in opt.state[p].items() if p in opt.state else ():
                found[f"{index}.{i} {name}"] = value.clone() if isinstance(value, Tensor) else value
    return found


def assert_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    """Equal to the last bit, dtypes and keys too."""
    assert a.keys() == b.keys()
    for key, x in a.items():
        y = b[key]
        if isinstance(x, Tensor) and isinstance(y, Tensor):
            assert x.dtype == y.dtype and x.shape == y.shape, f"{key}: {x.dtype} {x.shape}, {y.dtype} {y.shape}"
            assert (
                torch.equal(x.nan_to_num(7.25), y.nan_to_num(7.25)) if x.is_floating_point() else torch.equal(x, y)
            ), key
        else:
            assert type(x) is type(y) and x == y, f"{key}: {x!r}, {y!r}"


def twins(shapes=((17, 33), (50,), ())) -> tuple[list[Parameter], list[Parameter]]:
    mine = [p for _, p in parameters(list(shapes))]
    return mine, [Parameter(p.detach().clone()) for p in mine]


def feed(t: int, *lists: list[Parameter]) -> None:
    for params in lists:
        for i, p in enumerate(params):
            p.grad = gradient(tuple(p.shape), t, i, p.dtype)


def assert_close(a: list[Parameter], b: list[Parameter], atol: float = 1e-6) -> None:
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x.detach(), y.detach(), rtol=0, atol=atol)


def dequantized(opt: Rule, p: Parameter, name: str) -> Tensor:
    state, fmt = opt.state[p], opt._slots[p].formats
    letter = {m.name: letter for letter, m in opt._slots[p].program.moments.items()}[name]
    parts = {part: state[name if part == "codes" else f"{name}_{part}"] for part in fmt[letter].parts}
    shape = opt._slots[p].shape_of(letter)
    return backends.decode(fmt[letter], parts, layout.rows_of(shape)[1]).reshape(shape)
