"""What the tables of a report contain; how they are drawn is up to the terminal, Markdown or HTML."""

from __future__ import annotations

from dataclasses import dataclass

from . import phrases


@dataclass(frozen=True)
class Grid:
    """One table: a title, column heads, rows of text, a caption; `detail` tables are for files, not the terminal."""

    title: str
    heads: list[str]
    rows: list[list[str]]
    caption: str = ""
    detail: bool = False


def grids(summary: dict) -> list[Grid]:
    """All tables of a report that have something to show."""
    made = [loss(summary), contrasts(summary), columns(summary), memory(summary), speed(summary), methods(summary)]
    if len(summary["lrs"]) > 1:
        made.insert(3, sweep(summary))
    return [g for g in made if g.rows]


def loss(s: dict) -> Grid:
    """Final loss of every method."""
    unit = s["corpus"]["unit"]
    heads = ["method", "lr", f"loss, nats/{unit}", f"bits/{unit}", "unquantized", "steps to target", "diverged"]
    rows = [
        [r["name"], f"{r['lr']:g}", phrases.loss(r), phrases.number(r["bits_per_token"], ".3f"),
         phrases.number(r["loss_dense"], ".3f"), phrases.to_target(r, s["settings"]["steps"]), phrases.diverged(r)]
        for r in s["methods"]
    ]  # fmt: skip
    caption = (
        f"Final validation loss, lower is better, mean ± standard deviation over seeds; {s['compute']}. 'unquantized': "
        f"the final weights of a quantized model evaluated in plain layers. Target: the final loss of {s['reference']}."
    )
    return Grid("Loss", heads, rows, caption)


def contrasts(s: dict) -> Grid:
    """Every method against the reference and against plain Adam."""
    reference = s["reference"]
    plain = "adam" in {r["name"] for r in s["methods"]} and reference != "adam"
    heads = ["method", f"minus {reference} [95 %]", "verdict", *(["minus adam [95 %]", "verdict"] if plain else [])]
    rows = []
    for r in s["methods"]:
        row = [r["name"], phrases.difference(r["vs_reference"]), phrases.verdict(r["vs_reference"])]
        rows.append(row + ([phrases.difference(r["vs_adam"]), phrases.verdict(r["vs_adam"])] if plain else []))
    caption = (
        f"Paired differences of final loss, seed by seed; negative is better; after the verdict, in how many seeds the "
        f"method was lower; {s['compute']}."
    )
    return Grid("Against the baselines", heads, rows, caption)


def columns(s: dict) -> Grid:
    """What the optimizer gains, what the bits cost, and their sum."""
    heads = ["method", "1 optimizer", "2 cost of low bits", "3 sum", "verdict on 3"]
    rows = [
        [c["name"], phrases.difference(c["gain"], "is the reference"), phrases.difference(c["cost"]),
         phrases.difference(c["sum"]), phrases.verdict(c["sum"])]
        for c in s["columns"]
    ]  # fmt: skip
    caption = (
        f"1: the same optimizer in high precision minus {s['reference']}. 2: the low-bit method minus the same "
        "optimizer in high precision, which also keeps an fp32 master of the weights (low-bit methods keep none). 3 = "
        f"1 + 2. Differences of final loss, negative is better; {s['compute']}."
    )
    return Grid("Where the difference comes from", heads, rows, caption)


def sweep(s: dict) -> Grid:
    """Final loss at every learning rate."""
    lrs = sorted(s["lrs"])
    rows = []
    for name, points in s["sweep"].items():
        at = {p["lr"]: p for p in points}
        rows.append([name, *(_cell(at.get(lr)) for lr in lrs)])
    caption = f"Mean over seeds; {s['compute']}."
    return Grid("Final loss at every learning rate", ["method", *(f"{lr:g}" for lr in lrs)], rows, caption)


def _cell(point: dict | None) -> str:
    if point is None:
        return "–"
    if point["loss"] is None:
        return "diverged"
    return f"{point['loss']:.3f}" + (f" ({point['diverged']}/{point['n']} diverged)" if point["diverged"] else "")


def memory(s: dict) -> Grid:
    """Bytes measured from the tensors."""
    gpu = any(r["peak_device"] for r in s["methods"])
    heads = ["method", "weights", "fp32 master", "states", "gradients", "B/param", "peak GPU" if gpu else "peak RSS"]
    parts = ("weights", "master", "states", "gradients")
    rows = [
        [r["name"], *(phrases.size(r["bytes"][k]) if r["bytes"][k] else "–" for k in parts),
         f"{r['bytes_per_parameter']:.2f}", phrases.size(r["peak_device"] or r["peak_rss"])]
        for r in s["methods"]
    ]  # fmt: skip
    caption = (
        f"Counted from the tensors between backward pass and step ({s['compute']}). The fp32 image of gradients that a "
        "master's optimizer wants for a moment is not counted. Peak: whole process, with activations and torch itself."
    )
    return Grid("Memory", heads, rows, caption)


def speed(s: dict) -> Grid:
    """Throughput, time per step, gradient norms."""
    heads = ["method", "tok/s", "CPU s", "model ms", "step ms", "|g| p50", "p99", "max"]
    rows = [
        [r["name"], f"{r['tokens_per_second']:,.0f}", f"{r['cpu_seconds']:.1f}", f"{r['ms_model']:.1f}",
         f"{r['ms_optimizer']:.2f}", *(phrases.number(r["grad_norm"][k]) for k in ("median", "p99", "max"))]
        for r in s["methods"]
    ]  # fmt: skip
    caption = (
        f"{s['compute']}. CPU seconds of a whole run with its evaluations; wall-clock milliseconds per step, 'step' is "
        "everything from gradients to new stored weights; gradient norms before any clipping."
    )
    return Grid("Speed and gradients", heads, rows, caption)


def methods(s: dict) -> Grid:
    """What each method is."""
    heads = ["method", "optimizer", "states", "layers", "fp32 master", "step by"]
    rows = [
        [r["name"], r["about"], r["states"], r["recipe"], "yes" if r["master"] else "no, stochastic rounding", r["by"]]
        for r in s["methods"]
    ]
    return Grid(
        "Methods", heads, rows, f"Parameters and gradients are bf16 in every method; {s['compute']}.", detail=True
    )
