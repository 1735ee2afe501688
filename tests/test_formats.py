"""The catalogue. Every test runs over all of it: a new format is covered by being listed."""

import copy
import math
import pickle
from dataclasses import replace

import pytest
import torch

from lowbit.formats import Format, catalogue, format, formats, nearest

ALL = [format(name) for name in formats()]
COMPRESSED = [f for f in ALL if f.compressed]
FIXED = [f for f in ALL if f.kind in ("integer", "codebook")]

every = pytest.mark.parametrize("fmt", ALL, ids=str)
every_compressed = pytest.mark.parametrize("fmt", COMPRESSED, ids=str)
every_fixed = pytest.mark.parametrize("fmt", FIXED, ids=str)


def test_what_the_issue_asks_for_is_there():
    states = "fp32 bf16 fp16 int8 sqrt8 int4 sqrt4 dyn8 udyn8 dyn4 ulin4 solo4 solo2"
    weights = "int8 int4 int4-affine e2m1 e1m2 e3m0 nf4 bnb-fp4 e4m3 e5m2"
    assert set(f"{states} {weights}".split()) <= set(formats())


@every
def test_a_format_describes_itself(fmt: Format):
    assert format(fmt.name) is format(fmt) is fmt and str(fmt) == fmt.name and fmt.about
    assert fmt.bits in ((2, 4, 8) if fmt.compressed else (16, 32))
    assert fmt.block[0] == 1 and 256 % fmt.block[1] == 0
    assert fmt.parts[0] == "codes" and (not fmt.compressed or fmt.parts[1] == "scale")
    assert (fmt.dtype is None) == fmt.compressed


@every_compressed
def test_an_unsigned_format_names_its_signed_partner(fmt: Format):
    if not fmt.signed:
        assert fmt.partner, "quantize's error names it"
    if fmt.partner:
        other = format(fmt.partner)
        assert other.signed != fmt.signed and other.compressed and other.bits >= fmt.bits


@every_compressed
def test_bytes_per_value_counts_every_part(fmt: Format):
    per_block = sum({"codes": fmt.bits * fmt.block[1] / 8, "zero": 1}.get(part, 4) for part in fmt.parts)
    assert fmt.bytes_per_value == per_block / fmt.block[1]


def test_bytes_per_value_of_plain_formats():
    assert [format(n).bytes_per_value for n in ("fp32", "bf16", "fp16")] == [4, 2, 2]


@every_fixed
def test_values_are_fp32_numbers_one_per_code(fmt: Format):
    assert len(fmt.values) == 1 << fmt.bits
    unusable = {"e4m3": 2, "e5m2": 8}.get(fmt.name, 0)  # NaNs and infinities of fp8
    assert sum(not math.isfinite(v) for v in fmt.values) == unusable
    finite = torch.tensor([v for v in fmt.values if math.isfinite(v)], dtype=torch.float64)
    assert torch.equal(finite, finite.float().double())
    assert fmt.signed == bool((finite < 0).any())


@every_fixed
def test_top_and_zero(fmt: Format):
    ladder = [v for v, _ in fmt.ladder]
    assert ladder == sorted(set(ladder)) and ladder[-1] == fmt.top
    assert max(abs(v) for v in ladder) == fmt.top, "a value beyond the top could not be scaled to"
    if fmt.zero_code is None:
        assert 0 not in ladder
    else:
        assert fmt.values[fmt.zero_code] == 0 and math.copysign(1, fmt.values[fmt.zero_code]) == 1
    if not fmt.signed:
        assert list(fmt.values) == sorted(fmt.values), "an unsigned code is larger when its value is"
        assert fmt.zero_code in (0, None)


@every_fixed
def test_thresholds_lie_between_neighbours(fmt: Format):
    ladder = [v for v, _ in fmt.ladder]
    assert len(fmt.thresholds) == len(ladder) - 1
    assert all(low <= t < high for low, t, high in zip(ladder, fmt.thresholds, ladder[1:], strict=False))


def test_tags_name_one_format_and_block_each():
    tags = {}
    for fmt in ALL:
        for block in (16, 32, 64, 128, 256) if fmt.compressed else (1,):
            variant = format(f"{fmt.name}:{block}") if fmt.compressed else fmt
            assert 0 <= variant.tag < 2**31, "a tag must survive as an int32"
            assert tags.setdefault(variant.tag, variant) == variant
    assert len(tags) == 5 * len(COMPRESSED) + len(ALL) - len(COMPRESSED)


@every_compressed
def test_blocks_by_name(fmt: Format):
    other = format(f"{fmt.name}:16")
    assert other.block == (1, 16) and other.name == f"{fmt.name}:16"
    assert replace(other, name=fmt.name, block=fmt.block) == fmt
    assert other == fmt.with_block(16) == format(f"{fmt.name}:8").with_block(16)
    assert format(f"{fmt.name}:{fmt.block[1]}") is fmt
    assert format(other) is other


@every_compressed
def test_one_format_has_one_name(fmt: Format):
    # Otherwise the same state saved under "int4" and under with_block(128) has two tags, and is converted or refused.
    assert fmt.with_block(fmt.block[1]) == fmt
    assert fmt.with_block(fmt.block[1]).tag == fmt.tag


@pytest.mark.parametrize(
    "name", ["int4:0", "int4:x", "int4:-3", "int4:", "int4:3.5", "int4: 8", "int4:8:8", "int4:+8", "fp32:32", "bf16:1"]
)
def test_a_bad_block_is_an_error_that_shows_the_name(name: str):
    with pytest.raises(ValueError, match=name.replace("+", r"\+")):
        format(name)


def test_a_block_below_one_and_a_block_of_a_plain_format_are_errors():
    with pytest.raises(ValueError, match="at least 1"):
        format("int4").with_block(0)
    with pytest.raises(ValueError, match="fp32"):
        format("fp32").with_block(32)  # the same request as "fp32:32"


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("in4", "int4"),
        ("int-8", "int8"),
        ("sqrt", "sqrt8"),
        ("e2m", "e2m1"),
        ("nf4x:64", "nf4"),
        ("bnb_fp4", "bnb-fp4"),
    ],
)
def test_an_unknown_name_gives_the_nearest(typed: str, meant: str):
    with pytest.raises(ValueError, match=f"unknown format '{typed}'.*did you mean '{meant}'"):
        format(typed)


@pytest.mark.parametrize("name", ["", ":", "zzzzzz", None, 4])
def test_an_unknown_name_without_a_near_one_lists_the_known(name: str):
    with pytest.raises(ValueError, match=r"unknown format .*known: .*int8"):
        format(name)
    assert nearest("zzzzzz", formats()) == ""


@every
def test_a_format_is_a_value(fmt: Format):
    for twin in (copy.deepcopy(fmt), pickle.loads(pickle.dumps(fmt)), replace(fmt)):
        assert twin == fmt and hash(twin) == hash(fmt) and twin.tag == fmt.tag
    with pytest.raises(AttributeError):
        fmt.bits = 3  # type: ignore[misc]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_tables_do_not_depend_on_torchs_default_dtype(dtype: torch.dtype):
    # transformers sets it while it loads a model, and tables are built at first use.
    torch.set_default_dtype(dtype)
    try:
        fresh = catalogue.__wrapped__()
        wrong = [
            f.name
            for f in FIXED
            if repr((fresh[f.name].values, fresh[f.name].thresholds)) != repr((f.values, f.thresholds))
        ]
    finally:
        torch.set_default_dtype(torch.float32)
    assert not wrong


def test_tables_do_not_depend_on_torchs_default_device():
    with torch.device("meta"):  # how a large model is built before its weights exist
        fresh = catalogue.__wrapped__()
        assert all(repr(fresh[f.name].thresholds) == repr(f.thresholds) for f in FIXED)
