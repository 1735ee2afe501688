"""The report of a run folder: its tables on the terminal, as Markdown, and with plots as one HTML page."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from . import phrases
from .errors import BenchError
from .folder import Folder, write_atomically
from .summary import summarize
from .tables import Grid, grids

if TYPE_CHECKING:
    from rich.console import Console


def build(path: Path, say: Callable[[str], None] = print) -> dict:
    """Write summary.json, report.md, the plots and report.html into a run folder; returns the summary."""
    from .html import page

    folder = Folder(path)
    summary = summarize(folder.document(), folder.results())
    write_atomically(path / "summary.json", json.dumps(summary, indent=1, allow_nan=False) + "\n")
    write_atomically(path / "report.md", markdown(summary))
    images: list[Path] = []
    if summary["methods"]:
        try:
            from .plots import draw

            images = draw(summary, path)
        except BenchError as error:  # matplotlib is optional, the numbers are not
            say(f"no plots: {error}")
    write_atomically(path / "report.html", page(summary, images))
    return summary


def show(summary: dict, console: Console) -> None:
    """The report on a terminal."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    console.print(f"\n[bold]{phrases.heading(summary)}[/bold]\n{phrases.setup(summary)}\n", highlight=False)
    for grid in grids(summary):
        if grid.detail:
            continue
        table = Table(
            title=grid.title,
            caption=grid.caption,
            title_justify="left",
            caption_justify="left",
            box=SIMPLE_HEAD,
            padding=(0, 1),
        )
        for i, head in enumerate(grid.heads):
            table.add_column(head, justify="right" if i else "left", no_wrap=i == 0)
        for row in grid.rows:
            table.add_row(*row)
        console.print(table, highlight=False)
    for title, lines in (("Reading", phrases.reading(summary)), ("Notes", notes(summary))):
        console.print(f"[bold]{title}[/bold]")
        for line in lines:
            console.print(f"• {line}", highlight=False)


def markdown(summary: dict) -> str:
    """The whole report as Markdown: tables, reading and notes, without plots."""
    parts = [f"# {phrases.heading(summary)}\n", phrases.setup(summary) + "\n"]
    parts += [f"## {g.title}\n\n{markdown_grid(g)}\n{g.caption}\n" for g in grids(summary)]
    for title, lines in (("Reading", phrases.reading(summary)), ("Notes", notes(summary))):
        parts.append(f"## {title}\n\n" + "\n".join(f"- {line}" for line in lines) + "\n")
    parts.append(f"Made by: `{summary['command']}`\n")
    return "\n".join(parts)


def markdown_grid(grid: Grid) -> str:
    """One table as Markdown."""
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in (grid.heads, *grid.rows)]
    lines = [f"| {' | '.join(row)} |" for row in escaped]
    lines.insert(1, "|---|" + "---:|" * (len(grid.heads) - 1))
    return "\n".join(lines) + "\n"


def notes(summary: dict) -> list[str]:
    """What limits the result, the size of the run last."""
    return [*summary["notes"], phrases.cannot_show(summary)]
