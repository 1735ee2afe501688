"""cuda/linear.cu and few.cu: both products with a stored weight, on the emulator and, where there is one, on a GPU.

The result must be that of the weight's decoded values, rounded to bfloat16, to within what fp32 sums and one rounding
to bfloat16 allow: |y - exact| <= 2^-8 |exact| + K 2^-23 sum |x w|. The first term is half an ulp of bfloat16; products
of two bfloat16 numbers are exact in fp32, and each of the K additions may lose an ulp of fp32, 2^-23, of a sum that is
never larger than that of the magnitudes (tensor cores truncate: https://doi.org/10.7717/peerj-cs.330).
"""

import sys
from collections.abc import Iterator
from ctypes import c_void_p
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parent / "emulator"))
from emulator import REVERSE, compiler, installed, sanitized

import lowbit
from lowbit.gpu import machine, sources
from lowbit.gpu.linear import linear, linear_transposed
from lowbit.packed import Packed

needs_compiler = pytest.mark.skipif(compiler() is None, reason="there is no g++ for the emulator")

DEVICES = [pytest.param("cpu", marks=needs_compiler), pytest.param("cuda", marks=pytest.mark.gpu)]
FORMATS = [name for name in lowbit.formats() if lowbit.format(name).compressed and lowbit.format(name).plain]
# (m, n, k): few rows (at most 64) and more, whole tiles and none, aligned and not
WHOLE = [(1, 16, 64), (16, 50, 320), (40, 160, 96), (150, 288, 64)]
ODD = [(1, 1, 1), (3, 17, 45), (33, 33, 1100), (65, 1, 7), (70, 131, 100), (129, 33, 65)]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    if request.param == "cpu":
        with installed():
            yield torch.device("cpu")
    else:
        yield torch.device("cuda")


def values(*shape: int, seed: int = 0, signed: bool = True) -> Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return x if signed else x.abs()


def stored(name: str, n: int, k: int, device: torch.device) -> Packed:
    packed = lowbit.quantize(values(n, k, seed=1, signed=lowbit.format(name).signed), name)
    return Packed(packed.format, packed.shape, {part: t.to(device) for part, t in packed.parts.items()})


def check(got: Tensor, left: Tensor, right: Tensor) -> None:
    left, right = left.double().cpu(), right.bfloat16().double().cpu()
    exact, magnitudes = left @ right, left.abs() @ right.abs()
    allowed = 2.0**-8 * exact.abs() + left.shape[-1] * 2.0**-23 * magnitudes
    assert got.dtype == torch.bfloat16 and got.shape == exact.shape
    assert bool(((got.cpu().double() - exact).abs() <= allowed).all())


def both(name: str, m: int, n: int, k: int, device: torch.device) -> None:
    weight = stored(name, n, k, device)
    plain = Packed(weight.format, weight.shape, {p: t.cpu() for p, t in weight.parts.items()}).dequantize()
    x, dy = values(m, k, seed=2).bfloat16(), values(m, n, seed=3).bfloat16()
    check(linear(x.to(device), weight), x, plain.T)
    check(linear_transposed(dy.to(device), weight), dy, plain)


@pytest.mark.parametrize("shape", ODD, ids=str)
@pytest.mark.parametrize("name", ["int4", "int8", "nf4"])
def test_any_shape(name: str, shape: tuple[int, int, int], device: torch.device):
    both(name, *shape, device)


@pytest.mark.parametrize("shape", WHOLE, ids=str)
@pytest.mark.parametrize("name", ["int4", "int8", "nf4", "e2m1"])
def test_aligned_shapes(name: str, shape: tuple[int, int, int], device: torch.device):
    both(name, *shape, device)


@pytest.mark.parametrize("name", [*FORMATS, "int4:8", "nf4:24", "int8:16", "e4m3:32"])
def test_every_format(name: str, device: torch.device):
    both(name, 5, 24, 75, device)
    both(name, 65, 24, 75, device)


@pytest.mark.parametrize("name", ["solo2", "int4-affine", "e4m3", "nf4:16"])
def test_formats_that_are_stored_unlike_others_when_aligned(name: str, device: torch.device):
    both(name, 5, 32, 128, device)
    both(name, 65, 32, 128, device)


@needs_compiler
@pytest.mark.parametrize("m", [3, 70])
def test_the_order_of_threads_changes_no_bit(m: int):
    weight, x, dy = stored("nf4", 40, 70, torch.device("cpu")), values(m, 70).bfloat16(), values(m, 40).bfloat16()
    results = []
    for schedule in (0, REVERSE, 7):
        with installed(schedule):
            results.append((linear(x, weight), linear_transposed(dy, weight)))
    for y, dx in results[1:]:
        assert torch.equal(y, results[0][0]) and torch.equal(dx, results[0][1])


def test_inputs_of_any_rank_and_layout(device: torch.device):
    weight, x = stored("int8", 24, 32, device), values(2, 3, 32).bfloat16().to(device)
    flat = linear(x.reshape(6, 32), weight)
    assert torch.equal(linear(x, weight), flat.reshape(2, 3, 24))
    assert torch.equal(linear(x[0, 0], weight), flat[0])
    assert torch.equal(linear(x.reshape(6, 32).T.contiguous().T, weight), flat)
    shifted = torch.cat([torch.zeros(1, device=device, dtype=x.dtype), x.flatten()])[1:]  # begins between 16 bytes
    assert torch.equal(linear(shifted.view(6, 32), weight), flat)
    assert linear(x[:0], weight).shape == (0, 3, 24)
    assert linear_transposed(flat[:0], weight).shape == (0, 32)


def test_a_block_that_is_not_finite_spoils_only_its_row(device: torch.device):
    w = values(40, 160)
    w[3, 5] = float("inf")
    packed = lowbit.quantize(w, "int4")
    weight = Packed(packed.format, packed.shape, {p: t.to(device) for p, t in packed.parts.items()})
    for m in (2, 70):
        y = linear(values(m, 160).bfloat16().to(device), weight).cpu()
        assert y[:, 3].isnan().all() and y[:, [k for k in range(40) if k != 3]].isfinite().all()


# ---- torch


def test_torch_compile_and_autograd_know_the_products(device: torch.device):
    weight = stored("int4-affine", 40, 64, device)
    x = values(2, 3, 64).bfloat16().to(device).requires_grad_()

    def layer(x: Tensor) -> Tensor:
        return linear(x.relu(), weight) * 2

    torch._dynamo.reset()
    results = []
    for run in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        y = run(x)
        results.append((y.detach(), *torch.autograd.grad(y.float().square().sum(), x)))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    y, gradient = results[0]
    assert torch.equal(gradient, linear_transposed((2 * (2 * y.float())).bfloat16(), weight) * (x > 0))


def test_an_operator_is_called_for_a_compiler_or_a_gradient_only(device: torch.device):
    weight, x = stored("int4", 24, 64, device), values(2, 64).bfloat16().to(device)
    with _Seen() as seen:
        assert linear(x, weight).shape == (2, 24)
        linear_transposed(linear(x, weight), weight)
        assert not any("lowbit" in name for name in seen.names)
        linear(x.requires_grad_(), weight)
        assert "lowbit.linear.default" in seen.names


class _Seen(TorchDispatchMode):
    """The names of the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["linear", "linear_transposed"])
def test_the_operators_keep_torch_s_rules(name: str, device: torch.device):
    weight = stored("int4", 64, 64, device)
    x = values(4, 64).bfloat16().to(device).requires_grad_()
    linear(x, weight)  # registers them
    operator = getattr(torch.ops.lowbit, name).default
    torch.library.opcheck(operator, (x, weight.codes, weight.scale, None, "int4", 64))


# ---- what is refused


def error(x: Tensor, weight: Packed) -> str:
    with pytest.raises((TypeError, ValueError)) as caught:
        linear(x, weight)
    return str(caught.value)


def test_what_does_not_fit_is_named():
    weight, x = lowbit.quantize(values(8, 32), "int4"), values(2, 32).bfloat16()
    assert "bfloat16, not torch.float32" in error(x.float(), weight)
    assert "shape is (2, 31), and the weight [8, 32] has 32 columns" in error(x[:, :31], weight)
    assert "must be a matrix" in error(x, lowbit.quantize(values(32), "int4"))
    assert "use torch.nn.functional.linear" in error(x, lowbit.quantize(values(8, 32), "bf16"))
    assert "blocks of 1 x 12 values" in error(x, lowbit.quantize(values(8, 32), "int4:12"))
    assert "4 bits, blocks of 1 x 16 values and e4m3 scales" in error(x, lowbit.quantize(values(8, 32), "nvfp4"))
    assert "bf16 scales" in error(x, lowbit.quantize(values(8, 32), "int4-bf16"))
    assert "6 bits" in error(x, lowbit.quantize(values(8, 32), "e2m3"))
    assert "blocks of 1 x 0 values" in error(x, lowbit.quantize(values(8, 32), "int8:row"))
    own = Packed(lowbit.format("int8"), (8, 32), weight.parts)
    assert "has codes (8, 32) and scales (8, 1)" in error(x, own)
    assert "on meta" in error(x.to("meta"), weight)
    with pytest.raises(ValueError, match="has 8 rows"):
        linear_transposed(x, weight)
    with pytest.raises(ValueError, match="CUDA tensors, and these are on cpu"):
        linear(x, weight)


# ---- the tensor cores' instruction, against the numbering in NVIDIA's manual

MMA = """#include "mma.h"
extern "C" __global__ void product(const uint32_t *a, const uint32_t *b, float *c) {
  const int lane = lb::lane();
  uint32_t left[4], right[2];
  float sum[4];
  for (int k = 0; k < 4; ++k) left[k] = a[4 * lane + k], sum[k] = c[4 * lane + k];
  for (int k = 0; k < 2; ++k) right[k] = b[2 * lane + k];
  lb::mma_16x8x16(sum, left, right);
  for (int k = 0; k < 4; ++k) c[4 * lane + k] = sum[k];
}
"""


def test_a_fragment_is_numbered_as_in_nvidia_s_manual(device: torch.device):
    # https://docs.nvidia.com/cuda/parallel-thread-execution/, "Matrix Fragments for mma.m16n8k16"
    a, b, c = values(16, 16).bfloat16(), values(16, 8, seed=1).bfloat16(), values(16, 8, seed=2)
    lanes_a, lanes_b, lanes_c = torch.zeros(32, 8), torch.zeros(32, 4), torch.zeros(32, 4)
    places = []
    for lane in range(32):
        group, within = lane >> 2, lane % 4
        for i in range(8):
            row = group if i < 2 or 4 <= i < 6 else group + 8
            lanes_a[lane, i] = a[row, within * 2 + (i & 1) + (8 if i >= 4 else 0)]
        for i in range(4):
            lanes_b[lane, i] = b[within * 2 + (i & 1) + (8 if i >= 2 else 0), group]
            places.append((group if i < 2 else group + 8, within * 2 + (i & 1)))
            lanes_c[lane, i] = c[places[-1]]
    lanes_a, lanes_b = lanes_a.bfloat16().to(device), lanes_b.bfloat16().to(device)
    lanes_c = lanes_c.to(device)
    runs = machine(device)
    product = runs.module(MMA, sources()).function("product")
    runs.launch(product, 1, 32, [c_void_p(t.data_ptr()) for t in (lanes_a, lanes_b, lanes_c)])
    exact = c.double() + a.double() @ b.double()
    got = torch.zeros(16, 8)
    for place, value in zip(places, lanes_c.cpu().flatten().tolist(), strict=True):
        got[place] = value
    assert torch.allclose(got.double(), exact, rtol=0, atol=17 * 2.0**-22 * float((a.abs() @ b.abs()).max()))


# ---- sanitizers

RUN = """
import torch, lowbit
from emulator import installed
from lowbit.gpu import linear as host, nvrtc
texts = dict(nvrtc.sources())
for file, before, after in {faults!r}:
    assert before in texts[file], before
    texts[file] = texts[file].replace(before, after)
host.sources = lambda: texts
with installed():
    for name, m, n, k in {cases!r}:
        weight = lowbit.quantize(torch.rand(n, k), name)
        host.linear(torch.rand(m, k).bfloat16(), weight)
        host.linear_transposed(torch.rand(m, n).bfloat16(), weight)
print("clean")
"""
CASES = [
    ("nf4", 3, 17, 45),
    ("int4", 17, 16, 640),
    ("int4", 65, 37, 101),
    ("int8", 130, 32, 96),
    ("int8", 9, 13, 1100),
]
# The sanitizer, a case, the file, what stands in it, what is put there instead, and what is then said.
OVERFLOW = "AddressSanitizer: heap-"  # what lies beyond a tensor may be nobody's, or have been another's
FAULTS = {
    "the-loop-s-barrier": ("thread", 2, "linear.h", "__syncthreads();  // the next step reads", "//", "data race"),
    "the-sums-barrier": ("thread", 4, "few.h", "__syncthreads();  // before threads add", "//", "data race"),
    "the-next-tile-s-barrier": ("thread", 1, "few.h", "if (tile > 0) __syncthreads();  // the last", "//", "data race"),
    "the-tables-barrier": ("thread", 0, "few.h", "__syncthreads();  // tables", "//", "data race"),
    "parts-in-one-place": ("thread", 4, "few.h", "(int64_t)part * x.rows", "(int64_t)0 * x.rows", "data race"),
    "an-unmasked-tail": ("address", 0, "packed.h", "left < BYTES ? (int)left : BYTES", "left ? BYTES : 0", OVERFLOW),
    "an-unmasked-row": (
        "address",
        0,
        "packed.h",
        "row < w.rows ? row_bytes - offset : 0",
        "row_bytes - offset",
        OVERFLOW,
    ),
    "a-result-too-many": (
        "address",
        2,
        "linear.h",
        "!WHOLE && y < left.rows && x + 1 < cols",
        "!WHOLE && y < left.rows",
        OVERFLOW,
    ),
    "a-row-too-many": ("address", 0, "few.h", "down >= x.rows || col >= w.rows", "col >= w.rows", OVERFLOW),
}


@needs_compiler
@pytest.mark.parametrize("sanitizer", ["thread", "address"])
def test_a_sanitizer_has_nothing_to_say(sanitizer: str):
    done = sanitized(sanitizer, RUN.format(faults=[], cases=CASES))
    assert done.returncode == 0 and "clean" in done.stdout, done.stderr[-4000:]


@needs_compiler
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault: str):
    sanitizer, case, file, before, after, said = FAULTS[fault]
    done = sanitized(sanitizer, RUN.format(faults=[(file, before, after)], cases=[CASES[case]]))
    assert done.returncode != 0 and said in done.stderr and "clean" not in done.stdout, done.stderr[-4000:]
