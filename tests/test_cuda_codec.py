"""Codecs of whole matrices on CUDA, run by the emulator: the bits of the reference, for every format there is."""

import math
import sys
from collections.abc import Sequence
from ctypes import sizeof
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lowbit import rows
from lowbit.backends import cuda, cuda_codec, reference
from lowbit.formats import Format, Scaling, format, formats
from lowbit.gpu.formats import ENTRY, Bins, alive, bins, grid
from lowbit.rotation import SIZES, Rotation, rotate

sys.path.insert(0, str(Path(__file__).parent / "emulator"))
import emulator

pytestmark = pytest.mark.skipif(emulator.compiler() is None, reason="the emulator needs g++")

NOISE = (0x12345678, 0x9ABCDEF0)
NOISES = (None, NOISE)
HALVES = (torch.bfloat16, torch.float16)
SHAPES = [(3, 300), (2, 256), (41, 1), (1, 8), (4, 33), (3, 2), (6, 64), (0, 5), (2, 0), (1, 1100)]
# Blocks that a warp does not hold at once: of any length, longer than a row, of a few values that share a byte.
PLAIN = [name for name in formats() if format(name).plain or name in ("e2m3", "e3m2")]
BLOCKS = ["int4:48", "nf4:3", "sqrt8:7", "int8:1", "solo4:100", "solo2:3", "solo4:1000", "int4-affine:5",
          "int4-affine:512", "e2m1:16", "int4:8", "log4:32", "sqrt4:5000", "dyn8:300", "solo2:2",
          "e3m2:5", "e2m3:48", "sqrt8:row", "int4-affine:row"]  # fmt: skip
SPECIAL = [0.0, -0.0, 1e-45, -1e-45, 1e-40, 2.0**-126, 2.0**-127, 1e-20, 1.0, -1.0, 3.4028234663852886e38, 1e38]


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cuda_codec, "ENOUGH", 1)  # small matrices take turns too
    with emulator.installed() as found:
        yield found


def same(got: torch.Tensor, want: torch.Tensor, what: object) -> None:
    """Bit for bit, but for the payload of a NaN."""
    assert got.shape == want.shape and got.dtype == want.dtype, what
    if got.dtype.is_floating_point:
        assert torch.equal(got.isnan(), want.isnan()), what
        got, want = got.nan_to_num(nan=0.5), want.nan_to_num(nan=0.5)
    assert torch.equal(got.flatten().view(torch.uint8), want.flatten().view(torch.uint8)), what


def check(fmt: Format, x: torch.Tensor, live: bool = False, noises: Sequence = NOISES) -> None:
    for noise in noises:
        what = (fmt.name, tuple(x.shape), x.dtype, noise is not None, live)
        want = reference.encode(fmt, x, noise, live=live)
        got = cuda.encode(fmt, x, noise, live=live)
        assert got.keys() == want.keys()
        for part in want:
            same(got[part], want[part], (part, *what))
        same(cuda.decode(fmt, want, x.shape[1]), reference.decode(fmt, want, x.shape[1]), what)
        if not live:
            same(cuda.fake(fmt, x, noise), reference.fake(fmt, x, noise), what)


def values(fmt: Format, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    x = x * 10.0 ** torch.randint(-3, 3, (shape[0], 1), generator=torch.Generator().manual_seed(seed))
    return x if fmt.signed else x.abs() ** 3


@pytest.mark.parametrize("name", [*PLAIN, *BLOCKS])
def test_shapes(name):
    fmt = format(name)
    for shape in SHAPES:
        check(fmt, values(fmt, shape))
    x = values(fmt, (3, 301))
    check(fmt, x[:, 1:])  # rows of a view
    check(fmt, x.flatten()[1:601].view(2, 300))  # a start that is aligned to one value
    # Each module takes a while to compile: of two dtypes and two ways to round, a format meets two combinations.
    for dtype, noise in () if name in BLOCKS else zip(HALVES, NOISES if len(name) % 2 else NOISES[::-1], strict=True):
        check(fmt, x.to(dtype), noises=[noise])
        check(fmt, x.to(dtype).flatten()[1:601].view(2, 300), noises=[noise])


@pytest.mark.parametrize("name", [*PLAIN, *BLOCKS])
def test_special_values(name):
    fmt = format(name)
    x = values(fmt, (6, 600))
    x[0, :256] = 0
    x[1, 7] = 3e38
    x[2, 300] = math.inf
    x[3, 5], x[3, 400] = math.nan, math.inf
    x[4] = torch.tensor(SPECIAL).repeat(50) if fmt.signed else torch.tensor(SPECIAL).abs().repeat(50)
    x[5] = 1e-44
    if fmt.kind == "log":
        x[4] = x[4].abs()
    check(fmt, x)
    if fmt.kind != "log" and name not in BLOCKS:
        check(fmt, x.abs(), live=True)


@pytest.mark.parametrize("name", ["nf4", "int4-affine:32", "int4:3", "solo2:300", "fp32"])
@pytest.mark.parametrize("dtype", HALVES)
def test_what_comes_out_in_16_bits_is_rounded_once(name, dtype):
    fmt = format(name)
    x = values(fmt, (3, 300))
    x[1, 7], x[2, 8] = 3e38 if fmt.signed else 1e30, math.inf
    parts = reference.encode(fmt, x)
    same(cuda.decode(fmt, parts, 300, dtype), reference.decode(fmt, parts, 300).to(dtype), name)
    same(cuda.fake(fmt, x, NOISE, dtype=dtype), reference.fake(fmt, x, NOISE).to(dtype), name)


@pytest.mark.parametrize("name", PLAIN)
def test_every_code_is_decoded(name):
    fmt = format(name)
    if not fmt.compressed:  # every bit pattern of 16; of 32, some
        every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(256, 256)
        codes = every.view(fmt.dtype) if fmt.bits == 16 else (every.int() * 65521).view(fmt.dtype)
        same(cuda.decode(fmt, {"codes": codes}, 256), reference.decode(fmt, {"codes": codes}, 256), name)
        return
    count, block = 1 << fmt.bits, 256
    codes = torch.arange(count, dtype=torch.uint8).repeat(block // count).repeat(7, 1)
    scale = torch.tensor([1.0, 0.3, 2.0**-126, fmt.min_scale, fmt.max_scale, 0.0, math.nan])[:, None]
    parts = {"codes": rows.pack(codes, fmt.bits), "scale": scale, "base": torch.full_like(scale, 0.7)}
    parts["zero"] = torch.arange(7, dtype=torch.uint8)[:, None]
    parts = {part: parts[part] for part in fmt.parts}
    fmt = fmt.with_block(block)
    same(cuda.decode(fmt, parts, block), reference.decode(fmt, parts, block), name)


@pytest.mark.parametrize("name", [name for name in PLAIN if format(name).kind in ("integer", "codebook")])
def test_every_threshold(name):
    """What lies at a threshold and next to it, in blocks whose scale is a power of two."""
    fmt = format(name)
    points = torch.tensor([*fmt.thresholds, *(value for value, _ in fmt.ladder)])
    up, down = (torch.nextafter(points, torch.full_like(points, to)) for to in (math.inf, -math.inf))
    points = torch.cat([points, up, down])
    points = points[points.abs() < fmt.top]
    points = torch.cat([points, -points]) if fmt.signed else points.abs()
    block = 64
    points = torch.nn.functional.pad(points, (0, -len(points) % (block - 1))).view(-1, block - 1)
    x = torch.cat([torch.full((len(points), 1), fmt.top), points], 1)  # the first makes the scale 1
    x = x * x if fmt.square else x
    for scale in (1.0, 2.0**-40):
        check(fmt.with_block(block), x * scale)


GRIDS = {"e4m3": (3, -6), "e5m2": (2, -14), "e2m3": (3, 0), "e3m2": (2, -2), "e2m1": (1, 0), "mxfp8": (3, -6)}


@pytest.mark.parametrize("name", formats())
def test_grids_are_floats_that_round_half_to_even(name):
    """Mantissa and smallest normal exponent are those of the formats' names; e3m0 has no mantissa to be even."""
    fmt = format(name)
    found = grid(fmt)
    assert found == GRIDS.get(name, found) and (found is None or fmt.sign_magnitude)
    if name in ("nf4", "dyn8", "bnb-fp4", "e3m0", "int8", "log4", "int4-quest"):
        assert found is None
    if found and fmt.plain:  # of steps that are no powers of two
        table = tuple(0.75 * value for value in fmt.table)
        assert grid(replace(fmt, name="other", table=table)) is None
    if found and torch.finfo(torch.float8_e4m3fn).bits == fmt.bits:
        dtype = torch.float8_e5m2 if found[0] == 2 else torch.float8_e4m3fn
        assert 2.0 ** found[1] == torch.finfo(dtype).smallest_normal and 2.0 ** -found[0] == torch.finfo(dtype).eps


@pytest.mark.parametrize("name", [name for name in PLAIN if bins(format(name))])
def test_bins_have_one_threshold_and_hold_what_is_beyond(name):
    fmt = format(name)
    cut = bins(fmt)
    assert cut is not None
    edges = alive(fmt)
    points = torch.tensor([*edges, *(value for value, _ in fmt.ladder), fmt.top])
    points = torch.cat(
        [points, *(torch.nextafter(points, torch.full_like(points, to)) for to in (math.inf, -math.inf))]
    )
    for u in points.tolist():
        if u < min(0.0, fmt.ladder[0][0]) * 1.0000002 or (u < 0 and not fmt.signed):
            continue
        threshold, rung = cut.entries[cut.offset(u) // ENTRY]
        assert rung + (threshold < u) == sum(edge < u for edge in edges), u
    assert isinstance(cut, Bins) and len(cut.entries) <= 64


TOPS = {format(name).top: format(name) for name in PLAIN if format(name).kind == "integer" or "e" in name[:1]}


@pytest.mark.parametrize("top", sorted(TOPS))
def test_a_scale_is_a_quotient_rounded_once(top):
    """Kernels divide by a constant without dividing: of all exponents, and of many mantissas of one."""
    fmt = TOPS[top].with_block(8)
    anything = torch.randint(0, 0x7F800000, (4096,), generator=torch.Generator().manual_seed(int(top)))
    absmax = torch.cat([anything, torch.arange(0x3F800000, 0x40000000, 255)]).int().view(torch.float32)
    x = torch.zeros(8, len(absmax)).index_fill(0, torch.tensor(0), 1.0).T * absmax[:, None]
    x = x.double().square().float() if fmt.square else x
    same(cuda.encode(fmt, x)["scale"], reference.encode(fmt, x)["scale"], top)


@pytest.mark.parametrize("size", SIZES)
def test_a_rotation_is_the_same_alone_and_on_the_way(size):
    rotation = Rotation(size, seed=2**40 + 7)
    x = values(format("fp32"), (5, 3 * 128))
    turned = rotate(x, rotation)
    same(cuda.fake(format("fp32"), x, rotation=rotation), turned, size)
    for name, noise in (("int4", None), ("nf4", NOISE), ("int4:8", None), ("int4:48", NOISE), ("bf16", None)):
        fmt = format(name)
        want, got = reference.encode(fmt, turned, noise), cuda.encode(fmt, x, noise, rotation=rotation)
        for part in want:
            same(got[part], want[part], (name, part))
        same(cuda.fake(fmt, x, noise, rotation=rotation), reference.fake(fmt, turned, noise), name)


@pytest.mark.parametrize("size", SIZES)
def test_a_rotation_of_both_operands_cancels(size):
    rotation = Rotation(size, seed=3)
    x, w = values(format("fp32"), (4, 256)), values(format("fp32"), (6, 256), seed=1)
    turned = rotate(x, rotation).double() @ rotate(w, rotation).double().T
    plain = x.double() @ w.double().T
    assert (turned - plain).abs().max() < 1e-5 * (x.double().norm(dim=1)[:, None] * w.double().norm(dim=1)).max()
    # It is Hadamard's matrix: a rotation of unit vectors has entries of one size, orthogonal to each other.
    unit = rotate(torch.eye(size), rotation)
    assert torch.allclose(unit.abs(), torch.full_like(unit, size**-0.5))
    assert torch.allclose(unit @ unit.T, torch.eye(size), atol=1e-6)
    assert not torch.equal(unit, rotate(torch.eye(size), Rotation(size, seed=4)))


def test_a_rotation_says_what_it_cannot_do():
    with pytest.raises(ValueError, match="16, 32, 64, 128 values, not 48"):
        Rotation(48)
    with pytest.raises(ValueError, match="rows of 40 values"):
        rotate(torch.zeros(2, 40), Rotation(16))


# Scales that are stored or found otherwise, or of blocks that are no run of a row.
GIVEN = [name for name in formats() if name not in PLAIN]
TILES = ["int8:row", "int4:tensor", "e2m1:16x16", "nf4:3x5", "int8:32x32", "mxfp4:5"]


@pytest.mark.parametrize("name", [*GIVEN, *TILES])
def test_given_scales(name):
    fmt = format(name)
    x = values(fmt, (37, 301))
    check(fmt, x)
    check(fmt, x[:, :256])  # one long row, where no block has two
    check(fmt, x[:1, :2], noises=[NOISE])
    check(fmt, x[:0], noises=[NOISE])
    x[0, :256], x[20, 7], x[3, 300], x[4, 5] = 0, math.inf, math.nan, 3e38
    x[5] = torch.tensor(SPECIAL).repeat(26)[:301]
    check(fmt, x)


@pytest.mark.parametrize("name", ["nvfp4", "mxfp8-even", "e2m1:16x16"])
def test_codes_and_values_at_once(name):
    fmt, rotation = format(name), Rotation(32, seed=5)
    x = values(fmt, (9, 70)).bfloat16()
    for noise in NOISES:
        got, want = (
            cuda.quantized(fmt, x, noise, rotation=rotation),
            reference.quantized(fmt, x, noise, rotation=rotation),
        )
        same(got[0], want[0], name)
        for part in want[1]:
            same(got[1][part], want[1][part], (name, part))


@pytest.mark.parametrize("by", [1, 2, 3, 5, 7, 8, 641, 4097, 2**30 - 1, 2**30, 2**30 + 1, 2**31 - 1, 2**31, 2**40])
def test_quotients(by):
    """As cuda/places.h computes them, of numbers below 2**31; the others it divides."""
    divisor = cuda_codec.Divisor.of(by)
    assert divisor.by == by
    near = {k * by + d for k in (0, 1, 2, 3, 1000, (2**31 - 1) // by) for d in (-1, 0, 1)}
    for n in {0, 2**31 - 1, *range(100)} | {n for n in near if 0 <= n < 2**31}:
        total = (n * divisor.magic >> 32) + n
        assert total < 2**32 and total >> divisor.shift == n // by, n


@pytest.mark.parametrize("shape", [(130, 256), (70, 300), (1, 2048 * 9 + 8)])
@pytest.mark.parametrize("name", ["nf4", "nvfp4", "int4:48", "fp32", "int8:32x32"])
def test_turns(name, shape, monkeypatch):
    """Of one block of threads and of many; the last is short, and one has what is not finite."""
    fmt = format(name)
    x = values(fmt, shape)
    x[0, 5], x[-1, -1], x[len(x) // 2, 2100 % shape[1]] = math.inf, math.nan, -0.0
    for enough in (1, 4, 10**6):
        monkeypatch.setattr(cuda_codec, "ENOUGH", enough)
        made = cuda_codec.matrix(fmt, shape)
        assert (made.turns > 1) == (enough * 2 <= -(-made.lanes // cuda_codec.THREADS))
        check(fmt, x)


def test_lines():
    """Which matrices are one line of whole lanes: aligned, and no row ends in the midst of a lane or a block."""
    fmt, whole = format("nf4:128"), torch.zeros(4 * 256 + 8)

    def line(shape, x=whole, fmt=fmt, **more):
        made = cuda_codec.matrix(fmt, shape, **more)
        cuda_codec.point(made, values=x)
        return cuda_codec.is_line(made)

    assert line((4, 256)) and line((1, 8)) and line((1, 1032)) and line((2, 512))
    assert not line((4, 256), whole[1:]) and line((4, 256), whole[4:])
    assert not line((4, 252)) and not line((4, 64)) and not line((1, 12)) and line((4, 64), fmt=format("fp32"))
    assert not line((4, 256), alone=True) and not line((4, 256), filled=250) and line((1, 256), alone=True)
    assert not line((4, 256), fmt=format("e2m1:16x16"))
    assert not line((1 << 20, 1 << 14)) and line((1 << 20, (1 << 14) - 256))  # lanes are numbered in 31 bits


def test_what_kernels_do_not_take():
    assert not cuda.takes(format("sqrt8:4x4"))
    assert not cuda.takes(replace(format("log4"), block=(1, 32), scaling=Scaling("e8m0", rounding="up")))
    assert not cuda.takes(format("mxfp4"), live=True)


def test_any_order_of_threads_and_blocks():
    fmt = format("log4")
    x = values(fmt, (7, 700))
    want = reference.encode(fmt, x, NOISE)
    for schedule in (emulator.REVERSE, 2, 3):
        with emulator.installed(schedule):
            got = cuda.encode(fmt, x, NOISE)
            for part in want:
                same(got[part], want[part], (schedule, part))


def test_the_argument_has_the_layout_of_the_kernels(machine):
    module = cuda.module(torch.device("cpu"), cuda.print_spec(format("int8"), torch.float32))
    assert module.function("encode").sizes in (None, [sizeof(cuda.Matrix)])
