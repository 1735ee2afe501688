"""Turn a model's linear layers into quantized ones, in place, and back.

Choice: a layer is converted by changing its class, not by putting a new module in its place. The module, its
parameters, its hooks and every reference to it stay the same objects: an optimizer built before is still right, tied
weights stay tied, state dict keys do not change, and even a model that *is* an nn.Linear can be converted. PyTorch's
own `torch.nn.utils.parametrize` does the same. The price is that the class must be exactly nn.Linear, and that nobody
may compute with the layer in some other way than by calling it; the refusals below are about that.

Refusals are not errors: they are listed in the report with the reason. What must never happen is a layer that looks
quantized and is not, or that changed without being asked. All checks run before the first change.
"""

from __future__ import annotations

import fnmatch
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..roles import role_of
from ..stored import find_store, frozen
from .dense import dense_blocks
from .embedding import QuantEmbedding
from .linear import QuantLinear
from .presets import find_recipe
from .recipe import Recipe
from .report import Entry, Report
from .stored import StoredWeight
from .stored_state import check_free, dense_parameter_, freeze_


def quantize_(
    model: nn.Module,
    recipe: str | Recipe,
    *,
    skip: str | Sequence[str] = ("lm_head",),
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
) -> Report:
    """Make a model's linear layers compute with quantized operands, in place.

    Only modules of the exact class `nn.Linear` are converted, and those of `nn.Embedding` if the recipe has a store for
    them; norms and everything else stay as they are. Weights keep a float master unless the recipe stores them:
    parameters, optimizer and state dict do not change. A stored weight is the same object still, so optimizers, hooks
    and ties hold; its state dict has the codes. Where a recipe is for a frozen base (`Recipe.frozen`, as "qlora-nf4"),
    the weights that are converted are frozen, no others, and the report says so. Modules of torch that read a layer's
    weight without calling it are known and left alone; if one of yours does that, name its layers in `skip`.

    Args:
        model: any module.
        recipe: a name (`lowbit.recipes()`) or a `Recipe`.
        skip: globs on dotted names of layers to leave alone, with everything below them. A pattern matches the whole
            name or its end after a dot: "lm_head" matches "model.lm_head", "layers.0" all of "model.layers.0". The
            pattern "lm_head" also means output heads of other names (`lowbit.roles`). Routers are never converted, and
            neither are the first and last blocks that the recipe names (`Recipe.dense`).
        filter_fn: called with (module, name) for each layer that would be converted; False leaves it alone.

    Returns:
        A `Report`: print it to see what became of each weight and why.

    Raises:
        ValueError: the recipe is unknown, a layer is quantized already, or a weight would be trained that is to be
            stored in a format for frozen ones. Nothing has been changed.

    >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    >>> list(quantize_(model, "int4", skip=["2"]).converted)
    ['0']
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"quantize_: model must be a torch.nn.Module, not {type(model).__name__}")
    found = find_recipe(recipe)
    patterns = [skip] if isinstance(skip, str) else list(skip)
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear | QuantEmbedding):
            raise ValueError(f"quantize_: {name or 'the model'} is quantized already; undo it with to_dense_ first")

    reasons = _outside_forward(model)
    blocks = dense_blocks(model, found)
    chosen: dict[str, nn.Linear | nn.Embedding] = {}
    for name, module in model.named_modules():
        if name in reasons or not _weights(module):
            continue
        reason = (
            _unfit(module, found)
            or _skipped(name, patterns)
            or _by_policy(module, name, patterns, blocks)
            or _filtered(module, name, filter_fn)
        )
        if reason:
            reasons[name] = reason
        else:
            assert isinstance(module, nn.Linear | nn.Embedding)
            chosen[name] = module
    for name, reason in _tied(model, chosen).items():
        del chosen[name]
        reasons[name] = reason

    for name, module in chosen.items():
        _check_stored(module, name, found)
    report = _report(model, found, chosen, reasons, _unused(model, patterns))
    for name, module in chosen.items():
        if isinstance(module, nn.Linear):
            module.__class__ = QuantLinear
        else:
            module.__class__ = QuantEmbedding
        assert isinstance(module, QuantLinear | QuantEmbedding)
        module._adopt(found, name)
        if found.frozen:
            freeze_(module.weight)
    if not chosen:
        warnings.warn(f"quantize_ converted nothing. {_why_nothing(reasons)}", UserWarning, stacklevel=2)
    return report


@torch.no_grad()
def to_dense_(model: nn.Module, dtype: torch.dtype | None = torch.bfloat16) -> nn.Module:
    """Make quantized layers plain ones of torch again, holding the weights that their forward pass used, in place.

    The float masters, or the stored weights, are replaced by the dequantized ones; activations are no longer quantized.
    Other layers are not touched, so a model in another dtype than `dtype` needs `.to(dtype)` or autocast before it can
    run.

    Args:
        model: a model after `quantize_`.
        dtype: of the converted layers' weights and biases; None keeps each one's own.

    Returns:
        The same model.

    Raises:
        ValueError: no layer is quantized, or dtype is not a floating-point dtype.
    """
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"to_dense_: dtype must be a floating-point dtype or None, not {dtype}")
    layers = [module for module in model.modules() if isinstance(module, QuantLinear | QuantEmbedding)]
    if not layers:
        raise ValueError("to_dense_: no layer of this model is quantized")
    for layer in layers:
        if isinstance(layer.weight, StoredWeight):
            check_free(layer.weight, "a stored weight", "to_dense_")
    done: set[int] = set()  # a tied weight is dequantized once: doing it twice may change it
    for layer in layers:
        high = isinstance(layer, QuantLinear) and layer.high_precision
        if id(layer.weight) not in done:
            _store(layer.weight, layer.weight if high else layer.quantized_weight(), dtype)
        bias = layer.bias if isinstance(layer, QuantLinear) else None
        if bias is not None and id(bias) not in done:
            _store(bias, bias, dtype)
        done |= {id(layer.weight), id(bias)}
        plain = nn.Linear if isinstance(layer, QuantLinear) else nn.Embedding
        layer.__class__ = plain  # pyright: ignore[reportAttributeAccessIssue]
        for name in ("recipe", "_layer_id", "_calls", "high_precision", "norms", "channels"):
            layer.__dict__.pop(name, None)
    return model


def _store(parameter: Tensor, values: Tensor, dtype: torch.dtype | None) -> None:
    dtype = dtype or parameter.dtype
    if isinstance(parameter, StoredWeight):
        dense_parameter_(parameter, values.dequantize().to(dtype))
        return
    if parameter.dtype != dtype:
        parameter.grad = None  # it must have the parameter's dtype
    parameter.data = values.to(dtype)


def _check_stored(module: nn.Linear | nn.Embedding, name: str, recipe: Recipe) -> None:
    """Whether the weight can become a stored one; some formats are for frozen weights only."""
    store = recipe.store if isinstance(module, nn.Linear) else recipe.embedding
    if store in (None, "master"):
        return
    check_free(module.weight, f"{name or 'the model'}.weight", "quantize_")
    trained = module.weight.requires_grad and not recipe.frozen
    if trained and (reason := frozen(find_store(store).format)):
        raise ValueError(f"quantize_: {name or 'the model'}.weight requires a gradient, and {reason}")


def _weights(module: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The module's own parameters that a matmul could use (two dimensions or more), by name.

    A linear layer always has one entry, even where a parametrization makes its weight from other parameters or none of
    its own: it must be accounted for.
    """
    lazy = nn.parameter.UninitializedParameter
    own = {n: p for n, p in module.named_parameters(recurse=False) if not isinstance(p, lazy) and p.dim() >= 2}
    return {"weight": list(own.values())} if isinstance(module, nn.Linear) else {n: [p] for n, p in own.items()}


def _outside_forward(model: nn.Module) -> dict[str, str]:
    """Layers whose parents read their weights without calling them: a converted one would silently not be quantized."""
    found = {}
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(module, nn.MultiheadAttention):
            for child, inner in module.named_modules():
                if child and _weights(inner):
                    found[prefix + child] = "nn.MultiheadAttention reads its weight without calling it"
        if isinstance(module, nn.TransformerEncoderLayer):
            for child in ("linear1", "linear2"):
                found[prefix + child] = "nn.TransformerEncoderLayer's fast path reads its weight without calling it"
    return found


def _unfit(module: nn.Module, recipe: Recipe) -> str | None:
    """Why this module cannot be converted, whatever the user wants; None if it can."""
    kind = type(module).__name__
    table = type(module) is nn.Embedding and recipe.embedding is not None
    if isinstance(module, nn.Embedding | nn.EmbeddingBag) and not table:
        return "embeddings stay dense"
    if isinstance(module, nn.MultiheadAttention):
        return "nn.MultiheadAttention multiplies with it directly: there is no linear layer to convert"
    if kind == "Conv1D":  # Hugging Face's GPT-2 layer
        return "Conv1D keeps its weight transposed; replace it by nn.Linear to quantize it"
    if type(module) is not nn.Linear and not table:
        if isinstance(module, nn.Linear):
            return f"{kind} is a subclass of nn.Linear, which may compute something else"
        if any(p.dim() >= 3 for weights in _weights(module).values() for p in weights):
            return f"{kind} is not nn.Linear; weights of 3 or more dimensions (fused experts, convolutions) stay dense"
        return f"{kind} is not nn.Linear"
    weight = module._parameters.get("weight")
    if weight is None:
        return "its weight is not a parameter (weight_norm, spectral_norm or pruning computes it)"
    if type(weight) is not nn.Parameter and type(weight).__name__ != "DTensor":
        return f"its weight is a {type(weight).__name__}, not a plain parameter"
    if type(weight) is not nn.Parameter and recipe.stores:
        return "its weight is sharded already; store it first"
    if not weight.is_floating_point():
        return f"its weight is {weight.dtype}, not floating point"
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance (by accelerate hooks, for example)"
    return None


def _matches(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"*.{pattern}")


def _and_parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(len(parts), 0, -1)]


def _skipped(name: str, patterns: list[str]) -> str | None:
    hit = next((pattern for pattern in patterns if any(_matches(n, pattern) for n in _and_parents(name))), None)
    return hit and f"skip={hit!r}"


def _by_policy(module: nn.Module, name: str, patterns: list[str], blocks: dict[str, str]) -> str | None:
    """Why a layer stays dense that nobody named: routers, output heads of another name, blocks that a recipe skips."""
    role = role_of(f"{name}.weight", tuple(module.weight.shape)) if isinstance(module, nn.Linear) else ""
    if role == "router":
        return "routers stay dense"
    if role == "head" and "lm_head" in patterns:
        return "an output head, as skip='lm_head' means"
    return next((blocks[n] for n in _and_parents(name) if n in blocks), None)


def _filtered(module: nn.Module, name: str, filter_fn: Callable[[nn.Module, str], bool] | None) -> str | None:
    return None if filter_fn is None or filter_fn(module, name) else "filter_fn returned False"


def _unused(model: nn.Module, patterns: list[str]) -> list[str]:
    """Patterns that match no module: perhaps a typing error."""
    names = [name for name, _ in model.named_modules()]
    return [p for p in patterns if p != "lm_head" and not any(_matches(name, p) for name in names)]


def _tied(model: nn.Module, chosen: dict[str, nn.Linear | nn.Embedding]) -> dict[str, str]:
    """Chosen layers whose weight another module uses and that is not chosen too, with the reason."""
    owners: dict[int, list[str]] = defaultdict(list)
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners[id(parameter)].append(name)
    refused = {}
    for name, module in chosen.items():
        others = [other for other in owners[id(module.weight)] if other not in chosen]
        if others:
            refused[name] = f"its weight is tied to {others[0] or 'the model itself'}, which stays dense"
    return refused


def _report(
    model: nn.Module,
    recipe: Recipe,
    chosen: dict[str, nn.Linear | nn.Embedding],
    reasons: dict[str, str],
    unused: list[str],
) -> Report:
    entries = []
    seen: dict[int, str] = {}  # how each weight is kept, which its first owner says
    for name, module in model.named_modules():
        for key, parameters in _weights(module).items():
            full = name if key == "weight" else f"{name}.{key}" if name else key
            linear = isinstance(module, nn.Linear)
            shape = (module.out_features, module.in_features) if linear else tuple(parameters[0].shape)
            count = sum(p.numel() for p in parameters if id(p) not in seen)
            reason = None if name in chosen else reasons[name]
            store = "master" if reason else recipe.store if linear else recipe.embedding or "master"
            seen = {id(p): store for p in parameters} | seen
            store = next((seen[id(p)] for p in parameters), store)
            entries.append(Entry(full, shape, count, reason, store, not linear, recipe.frozen and not reason))
    lazy = nn.parameter.UninitializedParameter
    rest = [p.numel() for p in model.parameters() if id(p) not in seen and not isinstance(p, lazy)]
    return Report(recipe, tuple(entries), len(rest), sum(rest), tuple(unused))


def _why_nothing(reasons: dict[str, str]) -> str:
    if not reasons:
        return "The model has no nn.Linear."
    shown = [f"{name or 'the model'}: {reason}" for name, reason in reasons.items()]
    return "; ".join(shown[:3]) + (f"; and {len(shown) - 3} more" if len(shown) > 3 else "") + "."
