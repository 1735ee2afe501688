"""Published memory columns, from the states of optimizers on parameters without memory."""

import llama_shapes
import pytest
import torch
from cases import one_thread as one_thread
from llama_shapes import gigabytes, on_meta, roles

from lowbit.optim import SCALE, Adafactor, AdamMini, AdamW, SlimAdam

SIZES = list(llama_shapes.LLAMAS)


@pytest.mark.parametrize("size, millions", dict(zip(SIZES, (58.07, 134.1, 368.0, 1339, 6738), strict=True)).items())
def test_the_models_have_the_published_sizes(size: str, millions: float):
    count = sum(p.numel() for _, p in on_meta(size))
    assert float(f"{count / 1e6:.4g}") == millions


# SCALE's table (README of https://github.com/OptimAI-Lab/Minimalist_LLM_Pretraining): weights and states in bf16. Each
# figure is the rounded sum, but Adam's, which is the sum of the rounded (0.27 + 0.54, where the sum is 0.8046).
PUBLISHED = {
    "scale": (lambda p: SCALE(p, states="bf16", roles=roles(p)), (0.15, 0.32, 0.80, 2.81, 13.74)),
    "adam": (lambda p: AdamW(p, states="bf16"), (0.35, 0.81, 2.21, 8.04)),
}
COLUMNS = [(name, *pair) for name, (_, column) in PUBLISHED.items() for pair in zip(SIZES, column, strict=False)]


@pytest.mark.parametrize("name, size, published", COLUMNS)
def test_scales_table(name: str, size: str, published: float):
    opt = PUBLISHED[name][0](on_meta(size))
    weights, states = gigabytes(opt)
    found = round(weights, 2) + round(states, 2) if name == "adam" else weights + states
    assert round(found, 2) == published
    assert opt.explain().state_bytes == opt.state_bytes() and all(p.is_meta for p in opt.state)


def test_adam_minis_7b():
    """Llama 2 7B, fp32: 53.92 GB of AdamW's states become 26.96; the paper counts 6.74e9 parameters."""
    named = on_meta("7b")
    adamw, mini = AdamW(named, states="fp32"), AdamMini(named, num_heads=32, roles=roles(named), states="fp32")
    count = mini.explain().parameters
    per = [opt.state_bytes() / count for opt in (adamw, mini)]
    assert round(6.74 * per[0], 2) == 53.92
    assert 26.96 <= 6.74 * per[1] < 26.97  # 0.017 % of the second moments stay
    blocks = sum(mini.state[p]["exp_avg_sq"].numel() for p in mini.state)
    assert 1.1e6 < blocks < 1.2e6 and blocks / count < 1.8e-4


@pytest.mark.parametrize("states, per_value", [("fp32", 4.001), ("bf16", 2.001), ("8bit", 1.017), ("4bit", 0.532)])
def test_adam_minis_bytes_per_value(states: str, per_value: float):
    """Matrices of a 7B model; the second moments add less than a thousandth of a byte."""
    layers = [(n, p) for n, p in on_meta("7b") if ".layers." in n]
    opt = AdamMini(layers, num_heads=32, roles=roles(layers), states=states)
    assert opt.state_bytes() / opt.explain().parameters == pytest.approx(per_value, abs=1.2e-3)


def test_what_the_factored_ones_save():
    """Of a 7B model's second moments SlimAdam keeps under 2 % (the paper saves up to 98 %), Adafactor m + n."""
    named = on_meta("7b", torch.float32)
    slim, factored = SlimAdam(named, roles=roles(named), states="fp32"), Adafactor(named, states="fp32")
    count = slim.explain().parameters
    assert sum(slim.state[p]["exp_avg_sq"].numel() for p in slim.state) < 2e-3 * count
    wanted = sum(sum(p.shape) for _, p in named)
    kept = [v for state in factored.state.values() for k, v in state.items() if k.startswith("exp_avg_sq")]
    assert sum(v.numel() for v in kept if v.dim()) == wanted
