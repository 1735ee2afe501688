"""Which tensor gets what: an ordered list of (match, storage); the first match wins.

A user's rules come first, then the built-in ones, which stand here as a visible table: what is too small to be worth a
scale stays fp32, and embeddings' 4-bit states are kept in 8 bits (their rows are updated rarely and unevenly). The
decision uses the global shape and the name only, so it never depends on a device mesh.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from .formats import Format, formats, nearest
from .formats import format as find_format
from .layout import STEP_BLOCK, rows_of
from .roles import check_role

# What a name of `states=` means: (signed moments, non-negative moments). Chosen by measurement, not by guess:
# docs/state-formats.md; changing a row means raising the version, which checkpoints carry.
PRESETS: dict[str, tuple[str, str]] = {
    "fp32": ("fp32", "fp32"),
    "bf16": ("bf16", "bf16"),
    "8bit": ("int8", "sqrt8"),
    "4bit": ("nf4:128", "log4"),
}
PRESETS_VERSION = 1

SMALL, NARROW = 4096, 64  # below so many values, or columns, a scale costs more than it saves

Storage = str | Format | Mapping[str, "str | Format"]
Match = str | Callable[[str, tuple[int, ...]], bool]


@dataclass(frozen=True)
class Decision:
    """A resolved format and the rule that chose it."""

    format: Format
    why: str


class Policy:
    """An ordered list of (match, storage).

    Args:
        rules: `match` is a glob on the parameter's dotted name, a role preceded by `@` (`"@embedding"`), or a function
            (name, shape) -> bool. `storage` is anything `states=` takes.

    Raises:
        ValueError: a storage names no format or preset, or a match no role.
        TypeError: these are no rules.

    >>> Policy([("*.norm.*", "fp32"), ("@embedding", "bf16")])
    Policy([('*.norm.*', 'fp32'), ('@embedding', 'bf16')])
    """

    def __init__(self, rules: Sequence[tuple[Match, Storage]] = ()):
        if isinstance(rules, str | Mapping) or not isinstance(rules, Iterable):
            raise TypeError(f"Policy takes a list of (match, storage), not {rules!r}")
        rules = tuple(rules)
        for rule in rules:
            pair = isinstance(rule, tuple | list) and len(rule) == 2
            if not pair or not (isinstance(rule[0], str) or callable(rule[0])):
                raise TypeError(f'Policy: a rule is ("glob" or "@role" or a function, storage), not {rule!r}')
        self.rules = tuple((match, storage) for match, storage in rules)
        for match, storage in self.rules:
            check_storage(storage, "Policy")
            if isinstance(match, str) and match.startswith("@"):
                check_role(match[1:], f"Policy {match!r}")

    def __repr__(self) -> str:
        return f"Policy({list(self.rules)!r})"

    def unmatched(self, names: Iterable[str]) -> list[str]:
        """The globs that none of these names match.

        >>> Policy([("*.norm.*", "fp32"), ("layer.*", "bf16")]).unmatched(["layers.0.norm.weight"])
        ['layer.*']
        """
        names = list(names)
        globs = [match for match, _ in self.rules if isinstance(match, str) and not match.startswith("@")]
        return [glob for glob in globs if not any(fnmatchcase(name, glob) for name in names)]

    def decide(
        self, storage: Storage, moment: str, signed: bool, name: str, shape: tuple[int, ...], role: str = ""
    ) -> Decision:
        """The format of one moment of one parameter; `storage` is what its group asked for."""
        for match, wanted in self.rules:
            if _matches(match, name, shape, role):
                return Decision(resolve(wanted, moment, signed), f"policy {match!r}")
        wanted = resolve(storage, moment, signed)
        if not wanted.compressed:
            return Decision(wanted, "states")
        cols = rows_of(shape)[1]
        count = rows_of(shape)[0] * cols
        if len(shape) < 2 or cols == 1:
            return Decision(find_format("fp32"), "1-D: fp32")
        if count < SMALL:
            return Decision(find_format("fp32"), f"fewer than {SMALL:,} values: fp32")
        if cols < NARROW:
            return Decision(find_format("fp32"), f"fewer than {NARROW} columns: fp32")
        if role == "embedding" and wanted.bits < 8:
            return Decision(resolve("8bit", moment, signed), "embedding: 8 bits at least")
        return Decision(wanted, "states")


def _matches(match: Match, name: str, shape: tuple[int, ...], role: str) -> bool:
    if not isinstance(match, str):
        return match(name, shape)
    return match[1:] == role if match.startswith("@") else fnmatchcase(name, match)


def resolve(storage: Storage, moment: str, signed: bool) -> Format:
    """The format that a `states=` value means for one moment, before any policy.

    >>> resolve("8bit", "exp_avg_sq", signed=False).name, resolve("int4", "exp_avg_sq", signed=False).name
    ('sqrt8', 'sqrt4')
    """
    if isinstance(storage, Mapping):
        wanted = storage.get(moment, "fp32")
        if signed and wanted not in PRESETS and not find_format(wanted).signed:
            raise ValueError(f"states: {moment!r} is signed and format {find_format(wanted).name!r} is not")
        return resolve(wanted, moment, signed)
    if isinstance(storage, str) and storage in PRESETS:
        return find_format(PRESETS[storage][0 if signed else 1])
    fmt = find_format(storage)
    if fmt.signed == signed or not fmt.partner:
        if signed and not fmt.signed:
            raise ValueError(f"states: {moment!r} is signed and format {fmt.name!r} is not")
        return fmt
    partner = find_format(fmt.partner)
    return partner if fmt.block == find_format(fmt.name.split(":")[0]).block else partner.with_block(fmt.block)


def check_storage(storage: Any, where: str, moments: Mapping[str, bool] | None = None) -> None:
    """Raise a clear error unless `storage` is a value that `states=` takes; `moments` maps names to signedness."""
    if isinstance(storage, Mapping):
        for moment, wanted in storage.items():
            if moments is not None and moment not in moments:
                raise ValueError(
                    f"{where}: states names {moment!r}, which is no moment of this optimizer"
                    f"{nearest(moment, list(moments))}; it has: {', '.join(moments)}"
                )
            check_storage(wanted, where)
    elif isinstance(storage, str) and storage not in PRESETS:
        base = storage.partition(":")[0]
        if base not in formats():
            known = (*PRESETS, *formats())
            raise ValueError(f"{where}: unknown states {storage!r}{nearest(base, known)}; known: {', '.join(known)}")
        find_format(storage)
    elif not isinstance(storage, (str, Format)):
        raise TypeError(f"{where}: states must be a name, a Format or a dict of them, not {type(storage).__name__}")
    for moment, signed in ({} if moments is None else moments).items():
        fmt = resolve(storage, moment, signed)
        if not fmt.plain:
            raise ValueError(
                f"{where}: format {fmt.name!r} is for weights, activations and gradients; a state has an fp32 scale "
                "for each block of a row, and codes of 2, 4 or 8 bits: use 'int8', 'nf4:128' … (`lowbit formats`)"
            )
        if fmt.compressed and STEP_BLOCK % fmt.block[1]:
            raise ValueError(f"{where}: a state's block must divide {STEP_BLOCK}; {fmt.name!r} has {fmt.block[1]}")
        if fmt.kind == "affine":
            raise ValueError(f"{where}: format {fmt.name!r} is for weights; a state needs an exact 0")
