"""What an optimizer keeps for each tensor, as a table."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..tables import width
from .matrices import temporary_bytes, together
from .slot import tensors_of

if TYPE_CHECKING:
    from rich.table import Table

    from .base import Rule

NARROW = 156  # columns in which a table has no room for all of a tensor on one line


@dataclass(frozen=True)
class Row:
    """One parameter; `dtype` names its store, if it is codes and scales."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    role: str
    kind: str
    formats: dict[str, str]
    why: str
    state_bytes: int
    temporary_bytes: int = 0
    weight_bytes: int = 0


@dataclass(frozen=True)
class Explanation:
    """The rows, and totals. `str()` is a table for people, `rows` are for programs."""

    optimizer: str
    rows: tuple[Row, ...]
    sweeps: int
    stages: tuple[str, ...]
    together: bool = False  # matrix stages wait for what is measured over all tensors

    @property
    def state_bytes(self) -> int:
        """Bytes of all states."""
        return sum(row.state_bytes for row in self.rows)

    @property
    def temporary_bytes(self) -> int:
        """The most that whole matrices between stages take, of one tensor at a time or of all together."""
        each = [row.temporary_bytes for row in self.rows]
        return sum(each) if self.together else max(each, default=0)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all parameters, as they are stored."""
        return sum(row.weight_bytes for row in self.rows)

    @property
    def parameters(self) -> int:
        """How many values the parameters have."""
        total = 0
        for row in self.rows:
            count = 1
            for size in row.shape:
                count *= size
            total += count
        return total

    def __str__(self) -> str:
        from rich.console import Console

        out = io.StringIO()
        console = Console(file=out, width=width(), markup=False, highlight=False)
        console.print(self._table(narrow=console.width < NARROW))
        per = self.state_bytes / max(1, self.parameters)
        console.print(
            f"{self.parameters:,} parameters in {self.weight_bytes:,} bytes, "
            f"{self.state_bytes:,} bytes of state ({per:.3f} per parameter). "
            f"A step reads the gradient {self.sweeps} time{'s' if self.sweeps > 1 else ''}: "
            + " or, for other tensors, ".join(self.stages)
        )
        if self.temporary_bytes:
            whose = "all tensors" if self.together else "one tensor at a time"
            console.print(f"Between the stages of {whose}, whole matrices take up to {self.temporary_bytes:,} bytes.")
        return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"

    def _table(self, narrow: bool) -> Table:
        """A line for each moment; in a narrow table the rest stands below a tensor's name. No name is cut short."""
        from rich import box
        from rich.table import Table

        title = f"{self.optimizer}: where the state of each parameter goes"
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD if narrow else box.HEAVY_HEAD)
        kinds = ["kind"] if any(row.kind for row in self.rows) else []
        about = ("parameter", "state formats")
        if not narrow:
            about = ("parameter", "shape", "dtype", "role", *kinds, "state formats", "decided by")
        for column in about:
            table.add_column(column, overflow="fold")
        table.add_column("bytes" if narrow else "state bytes", justify="right", no_wrap=True)
        for row in self.rows:
            formats = "\n".join(f"{moment} {fmt}" for moment, fmt in row.formats.items())
            what = ["×".join(map(str, row.shape)) or "scalar", row.dtype, row.role, *([row.kind] if kinds else [])]
            cells = [row.name, *what, formats, row.why.replace("; ", "\n")]
            if narrow:
                cells = [f"{row.name}\n  {', '.join(filter(None, what))}\n  {row.why}", formats]
            table.add_row(*cells, f"{row.state_bytes:,}")
        return table


def explain(rule: Rule) -> Explanation:
    """See `Rule.explain`."""
    rows = []
    for group in rule.param_groups:
        for p, label in rule._labelled(group):
            slot = rule._slots[p]
            state: dict[str, Any] = rule.state.get(p, {})
            moments = slot.program.moments
            why = "; ".join(dict.fromkeys(d.why for d in slot.decisions.values())) or "no moments"
            rows.append(
                Row(
                    name=label,
                    shape=tuple(p.shape),
                    dtype=str(slot.store or p.dtype).removeprefix("torch."),
                    role=slot.role,
                    kind=slot.kind,
                    formats={moments[letter].name: fmt.name for letter, fmt in slot.formats.items()} if state else {},
                    why=why if state else "frozen",
                    state_bytes=sum(v.nbytes for v in state.values() if isinstance(v, Tensor)),
                    temporary_bytes=temporary_bytes(slot) if state else 0,
                    weight_bytes=sum(x.nbytes for x in tensors_of(p)),
                )
            )
    programs = list({id(slot.program): slot.program for slot in rule._slots.values()}.values())
    stages = tuple(" → ".join(stage.function.__name__ for stage in program.stages) for program in programs)
    return Explanation(
        optimizer=type(rule).__name__,
        rows=tuple(rows),
        sweeps=max((program.sweeps for program in programs), default=1),
        stages=stages,
        together=any(together(program) for program in programs),
    )
