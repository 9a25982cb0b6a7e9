"""Save the reports of a few steps, and read them as one: each file is complete, and nothing in it is run when it is loaded."""

import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import zerosum

torch.manual_seed(0)
model = nn.Sequential(nn.Embedding(50, 16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 50))
optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
probe = zerosum.Probe(model)

with tempfile.TemporaryDirectory() as folder:
    for step in range(3):
        x, y = torch.randint(50, (2, 8, 12))
        optimizer.zero_grad()
        with probe:
            F.cross_entropy(model(x).mT, y, reduction="none").mean(1).sum().backward()
        probe.report().save(Path(folder) / f"step-{step}.safetensors")  # before the gradient is clipped
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    reports = [zerosum.load_report(path) for path in sorted(Path(folder).iterdir())]

for step, report in enumerate(reports):
    print(f"step {step}: D_grad {report.metrics['D_grad'].value:.3f} of {report.num_examples} examples")
print(zerosum.merge(reports))
for module, group in reports[-1].by_module().items():
    print(f"{module:>5} {group.metrics['grad_norm'].value:8.4f}")
