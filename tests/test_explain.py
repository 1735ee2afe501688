"""The table of `explain()` fits where it is printed, and says the same everywhere."""

import sys

import pytest
import torch
from torch import nn

import lowbit
from lowbit.optim import AdamMini

LAYERS = [*(f"self_attn.{c}_proj" for c in "qkvo"), "mlp.gate_proj", "mlp.up_proj"]


def llama() -> list[tuple[str, nn.Parameter]]:
    names = [f"model.layers.{k}.{layer}.weight" for k in range(11) for layer in LAYERS]
    named = [(name, nn.Parameter(torch.zeros(128, 128))) for name in names]
    named.append(("model.layers.0.input_layernorm.weight", nn.Parameter(torch.zeros(128))))
    return [("model.embed_tokens.weight", nn.Parameter(torch.zeros(500, 128))), *named]


def printed(text: object, columns: int | None, monkeypatch: pytest.MonkeyPatch) -> str:
    """As in a terminal of so many columns; None: in no terminal."""
    with monkeypatch.context() as patch:
        patch.setattr(sys.stdout, "isatty", lambda: columns is not None, raising=False)
        patch.setenv("COLUMNS", str(columns or 57))
        return str(text)


@pytest.mark.parametrize("columns", [72, 80, 100, 150, 200])
def test_explain_fits_the_terminal_and_cuts_no_name_short(columns: int, monkeypatch: pytest.MonkeyPatch):
    named = llama()
    explained = AdamMini(named, states="4bit", num_heads=4).explain()
    text = printed(explained, columns, monkeypatch)
    assert max(map(len, text.splitlines())) <= columns and "…" not in text
    for (name, _), row in zip(named, explained.rows, strict=True):
        assert name in text and f"{row.state_bytes:,}" in text
    for said in ("128×128, float32, q, head" if columns < 156 else "128×128", "exp_avg nf4:128", "one per 32 rows"):
        assert said in text


def test_where_there_is_no_terminal_the_table_does_not_depend_on_it(monkeypatch: pytest.MonkeyPatch):
    explained = AdamMini(llama(), states="4bit", num_heads=4).explain()
    texts = {printed(explained, None, monkeypatch), printed(explained, 160, monkeypatch)}
    monkeypatch.setattr(sys, "stdout", None)
    texts.add(str(explained))
    assert len(texts) == 1 and max(map(len, texts.pop().splitlines())) <= 160


def test_a_long_name_is_folded(monkeypatch: pytest.MonkeyPatch):
    name = "model." + "block." * 30 + "weight"
    opt = lowbit.optim.AdamW([(name, nn.Parameter(torch.zeros(64, 64)))])
    for columns in (80, None):
        text = printed(opt.explain(), columns, monkeypatch)
        assert max(map(len, text.splitlines())) <= (columns or 160) and "…" not in text
        assert text.count("block") >= 25  # some are broken in two


def test_roles_fit_the_terminal_too(monkeypatch: pytest.MonkeyPatch):
    net = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 50, bias=False))
    table = [line for line in printed(lowbit.roles(net), 60, monkeypatch).splitlines() if line[:1] in "┏┃┡│└"]
    assert len(table) > 8 and max(map(len, table)) <= 60  # what stands below it is wrapped by the terminal
