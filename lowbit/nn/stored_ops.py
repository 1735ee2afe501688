"""What an operation of torch does with a tensor that is kept as codes: one rule per kind of operation.

Every operation ends in `dispatch`. Those with a rule of their own are in a table at the end. The others are told apart
by their schema: one that writes to a stored tensor decodes it to fp32, computes, and writes the result back; a view is
a `StoredView`; all others read, and get what the forward pass sees as a plain tensor. So no operation is missing, and
none changes a copy that nobody sees.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

Rule = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]


class StoredTensor(Tensor):
    """A tensor with no memory of its own: what `StoredWeight` and its views share."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]
    owns_codes = False  # a StoredWeight
    owns_rows = False
    whole = False  # whether its elements are those of `weight`, in order
    weight: Any

    def dense(self) -> Tensor:
        """The values that a forward pass sees, as a plain tensor of this dtype and shape."""
        raise TypeError(f"{type(self).__name__} has no values")

    def opened(self) -> Opened:
        """Its values, to be written to."""
        raise TypeError(f"{type(self).__name__} has no values")

    def viewed(self, step: Step) -> Tensor:
        """The view of it that `step` makes."""
        raise TypeError(f"{type(self).__name__} has no views")

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.dense().__reduce_ex__(protocol)

    def numpy(self, *, force: bool = False) -> Any:
        return self.dense().numpy(force=force)

    def tolist(self) -> Any:
        return self.dense().tolist()

    def __setitem__(self, index: Any, value: Any) -> None:
        opened = self.opened()
        opened.part[index] = _read(value)
        opened.close()

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"{type(self).__name__}({self.about()})\n{'on the meta device' if self.is_meta else self.dense()}"

    def about(self) -> str:
        """What is printed above the values."""
        return f"shape={tuple(self.shape)}, dtype={self.dtype}"


class Opened(NamedTuple):
    """fp32 values as an optimizer sees them: of a whole weight, and of the part of it that is to be written to."""

    weight: Any  # a StoredWeight
    values: Tensor
    part: Tensor

    def close(self, *, fresh: bool = False) -> None:
        """Write the values back. `fresh`: this part of them has nothing of the old ones left."""
        self.weight.write_(self.values, fresh=fresh and self.part.numel() == self.values.numel())


class Step(NamedTuple):
    """One operation that makes a view, and which of its results is meant if there are several."""

    func: Any
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]
    which: int | None = None

    def __call__(self, x: Tensor) -> Tensor:
        made = self.func(x, *self.args, **dict(self.kwargs))
        return made if self.which is None else made[self.which]


def dispatch(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What `func` gives where an argument is a StoredTensor."""
    name = func._schema.name
    if name in RULES and isinstance(args[0], StoredTensor) and args[0].owns_codes:
        return RULES[name](func, args, kwargs)
    if name in LIST_RULES:
        return LIST_RULES[name](func, args, kwargs)
    if func.namespace.lstrip("_").startswith("c10d"):
        raise TypeError(
            f"{name} moves the values of a stored weight between processes, and they have no memory of their own: "
            "move its parts (`weight.parts`), which are plain tensors, or `weight.dequantize()`"
        )
    if any(map(_is_written, func._schema.arguments)):
        return _writing(func, args, kwargs)
    if func.is_view and isinstance(args[0], StoredTensor):
        return _view(func, args, kwargs)
    return dense_call(func, args, kwargs)


def dense_call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`func` of what the forward pass sees of the stored tensors."""
    return func(*tree_map(_read, args), **tree_map(_read, kwargs))


def _read(x: Any) -> Any:
    return x.dense() if isinstance(x, StoredTensor) else x


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _writing(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Decode, compute in fp32, write back."""
    schema = func._schema
    if torch.Tag.inplace_view in func.tags or schema.name in ("aten::set_", "aten::resize_"):
        raise TypeError(f"{schema.name} would change what a stored weight is, which its codes cannot follow")
    named = dict(zip((a.name for a in schema.arguments), args, strict=False)) | kwargs
    written = {a.name for a in schema.arguments if _is_written(a)} & named.keys()
    opened: list[tuple[StoredTensor, Opened]] = []

    def write(x: Any) -> Any:
        if not isinstance(x, StoredTensor):
            return x
        opened.append((x, x.opened()))
        return opened[-1][1].part

    for name in written:
        named[name] = tree_map(write, named[name])
    narrow = {x.dtype for x, _ in opened}

    def read(x: Any) -> Any:  # lerp_, for one, does not promote
        x = _read(x)
        return x.float() if isinstance(x, Tensor) and x.dim() and x.dtype in narrow else x

    for name in named.keys() - written:
        named[name] = tree_map(read, named[name])
    positional = [named.pop(a.name) for a in schema.arguments[: len(args)]]
    result = func(*positional, **named)
    for _, values in opened:
        values.close(fresh=schema.name in FRESH)
    return tree_map(lambda x: next((t for t, values in opened if values.part is x), x), result)


def _view(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Views are made when they are used; `split` and the like make several."""
    step = Step(func, tuple(args[1:]), tuple(kwargs.items()))
    stored = args[0]
    if len(func._schema.returns) == 1 and func._schema.returns[0].type.kind() == "TensorType":
        return stored.viewed(step)
    count = len(step(torch.empty(stored.shape, dtype=stored.dtype, device="meta")))
    return [stored.viewed(step._replace(which=i)) for i in range(count)]


# ---- rules for whole weights: the first argument is a StoredWeight (Any here: it is defined on top of this)


def _alias(func: Any, args: Any, kwargs: Any) -> Any:
    return args[0].alias()


def _dequantize(func: Any, args: Any, kwargs: Any) -> Any:
    return args[0].dense(torch.float32)


def _clone(func: Any, args: Any, kwargs: Any) -> Any:
    return args[0].mapped(torch.clone)


def _to_copy(func: Any, args: Any, kwargs: Any) -> Any:
    """Another device, or another outer dtype; what is no float has no codes."""
    dtype = kwargs.get("dtype") or args[0].dtype
    if not dtype.is_floating_point:
        return func(args[0].dense(), **kwargs)
    device, wait = kwargs.get("device"), kwargs.get("non_blocking", False)
    return args[0].mapped(lambda x: x.to(device or x.device, copy=True, non_blocking=wait), dtype)


def _empty_like(func: Any, args: Any, kwargs: Any) -> Any:
    """Zeros: codes of whatever was in memory would decode to anything, NaN among it."""
    dtype = kwargs.get("dtype") or args[0].dtype
    if not dtype.is_floating_point:
        return torch.empty(args[0].shape, dtype=dtype, device=kwargs.get("device") or args[0].device)
    return args[0].mapped(lambda x: torch.zeros_like(x, device=kwargs.get("device")), dtype)


def _new_zeros(func: Any, args: Any, kwargs: Any) -> Any:
    """Dense. But rows of the same width are how fully_shard begins: the weight would be a dense one from then on."""
    weight, size = args[:2]
    if len(size) == weight.dim() > 1 and tuple(size[1:]) == tuple(weight.shape[1:]):
        raise TypeError(
            "a stored weight cannot be sharded by fully_shard, which would make it dense: use "
            "DistributedDataParallel, or leave its module out (for zeros of this shape: torch.zeros_like)"
        )
    return func(weight.dense(), *args[1:], **kwargs)


def _copy(func: Any, args: Any, kwargs: Any) -> Any:
    """A whole weight's copy is another weight: scales of its own, or the very parts of one that is stored alike."""
    to, source = args[:2]
    if isinstance(source, StoredTensor) and source.whole and source.shape == to.shape:
        source = source.weight
    if to.alike(source):
        to.take_(source)
        return to
    if isinstance(source, StoredTensor) and source.owns_codes:
        source = source.opened().values  # all that it has, and not only what the forward pass sees
    return _writing(func, (to, source, *args[2:]), kwargs)


def _embedding(func: Any, args: Any, kwargs: Any) -> Any:
    weight, index = args[:2]
    if not weight.owns_rows:
        return func(weight.dense(), *args[1:], **kwargs)
    return weight.rows_at(index.reshape(-1)).dense().reshape(*index.shape, weight.shape[1])


def _embedding_renorm(func: Any, args: Any, kwargs: Any) -> Any:
    """nn.Embedding's max_norm. A row that is made shorter is another row, with scales of its own; no other changes."""
    weight, index, *norm = args
    if not weight.owns_rows:
        return _writing(func, args, kwargs)
    index = index.reshape(-1)
    rows = weight.rows_at(index)
    values = rows.opened().values
    shorter = func(values.clone(), torch.arange(len(index), device=index.device), *norm)
    changed = (shorter != values).any(1, keepdim=True)
    weight.take_rows_(index, rows, changed, shorter)
    return weight


def _index_select(func: Any, args: Any, kwargs: Any) -> Any:
    weight, dim, index = args
    return (
        weight.rows_at(index).dense()
        if dim in (0, -weight.dim()) and weight.owns_rows
        else func(weight.dense(), dim, index)
    )


def _slice(func: Any, args: Any, kwargs: Any) -> Any:
    dim, start, end, step = (*args[1:], *(0, None, None, 1)[len(args) - 1 :])
    if dim not in (0, -args[0].dim()) or step != 1 or not args[0].owns_rows:
        return _view(func, args, kwargs)
    return args[0].mapped_rows(lambda x: func(x, 0, start, end))


def _split(func: Any, args: Any, kwargs: Any) -> Any:
    weight, sizes, dim = (*args, *((kwargs.get("dim", 0),) if len(args) < 3 else ()))
    if dim not in (0, -weight.dim()) or not weight.owns_rows:
        return _view(func, args, kwargs)
    count = len(func(weight.parts["codes"], sizes))
    return [weight.mapped_rows(lambda x, i=i: func(x, sizes)[i]) for i in range(count)]


RULES: dict[str, Rule] = {
    "aten::detach": _alias,
    "aten::alias": _alias,
    "aten::lift_fresh": _alias,
    "aten::clone": _clone,
    "aten::dequantize": _dequantize,
    "aten::_to_copy": _to_copy,
    "aten::empty_like": _empty_like,
    "aten::new_zeros": _new_zeros,
    "aten::copy_": _copy,
    "aten::embedding": _embedding,
    "aten::embedding_renorm_": _embedding_renorm,
    "aten::index_select": _index_select,
    "aten::slice": _slice,
    "aten::split": _split,
    "aten::split_with_sizes": _split,
}

# For what takes a list of tensors, stored and other ones; `stored_flat` fills it.
LIST_RULES: dict[str, Rule] = {}

# What overwrites a tensor without reading it: an initialization or another weight, with scales of its own.
_NEW_VALUES = "copy_ normal_ uniform_ zero_ fill_ bernoulli_ exponential_ log_normal_ cauchy_ geometric_ random_"
FRESH = frozenset(f"aten::{name}" for name in _NEW_VALUES.split())
