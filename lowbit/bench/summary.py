"""From result lines to comparisons: one row per method at its best learning rate, and the three columns kept apart.

The columns: (1) what the optimizer gains in high precision against the reference, (2) what 4 bits cost the same
optimizer, (3) their sum. A single number "4-bit X against BF16 Adam" is only the third and hides the other two.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from statistics import mean

from .stats import paired, spread, steps_to


def summarize(document: dict, results: list[dict]) -> dict:
    """Everything a report shows, as plain data.

    Args:
        document: the run folder's settings.json.
        results: the lines of its results.jsonl.
    """
    good = [r for r in results if r["status"] == "ok"]
    failed = [r for r in results if r["status"] != "ok"]
    chosen = {m["name"]: _best(m["name"], good) for m in document["methods"]}
    losses = {name: {r["seed"]: r["final_val"] for r in runs if r["final_val"] is not None}
              for name, runs in chosen.items()}  # fmt: skip
    reference = document["reference"]
    rows = [_row(m, chosen[m["name"]], losses, chosen, document) for m in document["methods"] if chosen[m["name"]]]
    return {
        "title": document["title"], "command": document["command"], "compute": document["compute"],
        "reference": reference, "corpus": document["corpus"], "settings": document["settings"],
        "machine": document["machine"], "seeds": document["seeds"], "lrs": document["lrs"],
        "methods": rows, "columns": _columns(rows, losses, chosen, reference),
        "sweep": _sweep(document, good), "failed": failed, "runs": len(results),
        "planned": len(document["methods"]) * len(document["lrs"]) * len(document["seeds"]),
        "notes": _notes(document, good, rows),
    }  # fmt: skip


def _best(name: str, good: list[dict]) -> list[dict]:
    """The runs of a method at the learning rate with the lowest mean loss; lost runs and missing seeds rank last."""
    by_lr: dict[float, list[dict]] = {}
    for r in good:
        if r["method"] == name:
            by_lr.setdefault(r["lr"], []).append(r)
    if not by_lr:
        return []
    most = max(map(len, by_lr.values()))

    def rank(runs: list[dict]) -> tuple:
        finals = [r["final_val"] for r in runs]
        lost = sum(v is None for v in finals)
        return (lost, most - len(runs), mean(v for v in finals if v is not None) if lost < len(finals) else math.inf)

    return sorted(min(by_lr.values(), key=rank), key=lambda r: r["seed"])


def _row(m: dict, runs: list[dict], losses: dict, chosen: dict, document: dict) -> dict:
    name, reference = m["name"], document["reference"]
    finals = list(losses[name].values())
    dense = [r["final_val_dense"] for r in runs if r["final_val_dense"] is not None]
    difference = _compare(name, reference, losses, chosen) if name != reference else None
    plain = _compare(name, "adam", losses, chosen) if name != "adam" else None
    return {
        **m, "lr": runs[0]["lr"], "n": len(runs), "compute": document["compute"],
        "loss": mean(finals) if finals else None, "loss_sd": spread(finals),
        "loss_dense": mean(dense) if dense else None,
        "bits_per_token": mean(finals) / math.log(2) if finals else None,
        "vs_reference": difference, "vs_adam": plain,
        "to_target": _to_target(runs, losses.get(reference, {})),
        "diverged": sum(r["diverged"] for r in runs),
        "diverged_why": [r["diverged_why"] for r in runs if r["diverged"]],
        "tokens_per_second": mean(r["tokens_per_second"] for r in runs),
        "cpu_seconds": mean(r["cpu_seconds"] for r in runs),
        "ms_model": mean(r["ms_model"] for r in runs), "ms_optimizer": mean(r["ms_optimizer"] for r in runs),
        "bytes": runs[0]["bytes"], "parameters": runs[0]["parameters"],
        "bytes_per_parameter": sum(runs[0]["bytes"].values()) / runs[0]["parameters"],
        "peak_rss": max(r["peak_rss"] for r in runs), "peak_device": max(r["peak_device"] or 0 for r in runs) or None,
        "grad_norm": {k: _mean(r["grad_norm"][k] for r in runs) for k in ("median", "p99", "max")},
        "curve": _mean_curve(runs), "curves": [r["curve"] for r in runs],
    }  # fmt: skip


def _compare(first: str, second: str, losses: dict, chosen: dict) -> dict | None:
    """First minus second, seed by seed. With lost runs there is no verdict: survivors flatter a method."""
    difference = paired(losses[first], losses.get(second, {}))
    if difference is None:
        return None
    runs = [*chosen[first], *chosen.get(second, [])]
    lost = sum(r["final_val"] is None for r in runs)
    return {**difference.describe(), **({"verdict": f"{lost} of {len(runs)} runs lost"} if lost else {})}


def _mean(values: Iterable[float | None]) -> float | None:
    kept = [v for v in values if v is not None]
    return mean(kept) if kept else None


def _mean_curve(runs: list[dict]) -> list[list[float]]:
    """Mean over the seeds at every step that all of them reached with a finite loss."""
    points = [{s: v for s, v in r["curve"] if v is not None} for r in runs]
    common = sorted(set.intersection(*(set(p) for p in points)))
    return [[s, mean(p[s] for p in points)] for s in common]


def _to_target(runs: list[dict], targets: dict[int, float]) -> dict | None:
    """Steps to the reference's final loss, seed by seed: how many runs reached it, and when on average."""
    found = [steps_to(r["curve"], targets[r["seed"]]) for r in runs if r["seed"] in targets]
    if not found:
        return None
    reached = [s for s in found if s is not None]
    return {"reached": len(reached), "of": len(found), "steps": mean(reached) if len(reached) == len(found) else None}


def _columns(rows: list[dict], losses: dict, chosen: dict, reference: str) -> list[dict]:
    """Gain in high precision, cost of the bits, and their sum, for every low-bit method with its counterpart."""
    out = []
    for row in rows:
        name, dense = row["name"], row["counterpart"]
        if not row["low_bit"] or not losses.get(dense):
            continue
        parts = {
            "gain": _compare(dense, reference, losses, chosen) if dense != reference else None,
            "cost": _compare(name, dense, losses, chosen),
            "sum": _compare(name, reference, losses, chosen),
        }
        out.append({"name": name, "label": row["label"], "counterpart": dense, **parts})
    return out


def _sweep(document: dict, good: list[dict]) -> dict[str, list[dict]]:
    """Final loss of every method at every learning rate."""
    sweep: dict[str, list[dict]] = {}
    for m in document["methods"]:
        for lr in sorted(document["lrs"]):
            runs = [r for r in good if (r["method"], r["lr"]) == (m["name"], lr)]
            finals = [r["final_val"] for r in runs if r["final_val"] is not None]
            if runs:
                point = {"lr": lr, "n": len(runs), "loss": mean(finals) if finals else None, "losses": finals,
                         "diverged": sum(r["diverged"] for r in runs)}  # fmt: skip
                sweep.setdefault(m["name"], []).append(point)
    return sweep


def _notes(document: dict, good: list[dict], rows: list[dict]) -> list[str]:
    """What a reader must know before believing the numbers."""
    notes = [f"Arithmetic: {document['compute']}. {_sentence(document['settings']['compute']['reason'])}"]
    contrasts = sum(r["vs_reference"] is not None for r in rows)
    if len(document["seeds"]) == 1:
        notes.append("One seed: there is no interval, and a difference may be chance.")
    elif contrasts:
        notes.append(
            f"Intervals are 95 % t-intervals of paired differences over {len(document['seeds'])} seeds; {contrasts} "
            "methods are compared with the reference and nothing is corrected for looking at several."
        )  # fmt: skip
    if len(document["lrs"]) == 1:
        notes.append(f"One learning rate, {document['lrs'][0]:g}, for all methods: none is tuned.")
    else:
        notes.append("Each method is shown at its best learning rate, chosen on these same seeds, which flatters all.")
        edges = _edges(document, rows)
        if edges:
            notes.append(f"Best at the edge of the learning rates tried, so perhaps better beyond: {', '.join(edges)}.")
    versions = {r["torch"] for r in good}
    if len(versions) > 1:
        notes.append(f"Runs of different torch versions are mixed here: {', '.join(sorted(versions))}.")
    if any(r["master"] for r in rows):
        notes.append(
            "BF16 Adam keeps an fp32 master and fp32 moments here, the strongest usual practice (16 bytes per "
            "parameter with gradients). Papers often count bf16 moments and no master (8): --optim adam/bf16/none "
            "measures that."
        )
    if any(r["recipe"] != "none" for r in rows):
        notes.append(
            "Layers are fake-quantized: values lie on the 4-bit grid, but the weights are kept in bf16 for the "
            "straight-through update, and matmuls run in the arithmetic above. Weight bytes are therefore not smaller."
        )
    return notes


def _edges(document: dict, rows: list[dict]) -> list[str]:
    ends = (min(document["lrs"]), max(document["lrs"]))
    return [f"{r['name']} ({r['lr']:g})" for r in rows if r["lr"] in ends]


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")
