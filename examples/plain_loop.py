"""Measures every 20th step of a training loop of one's own: no trainer, and two lines around the forward and backward passes.

A small GPT of zerosum's learns this very file, byte by byte.
"""

from pathlib import Path

import torch
import torch.nn.functional as F

import zerosum
from zerosum.training.model import GPT, GPTConfig

STEPS, EVERY, SEQUENCES, POSITIONS = 60, 20, 8, 32

torch.manual_seed(0)
text = torch.tensor(list(Path(__file__).read_bytes()))
model = GPT(GPTConfig(256, 32, 2, 2, POSITIONS))
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
probe = zerosum.Probe(model, gram=True, every=EVERY)

for step in range(STEPS):
    starts = torch.randint(len(text) - POSITIONS, (SEQUENCES, 1))
    window = text[starts + torch.arange(POSITIONS + 1)]
    optimizer.zero_grad()
    with probe:  # every forward and backward pass of the step; clipping and the optimizer come after it
        losses = F.cross_entropy(model(window[:, :-1]).mT, window[:, 1:], reduction="none").mean(1)
        losses.mean().backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    if step % EVERY == 0:
        found = probe.report().metrics
        said = ", ".join(f"{name} {found[name].value:.3f}" for name in ("D_grad", "mean_cosine", "noise_scale"))
        print(f"step {step}: loss {losses.mean().item():.3f}, {said} (random signs: D_grad {found['D_grad'].null:.3f})")
