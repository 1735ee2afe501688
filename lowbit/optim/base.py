"""Rule: the base class of every optimizer, and the one place where a step happens.

A subclass declares what its paper says (moments, scalars, stages, constants); this class does the rest, for every
optimizer and every state format alike: parameter groups, states, job table, rounding seeds, checks, checkpoints.

One step, once through: check everything -> constants per group (float64 on the host) -> one job per tensor ->
`backend.step(jobs)`, one call. State values are plain tensors and ints, created eagerly for every parameter that
requires a gradient, so checkpoint engines never need a fake first step.
"""

from __future__ import annotations

import inspect
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import count
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, TypedDict
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from .. import backends
from ..compiler import constant
from ..formats import nearest
from ..policy import PRESETS_VERSION, Policy, Storage
from ..roles import Roles, check_used, clean_name, role_map
from ..shards import local
from ..stages import Job, Moment, Program, Stage
from . import advice, checkpoint, replay, sparse
from .explain import Explanation, explain
from .hyper import check, check_common, check_names, of_floats, of_python
from .matrices import Chain, carried
from .parts import Part, Stabilizer, stabilizers
from .roster import Roster, Turns
from .sharded import count_together
from .slot import FLOATS, Slot, asked_of

if TYPE_CHECKING:
    from .in_backward import InBackward

Shares = list[tuple[ModuleType, list[Job]]]
MakesPart = Callable[[], sparse.Part]

__all__ = ["Options", "Params", "Part", "Rule", "Stabilizer"]

# What a step does: each group with its tensors that have a gradient, and their states.
Work = list[tuple[dict[str, Any], list[tuple[Slot, dict[str, Any]]]]]

Params = Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]]


class Options(TypedDict, total=False):
    """The keyword arguments that every optimizer takes: how things are stored and rounded (see `Rule`)."""

    states: Storage
    seed: int
    master: str
    rounding: str
    state_rounding: str
    stabilize: Iterable[Stabilizer]
    policy: Policy | None
    roles: Mapping[str, str] | None


class Rule(torch.optim.Optimizer, Part):
    """An optimizer whose per-value state can be stored in any format.

    To write your own: declare `moments` (letter -> Moment), `scalars` (name -> initial value) and `stages`, give
    `constants`, and pass the hyper-parameters as `defaults`.

    Args:
        params: parameters, (name, parameter) pairs, or groups, as in `torch.optim`. Names make policies, roles and
            rounding seeds independent of the order. A group may also carry what `hyper.EXTRAS` lists (labels, what
            schedulers write) and keys of your own that begin with an underscore.
        defaults: hyper-parameters and their default values; every one can be set per group. `lr` may be a tensor of one
            number in float32 or float64 on the parameters' GPU, as schedulers and captured graphs fill it: kernels read
            it there, and no step waits (it does where the reference or a CPU needs the number). It is looked at once,
            when the group is added; a step with a rate that is not finite leaves parameters as they are.
        states: "fp32", "bf16", "8bit", "4bit", a format name, a Format, or a dict from moment names to those. Also per
            group.
        seed: of stochastic rounding.
        master: how the low bits of a bf16/fp16 parameter are kept: "none", "split8", "split16", "kahan", "fp32".
        rounding: how a bf16/fp16 parameter is written: "auto" (stochastic when master is "none", else nearest),
            "nearest" or "stochastic".
        state_rounding: how states are written: "nearest" or "stochastic".
        stabilize: stabilizers to put in front of the update, in order.
        policy: overrides of which tensor's state is stored how.
        roles: {name or glob: role}, such as {"*.table": "embedding"}, or what `lowbit.roles(model)` found. Parameters
            it does not name go by their own names and shapes. Only the latter tells that a weight is stored (in, out),
            as transformers' `Conv1D` has it: rows are taken for outputs otherwise.

    Raises:
        ValueError: a hyper-parameter out of range, an unknown name or key of a group, a parameter given twice, or roles
            that name no parameter.
        TypeError: a hyper-parameter of a wrong type, or a parameter that is not float32, bfloat16 or float16.
    """

    moments: ClassVar[dict[str, Moment]] = {}
    kinds: ClassVar[tuple[str, ...]] = ("",)  # of tensors, each with a plan of its own
    by_role: ClassVar[bool] = False  # whether a tensor's kind depends on its role, and so on its name
    host: ClassVar[dict[str, float]] = {}  # numbers per tensor that matrix stages keep on the host
    guarded: bool = True
    apart: ClassVar[bool] = False  # whether its states mean something else than those of the class it derives from
    in_backward: InBackward | None = None  # what steps each parameter in backward

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Show the common options in a subclass's signature in place of its `**options`."""
        super().__init_subclass__(**kwargs)
        if "__init__" in vars(cls):
            own = inspect.signature(cls.__init__)
            named = {n: p for n, p in own.parameters.items() if p.kind is not p.VAR_KEYWORD}
            if len(named) < len(own.parameters):
                common = inspect.signature(Rule.__init__).parameters
                missing = [common[n] for n in Options.__annotations__ if n not in named]
                shown = sorted([*named.values(), *missing], key=lambda p: p.kind)
                cls.__init__.__signature__ = own.replace(parameters=shown)  # type: ignore[attr-defined]

    def __init__(
        self,
        params: Params,
        defaults: dict[str, Any],
        *,
        states: Storage = "8bit",
        seed: int = 0,
        master: str = "none",
        rounding: str = "auto",
        state_rounding: str = "nearest",
        stabilize: Iterable[Stabilizer] = (),
        policy: Policy | None = None,
        roles: Mapping[str, str] | None = None,
        **unknown: Any,
    ):
        if unknown:
            given, known = next(iter(unknown)), [n for n in inspect.signature(type(self)).parameters if n != "unknown"]
            hint = nearest(given, known)
            raise TypeError(f"{type(self).__name__} has no argument {given!r}{hint}; it has: {', '.join(known)}")
        self.stabilize = stabilizers(stabilize)
        self._number = _numbered(self)
        if not isinstance(policy, Policy | None):
            raise TypeError(f"policy must be a lowbit.Policy([(match, storage), …]), not {policy!r}")
        self.policy = Policy() if policy is None else policy
        self.roles = role_map(roles)
        self.transposed = roles.transposed if isinstance(roles, Roles) else frozenset[str]()  # stored (in, out)
        self._programs: dict[Any, Program] = {}
        self._slots: dict[Tensor, Slot] = {}
        self._roster: Roster | None = None  # what the last step found
        self.sharded = False  # whether any parameter is
        self.devices: set[torch.device] = set()  # where there are parameters
        self.advised = False  # of a learning rate that is too small
        for part in self.stabilize:
            for name, value in part.hyper.items():
                if name in defaults:
                    raise ValueError(f"stabilize: {name!r} of {part!r} is already a hyper-parameter of this optimizer")
                defaults[name] = value
        storage = {"states": states, "seed": seed, "master": master, "rounding": rounding}
        every = {**defaults, **storage, "state_rounding": state_rounding}
        super().__init__(_as_list(params), {name: of_python(value) for name, value in every.items()})
        named = [pair for g in self.param_groups for pair in zip(g.get("param_names", ()), g["params"], strict=False)]
        check_used(roles or {}, {name: p.shape for name, p in named})
        advice.nameless(self)
        advice.unmatched(self)

    # ---- what a subclass may override

    def plan(self, group: Mapping[str, Any], kind: str = "") -> tuple[Mapping[str, Moment], tuple[Stage, ...]]:
        """The moments and stages of a group's tensors of one kind (amsgrad adds a moment, for instance)."""
        return self.moments, self.stages

    def kind(self, group: Mapping[str, Any], name: str, shape: tuple[int, ...], role: str) -> str:
        """Which of `kinds` a tensor is, where an optimizer does not treat all alike; asked once."""
        return self.kinds[0]

    def check_group(self, group: Mapping[str, Any]) -> None:
        """Raise `ValueError` for a hyper-parameter out of range; called before anything changes."""

    def group_rows(self, group: Mapping[str, Any], name: str, shape: tuple[int, ...], role: str) -> int:
        """How many consecutive rows of a tensor are a group, where a moment or measure is over groups; asked once."""
        return 1

    def shapes(self, group: Mapping[str, Any], kind: str, shape: tuple[int, ...]) -> Mapping[str, tuple[int, int]]:
        """The shapes of letters that are no tensor of the parameter's shape, where there are matrix stages."""
        return {}

    def kind_constants(self, group: Mapping[str, Any], t: int, kind: str) -> dict[str, float]:
        """The constants of tensors of one kind, where they differ."""
        return self.constants(group, t)

    def fixed(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """What a group's states and stages are made for, by name: it may not change afterwards."""
        return {name: group.get(name) for name in ("states", "master", "amsgrad")}

    def kept(self, group: Mapping[str, Any], name: str, shape: tuple[int, ...], role: str) -> int:
        """How many values of each row of a tensor have moments and are stepped; 0 means all. Asked once.

        Which they are is drawn at random, and drawn anew whenever moments are reset.
        """
        return 0

    def step_after(self, group: Mapping[str, Any], t: int) -> int:
        """What `state["step"]` becomes after step t of a tensor: t."""
        return t

    # ---- groups and states

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in torch; its states are created at once. Checks everything before it changes anything."""
        if not isinstance(param_group, dict) or "params" not in param_group:
            raise TypeError(f'group {len(self.param_groups)} must be a dict with "params", not {param_group!r}')
        param_group = {name: of_python(value) for name, value in param_group.items()}
        group = {**self.defaults, **param_group}
        given = group["params"]
        entries = group["params"] = [given] if isinstance(given, Tensor) else _as_list(given)
        params = [entry[1] if isinstance(entry, tuple) else entry for entry in entries]
        names = [entry[0] if isinstance(entry, tuple) else "" for entry in entries]
        taken = {id(p): label for g in self.param_groups for p, label in self._labelled(g)}
        seen: dict[int, str] = {}
        for index, (p, name) in enumerate(zip(params, names, strict=True)):
            label = name or f"parameter {index} of group {len(self.param_groups)}"
            if not isinstance(p, Tensor):
                raise TypeError(f"{label}: an optimizer takes tensors, not {type(p).__name__}")
            if p.dtype not in FLOATS:
                raise TypeError(f"{label}: parameters must be float32, bfloat16 or float16, not {p.dtype}")
            if not p.is_leaf:
                raise ValueError(f"{label}: not a leaf tensor; pass the parameters themselves, not results computed")
            if id(p) in seen or id(p) in taken:
                first = seen.get(id(p)) or taken[id(p)]
                raise ValueError(f"{label}: given twice (first as {first}); give every parameter once")
            seen[id(p)] = label
        check_names(type(self).__name__, param_group, list(self.defaults), len(self.param_groups))
        check(self, group)
        super().add_param_group({**param_group, "params": entries})
        group = self.param_groups[-1]
        others = self.param_groups[:-1]
        group.setdefault("steps", others[0]["steps"] if others else 0)
        group.setdefault("states_version", PRESETS_VERSION)
        try:
            self.init_state()
        except BaseException:  # a tensor that this optimizer cannot take
            self.param_groups.pop()
            for p in params:
                self._slots.pop(p, None)
                self.state.pop(p, None)
            raise

    def _labelled(self, group: Mapping[str, Any]) -> list[tuple[Tensor, str]]:
        """Each parameter of a group with the name that messages use."""
        names = group.get("param_names")
        index = next((i for i, g in enumerate(self.param_groups) if g is group), len(self.param_groups))
        return [(p, names[i] if names else f"parameter {i} of group {index}") for i, p in enumerate(group["params"])]

    def init_state(self) -> None:
        """Create the state of every parameter that requires a gradient and has none yet."""
        position, seen = 0, Counter[str]()
        for group in self.param_groups:
            names = group.get("param_names")
            for i, (p, label) in enumerate(self._labelled(group)):
                name = clean_name(names[i]) if names else ""
                if p not in self._slots:
                    # Two models in one optimizer may use one name twice; their random bits must differ all the same.
                    number = zlib.crc32(f"{name}{'#' * seen[name]}".encode()) if name else position
                    self._slots[p] = Slot(self, group, p, name, label, number)
                    self.devices.add(p.device)
                    self.sharded |= self._slots[p].shard is not None
                position += 1
                seen[name] += 1
                if self._lacks_state(p):
                    self.state[p] = self._slots[p].fresh()

    def _lacks_state(self, p: Tensor) -> bool:
        return not self.state.get(p) and (p.requires_grad or p.grad is not None)

    # ---- the step

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step for every parameter that has a gradient.

        A tensor (or 256-value block, where no measurement is made) with a non-finite gradient, and a block with a value
        too large to be stored, is left as it was and counted (`counters`). Raises before anything has changed for a
        sparse or integer gradient, or when a parameter's dtype, device or shape is no longer what the state was made
        for.

        While a CUDA graph is captured it counts and changes nothing: see `prepare_replay`. To a compiler it is one
        operator (`compiled`), where parameters are plain tensors; else it runs outside of what is compiled.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if torch.compiler.is_compiling() and self.in_backward is None:
            every = [p for group in self.param_groups for p in group["params"]]
            which = [k for k, p in enumerate(every) if p.grad is not None]
            if which and all(type(p) in (Tensor, torch.nn.Parameter) for p in every) and _registered():
                with torch.no_grad():
                    params, grads = [every[k] for k in which], [every[k].grad for k in which]
                    torch.ops.lowbit.step(params, grads, which, self._number)
                return loss
        self._step()
        return loss

    # A scheduler would put a function of its own around `step`, which no compiler traces, to learn that it was called.
    step._wrapped_by_lr_sched = True  # pyright: ignore[reportFunctionMemberAccess]

    @_disable_dynamo
    def _step(self) -> None:
        self._opt_called = True
        if self.in_backward is not None:
            self.in_backward.end()
            return
        with torch.no_grad():
            if replay.capturing(self):
                self._capture()
                return
            counts = [group["steps"] for group in self.param_groups]
            try:
                work = self._work()
                advice.resolution(self, work)
                shares, parts, chains, advance = self._counted(work)
                self._reset("before")
                self._run(shares, parts)
                for chain in chains:
                    chain.run()
                self._reset("after")
                if self.sharded:
                    count_together(self)
                advance()
            except BaseException:  # such as kernels that cannot be compiled, or no memory: this was no step
                for group, count in zip(self.param_groups, counts, strict=True):
                    group["steps"] = count
                self._roster = None
                raise

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's, which no compiler traces."""
        if not (set_to_none and torch.compiler.is_compiling()):
            super().zero_grad(set_to_none)
            return
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None

    def _capture(self) -> None:
        """Put the launches of a step into the CUDA graph that is being captured."""
        replay.check_no_state_is_missing(self)
        shares, *_ = self._counted(self._work(), replay.check_capture)
        for group in self.param_groups:
            group["steps"] -= 1
        for backend, jobs in shares:
            backend.capture(jobs)

    @_disable_dynamo
    def prepare_replay(self) -> None:
        """Make the next replay of a CUDA graph, in which `step` was captured, the next step.

            for _ in range(3):  # compiles the kernels, makes the gradients and what else a graph needs to find
                train_step()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                train_step()  # nothing runs: opt.step() counts and changes nothing
            for batch in data:
                inputs.copy_(batch)
                opt.prepare_replay()
                graph.replay()

        Call it before every replay, on the stream of the replay. It does what the host does in a step: counts, reads
        the learning rate as it is now (one that is a tensor on the device is read by the replay itself), draws the
        step's random bits, resets moments if they are due; and tells the device by one copy, for which nothing waits.
        So replays and eager steps may be mixed, and a checkpoint between them is that of as many eager steps. A replay
        without it repeats a step with the same random bits, uncounted. Hooks of `step` are not called.

        The graph goes on using the memory it was captured with: a state or parameter that was loaded or moved needs a
        new graph. Raises `RuntimeError` before anything has changed where no captured step can be this one (a tensor
        has no gradient that had one, for instance), and where a step cannot be captured at all: matrix stages, sparse
        momentum, moments that are reset after a step, tensors that are not contiguous or not on CUDA.
        """
        if replay.capturing(self):
            raise RuntimeError("prepare_replay() comes before each graph.replay(), not into the graph itself")
        with torch.no_grad():
            work = self._work()
            advice.resolution(self, work)
            shares, _, _, advance = self._counted(work, replay.check_replay)
            self._reset("before")
            for backend, jobs in shares:
                backend.prepare(jobs)
            advance()
        self._opt_called = True  # a scheduler of torch wants to come after a step

    def _work(self) -> Work:
        """What there is to do, checked."""
        if self._roster is not None:
            for group in self.param_groups:
                check_common(group)
            if self._roster.lasts(self):
                return self._roster.work
            self._roster = None
        if any(self._lacks_state(p) for group in self.param_groups for p in group["params"]):
            self.init_state()
        work: Work = []
        for group in self.param_groups:
            check_common(group)
            asked, tensors = asked_of(self, group), []
            for p in group["params"]:
                grad = p.grad
                if grad is not None:
                    slot = self._slots[p]
                    slot.check(asked, grad)
                    tensors.append((slot, self.state[p]))
            work.append((group, tensors))
        return work

    def _run(self, shares: Shares, parts: list[MakesPart]) -> None:
        """Parts of tensors are copies, so one at a time; but what is measured over all tensors needs all at once."""
        together = bool(parts) and any(stage.over == "all" for part in self.stabilize for stage in part.stages)
        whole = [job for _, jobs in shares for job in jobs]
        for makers in [parts] if together else [[], *([part] for part in parts)]:
            made = [make() for make in makers]
            jobs = [*(whole if together else ()), *(part.job for part in made)]
            for backend, own in backends.share(jobs) if made else shares:
                backend.step(own)
            for part in made:
                part.put_back()

    def _counted(
        self, work: Work, check: Callable[[Rule, list[Slot], Shares, bool], None] | None = None
    ) -> tuple[Shares, list[MakesPart], list[Chain], Callable[[], None]]:
        """Count the step and make its jobs, by backend; if that or `check` fails, nothing has been counted.

        Also the chains of tensors that have matrix stages, whose first jobs are among the others if need be,
        and what sets every tensor's own count when the step is done.
        """
        for group in self.param_groups:
            group["steps"] += 1
        try:
            if self._roster is not None:
                shares, advance = self._roster.begin(self)
                if check is not None:
                    check(self, [slot for _, tensors in work for slot, _ in tensors], shares, False)
                return shares, [], [], advance
            made, parts, turns = self._jobs(work)
            chains = [job for job in made if isinstance(job, Chain)]
            jobs = [job for job in made if isinstance(job, Job)]
            shares = backends.share(jobs)
            if check is not None:
                check(self, [slot for _, tensors in work for slot, _ in tensors], shares, bool(parts))
            if Roster.can_be(work):
                self._roster = Roster(self, work, shares, turns)
            elif chains:
                shares = backends.share([*jobs, *(c.begin() for c in chains if c.together)])
            counts = [count for its in turns for count in its.counts]
            after = [its.then for its in turns for _ in its.counts if its.then is not None]
            return shares, parts, chains, partial(_advance, counts, after)
        except BaseException:
            for group in self.param_groups:
                group["steps"] -= 1
            raise

    def _jobs(self, work: Work) -> tuple[list[Job | Chain], list[MakesPart], list[Turns]]:
        jobs, parts, every = [], [], []
        for group, tensors in work:
            turns: dict[tuple[float, str], Turns] = {}  # by the tensors' own counts, nearly always one, and kinds
            for slot, state in tensors:
                count = state["step"]
                key = count.item(), slot.kind
                if key not in turns:
                    turns[key] = Turns(group, slot.kind)
                    turns[key].then = count.new_tensor(turns[key].begin(self, key[0]))
                turn = turns[key].turn
                if slot.kept:
                    slot.fit(state)
                    parts.append(partial(slot.part, group, state, turn))
                elif slot.numel:  # of all ranks: scalars are everywhere
                    jobs.append(slot.job(group, state, turn))
                turns[key].counts.append(count)
            every += turns.values()
        return jobs, parts, every

    def _constants(self, group: Mapping[str, Any], t: int, kind: str) -> dict[str, float]:
        group = of_floats(group, type(self).__name__)
        parts = [part.constants(group, t) for part in self.stabilize]
        return {k: v for constants in (*parts, self.kind_constants(group, t, kind)) for k, v in constants.items()}

    def _reset(self, when: str, only: Tensor | None = None) -> None:
        """Momentum reset: zero scales and codes, written directly; what debiases a moment restarts with it.

        Of every tensor in the group, also of those that have no gradient in this step. As released, a reset is part of
        a tensor's step and happens only to those that have one.
        """
        stepped_only = when == "after" or not self.guarded
        for group in self.param_groups:
            if any(part.resets(group) == when for part in (*self.stabilize, self)):
                for p in group["params"]:
                    meant = only is None or p is only
                    if meant and self.state.get(p) and not (stepped_only and p.grad is None):
                        self._slots[p].zero_moments(self.state[p], keep=when == "after")
                        if self._slots[p].kept:
                            self._slots[p].draw(self.state[p], group["seed"], group["steps"])

    def program(self, group: Mapping[str, Any], kind: str = "") -> Program:
        """The stages of a group's tensors of one kind, stabilizers first, as backends run them."""
        moments, stages = self.plan(group, kind or self.kinds[0])
        name = (tuple(moments.items()), stages)
        if name not in self._programs:
            parts = (*self.stabilize, self)
            front = tuple(stage for part in self.stabilize for stage in part.stages)
            every = (*front, *carried(front, stages), *stages)
            scalars = {k: v for part in parts for k, v in part.scalars.items()}
            others = {m.weight for k in self.kinds for m in self.plan(group, k)[0].values()}
            for weight in others - {m.weight for m in moments.values()}:
                scalars.pop(weight, None)  # of a moment that only tensors of other kinds have
            temporaries = {k: v for part in parts for k, v in part.temporaries.items()}
            self._programs[name] = Program(every, moments, scalars, self.guarded, temporaries)
        return self._programs[name]

    # ---- what it tells

    @property
    def _step_supports_amp_scaling(self) -> bool:  # with it, a GradScaler calls `step`, which can refuse it
        return self.in_backward is not None

    def explain(self) -> Explanation:
        """Every tensor with its role, formats, the rule that chose them and its bytes; `str()` is a table."""
        self.init_state()
        return explain(self)

    def state_bytes(self) -> int:
        """Bytes of all tensors in `state`, codes, scales, scalars and counters included; of shards, this rank's."""
        return sum(local(v).nbytes for state in self.state.values() for v in state.values() if isinstance(v, Tensor))

    def counters(self) -> dict[str, int]:
        """How often a step left a block, or a whole tensor, as it was: values not finite, or too large to be stored."""
        counts = [state["skipped"].tolist() for state in self.state.values() if state]
        blocks, tensors = (sum(column) for column in zip(*counts, strict=True)) if counts else (0, 0)
        return {"skipped_blocks": blocks, "skipped_tensors": tensors}

    # ---- copies and checkpoints

    def __getstate__(self) -> dict[str, Any]:
        # Also what a subclass keeps; not hooks (as in torch), and not what is built again.
        built = ("_programs", "_slots", "_roster", "_number", "devices", "sharded", "step", "in_backward")
        own = {k: v for k, v in vars(self).items() if k not in built and not k.startswith("_optimizer_")}
        return {**own, **super().__getstate__()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        checkpoint.unwrap(state)
        super().__setstate__(state)
        self._programs, self._slots, self._roster, self.devices, self.sharded = {}, {}, None, set(), False
        self._number = _numbered(self)
        for group in self.param_groups:
            for name, value in {**self.defaults, "steps": 0, "states_version": PRESETS_VERSION}.items():
                if name != "differentiable":  # torch adds it to the defaults: a group would differ from before
                    group.setdefault(name, value)
            group.update({k: tuple(v) for k, v in group.items() if isinstance(v, list) and k == "betas"})
        self.init_state()
        checkpoint.convert_stale(self)

    def state_dict(self) -> dict[str, Any]:
        """As in torch, of plain values only, so that `torch.load(weights_only=True)` takes it."""
        state_dict = super().state_dict()
        for group in state_dict["param_groups"]:
            group.update({name: of_python(value) for name, value in group.items()})  # of a scheduler's
            group["states"] = checkpoint.plain(group["states"])
            group[checkpoint.OPTIMIZER] = type(self).__name__
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load hyper-parameters, counters and states; a state stored in another format is converted.

        How states are stored (`states`, `master`) stays what this optimizer was built with. Also takes the state dict
        of the `torch.optim` namesake, and those of classes that this one derives from or that derive from it. Raises
        `ValueError` (or `KeyError`) before anything has changed when the checkpoint is not an optimizer's, is another
        optimizer's, belongs to other parameters, or is damaged.
        """
        with checkpoint.checked_and_kept(self):
            super().load_state_dict(state_dict)


# By a number, which is what an operator of torch can be given.
rules: WeakValueDictionary[int, Rule] = WeakValueDictionary()
_numbers = count()


def _numbered(rule: Rule) -> int:
    number = next(_numbers)
    rules[number] = rule
    return number


@constant
def _registered() -> bool:
    """Make the operator known; a compiler calls this once, and takes what it says for granted."""
    from . import compiled  # noqa: F401  # not before it is needed: importing the library registers nothing

    return True


def _advance(counts: list[Tensor], after: list[Tensor]) -> None:
    if counts:
        torch._foreach_copy_(counts, after)  # pyright: ignore[reportPrivateImportUsage]


def _as_list(params: Any) -> list[Any]:
    if isinstance(params, Tensor):
        raise TypeError("params must be a list of tensors, of (name, tensor) pairs or of groups, not one tensor")
    if isinstance(params, torch.nn.Module):
        raise TypeError("params must be parameters, not a module: pass model.named_parameters()")
    if not isinstance(params, Iterable):
        raise TypeError(f"params must be a list of tensors, of (name, tensor) pairs or of groups, not {params!r}")
    return list(params)
