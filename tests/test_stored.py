"""Weights kept as codes: what a stored weight means, and what writing to it may and may not do."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import lowbit
from lowbit import codec, scales, stored
from lowbit.rounding import key, uniform
from lowbit.rows import row_bits

TRAINED = ["int8", "int4", "nf4", "mxfp4", "nvfp4", "split", "split8"]
OTHERS = ["int8:64", "e2m1", "mxfp4-even", "mxfp4-rceil", "mxfp8", "e4m3:64"]


def parts_of(name: str, value: Tensor) -> dict[str, Tensor]:
    store = stored.find_store(name)
    shapes = store.part_shapes(tuple(value.shape))
    parts = {part: torch.zeros(shape, dtype=dtype) for part, (shape, dtype) in shapes.items()}
    stored.assign_(store.format, parts, value)
    return parts


def copied(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    return {part: tensor.clone() for part, tensor in parts.items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[part], b[part]) for part in a)


def weight(rows: int = 8, cols: int = 512, seed: int = 0) -> Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)) * 0.02


# --- Names and bytes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, most",
    [("int8", 8.2), ("int4", 4.5), ("nf4", 4.5), ("mxfp4", 4.25), ("nvfp4", 4.51), ("nf4-dq", 4.14), ("split", 12.5)],
)
def test_a_stored_weight_takes_the_bits_that_its_name_promises(name: str, most: float):
    value = weight(256, 1024)
    bits = 8 * sum(part.nbytes for part in parts_of(name, value).values()) / value.numel()
    assert most - 0.13 < bits <= most


@pytest.mark.parametrize(
    "name, why",
    [
        ("in4", "did you mean 'int4'"),
        ("bf16", "no codes"),
        ("sqrt8", "no sign"),
        ("int4-affine", "none of the formats"),
        ("ternary", "none of the formats"),
        ("int8:96", "divide 256"),
        ("int8:row", "lie in rows and divide 256"),
        ("nvfp4-2d", "lie in rows"),
        ("nvfp4-46", "may clip"),
    ],
)
def test_a_format_in_which_no_weight_can_be_kept_is_refused(name: str, why: str):
    with pytest.raises(ValueError, match=why):
        stored.find_store(name)


def test_a_store_is_found_by_the_number_in_a_checkpoint():
    for name in [*TRAINED, *OTHERS, "nf4-dq"]:
        store = stored.find_store(name)
        assert stored.store_of(store.format.tag, store.rest) == store
    assert stored.store_of(7, False) is None


# --- No update, no change --------------------------------------------------------------------------------------------

EXPONENTS = (-100, -30, -9, 0, 40)


def every_code(name: str) -> tuple[stored.Store, dict[str, Tensor], int]:
    """Parts with every code that encoding can give, in blocks of many scales: [scales, codes] of one block a row."""
    store = stored.find_store(name)
    fmt = store.format
    codes = torch.tensor([code for _, code in fmt.ladder])
    if fmt.sign_magnitude:
        codes = torch.cat([codes, codes | 1 << (fmt.bits - 1)])
    rest = torch.zeros_like(codes)
    if store.rest:
        k = torch.arange(-256 * fmt.limit - 127, 256 * fmt.limit + 128)
        codes = torch.floor((k + 128) / 256).long()
        rest, codes = k - 256 * codes, codes & ((1 << fmt.bits) - 1)
    count = fmt.block[1] * -(-len(codes) // fmt.block[1])
    codes, rest = (torch.cat([x, torch.zeros(count - len(x), dtype=x.dtype)]) for x in (codes, rest))
    mantissa = 1 + torch.rand(3 if name == "split8" else 40, generator=torch.Generator().manual_seed(1))
    each = torch.cat([mantissa * 2.0**e for e in EXPONENTS])
    if fmt.scaling.stored == "bf16":
        each = each.bfloat16()
    elif fmt.scaling.stored == "e8m0":
        each = torch.arange(1, 127 + math.frexp(fmt.max_scale)[1], dtype=torch.uint8)
    elif fmt.scaling.stored == "e4m3":
        each = torch.arange(8, 0x7F, dtype=torch.uint8)
    rows = len(each)
    parts = {
        "codes": stored.rows.pack(codes.to(torch.uint8).expand(rows, -1).contiguous(), fmt.bits),
        "scale": each.unsqueeze(1).expand(rows, count // fmt.block[1]).contiguous(),
    }
    if "tensor_scale" in fmt.parts:
        parts["tensor_scale"] = torch.tensor([0.00137])
    if store.rest:
        parts["rest"] = rest.to(torch.int8).expand(rows, -1).contiguous()
    return store, parts, count


@pytest.mark.parametrize("name", [*TRAINED, *OTHERS])
def test_without_an_update_every_code_under_every_kind_of_scale_stays(name: str):
    """The random bits of 64 elements are set to their extremes, where an ulp in value / scale would show."""
    store, parts, cols = every_code(name)
    before = copied(parts)
    value = stored.load(store.format, parts, cols)
    for u in (2.0**-17, 0.5, 1 - 2.0**-17):
        blocks = stored._blocks(store.format, parts, cols)
        inside = stored._into_blocks(store.format, value)
        new = stored.encode(store.format, blocks, inside, torch.full_like(inside, u))
        for part, tensor in new.items():
            assert torch.equal(tensor, blocks[part]), (u, part)
    for step in range(4):
        stored.store_(store.format, parts, value, key(0, step, 1, 0))
        assert equal(parts, before)


def test_an_ulp_in_the_quotient_would_show_in_8_bits():
    """The plain rule, up when u - floor(u) >= 1 - U for u = value / scale, changes codes that had no update."""
    store, parts, cols = every_code("int8")
    inside = stored._into_blocks(store.format, stored.load(store.format, parts, cols))
    inverse = scales.inverse(store.format, parts)
    moved = [codec.nearby(store.format, inside, inverse, torch.full_like(inside, u)) for u in (2.0**-17, 1 - 2.0**-17)]
    assert any((codes.flatten(1) != parts["codes"]).any() for codes in moved)


@given(st.sampled_from(TRAINED), st.integers(1, 5), st.integers(1, 300), st.integers(0, 2**40), st.integers(-120, 100))
def test_without_an_update_nothing_changes(name: str, rows: int, cols: int, seed: int, exponent: int):
    store = stored.find_store(name)
    value = weight(rows, cols, seed % 2**31) * 2.0**exponent
    parts = parts_of(name, value)
    before = copied(parts)
    for step in range(3):
        stored.store_(store.format, parts, stored.load(store.format, parts, cols), key(seed, step, 0, 0))
        assert equal(parts, before)


def walk(name: str, derived: bool, steps: int = 1000) -> Tensor:
    """How far weights with no update are after a run in which one weight of each block decays, in codes (rms)."""
    store = stored.find_store(name)
    fmt, block = store.format, store.format.block[1]
    value = weight(1, 256)
    value.view(-1, block)[:, 0] = 0.1  # the largest of its block
    parts = parts_of(name, value)
    start = stored.load(fmt, parts, 256)
    unit = scales.multiplier(fmt, parts).repeat_interleave(block, 1)
    for step in range(steps):
        now = stored.load(fmt, parts, 256)
        now.view(-1, block)[:, 0] *= 0.999
        if derived:
            parts["scale"].zero_()
        stored.store_(fmt, parts, now, key(3, step, 0, 0))
    moved = (stored.load(fmt, parts, 256) - start) / unit
    return moved.view(-1, block)[:, 1:].square().mean().sqrt()


@pytest.mark.parametrize("name", ["int8", "int4", pytest.param("nf4", marks=pytest.mark.slow)])
def test_weights_without_an_update_do_not_drift_in_a_thousand_steps(name: str, record_property):
    kept, derived = walk(name, derived=False), walk(name, derived=True)
    record_property("rms drift in codes with kept and with derived scales", (float(kept), float(derived)))
    least = {"int8": 1.0, "int4": 0.2, "nf4": 0.01}[name]
    assert kept == 0 and derived > least, (kept, derived)


# --- An update -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*TRAINED, *OTHERS])
def test_an_update_goes_to_a_neighbour_by_its_fraction(name: str):
    """In float64: a value between decodable a < b becomes b where U >= 1 - (v - a) / (b - a), and else a.

    Of formats with a sign bit the same is said of magnitudes.
    """
    store = stored.find_store(name)
    fmt = store.format
    parts = parts_of(name, weight())
    grid = [value for value, _ in fmt.ladder]
    if store.rest:
        grid = [k / 256 for k in range(-256 * fmt.limit - 127, 256 * fmt.limit + 128)]
    rungs = torch.tensor(grid, dtype=torch.float64)
    held = scales.multiplier(fmt, parts).double().repeat_interleave(fmt.block[1], 1)
    value = stored.load(fmt, parts, 512) + weight(seed=1) * 0.02
    value = value.clamp(-held * grid[-1] * 0.999, held * grid[-1] * 0.999).float()
    unit = value.double() / held
    sign = torch.sign(unit) if fmt.sign_magnitude else 1.0
    unit = unit * sign
    low = (torch.bucketize(unit, rungs, right=True) - 1).clamp(0, len(grid) - 2)
    a, b = rungs[low], rungs[low + 1]
    fraction = (unit - a) / (b - a)
    noise = key(5, 6, 7, 0)
    up = uniform(row_bits(noise, value)).double() >= 1 - fraction
    before = copied(parts)
    stored.store_(fmt, parts, value, noise)
    assert torch.equal(parts["scale"], before["scale"])
    got = stored.load(fmt, parts, 512).double() / held * sign
    near = (uniform(row_bits(noise, value)).double() - (1 - fraction)).abs() < 1e-3 * (256 if store.rest else 1)
    expected = torch.where(up, b, a)
    assert near.double().mean() < (0.55 if store.rest else 0.01)
    assert ((got - expected).abs() < 1e-6 * grid[-1])[~near].all()
    assert (((got - a).abs() < 1e-6 * grid[-1]) | ((got - b).abs() < 1e-6 * grid[-1]))[fraction % 1 > 1e-3].all()


@pytest.mark.parametrize("name", TRAINED)
def test_writing_is_unbiased(name: str):
    """Over 200 draws the mean of what is stored is what was written, within 5 standard errors of the grid's noise."""
    store = stored.find_store(name)
    start = parts_of(name, weight(4, 256))
    held = scales.multiplier(store.format, start).repeat_interleave(store.format.block[1], 1)
    value = stored.load(store.format, start, 256) * 0.97
    total, count = torch.zeros_like(value, dtype=torch.float64), 200
    for draw in range(count):
        parts = copied(start)
        stored.store_(store.format, parts, value, key(draw, 0, 0, 0))
        total += stored.load(store.format, parts, 256).double()
    widest = max(b - a for (a, _), (b, _) in zip(store.format.ladder, store.format.ladder[1:], strict=False))
    step = held * widest / (256 if store.rest else 1)
    error = (total / count - value) / step
    assert error.abs().max() < 5 * 0.5 / count**0.5
    assert error.mean().abs() < 5 * 0.5 / (count * value.numel()) ** 0.5


@pytest.mark.parametrize("name", [*TRAINED, *OTHERS])
def test_a_scale_changes_only_where_a_value_would_clip(name: str):
    store = stored.find_store(name)
    fmt = store.format
    parts = parts_of(name, weight())
    before = copied(parts)
    value = stored.load(fmt, parts, 512)
    value[::2, 0] *= 4  # the first block of every other row
    value[::2, 0] += torch.where(value[::2, 0] >= 0, 0.2, -0.2)
    stored.store_(fmt, parts, value, key(0, 0, 0, 0))
    changed = parts["scale"] != before["scale"]
    assert changed[::2, 0].all() and not changed[1::2].any() and not changed[:, 1:].any()
    after = stored.load(fmt, parts, 512)
    assert torch.equal(after[1::2], value[1::2]) and torch.equal(after[:, 256:], value[:, 256:])
    top = scales.multiplier(fmt, parts)[::2, 0] * fmt.top
    assert (top >= value[::2, 0].abs() * (1 - 2.0**-22)).all()  # nothing is cut off
    assert (top < 2.0 * value[::2, 0].abs()).all()  # and the scale is no larger than it must be


def test_a_weight_with_a_tensor_scale_has_room_to_grow_and_then_clips():
    fmt = stored.find_store("nvfp4").format
    value = weight()
    parts = parts_of("nvfp4", value)
    most = value.abs().max()
    for factor, fits in ((15.9, True), (17.0, False)):
        own = copied(parts)
        stored.store_(fmt, own, value * factor, None)
        largest = stored.load(fmt, own, 512).abs().max()
        assert (largest > 0.999 * most * factor) == fits and largest > 15 * most
        assert torch.equal(own["tensor_scale"], parts["tensor_scale"])


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_value_that_is_not_finite_spoils_its_block_until_it_is_written_again(name: str, bad: float):
    store = stored.find_store(name)
    block = store.format.block[1]
    parts = parts_of(name, weight())
    value = stored.load(store.format, parts, 512)
    spoilt = value.clone()
    spoilt[3, 5] = bad
    stored.store_(store.format, parts, spoilt, key(0, 0, 0, 0))
    after = stored.load(store.format, parts, 512)
    assert after[3, :block].isnan().all() and torch.equal(after[3, block:], value[3, block:])
    assert torch.equal(after[:3], value[:3]) and torch.equal(after[4:], value[4:])
    stored.store_(store.format, parts, value, None)
    step = scales.multiplier(store.format, parts)[3, 0] * store.format.top / 7
    assert (stored.load(store.format, parts, 512)[3, :block] - value[3, :block]).abs().max() <= step


@pytest.mark.parametrize("name", TRAINED)
def test_a_weight_of_zeros_starts_to_move(name: str):
    store = stored.find_store(name)
    parts = parts_of(name, torch.zeros(4, 256))
    assert (stored.load(store.format, parts, 256) == 0).all()
    value = weight(4, 256)
    stored.store_(store.format, parts, value, None)
    error = (stored.load(store.format, parts, 256) - value).norm() / value.norm()
    assert error < {"int8": 0.01, "split": 0.001, "split8": 0.0001}.get(name, 0.13)


# --- Split -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, limit", [("split", 7), ("split8", 127)])
def test_a_split_store_is_one_integer_in_two_parts(name: str, limit: int):
    """k = 256 code + rest for every k, code = floor((k + 128) / 256); the forward pass sees the code alone."""
    store = stored.find_store(name)
    k = torch.arange(-256 * limit - 127, 256 * limit + 128)
    k = torch.cat([k, torch.zeros(-len(k) % 256, dtype=k.dtype)])
    parts = parts_of(name, torch.full((1, len(k)), limit * 0.5))  # a scale of 1/2 in every block
    value = (k * (0.5 / 256)).float().unsqueeze(0)
    stored.store_(store.format, parts, value, key(0, 0, 0, 0))
    assert torch.equal(stored.load(store.format, parts, len(k)), value)
    seen = {part: tensor for part, tensor in parts.items() if part != "rest"}
    code = stored.load(store.format, seen, len(k)).squeeze(0) / 0.5
    assert torch.equal(code, torch.floor((k + 128) / 256))
    assert torch.equal(parts["rest"].squeeze(0).float(), k - 256 * code)


# --- All values at once ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["int8", "nf4", "mxfp4", "mxfp4-even", "nf4-dq", "nvfp4", "int4-bf16"])
def test_a_fresh_weight_is_what_quantize_makes_of_it(name: str):
    """Also nvfp4, whose tensor scale leaves room by a power of two: no block of these is near the least scale."""
    value = weight()
    packed = lowbit.quantize(value, name)
    parts = parts_of(name, value)
    assert torch.equal(stored.load(stored.find_store(name).format, parts, 512), packed.dequantize())
    if name != "nvfp4":
        assert equal(parts, packed.parts)


@pytest.mark.parametrize("name", TRAINED)
def test_rescaling_gives_small_weights_their_codes_back(name: str):
    store = stored.find_store(name)
    value = weight()
    parts = parts_of(name, value)
    small = value / 50
    stored.store_(store.format, parts, small, key(0, 0, 0, 0))
    before = (stored.load(store.format, parts, 512) - small).norm()
    held = scales.multiplier(store.format, parts).clone()
    stored.rescale_(store.format, parts, 512)
    assert (scales.multiplier(store.format, parts) < held).float().mean() > 0.9
    fresh = copied(parts)
    stored.store_(store.format, parts, small, None)
    stored.rescale_(store.format, fresh, 512)
    assert (stored.load(store.format, parts, 512) - small).norm() < 0.5 * before
    assert (stored.load(store.format, fresh, 512) - stored.load(store.format, fresh, 512)).abs().max() == 0


@pytest.mark.parametrize("name", [*TRAINED, "nf4-dq"])
def test_a_large_weight_is_written_in_pieces_without_a_difference(name: str, monkeypatch):
    store = stored.find_store(name)
    whole = parts_of(name, weight(9, 300))
    update = stored.load(store.format, whole, 300) + weight(9, 300, 1) * 0.1
    if not stored.frozen(store.format):
        stored.store_(store.format, whole, update, key(1, 2, 3, 0))
    monkeypatch.setattr(stored, "PIECE", 700)
    pieces = parts_of(name, weight(9, 300))
    if not stored.frozen(store.format):
        stored.store_(store.format, pieces, update, key(1, 2, 3, 0))
    assert equal(pieces, whole)


def test_scales_that_are_quantized_together_cannot_be_trained():
    fmt = stored.find_store("nf4-dq").format
    parts = parts_of("nf4-dq", weight())
    before = copied(parts)
    with pytest.raises(ValueError, match="frozen"):
        stored.store_(fmt, parts, weight(seed=1), None)
    assert equal(parts, before)


@pytest.mark.parametrize("shape", [(0, 64), (3, 0), (1, 1), (5, 257)])
@pytest.mark.parametrize("name", TRAINED)
def test_any_shape_can_be_stored(name: str, shape: tuple[int, int]):
    store = stored.find_store(name)
    value = torch.ones(shape)
    parts = parts_of(name, value)
    stored.store_(store.format, parts, value * 0.5, key(0, 0, 0, 0))
    assert stored.load(store.format, parts, shape[1]).shape == shape
