"""Train against interference: a penalty on how far the examples' gradients of chosen layers cancel, differentiated for real.
Run it with: python examples/regularizer.py (a few seconds on a CPU)."""

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import zerosum
import zsl_kernels as zk
from zerosum.training.model import GPT, GPTConfig, token_losses

N, T, VOCAB, STEPS = 16, 16, 32, 60


def train(strength: float) -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab=VOCAB, width=32, layers=2, heads=2, positions=T))
    layers = [block.mlp.down for block in model.blocks]
    following = torch.randint(VOCAB, (VOCAB, 2))  # of each symbol, the two that may follow
    probe = zerosum.Probe(model, every=20)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(STEPS):
        text = [torch.randint(VOCAB, (N,))]
        for _ in range(T):
            text.append(following[text[-1], torch.randint(2, (N,))])
        tokens = torch.stack(text, 1)
        optimizer.zero_grad()
        with probe, sdpa_kernel(SDPBackend.MATH):  # the fused attention cannot be differentiated twice
            with zerosum.Factors(*layers) as factors:
                losses = token_losses(model, tokens[:, :-1], tokens[:, 1:]).mean(1)
            sums = [zk.interference(a, b) for a, b in factors.of(losses.sum(), create_graph=True)]
            # Σ|Σ g| / Σ|g| is 1 where no gradients cancel.
            penalty = sum(1 - s.grad_sum.abs().sum() / s.abs_sum.sum() for s in sums) / len(sums)
            if probe.measuring:
                zerosum.auxiliary(penalty)  # no example's own: the report is of the losses alone
            (losses.mean() + strength * penalty).backward()
        optimizer.step()
        if step % 20 == 0:
            d_grad = probe.report().metrics["D_grad"].value
            print(f"  step {step:2}: loss {losses.mean():.3f}, penalty {penalty:.3f}, D_grad of all layers {d_grad:.3f}")


def main() -> None:
    for strength in (0.0, 1.0):
        print(f"strength {strength}")
        train(strength)


if __name__ == "__main__":
    main()
