"""The native backend's steps are the reference's, bit for bit; its structs, threads and memory."""

import os
import subprocess
import sys
import zlib
from ctypes import c_uint32, sizeof
from itertools import combinations, product
from pathlib import Path

import pytest
import torch
from cases import injected
from cases import one_thread as one_thread
from hypothesis import given
from hypothesis import strategies as st
from native_cases import (
    COVERING,
    DIMENSIONS,
    OPTIMIZERS,
    SHAPES,
    Setting,
    differences,
    every_isa,
    gradients,
    libraries,
    need,
    pairwise,
    run,
    same,
    stored,
    using,
)
from torch.nn import Parameter

import lowbit
from lowbit.layout import STEP_BLOCK
from lowbit.native import abi, build, tables
from lowbit.native.library import ISAS, load
from lowbit.optim import AdamW
from lowbit.policy import PRESETS

HERE = Path(__file__).parent
PLAIN = Setting("adamw", "int8", "sqrt8", 0, "f32", "f32", "auto", "nearest", "ragged", 2, "clean")


def agree(s: Setting, isas: list[str] | None = None) -> None:
    """By the best instruction set, which users get, and one of the others: each has hundreds of settings."""
    tape: list = []
    with injected(tape, replay=False):
        expected = run(s, "reference")
    *others, best = libraries()
    for isa in isas or [best, *others[zlib.crc32(str(s).encode()) % max(1, len(others)) :][:1]]:
        with injected(tape, replay=True):
            found = differences(expected, run(s, "native", isa))
        assert not found, f"{isa}: {len(found)} differ: {'; '.join(found[:4])}"


# ---- what crosses from Python into the library

STRUCTS = {name: getattr(abi, name) for name in ("Format", "Operand", "Stage", "Program", "Job", "Matrix")}
LIMITS = {name: getattr(abi, name) for name in ("ARRAYS", "SCALARS", "CONSTANTS", "STAGES", "MOMENTS")}
ENUMS = {
    "DTYPE": "FLOAT32 BFLOAT16 FLOAT16",
    "KIND": "KIND_FLOAT KIND_INTEGER KIND_CODEBOOK KIND_AFFINE KIND_LOG",
    "MASTER": "NONE SPLIT8 SPLIT16 KAHAN MASTER32",
    "STAGE": "MEASURE FOLD UPDATE",
    "REDUCE": "MAX SUM MEAN",
    "OVER": "TENSOR ALL ROW COLUMN GROUP",
}


def python_layout() -> dict[str, int]:
    layout = {f"LB_{name}": value for name, value in LIMITS.items()} | {"LB_BLOCK": STEP_BLOCK}
    for name, struct in STRUCTS.items():
        layout[f"sizeof(lb_{name.lower()})"] = sizeof(struct)
        for field in struct._fields_:
            of, its = f"lb_{name.lower()}", getattr(struct, field[0])
            layout |= {f"offsetof({of}, {field[0]})": its.offset, f"sizeof((({of} *)0)->{field[0]})": its.size}
    for name, words in ENUMS.items():
        numbers = list(dict.fromkeys(getattr(abi, name).values()))
        assert len(numbers) == len(words.split()) and set(getattr(abi, name).values()) == set(numbers)
        layout |= {f"LB_{word}": number for word, number in zip(words.split(), numbers, strict=True)}
    return layout


def test_structs_and_numbers_are_the_compilers(tmp_path: Path):
    if not (cxx := build.compiler()):
        pytest.skip("no C++ compiler")
    layout = python_layout()
    text = '#include <stddef.h>\n#include <stdio.h>\n#include "abi.h"\nint main() {\n'
    text += "".join(f'  printf("%d\\n", (int)({name}));\n' for name in layout) + "}\n"
    (tmp_path / "layout.cpp").write_text(text)
    subprocess.run([cxx, f"-I{build.HERE}", tmp_path / "layout.cpp", "-o", tmp_path / "layout"], check=True)
    said = subprocess.run([tmp_path / "layout"], check=True, capture_output=True, text=True).stdout.split()
    assert dict(zip(layout, map(int, said), strict=True)) == layout


# ---- steps


def test_settings_cover_every_pair():
    for i, j in combinations(range(len(DIMENSIONS)), 2):
        assert {(s[i], s[j]) for s in COVERING} == set(product(DIMENSIONS[i], DIMENSIONS[j]))
    assert [Setting(*row) for row in pairwise(DIMENSIONS)] == COVERING  # the same on every run


@pytest.mark.parametrize("setting", COVERING, ids=str)
def test_a_step_has_the_references_bits(setting: Setting):
    agree(setting)


@pytest.mark.parametrize("states", ["8bit", "4bit"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_presets_have_the_references_bits(optimizer: str, states: str):
    m, v = PRESETS[states]
    for p, shapes in (("f32", "ragged"), ("bf16", "large")):
        agree(PLAIN._replace(optimizer=optimizer, m=m, v=v, p=p, g=p, shapes=shapes))


@every_isa
def test_every_instruction_set_is_compared(isa: str):
    """Those that this processor lacks are skipped here, where it shows."""
    need(isa)
    agree(PLAIN._replace(optimizer="all", shapes="views"), [isa])
    library = libraries()[isa]
    assert library.isa == isa and library.asked["step"] >= 4 and library._kernels


def test_instruction_sets_are_forced_by_name(monkeypatch: pytest.MonkeyPatch):
    best = list(libraries())[-1]
    for isa in ISAS:
        monkeypatch.setenv("LOWBIT_ISA", isa)
        if isa in libraries():
            assert load.__wrapped__().isa == isa
        else:
            with pytest.raises(ValueError, match=f"this processor has {best} at best"):
                load.__wrapped__()
    monkeypatch.setenv("LOWBIT_ISA", "avx")
    with pytest.raises(ValueError, match=r"'avx' is no instruction set \(did you mean 'avx2'\?\)"):
        load.__wrapped__()


def test_differences_are_seen(monkeypatch: pytest.MonkeyPatch):
    """One number of a table an ulp off; a zero's sign; another random bit."""
    zero = torch.zeros(3)
    assert not same(zero, -zero) and same(zero / zero, -zero / zero) and not same(zero, zero.double())
    fmt = lowbit.format("nf4:128")
    setting = PLAIN._replace(m="nf4:128", shapes="dense")
    tampered = tables.table(fmt)
    number = abi.Format.values.offset + 4 * 3  # what code 3 stands for
    was = c_uint32.from_buffer(tampered, number)
    was.value += 1
    try:
        assert differences(run(setting, "reference"), run(setting, "native", "baseline"))
    finally:
        was.value -= 1
    agree(setting, ["baseline"])
    other = setting._replace(state_rounding="stochastic")
    found = differences(run(other, "reference"), run(other._replace(m="nf4"), "native", "baseline"))
    assert any(" exp_avg (" in line for line in found)  # the setting's name is its seed


def some(dimension: str) -> st.SearchStrategy:
    return st.sampled_from(getattr(DIMENSIONS, dimension))


@given(
    setting=st.builds(Setting, *(some(name) for name in Setting._fields)),
    shapes=st.lists(
        st.tuples(
            st.lists(st.integers(1, 40), max_size=3).map(tuple) | st.tuples(st.integers(1, 9), st.integers(200, 1100)),
            st.sampled_from(["plain", "transposed", "offset"]),
            st.sampled_from(["plain", "transposed", "offset", "strided", "expanded"]),
        ),
        min_size=2,
        max_size=4,
    ),
)
def test_any_shapes_and_options(setting: Setting, shapes: list[tuple[tuple[int, ...], str, str]]):
    laid = [(shape, *(how if len(shape) > 1 else "plain" for how in hows)) for shape, *hows in shapes]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SHAPES, "drawn", laid)
        gradients.cache_clear()
        agree(setting._replace(shapes="drawn"), list(libraries())[-1:])


# ---- threads and memory


@pytest.mark.parametrize("optimizer", ["adamw", "stablespam", "vectors"])
def test_the_number_of_threads_changes_no_bit(optimizer: str):
    isa = list(libraries())[-1]
    setting = PLAIN._replace(optimizer=optimizer, shapes="large", p="bf16", state_rounding="stochastic")
    each = []
    for threads in (1, 2, 7):
        each.append(run(setting._replace(threads=threads), "native", isa))
    for other in each[1:]:
        assert not differences(each[0], other)


def python(script: str, *arguments: str) -> str:
    """What a fresh process prints."""
    env = {**os.environ, "LOWBIT_BACKEND": "native", "PYTHONPATH": str(HERE)}
    command = [sys.executable, "-W", "error", "-c", script, *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=HERE.parent)
    assert done.returncode == 0, done.stderr
    return done.stdout


THREADS = """
import os, sys, torch
from lowbit.optim import StableSPAM
for threads in (1, 3):
    torch.set_num_threads(threads)
    torch.ones(1 << 20).add_(1)  # torch's own are counted before
    p = torch.nn.Parameter(torch.zeros(512, 1024))
    p.grad = torch.ones_like(p)
    opt = StableSPAM([p], states="4bit")
    before = set(os.listdir("/proc/self/task"))
    for _ in range(3):
        opt.step()
    print(len(set(os.listdir("/proc/self/task")) - before))
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="no /proc to count threads in")
def test_a_step_uses_the_threads_it_was_given():
    libraries()
    alone, three = map(int, python(THREADS).split())
    assert alone == 0 and three <= 2


MEMORY = """
import resource, torch
from lowbit.optim import AdamW, StableSPAM, GlobalClip
torch.set_num_threads(2)
def resident():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS"))
def most():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
def growth(shape, make, dtype):
    p = torch.nn.Parameter(torch.full(shape, 0.1, dtype=dtype))
    p.grad = torch.full(shape, 0.01, dtype=dtype)
    opt = make([p])
    for state in opt.state[p].values():
        if isinstance(state, torch.Tensor):
            state.add_(0)  # memory that was only promised so far
    ballast = []
    while resident() < most():  # the peak so far must not hide the step's
        ballast.append(bytearray(b"x") * ((most() - resident()) * 1024 + 65536))
    before = most()
    opt.step()
    return most() - before
for make, dtype in (
    (lambda params: AdamW(params, states="8bit"), torch.float32),
    (lambda params: AdamW(params, states="4bit", master="split8", amsgrad=True), torch.bfloat16),
    (lambda params: StableSPAM(params, states="4bit", stabilize=(GlobalClip(1.0),)), torch.float32),
    (lambda params: AdamW(params, states="8bit", rounding="nearest", lr=0.1), torch.bfloat16),
):
    growth((64, 256), make, dtype)
    print(growth((4096, 4096), make, dtype))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc to read memory from")
def test_a_step_needs_a_megabyte_per_thread():
    """On a tensor of 64 MB, whose states in fp32 would be 128 MB."""
    libraries()
    grown = [int(kib) for kib in python(MEMORY).split()]
    assert len(grown) == 4 and max(grown) <= 2 * 1024 + 512, f"KiB, for 2 threads: {grown}"


def test_a_parameter_that_moves_is_found_again():
    """A step may keep what it knows of a job, but not where a parameter lay or what it was told."""
    for isa in libraries():
        results = []
        for backend in ("reference", "native"):
            with using(backend, isa if backend == "native" else ""):
                p = Parameter(torch.linspace(-1, 1, 64 * 64).view(64, 64))
                opt = AdamW([p], lr=0.1, states="4bit", state_rounding="stochastic")
                for t in range(4):
                    p.grad = p.detach().clone() * (t + 1)
                    opt.step()
                    p.data = [p.data.clone(), p.data.t().contiguous().t(), p.data.clone(), p.data][t]
                    opt.param_groups[0]["lr"] /= 2
                results.append(p.detach().clone())
        assert same(*results)


def test_blocks_by_name():
    assert stored("fp32", 16) == "fp32" and stored("nf4", 16) == "nf4:16"
