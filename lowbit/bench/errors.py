"""One error type for everything a user can put right, and the nearest-name hint that such errors carry."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType


class BenchError(ValueError):
    """Bad input: the command line prints the message as one sentence and exits with 2, without a traceback."""


def unknown(what: str, name: str, known: Iterable[str]) -> BenchError:
    """An error for a name that is not in `known`, with the nearest match first."""
    names = sorted(known)
    near = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return BenchError(f"unknown {what} {name!r}: {hint}known: {', '.join(names)}")


def need(module: str, extra: str = "bench") -> ModuleType:
    """Import an optional package at the moment it is used, or say how to install it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.split(".")[0]
        raise BenchError(f"this needs {package}, which is not installed: pip install 'lowbit[{extra}]'") from error
