"""Quotients and roots without branches (cuda/quick.h): IEEE's bits wherever there is no doubt."""

from ctypes import c_int32, c_void_p

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
        like = any_bits(n, 2).abs().frexp().mantissa  # neighbours in size, where quotients are hard to round
        assert compared(like, like.flip(0))[2:] == [0, 0]
        without = SOURCE.replace('#include "quick.h"', "").replace("using namespace lb;", "")
        spoilt = sources()["quick.h"].replace("-inverse, quotient)", "inverse * 0.0f, quotient)")
        assert spoilt != sources()["quick.h"]
        wrong = compared(like, like.flip(0), spoilt.replace("#pragma once", "") + "using namespace lb;" + without)
        assert wrong[2] > n // 20


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
