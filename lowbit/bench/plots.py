"""The plots (matplotlib): one colour for each optimizer, dashes for low-bit runs, so that pairs are seen as pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .errors import need

# Okabe and Ito's palette: told apart with every common colour blindness and in print. Black is the reference.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8B5A2B", "#999999")
_DASHES = ("--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)))
_MARKERS = "osD^vP*X"
_PARTS = (("weights", "#0072B2"), ("master", "#56B4E9"), ("states", "#E69F00"), ("gradients", "#999999"))
_STYLE = {
    "font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#e6e6e6",
    "axes.axisbelow": True, "savefig.dpi": 150, "legend.frameon": False, "axes.titlelocation": "left",
}  # fmt: skip


def draw(summary: dict, out: Path) -> list[Path]:
    """Draw what the summary allows into `out`; returns the files."""
    need("matplotlib")
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # figures without pyplot: no global state, no display

    made = []
    with rc_context(_STYLE):  # pyright: ignore[reportArgumentType]
        for name, plot in (("loss_curves", _curves), ("memory", _memory), ("loss_vs_lr", _sweep)):
            figure = Figure(figsize=(10, 5.2), layout="constrained")
            if plot(summary, figure):
                made.append(out / f"{name}.png")
                figure.savefig(made[-1])
    return made


def styles(summary: dict) -> dict[str, dict[str, Any]]:
    """Colour by optimizer (black for the reference's), dash and marker by what is low-bit about a method."""
    rows = summary["methods"]
    optimizers = list(dict.fromkeys(r["optimizer"] for r in rows if r["optimizer"] != summary["reference"]))
    colour = {o: _COLOURS[i % len(_COLOURS)] for i, o in enumerate(optimizers)} | {summary["reference"]: "#000000"}
    kinds = list(dict.fromkeys((r["states"], r["recipe"]) for r in rows if r["low_bit"]))
    made = {}
    for r in rows:
        kind = kinds.index((r["states"], r["recipe"])) if r["low_bit"] else -1
        made[r["name"]] = {
            "color": colour[r["optimizer"]], "linestyle": "-" if kind < 0 else _DASHES[kind % len(_DASHES)],
            "marker": _MARKERS[(kind + 1) % len(_MARKERS)],
        }  # fmt: skip
    return made


def _curves(summary: dict, figure: Any) -> bool:
    """Validation loss over steps: mean as a line, seeds as faint lines, the reference's final loss as the target."""
    rows = sorted((r for r in summary["methods"] if len(r["curve"]) > 1), key=lambda r: r["curve"][-1][1])
    if not rows:
        return False
    axes, look = figure.subplots(), styles(summary)
    steps = summary["settings"]["steps"]
    for r in rows:
        style = look[r["name"]] | {"marker": ""}
        for curve in r["curves"]:
            kept = [(s, v) for s, v in curve if v is not None]
            axes.plot(*zip(*kept, strict=True), alpha=0.18, linewidth=0.8, color=style["color"])
        axes.plot(*zip(*r["curve"], strict=True), **style, linewidth=1.8, label=f"{r['name']}  {r['curve'][-1][1]:.3f}")
    target = next((r["loss"] for r in rows if r["name"] == summary["reference"]), None)
    if target is not None:
        axes.axhline(target, color="#000000", linewidth=0.8, linestyle=(0, (1, 2)))
        axes.text(0.01 * steps, target, f"final loss of {summary['reference']}", va="bottom", fontsize=9)
    # The first part falls from ln(vocabulary) and would squeeze what matters into a sliver.
    late = [v for r in rows for s, v in r["curve"] if s >= 0.2 * steps] or [r["curve"][-1][1] for r in rows]
    low, high = min(late), max(late)
    axes.set_ylim(low - 0.05 * (high - low), high + 0.02 * (high - low))
    axes.set_xlim(0, steps)
    axes.set_xlabel("step")
    axes.set_ylabel(f"validation loss (nats/{summary['corpus']['unit']})")
    axes.legend(
        loc="upper right", title="method, final loss", alignment="left", frameon=True, edgecolor="white", framealpha=1
    )
    _title(axes, summary, "Validation loss, mean over seeds")
    return True


def _memory(summary: dict, figure: Any) -> bool:
    """Bytes per parameter of what lives between steps, stacked."""
    rows = list(reversed(summary["methods"]))
    axes = figure.subplots()
    widest = max(r["bytes_per_parameter"] for r in rows)
    for y, r in enumerate(rows):
        left = 0.0
        for part, colour in _PARTS:
            width = r["bytes"][part] / r["parameters"]
            axes.barh(y, width, left=left, color=colour, height=0.62, edgecolor="white")
            if width > 0.035 * widest:
                axes.text(left + width / 2, y, f"{width:.2g}", ha="center", va="center", fontsize=8,
                          color="white" if part == "weights" else "black")  # fmt: skip
            left += width
        axes.text(left, y, f" {left:.2f}", va="center", fontweight="bold")
    axes.set_yticks(range(len(rows)), [r["name"] for r in rows])
    axes.set_xlim(0, 1.1 * widest)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("bytes per parameter, measured from the tensors")
    from matplotlib.patches import Patch

    names = {"master": "fp32 master", "states": "optimizer state"}
    handles = [Patch(color=c, label=names.get(p, p)) for p, c in _PARTS]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(_PARTS))
    _title(axes, summary, "Memory of training, without activations")
    return True


def _sweep(summary: dict, figure: Any) -> bool:
    """Final loss against learning rate: how forgiving a method is."""
    if len(summary["lrs"]) < 2:
        return False
    axes, look = figure.subplots(), styles(summary)
    middle = (len(summary["sweep"]) - 1) / 2
    for i, (name, points) in enumerate(summary["sweep"].items()):
        kept = [p for p in points if p["loss"] is not None]
        if not kept:
            continue
        at = [p["lr"] * 1.015 ** (i - middle) for p in kept]  # side by side, so that the spreads do not overlap
        for x, p in zip(at, kept, strict=True):
            axes.vlines(x, min(p["losses"]), max(p["losses"]), color=look[name]["color"], alpha=0.5, linewidth=1)
        axes.plot(at, [p["loss"] for p in kept], **look[name], markersize=5, linewidth=1.5, label=name)
    lrs = sorted(summary["lrs"])
    axes.set_xscale("log")
    axes.set_xticks(lrs, [f"{lr:g}" for lr in lrs])
    axes.minorticks_off()
    axes.set_xlabel("peak learning rate")
    axes.set_ylabel(f"final validation loss (nats/{summary['corpus']['unit']})")
    figure.legend(loc="outside right upper", alignment="left")
    _title(axes, summary, "Final loss against learning rate, mean and range over seeds")
    return True


def _title(axes: Any, summary: dict, text: str) -> None:
    s = summary["settings"]
    axes.set_title(f"{text}\n", fontweight="bold")
    size = f"{s['preset']['name']}, {s['steps']} steps, {len(summary['seeds'])} seeds"
    below = f"{summary['title']}: {size}; {summary['compute']}"
    axes.text(0, 1.02, below, transform=axes.transAxes, fontsize=9, color="#555555")
