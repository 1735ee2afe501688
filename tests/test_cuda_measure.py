"""What CUDA kernels measure and fold, on the emulator: the bits of the reference, in every schedule."""

import copy
import sys
from ctypes import c_int32, c_int64, c_void_p
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CASES, gradient, parameters
from cases import one_thread as one_thread
from native_rules import Loose, Vectors
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent / "emulator"))
from emulator import FORWARD, REVERSE, compiler, installed, sanitized

from lowbit.backends import cuda_step, reference
from lowbit.formats import format as storage
from lowbit.gpu import machine, sources
from lowbit.gpu.stages import room
from lowbit.layout import rows_of
from lowbit.optim import AdaClip, AdaGN, AdamW, GlobalClip, Moment, Rule
from lowbit.rows import zeros
from lowbit.stages import Job, Program, Turn, fold, measure, update
from lowbit.words import abs, maximum, sqrt

pytestmark = pytest.mark.skipif(compiler() is None, reason="kernels are compiled by g++ here, and there is none")
CPU = torch.device("cpu")

# ---- trees

TREES = """
#include "sums.h"
using namespace lb;
extern "C" __global__ void __launch_bounds__(256) lines(const double *x, int64_t n, double *to) {
  __shared__ Room<256> room;
  const auto read = [&](int64_t i) { return x[i]; };
  const double sum = halve_line<false>(n, room, read), most = halve_line<true>(n, room, read);
  if (threadIdx.x == 0) to[0] = sum, to[1] = most;
}
extern "C" __global__ void __launch_bounds__(32) teams(const double *x, int64_t n, double *to) {
  __shared__ double waiting[15][32];
  for (int k = 0, lanes = 1; lanes <= 32; lanes *= 2, ++k) {  // n is not too much for any of them
    const auto read = [&](int64_t i) { return x[i]; };
    const double sum = halve_team<false>(strip<false, 4>(n, lane() % lanes, lanes, waiting, read), n, lanes);
    if (lane() % lanes == 0) to[k * 32 + lane() / lanes] = sum;
  }
}
template <int LANES, int V> LB_FN void block(const float *x, float *to) {
  float own[V];
  for (int k = 0; k < V; ++k) own[k] = x[lane() * V + k];
  to[lane()] = block_sum<LANES>(own);
}
extern "C" __global__ void __launch_bounds__(32) blocks(const float *x, int32_t lanes, int32_t values, float *to) {
#define LB_CASE(L, V) if (lanes == L && values == V) block<L, V>(x, to);
  CASES
}
"""
CUTS = [(1 << lanes, 1 << values) for lanes in range(6) for values in range(5)]


def trees() -> Any:
    cases = "\n  ".join(f"LB_CASE({lanes}, {values})" for lanes, values in CUTS)
    return machine(CPU).module(TREES.replace("CASES", cases), sources())


def awkward(n: int, seed: int, dtype: torch.dtype) -> Tensor:
    """Numbers of many magnitudes, with zeros of both signs, and sometimes infinities and NaN."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(n, generator=draw, dtype=torch.float64) * 2.0 ** torch.randint(-40, 40, (n,), generator=draw)
    x[torch.rand(n, generator=draw) < 0.3] = -0.0
    if seed % 3 == 1 and n:
        x[int(torch.randint(n, (1,), generator=draw))] = float("inf")
    if seed % 3 == 2 and n:
        x[int(torch.randint(n, (1,), generator=draw))] = float("nan")
    return x.to(dtype) if seed % 7 else torch.full((n,), -0.0, dtype=dtype)


def same(a: Tensor, b: Tensor) -> bool:
    """The same bits, a NaN's payload aside."""
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(*(_bits(x.nan_to_num(7.0)) for x in (a, b)))


def _bits(x: Tensor) -> Tensor:
    return x.view(torch.int64 if x.dtype == torch.float64 else torch.int32)


@pytest.mark.parametrize("n", [*range(1, 71), 255, 256, 257, 2047, 2049, 5000, 8192, 70001])
def test_lines_of_any_length_are_halved_as_the_reference_does(n: int):
    with installed(schedule=n % 4):
        for seed in range(5 if n < 71 else 3):
            x, to = awkward(n, seed + 7 * (n % 5 > 0), torch.float64), torch.empty(2, dtype=torch.float64)
            arguments = [c_void_p(x.data_ptr()), c_int64(n), c_void_p(to.data_ptr())]
            machine(CPU).launch(trees().function("lines"), 1, 256, arguments)
            assert same(to[0], reference.halve(x))
            magnitudes = x.abs()
            machine(CPU).launch(trees().function("lines"), 1, 256, [c_void_p(magnitudes.data_ptr()), *arguments[1:]])
            assert same(to[1], magnitudes.amax())


@pytest.mark.parametrize("n", [*range(1, 71), 257, 1000, 1024])
def test_teams_of_any_size_have_the_same_sum(n: int):
    with installed(schedule=n % 4):
        x, to = awkward(n, n, torch.float64), torch.zeros(6, 32, dtype=torch.float64)
        arguments = [c_void_p(x.data_ptr()), c_int64(n), c_void_p(to.data_ptr())]
        machine(CPU).launch(trees().function("teams"), 1, 32, arguments)
        for k in range(6):
            assert all(same(sum, reference.halve(x)) for sum in to[k, : 32 >> k])


@pytest.mark.parametrize("lanes, values", CUTS)
def test_a_step_blocks_sum_is_the_same_however_lanes_share_it(lanes: int, values: int):
    with installed(schedule=REVERSE):
        for seed in range(8):
            x, to = awkward(32 * values, seed, torch.float32), torch.empty(32)
            arguments = [c_void_p(x.data_ptr()), c_int32(lanes), c_int32(values), c_void_p(to.data_ptr())]
            machine(CPU).launch(trees().function("blocks"), 1, 32, arguments)
            assert same(to, reference.halve(x.view(-1, lanes * values)).repeat_interleave(lanes))


# ---- every measurement, on rules of our own


def kept(reduce: str, over: str, guarded: bool = True) -> Program:
    """A program that keeps what it measured, and the largest of it so far."""
    stage = MEASURES[reduce, over]
    if over in ("tensor", "all"):
        return Program((stage, note, step_by_scalar), {}, {"seen": 0.25, "count": 0.0}, guarded, {"twice": 3.0})
    vectors: Any = {"v": Moment("v", over=over), "w": Moment("w", over=over)}
    return Program((stage, note_each, advance, note_again, step_by_vector), vectors, {"count": 1.0}, guarded)


def _measure(reduce: Any, over: Any) -> Any:
    @measure(reduce, over=over)
    def value(g, p, c):
        return g * p + c.share  # of zeros it is not zero, so what is beyond a row's end must be left out

    return value


MEASURES = {
    (reduce, over): _measure(reduce, over)
    for reduce in ("max", "sum", "mean")
    for over in ("tensor", "all", "row", "column", "group")
    if (reduce, over) != ("mean", "all")
}


@fold
def note(x, s, c):
    """Once per tensor; a scalar of this step too."""
    s.twice = s.twice + x
    s.seen = maximum(s.seen, s.twice * c.share)
    s.count = s.count + c.one


@fold("v")
def note_each(x, v, c):
    """Once per element."""
    return x + v * c.share


@fold
def advance(s, c):
    """A fold over the tensor between two over elements."""
    s.count = s.count + c.one


@fold("w v")
def note_again(x, v, s):
    """Reads what the fold before it assigned."""
    return x * s.count, v - x


@update("p")
def step_by_scalar(p, g, s):
    return p - g * s.seen


@update("p")
def step_by_vector(p, g, v, w):
    return p - g * sqrt(abs(v - w))


SHAPES = [(33, 300), (1030, 65), (1100, 3), (9000, 1), (50,), (), (3, 5461), (2, 300000), (600, 257)]
CONSTANTS = {"share": 0.37, "one": 1.0}


def jobs_of(program: Program, shapes: list[tuple[int, ...]], seed: int = 0, dtype: Any = torch.float32) -> list[Job]:
    draw = torch.Generator().manual_seed(seed)
    made, turn = [], Turn(CONSTANTS)
    for k, shape in enumerate(shapes):
        rows, cols = rows_of(shape)
        param = torch.randn(shape, generator=draw).to(dtype)
        param.grad = (torch.randn(shape, generator=draw) * 2.0 ** torch.randint(-9, 9, shape, generator=draw)).to(dtype)
        group_rows = (4, 7, 1, 2000)[k % 4]
        sizes = {"row": rows, "column": cols, "group": -(-rows // group_rows)}
        vectors = {
            name: torch.randn(sizes[moment.over], generator=draw)
            for name, moment in program.moments.items()
            if moment.over != "value"
        }
        formats = {letter: storage("fp32") for letter in program.values}
        made.append(
            Job(
                param=param,
                moments={letter: zeros(fmt, tuple(shape), CPU) for letter, fmt in formats.items()},
                formats=formats,
                scalars={name: torch.tensor(value) for name, value in program.scalars.items()},
                skipped=torch.zeros(2, dtype=torch.int64),
                rows=rows,
                cols=cols,
                program=program,
                turn=turn,
                vectors=vectors,
                group_rows=group_rows,
            )
        )
    return made


def state(jobs: list[Job]) -> list[Tensor]:
    """All that a step writes."""
    found = []
    for job in jobs:
        found += [job.param.detach(), job.skipped, *job.scalars.values(), *job.vectors.values()]
        found += [x for parts in job.moments.values() for x in parts.values()]
    return [x.double() for x in found]


def assert_equal(device: list[Job], expected: list[Job]) -> None:
    for k, (a, b) in enumerate(zip(state(device), state(expected), strict=True)):
        assert same(a, b), k


@pytest.mark.parametrize("reduce, over", list(MEASURES))
def test_every_measurement_has_the_references_bits(reduce: str, over: str):
    program = kept(reduce, over)
    device, expected = jobs_of(program, SHAPES), jobs_of(program, SHAPES)
    reference.step(expected)
    with installed(schedule=len(over) % 3):
        cuda_step.step(device)
    assert_equal(device, expected)


def test_a_tensor_of_many_long_rows_is_summed_in_strips():
    shapes = [(8195, 257)]
    program = kept("sum", "tensor")
    device, expected = jobs_of(program, shapes), jobs_of(program, shapes)
    reference.step(expected)
    with installed():
        cuda_step.step(device)
    assert_equal(device, expected)


def broken(job: Job, how: str) -> Job:
    """A gradient that is not finite; values that are, and their sum is not."""
    flat = job.grad.view(-1)
    if how == "huge":
        flat.fill_(3e38)
    elif flat.numel():
        flat[len(flat) // 2] = float(how)
    return job


@pytest.mark.parametrize("over", ["tensor", "all", "row", "column", "group"])
@pytest.mark.parametrize("guarded", [True, False])
def test_what_is_not_finite_keeps_a_tensor_as_it_was(over: str, guarded: bool):
    program, shapes = kept("sum", over, guarded), SHAPES[:3] + SHAPES[4:7] + SHAPES[:2]
    how = ["inf", "nan", "huge", "-inf"]
    device, expected = (
        [broken(job, how[k]) if k < len(how) else job for k, job in enumerate(jobs_of(program, shapes))]
        for _ in range(2)
    )
    before = copied(device)
    reference.step(expected)
    with installed():
        cuda_step.step(device)
    assert_equal(device, expected)
    assert [int(job.skipped[1]) for job in device] == [int(guarded and k < len(how)) for k in range(len(shapes))]
    left = [all(map(same, state([a]), state([b]))) for a, b in zip(before, device, strict=True)]
    assert not any(left)  # what was skipped is counted
    assert [
        all(map(torch.equal, a.scalars.values(), b.scalars.values())) for a, b in zip(before, device, strict=True)
    ] == [bool(job.skipped[1]) for job in device]


def test_programs_share_what_is_measured_over_all_tensors():
    programs = [kept("sum", "all"), kept("sum", "row"), kept("sum", "all", guarded=False)]

    def jobs() -> list[Job]:
        made = [jobs_of(program, SHAPES[k:9:2], k) for k, program in enumerate(programs)]
        broken(made[0][1], "nan")
        mixed = [made[k % 3].pop(0) for k in range(12)]  # their order decides on the tree
        return mixed

    device, expected = jobs(), jobs()
    reference.step(expected)
    with installed(schedule=2):
        cuda_step.step(device)
    assert_equal(device, expected)
    assert len({float(job.scalars["seen"]) for job in device if "seen" in job.scalars}) > 1


def test_gradients_may_begin_anywhere_and_have_16_bits():
    program = kept("sum", "row")
    for dtype, offset in ((torch.bfloat16, 1), (torch.float16, 3), (torch.float32, 1), (torch.bfloat16, 0)):
        device, expected = (jobs_of(program, [(70, 512), (33, 300), (64, 16)], 1, dtype) for _ in range(2))
        for job in device:
            room = torch.empty(job.grad.numel() + offset, dtype=dtype)
            room[offset:] = job.grad.flatten()
            job.gathered = room[offset:].view_as(job.grad)
        reference.step(expected)
        with installed():
            cuda_step.step(device)
        assert_equal(device, expected)


# ---- rules that users run


def copied(jobs: list[Job]) -> list[Job]:
    """The same tensors, apart."""
    made = []
    for job in jobs:
        mine = copy.copy(job)
        mine.gathered, mine.prepared = job.grad.clone(), None
        mine.param, mine.skipped = job.param.detach().clone(), job.skipped.clone()
        mine.companion = None if job.companion is None else job.companion.clone()
        mine.moments = {k: {part: x.clone() for part, x in parts.items()} for k, parts in job.moments.items()}
        mine.scalars = {k: x.clone() for k, x in job.scalars.items()}
        mine.vectors = {k: x.clone() for k, x in job.vectors.items()}
        made.append(mine)
    return made


BUILT = {case.name: case.build for case in CASES}
RULES: dict[str, Any] = {
    **{name: BUILT[name] for name in ("stablespam", "adammini", "slimadam-column", "adafactor-relative", "scale")},
    "stablespam-official": BUILT["stablespam-official"],
    "fira": BUILT["fira"],
    "stabilizers": lambda p, **more: AdamW(p, lr=1e-3, stabilize=[AdaClip(), AdaGN(), GlobalClip(1.0)], **more),
    "vectors": lambda p, **more: Vectors(p, {"lr": 1e-3}, **more),
    "loose": lambda p, **more: Loose(p, {"lr": 1e-3}, **more),
}


@pytest.mark.parametrize("name", RULES)
def test_rules_measure_the_references_bits(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LOWBIT_BACKEND", "reference")
    named = parameters([(65, 300), (1030, 65), (80, 256), (7,), ()], torch.bfloat16)
    states = "fp32" if name == "fira" else "4bit"
    opt: Rule = RULES[name](named, states=states)
    step, seen = reference.step, 0

    def both(jobs: list[Job]) -> None:
        nonlocal seen
        device = copied(jobs)
        step(jobs)
        with installed(schedule=seen % 3):
            cuda_step.step(device)
        assert_equal(device, jobs)
        seen += 1

    monkeypatch.setattr(reference, "step", both)
    for t in range(1, 4):
        for k, (_, p) in enumerate(named):
            p.grad = gradient(tuple(p.shape), t, k, p.dtype)
        if t == 3:
            named[0][1].grad[3, 3] = float("inf")
        opt.step()
    assert seen >= 3


def test_a_tensor_beyond_the_trees_is_refused():
    for over, rows, cols in (("row", 2, 1 << 32), ("column", 1 << 24, 64), ("tensor", 1 << 24, 300)):
        with pytest.raises(ValueError, match="too large for what is measured on a GPU"):
            room(kept("sum", over), rows, cols)
    assert room(kept("sum", "tensor"), 1 << 30, 1) == (1 << 30, 8192)


# ---- faults


def test_no_schedule_and_no_share_changes_a_bit():
    found = []
    for schedule in range(4):
        jobs = [job for over in ("row", "column", "all") for job in jobs_of(kept("sum", over), SHAPES[:4])]
        with installed(schedule):
            cuda_step.step(jobs)
        found.append(state(jobs))
    assert all(all(map(same, found[0], other)) for other in found[1:])


FAULTS = {
    "no barrier before a column is added up": ("    __syncthreads();\n    const int count", "    const int count"),
    "values beyond a row's end": ("  beyond(here, [&](int k) { value[k] = 0.0f; });\n", ""),
    "one room for two turns": ("room[turn][t * V + k]", "room[0][t * V + k]"),
    "the last strip is left out": ("if (line < lines && lane", "if (line < lines - 1 && lane"),
    "no barrier before a block's largest number": ("    __syncthreads();\n    most = largest", "    most = largest"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_kernels_is_seen(fault: str, monkeypatch: pytest.MonkeyPatch):
    texts, (right, wrong) = sources(), FAULTS[fault]
    (file,) = (name for name in ("sweeps.h", "reductions.h") if texts[name].count(right) == 1)
    monkeypatch.setattr(cuda_step, "sources", lambda: {**texts, file: texts[file].replace(right, wrong)})
    wrongs = 0
    for (reduce, over), schedule in product((("sum", "column"), ("sum", "row"), ("max", "tensor")), (FORWARD, REVERSE)):
        program = kept(reduce, over)
        device, expected = jobs_of(program, [(33, 300)]), jobs_of(program, [(33, 300)])
        reference.step(expected)
        with installed(schedule):
            cuda_step.step(device)
        wrongs += not all(map(same, state(device), state(expected)))
    assert wrongs


def under_sanitizer() -> None:
    """What sanitizers watch: every way to measure, on small tensors."""
    for reduce, over, shapes in (
        ("sum", "column", [(520, 3), (33, 256)]),
        ("max", "all", [(33, 300)]),
        ("sum", "all", [(33, 300)]),
        ("mean", "group", [(33, 300)]),
    ):
        jobs = jobs_of(kept(reduce, over), shapes)
        with installed(schedule=2):
            cuda_step.step(jobs)


@pytest.mark.parametrize("sanitizer", ["thread", "address"])
def test_sanitizers_find_nothing(sanitizer: str):
    done = sanitized(sanitizer, "import test_cuda_measure; test_cuda_measure.under_sanitizer(); print('well')")
    assert done.returncode == 0 and "well" in done.stdout, done.stderr[-3000:]
