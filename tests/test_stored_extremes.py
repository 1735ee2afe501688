"""Stored weights at the ends of what numbers can be: the native step has the reference's bits there too."""

import pytest
import torch
from torch import Tensor, nn

import lowbit
from lowbit.nn import StoredWeight

STORES = ["int8", "int4", "nf4", "mxfp4", "nvfp4", "split", "split8"]


def stepped(backend: str, start: Tensor, store: str, grad: Tensor, optimizer: str, monkeypatch) -> dict[str, Tensor]:
    """The parts of a weight after one step on a backend."""
    monkeypatch.setenv("LOWBIT_BACKEND", backend)
    p = nn.Parameter(StoredWeight.of(start, store))
    p.grad = grad.clone()
    getattr(lowbit.optim, optimizer)([p], lr=0.01).step()
    return p.parts


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    for part in a:
        assert torch.equal(a[part].isnan(), b[part].isnan()), part
        assert torch.equal(a[part].nan_to_num(), b[part].nan_to_num()), part


@pytest.mark.parametrize("cols", [96, 35])
def test_a_value_beyond_every_scale_keeps_its_sign(cols: int, monkeypatch: pytest.MonkeyPatch):
    """E4M3 scales end at 448 times the tensor's; value / scale may then be infinite."""
    generator = torch.Generator().manual_seed(0)
    start, grad = torch.randn(2, cols, generator=generator) * 1e-38, torch.randn(2, cols, generator=generator) * 1e6
    found = [stepped(backend, start, "nvfp4", grad, "SGD", monkeypatch) for backend in ("reference", "native")]
    assert_same(*found)
    values = lowbit.stored.load(lowbit.format("nvfp4"), found[1], cols)
    assert torch.equal(values.sign(), -grad.sign())


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW", "Adafactor"])
@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_blocks_that_are_not_finite_stay_so_and_harm_no_others(
    bad: float, store: str, optimizer: str, monkeypatch: pytest.MonkeyPatch
):
    generator = torch.Generator().manual_seed(0)
    start, grad = torch.randn(4, 512, generator=generator), torch.randn(4, 512, generator=generator)
    start[1, 300] = bad
    found = [stepped(backend, start, store, grad, optimizer, monkeypatch) for backend in ("reference", "native")]
    assert_same(*found)
    fmt = lowbit.stored.find_store(store).format
    assert lowbit.stored.load(fmt, found[1], 512).isnan().sum() == fmt.block[1]
