"""Where codes lie in memory, and the function users call."""

import copy
import io
import math
import pickle
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import bit_stream, bits16_at
from torch import Tensor

from lowbit.formats import PLAIN, Format, format, formats
from lowbit.layout import row_bytes, row_stride, rows_of, step_width
from lowbit.packed import Packed, quantize
from lowbit.rounding import key, narrow
from lowbit.rows import decode_rows, encode_rows, pack, part_shapes, unpack, zeros

ALL = [format(name) for name in formats() if format(name).scaling == PLAIN]  # others: tests/test_scales.py
COMPRESSED = [f for f in ALL if f.compressed]
every = pytest.mark.parametrize("fmt", ALL, ids=str)
every_compressed = pytest.mark.parametrize("fmt", COMPRESSED, ids=str)
both_roundings = pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])

SHAPES = [
    (),
    (1,),
    (7,),
    (300,),
    (1, 1),
    (3, 5),
    (4, 256),
    (3, 257),
    (2, 5461),
    (5, 1),
    (4, 3, 5),
    (8, 3, 3, 3),
    (2, 1, 1, 1),
]
EMPTY = [(0,), (0, 5), (5, 0), (2, 0, 3), (0, 0)]


def values(fmt: Format, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return x if fmt.signed else x.abs()


def equal(a: Packed, b: Packed) -> bool:
    return (
        a.shape == b.shape
        and a.parts.keys() == b.parts.keys()
        and all(torch.equal(a.parts[k], b.parts[k]) for k in a.parts)
    )


# --- codes to bytes ------------------------------------------------------------------------------------------------


@given(st.sampled_from([2, 4, 8]), st.integers(0, 5), st.integers(0, 70), st.integers(0, 2**32))
def test_packing_is_a_little_endian_bit_stream_and_unpacking_its_inverse(bits: int, rows: int, cols: int, seed: int):
    codes = torch.randint(0, 1 << bits, (rows, cols), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    before = codes.clone()
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (rows, row_bytes(cols, bits))
    assert packed.tolist() == [
        bit_stream(row, bits, row_bytes(cols, bits)) for row in codes.tolist()
    ]  # unused bits are 0
    back = unpack(packed, bits, cols)
    assert back.dtype == torch.uint8 and torch.equal(back, codes) and torch.equal(codes, before)


def test_element_0_is_in_the_low_bits():
    assert pack(torch.tensor([[1, 2, 3]], dtype=torch.uint8), 4).tolist() == [[0x21, 0x03]]
    assert pack(torch.tensor([[1, 2, 3, 0, 1]], dtype=torch.uint8), 2).tolist() == [[0b00111001, 0b01]]


@every_compressed
@pytest.mark.parametrize("cols", [1, 3, 5, 127, 129, 255, 257])
def test_unused_bits_are_zero(fmt: Format, cols: int):
    # Also in formats where the padding's own code is not 0: nf4's is 7, int4-affine's the zero point.
    codes = quantize(-values(fmt, (4, cols)) if fmt.signed else values(fmt, (4, cols)), fmt).codes
    used = cols * fmt.bits % 8
    assert codes.shape == (4, math.ceil(cols * fmt.bits / 8))
    assert used == 0 or not (codes[:, -1] >> used).any()


@given(st.integers(0, 10_000))
def test_strides_are_whole_step_blocks(cols: int):
    width, stride = step_width(cols), row_stride(cols)
    assert (
        width in (1, 2, 4, 8, 16, 32, 64, 128, 256) and (width >= min(cols, 256)) and (width == 1 or width < 2 * cols)
    )
    assert stride % width == 0 and cols <= stride < cols + width


def test_rows():
    assert [rows_of(s) for s in ((), (5,), (2, 3), (8, 3, 3, 3), (0, 5), (5, 0))] == [
        (1, 1),
        (5, 1),
        (2, 3),
        (8, 27),
        (0, 5),
        (5, 0),
    ]


@every
@pytest.mark.parametrize("shape", [(4, 300), (3, 5), (8, 3, 3, 3), (5,), (0, 5)], ids=str)
def test_part_shapes_are_what_encoding_gives(fmt: Format, shape: tuple[int, ...]):
    rows, cols = rows_of(shape)
    parts = encode_rows(fmt, values(fmt, (rows, cols)))
    declared = part_shapes(fmt, shape)
    assert list(declared) == list(fmt.parts if fmt.compressed else ("codes",))
    if not fmt.compressed:
        parts = {"codes": parts["codes"].reshape(shape)}
    assert {k: (tuple(v.shape), v.dtype) for k, v in parts.items()} == declared
    nothing = zeros(fmt, shape, torch.device("cpu"))
    assert {k: (tuple(v.shape), v.dtype) for k, v in nothing.items()} == declared
    assert not decode_rows(fmt, nothing, cols).any()


# --- rows own their blocks -----------------------------------------------------------------------------------------


@every_compressed
def test_a_row_is_encoded_as_if_it_were_alone(fmt: Format):
    x = values(fmt, (5, 333)) * torch.tensor([[1.0], [1e-6], [1e6], [0.0], [3.0]])
    together = quantize(x, fmt)
    for i in range(5):
        alone = quantize(x[i : i + 1], fmt)
        assert all(torch.equal(alone.parts[part][0], together.parts[part][i]) for part in together.parts)


@every_compressed
@pytest.mark.parametrize("cols", [1, 31, 130, 257])
def test_a_block_is_encoded_as_if_it_were_alone_and_the_last_may_be_short(fmt: Format, cols: int):
    x = values(fmt, (3, cols))
    whole = quantize(x, fmt).dequantize()
    block = fmt.block[1]
    assert quantize(x, fmt).scale.shape == (3, math.ceil(cols / block))
    for start in range(0, cols, block):
        assert torch.equal(
            quantize(x[:, start : start + block].contiguous(), fmt).dequantize(), whole[:, start : start + block]
        )


@every_compressed
@pytest.mark.parametrize("block", [1, 3, 16, 256])
def test_any_block_length(fmt: Format, block: int):
    x = values(fmt, (3, 50))
    packed = quantize(x, f"{fmt.name}:{block}")
    assert packed.scale.shape == (3, math.ceil(50 / block)) and packed.format.block == (1, block)
    got = packed.dequantize()
    assert got.shape == x.shape and got.isfinite().all()
    if block == 1 and fmt.name not in ("dyn4", "dyn8"):  # each value is its own largest
        torch.testing.assert_close(got, x, rtol=3e-7, atol=0)


def test_noise_belongs_to_the_element_and_rows_start_at_whole_step_blocks():
    x = torch.full((3, 300), 1 + 2.0**-9 + 2.0**-12)  # between two bf16 numbers
    got = quantize(x, "bf16", stochastic=True, seed=7).codes
    keys = key(7, 0, 0, 0)
    bits = [[bits16_at(keys, row * 512 + col) for col in range(300)] for row in range(3)]
    assert torch.equal(got, narrow(x, torch.bfloat16, torch.tensor(bits, dtype=torch.int32)))
    assert len(got.unique()) == 2


@every_compressed
def test_stochastic_codes_are_a_function_of_the_seed(fmt: Format):
    x = values(fmt, (16, 256))
    a, b, c = (quantize(x, fmt, stochastic=True, seed=s) for s in (1, 1, 2))
    assert equal(a, b) and not torch.equal(a.codes, c.codes) and torch.equal(a.scale, c.scale)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    quantize(x, fmt, stochastic=True)
    assert torch.equal(state, torch.get_rng_state()), "torch's own stream is left alone"
    assert not torch.equal(a.codes[0], quantize(x[:1].expand(2, -1), fmt, stochastic=True, seed=1).codes[1]), (
        "rows differ"
    )


# --- quantize and dequantize ---------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("shape", SHAPES + EMPTY, ids=str)
def test_every_shape_comes_back(fmt: Format, shape: tuple[int, ...]):
    x = values(fmt, shape)
    for stochastic in (False, True):
        packed = quantize(x, fmt, stochastic=stochastic)
        got = packed.dequantize()
        assert packed.shape == tuple(got.shape) == shape and got.dtype == torch.float32
        assert got.isfinite().all()
        assert packed.nbytes == sum(t.numel() * t.element_size() for t in packed.parts.values())
        assert packed.codes is packed.parts["codes"]
        if fmt.compressed:
            assert packed.codes.dtype == torch.uint8 and packed.codes.dim() == 2 and packed.scale.dtype == torch.float32
        else:
            assert packed.codes.dtype == fmt.dtype and packed.codes.shape == x.shape and packed.scale is None


@every_compressed
def test_dimensions_after_the_first_are_one_row(fmt: Format):
    x = values(fmt, (8, 3, 5, 7))
    assert torch.equal(quantize(x, fmt).codes, quantize(x.reshape(8, 105), fmt).codes)
    v = values(fmt, (300,))
    assert torch.equal(quantize(v, fmt).codes, quantize(v.reshape(1, 300), fmt).codes)


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_first_made_fp32(fmt: Format, dtype: torch.dtype):
    x = values(fmt, (5, 130), dtype)
    before = x.clone()
    assert equal(quantize(x, fmt), quantize(x.float(), fmt))
    assert torch.equal(x, before)
    got = quantize(x, fmt)
    assert torch.equal(got.dequantize(dtype), got.dequantize().to(dtype)) and got.dequantize(dtype).dtype == dtype


@every
@both_roundings
def test_memory_layout_of_the_input_does_not_matter(fmt: Format, stochastic: bool):
    base = values(fmt, (64, 6, 40))
    views = [
        base.permute(2, 0, 1),
        base[:, ::2, ::3],
        base.flatten(1).t(),
        base.flatten(1)[:, 1:],
        base[:, :, 0],
        base[:, 0, 0],
    ]
    views += [base[:1, 0].expand(5, -1), base.to(memory_format=torch.contiguous_format)[3:7], base.flatten(1)[:, 5]]
    torch.set_warn_always(True)  # otherwise torch warns about a slow layout only the first time
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for view in views:
                got = quantize(view, fmt, stochastic=stochastic)
                assert equal(got, quantize(view.contiguous().clone(), fmt, stochastic=stochastic))
    finally:
        torch.set_warn_always(False)


@every
@pytest.mark.parametrize("cols", [64, 257])
def test_parts_own_exactly_the_memory_they_need(fmt: Format, cols: int):
    # A view of a padded or transposed buffer would keep (and torch.save would write) more bytes than nbytes admits, and
    # a kernel that is given its pointer would read the wrong values.
    for x in (values(fmt, (100, cols)), values(fmt, (cols, 100)).t(), values(fmt, (100, 2 * cols))[:, ::2]):
        packed = quantize(x, fmt)
        for name, part in packed.parts.items():
            assert part.is_contiguous(), f"{name} {tuple(part.shape)} has strides {part.stride()}"
            assert part.untyped_storage().nbytes() == part.nbytes, name
        got = packed.dequantize()
        assert got.is_contiguous() and got.untyped_storage().nbytes() == got.nbytes


@every
def test_what_is_stored_is_a_copy(fmt: Format):
    x = values(fmt, (3, 64))
    packed = quantize(x, fmt)
    first = packed.dequantize()
    expected = first.clone()
    x.zero_()
    assert torch.equal(packed.dequantize(), expected), "writing to the input changed what was stored"
    first.zero_()
    assert torch.equal(packed.dequantize(), expected), "writing to the output changed what was stored"


@every
def test_gradients_stop_here(fmt: Format):
    x = values(fmt, (3, 64)).requires_grad_()
    packed = quantize(x, fmt, stochastic=True)
    assert not any(part.requires_grad for part in packed.parts.values())
    with torch.inference_mode():  # tables cached here must serve outside too
        inside = quantize(x, f"{fmt}:8" if fmt.compressed else fmt)
    assert equal(quantize(x, f"{fmt}:8" if fmt.compressed else fmt), inside)


@every_compressed
def test_quantizing_twice_changes_nothing(fmt: Format):
    x = values(fmt, (16, 300))
    if fmt.name in ("dyn4", "dyn8"):  # they have no -1: test_codec.py tells
        x[:, :: fmt.block[1]] = 9
    once = quantize(x, fmt).dequantize()
    twice = quantize(once, fmt).dequantize()
    torch.testing.assert_close(twice, once, rtol=1e-6 if fmt.kind in ("affine", "log") else 0, atol=0)


@every
def test_parts_survive_a_checkpoint(fmt: Format):
    packed = quantize(values(fmt, (3, 100)), fmt)
    file = io.BytesIO()
    torch.save(packed.parts, file)
    file.seek(0)
    again = Packed(fmt, packed.shape, torch.load(file, weights_only=True))
    assert torch.equal(again.dequantize(), packed.dequantize())
    for twin in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert torch.equal(twin.dequantize(), packed.dequantize())


def test_comparing_two_packed_tensors_is_not_an_error():
    a, b = (quantize(torch.ones(3, 4), "int8") for _ in range(2))
    assert isinstance(a == b, bool)
    assert a in [b, a] and "int8" in repr(a)


@pytest.mark.parametrize(
    "x",
    [
        torch.arange(4),
        torch.tensor([True]),
        torch.zeros(2, dtype=torch.complex64),
        torch.zeros(2, dtype=torch.uint8),
        torch.zeros(2).double(),
    ],
    ids=lambda x: str(x.dtype),
)
@pytest.mark.parametrize("name", ["fp32", "int8", "sqrt8", "nf4"])
def test_what_is_not_float32_or_a_half_is_refused(x: Tensor, name: str):
    with pytest.raises(TypeError, match=str(x.dtype)):
        quantize(x, name)


@pytest.mark.parametrize("fmt", [f for f in COMPRESSED if not f.signed], ids=str)
def test_negative_values_in_an_unsigned_format_are_refused(fmt: Format):
    with pytest.raises(ValueError, match=f"{fmt.name}.*unsigned.*{fmt.partner}"):
        quantize(torch.tensor([1.0, -1e-45]), fmt)
    with pytest.raises(ValueError, match="unsigned"):
        quantize(torch.tensor([1.0, -float("inf"), float("nan")]), fmt)
    minus_zero = quantize(torch.tensor([1.0, -0.0]), fmt).dequantize()
    assert minus_zero[0] == 1 and (fmt.zero_code is None or minus_zero[1] == 0)


def test_an_unknown_format_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'int8'"):
        quantize(torch.ones(2), "int-8")


@every
def test_a_format_may_be_given_as_a_value(fmt: Format):
    x = values(fmt, (2, 9))
    assert equal(quantize(x, fmt), quantize(x, fmt.name)) and quantize(x, fmt).format is fmt
