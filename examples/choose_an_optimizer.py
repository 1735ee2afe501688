"""Stable-SPAM with 4-bit states: what it keeps for each tensor, and resuming from a file.

python examples/choose_an_optimizer.py
"""

import tempfile
from pathlib import Path

import torch

import lowbit


def make() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """A model in bf16 and its optimizer: no fp32 copy of anything, the weights are rounded stochastically."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(256, 512), torch.nn.ReLU(), torch.nn.Linear(512, 256)).bfloat16()
    return model, lowbit.optim.StableSPAM(model.named_parameters(), lr=1e-3, states="4bit", reset_interval=50)


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> float:
    """Learn to copy the input; returns the last loss."""
    for step in steps:
        x = torch.randn(64, 256, generator=torch.Generator().manual_seed(step)).bfloat16()
        loss = torch.nn.functional.mse_loss(model(x), x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


model, optimizer = make()
print(optimizer.explain())
train(model, optimizer, range(0, 60))

with tempfile.TemporaryDirectory() as folder:
    lowbit.save_optimizer(optimizer, Path(folder) / "optimizer.safetensors")
    torch.save(model.state_dict(), Path(folder) / "model.pt")
    resumed, resumed_optimizer = make()
    resumed.load_state_dict(torch.load(Path(folder) / "model.pt", weights_only=True))
    lowbit.load_optimizer(resumed_optimizer, Path(folder) / "optimizer.safetensors")

one, other = train(model, optimizer, range(60, 100)), train(resumed, resumed_optimizer, range(60, 100))
print(f"loss {one:.4f}, resumed {other:.4f}: the same, bit for bit")
assert all(torch.equal(p, q) for p, q in zip(model.parameters(), resumed.parameters(), strict=True))
