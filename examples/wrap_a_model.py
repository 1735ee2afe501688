"""Train a model with 4-bit weights and activations, then turn it back into a plain one.

python examples/wrap_a_model.py
"""

import torch

import lowbit

torch.manual_seed(0)
model = torch.nn.ModuleDict(
    {
        "embed_tokens": torch.nn.Embedding(64, 96),
        "mlp": torch.nn.Sequential(torch.nn.Linear(96, 256), torch.nn.SiLU(), torch.nn.Linear(256, 96)),
        "lm_head": torch.nn.Linear(96, 64, bias=False),
    }
)

print(lowbit.quantize_(model, "int4"))  # in place; says what was converted, and why the rest was not

optimizer = lowbit.optim.AdamW(model.named_parameters(), lr=3e-3, states="4bit")
tokens = torch.randint(0, 64, (512,))
first = None
for _ in range(40):
    loss = torch.nn.functional.cross_entropy(model["lm_head"](model["mlp"](model["embed_tokens"](tokens))), tokens)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    first = first or loss.item()
print(f"loss {first:.3f} -> {loss.item():.3f} in 4 bits")
assert loss.item() < first

lowbit.to_dense_(model, dtype=torch.float32)  # plain nn.Linear, with the weights the 4-bit forward pass used
print(type(model["mlp"][0]).__name__)
