"""cuda/few.cu: few rows times a stored weight. How terms are divided, how far ahead codes are loaded, and faults.

The tolerance is that of test_cuda_linear.py. That W streams cannot be timed here; what can be read off the machine code
is which loads are under way while others are waited for.
"""

import functools
import re
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_cuda_build import SHIPPED, compiler, needs_nvdisasm, nvrtcs
from test_cuda_linear import REVERSE, check, installed, needs_compiler, sources, stored, values
from test_cuda_linear import device as device

import lowbit
from lowbit.gpu import inspect
from lowbit.gpu import linear as host
from lowbit.gpu.inspect import Instruction

# One group of eight rows of x, two, four, twice four; full and not. n: tiles of W's rows, full and not. k: whole turns
# of a warp or not; several parts, of which the last is shorter, or ends within a turn.
ROWS = [1, 2, 8, 9, 15, 16, 17, 33, 64]
SPLIT = {"int4": (4224, 4095), "int8": (2112, 1100), "nf4": (4224, 2050)}


def product(name: str, m: int, n: int, k: int, device: torch.device) -> None:
    weight, x = stored(name, n, k, device), values(m, k, seed=2).bfloat16()
    plain = lowbit.Packed(weight.format, weight.shape, {p: t.cpu() for p, t in weight.parts.items()}).dequantize()
    check(host.linear(x.to(device), weight), x, plain.T)


@pytest.mark.parametrize("m", ROWS)
@pytest.mark.parametrize("name", SPLIT)
def test_terms_in_parts(name: str, m: int, device: torch.device):
    n = 16 * (m % 3) + m % 7 + 1
    for k in SPLIT[name]:
        assert host.few(lowbit.format(name), m, n, k).parts > 1
        product(name, m, n, k, device)


@pytest.mark.parametrize("m", [3, 20])
@pytest.mark.parametrize("name", SPLIT)
def test_more_turns_than_are_under_way_at_once(
    name: str, m: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
):
    in_one_part(monkeypatch)
    for k in (6144, 5000):
        product(name, m, 24, k, device)


def in_one_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with many rows of W, of which an emulator would have long."""
    monkeypatch.setattr(host, "few", functools.partial(host.few, blocks=1))


def test_a_part_for_each_block_that_would_have_no_work(device: torch.device):
    int4 = lowbit.format("int4")
    assert [host.few(int4, 1, n, 4096).parts for n in (16, 1024, 2048, 4096, 16384)] == [4, 4, 2, 1, 1]
    assert [host.few(int4, m, 1024, 4096).parts for m in (8, 16, 17, 64)] == [4, 4, 4, 2]
    assert [host.few(int4, 32, 2048, k).parts for k in (1024, 2048, 4096)] == [1, 2, 2]


@given(
    bits=st.sampled_from(["solo2", "int4", "int8"]),
    m=st.integers(1, 64),
    n=st.integers(1, 1 << 20),
    k=st.integers(1, 1 << 20),
)
def test_parts_have_all_terms_once(bits: str, m: int, n: int, k: int):
    plan = host.few(lowbit.format(bits), m, n, k)
    assert plan.groups == (1 if m <= 8 else 2 if m <= 16 else 4)
    assert plan.span % (8 * plan.turn) == 0  # a whole number of sweeps: each warp's turns end where a part does
    assert plan.span * (plan.parts - 1) < k <= plan.span * plan.parts
    assert plan.parts == 1 or plan.blocks <= host.BLOCKS


@needs_compiler
@pytest.mark.parametrize("m", [2, 20])
def test_the_order_of_blocks_changes_no_bit(m: int):
    weight, x = stored("nf4", 70, 3300, torch.device("cpu")), values(m, 3300).bfloat16()
    results = []
    for schedule in (0, REVERSE, 7):
        with installed(schedule):
            results.append(host.linear(x, weight))
    assert all(torch.equal(y, results[0]) for y in results[1:])


@needs_compiler
def test_few_rows_in_a_batch_are_what_they_are_alone():
    """Of eight rows none knows of the others: a server may batch what comes together."""
    weight, x = stored("int4", 50, 1100, torch.device("cpu")), values(8, 1100).bfloat16()
    with installed():
        assert torch.equal(host.linear(x, weight), torch.cat([host.linear(row[None], weight) for row in x]))


# ---- faults: what stands in few.h or few.cu, what is put in its place; each is seen in the results

FAULTS = {
    "the last part is left out": ("few.cu", "part < parts", "part + 1 < parts"),
    "a part has the terms of those behind it": ("few.h", "x.cols - begin < span ? x.cols : begin + span", "x.cols"),
    "all parts begin at the beginning": ("few.h", "begin = part * span", "begin = 0 * span"),
    "codes that were multiplied before": ("few.h", "if (term + AHEAD * SWEEP < end) load_turn", "if (false) load_turn"),
    "a warp's sums are left out": ("few.h", "k < WARPS; ++k) total", "k < WARPS - 1; ++k) total"),
}


@needs_compiler
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(fault: str, monkeypatch: pytest.MonkeyPatch):
    file, before, after = FAULTS[fault]
    texts = dict(sources())
    assert before in texts[file]
    monkeypatch.setattr(host, "sources", lambda: {**texts, file: texts[file].replace(before, after)})
    if fault == "codes that were multiplied before":
        in_one_part(monkeypatch)
    with installed(), pytest.raises(AssertionError):
        product("int4", 3, 24, 5000, torch.device("cpu"))


# ---- machine code


def ahead(loop: Sequence[Instruction]) -> list[tuple[int, int]]:
    """Of each load from global memory in a loop: its bits, and the multiplications before what it brings is read."""
    found = []
    for at, one in enumerate(loop):
        if one.name != "LDG":
            continue
        first = int(re.match(r"R(\d+)", one.operands)[1])
        brought = {f"R{first + k}" for k in range(one.width // 32)}
        count = 0
        for later in [*loop[at + 1 :], *loop[: at + 1]]:
            if brought & set(re.findall(r"\bR\d+", later.operands.partition(",")[2])):
                break
            count += later.name == "HMMA"
        found.append((one.width, count))
    return found


@functools.cache
def machine_code(name: str, arch: str) -> list[Instruction]:
    compiler("nvrtc13")
    source, headers = host.sources()["few.cu"], {**host.sources(), "spec.h": SHIPPED[name].spec}
    cubin, _ = nvrtcs()[13].compile(source, "few.cu", headers, arch, inspect.VERBOSE)
    return inspect.disassemble(cubin)["linear_few"]


# Turns under way, loads of codes in a turn, and multiplications of a turn.
AHEAD = [
    ("few int4, 8 rows", 4, 2, 8),
    ("few int4, 16 rows", 4, 2, 16),
    ("few int4, 32 rows", 2, 4, 64),
    ("few nf4, 8 rows", 4, 2, 8),
    ("few int8, 8 rows", 4, 2, 4),
]


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
@pytest.mark.parametrize(("name", "turns", "loads", "products"), AHEAD, ids=lambda x: x if isinstance(x, str) else "")
def test_codes_and_scales_are_loaded_turns_before_they_are_read(
    name: str, turns: int, loads: int, products: int, arch: str
):
    needs_nvdisasm()
    code = machine_code(name, arch)
    barrier = next(k for k, one in enumerate(code) if one.name == "BAR")
    assert sum(one.name == "LDG" and one.width == 128 for one in code[:barrier]) == turns * loads
    loop = inspect.hot_loop(code)
    assert sum(one.name == "HMMA" for one in loop) == turns * products
    early = [width for width, count in ahead(loop) if count >= (turns - 1) * products]
    # What is left over a compiler has moved nearer, but for less than a turn it does not wait.
    assert early.count(128) >= turns * loads - 2 and early.count(32) >= turns * loads - 4
    # 16 bytes, 512 threads or 256: what a multiprocessor waits for just before a turn is loaded. 3.35 TB/s for 700 ns
    # are 18 KB for each of an H100's 132.
    assert 16 * loads * (turns - 1) * (512 if loads == 2 else 256) >= 16 << 10
