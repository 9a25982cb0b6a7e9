"""Per-example gradient statistics of one layer by the ops alone: what a linear layer's inputs and output gradients tell.
Run it with: python examples/ops.py (under a second on a CPU)."""

import torch
import torch.nn.functional as F

import zsl_kernels as zk

N, T, K, O = 8, 32, 48, 64  # examples, positions, features in and out


def main() -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(K, O, bias=False)
    a = torch.randn(N, T, K)  # the layer's inputs
    out = layer(a)
    out.retain_grad()
    losses = F.cross_entropy(out.mT, torch.randint(O, (N, T)), reduction="none").mean(1)  # (N,)
    losses.sum().backward()
    b = out.grad  # the gradients with respect to its outputs: example i's weight gradient is b[i].T @ a[i]

    s = zk.interference(a, b, gram=True)
    assert torch.allclose(s.grad_sum, layer.weight.grad, atol=1e-6)  # Σ g is what autograd computed
    cancelled = 1 - s.grad_sum.abs() / s.abs_sum  # for each coordinate: 0 where all examples agree, 1 where they cancel
    print(f"D over coordinates {cancelled.mean():.3f}; norms of the gradients {[round(x, 3) for x in s.sq_norm.sqrt().tolist()]}")
    cosines = s.gram / (s.sq_norm[:, None] * s.sq_norm).sqrt()
    print(f"mean cosine of two gradients {(cosines.sum() - N) / (N * (N - 1)):.4f}")

    # One of them alone costs less, and so does a direction: what each loss changes by along a step.
    step = -0.1 * layer.weight.grad
    print("first-order loss changes", [round(x, 4) for x in zk.dot(a, b, step).tolist()])
    print("clipped sum: norm", round(zk.weighted_grad(a, b, (0.1 / s.sq_norm.sqrt()).clamp(max=1)).norm().item(), 4))

    # Rows of examples of different lengths, in any order and without padding, name their example.
    rows = torch.randperm(N * T)[:100]
    ragged = zk.interference(a.flatten(0, 1)[rows], b.flatten(0, 1)[rows], example_ids=rows // T, num_examples=N)
    print("ragged rows:", tuple(ragged.abs_sum.shape), tuple(ragged.l1.shape))

    # All of this is differentiable: the derivative of how much gradients cancel, with respect to the inputs.
    a.requires_grad_()
    s = zk.interference(a, b)
    (1 - s.grad_sum.abs().sum() / s.abs_sum.sum()).backward()
    print(f"norm of the derivative {a.grad.norm():.4f}")
    print(zk.plan("interference", N=N, T=T, K=K, O=O))  # which implementation was taken, and why


if __name__ == "__main__":
    main()
