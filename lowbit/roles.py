"""What a parameter is for: embedding, head, q, k, v, … . The one home of what model families call their parts.

`role_of` goes by name and shape, which is all that an optimizer given named parameters has. `roles(model)` also sees
the modules and asks their types first. Neither ever fails on a name or a shape: what cannot be placed has the role "",
which is printed, and a vector is never taken for a matrix, whatever it is called.
"""

from __future__ import annotations

import difflib
import io
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy

from .formats import nearest
from .tables import width

# Every role there is. "expert": experts fused in one tensor; "mlp": another matrix of an MLP, as gate and up fused.
ROLES = (
    "embedding", "head", "q", "k", "v", "qkv", "o", "gate", "up", "down", "mlp", "expert", "router", "conv",
    "norm", "bias", "",
)  # fmt: skip
OF_VECTORS = ("norm", "bias", "")  # the only roles that a tensor with fewer than two dimensions can have


def _table(**words: str) -> dict[str, str]:
    return {word: role for role, names in words.items() for word in names.split()}


# Modules' names in lower case, or `parent.name`; tests/test_roles.py has them family by family. A name that several use
# for different things stands in a table that holds inside an attention, inside an MLP, or in neither.
ANYWHERE = _table(
    embedding="wte wpe shared relative_attention_bias",
    head="lm_head embed_out output_projection to_logits predictions.decoder lm_head.decoder generator.proj",
    q="q_proj wq to_q q_lin q_linear query_proj linear_q q_attn q_b_proj q_proj_weight",
    k="k_proj wk to_k k_lin k_linear key_proj linear_k k_proj_weight",
    v="v_proj wv to_v v_lin v_linear value_proj linear_v v_proj_weight",
    qkv="qkv qkv_proj wqkv c_attn query_key_value to_qkv linear_qkv attn_qkv in_proj_weight",
    o="o_proj attn_out attn_proj",
    gate="gate_proj w_gate wi_0",
    up="up_proj w_up c_fc fc_in wi_1 linear_fc1 dense_h_to_4h intermediate.dense",
    down="down_proj w_down fc_out linear_fc2 dense_4h_to_h",
    mlp="gate_up_proj w12 gate_up up_gate_proj",
    router="shared_expert_gate gate.wg",
) | {"crossattention.c_attn": ""}  # GPT-2's is k and v, without q
IN_ATTENTION = _table(
    q="q query", k="k key", v="v value", qkv="in_proj",
    o="o wo out_proj c_proj dense proj projection out output to_out out_lin linear_out linear_proj attention.output",
)  # fmt: skip
IN_MLP = _table(
    gate="gate w1", up="w3 up fc1 lin1 linear1 w_1 wi key", down="w2 down fc2 lin2 linear2 w_2 wo c_proj value",
)  # fmt: skip
ELSEWHERE = _table(
    head="head classifier score qa_outputs output_layer", o="wo",
    up="fc1 lin1 linear1", down="fc2 lin2 linear2 output.dense",
)  # fmt: skip
AT_THE_TOP = _table(head="output decoder proj_out", mlp="fc1 lin1 linear1 fc2 lin2 linear2")  # outside numbered layers

# Words that say nothing: what they belong to stands before them.
GENERIC = {"weight", "kernel", "linear", "lin", "layer", "module", "base_layer", "fn", "net", "parametrizations"}
GENERIC |= {"original", "original0", "original1", "weight_orig", "weight_g", "weight_v"}
ATTENTION = re.compile(r".*(attn|attention)s?|att|sa|mha|mhsa|mqa|gqa")
MLP = {"mlp", "mlps", "ffn", "ff", "ffw", "feedforward", "moe", "expert", "experts", "intermediate", "densereludense"}


def role_of(name: str, shape: Sequence[int], roles: Mapping[str, str] | None = None) -> str:
    """The role of a parameter, one of `ROLES`; "" where name and shape do not tell.

    Args:
        name: dotted, as `named_parameters()` gives it; "" where there is none.
        shape: the parameter's.
        roles: {name or glob: role}, asked first: the name itself, then the first glob that matches. The role of a
            matrix is not given to a vector, so {"*.q_proj.*": "q"} leaves the bias a bias.

    >>> role_of("model.layers.0.self_attn.k_proj.weight", (64, 128)), role_of("model.final_layernorm.weight", (128,))
    ('k', 'norm')
    >>> role_of("h.0.attn.c_proj.weight", (64, 64)), role_of("h.0.mlp.c_proj.weight", (64, 256))
    ('o', 'down')
    >>> role_of("table", (100, 64), {"tab*": "embedding"})
    'embedding'
    """
    if roles:
        told = _told(name, shape, roles)
        if told is not None:
            return roles[told]
    parts = clean_name(name).split(".")
    words = [w for w in parts if not _says_nothing(w)]
    owner, own = _pieces(words[-1]) if words else [], _pieces(parts[-1])
    if "bias" in own:
        return "bias"
    if len(shape) < 2:  # `norm.weight`, and also `norm.scale`
        module = next((w for w in reversed(parts[:-1]) if not _says_nothing(w)), "")
        around = [*own, *_pieces(module)]
        return "norm" if _is_norm(around) or {"ln", "bn"} & set(around) else ""
    if _is_norm(_pieces(".".join(parts[-2:-1]))):
        return "norm"  # nn.LayerNorm((8, 8))
    embeds = any(p.startswith("embed") or p in ("emb", "embs", "embd") for p in owner)
    if len(shape) > 3:
        return "embedding" if embeds and words[-1] == parts[-1] else "conv"  # a table of positions is no module
    if any("lora" in _pieces(w) for w in words):
        return ""  # a low-rank factor has neither the rows nor the columns of what it is added to
    if embeds and not {"proj", "projection", "mapping", "dense"} & set(owner):
        return ANYWHERE.get(words[-1].lower(), "embedding")
    place = next(filter(None, map(_place, reversed(words))), "")
    if len(shape) == 3:
        return "conv" if any(p.startswith("conv") for p in owner) else "expert" if place == "mlp" else ""
    return _matrix(parts, words, place, (shape[0], shape[1])) if words else ""


def _matrix(parts: list[str], words: list[str], place: str, shape: tuple[int, int]) -> str:
    """The role of a 2-D tensor by its module's name, that module's parent, and where they are."""
    word, pair = words[-1].lower(), ".".join(words[-2:]).lower()
    if place == "mlp" and word == "gate" and _routes(words, shape):
        return "router"
    if place == "mlp" and words[-1] == "Wi":
        return "mlp"  # ModernBERT's gate and up; T5's `wi` is up alone
    if any("router" in _pieces(w) for w in words[-2:]):
        return "router"
    after = parts[len(parts) - parts[::-1].index(words[-1]) :]
    numbered = bool(after) and after[0].isdecimal()  # one of several, so not the last layer
    around = {"attention": IN_ATTENTION, "mlp": IN_MLP}.get(place, ELSEWHERE)
    tables = [ANYWHERE, around] if any(p.isdecimal() for p in parts) or place else [ANYWHERE, AT_THE_TOP, around]
    for table in tables:
        for key in (pair, word):
            if key in table and not (numbered and table[key] == "head"):
                return table[key]
    pieces = _pieces(word)
    if not numbered and not place and (pieces[-1:] == ["head"] or any(p.startswith("unembed") for p in pieces)):
        return "head"
    return "mlp" if place == "mlp" else ""


def _routes(words: list[str], shape: tuple[int, int]) -> bool:
    """Whether a `gate` of an MLP chooses experts: it has a row for each; SwiGLU's has one for each hidden unit."""
    around = _pieces(words[-2]) if len(words) > 1 else []
    return not {"expert", "experts"} & set(around) and ("moe" in around or shape[0] < shape[1])


def _pieces(word: str) -> list[str]:
    """`post_attentionLayerNorm1` -> post, attention, layer, norm: so that `ln` is not found in `kiln`."""
    split = (
        re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", word.replace("MoE", "Moe")).lower().split("_")
    )
    return [p for p in (piece.rstrip("0123456789") for piece in split) if p]


def _says_nothing(word: str) -> bool:
    return word.isdecimal() or word.lower() in GENERIC


def _is_norm(pieces: list[str]) -> bool:
    return any(piece.endswith("norm") for piece in pieces)


def _place(word: str) -> str:
    pieces = _pieces(word)
    if MLP & {*pieces, word.lower()} or "feed_forward" in word.lower():
        return "mlp"
    return "attention" if any(ATTENTION.fullmatch(p) for p in pieces) else ""


def clean_name(name: str) -> str:
    """A parameter's name without what wrappers put in front of it, so that wrapping changes no seed and no policy.

    >>> clean_name("module.layers.0._orig_mod.weight")
    'layers.0.weight'
    """
    wrappers = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
    return ".".join(w for w in name.split(".") if w not in wrappers).removeprefix("module.")


# ---- what the user says


def _told(name: str, shape: Sequence[int], roles: Mapping[str, str]) -> str | None:
    """The entry of the map that speaks of this parameter."""
    name = clean_name(name)
    if name in roles and _fits(roles[name], shape):
        return name
    return next((glob for glob, role in roles.items() if _fits(role, shape) and fnmatchcase(name, glob)), None)


def _fits(role: str, shape: Sequence[int]) -> bool:
    return len(shape) >= 2 or role in OF_VECTORS


def check_role(role: Any, where: str) -> None:
    """Raise `ValueError` unless there is such a role."""
    if role not in ROLES:
        known = ", ".join(filter(None, ROLES))
        raise ValueError(
            f"{where}: unknown role {role!r}{nearest(role, ROLES) if isinstance(role, str) else ''}; known: {known}"
        )


def role_map(roles: Any, where: str = "roles") -> dict[str, str]:
    """The checked map {glob: role} of an argument; the names that `roles(model)` gave stand for themselves only."""
    if not isinstance(roles, Mapping | None):
        raise TypeError(f"{where} must be a dict such as {{'*.table': 'embedding'}}, not {type(roles).__name__}")
    for pattern, role in (roles or {}).items():
        if not isinstance(pattern, str):
            raise TypeError(f"{where}: a name or glob is a str, not {type(pattern).__name__}")
        check_role(role, f"{where} {pattern!r}")
    literal = isinstance(roles, Roles)
    return {re.sub(r"([*?[])", r"[\1]", p) if literal else p: role for p, role in (roles or {}).items()}


def check_used(roles: Mapping[str, str], shapes: Mapping[str, Sequence[int]], where: str = "roles") -> None:
    """Raise `ValueError` for a map that names no parameter: an entry of a dict, or all of what `roles(model)` gave.

    Args:
        roles: as the user gave it.
        shapes: name -> shape of every parameter there is.
        where: the argument's name.
    """
    named = {clean_name(name): shape for name, shape in shapes.items()}
    if isinstance(roles, Roles):
        if roles and not named.keys() & roles.keys():
            raise ValueError(f"{where} names no parameter of this optimizer{near(next(iter(roles)), named)}")
        return
    for pattern, role in roles.items():
        hit = [name for name in named if name == pattern or fnmatchcase(name, pattern)]
        if not hit:
            raise ValueError(f"{where} {pattern!r} names no parameter{near(pattern, named)}")
        if not any(_fits(role, named[name]) for name in hit):
            raise ValueError(f"{where} {pattern!r} names vectors only ({hit[0]} …), which cannot be {role!r}")


def near(pattern: str, names: Collection[str]) -> str:
    """` (near names: a, b)`, the names most like a pattern; or some of them."""
    close = difflib.get_close_matches(pattern, list(names), n=3, cutoff=0.5) or list(names)[:3]
    return f" (near names: {', '.join(close)})" if close else ""


# ---- a whole model


class Roles(Mapping[str, str]):
    """{parameter name: role}, as `roles(model)` found it; `print` shows a table. Pass it to an optimizer as `roles=`.

    Attributes:
        why: what decided each role: an override, a module's type, a shape, the name.
        shapes: of the parameters.
        tied: name -> the other names of the same tensor.
        transposed: the names of weights that are stored (in, out), as in transformers' Conv1D.
        num_heads: query heads of an attention, by `model.config` or torch's modules; None where these do not say.
        num_kv_heads: key and value heads.
        head_dim: rows of a query head.
    """

    def __init__(self, found: Mapping[str, tuple[str, str]], shapes: Mapping[str, tuple[int, ...]]):
        self._roles = {name: role for name, (role, _) in found.items()}
        self.why = {name: why for name, (_, why) in found.items()}
        self.shapes = dict(shapes)
        self.tied: dict[str, tuple[str, ...]] = {}
        self.transposed: frozenset[str] = frozenset()
        self.num_heads: int | None = None
        self.num_kv_heads: int | None = None
        self.head_dim: int | None = None

    def __getitem__(self, name: str) -> str:
        return self._roles[clean_name(name)]

    def __iter__(self) -> Iterator[str]:
        return iter(self._roles)

    def __len__(self) -> int:
        return len(self._roles)

    def __repr__(self) -> str:
        return f"Roles({self._roles!r})"

    @property
    def unplaced(self) -> tuple[str, ...]:
        """The matrices whose role is not known."""
        return tuple(name for name, role in self.items() if not role and len(self.shapes[name]) > 1)

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table

        # Layers that differ in their number only share a line.
        lines = [
            (".".join("*" if part.isdecimal() else part for part in name.split(".")), shape, self[name], self.why[name])
            for name, shape in self.shapes.items()
        ]
        count, first = Counter(lines), dict(zip(reversed(lines), reversed(list(self.shapes)), strict=True))
        table = Table("parameter", "shape", "role", "decided by", title="Roles", title_justify="left")
        for line, times in count.items():
            pattern, shape, role, why = line
            name = f"{pattern}  ×{times}" if times > 1 else first[line]
            table.add_row(name, "×".join(map(str, shape)) or "scalar", role or "–", why)
        out = io.StringIO()
        console = Console(file=out, width=width(), markup=False, highlight=False)
        console.print(table)
        for name, others in self.tied.items():
            console.print(f"{name} is also {', '.join(others)}.", soft_wrap=True)
        if self.num_heads:
            heads = f"{self.num_heads} query heads, {self.num_kv_heads} key and value heads"
            console.print(f"{heads} of {self.head_dim or 'unknown'} rows, by the model.", soft_wrap=True)
        if self.unplaced:
            matrices = "1 matrix" if len(self.unplaced) == 1 else f"{len(self.unplaced)} matrices"
            console.print(
                f"Not placed ({matrices}): {', '.join(self.unplaced)}. Say what they are with "
                "overrides={name or glob: role}, where it matters to the optimizer.",
                soft_wrap=True,
            )
        return out.getvalue()


def roles(model: nn.Module, overrides: Mapping[str, str] | None = None) -> Roles:
    """What each parameter of a model is for, by module type and shape first, and by name last.

    Args:
        model: any module.
        overrides: {name or glob: role}, which come first.

    Returns:
        A mapping {name: role}, which prints as a table. A weight that is an embedding and the head, too, is an
        "embedding" once; the table says so. Matrices that cannot be placed have the role "" and are listed.

    Raises:
        ValueError: an override names no parameter, or no role; or a lazy module has not been run yet.

    >>> net = nn.Sequential(nn.Embedding(100, 64), nn.LayerNorm(64), nn.Linear(64, 100, bias=False))
    >>> dict(roles(net))
    {'0.weight': 'embedding', '1.weight': 'norm', '1.bias': 'bias', '2.weight': 'head'}
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"roles: model must be a torch.nn.Module, not {type(model).__name__}")
    told = role_map(overrides, "overrides")
    names = {id(p): clean_name(name) for name, p in model.named_parameters()}
    lazy = [name for name, p in model.named_parameters() if is_lazy(p)]
    if lazy:
        raise ValueError(f"roles: {lazy[0]} has no shape yet; run the model once first")
    shapes = {names[id(p)]: tuple(p.shape) for p in model.parameters()}
    check_used(told, shapes, "overrides")

    modules = dict(model.named_modules(remove_duplicate=False))
    owners: dict[str, list[tuple[str, nn.Module]]] = {name: [] for name in names.values()}
    for path, p in model.named_parameters(remove_duplicate=False):
        owners[names[id(p)]].append((path, modules[path.rpartition(".")[0]]))

    tables = {module.weight.shape for module in modules.values() if isinstance(module, nn.Embedding)}
    linears = [path for path, module in modules.items() if isinstance(module, nn.Linear)]
    found = {}
    for name, places in owners.items():
        override = _told(name, shapes[name], told)
        by_type = next(filter(None, (_by_type(*at, modules, len(shapes[name])) for at in places)), None)
        if override is not None:
            found[name] = told[override], f"override {override!r}"
        elif by_type:
            found[name] = by_type
            head = next((clean_name(path) for path, module in places if isinstance(module, nn.Linear)), "")
            if head and by_type[0] == "embedding":
                found[name] = "embedding", f"{by_type[1]}; it is also the head, {head}"
        else:
            path, module = places[0]
            found[name] = _by_name(name, shapes[name], module, modules.get(path.rpartition(".")[0].rpartition(".")[0]))
            ends = linears[-1:] == [path.rpartition(".")[0]] and shapes[name] in tables
            if ends and found[name][0] in ("", "mlp"):
                found[name] = "head", "shape: the last Linear, as many rows as an embedding"

    result = Roles(found, shapes)
    result.tied = {name: tuple(clean_name(path) for path, _ in at[1:]) for name, at in owners.items() if len(at) > 1}
    result.transposed = frozenset(
        name for name, at in owners.items() if len(shapes[name]) == 2 and type(at[0][1]).__name__ == "Conv1D"
    )
    _read_heads(result, model)
    return result


def _by_type(path: str, module: nn.Module, modules: Mapping[str, nn.Module], dimensions: int) -> tuple[str, str] | None:
    """(role, why), where the type of the module that has the parameter tells."""
    owner, _, own = path.rpartition(".")
    parent, _, child = owner.rpartition(".")
    above = modules.get(parent) if owner else None
    kind = type(module).__name__
    if "bias" in _pieces(own):
        return "bias", "the parameter's own name"
    if isinstance(module, nn.MultiheadAttention):
        return ANYWHERE.get(own, ""), f"module: {kind}"
    if isinstance(above, nn.MultiheadAttention) and child == "out_proj":
        return "o", "module: MultiheadAttention"
    if isinstance(above, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer) and child in ("linear1", "linear2"):
        return IN_MLP[child], f"module: {type(above).__name__}"
    norms = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, _NormBase)
    if isinstance(module, norms) or _is_norm(_pieces(kind)[-1:] if dimensions > 1 else _pieces(kind)):
        return "norm", f"module: {kind}"
    embeds = isinstance(module, nn.Embedding | nn.EmbeddingBag) or _pieces(kind)[-1:] == ["embedding"]
    if dimensions == 2 and embeds:
        return "embedding", f"module: {kind}"
    if dimensions >= 3 and isinstance(module, _ConvNd):
        return "conv", f"module: {kind}"
    if dimensions == 2 and "router" in _pieces(kind):
        return "router", f"module: {kind}"
    if dimensions == 3 and {"expert", "experts", "moe"} & set(_pieces(kind)):
        return "expert", f"module: {kind}"
    return None


def _by_name(name: str, shape: tuple[int, ...], module: nn.Module, above: nn.Module | None) -> tuple[str, str]:
    role = role_of(name, shape)
    if role == "embedding" and isinstance(module, nn.Linear):
        role = ""  # the projection inside an embedder, not a table that is looked up
    if role == "gate" and name.endswith("w1.weight") and not hasattr(above, "w3"):
        return "up", "name, and there is no w3"
    return role, "name" if role else "not placed" if len(shape) > 1 else "a vector"


def _read_heads(result: Roles, model: nn.Module) -> None:
    """The numbers of heads, as the families' configs spell them, or as torch's attention modules have them."""
    inside = getattr(model, "module", model)  # of DistributedDataParallel
    config = getattr(inside, "config", None)
    config = getattr(config, "text_config", None) or config  # of a model that also sees or hears

    def number(*names: str) -> int | None:
        values = [config.get(n) if isinstance(config, Mapping) else getattr(config, n, None) for n in names]
        return next((v for v in values if type(v) is int and v > 0), None)

    result.num_heads = number("num_attention_heads", "n_head", "num_heads", "n_heads")
    result.num_kv_heads = number("num_key_value_heads", "num_kv_heads", "n_kv_heads") or result.num_heads
    result.head_dim = number("qk_head_dim", "head_dim", "d_kv")  # DeepSeek's head_dim is of rotated columns only
    if result.num_heads and not result.head_dim:  # as many rows as the query has for each head
        query = [result.shapes[name][0] for name, role in result.items() if role == "q"]
        width = query[0] if query else number("hidden_size", "n_embd", "d_model", "dim") or 0
        result.head_dim = width // result.num_heads if width % result.num_heads == 0 and width else None
    found = {(m.num_heads, m.head_dim) for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    if not result.num_heads and len(found) == 1:
        [(result.num_heads, result.head_dim)] = found
        result.num_kv_heads = result.num_heads
