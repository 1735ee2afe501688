"""The corpus of a benchmark: one row of token ids, its split, its checksum, and the windows that every method sees.

Batches are a function of (seed, step) and of nothing else, so that two methods of one seed train on the same bytes and
a difference of their losses can be paired. Validation is the last tenth, in fixed windows.
"""

from __future__ import annotations

import ctypes
import hashlib
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch

from . import readers
from .errors import BenchError

STDLIB = "stdlib"
_DTYPES = {"uint8": torch.uint8, "uint16": torch.uint16, "int32": torch.int32}


@dataclass(frozen=True)
class Corpus:
    """Token ids (perhaps memory-mapped), where validation begins, and what is needed to say which text this was."""

    name: str
    tokens: torch.Tensor
    vocab_size: int
    split: int
    documents: int
    sha256: str
    is_bytes: bool

    def describe(self) -> dict:
        """What a result file records; two runs may be compared only if their checksums agree."""
        return {
            "name": self.name, "sha256": self.sha256, "tokens": self.tokens.numel(), "documents": self.documents,
            "train_tokens": self.split, "validation_tokens": self.tokens.numel() - self.split,
            "vocab_size": self.vocab_size, "unit": "byte" if self.is_bytes else "token",
        }  # fmt: skip

    def check_window(self, seq: int) -> None:
        """Refuse a corpus whose training or validation part is shorter than one window and its next token."""
        for part, length in (("training", self.split), ("validation", self.tokens.numel() - self.split)):
            if length < seq + 1:
                raise BenchError(
                    f"corpus {self.name} is too short: its {part} part has {length} tokens, one window needs {seq + 1} "
                    f"(give more text, or a smaller --seq)"
                )

    def batch(self, seed: int, step: int, batch: int, seq: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and next tokens of one step, each `[batch, seq]`: random windows, the same for every method."""
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        starts = torch.randint(0, self.split - seq, (batch,), generator=generator)
        return self._windows(starts.tolist(), seq)

    def validation(self, windows: int, seq: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Fixed windows spread evenly over the validation part; fewer if it is too short to hold that many apart."""
        length = self.tokens.numel() - self.split
        windows = max(1, min(windows, (length - 1) // seq))
        last, gaps = length - 1 - seq, max(1, windows - 1)
        return self._windows([self.split + i * last // gaps for i in range(windows)], seq)

    def _windows(self, starts: list[int], seq: int) -> tuple[torch.Tensor, torch.Tensor]:
        rows = torch.stack([self.tokens[s : s + seq + 1].to(torch.int64) for s in starts])
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    def store(self, path: Path) -> dict:
        """Write the tokens to `path`; `restore` maps them in another process without reading the sources again."""
        with path.open("wb") as file:
            for part in self.tokens.split(1 << 24):
                file.write(_as_bytes(part))
        kind = str(self.tokens.dtype).removeprefix("torch.")
        return {**self.describe(), "split": self.split, "path": str(path), "dtype": kind}


def restore(handle: dict) -> Corpus:
    """The corpus that `Corpus.store` wrote."""
    dtype = _DTYPES[handle["dtype"]]
    tokens = torch.from_file(handle["path"], shared=False, size=handle["tokens"], dtype=dtype)
    return Corpus(
        name=handle["name"], tokens=tokens, vocab_size=handle["vocab_size"], split=handle["split"],
        documents=handle["documents"], sha256=handle["sha256"], is_bytes=handle["unit"] == "byte",
    )  # fmt: skip


def load(sources: list[str] | None = None, *, text_key: str = "text", vocab_size: int | None = None,
         max_bytes: int = 20_000_000) -> Corpus:  # fmt: skip
    """Load what `--data` names; nothing named means the text of the installed Python standard library.

    Args:
        sources: paths of text, JSON-lines or token files, folders, or `hf:NAME[:config]`.
        text_key: key that holds the text in JSON lines and Hugging Face data sets.
        vocab_size: of the model. Bytes need 256 (the default); of a token file the default is its largest id + 1.
        max_bytes: how much of a Hugging Face stream to read.
    """
    if not sources or sources == [STDLIB]:
        name = f"Python {platform.python_version()} standard library"
        return _from_documents(name, readers.standard_library(), vocab_size)
    for source in sources:
        if not source.startswith("hf:") and not Path(source).exists():
            raise BenchError(f"no such file or folder: {source}")
    tokenized = [s for s in sources if readers.suffix_of(Path(s)) in readers.TOKEN_SUFFIXES and Path(s).is_file()]
    if tokenized:
        if len(sources) > 1:
            raise BenchError(f"a token file stands alone, but --data names {len(sources)} things: {', '.join(sources)}")
        return _from_tokens(Path(tokenized[0]).name, readers.token_file(Path(tokenized[0])), vocab_size)
    parts = [
        readers.hugging_face(s[3:], text_key, max_bytes) if s.startswith("hf:")
        else readers.text_documents(Path(s), text_key) for s in sources
    ]  # fmt: skip
    name = ", ".join(s if s.startswith("hf:") else Path(s).name or s for s in sources)
    return _from_documents(name, chain.from_iterable(parts), vocab_size)


def _from_documents(name: str, documents: Iterable[bytes], vocab_size: int | None) -> Corpus:
    data = bytearray()
    ends: list[int] = []
    for document in documents:
        if document:
            data += document if document.endswith(b"\n") else document + b"\n"
            ends.append(len(data))
    if not data:
        raise BenchError(f"corpus {name} is empty")
    if vocab_size is not None and vocab_size < 256 and max(data) >= vocab_size:
        raise BenchError(f"corpus {name} has byte {max(data)}, but --vocab-size is {vocab_size}: text needs 256")
    # The last tenth of the documents, so that no text is cut in two; with few documents the last tenth of the text.
    split = ends[len(ends) - len(ends) // 10 - 1] if len(ends) >= 10 else len(data) - len(data) // 10
    digest = hashlib.sha256(data).hexdigest()
    tokens = torch.frombuffer(data, dtype=torch.uint8)
    return Corpus(name, tokens, vocab_size or 256, split, len(ends), digest, is_bytes=True)


def _from_tokens(name: str, tokens: torch.Tensor, vocab_size: int | None) -> Corpus:
    digest = hashlib.sha256()
    largest = 0
    for part in tokens.split(1 << 24):
        digest.update(_as_bytes(part))
        largest = max(largest, int(part.to(torch.int32).max()))
    if vocab_size is not None and largest >= vocab_size:
        raise BenchError(f"{name} holds token id {largest}, but --vocab-size is {vocab_size}: ids must be below it")
    split = tokens.numel() - tokens.numel() // 10
    return Corpus(name, tokens, vocab_size or largest + 1, split, 1, digest.hexdigest(), is_bytes=False)


def _as_bytes(part: torch.Tensor) -> bytes:
    part = part.contiguous()
    return ctypes.string_at(part.data_ptr(), part.numel() * part.element_size())  # without numpy, which torch may lack
