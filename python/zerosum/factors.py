"""The two factors of linear layers' per-example gradients, kept and differentiable: for penalties on gradients, and for what the
ops of :mod:`zsl_kernels` compute of them."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Factors:
    """``(layer_input, torch.autograd.grad(losses.sum(), layer_output)[0])`` of some ``nn.Linear`` layers: a and b, of which
    g_i = b_iᵀ a_i is the gradient of example i::

        with zerosum.Factors(model.head) as factors:
            losses = per_example_loss(model(x), y)                      # (N,)
        ((a, b),) = factors.of(losses.sum(), create_graph=True)         # (N, T, K), (N, T, O)
        s = zk.interference(a, b)
        (losses.mean() - s.grad_sum.abs().sum() / s.abs_sum.sum()).backward()

    Rows are taken to be (N, …, K): the first dimension is that of the examples. That is not proved, unlike a probe's. Gradients are
    those of the layer's own uses: what reaches a tied weight by another way, and biases, are not among them.

    Args:
        layers: ``nn.Linear`` modules whose ``forward`` is not overridden. They run in the block, once or more often.

    Raises:
        TypeError: a layer is another module.
        ValueError: no layer is given, or one twice.
        RuntimeError: in the block, where a layer runs without gradients.
    """

    def __init__(self, *layers: nn.Linear) -> None:
        for k, layer in enumerate(layers):
            if not isinstance(layer, nn.Linear) or type(layer).forward is not nn.Linear.forward:
                raise TypeError(f"layers[{k}]: expected an nn.Linear with its own forward, got {type(layer).__name__}")
        if not layers or len(set(layers)) < len(layers):
            raise ValueError(
                f"layers: expected one or more different layers, got {len(layers)}, {len(set(layers))} of them different"
            )
        self._layers = layers
        self._uses: list[list[_Use]] = [[] for _ in layers]
        self._handles: list[Any] = []

    def __enter__(self) -> Factors:
        """Starts anew: what an earlier block kept is forgotten."""
        self._uses = [[] for _ in self._layers]
        for layer, uses in zip(self._layers, self._uses, strict=True):
            # First of all hooks: the others may change the output.
            self._handles.append(layer.register_forward_hook(partial(_keep, uses, str(layer)), prepend=True))
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def of(self, loss: Tensor, *, create_graph: bool = False) -> list[tuple[Tensor, Tensor]]:
        """``(layer_input, torch.autograd.grad(loss, layer_output)[0])`` of each layer, by one backward pass that keeps the graph.

        Args:
            loss: Σ_i ℓ_i, one number.
            create_graph: whether what is computed of the factors will be differentiated, as a penalty is. Without it both are
                detached.

        Returns:
            a (N, T, K) and b (N, T, O) for each layer. T counts all positions of all of the layer's uses. ``a`` has the dtype of
            ``b``, which under autocast is the lower one.

        Raises:
            ValueError: the loss is not one number, or an input has no dimension of examples, or uses differ in N.
            RuntimeError: a layer did not run in the block, or the loss does not depend on it, or its input or output was modified
                in place.
        """
        if loss.numel() != 1:
            raise ValueError(f"loss: expected one number, the sum of the examples' losses, got shape {tuple(loss.shape)}")
        kept = [list(uses) for uses in self._uses]  # (A checkpoint that computes again adds to them.)
        for layer, uses in zip(self._layers, kept, strict=True):
            if not uses:
                raise RuntimeError(f"{layer} did not run in the block")
            if any((use.input._version, use.output._version) != use.versions for use in uses):
                raise RuntimeError(f"{layer}: its input or its output was modified in place after it ran")
            if min(use.input.ndim for use in uses) < 2 or len({len(use.input) for use in uses}) != 1:
                shapes = ", ".join(str(tuple(use.input.shape)) for use in uses)
                raise ValueError(f"{layer}: expected inputs of shape (N, …, K) with the same N in all uses, got {shapes}")
        outputs = [use.output for uses in kept for use in uses]
        gradients = iter(torch.autograd.grad(loss, outputs, retain_graph=True, create_graph=create_graph, allow_unused=True))
        found = []
        for layer, uses in zip(self._layers, kept, strict=True):
            pairs = [(use.input, g) for use in uses if (g := next(gradients)) is not None]
            if not pairs:
                raise RuntimeError(f"the loss does not depend on {layer}")
            a, b = (torch.cat([_rows(pair[k]) for pair in pairs], 1) for k in range(2))
            a = a.to(b.dtype)
            found.append((a if create_graph else a.detach(), b))
        return found


class _Use(NamedTuple):
    """One call of a layer."""

    input: Tensor
    output: Tensor
    versions: tuple[int, int]


def _keep(uses: list[_Use], layer: str, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    if not output.requires_grad:
        raise RuntimeError(f"{layer} ran without gradients (torch.no_grad, a reentrant checkpoint, or nothing trainable)")
    (x,) = inputs
    uses.append(_Use(x, output, (x._version, output._version)))


def _rows(x: Tensor) -> Tensor:
    """(N, …, K) as (N, T, K)."""
    return x.reshape(x.shape[0], -1, x.shape[-1])
