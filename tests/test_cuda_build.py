"""Every shipped kernel through every compiler, for every architecture; what the machine code may cost; and that faults
of each kind are found."""

import functools
import json
import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lowbit.__main__ import main
from lowbit.bench import kernels
from lowbit.bench.kernels import shipped
from lowbit.gpu import CompileError, NoCompiler, inspect, nvrtc
from lowbit.gpu.cost import ARCHITECTURES, Report, read, report, texts
from lowbit.gpu.inspect import InspectError, Instruction, Specialisation

SHIPPED = {special.name: special for special in shipped()}
STRICT = ["-Werror", "all-warnings", "-Xptxas", "-v,-warn-spills,-warn-lmem-usage,-Werror"]

# Registers of a thread at most; 64 where nothing is said. Two blocks of 128 threads fit a multiprocessor with 255.
REGISTERS = {"linear": 255, "linear_transposed": 255, "linear_few": 255}
REGISTERS["again"] = 96  # few blocks of threads have work
REGISTERS["rows"] = 80  # one number for 256 values
# Of some specialisations' main kernels. Of few rows, two blocks of 256 threads fit.
OF = {f"few {name} rows": 128 for name in ("int4, 8", "int4, 16", "nf4, 8", "int8, 8", "e2m1, 8")}

# Instructions for each value, on sm_90a, at most: what an H100 can issue while its memory streams, or less. And the
# bytes that a thread moves for each value in the main loop, without which the count of values would be only a claim.
BUDGETS = [
    ("linear int4", "linear", 10, (4 * 16 + 16 + 4) / 32),
    ("linear int4", "linear_transposed", 13, (4 * 16 + 2 * (8 + 4)) / 32),
    ("few int4, 8 rows", "linear_few", 4.7, (4 * 16 + 2 * (16 + 4)) / 64),
    ("few int4, 16 rows", "linear_few", 4.9, (8 * 16 + 2 * (16 + 4)) / 64),
    ("few int4, 32 rows", "linear_few", 5.1, (16 * 16 + 4 * (16 + 4)) / 128),
    ("few nf4, 8 rows", "linear_few", 5.3, (4 * 16 + 2 * (16 + 4)) / 64),
    ("few int8, 8 rows", "linear_few", 4.9, (2 * 16 + 2 * (16 + 4)) / 32),
    ("linear nf4", "linear", 12, (4 * 16 + 16 + 4) / 32),
    ("linear e2m1", "linear", 12, (4 * 16 + 16 + 4) / 32),
    ("AdamW 8bit", "update", 69, 12),
    ("AdamW 4bit", "update", 78, 10),
    ("StableSPAM 4bit", "update", 83, 10),
    ("Lion 8bit", "update", 39, 9),
    # Codes and a scale for each lane, of which one stores it.
    ("codec int4", "encode", 20, (16 + 4 + 4) / 8),
    ("codec nf4", "encode", 24, (16 + 4 + 4) / 8),
    ("codec e2m1", "encode", 25, (16 + 4 + 4) / 8),
    ("codec int8", "encode", 18, (16 + 8 + 4) / 8),
    ("codec e4m3", "encode", 28, (16 + 8 + 4) / 8),
    ("codec mxfp8", "encode", 33, (16 + 8 + 1) / 8),
    ("codec mxfp4", "encode", 30, (16 + 4 + 1) / 8),
    ("codec nvfp4", "encode", 36, None),
    ("codec int4 stochastic", "encode", 34, (16 + 4 + 4) / 8),
    ("codec nf4 stochastic", "encode", 47, (16 + 4 + 4) / 8),
    ("codec e4m3 stochastic", "encode", 44, (16 + 8 + 4) / 8),
    ("codec mxfp4 stochastic", "encode", 48, (16 + 4 + 1) / 8),
    ("codec int4", "decode", 8, (4 + 4 + 16) / 8),
    ("codec nf4", "decode", 7.5, (4 + 4 + 16) / 8),
    ("codec e4m3", "decode", 7.5, (8 + 4 + 16) / 8),
    ("codec mxfp4", "decode", 8, (4 + 1 + 16) / 8),
    ("codec bf16", "decode", 3.2, 4),
    ("passes nvfp4", "largest_of_all", 5, 2),
    ("passes int4:48", "scales", 14, 2),
    ("statistic nvfp4-2d", "measure", 34, None),
    ("StableSPAM 4bit measures", "measure", 6, None),
    ("AdamMini 8bit measures", "measure", 15.5, None),
]
NARROW = ("passes int4:48",)  # a value at a time
# Accesses of a turn: p and g are 128 bits for a lane's eight values, codes and scales have no more than these.
ACCESSES = {
    "AdamW 8bit": {"LDG 128": 2, "LDG 64": 2, "LDG 32": 2, "STG 128": 1, "STG 64": 2, "STG 32": 2},
    "AdamW 4bit": {"LDG 128": 2, "LDG 32": 4, "STG 128": 1, "STG 32": 4},
    "StableSPAM 4bit": {"LDG 128": 2, "LDG 32": 4, "STG 128": 1, "STG 32": 4},
    "Lion 8bit": {"LDG 128": 2, "LDG 64": 1, "LDG 32": 1, "STG 128": 1, "STG 64": 1, "STG 32": 1},
}


# ---- compilers


def by_nvcc(special: Specialisation, arch: str) -> tuple[bytes, str]:
    source, headers = texts(special)
    return nvcc(source, {name: text for name, text in headers.items() if name != "stdint.h"}, arch)


def nvcc(source: str, headers: dict[str, str], arch: str) -> tuple[bytes, str]:
    with tempfile.TemporaryDirectory() as folder:
        for name, text in {**headers, "kernel.cu": source}.items():
            Path(folder, name).write_text(text, encoding="utf-8")
        command = ["nvcc", "-cubin", f"-arch={arch}", "-std=c++17", "-fmad=false", *STRICT, "-I.", "kernel.cu"]
        done = subprocess.run([*command, "-o", "kernel.cubin"], cwd=folder, capture_output=True, text=True)
        if done.returncode:
            raise CompileError(f"a kernel for {arch}", done.stdout + done.stderr)
        return Path(folder, "kernel.cubin").read_bytes(), done.stdout + done.stderr


def refuse_warnings(name: str, arch: str, log: str) -> None:
    # NVRTC itself goes on, and older ones cannot be told otherwise.
    if re.search(r"\bwarning\b", log):
        raise CompileError(f"{name} for {arch}", log)


@functools.cache
def nvrtcs() -> dict[int, nvrtc.Nvrtc]:
    """By the major version of CUDA."""
    found: dict[int, nvrtc.Nvrtc] = {}
    for path in nvrtc.places():
        library = nvrtc.Nvrtc(path)
        found.setdefault(library.version[0], library)
    return found


@functools.cache
def compiler(name: str) -> Callable[[Specialisation, str], tuple[bytes, str]]:
    if name == "nvcc":
        if not shutil.which("nvcc"):
            pytest.skip("there is no nvcc")
        said = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
        assert (found := re.search(r"release (\d+)\.", said)) and int(found[1]) >= 13, f"nvcc is too old: {said}"
        return by_nvcc
    library = nvrtcs().get(int(name.removeprefix("nvrtc")))
    if library is None:
        pytest.skip(
            f"there is no {name}: pip install {'nvidia-cuda-nvrtc-cu12' if name == 'nvrtc12' else 'nvidia-cuda-nvrtc'}"
        )

    def compile(special: Specialisation, arch: str) -> tuple[bytes, str]:
        source, headers = texts(special)
        cubin, log = library.compile(source, special.file, headers, arch, inspect.VERBOSE)
        refuse_warnings(special.name, arch, log)
        return cubin, log

    return compile


def needs_nvdisasm() -> None:
    if not inspect.nvdisasm():
        pytest.skip(inspect.NO_NVDISASM)


COMPILERS = ["nvcc", "nvrtc12", "nvrtc13"]


def matrix() -> Iterator:
    """All compilers for H100s; for others, and for variants ("name, which"), each in turn; the rest in the slow tests.

    Codecs are many and much alike: on each architecture one compiler in turn, all but one architecture among the slow
    tests.
    """
    for k, name in enumerate(SHIPPED):
        for j, arch in enumerate(ARCHITECTURES):
            for i, by in enumerate(COMPILERS):
                in_turn = (i + j + k) % len(COMPILERS) == 0
                if name.startswith(("codec", "passes", "statistic")):
                    if not in_turn:
                        continue
                    chosen = j == k % len(ARCHITECTURES)
                else:
                    chosen = in_turn or (arch == "sm_90a" and ", " not in name)
                yield pytest.param(by, arch, name, marks=[] if chosen else [pytest.mark.slow])


@pytest.mark.parametrize(("by", "arch", "name"), list(matrix()))
def test_a_kernel_compiles_without_a_warning_and_keeps_to_registers(by: str, arch: str, name: str):
    special = SHIPPED[name]
    cubin, log = compiler(by)(special, arch)
    found = {one.kernel: one for one in read(special, arch, cubin, log)}
    assert set(special.values) <= set(found)
    for kernel, one in found.items():
        taken = one.resources
        assert (taken.spills, taken.stack) == (0, 0), kernel
        most = OF[name] if kernel == "linear_few" and name in OF else REGISTERS.get(kernel, 64)
        assert 0 < taken.registers <= most, kernel
        bytewise = special.file in ("codec.cu", "passes.cu")  # scales and zero points of a byte, masks
        assert bytewise or not any(access.split()[1] == "8" for access in (one.mix.accesses if one.mix else {})), kernel


LOCAL = 'extern "C" __global__ void k(float *p, int n) { float a[64]; for (int i = 0; i < 64; ++i) a[i] = p[i]; ' + (
    "for (int i = 0; i < 64; ++i) p[i] = a[i * n % 64]; }"
)
OVERFULL = 'extern "C" __global__ void __launch_bounds__(1024, 2) k(float *p) { float a[64]; ' + (
    "#pragma unroll\n for (int i = 0; i < 64; ++i) a[i] = p[i]; __syncthreads();\n"
    "#pragma unroll\n for (int i = 0; i < 64; ++i) p[64 - i] = a[i]; }"
).replace("#", "\n#")
UNUSED = 'extern "C" __global__ void k(float *p) { int unused; p[0] = 0.0f; }'


@pytest.mark.parametrize("by", COMPILERS)
@pytest.mark.parametrize(
    ("source", "said"),
    [(LOCAL, "Local memory used"), (OVERFULL, "Registers are spilled"), (UNUSED, "declared but never referenced")],
    ids=["local", "spilled", "unused"],
)
def test_a_planted_warning_is_refused(by: str, source: str, said: str):
    compiler(by)
    with pytest.raises(CompileError, match=said):
        if by == "nvcc":
            nvcc(source, {}, "sm_90a")
        else:
            library = nvrtcs()[int(by.removeprefix("nvrtc"))]
            _, log = library.compile(source, "planted.cu", {}, "sm_90a", inspect.VERBOSE)
            refuse_warnings("planted", "sm_90a", log)


# ---- budgets


@functools.cache
def reports(name: str) -> dict[str, Report]:
    compiler("nvrtc13")
    return {one.kernel: one for one in report(SHIPPED[name], "sm_90a", nvrtcs()[13])}


@pytest.mark.parametrize(("name", "kernel", "most", "moved"), BUDGETS, ids=lambda x: x if isinstance(x, str) else "")
def test_instructions_for_each_value_keep_to_the_budget(name: str, kernel: str, most: float, moved: float | None):
    needs_nvdisasm()
    one = reports(name)[kernel]
    assert one.mix and one.per_value
    assert 0 < one.per_value <= most, one
    assert moved is None or one.mix.bytes / one.values == pytest.approx(moved, rel=1e-6), one
    assert name in NARROW or {"LDG 128", "STG 128"} & set(one.mix.accesses)
    assert kernel != "update" or one.mix.accesses == ACCESSES[name]


def test_a_planted_narrow_access_is_seen():
    needs_nvdisasm()
    compiler("nvrtc13")
    special = SHIPPED["few int4, 8 rows"]
    source, headers = texts(special)
    wide, narrow = "((const Four *)from)[k]", "((const volatile uint32_t *)from)[4 * k + {}]"
    words = ", ".join(narrow.format(i) for i in range(4))
    patched = headers["device.h"].replace(f"const Four x = {wide};", f"const Four x = {{{words}}};")
    assert patched != headers["device.h"]
    cubin, log = nvrtcs()[13].compile(source, special.file, {**headers, "device.h": patched}, "sm_90a", inspect.VERBOSE)
    found = {one.kernel: one for one in read(special, "sm_90a", cubin, log)}
    mix = found["linear_few"].mix
    assert mix and "LDG 128" not in mix.accesses and mix.accesses["LDG 32"] > 16


# ---- reading machine code


def kernel(text: str) -> list[Instruction]:
    """Instructions, one a line; `name:` before a line is a label, and `@name` in operands its address."""
    lines, labels = [], {}
    for line in filter(None, map(str.strip, text.splitlines())):
        while found := re.match(r"(\w+):\s*", line):
            labels[found[1]] = 16 * len(lines)
            line = line[found.end() :]
        lines.append(line)
    made = []
    for line in lines:
        predicate, opcode, operands = re.fullmatch(r"(@!?\w+ )?(\S+) ?(.*)", line).groups()
        operands = re.sub(r"@(\w+)", lambda found: hex(labels[found[1]]), operands)
        made.append(Instruction(opcode, operands, (predicate or "").strip()))
    return made


LOOP = """
    S2R R0
    @P0 EXIT
    first: LDG.E R9
    @P1 BRA @first
    head: LDG.E.128 R4
    @P2 BRA @wide
    LDG.E.U8 R5
    wide: BSSY B0,@meet
    MUFU.RCP R6
    @!P0 BRA @good
    MOV R7
    CALL.REL.NOINC 0x8000
    BRA @meet
    good: FFMA R6
    BSYNC B0
    meet: BRA.DIV UR4,@apart
    SHFL.BFLY R6
    back: STG.E.128 R6
    @P3 BRA @head
    EXIT
    apart: WARPSYNC.COLLECTIVE R1,@back
    SHFL.BFLY R6
    BRA @back
"""


def test_the_main_loop_is_the_one_with_wide_accesses_without_what_never_runs():
    got = [one.opcode for one in inspect.hot_loop(kernel(LOOP))]
    assert got == [
        "LDG.E.128",
        "BRA",
        "BSSY",
        "MUFU.RCP",
        "BRA",
        "FFMA",
        "BSYNC",
        "BRA.DIV",
        "SHFL.BFLY",
        "STG.E.128",
        "BRA",
    ]
    mix = inspect.Mix.of(inspect.hot_loop(kernel(LOOP)))
    assert mix.accesses == {"LDG 128": 1, "STG 128": 1} and mix.bytes == 32 and mix.instructions == 11
    assert mix.classes == {"global": 2, "control": 6, "mufu": 1, "fp32": 1, "shared": 1}


def test_without_a_loop_all_that_runs_is_counted():
    text = "LDG.E.128 R0\n@!P0 BRA @good\nCALL.REL.NOINC 0x8000\ngood: STG.E.64 R0\nEXIT\nFADD R9\nRET.REL R2"
    assert [one.opcode for one in inspect.hot_loop(kernel(text))] == ["LDG.E.128", "BRA", "STG.E.64", "EXIT"]


def test_of_two_branches_the_longer_is_counted():
    text = """
        head: LDG.E.128 R0
        @P0 BRA @long
        FADD R1
        BRA @meet
        long: FMUL R1
        FMUL R2
        meet: STG.E.128 R0
        @P1 BRA @head
        EXIT
    """
    got = [one.opcode for one in inspect.hot_loop(kernel(text))]
    assert got == ["LDG.E.128", "BRA", "FMUL", "FMUL", "STG.E.128", "BRA"]


def test_what_is_fallen_back_to_is_left_out():
    text = """
        head: LDG.E.128 R0
        MUFU.RCP R1
        VOTE.ANY R2
        @!P0 BRA @over
        FCHK P1, R0
        @!P1 BRA @good
        CALL.REL.NOINC 0x8000
        good: FFMA R1
        FFMA R2
        over: STG.E.128 R0
        @P2 BRA @head
        EXIT
    """
    got = [one.opcode for one in inspect.hot_loop(kernel(text))]
    assert got == ["LDG.E.128", "MUFU.RCP", "VOTE.ANY", "BRA", "STG.E.128", "BRA"]
    always = text.replace("@!P0 BRA @over", "NOP")  # without another way, all of it but the call
    assert [one.opcode for one in inspect.hot_loop(kernel(always))].count("FFMA") == 2


def test_a_path_by_16_bits_is_left_out_where_there_is_a_wide_one():
    wide = "head: LDG.E.128 R0\n@P0 BRA @fast\nLDG.E.U16 R1\nfast: FADD R1\n@P1 BRA @head\nEXIT"
    assert [one.opcode for one in inspect.hot_loop(kernel(wide))] == ["LDG.E.128", "BRA", "FADD", "BRA"]
    only = "head: LDG.E.128 R0\nLDG.E.U16 R1\n@P1 BRA @head\nEXIT"
    assert [one.opcode for one in inspect.hot_loop(kernel(only))] == ["LDG.E.128", "LDG.E.U16", "BRA"]


def test_of_nested_loops_the_innermost_is_counted():
    text = "outer: IADD3 R1\ninner: LDG.E.128 R0\n@P0 BRA @inner\nFADD R1\n@P1 BRA @outer\nEXIT"
    assert [one.opcode for one in inspect.hot_loop(kernel(text))] == ["LDG.E.128", "BRA"]


def test_a_loop_that_a_call_with_a_predicate_leaves_is_one():
    text = "head: LDG.E.128 R0\n@P0 CALL.REL.NOINC @out\nBRA @head\nout: EXIT"
    assert [one.opcode for one in inspect.hot_loop(kernel(text))] == ["LDG.E.128", "CALL.REL.NOINC", "BRA"]


def test_a_computed_jump_goes_where_nothing_else_does():
    text = """
        LDG.E.128 R0
        BRX R2
        FADD R1
        BRA @meet
        FMUL R1
        FMUL R2
        meet: STG.E.128 R0
        EXIT
        subroutine: FADD R1
        FADD R1
        FADD R1
        RET.REL R2
    """
    got = [one.opcode for one in inspect.hot_loop(kernel(text))]
    assert got == ["LDG.E.128", "BRX", "FMUL", "FMUL", "STG.E.128", "EXIT"]


def test_a_computed_jump_that_is_not_taken_goes_on():
    text = "head: LDG.E.128 R0\n@P0 BRX R2\nFADD R1\nBRA @meet\nFMUL R1\nmeet: STG.E.128 R0\nEXIT"
    assert "FADD" in [one.opcode for one in inspect.hot_loop(kernel(text))]
    with pytest.raises(InspectError, match="computed jump"):
        inspect.hot_loop(kernel("LDG.E.128 R0\nBRX R2\n"))


def test_results_that_not_every_launch_asks_for_are_left_out():
    text = "head: LDG.E.128 R0\n@P0 BRA @none\nFMUL R1\nSTG.E.128 R1\nnone: STG.E R0\n@P1 BRA @head\nEXIT"
    opcodes = lambda apart: [one.opcode for one in inspect.hot_loop(kernel(text), frozenset(apart))]  # noqa: E731
    assert opcodes([]) == ["LDG.E.128", "BRA", "FMUL", "STG.E.128", "STG.E", "BRA"]
    assert opcodes(["STG 128"]) == ["LDG.E.128", "BRA", "STG.E", "BRA"]


def test_a_narrow_access_that_there_is_no_way_past_is_counted():
    text = "head: LDG.E.128 R0\n@P0 BRA @byte\nSTG.E.U8 R3\nbyte: STG.E.U8 R0\n@P1 BRA @head\nEXIT"
    assert [one.opcode for one in inspect.hot_loop(kernel(text))] == ["LDG.E.128", "BRA", "STG.E.U8", "BRA"]
    each = "head: @P0 LDG.E.U8 R0\n@!P0 LDG.E.U16 R0\n@P1 BRA @head\nSTG.E R0\nEXIT"
    assert [one.opcode for one in inspect.hot_loop(kernel(each))] == ["LDG.E.U8", "LDG.E.U16", "BRA"]


def test_what_ptxas_says_is_read():
    log = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'a' for 'sm_90a'
ptxas info    : Function properties for a
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 16 bytes cumulative stack size, 1024 bytes smem
ptxas info    : Compiling entry function 'b' for 'sm_90a'
ptxas info    : Used 9 registers"""
    assert inspect.resources(log) == {"a": inspect.Resources(40, 16, 20, 1024), "b": inspect.Resources(9, 0, 0, 0)}
    with pytest.raises(InspectError, match="ptxas-options"):
        inspect.resources("ptxas info    : Compiling entry function 'a' for 'sm_90a'")


def test_what_is_no_machine_code_is_an_error():
    needs_nvdisasm()
    with pytest.raises(InspectError, match="cannot read"):
        inspect.disassemble(b"no cubin")


# ---- lowbit doctor --arch


@pytest.mark.slow
def test_doctor_prints_what_kernels_cost(capsys: pytest.CaptureFixture):
    compiler("nvrtc13")
    needs_nvdisasm()
    assert main(["doctor", "--arch", "sm_90a", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["kernels"]
    assert {one["specialisation"] for one in found} == set(SHIPPED)
    assert all(one["resources"]["registers"] > 0 for one in found)
    # Not counted is only what does not grow with the values, or by one for each 256 of them; and what never runs.
    without = {one["kernel"] for one in found if one["per_value"] is None}
    assert without == {
        *("begin", "rows", "elements", "subtotal", "total", "scalars", "follow"),
        *("measure_columns", "largest_of_all", "scales", "decode", "linear_sum"),
    }
    assert all(one["per_value"] for one in found if one["kernel"] in ("update", "again", "encode", "measure"))
    assert main(["doctor", "--arch", "sm_90a"]) == 0
    assert "linear_few" in capsys.readouterr().out


def test_doctor_says_what_is_missing(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    def none():
        raise NoCompiler("there is none: pip install nvidia-cuda-nvrtc")

    with monkeypatch.context() as patch:
        patch.setattr(nvrtc, "find", none)
        assert main(["doctor", "--arch", "sm_90a"]) == 1
    assert "pip install nvidia-cuda-nvrtc" in capsys.readouterr().out
    compiler("nvrtc13")
    assert main(["doctor", "--arch", "sm_1"]) == 1
    assert "not compiled for sm_1:" in capsys.readouterr().out
    monkeypatch.setattr(inspect, "nvdisasm", lambda: None)
    monkeypatch.setattr(kernels, "shipped", lambda: [SHIPPED["codec nf4"], SHIPPED["AdamW 8bit"]])
    assert main(["doctor", "--arch", "sm_90a", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {one["specialisation"] for one in found["kernels"]} == {"codec nf4", "AdamW 8bit"}
    assert inspect.NO_NVDISASM in found["advice"]
    assert all(one["per_value"] is None and one["resources"]["registers"] for one in found["kernels"])


# ---- a second pair of eyes


# Warnings, and what clang-tidy takes for mistakes, but for matters of style and widened products of small constants.
CHECKS = ["-*", "clang-diagnostic-*", "bugprone-*"] + [
    f"-bugprone-{name}"
    for name in (
        "dynamic-static-initializers",  # threadIdx and its like, in tests/clang_cuda.h
        "easily-swappable-parameters",
        "implicit-widening-of-multiplication-result",
        "macro-parentheses",
        "reserved-identifier",
        "signed-bitwise",
    )
]


def clang(text: str, headers: dict[str, str], folder: Path) -> str:
    """What clang-tidy finds in a kernel."""
    found = shutil.which("clang-tidy", path=sysconfig.get_path("scripts"))
    if not found:
        pytest.skip("there is no clang-tidy: pip install clang-tidy")
    for name, header in {**headers, "kernel.cu": text}.items():
        if name != "stdint.h":
            (folder / name).write_text(header, encoding="utf-8")
    cuda = ["-x", "cuda", "--cuda-device-only", "--cuda-gpu-arch=sm_80", "-nocudainc", "-nocudalib"]
    warnings = ["-std=c++17", "-Wall", "-Wextra", "-Wno-unknown-cuda-version", "-Wno-unknown-pragmas"]
    words = ["-include", str(Path(__file__).with_name("clang_cuda.h"))]
    command = [found, "kernel.cu", "--quiet", "--header-filter=.*", f"--checks={','.join(CHECKS)}"]
    done = subprocess.run([*command, "--", *cuda, *warnings, *words, "-I."], cwd=folder, capture_output=True, text=True)
    return done.stdout + (done.stderr if done.returncode else "")


@pytest.mark.parametrize("name", SHIPPED)
def test_clang_has_nothing_to_say(name: str, tmp_path: Path):
    assert not clang(*texts(SHIPPED[name]), tmp_path)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("host();", "no matching function for call to 'host'"),
        ("int unused;", "unused variable"),
        ("if (*p = 1.0f) *p = 2.0f;", "assignment as a condition"),
        ("*p = 1.0f; for (char i = 0; i < n; ++i) *p += 1.0f;", "bugprone-too-small-loop-variable"),
    ],
    ids=["host", "unused", "assignment", "loop"],
)
def test_clang_finds_what_is_planted(body: str, said: str, tmp_path: Path):
    text = f'void host();\nextern "C" __global__ void k(float *p, int n) {{ {body} }}'
    assert said in clang(text, {}, tmp_path)
