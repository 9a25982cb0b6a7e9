"""Computes inner products between the gradients of a data set's examples, block by block."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from zerosum.changes import eval_mode
from zerosum.distributed import check_whole
from zerosum.probe import Probe, Report
from zerosum.probe.parameters import UNREACHED

Batch = tuple[Tensor, ...]


def gram_between(
    model: nn.Module,
    losses: Callable[..., Tensor],
    first: Batch,
    second: Batch | None = None,
    *,
    block: int = 8,
    parameters: Iterable[str] | None = None,
) -> Tensor:
    """Compute ``g(first) @ g(second).T``: exact inner products of all pairs of examples of two sets, or of one, without storing
    gradients.

    Row i of ``g(batch)`` is ``torch.autograd.grad(losses(model, *batch)[i], parameters)``, flattened into one vector. Each pair of
    blocks takes one forward and one backward pass of both blocks under a probe. In all there are N·M / ``block``² passes of
    2·``block`` examples, or half as many within one set. The memory is that of one pass. The model runs in eval mode and is left
    unchanged; ``.grad`` is not touched.

    Args:
        model: a model that processes each example independently.
        losses: ``losses(model, *batch)`` returns the losses (n,) of n examples.
        first: tensors with N examples along their first dimension, such as ``(tokens, targets)``.
        second: tensors of the same other dimensions with M examples; None means ``first``.
        block: how many examples of each set run together.
        parameters: names of the parameters to take inner products over; None means all trainable ones. Other parameters are not
            measured.

    Returns: (N, M) float64, on the CPU.

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it.
        NotImplementedError: the model's parameters are sharded.
        RuntimeError: a parameter's per-example gradients are unknown; the message names the parameter and the reason.
    """
    n = check_batch("first", first)
    m = n if second is None else check_batch("second", second)
    if second is not None:
        shapes = [[(x.shape[1:], x.dtype) for x in batch] for batch in (first, second)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"second: expected tensors that may be joined with those of first, {shapes[0]}, got {shapes[1]}")
    if not isinstance(block, int) or isinstance(block, bool) or block < 1:
        raise ValueError(f"block: expected a positive integer, got {block!r}")
    if not callable(losses):
        raise TypeError(f"losses: expected a function of (model, *batch), got {type(losses).__name__}")
    check_whole(model, "gram_between")
    found = torch.zeros(n, m, dtype=torch.float64)
    blocks, others = torch.arange(n).split(block), torch.arange(m).split(block)
    with trainable_alone(model, parameters), eval_mode(model), torch.enable_grad():
        # The probe differentiates the examples' own losses, whatever the loss of training is.
        probe = Probe(model, gram=True, loss_reduction="sum")
        if second is not None:
            for mine, its in itertools.product(blocks, others):
                batch = tuple(torch.cat([x[mine], y[its]]) for x, y in zip(first, second, strict=True))
                found[mine[:, None], its] = _gram(probe, losses, batch)[: len(mine), len(mine) :]
            return found
        # A pair of blocks of one set also yields the inner products within each block.
        for pair in itertools.combinations(blocks, 2) if len(blocks) > 1 else [blocks]:
            mine = torch.cat(pair)
            found[mine[:, None], mine] = _gram(probe, losses, tuple(x[mine] for x in first))
    return found


def check_batch(name: str, batch: Any) -> int:
    if not isinstance(batch, tuple) or not batch or not all(isinstance(x, Tensor) and x.ndim for x in batch):
        raise TypeError(f"{name}: expected a tuple of tensors, whose first dimension are the examples, got {type(batch).__name__}")
    sizes = {len(x) for x in batch}
    if len(sizes) != 1 or not min(sizes):
        raise ValueError(f"{name}: expected tensors of the same number of examples, at least one, got {sorted(sizes)}")
    return sizes.pop()


def _gram(probe: Probe, losses: Callable[..., Tensor], batch: Batch) -> Tensor:
    """Return the Gram (n, n) of one batch, float64 on the CPU."""
    n = len(batch[0])
    with probe:
        losses_of_each(losses, probe.model, batch).sum().backward()
    report = probe.report()
    check_covered(report)
    return torch.zeros(n, n, dtype=torch.float64) if report.gram is None else report.gram.cpu()


def losses_of_each(losses: Callable[..., Tensor], model: nn.Module, batch: Batch) -> Tensor:
    """Return the losses (n,), for a backward pass whose gradient is not added to another."""
    model.zero_grad()
    values, n = losses(model, *batch), len(batch[0])
    if not isinstance(values, Tensor) or values.shape != (n,):
        found = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(f"losses: expected one for each of {n} examples, ({n},), got {found}")
    return values


def check_covered(report: Report) -> None:
    """Raise an error if a parameter is not covered although its gradient may be nonzero."""
    for name, reason in report.coverage.not_covered.items():
        if reason not in UNREACHED:
            raise RuntimeError(f"parameters: the per-example gradients of {name!r} are not known: {reason}")


@contextmanager
def trainable_alone(model: nn.Module, names: Iterable[str] | None) -> Iterator[None]:
    """Make only the named parameters trainable, without gradients, inside the context; then restore the previous state."""
    known = dict(model.named_parameters(remove_duplicate=False))
    if names is not None:
        names = [names] if isinstance(names, str) else list(names)
        if not names:
            raise ValueError("parameters: expected at least one name, or None for all, got none")
        for name in names:
            if name not in known or not known[name].requires_grad:
                raise ValueError(f"parameters: {name!r} is not a trainable parameter of the model")
    chosen = None if names is None else {id(known[name]) for name in names}
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    try:
        for p, trainable, _ in before:
            p.grad = None
            p.requires_grad_(trainable and (chosen is None or id(p) in chosen))
        yield
    finally:
        for p, trainable, grad in before:
            p.requires_grad_(trainable)
            p.grad = grad
