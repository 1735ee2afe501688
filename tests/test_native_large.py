"""Tensors of more than 2^31 values: what they hold repeats, so that a small tensor says what every part must become."""

import os

import pytest
import torch
from cases import one_thread as one_thread
from native_cases import AsAsked, same
from torch import Tensor
from torch.nn import Parameter

import lowbit
from lowbit.optim import AdamW

BEYOND = 2**31
# A matrix of many rows, and one row that no 32-bit number counts. A pattern is as long as its blocks' common period.
SHAPES = {"rows": ((BEYOND // 4096 + 7, 4096), 5 * 4096), "one row": ((1, BEYOND + 2560), 1280)}

ENOUGH = 18 << 30
needs_memory = pytest.mark.skipif(
    os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < ENOUGH, reason="needs 18 GiB of free memory"
)


def filled(shape: tuple[int, int], pattern: Tensor) -> Tensor:
    made = torch.empty(shape, dtype=pattern.dtype)
    whole = made.numel() // pattern.numel() * pattern.numel()
    made.view(-1)[:whole].view(-1, pattern.numel()).copy_(pattern)
    made.view(-1)[whole:] = pattern[: made.numel() - whole]
    return made


def holds(values: Tensor, pattern: Tensor) -> bool:
    """Whether all of it repeats the pattern, bit for bit."""
    whole = values.numel() // pattern.numel() * pattern.numel()
    lines, rest = values.reshape(-1)[:whole].view(-1, pattern.numel()), values.reshape(-1)[whole:]
    parts = all(same(part, pattern.expand(part.shape)) for part in lines.split(max(1, (1 << 28) // pattern.numel())))
    return parts and same(rest, pattern[: len(rest)])


@needs_memory
@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("states", ["8bit", "4bit"])
def test_a_step_of_more_than_two_billion_values(name: str, states: str):
    shape, period = SHAPES[name]
    small = (period // shape[1], shape[1]) if name == "rows" else (1, period)
    generator = torch.Generator().manual_seed(3)
    begin, g = (torch.randn(n, generator=generator).bfloat16() for n in (period, 256))
    stepped = []
    for size in (small, shape):
        p = Parameter(filled(size, begin))
        opt = AdamW([("p", p)], lr=0.01, states=states, rounding="nearest", policy=AsAsked())
        p.grad = filled((1, size[1]), g).expand(size) if name == "rows" else filled(size, g)
        opt.step()
        stepped.append({"p": p.detach(), **{k: v for k, v in opt.state[p].items() if isinstance(v, Tensor)}})
        del p, opt
    for key, pattern in stepped[0].items():
        assert pattern.dim() < 2 or holds(stepped[1][key], pattern.reshape(-1)), key
    assert not torch.equal(stepped[0]["p"].view(-1), begin), "the step changed nothing"


@needs_memory
@pytest.mark.slow
@pytest.mark.parametrize("format", ["int8", "nf4", "mxfp4"])
def test_codes_of_more_than_two_billion_values(format: str):
    shape, period = SHAPES["rows"]
    pattern = torch.randn(period, generator=torch.Generator().manual_seed(4)).bfloat16()
    expected = lowbit.quantize(pattern.view(-1, shape[1]), format)
    got = lowbit.quantize(filled(shape, pattern), format)
    for part, values in expected.parts.items():
        assert holds(got.parts[part], values.reshape(-1)), part
    assert holds(got.dequantize(torch.bfloat16), expected.dequantize(torch.bfloat16).reshape(-1))


def test_one_row_beyond_that_has_no_codes():
    with pytest.raises(ValueError, match=r"a row of 2147483904 values is too long .* LOWBIT_BACKEND=reference"):
        lowbit.quantize(torch.zeros(1, 1).expand(1, BEYOND + 256), "int8")
