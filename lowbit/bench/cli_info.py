"""`lowbit formats` and `lowbit doctor`: what can be stored how, and what this machine can do."""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import TYPE_CHECKING

from . import machine

if TYPE_CHECKING:
    from ..gpu.cost import Report


def formats_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `lowbit formats`."""
    parser.description = (
        "How numbers can be stored: pass a name to lowbit.quantize(x, NAME), or in a recipe; formats marked as a\n"
        "state's also as states= of an optimizer. A block is the (rows, columns) that share one scale: NAME:32,\n"
        "NAME:16x16, NAME:row and NAME:tensor choose others. bytes/value counts codes and scales."
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
            "scale": f.scaling.stored if f.compressed else None, "state": f.plain and f.kind != "affine",
            "bytes_per_value": f.bytes_per_value, "about": f.about,
        })  # fmt: skip
    if args.json:
        print(json.dumps(rows, indent=1))
        return 0
    from rich.console import Console
    from rich.table import Table

    table = Table(title="formats", title_justify="left")
    for head in ("name", "bits", "sign", "block", "scale", "state", "bytes/value", "what it is"):
        table.add_column(head, justify="right" if head in ("bits", "block", "bytes/value") else "left", overflow="fold")
    for r in rows:
        table.add_row(
            r["name"], str(r["bits"]), "±" if r["signed"] else "≥ 0", _block(r["block"]), r["scale"] or "–",
            "yes" if r["state"] else "", f"{r['bytes_per_value']:.4g}", r["about"],
        )  # fmt: skip
    Console(width=None if sys.stdout.isatty() else 120).print(table, highlight=False)
    return 0


def _block(block: list[int] | None) -> str:
    if block is None:
        return "–"
    whole = {(1, 0): "row", (0, 0): "tensor"}
    return whole.get((block[0], block[1]), f"{block[0]}×{block[1]}")


def doctor_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `lowbit doctor`."""
    parser.description = "What this machine and installation can do, and what to do about what is missing."
    parser.epilog = "examples\n  lowbit doctor\n  lowbit doctor --json\n  lowbit doctor --arch sm_90a"
    parser.add_argument("--json", action="store_true", help="print as JSON")
    parser.add_argument(
        "--arch",
        metavar="sm_NN",
        help="compile every CUDA kernel for this architecture, with or without a GPU, and say what each costs",
    )


def doctor_main(args: argparse.Namespace, argv: list[str]) -> int:
    """Print the findings; 1 if there is no backend, or kernels were to be compiled and cannot be."""
    found = machine.describe()
    found["packages"] = {p: machine.version(p) for p in ("numpy", "rich", "safetensors", "matplotlib", "datasets")}
    found["compiler"] = machine.compiler()
    found["backend"], problem = _backend()
    found["native"], missing = _native()
    found["gpu"], without = _gpu()
    advice = [line for line in (problem, missing, without) if line]
    if not found["packages"]["matplotlib"]:
        advice.append("matplotlib is missing, so `lowbit bench` makes no plots: pip install 'lowbit[bench]'")
    if not found["packages"]["datasets"]:
        advice.append("datasets is missing, so --data hf:… does not work: pip install 'lowbit[hf]'")
    if found["cuda"] is None:
        advice.append("no CUDA device: everything runs on the CPU")
    if not {"avx512_bf16", "amx_bf16"} & machine.cpu_flags() and found["cuda"] is None:
        advice.append("no bf16 instructions: benchmarks compute in fp32 and round what they store to bf16")
    kernels = []
    if args.arch:
        kernels, missing = _kernels(args.arch)
        advice += missing
    found["advice"] = advice
    if args.json:
        print(json.dumps(found | ({"kernels": [one.as_dict() for one in kernels]} if args.arch else {}), indent=1))
    else:
        for key, value in found.items():
            for i, line in enumerate(_lines(value)):
                print(f"{key if i == 0 else '':<14}{line}")
        if kernels:
            _print_kernels(kernels)
    return 1 if problem or (args.arch and not kernels) else 0


def _kernels(arch: str) -> tuple[list[Report], list[str]]:
    """What every shipped kernel costs on an architecture, and what is missing to know it."""
    from rich.console import Console
    from rich.progress import track

    from ..gpu import cost, inspect, nvrtc
    from .kernels import shipped

    try:
        compiler = nvrtc.find()
        said = Console(stderr=True)  # it takes a minute
        specials = track(shipped(), f"compiling for {arch}", console=said, transient=True, disable=not said.is_terminal)
        found = [one for special in specials for one in cost.report(special, arch, compiler)]
    except (nvrtc.NoCompiler, nvrtc.CompileError, inspect.InspectError) as error:
        return [], [f"the kernels are not compiled for {arch}: {error}"]
    return found, [] if inspect.nvdisasm() else [inspect.NO_NVDISASM]


def _print_kernels(kernels: list[Report]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"kernels for {kernels[0].arch}",
        title_justify="left",
        caption="–: work that does not grow with the values, or by one for each 256 of them; or not launched for this",
        caption_justify="left",
    )
    for head in ("for", "kernel", "registers", "spills", "stack", "shared", "instructions/value", "global accesses"):
        table.add_column(head, justify="left" if head in ("for", "kernel", "global accesses") else "right")
    for one in kernels:
        taken = one.resources
        accesses = ", ".join(f"{n} × {access}" for access, n in sorted(one.mix.accesses.items())) if one.mix else "–"
        numbers = [str(n) for n in (taken.registers, taken.spills, taken.stack, taken.shared)]
        counted = "–" if one.per_value is None else f"{one.per_value:.1f}"
        table.add_row(one.specialisation, one.kernel, *numbers, counted, accesses)
    Console(width=140).print(table, highlight=False)


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


def _gpu() -> tuple[dict[str, str] | None, str]:
    """What kernels are compiled and run with on the first GPU, and what to do if they cannot be."""
    import torch

    from ..gpu.describe import describe

    return describe(torch.device("cuda", 0)) if torch.cuda.is_available() else (None, "")


def _lines(value: object) -> list[str]:
    if isinstance(value, dict):
        return [f"{k} {v or 'not installed'}" for k, v in value.items()]
    if isinstance(value, list):
        return [str(v) for v in value] if any(" " in str(v) for v in value) else [" ".join(map(str, value)) or "none"]
    return ["none" if value is None else str(value)]
