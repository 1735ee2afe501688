"""What the machine is and what is installed on it: recorded beside every result, and printed by `lowbit doctor`."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from functools import cache
from pathlib import Path


@cache
def cpu_flags() -> frozenset[str]:
    """Instruction set extensions of this CPU (empty where the system does not list them)."""
    return frozenset(_cpuinfo("flags").split()) | frozenset(_cpuinfo("Features").split())


@cache
def cpu_name() -> str:
    """The CPU's own name."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _cpuinfo(key: str) -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == key:
                return value.strip()
    except OSError:
        pass
    return ""


def cores() -> int:
    """How many cores this process may use: its affinity, and a container's quota if that is smaller."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            count = min(count, max(1, int(quota) // int(period)))
    except (OSError, ValueError):
        pass
    return max(1, count)


def version(package: str) -> str | None:
    """The installed version of a package, without importing it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def compiler() -> str | None:
    """The C++ compiler that would be used, if there is one."""
    names = [n for n in (os.environ.get("CXX"), "c++", "g++", "clang++") if n]
    return next((path for n in names if (path := shutil.which(n))), None)


def describe() -> dict:
    """A machine and its versions, for the record."""
    import torch

    notable = ("avx2", "fma", "avx512f", "avx512bw", "avx512_bf16", "amx_bf16", "asimd", "sve")
    return {
        "cpu": cpu_name(),
        "cores": cores(),
        "cpu_features": [f for f in notable if f in cpu_flags()],
        "memory_bytes": _memory(),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lowbit": version("lowbit") or "not installed (run from a checkout)",
        "cuda": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
    }


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


class PeakMemory:
    """Peak resident memory of this process since construction, where the system can reset its high-water mark."""

    def __init__(self) -> None:
        self.exact = False
        try:
            Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak so far
            self.exact = True
        except OSError:
            pass
        self.before = self._status("VmRSS")

    def peak(self) -> int:
        """Bytes; without the reset, the peak of the whole process."""
        if value := self._status("VmHWM"):
            return value
        try:
            import resource
        except ImportError:  # Windows
            return 0
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    @staticmethod
    def _status(key: str) -> int:
        try:
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith(key + ":"):
                    return int(line.split()[1]) * 1024
        except OSError:
            pass
        return 0
