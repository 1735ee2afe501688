"""`lowbit formats` and `lowbit doctor`: what can be stored how, and what this machine can do."""

from __future__ import annotations

import argparse
import json
import os

from . import machine


def formats_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `lowbit formats`."""
    parser.description = (
        "How numbers can be stored: pass a name as states= of an optimizer, or to lowbit.quantize(x, NAME).\n"
        "A block is the (rows, columns) that share one scale; bytes/value counts codes and scales."
    )
    parser.epilog = "examples\n  lowbit formats\n  lowbit formats --json"
    parser.add_argument("--json", action="store_true", help="print as JSON")


def formats_main(args: argparse.Namespace, argv: list[str]) -> int:
    """Print the table of formats."""
    from ..formats import format, formats

    rows = []
    for name in formats():
        f = format(name)
        rows.append({
            "name": name, "bits": f.bits, "signed": f.signed, "block": list(f.block) if f.compressed else None,
            "bytes_per_value": f.bytes_per_value, "about": f.about,
        })  # fmt: skip
    if args.json:
        print(json.dumps(rows, indent=1))
        return 0
    from rich.console import Console
    from rich.table import Table

    table = Table(title="formats", title_justify="left")
    for head in ("name", "bits", "sign", "block", "bytes/value", "what it is"):
        table.add_column(head, justify="right" if head in ("bits", "block", "bytes/value") else "left", overflow="fold")
    for r in rows:
        block = f"{r['block'][0]}×{r['block'][1]}" if r["block"] else "–"
        table.add_row(
            r["name"], str(r["bits"]), "±" if r["signed"] else "≥ 0", block, f"{r['bytes_per_value']:.4g}", r["about"]
        )
    Console().print(table, highlight=False)
    return 0


def doctor_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `lowbit doctor`."""
    parser.description = "What this machine and installation can do, and what to do about what is missing."
    parser.epilog = "examples\n  lowbit doctor\n  lowbit doctor --json"
    parser.add_argument("--json", action="store_true", help="print as JSON")


def doctor_main(args: argparse.Namespace, argv: list[str]) -> int:
    """Print the findings; 1 if the library itself cannot be imported or its backend cannot be chosen."""
    found = machine.describe()
    found["packages"] = {p: machine.version(p) for p in ("numpy", "rich", "safetensors", "matplotlib", "datasets")}
    found["compiler"] = machine.compiler()
    found["backend"], problem = _backend()
    found["native"], missing = _native()
    advice = [line for line in (problem, missing) if line]
    if not found["packages"]["matplotlib"]:
        advice.append("matplotlib is missing, so `lowbit bench` makes no plots: pip install 'lowbit[bench]'")
    if not found["packages"]["datasets"]:
        advice.append("datasets is missing, so --data hf:… does not work: pip install 'lowbit[hf]'")
    if found["cuda"] is None:
        advice.append("no CUDA device: everything runs on the CPU")
    if not {"avx512_bf16", "amx_bf16"} & machine.cpu_flags() and found["cuda"] is None:
        advice.append("no bf16 instructions: benchmarks compute in fp32 and round what they store to bf16")
    found["advice"] = advice
    if args.json:
        print(json.dumps(found, indent=1))
    else:
        for key, value in found.items():
            for i, line in enumerate(_lines(value)):
                print(f"{key if i == 0 else '':<14}{line}")
    return 1 if problem else 0


def _backend() -> tuple[str | None, str]:
    import torch

    try:
        from .. import backends

        name = backends.choose(torch.device("cpu")).__name__.rsplit(".", 1)[-1]
    except Exception as error:
        return None, f"no backend: {type(error).__name__}: {error}"
    forced = os.environ.get("LOWBIT_BACKEND")
    return name + (f" (forced by LOWBIT_BACKEND={forced})" if forced else ""), ""


def _native() -> tuple[dict[str, str], str]:
    """The native library: what was found, what it runs on, and what to do if there is none."""
    import torch

    from ..native import build, library

    told = {key: str(value) for key, value in build.describe().items() if value not in (None, "")}
    try:
        loaded = library.load()
    except (build.BuildError, ValueError) as error:
        return told, f"no native library, so steps take 20 to 50 times as long: {error}"
    found = {
        "library": f"{loaded.found.path} ({loaded.found.origin})",
        "instructions": f"{loaded.isa}" + (f" (this processor has {loaded.best})" if loaded.isa != loaded.best else ""),
        "threads": f"{torch.get_num_threads()} (torch.set_num_threads)",
    }
    return found | told, ""


def _lines(value: object) -> list[str]:
    if isinstance(value, dict):
        return [f"{k} {v or 'not installed'}" for k, v in value.items()]
    if isinstance(value, list):
        return [str(v) for v in value] if any(" " in str(v) for v in value) else [" ".join(map(str, value)) or "none"]
    return ["none" if value is None else str(value)]
