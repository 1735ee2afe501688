"""Give a model on the meta device its memory and values, one module at a time.

A model is built on the meta device, quantized there (its weights are then codes without memory), and filled. At no time
is there a dense copy of more than one module's weights.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import safe_open
from torch import Tensor, nn

from .stored import StoredWeight
from .stored_state import become, found, store_parameter_

Source: TypeAlias = "Mapping[str, Tensor] | str | os.PathLike | Sequence[str | os.PathLike] | None"


@torch.no_grad()
def materialize_(model: nn.Module, source: Source = None, device: torch.device | str = "cpu") -> nn.Module:
    """Put on `device`, with values, what of a model is on the meta device; in place, module by module.

    Args:
        model: any module, as a rule built under `torch.device("meta")` and quantized with `Recipe(store=...)`. What is
            not on the meta device stays as it is.
        source: where values come from. None: each module's `reset_parameters`. Or a mapping from the keys of the state
            dict to tensors, a safetensors file, a folder of such files, or a list of them. A weight may be there dense
            or stored; a dense one is rounded to nearest where the model stores it.
        device: where the tensors go.

    Returns:
        The same model, with the same parameter objects.

    Raises:
        ValueError: `source` lacks a tensor or has one that does not fit; or, without a source, a module cannot fill
            itself. Names the tensor; nothing has been changed.

    >>> from lowbit import Recipe, quantize_
    >>> with torch.device("meta"):
    ...     model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))
    >>> report = quantize_(model, Recipe(store="int4"))
    >>> materialize_(model)[0].weight.store
    'int4'
    """
    with ExitStack() as stack:
        tensors = None if source is None else _opened(source, stack)
        names = _names(model)
        for name, module in model.named_modules():
            for key, tensor in _on_meta(module):
                _check(module, name, key, tensor, tensors, names[id(tensor)])
        for module in model.modules():
            own = dict(_on_meta(module))
            if own and tensors is None:
                _reset(module, own, device)
            elif tensors is not None:
                for tensor in own.values():
                    become(tensor, _read(tensors, names[id(tensor)], tensor, device))
    return model


def _on_meta(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A module's own parameters and buffers, those without memory."""
    for key, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None and tensor.is_meta:
            yield key, tensor


def _names(model: nn.Module) -> dict[int, list[str]]:
    """All names of each parameter and buffer: a checkpoint has a tied one under any of them."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, module in model.named_modules():
        for key, tensor in _on_meta(module):
            names[id(tensor)].append(f"{name}.{key}" if name else key)
    return names


def _check(
    module: nn.Module, name: str, key: str, tensor: Tensor, tensors: Mapping[str, Tensor] | None, names: list[str]
) -> None:
    if tensors is None and not hasattr(module, "reset_parameters"):
        raise ValueError(
            f"materialize_: {name or 'the model'} ({type(module).__name__}) has no reset_parameters to fill its "
            f"{key!r}: give it one, or give source="
        )
    if tensors is not None and key in module._non_persistent_buffers_set:
        raise ValueError(f"materialize_: buffer {names[0]!r} is in no checkpoint; compute it before calling this")
    if tensors is not None:
        _read(tensors, names, tensor, "meta")


def _reset(module: Any, own: dict[str, Tensor], device: torch.device | str) -> None:
    others = [(t, t.clone()) for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]
    stored = [(t, t.store, t.stream) for t in own.values() if isinstance(t, StoredWeight)]
    for tensor in own.values():
        become(tensor, torch.empty(tensor.shape, dtype=tensor.dtype, device=device))
    module.reset_parameters()
    for tensor, value in others:
        if not value.is_meta:
            tensor.copy_(value)
    for tensor, store, stream in stored:
        store_parameter_(tensor, store, stream)


def _read(tensors: Mapping[str, Tensor], names: list[str], old: Tensor, device: torch.device | str) -> Tensor:
    """The value of a tensor of the model, on the device; "meta" finds out whether there is one that fits."""
    name = next((name for name in names if name in tensors), None)
    if name is None:
        raise ValueError(f"materialize_: source has no {names[0]!r}")
    try:
        saved = found(tensors, name, old)
    except ValueError as error:
        raise ValueError(f"materialize_: {error}") from None
    if isinstance(old, StoredWeight) and saved.stored is not None and saved.stored.alike(old):
        return saved.stored.mapped(lambda part: part.to(device, copy=not isinstance(tensors, _Lazy)))
    value = saved.stored.load() if saved.stored is not None else saved.value
    assert value is not None
    if isinstance(old, StoredWeight):
        return StoredWeight.of(value.to(device, old.dtype), old.store, stream=old.stream)
    return value.to(device, old.dtype, copy=not isinstance(tensors, _Lazy))


class _Lazy(Mapping[str, Tensor]):
    """The tensors of safetensors files, read when asked for."""

    def __init__(self, files: list[Any]):
        self.where = {key: file for file in files for key in file.keys()}  # noqa: SIM118  # no dictionary

    def __getitem__(self, key: str) -> Tensor:
        return self.where[key].get_tensor(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self.where)

    def __len__(self) -> int:
        return len(self.where)


def _opened(source: Any, stack: ExitStack) -> Mapping[str, Tensor]:
    if isinstance(source, Mapping):
        return source
    paths = [Path(p) for p in ([source] if isinstance(source, str | os.PathLike) else source)]
    files = [file for path in paths for file in (sorted(path.glob("*.safetensors")) if path.is_dir() else [path])]
    missing = [str(file) for file in files if not file.is_file()]
    if missing or not files:
        raise ValueError(f"materialize_: there is no safetensors file {', '.join(missing) or f'in {paths[0]}'}")
    return _Lazy([stack.enter_context(safe_open(file, framework="pt")) for file in files])
