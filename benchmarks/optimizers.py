"""Write the table of docs/optimizers.md: what each optimizer keeps for a 60M LLaMA, in each state format.

python benchmarks/optimizers.py            write it
python benchmarks/optimizers.py --check    fail if it is not what the optimizers keep (a test does this)

Nothing is trained and nothing allocated: the model's tensors are on the meta device.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import timing
import torch

import lowbit
from lowbit.bench.model import Llama, preset
from lowbit.bench.report import markdown_grid
from lowbit.bench.tables import Grid

PAGE = timing.ROOT / "docs" / "optimizers.md"
START, END = "<!-- memory -->\n", "<!-- /memory -->\n"
STATES = ("fp32", "bf16", "8bit", "4bit")
O = lowbit.optim
HEADS = preset("60m").heads
OPTIMIZERS: dict[str, Callable[..., O.Rule]] = {
    "AdamW": O.AdamW,
    "StableSPAM": O.StableSPAM,
    "SPAM": O.SPAM,
    "SPAM, density 1/4": lambda p, **kw: O.SPAM(p, density=0.25, **kw),
    "AdamMini": lambda p, **kw: O.AdamMini(p, num_heads=HEADS, **kw),
    "SlimAdam": O.SlimAdam,
    "AdamS": O.AdamS,
    "Lion": O.Lion,
    "SGD, momentum": lambda p, **kw: O.SGD(p, lr=1e-3, momentum=0.9, **kw),
    "Adafactor": O.Adafactor,
    "AdaPM": O.AdaPM,
    "AdaPM, Adam-mini's v": lambda p, **kw: O.AdaPM(p, second_moment="mini", **kw),
    "SCALE": O.SCALE,
    "Muon": O.Muon,
    "SWAN": O.SWAN,
    "GaLore, rank 128": lambda p, **kw: O.GaLore(p, rank=128, **kw),
    "Fira, rank 128": lambda p, **kw: O.Fira(p, rank=128, **kw),
    "APOLLO, rank 128": lambda p, **kw: O.APOLLO(p, rank=128, **kw),
    "APOLLOMini": O.APOLLOMini,
}


def row(name: str, model: torch.nn.Module) -> list[str]:
    """An optimizer: bytes of state per parameter in each format, and how often a step reads the gradient."""
    cells: list[Any] = [name]
    values = sum(p.numel() for p in model.parameters())
    for states in STATES:
        opt = OPTIMIZERS[name](model.named_parameters(), states=states)
        cells.append(f"{opt.state_bytes() / values:.2f}")
    return [*cells, str(opt.explain().sweeps)]


def table() -> str:
    """The table in Markdown."""
    with torch.device("meta"):
        model = Llama(preset("60m"))
    rows = [row(name, model) for name in OPTIMIZERS]
    return markdown_grid(Grid("", ["optimizer", *STATES, "sweeps"], rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; fail if the page is not current")
    arguments = parser.parse_args()
    page = PAGE.read_text(encoding="utf-8")
    head, rest = page.split(START)
    made = head + START + table() + END + rest.split(END)[1]
    if not arguments.check:
        PAGE.write_text(made, encoding="utf-8")
    elif made != page:
        sys.exit(f"{PAGE.name} is not current: run python benchmarks/optimizers.py")
