"""Where a model stops mixing positions: the tensor from which on each position's loss is its own.

Behind its last attention a transformer works position by position. Let h (N, T, ·) be a tensor that every path from the losses
to earlier layers passes through, and row (i, t) of it all that loss (i, t) depends on. Then one ordinary backward pass gives
∂ℓ_it/∂h for *every* token at once, each in its own row: what lies behind h has rank-one gradients, and what lies before it is
reached by starting there, one row for each token.
"""

from __future__ import annotations

import heapq
from collections.abc import Container, Iterable, Iterator

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node


def separators(losses: Tensor, activations: Container[Node]) -> Iterator[GradientEdge]:
    """The tensors through which every path from ``losses`` passes, from the losses on, as edges of the graph.

    ``activations`` are the nodes that made tensors which depend on data. A node's inputs were made before it: nodes taken by
    falling sequence numbers come after all that depends on them, and one of them separates the graph where nothing that is left
    leads to another activation. (A node with several results, such as a split, is none: no edge has them all.)
    """
    assert losses.grad_fn is not None
    count = 0  # heapq compares what comes first alone
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
    """Whether the node depends on an activation, and not on weights alone."""
    return any(x in activations for x in _walk([node], stop=activations))


def _walk(nodes: Iterable[Node], stop: Container[Node]) -> Iterator[Node]:
    """All nodes that these lead to, themselves included; not beyond those of ``stop``."""
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
    """The ids of the leaf tensors that a node leads to, by paths that do not go through ``stop``."""
    found = _walk([node], set() if stop is None else {stop})
    return {id(leaf) for x in found if x is not stop and (leaf := getattr(x, "variable", None)) is not None}


def row_wise(losses: Tensor, edges: list[GradientEdge], signs: Tensor) -> list[bool]:
    """Whether row (i, t) of each tensor's gradient comes from loss (i, t) alone, for losses (N, T).

    With the losses' signs changed at random, such a row is the same with that sign, to the last bit, for every operation on it
    rounds symmetrically; one that other losses reach is not.
    """
    plain, signed = (
        torch.autograd.grad(losses, edges, weights.to(losses.dtype), retain_graph=True, allow_unused=True)
        for weights in (torch.ones_like(losses), signs)
    )
    return [follows(x, y, signs) for x, y in zip(plain, signed, strict=True)]


def follows(plain: Tensor | None, signed: Tensor | None, signs: Tensor) -> bool:
    """Whether each row of a gradient has the sign of its own loss alone, for losses (N, T) with and without these signs."""
    x, y = (position_rows(x, signs.shape) for x in (plain, signed))
    return x is not None and y is not None and torch.equal(y, x * signs.reshape(-1, 1).to(x.dtype))


def position_rows(x: Tensor | None, shape: torch.Size) -> Tensor | None:
    """(N, T, …) or (N·T, …) as (N·T, F), and None if it is neither."""
    if x is None or not x.ndim or (x.shape[: len(shape)] != shape and x.shape[0] != shape.numel()):
        return None
    return x.reshape(shape.numel(), -1)
