"""A step on a GPU: every tensor of an optimizer in a few launches, none of which waits for the host.

Jobs that the same kernels can step (one program, the same formats and types: `gpu.specialise.Special`) and that share
their constants are a bucket. A bucket's kernels are compiled for it and are launched once each for all of its tensors:

    begin      the scalars' working copies, and folds up to the first measurement
    measure    for each measurement a sweep over the gradient, then reductions, then folds
    judge      whether a tensor must be left as it is
    update     the sweep that writes
    finish     the scalars and vectors that persist

What a job is (pointers, shapes) is a table on the device for as long as the job's storage lasts. What a step changes
(gradients' addresses, seeds, step numbers, constants) is one small buffer, filled by one asynchronous copy: a captured
CUDA graph is replayed after that copy alone.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Sequence
from ctypes import c_float, c_void_p, sizeof
from dataclasses import dataclass
from weakref import ref

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ..gpu import jobs as structs
from ..gpu.machine import Function, Machine, Module, machine
from ..gpu.specialise import Special, print_spec, special
from ..gpu.stages import print_program
from ..layout import row_stride
from ..native import abi
from ..stages import Job

THREADS, UNITS = 256, 4  # as in cuda/operands.h
TILE = 512  # rows that a sum over a column adds one after the other
