"""The printer: what it prints has the bits of the Python it was printed from; all else it refuses, with the line."""

import ctypes
import functools
import importlib.util
import re
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from lowbit import optim, words
from lowbit.native import printer
from lowbit.native.printer import collect, kernels_header, print_stage, rules_header
from lowbit.native.translate import WORDS, Unprintable
from lowbit.stages import Namespace, Stage, fold, measure, update
from lowbit.words import abs, binade, clip, lerp, maximum, minimum, reciprocal, sign, sqrt, where

NATIVE = Path(printer.__file__).parent
FLAGS = ["-O3", "-std=c++17", "-fPIC", "-shared", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
FLAGS += ["-Wall", "-Wextra", "-Werror"]
TARGETS = {"baseline": "", "avx2": "arch=x86-64-v3", "avx512": "arch=x86-64-v4"}
SHIPPED = collect(optim)

# ---- rules that say everything that may be said

TENTH, COUNT = 0.1, 3


def halves(a, b):
    return a * (1 / 2), -b


def turned(a, s, c):
    a = a + s.gain
    return halves(a, c.rate * a)


def ramp(a, c):
    tilt = 1 - a
    return tilt * c.rate


@update("p m v q")
def everything(p, g, m, v, c, s):
    """Tuples, a swap, numbers folded, conditions, a name assigned twice, a write that is not read, unused names."""
    two = 2
    low, high = turned(g, s, c)
    _unused, v = halves(v, g * g)
    m, p = p, m
    live = (g > TENTH) & ~(p >= m) | (g == -1.5) | (g != g)
    also = live
    a = maximum(p, 0.25) - minimum(-0.5, m) - (low - (high - TENTH * COUNT * two))
    a = a / (abs(high) * (c.rate - -1.5)) / s.gain
    p = where(also, a * -(2 * 3.5), g - -p + -(-a))  # noqa: B002
    level, _dead = m, low
    return p, lerp(level, 1, s.gain) + lerp(0, ramp(g, c), s.gain), sign(v) * sqrt(abs(v)), clip(g, -1.0, 16777217)


@measure("sum")
def numbers(g):
    a = g * 0.1 + g * 3e-45 + g * 16777217 + g * 3.4028235e38 + g * 1.00000005960464477540
    return binade(a) * reciprocal(g) - (0.1 + 0.2) / 3 * g + where(g <= 1e-50, -0.0, g) * 1e-08


@fold("v n")
def elements(n, x, v, s, c):
    n = lerp(n, x, c.rate)
    return v * s.gain - n, n


@fold
def scalars(x, s, c):
    s.old, s.gain = s.gain, s.old
    s.low, s.high = halves(s.gain, x)
    _unused = c.rate


OWN = [(stage, frozenset("vq")) for stage in (everything, numbers, elements, scalars)]
EVERY = [*SHIPPED, *OWN]


# ---- refusals

HEADER = """
import torch
from lowbit.stages import fold, measure, update
from lowbit.words import clip, lerp, maximum, sqrt, where
TABLE = [1.0]
FLAG = True
"""
UPDATE = "@update('p')\ndef rule(p, g, s, c):\n    "
FOLD = "@fold\ndef rule(x, s, c):\n    "
MEASURE = "@measure('sum')\ndef rule(g):\n    "
WHERE, WORD, FIELD = "say where(condition, a, b)", "a rule may", "in a fold over the tensor"
REFUSED = [
    # (source, what the message quotes from its line marked #!, what it advises)
    (UPDATE + "return p if g > 0 else g  #!", "p if g > 0 else g", WHERE),
    (UPDATE + "if g > 0:  #!\n        p = g\n    return p", "if g > 0:", WHERE),
    (UPDATE + "for i in TABLE:  #!\n        p = g\n    return p", "for i in TABLE:", WORD),
    (UPDATE + "while g > 0:  #!\n        p = g\n    return p", "while g > 0:", WORD),
    (UPDATE + "p += g  #!\n    return p", "p += g", "say a = a + b"),
    (UPDATE + "a: float = g  #!\n    return a", "a: float = g", WORD),
    (UPDATE + "a = b = g  #!\n    return a", "a = b = g", WORD),
    (UPDATE + "sqrt(g)  #!\n    return p", "sqrt(g)", WORD),
    (UPDATE + "def a():  #!\n        pass\n    return p", "def a():", WORD),
    (UPDATE + "global p2  #!\n    return p", "global p2", WORD),
    (UPDATE + "return g  #!\n    return p", "return g", WORD),
    (UPDATE + "p = (lambda: g)()  #!\n    return p", "(lambda: g)()", WORD),
    (UPDATE + "p = (a := g)  #!\n    return p", "(a := g)", WORD),
    (UPDATE + "return where((g > 0) and (p > 0), p, g)  #!", "g > 0 and p > 0", "say & or |"),
    (UPDATE + "return where(not g > 0, p, g)  #!", "not g > 0", "say ~"),
    (UPDATE + "return where(0 < g < 1, p, g)  #!", "0 < g < 1", WORD),
    (UPDATE + "return where(g is p, p, g)  #!", "g is p", WORD),
    (UPDATE + "return where(g, p, g)  #!", "`g`", "must be a condition"),
    (UPDATE + "return where(1.0, p, g)  #!", "`1.0`", "must be a condition"),
    (UPDATE + "return where(p & g, p, g)  #!", "`p`", "must be a condition"),
    (UPDATE + "return p + (g > 0)  #!", "g > 0", WHERE),
    (UPDATE + "return g > 0  #!", "g > 0", WHERE),
    (UPDATE + "a = g\n    a = g > 0  #!\n    return p", "a = g > 0", "a value or a condition"),
    (UPDATE + "p = g > 0  #!\n    return p", "p = g > 0", "a value or a condition"),
    (UPDATE + "return p ** 2  #!", "p ** 2", "say a * a"),
    (UPDATE + "return p % 2  #!", "p % 2", WORD),
    (UPDATE + "return p // g  #!", "p // g", WORD),
    (UPDATE + "return p @ g  #!", "p @ g", WORD),
    (UPDATE + "return +p  #!", "+p", WORD),
    (UPDATE + "return 1 / g  #!", "1 / g", "reciprocal"),
    (UPDATE + "return g / 3  #!", "g / 3", "reciprocal"),
    (UPDATE + "return g * (1 / 0)  #!", "1 / 0", "division by zero"),
    (UPDATE + "return g * 1e39  #!", "1e+39", "finite in fp32"),
    (UPDATE + "return g * 10 ** 2  #!", "10 ** 2", "say a * a"),
    (UPDATE + "return p * True  #!", "True", WORD),
    (UPDATE + "return p * FLAG  #!", "FLAG", "no number"),
    (UPDATE + "return p * 'a'  #!", "'a'", WORD),
    (UPDATE + "return p * 1j  #!", "1j", WORD),
    (UPDATE + "return p[0]  #!", "p[0]", WORD),
    (UPDATE + "return p.T  #!", "p.T", WORD),
    (UPDATE + "return p.abs()  #!", "p.abs()", WORD),
    (UPDATE + "return torch.sqrt(p)  #!", "torch.sqrt(p)", WORD),
    (UPDATE + "return abs(p)  #!", "abs(p)", "from lowbit.words import abs"),
    (UPDATE + "return float(p)  #!", "float(p)", WORD),
    (UPDATE + "return unknown(p)  #!", "unknown(p)", WORD),
    (UPDATE + "return p + unknown  #!", "unknown", "no argument"),
    (UPDATE + "return p + TABLE  #!", "TABLE", "no argument"),
    (UPDATE + "return p + s  #!", "`s`", "no argument"),
    (UPDATE + "a = b  #!\n    b = g\n    return a", "`b`", "no name assigned above"),
    (UPDATE + "return lerp(p, g, weight=c.rate)  #!", "lerp(p, g, weight=c.rate)", "by position"),
    (UPDATE + "return lerp(p, g)  #!", "lerp(p, g)", "takes 3 arguments"),
    (UPDATE + "return sqrt(*p)  #!", "*p", WORD),
    (UPDATE + "return lerp(p, g, 0.5)  #!", "0.5", "say c.name"),
    (UPDATE + "return lerp(0.0, 1.0, g)  #!", "lerp(0.0, 1.0, g)", "say c.name"),
    (UPDATE + "return where(g > 0, 1.0, 0.0)  #!", "where(g > 0, 1.0, 0.0)", "say c.name"),
    (UPDATE + "return where(1 > 0, p, g)  #!", "1 > 0", "say c.name"),
    (UPDATE + "return clip(1.0, p, g)  #!", "1.0", "say c.name"),
    (UPDATE + "return 1.0  #!", "1.0", "say c.name"),
    (UPDATE + "return p, g  #!", "return (p, g)", "2 values for 1 names"),
    (UPDATE + "a, b = p  #!\n    return a", "a, b = p", "1 values for 2 names"),
    (UPDATE + "s.a = g  #!\n    return p", "s.a", FIELD),
    (UPDATE + "s = g  #!\n    return p", "`s`", FIELD),
    (UPDATE + "c.a = g  #!\n    return p", "c.a", FIELD),
    (UPDATE + "p[0] = g  #!\n    return p", "p[0]", FIELD),
    (UPDATE + "*a, b = p, g  #!\n    return p", "*a", FIELD),
    (UPDATE + "double = g  #!\n    return double", "`double`", "choose another"),
    (UPDATE + "kept0_ = g  #!\n    return p", "`kept0_`", "choose another"),
    (UPDATE + "return p * c.int  #!", "c.int", "choose another"),
    ("@update('p')\ndef rule(p, g):  #!\n    p = g", "def rule(p, g):", "last line must return"),
    ("@update('p')\ndef rule(p, g):  #!\n    return", "def rule(p, g):", "last line must return"),
    ("@update('p')\ndef rule(p, at):  #!\n    return p", "`at`", "choose another"),
    ("@update('p')\ndef rule(p, g=1.0):  #!\n    return p", "p, g=1.0", "without defaults"),
    ("@update('p')\ndef rule(p, *g):  #!\n    return p", "p, *g", "without defaults"),
    ("@update('p')\ndef rule(p, *, g):  #!\n    return p", "p, *, g", "without defaults"),
    ("@update('p')\ndef rule(p, x):  #!\n    return p", "p, x", "only a fold has it"),
    ("@update('p')\nasync def rule(p):  #!\n    return p", "async def rule(p):", "say def"),
    ("@measure('sum')\ndef rule(g):  #!\n    return g, g", "def rule(g):", "one value"),
    (FOLD + "s.a = 1.0  #!", "1.0", "say c.name"),
    (FOLD + "s.a = x > 0  #!", "x > 0", WHERE),
    (FOLD + "return x  #!", "return x", "returns nothing"),
    ("@fold\ndef rule(g, s):  #!\n    s.a = g", "g, s", "s, c and x only"),
    ("def f(a):\n    return f(a)  #!\n" + MEASURE + "return f(g)", "f(a)", "cannot call itself"),
    ("def f(a, b=1.0):  #!\n    return a\n" + MEASURE + "return f(g, g)", "a, b=1.0", "without defaults"),
    ("def f(a):\n    for i in a:  #!\n        pass\n    return a\n" + MEASURE + "return f(g)", "for i in a:", WORD),
    ("def f(a):\n    return 2.0  #!\n" + MEASURE + "return f(g)", "2.0", "say c.name"),
    ("def f(a):\n    return a > 0  #!\n" + MEASURE + "return f(g)", "a > 0", WHERE),
    ("def f(a):\n    return a\n" + MEASURE + "return f(2.0)  #!", "2.0", "say c.name"),
    ("def f(a):\n    return a\n" + MEASURE + "return f(g, g)  #!", "f(g, g)", "f takes 1 arguments"),
    ("def f(a):\n    return a, a\n" + MEASURE + "return f(g) + g  #!", "f(g)", "say a, b = f("),
    ("def f(a, c):\n    return a * c.b\n" + MEASURE + "return f(g, g)  #!", "`g`", "f takes c here"),
    ("def f(a, s):\n    s.b = a  #!\n    return a\n" + UPDATE + "return f(g, s)", "s.b", FIELD),
    ("f = lambda a: a\n" + MEASURE + "return f(g)", "", "<lambda> is no plain function"),
    ("f = torch.no_grad()(sqrt)\n" + MEASURE + "return f(g)", "", "without decorators"),
    ("f = measure('sum')(sqrt)\n" + MEASURE + "return f(g)  #!", "f(g)", WORD),
    ("rule = measure('sum')(lambda g: g)", "", "<lambda> is no plain function"),
    ("rule = measure('sum')(torch.no_grad()(lambda g: g))", "", "without decorators"),
    ("exec(\"@measure('sum')\\ndef rule(g):\\n    return g\")", "", "keep it in a file"),
    ("def made(table):\n    " + MEASURE.replace("\n", "\n    ") + "return g * table  #!\n    return rule\n"
     "rule = made(TABLE)", "table", "no argument"),
]  # fmt: skip


def loaded(path: Path, source: str) -> ModuleType:
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("source", "said", "advice"), REFUSED)
def test_what_has_no_cpp_is_refused_with_its_line(source, said, advice, tmp_path):
    path = tmp_path / "refused.py"
    stage = loaded(path, HEADER + source).rule
    with pytest.raises(Unprintable) as refusal:
        print_stage(stage, frozenset())
    message = str(refusal.value)
    line = next((n for n, text in enumerate((HEADER + source).split("\n"), 1) if "#!" in text), None)
    assert message.startswith(f"{path}:{line}: a rule cannot say `" if line else "")
    assert (said.strip("`") if not line else said) in message
    assert advice in message
    assert isinstance(refusal.value, ValueError)


def test_two_functions_of_one_name_are_refused(tmp_path):
    (tmp_path / "other").mkdir()
    first = loaded(tmp_path / "same.py", HEADER + MEASURE + "return g").rule
    second = loaded(tmp_path / "other" / "same.py", HEADER + MEASURE + "return g * g").rule
    with pytest.raises(Unprintable, match="same_rule"):
        rules_header([(first, ()), (second, ())])


def test_a_long_expression_takes_no_longer_than_its_length(tmp_path):
    rule = loaded(tmp_path / "long.py", HEADER + MEASURE + "return " + " + ".join(["-(g * 2.0)"] * 60)).rule
    assert print_stage(rule, ()).functor.count("2.0f") == 60


# ---- what is printed


def test_the_headers_in_git_are_current():
    assert (NATIVE / "rules.h").read_text() == rules_header(SHIPPED), "run python -m lowbit.native.printer"
    assert (NATIVE / "kernels.h").read_text() == kernels_header(SHIPPED), "run python -m lowbit.native.printer"


def test_every_stage_of_every_shipped_optimizer_is_printed():
    printed = {stage.function: letters for stage, letters in SHIPPED}
    p = [torch.nn.Parameter(torch.ones(2))]
    optimizers = [optim.AdamW(p, stabilize=(optim.SpikeClip(), optim.GlobalClip())), optim.AdamW(p, amsgrad=True)]
    optimizers += [optim.StableSPAM(p, variant=variant) for variant in ("paper", "official")]
    for opt in optimizers:
        program = opt.program(opt.param_groups[0])
        unsigned = {letter for letter, moment in program.moments.items() if not moment.signed}
        for stage in program.stages:
            assert unsigned & set(stage.writes) <= printed[stage.function]


def test_what_is_printed_says_what_it_needs():
    printed = print_stage(everything, frozenset("vq"))
    assert printed.symbol == "test_printer_everything"
    assert (printed.reads, printed.writes) == (("p", "g", "m", "v"), ("p", "m", "v", "q"))
    assert (printed.scalars, printed.constants, printed.uses_x) == (("gain",), ("rate",), False)
    assert list(printed.helpers) == [f"test_printer_{name}" for name in ("halves", "turned", "ramp")]
    assert printed.roots == 0b1100
    assert print_stage(scalars, ()).assigns == ("old", "gain", "low", "high")
    assert print_stage(elements, frozenset("v")).roots == 0 and print_stage(elements, ()).uses_x


# ---- its bits

reprinted = functools.cache(print_stage)


PIECE = 1024  # values that have peaks of their own


class Frame(ctypes.Structure):
    """`lb_frame` of abi.h."""

    _fields_ = [
        ("inputs", ctypes.c_void_p * 12),
        ("outputs", ctypes.c_void_p * 12),
        *((name, ctypes.c_void_p) for name in ("x", "s", "si", "c", "ci")),
        ("n", ctypes.c_int64),
        ("piece", ctypes.c_int64),
        ("roots", ctypes.c_uint32),
        ("peaks", ctypes.c_void_p),
    ]


def compiled(source: str, folder: Path, *flags: str) -> Path:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    (folder / "source.cpp").write_text(source)
    command = [compiler, *FLAGS, *flags, f"-I{NATIVE}", "source.cpp", "-o", "library.so"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0 and (not done.stderr or flags), done.stderr
    (folder / "log").write_text(done.stderr)
    return folder / "library.so"


@pytest.fixture(scope="module", params=TARGETS)
def library(request, tmp_path_factory) -> ctypes.CDLL:
    """The kernels of every shipped stage and of this file's, for one instruction set."""
    cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    if request.param != "baseline" and not {"avx2", "fma", request.param.replace("512", "512vl")} <= set(cpu.split()):
        pytest.skip(f"this CPU has no {request.param}")
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "rules.h").write_text(rules_header(EVERY))
    (folder / "kernels.h").write_text(kernels_header(EVERY))
    target = f'#pragma GCC target("{TARGETS[request.param]}")\n' if TARGETS[request.param] else ""
    name = '#define LB_KERNEL(symbol) extern "C" void lb_##symbol##_here\n'
    # Without -fno-ipa-icf, kernels of the same text would be one, and only that one be reported.
    flags = ("-fopt-info-vec-optimized", "-fno-ipa-icf")
    path = compiled(f'{target}{name}#include "kernels.h"\n', folder, *flags)
    loaded = ctypes.CDLL(str(path))
    loaded.folder, loaded.target = folder, request.param  # type: ignore[attr-defined]
    return loaded


SPECIAL = np.array(
    [0.0, 1.0, 0.5, 2.0, 0.1, 1e-30, 1e30, 2.0**-126, 1e-40, 1e-45, 3.4028235e38, np.inf, np.nan], np.float32
)


def wild(rng: np.random.Generator, n: int) -> np.ndarray:
    """Special values, either sign, and any bit pattern."""
    some = rng.choice(SPECIAL, n) * rng.choice(np.array([-1, 1], np.float32), n)
    any_bits = rng.integers(0, 1 << 32, n, dtype=np.uint32).view(np.float32)
    return np.where(rng.random(n) < 0.5, some, any_bits)


def tame(rng: np.random.Generator, n: int) -> np.ndarray:
    return (rng.standard_normal(n) * np.exp2(rng.integers(-8, 8, n))).astype(np.float32)


def same(a: np.ndarray, b: np.ndarray) -> bool:
    """The same bits, or both not a number."""
    return bool(((a.view(np.uint32) == b.view(np.uint32)) | (np.isnan(a) & np.isnan(b))).all())


def pointers(arrays: list[np.ndarray]) -> ctypes.Array:
    return (ctypes.c_void_p * 12)(*(a.ctypes.data for a in arrays))


def run(library: ctypes.CDLL, stage: Stage, letters, arrays, s, c, x, n: int, roots: int = 0, in_place: bool = False):
    """Call a kernel; what it wrote, and the peaks it reported, a row for each piece."""
    printed = reprinted(stage, letters)
    inputs = [arrays[name].copy() for name in printed.reads]
    writes = printed.writes or ("value",) * (stage.kind == "measure")
    outputs = [np.full(n + 16, 7, np.float32) for _ in writes]
    if in_place:
        outputs = [
            inputs[printed.reads.index(w)] if w in printed.reads else o for w, o in zip(writes, outputs, strict=True)
        ]
    # The stage's scalars and constants lie scattered among the program's.
    si = np.arange(len(printed.scalars), dtype=np.int32)[::-1] * 2 + 1
    ci = np.arange(len(printed.constants), dtype=np.int32)[::-1] * 3 + 2
    ss, cs = np.full(33, 7, np.float32), np.full(49, 7, np.float32)
    ss[si], cs[ci] = [s[name] for name in printed.scalars], [c[name] for name in printed.constants]
    si, ci = si.copy(), ci.copy()
    peaks = np.zeros((n // PIECE + 1, len(writes) + ("g" in printed.reads)), np.uint32)
    every = [v.ctypes.data for v in (x, ss, si, cs, ci)]
    frame = Frame(pointers(inputs), pointers(outputs), *every, n, PIECE, roots, peaks.ctypes.data)
    getattr(library, f"lb_{printed.symbol}_here")(ctypes.byref(frame))
    return dict(zip(writes, outputs, strict=True)), dict(zip(printed.scalars, ss[si], strict=True)), peaks


def expected(stage: Stage, arrays, s, c, x):
    """What the Python function makes of the same, in torch."""
    tensors = {name: torch.from_numpy(values.copy()) for name, values in arrays.items()}
    its = {r: Namespace({k: torch.tensor([v]) for k, v in values.items()}) for r, values in {"s": s, "c": c}.items()}
    result = stage({**tensors, **its, "x": torch.from_numpy(x.copy())})
    results = result if isinstance(result, tuple) else (result,) * (result is not None)
    writes = stage.writes or ("value",) * (stage.kind == "measure")
    return {w: r.numpy() for w, r in zip(writes, results, strict=True)}, {k: v.numpy()[0] for k, v in its["s"].items()}


@pytest.mark.parametrize(
    ("stage", "letters"), EVERY, ids=lambda value: getattr(getattr(value, "function", 0), "__name__", "")
)
def test_a_kernel_has_the_bits_of_its_python(stage, letters, library):
    printed = reprinted(stage, letters)
    rng = np.random.default_rng(0)
    count = 4096 if printed.reads else 1
    for trial in range(8 if printed.reads else 400):
        values, numbers = [(tame, tame), (wild, tame), (wild, wild), (tame, wild)][trial % 4]
        n = count - 5 * (trial > 3 and count > 5)
        arrays = {name: values(rng, count) for name in printed.reads}
        s, c = (
            {name: np.float32(numbers(rng, 1)[0]) for name in names} for names in (printed.scalars, printed.constants)
        )
        if trial % 8 > 3:  # the shares and weights that rules have
            s, c = ({k: np.float32(rng.random()) for k in names} for names in (s, c))
        x = values(rng, count)
        wanted, scalars = expected(stage, arrays, s, c, x)
        done = n if stage.kind == "fold" else n // 16 * 16
        for roots in range(printed.roots + 1):
            if roots & ~printed.roots:
                continue
            got, after, peaks = run(library, stage, letters, arrays, s, c, x, n, roots, in_place=trial % 2 == 1)
            assert all(same(np.float32(after[name]), np.float32(scalars[name])) for name in after)
            for k, (name, values_got) in enumerate(got.items()):
                value = torch.from_numpy(wanted[name][:done])
                stored = (sqrt(value) if roots >> k & 1 else value).numpy()
                assert same(values_got[:done], stored), f"{name}, trial {trial}, roots {roots}"
                if trial % 2 == 0:
                    assert (values_got[done:] == 7).all(), "written beyond the end"
                if stage.kind != "fold":
                    assert_peaks(peaks[:, k], stored)
            if stage.kind != "fold" and "g" in printed.reads:
                assert_peaks(peaks[:, -1], arrays["g"][:done])


def assert_peaks(peaks: np.ndarray, values: np.ndarray) -> None:
    for k, start in enumerate(range(0, len(values), PIECE)):
        largest = (values[start : start + PIECE].view(np.uint32) & 0x7FFFFFFF).max()
        assert peaks[k] == largest or (peaks[k] > 0x7F800000 and largest > 0x7F800000)


def test_every_loop_is_vector_code(library):
    text = (library.folder / "kernels.h").read_text().split("\n")
    loops = {number for number, line in enumerate(text, 1) if "for (int64_t at = " in line}
    log = (library.folder / "log").read_text().split("\n")
    vectorised = {int(line.split(":")[1]) for line in log if line.startswith("kernels.h") and "loop vectorized" in line}
    assert loops - vectorised == set()
    if objdump := shutil.which("objdump"):
        code = subprocess.run([objdump, "-d", library.folder / "library.so"], capture_output=True, text=True).stdout
        adamw = code.split("lb_adamw_adamw_here>:")[1].split("\n\n")[0]
        wide = {"baseline": "[xyz]mm", "avx2": "ymm", "avx512": "[yz]mm"}[library.target]
        assert re.search(f"divps .*%{wide}", adamw) and re.search(f"sqrtps .*%{wide}", adamw)


def test_words_have_the_bits_of_their_torch_meaning(tmp_path):
    lines = ['#include "words.h"', '#define LOOP _Pragma("GCC ivdep") for (long i = 0; i < n; ++i)']
    for word, kinds in WORDS.items():
        arguments = ", ".join(f"in[{k}][i] > 0.0f" if kind == "c" else f"in[{k}][i]" for k, kind in enumerate(kinds))
        lines.append(f'extern "C" void at_{word}(const float *const *in, float *out, long n) {{')
        lines.append(f"  LOOP out[i] = lb::{word}({arguments});\n}}")
    native = ctypes.CDLL(str(compiled("\n".join(lines), tmp_path)))
    rng = np.random.default_rng(0)
    table = np.concatenate([SPECIAL, -SPECIAL, np.nextafter(np.float32([0.5, 1, 2]), np.float32(0)), wild(rng, 35)])
    for word, kinds in WORDS.items():
        inputs = [a.ravel().copy() for a in np.meshgrid(*[table] * len(kinds))]
        out = np.empty_like(inputs[0])
        getattr(native, f"at_{word}")(pointers(inputs), ctypes.c_void_p(out.ctypes.data), ctypes.c_long(out.size))
        spoken = [
            torch.from_numpy(a) > 0 if kind == "c" else torch.from_numpy(a)
            for kind, a in zip(kinds, inputs, strict=True)
        ]
        assert same(out, getattr(words, word)(*spoken).numpy()), word
