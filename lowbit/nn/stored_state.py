"""How a module with a stored weight is saved and loaded: its state dict holds plain tensors.

    weight            the codes, uint8 [rows, bytes]
    weight_scale …    the other parts, each under its name; `weight_rest` for a split store
    weight_writes     int64 []: how often torch wrote to it, which the random bits of the next write depend on
    weight_format     int64 []: `Format.tag` of the codes

A dense checkpoint is rounded to nearest on the way in. One stored otherwise is decoded and stored anew. What does not
fit is an error, and this module has then not changed (torch reports after all modules have been loaded).
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import stored
from .stored import StoredWeight

_EXTRA = ("writes", "format")


class Saved(NamedTuple):
    """A weight as a state dict has it: dense, or stored."""

    value: Tensor | None
    stored: StoredWeight | None


class StoredState(nn.Module):
    """A module whose parameters may be `StoredWeight`s, or that may be loaded from one which had such."""

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        for parameter in self._parameters.values():
            if isinstance(parameter, StoredWeight):
                _keep_hooks(parameter)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, parameter in self._parameters.items():
            if isinstance(parameter, StoredWeight):
                destination.update(plain(parameter, prefix + name))

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        assign = local_metadata.get("assign_to_params_buffers", False)
        ours: set[str] = set()
        for name, parameter in self._parameters.items():
            key = prefix + name
            if key not in state_dict or not (isinstance(parameter, StoredWeight) or f"{key}_format" in state_dict):
                continue
            ours |= {key, *(k for part in (*stored.PARTS, *_EXTRA) if (k := f"{key}_{part}") in state_dict)}
            assert parameter is not None
            try:
                loaded = _loaded(parameter, found(state_dict, key, parameter), key, assign)
            except ValueError as error:
                error_msgs.append(str(error))
            else:
                self._parameters[name] = loaded
        rest = {k: v for k, v in state_dict.items() if k.startswith(prefix) and k not in ours}
        missing: list[str] = []
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs)
        missing_keys += [key for key in missing if key not in ours]


def plain(weight: StoredWeight, key: str) -> dict[str, Tensor]:
    """The tensors of a state dict that stand for a stored weight."""
    parts = {(key if part == "codes" else f"{key}_{part}"): tensor for part, tensor in weight.parts.items()}
    return {**parts, f"{key}_writes": weight.writes, f"{key}_format": torch.tensor(weight.format.tag)}


def found(state: Mapping[str, Any], key: str, parameter: Tensor) -> Saved:
    """What a state dict has for a parameter.

    Raises:
        ValueError: it does not fit the parameter, or its format is not known; says which key.
    """
    value = state[key]
    if f"{key}_format" not in state:
        if isinstance(parameter, StoredWeight) and not value.is_floating_point():
            raise ValueError(
                f"{key} is {value.dtype}, which is neither a dense weight nor, without {key}_format, codes"
            )
        _same(key, value, tuple(parameter.shape), value.dtype)
        return Saved(value, None)
    tag = int(state[f"{key}_format"])
    store = stored.store_of(tag, f"{key}_rest" in state)
    if store is None:
        raise ValueError(f"{key}_format is {tag}, which is no format that this version can keep a weight in")
    parts = {}
    for part, (shape, dtype) in store.part_shapes(tuple(parameter.shape)).items():
        name = key if part == "codes" else f"{key}_{part}"
        if name not in state:
            raise ValueError(f"{name} is missing, and {key} is stored as {store}")
        parts[part] = state[name]
        _same(name, parts[part], shape, dtype)
    writes = state.get(f"{key}_writes")
    stream = parameter.stream if isinstance(parameter, StoredWeight) else 0
    dtype = parameter.dtype
    return Saved(None, StoredWeight(store.format, parts, parameter.shape, dtype, stream=stream, writes=writes))


def _same(name: str, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tuple(x.shape) != shape or x.dtype != dtype:
        raise ValueError(
            f"size mismatch for {name}: the checkpoint has {x.dtype} {tuple(x.shape)}, not {dtype} {shape}"
        )


@torch.no_grad()
def _loaded(parameter: Tensor, saved: Saved, key: str, assign: bool) -> Any:
    """The parameter with the saved values: itself, or, to `assign`, one on top of the saved tensors."""
    old: Any = parameter
    if parameter.is_meta and not assign:
        warnings.warn(
            f"for {key}: copying from a checkpoint to a parameter on the meta device does nothing; "
            "use load_state_dict(assign=True) or lowbit.materialize_",
            stacklevel=2,
        )
    elif not isinstance(old, StoredWeight):
        assert saved.stored is not None
        if assign:
            return nn.Parameter(saved.stored.load().to(old.dtype), requires_grad=old.requires_grad)
        old.copy_(saved.stored.load())
    elif assign:
        return nn.Parameter(_assigned(old, saved), requires_grad=old.requires_grad)
    elif saved.stored is None:
        assert saved.value is not None
        old.assign_(saved.value)
    elif old.alike(saved.stored):
        old.take_(saved.stored)
        old.writes.copy_(saved.stored.writes)
    else:
        old.assign_(saved.stored.load())
    return old


def _assigned(old: StoredWeight, saved: Saved) -> StoredWeight:
    if saved.stored is not None and (saved.stored.format, saved.stored.parts.keys()) == (old.format, old.parts.keys()):
        return saved.stored
    value = saved.stored.load() if saved.stored is not None else saved.value
    assert value is not None
    return StoredWeight.of(value, old.store, stream=old.stream)


@torch.no_grad()
def store_parameter_(parameter: Tensor, store: str, stream: int | Tensor) -> None:
    """Make a parameter a stored weight. It stays the same object, wherever it is used, with its hooks and gradient."""
    if not isinstance(parameter, StoredWeight):
        become(parameter, StoredWeight.of(parameter.detach(), store, stream=stream))


def freeze_(parameter: Tensor) -> None:
    """Make a parameter one that is not trained; a gradient that it has will not be used."""
    parameter.requires_grad_(False)
    parameter.grad = None


@torch.no_grad()
def dense_parameter_(parameter: Tensor, values: Tensor) -> None:
    """Make a stored weight a plain parameter with these values. It stays the same object."""
    become(parameter, values)


def check_free(parameter: Tensor, name: str, doing: str) -> None:
    """Only a parameter that nothing in C++ holds on to can become another tensor.

    Raises:
        RuntimeError: a live graph, DistributedDataParallel or a compiled function does.
    """
    count: int = parameter._use_count()  # pyright: ignore[reportAttributeAccessIssue]  # 2: with the node of a graph that adds to its gradient
    if weakref.getweakrefs(parameter) or count > 2 or (count == 2 and not parameter.requires_grad):
        raise RuntimeError(
            f"{doing}: {name} cannot become another tensor while something else holds it: a graph that is still "
            "to be differentiated, DistributedDataParallel or torch.compile; do this before, or drop those first"
        )


def become(parameter: Tensor, value: Tensor) -> None:
    """Make a parameter (or a buffer) another tensor, without its being another object."""
    if not isinstance(parameter, nn.Parameter):
        torch.utils.swap_tensors(parameter, value)
        return
    grad, parameter.grad = parameter.grad, None
    torch.utils.swap_tensors(parameter, nn.Parameter(value, requires_grad=parameter.requires_grad))
    _keep_hooks(parameter)
    if grad is not None and grad.dtype == parameter.dtype:
        parameter.grad = grad


def _keep_hooks(parameter: Tensor) -> None:
    """Hooks that a swap has left in Python alone are known to autograd again; their handles still remove them."""
    for hooks in ("_backward_hooks", "_post_accumulate_grad_hooks"):
        setattr(parameter, hooks, getattr(parameter, hooks))


def rescale_(model: nn.Module) -> int:
    """Derive the scales of all stored weights anew, in place, and round their codes to nearest.

    Training only ever lets a scale grow, when a value would clip: where weights have become smaller, their codes have
    become few. This is the one other moment at which scales change; call it now and then in a long run, or never.

    Args:
        model: any module.

    Returns:
        How many weights have been rescaled; a shared one counts once. Frozen formats keep their scales.

    Raises:
        ValueError: the model has no stored weight.
    """
    weights = [p for p in model.parameters() if isinstance(p, StoredWeight)]
    if not weights:
        raise ValueError("rescale_: this model has no stored weight; quantize_ it with Recipe(store=...)")
    weights = [weight for weight in weights if not stored.frozen(weight.format)]
    for weight in weights:
        weight.rescale_()
    return len(weights)
