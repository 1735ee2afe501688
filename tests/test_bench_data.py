"""The benchmark's corpus: every reader, the split, the windows, and what is refused."""

import gzip
import hashlib
import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from lowbit.bench import data
from lowbit.bench.errors import BenchError


def text(n: int = 3000) -> bytes:
    return bytes(97 + (i * i) % 26 for i in range(n))


def refuses(match: str):
    return pytest.raises(BenchError, match=match)


def test_text_file_becomes_its_bytes(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes(b"hello\n")
    corpus = data.load([str(tmp_path / "a.txt")])
    assert corpus.tokens.tolist() == list(b"hello\n")
    assert (corpus.vocab_size, corpus.documents, corpus.name) == (256, 1, "a.txt")
    assert corpus.sha256 == hashlib.sha256(b"hello\n").hexdigest()


def test_several_files_and_a_folder_come_in_sorted_order(tmp_path: Path):
    for name, body in (("b.txt", b"B\n"), ("a.md", b"A\n"), ("sub/c.py", b"C"), ("ignored.png", b"X")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(body)
    folder = data.load([str(tmp_path)])
    assert bytes(folder.tokens.tolist()) == b"A\nB\nC\n", "a document without a final newline gets one"
    both = data.load([str(tmp_path / "b.txt"), str(tmp_path / "a.md")])
    assert bytes(both.tokens.tolist()) == b"B\nA\n", "named files keep the order given"


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".json.gz"])
def test_json_lines(tmp_path: Path, suffix: str):
    lines = "".join(json.dumps({"body": f"doc {i} é", "other": 1}) + "\n" for i in range(20)).encode()
    path = tmp_path / f"x{suffix}"
    path.write_bytes(gzip.compress(lines, mtime=0) if suffix.endswith("gz") else lines)
    corpus = data.load([str(path)], text_key="body")
    wanted = "".join(f"doc {i} é\n" for i in range(20)).encode()
    assert bytes(corpus.tokens.tolist()) == wanted and corpus.documents == 20
    held_out = bytes(corpus.tokens[corpus.split :].tolist())
    assert held_out == "doc 18 é\ndoc 19 é\n".encode(), "validation is the last tenth of the documents, whole"


@pytest.mark.parametrize("kind", ["bin", "npy", "npy64"])
def test_token_files(tmp_path: Path, kind: str):
    ids = np.arange(1000) * 7 % 50257
    path = tmp_path / f"tokens.{kind[:3]}"
    if kind == "bin":
        ids.astype("<u2").tofile(path)
    else:
        np.save(path, ids.astype(np.uint16 if kind == "npy" else np.int64))
    corpus = data.load([str(path)])
    assert corpus.tokens.to(torch.int64).tolist() == ids.tolist()
    assert corpus.vocab_size == ids.max() + 1 and corpus.split == 900 and not corpus.is_bytes
    assert corpus.describe()["unit"] == "token"
    assert data.load([str(path)], vocab_size=50304).vocab_size == 50304


def test_hugging_face_stream_stops_at_the_limit(monkeypatch: pytest.MonkeyPatch):
    asked = []

    def load_dataset(*args: object, **options: object):
        asked.append((args, options))
        return ({"text": "x" * 99} for _ in range(10**9))

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    corpus = data.load(["hf:allenai/c4:en"], max_bytes=5000)
    assert asked == [(("allenai/c4", "en"), {"split": "train", "streaming": True})]
    assert corpus.documents == 51 and corpus.tokens.numel() == 5100


def test_standard_library_is_the_default_and_leaves_out_tests():
    corpus = data.load()
    assert corpus.tokens.numel() > 3_000_000 and corpus.documents > 300
    assert corpus.sha256 == data.load().sha256, "the same text on every call"
    body = bytes(corpus.tokens[:2_000_000].tolist())
    assert b"class " in body and b"unittest.main()" not in body.split(b"class _StoreAction")[0]


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("empty.txt", b"", {}, "is empty"),
        ("empty.bin", b"", {}, "is empty"),
        ("odd.bin", b"abc", {}, "odd number of bytes"),
        ("x.csv", b"a,b", {}, "suffix is not one of .txt"),
        ("x.jsonl", b'{"body": "a"}\n', {}, "line 1 has no key 'text'.*has: body.*--text-key"),
        ("x.jsonl", b'{"text": "a"}\nnot json\n', {}, "line 2 is not JSON"),
        ("x.jsonl", b'{"text": 3}\n', {}, "not text but int"),
        ("x.jsonl", b"[1]\n", {}, "no key"),
        ("x.jsonl.gz", b"plain", {}, "not a complete gzip file"),
        ("x.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 99, mtime=0)[:-9], {}, "not a complete gzip file"),
        ("x.npy", b"nonsense", {}, "not a .npy file"),
        ("x.bin", np.array([5, 300], "<u2").tobytes(), {"vocab_size": 300}, "token id 300.*--vocab-size is 300"),
        ("x.txt", b"a\xff", {"vocab_size": 128}, "byte 255.*--vocab-size is 128"),
    ],
)
def test_refused(tmp_path: Path, name: str, content: bytes, options: dict, message: str):
    (tmp_path / name).write_bytes(content)
    with refuses(message):
        data.load([str(tmp_path / name)], **options)


def test_refused_arrays(tmp_path: Path):
    for array, message in (
        (np.zeros((2, 2), np.uint16), "one row of integers"),
        (np.zeros(3), "one row of integers"),
        (np.array([-1, 2]), "ids outside"),
        (np.zeros(0, np.uint16), "is empty"),
    ):
        np.save(tmp_path / "x.npy", array)
        with refuses(message):
            data.load([str(tmp_path / "x.npy")])


def test_refused_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with refuses("no such file or folder: /nowhere/x.txt"):
        data.load(["/nowhere/x.txt"])
    (tmp_path / "folder").mkdir()
    with refuses("no readable file under"):
        data.load([str(tmp_path / "folder")])
    (tmp_path / "a.bin").write_bytes(b"abcd")
    with refuses("a token file stands alone"):
        data.load([str(tmp_path / "a.bin"), str(tmp_path / "a.bin")])
    monkeypatch.setitem(sys.modules, "datasets", None)
    with refuses(r"pip install 'lowbit\[hf\]'"):
        data.load(["hf:some/set"])
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace())
    with refuses("names no data set"):
        data.load(["hf:"])


def test_corpus_shorter_than_a_window(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes(text(400))
    corpus = data.load([str(tmp_path / "a.txt")])
    corpus.check_window(39)  # validation has 40 tokens: one window and its next token
    with refuses("validation part has 40 tokens, one window needs 41"):
        corpus.check_window(40)


def corpus_of(body: bytes, tmp_path: Path) -> data.Corpus:
    (tmp_path / "c.txt").write_bytes(body)
    return data.load([str(tmp_path / "c.txt")])


def test_batches_depend_on_seed_and_step_only(tmp_path: Path):
    corpus = corpus_of(text(), tmp_path)
    x, y = corpus.batch(3, 5, batch=4, seq=16)
    torch.manual_seed(99)
    again, _ = corpus.batch(3, 5, batch=4, seq=16)
    assert x.shape == y.shape == (4, 16) and torch.equal(x, again) and torch.equal(x[:, 1:], y[:, :-1])
    assert not torch.equal(x, corpus.batch(3, 6, 4, 16)[0]) and not torch.equal(x, corpus.batch(4, 5, 4, 16)[0])


def test_training_never_sees_validation(tmp_path: Path):
    corpus = corpus_of(b"t" * 901 + b"v" * 99, tmp_path)
    assert corpus.split == 901  # of 1001: the final newline counts
    drawn = torch.cat([torch.stack(corpus.batch(0, step, 64, 16)) for step in range(20)])
    assert ord("v") not in drawn[drawn != ord("t")].tolist()
    held_out, _ = corpus.validation(5, 16)
    assert set(held_out.flatten().tolist()) == {ord("v")}


def test_validation_windows_are_fixed_and_reach_both_ends(tmp_path: Path):
    corpus = corpus_of(text(10_000), tmp_path)
    x, y = corpus.validation(8, 16)
    assert x.shape == (8, 16) and torch.equal(x, corpus.validation(8, 16)[0])
    assert torch.equal(x[0], corpus.tokens[corpus.split : corpus.split + 16].to(torch.int64))
    assert torch.equal(y[-1], corpus.tokens[-16:].to(torch.int64))
    assert corpus.validation(10_000, 16)[0].shape[0] == (corpus.tokens.numel() - corpus.split - 1) // 16


def test_a_stored_corpus_is_the_same_corpus(tmp_path: Path):
    ids = np.arange(500, dtype="<u2") * 100
    (tmp_path / "x.bin").write_bytes(ids.tobytes())
    for corpus in (corpus_of(text(), tmp_path), data.load([str(tmp_path / "x.bin")])):
        handle = json.loads(json.dumps(corpus.store(tmp_path / "tokens")))
        back = data.restore(handle)
        assert torch.equal(back.tokens, corpus.tokens) and back.tokens.dtype == corpus.tokens.dtype
        assert back.describe() == corpus.describe() and back.split == corpus.split
