"""The batch size that the gradient's noise calls for, from steps of any batch size: the noise scale of McCandlish et al. (2018).
Run it with: python examples/batch_size.py (a few seconds on a CPU)."""

import torch

import zerosum
from zerosum.training.model import GPT, GPTConfig, token_losses

N, T, VOCAB, STEPS, DECAY = 16, 16, 32, 100, 0.95


class Average:
    """An exponential moving average, without the bias of its start."""

    def __init__(self) -> None:
        self.total = self.weight = 0.0

    def add(self, x: float) -> float:
        self.total, self.weight = DECAY * self.total + (1 - DECAY) * x, DECAY * self.weight + 1 - DECAY
        return self.total / self.weight


def main() -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab=VOCAB, width=32, layers=2, heads=2, positions=T))
    following = torch.randint(VOCAB, (VOCAB, 2))  # of each symbol, the two that may follow
    probe = zerosum.Probe(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    trace, signal = Average(), Average()
    for step in range(1, STEPS + 1):
        text = [torch.randint(VOCAB, (N,))]
        for _ in range(T):
            text.append(following[text[-1], torch.randint(2, (N,))])
        tokens = torch.stack(text, 1)
        optimizer.zero_grad()
        with probe:
            losses = token_losses(model, tokens[:, :-1], tokens[:, 1:]).mean(1)
            losses.mean().backward()
        optimizer.step()
        metrics = probe.report().metrics
        # Each is unbiased; their ratio in one step is not, and jumps.
        variance = trace.add(metrics["noise_trace"].value)
        square = signal.add(metrics["grad_norm_sq"].value)
        if step % 20 == 0:
            now = metrics["noise_scale"].value
            print(f"step {step:3}: loss {losses.mean():.3f}, noise scale {now:6.1f} by itself, {variance / square:6.1f} averaged")


if __name__ == "__main__":
    main()
