"""Computes the two factors of linear layers' per-example gradients in differentiable form.

Use them for penalties on gradients, or as inputs of the ops of :mod:`zsl_kernels`.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Factors:
    """Computes ``(layer_input, torch.autograd.grad(losses.sum(), layer_output)[0])`` of some ``nn.Linear`` layers.

    These are the factors a and b of each example's gradient, g_i = b_iᵀ a_i::

        with zerosum.Factors(model.head) as factors:
            losses = per_example_loss(model(x), y)                      # (N,)
        ((a, b),) = factors.of(losses.sum(), create_graph=True)         # (N, T, K), (N, T, O)
        s = zk.interference(a, b)
        (losses.mean() - s.grad_sum.abs().sum() / s.abs_sum.sum()).backward()

    It assumes that rows are (N, …, K), with the examples in the first dimension; unlike a probe, it does not prove this. The
    factors cover the uses of the weight in the layer itself. They cover neither other uses of a tied weight nor biases.

    Args:
        layers: ``nn.Linear`` modules whose ``forward`` is not overridden. Each must run in the block at least once.

    Raises:
        TypeError: a layer is not such a module.
        ValueError: no layer is given, or a layer is given twice.
        RuntimeError: in the block, if a layer runs without gradients.
    """

    def __init__(self, *layers: nn.Linear) -> None:
        for k, layer in enumerate(layers):
            if not isinstance(layer, nn.Linear) or type(layer).forward is not nn.Linear.forward:
                raise TypeError(f"layers[{k}]: expected an nn.Linear with its own forward, got {type(layer).__name__}")
        if not layers or len(set(layers)) < len(layers):
            raise ValueError(
                f"layers: expected one or more distinct layers, got {len(layers)}, of which {len(set(layers))} are distinct"
            )
        self._layers = layers
        self._uses: list[list[_Use]] = [[] for _ in layers]
        self._handles: list[Any] = []

    def __enter__(self) -> Factors:
        """Start a new block and forget what an earlier one kept."""
        self._uses = [[] for _ in self._layers]
        for layer, uses in zip(self._layers, self._uses, strict=True):
            # This hook must run first, because other hooks may change the output.
            self._handles.append(layer.register_forward_hook(partial(_keep, uses, str(layer)), prepend=True))
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def of(self, loss: Tensor, *, create_graph: bool = False) -> list[tuple[Tensor, Tensor]]:
        """Return ``(layer_input, torch.autograd.grad(loss, layer_output)[0])`` of each layer. The backward pass keeps the graph.

        Args:
            loss: Σ_i ℓ_i, one number.
            create_graph: whether the factors are differentiable, as a penalty needs. If False, both are detached.

        Returns:
            a (N, T, K) and b (N, T, O) for each layer. T counts all positions of all of the layer's uses. ``a`` has the dtype of
            ``b``, which is the lower one under autocast.

        Raises:
            ValueError: the loss is not one number, an input has no example dimension, or uses differ in N.
            RuntimeError: a layer did not run in the block, the loss does not depend on it, or its input or output was modified in
                place.
        """
        if loss.numel() != 1:
            raise ValueError(f"loss: expected one number, the sum of the examples' losses, got shape {tuple(loss.shape)}")
        kept = [list(uses) for uses in self._uses]  # a copy, because a checkpoint that recomputes appends to them
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
    """Reshape (N, …, K) to (N, T, K)."""
    return x.reshape(x.shape[0], -1, x.shape[-1])
