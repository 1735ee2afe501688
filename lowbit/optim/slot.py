"""One parameter of an optimizer: what never changes about it, its state, and its job in a step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import layout, masters, rows
from ..formats import format as find_format
from ..policy import Decision, role_of
from ..stages import Job, Moment

if TYPE_CHECKING:
    from .base import Rule

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
FIXED = ("states", "master", "amsgrad")  # what a group's state is made for


class Slot:
    """What never changes about one parameter: its name, shape, formats; makes its state and its jobs."""

    def __init__(self, rule: Rule, group: Mapping[str, Any], p: Tensor, name: str, label: str, number: int):
        self.param, self.label, self.name = p, label, name
        self.role = role_of(name, rule.roles) if name else ""
        self.rows, self.cols = layout.rows_of(p.shape)
        self.made_for = (p.dtype, p.device, p.shape)
        self.id = number
        self.asked = _asked(group)
        self.program = rule.program(group)
        self.group_rows = rule.group_rows(group, name, tuple(p.shape), self.role)
        if not isinstance(self.group_rows, int) or self.group_rows < 1:
            raise ValueError(f"{label}: group_rows must be a whole number of at least 1, not {self.group_rows!r}")
        self.decisions: dict[str, Decision] = {
            letter: rule.policy.decide(group["states"], m.name, m.signed, name, tuple(p.shape), self.role)
            if m.over == "value"
            else Decision(find_format("fp32"), f"one per {m.over}: fp32")
            for letter, m in self.program.moments.items()
        }
        self.formats = {letter: decision.format for letter, decision in self.decisions.items()}
        self.master = group["master"]

    def check(self, group: Mapping[str, Any], grad: Tensor) -> None:
        """Raise before a step changes anything."""
        p = self.param
        if _asked(group) != self.asked:
            raise RuntimeError(
                f"{self.label}: {', '.join(FIXED)} of its group changed since the state was made (from {self.asked} to "
                f"{_asked(group)}); build a new optimizer with them and load this one's state_dict, which is converted"
            )
        if (p.dtype, p.device, p.shape) != self.made_for:
            was, now = (f"{d}, {dev}, {tuple(s)}" for d, dev, s in (self.made_for, (p.dtype, p.device, p.shape)))
            raise RuntimeError(
                f"{self.label}: was {was} when the optimizer was built and is {now} now; "
                "change the model's dtype, device or shape first and build the optimizer after"
            )
        if grad.layout != torch.strided:
            raise TypeError(f"{self.label}: sparse gradients are not supported; use nn.Embedding(sparse=False)")
        if grad.dtype not in FLOATS:
            raise TypeError(f"{self.label}: the gradient is {grad.dtype}; it must be float32, bfloat16 or float16")
        if grad.shape != p.shape or grad.device != p.device:
            raise ValueError(
                f"{self.label}: the gradient is {tuple(grad.shape)} on {grad.device}, "
                f"the parameter {tuple(p.shape)} on {p.device}"
            )

    def fresh(self) -> dict[str, Any]:
        """A state of zeros: plain tensors and ints only."""
        p = self.param
        state: dict[str, Any] = {"step": torch.zeros((), dtype=torch.float32, device="cpu")}
        for letter, moment in self.program.moments.items():
            fmt = self.formats[letter]
            for part, tensor in rows.zeros(fmt, self._shape(moment), p.device).items():
                state[state_key(moment.name, part)] = tensor
            if fmt.compressed:
                state[f"{moment.name}_format"] = fmt.tag
        for name, value in self.program.scalars.items():
            state[name] = torch.full((), value, dtype=torch.float32, device=p.device)
        state["skipped"] = torch.zeros(2, dtype=torch.int64, device=p.device)
        kept = masters.companion_dtype(self.master, p.dtype)
        if kept is not None:
            start = p.detach() if self.master == "fp32" else torch.zeros_like(p)
            state["master"] = start.to(kept, copy=True).contiguous()
        return state

    def _shape(self, moment: Moment) -> tuple[int, ...]:
        vectors = {"row": self.rows, "column": self.cols, "group": -(-self.rows // self.group_rows)}
        return tuple(self.param.shape) if moment.over == "value" else (vectors[moment.over],)

    def job(self, group: Mapping[str, Any], state: dict[str, Any], grad: Tensor, constants: dict[str, float]) -> Job:
        moments = {}
        for letter, moment in self.program.values.items():
            parts = self.formats[letter].parts if self.formats[letter].compressed else ("codes",)
            moments[letter] = {part: state[state_key(moment.name, part)] for part in parts}
        noise = set(moments) if group["state_rounding"] == "stochastic" else set()
        half = self.param.dtype != torch.float32
        if half and self.master == "none" and group["rounding"] != "nearest":
            noise.add("p")
        return Job(
            param=self.param,
            grad=grad,
            moments=moments,
            formats={letter: self.formats[letter] for letter in moments},
            scalars={name: state[name] for name in self.program.scalars},
            constants=constants,
            skipped=state["skipped"],
            rows=self.rows,
            cols=self.cols,
            program=self.program,
            master=self.master if "master" in state else "none",
            companion=state.get("master"),
            noise=frozenset(noise),
            stream=(group["seed"], group["steps"], self.id),
            vectors={letter: state[m.name] for letter, m in self.program.moments.items() if m.over != "value"},
            group_rows=self.group_rows,
        )

    def zero_moments(self, state: dict[str, Any], keep: bool) -> None:
        """Zero every moment and what debiases it; `keep` spares maxima of moments, as released code does."""
        for letter, moment in self.program.moments.items():
            if keep and moment.name.startswith("max_"):
                continue
            for part in rows.part_shapes(self.formats[letter], self._shape(moment)):
                state[state_key(moment.name, part)].zero_()
            if moment.weight:
                state[moment.weight].zero_()


def _asked(group: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(str(group.get(name)) for name in FIXED)


def state_key(moment: str, part: str) -> str:
    """The state's key of a moment's part: `exp_avg` for the codes, `exp_avg_scale` for the scales."""
    return moment if part == "codes" else f"{moment}_{part}"
