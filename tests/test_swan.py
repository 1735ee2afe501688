"""SWAN: the properties the paper states; there is no official code to follow."""

import numpy as np
import pytest
import torch
from cases import assert_close, gradient
from cases import one_thread as one_thread
from torch.nn import Parameter

from lowbit.optim import SWAN, AdamW
from lowbit.optim.swan import normalized, whitened


def direction(g: torch.Tensor, **options) -> torch.Tensor:
    p = Parameter(torch.zeros_like(g))
    opt = SWAN([("p", p)], lr=1.0, **options)
    p.grad = g
    opt.step()
    return -p.detach()


@pytest.mark.parametrize("shape", [(20, 30), (30, 20), (12, 5, 6)], ids=str)
def test_the_direction_is_the_papers_formula(shape: tuple[int, ...]):
    """(G G')^(-1/2) G of the row-normalized gradient by SVD in float64, of that gradient's norm."""
    torch.manual_seed(0)
    g = torch.randn(shape)
    flat = g.double().numpy().reshape(shape[0], -1)
    rows = (flat - flat.mean(1, keepdims=True)) / flat.std(1, keepdims=True)
    u, s, vt = np.linalg.svd(rows, full_matrices=False)
    # Centred rows have the vector of ones in their null space, so a tall matrix has a singular value of 0.
    white = (u * (s > 1e-9)) @ vt
    white *= np.linalg.norm(rows) / np.linalg.norm(white)
    np.testing.assert_allclose(direction(g, ns_steps=16).reshape(flat.shape), white, atol=2e-3)


def test_singular_values_become_one_and_zeros_stay():
    torch.manual_seed(0)
    g = torch.randn(20, 8) @ torch.randn(8, 30)
    values = torch.linalg.svdvals(whitened(g, 16))
    torch.testing.assert_close(values[:8], torch.ones(8), rtol=0, atol=1e-3)
    assert float(values[8:].max()) < 0.05


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e30])
def test_the_gradients_scale_does_not_matter(scale: float):
    g = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(direction(g * scale), direction(g), rtol=0, atol=1e-3)


def test_neither_do_the_rows_scales_nor_their_means():
    g = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    rows = torch.linspace(0.1, 10, 20).unsqueeze(1)
    torch.testing.assert_close(direction(g * rows + rows), direction(g), rtol=0, atol=1e-3)


def test_rows_have_mean_zero_and_deviation_one():
    rows = normalized(gradient((20, 30), 1))
    torch.testing.assert_close(rows.mean(1), torch.zeros(20), rtol=0, atol=1e-5)
    torch.testing.assert_close(rows.std(1, correction=0), torch.ones(20), rtol=0, atol=1e-4)


def test_a_gradient_of_zeros_or_of_one_value_only_decays():
    for g in (torch.zeros(20, 30), torch.full((20, 30), 3.0)):
        p = Parameter(torch.ones(20, 30))
        opt = SWAN([("p", p)], lr=0.1, weight_decay=0.5)
        p.grad = g
        opt.step()
        torch.testing.assert_close(p.detach(), torch.full((20, 30), 0.95))


def test_a_matrix_has_no_state_and_the_rest_is_adamw():
    shapes = {"emb": (50, 20), "head": (50, 20), "norm": (20,), "w": (20, 30)}
    roles = {"emb": "embedding", "head": "head"}
    mine = {n: Parameter(torch.ones(s)) for n, s in shapes.items()}
    theirs = {n: Parameter(torch.ones(s)) for n, s in shapes.items() if n != "w"}
    opt = SWAN(list(mine.items()), lr=0.01, weight_decay=0.1, roles=roles, states="fp32")
    ref = AdamW(list(theirs.items()), lr=0.01, weight_decay=0.1, states="fp32")
    for t in range(1, 5):
        for n, p in mine.items():
            p.grad = gradient(shapes[n], t)
            if n != "w":
                theirs[n].grad = p.grad.clone()
        opt.step()
        ref.step()
    assert sorted(opt.state[mine["w"]]) == ["skipped", "step"]
    assert_close([mine[n] for n in theirs], list(theirs.values()), atol=0)
    assert [row.kind for row in opt.explain().rows] == ["other", "other", "other", "matrix"]


@pytest.mark.parametrize("options, message", [({"ns_steps": 0}, "ns_steps must be"), ({"betas": (0.1,)}, "betas must")])
def test_bad_arguments(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        SWAN([Parameter(torch.ones(4, 4))], **options)
