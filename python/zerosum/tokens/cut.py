"""Finds the tensor after which a model no longer mixes positions, so that each position's loss depends on its own row only.

After its last attention, a transformer works on each position separately. Let h (N, T, ·) be a tensor through which every path
from the losses to earlier layers passes, such that loss (i, t) depends on row (i, t) of h only. One ordinary backward pass then
gives ∂ℓ_it/∂h for *every* token at once, each in its own row. Weights after h have rank-one gradients. Weights before h are reached
by backward passes that start at h, one row per token.
"""

from __future__ import annotations

import heapq
from collections.abc import Container, Iterable, Iterator

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node


def separators(losses: Tensor, activations: Container[Node]) -> Iterator[GradientEdge]:
    """Yield the tensors through which every path from ``losses`` passes, starting at the losses, as edges of the graph.

    ``activations`` are the nodes whose results depend on data. A node's inputs were created before it, so taking nodes by falling
    sequence number visits every node after all that depend on it. A node separates the graph if no waiting node leads to another
    activation. (A node with several results, such as a split, is skipped: no single edge carries them all.)
    """
    assert losses.grad_fn is not None
    count = 0  # breaks ties, because nodes cannot be compared
    heap: list[tuple[int, int, Node]] = [(-losses.grad_fn._sequence_nr(), count, losses.grad_fn)]
    waiting = {losses.grad_fn}
    while heap:
        _, _, node = heapq.heappop(heap)
        waiting.discard(node)
        if node in activations and not waiting and len(node._input_metadata) == 1:
            yield GradientEdge(node, 0)
        for before, _ in node.next_functions:
            if before is not None and before not in waiting and _leads_to(before, activations):
                count += 1
                waiting.add(before)
                heapq.heappush(heap, (-before._sequence_nr(), count, before))


def _leads_to(node: Node, activations: Container[Node]) -> bool:
    """Whether the node depends on an activation, and not only on weights."""
    return any(x in activations for x in _walk([node], stop=activations))


def _walk(nodes: Iterable[Node], stop: Container[Node]) -> Iterator[Node]:
    """Yield these nodes and all nodes that they lead to, without going past those in ``stop``."""
    seen: set[Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        yield node
        if node not in stop:
            stack.extend(x for x, _ in node.next_functions if x is not None)


def leaves(node: Node, stop: Node | None = None) -> set[int]:
    """Return the ids of the leaf tensors that a node leads to, along paths that avoid ``stop``."""
    found = _walk([node], set() if stop is None else {stop})
    return {id(leaf) for x in found if x is not stop and (leaf := getattr(x, "variable", None)) is not None}


def row_wise(losses: Tensor, edges: list[GradientEdge], signs: Tensor) -> list[bool]:
    """Whether row (i, t) of each tensor's gradient comes from loss (i, t) alone, for losses (N, T).

    Random signs on the losses test this. A row with one loss changes by exactly that sign, bit for bit, because every operation
    rounds symmetrically. A row that other losses reach does not.
    """
    plain, signed = (
        torch.autograd.grad(losses, edges, weights.to(losses.dtype), retain_graph=True, allow_unused=True)
        for weights in (torch.ones_like(losses), signs)
    )
    return [follows(x, y, signs) for x, y in zip(plain, signed, strict=True)]


def follows(plain: Tensor | None, signed: Tensor | None, signs: Tensor) -> bool:
    """Whether each row of a gradient changes by its own loss's sign only, given gradients without and with the (N, T) signs."""
    x, y = (position_rows(x, signs.shape) for x in (plain, signed))
    return x is not None and y is not None and torch.equal(y, x * signs.reshape(-1, 1).to(x.dtype))


def position_rows(x: Tensor | None, shape: torch.Size) -> Tensor | None:
    """Reshape (N, T, …) or (N·T, …) to (N·T, F); returns None for other shapes."""
    if x is None or not x.ndim or (x.shape[: len(shape)] != shape and x.shape[0] != shape.numel()):
        return None
    return x.reshape(shape.numel(), -1)
