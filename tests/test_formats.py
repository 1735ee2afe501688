"""The catalogue. Every test runs over all of it: a new format is covered by being listed."""

import copy
import math
import pickle
from dataclasses import replace

import pytest
import torch

from lowbit.formats import Format, Scaling, catalogue, format, formats, nearest
from lowbit.rows import part_shapes

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
    assert fmt.bits in ((2, 4, 6, 8) if fmt.compressed else (16, 32))
    assert fmt.block in ((16, 16), (0, 0), (1, 0)) or (fmt.block[0] == 1 and 256 % fmt.block[1] == 0)
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
    shape = (256, 4096)
    whole = sum(math.prod(size) * dtype.itemsize for size, dtype in part_shapes(fmt, shape).values())
    once = (
        4 * len({"" if fmt.scaling.outer else "tensor_scale", "scale_offset"} & set(fmt.parts))
        + 4 * (fmt.block == (0, 0))
        + 4 * 256 * (fmt.block == (1, 0))
    )
    assert fmt.bytes_per_value * math.prod(shape) == whole - once


@pytest.mark.parametrize(
    ("name", "bits"),
    [("mxfp4", 4.25), ("mxfp6-e2m3", 6.25), ("mxfp8", 8.25), ("nvfp4", 4.5), ("nvfp4-2d", 4 + 8 / 256),
     ("nvfp4-128", 4.75), ("int8", 8.125),
     ("int4-bf16", 4.5), ("nf4", 4.5), ("nf4-dq", 4 + 8 / 64 + 32 / (64 * 256)), ("int8:row", 8), ("ternary", 2)],
)  # fmt: skip
def test_bits_per_value_as_published(name: str, bits: float):
    assert format(name).bytes_per_value * 8 == bits


def test_bytes_per_value_of_plain_formats():
    assert [format(n).bytes_per_value for n in ("fp32", "bf16", "fp16")] == [4, 2, 2]


@every_fixed
def test_values_are_fp32_numbers_one_per_code(fmt: Format):
    assert len(fmt.values) == 1 << fmt.bits
    unusable = {448: 2, 57344: 8}.get(fmt.top, 0)  # NaNs and infinities of fp8
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
        for block in (8, 16, 32, 64, 128) if fmt.compressed else (1,):
            variant = format(f"{fmt.name}:{block}") if fmt.compressed else fmt
            assert 0 <= variant.tag < 2**31, "a tag must survive as an int32"
            assert tags.setdefault(variant.tag, variant) == variant
    assert len(tags) == 5 * len(COMPRESSED) + len(ALL) - len(COMPRESSED)


@every_compressed
def test_blocks_by_name(fmt: Format):
    other = format(f"{fmt.name}:4")
    assert other.block == (1, 4) and other.name == f"{fmt.name}:4"
    assert replace(other, name=fmt.name, block=fmt.block) == fmt
    assert other == fmt.with_block(4) == format(f"{fmt.name}:8").with_block(4)
    assert format(f"{fmt.name}:{fmt.block[0]}x{fmt.block[1]}") is fmt
    assert format(other) is other


@pytest.mark.parametrize(
    ("text", "block", "name"),
    [("row", (1, 0), "row"), ("tensor", (0, 0), "tensor"), ("1x0", (1, 0), "row"), ("0x0", (0, 0), "tensor"),
     ("16x16", (16, 16), "16x16"), ("0x1", (0, 1), "0x1"), ("1x32", (1, 32), "32"), ("4x0", (4, 0), "4x0")],
)  # fmt: skip
def test_blocks_of_rows_and_columns(text: str, block: tuple[int, int], name: str):
    fmt = format(f"int8:{text}")
    assert (fmt.block, fmt.name) == (block, f"int8:{name}")
    assert fmt == format("int8").with_block(block) == format(fmt.name) == pickle.loads(pickle.dumps(fmt))
    assert not fmt.plain or fmt.block == (1, 32)


@every_compressed
def test_one_format_has_one_name(fmt: Format):
    # Otherwise the same state saved under "int4" and under with_block(128) has two tags, and is converted or refused.
    assert fmt.with_block(fmt.block) == fmt
    assert fmt.with_block(fmt.block).tag == fmt.tag


@every_compressed
def test_a_scaling_is_part_of_what_a_format_is(fmt: Format):
    if fmt.kind not in ("integer", "codebook") or fmt.square:
        with pytest.raises(ValueError, match=f"{fmt.name}.*linear codes"):
            replace(fmt, scaling=Scaling("bf16"))
        return
    other = replace(fmt, scaling=Scaling("e4m3", peak=448, gain=1.5))
    assert other != fmt and other.tag != fmt.tag and other.parts == ("codes", "scale", "tensor_scale")
    back = replace(other, scaling=fmt.scaling)
    assert back == fmt and back.parts == fmt.parts and back.tag == fmt.tag
    assert pickle.loads(pickle.dumps(other)).scaling == other.scaling


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"stored": "e8m0"}, "e8m0 cannot be rounded 'nearest'"),
        ({"stored": "fp32", "rounding": "up"}, "fp32 cannot be rounded 'up'"),
        ({"stored": "double", "rounding": "floor"}, "double cannot be rounded 'floor'"),
        ({"peak": 448}, "peak and least are for .* e4m3, not fp32"),
        ({"stored": "bf16", "least": 1.0}, "peak and least"),
        ({"gain": 0.0}, "gain and headroom must be above 0"),
        ({"headroom": 4 / 3}, "headroom is for .* e8m0; with fp32 use gain"),
        ({"outer": 32}, "outer .* needs a peak"),
        ({"candidates": ()}, "candidates"),
        ({"candidates": (1.0, -1.0)}, "candidates"),
    ],
)
def test_a_scaling_that_cannot_be_is_an_error(arguments: dict, match: str):
    with pytest.raises(ValueError, match=match):
        Scaling(**arguments)


@pytest.mark.parametrize(
    "name",
    [
        "int4:0",
        "int4:x",
        "int4:-3",
        "int4:",
        "int4:3.5",
        "int4: 8",
        "int4:8:8",
        "int4:+8",
        "fp32:32",
        "bf16:1",
        "int4:rows",
        "int4:16x",
        "int4:x16",
        "int4:4x4x4",
        "int4:-1x4",
        "fp32:row",
    ],
)
def test_a_bad_block_is_an_error_that_shows_the_name(name: str):
    with pytest.raises(ValueError, match=name.replace("+", r"\+")):
        format(name)


def test_a_block_below_one_and_a_block_of_a_plain_format_are_errors():
    with pytest.raises(ValueError, match="at least 1"):
        format("int4").with_block(0)
    with pytest.raises(ValueError, match="fp32"):
        format("fp32").with_block(32)  # the same request as "fp32:32"
    with pytest.raises(ValueError, match="not -1 x 4"):
        format("int4").with_block((-1, 4))


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("in4", "int4"),
        ("int-8", "int8"),
        ("sqrt", "sqrt8"),
        ("e2n1", "e2m1"),
        ("mxpf4", "mxfp4"),
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
