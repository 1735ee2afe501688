"""Experts stacked in one tensor, (experts, out, in), as transformers' Mixtral and Qwen-MoE have them."""

from typing import Any

import pytest
import torch
from cases import CASES, Case, assert_close, gradient
from cases import one_thread as one_thread
from torch.nn import Parameter

import lowbit
from lowbit.optim import Rule

NAME, SHAPE = "model.layers.0.mlp.experts.gate_up_proj", (3, 16, 24)

# The optimizer, what the single experts are told, and what `explain()` calls the stack.
ALIKE: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "AdamW": ({}, {}, ""), "Lion": ({}, {}, ""), "AdamS": ({}, {}, ""), "SGD": ({"momentum": 0.9}, {}, ""),
    "Muon": ({"precision": "fp32"}, {}, "experts"),
    "SWAN": ({}, {}, "experts"),
    "AdamMini": ({}, {"partition": {"*": "tensor"}}, "expert"),
    "SlimAdam": ({}, {"dims": {"*": "full"}}, "full"),
    "GaLore": ({"rank": 2}, {"rank": 99}, "other"),
    "Fira": ({"rank": 2}, {"rank": 99}, "other"),
    "APOLLO": ({"rank": 2}, {"rank": 99}, "other"),
    "AdaPM": ({"rank": 2}, {"rank": 99}, "full momentum"),
    "SCALE": ({}, {}, "row"),
}  # fmt: skip


@pytest.mark.parametrize("name", ALIKE)
def test_a_stack_is_stepped_as_its_experts_would_be(name: str):
    """No expert sees another. SCALE divides an expert by one norm, as its rows are the first dimension."""
    options, single, kind = ALIKE[name]
    cls, scale = getattr(lowbit.optim, name), name == "SCALE"
    start = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    stack = Parameter(start.clone())
    experts = [Parameter(x.reshape(1, -1).clone() if scale else x.clone()) for x in start]
    opt: Rule = cls([(NAME, stack)], lr=1e-2, states="fp32", **options)
    named = [(f"model.layers.0.mlp.experts.{k}.up_proj.weight", p) for k, p in enumerate(experts)]
    ref: Rule = cls(named, lr=1e-2, states="fp32", **{**options, **single})
    for t in range(1, 5):
        stack.grad = gradient(SHAPE, t)
        for x, p in zip(stack.grad, experts, strict=True):
            p.grad = x.reshape(p.shape).clone()
        opt.step()
        ref.step()
    row = opt.explain().rows[0]
    assert (row.role, row.kind.split(",")[0]) == ("expert", kind)
    assert_close([x.reshape(p.shape) for x, p in zip(stack.detach(), experts, strict=True)], experts, atol=1e-5)


@pytest.mark.parametrize("states", ["8bit", "4bit"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_optimizer_trains_a_stack(case: Case, states: str):
    stack = Parameter(torch.ones(4, 64, 96))
    opt = case.build([(NAME, stack)], states=states)
    before = stack.detach().clone()
    for t in range(1, 4):
        stack.grad = gradient((4, 64, 96), t)
        opt.step()
    assert stack.isfinite().all() and not torch.equal(stack, before) and opt.counters()["skipped_blocks"] == 0
