"""Ten lines: adapt a plain module, train, save, load beside, switch, merge. Prints the numbers that the README states."""

import torch

import deltaw as dw

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 1))
x, y = torch.randn(256, 8), torch.randn(256, 1)
before = model(x)

dw.attach(model, dw.LoRA(rank=4), targets=["0"], train=["2"])  # layer 0 gets B A, layer 2 a trained copy
assert torch.equal(model(x), before)  # nothing has changed yet, to the bit
optimizer = torch.optim.AdamW(dw.param_groups(model, lr=1e-2))
for _ in range(50):
    optimizer.zero_grad()
    loss = torch.nn.functional.mse_loss(model(x), y)
    loss.backward()
    optimizer.step()

dw.save(model, "adapters/first")  # a PEFT folder where PEFT can say it
with dw.disabled(model):
    assert torch.equal(model(x), before)  # the base is untouched
after = model(x)
print(dw.merge(model))  # W + B A written into the weights, with what rounding did
print(f"merged and unmerged differ by at most {(model(x) - after).abs().max():.1e}")
