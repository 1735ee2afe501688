"""What of a model computes in high precision: some blocks always, all of it at the end of training."""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import nn

from .linear import QuantLinear
from .recipe import Recipe


def high_precision_(model: nn.Module, on: bool = True) -> nn.Module:
    """Let quantized layers compute like nn.Linear, from their float masters, in place; `on=False` undoes it.

    For the last part of training: most of what low precision has cost is then won back (half of the gap in the last 18
    per cent of NVIDIA's run, https://arxiv.org/abs/2509.25149, section 4 and appendix D). Modules, parameters and
    optimizers stay the same objects and nothing is rounded. It is not in the state dict: call it again after loading a
    checkpoint.

    Args:
        model: a model after `quantize_`.
        on: compute in high precision from now on, or quantized again.

    Returns:
        The same model.

    Raises:
        ValueError: no layer is quantized.

    >>> from lowbit import quantize_
    >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    >>> report = quantize_(model, "int4")
    >>> high_precision_(model)[0].high_precision
    True
    """
    layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
    if not layers:
        raise ValueError("high_precision_: no layer of this model is quantized; call quantize_ first")
    for layer in layers:
        layer.high_precision = bool(on)
    return model


def dense_blocks(model: nn.Module, recipe: Recipe) -> dict[str, str]:
    """Name → reason of the blocks that a recipe leaves dense: the first and the last of each stack.

    Everything below such a block stays dense. A stack is an outermost nn.ModuleList or nn.Sequential of two or more
    modules of one class, each with a linear layer inside: the layers of a transformer.
    """
    found = {}
    for name, stack in _stacks(model):
        count = len(stack)
        first, last = (math.ceil(part * count) if part < 1 else int(part) for part in recipe.dense)
        for index, child in enumerate(child for child, _ in stack.named_children()):
            inside = f"{name}.{child}" if name else child
            if index < first:
                found[inside] = f"one of the first {first} of {count} blocks, which {recipe.name or 'the recipe'} skips"
            elif index >= count - last:
                found[inside] = f"one of the last {last} of {count} blocks, which {recipe.name or 'the recipe'} skips"
    return found


def _stacks(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.ModuleList | nn.Sequential]]:
    if isinstance(module, nn.ModuleList | nn.Sequential) and _is_stack(list(module)):
        yield name, module
        return
    for child, inner in module.named_children():
        yield from _stacks(inner, f"{name}.{child}" if name else child)


def _is_stack(blocks: list[nn.Module]) -> bool:
    return (
        len(blocks) > 1
        and len({type(block) for block in blocks}) == 1
        and all(any(isinstance(m, nn.Linear) for m in block.modules() if m is not block) for block in blocks)
    )
