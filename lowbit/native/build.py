"""Build the native CPU library: at installation where there is a C++ compiler, else when it is first needed.

Only the standard library and nothing of lowbit is imported: setup.py loads this file by its path, where no torch is.

What is compiled at first use stays in `$LOWBIT_CACHE`, else `$XDG_CACHE_HOME/lowbit`, else `~/.cache/lowbit`; where
that cannot be written, in a private folder beside the temporary files. All of it may be deleted at any time. `$CXX`
names the compiler, else it is the first of c++, g++ and clang++.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
SUFFIX = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")
INSTALL = {"darwin": "xcode-select --install", "win32": "https://www.msys2.org"}.get(sys.platform, "apt install g++")
NONE = f"there is no C++ compiler ($CXX, c++, g++ or clang++): install one ({INSTALL})"

# Every flag that may change a bit is here: a·b + c is contracted nowhere, and never -ffast-math. Never -march=native:
# the library chooses its instruction set when it runs.
FLAGS = ["-O3", "-std=c++17", "-fPIC", "-shared", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-Wall"]

# clang brings an OpenMP of its own, and that one aborts the process where torch has loaded Intel's: threads there.
OPENMP = '#include <omp.h>\n#ifdef __clang__\n#error\n#endif\nextern "C" int f() { return omp_get_max_threads(); }\n'


class BuildError(RuntimeError):
    """The library is not there and could not be built; the message says what to do."""


class NoCompiler(BuildError):
    """There is no C++ compiler."""


class Found(NamedTuple):
    """A library, and how it came: `origin` is "shipped", "cache" or "compiled", `reason` why it is not shipped."""

    path: Path
    origin: str
    seconds: float
    reason: str


def find(compile: bool = True, folder: Path = HERE) -> Found:
    """The library of the sources in a folder: shipped if it is theirs, else from the cache, else compiled.

    Raises `NoCompiler` or `BuildError`.
    """
    start = time.perf_counter()

    def found(path: Path, origin: str, reason: str) -> Found:
        return Found(path, origin, time.perf_counter() - start, reason)

    library = shipped(folder)
    reason = _fault(library, mark := fingerprint(_files(folder)))
    if not reason:
        return found(library, "shipped", "")
    if path := cached(folder):
        return found(path, "cache", reason)
    if not sources(folder):
        raise BuildError(f"{reason}, and there are no C++ sources in {folder}: reinstall lowbit")
    if not compile:
        raise BuildError(f"{reason}, and it was not to be compiled")
    path, made, note = _keep("lowbit", mark, reason, lambda to: compile_to(to, folder))
    return found(path, "compiled" if made else "cache", f"{reason}; {note}" if note else reason)


def compile_extra(source_text: str, name: str, folder: Path = HERE) -> Path:
    """The library of one generated C++ text, which may include the headers of the folder; compiled once and kept."""

    def make(target: Path) -> None:
        with tempfile.TemporaryDirectory() as work:
            text = Path(work, f"{name}.cpp")
            marked = f'{source_text}\nextern "C" const char *lb_fingerprint(void) {{ return "{mark}"; }}\n'
            text.write_text(marked, encoding="utf-8")
            _compile([text], target, f"-I{folder}")

    mark = fingerprint([path for path in _files(folder) if path.suffix == ".h"], source_text)
    return _kept(name, mark) or _keep(name, mark, f"{name} is not compiled yet", make)[0]


def compile_to(target: Path, folder: Path = HERE) -> None:
    """Compile the sources of a folder into a library at `target`, which appears whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    _compile(sources(folder), target, f'-DLB_FINGERPRINT="{fingerprint(_files(folder))}"')


def describe(folder: Path = HERE) -> dict[str, str | bool | None]:
    """What there is to load and to compile with, for `lowbit doctor`."""
    fault = _fault(shipped(folder), fingerprint(_files(folder)))
    found = {"shipped": fault or f"{shipped(folder)} (fresh)", "cache": str(next(places())), "compiler": compiler()}
    try:
        found["cached"] = (path := cached(folder)) and str(path)
        if cxx := compiler():
            found |= {"version": version(cxx), "flags": " ".join(flags(cxx)), "openmp": "-fopenmp" in flags(cxx)}
    except BuildError as error:
        found["problem"] = str(error)
    return found


def sources(folder: Path = HERE) -> list[Path]:
    """The C++ files, each compiled by itself."""
    return sorted(folder.glob("*.cpp"))


def device_sources() -> Path:
    """The folder of the CUDA sources: in the package once installed, at the top of the repository in a checkout.

    It is no module to ask importlib for: an `__init__.py` in it would hide NVIDIA's `cuda` from who runs in a checkout.
    """
    installed = HERE.parent / "cuda"
    return installed if installed.is_dir() else HERE.parents[1] / "cuda"


def shipped(folder: Path = HERE) -> Path:
    """Where installation puts the library: beside its sources."""
    return folder / f"_lowbit{SUFFIX}"


def cached(folder: Path = HERE) -> Path | None:
    """The library that was compiled before from these sources, by this compiler or, if there is none, by any."""
    return _kept("lowbit", fingerprint(_files(folder)))


def compiler() -> str | None:
    """The path of the C++ compiler that would be used, if there is one."""
    names = filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++"))
    return next((path for name in names if (path := shutil.which(name))), None)


@functools.cache
def version(compiler: str) -> str:
    """The first line of what the compiler says about itself."""
    return (_run([compiler, "--version"]).splitlines() or [""])[0]


@functools.cache
def flags(compiler: str) -> list[str]:
    """What to compile and link with: OpenMP where it is the one that torch uses too, else threads."""
    with tempfile.TemporaryDirectory() as work:
        probe = Path(work, "probe.cpp")
        probe.write_text(OPENMP)
        try:
            _run([compiler, *FLAGS, "-fopenmp", str(probe), "-o", str(probe.with_suffix(SUFFIX))])
        except BuildError:
            return [*FLAGS, "-pthread"]
    return [*FLAGS, "-fopenmp"]


def fingerprint(files: Iterable[Path], *more: str) -> str:
    """A hash of the files' names and bytes and of the texts."""
    parts = [part for path in files for part in (path.name.encode(), path.read_bytes())]
    parts += [text.encode() for text in more]
    return hashlib.sha256(b"".join(b"%d:%b" % (len(part), part) for part in parts)).hexdigest()


def _files(folder: Path) -> list[Path]:
    return sorted([*folder.glob("*.cpp"), *folder.glob("*.h")])


def _name(name: str, mark: str) -> str:
    """A library's file name in the cache; without a compiler a pattern, for what any compiler made of the sources."""
    if not (cxx := compiler()):
        return f"{name}-{mark[:16]}-*{SUFFIX}"
    # One home folder may serve machines of several kinds.
    made_by = fingerprint([], sys.platform, platform.machine(), version(cxx), *flags(cxx))
    return f"{name}-{mark[:16]}-{made_by[:16]}{SUFFIX}"


def _kept(name: str, mark: str) -> Path | None:
    paths = (path for place in places() for path in sorted(place.glob(_name(name, mark))))
    return next((path for path in paths if not _fault(path, mark)), None)


def _fault(library: Path, mark: str) -> str:
    """What is wrong with a library, if anything: missing, of other sources than those with the mark, not loadable."""
    try:
        # Read, and not asked: a stale library that was loaded once stays in the process.
        if mark.encode() not in library.read_bytes():
            return f"{library} was built from other sources"
        ctypes.CDLL(str(library))
    except OSError as error:
        return f"{library} does not load: {error}" if library.exists() else f"there is no {library}"
    return ""


def places(create: bool = False) -> Iterator[Path]:
    """The folders in which compiled libraries may be: the cache, and the one that replaces it."""
    own, home = os.environ.get("LOWBIT_CACHE"), os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    yield Path(os.path.abspath(os.path.expanduser(own))) if own else Path(home, "lowbit")
    posix = os.name == "posix"  # elsewhere each user has temporary files of their own
    with contextlib.suppress(OSError):
        spare = Path(tempfile.gettempdir(), f"lowbit-{os.getuid()}" if posix else "lowbit")
        if create:
            spare.mkdir(0o700, exist_ok=True)
        # Anyone can guess the name, and who put a library there would run in our process.
        info = spare.lstat()
        if stat.S_ISDIR(info.st_mode) and (not posix or (info.st_uid == os.getuid() and not info.st_mode & 0o022)):
            yield spare


def _keep(name: str, mark: str, why: str, make: Callable[[Path], None]) -> tuple[Path, bool, str]:
    """Have a library in the first folder that takes it. Returns it, whether we made it, and what was wrong before."""
    if not compiler():
        raise NoCompiler(f"{why}, and {NONE}, or do without it, slower: LOWBIT_BACKEND=reference")
    problems = []
    for place in places(create=True):
        path, made = place / _name(name, mark), False
        try:
            place.mkdir(0o700, parents=True, exist_ok=True)
            with one_at_a_time(path.with_suffix(".lock")):
                if _fault(path, mark):  # otherwise another process made it while we waited
                    make(path)
                    made = True
            problem = _fault(path, mark)
        except OSError as error:
            problem = f"cannot write {place}: {error.strerror or error}"
        if not problem:
            return path, made, "; ".join(problems)
        problems.append(problem)
    raise BuildError(f"{'; '.join(problems)}: set LOWBIT_CACHE to a folder to write to and load from")


@contextlib.contextmanager
def one_at_a_time(lock: Path) -> Iterator[None]:
    """Keep other processes waiting. Where files cannot be locked, all compile, and the last one's library stays."""
    with open(lock, "w") as file:
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _compile(files: list[Path], target: Path, *more: str) -> None:
    if not (cxx := compiler()):
        raise NoCompiler(NONE)
    # Beside the target and not among the temporary files: only within one file system is a replacement atomic.
    with tempfile.TemporaryDirectory(prefix=".build-", dir=target.parent, ignore_cleanup_errors=True) as work:
        objects = [f"{work}/{file.stem}.o" for file in files]
        commands = [
            [cxx, *flags(cxx), *more, "-c", str(file), "-o", obj] for file, obj in zip(files, objects, strict=True)
        ]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(_run, commands))
        made = Path(work, target.name)
        _run([cxx, *flags(cxx), *objects, "-o", str(made)])
        os.replace(made, target)


def _run(command: list[str]) -> str:
    """What a command prints. Raises `BuildError` with its first error if it fails."""
    try:
        # In English whatever the language is: the answers are part of keys.
        done = subprocess.run(command, env={**os.environ, "LC_ALL": "C"}, capture_output=True, errors="replace")
        output, failed = done.stdout + done.stderr, done.returncode
    except OSError as error:
        output, failed = str(error), True
    if failed:
        lines = output.splitlines()
        first = next((i for i, line in enumerate(lines) if "error" in line), 0)
        raise BuildError("\n".join([f"compiling failed: {shlex.join(command)}", *lines[first : first + 8]]))
    return output
