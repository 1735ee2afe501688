"""`lowbit bench`: from words on the command line to a plan, a run folder, and a report."""

from __future__ import annotations

import argparse
import json
import math
import re
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import BenchError

if TYPE_CHECKING:
    from .compute import Compute
    from .runner import Plan

_ABOUT = """\
Train the same small LLaMA several times, on the same batches, and compare what differs: the optimizer, how its
state is stored, and 4-bit layers. Prints tables and leaves a folder with results.jsonl, plots and a self-contained
report.html.

Always among the methods: adam (β2 .999), adam-fair (β2 .95, gradient clipping: how people really train) and
adam-4bit, and for each low-bit method the same optimizer in high precision, so that what the optimizer gains and
what the bits cost are seen apart.
"""
_EXAMPLES = """\
examples
  lowbit bench --demo                                    five methods, three seeds, a few minutes on two cores
  lowbit bench --full --out runs/full                    nine methods × three learning rates × three seeds
  lowbit bench --full --out runs/full --resume           go on after Ctrl-C or a crash
  lowbit bench --data my.txt --steps 2000 --seeds 5      your own text, more seeds
  lowbit bench --optim adam-fair,stablespam --states 8bit,4bit --recipe none,int4 --lr 1e-3,3e-3
  lowbit bench --optim stablespam/4bit/stablespam-fp4    one method in full: OPTIMIZER/STATES/RECIPE
  lowbit bench --optim galore:rank=8,muon:aux_lr=1e-3,adammini:num_heads=4
                                                         options of an optimizer, by its arguments' names
  lowbit bench --spike whole:1000@50                     multiply the gradient by 1000 every 50 steps
  lowbit bench --preset 60m --data hf:allenai/c4:en      a published size; this wants a GPU

methods: adam, adam-fair, stablespam (the paper's betas and gammas, resets scaled to the run), stablespam-b95 (β2
.95, no reset), any class of
lowbit.optim by name, with options behind colons (galore:rank=8:scale=0.5); NAME-4bit means 4-bit states and int4
layers.
"""
DEMO = {"preset": "nano", "steps": 400, "seeds": "3", "optim": "stablespam-4bit"}
FULL = {
    "preset": "nano", "steps": 800, "seeds": "3", "lr": "1e-3,3e-3,1e-2",
    "optim": "stablespam-4bit,stablespam/4bit/stablespam-fp4,stablespam-b95-4bit,adam-fair-4bit",
}  # fmt: skip


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.description, parser.epilog = _ABOUT, _EXAMPLES
    parser.usage = "lowbit bench [--demo | --full] [options]"
    suite = parser.add_mutually_exclusive_group()
    suite.add_argument("--demo", action="store_true", help="a short comparison: nano, 400 steps, 3 seeds")
    suite.add_argument("--full", action="store_true", help="a longer one: nano, 800 steps, 3 learning rates, 3 seeds")
    what = parser.add_argument_group("what is compared")
    what.add_argument("--optim", metavar="A,B", help="methods, or with --states/--recipe optimizers")
    what.add_argument("--states", metavar="A,B", help="fp32, bf16, 8bit, 4bit or a format name (lowbit formats)")
    what.add_argument("--recipe", metavar="A,B", help="what linear layers do: none, int4, fp4, stablespam-int4, …")
    what.add_argument(
        "--lr", metavar="A,B", help="peak learning rates [the preset's]; the best is chosen for each method"
    )
    what.add_argument("--seeds", metavar="N", help="how many seeds, or a list such as 10,11,12 [3]")
    what.add_argument("--reference", metavar="NAME", help="the method all others are compared with [adam-fair]")
    how = parser.add_argument_group("model, data and schedule")
    how.add_argument("--preset", metavar="NAME", help="nano, micro, mini, 60m, 130m, 350m or 1b [nano]")
    how.add_argument("--data", metavar="PATH", nargs="+", help="text (.txt .md .py, a folder), .jsonl(.gz), tokens "
                     "(.bin .npy) or hf:NAME[:config] [the text of Python's standard library, as bytes]")  # fmt: skip
    how.add_argument("--text-key", metavar="KEY", default="text", help="key of the text in JSON lines [text]")
    how.add_argument("--vocab-size", metavar="N", type=int, help="of the model [256 for text; largest token id + 1]")
    how.add_argument("--data-bytes", metavar="N", type=int, default=20_000_000, help="text to read from hf: [20000000]")
    how.add_argument("--steps", metavar="N", type=int, help="training steps [the preset's]")
    how.add_argument("--batch", metavar="N", type=int, help="windows per step [the preset's]")
    how.add_argument("--seq", metavar="N", type=int, help="tokens per window [the preset's]")
    how.add_argument("--warmup", metavar="F", type=float, default=0.1, help="share of steps with rising rate [0.1]")
    how.add_argument("--embed-lr-mult", metavar="F", type=float, default=1.0, help="embedding and head rate factor [1]")
    how.add_argument("--spike", metavar="SPEC", default="", help="whole:FACTOR@EVERY or entries:SHARE:FACTOR@EVERY")
    how.add_argument("--val-windows", metavar="N", type=int, default=256, help="validation windows [256]")
    how.add_argument("--compute", choices=("auto", "fp32", "bf16"), default="auto",
                     help="matmul arithmetic; auto takes bf16 where a probe finds it faster [auto]")  # fmt: skip
    run = parser.add_argument_group("running")
    run.add_argument("--out", metavar="DIR", help="run folder [runs/bench-DATE-TIME]")
    run.add_argument("--resume", action="store_true", help="continue the folder named by --out")
    run.add_argument("--jobs", metavar="N", type=int, help="processes [one per core for small models; 0: this process]")
    run.add_argument("--json", action="store_true", help="print the summary as JSON on stdout")
    run.add_argument("--quiet", action="store_true", help="no progress")


def main(args: argparse.Namespace, argv: list[str]) -> int:
    """Run the benchmark; returns the exit code."""
    from rich.console import Console

    from . import report, runner

    say = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)  # 'lowbit[bench]' is no style
    out = _folder(args)
    plan, workers, threads = make_plan(args, shlex.join(argv), out)
    if not args.quiet:
        for line in _announcement(plan, out, workers, threads):
            say.print(line)
    started = time.monotonic()
    try:
        with terminable():
            results = runner.run(plan, out, resume=args.resume, workers=workers, threads=threads, quiet=args.quiet)
    except KeyboardInterrupt:
        if (out / "results.jsonl").exists():
            report.build(out, say.print)
        again = shlex.join([*argv, *([] if args.out else ["--out", str(out)]), *([] if args.resume else ["--resume"])])
        say.print(f"\nstopped; finished runs are kept in {out}. To continue: {again}")
        return 130
    summary = report.build(out, say.print)
    if args.json:
        print(json.dumps(summary, indent=1, allow_nan=False))
    else:
        report.show(summary, Console(width=None if sys.stdout.isatty() else 120))
    failed = [r for r in results if r["status"] != "ok"]
    say.print(f"{len(results)} runs, {time.monotonic() - started:.0f} s; report: {out / 'report.html'}")
    if failed:
        say.print(
            f"{len(failed)} runs crashed; the first: {failed[0]['method']}: {failed[0]['error']}", style="bold red"
        )
    return 1 if failed else 0


@contextmanager
def terminable() -> Iterator[None]:
    """A polite kill leaves a usable folder, as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def make_plan(args: argparse.Namespace, command: str, out: Path) -> tuple[Plan, int, int]:
    """What the options ask for, checked as a whole before anything is run; with it processes and threads of each."""
    from . import data, methods
    from .compute import choose_compute, choose_device
    from .model import preset
    from .runner import Plan, workers_and_threads
    from .spike import Spike
    from .train import Settings

    suite = DEMO if args.demo else FULL if args.full else {}
    shape = preset(args.preset or suite.get("preset", "nano"))
    lrs = _numbers("--lr", args.lr or suite.get("lr") or f"{shape.lr:g}")
    seeds = _seeds(args.seeds or suite.get("seeds", "3"))
    names = _words("--optim", args.optim or suite.get("optim", "stablespam-4bit"))
    if (args.states or args.recipe) and not args.optim:
        names = ["adam-fair", "stablespam"]
    states, recipes = (_words(o, v) if v else None for o, v in (("--states", args.states), ("--recipe", args.recipe)))
    chosen = methods.choose(names, states, recipes)
    reference = args.reference or "adam-fair"
    if reference not in {m.name for m in chosen}:
        chosen += [m for m in methods.choose([reference]) if m.name == reference]
    Spike.parse(args.spike)
    steps = _positive("--steps", args.steps if args.steps is not None else suite.get("steps", shape.steps))
    batch = _positive("--batch", args.batch if args.batch is not None else shape.batch)
    seq = _positive("--seq", args.seq if args.seq is not None else shape.seq)
    if not 0 <= args.warmup < 1:
        raise BenchError(f"--warmup is a share of the steps, at least 0 and below 1, not {args.warmup:g}")
    if not (math.isfinite(args.embed_lr_mult) and args.embed_lr_mult > 0):
        raise BenchError(f"--embed-lr-mult must be positive, not {args.embed_lr_mult:g}")
    if args.jobs is not None and args.jobs < 0:
        raise BenchError(f"--jobs must be 0 or more, not {args.jobs}")
    if args.vocab_size is not None:
        _positive("--vocab-size", args.vocab_size)
    corpus = data.load(args.data, text_key=args.text_key, vocab_size=args.vocab_size,
                       max_bytes=_positive("--data-bytes", args.data_bytes))  # fmt: skip
    corpus.check_window(seq)
    runs = len(chosen) * len(lrs) * len(seeds)
    device = choose_device()
    workers, threads = workers_and_threads(shape.parameters(corpus.vocab_size), runs, args.jobs, device)
    settings = Settings(
        preset=shape, steps=steps, batch=batch, micro_batch=min(batch, shape.micro_batch), seq=seq,
        vocab=corpus.vocab_size, warmup=args.warmup, embed_lr_mult=args.embed_lr_mult,
        val_windows=_positive("--val-windows", args.val_windows), spike=args.spike,
        compute=remembered(args, out) or choose_compute(shape, corpus.vocab_size, seq, threads, device, args.compute),
    )  # fmt: skip
    title = "demo" if args.demo else "full comparison" if args.full else "benchmark"
    return Plan(chosen, lrs, seeds, settings, corpus, reference, title, command), workers, threads


def remembered(args: argparse.Namespace, out: Path) -> Compute | None:
    """The arithmetic that a continued folder was begun with: a probe could choose differently the second time."""
    from .compute import Compute
    from .folder import Folder

    if not args.resume or args.compute != "auto" or not Folder(out).settings_path.exists():
        return None
    return Compute(**Folder(out).document()["settings"]["compute"])


def _announcement(plan: Plan, out: Path, workers: int, threads: int) -> list[str]:
    s, c = plan.settings, plan.corpus.describe()
    where = f"{workers} processes of {threads} threads" if workers else "this process"
    return [
        f"corpus   {c['name']}: {c['tokens']:,} {c['unit']}s, {c['documents']} documents, sha256 {c['sha256']}",
        f"model    {s.preset.name}, {s.preset.parameters(s.vocab):,} parameters, vocabulary {s.vocab}",
        f"compute  {s.compute.label} ({s.compute.reason})",
        f"methods  {', '.join(m.name for m in plan.methods)}",
        f"runs     {len(plan.jobs())} of {s.steps} steps in {where}, into {out}",
    ]


def _folder(args: argparse.Namespace) -> Path:
    if args.out:
        return Path(args.out)
    if args.resume:
        raise BenchError("--resume needs the folder to continue: --out DIR")
    return Path("runs") / time.strftime("bench-%Y%m%d-%H%M%S")


def _words(option: str, text: str) -> list[str]:
    found = [w.strip() for w in re.split(r",(?![^(]*\))", text) if w.strip()]  # commas in parentheses are a tuple's
    if not found:
        raise BenchError(f"{option} names nothing")
    return list(dict.fromkeys(found))


def _numbers(option: str, text: str) -> list[float]:
    words = _words(option, text)
    try:
        found = sorted({float(w) for w in words})
    except ValueError as error:
        raise BenchError(f"{option} takes numbers such as 1e-3,3e-3, not {text!r}") from error
    if not all(math.isfinite(v) and v > 0 for v in found):
        raise BenchError(f"{option} must be positive, not {text}")
    return found


def _seeds(text: str) -> list[int]:
    words = _words("--seeds", text)
    try:
        found = [int(w) for w in words]
    except ValueError as error:
        raise BenchError(f"--seeds takes a count or a list such as 10,11,12, not {text!r}") from error
    if len(found) == 1 and "," not in text:
        found = list(range(_positive("--seeds", found[0])))
    if min(found) < 0:
        raise BenchError(f"--seeds must not be negative: {text}")
    return found


def _positive(option: str, value: int) -> int:
    if value < 1:
        raise BenchError(f"{option} must be at least 1, not {value}")
    return value
