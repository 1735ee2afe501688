"""The quantized linear layer: one autograd function, three matmuls.

    forward   y  = Q(x) Q(W)ᵀ + b     saves Q(x) and Q(W), or the originals where a backward operand asks for them
    backward  gx = Q(gy) Q(W)         where x needs a gradient
              gW = Q(gy)ᵀ Q(x)        where W does: frozen weights save no activations
              gb = sum of gy

The gradient passes the rounding as if it were not there (straight through), with the *quantized* operands in the
backward matmuls, as in the Stable-SPAM release and most quantization-aware training. Everything is simulated: operands
are rounded in fp32 to values that 4-bit codes would have, then multiplied by the matmul that torch has for the compute
dtype. That buys the numerics of 4-bit training on any machine and no speed or memory at all; kernels come later and
must agree with this.

The layer is an `nn.Linear` in everything else: same parameters, same state dict, same shapes. It differs in one thing
to be lenient: operands of different dtypes are promoted, where nn.Linear raises.
"""

from __future__ import annotations

import zlib
from collections import deque
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..compiler import constant
from ..roles import clean_name
from ..rounding import key
from .fake import fake_quantize
from .recipe import FORWARD, Operand, Recipe, find_recipe

# Operand numbers in the key of the random bits: dgrad's and wgrad's two operands.
_DGRAD, _WGRAD = (1, 2), (3, 4)


class QuantLinear(nn.Linear):
    """An `nn.Linear` whose matmuls are quantized by a recipe.

    `quantize_` turns a model's layers into these; made by hand, it takes nn.Linear's arguments and a recipe.

    Args:
        in_features: as for nn.Linear.
        out_features: as for nn.Linear.
        bias: as for nn.Linear.
        device: as for nn.Linear.
        dtype: as for nn.Linear.
        recipe: a name (`lowbit.recipes()`) or a `Recipe`.
        name: tells this layer's random bits from other layers'.
    """

    recipe: Recipe

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        recipe: str | Recipe,
        name: str = "",
    ) -> None:
        found = find_recipe(recipe)
        super().__init__(in_features, out_features, bias, device, dtype)
        self._adopt(found, name)

    def _adopt(self, recipe: Recipe, name: str) -> None:
        self.recipe = recipe
        self._layer_id = zlib.crc32(clean_name(name).encode())
        self._calls = Calls()

    def forward(self, input: Tensor) -> Tensor:
        if not input.is_floating_point():
            raise TypeError(f"QuantLinear: input must be a floating-point tensor, not {input.dtype}")
        call = self._calls.number(input, self.training) if self.recipe.stochastic else 0
        stream = (self.recipe.seed, call, self._layer_id)
        dtype = _compute_dtype(input, self.weight)
        return _ThreeMatmuls.apply(input, self.weight, self.bias, self.recipe, dtype, stream)  # pyright: ignore

    def quantized_weight(self) -> Tensor:
        """The weight that the forward pass multiplies with, in fp32."""
        return fake_quantize(self.weight.detach(), self.recipe.forward[1]).float()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, recipe={self.recipe.name or self.recipe.matmuls}"


class Calls:
    """Numbers the calls of a layer, so that each backward pass has its own random bits.

    Gradient checkpointing calls a layer twice for one step, and must give the gradients it would give without: the
    recomputed call, known by running inside a backward pass, gets the number of the call that it repeats. With
    `use_reentrant=False` the first call's own autograd node runs backward, so nothing is needed. With
    `use_reentrant=True` the first call ran without a graph and left only a note here: its number and a checksum of its
    input, by which the repeated call finds it, in whatever order a layer used several times is called again.
    """

    def __init__(self) -> None:
        self.count = 0
        self.without_graph: deque[tuple[int, Tensor]] = deque(maxlen=256)  # not all are repeated: some only evaluate

    def number(self, x: Tensor, training: bool) -> int:
        """The number of this call. Evaluation, which leads to no gradient, does not count."""
        graph = torch.is_grad_enabled()
        if torch._C._current_graph_task_id() != -1:  # how torch.utils.checkpoint itself knows
            return self._repeated(x)
        if training or graph:
            self.count += 1
            if not graph:
                self.without_graph.append((self.count, _checksum(x)))
        return self.count

    def _repeated(self, x: Tensor) -> int:
        notes = self.without_graph
        found = len(notes) - 1
        if len(notes) > 1:
            checksum = _checksum(x)
            same = (
                i for i in range(found, -1, -1) if notes[i][1].device == x.device and torch.equal(notes[i][1], checksum)
            )
            found = next(same, found)
        if found < 0:
            return self.count
        number = notes[found][0]
        del notes[found]
        return number


def _checksum(x: Tensor) -> Tensor:
    return x.detach().contiguous().view(torch.int16).sum()  # stays on its device: nothing waits for it


@constant  # compilers before torch 2.13 do not trace the question
def _has_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device)


def _compute_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """What F.linear would compute in: autocast's dtype where it is on (float64 is left alone), else the wider one."""
    dtype = torch.promote_types(x.dtype, weight.dtype)
    device = x.device.type
    if dtype != torch.float64 and _has_autocast(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return dtype


def _matrix(x: Tensor) -> Tensor:
    """[..., cols] as [rows, cols]; a reshape by -1 would not know the rows of an empty tensor."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def _along_rows(x: Tensor, operand: Operand | None, dtype: torch.dtype, noise: tuple[int, int] | None = None) -> Tensor:
    return fake_quantize(x, operand, noise).to(dtype)


def _along_columns(
    x: Tensor, operand: Operand | None, dtype: torch.dtype, noise: tuple[int, int] | None = None
) -> Tensor:
    """Like `_along_rows` with blocks down the columns; flat groups have no direction and stay as they are."""
    if operand is None or operand.flat:
        return _along_rows(x, operand, dtype, noise)
    return _along_rows(x.t(), operand, dtype, noise).t()


class _ThreeMatmuls(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        recipe: Recipe,
        dtype: torch.dtype,
        stream: tuple[int, int, int],
    ) -> Tensor:
        rows = _matrix(x)
        activation, w_operand = recipe.forward
        xq, wq = _along_rows(rows, activation, dtype), _along_rows(weight, w_operand, dtype)
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        for_dgrad = wq if recipe.dgrad[1] == FORWARD else weight
        for_wgrad = xq if recipe.wgrad[1] == FORWARD else rows
        ctx.save_for_backward(for_dgrad if needs_x else None, for_wgrad if needs_weight else None)
        ctx.recipe, ctx.dtype, ctx.stream = recipe, dtype, stream
        ctx.input_shape, ctx.dtypes = x.shape, (x.dtype, weight.dtype, None if bias is None else bias.dtype)
        y = F.linear(xq, wq, None if bias is None else bias.to(dtype))
        return y.reshape(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        weight, rows = ctx.saved_tensors
        recipe, dtype = ctx.recipe, ctx.dtype
        x_dtype, weight_dtype, bias_dtype = ctx.dtypes
        gy = _matrix(grads[0])
        gx = gw = gb = None

        def noise(operand: int) -> tuple[int, int]:
            seed, call, layer = ctx.stream
            return key(seed, call, layer, operand)

        if weight is not None:
            g = _along_rows(gy, recipe.dgrad[0], dtype, noise(_DGRAD[0]))
            if recipe.dgrad[1] != FORWARD:
                weight = _along_columns(weight, recipe.dgrad[1], dtype, noise(_DGRAD[1]))
            gx = (g @ weight).to(x_dtype).reshape(ctx.input_shape)
        if rows is not None:
            g = _along_columns(gy, recipe.wgrad[0], dtype, noise(_WGRAD[0]))
            if recipe.wgrad[1] != FORWARD:
                rows = _along_columns(rows, recipe.wgrad[1], dtype, noise(_WGRAD[1]))
            gw = (g.t() @ rows).to(weight_dtype)
        if ctx.needs_input_grad[2]:
            gb = gy.sum(0).to(bias_dtype)
        return gx, gw, gb, None, None, None
