"""`StoredWeight`: an nn.Parameter that *is* codes and scales. What they mean is said by `lowbit.stored`.

To autograd it is a dense leaf of the outer dtype and shape, with a dense gradient. Between uses there is no dense copy
of it; what is done to it decides what comes back:

    detach, requires_grad_, .data            the same codes (an alias)
    w[2:5], split and chunk along rows       an alias of those rows' codes
    clone, deepcopy, .to, .cpu, .half        a StoredWeight with codes of its own; `.to(dtype)` changes the outer dtype
    empty_like                               a StoredWeight of zeros
    t, view, w[0], transpose …               a `StoredView`: read, it is dense; written to, it writes to the weight
    embedding, index_select of rows          dense; only the rows asked for are decoded
    embedding's max_norm                     rows that are too long are stored anew
    zeros_like, w + 1, w @ x, w.float() @ x  dense, of what the forward pass sees (a split store's codes alone)
    mul_, add_, addcdiv_, w[0] = x           decoded to fp32, computed, written with stochastic rounding
    copy_, normal_, uniform_, zero_, fill_ … stored anew: new scales, rounded to nearest
    copy_ of a weight stored alike           its parts are copied, no rounding
    p.data = dense                           stored anew

Writing is what lets `torch.optim` train it. Each write has random bits of its own, by a counter that lies beside the
codes, is saved with them, and is never read back from a device. `lowbit.optim` reads and writes the parts itself, once
a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .. import backends, stored
from ..backends import reference
from ..formats import Format
from ..layout import rows_of
from ..rounding import key
from .operand import Operand
from .stored_ops import Opened, Step, StoredTensor

_OPERAND = 0x57 << 16  # of the random bits; far from the operands of optimizers


class StoredWeight(StoredTensor):
    """A weight kept as codes and scales.

    Made by `quantize_(model, Recipe(..., store=...))`, or by `StoredWeight.of`. Wrap it in an `nn.Parameter`.

    Attributes:
        format: of the codes.
        parts: plain tensors as in `lowbit.rows`: `codes`, `scale` …, and `rest` for a split store.
        stream: tells the random bits of its writes from other weights'; int64 [] on the CPU, and no number, so that
            compiled code does not depend on it.
        writes: how often it was written to by torch; int64 [], on its device.
    """

    owns_codes = True
    partial = False  # some rows of a weight, which share a scale of the tensor with the others
    format: Format
    parts: dict[str, Tensor]
    stream: Tensor
    writes: Tensor

    @staticmethod
    def __new__(
        cls,
        format: Format,
        parts: Mapping[str, Tensor],
        shape: Iterable[int],
        dtype: torch.dtype = torch.float32,
        *,
        stream: int | Tensor = 0,
        writes: Tensor | None = None,
    ) -> StoredWeight:
        device = parts["codes"].device
        return torch.Tensor._make_wrapper_subclass(cls, torch.Size(shape), dtype=dtype, device=device)

    def __init__(
        self,
        format: Format,
        parts: Mapping[str, Tensor],
        shape: Iterable[int],
        dtype: torch.dtype = torch.float32,
        *,
        stream: int | Tensor = 0,
        writes: Tensor | None = None,
    ) -> None:
        self.format, self.parts = format, dict(parts)
        self.stream = stream if isinstance(stream, Tensor) else torch.tensor(stream, device="cpu")
        self.writes = torch.zeros((), dtype=torch.int64, device=self.device) if writes is None else writes

    @classmethod
    def of(cls, value: Tensor, store: str, *, stream: int | Tensor = 0) -> StoredWeight:
        """A dense tensor, rounded to nearest; its dtype is the outer dtype. A meta tensor gives meta parts.

        Raises:
            TypeError: value is no floating-point tensor.
            ValueError: `store` is not the name of one (`lowbit.stored.stores`).
        """
        if not value.is_floating_point():
            raise TypeError(f"StoredWeight.of: value must be a floating-point tensor, not {value.dtype}")
        found = stored.find_store(store)
        shapes = found.part_shapes(tuple(value.shape))
        parts = {part: torch.zeros(shape, dtype=dtype, device=value.device) for part, (shape, dtype) in shapes.items()}
        made = cls(found.format, parts, value.shape, value.dtype, stream=stream)
        made.assign_(value)
        return made

    @property
    def nbytes(self) -> int:  # pyright: ignore
        """Bytes of all parts together."""
        return sum(part.nbytes for part in self.parts.values())

    @property
    def store(self) -> str:
        """How it is kept, by name: "int8", "split" …."""
        return stored.name_of(self.format, "rest" in self.parts)

    def load(self) -> Tensor:
        """The fp32 values that an optimizer sees; of a split store, 8 bits more than the forward pass."""
        return stored.load(self.format, self.parts, self._cols).view(self.shape)

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        seen = {part: tensor for part, tensor in self.parts.items() if part != "rest"}
        plain = type(seen["codes"]) is Tensor and not (seen["codes"].is_meta or torch.compiler.is_compiling())
        decode = backends.decode if plain else reference.decode  # fake tensors have no memory to point to
        return decode(self.format, seen, self._cols).view(self.shape).to(dtype or self.dtype)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense tensor that the forward pass sees, in the outer dtype unless told otherwise; no gradient."""
        return self.dense(dtype)

    def opened(self) -> Opened:
        values = self.load()
        return Opened(self, values, values)

    @torch.no_grad()
    def write_(self, values: Tensor, *, fresh: bool = False) -> None:
        """Store values [shape], rounded stochastically. `fresh`: nothing of the old ones is left in them."""
        if fresh:
            self.assign_(values)
            return
        noise = key(0, _number(self.writes), _number(self.stream), _OPERAND)
        stored.store_(self.format, self.parts, values.reshape(rows_of(self.shape)), noise)
        self.writes.add_(1)

    @torch.no_grad()
    def assign_(self, values: Tensor) -> None:
        """Store other values [shape]: new scales, rounded to nearest."""
        if self.is_meta:
            return
        if self.partial:  # the scale of the tensor is not its own
            self.parts["scale"].zero_()
            stored.store_(self.format, self.parts, values.detach().reshape(rows_of(self.shape)), None)
            return
        matrix = values.detach().reshape(rows_of(self.shape))
        if type(matrix) is Tensor and self.parts.keys().isdisjoint(("rest", "tensor_scale")) and matrix.numel():
            for part, tensor in backends.encode(self.format, matrix).items():  # the same, and faster
                self.parts[part].copy_(tensor)
        else:
            stored.assign_(self.format, self.parts, matrix)

    def rescale_(self) -> None:
        """Derive every scale anew (they only grow otherwise) and round the codes to nearest."""
        stored.rescale_(self.format, self.parts, self._cols)

    @property
    def _cols(self) -> int:
        return rows_of(self.shape)[1]

    # ---- what the rules of `stored_ops` use

    @property
    def owns_rows(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether a row's parts are its own. Scales that are quantized together are not."""
        return not stored.frozen(self.format)

    def alias(self) -> StoredWeight:
        """The same codes. The very dictionary of parts: what is replaced in one is replaced in all."""
        alias = StoredWeight(self.format, self.parts, self.shape, self.dtype, stream=self.stream, writes=self.writes)
        alias.parts = self.parts
        return alias

    def mapped(self, f: Callable[[Tensor], Tensor], dtype: torch.dtype | None = None) -> StoredWeight:
        """With f of every part, which keeps its shape."""
        parts = {part: f(tensor) for part, tensor in self.parts.items()}
        return StoredWeight(
            self.format, parts, self.shape, dtype or self.dtype, stream=self.stream, writes=f(self.writes)
        )

    def mapped_rows(self, f: Callable[[Tensor], Tensor]) -> StoredWeight:
        """With f of every part, which takes rows out of it, but for those of the whole tensor."""
        parts = {part: tensor if part in stored.WHOLE else f(tensor) for part, tensor in self.parts.items()}
        shape = (len(parts["codes"]), *self.shape[1:])
        made = StoredWeight(self.format, parts, shape, self.dtype, stream=self.stream, writes=self.writes)
        made.partial = not parts.keys().isdisjoint(stored.WHOLE)
        return made

    def rows_at(self, index: Tensor) -> StoredWeight:
        """The rows with these numbers, in codes of their own."""
        return self.mapped_rows(lambda x: x.index_select(0, index))

    @torch.no_grad()
    def take_rows_(self, index: Tensor, rows: StoredWeight, which: Tensor, values: Tensor) -> None:
        """Store other values in rows of these numbers, which are `rows` now, where `which` [n, 1] says so."""
        old = dict(rows.parts)
        rows.parts = {part: tensor.clone() for part, tensor in old.items()}
        rows.assign_(values)
        for part in old.keys() - set(stored.WHOLE):
            self.parts[part].index_copy_(0, index, torch.where(which, rows.parts[part], old[part]))

    def alike(self, other: object) -> bool:
        """Whether its parts can be copied to ours."""
        mine = (self.format, self.shape, self.parts.keys())
        return isinstance(other, StoredWeight) and (other.format, other.shape, other.parts.keys()) == mine

    @torch.no_grad()
    def take_(self, other: StoredWeight) -> None:
        """Copy the parts of a weight that is `alike`; the counter never goes back, so no random bits come twice."""
        for part, tensor in self.parts.items():
            tensor.copy_(other.parts[part])
        self.writes.copy_(torch.maximum(self.writes, other.writes))

    def viewed(self, step: Step) -> StoredView:
        return StoredView(self, (step,))

    # ---- what torch asks of a tensor

    @property
    def data(self) -> StoredWeight:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The same codes without the graph. Setting it stores another tensor of this shape."""
        return self.detach()  # pyright: ignore[reportReturnType]

    @data.setter
    def data(self, value: Tensor) -> None:
        if value.shape != self.shape or not value.is_floating_point() or value.device != self.device:
            raise TypeError(
                f"a stored weight's data must be floating point, {tuple(self.shape)} and on {self.device}, "
                f"not {value.dtype} {tuple(value.shape)} on {value.device}"
            )
        if self.alike(value):
            self.parts.update(value.parts)  # pyright: ignore[reportAttributeAccessIssue]
        else:
            self.assign_(value.load() if isinstance(value, StoredWeight) else value)

    def share_memory_(self) -> StoredWeight:
        for tensor in (*self.parts.values(), self.writes):
            tensor.share_memory_()
        return self

    def is_shared(self) -> bool:
        return self.parts["codes"].is_shared()

    def __deepcopy__(self, memo: dict[int, Any]) -> StoredWeight:
        if not self.is_leaf:
            raise RuntimeError("only a stored weight that is a leaf of the graph can be copied deeply; detach it first")
        if id(self) not in memo:
            copy = self.mapped(lambda part: part.detach().clone())
            memo[id(self)] = _finish(copy, self.requires_grad, isinstance(self, torch.nn.Parameter))
            if self.grad is not None:
                copy.grad = self.grad.clone()
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        state = (self.format, self.parts, tuple(self.shape), self.dtype, int(self.stream), self.writes)
        return _rebuild, (*state, self.requires_grad, isinstance(self, torch.nn.Parameter))

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return [*self.parts, "writes", "stream"], (self.format, self.dtype)

    @staticmethod
    def __tensor_unflatten__(tensors: dict[str, Tensor], about: Any, size: Any, stride: Any) -> StoredWeight:
        format, dtype = about
        parts = {part: tensor for part, tensor in tensors.items() if part not in ("writes", "stream")}
        return StoredWeight(format, parts, size, dtype, stream=tensors["stream"], writes=tensors["writes"])

    def _stable_hash_for_caching(self) -> str:
        """What compiled code depends on, in words: the key under which torch keeps it from process to process."""
        parts = {part: (x.dtype, tuple(x.shape), x.stride(), x.storage_offset()) for part, x in self.parts.items()}
        about = (
            self.format.name,
            self.format.tag,
            self.dtype,
            tuple(self.shape),
            self.requires_grad,
            str(self.device),
            parts,
        )
        return f"{type(self).__name__}: {about}"

    def __getattr__(self, name: str) -> Tensor:
        try:
            return self.__dict__["parts"][name]
        except KeyError:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}") from None

    def about(self) -> str:
        bits = 8 * self.nbytes / max(1, self.numel())
        return f"{super().about()}, store={self.store!r}, {bits:.2f} bits"


class StoredView(StoredTensor):
    """A view of a stored weight: how it came about, replayed on dense values whenever it is read or written to."""

    weight: StoredWeight
    steps: tuple[Step, ...]

    @staticmethod
    def __new__(cls, weight: StoredWeight, steps: tuple[Step, ...]) -> StoredView:
        shape = _replay(torch.empty(weight.shape, dtype=weight.dtype, device="meta"), steps)
        return torch.Tensor._make_wrapper_subclass(
            cls, shape.shape, shape.stride(), shape.storage_offset(), dtype=shape.dtype, device=weight.device
        )

    def __init__(self, weight: StoredWeight, steps: tuple[Step, ...]) -> None:
        self.weight, self.steps = weight, steps

    @property
    def whole(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return all(step.func._schema.name in ("aten::view", "aten::detach", "aten::alias") for step in self.steps)

    def dense(self) -> Tensor:
        return _replay(self.weight.dense(), self.steps)

    def opened(self) -> Opened:
        values = self.weight.load()
        return Opened(self.weight, values, _replay(values, self.steps))

    def viewed(self, step: Step) -> StoredView:
        return StoredView(self.weight, (*self.steps, step))


def decoded(weight: Tensor) -> Tensor:
    """A weight's dense values, as the forward pass sees them: fp32 if it is stored, or the weight itself."""
    # An operation of torch, and no method: what compiles a layer need not look into the tensor.
    return torch.dequantize(weight) if isinstance(weight, StoredWeight) else weight


def is_stored(weight: Tensor, operand: Operand | None) -> bool:
    """Whether a stored weight is what a forward operand asks for: nothing more, or the store's own grid and blocks."""
    if not isinstance(weight, StoredWeight):
        return False
    return operand is None or (operand.codes is not None and stored.same_grid(operand.codes, weight.format))


def _number(x: Tensor) -> Any:
    """A number in a tensor: as it is, where a device or a compiler has it; on the host it costs nothing to know it."""
    return int(x) if type(x) is Tensor and x.device.type == "cpu" else x


def _replay(x: Tensor, steps: Iterable[Step]) -> Tensor:
    for step in steps:
        x = step(x)
    return x


def _rebuild(
    format: Format, parts: dict[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype, stream: int, writes: Tensor,
    requires_grad: bool, parameter: bool,
) -> StoredWeight:  # fmt: skip
    return _finish(StoredWeight(format, parts, shape, dtype, stream=stream, writes=writes), requires_grad, parameter)


def _finish(weight: StoredWeight, requires_grad: bool, parameter: bool) -> StoredWeight:
    weight.requires_grad_(requires_grad)
    if parameter:
        weight._is_param = True  # what nn.Parameter's isinstance looks at
    return weight
