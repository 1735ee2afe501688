"""The report: tables, plots and page from canned results, and the sentences that follow from the numbers."""

import json
import re
import sys
from pathlib import Path

import pytest
from rich.console import Console
from test_bench_stats import METHODS, document, line

from lowbit.bench import phrases, report
from lowbit.bench.errors import BenchError
from lowbit.bench.plots import draw, styles
from lowbit.bench.summary import summarize
from lowbit.bench.tables import grids

MACHINE = {"cpu": "a CPU", "torch": "2.13", "cpu_features": ["avx2", "fma"], "cuda": None}


def write(folder: Path, lrs: list[float], seeds: list[int], drop: int = 0) -> dict:
    """A run folder: hp gains .1, its 4-bit form gives .03 back."""
    made = {**document(METHODS, lrs, seeds), "version": 1, "title": "demo", "machine": MACHINE}
    made["command"] = "lowbit bench --demo --data '<b>.txt'"
    made["corpus"] |= {"tokens": 123456, "sha256": "abcdef0123456789" * 4}
    lines = [
        line(m, lr, s, 2.0 + gain + 0.1 * s + 0.001 * s * gain + lr, final_val_dense=1.95 if m == "hp-4bit" else None)
        for m, gain in (("ref", 0.0), ("hp", -0.1), ("hp-4bit", -0.07))
        for lr in lrs
        for s in seeds
    ]
    folder.mkdir(exist_ok=True)
    (folder / "settings.json").write_text(json.dumps(made))
    (folder / "results.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines[: len(lines) - drop]))
    return made


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    write(folder, [1e-3, 3e-3], [0, 1, 2])
    report.build(folder)
    return folder


def test_files(built: Path):
    assert {p.name for p in built.iterdir()} == {
        "settings.json", "results.jsonl", "summary.json", "report.md", "report.html",
        "loss_curves.png", "memory.png", "loss_vs_lr.png",
    }  # fmt: skip
    assert all((built / n).read_bytes()[:4] == b"\x89PNG" for n in ("loss_curves.png", "memory.png", "loss_vs_lr.png"))


def test_page_is_self_contained_and_complete(built: Path):
    page = (built / "report.html").read_text()
    assert not re.search('(src|href)=(?!"data:)', page) and "http" not in page and "<script" not in page
    assert page.count('src="data:image/png;base64,') == 3
    for needed in ("abcdef0123456789" * 4, "lowbit bench --demo", "a CPU", ">demo<", "cannot show", "1 optimizer",
                   "fp32 compute, bf16-rounded storage", "hp-4bit"):  # fmt: skip
        assert needed in page, needed
    assert "<b>.txt" not in page and "&lt;b&gt;.txt" in page, "what comes from outside is escaped"


def test_every_table_and_plot_is_labelled_with_the_arithmetic(built: Path):
    summary = json.loads((built / "summary.json").read_text())
    assert [g.title for g in grids(summary)] == [
        "Loss", "Against the baselines", "Where the difference comes from", "Final loss at every learning rate",
        "Memory", "Speed and gradients", "Methods",
    ]  # fmt: skip
    assert all(summary["compute"] in g.caption for g in grids(summary))
    assert all(len(row) == len(g.heads) for g in grids(summary) for row in g.rows)


def test_numbers_in_the_markdown(built: Path):
    text = (built / "report.md").read_text()
    assert "| hp-4bit | 0.001 | 2.031 ± 0.100 |" in text
    row = next(x for x in text.splitlines() if x.startswith("| hp-4bit | -0.1"))
    # by hand: gains -.1, -.1001, -.1002; costs .03, .03003, .03006; sums -.07, -.07007, -.07014
    cells = [c.strip() for c in row.split("|")[2:-1]]
    assert cells[:3] == ["-0.100 [-0.100, -0.100]", "+0.030 [+0.030, +0.030]", "-0.070 [-0.070, -0.070]"]
    assert cells[3] == "better, 3/3"
    assert "| hp-4bit | 200 B | – | 100 B | 200 B | 5.00 | 1 B |" in text, "weights, master, states, gradients"
    assert "Made by: `lowbit bench --demo" in text


def test_terminal_shows_the_same(built: Path):
    console = Console(width=130, record=True, file=(built / "terminal").open("w"))
    report.show(json.loads((built / "summary.json").read_text()), console)
    console.file.close()
    (built / "terminal").unlink()
    text = console.export_text()
    for needed in ("hp-4bit", "-0.070 [-0.070, -0.070]", "better, 3/3", "cannot show", "5.00", "Reading"):
        assert needed in text


def test_sentences(tmp_path: Path):
    write(tmp_path, [1e-3], [0])
    summary = report.build(tmp_path)
    said = " ".join(phrases.reading(summary))
    assert "in high precision hp ends 0.100 below the reference (one seed, no interval)" in said
    assert "ends 0.030 above hp in high precision" in said and "together 0.070 below the reference" in said
    assert "51,200 bytes" in phrases.cannot_show(summary)


def test_unfinished_and_empty_folders(tmp_path: Path):
    write(tmp_path / "a", [1e-3], [0, 1], drop=2)
    summary = report.build(tmp_path / "a")
    assert "unfinished, 2 of 6 runs missing" in phrases.heading(summary) and summary["columns"] == []
    write(tmp_path / "b", [1e-3], [0], drop=3)
    assert "nothing can be compared" in phrases.reading(report.build(tmp_path / "b"))[0]


def test_diverged_runs_are_named():
    made = document(METHODS, [1e-3], [0])
    summary = summarize(made, [line("ref", 1e-3, 0, 2.0), line("hp", 1e-3, 0, None), line("hp-4bit", 1e-3, 0, 2.1)])
    loss = {row[0]: row for row in grids(summary)[0].rows}
    assert loss["hp"][2] == "diverged" and loss["hp"][-1] == "1/1" and loss["ref"][-1] == "no"
    assert "hp: 1 of 1 runs diverged (training loss not finite at step 7)" in " ".join(phrases.reading(summary))


def test_plots_need_matplotlib_and_say_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write(tmp_path, [1e-3], [0])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    said: list[str] = []
    summary = report.build(tmp_path, said.append)
    assert said == ["no plots: this needs matplotlib, which is not installed: pip install 'lowbit[bench]'"]
    assert (tmp_path / "report.html").exists() and not list(tmp_path.glob("*.png"))
    with pytest.raises(BenchError, match="matplotlib"):
        draw(summary, tmp_path)


def test_pairs_share_a_colour_and_differ_in_dash(built: Path):
    look = styles(json.loads((built / "summary.json").read_text()))
    assert look["hp"]["color"] == look["hp-4bit"]["color"] != look["ref"]["color"] == "#000000"
    assert look["hp"]["linestyle"] == "-" != look["hp-4bit"]["linestyle"]


def test_sizes():
    said = [phrases.size(n) for n in (0, 999, 1000, 279168, 1_116_756, 8_030_000_000, 4.2e12)]
    assert said == ["0 B", "999 B", "1 kB", "279 kB", "1.12 MB", "8.03 GB", "4.2e+03 GB"]
