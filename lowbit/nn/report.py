"""What `quantize_` did to each weight of a model, and why not more."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..stored import find_store
from .recipe import Recipe


class Entry(NamedTuple):
    """A weight of the model; `reason` says why it stays dense, None that its layer was converted."""

    name: str
    shape: tuple[int, ...]
    parameters: int  # 0 for a weight that an earlier entry shares
    reason: str | None
    store: str = "master"
    table: bool = False  # of an embedding: no matmul
    frozen: bool = False  # by the recipe

    @property
    def nbytes(self) -> int:
        """What a stored weight takes; 0 for one that an earlier entry shares, and for masters."""
        if self.store == "master" or not self.parameters:
            return 0
        shapes = find_store(self.store).part_shapes(self.shape).values()
        layers = self.parameters // math.prod(self.shape)
        return layers * sum(math.prod(shape) * dtype.itemsize for shape, dtype in shapes)


@dataclass(frozen=True)
class Report:
    """What became of each weight. `print(report)` shows a table in which repeated layers share a line.

    Attributes:
        recipe: the recipe that was applied.
        entries: every weight with two dimensions or more, in the model's order.
        other_tensors: how many other parameters there are (norms, biases), which stay as they are.
        other_parameters: the values in them.
        unused_skips: patterns of `skip` that matched nothing.
    """

    recipe: Recipe
    entries: tuple[Entry, ...]
    other_tensors: int
    other_parameters: int
    unused_skips: tuple[str, ...] = ()

    @property
    def converted(self) -> dict[str, tuple[int, ...]]:
        """Name → shape of the layers that are quantized now."""
        return {e.name: e.shape for e in self.entries if e.reason is None}

    @property
    def skipped(self) -> dict[str, str]:
        """Name → reason for the weights that stay dense."""
        return {e.name: e.reason for e in self.entries if e.reason is not None}

    @property
    def parameters(self) -> int:
        """All parameters of the model, shared ones once."""
        return sum(e.parameters for e in self.entries) + self.other_parameters

    @property
    def quantized_parameters(self) -> int:
        """Those in quantized matmuls."""
        return sum(e.parameters for e in self.entries if e.reason is None and not e.table)

    @property
    def stored_parameters(self) -> int:
        """Those that are codes and scales, with no float master."""
        return sum(e.parameters for e in self.entries if e.store != "master")

    @property
    def stored_bytes(self) -> int:
        """What the stored ones take, scales and all."""
        return sum(e.nbytes for e in self.entries)

    @property
    def share(self) -> float:
        """The part of all parameters that is in quantized matmuls, 0 to 1."""
        return self.quantized_parameters / max(1, self.parameters)

    def to_dict(self) -> dict[str, Any]:
        """Everything, in types that JSON knows."""
        return {
            "recipe": str(self.recipe),
            "parameters": self.parameters,
            "quantized_parameters": self.quantized_parameters,
            "share": self.share,
            "stored_parameters": self.stored_parameters,
            "stored_bytes": self.stored_bytes,
            "converted": {name: list(shape) for name, shape in self.converted.items()},
            "skipped": self.skipped,
            "other_tensors": self.other_tensors,
            "other_parameters": self.other_parameters,
            "unused_skips": list(self.unused_skips),
        }

    def __str__(self) -> str:
        bits = f"{self.recipe.bits}-bit" if self.recipe.bits else "quantized"
        layers = sum(e.reason is None and not e.table for e in self.entries)
        lines = [
            f"{layers} of {len(self.entries)} weights, {100 * self.share:.1f} % of "
            f"{self.parameters:,} parameters, are in {bits} matmuls now",
            *self._stored(),
            str(self.recipe),
            *_table([("weight", "shape", "parameters", "now"), *map(_cells, _grouped(self.entries)), *self._rest()]),
        ]
        lines += [f"note: skip={pattern!r} matched nothing" for pattern in self.unused_skips]
        return "\n".join(lines)

    def _stored(self) -> list[str]:
        if not self.stored_parameters:
            return []
        bits = 8 * self.stored_bytes / self.stored_parameters
        return [
            f"{self.stored_parameters:,} parameters are kept as codes, with no float copy: "
            f"{self.stored_bytes:,} bytes, {bits:.2f} bits each"
        ]

    def _rest(self) -> list[tuple[str, str, str, str]]:
        if not self.other_tensors:
            return []
        return [(f"{self.other_tensors} norms, biases …", "", f"{self.other_parameters:,}", "unchanged")]


def _pattern(name: str) -> str:
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))


def _grouped(entries: tuple[Entry, ...]) -> list[tuple[int, Entry]]:
    """Layers that differ in numbers only ("layers.3.mlp.up_proj"), with how many there are."""
    order: dict[tuple[object, ...], list[Entry]] = {}
    for entry in entries:
        order.setdefault((_pattern(entry.name), *entry[1:2], *entry[3:]), []).append(entry)
    groups = []
    for same in order.values():
        name = _pattern(same[0].name) if len(same) > 1 else same[0].name
        groups.append((len(same), same[0]._replace(name=name, parameters=sum(e.parameters for e in same))))
    return groups


def _cells(group: tuple[int, Entry]) -> tuple[str, str, str, str]:
    count, entry = group
    name = f"{entry.name or 'the model'}{f'  ×{count}' if count > 1 else ''}"
    return name, " × ".join(map(str, entry.shape)), f"{entry.parameters:,}", entry.reason or _now(entry)


def _now(entry: Entry) -> str:
    frozen = ", frozen" if entry.frozen else ""
    if entry.store == "master":
        return f"quantized{frozen}"
    bits = f", {8 * entry.nbytes / entry.parameters:.2f} bits" if entry.parameters else ""
    return f"{'stored' if entry.table else 'quantized, stored'} as {entry.store}{bits}{frozen}"


def _table(rows: list[tuple[str, str, str, str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return [f"  {a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}  {d}".rstrip() for a, b, c, d in rows]
