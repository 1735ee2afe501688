"""The emulator as a machine for CPU tensors: g++ in NVRTC's place, a library of ours in the CUDA driver's.

`Emulator()` is a `lowbit.gpu.Machine`; everything else about it, the launcher above all, is what runs on a GPU.
`installed()` has host code use it for CPU tensors. Sanitizers need to be there when a process starts, so what they are
to see runs in a process of its own: `sanitized("thread", ...)`.
"""

import atexit
import contextlib
import ctypes
import functools
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from lowbit.gpu import CompileError, Machine, entries, machines
from lowbit.gpu import cache as gpu_cache
from lowbit.gpu.driver import Driver
from lowbit.native import build

HERE = Path(__file__).parent
# Which checks a process runs under is decided when it is started: by `sanitized`, which sets this.
VARIABLE = "LOWBIT_EMULATOR"
SANITIZERS = {
    "": [],
    "thread": ["-fsanitize=thread"],
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
}
WARNINGS = ["-Wall", "-Wextra", "-Werror"]
SONAME = "liblowbit-emulator-driver.so"
FORWARD, REVERSE = 0, 1  # schedules; from 2 on, seeds of shuffled ones


def variant() -> str:
    """The sanitizer of this process: none, thread or address."""
    return os.environ.get(VARIABLE, "")


def compiler() -> str | None:
    """g++, or a reason to skip is its absence; clang has another section syntax and other sanitizers."""
    return shutil.which(os.environ.get("LOWBIT_EMULATOR_CXX", "g++"))


@functools.cache
def flags(sanitizer: str) -> tuple[str, ...]:
    level = ["-O1", "-g1"]  # kernels run for an instant; with -O2 a quarter more time goes into them, all of it g++'s
    bits = ["-std=c++17", "-fPIC", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]
    bits += ["-fno-strict-aliasing"]  # wide accesses to whatever lies there
    fused = ["-mfma"] if _has_fma() else []  # else a call of the library's fmaf, with the same bits
    # With it, g++ 12 has aligned accesses to a red zone that is not.
    fused += ["-mno-red-zone"] if platform.machine() == "x86_64" else []
    return (*level, *bits, *fused, *SANITIZERS[sanitizer], *WARNINGS)


def _has_fma() -> bool:
    cpu = Path("/proc/cpuinfo")
    return platform.machine() == "x86_64" and cpu.exists() and bool(re.search(r"\bfma\b", cpu.read_text()))


def _run(command: Sequence[str], folder: Path) -> str:
    env = {**os.environ, "LC_ALL": "C", "LD_PRELOAD": ""}  # a compiler is not to be watched by a sanitizer
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=env)
    if done.returncode:
        raise CompileError("the emulator's kernel", done.stdout + done.stderr)
    return done.stdout


@functools.cache
def _fingerprint() -> str:
    return build.fingerprint([*sorted(HERE.glob("*.h")), *sorted(HERE.glob("*.cpp")), Path(__file__)])


@functools.cache
def _scratch() -> Path:
    """Where libraries are put to be loaded; gone when the process ends."""
    path = Path(tempfile.mkdtemp(prefix="lowbit-emulator-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


@functools.cache
def library() -> str:
    """The path of the library that stands in for the CUDA driver."""
    return _library("libcuda-emulator.so", SONAME, ["fibers.cpp", "driver.cpp"])


def _library(name: str, soname: str, files: Sequence[str], *linked: str) -> str:
    def make() -> bytes:
        with tempfile.TemporaryDirectory() as work:
            define = [f"-DEMULATOR_{variant().upper()}_SANITIZER"] if variant() else []
            plain = ["-O2", "-std=c++17", "-fPIC", "-shared", "-fvisibility=hidden", *WARNINGS, *define]
            link = [*linked, f"-Wl,-soname,{soname}", "-ldl", "-o", "made.so"]
            _run([compiler() or "g++", *plain, *[str(HERE / file) for file in files], *link], Path(work))
            return Path(work, "made.so").read_bytes()

    data = gpu_cache.kept("emulator", build.fingerprint([], _fingerprint(), variant(), _version(), name), make)
    path = _scratch() / name
    path.write_bytes(data)
    return str(path)


def without_bindings() -> str:
    """Why cuda-bindings cannot reach the emulator here, if so."""
    if entries.of_bindings() is None:
        return "cuda-bindings is not installed"
    return "cuda-bindings has the driver of a GPU here" if torch.cuda.is_available() else ""


@functools.cache
def by_bindings() -> entries.Entries:
    """The emulator's entry points by cuda-bindings, which takes a library of NVIDIA's name that is there already."""
    ctypes.CDLL(_library("libcuda-named.so", entries.LIBRARY, ["named.cpp"], "-Wl,--no-as-needed", library()))
    found = entries.of_bindings()
    assert found is not None
    return found


@functools.cache
def _version() -> str:
    return build.version(compiler() or "g++")


class Compiler:
    """g++, with the shim before a kernel's text and a list of its kernels behind."""

    arch = "emulator"

    def __init__(self) -> None:
        self.sanitizer = variant()
        self.key = "\n".join([f"the emulator's {_version()}", *flags(self.sanitizer), _fingerprint()])

    def compile(self, source: str, headers: Mapping[str, str]) -> bytes:
        cxx = compiler()
        if not cxx:
            raise CompileError("for the emulator", "there is no g++")
        with tempfile.TemporaryDirectory() as name:
            work = Path(name)
            for header, text in headers.items():
                if header != "stdint.h":
                    (work / header).write_text(text, encoding="utf-8")
            (work / "kernel.cu").write_text(source, encoding="utf-8")
            options = flags(self.sanitizer)
            include = ["-I", ".", "-I", str(HERE), "-include", str(HERE / "shim.h")]
            text = _run([cxx, *options, *include, "-E", "-x", "c++", "kernel.cu"], work)
            (work / "kernel.ii").write_text(with_list(text), encoding="utf-8")
            self._link(cxx, options, work)
            return (work / "kernel.so").read_bytes()

    def _link(self, cxx: str, options: Sequence[str], work: Path) -> None:
        # What it calls is in the driver, which is loaded before it, but not for all to see: hence linked, by its name.
        link = ["-shared", "-Wl,-Bsymbolic", "-Wl,-z,defs", "-fno-gnu-unique", f"-fdebug-prefix-map={work}=."]
        _run([cxx, *options, "kernel.ii", *link, library(), "-o", "kernel.so"], work)


def with_list(text: str) -> str:
    """A preprocessed text with the list of its kernels, by name, with the block sizes that they allow."""
    kernels: dict[str, str] = {}
    pieces = text.split("emulator_global")
    for k, piece in enumerate(pieces[1:], 1):
        most = "1024"
        if (at := piece.find("emulator_bounds")) >= 0 and "{" not in piece[:at]:
            end = _closing(piece, piece.index("(", at))
            most = piece[piece.index("(", at) + 1 : end].split(",")[0]
            piece = piece[:at] + piece[end + 1 :]
        found = re.match(r"\s*void\s+(\w+)\s*\(", piece)
        if not found:
            raise CompileError("for the emulator", f"a kernel is not `__global__ void name(`: {piece[:80]!r}")
        kernels[found[1]] = most
        pieces[k] = '__attribute__((visibility("default")))' + piece
    rows = [f'  emulator::Entry<&{name}>::kernel("{name}", {most}),' for name, most in kernels.items()]
    api = 'extern "C" __attribute__((visibility("default"))) const emulator::'
    # Only whole pages can be mapped anew.
    page = ['[[gnu::section("emulator_shared"), gnu::aligned(4096), gnu::used]] static char emulator_page;']
    return "\n".join(
        [
            "".join(pieces),
            *(page if variant() == "thread" else []),
            # The linker knows where a section begins and ends, if there is one.
            'extern "C" __attribute__((weak, visibility("hidden"))) char __start_emulator_shared[];',
            'extern "C" __attribute__((weak, visibility("hidden"))) char __stop_emulator_shared[];',
            'extern "C" {',
            api.replace('extern "C" ', "extern ") + "Kernel emulator_kernels[];",
            api.replace('extern "C" ', "extern ") + "Shared emulator_shared_memory;",
            "}",
            "const emulator::Kernel emulator_kernels[] = {",
            *rows,
            "  {nullptr, nullptr, nullptr, 0, 0},",
            "};",
            "const emulator::Shared emulator_shared_memory = {",
            "  __start_emulator_shared, __stop_emulator_shared, emulator::renew",
            "};",
            "",
        ]
    )


def _closing(text: str, at: int) -> int:
    depth = 0
    for k in range(at, len(text)):
        depth += (text[k] == "(") - (text[k] == ")")
        if not depth:
            return k
    raise CompileError("for the emulator", f"a parenthesis is not closed: {text[at : at + 80]!r}")


class Emulator(Machine):
    """A machine for CPU tensors. `schedule`: FORWARD, REVERSE or a seed; `current`: the stream that is in use.

    Its driver is reached by ctypes, or by cuda-bindings. `library` has the emulator's own entry points, too.
    """

    def __init__(self, schedule: int = FORWARD, bindings: bool = False):
        self.library, self.current, self.schedule = ctypes.CDLL(library()), 0, schedule
        driver = Driver(by_bindings() if bindings else entries.of_library(library()))
        super().__init__(driver, Compiler(), driver.primary_context(0), lambda: self.current)
        self.library.emulator_folder(str(_scratch()).encode())

    def launch(self, function, grid, block, arguments, shared=0) -> None:
        self.library.emulator_schedule(self.schedule)
        super().launch(function, grid, block, arguments, shared)


@contextlib.contextmanager
def installed(schedule: int = FORWARD) -> Iterator[Emulator]:
    """Have host code use an emulator for CPU tensors."""
    emulator, before = Emulator(schedule), machines.get(torch.device("cpu"))
    machines[torch.device("cpu")] = emulator
    try:
        yield emulator
    finally:
        if before is None:
            del machines[torch.device("cpu")]
        else:
            machines[torch.device("cpu")] = before


def sanitized(sanitizer: str, code: str, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process whose kernels, and every tensor's memory, a sanitizer watches.

    Tensors that the code makes have exactly their size in the eyes of AddressSanitizer. A fault ends the process with a
    return code that is not 0 and a report in its stderr.
    """
    # What throws must be there before what watches throwing.
    libraries = {"thread": ["libtsan.so"], "address": ["libasan.so", "libstdc++.so"]}[sanitizer]
    paths = [str(HERE), str(HERE.parent), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
    env = {
        **os.environ,
        VARIABLE: sanitizer,
        "LD_PRELOAD": " ".join(map(_library_of, libraries)),
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        # Python and torch are not compiled for it.
        "TSAN_OPTIONS": "halt_on_error=1 ignore_noninstrumented_modules=1",
    }
    with tempfile.TemporaryDirectory(prefix="lowbit-sanitized-") as scratch:  # a fault ends it before it can tidy up
        env["TMPDIR"] = scratch
        return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=timeout)


def _library_of(name: str) -> str:
    done = subprocess.run([compiler() or "g++", f"-print-file-name={name}"], capture_output=True, text=True)
    return os.path.realpath(done.stdout.strip())
