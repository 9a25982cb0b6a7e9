"""Handles tensors computed from parameters only, by passing their per-example gradients on to those parameters."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from zerosum.probe.contributions import Contributions, Dense, DiagonalRows, RowGather
from zerosum.probe.parameters import DerivedWeight, GradSource, Pullback, Ref
from zerosum.probe.rules import embedding
from zerosum.probe.rules.site import Phase, RuleContext


def derive(
    context: RuleContext, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], refs: list[Ref], out: Tensor
) -> DerivedWeight:
    """Treat the result of a call that depends on weights only as a weight."""
    parents = list(dict.fromkeys(t for ref in refs for t in ref.source.parameters))
    derived = DerivedWeight(context, out, parents)
    if func is F.embedding and embedding.plain(args, kwargs):
        derived.pullback, derived.roots = _lookup(context, embedding.rows(*args, **kwargs), refs[0]), [derived]
    else:
        derived.roots = list(dict.fromkeys(root for ref in refs for root in ref.source.roots))
        derived.pullback = _any(context, derived.roots, out)
    return derived


def derive_lookup(context: RuleContext, ids: Tensor, weight: Ref) -> DerivedWeight:
    """Treat rows of a table, at indices that are the same for all examples, as a weight without computing the tensor."""
    like = weight.source.tensor
    out = torch.empty(*ids.shape, like.shape[1], dtype=like.dtype, device="meta", requires_grad=True)
    derived = DerivedWeight(context, out, weight.source.parameters)
    derived.pullback, derived.roots = _lookup(context, ids, weight), [derived]
    return derived


def _lookup(context: RuleContext, ids: Tensor, weight: Ref) -> Pullback:
    """Return the pullback for rows of a table at indices that are the same for all examples."""
    K = weight.piece.size[1]
    parent = weight.source
    for t in parent.parameters:
        t.covered_by("embedding")
        t.defer()

    def pullback(contributions: Contributions) -> Tensor:
        assert context.current is not None
        E = context.current.examples
        like = weight.source.tensor.new_empty(*ids.shape, K)
        for piece, mine in contributions.of_piece.items():
            for one in mine:
                if isinstance(one, DiagonalRows) and piece.size == like.shape and piece.stride == like.stride():
                    rows = RowGather(ids.reshape(E, -1), one.g.reshape(E, -1, K), weight.piece.size[0])
                elif isinstance(one, RowGather) and piece.size[-1] == K and piece.numel == like.numel():
                    flat = torch.cat([ids.flatten(), ids.new_full((1,), -1)])
                    rows = RowGather(flat[one.rows], one.e, weight.piece.size[0], one.ids)
                else:
                    g = Contributions(contributions.base, {piece: [one]}).materialize(E, like)
                    rows = RowGather(ids.reshape(1, -1).expand(E, -1), g.reshape(E, -1, K), weight.piece.size[0])
                parent.pull(weight.piece, rows)
        return contributions.grad_sum(like)

    return pullback


def _any(context: RuleContext, sources: list[GradSource], out: Tensor) -> Pullback:
    """Return the pullback for any other function: its vector-Jacobian product with each example's gradient, back to the
    sources."""
    edge, value = get_gradient_edge(out), torch.empty_strided(out.size(), out.stride(), dtype=out.dtype, device="meta")
    device = out.device

    def pullback(contributions: Contributions) -> Tensor:
        assert context.current is not None
        like = torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=device)
        E = context.current.examples
        if not E:
            return torch.zeros_like(like)
        g = contributions.materialize(E, like)
        given = g.to(value.dtype)
        wanted = [source.tensor for source in sources]
        with context.silenced(Phase.PLAIN):
            try:
                found = torch.autograd.grad([edge], wanted, [given], retain_graph=True, is_grads_batched=True, allow_unused=True)
            except RuntimeError:  # an operation without batched gradients
                each = [torch.autograd.grad([edge], wanted, [x], retain_graph=True, allow_unused=True) for x in given]
                found = tuple(None if gs[0] is None else torch.stack(gs) for gs in zip(*each, strict=True))  # type: ignore[misc]
        for source, gs in zip(sources, found, strict=True):
            if gs is not None:
                source.pull(source.base, Dense(gs.detach()))
        return g.sum(0)

    return pullback
