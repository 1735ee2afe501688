"""Steps of stored weights on CUDA, run by the emulator: the bits of the reference; faults in the kernels are found."""

import pytest
from cases import injected
from cases import one_thread as one_thread
from cuda_cases import needs_compiler, patched, stepping
from emulator import sanitized
from native_cases import differences
from stored_cases import COVERING, DIMENSIONS, OTHERS, STORES, Setting, run

pytestmark = needs_compiler
PLAIN = Setting("adamw", "int4", "8bit", "bf16", "bf16", "auto", "nearest", "ragged", 1, "clean")
EVERY = [
    PLAIN._replace(store=store, shapes=("large", "ragged")[k % 2], wrong=DIMENSIONS.wrong[k % len(DIMENSIONS.wrong)])
    for k, store in enumerate([*STORES, *OTHERS])
]


def wrong(s: Setting, schedule: int = 0) -> list[str]:
    """Where steps of a setting differ from the reference's."""
    tape: list = []
    with injected(tape, replay=False):
        expected = run(s, "reference")
    with stepping(schedule) as its, injected(tape, replay=True):
        found = run(s, "native")
    assert its.launched["update"], "nothing was launched"
    return differences(expected, found)


@pytest.mark.parametrize("k", range(len(EVERY)), ids=lambda k: EVERY[k].store)
def test_a_step_of_a_stored_weight_has_the_references_bits(k: int):
    """In rows of whole step blocks and in others, with and without numbers that are not finite."""
    assert not (found := wrong(EVERY[k], schedule=k % 5)), found[:4]


@pytest.mark.slow
@pytest.mark.parametrize("k", range(len(COVERING)), ids=lambda k: str(COVERING[k]))
def test_every_pair_of_settings_has_the_references_bits(k: int):
    assert not (found := wrong(COVERING[k], schedule=k % 5)), found[:4]


FAULTS = {
    "a scale that stays when a value clips": ("int8", "if (fresh.renewed[part]) store_scale", "if (false) store_scale"),
    "a scale that each step derives": ("int8", "clips(absmax, REACH,", "clips(absmax, -REACH,"),
    "each lane its own scale": ("int8", "largest<SCALE_LANES<K>>(magnitude_bits(most))", "magnitude_bits(most)"),
    "a rest that is lost": ("split", "if (REST) put<V, 1>(job.rest", "if (false) put<V, 1>(job.rest"),
    "a rest without its sign": ("split8", "(int8_t)(uint8_t)(rest.word", "(uint8_t)(rest.word"),
    "the tensor's scale left out": ("nvfp4", "OUTER ? load_float(job.tensor_scale) : 1.0f", "1.0f"),
    "another operand's random bits": ("nf4", "draw(key, place, draws)", "draw({key.second, key.first}, place, draws)"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_that_is_planted_is_found(name: str):
    store, before, after = FAULTS[name]
    with patched("weights.h", before, after):
        assert wrong(PLAIN._replace(store=store, shapes="large"))


@pytest.mark.parametrize("sanitizer", ["thread", pytest.param("address", marks=pytest.mark.slow)])
def test_sanitizers_find_nothing_in_stored_weights(sanitizer: str):
    names = ["nvfp4", "split8"] if sanitizer == "thread" else ["nvfp4", "split8", "nf4", "mxfp8"]
    code = f"""
from test_cuda_stored import *
for name in {names}:
    with stepping(schedule=2) as device:
        run(PLAIN._replace(store=name, wrong="nan"), "native")
    assert device.launched["update"]
print("well")
"""
    done = sanitized(sanitizer, code)
    assert done.returncode == 0 and "well" in done.stdout, done.stderr[-4000:]
