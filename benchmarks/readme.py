"""Write the results table of README.md, and docs/state-formats.md, from committed results.

python benchmarks/readme.py            write them
python benchmarks/readme.py --check    fail if they are not what the results say (a test does this)
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import state_formats  # the script beside this one

from lowbit.bench import phrases, tables
from lowbit.bench.folder import Folder
from lowbit.bench.report import markdown_grid, notes
from lowbit.bench.summary import summarize

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- results -->", "<!-- /results -->"


def results_section() -> str:
    """The README's part: final losses, the three columns, memory, and what to make of them."""
    folder = Folder(RESULTS / "bench-full")
    summary = summarize(folder.document(), folder.results())
    parts = [f"`lowbit bench --full`: {phrases.setup(summary)}"]
    parts.append(in_short(summary))
    parts.append("![Final loss against learning rate](benchmarks/results/bench-full/loss_vs_lr.png)")
    for grid in (tables.loss(summary), tables.columns(summary), tables.memory(summary), tables.speed(summary)):
        parts.append(f"**{grid.title}.** {grid.caption}\n\n{markdown_grid(grid).strip()}")
    parts.append("**Mind:**\n\n" + "\n".join(f"- {line}" for line in notes(summary)))
    return "\n\n".join(parts)


def in_short(summary: dict) -> str:
    """One sentence a low-bit method: loss against the reference, memory, speed."""
    rows = {row["name"]: row for row in summary["methods"]}
    reference = rows[summary["reference"]]
    lines = []
    for column in summary["columns"]:
        row = rows[column["name"]]
        slower = reference["tokens_per_second"] / row["tokens_per_second"]
        lines.append(
            f"- **{row['label']}**: {phrases.difference(column['sum'])} nats/byte against {reference['label']} "
            f"({phrases.verdict(column['sum'])}); {row['bytes_per_parameter']:.1f} bytes per parameter for weights, "
            f"states and gradients instead of {reference['bytes_per_parameter']:.1f}; {slower:.1f} times slower here."
        )
    return "\n".join(["In short (at each method's best learning rate; negative is better):", "", *lines])


def readme() -> str:
    """README.md with the results as they are now."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{results_section()}\n{END}{rest.split(END)[1]}"


def formats_page() -> str:
    """docs/state-formats.md with the table as it is now."""
    text = (ROOT / "docs" / "state-formats.md").read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    made = state_formats.table(json.loads((RESULTS / "state_formats.json").read_text()))
    return f"{before}{BEGIN}\n{made}\n{END}{rest.split(END)[1]}"


def main() -> int:
    """Write, or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = []
    for path, wanted in ((ROOT / "README.md", readme()), (ROOT / "docs" / "state-formats.md", formats_page())):
        if path.read_text(encoding="utf-8") != wanted:
            stale.append(path.name)
            if not check:
                path.write_text(wanted, encoding="utf-8")
    if check and stale:
        print(f"not what benchmarks/results says: {', '.join(stale)}; run python benchmarks/readme.py", file=sys.stderr)
    return int(bool(check and stale))


if __name__ == "__main__":
    sys.exit(main())
