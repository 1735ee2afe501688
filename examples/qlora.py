"""QLoRA: a frozen base in 4.13 bits a weight, LoRA adapters trained on top of it by peft, merged exactly.

A tiny model stands for yours: put `AutoModelForCausalLM.from_pretrained(...)` in its place.
"""
# needs: peft

import torch
import torch.nn.functional as F
from peft import LoraConfig
from torch import nn

import lowbit
from lowbit.integrations.peft import get_peft_model


class Attention(nn.Module):
    """One head, for the sake of the example."""

    def __init__(self, hidden: int):
        super().__init__()
        self.q_proj = nn.Linear(hidden, hidden, bias=False)
        self.k_proj = nn.Linear(hidden, hidden, bias=False)
        self.v_proj = nn.Linear(hidden, hidden, bias=False)
        self.o_proj = nn.Linear(hidden, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return x + self.o_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True))


torch.manual_seed(0)
model = nn.Sequential(nn.Embedding(50, 128), Attention(128), Attention(128), nn.Linear(128, 50))

# 1  The base: NF4 with double-quantized scales (QLoRA's format), frozen. No 16-bit copy is kept.
model.requires_grad_(False)
report = lowbit.quantize_(model, "qlora-nf4", skip=["3"])
weight = model[1].q_proj.weight
print(f"{len(report.converted)} layers in {8 * weight.nbytes / weight.numel():.2f} bits a weight")

# 2  Adapters, as with any model of peft.
model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]))
trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
opt = lowbit.optim.AdamW(trained, lr=1e-2, states="8bit")
tokens = torch.randint(0, 50, (4, 17))
for step in range(20):
    logits = model(tokens[:, :-1])
    loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    opt.zero_grad()
    loss.backward()
    opt.step()
    if step % 5 == 0:
        print(f"step {step}: loss {loss.item():.3f}")

# 3  Merge: plain nn.Linear layers with the dequantized base plus the adapters, which is what was trained.
before = model(tokens)
merged = model.merge_and_unload()
print(f"merged: {type(merged[1].q_proj).__name__}, logits differ by {(merged(tokens) - before).abs().max():.1e}")
