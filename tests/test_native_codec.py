"""The native encoder and decoder have the reference's bits: every format, block length, dtype and special number."""

import math
from ctypes import addressof, c_uint32

import pytest
import torch
from cases import one_thread as one_thread
from hypothesis import given
from hypothesis import strategies as st
from native_cases import every_isa, libraries, need, same, using
from torch import Tensor

import lowbit
from lowbit.backends import native, reference
from lowbit.formats import Format
from lowbit.native import abi, tables

FORMATS = [fmt for fmt in map(lowbit.format, lowbit.formats()) if fmt.plain]
BLOCKS = (1, 3, 16, 96, 1000)
EVERY = [f if b is None else f.with_block(b) for f in FORMATS for b in (None, *BLOCKS) if b is None or f.compressed]
FIXED = [f for f in EVERY if f.kind in ("integer", "codebook") and (":" not in f.name or f.block[1] == 16)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NOISE = (None, (123456789, 987654321))
HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}

every_format = pytest.mark.parametrize("fmt", EVERY, ids=str)


def compare(fmt: Format, x: Tensor, threads: tuple[int, ...] = (1,)) -> None:
    """Codes, scales and all, of every instruction set; what they decode to; `fake`, which makes no codes."""
    for noise in NOISE:
        for live in (False, True):
            if live and bool((x < 0).any()):
                continue  # what may not become 0 is not negative
            expected = reference.encode(fmt, x, noise, live=live)
            decoded = reference.decode(fmt, expected, x.shape[1])
            for isa in libraries():
                for count in threads:
                    with using("native", isa, count):
                        check(fmt, x, noise, live, expected, decoded, isa)


def check(fmt, x: Tensor, noise, live: bool, expected: dict[str, Tensor], decoded: Tensor, isa: str) -> None:
    about = f"{isa}, {tuple(x.shape)} {x.dtype}, noise {noise}, live {live}"
    found = native.encode(fmt, x, noise, live=live)
    assert found.keys() == expected.keys()
    for part, wanted in expected.items():
        assert same(found[part].view(wanted.shape), wanted), f"{part} of {about}"
    assert same(native.decode(fmt, expected, x.shape[1]), decoded), f"decode of {about}"
    if not live:
        assert same(native.fake(fmt, x, noise), decoded), f"fake of {about}"


def fitting(fmt: Format, x: Tensor) -> Tensor:
    return x if fmt.signed else x.abs()


def normal(rows: int, cols: int, seed: int = 0) -> Tensor:
    """Rows of all magnitudes, zeros, a row of zeros, both zeros."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, cols, generator=generator) * 10 ** (3 * torch.randn(rows, 1, generator=generator))
    x[:, ::5] = 0
    x[:, 1::7] *= -0.0
    x[1:3] = 0
    return x


def dtypes(fmt: Format, k: int) -> list[torch.dtype]:
    """All for a format as it is in the catalogue; with other blocks now one, now another."""
    return DTYPES if ":" not in fmt.name else [DTYPES[(fmt.block[1] + k) % 3]]


@every_format
def test_ordinary_numbers(fmt: Format):
    for k, shape in enumerate([(3, 300), (7, 33), (16, 256), (5, 1), (1, 700)]):
        x = fitting(fmt, normal(*shape, seed=k))
        for dtype in dtypes(fmt, k):
            compare(fmt, x.to(dtype))


@pytest.mark.parametrize("fmt", [f for f in EVERY if ":" not in f.name or f.block[1] in (3, 16)], ids=str)
def test_a_long_row_is_cut_among_threads(fmt: Format):
    compare(fmt, fitting(fmt, normal(1, 40001)), threads=(1, 7))


@every_isa
def test_every_instruction_set_encodes(isa: str):
    """Those that this processor lacks are skipped here, where it shows."""
    need(isa)
    compare(FORMATS[5], normal(4, 128))
    assert libraries()[isa].asked["encode"] and libraries()[isa].asked["decode"]


@every_format
def test_numbers_of_all_bits(fmt: Format):
    """Random bits: infinities, NaNs, subnormals; alone in a block, among their like, and none of them."""
    generator = torch.Generator().manual_seed(fmt.tag)
    bits = torch.randint(-(2**31), 2**31, (24, 512), generator=generator, dtype=torch.int64).to(torch.int32)
    wild = bits.view(torch.float32)
    few = torch.where(torch.rand(wild.shape, generator=generator) < 0.01, wild, torch.randn(wild.shape))
    for k, x in enumerate((wild, few, wild.nan_to_num(0.0, 0.0, 0.0), wild * 1e-38)):
        for dtype in dtypes(fmt, k):
            compare(fmt, fitting(fmt, x.to(dtype)))


SPECIAL = [0.0, -0.0, 1e-45, 2.0**-149, 2.0**-126, 2.0**-74, 1e-20, 1.0, 6.0, 1e20, 3.4028234663852886e38]
SPECIAL += [3.3e38, 1.7e38, math.inf, -math.inf, math.nan, 65504.0, 65520.0, 2.0**-14, 2.0**-24, 2.0**-25]


@every_format
def test_special_blocks(fmt: Format):
    """Each special number alone, with itself, with 1, with its negative."""
    rows = [[a, b, *[c] * 6] for a in SPECIAL for b in (a, -a, 1.0) for c in (a, 0.0)]
    compare(fmt, fitting(fmt, torch.tensor(rows)))


def boundaries(fmt: Format) -> Tensor:
    """Every threshold and value ± 2 ulp in units of a scale of 1: a row has the top and one of them, and its negative.

    A square format's are squares, whose neighbours' roots fall on either side.
    """
    numbers = torch.tensor([*fmt.thresholds, *(value for value, _ in fmt.ladder)], dtype=torch.float32)
    if fmt.square:
        numbers = (numbers.double() ** 2).float()
    around = [numbers]
    for towards in (-math.inf, math.inf):
        near = numbers
        for _ in range(2):
            near = torch.nextafter(near, torch.tensor(towards))
            around.append(near)
    x = torch.cat(around)
    x = torch.cat([x, -x]) if fmt.signed else x.clamp(min=0)
    top = fmt.top**2 if fmt.square else fmt.top
    return torch.stack([torch.full_like(x, top), x, x / 2, x * 0.75], 1)


@pytest.mark.parametrize("fmt", FIXED, ids=str)
def test_every_boundary(fmt: Format):
    x = boundaries(fmt)
    compare(fmt, x)
    compare(fmt, x * 2.0**-9)
    compare(fmt, wide(x))


def wide(x: Tensor) -> Tensor:
    """Enough to a block for vector code."""
    return torch.cat([x, *[x[:, 1:].roll(k, 0) for k in range(1, 12)]], 1)


@pytest.mark.parametrize("name", ["nf4", "log4", "dyn8", "e4m3"])
def test_a_boundary_an_ulp_off_is_seen(name: str):
    """In the tree that vector code searches, in the cells of formats with more values, in small floats' arithmetic."""
    fmt = lowbit.format(name).with_block(48)
    table = tables.table(fmt)
    if table.cells:
        width = 1 << table.cell_shift
        cells = (c_uint32.from_address(table.cells + 4 * k) for k in range(table.cell_half))
        number = next(cell for cell in cells if 0 < cell.value & 0xFFFFFF < width)
    elif table.grid_bits:
        number = c_uint32.from_address(addressof(table) + abi.Format.grid_least.offset)
    else:
        need("avx2")
        number = c_uint32.from_address(addressof(table) + abi.Format.tree.offset)
    number.value += 1
    try:
        with pytest.raises(AssertionError, match="codes of"):
            compare(fmt, wide(boundaries(fmt)))
    finally:
        number.value -= 1
    compare(fmt, wide(boundaries(fmt)))


@pytest.mark.parametrize("name", HALVES)
def test_all_65536_halves_widen(name: str):
    fmt, dtype = lowbit.format(name), HALVES[name]
    codes = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype).view(256, 256)
    expected = codes.float()
    for isa in libraries():
        with using("native", isa):
            assert same(native.decode(fmt, {"codes": codes}, 256), expected), isa
            assert same(native.encode(lowbit.format("fp32"), codes)["codes"], expected), isa
    compare(lowbit.format("int8:64"), codes)


@pytest.mark.parametrize("name", HALVES)
def test_narrowing_on_every_boundary(name: str):
    """Every half, the middle to the next, and a quarter of the way, ± 1 ulp."""
    fmt, dtype = lowbit.format(name), HALVES[name]
    halves = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype).float()
    halves = halves[torch.isfinite(halves)].sort().values.unique()
    spots = [halves[:-1] + (halves[1:] - halves[:-1]) * share for share in (0.0, 0.25, 0.5, 0.75)]
    beyond = halves[-1] + (halves[-1] - halves[-2]) * torch.tensor([0.0, 0.25, 0.5, 1.0, 2.0])
    spots = torch.cat([*spots, beyond, -beyond])
    around = [spots, *(torch.nextafter(spots, torch.tensor(to)) for to in (-math.inf, math.inf))]
    x = torch.cat(around)
    compare(fmt, torch.nn.functional.pad(x, (0, -len(x) % 300)).view(-1, 300))
    for dtype in (torch.bfloat16, torch.float16):  # and from the other halves
        compare(fmt, halves[: len(halves) // 256 * 256].to(dtype).view(-1, 256))


FLOATS = st.floats(width=32) | st.sampled_from(SPECIAL)


@given(
    fmt=st.sampled_from(FORMATS),
    block=st.integers(1, 40) | st.sampled_from([64, 100, 256, 1000]),
    cols=st.integers(1, 70) | st.integers(1, 1200),
    values=st.lists(FLOATS, min_size=1, max_size=40),
    seed=st.integers(0, 99),
    dtype=st.sampled_from(DTYPES),
    threads=st.sampled_from([1, 3]),
)
def test_anything(fmt: Format, block: int, cols: int, values: list[float], seed: int, dtype, threads: int):
    generator = torch.Generator().manual_seed(seed)
    rows = 1 + seed % 5
    chosen = torch.tensor(values)[torch.randint(len(values), (rows, cols), generator=generator)]
    x = torch.where(torch.rand(rows, cols, generator=generator) < 0.3, chosen, normal(rows, cols, seed)).to(dtype)
    compare(fmt.with_block(block) if fmt.compressed else fmt, fitting(fmt, x), (threads,))


def test_transposed_and_cut_out_matrices():
    x = normal(40, 96)
    for fmt in (lowbit.format(name) for name in ("nf4", "int4-affine", "solo2", "bf16")):
        for view in (x.t(), x[:, 3:50], x[::2], x[:1].expand(9, -1), torch._neg_view(-x.abs())):
            compare(fmt, fitting(fmt, view))
        for empty in (x[:0], x[:, :0]):
            expected = reference.encode(fmt, empty)
            found = native.encode(fmt, empty)
            assert all(same(found[part], expected[part]) for part in expected)
            assert native.decode(fmt, found, empty.shape[1]).shape == empty.shape == native.fake(fmt, empty).shape
