"""The reference backend's own promises: what a sum is, how work is cut, one call for all."""

import math

import numpy as np
import pytest
import torch
from cases import gradient, parameters
from cases import one_thread as one_thread
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import Parameter

from lowbit.backends import choose, reference
from lowbit.optim import AdaGN, AdamW, GlobalClip, StableSPAM


@pytest.fixture(autouse=True)
def on_the_reference(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LOWBIT_BACKEND", "reference")


def tree(values: list) -> np.number:
    """A halving tree in plain Python: x[i] + x[i + n/2], padded with zeros to a power of two."""
    n = 1 << max(0, len(values) - 1).bit_length()
    values = [*values, *[values[0] * 0] * (n - len(values))]
    while len(values) > 1:
        half = len(values) // 2
        values = [a + b for a, b in zip(values[:half], values[half:], strict=True)]
    return values[0]


def sum_of_squares(g: np.ndarray) -> np.float64:
    """DESIGN §5: 256-value blocks of a row in fp32, then blocks of a row, then rows, in float64."""
    rows = []
    for row in g:
        blocks = [row[i : i + 256] for i in range(0, len(row), 256)]
        padded = [[*(x * x for x in b), *[np.float32(0)] * (256 - len(b) if len(row) > 256 else 0)] for b in blocks]
        rows.append(tree([np.float64(tree(b)) for b in padded]))
    return tree(rows)


@given(st.integers(1, 40), st.integers(0, 3))
def test_halve_is_a_halving_tree(length: int, seed: int):
    x = np.random.default_rng(seed).standard_normal(length).astype(np.float32)
    assert reference.halve(torch.from_numpy(x)).item() == tree(list(x))


def test_halve_of_nothing():
    assert reference.halve(torch.zeros(3, 0)).tolist() == [0, 0, 0]


@pytest.mark.parametrize("shape", [(1, 1), (5, 33), (3, 300), (2, 5461), (7, 256), (50, 1), (4, 513)])
def test_a_norm_is_the_sum_of_the_tree(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch):
    """The same bits however the rows are cut."""
    g = gradient(shape, 1)
    expected = np.float32(math.sqrt(np.float32(sum_of_squares(g.numpy()))))
    for chunk in (1, 1000, 1 << 18):
        monkeypatch.setattr(reference, "CHUNK", chunk)
        p = Parameter(torch.zeros(shape))
        opt = AdamW([p], stabilize=(AdaGN(gamma1=0.0),))
        p.grad = g
        opt.step()
        assert float(opt.state[p]["m_norm_t"]) == expected


def test_a_norm_over_all_tensors_does_not_depend_on_how_they_are_cut(monkeypatch: pytest.MonkeyPatch):
    found = []
    for chunk in (1, 4000, 1 << 18):
        monkeypatch.setattr(reference, "CHUNK", chunk)
        named = parameters([(33, 300), (50,), (4, 5461), (64, 64)])
        opt = AdamW(named, stabilize=(GlobalClip(0.1),), states="8bit")
        for t in (1, 2):
            for n, p in named:
                p.grad = gradient(tuple(p.shape), t, int(n[1]))
            opt.step()
        found.append([p.detach().clone() for _, p in named])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_one_call_takes_all_tensors(monkeypatch: pytest.MonkeyPatch):
    calls = []
    real = reference.step
    monkeypatch.setattr(reference, "step", lambda jobs: (calls.append(len(jobs)), real(jobs)))
    named = parameters([(64, 64), (33, 300), (50,), (0,), ()])
    opt = StableSPAM([{"params": [p for _, p in named[:2]]}, {"params": [p for _, p in named[2:]], "amsgrad": True}])
    for _, p in named:
        p.grad = torch.ones_like(p)
    opt.step()
    assert calls == [4]  # an empty tensor is no job


def test_temporaries_are_a_chunk_and_not_a_model():
    """The gradient is read in pieces: no temporary is larger than a chunk (or one row), whatever the tensor."""
    rows = 3000
    p = Parameter(torch.zeros(rows, 1024))
    opt = StableSPAM([p], states="4bit")
    p.grad = torch.ones_like(p)
    from torch.utils._python_dispatch import TorchDispatchMode

    kept = {x.untyped_storage().data_ptr() for x in (p, p.grad, *opt.state[p].values()) if isinstance(x, torch.Tensor)}

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, (list, tuple)) else [out]:
                if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in kept:
                    self.numel = max(self.numel, x.numel())
            return out

    with Largest() as seen:
        opt.step()
    assert 0 < seen.numel <= reference.CHUNK * 1.01


def test_backends_are_chosen_by_name(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LOWBIT_BACKEND", "reference")
    assert choose(torch.device("cpu")) is reference
