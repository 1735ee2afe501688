"""What torch's compiler is told of functions, without importing it: it takes longer than all of lowbit."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

Function = TypeVar("Function", bound=Callable[..., object])


def constant(function: Function) -> Function:
    """Decorator: to a compiler, what the function returns is a constant, found by calling it.

    As `torch.compiler.assume_constant_result`, which imports the compiler to set this mark.
    """
    vars(function)["_dynamo_marked_constant"] = True
    return function
