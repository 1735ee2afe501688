"""What there is to compile and run kernels with on a GPU, for `lowbit doctor`."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch

from ..native import build
from . import nvrtc
from .driver import Driver, DriverError
from .entries import NoDriver

_KERNEL_MODULE = Path("/proc/driver/nvidia/version")


def describe(device: torch.device) -> tuple[dict[str, str], str]:
    """What was found, as far as it goes, and what is missing: then the reference backend does the work."""
    capability = torch.cuda.get_device_capability(device)
    found = {"capability": "{}.{}".format(*capability)}
    problem = ""
    try:
        driver = Driver()
        version = driver.version()
        found["driver"] = f"{_release()}up to CUDA {version[0]}.{version[1]}, by {driver.by}"
        compiler = nvrtc.find(version[0])
        found["NVRTC"] = f"{compiler.version[0]}.{compiler.version[1]}, {compiler.path}"
        found["architecture"] = nvrtc.architecture(capability, compiler)
        found["kernels kept"] = _kept(found["architecture"])
    except (NoDriver, DriverError, nvrtc.NoCompiler) as error:
        problem = str(error)
    forced = os.environ.get("LOWBIT_BACKEND", "")
    backend = forced or ("reference" if problem else "native")
    name = {"native": "CUDA kernels", "reference": "reference: torch's operations, tens of times slower"}
    why = f" (LOWBIT_BACKEND={forced})" if forced else " (see advice)" if problem else ""
    found["backend"] = f"{name.get(backend, 'none')}{why}"
    return found, problem and f"CUDA tensors have no kernels, so steps are tens of times slower: {problem}"


def _release() -> str:
    """NVIDIA's number of the driver, where the system tells."""
    try:
        said = re.search(r"\b\d{3,}\.[\d.]+\b", _KERNEL_MODULE.read_text())
    except OSError:
        return ""
    return f"{said[0]}, " if said else ""


def _kept(arch: str) -> str:
    """How many kernels are on the disk, and where."""
    counts = {place: len([*place.glob(f"kernel-{arch}-" + "[0-9a-f]" * 32)]) for place in build.places()}
    return ", ".join(f"{count} in {place}" for place, count in counts.items())
