"""Scales, masks, corrections and rotations that CUDA kernels make, on the emulator: the reference's bits."""

import contextlib
import math
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lowbit import backends, quantize_
from lowbit.backends import cuda, cuda_codec, reference
from lowbit.formats import Scaling, format
from lowbit.nn import matmul, three
from lowbit.rotation import SIZES, Rotation
from lowbit.scales import best

sys.path.insert(0, str(Path(__file__).parent / "emulator"))
import emulator
from test_cuda_codec import NOISE, SPECIAL, machine, same, values  # noqa: F401  # machine is a fixture

pytestmark = pytest.mark.skipif(emulator.compiler() is None, reason="the emulator needs g++")

# Scales that the host makes of what kernels have measured.
MEASURED = ["int4:tensor", "nf4:3x5", "nvfp4-2d", "int4-sawb", "int4-quest", "nf4-dq", "mxfp6-e3m2:5", "nvfp4-46:48"]


def spoilt(shape: tuple[int, int], seed: int = 0) -> Tensor:
    """A matrix with rows of zeros, of the smallest and the largest numbers, and of what is not finite."""
    x = values(format("fp32"), shape, seed)
    x[0] = 0
    x[1, 3], x[2, 5], x[3, -1] = math.inf, math.nan, 3e38
    x[4] = torch.tensor(SPECIAL).repeat(-(-shape[1] // len(SPECIAL)))[: shape[1]]
    x[5] = 1e-44
    return x


def all_same(got: dict[str, Tensor], want: dict[str, Tensor], what: object) -> None:
    assert got.keys() == want.keys(), what
    for part in want:
        same(got[part], want[part], (part, what))


# ---- one pass


@pytest.mark.parametrize(
    "name", ["int4:32", "mxfp4-quest", "nvfp4-46", "mxfp6-e3m2", "int4-quest", "nf4:5", "e2m1:4x8"]
)
@pytest.mark.parametrize("signs", [5, None])
def test_codes_values_and_a_mask_at_once(name: str, signs: int | None):
    """As QuEST and Quartet ask for them: rotated, with a bit for each value that is near enough."""
    fmt, rotation = format(name), Rotation(32, signs)
    for x in (spoilt((9, 70)).bfloat16(), spoilt((7, 256))):
        for noise, edge, dtype in ((None, 3.0, torch.bfloat16), (NOISE, fmt.top, torch.float32)):
            asked = {"rotation": rotation, "edge": edge, "dtype": dtype}
            got, want = cuda.quantized(fmt, x, noise, **asked), reference.quantized(fmt, x, noise, **asked)
            same(got[0], want[0], name)
            all_same(got[1], want[1], name)


@pytest.mark.parametrize("name", ["int4-bf16", "nvfp4-128", "nvfp4-sr", "mxfp8-e5m2"])
@pytest.mark.parametrize("shape", [(1, 3), (5, 129), (3, 640), (0, 16), (2, 0)])
def test_scales_of_any_shape(name: str, shape: tuple[int, int]):
    fmt, x = format(name), values(format("fp32"), shape) if shape[0] else torch.zeros(shape)
    got, want = cuda.quantized(fmt, x, NOISE), reference.quantized(fmt, x, NOISE)
    same(got[0], want[0], shape)
    all_same(got[1], want[1], shape)


OWN = {
    "bf16 to nearest": Scaling("bf16"),
    "rms in bytes": Scaling("e4m3", statistic="rms", gain=2.0),
    "bytes above a least": Scaling("e4m3", least=2.0**-6),
    "rms in fp32": Scaling(statistic="rms", gain=2.5),
    "rms under one of the tensor": Scaling("e4m3", statistic="rms", peak=448),
    "the better power of two": Scaling("e8m0", rounding="floor", candidates=(1.0, 2.0)),
    "the better of a part of a row": Scaling("e4m3", peak=256, outer=64, candidates=(1.0, 1.5)),
}


@pytest.mark.parametrize("name", OWN)
def test_a_scaling_of_ones_own(name: str):
    fmt = replace(format("e2m1:16"), name="own", scaling=OWN[name])
    assert cuda_codec.finder(fmt) == "warp"
    x = spoilt((7, 100))
    all_same(cuda.encode(fmt, x), reference.encode(fmt, x), name)
    same(cuda.fake(fmt, x), reference.fake(fmt, x), name)


# ---- MS-EDEN


EDEN = [*(("nvfp4-eden", size) for size in SIZES), ("nvfp4", 32), ("nvfp4-128:32", 128), ("nvfp4-eden:4", 16)]


@pytest.mark.parametrize(("name", "run"), EDEN)
def test_corrected_scales(name: str, run: int):
    fmt, rotation = format(name), Rotation(run, 7)
    for x in (values(format("fp32"), (5, 200)), values(format("fp32"), (6, 256), 1).bfloat16(), spoilt((6, 130))):
        want = reference.quantized(fmt, x, NOISE, rotation=rotation, run=run)
        got = cuda.quantized(fmt, x, NOISE, rotation=rotation, run=run)
        same(got[0], want[0], name)
        all_same(got[1], want[1], name)
        all_same(cuda.encode(fmt, x, NOISE, rotation=rotation, run=run), want[1], name)


# ---- rotations


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotated_and_back(size: int, dtype: torch.dtype):
    x = values(format("fp32"), (5, 200)).to(dtype)
    mask = torch.randint(0, 256, (5, 25), generator=torch.Generator().manual_seed(1)).byte()
    for rotation in (Rotation(size, 2**40 + 1), Rotation(size, None)):
        for back, bits in ((False, None), (True, None), (True, mask)):
            asked = {"back": back, "mask": bits, "dtype": dtype}
            same(cuda.rotate(x, rotation, **asked), reference.rotate(x, rotation, **asked), (rotation, back))


# ---- what kernels measure for the host


@pytest.mark.parametrize("name", [*MEASURED, "nvfp4-46"])
def test_what_is_measured(name: str):
    fmt = format(name)
    for x in (spoilt((37, 301)), values(format("fp32"), (6, 512)), values(format("fp32"), (1, 2)), torch.zeros(0, 5)):
        want, got = reference.measured(fmt, x), cuda.measured(fmt, x)
        same(got.absmax(), want.absmax(), name)
        if not x.numel():
            continue
        found = best(fmt, want)
        all_same(best(fmt, got).parts, found.parts, name)
        finite = found.inverse.isfinite() & found.multiplier.isfinite()
        for of in ("squares", "magnitudes"):
            same(got.total(of, found.inverse), want.total(of, found.inverse), (name, of))
        same(got.units(found.inverse), want.units(found.inverse), name)
        same(got.codes(found), want.codes(found), name)
        if fmt.zero_code is not None:  # else the reference counts what the zeros beyond an edge lose
            same(got.losses(found)[finite], want.losses(found)[finite], name)
        same(got.products(found.inverse)[finite], want.products(found.inverse)[finite], name)


# ---- nothing of a matrix goes through torch

FREE = {"aten.detach.default", "aten.empty.memory_format", "aten.view.default", "aten.alias.default"}


class Watched(TorchDispatchMode):
    """Counts torch's operations on tensors as large as a matrix."""

    def __init__(self, size: int):
        super().__init__()
        self.size, self.seen = size, Counter[str]()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = [a for a in torch.utils._pytree.tree_leaves((args, kwargs or {})) if isinstance(a, Tensor)]
        if str(func) not in FREE and any(a.numel() >= self.size for a in given):
            self.seen[str(func)] += 1
        return func(*args, **(kwargs or {}))


ASKED = ["fp32", "int4", "mxfp6-e2m3", "nvfp4-eden", "int4-quest", "nf4-dq", "e2m1:16x16", "sqrt8:row"]


def asked(name: str, x: Tensor) -> None:
    """All that a layer asks for of a format."""
    fmt, rotation = format(name), Rotation(32, None)
    cuda.quantized(fmt, x, edge=2.0) if cuda_codec.is_linear(fmt) else cuda.quantized(fmt, x)
    cuda.quantized(fmt, x, NOISE, rotation=rotation, dtype=torch.bfloat16)
    cuda.decode(fmt, cuda.encode(fmt, x, rotation=Rotation(32, 1)), x.shape[1])
    cuda.rotate(x, rotation, back=True, mask=torch.zeros(x.shape[0], x.shape[1] // 8, dtype=torch.uint8))
    if fmt.scaling.stored == "e4m3" and fmt.block == (1, 16):
        cuda.quantized(fmt, x, NOISE, rotation=rotation, run=32)


@pytest.mark.parametrize("name", ASKED)
def test_torch_does_nothing_with_a_matrix(name: str):
    x = values(format(name), (64, 512))
    with Watched(x.numel()) as watched:
        asked(name, x)
    assert not watched.seen, watched.seen


def test_what_torch_does_with_a_matrix_is_seen():
    x = values(format("int4"), (64, 512))
    with Watched(x.numel()) as watched:
        reference.fake(format("int4"), x)
    assert watched.seen


@pytest.mark.parametrize("name", ["int4:32", "int4-bf16", "mxfp4", "nvfp4-128", "nvfp4-46", "mxfp6-e2m3"])
def test_one_launch_where_blocks_lie_in_rows(name: str, monkeypatch: pytest.MonkeyPatch):
    """And one more for the scale of a tensor."""
    launched: list[str] = []
    launch = emulator.Emulator.launch

    def note(self, function, *args, **kwargs):
        if self.driver.is_current(self.context):  # else this is called once more
            launched.append(function.name)
        launch(self, function, *args, **kwargs)

    monkeypatch.setattr(emulator.Emulator, "launch", note)
    fmt = format(name)
    cuda.quantized(fmt, values(fmt, (4, 256)), rotation=Rotation(16, 1), edge=1.0)
    whole = fmt.scaling.peak and not fmt.scaling.outer
    assert launched == ["largest_of_all", "encode"] if whole else launched == ["encode"]


# ---- layers


@pytest.mark.parametrize("preset", ["nvfp4", "quartet2", "quest", "mxfp4", "tetrajet2"])
def test_a_layer_is_given_values_in_its_dtype(preset: str, monkeypatch: pytest.MonkeyPatch):
    """On a GPU kernels round to bf16 what is multiplied in it: the bits of a conversion afterwards."""
    monkeypatch.setitem(backends._NATIVE, "cpu", cuda)
    monkeypatch.setattr(matmul, "multiplied_in", lambda device, dtype: dtype)  # as on a GPU
    found, made = [], Counter[torch.dtype]()
    run = cuda._encode

    def note(fmt, x, parts, dtype, *args, **kwargs):
        made[dtype] += 1
        return run(fmt, x, parts, dtype, *args, **kwargs)

    monkeypatch.setattr(cuda, "_encode", note)
    for inside in (lambda device, dtype: torch.float32, lambda device, dtype: dtype):
        made.clear()
        monkeypatch.setattr(three, "multiplied_in", inside)
        torch.manual_seed(0)
        layer = quantize_layer(preset)
        x = torch.randn(32, 64, dtype=torch.bfloat16, requires_grad=True)
        layer(x).square().sum().backward()
        found.append((layer.weight.grad, x.grad))
    assert all(map(torch.equal, *found))
    assert made[torch.bfloat16] >= 3


def quantize_layer(preset: str) -> torch.nn.Module:
    model = torch.nn.Sequential(torch.nn.Linear(64, 64)).to(torch.bfloat16)
    quantize_(model, preset)
    return model[0]


# ---- faults

SETTINGS = {
    "nvfp4": ("nvfp4", {}),
    "better": ("nvfp4-46", {}),
    "outer": ("nvfp4-128", {}),
    "quest": ("mxfp4-quest", {"edge": 2.0}),
    "six": ("mxfp6-e2m3", {}),
    "eden": ("nvfp4-eden", {"run": 32, "rotation": Rotation(32, 5)}),
    "rows": ("int4-quest", {}),
    "apart": ("int4:48", {}),
}
FAULTS = {
    "a mask of what another lane has": ("quest", "coding.h", "/ 8) + p.col / 8] = (uint8_t)(b", "/ 8)] = (uint8_t)(b"),
    "bits of what is beyond a row": ("quest", "coding.h", "(bits & ((1u << p.count) - 1u))", "(bits)"),
    "6 bits cut off at words": (
        "six",
        "formats.h",
        "codes.word[word + 1] |= code >> (32 - from);",
        "codes.word[word + 1] |= 0u;",
    ),
    "a sum for the tensor's largest": (
        "nvfp4",
        "passes.cu",
        "over_block(most, false, room)",
        "over_block(most, true, room)",
    ),
    "each lane its own largest": ("apart", "passes.cu", "range.above = over_block(range.above, false, room);", ""),
    "the first turn's values in all turns": (
        "outer",
        "codec.cu",
        "ahead = Raw::of(m, next);\n    encode_turn",
        "encode_turn",
    ),
    "quotients of another divisor": (
        "quest",
        "places.h",
        "d.magic) + low) >> d.shift",
        "d.magic) + low) >> (d.shift + 1)",
    ),
    "NaN as the largest": ("quest", "coding.h", "source[i] = in_units(x[i], inverse);", "(void)0;"),
    "what is not finite counts": (
        "nvfp4",
        "derive.h",
        "return finite_bits(magnitude_bits(x)) ? x : 0.0f;",
        "return x;",
    ),
    "the worse candidate": ("better", "derive.h", "shared) < loss_of(x, b, shared)", "shared) > loss_of(x, b, shared)"),
    "a short block's mean as a long one's": ("quest", "derive.h", "left >= WIDTH ?", "left >= 0 ?"),
    "each block its own outer scale": ("outer", "derive.h", "largest<OUTER_LANES>(bits_of", "(bits_of"),
    "a block's correction for its run's": ("eden", "derive.h", "apart >= LANES; apart /= 2", "apart > RUN; apart /= 2"),
    "random bits of another block": ("eden", "derive.h", "number % 2 ? both >> 16", "number % 2 == 0 ? both >> 16"),
    "signs come first on the way back": (
        "back",
        "places.h",
        "if (BACK) flip(m, col, x);",
        "if (!BACK) flip(m, col, x);",
    ),
    "what is beyond a piece counts": ("losses", "statistic.cu", "i < p.count ? x[i] : 0.0f", "i < V ? x[i] : 0.0f"),
    "all pieces of a row in one place": (
        "rows",
        "statistic.cu",
        "number % (uint32_t)pieces * (int64_t)LB_BLOCK + ",
        "",
    ),
}


@contextlib.contextmanager
def patched(file: str, before: str, after: str) -> Iterator[None]:
    """Compile matrices' kernels from a text with a fault in it."""
    texts = cuda_codec.sources()
    assert texts[file].count(before) == 1, f"{file} no longer has {before!r}, or has it more than once"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_codec, "_texts", lambda: {**texts, file: texts[file].replace(before, after)})
        yield


def differs(setting: str) -> None:
    """Raises where bits are not the reference's."""
    x, rotation = spoilt((6, 300)), Rotation(32, 5)
    if setting == "back":
        return same(cuda.rotate(x, rotation, back=True), reference.rotate(x, rotation, back=True), "back")
    if setting == "losses":  # a grid without a zero: what is no value would lose something
        fmt, few = format("int4-quest").with_block(9), torch.ones(1, 9)
        found = best(fmt, reference.measured(fmt, few))
        return same(cuda.measured(fmt, few).losses(found), reference.measured(fmt, few).losses(found), "losses")
    name, how = SETTINGS[setting]
    fmt = format(name)
    for numbers in (x, values(format("fp32"), (6, 300))):
        got, want = cuda.quantized(fmt, numbers, NOISE, **how), reference.quantized(fmt, numbers, NOISE, **how)
        same(got[0], want[0], name)
        all_same(got[1], want[1], name)


@pytest.mark.parametrize("setting", [*SETTINGS, "back", "losses"])
def test_without_a_fault_nothing_differs(setting: str):
    differs(setting)


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_in_a_codec_shows(name: str):
    setting, *fault = FAULTS[name]
    with patched(*fault), pytest.raises(AssertionError):
        differs(setting)


@pytest.mark.parametrize("sanitizer", [pytest.param("thread", marks=pytest.mark.slow), "address"])
def test_sanitizers_find_nothing_in_codecs(sanitizer: str):
    names = ["mxfp6-e2m3", "nvfp4-46"] if sanitizer == "address" else ["nvfp4-46", "nvfp4-2d", "int8:row"]
    code = f"""
import emulator, torch
from test_cuda_scales import asked, values, format
with emulator.installed(2):
    for name in {names}:
        asked(name, values(format(name), (5, 320)))
        asked(name, values(format(name), (3, 33 * 8))[:, 8:])
print("well")
"""
    done = emulator.sanitized(sanitizer, code)
    assert done.returncode == 0 and "well" in done.stdout, done.stderr[-3000:]
