"""What CUDA kernels measure and fold, on the emulator: the bits of the reference, in every schedule."""

from ctypes import c_int32, c_int64, c_void_p
from typing import Any, ClassVar

import pytest
import torch
from cases import one_thread as one_thread
from cuda_measures import measure as measured_on_device
from emulator.emulator import REVERSE, compiler, installed, sanitized
from torch import Tensor

from lowbit.backends import reference
from lowbit.formats import format as storage
from lowbit.gpu import machine, sources
from lowbit.layout import rows_of
from lowbit.optim import Moment
from lowbit.rows import zeros
from lowbit.stages import Job, Program, fold, measure, update
from lowbit.words import abs, maximum, sqrt

pytestmark = pytest.mark.skipif(compiler() is None, reason="kernels are compiled by g++ here, and there is none")
CPU = torch.device("cpu")

# ---- trees

TREES = """
#include "sums.h"
using namespace lb;
extern "C" __global__ void __launch_bounds__(256) lines(const double *x, int64_t n, double *to) {
  __shared__ double room[256];
  const auto read = [&](int64_t i) { return x[i]; };
  const double sum = halve_line<false>(n, room, read), most = halve_line<true>(n, room, read);
  if (threadIdx.x == 0) to[0] = sum, to[1] = most;
}
extern "C" __global__ void __launch_bounds__(32) teams(const double *x, int64_t n, double *to) {
  for (int k = 0, lanes = 1; lanes <= 32; lanes *= 2, ++k) {  // n is not too much for any of them
    const auto read = [&](int64_t i) { return x[i]; };
    const double sum = halve_team<false>(strip<false, 4, 12>(n, lane() % lanes, lanes, read), n, lanes);
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
            machine(CPU).launch(
                trees().function("lines"), 1, 256, [c_void_p(magnitudes.data_ptr()), *arguments[1:]]
            )
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
        return g * p - g * c.share

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


SHAPES = [(33, 300), (1030, 65), (1100, 3), (9000, 2), (50,), (), (3, 5461), (5, 4, 6), (2, 300000), (600, 257)]
CONSTANTS = {"share": 0.37, "one": 1.0}


def jobs_of(program: Program, shapes: list[tuple[int, ...]], seed: int = 0, dtype: Any = torch.float32) -> list[Job]:
    draw = torch.Generator().manual_seed(seed)
    made = []
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
                constants=CONSTANTS,
                vectors=vectors,
                group_rows=group_rows,
            )
        )
    return made


def state(jobs: list[Job]) -> list[Tensor]:
    return [x for job in jobs for x in (*job.scalars.values(), *job.vectors.values(), job.skipped[1])]


def assert_equal(device: list[Job], expected: list[Job]) -> None:
    for k, (a, b) in enumerate(zip(state(device), state(expected), strict=True)):
        assert same(a.double(), b.double()), k


@pytest.mark.parametrize("reduce, over", list(MEASURES))
def test_every_measurement_has_the_references_bits(reduce: str, over: str):
    program = kept(reduce, over)
    device, expected = jobs_of(program, SHAPES), jobs_of(program, SHAPES)
    reference.step(expected)
    with installed(schedule=len(over) % 3):
        measured_on_device(device)
    assert_equal(device, expected)
