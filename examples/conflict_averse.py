"""Updates that no example's loss opposes, from the Gram of the examples' gradients: by UPGrad, MGDA, and TorchJD's weightings.
Run it with: python examples/conflict_averse.py (needs scipy; a few seconds on a CPU)."""

import torch
from torch import Tensor

import zerosum
from zerosum.training.model import GPT, GPTConfig, token_losses

N, T, VOCAB = 8, 16, 2


def weightings() -> dict:
    """By name, from a Gram (N, N) to weights (N,)."""
    mgda, upgrad = zerosum.weights.mgda, zerosum.weights.upgrad
    found = {"mean": lambda gram: torch.full((N,), 1 / N), "MGDA": mgda, "UPGrad": upgrad}
    try:
        from torchjd.aggregation import IMTLGWeighting, PCGradWeighting
    except ImportError:
        print("TorchJD is not installed: its weightings are skipped (pip install torchjd)")
        return found
    return found | {"PCGrad (TorchJD)": PCGradWeighting(), "IMTL-G (TorchJD)": IMTLGWeighting()}


def main() -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab=VOCAB, width=32, layers=2, heads=2, positions=T))
    probe = zerosum.Probe(model, gram=True)
    x, y = torch.randint(VOCAB, (2, N, T))
    x = x[:1].repeat(N, 1)
    y[1:-1] = torch.where(torch.rand(N - 2, T) < 0.3, y[1:-1], y[0])  # all but the last example want much the same

    def losses() -> Tensor:
        return token_losses(model, x, y).mean(1)

    with probe:
        before = losses()
        before.mean().backward(retain_graph=True)
    gram = probe.report().gram.float()
    print(f"pairs of examples in conflict: {int((gram.triu(1) < 0).sum())} of {N * (N - 1) // 2}")
    updates = {}
    for name, weigh in weightings().items():
        model.zero_grad()
        (weigh(gram) * before).sum().backward(retain_graph=True)  # Σ w_i g_i
        updates[name] = [p.grad for p in model.parameters()]
    start = [p.detach().clone() for p in model.parameters()]
    for name, update in updates.items():
        length = torch.nn.utils.get_total_norm(update)
        with torch.no_grad():
            for p, value, u in zip(model.parameters(), start, update, strict=True):
                p.copy_(value - 0.02 * u / length)  # steps of one length
            change = losses() - before
        print(f"{name:>17}: mean change of the loss {change.mean():+.5f}, of the worst example {change.max():+.5f}")


if __name__ == "__main__":
    main()
