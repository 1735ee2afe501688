"""One table: every optimizer, with hyper-parameters that reach all of it, and its independent reference.

A new optimizer is one row. All tests of optimizers draw from here.
"""

import contextlib
import copy
import gc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import oracles_blocks
import oracles_matrix
import oracles_optim
import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import lowbit
from lowbit import backends, layout
from lowbit.optim import (
    APOLLO,
    SCALE,
    SGD,
    SPAM,
    SWAN,
    Adafactor,
    AdamMini,
    AdamS,
    AdamW,
    Fira,
    GaLore,
    Lion,
    Muon,
    Rule,
    SlimAdam,
    StableSPAM,
)
from lowbit.stages import Stage


@dataclass(frozen=True)
class Case:
    """`unit`: what a non-finite gradient leaves alone: the 256-value block, the tensor, or nothing (released code).

    `signed`: the states that a reference reads, and those with one number per value may be stored in any format.
    """

    name: str
    optimizer: type[Rule]
    hyper: dict[str, Any]
    oracle: Callable[..., Any]
    unit: str = "block"
    signed: dict[str, bool] = field(default_factory=lambda: {"exp_avg": True, "exp_avg_sq": False})
    options: dict[str, Any] = field(default_factory=dict)  # what the oracle need not know
    sweeps: int = 1
    low_rank: bool = False  # has states of other shapes than the parameter's
    mixes: bool = False  # what one value does depends on all of its matrix

    def __str__(self) -> str:
        return self.name

    def build(self, params: Any, **changes: Any) -> Rule:
        return self.optimizer(params, **{**self.hyper, **self.options, **changes})


class LastLayers(SCALE):
    """SCALE that takes every matrix for the head."""

    def kind(self, group: Mapping[str, Any], name: str, shape: tuple[int, ...], role: str) -> str:
        return "row with momentum" if len(shape) > 1 else "Adam"


AMSGRAD = {"exp_avg": True, "exp_avg_sq": False, "max_exp_avg_sq": False}
SPIKY = {"lr": 1e-3, "reset_interval": 7, "warmup_steps": 3, "grace_steps": 2, "threshold": 437.0, "weight_decay": 0.1}
MOMENTUM = {"exp_avg": True}
STABLE = {"lr": 1e-3, "reset_interval": 7, "total_steps": 9, "weight_decay": 0.1}
ADAM = {"lr": 1e-3, "weight_decay": 0.1}
FACTORED = {"exp_avg_sq": False, "exp_avg_sq_row": False, "exp_avg_sq_col": False}
RELATIVE = {"lr": 1e-2, "scale_parameter": True, "relative_step": True}
# One projector for as long as the tests take: another's signs would be arbitrary beside the old moments.
LOW_RANK = {"lr": 1e-3, "rank": 3, "update_interval": 1000, "scale": 0.25, "weight_decay": 0.1}
PROJECTED = {"exp_avg": True, "exp_avg_sq": False, "projector": True}

CASES = [
    Case("adamw", AdamW, {"lr": 1e-3, "weight_decay": 0.1}, oracles_optim.adamw),
    Case("adamw-amsgrad", AdamW, {"lr": 1e-3, "amsgrad": True}, oracles_optim.adamw, signed=AMSGRAD),
    Case("stablespam", StableSPAM, STABLE, oracles_optim.stablespam_paper, "tensor", sweeps=3),
    Case(
        "stablespam-amsgrad", StableSPAM, {**STABLE, "amsgrad": True}, oracles_optim.stablespam_paper, "tensor",
        AMSGRAD, sweeps=3,
    ),
    Case(
        "stablespam-official", StableSPAM, STABLE, oracles_optim.stablespam_official, "none", sweeps=3,
        options={"variant": "official"},
    ),
    Case("spam", SPAM, SPIKY, oracles_optim.spam_paper),
    Case("spam-official", SPAM, SPIKY, oracles_optim.spam_official, "none", options={"variant": "official"}),
    Case(
        "sgd", SGD, {"lr": 1e-4, "momentum": 0.9, "dampening": 0.2, "weight_decay": 0.1}, oracles_optim.sgd,
        signed={"momentum_buffer": True},
    ),
    Case("lion", Lion, {"lr": 1e-4, "weight_decay": 0.1}, oracles_optim.lion, signed=MOMENTUM),
    Case("adams", AdamS, {"lr": 1e-3, "weight_decay": 0.1}, oracles_optim.adams, signed=MOMENTUM),
    Case("adammini", AdamMini, ADAM, oracles_blocks.adam_mini, "tensor", sweeps=2),
    Case("adammini-tensor", AdamMini, ADAM, oracles_blocks.adam_mini_tensor, "tensor",
         options={"partition": {"*": "tensor"}}, sweeps=2),
    Case("slimadam-column", SlimAdam, ADAM, oracles_blocks.slim_adam_column, "tensor",
         options={"dims": {"*": "column"}}, sweeps=2),
    Case("adafactor", Adafactor, {"lr": 1e-3, "weight_decay": 0.1}, oracles_blocks.adafactor, "tensor", FACTORED,
         sweeps=5),
    Case("adafactor-relative", Adafactor, {**RELATIVE, "beta1": 0.9}, oracles_blocks.adafactor, "tensor",
         {"exp_avg": True, **FACTORED}, sweeps=6),
    Case("scale", SCALE, {"lr": 1e-3, "scalar_lr": 2e-3, "weight_decay": 0.1}, oracles_blocks.scale, "tensor",
         sweeps=2),
    Case("scale-head-l2", LastLayers, {"lr": 1e-3, "norm": "l2"}, oracles_blocks.scale_head, "tensor", sweeps=2),
    Case(
        "muon", Muon, {"lr": 1e-3, "weight_decay": 0.1, "aux_lr": 1e-3}, oracles_matrix.muon, "tensor",
        {"momentum_buffer": True, "exp_avg": True, "exp_avg_sq": False}, {"precision": "fp32"},
        sweeps=2, mixes=True,
    ),
    Case(
        "galore", GaLore, LOW_RANK, oracles_matrix.galore, "tensor", PROJECTED,
        sweeps=2, low_rank=True, mixes=True,
    ),
    Case(
        "fira", Fira, LOW_RANK, oracles_matrix.fira, "tensor", PROJECTED,
        sweeps=3, low_rank=True, mixes=True,
    ),
    Case(
        "apollo", APOLLO, LOW_RANK, oracles_matrix.apollo, "tensor", PROJECTED, {"proj": "svd"},
        sweeps=3, low_rank=True,
    ),
    Case(
        "swan", SWAN, {"lr": 1e-3, "weight_decay": 0.1}, oracles_matrix.swan, "tensor",
        sweeps=1, mixes=True,
    ),
]  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread():
    """For modules that import it: tensors are small, and a second thread costs time and changes no bit of a step."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", autouse=True)
def old_objects_left_alone():
    """For modules that import it: what looks through the heap, and the collector, pass over what was there before."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


every_case = pytest.mark.parametrize("case", CASES, ids=str)
guarded_cases = pytest.mark.parametrize("case", [c for c in CASES if c.unit != "none"], ids=str)

# What a state can be stored in: every format but those that are for weights.
STATE_FORMATS = [
    name for name in lowbit.formats() if lowbit.format(name).plain and lowbit.format(name).kind != "affine"
]
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

    A matmul has no bits of its own: they change with the number of threads, and with the device. The tape is kept on
    the CPU.
    """
    own, rest = Stage.written, iter(tape)

    def copied(values: dict[str, Any]) -> dict[str, Any]:
        return {k: x.cpu().clone() if isinstance(x, Tensor) else copy.copy(x) for k, x in values.items()}

    def written(self: Stage, operands: dict[str, Any]) -> dict[str, Any]:
        if self.kind != "matrix":
            return own(self, operands)
        given = copied(operands)
        if not replay:
            result = own(self, operands)
            kept = {k: None if x is operands.get(k) else x.cpu().clone() for k, x in result.items()}
            tape.append((given, dict(operands["host"]), kept))
            return result
        expected, host, result = next(rest)
        assert_same(given, expected)
        operands["host"].update(host)
        device = next(x.device for x in operands.values() if isinstance(x, Tensor))
        return {k: operands[k] if x is None else x.to(device, copy=True) for k, x in result.items()}

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
    """A state's values; a vector's number stands at every value that it is for."""
    slot, state = opt._slots[p], opt.state[p]
    letter = {m.name: letter for letter, m in slot.program.moments.items()}[name]
    over = slot.program.moments[letter].over
    if over != "value":
        each = {"row": 1, "group": slot.group_rows}
        vector = state[name] if over == "column" else state[name].repeat_interleave(each[over])[: slot.rows, None]
        return vector.expand(slot.rows, slot.cols).reshape(p.shape)
    fmt, shape = slot.formats[letter], slot.shape_of(letter)
    parts = {part: state[name if part == "codes" else f"{name}_{part}"] for part in fmt.parts}
    return backends.decode(fmt, parts, layout.rows_of(shape)[1]).reshape(shape)


def as_reference(opt: Rule, p: Parameter, case: Case) -> dict:
    """A tensor's state as the float64 reference has it."""
    state = opt.state[p]
    s = oracles_optim.fresh(p.detach().double().numpy())
    for name in s:
        if name in case.signed and name in state:
            s[name] = dequantized(opt, p, name).double().numpy()
        elif name in state:
            s[name] = float(state[name])
    return s
