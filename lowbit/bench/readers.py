"""From what the user names to documents: text as bytes, or token ids already made by someone else's tokenizer.

Every reader yields documents in a fixed order, because the corpus checksum, and with it the right to compare two runs,
depends on that order.
"""

from __future__ import annotations

import gzip
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch

from .errors import BenchError, need

TEXT_SUFFIXES = (".txt", ".md", ".py")
JSONL_SUFFIXES = (".jsonl", ".jsonl.gz", ".json.gz")
TOKEN_SUFFIXES = (".bin", ".npy")
KNOWN = ", ".join((*TEXT_SUFFIXES, *JSONL_SUFFIXES, *TOKEN_SUFFIXES))

# Tests repeat themselves, encodings and pydoc_data are tables, and the rest differs from machine to machine.
_SKIPPED_FOLDERS = {
    "test", "tests", "idle_test", "encodings", "pydoc_data", "site-packages", "dist-packages", "__pycache__",
}  # fmt: skip
_SKIPPED_PREFIXES = ("_sysconfigdata", "sitecustomize", "usercustomize")


def standard_library() -> Iterator[bytes]:
    """The sources of the running Python's standard library, one document per file, in sorted order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = False
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
        folders = path.relative_to(root).parts[:-1]
        if any(f in _SKIPPED_FOLDERS or f.startswith("config-") for f in folders):
            continue
        if path.name.startswith(_SKIPPED_PREFIXES):
            continue
        found = True
        yield path.read_bytes()
    if not found:
        raise BenchError(f"no standard library sources under {root} (a stripped Python?): name a text with --data")


def text_documents(path: Path, text_key: str) -> Iterator[bytes]:
    """The documents of one text or JSON-lines file, or of every such file under a folder."""
    if path.is_dir():
        files = [p for p in sorted(path.rglob("*")) if p.is_file() and suffix_of(p) in TEXT_SUFFIXES + JSONL_SUFFIXES]
        if not files:
            raise BenchError(f"no readable file under {path}: looked for {', '.join(TEXT_SUFFIXES + JSONL_SUFFIXES)}")
        for file in files:
            yield from text_documents(file, text_key)
    elif suffix_of(path) in JSONL_SUFFIXES:
        yield from _json_lines(path, text_key)
    elif suffix_of(path) in TEXT_SUFFIXES:
        yield path.read_bytes()
    else:
        raise BenchError(f"cannot read {path}: its suffix is not one of {KNOWN}")


def suffix_of(path: Path) -> str:
    """The suffix that decides the reader, `.gz` together with the one before it, in lower case."""
    parts = [s.lower() for s in path.suffixes]
    return "".join(parts[-2:]) if parts and parts[-1] == ".gz" else "".join(parts[-1:])


def _json_lines(path: Path, text_key: str) -> Iterator[bytes]:
    gzipped = path.name.lower().endswith(".gz")
    try:
        with gzip.open(path, "rb") if gzipped else path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _text_of(line, text_key, f"{path} line {number}")
    except (gzip.BadGzipFile, EOFError) as error:
        raise BenchError(f"{path} is not a complete gzip file: {error}") from error


def _text_of(line: bytes, text_key: str, where: str) -> bytes:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise BenchError(f"{where} is not JSON: {error}") from error
    if not isinstance(record, dict) or text_key not in record:
        keys = ", ".join(map(str, record)) if isinstance(record, dict) else type(record).__name__
        raise BenchError(f"{where} has no key {text_key!r} (it has: {keys}): choose one with --text-key")
    if not isinstance(record[text_key], str):
        raise BenchError(f"{where}: {text_key!r} is not text but {type(record[text_key]).__name__}")
    return record[text_key].encode()


def hugging_face(spec: str, text_key: str, max_bytes: int) -> Iterator[bytes]:
    """Documents of `NAME[:config]` streamed from the hub, until `max_bytes` of text have been read."""
    datasets = need("datasets", "hf")
    name, _, config = spec.partition(":")
    if not name:
        raise BenchError("hf: names no data set: write hf:NAME or hf:NAME:config, for example hf:allenai/c4:en")
    read = 0
    try:
        for record in datasets.load_dataset(name, config or None, split="train", streaming=True):
            if text_key not in record:
                raise BenchError(
                    f"hf:{spec} has no column {text_key!r} (it has: {', '.join(record)}): choose one with --text-key"
                )
            text = str(record[text_key]).encode()
            yield text
            read += len(text)
            if read >= max_bytes:
                return
    except (OSError, ValueError) as error:
        if isinstance(error, BenchError):
            raise
        raise BenchError(f"could not load hf:{spec}: {error}") from error


def token_file(path: Path) -> torch.Tensor:
    """Token ids of a flat uint16 file (nanoGPT's .bin) or of a one-dimensional integer .npy, memory-mapped."""
    if path.stat().st_size == 0:
        raise BenchError(f"{path} is empty")
    if path.suffix.lower() == ".bin":
        count, rest = divmod(path.stat().st_size, 2)
        if rest:
            raise BenchError(f"{path} has an odd number of bytes, so it is not a file of uint16 tokens")
        return torch.from_file(str(path), shared=False, size=count, dtype=torch.uint16)
    numpy = need("numpy")
    try:
        array = numpy.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        raise BenchError(f"{path} is not a .npy file of numbers: {error}") from error
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise BenchError(f"{path} must hold one row of integers, not {array.dtype} of shape {array.shape}")
    if array.size == 0:
        raise BenchError(f"{path} is empty")
    if array.min() < 0 or array.max() > 2**31 - 1:
        raise BenchError(f"{path} holds ids outside 0 … 2^31 - 1: {int(array.min())} … {int(array.max())}")
    return torch.from_numpy(array.astype(numpy.uint16 if array.max() < 2**16 else numpy.int32))
