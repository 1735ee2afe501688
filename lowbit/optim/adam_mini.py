"""Adam-mini.

Zhang et al. 2024, https://arxiv.org/abs/2406.16793, Algorithm 1: Adam whose second moment is one number for each block
of a tensor, the average of the block's mean square. The blocks are Algorithm 3's: an attention head of a query or key
matrix, an output neuron (a row) of any other matrix, a token's row of an embedding and of the head, and a whole tensor
for what is left, such as a norm.

The released code (adam-mini 1.1.1) adds two things to the paper: biases are plain Adam, and norms and biases have no
weight decay. Both are so here. It goes by substrings of names, and so crashes on a vector whose name holds "mlp", cuts
heads wrongly where head_dim is not dim / heads, and gives a matrix it does not know one number without telling. Here
role, shape and explicit head counts decide, a matrix of no known role has one number per row, and `explain()` tells
each tensor's partition. The second moments of blocks are fp32 whatever the states' format: in bf16 an average with
beta2 = 0.999 never decays.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from typing import Any, ClassVar

from typing_extensions import Unpack

from ..formats import nearest
from ..stages import Moment, Stage, fold, measure, update
from ..words import lerp
from .adamw import AdamW, adamw, average, debias, descend, weigh
from .base import Options, Params, Rule

PARTITIONS = ("head", "row", "column", "tensor", "value")
UNKNOWN_HEADS, EXPERT = "row, for want of head counts", "expert"  # what explain() says of these rows
UNDECAYED = ", no decay"


@measure("mean", over="group")
def mean_square(g):
    """Of each group of rows."""
    return g * g


@measure("mean", over="column")
def mean_square_of_columns(g):
    """Of each column."""
    return g * g


@fold("v")
def average_square(x, v, c):
    """The block's second moment."""
    return lerp(v, x, c.rate2)


@update("p m")
def mini(p, g, m, v, c, s):
    """Adam's step, with the second moment of the block."""
    m = lerp(m, g, c.rate1)
    return descend(c.keep * p, m, v, c, s), m


@update("p m")
def mini_undecayed(p, g, m, v, c, s):
    """The same for a tensor without weight decay."""
    m = lerp(m, g, c.rate1)
    return descend(p, m, v, c, s), m


@update("p m v")
def adam(p, g, m, v, c, s):
    """Adam for a tensor without weight decay."""
    m, v = average(m, v, g, c)
    return descend(p, m, v, c, s), m, v


def shared_second_moment(over: Any, decays: bool) -> tuple[Mapping[str, Moment], tuple[Stage, ...]]:
    """Adam's moments and stages, with a second moment over each "value", "group" or "column"."""
    m = AdamW.moments["m"]
    if over == "value":
        return AdamW.moments, (weigh, debias, adamw if decays else adam)
    mean = mean_square if over == "group" else mean_square_of_columns
    moments = {"m": m, "v": Moment("exp_avg_sq", signed=False, weight="exp_avg_sq_weight", over=over)}
    return moments, (weigh, debias, mean, average_square, mini if decays else mini_undecayed)


def has_decay(group: Mapping[str, Any], shape: tuple[int, ...], role: str) -> bool:
    """Whether a tensor is decayed: vectors, norms and biases are not, unless the group says so."""
    return group["decay_1d"] or (len(shape) > 1 and role not in ("norm", "bias"))


def chosen(patterns: Mapping[str, str], name: str) -> str:
    """What the first pattern that fits a name asks for; "" if none does."""
    return next((wanted for pattern, wanted in patterns.items() if name and fnmatchcase(name, pattern)), "")


def check_patterns(argument: str, patterns: Mapping[str, str], known: Collection[str]) -> dict[str, str]:
    """A copy, if it asks only for what is known."""
    if not isinstance(patterns, Mapping):
        raise TypeError(f"{argument} must be a dict from globs on names to {', '.join(known)}, not {patterns!r}")
    for pattern, wanted in patterns.items():
        if wanted not in known:
            hint = nearest(wanted, list(known)) if isinstance(wanted, str) else ""
            raise ValueError(f"{argument}: {wanted!r} for {pattern!r} is unknown{hint}; known: {', '.join(known)}")
    return dict(patterns)


def check_matches(argument: str, patterns: Mapping[str, str], rule: Rule) -> None:
    """Raise for a pattern that fits no parameter of an optimizer."""
    names = [slot.name for slot in rule._slots.values()]
    if patterns and not any(names):
        raise ValueError(f"{argument} goes by names, and the parameters have none: pass model.named_parameters()")
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"{argument}: {pattern!r} fits no parameter{nearest(pattern, names)}")


class AdamMini(AdamW):
    """Adam with one second moment per attention head, per row or per tensor: half of Adam's state.

    Which block a tensor's second moments are over is decided by its role and shape, and shown by `explain()`:

    ======================================================= ==================================================
    queries, keys, and fused queries, keys and values       head; row where no head counts are given
    norms                                                   tensor
    biases, other vectors and scalars                       value (plain Adam)
    experts fused into three dimensions                     expert: one each, as rows are the first dimension
    every other matrix or convolution                       row
    ======================================================= ==================================================

    A fused (d, 3 d) matrix holds input neurons in its rows, as GPT-2's `Conv1D` does: one per column, which is finer
    than a head. That other matrices are of a `Conv1D`, `roles=lowbit.roles(model)` tells; their shapes do not.

    Args:
        params: see `lowbit.optim.Rule`, as all keyword arguments not listed here. With names, as roles need them.
        lr: learning rate.
        betas: decay of the first and of the second moment.
        eps: added to the denominator.
        weight_decay: decoupled; of matrices only (see `decay_1d`).
        head_dim: rows of one attention head.
        num_heads: heads of a query matrix. Without `head_dim`, a query's rows divided by this are a head.
        num_kv_heads: heads of a key matrix; None: as many as its rows hold, of columns / num_heads rows each.
        v_per_tensor: one second moment for each whole value matrix, as the authors advise for short runs (there
            `wv_names = {}`).
        partition: {glob on names: "head", "row", "column", "tensor" or "value"}, before all of the above.
        decay_1d: decay norms, biases and other vectors too; the released code does not, nor does it ask.
        beta1_annealing: length in steps of a cosine on beta1, as in `AdamW`; None leaves beta1 constant.
        eta_min: where that cosine ends, as a share.
        **options: states, seed, master, rounding, state_rounding, stabilize, policy, roles.

    Raises:
        ValueError: also for heads that do not divide a tensor, or are not the same size in queries and keys.

    >>> import torch
    >>> q, up = (torch.nn.Parameter(torch.zeros(n, 32)) for n in (32, 64))
    >>> opt = AdamMini([("q_proj", q), ("up_proj", up)], num_heads=4, roles={"q_*": "q"})
    >>> [row.kind for row in opt.explain().rows], opt.state[q]["exp_avg_sq"].shape, opt.state[up]["exp_avg_sq"].shape
    (['head', 'row'], torch.Size([4]), torch.Size([64]))
    """

    by_role: ClassVar = True
    apart: ClassVar = True
    kinds: ClassVar = tuple(
        where + decay for where in ("row", *PARTITIONS, UNKNOWN_HEADS, EXPERT) for decay in ("", UNDECAYED)
    )

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        head_dim: int | None = None,
        num_heads: int | None = None,
        num_kv_heads: int | None = None,
        v_per_tensor: bool = False,
        partition: Mapping[str, str] | None = None,
        decay_1d: bool = False,
        beta1_annealing: int | None = None,
        eta_min: float = 0.5,
        **options: Unpack[Options],
    ):
        self.partition = check_patterns("partition", partition or {}, PARTITIONS)
        hyper = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "decay_1d": decay_1d}
        heads = {"head_dim": head_dim, "num_heads": num_heads, "num_kv_heads": num_kv_heads}
        hyper.update(beta1_annealing=beta1_annealing, eta_min=eta_min)
        super(AdamW, self).__init__(params, {**hyper, **heads, "v_per_tensor": v_per_tensor}, **options)
        check_matches("partition", self.partition, self)

    def check_group(self, group: Mapping[str, Any]) -> None:
        """See `Rule.check_group`."""
        super().check_group(group)
        for name in ("head_dim", "num_heads", "num_kv_heads"):
            count = group[name]
            if count is not None and (not isinstance(count, int) or isinstance(count, bool) or count < 1):
                raise ValueError(f"{name} must be a whole number of at least 1, or None, not {count!r}")
        if group["num_kv_heads"] is not None and group["num_heads"] is None and group["head_dim"] is None:
            raise ValueError("num_kv_heads alone tells no query's heads: pass num_heads or head_dim as well")

    def fixed(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """See `Rule.fixed`."""
        own = ("head_dim", "num_heads", "num_kv_heads", "v_per_tensor", "decay_1d")
        return {**super().fixed(group), **{name: group[name] for name in own}}

    def kind(self, group: Mapping[str, Any], name: str, shape: tuple[int, ...], role: str) -> str:
        """The partition, and whether the tensor is decayed."""
        where = chosen(self.partition, name) or self._partition(group, name, shape, role)
        return where if has_decay(group, shape, role) else where + UNDECAYED

    def _partition(self, group: Mapping[str, Any], name: str, shape: tuple[int, ...], role: str) -> str:
        if role == "norm":
            return "tensor"
        if role == "bias" or len(shape) < 2:
            return "value"
        if role == "v" and group["v_per_tensor"]:
            return "tensor"
        if name in self.transposed or (role == "qkv" and shape[1] == 3 * shape[0]):
            return "column"
        if role in ("q", "k", "qkv"):
            return UNKNOWN_HEADS if group["head_dim"] is None and group["num_heads"] is None else "head"
        return EXPERT if role == "expert" and len(shape) > 2 else "row"

    def plan(self, group: Mapping[str, Any], kind: str = "") -> tuple[Mapping[str, Moment], tuple[Stage, ...]]:
        """See `Rule.plan`."""
        where = kind.removesuffix(UNDECAYED)
        return shared_second_moment(where if where in ("value", "column") else "group", kind == where)

    def group_rows(self, group: Mapping[str, Any], name: str, shape: tuple[int, ...], role: str) -> int:
        """See `Rule.group_rows`."""
        where = self.kind(group, name, shape, role).removesuffix(UNDECAYED)
        rows = shape[0] if shape else 1
        return max(1, rows) if where == "tensor" else self._head(group, name, shape, role) if where == "head" else 1

    def _head(self, group: Mapping[str, Any], name: str, shape: tuple[int, ...], role: str) -> int:
        """How many rows of a tensor are one head."""
        rows, cols = shape[0], shape[-1]
        head_dim, heads, kv_heads = group["head_dim"], group["num_heads"], group["num_kv_heads"]
        if head_dim is None and heads is None:
            raise ValueError(f'{name}: partition "head" needs to know how many heads there are: pass num_heads=')
        count = {"k": kv_heads, "qkv": heads and heads + 2 * (kv_heads or heads)}.get(role, heads)
        whence = "" if head_dim else f" ({cols} columns / num_heads={heads})"
        if not head_dim and count is None and cols % heads == 0:  # a key's, when only queries' are counted
            head_dim = cols // heads
        if not head_dim and count is not None and rows % count == 0:
            head_dim = rows // count
        if not head_dim or rows % head_dim or (count and rows != count * head_dim):
            asked = [f"{count} heads"] * bool(count) + [f"heads of {head_dim} rows{whence}"] * bool(head_dim)
            raise ValueError(
                f"{name}: its {rows} rows are not {' and '.join(asked) or f'of {heads} heads'}; pass the right "
                f'head_dim, num_heads and num_kv_heads, or partition={{"{name}": "row"}}'
            )
        return head_dim

    def init_state(self) -> None:
        """See `Rule.init_state`; all heads that were counted must have one size."""
        super().init_state()
        for group in self.param_groups:
            heads = [self._slots[p] for p in group["params"] if self._slots[p].kind.startswith("head")]
            odd = next((slot for slot in heads if slot.group_rows != heads[0].group_rows), None)
            if odd is not None:
                raise ValueError(
                    f"{odd.label}: would have heads of {odd.group_rows} rows, {heads[0].label} of "
                    f"{heads[0].group_rows}: pass head_dim, or num_heads and num_kv_heads"
                )
