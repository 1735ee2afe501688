"""Building and shipping the native library: found, cached, compiled once, and installed with or without a compiler."""

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from zipfile import ZipFile

import pytest

from lowbit.native import build

ROOT = Path(__file__).parents[1]
NATIVE = ROOT / "lowbit" / "native"
CXX = build.compiler()

ENTRY = """#include "abi.h"
int other();
extern "C" const char *lb_fingerprint(void) { return LB_FINGERPRINT; }
extern "C" int lb_answer(void) { return other() + ONE; }
"""

needs_compiler = pytest.mark.skipif(CXX is None, reason="no C++ compiler")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and temporary files to match: what runs here must not meet what a developer has compiled."""
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr(tempfile, "tempdir", None)  # asks the environment again
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Sources that stand in for the real ones and compile in no time."""
    path = tmp_path / "sources"
    path.mkdir()
    (path / "entry.cpp").write_text(ENTRY)
    (path / "other.cpp").write_text("int other() { return 41; }\n")
    (path / "abi.h").write_text("#pragma once\n#define ONE 1\n")
    return path


@pytest.fixture
def compiler_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """$CXX becomes the compiler behind a script that takes its time and writes down what it is asked."""
    wrapper, log = tmp_path / "cxx", tmp_path / "log"
    wrapper.write_text(f'#!/bin/sh\necho "$@" >> "{log}"\ncase " $* " in *entry*) sleep 0.3;; esac\nexec {CXX} "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("CXX", str(wrapper))
    return log


def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "/nowhere")


def compiled_files(log: Path) -> int:
    return sum(" -c " in line for line in log.read_text().splitlines())


def mark(path: Path) -> str:
    """What the library at a path says it was made of."""
    says = ctypes.CDLL(str(path)).lb_fingerprint
    says.restype = ctypes.c_char_p
    return says().decode()


def of(folder: Path) -> str:
    return build.fingerprint(build._files(folder))


# ---- what identifies a library


def test_every_byte_and_name_of_a_source_is_in_the_fingerprint(folder):
    def changes(path: Path, text: bytes) -> bool:
        before, kept = of(folder), path.read_bytes()
        path.write_bytes(text)
        after = of(folder)
        path.write_bytes(kept)
        assert of(folder) == before
        return after != before

    for path in list(folder.iterdir()):
        text = path.read_bytes()
        assert all(changes(path, text[:i] + bytes([text[i] ^ 1]) + text[i + 1 :]) for i in range(len(text)))
        assert changes(path, text + b"\n") and changes(path, text[:-1])
    before = of(folder)
    (folder / "abi.h").rename(folder / "abj.h")
    assert of(folder) != before
    # Nor can text move from one file to the next unseen.
    first, second = build.sources(folder)
    seen = set()
    for texts in ("1", f"2{second.name}3"), (f"1{second.name}2", "3"):
        for path, text in zip((first, second), texts, strict=True):
            path.write_text(text)
        seen.add(of(folder))
    assert len(seen) == 2


@needs_compiler
@pytest.mark.parametrize("what", ["flags", "version", "machine"])
def test_other_tools_make_another_file(folder, monkeypatch, what):
    first = build.find(folder=folder)
    assert build.find(folder=folder)[:2] == (first.path, "cache")
    if what == "flags":
        flags = build.flags(CXX)
        monkeypatch.setattr(build, "flags", lambda compiler: [*flags, "-DOTHER"])
    elif what == "version":
        monkeypatch.setattr(build, "version", lambda compiler: "g++ 99")
    else:
        monkeypatch.setattr(build.platform, "machine", lambda: "pdp11")
    second = build.find(folder=folder)
    assert second.origin == "compiled" and second.path != first.path


@needs_compiler
def test_no_flag_lets_a_bit_differ(folder):
    flags = build.flags(CXX)
    assert {"-ffp-contract=off", "-O3", "-std=c++17"} <= set(flags)
    assert not [flag for flag in flags if "fast-math" in flag or flag.startswith(("-march", "-mcpu", "-mtune"))]
    assert ("-fopenmp" in flags) != ("-pthread" in flags)


def test_without_openmp_threads(folder, tmp_path, monkeypatch):
    """A compiler that refuses -fopenmp, as macOS's does."""
    script = tmp_path / "cxx"
    script.write_text('#!/bin/sh\ncase " $* " in *" -fopenmp "*) echo "error: no such option" >&2; exit 1;; esac\n')
    script.chmod(0o755)
    assert build.flags(str(script)) == [*build.FLAGS, "-pthread"]


# ---- which library is taken


@needs_compiler
def test_the_shipped_library_is_taken_if_it_is_of_these_sources(folder, cache, monkeypatch):
    build.compile_to(build.shipped(folder), folder)
    no_compiler(monkeypatch)
    found = build.find(folder=folder)
    assert found[:2] == (build.shipped(folder), "shipped") and found.reason == ""
    assert mark(found.path) == of(folder)
    assert not cache.exists()


@needs_compiler
@pytest.mark.parametrize("file", ["abi.h", "other.cpp"])
def test_a_stale_shipped_library_is_not_taken(folder, file):
    build.compile_to(build.shipped(folder), folder)
    (folder / file).write_text((folder / file).read_text().replace("1\n", "2\n").replace("41", "42"))
    found = build.find(folder=folder)
    assert found.origin == "compiled" and "_lowbit" in found.reason and "other sources" in found.reason
    assert mark(found.path) == of(folder) != mark(build.shipped(folder))
    assert ctypes.CDLL(str(found.path)).lb_answer() == 43


@needs_compiler
def test_a_shipped_library_for_another_machine_is_not_taken(folder):
    build.shipped(folder).write_bytes(b"\x7fELF of somewhere else" + of(folder).encode())
    found = build.find(folder=folder)
    assert found.origin == "compiled" and "does not load" in found.reason


@needs_compiler
def test_a_damaged_cache_is_mended(folder):
    path = build.find(folder=folder).path
    size = path.stat().st_size
    path.unlink()  # not written over: this process has it loaded
    path.write_bytes(b"half")
    found = build.find(folder=folder)
    assert found[:2] == (path, "compiled") and path.stat().st_size == size


@needs_compiler
def test_what_was_compiled_serves_where_there_is_no_compiler(folder, monkeypatch):
    path = build.find(folder=folder).path
    rule = build.compile_extra("int f();", "rule", folder)
    no_compiler(monkeypatch)
    assert build.find(folder=folder)[:2] == (path, "cache")
    assert build.compile_extra("int f();", "rule", folder) == rule


# ---- what cannot be built


def test_no_compiler_is_a_sentence_that_says_what_to_do(folder, cache, monkeypatch):
    no_compiler(monkeypatch)
    with pytest.raises(build.NoCompiler) as error:
        build.find(folder=folder)
    message = str(error.value)
    assert "there is no C++ compiler" in message and "LOWBIT_BACKEND=reference" in message and "install one" in message
    assert str(build.shipped(folder)) in message and "\n" not in message
    with pytest.raises(build.NoCompiler, match="myrule is not compiled yet, and there is no C"):
        build.compile_extra("", "myrule", folder)
    assert not cache.exists()


@needs_compiler
def test_a_broken_source_gives_the_command_and_the_first_error(folder, cache):
    (folder / "other.cpp").write_text("#warning first\nint other() { return nonsense; }\nint x = more_nonsense;\n")
    with pytest.raises(build.BuildError) as error:
        build.find(folder=folder)
    command, first = str(error.value).splitlines()[:2]
    assert str(CXX) in command and "-ffp-contract=off" in command and "other.cpp" in command
    assert "other.cpp:2" in first and "nonsense" in first
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


def test_a_compiler_that_fails_does_not_fail_the_doctor(folder, tmp_path, monkeypatch):
    script = tmp_path / "cxx"
    script.write_text("#!/bin/sh\necho no licence >&2; exit 1\n")
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    assert "no licence" in str(build.describe(folder)["problem"])
    with pytest.raises(build.BuildError, match="no licence"):
        build.find(folder=folder)


def test_nothing_to_compile(tmp_path):
    with pytest.raises(build.BuildError, match="no C\\+\\+ sources"):
        build.find(folder=tmp_path)


def test_not_compiled_unless_allowed(folder, cache):
    with pytest.raises(build.BuildError, match="not to be compiled"):
        build.find(compile=False, folder=folder)
    assert not cache.exists()


# ---- where it is kept


@pytest.mark.parametrize(
    ("env", "place"),
    [
        ({"LOWBIT_CACHE": "/a/b"}, "/a/b"),
        ({"LOWBIT_CACHE": "~/b"}, "/h/b"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/lowbit"),
        ({"LOWBIT_CACHE": "", "XDG_CACHE_HOME": ""}, "/h/.cache/lowbit"),
    ],
)
def test_the_cache_is_where_the_docstring_says(monkeypatch, env, place):
    for name in ("LOWBIT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "/h", **env}.items():
        monkeypatch.setenv(name, value)
    assert build.describe()["cache"] == place


@needs_compiler
def test_a_cache_that_cannot_be_written_is_replaced_and_said(folder, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path / "file" / "cache"))  # root may write anywhere else
    found = build.find(folder=folder)
    assert found.origin == "compiled" and f"cannot write {tmp_path}/file/cache" in found.reason
    assert found.path.is_relative_to(tmp_path / "tmp") and found.path.parent.stat().st_mode & 0o777 == 0o700
    assert build.find(folder=folder)[:2] == (found.path, "cache")


@needs_compiler
@pytest.mark.parametrize("trap", ["open", "link"])
def test_a_folder_that_others_could_have_filled_is_not_used(folder, tmp_path, monkeypatch, trap):
    (tmp_path / "file").touch()
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path / "file" / "cache"))
    spare = build.find(folder=folder).path.parent
    if trap == "open":
        spare.chmod(0o777)
    else:
        spare.rename(tmp_path / "elsewhere")
        spare.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(build.BuildError, match="set LOWBIT_CACHE"):
        build.find(folder=folder)


FIND = """
import ctypes, json, sys, time
from pathlib import Path
if sys.argv[3] == "no-locks":
    sys.modules["fcntl"] = None
import importlib.util
spec = importlib.util.spec_from_file_location("build", sys.argv[1])
build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)
found = build.find(folder=Path(sys.argv[2]))
print(json.dumps([str(found.path), found.origin, ctypes.CDLL(str(found.path)).lb_answer()]))
"""


def finder(folder: Path, locks: str = "locks") -> subprocess.Popen:
    """A process that has neither torch nor lowbit and looks for the library."""
    command = [sys.executable, "-I", "-S", "-c", FIND, str(NATIVE / "build.py"), str(folder), locks]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)


@needs_compiler
@pytest.mark.parametrize("locks", ["locks", "no-locks"])
def test_processes_that_start_together_all_load_and_one_compiles(folder, cache, compiler_log, locks):
    running = [finder(folder, locks) for _ in range(4)]
    answers = [json.loads(process.communicate()[0]) for process in running]
    assert {tuple(answer[::2]) for answer in answers} == {(answers[0][0], 42)}
    files = len(build.sources(folder))
    if locks == "locks":
        assert sorted(answer[1] for answer in answers) == ["cache", "cache", "cache", "compiled"]
        assert compiled_files(compiler_log) == files
    else:
        assert compiled_files(compiler_log) > files, "they did not start together"
    assert {path.suffix for path in cache.iterdir()} == {build.SUFFIX, ".lock"}


@needs_compiler
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("when", ["entry.cpp", "other.o -o"])
def test_interrupted_compiling_leaves_nothing_half_written(folder, cache, compiler_log, when, how):
    compiler_log.touch()
    process = finder(folder)
    while when not in compiler_log.read_text() and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, how)
    process.communicate()
    assert process.returncode != 0
    assert not list(cache.glob(f"*{build.SUFFIX}"))
    if how == signal.SIGINT:
        assert {path.suffix for path in cache.iterdir()} == {".lock"}
    assert build.find(folder=folder).origin == "compiled"  # the lock died with its owner


# ---- a rule's own library


@needs_compiler
def test_a_generated_text_is_compiled_once_and_again_when_a_header_changes(folder, compiler_log):
    text = '#include "abi.h"\nextern "C" int seven() { return 6 + ONE; }'
    path = build.compile_extra(text, "seven", folder)
    assert ctypes.CDLL(str(path)).seven() == 7 and path.name.startswith("seven-")
    assert build.compile_extra(text, "seven", folder) == path and compiled_files(compiler_log) == 1
    (folder / "abi.h").write_text("#pragma once\n#define ONE 2\n")
    other = build.compile_extra(text, "seven", folder)
    assert ctypes.CDLL(str(other)).seven() == 8 and other != path
    assert build.compile_extra(text + " ", "seven", folder) not in (path, other)


# ---- installed

# Runs outside the checkout.
INSTALLED = """
import json, sys
from importlib.metadata import distribution
import lowbit
from lowbit.native import build
installed = distribution("lowbit")
try:
    found = build.find(compile=False)
    origin, path = found.origin, str(found.path)
except build.BuildError as error:
    origin, path = "none", str(error)
print(json.dumps({
    "home": lowbit.__file__, "origin": origin, "path": path,
    "names": [str(file) for file in installed.files], "wheel": installed.read_text("WHEEL"),
    "sources": sorted(p.name for p in build._files(build.HERE)),
    "cuda": sorted(p.name for p in build.device_sources().iterdir()), "cuda_at": str(build.device_sources()),
}))
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what is built from, as a fresh clone has it."""
    copy = tmp_path / "checkout"
    for name in ("lowbit", "cuda"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "_lowbit.*"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    return copy


@pytest.fixture
def light_checkout(checkout: Path) -> Path:
    """The same with sources that compile in no time: these tests ask where things are, not what they compute."""
    for path in build.sources(checkout / "lowbit/native"):
        path.unlink()
    (checkout / "lowbit/native/entry.cpp").write_text(
        'extern "C" const char *lb_fingerprint() { return LB_FINGERPRINT; }'
    )
    return checkout


class Environment:
    """A virtual environment that sees the packages of this one, but not what is installed here in editable form."""

    def __init__(self, folder: Path):
        self.folder = folder
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
        self.python = str(folder / "bin" / "python")
        own = self.run("import sysconfig; print(sysconfig.get_path('purelib'))").strip()
        # Paths in a .pth file are added; the .pth files that lie there are not read.
        Path(own, "outer.pth").write_text("\n".join({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}))
        if find_spec("setuptools") is None or int(version("setuptools").split(".")[0]) < 77:
            self.pip("--constraint", str(ROOT / "constraints.txt"), "setuptools>=77")

    def run(self, *code: str, **environ: str) -> str:
        return self.done(*code, **environ).stdout

    def done(self, *code: str, **environ: str) -> subprocess.CompletedProcess[str]:
        env = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "COV_"))}
        command = [self.python, *(code if len(code) > 1 else ("-c", *code))]
        done = subprocess.run(command, cwd=self.folder, env={**env, **environ}, capture_output=True, text=True)
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        return done

    def pip(self, *args: str, **environ: str) -> str:
        # -I: the lowbit that the outer packages hold in editable form counts as installed otherwise.
        options = ["--disable-pip-version-check", "-v", "-I", "--no-deps", "--no-build-isolation"]
        done = self.done("-m", "pip", "install", *options, *args, **environ)
        return done.stdout + done.stderr

    def look(self, **environ: str) -> dict:
        return json.loads(self.run(INSTALLED, **environ))


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    return Environment(tmp_path / "venv")


def backend(environment: Environment, checkout: Path, out: Path, what: str, **environ: str) -> Path:
    code = f"import os, setuptools.build_meta as b; os.chdir({str(checkout)!r}); print(b.build_{what}({str(out)!r}))"
    out.mkdir(exist_ok=True)
    return out / environment.run(code, **environ).splitlines()[-1]


def here(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix in (".cpp", ".h"))


@needs_compiler
def test_installing_the_sdist_brings_library_sources_and_cuda(checkout, environment, tmp_path):
    sdist = backend(environment, checkout, tmp_path / "dist", "sdist")
    with tarfile.open(sdist) as archive:
        inside = [name.partition("/")[2] for name in archive.getnames()]
    native, cuda = here(checkout / "lowbit/native"), sorted(path.name for path in (ROOT / "cuda").iterdir())
    assert {"setup.py", *(f"lowbit/native/{name}" for name in native), *(f"cuda/{name}" for name in cuda)} <= {*inside}
    assert not [name for name in inside if "_lowbit." in name]

    quick = tmp_path / "quick"  # the same compiler, which does not optimize
    quick.write_text(f'#!/bin/sh\nexec {CXX} "$@" -O0\n')
    quick.chmod(0o755)
    said = environment.pip(str(sdist), CXX=str(quick))
    seen = environment.look(PATH="/nowhere", CXX="")
    assert seen["home"].startswith(str(environment.folder)) and seen["origin"] == "shipped", said
    assert "Tag: py3-none-" in seen["wheel"] and "-any" not in seen["wheel"]
    assert f"lowbit/native/_lowbit{build.SUFFIX}" in seen["names"] and seen["sources"] == native
    assert seen["cuda"] == cuda and seen["cuda_at"].startswith(str(environment.folder))


@needs_compiler
def test_an_editable_install_builds_in_place(light_checkout, environment):
    environment.pip("-e", str(light_checkout))
    seen = environment.look(PATH="/nowhere", CXX="")
    assert seen["home"].startswith(str(light_checkout)) and seen["origin"] == "shipped", seen
    assert seen["path"] == str(light_checkout / f"lowbit/native/_lowbit{build.SUFFIX}")
    assert seen["cuda_at"] == str(light_checkout / "cuda") and "README.md" in seen["cuda"]


def test_without_a_compiler_installing_works_and_importing_too(light_checkout, environment, tmp_path):
    none = {"PATH": "/nowhere", "CXX": ""}
    if CXX:  # an earlier build of the same checkout must not lend its library
        assert "-any" not in backend(environment, light_checkout, tmp_path / "before", "wheel").name
    wheel = backend(environment, light_checkout, tmp_path / "dist", "wheel", **none)
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not [name for name in ZipFile(wheel).namelist() if "_lowbit." in name]
    said = environment.pip("-e", str(light_checkout), **none)
    assert "without the native library" in said and "there is no C++ compiler" in said
    seen = environment.look(**none)
    assert seen["origin"] == "none" and seen["home"].startswith(str(light_checkout))
    assert seen["sources"] == here(light_checkout / "lowbit/native")
