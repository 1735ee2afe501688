"""What authors' packages made of one set of gradients (tests/golden/README.md), and the runner that compares."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.nn import Parameter

from lowbit.optim import Rule

GOLDEN = Path(__file__).parent / "golden"


def follow(build: Callable[[list[tuple[str, Parameter]]], Rule], name: str, atol: float = 2e-6) -> None:
    """Take the 20 steps on the tensors of `<name>.npz`, with its schedule, and compare parameters and last states."""
    inputs, expected = np.load(GOLDEN / "inputs_mha_small.npz"), np.load(GOLDEN / f"{name}.npz")
    kept = {tuple(key.split("/", 2)[1:]) for key in expected if key.startswith("p/")}
    names = [n for n in inputs["names"].tolist() if any(n == of for _, of in kept)]
    assert names and ("20", names[0]) in kept
    named = [(n, Parameter(torch.from_numpy(inputs[f"p0/{n}"]))) for n in names]
    opt = build(named)
    for t in range(1, 21):
        for group in opt.param_groups:
            group["lr"] = float(inputs["lr"][t - 1])
        for n, p in named:
            p.grad = torch.from_numpy(inputs[f"g/{t}/{n}"])
        opt.step()
        for n, p in named:
            if (str(t), n) in kept:
                got, wanted = p.detach().numpy(), expected[f"p/{t}/{n}"]
                np.testing.assert_allclose(got, wanted, rtol=0, atol=atol, err_msg=f"step {t}: {n}")
    for key in (key for key in expected if key.startswith("state/")):
        _, n, moment = key.split("/")
        np.testing.assert_allclose(opt.state[dict(named)[n]][moment], expected[key], rtol=1e-4, atol=atol, err_msg=key)
