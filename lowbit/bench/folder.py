"""The run folder: `settings.json` says what its runs share, `results.jsonl` has one line for each finished run.

A run is either wholly in the file or not there: a line goes out in one write and is flushed to disk, and a torn last
line (a killed process, a full disk) is cut off on the next start. So a killed benchmark loses at most what was running.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from .errors import BenchError

VERSION = 1


class Folder:
    """One run folder on disk."""

    def __init__(self, path: Path):
        self.path = path
        self.results_path = path / "results.jsonl"
        self.settings_path = path / "settings.json"

    def begin(self, document: dict, *, resume: bool) -> None:
        """Create the folder, or check that an existing one was made with the same settings and corpus."""
        if self.path.exists() and not self.path.is_dir():
            raise BenchError(f"{self.path} is a file; --out needs a folder")
        if self.settings_path.exists():
            self._check_same(document, resume=resume)
            return
        if self.results_path.exists():
            raise BenchError(f"{self.path} has results but no settings.json: choose another --out")
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomically(self.settings_path, json.dumps(document, indent=1) + "\n")

    def _check_same(self, document: dict, *, resume: bool) -> None:
        old = self.document()
        if not resume:
            raise BenchError(
                f"{self.path} already holds a benchmark: continue it with --resume or choose another --out"
            )
        differing = [f"{key} was {was!r}, is {now!r}" for key, was, now in _differences(old, document)]
        if differing:
            raise BenchError(
                f"{self.path} was made with other settings, so it cannot be continued with these "
                f"({'; '.join(differing[:4])}); it was made by: {old.get('command', 'an unknown command')}"
            )
        write_atomically(self.settings_path, json.dumps(_merged(old, document), indent=1) + "\n")

    def document(self) -> dict:
        """What `settings.json` says."""
        try:
            document = json.loads(self.settings_path.read_text())
        except FileNotFoundError:
            raise BenchError(f"{self.path} is not a benchmark folder: it has no settings.json") from None
        except ValueError as error:
            raise BenchError(f"{self.settings_path} is damaged: {error}") from error
        if document.get("version") != VERSION:
            raise BenchError(f"{self.path} was written by another version of lowbit (format {document.get('version')})")
        return document

    def results(self) -> list[dict]:
        """Every whole line, the last one of each run (a crashed run may have been repeated)."""
        try:
            text = self.results_path.read_text(errors="replace")
        except FileNotFoundError:
            return []
        latest: dict[tuple, dict] = {}
        lines = text.split("\n")
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                result = json.loads(line)
                latest[key_of(result)] = result
            except (ValueError, KeyError, TypeError):
                if number != len(lines):  # only the last line, without its newline, can be torn
                    raise BenchError(f"{self.results_path} line {number} is damaged: delete that line") from None
        return list(latest.values())

    def finished(self) -> set[tuple]:
        """The runs that need not be done again."""
        return {key_of(r) for r in self.results() if r["status"] == "ok"}

    def append(self, result: dict) -> None:
        """Add one result, cutting off a torn line first."""
        line = (json.dumps(result, allow_nan=False) + "\n").encode()
        handle = os.open(self.results_path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o644)
        with os.fdopen(handle, "r+b", buffering=0) as file:
            data = file.read()
            file.truncate(data.rfind(b"\n") + 1)
            file.seek(0, os.SEEK_END)
            file.write(line)
            os.fsync(file.fileno())


def key_of(result: dict) -> tuple[str, float, int]:
    """What identifies a run within its folder."""
    return (result["method"], result["lr"], result["seed"])


def write_atomically(path: Path, text: str) -> None:
    """Write a whole file or none of it."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text)
    temporary.replace(path)


def _merged(old: dict, new: dict) -> dict:
    """The new document, which also keeps the methods, learning rates and seeds that the folder already had."""
    methods = {m["name"]: m for m in [*old["methods"], *new["methods"]]}
    lists = {k: sorted({*old[k], *new[k]}) for k in ("lrs", "seeds")}
    return {**new, **lists, "methods": list(methods.values())}


def _differences(old: dict, new: dict) -> list[tuple[str, object, object]]:
    """What makes two documents' runs incomparable; the wording of a reason does not."""
    found = [d for part in ("settings", "corpus") for d in _walk(old[part], new[part], "")]
    return [d for d in found if d[0] != "compute.reason"]


def _walk(old: object, new: object, prefix: str) -> list[tuple[str, object, object]]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(k for k in new if k not in old)]
        return [d for k in keys for d in _walk(old.get(k), new.get(k), f"{prefix}{k}.")]
    old, new = json.loads(json.dumps(old)), json.loads(json.dumps(new))
    return [] if old == new else [(prefix.rstrip("."), old, new)]
