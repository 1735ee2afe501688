"""Timing on a machine that others use too: what can be compared was timed in turn, in one process, in shuffled order.

A script gives `rounds` its cases. Each round times every case once, in an order drawn anew, once with each number of
threads; ratios are taken within a round, and their median is what is reported. Every time is kept in the results, with
the load, the time stolen by other guests, the versions and the commit, and `cpu_tables.py` makes the tables of it.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from lowbit.bench import machine
from lowbit.native import build, library

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
ADDS = 1 << 24  # of the clock's chain
WIDE_ADDS = 1 << 22  # of vectors, on each thread

Case = Callable[[], float]  # does its work once; how long that took, in seconds
Times = dict[str, dict[str, list[float]]]  # by case and number of threads: seconds, one a round

# What the machine can do at best: additions that wait for one another, one a cycle; additions of whole vectors that do
# not, on all threads, which take longer where a neighbour has part of a core (the chain does not: it leaves room for
# him); and memory read and written, in place and as a fused Adam in fp32 does it (four streams read, three written).
PROBES = r"""
#include <stdint.h>
#define PUBLIC extern "C" __attribute__((visibility("default")))
#define ADD x += y; __asm__ volatile("" : "+r"(x), "+r"(y));

PUBLIC uint64_t probe_clock(int64_t adds) {
  uint64_t x = 0, y = 1;
  for (int64_t i = 0; i < adds; i += 16) { ADD ADD ADD ADD ADD ADD ADD ADD ADD ADD ADD ADD ADD ADD ADD ADD }
  return x;
}

#if defined(__AVX512F__)
enum { LANES = 16 };
#elif defined(__AVX__)
enum { LANES = 8 };
#else
enum { LANES = 4 };
#endif
typedef float Wide __attribute__((vector_size(4 * LANES)));

PUBLIC float probe_core(int64_t adds, int threads) {
  float found = 0.0f;
#pragma omp parallel num_threads(threads) reduction(+ : found)
  {
    Wide sums[8] = {}, one = {};
    for (int k = 0; k < 8 * LANES; ++k) sums[k / LANES][k % LANES] = (float)k;  // equal ones would be one
    for (int k = 0; k < LANES; ++k) one[k] = 1.0f;
    for (int64_t i = 0; i < adds; i += 8) {
      for (int k = 0; k < 8; ++k) sums[k] += one;
    }
    for (int k = 0; k < 8 * LANES; ++k) found += sums[k / LANES][k % LANES];
  }
  return found;
}

PUBLIC void probe_scale(float *__restrict__ p, int64_t n, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < n; i++) p[i] *= 0.999f;
}

PUBLIC void probe_adam(float *__restrict__ p, const float *__restrict__ g, float *__restrict__ m,
                       float *__restrict__ v, int64_t n, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < n; i++) {
    m[i] += 0.1f * (g[i] - m[i]);
    v[i] += 0.001f * (g[i] * g[i] - v[i]);
    p[i] -= 1e-6f * (m[i] + v[i]);
  }
}
"""


def arguments(about: str, out: str, rounds: int = 9) -> argparse.ArgumentParser:
    """The options that every script has."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--threads", type=lambda text: [int(t) for t in text.split(",")], default=[1, 2])
    parser.add_argument("--without", default="", help="rivals to leave out: torchao,bitsandbytes")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes and two rounds, to see that it runs")
    parser.add_argument("--out", type=Path, help=f"default: {(RESULTS / out).relative_to(ROOT)}; a smoke run: nowhere")
    parser.set_defaults(results=RESULTS / out)
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments, with what a smoke run means."""
    args = parser.parse_args()
    args.without = set(filter(None, args.without.split(",")))
    if args.smoke:
        args.rounds = 2
    elif args.out is None:
        args.out = args.results
    return args


def timed(work: Callable[[], Any], repeat: int = 1) -> Case:
    """A case of a call: the mean over `repeat` of them."""

    def case() -> float:
        began = time.perf_counter()
        for _ in range(repeat):
            work()
        return (time.perf_counter() - began) / repeat

    return case


def rounds(cases: dict[str, Case], count: int, threads: Sequence[int], warm: int = 1) -> tuple[Times, dict[str, str]]:
    """Time every case `count` times with each number of threads; also what each rival that cannot run said."""
    seconds: Times = {name: {str(t): [] for t in threads} for name in cases}
    failed: dict[str, str] = {}
    dice, before = random.Random(0), torch.get_num_threads()
    gc.collect()
    gc.disable()
    try:
        for k in range(-warm, count):
            for t in dice.sample(list(threads), len(threads)):
                torch.set_num_threads(t)
                for name in dice.sample(list(cases), len(cases)):
                    took = None if name in failed else _attempt(name, cases[name], failed)
                    if took is not None and k >= 0:
                        seconds[name][str(t)].append(took)
                print(f"round {k + 1} of {count}, threads: {t}, {len(cases) - len(failed)} cases", file=sys.stderr)
    finally:
        gc.enable()
        torch.set_num_threads(before)
    return {name: its for name, its in seconds.items() if name not in failed}, failed


def _attempt(name: str, case: Case, failed: dict[str, str]) -> float | None:
    """A case's time; that a rival fails is a result, that ours does is a bug."""
    try:
        return case()
    except Exception as error:
        if name.startswith("lowbit"):
            raise
        failed[name] = reason(error)
        return None


def reason(error: Exception) -> str:
    """Why a rival cannot run, on one line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:200]


def group(
    title: str, cases: dict[str, Case], args: argparse.Namespace, rounds_: int = 0, **about: dict[str, Any]
) -> dict[str, Any]:
    """Cases that were timed in the same rounds, as the results hold them; `about` is more that is known of each."""
    count = rounds_ or args.rounds
    seconds, failed = rounds(cases, count, args.threads)
    made = {n: {"seconds": s, **{key: its[n] for key, its in about.items() if n in its}} for n, s in seconds.items()}
    return {"title": title, "rounds": count, "cases": made, "failed": failed}


def probes(n: int) -> dict[str, Case]:
    """The clock, and memory with n values; nothing where there is no compiler."""
    try:
        text = f"{library.ISAS[library.load().isa]}\n{PROBES}"
        handle = ctypes.CDLL(str(build.compile_extra(text, "probes")))
    except build.BuildError as error:
        print(f"no probes: {error}", file=sys.stderr)
        return {}
    tensors = [torch.rand(n) for _ in range(4)]
    p, g, m, v = (ctypes.c_void_p(t.data_ptr()) for t in tensors)
    count = ctypes.c_int64(n)
    return {
        "probe: clock": timed(lambda: handle.probe_clock(ctypes.c_int64(ADDS))),
        "probe: core": timed(lambda: handle.probe_core(ctypes.c_int64(WIDE_ADDS), torch.get_num_threads())),
        # The tensors as a default: they must live as long as the case.
        "probe: read + write": timed(lambda _=tensors: handle.probe_scale(p, count, torch.get_num_threads())),
        "probe: Adam's traffic": timed(lambda: handle.probe_adam(p, g, m, v, count, torch.get_num_threads())),
    }


def median_ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """The median of the ratios within each round."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def environment() -> dict[str, Any]:
    """The machine, and the versions of all that takes part."""
    found = build.describe()
    packages = {name: machine.version(name) for name in ("torchao", "bitsandbytes")}
    native = library.load()
    compiler = found.get("version"), found.get("flags")
    return {**machine.describe(), **packages, "isa": native.isa, "compiler": compiler, "commit": commit()}


def commit() -> str | None:
    """Which version of the sources this is; `LOWBIT_COMMIT` says so where they were copied without their history."""
    if told := os.environ.get("LOWBIT_COMMIT"):
        return told
    git = ["git", "describe", "--always", "--abbrev=12", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def noise() -> dict[str, Any]:
    """What others do on this machine: the load averages, and the seconds other guests took from it since it started."""
    try:
        steal = int(Path("/proc/stat").read_text().split()[8]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        steal = None
    return {"time": time.time(), "load_average": os.getloadavg(), "steal_seconds": steal}


def start(args: argparse.Namespace, found: dict[str, Any] | None = None, **about: Any) -> dict[str, Any]:
    """Results with nothing measured yet; `found` is the environment where it is not a CPU's."""
    command = " ".join(["python", *(os.path.relpath(w, ROOT) if w.endswith(".py") else w for w in sys.argv)])
    return {"command": command, "environment": found or environment(), **about, "before": noise(), "groups": []}


def add(results: dict[str, Any], made: dict[str, Any], args: argparse.Namespace) -> None:
    """One more group, written at once: a run may take a quarter of an hour."""
    results["groups"].append(made)
    results["after"] = noise()
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n")
