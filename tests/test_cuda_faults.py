"""Steps under sanitizers, and faults that are planted in the shipped kernels' text: each of them is found."""

from typing import NamedTuple

import pytest
from cases import one_thread as one_thread
from cuda_cases import needs_compiler, patched, stepping, wrong
from emulator import sanitized
from native_cases import SHAPES, Setting, run

from lowbit.backends import cuda_step
from lowbit.gpu import DriverError

pytestmark = needs_compiler
PLAIN = Setting("adamw", "int8", "sqrt8", 0, "bf16", "bf16", "auto", "nearest", "views", 1, "clean")
SETTINGS = {
    "adamw": PLAIN._replace(m="nf4", v="dyn8", rounding="kahan", state_rounding="stochastic"),
    "halves": PLAIN._replace(p="f16", g="f32", m="bf16", v="int4", block=1, rounding="split8", shapes="points"),
    "stablespam": PLAIN._replace(optimizer="stablespam", m="int4", v="sqrt4", rounding="stochastic", wrong="nan"),
    "adammini": PLAIN._replace(optimizer="adammini", m="nf4", v="log4", g="f32", shapes="ragged", wrong="broken"),
    "adafactor": PLAIN._replace(optimizer="adafactor-relative", p="f32", m="nf4", shapes="dense"),
    "shares": PLAIN._replace(rounding="split8"),
    "spoilt": PLAIN._replace(block=16, wrong="nan"),
    # What quick numbers doubt. In "ended", a warp comes from a NaN to a row's end, where that lane has no value.
    "small": PLAIN._replace(p="f32", g="f32", m="fp32", v="fp32", wrong="tiny"),
    "ended": PLAIN._replace(block=16, p="f16", g="f32", rounding="split8", shapes="ended", wrong="tiny"),
    "large": PLAIN._replace(optimizer="stablespam", shapes="large"),
    "loud": PLAIN._replace(optimizer="stablespam", wrong="nan"),
    "vectors": PLAIN._replace(optimizer="vectors", m="e2m1", v="solo4", block=16, shapes="ragged"),
}

SANITIZED = ["adamw", "halves", "stablespam", "adammini", "adafactor", "vectors"]


def under_sanitizer(*names: str, steps: int = 2, file: str = "", before: str = "", after: str = "") -> None:
    """Run settings, with a fault in the text if one is named; one block of threads looks for all that is doubtful."""
    cuda_step.REVISERS = 1  # in a process of its own
    for name in names:
        if file:
            with stepping(schedule=2), patched(file, before, after):
                run(SETTINGS[name], "native", steps=steps)
        else:
            with stepping(schedule=2) as device:
                run(SETTINGS[name], "native", steps=steps)
            assert device.launched["update"]


@pytest.mark.parametrize("sanitizer", ["thread", pytest.param("address", marks=pytest.mark.slow)])
def test_sanitizers_find_nothing(sanitizer: str):
    names = ", ".join(map(repr, SANITIZED))
    done = sanitized(sanitizer, f"from test_cuda_faults import *; under_sanitizer({names}); print('well')")
    assert done.returncode == 0 and "well" in done.stdout, done.stderr[-4000:]


class Fault(NamedTuple):
    """What is put in the place of what, in which file; the setting that shows it."""

    setting: str
    file: str
    before: str
    after: str
    how: str = "bits"  # or a sanitizer, or what the emulator says


FAULTS = {
    # step.cu, turns.h
    "tables are read before they are filled": Fault(
        "adamw", "turns.h", "told.length;\n    }\n  }\n  __syncthreads();", "told.length;\n    }\n  }", "thread"
    ),
    "addresses are moved before they are there": Fault(
        "adamw", "turns.h", "__syncthreads();\n  if (DRAWS) stream_keys", "if (DRAWS) stream_keys", "thread"
    ),
    "what is above 0 becomes 0": Fault("large", "formats.h", "saturated(source * 0x1p100f)", "0.0f"),
    "each lane its own scale": Fault("adamw", "moments.h", "largest<SCALE_LANES<K>>(most_of<QUICK", "(most_of<QUICK"),
    "the last step's scale stays": Fault(
        "stablespam", "moments.h", "store_float(job.scale[K] + index, scaled.scale[part]);", ""
    ),
    "codes that were made with another scale": Fault(
        "stablespam", "moments.h", "to.inverse[part] = quick_inverse(to.scale[part]);", "to.inverse[part] = 1.0f;"
    ),
    "a tail that is not masked": Fault(
        "halves", "operands.h", "left < V ? (int)(left > 0 ? left : 0) : V", "left > 0 ? V : 0", "address"
    ),
    "a row that is not masked": Fault(
        "adamw", "operands.h", "left = row < job.rows ? job.cols - col : 0", "left = job.cols - col", "address"
    ),
    "an unaligned gradient taken for an aligned one": Fault(
        "adamw",
        "moments.h",
        "load<V * SIZE<GRAD>, SIZE<GRAD>>(at, place.count)",
        "load_aligned<V * SIZE<GRAD>>(at)",
        "address",
    ),
    "a lane skips its own values only": Fault("spoilt", "step.cu", "GUARDED && any<LANES>(bad)", "GUARDED && bad"),
    "a parameter's random bits for a moment": Fault("adamw", "turns.h", "keys[1 + K]", "keys[K]"),
    "lanes leave before the others": Fault("adamw", "turns.h", ": any<32>(count > 0);", ": count > 0;", "__"),
    "the first value beyond a row counts": Fault(
        "vectors", "operands.h", "if (k >= place.count) act(k);", "if (k > place.count) act(k);"
    ),
    "what a rule makes of nothing counts": Fault(
        "vectors", "turns.h", "{ clear(k, x), Stored<0>::clear_sources(k, to.moments); }", "{ (void)k; }"
    ),
    "quick numbers that are in doubt are kept": Fault(
        "small", "step.cu", "any<32>(doubt && (ANEW || to.count > 0))", "any<32>(doubt && to.count > V)"
    ),
    "a lane judged by values that another turn has left": Fault("ended", "turns.h", "if (!EARLY) to = {};", ""),
    "what is left alone is done again": Fault("loud", "step.cu", "*told.marks = 0u;", ""),
    "marks that are set before all are cleared": Fault(
        "small",
        "step.cu",
        "if (MEASURES > 0 && GUARDED && run.skip) return;",
        "if (lane() == 0) atomicOr(marks + blockIdx.x, 1u);",
        "thread",
    ),
    "a turn that begins in a row that has ended": Fault("ended", "turns.h", "own.row += 1, own.col -=", "own.col -="),
    "a turn that begins in the rows of the one before": Fault(
        "large", "turns.h", "own.row += told.rows", "own.row += 0"
    ),
    "a turn that begins at a row's end": Fault("large", "turns.h", "own.col >= told.length", "own.col > told.length"),
    "two parameters in each other's place": Fault(
        "shares", "operands.h", "permute(low, high, 0x7632)", "permute(low, high, 0x3276)"
    ),
    "each chunk the same random bits": Fault(
        "large", "turns.h", "told.job.first + (chunk - told.job.first_chunk) * CHUNK", "told.job.first"
    ),
    "a column that is not written down": Fault("adamw", "turns.h", "= {to.row, to.col};", "= {to.row, 0};"),
    "a chunk's numbers are written while others read those of the one before": Fault(
        "small", "step.cu", "if (prepared) __syncthreads();", "if (prepared) (void)0;", "thread"
    ),
    "what is doubtful is not done again": Fault(
        "small",
        "step.cu",
        "if ((doubtful & 1u) == 0u) continue;",
        "if ((doubtful & 1u) != 0u) continue;",
    ),
    "a quotient that is nearly right": Fault(
        "adamw", "quick.h", "fma(fma(b, quotient, -a), -inverse, quotient)", "quotient"
    ),
    # measure.cu and what it includes
    "columns are added up before they are there": Fault(
        "adafactor",
        "sweeps.h",
        "room[turn][t * V + k] = value[k];\n    __syncthreads();",
        "room[turn][t * V + k] = value[k];",
        "thread",
    ),
    "one room, and one barrier": Fault("adafactor", "sweeps.h", "turn = 1 - turn", "turn = 0", "thread"),
    "a barrier for those who add": Fault(
        "adafactor",
        "sweeps.h",
        "room[turn][t * V + k] = value[k];\n    __syncthreads();",
        "room[turn][t * V + k] = value[k];\n    if (adding) __syncthreads();",
        "__syncthreads",
    ),
    "halves before the other half is there": Fault(
        "stablespam", "sums.h", "t + apart]);\n    __syncthreads();", "t + apart]);", "thread"
    ),
    "a maximum that is not atomic": Fault(
        "large",
        "sweeps.h",
        "if (threadIdx.x == 0) atomicMax(&run.most, most);",
        "if (threadIdx.x == 0 && most > run.most) run.most = most;",
        "thread",
    ),
    "warps' maxima are read before they are there": Fault(
        "stablespam", "sweeps.h", "room[warp()] = most;\n    __syncthreads();", "room[warp()] = most;", "thread"
    ),
    "folds before all scalars are there": Fault(
        "adammini", "measure.cu", "__syncthreads();\n  if (t == 0) Folds<0>", "if (t == 0) Folds<0>", "thread"
    ),
    "a tensor is judged before all of it is known": Fault(
        "stablespam",
        "measure.cu",
        "atomicMax(&run.skip, 1u);\n  __syncthreads();",
        "atomicMax(&run.skip, 1u);",
        "thread",
    ),
    "lanes of a team part": Fault(
        "stablespam", "reductions.h", "first < lines; first +=", "first + own < lines; first +=", "__"
    ),
}


# Those that take long to find are among the slow tests, but for one of each kind.
LONG = {name for name, fault in FAULTS.items() if fault.how in ("thread", "address")} - {
    "tables are read before they are filled",
    "folds before all scalars are there",
    "a tail that is not masked",
}


@pytest.mark.parametrize("name", [pytest.param(k, marks=pytest.mark.slow if k in LONG else []) for k in FAULTS])
def test_a_planted_fault_is_found(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(SHAPES, "ended", [((3, 1800), "plain", "plain")])
    setting, file, before, after, how = FAULTS[name]
    if how == "bits":
        with patched(file, before, after):
            assert wrong(SETTINGS[setting])
    elif how in ("thread", "address"):
        plant = f"under_sanitizer({setting!r}, file={file!r}, before={before!r}, after={after!r})"
        done = sanitized(how, f"from test_cuda_faults import *; {plant}")
        said = {"thread": ("data race",), "address": ("AddressSanitizer", "runtime error")}[how]
        assert done.returncode and any(words in done.stderr for words in said) and "Traceback" not in done.stderr, (
            done.stderr[-4000:]
        )
    else:
        with patched(file, before, after), pytest.raises(DriverError, match=how):
            wrong(SETTINGS[setting])
