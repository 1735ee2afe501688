"""The command line: exit codes, messages, help, JSON, and a whole small benchmark."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cases import STATE_FORMATS

from lowbit.__main__ import main
from lowbit.formats import formats
from lowbit.gpu import describe, nvrtc

SMALL = [
    "--steps",
    "4",
    "--batch",
    "2",
    "--seq",
    "16",
    "--val-windows",
    "4",
    "--seeds",
    "1",
    "--compute",
    "fp32",
    "--quiet",
]


@pytest.fixture
def text(tmp_path: Path) -> str:
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog; " * 100)
    return str(tmp_path / "text.txt")


@pytest.mark.parametrize("command", ["bench", "plan", "formats", "doctor"])
def test_help_teaches(command: str, capsys: pytest.CaptureFixture):
    assert main([command, "--help"]) == 0
    out = capsys.readouterr().out
    assert "examples\n" in out and f"lowbit {command}" in out and "--json" in out


def test_top(capsys: pytest.CaptureFixture):
    assert main(["--help"]) == 0
    assert main(["--version"]) == 0
    assert "lowbit bench --demo" in (out := capsys.readouterr().out) and "lowbit 0" in out
    assert main([]) == 2


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["bnch"], "unknown command 'bnch'; did you mean bench?"),
        (["--versoin"], "unknown option --versoin; did you mean --version?"),
        (["bench", "--sedes", "3"], "unknown option --sedes; did you mean --seeds?"),
        (["bench", "--demo", "--full"], "not allowed with argument"),
        (["bench", "--preset", "nanno"], "unknown preset 'nanno': did you mean 'nano'?"),
        (["bench", "--optim", "stablespm"], "unknown optimizer 'stablespm': did you mean 'stablespam'?"),
        (["bench", "--states", "4bits"], "unknown state format '4bits': did you mean '4bit'?"),
        (["bench", "--recipe", "in4"], "unknown recipe 'in4': did you mean 'int4'?"),
        (["bench", "--reference", "adm"], "unknown optimizer 'adm'"),
        (["bench", "--lr", "fast"], "--lr takes numbers such as 1e-3,3e-3, not 'fast'"),
        (["bench", "--lr", "-1"], "--lr must be positive, not -1"),
        (["bench", "--lr", "0"], "--lr must be positive"),
        (["bench", "--lr", ","], "--lr names nothing"),
        (["bench", "--seeds", "0"], "--seeds must be at least 1, not 0"),
        (["bench", "--seeds", "x"], "--seeds takes a count or a list"),
        (["bench", "--steps", "0"], "--steps must be at least 1, not 0"),
        (["bench", "--steps", "many"], "invalid int value: 'many'"),
        (["bench", "--warmup", "1"], "--warmup is a share of the steps"),
        (["bench", "--embed-lr-mult", "0"], "--embed-lr-mult must be positive"),
        (["bench", "--spike", "big"], "cannot read spike 'big'"),
        (["bench", "--data", "/nowhere"], "no such file or folder: /nowhere"),
        (["bench", "--resume"], "--resume needs the folder to continue: --out DIR"),
        (["bench", "--jobs", "-2"], "--jobs must be 0 or more"),
    ],
)
def test_bad_usage_is_one_clear_sentence_and_2(argv: list[str], message: str, capsys: pytest.CaptureFixture):
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and captured.err.startswith("lowbit: error: ")
    assert captured.out == ""


def test_short_corpus_leaves_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "short.txt").write_text("too short")
    assert main(["bench", "--data", str(tmp_path / "short.txt"), "--out", str(tmp_path / "out")]) == 2
    assert "too short" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_formats(capsys: pytest.CaptureFixture):
    assert main(["formats", "--json"]) == 0
    rows = {r["name"]: r for r in json.loads(capsys.readouterr().out)}
    assert set(rows) == set(formats()) and rows["fp32"]["bytes_per_value"] == 4 and rows["fp32"]["block"] is None
    assert rows["int8"]["bits"] == 8 and rows["int8"]["signed"] and rows["int8"]["bytes_per_value"] > 1
    assert rows["nvfp4"]["scale"] == "e4m3" and rows["fp32"]["scale"] is None
    assert {n for n, r in rows.items() if r["state"]} == set(STATE_FORMATS)
    assert main(["formats"]) == 0
    shown = capsys.readouterr().out
    assert "int8" in shown and "tensor" in shown and "16×16" in shown


def test_doctor(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["torch"] == torch.__version__ and found["cores"] >= 1
    assert {"compiler", "backend", "cuda", "packages", "advice", "cpu_features"} <= set(found)
    assert main(["doctor"]) == 0
    assert torch.__version__ in capsys.readouterr().out
    monkeypatch.setenv("LOWBIT_BACKEND", "refrence")
    assert main(["doctor", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["backend"] is None and "refrence" in found["advice"][0]


@pytest.mark.parametrize("forced", ["", "reference"])
def test_doctor_on_a_gpu(forced: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    """Driver, compiler, architecture, what is kept, and who does the work; or what is missing and the way out."""

    def tell() -> dict:
        main(["doctor", "--json"])
        return json.loads(capsys.readouterr().out)

    assert tell()["gpu"] is None or torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(describe, "Driver", lambda: SimpleNamespace(version=lambda: (13, 1), by="ctypes"))
    monkeypatch.setattr(describe, "_KERNEL_MODULE", tmp_path / "version")
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun Jul 27\n")
    compiler = SimpleNamespace(version=(13, 0), path="/lib/libnvrtc.so.13", architectures=lambda: [80, 90, 100])
    monkeypatch.setattr(nvrtc, "find", lambda newest: compiler)
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path))
    monkeypatch.setenv("LOWBIT_BACKEND", forced)
    (tmp_path / f"kernel-sm_90a-{'0' * 32}").write_bytes(b"")
    (tmp_path / f"kernel-sm_90a-{'0' * 32}.lock").write_bytes(b"")
    found = tell()["gpu"]
    assert found["driver"] == "580.65.06, up to CUDA 13.1, by ctypes"
    assert found["NVRTC"] == "13.0, /lib/libnvrtc.so.13"
    assert found["architecture"] == "sm_90a" and found["kernels kept"].startswith(f"1 in {tmp_path}")
    assert found["backend"].startswith("reference" if forced else "CUDA kernels")

    def none(newest: int):
        raise nvrtc.NoCompiler("there is none: pip install nvidia-cuda-nvrtc")

    monkeypatch.setattr(nvrtc, "find", none)
    told = tell()
    assert "architecture" not in told["gpu"] and told["gpu"]["backend"].startswith("reference")
    assert any(
        "no kernels, so steps are" in line and "pip install nvidia-cuda-nvrtc" in line for line in told["advice"]
    )


def test_bench_end_to_end(tmp_path: Path, text: str, capsys: pytest.CaptureFixture):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    out = tmp_path / "run"
    command = ["bench", "--data", text, "--out", str(out), "--jobs", "0", *SMALL]
    try:
        assert main([*command, "--json"]) == 0
        summary = json.loads(capsys.readouterr().out)
        names = [r["name"] for r in summary["methods"]]
        assert names == ["adam", "adam-fair", "adam-4bit", "stablespam", "stablespam-4bit"]
        assert [c["name"] for c in summary["columns"]] == ["adam-4bit", "stablespam-4bit"]
        assert "--json" in summary["command"] and summary["corpus"]["name"] == "text.txt"
        assert len((out / "results.jsonl").read_text().splitlines()) == 5
        assert {"report.html", "report.md", "loss_curves.png", "memory.png", "summary.json"} <= set(os.listdir(out))
        assert main(command) == 2, "a folder is not overwritten"
        assert "--resume" in capsys.readouterr().err
        assert main([*command, "--resume"]) == 0, "nothing left to do"
        shown = capsys.readouterr().out
        assert "Where the difference comes from" in shown and "one seed: no interval" in shown
        assert main([*command, "--resume", "--batch", "3"]) == 2
        assert "batch was 2, is 3" in capsys.readouterr().err
        assert len((out / "results.jsonl").read_text().splitlines()) == 5
    finally:
        torch.set_num_threads(before)


def test_a_crashed_run_is_exit_code_1(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch, capsys):
    def explode(job: object, *rest: object) -> dict:
        raise RuntimeError("boom")

    monkeypatch.setattr("lowbit.bench.train.train", explode)
    assert main(["bench", "--data", text, "--out", str(tmp_path / "run"), "--jobs", "0", *SMALL]) == 1
    err = capsys.readouterr().err
    assert "5 runs crashed; the first: adam: RuntimeError: boom" in err and "Traceback" not in err


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize("how", ["Ctrl-C", "kill"])
def test_interrupted_benchmark_leaves_a_usable_folder(tmp_path: Path, text: str, how: str):
    out = tmp_path / "run"
    few = ["--steps", "40", "--batch", "2", "--seq", "16", "--val-windows", "4", "--seeds", "500"]
    command = [sys.executable, "-m", "lowbit", "bench", "--data", text, "--out", str(out), "--jobs", "1",
               "--compute", "fp32", *few]  # fmt: skip
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    pipes = {"stderr": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    running = subprocess.Popen(command, **pipes, env=env, start_new_session=True)
    results = out / "results.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (results.exists() and results.read_text().count("\n") >= 2):
        time.sleep(0.1)
    if how == "Ctrl-C":
        os.killpg(running.pid, signal.SIGINT)  # a terminal sends it to the workers too
    else:
        running.send_signal(signal.SIGTERM)
    _, err = running.communicate(timeout=30)
    assert running.returncode == 130 and "finished runs are kept" in err and "--resume" in err
    assert "Traceback" not in err
    lines = [json.loads(x) for x in results.read_text().splitlines()]
    assert len(lines) >= 2 and {x["status"] for x in lines} == {"ok"}
    assert "unfinished" in (out / "report.md").read_text()
