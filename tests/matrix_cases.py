"""What tests of optimizers with matrix stages share: the authors' runs, and small helpers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import Parameter

from lowbit.optim import Rule

GOLDEN = Path(__file__).parent / "golden"
HEAD = {"lm_head.weight": "head"}


def follow(
    build: Callable[[list[tuple[str, Parameter]]], Rule], name: str, lr: float, atol: float,
    before: Callable[[Rule, dict[str, Parameter], int, Any], None] = lambda *_: None,
) -> tuple[Rule, dict[str, Parameter], Any]:  # fmt: skip
    """Take 20 steps as the authors' package did (tests/golden/README.md) and compare parameters where they are kept."""
    inputs, expected = np.load(GOLDEN / "inputs_mha_small.npz"), np.load(GOLDEN / f"{name}.npz")
    kept = {tuple(key.split("/", 2)[1:]) for key in expected if key.startswith("p/")}
    named = {n: Parameter(torch.from_numpy(inputs[f"p0/{n}"])) for n in sorted({n for _, n in kept})}
    assert len(named) == 5
    opt, compared = build(list(named.items())), 0
    for t in range(1, 21):
        for group in opt.param_groups:
            group["lr"] = lr * float(inputs["lr"][t - 1]) / 3e-3
        before(opt, named, t, expected)
        for n, p in named.items():
            p.grad = torch.from_numpy(inputs[f"g/{t}/{n}"])
        opt.step()
        for n, p in named.items():
            if (str(t), n) in kept:
                np.testing.assert_allclose(p.detach(), expected[f"p/{t}/{n}"], rtol=0, atol=atol, err_msg=f"{t} {n}")
                compared += 1
    assert compared == len(kept) == 15
    return opt, named, expected
