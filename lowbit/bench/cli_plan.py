"""`lowbit plan`: the memory of a training step, before there is a machine for it."""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import asdict

from .plan import DTYPES, MODELS, Choice, Plan, plan

_UNITS = {"": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def plan_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `lowbit plan`."""
    parser.description = (
        "What a training step takes of memory: weights, states, gradients, what backward needs, and the peak.\n"
        "Counted from the real model, layers and optimizer without allocating them; nothing is downloaded.\n"
        "Exit code 1: it does not fit into --fits."
    )
    parser.epilog = (
        "examples\n"
        "  lowbit plan --model 1b --optimizer stable-spam --states 4bit --recipe int4 --store int4\n"
        "  lowbit plan --model 7b --optimizer muon --batch 8 --seq 2048 --checkpoint --fits 80GB\n"
        "  lowbit plan --model path/to/config.json --store nf4 --json"
    )
    add = parser.add_argument
    default = Choice("")
    add(
        "--model",
        default="1b",
        metavar="NAME|PATH",
        help=f"{', '.join(MODELS)}, or a Hugging Face config.json, which needs transformers (default: %(default)s)",
    )
    add("--optimizer", default=default.optimizer, help="a class of lowbit.optim, in any case (default: %(default)s)")
    add("--states", default=default.states, help="fp32, bf16, 8bit, 4bit or a format (default: %(default)s)")
    add("--recipe", default=default.recipe, help="what linear layers compute with (default: %(default)s)")
    add("--store", default=default.store, help="how their weights are kept: master (a float), int8, int4, nf4, split …")
    add("--embedding", metavar="STORE", help="how embedding tables are kept (default: a float)")
    add("--master", default=default.master, help="what is kept of weights beside them: none, split8 … (none)")
    add("--dtype", default=default.dtype, choices=DTYPES, help="of weights that are floats (default: %(default)s)")
    add("--batch", type=_positive, default=default.batch, help="sequences in one pass (default: %(default)s)")
    add("--seq", type=_positive, help="tokens in a sequence (default: the model's)")
    add("--checkpoint", action="store_true", help="recompute each block's activations in the backward pass")
    add("--clip", action="store_true", help="clip the norm over all gradients, which then cannot be freed one by one")
    add("--fits", type=_bytes, metavar="SIZE", help="such as 24GB: leave with 1 if the step does not fit")
    add("--json", action="store_true", help="print as JSON")


def plan_main(args: argparse.Namespace, argv: list[str]) -> int:
    """Print the plan; 1 if it does not fit."""
    names = Choice.__dataclass_fields__
    choice = Choice(**{name: getattr(args, name) for name in names})
    found = plan(choice)
    least = min(peak for peak in (found.peak, found.released) if peak is not None)
    fits = None if args.fits is None else least <= args.fits
    if args.json:
        print(json.dumps({"choice": asdict(choice), "bytes": asdict(found), "fits": fits}, indent=1))
    else:
        _print(choice, found)
        if args.fits is not None:
            print(_verdict(found, args.fits))
    return int(fits is False)


def _print(choice: Choice, found: Plan) -> None:
    from rich.console import Console
    from rich.table import Table

    layers = choice.recipe if choice.recipe != "none" else choice.dtype
    title = (
        f"{choice.model}: {choice.optimizer}, {choice.states} states, {layers} layers, weights kept as {choice.store}"
    )
    table = Table(title=title, title_justify="left")
    table.add_column("what")
    table.add_column("bytes", justify="right")
    table.add_column("which is")
    per = {name: f"{8 * getattr(found, name) / max(1, found.parameters):.2f} bits" for name in ("weights", "states")}
    lines = [
        ("weights", found.weights, f"{found.parameters:,} parameters, {per['weights']} each, and buffers"),
        ("optimizer states", found.states, f"{per['states']} per parameter"),
        ("master", found.master, "kept beside 16-bit weights"),
        ("gradients", found.gradients, f"all of them; the largest is {size(found.gradient)}"),
        ("activations", found.activations, f"kept for the backward pass of {found.batch} × {found.seq} tokens"),
        ("matrix stages", found.temporary, "of the optimizer, for a while"),
        ("peak", found.peak, "the most at any time of a step"),
    ]
    for what, count, about in lines:
        if count:
            table.add_row(what, size(count), about)
    if found.released is None:
        table.add_row("peak, gradients released", "–", "not with a norm over all gradients")
    else:
        table.add_row("peak, gradients released", size(found.released), "lowbit.optim.step_in_backward")
    console = Console(width=110)
    console.print(table, highlight=False)
    console.print("On top of it: the CUDA context, fragmentation, and buffers inside of kernels.", highlight=False)


def _verdict(found: Plan, room: float) -> str:
    if found.peak <= room:
        return f"It fits into {size(room)}."
    if found.released is not None and found.released <= room:
        return f"It fits into {size(room)} if gradients are released in backward."
    return f"It does not fit into {size(room)}."


def size(count: float) -> str:
    """Bytes for people, in powers of ten."""
    if count >= 1e9:
        return f"{count / 1e9:,.2f} GB"
    return f"{count / 1e6:,.1f} MB" if count >= 1e6 else f"{count / 1e3:,.1f} kB"


def _positive(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"a count must be a whole number of at least 1, not {text!r}")
    return int(text)


def _bytes(text: str) -> float:
    match = re.fullmatch(r"([0-9.]+(?:e[0-9]+)?)\s*([A-Za-z]*)", text)
    if not match or match[2].upper() not in _UNITS:
        raise argparse.ArgumentTypeError(f"a size is such as 24GB or 80GiB, not {text!r}")
    return float(match[1]) * _UNITS[match[2].upper()]
