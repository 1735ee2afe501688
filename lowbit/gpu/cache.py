"""What was compiled, kept on disk in the folder of lowbit/native/build.py; like that, it may be deleted at any time."""

from __future__ import annotations

import hashlib
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

from ..native import build

DIGEST = hashlib.sha256().digest_size


def kept(name: str, key: str, make: Callable[[], bytes]) -> bytes:
    """The bytes kept under a name and key; made and kept if they are not there.

    Where nothing can be written, they are made and a warning says so. Two processes do not make the same at once.
    """
    file = f"{name}-{key[:32]}"
    for place in build.places():
        if (found := _read(place / file)) is not None:
            return found
    problems = []
    for place in build.places(create=True):
        try:
            place.mkdir(0o700, parents=True, exist_ok=True)
            with build.one_at_a_time((place / file).with_suffix(".lock")):
                found = _read(place / file)  # another process may have made it while we waited
                if found is None:
                    found = make()
                    _write(place / file, found)
                return found
        except OSError as error:
            problems.append(f"cannot write {place}: {error.strerror or error}")
    warnings.warn(
        f"{'; '.join(problems)}: {name} is compiled by every process; set LOWBIT_CACHE to a folder to write to",
        RuntimeWarning,
        stacklevel=2,
    )
    return make()


def _read(path: Path) -> bytes | None:
    """What is in a file, if it is there and whole: its last bytes are the hash of the others."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    content, digest = data[:-DIGEST], data[-DIGEST:]
    return content if hashlib.sha256(content).digest() == digest else None


def _write(path: Path, content: bytes) -> None:
    """Whole or not at all: only within one file system is a replacement atomic."""
    handle, name = tempfile.mkstemp(prefix=".made-", dir=path.parent)
    try:
        with open(handle, "wb") as file:
            file.write(content + hashlib.sha256(content).digest())
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
