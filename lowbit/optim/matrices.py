"""One tensor's step where a rule has matrix stages: segments run by any backend, and torch functions between them.

A segment is an ordinary program run as an ordinary job (`stages` says how a program is cut). What the job calls a
moment is either one, or a whole fp32 matrix that lives from the stage that writes it to the last that reads it. So no
backend knows of matrices, and one tensor's are freed before the next tensor's are made.

A segment that does not name p, or g, gets a stand-in: zeros in bf16. A tensor with a non-finite gradient is left alone
without asking the device: all of the gradient, or what stands in for it, becomes NaN, so every segment leaves every
block as it was; matrix stages see zeros in place of such a gradient, and what they return is not stored.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import backends, layout
from ..formats import format as find_format
from ..rounding import key
from ..stages import CARRIED, Job, Namespace, Program, Stage, Turn, update
from ..tape import Traced

if TYPE_CHECKING:
    from .slot import Slot

FP32 = find_format("fp32")
STAND_IN = torch.bfloat16


@update(CARRIED)
def carry(g):
    """The gradient as stabilizers left it, for what comes after a matrix stage."""
    return g


def carried(front: tuple[Stage, ...], own: tuple[Stage, ...]) -> tuple[Stage, ...]:
    """`carry`, where stabilizers change a gradient that is read at or behind a rule's first matrix stage."""
    first = next((i for i, stage in enumerate(own) if stage.kind == "matrix"), len(own))
    needed = any("g" in stage.reads for stage in own[first:]) and any("g" in stage.writes for stage in front)
    return (carry,) if needed else ()


def is_matrix(shape: tuple[int, ...], role: str) -> bool:
    """Whether a tensor is a weight matrix (a convolution's is, flattened), by its role and shape."""
    return len(shape) > 1 and min(layout.rows_of(shape)) > 1 and role not in ("embedding", "head", "norm", "bias")


def is_stack(shape: tuple[int, ...], role: str) -> bool:
    """Whether a tensor holds a matrix for each expert: flattened, it would be one that mixes them."""
    return role == "expert" and len(shape) == 3 and min(shape[1:]) > 1


class Chain:
    """The segments and matrix stages of one tensor; it lasts like a `Job`, but for `turn` and `state`."""

    def __init__(self, slot: Slot, group: Mapping[str, Any], state: dict[str, Any]):
        self.slot, self.state = slot, state
        self.program: Program = slot.program
        self.noise = slot.noise(group, self.program.values)
        self.turn = Turn()
        self.together = together(self.program)
        self._begun = False

    # ---- once through

    def begin(self) -> Job:
        """The first segment, to be run by the caller, with those of other tensors; `run` does the rest."""
        self._start()
        self._begun = True
        first = self.program.parts[0]
        assert isinstance(first, Program)
        return self._job(0, first)

    def run(self) -> None:
        """All parts, or, after `begin`, the others."""
        device = self.slot.param.device.type
        with torch.autocast(device, enabled=False):
            if not self._begun:
                self._start()
            try:
                for index, part in enumerate(self.program.parts):
                    if isinstance(part, Stage):
                        self._apply(index, part)
                    elif index or not self._begun:
                        job = self._job(index, part)
                        backends.for_program(part, self.slot.param.device).step([job])
                    self._passed(index, part)
                self._finish()
            finally:
                self._begun = False
                self.whole.clear()
                del self.gradient

    def _start(self) -> None:
        p = self.slot.param
        assert p.grad is not None
        self.gradient = p.grad.detach()
        self.whole: dict[str, Tensor] = {}
        self.old = {name: self.state[name].clone() for name in self.program.scalars}
        self.skipped = torch.zeros_like(self.state["skipped"])
        self.ok = torch.ones((), dtype=torch.bool, device=p.device)
        if self.program.guarded:
            low, high = torch.aminmax(self.gradient)
            self.ok = torch.isfinite(low) & torch.isfinite(high)

    def _passed(self, index: int, part: Program | Stage) -> None:
        """What was left alone stays so; what nobody reads any more is freed."""
        later = self.program.parts[index + 1 :]
        if self.program.guarded and later:
            self.ok &= ~self.skipped.any()
        wanted = {letter for stages in later for letter in _reads(stages)}
        if "g" in wanted and CARRIED in self.whole:
            self.gradient = self.whole[CARRIED]
        for letter in self.whole.keys() - wanted:
            del self.whole[letter]

    def _finish(self) -> None:
        if not self.program.guarded:
            self.state["skipped"] += self.skipped
            return
        for name, old in self.old.items():
            self.state[name].copy_(torch.where(self.ok, self.state[name], old))
        one_tensor = torch.arange(2, device=self.skipped.device)  # no block, one tensor
        self.state["skipped"] += torch.where(self.ok, self.skipped, one_tensor)

    # ---- segments

    def _job(self, index: int, segment: Program) -> Job:
        slot, (rows, cols) = self.slot, over(self.slot, segment)
        device = slot.param.device
        moments, formats = {}, {}
        for letter in segment.values:
            if letter in self.program.moments:
                moments[letter], formats[letter] = slot.parts(letter, self.state), slot.formats[letter]
            else:
                if letter not in self.whole:
                    self.whole[letter] = torch.zeros(rows, cols, dtype=torch.float32, device=device)
                moments[letter], formats[letter] = {"codes": self.whole[letter]}, FP32
        param, gradient = slot.param, self.gradient
        if not {"p", "g"} <= segment.named:
            poison = torch.where(self.ok, 0.0, torch.nan).to(STAND_IN)
            stand_in = poison.expand(rows, cols).contiguous()
            param, gradient = (x if k in segment.named else stand_in for k, x in (("p", param), ("g", gradient)))
        if "g" in segment.named and self.program.guarded:
            gradient = torch.where(self.ok, gradient, torch.nan)
        turn = self.turn
        own_p = param is slot.param
        vectors = {k: self.state[m.name] for k, m in segment.moments.items() if m.over != "value"}
        return Job(
            param=param,
            moments=moments,
            formats=formats,
            scalars={name: self.state[name] for name in segment.scalars},
            skipped=self.skipped,
            rows=rows,
            cols=cols,
            program=segment,
            # A moment's number is its segment's only.
            turn=Turn(turn.constants, turn.seed, turn.step + (index << 32), turn.traced),
            tensor=slot.id,
            master=slot.master if own_p and "master" in self.state else "none",
            companion=self.state.get("master") if own_p else None,
            noise=self.noise & (moments.keys() | ({"p"} if own_p else set())),
            vectors=vectors,
            group_rows=slot.group_rows,
            gathered=gradient,
            stored=slot.stored if own_p else None,
        )

    # ---- matrix stages

    def _apply(self, index: int, stage: Stage) -> None:
        host = Namespace({name: float(self.state[name]) for name in self.slot.host})
        before = dict(host)
        first, second = self._key(index, 254)
        operands: dict[str, Any] = {
            "c": _Constants(self.turn, self.slot.param.device),
            "host": host,
            "key": first << 32 | second,
            "shape": self.slot.made_for[2],
        }
        for letter in stage.reads:
            if letter not in operands:
                operands[letter] = self._matrix(letter)
        written = stage.written(operands)
        new = {k: self._checked(stage, k, x) for k, x in written.items() if x is not operands.get(k)}
        if self.program.guarded:
            for x in new.values():
                self.ok &= torch.isfinite(x).all()
        for number, (letter, x) in enumerate(new.items()):
            if letter in self.program.moments:
                self._store(letter, x, self._key(index, number))
            else:
                self.whole[letter] = torch.where(self.ok, x, 0.0)
        if host != before and bool(self.ok):
            for name, value in host.items():
                self.state[name].fill_(value)

    def _key(self, index: int, operand: int) -> tuple[int, int]:
        return key(self.turn.seed, self.turn.step, self.slot.id, (index << 8) + operand)

    def _matrix(self, letter: str) -> Tensor:
        """An operand as a whole fp32 matrix; zeros in place of a gradient that is not finite."""
        rows, cols = layout.rows_of(self.slot.shape_of(letter))
        if letter in self.program.moments:
            return backends.decode(self.slot.formats[letter], self.slot.parts(letter, self.state), cols)
        if letter != "g":
            return self.whole[letter]
        g = self.gradient.resolve_neg().reshape(rows, cols).float().contiguous()  # a matmul goes by the layout
        return torch.where(self.ok, g, 0.0) if self.program.guarded else g

    def _checked(self, stage: Stage, letter: str, x: Tensor) -> Tensor:
        rows, cols = layout.rows_of(self.slot.shape_of(letter))
        if x.shape != (rows, cols):
            raise ValueError(
                f"{self.slot.label}: matrix {stage.function.__name__!r} returned {letter!r} of shape "
                f"{tuple(x.shape)}; it must be {(rows, cols)}"
            )
        return x.float().contiguous()

    def _store(self, letter: str, x: Tensor, noise: tuple[int, int]) -> None:
        fmt, moment = self.slot.formats[letter], self.program.moments[letter]
        stochastic = noise if letter in self.noise else None
        coded = backends.encode(fmt, x, stochastic, live=not moment.signed)
        for part, kept in self.slot.parts(letter, self.state).items():
            kept.copy_(torch.where(self.ok, coded[part].view(kept.shape), kept))


class _Constants(Namespace):
    """Constants of a matrix stage; one that only the stage's device knows is a tensor of one float64 number there."""

    def __init__(self, turn: Turn, device: torch.device):
        super().__init__({**turn.constants, **turn.traced})
        self.__dict__["read"] = lambda x: x.double() if x.device == device else x.item()

    def __getitem__(self, name: str) -> Any:
        x = super().__getitem__(name)
        return x.value(self.__dict__["read"]) if isinstance(x, Traced) else x


def _reads(part: Program | Stage) -> Iterable[str]:
    return part.reads if isinstance(part, Stage) else part.named


def over(slot: Slot, segment: Program) -> tuple[int, int]:
    """Rows and columns of what a segment goes over."""
    own = ({"p", "g"} & segment.named) | segment.values.keys()
    shapes = {letter: layout.rows_of(slot.shape_of(letter)) for letter in sorted(own)}
    if len(set(shapes.values())) > 1:
        raise ValueError(
            f"{slot.label}: {segment.stages[0].function.__name__!r} and what follows it to the next matrix stage name "
            f"matrices of different shapes: {shapes}"
        )
    return next(iter(shapes.values()), (slot.rows, slot.cols))


def together(program: Program) -> bool:
    """Whether the first segments of all tensors are run in one call, since they measure over all."""
    return bool(program.parts) and any(stage.over == "all" for stage in program.measures)


def temporary_bytes(slot: Slot) -> int:
    """The most that whole matrices between stages take at a time, stand-ins included; functions may need more."""
    most, whole = 0, set[str]()

    def size(letters: Iterable[str]) -> int:
        shapes = [layout.rows_of(slot.shape_of(letter)) for letter in letters]
        return sum(rows * cols for rows, cols in shapes)

    for index, part in enumerate(slot.program.parts):
        if isinstance(part, Stage):
            operands = {k for k in (*part.reads, *part.writes) if k not in ("c", "host", "key", "shape")}
            most = max(most, 4 * size(whole | operands) + 4 * size(part.writes))
            whole |= set(part.writes) - slot.program.moments.keys()
        else:
            whole |= part.values.keys() - slot.program.moments.keys()
            rows, cols = over(slot, part)
            stand_in = 0 if {"p", "g"} <= part.named else STAND_IN.itemsize
            copy = slot.param.dtype.itemsize if "g" in part.named else 0
            most = max(most, 4 * size(whole) + (stand_in + copy) * rows * cols)
        wanted = {letter for later in slot.program.parts[index + 1 :] for letter in _reads(later)}
        whole &= wanted | ({CARRIED} if "g" in wanted else set())
    return most
