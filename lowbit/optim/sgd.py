"""SGD with momentum.

Polyak 1964, https://doi.org/10.1016/0041-5553(64)90137-5, and Nesterov's variant as Sutskever et al. 2013 have it
(https://proceedings.mlr.press/v28/sutskever13.html, equations 1 to 4), with torch's meaning of every argument: the
learning rate stands outside the buffer, weight decay is coupled (added to the gradient), and the first gradient enters
the buffer whole, whatever the dampening.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

from typing_extensions import Unpack

from ..stages import Moment, Stage, update
from .base import Options, Params, Rule


def decayed(g, p, c):
    """The gradient of the loss and of the coupled decay."""
    return g + c.weight_decay * p


@update("p")
def plain(p, g, c):
    """Down the gradient."""
    return p - c.lr * decayed(g, p, c)


@update("p b")
def momentum(p, g, b, c):
    """Down the buffer."""
    b = c.momentum * b + c.share * decayed(g, p, c)
    return p - c.lr * b, b


@update("p b")
def nesterov(p, g, b, c):
    """Down the buffer as it will be if the next gradient is this one."""
    d = decayed(g, p, c)
    b = c.momentum * b + c.share * d
    return p - c.lr * (d + c.momentum * b), b


class SGD(Rule):
    """`torch.optim.SGD` with its momentum in any format; without momentum it has no state.

    Args:
        params: see `lowbit.optim.Rule`, as all keyword arguments not listed here.
        lr: learning rate, a float or a 0-d tensor; one on the parameters' device is read there, by no step on the host.
        momentum: share of the buffer that stays; 0 needs no buffer.
        dampening: 1 - dampening is the share of a gradient that enters the buffer, of all but the first.
        weight_decay: coupled (L2): weight_decay * p is added to the gradient.
        nesterov: Nesterov's momentum; needs momentum, and no dampening.
        **options: states, seed, master, rounding, state_rounding, stabilize, policy, roles.

    >>> import torch
    >>> w = torch.nn.Parameter(torch.ones(64, 64))
    >>> opt = SGD([("w", w)], lr=0.1, momentum=0.9, states="4bit")
    >>> w.sum().backward()
    >>> opt.step()
    >>> round(w[0, 0].item(), 4), opt.state[w]["momentum_buffer"].dtype
    (0.9, torch.uint8)
    """

    moments: ClassVar = {"b": Moment("momentum_buffer")}

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        **options: Unpack[Options],
    ):
        hyper = {"lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay}
        super().__init__(params, {**hyper, "nesterov": nesterov}, **options)

    def check_group(self, group: Mapping[str, Any]) -> None:
        """See `Rule.check_group`."""
        for name in ("momentum", "dampening"):
            if not (math.isfinite(group[name]) and group[name] >= 0):
                raise ValueError(f"{name} must be a finite number >= 0, not {group[name]}")
        if group["nesterov"] and (group["momentum"] == 0 or group["dampening"] != 0):
            raise ValueError("nesterov=True needs momentum above 0 and dampening=0")

    def plan(self, group: Mapping[str, Any], kind: str = "") -> tuple[Mapping[str, Moment], tuple[Stage, ...]]:
        """See `Rule.plan`."""
        if group["momentum"] == 0:
            return {}, (plain,)
        return self.moments, (nesterov if group["nesterov"] else momentum,)

    def fixed(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """See `Rule.fixed`; momentum may change, but not between none and some."""
        kind = "some" if group["momentum"] else "none"
        return {**super().fixed(group), "momentum": kind, "nesterov": group["nesterov"]}

    def constants(self, group: Mapping[str, Any], t: int) -> dict[str, float]:
        """See `Part.constants`."""
        share = 1.0 if t == 1 else 1 - group["dampening"]
        own = {"momentum": group["momentum"], "weight_decay": group["weight_decay"], "share": share}
        return {"lr": group["lr"], **own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `Rule.load_state_dict`. torch's SGD counts no steps: where it has a buffer, one at least was made."""
        states = state_dict.get("state") if isinstance(state_dict, Mapping) else None
        if isinstance(states, Mapping):
            theirs = {k: s["momentum_buffer"] for k, s in states.items() if set(s) == {"momentum_buffer"}}
            counted = {k: {"step": 1, "momentum_buffer": b} if b is not None else {} for k, b in theirs.items()}
            state_dict = {**state_dict, "state": {**states, **counted}}
        super().load_state_dict(state_dict)
