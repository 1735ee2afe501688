"""The C++ driver under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer, which find planted faults.

Python and torch cannot run under them, so calls are recorded here and played back by tests/native/harness.cpp.
"""

import re
import shutil
import subprocess
from itertools import product
from pathlib import Path
from typing import NamedTuple

import pytest
import stored_cases
import torch
from cases import one_thread as one_thread
from native_cases import COVERING, Setting, libraries, run
from native_recorder import Recorder

import lowbit
from lowbit.backends import native, native_matrix
from lowbit.native import build
from lowbit.rotation import Rotation

HARNESS = Path(__file__).parent / "native" / "harness.cpp"
THREADS = 4
ADDRESS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
THREAD = ["-fsanitize=thread"]
# Optimized so far that it takes seconds. No -fopenmp: ThreadSanitizer knows no libgomp, and the driver has its threads.
FLAGS = [*(f for f in build.FLAGS if f not in ("-O3", "-shared", "-fPIC")), "-O1", "-g1", "-pthread"]
# Fused loops are one template, and the compiler takes seconds for each rule: only those of the rules that DRAFTED runs.
OTHERS_FUSED = r"LB_FUSED\((?!(?:stabilizers_normalize_)?adamw_adamw\))(\w+)\)"
NOT_FUSED = r"LB_EXPORT lb_fused_kernel LB_NAME(\1_fused)(uint64_t, uint32_t) { return nullptr; }"


class Case(NamedTuple):
    """A build of the driver. `fault`: (what is in one of the headers, what is put there instead, what is said)."""

    isa: str
    flags: list[str]
    fault: tuple[str, str, str] | None = None


LONGER = (r"memcpy\(p, from, 4 \* n\)", "memcpy(p, from, 4 * n + 4)", "heap-buffer-overflow")
SPLIT = (
    r"(unpack\(codes, f\.bits, s\.n)(, room\.codes\);\s*const uint8_t \*code )",
    r"\1 + 2\2",
    "heap-buffer-overflow",
)
BARRIER = (r"(sweep\(step, \*room\);\s*)LB_BARRIER\(\);", r"\1", "data race")
CASES = {
    "address-baseline": Case("baseline", ADDRESS),
    "address-avx2": Case("avx2", ADDRESS),
    "thread": Case("baseline", THREAD),
    "address-a-copy-too-long": Case("baseline", ADDRESS, LONGER),
    "address-a-split-weight-too-long": Case("baseline", ADDRESS, SPLIT),
    "thread-a-barrier-less": Case("baseline", THREAD, BARRIER),
}


# What fused loops take: moments in bytes and in 4 bits, parameters that are drawn; rows with ends of both kinds.
DRAFTED = [
    Setting("adamw", "int8", "sqrt8", 0, "f32", "f32", "nearest", "nearest", "large", THREADS, "clean"),
    Setting("adamw", "nf4", "log4", 256, "bf16", "bf16", "auto", "nearest", "large", THREADS, "clean"),
    Setting("stablespam", "nf4", "log4", 256, "bf16", "bf16", "auto", "nearest", "large", THREADS, "clean"),
]


# Weights that are codes: every way to keep scales, a rest, rows of whole blocks and others, numbers that overflow.
STORED = [
    stored_cases.Setting("adamw", store, "8bit", "f32", "bf16", rounding, "nearest", shapes, THREADS, wrong)
    for store, shapes, rounding, wrong in [
        ("int8", "large", "auto", "clean"),
        ("int4", "ragged", "auto", "huge"),
        ("nf4", "large", "auto", "huge"),
        ("mxfp4", "ragged", "nearest", "clean"),
        ("nvfp4", "large", "auto", "clean"),
        ("split", "ragged", "auto", "clean"),
        ("split8", "large", "auto", "huge"),
        ("mxfp8", "points", "nearest", "clean"),
    ]
]

# What a layer asks for: scales of every kind, of blocks in rows and of tiles; sums over short blocks and long ones.
NAMES = (
    "mxfp4",
    "nvfp4",
    "nvfp4-46",
    "nvfp4-2d",
    "ternary",
    "int4-quest",
    "mxfp6-e2m3",
    "int8:row",
    "e2m1:16x16",
    "nf4",
    "nvfp4-128",
    "int4-quest:24",
)
LAYERS = list(product(NAMES, [(7, 33), (130, 72), (3, 2500)]))


def native_dtype(k: int) -> torch.dtype:
    return (torch.float32, torch.bfloat16, torch.float16)[k % 3]


def chosen() -> list[Setting]:
    """Settings until every value of every dimension has been there; no NaN, which may have any bits."""
    missing = {(k, v) for s in COVERING for k, v in enumerate(s)}
    found = []
    for s in COVERING:
        kept = s.wrong in ("clean", "huge") and not s.optimizer.startswith(("official", "loose", "stablespam-official"))
        if kept and s.shapes != "large" and missing & (new := set(enumerate(s))):
            found.append(s)
            missing -= new
    found.append(found[0]._replace(optimizer="vectors", shapes="large", wrong="clean"))
    return [*found, *DRAFTED]


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recording")
    recorder = Recorder(libraries()["baseline"], THREADS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOWBIT_BACKEND", "native")
        for module in (native, native_matrix):
            patch.setattr(module, "load", lambda: recorder)
        for setting in chosen():
            run(setting, "native", steps=2)
        for setting in STORED:
            stored_cases.run(setting, "native", steps=2)
        for k, name in enumerate(name for name in lowbit.formats() if lowbit.format(name).plain):
            fmt = lowbit.format(name)
            for block in (None, 3, 1000) if fmt.compressed else (None,):
                f = fmt.with_block(block) if block else fmt
                for shape in [(7, 33), (3, 300), (1, 40001)]:
                    x = torch.randn(shape, generator=torch.Generator().manual_seed(k))
                    x = x.to(native_dtype(k))
                    noise = (k, 7) if k % 2 else None
                    parts = native.encode(f, x if fmt.signed else x.abs(), noise, live=False)
                    native.decode(f, parts, shape[1])
                    native.fake(f, x if fmt.signed else x.abs(), noise)
        for k, (name, shape) in enumerate(LAYERS):
            x = torch.randn(shape, generator=torch.Generator().manual_seed(k)).to(native_dtype(k))
            rotation = Rotation((16, 32, 64, 128)[k % 4], k) if k % 3 else None
            for view in (x, x.t(), x[:, 1:].t()):
                edge = 2.0 if k % 2 else None
                values, parts = native.quantized(
                    lowbit.format(name), view, None, rotation=rotation, dtype=native_dtype(k + 1), edge=edge
                )
                if edge and rotation:
                    native.rotate(values, rotation, back=True, mask=parts["inside"])
                native.fake(lowbit.format(name), view, (k, 7), rotation=rotation)
                cols = rotation.padded(view.shape[1]) if rotation else view.shape[1]
                native.decode(lowbit.format(name), parts, cols, native_dtype(k + 1))
        for k, (shape, dtype) in enumerate(product([(7, 33), (130, 200), (3, 2500)], (torch.float32, None))):
            x = torch.randn(shape, generator=torch.Generator().manual_seed(k)).to(native_dtype(k))
            for view in (x, x.t()):
                corrected = {"rotation": Rotation(128, k), "run": 128}
                if dtype:
                    native.quantized(lowbit.format("nvfp4-eden"), view, (k, 7), dtype=dtype, **corrected)
                else:
                    native.encode(lowbit.format("nvfp4-eden"), view, (k, 7), **corrected)
    with open(folder / "calls", "wb") as file:
        recorder.write(file)
    (folder / "own.h").write_text(recorder.own_kernels())
    return folder


def compiled(folder: Path, name: str) -> Path | str:
    """The built harness of a case, or why there is none."""
    case, cxx = CASES[name], build.compiler()
    if not cxx:
        return "no C++ compiler"
    if case.isa not in libraries():
        return f"this processor has no {case.isa}"
    (probe := folder / f"{name}-probe.cpp").write_text("int main() { return 0; }\n")
    command = [cxx, *FLAGS, *case.flags]
    for attempt in ([*command, str(probe), "-o", str(probe.with_suffix(""))], [str(probe.with_suffix(""))]):
        done = subprocess.run(attempt, capture_output=True, text=True)
        if done.returncode:
            return f"no {case.flags[0]} here: {(done.stderr.splitlines() or ['?'])[0]}"
    sources = folder / name
    shutil.copytree(build.HERE, sources, ignore=shutil.ignore_patterns("*.py", "*.so", "__pycache__"))
    kernels = sources / "kernels.h"
    kernels.write_text(re.sub(OTHERS_FUSED, NOT_FUSED, kernels.read_text()))
    if case.fault:
        there, instead, _ = case.fault
        found = [path for path in sources.glob("*.h") if re.search(there, path.read_text())]
        assert len(found) == 1, f"the driver has changed: {there!r} is in {[path.name for path in found]}"
        found[0].write_text(re.sub(there, instead, found[0].read_text(), count=1))
    driver = f'-DLB_DRIVER="isa_{case.isa}.cpp"'
    target = folder / f"{name}-harness"
    done = subprocess.run(
        [*command, driver, f"-I{sources}", f"-I{folder}", str(HARNESS), "-o", str(target)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return target


def play(harness: Path | str, recording: Path) -> subprocess.CompletedProcess:
    if isinstance(harness, str):
        pytest.skip(harness)
    env = {"ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "halt_on_error=1", "UBSAN_OPTIONS": "print_stacktrace=1"}
    return subprocess.run([harness, recording / "calls"], capture_output=True, text=True, env=env, timeout=300)


def test_recorded_settings_reach_every_kind():
    """Of optimizer, format, dtype, rounding and shapes."""
    settings = chosen()
    assert len(settings) < 50
    for k in ("m", "v", "block", "p", "g", "rounding", "state_rounding"):
        assert {getattr(s, k) for s in settings} == {getattr(s, k) for s in COVERING}


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.fault])
def test_the_driver_is_clean(name: str, recording: Path):
    done = play(compiled(recording, name), recording)
    assert done.returncode == 0 and not done.stderr, done.stderr[:4000]
    assert done.stdout.endswith(" calls\n") and int(done.stdout.split()[0]) > 200


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.fault])
def test_a_planted_fault_is_found(name: str, recording: Path):
    done = play(compiled(recording, name), recording)
    said = CASES[name].fault[2]
    assert done.returncode not in (0, 3, 4) and said in done.stderr, done.stderr[:4000] or done.stdout
