"""What a layer asks of the native backend has the reference's bits: codes and values at once, down columns, rotated."""

from itertools import product

import pytest
import torch
from cases import one_thread as one_thread
from hypothesis import given
from hypothesis import strategies as st
from native_cases import every_isa, libraries, need, same, using
from torch import Tensor

import lowbit
from lowbit import backends
from lowbit.backends import native, reference
from lowbit.formats import Format
from lowbit.native.tables import stores
from lowbit.rotation import SIZES, Rotation, rotate, rotate_back
from lowbit.scales import Coded, best

FORMATS = [lowbit.format(name) for name in lowbit.formats()]
# Blocks that share bytes, that vector code takes, that are longer than a span, of one value, of rows, tiles, a tensor.
OTHERS = [
    *("int4:16", "nf4:24", "e4m3:1000", "e5m2:16", "int8:3", "e2m1:1", "e1m2:1500", "sqrt8:16", "solo2:6"),
    *("int4-affine:24", "int8:row", "int8:tensor", "int4:5x7", "e2m1:16x16", "nf4:3x300", "mxfp4:5", "mxfp4:row"),
    *("mxfp6-e2m3:5", "mxfp8:2x2", "mxfp8:64", "nvfp4:48", "nvfp4-46:17", "nvfp4-46:8", "nvfp4-128:32"),
    *("int4-quest:32", "int4-quest:100", "int4-quest:512", "mxfp4-quest:16", "mxfp4-quest:24"),
]
EVERY = [*FORMATS, *map(lowbit.format, OTHERS)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NOISE = (None, (123456789, 987654321))
ROTATIONS = (None, *(Rotation(size, seed) for size in SIZES for seed in (2**40 + size, None)))
# Whole strips and none, ragged ends of tiles, pieces and blocks; those that can be rotated, and others.
SHAPES = [(64, 128), (3, 384), (70, 640), (1, 2048), (17, 33), (130, 7), (5, 1), (1, 1), (66, 1111)]
LONG = [(1, 40000), (70, 16512)]  # cut among threads


def matrix(shape: tuple[int, int], dtype: torch.dtype, layout: str, seed: int) -> Tensor:
    """Numbers of all magnitudes and zeros: rows in memory, columns in memory, or parts of either."""
    generator = torch.Generator().manual_seed(seed)
    rows, cols = shape if layout in ("rows", "cut rows") else shape[::-1]
    cut = 3 * layout.startswith("cut")
    x = torch.randn(rows, cols + cut, generator=generator) * 10 ** torch.randn(rows, 1, generator=generator)
    x[:, ::5] = 0
    x = x.to(dtype)[:, cut:]
    return x if layout in ("rows", "cut rows") else x.t()


LAYOUTS = ("rows", "columns", "cut rows", "cut columns")


def pad(x: Tensor, cols: int) -> Tensor:
    return torch.cat([x, x.new_zeros(len(x), cols - x.shape[1])], 1)


def check(fmt: Format, x: Tensor, noise, rotation: Rotation | None, dtype: torch.dtype, threads: int, isas=None):
    turned = x if rotation is None else rotate(pad(x, rotation.padded(x.shape[1])), rotation)
    parts = reference.encode(fmt, turned, noise)
    values = reference.decode(fmt, parts, turned.shape[1]).to(dtype)
    for isa in isas or libraries():
        about = f"{fmt} on {isa}: {tuple(x.shape)} {x.stride()} {x.dtype} to {dtype}, noise {noise}, {rotation}"
        with using("native", isa, threads):
            made, codes = native.quantized(fmt, x, noise, rotation=rotation, dtype=dtype)
            faked = native.fake(fmt, x, noise, rotation=rotation, dtype=dtype)
            alone = native.encode(fmt, x, noise, rotation=rotation)
            decoded = native.decode(fmt, parts, turned.shape[1], dtype)
        assert codes.keys() == alone.keys() == parts.keys()
        for part, wanted in parts.items():
            assert same(codes[part], wanted) and same(alone[part], wanted), f"{part} of {about}"
        for found in (made, faked, decoded):
            assert same(found, values), about


@pytest.mark.parametrize("fmt", EVERY, ids=str)
def test_codes_and_values_at_once(fmt: Format):
    """Every format; dtypes, layouts, rounding and rotations go round so that each meets each."""
    settings = list(product(LAYOUTS, DTYPES, DTYPES, NOISE, ROTATIONS))
    start = fmt.tag % len(settings)
    for k, shape in enumerate(SHAPES * 2):
        layout, dtype, out, noise, rotation = settings[(start + 91 * k) % len(settings)]  # 91 and 324 are coprime
        x = matrix(shape, dtype, layout, k)
        check(fmt, x if fmt.signed else x.abs(), noise, rotation if fmt.signed else None, out, 1 + k % 2)


@pytest.mark.parametrize("setting", list(product(LAYOUTS, DTYPES, NOISE)), ids=lambda s: f"{s[0]}-{s[1]}-{bool(s[2])}")
def test_every_layout(setting):
    """With every rotation, every dtype of the result; an instruction set in turn."""
    layout, dtype, noise = setting
    names, isas = ("int4:16", "e2m1:32", "nf4", "int8", "bf16"), list(libraries())
    for k, (rotation, out) in enumerate(product(ROTATIONS, DTYPES)):
        shape = [(66, 640), (1, 128), (64, 1024)][k % 3]
        fmt = lowbit.format(names[k % len(names)])
        check(fmt, matrix(shape, dtype, layout, k), noise, rotation, out, 1 + k % 2, [isas[k % len(isas)]])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", LONG, ids=str)
def test_long_rows_are_cut_among_threads(shape: tuple[int, int], layout: str):
    for k, name in enumerate(("int4:16", "int8:3", "e4m3:96", "nf4:20000", "fp16")):
        x = matrix(shape, DTYPES[k % 3], layout, k)
        last = list(libraries())[-1:]
        check(lowbit.format(name), x, NOISE[k % 2], Rotation(SIZES[k % 4], k), DTYPES[k // 2], 1 + 6 * (k % 2), last)


@every_isa
@pytest.mark.parametrize("size", SIZES)
def test_rotations(isa: str, size: int):
    """There and back, with signs and without, of all bits: infinities, NaNs and subnormals too."""
    need(isa)
    generator = torch.Generator().manual_seed(size)
    wild = torch.randint(-(2**31), 2**31, (9, 1280), generator=generator).to(torch.int32).view(torch.float32)
    few = torch.where(torch.rand(wild.shape, generator=generator) < 0.01, wild, torch.randn(wild.shape))
    for seed, x, dtype in product((0, 2**50 + 1, None), (few, wild * 1e-30, torch.randn(70, 128)), DTYPES):
        rotation = Rotation(size, seed)
        for view in (x, x.t()[:size].contiguous().t(), x.t()[:size].t()):
            with using("native", isa):
                assert same(native.rotate(view, rotation, dtype=dtype), rotate(view, rotation).to(dtype))
                assert same(
                    native.rotate(view, rotation, back=True, dtype=dtype), rotate_back(view, rotation).to(dtype)
                )


@pytest.mark.parametrize("size", SIZES)
def test_a_rotation_is_hadamards_and_undone(size: int):
    """Against Sylvester's matrix in float64; both operands of a contraction cancel."""
    x, w = torch.randn(40, 4 * size), torch.randn(30, 4 * size)
    rotation = Rotation(size, 7)
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    while len(hadamard) < size:
        hadamard = torch.kron(torch.tensor([[1.0, 1], [1, -1]], dtype=torch.float64), hadamard)
    signs = 1 - 2 * rotation.signs(4 * size).double()
    wanted = ((x.double() * signs).unflatten(1, (-1, size)) @ hadamard / size**0.5).flatten(1)
    turned = backends.rotate(x, rotation)
    assert (turned - wanted).abs().max() < 1e-5
    assert (backends.rotate(turned, rotation, back=True) - x).abs().max() < 1e-5
    product = turned.double() @ backends.rotate(w, rotation).double().t()
    assert (product - x.double() @ w.double().t()).abs().max() < 1e-4


def test_values_are_rows_and_new():
    """Whatever the operand's layout: as a matmul takes them, along the contraction."""
    x = torch.randn(48, 128)
    for name, rotation in product(("int4:16", "mxfp4", "bf16"), (None, Rotation(16))):
        for view in (x, x.t(), x[:, 3:50]):
            values, _ = native.quantized(lowbit.format(name), view, rotation=rotation)
            assert values.is_contiguous() and values.data_ptr() != x.data_ptr()


def test_nothing_around_a_matrix_is_written():
    for name, layout, dtype in product(("int4:16", "e4m3:24", "fp16", "int4-affine"), LAYOUTS, DTYPES):
        x = matrix((37, 48), dtype, layout, 1)
        before = x.clone()
        native.quantized(lowbit.format(name), x, (1, 2), rotation=Rotation(16))
        assert same(x, before), "the input has changed"


@pytest.mark.parametrize("fmt", [f for f in EVERY if stores(f)], ids=str)
def test_scale_bytes_of_every_magnitude(fmt: Format):
    """Every exponent, mantissas around those where a byte changes, infinity and NaN; in tensors of several ranges."""
    exponents = torch.arange(256, dtype=torch.int32).unsqueeze(1) << 23
    near = [(k << 20) + d for k in range(8) for d in (-1, 0, 1)] + [
        (k << 19) + d for k in (1, 7, 15) for d in (-1, 0, 1)
    ]
    mantissas = torch.tensor([m & 0x7FFFFF for m in near], dtype=torch.int32)
    largest = (exponents | mantissas).view(torch.float32)
    block = fmt.block[1]
    for first, last in ((0, 256), (0, 255), (0, 60), (110, 140), (126, 128), (240, 255)):
        x = largest[first:last].unsqueeze(-1) * torch.linspace(1, -0.7, block)
        check(fmt, x.flatten(1), None, None, torch.float32, 1)


INSIDE = [f for f in EVERY if f.signed and f.compressed and f.kind in ("integer", "codebook") and not f.square]


@pytest.mark.parametrize("fmt", INSIDE, ids=str)
def test_which_values_are_inside_an_edge(fmt: Format):
    """Beside the same values and codes; then gradients that pass such a mask, rotated back."""
    for k, (shape, layout) in enumerate(product([(33, 256), (70, 100), (3, 1500)], LAYOUTS)):
        x, rotation = matrix(shape, DTYPES[k % 3], layout, k), ROTATIONS[(fmt.tag + k) % len(ROTATIONS)]
        x[0, 0], x[-1, -1] = float("nan") if k % 5 == 0 else x[0, 0], float("inf") if k % 7 == 0 else x[-1, -1]
        edge = fmt.top * (0.3, 1.0, 1.1)[k % 3]
        values, parts = reference.quantized(fmt, x, rotation=rotation, edge=edge)
        g = torch.randn(values.shape, generator=torch.Generator().manual_seed(k)).to(DTYPES[k // 3 % 3])
        back = None if rotation is None else reference.rotate(g, rotation, back=True, mask=parts["inside"])
        for isa in libraries():
            with using("native", isa, 1 + k % 2):
                found, codes = native.quantized(fmt, x, rotation=rotation, edge=edge)
                assert same(found, values) and codes.keys() == parts.keys()
                for part, wanted in parts.items():
                    assert same(codes[part], wanted), f"{part} of {fmt} on {isa}: {shape} {x.stride()} {rotation}"
                for own in (False, True):
                    if rotation is not None:
                        found = native.rotate(g.clone(), rotation, back=True, mask=parts["inside"], own=own)
                        assert same(found, back), f"{fmt} on {isa}: {shape} {g.dtype} {rotation}"


def test_a_matrix_of_ones_own_may_be_overwritten_and_no_other():
    x, rotation = torch.randn(40, 256), Rotation(64)
    for own, dtype in product((False, True), DTYPES):
        given = x.to(dtype, copy=True)
        found = native.rotate(given, rotation, back=True, own=own)
        assert (found.data_ptr() == given.data_ptr()) == (own and dtype == torch.float32)
        assert same(found, rotate_back(x.to(dtype), rotation)) and (own or same(given, x.to(dtype)))


@pytest.mark.parametrize("name", ["nvfp4-eden", "nvfp4-46", "nvfp4-te", "nvfp4"])
@pytest.mark.parametrize("size", [16, 128])
def test_corrections_of_ms_eden(name: str, size: int):
    """Codes and drawn scales of rotated runs, of every layout; blocks of zeros, flushed ones, and not finite."""
    fmt = lowbit.format(name)
    for k, (layout, shape) in enumerate(product(LAYOUTS, [(33, 256), (70, 100), (2, 3000)])):
        x, rotation = matrix(shape, DTYPES[k % 3], layout, k), Rotation(size, k)
        x[: shape[0] // 3] *= 0 if k % 2 else 1e-6
        x[-1, -1] = (1.0, float("nan"), float("inf"))[k % 3]
        values, parts = reference.quantized(fmt, x, (k, 99), rotation=rotation, run=size)
        for isa in libraries():
            with using("native", isa, 1 + k % 2):
                found, codes = native.quantized(fmt, x, (k, 99), rotation=rotation, run=size)
                alone = native.encode(fmt, x, (k, 99), rotation=rotation, run=size)
            about = f"{name} on {isa}: {shape} {x.stride()} {x.dtype}"
            assert same(found, values) and codes.keys() == parts.keys() == alone.keys(), about
            for part, wanted in parts.items():
                assert same(codes[part], wanted) and same(alone[part], wanted), f"{part} of {about}"


@pytest.mark.parametrize("name", ["nvfp4-eden", "nvfp4"])
def test_every_drawn_scale_of_ms_eden(name: str):
    """Blocks of all magnitudes next to one that decides the tensor's scale: every stored byte, its neighbours drawn."""
    fmt, generator = lowbit.format(name), torch.Generator().manual_seed(1)
    x = torch.randn(64, 2048, generator=generator) * torch.exp2(torch.linspace(-24, 3, 128)).repeat_interleave(16)
    values, parts = reference.quantized(fmt, x, (1, 2), run=64)
    assert len(parts["scale"].unique()) > (100 if fmt.scaling.least == 0 else 40)
    for isa in libraries():
        with using("native", isa):
            found, codes = native.quantized(fmt, x, (1, 2), run=64)
        assert same(found, values) and all(same(codes[part], wanted) for part, wanted in parts.items())


MEASURED = ("nvfp4", "mxfp4-quest", "int4:16", "e2m1:16x16", "int8:row", "int4-quest", "ternary", "nf4:300", "e4m3:3")


@pytest.mark.parametrize("name", MEASURED)
def test_what_is_measured_of_blocks(name: str):
    """Sums, units and codes for those who make scales themselves, of every layout."""
    fmt = lowbit.format(name)
    for k, (layout, shape) in enumerate(product(LAYOUTS, [(33, 256), (70, 100), (3, 1500)])):
        x, rotation = matrix(shape, DTYPES[k % 3], layout, k), Rotation(16, k) if k % 2 else None
        wanted = answers(fmt, reference.measured(fmt, x, rotation=rotation))
        for isa in libraries():
            with using("native", isa):
                found = answers(fmt, native.measured(fmt, x, rotation=rotation))
            assert found.keys() == wanted.keys()
            for what, value in wanted.items():
                assert torch.equal(found[what], value), f"{what} of {name} on {isa}: {tuple(x.shape)} {x.stride()}"


def answers(fmt: Format, blocks: Coded) -> dict[str, Tensor]:
    found = best(fmt, blocks)
    return {
        "absmax": blocks.absmax(),
        "inverse": found.inverse,
        "multiplier": found.multiplier,
        "squares": blocks.total("squares", found.inverse),
        "magnitudes": blocks.total("magnitudes", found.inverse),
        "losses": blocks.losses(found),
        "products": blocks.products(found.inverse),
        "units": blocks.units(found.inverse),
        "codes": blocks.codes(found),
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_any_dtype_by_the_public_functions(dtype: torch.dtype):
    fmt, x = lowbit.format("e2m1:16"), torch.randn(20, 64, dtype=dtype)
    values, parts = backends.quantized(fmt, x, dtype=dtype)
    wanted = reference.fake(fmt, x.float()).to(dtype)
    for found in (values, backends.decode(fmt, parts, 64, dtype), backends.fake(fmt, x, dtype=dtype)):
        assert found.dtype == dtype and torch.equal(found, wanted)
    assert torch.equal(lowbit.quantize(x.float(), fmt).dequantize(dtype), wanted)


@pytest.mark.parametrize("shape", [(0, 32), (32, 0), (0, 0)], ids=str)
def test_empty_matrices(shape: tuple[int, int]):
    for name, layout in product(("int4:16", "bf16", "fp32"), ("rows", "columns")):
        x = torch.zeros(shape) if layout == "rows" else torch.zeros(shape[::-1]).t()
        values, parts = native.quantized(lowbit.format(name), x, rotation=Rotation(32))
        wanted = reference.encode(lowbit.format(name), x)
        assert values.shape == shape and all(same(parts[part], wanted[part]) for part in wanted)


@given(
    fmt=st.sampled_from(EVERY),
    shape=st.tuples(st.integers(1, 140), st.integers(1, 600)),
    size=st.sampled_from((0, *SIZES)),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from(DTYPES),
    out=st.sampled_from(DTYPES),
    noise=st.sampled_from(NOISE),
    seed=st.integers(0, 99),
)
def test_anything(fmt: Format, shape, size: int, layout: str, dtype, out, noise, seed: int):
    x = matrix(shape, dtype, layout, seed)
    check(fmt, x if fmt.signed else x.abs(), noise, Rotation(size, seed) if size and fmt.signed else None, out, 1)
