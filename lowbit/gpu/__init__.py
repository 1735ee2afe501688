"""GPUs: kernels are compiled on the user's machine, kept on disk, and launched where torch launches its own."""

from .driver import DriverError
from .entries import NoDriver
from .machine import Arguments, Function, Machine, Module, capturing, machine, machines, runs
from .nvrtc import CompileError, NoCompiler, sources

__all__ = [
    "Arguments",
    "CompileError",
    "DriverError",
    "Function",
    "Machine",
    "Module",
    "NoCompiler",
    "NoDriver",
    "capturing",
    "machine",
    "machines",
    "runs",
    "sources",
]
