"""The launcher, on the emulator's driver, by ctypes and cuda-bindings: arguments, memory, streams, graphs, errors."""

import ctypes
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from ctypes import Structure, byref, c_double, c_float, c_int, c_int8, c_int64, c_uint16, c_void_p
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "emulator"))
import emulator
from emulator import Emulator

from lowbit.gpu import Arguments, CompileError, DriverError, NoDriver, entries, machine, machines, sources
from lowbit.gpu import cache as gpu_cache

pytestmark = pytest.mark.skipif(emulator.compiler() is None, reason="no g++")

SOURCE = """
#include <stdint.h>
struct Mixed { int8_t a; double b; uint16_t c[3]; };
extern "C" __global__ void scale(float *x, int n, const float *factor) {
  const int k = (int)(blockIdx.x * blockDim.x + threadIdx.x);
  if (k < n) x[k] *= *factor;
}
extern "C" __global__ void store(double *to, int8_t a, float b, int64_t c, double d, Mixed e, Mixed *f, bool g) {
  to[0] = a, to[1] = b, to[2] = (double)c, to[3] = d, to[4] = e.a, to[5] = e.b, to[6] = e.c[2], to[7] = f->b, to[8] = g;
}
extern "C" __global__ void
__launch_bounds__(64, (2 + 2)) count(unsigned *to) {
  LB_DYNAMIC_SHARED(bytes);
  bytes[threadIdx.x] = 1;
  atomicAdd(to, (unsigned)bytes[threadIdx.x]);
}
"""


class Mixed(Structure):
    _fields_ = [("a", c_int8), ("b", c_double), ("c", c_uint16 * 3)]


BY_BINDINGS = "LOWBIT_DRIVER_BY_BINDINGS"  # set in the process that `test_cuda_bindings_do_the_same` starts


@pytest.fixture
def gpu() -> Emulator:
    return Emulator(bindings=BY_BINDINGS in os.environ)


@pytest.fixture
def module(gpu):
    return gpu.module(SOURCE, sources())


def at(x: torch.Tensor) -> c_void_p:
    return c_void_p(x.data_ptr())


THREE = torch.tensor(3.0)


def calls(gpu: Emulator, act: Callable[[], object]) -> list[str]:
    """What reaches the driver, in its order."""
    library = gpu.library
    library.emulator_calls.restype = ctypes.c_char_p
    library.emulator_note_calls(1)
    try:
        act()
        return library.emulator_calls().decode().splitlines()
    finally:
        library.emulator_note_calls(0)


# ---- launches


def test_arguments_of_every_kind_arrive(gpu, module):
    to, there = torch.zeros(9, dtype=torch.float64), Mixed(1, 2.5, (1, 2, 3))
    arguments = [at(to), c_int8(-5), c_float(0.25), c_int64(-(1 << 40)), c_double(1e300), Mixed(-1, 7.0, (8, 9, 65535))]
    gpu.launch(module.function("store"), 1, 1, [*arguments, c_void_p(ctypes.addressof(there)), ctypes.c_bool(True)])
    assert to.tolist() == [-5, 0.25, -(2.0**40), 1e300, -1, 7, 65535, 2.5, 1]


@pytest.mark.parametrize("arguments", [[c_void_p(0)], [c_void_p(0), c_int64(1), c_void_p(0)], [c_int(1)] * 3])
def test_arguments_of_other_sizes_are_refused(gpu, module, arguments):
    with pytest.raises(TypeError, match=r"scale takes arguments of \[8, 4, 8\] bytes, not of"):
        gpu.launch(module.function("scale"), 1, 1, arguments)


def not_found(*inputs: object) -> tuple:
    raise RuntimeError("function cuFuncGetParamInfo is not found")


@pytest.mark.parametrize("ask", [{}, {"cuFuncGetParamInfo": not_found}])
def test_a_driver_that_cannot_tell_sizes_is_believed(gpu, module, monkeypatch, ask):
    others = {name: entry for name, entry in gpu.driver._functions.items() if name not in entries.LATER}
    monkeypatch.setattr(gpu.driver, "_functions", {**others, **ask})
    monkeypatch.setattr(module, "_functions", {})
    x = torch.ones(3)
    gpu.launch(module.function("scale"), 1, 32, [at(x), c_int(2), at(THREE)])
    assert x.tolist() == [3, 3, 1]


def test_arguments_that_are_kept_are_read_in_every_launch(gpu, module):
    x, count = torch.ones(3), c_int(1)
    arguments = Arguments([at(x), count, at(THREE)])
    for value in (1, 2, 3):
        count.value = value
        gpu.launch(module.function("scale"), 1, 32, arguments)
    assert x.tolist() == [27, 9, 3]
    with pytest.raises(TypeError, match=r"scale takes arguments of \[8, 4, 8\] bytes, not of \[8\]"):
        gpu.launch(module.function("scale"), 1, 32, Arguments([at(x)]))


def test_a_stream_is_held_by_the_thread_that_says_so(gpu, module):
    x, function = torch.ones(1), module.function("scale")
    gpu.current = 5

    def launch() -> None:
        gpu.launch(function, 1, 1, [at(x), c_int(1), at(THREE)])

    def act() -> None:
        with gpu.held():
            gpu.current = 6
            launch()
            with gpu.held():
                launch()
            launch()
            thread = threading.Thread(target=launch)
            thread.start()
            thread.join()
        launch()

    said = [call for call in calls(gpu, act) if call.startswith("launch")]
    assert said == [f"launch scale on {stream}" for stream in (5, 6, 5, 6, 6)]
    assert gpu.driver.call("cuCtxGetCurrent", doing="") == 0  # as it was


@pytest.mark.parametrize(("grid", "block"), [(1, 1), (1, 64), (7, 33), (300, 64)])
def test_a_grid_has_its_blocks_and_threads(gpu, module, grid, block):
    to = torch.zeros(1, dtype=torch.int32)
    gpu.launch(module.function("count"), grid, block, [at(to)], shared=block)
    assert to.item() == grid * block


def test_shared_memory_beyond_48_kib_is_asked_for(gpu, module):
    to = torch.zeros(1, dtype=torch.int32)
    function = module.function("count")
    gpu.launch(function, 1, 32, [at(to)], shared=100 << 10)
    assert to.item() == 32 and function.dynamic == 100 << 10
    with pytest.raises(DriverError, match=r"asking for 307200 bytes of shared memory: .*INVALID_VALUE"):
        gpu.launch(function, 1, 32, [at(to)], shared=300 << 10)


@pytest.mark.parametrize(
    ("grid", "block", "said"),
    [
        (0, 32, r"launching count, 0 blocks of 32 threads with 32 bytes of dynamic shared memory: .*INVALID_VALUE"),
        (1, 0, "INVALID_VALUE"),
        (1, 1025, "INVALID_VALUE"),
        (1, 65, r"LAUNCH_OUT_OF_RESOURCES\); the block is larger than the kernel allows"),
    ],
)
def test_a_launch_that_cannot_be_is_described(gpu, module, grid, block, said):
    to = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(DriverError, match=said):
        gpu.launch(module.function("count"), grid, block, [at(to)], shared=32)
    assert to.item() == 0


def test_what_a_module_lacks_is_named(module):
    with pytest.raises(DriverError, match=r"looking for the kernel missing: .*CUDA_ERROR_NOT_FOUND"):
        module.function("missing")


def test_a_kernel_tells_what_it_takes(module):
    found = module.function("count").resources()
    assert found["threads"] == 64 and found["shared"] == 0 and set(found) == {"registers", "local", "shared", "threads"}


def test_any_thread_may_launch(gpu, module):
    two, x = torch.tensor(2.0), [torch.ones(100) for _ in range(8)]

    def launch(one: torch.Tensor) -> None:
        for _ in range(5):
            gpu.launch(module.function("scale"), 4, 32, [at(one), c_int(100), at(two)])

    threads = [threading.Thread(target=launch, args=(one,)) for one in x]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(one, torch.full((100,), 32.0)) for one in x)
    assert gpu.driver.call("cuCtxGetCurrent", doing="") == 0  # as it was


# ---- memory


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 1 << 20])
def test_writes_of_any_size(gpu, size):
    data = torch.randint(0, 256, (size,), dtype=torch.uint8)
    x, given = torch.zeros(size + 1, dtype=torch.uint8), bytearray(data.numpy().tobytes())
    gpu.write(x.data_ptr(), bytes(given))
    given[:] = b"\xff" * size
    assert torch.equal(x[:size], data) and x[size] == 0


def test_pinned_memory_is_used_again_once_its_copy_is_done(gpu, monkeypatch):
    x, done = torch.zeros(5000, dtype=torch.uint8), False
    monkeypatch.setattr(gpu.driver, "reached", lambda event: done)
    for _ in range(3):
        gpu.write(x.data_ptr(), b"abc")
    stages = gpu._staging.stages
    assert len(stages) == 3 and len({stage[0] for stage in stages}) == 3
    done = True
    for _ in range(3):
        gpu.write(x.data_ptr(), b"abc")
    assert len(gpu._staging.stages) == 3
    gpu.write(x.data_ptr(), bytes(5000))
    assert [stage[1] for stage in stages] == [4096, 4096, 4096, 8192]


# ---- streams and graphs


def test_streams_run_a_module_side_by_side(gpu, module):
    """A kernel has no variables, so no stream waits for another, and writes are ordered by streams alone."""
    x, function = torch.ones(1), module.function("scale")

    def act() -> None:
        for gpu.current in (11, 12, 11):
            gpu.launch(function, 1, 1, [at(x), c_int(1), at(THREE)])
            gpu.write(x.data_ptr(), bytes(4))

    def on(stream: int) -> list[str]:
        return [f"{what} on {stream}" for what in ("launch scale", "write", "record")]

    assert calls(gpu, act) == [*on(11), *on(12), *on(11)]


def test_a_graph_replays_launches(gpu, module):
    factors = torch.tensor([2.0])
    x, function = torch.ones(70), module.function("scale")
    gpu.current = 5
    gpu.launch(function, 3, 32, [at(x), c_int(0), at(factors)])
    library, graph = gpu.library, c_void_p()
    assert not gpu.capturing()
    assert library.cuStreamBeginCapture_v2(c_void_p(5), 0) == 0
    assert gpu.capturing()
    with pytest.raises(RuntimeError, match="host values cannot be written while a CUDA graph is captured"):
        gpu.write(factors.data_ptr(), bytes(4))
    with pytest.raises(RuntimeError, match="do one step before the graph is captured"):
        gpu.module(SOURCE + "// another", sources())
    count = c_int(70)
    gpu.launch(function, 3, 32, [at(x), count, at(factors)])
    count.value = 1  # what a graph launches with is what it was captured with
    assert library.cuStreamEndCapture(c_void_p(5), byref(graph)) == 0
    assert not gpu.capturing() and torch.equal(x, torch.ones(70))
    for factor in (2.0, 5.0):
        factors.fill_(factor)
        x.fill_(1.0)
        with gpu.driver.within(gpu.context):
            assert library.cuGraphLaunch(graph, c_void_p(5)) == 0
        assert torch.equal(x, torch.full((70,), factor))
    gpu.module(SOURCE + "// another", sources())


# ---- modules and the cache


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def counted(gpu: Emulator, monkeypatch) -> list[str]:
    made, compile = [], gpu.compiler.compile
    monkeypatch.setattr(gpu.compiler, "compile", lambda *a: (made.append(a[0]), compile(*a))[1])
    return made


def test_a_text_is_compiled_once(gpu, empty_cache, monkeypatch):
    made = counted(gpu, monkeypatch)
    first = gpu.module(SOURCE, sources())
    assert gpu.module(SOURCE, dict(sources())) is first and len(made) == 1
    other = Emulator()
    again = counted(other, monkeypatch)
    assert other.module(SOURCE, sources()) is not first and not again
    assert len([path for path in empty_cache.iterdir() if path.name.startswith("kernel-emulator")]) == 2  # and a lock


@pytest.mark.parametrize("what", ["source", "header's text", "header's name", "compiler"])
def test_whatever_changes_what_is_made_is_compiled_anew(gpu, empty_cache, monkeypatch, what):
    made, headers, source = counted(gpu, monkeypatch), {**sources(), "a.h": "//"}, SOURCE
    gpu.binary(source, headers)
    if what == "source":
        source += "//"
    elif what == "header's text":
        headers["device.h"] += "//"
    elif what == "header's name":
        headers["b.h"] = headers.pop("a.h")
    else:
        gpu.compiler.key += "2"
    gpu.binary(source, headers)
    assert len(made) == 2
    gpu.binary(source, headers)
    assert len(made) == 2


def test_a_damaged_file_is_made_again(empty_cache):
    assert gpu_cache.kept("x", "key", lambda: b"good") == b"good"
    path = empty_cache / "x-key"
    for damage in (b"", b"half", path.read_bytes()[:-1], path.read_bytes()[1:]):
        path.write_bytes(damage)
        assert gpu_cache.kept("x", "key", lambda: b"new") == b"new"
        assert gpu_cache.kept("x", "key", lambda: b"newer") == b"new"


def test_a_cache_that_cannot_be_written_is_a_warning(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(gpu_cache.build, "places", lambda create=False: iter([tmp_path / "file" / "no"]))
    with pytest.warns(RuntimeWarning, match="x is compiled by every process; set LOWBIT_CACHE"):
        assert gpu_cache.kept("x", "key", lambda: b"made") == b"made"


def test_an_error_of_what_compiles_is_not_taken_for_the_caches(empty_cache):
    def make() -> bytes:
        raise CompileError("x", "its log")

    with pytest.raises(CompileError, match="its log"):
        gpu_cache.kept("x", "key", make)
    assert gpu_cache.kept("x", "key", lambda: b"good") == b"good"
    assert [path.name for path in empty_cache.iterdir() if path.name.startswith(".made")] == []


def test_several_texts_are_compiled_at_once(gpu, empty_cache, monkeypatch):
    inside, both, compile = [], threading.Barrier(2, timeout=60), gpu.compiler.compile

    def together(*texts):
        both.wait()  # or nobody gets further
        inside.append(texts)
        return compile(*texts)

    monkeypatch.setattr(gpu.compiler, "compile", together)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    texts = [(SOURCE + "// 1", sources()), (SOURCE + "// 2", sources()), (SOURCE + "// 1", sources())]
    first, second, third = gpu.prefetch(texts)
    assert len(inside) == 2 and first is third is not second and gpu.module(*texts[1]) is second


def test_a_text_that_fails_may_be_tried_again(gpu, empty_cache, monkeypatch):
    compile = gpu.compiler.compile
    with pytest.raises(CompileError, match=r"kernel\.cu:1:"):
        gpu.module("nonsense", sources())
    monkeypatch.setattr(gpu.compiler, "compile", lambda source, headers: compile(SOURCE, headers))
    assert gpu.module("nonsense", sources()).function("scale")


def test_headers_given_with_a_text_are_those_it_includes(gpu):
    source = '#include "spec.h"\nextern "C" __global__ void f(int *x) { *x = SPEC; }\n'
    for value in (3, 4):
        x = torch.zeros(1, dtype=torch.int32)
        module = gpu.module(source, {**sources(), "spec.h": f"#define SPEC {value}\n"})
        gpu.launch(module.function("f"), 1, 1, [at(x)])
        assert x.item() == value


# ---- what is missing


def test_no_driver_is_a_sentence():
    with pytest.raises(NoDriver, match=r"there is no CUDA driver here .*install NVIDIA's .*or use CPU tensors"):
        entries.of_library("libcuda-of-nobody.so")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a driver here")
def test_no_driver_is_a_sentence_by_cuda_bindings():
    if entries.of_bindings() is None:
        pytest.skip("cuda-bindings is not installed")
    # In a process of its own: in this one the emulator may have NVIDIA's name.
    code = "from lowbit.gpu.driver import Driver\ntry: Driver()\nexcept Exception as error: print(type(error), error)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "NoDriver" in said and "there is no CUDA driver here" in said and "or use CPU tensors" in said


@pytest.mark.skipif(BY_BINDINGS in os.environ, reason="this is that process")
def test_cuda_bindings_do_the_same():
    """All tests of this file. In a process of its own: NVRTC, too, would take a library that has NVIDIA's name."""
    if reason := emulator.without_bindings():
        pytest.skip(reason)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", __file__]
    done = subprocess.run(command, env={**os.environ, BY_BINDINGS: "1"}, capture_output=True, text=True)
    passed = re.search(r"(\d+) passed", done.stdout)
    assert done.returncode == 0 and passed and int(passed[1]) > 40, done.stdout[-4000:] + done.stderr[-1000:]


def test_the_way_to_the_driver_is_told(gpu):
    assert gpu.driver.by.startswith("cuda-bindings " if BY_BINDINGS in os.environ else "ctypes")


def test_cuda_bindings_come_first(monkeypatch):
    """Unless they are not there, are too old, or mean another stream by 0 than torch does."""
    functions = {name.removesuffix("_v2"): lambda *inputs: (0, *inputs) for name in entries.FUNCTIONS}
    numbers = {"CUresult": lambda x: ("result", x), "CUfunction_attribute": lambda x: ("attribute", x)}
    modules = {"cuda.bindings": SimpleNamespace(__version__="13.0.3"), "cuda.bindings.driver": SimpleNamespace()}
    vars(modules["cuda.bindings.driver"]).update({**functions, **numbers})
    for name, there in modules.items():
        monkeypatch.setitem(sys.modules, name, there)
    monkeypatch.setattr(entries, "of_library", lambda path: path)
    monkeypatch.delenv(entries.PER_THREAD, raising=False)
    found = entries.of_nvidia()
    assert found.by == "cuda-bindings 13.0.3" and found.functions.keys() == entries.FUNCTIONS.keys()
    assert found.functions["cuFuncSetAttribute"](5, 8, 99) == (0, 5, ("attribute", 8), 99)
    assert found.functions["cuGetErrorName"](700) == (0, ("result", 700))
    monkeypatch.setenv(entries.PER_THREAD, "1")
    assert entries.of_nvidia() == entries.LIBRARY
    monkeypatch.setenv(entries.PER_THREAD, "0")
    assert entries.of_nvidia().by == "cuda-bindings 13.0.3"
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)  # importing it fails
    assert entries.of_nvidia() == entries.LIBRARY


def test_a_driver_that_lacks_something_is_too_old(tmp_path):
    (tmp_path / "old.cpp").write_text('extern "C" int cuInit(unsigned flags) { return (int)flags; }\n')
    path = tmp_path / "libold.so"
    subprocess.run([emulator.compiler(), "-shared", "-fPIC", tmp_path / "old.cpp", "-o", path], check=True)
    with pytest.raises(NoDriver, match=r"libold.so has no cuDriverGetVersion: install a newer one"):
        entries.of_library(str(path))


def test_what_cannot_be_loaded_names_both_versions(gpu, monkeypatch):
    monkeypatch.setattr(gpu, "binary", lambda source, headers: b"PTX" * 100)
    with pytest.raises(RuntimeError) as error:
        gpu.module("", {})
    said = str(error.value)
    assert "CUDA_ERROR_INVALID_IMAGE" in said and "Made for emulator by the emulator's" in said
    assert "this driver goes up to CUDA 13.0" in said and "update the driver" in said


def test_an_unknown_error_still_has_its_number(gpu):
    assert str(gpu.driver.error(424242, "doing this")) == ("doing this: the driver has no words for it (error 424242)")


def test_machines_are_by_device():
    with pytest.raises(ValueError, match="CUDA kernels run on CUDA tensors, and these are on cpu"):
        machine(torch.device("cpu"))
    with emulator.installed() as gpu:
        assert machine(torch.device("cpu")) is gpu
    assert torch.device("cpu") not in machines
