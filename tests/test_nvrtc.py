"""NVRTC: found wherever it may be, and what it makes of kernels for every architecture; no GPU is needed."""

import contextlib
import ctypes
import importlib.util
import platform
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest

from lowbit.gpu import CompileError, NoCompiler, nvrtc, sources
from lowbit.native import build

ROOT = Path(__file__).parents[1]
ARCHITECTURES = ["sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120a"]
KERNEL = """
#include "device.h"
__constant__ float factor;
extern "C" __global__ void __launch_bounds__(256) peak(const float *x, float *to, int64_t n) {
  LB_DYNAMIC_SHARED(bytes);
  const int64_t k = (int64_t)blockIdx.x * 256 + threadIdx.x;
  ((float *)bytes)[threadIdx.x] = k < n ? lb::fma(x[k], factor, 1.0f) * x[k] + x[k] : 0.0f;
  __syncthreads();
  const uint32_t most = lb::largest<32>(lb::magnitude_bits(((float *)bytes)[255 - threadIdx.x]));
  if (lb::lane() == 0) to[k / 32] = lb::float_of(lb::largest<8>(most));
}
"""


def found() -> dict[str, nvrtc.Nvrtc]:
    """Every NVRTC there is, by version."""
    libraries = {}
    for path in nvrtc.places():
        with contextlib.suppress(NoCompiler):
            library = nvrtc.Nvrtc(path)
            libraries.setdefault(f"{library.version[0]}.{library.version[1]}", library)
    return libraries


NVRTCS = found()
MISSING = pytest.param(None, marks=pytest.mark.skip(reason="no NVRTC: pip install nvidia-cuda-nvrtc"), id="none")
each_nvrtc = pytest.mark.parametrize("library", [pytest.param(v, id=k) for k, v in NVRTCS.items()] or [MISSING])


def test_the_wheels_for_developers_are_here():
    """On the machines that pyproject.toml names, nothing below may be skipped in silence."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        pytest.skip("NVRTC is among the development tools on Linux x86-64 only")
    if importlib.util.find_spec("nvidia") is None:
        pytest.skip("nvidia-cuda-nvrtc is not installed: pip install -e '.[dev]'")
    assert {version.split(".")[0] for version in NVRTCS} >= {"12", "13"}


def test_sources_are_all_headers_of_both_folders():
    texts = sources()
    there = [*(ROOT / "cuda").glob("*.cu"), *(ROOT / "cuda").glob("*.h"), *(ROOT / "lowbit" / "native").glob("*.h")]
    assert set(texts) == {path.name for path in there} | {"stdint.h"} and len(there) + 1 == len(texts)
    assert all(texts[path.name] == path.read_text() for path in there)


@each_nvrtc
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_kernels_compile_without_a_warning(library, arch):
    if int("".join(filter(str.isdigit, arch))) not in library.architectures():
        pytest.skip(f"NVRTC {library.version[0]}.{library.version[1]} is older than {arch}")
    cubin, log = library.compile(KERNEL, "kernel.cu", sources(), arch)
    assert log == "" and cubin.startswith(b"\x7fELF") and b"peak" in cubin and b"factor" in cubin
    assert library.compile(KERNEL, "kernel.cu", sources(), arch) == (cubin, log)


@each_nvrtc
def test_our_stdint_has_the_widths_it_names(library):
    checks = "".join(
        f"static_assert(sizeof({sign}int{bits}_t) == {bits // 8} && ({sign}int{bits}_t)-1 {'>' if sign else '<'} 0, "
        f'"{sign}int{bits}_t");\n'
        for bits in (8, 16, 32, 64)
        for sign in ("", "u")
    )
    checks += 'static_assert(sizeof(uintptr_t) == sizeof(void *) && sizeof(INT64_C(1)) == 8, "");\n'
    checks += 'static_assert(INT32_MAX == 0x7FFFFFFF && UINT32_MAX == 0xFFFFFFFF && INT64_MAX > 0, "");\n'
    library.compile(f"#include <stdint.h>\n{checks}", "kernel.cu", sources(), "sm_80")
    with pytest.raises(CompileError, match="static assertion failed"):
        library.compile(f"#include <stdint.h>\n{checks}".replace("== 8,", "== 4,"), "kernel.cu", sources(), "sm_80")


@each_nvrtc
def test_nothing_is_contracted_and_division_is_ieee(library):
    """Without -fmad=false the cubin would be another one; that says that the option reaches the compiler."""
    text = 'extern "C" __global__ void f(float *x) { x[0] = x[1] * x[2] + x[3]; }\n'
    cubin = library.compile(text, "kernel.cu", {}, "sm_80")[0]
    assert cubin != library.compile(text, "kernel.cu", {}, "sm_80", ["-fmad=true"])[0]
    explicit = text.replace("x[1] * x[2] + x[3]", "__fadd_rn(__fmul_rn(x[1], x[2]), x[3])")
    assert cubin == library.compile(explicit, "kernel.cu", {}, "sm_80")[0]


@each_nvrtc
def test_a_wrong_text_is_an_error_with_the_log(library):
    with pytest.raises(CompileError, match=r"step\.cu for sm_80 failed:\nbad\.h\(2\): error: .*nonsense") as error:
        library.compile('#include "bad.h"', "step.cu", {"bad.h": "\n__device__ int x = nonsense;\n"}, "sm_80")
    assert error.value.log.startswith("bad.h(2)")
    with pytest.raises(CompileError, match="cannot open source file"):
        library.compile('#include "missing.h"', "step.cu", {}, "sm_80")
    with pytest.raises(NoCompiler, match=r"NVRTC \d+\.\d+ at .*INVALID_OPTION"):
        library.compile("", "step.cu", {}, "sm_1")


@each_nvrtc
def test_what_a_kernel_takes_can_be_asked_for(library):
    log = library.compile(KERNEL, "kernel.cu", sources(), "sm_90a", ["--ptxas-options=-v"])[1]
    assert "registers" in log and "0 bytes spill stores" in log


# ---- what to compile for


class Some(nvrtc.Nvrtc):
    """An NVRTC that knows certain architectures."""

    def __init__(self, *known: int, version: tuple[int, int] = (13, 0)):
        self.known, self.version, self.path = list(known), version, "libnvrtc.so"

    def architectures(self) -> list[int]:
        return self.known


@pytest.mark.parametrize(
    ("capability", "known", "arch"),
    [
        ((8, 0), (75, 80, 86, 90), "sm_80"),
        ((8, 6), (75, 80, 86, 90), "sm_86"),
        ((8, 9), (75, 80, 86, 90), "sm_86"),  # the newest that is not newer
        ((9, 0), (80, 90), "sm_90a"),
        ((10, 3), (90, 100), "sm_100"),  # machine code for 10.0a would not run there
        ((12, 1), (90, 120, 121), "sm_121a"),
    ],
)
def test_a_gpu_gets_its_own_architecture_or_an_older_one_of_its_kind(capability, known, arch):
    assert nvrtc.architecture(capability, Some(*known)) == arch


@pytest.mark.parametrize("capability", [(10, 0), (13, 0)])
def test_a_gpu_newer_than_nvrtc_is_an_error_that_says_so(capability):
    with pytest.raises(NoCompiler, match=r"capability 1\d\.0, and NVRTC 12\.4 compiles for 8\.0, 9\.0: install"):
        nvrtc.architecture(capability, Some(80, 90, version=(12, 4)))


def test_a_gpu_that_is_too_old_is_an_error_that_says_so():
    with pytest.raises(NoCompiler, match=r"capability 7\.5, and the kernels need 8\.0 .*LOWBIT_BACKEND=reference"):
        nvrtc.architecture((7, 5), Some(75, 80))


# ---- where it is


FAKE = """
extern "C" int nvrtcVersion(int *major, int *minor) { return *major = %d, *minor = %d, 0; }
extern "C" const char *nvrtcGetErrorString(int) { return "error"; }
"""
OTHERS = [name for name in nvrtc._FUNCTIONS if name != "nvrtcVersion"]


@pytest.fixture
def nowhere(monkeypatch, tmp_path):
    """A machine on which there is no NVRTC; returns what puts one into a folder."""
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "cuda.pathfinder", None)  # importing it fails
    places = nvrtc.places
    monkeypatch.setattr(nvrtc, "places", lambda: (path for path in places() if str(tmp_path) in path))
    nvrtc.find.cache_clear()

    def put(folder: str, version: tuple[int, int], functions: list[str] = OTHERS) -> Path:
        path = tmp_path / folder / f"libnvrtc.so.{version[0]}"
        path.parent.mkdir(parents=True)
        text = FAKE % version + "".join(f'extern "C" int {name}() {{ return 0; }}\n' for name in functions)
        source = path.with_suffix(".cpp")
        source.write_text(text)
        cxx = build.compiler() or pytest.skip("no C++ compiler")
        subprocess.run([cxx, "-shared", "-fPIC", source, "-o", path], check=True)
        return path

    yield put
    nvrtc.find.cache_clear()


def test_without_nvrtc_a_sentence_says_where_it_comes_from(nowhere):
    with pytest.raises(NoCompiler, match=r"there is none \(nothing found\): torch for CUDA brings it, or pip install"):
        nvrtc.find()


@pytest.mark.parametrize("variable", ["CUDA_HOME", "CUDA_PATH"])
@pytest.mark.parametrize("inner", ["lib64", "lib", "targets/x86_64-linux/lib"])
def test_a_toolkit_is_found_by_its_variable(nowhere, tmp_path, monkeypatch, variable, inner):
    path = nowhere(f"toolkit/{inner}", (12, 9))
    monkeypatch.setenv(variable, str(tmp_path / "toolkit"))
    assert (nvrtc.find().path, nvrtc.find().version) == (str(path), (12, 9))


def pathfinder(find: Callable[[str], object]) -> types.SimpleNamespace:
    return types.SimpleNamespace(load_nvidia_dynamic_lib=find)


def test_nvidias_own_search_comes_before_ours(nowhere, tmp_path, monkeypatch):
    """With what it finds, unless that is newer than the driver."""
    theirs, ours = nowhere("theirs", (13, 0)), nowhere("toolkit/lib", (12, 9))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    asked = []

    def find(name: str) -> object:
        asked.append(name)
        return types.SimpleNamespace(abs_path=str(theirs))

    monkeypatch.setitem(sys.modules, "cuda.pathfinder", pathfinder(find))
    assert nvrtc.find(13).path == str(theirs) and asked == ["nvrtc"]
    assert nvrtc.find(12).path == str(ours)


def test_where_nvidias_search_finds_nothing_ours_goes_on(nowhere, tmp_path, monkeypatch):
    def fail(name: str) -> object:
        raise RuntimeError(f"no {name}")

    ours = nowhere("toolkit/lib", (12, 9))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    monkeypatch.setitem(sys.modules, "cuda.pathfinder", pathfinder(fail))
    assert nvrtc.find().path == str(ours)


@pytest.mark.parametrize(("folder", "version"), [("cu13", (13, 0)), ("cuda_nvrtc", (12, 9))])
def test_a_package_is_found(nowhere, tmp_path, monkeypatch, folder, version):
    path = nowhere(f"nvidia/{folder}/lib", version)

    spec = types.SimpleNamespace(submodule_search_locations=[str(tmp_path / "nvidia")])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    assert nvrtc.find().path == str(path)


@pytest.mark.skipif(sys.platform != "linux", reason="what a process has mapped is known on Linux")
def test_what_is_loaded_comes_first(nowhere, tmp_path, monkeypatch):
    loaded, other = nowhere("loaded", (13, 0)), nowhere("toolkit/lib", (13, 1))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    assert nvrtc.find().path == str(other)
    nvrtc.find.cache_clear()
    ctypes.CDLL(str(loaded))
    assert nvrtc.find().path == str(loaded)


def test_none_newer_than_the_driver_is_taken(nowhere, tmp_path, monkeypatch):
    nowhere("toolkit/lib", (13, 0))
    old = nowhere("old/lib", (12, 9))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    with pytest.raises(NoCompiler, match=r"is of CUDA 13, and the driver goes up to 12.*nvidia-cuda-nvrtc-cu12"):
        nvrtc.find(12)
    with pytest.raises(NoCompiler, match=r"the driver goes up to 11.*: update the driver, to CUDA 12 or later"):
        nvrtc.find(11)
    monkeypatch.setenv("CUDA_PATH", str(tmp_path / "old"))
    assert nvrtc.find(12).path == str(old)


def test_one_that_is_too_old_is_named(nowhere, tmp_path, monkeypatch):
    nowhere("toolkit/lib", (11, 0), [name for name in OTHERS if name != "nvrtcGetCUBIN"])
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    with pytest.raises(NoCompiler, match=r"libnvrtc.so.11 is too old, it has no nvrtcGetCUBIN"):
        nvrtc.find()
