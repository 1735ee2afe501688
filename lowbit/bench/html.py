"""One self-contained page: everything a reader needs to believe or doubt the result, in a file that can be mailed."""

from __future__ import annotations

import base64
from html import escape
from pathlib import Path

from . import phrases
from .tables import Grid, grids

_CSS = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 76rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2rem } img { max-width: 100%; height: auto }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; display: block }
table { overflow-x: auto } th { border-bottom: 2px solid #888 }
th, td { padding: .3rem .6rem; border-bottom: 1px solid #ddd; text-align: right; vertical-align: bottom }
th:first-child, td:first-child { text-align: left; font-weight: 600; white-space: nowrap }
table.text td { text-align: left; overflow-wrap: anywhere } .small { color: #555; font-size: 13px }
.label { background: #E69F00; color: #000; padding: .1rem .5rem; border-radius: .3rem; font-size: .8rem }
figure { margin: 1.5rem 0 }
"""
_CAPTIONS = {
    "loss_curves": "Solid: high precision. Dashed: low-bit. One colour for each optimizer, black for the reference.",
    "memory": "What lives between the backward pass and the step. Activations are the same for every method.",
    "loss_vs_lr": "A flat curve forgives a wrong learning rate.",
}


def page(summary: dict, images: list[Path]) -> str:
    """The page as text; images are inlined."""
    demo = '<span class="label">demo</span> ' if summary["title"] == "demo" else ""
    body = [
        f"<h1>{demo}{escape(phrases.heading(summary))}</h1>", f"<p>{escape(phrases.setup(summary))}</p>",
        "<h2>Reading</h2>", _list(phrases.reading(summary)),
        f"<p><strong>What this run cannot show.</strong> {escape(phrases.cannot_show(summary))}</p>",
        *(_table(g) for g in grids(summary)), *(_image(i) for i in images),
        "<h2>Notes</h2>", _list(summary["notes"]), _failed(summary["failed"]), _record(summary),
    ]  # fmt: skip
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(phrases.heading(summary))}</title><style>{_CSS}</style></head><body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def _table(grid: Grid) -> str:
    heads = "".join(f"<th>{escape(h)}</th>" for h in grid.heads)
    rows = "".join("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>" for row in grid.rows)
    return (
        f"<h2>{escape(grid.title)}</h2><table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>"
        f'<p class="small">{escape(grid.caption)}</p>'
    )


def _image(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    caption = escape(_CAPTIONS.get(path.stem, ""))
    alt = escape(path.stem.replace("_", " "))
    return f'<figure><img alt="{alt}" src="data:image/png;base64,{data}"><p class="small">{caption}</p></figure>'


def _list(lines: list[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


def _failed(failed: list[dict]) -> str:
    if not failed:
        return ""
    return "<h2>Failed runs</h2>" + _list(
        [f"{r['method']}, lr {r['lr']:g}, seed {r['seed']}: {r['error']}" for r in failed]
    )


def _record(summary: dict) -> str:
    machine, corpus = summary["machine"], summary["corpus"]
    rows = {
        "command": summary["command"], "corpus": f"{corpus['name']}, {corpus['tokens']:,} {corpus['unit']}s",
        "corpus sha256": corpus["sha256"],
        **{k: ", ".join(map(str, v)) if isinstance(v, list) else str(v) for k, v in machine.items()},
    }  # fmt: skip
    cells = "".join(f"<tr><td>{escape(k)}</td><td>{escape(v)}</td></tr>" for k, v in rows.items())
    return f'<h2>How this was made</h2><table class="text"><tbody>{cells}</tbody></table>'
