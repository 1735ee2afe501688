"""One parameter of an optimizer: what never changes about it, its state, and its job in a step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import layout, masters, rows
from ..formats import Format
from ..formats import format as find_format
from ..policy import Decision
from ..roles import role_of
from ..shards import local, shard_of
from ..stages import Job, Program, Turn
from ..stored import Store, frozen, name_of, resolution
from . import sparse
from .matrices import Chain, over, together
from .sharded import WholeChain

if TYPE_CHECKING:
    from .base import Rule

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SAMPLE = 1 << 16  # values of a parameter that show how large they are


class Slot:
    """What never changes about one parameter: its name, shape, formats; makes its state and its jobs."""

    def __init__(self, rule: Rule, group: Mapping[str, Any], p: Tensor, name: str, label: str, number: int):
        self.param, self.label, self.name = p, label, name
        self.role = role_of(name, tuple(p.shape), rule.roles)
        self.rows, self.cols = layout.rows_of(p.shape)
        self.shape = tuple(p.shape)  # of a moment that has one number per value
        self.made_for = (p.dtype, p.device, p.shape, format_of(p))
        self.shard = shard_of(p, label)
        self.rows_here = self.rows if self.shard is None else self.shard.rows  # of the rows: those this rank has
        self.numel = p.numel()
        self.id = number
        self.fixed, self.asked = tuple(rule.fixed(group)), asked_of(rule, group)
        self.kind = rule.kind(group, name, tuple(p.shape), self.role)
        if self.kind not in rule.kinds:
            known = ", ".join(rule.kinds)
            raise ValueError(f"{label}: {type(rule).__name__} has no kind {self.kind!r}; it has: {known}")
        self.program = rule.program(group, self.kind)
        self.shapes = rule.shapes(group, self.kind, tuple(p.shape)) if self.program.parts else {}
        self.host = {k: v for stage in self.program.stages if "host" in stage.reads for k, v in rule.host.items()}
        self.group_rows = rule.group_rows(group, name, tuple(p.shape), self.role)
        if not isinstance(self.group_rows, int) or self.group_rows < 1:
            raise ValueError(f"{label}: group_rows must be a whole number of at least 1, not {self.group_rows!r}")
        self.seed: int = group["seed"]
        self.kept = rule.kept(group, name, tuple(p.shape), self.role)
        if self.kept:
            self.shape = self.rows, self.kept
        self.decisions: dict[str, Decision] = {
            letter: rule.policy.decide(group["states"], m.name, m.signed, name, self.shape_of(letter), self.role)
            if m.over == "value"
            else Decision(find_format("fp32"), f"one per {self._each(m.over)}: fp32")
            for letter, m in self.program.moments.items()
        }
        self.formats = {letter: decision.format for letter, decision in self.decisions.items()}
        self._check_reads(rule)
        for part in self.program.parts:
            if isinstance(part, Program):
                over(self, part)  # raises for matrices that do not fit together
        if self.shard is not None and together(self.program):
            raise ValueError(
                f"{label}: it is sharded, and {type(rule).__name__} gathers one whole matrix after the other, so "
                "nothing can be measured over all of them before: leave GlobalClip out and use "
                "torch.nn.utils.clip_grad_norm_"
            )
        self.master = group["master"]
        self.cut: frozenset[str] = frozenset()
        self.store = self._store()
        self.tensors = self._tensors()
        # Those of a state that are cut as the parameter is; any other tensor every rank has whole.
        whole = {m.name for m in self.program.moments.values() if m.over in ("column", "group")} | {"skipped"}
        by_row = {name for name, (shape, _) in self.tensors.items() if shape[:1] == (self.rows,)} - whole
        if self.shard is not None:
            self.cut = frozenset(by_row)
        self.lost = torch.zeros(2, dtype=torch.int64, device=p.device)  # of a sharded tensor, not added up yet
        self.of_state = itemgetter("step", *self.tensors)  # two at least, so always a tuple
        self._passed: Any = None  # what the last check saw
        self._job: Job | Chain | None = None
        self._job_of: Any = None  # what the job was made of

    def _check_reads(self, rule: Rule) -> None:
        """Raise where a stabilizer reads a moment that is kept in a subspace; `hyper.check` sees all else."""
        for part in rule.stabilize:
            for letter in self.formats.keys() & {letter for stage in part.stages for letter in stage.reads}:
                if self.shape_of(letter) != self.shape:
                    raise ValueError(
                        f"{self.label}: stabilize: {part!r} reads {letter!r}, which {type(rule).__name__} keeps as "
                        f"{self.shape_of(letter)}, not for each value of {self.shape}"
                    )

    def check(self, asked: tuple[str, ...], grad: Tensor) -> None:
        """Raise before a step changes anything; `asked` is `asked_of` the group. What passed once passes again."""
        p = self.param
        now = (p.dtype, p.device, p.shape, format_of(p), grad.layout, grad.dtype, grad.device, grad.shape, asked)
        if self.shard is not None:
            now = (*now, getattr(grad, "placements", None), getattr(grad, "device_mesh", None))
        if now != self._passed:
            self._check(asked, grad)
            self._passed = now

    def _check(self, asked: tuple[str, ...], grad: Tensor) -> None:
        p = self.param
        if asked != self.asked:
            raise RuntimeError(
                f"{self.label}: {', '.join(self.fixed)} of its group changed since the state was made "
                f"(from {self.asked} to {asked}); build "
                "a new optimizer with them and load this one's state_dict, which is converted"
            )
        present = (p.dtype, p.device, p.shape, format_of(p))
        if present != self.made_for:
            was, now = (
                ", ".join([f"{d}, {dev}, {tuple(s)}", *([f"stored as {fmt}"] if fmt else [])])
                for d, dev, s, fmt in (self.made_for, present)
            )
            raise RuntimeError(
                f"{self.label}: was {was} when the optimizer was built and is {now} now; "
                "change the model's dtype, device, shape or store first and build the optimizer after"
            )
        if self.store is not None and (reason := frozen(self.store.format)):
            raise ValueError(f"{self.label}: {reason}")
        if grad.layout != torch.strided:
            raise TypeError(f"{self.label}: sparse gradients are not supported; use nn.Embedding(sparse=False)")
        if grad.dtype not in FLOATS:
            raise TypeError(f"{self.label}: the gradient is {grad.dtype}; it must be float32, bfloat16 or float16")
        if grad.shape != p.shape or grad.device != p.device:
            raise ValueError(
                f"{self.label}: the gradient is {tuple(grad.shape)} on {grad.device}, "
                f"the parameter {tuple(p.shape)} on {p.device}"
            )
        placed, due = ((getattr(x, "placements", None), getattr(x, "device_mesh", None)) for x in (grad, p))
        if placed != due:
            raise ValueError(
                f"{self.label}: the gradient is placed {placed[0]} and the parameter {due[0]}, on meshes {placed[1]} "
                f"and {due[1]}; redistribute the gradient"
            )

    def _store(self) -> Store | None:
        """How the parameter is stored, if it is codes and scales; raises where that cannot be stepped."""
        fmt = format_of(self.param)
        if fmt is None:
            return None
        if self.master != "none":
            raise ValueError(
                f"{self.label}: master={self.master!r} keeps the low bits of a 16-bit parameter, and this is stored "
                f'as {fmt.name}: give it a group with master="none"; store="split" keeps what codes alone lose'
            )
        parts = parts_of(self.param)
        if self.param.requires_grad and (reason := frozen(fmt)):
            raise ValueError(f"{self.label}: {reason}")
        store = Store(name_of(fmt, "rest" in parts), fmt, "rest" in parts)
        shapes = store.part_shapes(tuple(self.param.shape))
        if shapes.keys() != parts.keys():
            raise ValueError(f"{self.label}: {fmt.name} has the parts {', '.join(shapes)}, not {', '.join(parts)}")
        self._fit(parts, shapes, "its")
        return store

    def _tensors(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of every tensor of a state but `step`, by the state's keys."""
        tensors = {
            state_key(moment.name, part): kind
            for letter, moment in self.program.moments.items()
            for part, kind in rows.part_shapes(self.formats[letter], self.shape_of(letter)).items()
        }
        tensors.update(dict.fromkeys(self.program.scalars, ((), torch.float32)))
        tensors["skipped"] = (2,), torch.int64
        if self.kept:
            tensors["mask"] = sparse.mask_shape(self.rows, self.cols), torch.uint8
        kept = None if self.store else masters.companion_dtype(self.master, self.param.dtype)
        if kept is not None:
            tensors["master"] = tuple(self.param.shape), kept
        return tensors

    def fresh(self) -> dict[str, Any]:
        """A state of zeros: tensors and ints only."""
        return self.spread(self.own())

    def spread(self, own: dict[str, Any]) -> dict[str, Any]:
        """A state of which this rank has its `own` part: sharded like the parameter."""
        shard = self.shard
        return own if shard is None else {k: shard.spread(v) if k in self.cut else v for k, v in own.items()}

    def here(self, shape: tuple[int, ...], cut: bool) -> tuple[int, ...]:
        """What this rank has of a tensor of a state."""
        return (self.rows_here, *shape[1:]) if cut else shape

    def own(self) -> dict[str, Any]:
        """What this rank has of a state of zeros: plain tensors and ints only."""
        p = local(self.param)
        state: dict[str, Any] = {"step": torch.zeros((), dtype=torch.float32, device="cpu")}
        state.update({k: torch.tensor(v, dtype=torch.float32, device="cpu") for k, v in self.host.items()})
        for name, (shape, dtype) in self.tensors.items():
            state[name] = torch.zeros(self.here(shape, name in self.cut), dtype=dtype, device=p.device)
        for name, value in self.program.scalars.items():
            state[name].fill_(value)
        if self.kept:
            self.draw(state, self.seed, 0)
        if self.master == "fp32" and "master" in state:
            state["master"].copy_(p.detach())
        formats = {m.name: self.formats[letter] for letter, m in self.program.moments.items()}
        return {**state, **{f"{name}_format": fmt.tag for name, fmt in formats.items() if fmt.compressed}}

    def _each(self, over: str) -> str:
        """What a vector has one number for."""
        if over != "group" or self.group_rows == 1:
            return over.replace("group", "row")
        return f"{self.group_rows} rows" if self.group_rows < self.rows else "tensor"

    def draw(self, state: dict[str, Any], seed: int, steps: int) -> None:
        """Choose anew which values of each row have moments, in the step of that number."""
        first = 0 if self.shard is None else self.shard.first
        mask = local(state["mask"])
        mask.copy_(sparse.draw(seed, steps, self.id, self.rows_here, self.cols, self.kept, mask.device, first))

    def shape_of(self, letter: str) -> tuple[int, ...]:
        """Of a moment, or of a whole matrix between two stages; the parameter's, unless the rule says otherwise."""
        moment = self.program.moments.get(letter)
        if moment is None or moment.over == "value":
            return self.shapes.get(letter, self.shape)
        vectors = {"row": self.rows, "column": self.kept or self.cols, "group": -(-self.rows // self.group_rows)}
        return (vectors[moment.over],)

    def job(self, group: Mapping[str, Any], state: dict[str, Any], turn: Turn) -> Job | Chain:
        """Its job, or chain of them, in this step.

        The last one, unless a tensor was replaced or moved or the rounding changed since.
        """
        p = local(self.param)
        kept = self.of_state(state)
        addresses = [*map(Tensor.data_ptr, (*tensors_of(p), *(kept if self.shard is None else map(local, kept))))]
        job, made_of = self._job, (addresses, p.is_contiguous(), group["rounding"], group["state_rounding"])
        if job is None or made_of != self._job_of:
            self.fit(state)
            chain = Chain if self.shard is None else WholeChain
            job = self._job = chain(self, group, state) if self.program.parts else self._made(group, state)
            self._job_of = made_of
        job.turn = turn
        if isinstance(job, Chain):
            job.state = state
        return job

    def part(self, group: Mapping[str, Any], state: dict[str, Any], turn: Turn) -> sparse.Part:
        """Its job in this step, on copies of the values that have moments; `Part.put_back` ends it."""
        job = self._made(group, state)
        part = sparse.Part(job, local(state["mask"]), self.kept)
        job.turn = turn
        return part

    def fit(self, state: dict[str, Any]) -> None:
        """Raise unless every tensor of a state, and of a stored parameter, is as it was made."""
        self._fit(state, self.tensors, "its state")
        if self.store is not None:
            self._fit(parts_of(self.param), self.store.part_shapes(tuple(self.param.shape)), "its")

    def _fit(self, state: Mapping[str, Any], tensors: Mapping[str, Any], whose: str) -> None:
        for name, (shape, dtype) in tensors.items():  # a backend may go by addresses
            x, device = state[name], self.param.device
            placed = self.shard.placements if name in self.cut and self.shard else None
            fits = getattr(x, "placements", None) == placed and x.is_contiguous()
            if (x.shape, x.dtype, x.device) != (shape, dtype, device) or not fits:
                raise ValueError(
                    f"{self.label}: {whose} {name!r} is {x.dtype}, {x.device}, {tuple(x.shape)}; it must be {dtype}, "
                    f"{device}, {shape} and contiguous"
                )

    def noise(self, group: Mapping[str, Any], values: Iterable[str]) -> frozenset[str]:
        """Which operands round stochastically: p, and letters of moments."""
        noise = set(values) if group["state_rounding"] == "stochastic" else set()
        coarse = self.param.dtype != torch.float32 or self.store is not None
        if coarse and self.master == "none" and group["rounding"] != "nearest":
            noise.add("p")
        return frozenset(noise)

    def parts(self, letter: str, state: Mapping[str, Any]) -> dict[str, Tensor]:
        """The tensors that store a moment."""
        name, fmt = self.program.moments[letter].name, self.formats[letter]
        return {part: local(state[state_key(name, part)]) for part in rows.part_shapes(fmt, (1, 1))}

    def _made(self, group: Mapping[str, Any], state: dict[str, Any]) -> Job:
        moments, values = self.program.moments, self.program.values
        return Job(
            param=local(self.param),
            moments={letter: self.parts(letter, state) for letter in values},
            formats={letter: self.formats[letter] for letter in values},
            scalars={name: state[name] for name in self.program.scalars},
            skipped=state["skipped"] if self.shard is None else self.lost,
            rows=self.rows_here,
            cols=self.cols,
            program=self.program,
            tensor=self.id,
            master=self.master if "master" in self.tensors else "none",
            companion=local(state["master"]) if "master" in self.tensors else None,
            noise=self.noise(group, values),
            vectors={letter: local(state[m.name]) for letter, m in moments.items() if m.over != "value"},
            group_rows=self.group_rows,
            stored=self.stored,
            shard=self.shard,
            whole=None if self.shard is None else self.param,
        )

    @property
    def stored(self) -> tuple[Format, dict[str, Tensor]] | None:
        """The parameter's format and parts, as a job takes them."""
        return None if self.store is None else (self.store.format, dict(parts_of(self.param)))

    def resolution(self) -> tuple[float, str, str]:
        """What an update must be above to move the parameter if that rounds to nearest; its name; what has more."""
        if self.stored is not None:
            return resolution(*self.stored) / 2, f"{self.stored[0].name}, half a code", 'store="split"'
        p = local(self.param.detach())
        for d in range(p.dim()):  # a corner of it: a large tensor is not copied to fp32
            p = p.narrow(d, 0, max(1, min(p.shape[d], SAMPLE * p.shape[d] // p.numel())))
        half = float(p.float().square().mean().sqrt()) * torch.finfo(p.dtype).eps / 2
        return half, f"{p.dtype}, half an ulp", "a master"

    def zero_moments(self, state: dict[str, Any], keep: bool) -> None:
        """Zero every moment and what debiases it; `keep` spares maxima of moments, as released code does."""
        for letter, moment in self.program.moments.items():
            if moment.lasting or (keep and moment.name.startswith("max_")):
                continue
            for part in rows.part_shapes(self.formats[letter], self.shape_of(letter)):
                local(state[state_key(moment.name, part)]).zero_()
            if moment.weight:
                state[moment.weight].zero_()


def format_of(p: Tensor) -> Format | None:
    """The format of a parameter that is codes and scales, such as `lowbit.nn.StoredWeight`; None for plain tensors."""
    fmt = getattr(p, "format", None)
    return fmt if isinstance(fmt, Format) else None


def parts_of(p: Tensor) -> Mapping[str, Tensor]:
    """The parts of a parameter that has a format."""
    return p.parts  # type: ignore[attr-defined]


def tensors_of(p: Tensor) -> tuple[Tensor, ...]:
    """The plain tensors that a parameter is made of."""
    return (p,) if format_of(p) is None else tuple(parts_of(p).values())


def asked_of(rule: Rule, group: Mapping[str, Any]) -> tuple[str, ...]:
    """What a group asks of its states, comparable."""
    return tuple(str(value) for value in rule.fixed(group).values())


def state_key(moment: str, part: str) -> str:
    """The state's key of a moment's part: `exp_avg` for the codes, `exp_avg_scale` for the scales."""
    return moment if part == "codes" else f"{moment}_{part}"
