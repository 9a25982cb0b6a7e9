"""Which training examples push the model the way a test example needs: inner products of gradients over a data set.

A sketch of each training example is kept, not its gradient; the best of them are then compared exactly."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import zerosum

torch.manual_seed(0)
model = nn.Sequential(nn.Embedding(30, 16), nn.Flatten(), nn.Linear(96, 64), nn.Tanh(), nn.Linear(64, 30))


def losses(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y, reduction="none")


# The next number of a sequence that rises by a step of its own.
step = torch.randint(1, 6, (512,))
x = (torch.randint(30, (512, 1)) + step[:, None] * torch.arange(6)) % 30
y = (x[:, -1] + step) % 30
optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
for _ in range(150):
    optimizer.zero_grad()
    losses(model, x, y).mean().backward()
    optimizer.step()

train, test = (x[:448], y[:448]), (x[448:452], y[448:452])
sketch = zerosum.Sketch(model, losses, width=512)
rows = torch.cat([sketch(*batch) for batch in zip(*(t.split(64) for t in train), strict=True)])  # (448, 512)
scores = sketch(*test) @ rows.T  # (4, 448): estimates of <g_test, g_train>

for i in range(4):
    best = scores[i].topk(8).indices
    one = tuple(t[i : i + 1] for t in test)
    exact = zerosum.gram_between(model, losses, one, tuple(t[best] for t in train))[0]
    found, estimates = (", ".join(f"{value:.3g}" for value in values.tolist()[:4]) for values in (exact, scores[i, best]))
    print(f"test example {i}, step {step[448 + i]}: steps {step[best].tolist()}, exact {found}, estimated {estimates}")
