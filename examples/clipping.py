"""Clip each example's gradient before they are summed: one probed step tells the norms, a second backward pass gives the sum.
Run it with: python examples/clipping.py (a second on a CPU)."""

import torch
import torch.nn.functional as F
from torch import nn

import zerosum

MAX_NORM, STEPS, N = 2.0, 40, 32


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 1))
    truth = torch.randn(16, 1)
    probe = zerosum.Probe(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(STEPS):
        x = torch.randn(N, 16)
        y = x @ truth
        y[0] += 100  # an outlier in each batch, which outweighs all others
        with probe:
            losses = F.mse_loss(model(x), y, reduction="none").mean(1)  # (N,)
            losses.mean().backward(retain_graph=True)
        report = probe.report()
        weights = zerosum.weights.clip(report, MAX_NORM)  # (N,): min(1, MAX_NORM / ‖g_i‖)
        norms = report.sq_norm.sqrt()
        optimizer.zero_grad()
        (weights * losses).mean().backward()  # outside of the block: Σ w_i g_i / N
        optimizer.step()
        if step % 10 == 9:
            print(f"step {step + 1}: ‖g‖ of the outlier {norms[0]:.0f}, median {norms.median():.1f}; loss {losses[1:].mean():.3f}")


if __name__ == "__main__":
    main()
