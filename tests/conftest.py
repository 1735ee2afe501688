import contextlib
import importlib.util
import os
import signal

# One thread, here and in processes that tests start: several tests run at once, and what a matmul returns depends on
# the number. Tests that are about threads ask for more.
os.environ["OMP_NUM_THREADS"] = "1"

# Shells start what runs in the background deaf to Ctrl-C, and so would be the processes that tests interrupt.
with contextlib.suppress(ValueError):  # in no main thread
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
import torch
from hypothesis import HealthCheck, settings

# The same examples on every run and every machine: a red test is red for everyone, and a slow machine is not a defect.
settings.register_profile("lowbit", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("lowbit")

torch.set_num_threads(1)  # where a plugin has imported it before


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = [name for name in ("torchao", "bitsandbytes") if importlib.util.find_spec(name) is None]
    reasons = {}
    if not torch.cuda.is_available():
        reasons["gpu"] = "no CUDA device"
    if missing:
        reasons["rivals"] = f"not installed: {', '.join(missing)}"
    for item in items:
        for marker, reason in reasons.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))
