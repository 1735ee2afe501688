"""Quotients and roots without branches (cuda/quick.h): IEEE's bits wherever there is no doubt."""

from ctypes import c_float, c_int32, c_void_p

import pytest
import torch
from cuda_cases import needs_compiler, stepping

from lowbit.gpu import NoCompiler, inspect, machine, nvrtc, sources
from lowbit.gpu.cost import ARCHITECTURES

SOURCE = """
#include "quick.h"
using namespace lb;
// Of n numbers x, and y: counts what is beyond doubt, and what of it is wrong.
extern "C" __global__ void __launch_bounds__(256) compare(const float *x, const float *y, int32_t n, uint32_t *counts) {
  const int32_t i = (int32_t)(blockIdx.x * 256 + threadIdx.x);
  if (i >= n) return;
  Doubt of_quotient, of_root;
  const float quotient = (Quick{x[i], &of_quotient} / Quick{y[i], &of_quotient}).x;
  const float root = lb::sqrt(Quick{x[i], &of_root}).x;
  const bool divided = !Doubt::any(of_quotient), rooted = !Doubt::any(of_root);
  if (divided) atomicAdd(counts, 1u);
  if (rooted) atomicAdd(counts + 1, 1u);
  if (divided && bits_of(quotient) != bits_of(x[i] / y[i])) atomicAdd(counts + 2, 1u);
  if (rooted && bits_of(root) != bits_of(lb::sqrt(x[i]))) atomicAdd(counts + 3, 1u);
}
"""


def compared(x: torch.Tensor, y: torch.Tensor, source: str = SOURCE) -> list[int]:
    """How many quotients and roots are beyond doubt, and how many of those are wrong."""
    counts = torch.zeros(4, dtype=torch.int32, device=x.device)
    on = machine(x.device)
    function = on.module(source, sources()).function("compare")
    pointers = [c_void_p(tensor.data_ptr()) for tensor in (x, y)]
    on.launch(function, -(-len(x) // 256), 256, [*pointers, c_int32(len(x)), c_void_p(counts.data_ptr())])
    return counts.tolist()


def of_bits(bits: torch.Tensor) -> torch.Tensor:
    return bits.to(torch.int32).view(torch.float32)


def any_bits(n: int, seed: int) -> torch.Tensor:
    return of_bits(torch.randint(-(2**31), 2**31, (n,), generator=torch.Generator().manual_seed(seed)))


EDGES = [k * 2**23 + d for k in range(256) for d in (-2, -1, 0, 1, 2) if k * 2**23 + d >= 0]


@needs_compiler
def test_what_is_beyond_doubt_is_ieees():
    n = 1 << 17
    with stepping():
        fine = compared(any_bits(n, 0), any_bits(n, 1))
        assert fine[0] > n // 20 and fine[1] > n // 4 and fine[2:] == [0, 0]
        edges = of_bits(torch.tensor([*EDGES, *(k - 2**31 for k in EDGES)]))  # around powers of two, of both signs
        for k in range(0, len(edges), 61):
            assert compared(edges, edges.roll(k))[2:] == [0, 0]
        assert compared(torch.zeros(256), torch.ones(256)) == [256, 256, 0, 0]  # 0 is beyond doubt
        like = any_bits(n, 2).abs().frexp().mantissa  # neighbours in size, where quotients are hard to round
        assert compared(like, like.flip(0))[2:] == [0, 0]
        without = SOURCE.replace('#include "quick.h"', "").replace("using namespace lb;", "")
        spoilt = sources()["quick.h"].replace("-inverse, quotient)", "inverse * 0.0f, quotient)")
        assert spoilt != sources()["quick.h"]
        wrong = compared(like, like.flip(0), spoilt.replace("#pragma once", "") + "using namespace lb;" + without)
        assert wrong[2] > n // 20


# ---- an approximation may be off

OFF = """
#include "quick.h"
using namespace lb;
// Of 256 mantissas in a row: how many reciprocals, refined once, are not the nearest; the last of those; how many roots
// are not.
extern "C" __global__ void __launch_bounds__(128) refined(uint32_t *counts) {
  const uint32_t first = (blockIdx.x * 128 + threadIdx.x) * 256;
  uint32_t inverses = 0u, roots = 0u, last = 0u;
  for (uint32_t bits = first; bits < first + 256u; ++bits) {
    const float b = float_of(0x3F800000u + bits), near = near_reciprocal(b);
    if (fma(near, fma(-b, near, 1.0f), near) != 1.0f / b) ++inverses, last = bits;
    Doubt doubt;
    roots += lb::sqrt(Quick{b, &doubt}).x != lb::sqrt(b);
    roots += lb::sqrt(Quick{2.0f * b, &doubt}).x != lb::sqrt(2.0f * b);
  }
  if (inverses) atomicAdd(counts, inverses);
  if (roots) atomicAdd(counts + 1, roots);
  if (inverses) atomicMax(counts + 2, last);
}
// Of 256 numerators in a row: how many quotients by b are not the nearest.
extern "C" __global__ void __launch_bounds__(128) quotients(float b, uint32_t *counts) {
  const uint32_t first = (blockIdx.x * 128 + threadIdx.x) * 256;
  uint32_t wrong = 0u;
  for (uint32_t bits = first; bits < first + 256u; ++bits) {
    Doubt doubt;
    const float a = float_of(0x3F800000u + bits);
    wrong += divided(a, b, &doubt).x != a / b;
  }
  if (wrong) atomicAdd(counts + 3, wrong);
}
"""
SECOND = """#else
// Of the two numbers around it, the one that is farther away.
LB_FN float near_reciprocal(float x) {
  const float nearest = 1.0f / x, left = fma(-x, nearest, 1.0f);
  return float_of(bits_of(nearest) + (left > 0.0f ? 1u : left < 0.0f ? 0u - 1u : 0u));
}
LB_FN float near_reciprocal_root(float x) {
  const double root = __builtin_sqrt((double)x);
  const float nearest = (float)(1.0 / root);
  const double left = 1.0 - (double)nearest * root;
  return float_of(bits_of(nearest) + (left > 0.0 ? 1u : left < 0.0 ? 0u - 1u : 0u));
}
#endif
"""


@needs_compiler
def test_an_approximation_may_be_off():
    """All mantissas, with the worse of the two approximations that are less than a unit in the last place off.

    Reciprocals are the nearest after one refinement, and so are quotients then (Markstein 1990), but for one by the
    largest mantissa, that paper's exception; and roots, but for one. Those are looked at on a GPU, below."""
    counts = torch.zeros(4, dtype=torch.int32)
    quick = sources()["quick.h"]
    own = quick[quick.index("#else  // the approximations") : quick.index("struct Doubt")]
    with stepping():
        on = machine(counts.device)
        module, to = on.module(OFF, {**sources(), "quick.h": quick.replace(own, SECOND)}), c_void_p(counts.data_ptr())
        on.launch(module.function("refined"), 256, 128, [to])
        assert counts.tolist() == [1, 1, 2**23 - 1, 0]
        on.launch(module.function("quotients"), 256, 128, [c_float(2.0 - 2.0**-23), to])
        assert counts[3] == 1
        for b in torch.rand(32, generator=torch.Generator().manual_seed(0)):
            on.launch(module.function("quotients"), 256, 128, [c_float(1.0 + b.item()), to])
        assert counts[3] == 1


@pytest.mark.gpu
def test_a_gpus_approximations_are_good_enough():
    """All numbers of two binades, whose roots are all that there are; and 2**33 quotients."""
    device = torch.device("cuda")
    numbers = of_bits(torch.arange(127 << 23, 129 << 23, device=device))
    for k in range(256):
        every = numbers[torch.randperm(len(numbers), device=device)] if k else numbers.new_ones(len(numbers))
        assert compared(every, numbers)[2:] == [0, 0], k  # the first are reciprocals
    hardest = of_bits(torch.arange((127 << 23) - (1 << 16), 127 << 23, device=device))  # just below 2
    for y in hardest[-64:]:
        x = numbers[: 1 << 23]
        assert compared(x, y.expand(len(x)).contiguous())[2:] == [0, 0]
    assert compared(numbers, numbers)[1] == len(numbers)


IEEE = """
extern "C" __global__ void quotient(float *x, const float *y) { x[threadIdx.x] = x[threadIdx.x] / y[threadIdx.x]; }
extern "C" __global__ void root(float *x) { x[threadIdx.x] = __fsqrt_rn(x[threadIdx.x]); }
"""


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_course_is_the_compilers_own(arch: str):
    """From an approximation to IEEE's quotient and root: as many multiply-adds as in quick.h, or products."""
    if not inspect.nvdisasm():
        pytest.skip("nvdisasm is not installed: pip install nvidia-cuda-nvdisasm")
    try:
        compiler = nvrtc.find()
    except NoCompiler as error:
        pytest.skip(str(error))
    code = inspect.disassemble(compiler.compile(IEEE, "ieee.cu", sources(), arch)[0])
    counted = {}
    for kernel, near in (("quotient", "MUFU.RCP"), ("root", "MUFU.RSQ")):
        names = [i.opcode for i in code[kernel]]
        names = names[names.index(near) : names.index("EXIT")]  # what is called for odd operands stands behind
        counted[kernel] = [sum(name.startswith(what) for name in names) for what in ("FFMA", "FMUL")]
    assert counted == {"quotient": [5, 0], "root": [2, 2]}
