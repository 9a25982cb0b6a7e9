"""A loop of one's own in plain PyTorch. Lines that end in `# +` are what the probe adds."""

import inspect
import statistics

import torch
import torch.nn.functional as F

import zerosum  # +
from zerosum.training.model import GPT, GPTConfig

LENGTH, STEPS, EVERY = 32, 12, 4


def main() -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab=256, width=32, layers=2, heads=4, positions=LENGTH))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    text = torch.tensor(list(inspect.getsource(statistics).encode()))  # a byte is a token
    probe = zerosum.Probe(model, gram=True, every=EVERY)  # +
    for step in range(STEPS):
        optimizer.zero_grad()
        with probe:  # +
            for _ in range(2):  # micro-batches
                starts = torch.randint(len(text) - LENGTH, (4,))
                batch = torch.stack([text[i : i + LENGTH + 1] for i in starts.tolist()])
                loss = F.cross_entropy(model(batch[:, :-1]).mT, batch[:, 1:]) / 2
                loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        print(f"step {step}: loss {2 * loss.item():.3f}")
        if step % EVERY == 0:  # +
            report = probe.report()  # +
            d = report.metrics["D_grad"]  # +
            print(f"  {report.num_examples} examples: D_grad {d.value:.3f}, with random signs {d.null:.3f}")  # +
    print(probe.report())  # +


if __name__ == "__main__":
    main()
