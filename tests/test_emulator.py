"""The emulator of CUDA: what it computes, and that it finds what would go wrong on a GPU."""

import re
import sys
import textwrap
from ctypes import Structure, c_float, c_int, c_void_p
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "emulator"))
import emulator
from emulator import FORWARD, REVERSE, Emulator, sanitized

from lowbit.gpu import CompileError, DriverError, sources

pytestmark = pytest.mark.skipif(emulator.compiler() is None, reason="no g++")
SCHEDULES = [FORWARD, REVERSE, 2, 3]


def at(x: torch.Tensor) -> c_void_p:
    return c_void_p(x.data_ptr())


def kernel(body: str, parameters: str = "float *x, int n", before: str = "") -> str:
    return f'#include "device.h"\n{before}\nextern "C" __global__ void f({parameters}) {{\n{body}\n}}\n'


def run(source, arguments, grid=1, block=32, shared=0, schedule=FORWARD) -> None:
    machine = Emulator(schedule)
    machine.launch(machine.module(source, sources()).function("f"), grid, block, arguments, shared)


# ---- what it computes


LANES = list(range(32))
WARP = {
    "__shfl_sync(~0u, v, 5)": [105] * 32,
    "__shfl_sync(~0u, v, 1, 8)": [100 + k // 8 * 8 + 1 for k in LANES],
    "__shfl_xor_sync(~0u, v, 9)": [100 + (k ^ 9) for k in LANES],
    "__shfl_xor_sync(~0u, v, 8, 8)": [100 + (k ^ 8 if k & 8 else k) for k in LANES],
    "__shfl_up_sync(~0u, v, 3)": [100 + (k - 3 if k >= 3 else k) for k in LANES],
    "__shfl_down_sync(~0u, v, 3, 16)": [100 + (k + 3 if k % 16 < 13 else k) for k in LANES],
    "(int)__shfl_sync(~0u, (long long)v << 32, 7) + (int)(__shfl_sync(~0u, (long long)v << 32, 7) >> 32)": [107] * 32,
    "(int)__ballot_sync(~0u, k & 1)": [-1431655766] * 32,
    "__any_sync(~0u, k == 31)": [1] * 32,
    "__any_sync(~0u, k == 32)": [0] * 32,
    "__all_sync(~0u, k < 31)": [0] * 32,
    "__all_sync(~0u, k < 32)": [1] * 32,
    "(int)__reduce_max_sync(~0u, k * 7 % 32)": [31] * 32,
    "(int)__reduce_min_sync(~0u, k + 5)": [5] * 32,
    "(int)__reduce_add_sync(~0u, k)": [496] * 32,
    "(int)__reduce_and_sync(~0u, k | 64)": [64] * 32,
    "(int)__reduce_or_sync(~0u, k)": [31] * 32,
    "(int)__reduce_xor_sync(~0u, k == 3 ? 9 : 0)": [9] * 32,
    # Masks that part a warp in two, and lanes that come to them at different times.
    "k < 16 ? __shfl_xor_sync(0xFFFFu, v, 1) : 0": [100 + (k ^ 1) if k < 16 else 0 for k in LANES],
    "__syncthreads_count(k % 3 == 0)": [11] * 32,
    "__syncthreads_or(k == 4) + 2 * __syncthreads_and(k < 31)": [1] * 32,
    "(int)threadIdx.x + 0 * (int)(blockDim.x + gridDim.x + blockIdx.x)": LANES,
    "__clz(k) * 100 + __ffs(k) + __popc(k)": [
        (32 - k.bit_length()) * 100 + (k & -k).bit_length() + bin(k).count("1") for k in LANES
    ],
    "(int)__byte_perm(0x33221100u, 0x77665544u, 0x7250u)": [0x77225500] * 32,
    "(int)__byte_perm(0x80u, 0u, 0x8888u)": [-1] * 32,
    "(int)__funnelshift_l(0x80000000u, 1u, 4)": [0x18] * 32,
    "(int)__funnelshift_r(0x10u, 1u, 4)": [0x10000001] * 32,
    "(int)__umulhi(0x80000000u, 10u)": [5] * 32,
    "__float_as_int(__fsqrt_rn(__fmaf_rn(2.0f, 4.0f, 1.0f)))": [0x40400000] * 32,
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_lane_gets_what_it_would_on_a_gpu(schedule):
    rows = "\n".join(f"  to[{row} * 32 + k] = {text};" for row, text in enumerate(WARP))
    source = kernel(f"  const int k = threadIdx.x, v = 100 + k;\n{rows}", "int *to")
    to = torch.zeros(len(WARP), 32, dtype=torch.int32)
    run(source, [at(to)], schedule=schedule)
    for text, row, expected in zip(WARP, to.tolist(), WARP.values(), strict=True):
        assert row == expected, text


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_atomics(schedule):
    body = """
      const int k = blockIdx.x * blockDim.x + threadIdx.x;
      atomicAdd(&to[0], k), atomicMax(&to[1], k), atomicMin(&to[2], -k), atomicOr((unsigned *)&to[3], 1u << k % 31);
      for (int old = to[4]; old != atomicCAS(&to[4], old, old + 2);) old = *(volatile int *)&to[4];
      atomicAdd((float *)&to[5], 0.5f), atomicAdd((double *)&to[6], 0.25);
      atomicAdd((unsigned long long *)&to[8], 1ull << 33), atomicExch(&to[10], 3), atomicSub(&to[11], 1);
    """
    to = torch.zeros(12, dtype=torch.int32)
    run(kernel(body, "int *to"), [at(to)], grid=3, block=64, schedule=schedule)
    n = 192
    assert to[:4].tolist() == [n * (n - 1) // 2, n - 1, -(n - 1), 2**31 - 1]
    assert to[4] == 2 * n and to[5:6].view(torch.float32) == n / 2 and to[6:8].view(torch.float64) == n / 4
    assert to[8:10].view(torch.int64) == n << 33 and to[10:].tolist() == [3, -n]


SUMS = kernel(
    """
      __shared__ float part[8];
      LB_DYNAMIC_SHARED(bytes);
      float *mine = (float *)bytes;
      const int k = threadIdx.x, warp = k / 32;
      mine[k] = x[blockIdx.x * blockDim.x + k] * factors.first;
      __syncwarp();
      float sum = 0.0f;
      if (lb::lane() == 0) for (int j = 0; j < 32; ++j) sum += mine[k + j];
      if (lb::lane() == 0) part[warp] = sum;
      __syncthreads();
      if (k == 0) for (int j = 0; j < 8; ++j) to[blockIdx.x] += part[j] + (float)factors.second;
    """,
    "const float *x, float *to, Factors factors",
    "struct Factors { float first; int second; };",
)


class Factors(Structure):
    _fields_ = [("first", c_float), ("second", c_int)]


def sums(source: str, schedule: int, grid: int = 5) -> torch.Tensor:
    x, to = torch.arange(grid * 256.0), torch.zeros(grid)
    run(source, [at(x), at(to), Factors(2.0, 1)], grid, 256, 4 * 256, schedule)
    return to


SUM = torch.arange(5 * 256.0).view(5, 256).sum(1) * 2 + 8


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_shared_memory_and_barriers(schedule):
    assert torch.equal(sums(SUMS, schedule), SUM)


def test_shared_memory_is_full_of_garbage_before_each_block():
    body = """
      __shared__ float still[4];
      LB_DYNAMIC_SHARED(bytes);
      if (threadIdx.x < 4) x[blockIdx.x * 8 + threadIdx.x] = still[threadIdx.x];
      if (threadIdx.x < 4) x[blockIdx.x * 8 + 4 + threadIdx.x] = ((float *)bytes)[threadIdx.x];
      if (threadIdx.x < 4) still[threadIdx.x] = ((float *)bytes)[threadIdx.x] = (float)n;
    """
    x = torch.zeros(2, 8)
    run(kernel(body), [at(x), c_int(1)], grid=2, shared=16)
    assert x.isnan().all()


def test_a_schedule_is_an_order_of_threads_and_of_blocks():
    body = "  const int k = atomicAdd(count, 1);\n  x[k] = (float)(blockIdx.x * 100 + threadIdx.x);"
    source, orders = kernel(body, "float *x, int *count"), []
    for schedule in [FORWARD, REVERSE, 2, 2, 3]:
        x, count = torch.zeros(4 * 32), torch.zeros(1, dtype=torch.int32)
        run(source, [at(x), at(count)], grid=4, schedule=schedule)
        orders.append(x.tolist())
    forward = [b * 100.0 + t for b in range(4) for t in range(32)]
    assert orders[0] == forward and orders[1] == forward[::-1]
    assert orders[2] == orders[3] != orders[4] and all(sorted(order) == forward for order in orders)


def test_a_wrong_text_is_an_error_with_the_compilers_words():
    with pytest.raises(CompileError, match=r"kernel.cu:4:.*nonsense"):
        run(kernel("  x[0] = nonsense;"), [])
    with pytest.raises(CompileError, match="unused variable"):  # warnings are errors
        run(kernel("  int idle = n;\n  x[0] = 1.0f;"), [])


# ---- what goes wrong


@pytest.mark.parametrize("there", ["      __syncthreads();\n", "      __syncwarp();\n"])
def test_without_a_barrier_the_schedule_shows(there):
    assert SUMS.count(there) == 1
    found = [sums(SUMS.replace(there, ""), schedule) for schedule in SCHEDULES]
    assert not all(torch.equal(x, SUM) for x in found)


FAULTS = {
    "a barrier in a branch": (
        "  if (threadIdx.x < 40) __syncthreads();\n  x[threadIdx.x] = 1.0f;",
        r"kernel.cu:5: thread \(\d+,0,0\) of block \(0,0,0\) of f (exits while \d+ threads wait|waits at a __sync)",
    ),
    "an exit before a barrier": (
        "  if (threadIdx.x >= (unsigned)n) return;\n  __syncthreads();\n  x[threadIdx.x] = 1.0f;",
        r"kernel.cu:6: thread .* (waits at a __syncthreads, but thread \d+ has exited|exits while \d+ threads wait)",
    ),
    "two barriers": (
        "  if (threadIdx.x < 32)\n    __syncthreads();\n  else\n    __syncthreads();\n  x[0] = 1.0f;",
        r"kernel.cu:\d: thread .* waits at this __syncthreads, but thread \d+ at .*kernel.cu:\d",
    ),
    "a shuffle from outside its mask": (
        "  if (threadIdx.x < 16) x[threadIdx.x] = __shfl_xor_sync(0xFFFFu, 1.0f, 16);",
        r"kernel.cu:5: thread .* reads lane \d+ in __shfl_xor_sync, which mask 0x0000ffff does not name",
    ),
    "a shuffle without itself": (
        "  x[threadIdx.x] = __shfl_xor_sync(0xFFFFu, 1.0f, 1);",
        r"kernel.cu:5: thread .* is not in the mask 0x0000ffff of its __shfl_xor_sync",
    ),
    "a shuffle in a branch": (
        "  if (threadIdx.x % 32 < 20) x[threadIdx.x] = __shfl_xor_sync(~0u, 1.0f, 1);",
        r"kernel.cu:5: thread .* (exits while lane \d+ waits for it here|waits for lane \d+)",
    ),
    "two shuffles at once": (
        "  const int k = threadIdx.x;\n  x[k] = k % 2 ? __shfl_xor_sync(~0u, 1.0f, 1) : __shfl_sync(~0u, 1.0f, 1);",
        r"kernel.cu:\d: thread .* is in __shfl\w* with mask 0xffffffff, but lane \d+ in __shfl",
    ),
    "two masks at once": (
        "  const int k = threadIdx.x;\n  x[k] = __shfl_xor_sync(k % 32 ? ~0u : 1u, 1.0f, 0);\n  __syncwarp();",
        r"kernel.cu:\d: thread .* is in __\w+ with mask 0xffffffff, but lane \d+ in __",
    ),
    "a warp that waits for two things": (
        "  if (threadIdx.x % 2)\n    __syncthreads();\n  else\n    __syncwarp();\n  x[0] = 1.0f;",
        r"kernel.cu:8: thread .* waits for ever, like 31 others, in __syncwarp .*; 32 threads wait at a __syncthreads",
    ),
    "lanes that do not exist": (
        "  if (threadIdx.x >= 64) x[threadIdx.x] = __shfl_xor_sync(~0u, 1.0f, 1);",
        r"kernel.cu:5: thread .* names lane 8 in __shfl_xor_sync, which does not exist",
    ),
    "a width of 12": (
        "  x[threadIdx.x] = __shfl_xor_sync(~0u, 1.0f, 1, 12);",
        r"kernel.cu:5: thread .* the width of a shuffle is a power of two",
    ),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", FAULTS)
def test_what_no_gpu_would_take_is_an_error(name, schedule):
    body, said = FAULTS[name]
    x = torch.zeros(128)
    block = 72 if name == "lanes that do not exist" else 64
    with pytest.raises(DriverError, match=said) as error:
        run(kernel("  (void)n;\n" + body), [at(x), c_int(40)], block=block, schedule=schedule)
    assert error.value.code == 719
    # And the machine is as good as new.
    assert torch.equal(sums(SUMS, schedule), SUM)


# ---- what the sanitizers see


def watched(sanitizer: str, source: str, call: str) -> tuple[int, str]:
    """The return code and the report of a process in which a sanitizer watches a kernel's launch."""
    code = f"from test_emulator import *\nsource = {source!r}\n{textwrap.dedent(call)}\n"
    done = sanitized(sanitizer, code)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stderr


CALL_SUMS = "for schedule in (0, 1, 2): assert torch.equal(sums(source, schedule), SUM)"
FENCED = kernel(
    """
      __shared__ int last;
      if (threadIdx.x == 0) {
        to[blockIdx.x] = x[blockIdx.x];
        __threadfence();
        last = atomicAdd(count, 1) == (int)gridDim.x - 1;
        __threadfence();  // that the others see what it saw
      }
      __syncthreads();
      if (last && threadIdx.x == 7) for (int k = 0; k < (int)gridDim.x; ++k) to[gridDim.x] += to[k];
    """,
    "const float *x, float *to, int *count",
)
CALL_FENCED = """
for schedule in (0, 1, 2):
    x, to, count = torch.ones(4), torch.zeros(5), torch.zeros(1, dtype=torch.int32)
    run(source, [at(x), at(to), at(count)], grid=4, schedule=schedule)
    assert to[4] == 4
"""


@pytest.mark.parametrize("sanitizer", ["thread", "address"])
def test_sanitizers_have_nothing_to_say_about_what_is_right(sanitizer):
    both = f"{CALL_SUMS}\nsource = {FENCED!r}\n{CALL_FENCED}"
    assert watched(sanitizer, SUMS, both) == (0, "")


RACES = {
    "the first __threadfence": (FENCED, "        __threadfence();\n", "", CALL_FENCED),
    "the second __threadfence": (FENCED, "        __threadfence();  // that", "  // that", CALL_FENCED),
    "blocks that write the same": (SUMS, "to[blockIdx.x] +=", "to[0] +=", CALL_SUMS),
    "a missing __syncthreads": (SUMS, "      __syncthreads();\n", "", CALL_SUMS),
    "a missing __syncwarp": (SUMS, "      __syncwarp();\n", "", CALL_SUMS),
    # A shuffle lets lanes wait for each other and orders no memory.
    "a shuffle in its place": (SUMS, "      __syncwarp();\n", "  __shfl_sync(~0u, 0, 0);\n", CALL_SUMS),
    "a write by all lanes": (SUMS, "if (lb::lane() == 0) part[warp] = sum", "part[warp] = (float)k", CALL_SUMS),
}


@pytest.mark.parametrize("name", RACES)
def test_races_are_found(name):
    source, there, instead, call = RACES[name]
    assert source.count(there) == 1
    code, report = watched("thread", source.replace(there, instead), call.replace("assert ", "_ = "))
    assert code == 66 and re.search(r"ThreadSanitizer: data race .*kernel.cu:\d+ in f", report), report


OUTSIDE = {
    "static shared memory": (
        "part[warp] = sum",
        "part[warp + 1] = sum",
        "index 8 out of bounds|global-buffer-overflow",
    ),
    "dynamic shared memory": ("mine[k] =", "mine[k + 1] =", "heap-buffer-overflow"),
    "a tensor, reading": (
        "x[blockIdx.x * blockDim.x + k]",
        "x[blockIdx.x * blockDim.x + k + 1]",
        "heap-buffer-overflow",
    ),
    "a tensor, writing": ("to[blockIdx.x] +=", "to[blockIdx.x + 1] =", "heap-buffer-overflow"),
    "a word that is not aligned": (
        "+= mine[k + j]",
        "+= *(float *)(bytes + 4 * (k + j) + 1 - j % 2)",
        "misaligned address",
    ),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_wrong_addresses_are_found(name):
    there, instead, said = OUTSIDE[name]
    assert SUMS.count(there) == 1
    code, report = watched("address", SUMS.replace(there, instead), CALL_SUMS.replace("assert ", "_ = "))
    assert code == 1 and re.search(said, report) and re.search(r"kernel.cu:\d+", report), report
