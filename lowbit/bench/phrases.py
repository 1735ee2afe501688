"""How numbers are written, and what they mean in plain language: one place for the terminal, Markdown and HTML."""

from __future__ import annotations


def size(count: float) -> str:
    """Bytes in the unit that fits."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def loss(row: dict) -> str:
    """Final loss with its spread over the seeds."""
    if row["loss"] is None:
        return "diverged"
    spread = f" ± {row['loss_sd']:.3f}" if row["loss_sd"] is not None else ""
    return f"{row['loss']:.3f}{spread}"


def difference(d: dict | None, empty: str = "–") -> str:
    """A paired difference with its interval."""
    if d is None:
        return empty
    if d["low"] is None:
        return f"{d['mean']:+.3f}"
    return f"{d['mean']:+.3f} [{d['low']:+.3f}, {d['high']:+.3f}]"


def verdict(d: dict | None, empty: str = "–") -> str:
    """What a paired difference allows to be said, with the count of seeds in which the first was lower."""
    if d is None:
        return empty
    return f"{d['verdict']}, {d['better']}/{d['n']}" if d["low"] is not None else d["verdict"]


def to_target(row: dict, steps: int) -> str:
    """Steps to the reference's final loss."""
    t = row["to_target"]
    if t is None:
        return "–"
    if t["steps"] is None:
        return "never" if t["reached"] == 0 else f"{t['reached']} of {t['of']} runs"
    return f"{t['steps']:.0f} ({100 * t['steps'] / steps:.0f} %)"


def diverged(row: dict) -> str:
    """Whether any run of a row diverged."""
    return f"{row['diverged']}/{row['n']}" if row["diverged"] else "no"


def number(value: float | None, form: str = ".2f") -> str:
    """A number, or a dash."""
    return "–" if value is None else format(value, form)


def cannot_show(summary: dict) -> str:
    """What a run of this size says nothing about."""
    parameters = max((r["parameters"] for r in summary["methods"]), default=0)
    tokens = summary["settings"]["steps"] * summary["settings"]["batch"] * summary["settings"]["seq"]
    unit = summary["corpus"]["unit"]
    return (
        f"This model has {parameters / 1e6:.3g} million parameters and saw {tokens:,} {unit}s: the "
        "first minutes of training, which reward fast optimizers. Such a run can show how sensitive a method is to its "
        "learning rate, what memory it needs, and whether 4 bits cost something at this size. It cannot show late "
        "divergence, behaviour at billions of parameters, a speed-up from 4-bit hardware, or that the ranking of "
        "optimizers stays as it is here."
    )


def reading(summary: dict) -> list[str]:
    """The result in sentences, each of which follows from a number in the tables."""
    rows = {r["name"]: r for r in summary["methods"]}
    reference = summary["reference"]
    if reference not in rows or rows[reference]["loss"] is None:
        return [f"The reference {reference} has no finished run, so nothing can be compared."]
    lines = [f"The reference is {reference}: {rows[reference]['about']}. It ended at {loss(rows[reference])}."]
    for c in summary["columns"]:
        parts = []
        if c["gain"] is not None:
            parts.append(f"in high precision {c['counterpart']} ends {_judged(c['gain'], 'the reference')}")
        if c["cost"] is not None:
            parts.append(f"its low-bit form ends {_judged(c['cost'], c['counterpart'] + ' in high precision')}")
        if c["sum"] is not None and c["gain"] is not None:
            parts.append(f"together {_judged(c['sum'], 'the reference')}")
        if parts:
            lines.append(f"{c['label']}: {'; '.join(parts)}.")
    for row in rows.values():
        if row["diverged"]:
            lines.append(f"{row['name']}: {row['diverged']} of {row['n']} runs diverged ({row['diverged_why'][0]}).")
    return lines


def _judged(d: dict, against: str) -> str:
    where = f"{abs(d['mean']):.3f} {'below' if d['mean'] < 0 else 'above'} {against}"
    doubt = {"not significant": " (not significant)", "one seed: no interval": " (one seed, no interval)"}
    return where + doubt.get(d["verdict"], f" ({d['better']} of {d['n']} seeds lower, interval excludes 0)")


def heading(summary: dict) -> str:
    """What a report is called; a demo says that it is one, an unfinished one too."""
    missing = summary["planned"] - summary["runs"]
    unfinished = f" – unfinished, {missing} of {summary['planned']} runs missing" if missing > 0 else ""
    return f"lowbit {summary['title']}: low-bit training against BF16 Adam{unfinished}"


def setup(summary: dict) -> str:
    """The set-up in one sentence."""
    s, c = summary["settings"], summary["corpus"]
    extra = f", spikes {s['spike']}" if s["spike"] else ""
    extra += f", embedding and head lr × {s['embed_lr_mult']:g}" if s["embed_lr_mult"] != 1 else ""
    return (
        f"{s['preset']['name']} LLaMA, {s['steps']} steps of {s['batch']} × {s['seq']} {c['unit']}s, seeds "
        f"{', '.join(map(str, summary['seeds']))}, warm-up {100 * s['warmup']:g} % then cosine to 0.1{extra}; "
        f"{c['name']} (sha256 {c['sha256'][:16]}…); {summary['compute']}; {summary['machine']['cpu']}, "
        f"torch {summary['machine']['torch']}."
    )
