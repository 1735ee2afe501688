"""`lowbit plan`: what it says is what real tensors take."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cases import one_thread as one_thread
from torch import Tensor, nn

import lowbit
from lowbit.__main__ import main
from lowbit.bench.live import Live
from lowbit.bench.model import PRESETS, Llama
from lowbit.bench.plan import Choice, plan


def kept_by_autograd(model: nn.Module, tokens: Tensor) -> int:
    """Bytes of the distinct storages that a forward pass saves, without parameters and buffers."""
    own = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers())}
    saved: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        saved.setdefault(x.untyped_storage().data_ptr(), x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = F.cross_entropy(model(tokens).flatten(0, 1).float(), tokens.flatten())
    found = sum(x.untyped_storage().nbytes() for at, x in saved.items() if at not in own)
    loss.backward()
    return found


@pytest.mark.parametrize("recipe", ["none", "int4"])
@pytest.mark.parametrize("optimizer, states", [("AdamW", "fp32"), ("StableSPAM", "4bit"), ("AdamMini", "8bit")])
def test_it_says_what_real_tensors_take(recipe: str, optimizer: str, states: str):
    told = plan(Choice("nano", optimizer, states, recipe, batch=3, seq=17))
    model = Llama(PRESETS["nano"], seq=17).bfloat16()
    if recipe != "none":
        lowbit.quantize_(model, recipe)
    heads = {"num_heads": 2} if optimizer == "AdamMini" else {}
    opt = getattr(lowbit.optim, optimizer)(model.named_parameters(), lr=1e-3, states=states, **heads)
    activations = kept_by_autograd(model, torch.zeros(3, 17, dtype=torch.int64))
    assert told.parameters == PRESETS["nano"].parameters()
    assert told.weights == sum(x.nbytes for x in (*model.parameters(), *model.buffers()))
    assert told.states == opt.state_bytes() and told.master == told.temporary == 0
    gradients = [p.grad.nbytes for p in model.parameters() if p.grad is not None]
    assert (told.gradients, told.gradient) == (sum(gradients), max(gradients))
    assert told.activations == pytest.approx(activations, rel=0.02)  # the gradient of the mean's divisor, for one


def test_the_peak_is_counted_operation_by_operation():
    """By hand: two matrices of 64 × 64, fp32; the second's gradient comes when the first's input is still kept."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False))
        x = torch.zeros(8, 64)
    live = Live([x, *model.parameters()])
    with live:
        y = model(x)
        assert live.now == 2 * 8 * 64 * 4
        y.sum().backward()
    assert live.now == 2 * 64 * 64 * 4 + 8 * 64 * 4  # gradients, and y
    del y
    assert live.now == 2 * 64 * 64 * 4 and live.most > live.now


def test_what_saves_memory_saves_it():
    usual = plan(Choice("130m", states="fp32", batch=1, seq=128))
    assert usual.weights + usual.states + usual.gradients <= usual.peak
    assert usual.released is not None and usual.weights + usual.states < usual.released < usual.peak
    less = {
        "checkpoint": plan(Choice("130m", states="fp32", seq=128, checkpoint=True)).activations / usual.activations,
        "int4": plan(Choice("130m", states="fp32", seq=128, recipe="int4")).activations / usual.activations,
        "4bit": plan(Choice("130m", states="4bit", seq=128)).states / usual.states,
        "seq": plan(Choice("130m", states="fp32", seq=64)).activations / usual.activations,
    }
    assert less["checkpoint"] < 0.4 and less["int4"] < 1 and less["4bit"] < 0.2
    assert less["seq"] == pytest.approx(0.5, abs=0.02)  # nothing is kept that grows with its square
    assert plan(Choice("130m", "Muon", seq=8)).temporary > 0
    assert plan(Choice("130m", master="split8", seq=8)).master == usual.parameters
    assert plan(Choice("130m", clip=True, seq=8)).released is None


def test_a_published_column():
    """LLaMA 7B, weights and Adam's states in bf16: 13.48 + 26.95 GB (SCALE's table)."""
    told = plan(Choice("7b", states="bf16", batch=1, seq=8))
    assert round(told.parameters / 1e9, 3) == 6.738
    assert (round(told.weights / 1e9, 2), round(told.states / 1e9, 2)) == (13.48, 26.95)
    assert told.gradients == 2 * told.parameters


def test_the_command_prints_a_table_and_json(capsys: pytest.CaptureFixture):
    asked = ["plan", "--model", "60m", "--optimizer", "stable-spam", "--states", "4bit", "--recipe", "int4"]
    assert main([*asked, "--seq", "64"]) == 0
    out = capsys.readouterr().out
    assert "60m: stable-spam, 4bit states, int4 layers" in out and "peak, gradients released" in out
    assert main([*asked, "--seq", "64", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["bytes"]["peak"] > told["bytes"]["released"] > told["bytes"]["weights"] and told["fits"] is None
    assert told["choice"]["recipe"] == "int4"


def test_rows_of_nothing_are_left_out(capsys: pytest.CaptureFixture):
    assert main(["plan", "--model", "nano"]) == 0
    out = capsys.readouterr().out
    assert "matrix stages" not in out and "beside 16-bit weights" not in out and " 0.0 " not in out
    assert main(["plan", "--model", "60m", "--seq", "64", "--optimizer", "galore"]) == 0
    assert "matrix stages" in capsys.readouterr().out


def test_it_says_whether_it_fits(capsys: pytest.CaptureFixture):
    asked = ["plan", "--model", "60m", "--seq", "64"]
    told = plan(Choice("60m", seq=64))
    between = (told.peak + told.released) // 2
    for room, code, verdict in (
        ("1GiB", 0, "It fits into 1.07 GB.\n"),
        (f"{between}", 0, "if gradients are released in backward"),
        ("9MB", 1, "It does not fit into 9.0 MB"),
    ):
        assert main([*asked, "--fits", room]) == code
        assert verdict in capsys.readouterr().out
    assert main([*asked, "--fits", "9MB", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["fits"] is False
    assert main([*asked, "--fits", str(between), "--clip"]) == 1  # a norm over all gradients needs them all


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--model", "8b"], "unknown model (and there is no such config.json) '8b'"),
        (["--optimizer", "adamx"], "unknown optimizer 'adamx': did you mean"),
        (["--states", "5bit"], "unknown"),
        (["--recipe", "int44"], "unknown recipe 'int44': did you mean 'int4'?"),
        (["--store", "int44"], "unknown store 'int44'"),
        (["--batch", "0"], "a count must be a whole number of at least 1, not '0'"),
        (["--fits", "much"], "argument --fits: a size is such as 24GB or 80GiB, not 'much'"),
    ],
    ids=str,
)
def test_bad_input_is_one_sentence(argv: list[str], message: str, capsys: pytest.CaptureFixture):
    assert main(["plan", "--model", "nano", *argv]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("lowbit: error: ") and message in captured.err and captured.err.count("\n") == 1


def test_a_config_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture):
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text('{"hidden_size": 64}')
    assert main(["plan", "--model", str(tmp_path)]) == 2
    assert "is not the config.json of a causal language model" in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
def test_a_hugging_face_config(tmp_path: Path):
    """The shapes of a preset, as transformers' own LLaMA: the same parameters, and about the same activations."""
    shape = PRESETS["mini"]
    config = {
        "model_type": "llama", "hidden_size": shape.hidden, "intermediate_size": shape.ff, "vocab_size": shape.vocab,
        "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads, "num_key_value_heads": shape.heads,
        "max_position_embeddings": 128, "tie_word_embeddings": False,
    }  # fmt: skip
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    ours, theirs = (plan(Choice(name, "AdamMini", "4bit", "int4", batch=2)) for name in ("mini", str(path)))
    assert (ours.parameters, ours.gradients, ours.seq) == (theirs.parameters, theirs.gradients, theirs.seq)
    assert ours.states == theirs.states
    assert ours.activations == pytest.approx(theirs.activations, rel=0.25)
    less = plan(Choice(str(path), batch=2, checkpoint=True))
    assert less.activations < theirs.activations / 2
    path.write_text(json.dumps({**config, "num_key_value_heads": 2, "tie_word_embeddings": True}))
    assert plan(Choice(str(path), "AdamMini", batch=2)).parameters < theirs.parameters
