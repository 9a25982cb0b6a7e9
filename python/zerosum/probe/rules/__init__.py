"""Registers one rule for each operation that uses a weight; :func:`rule` lets users add their own.

A rule receives the context, the function and the call's arguments. At least one argument is a weight (or a view of one, or a
function of weights alone) and at least one is an activation. The rule returns the result of the instrumented call. The result's
backward pass stores with the weight the contributions to its per-example gradient (see :mod:`zerosum.probe.contributions`). A rule
that does not cover the call raises :class:`~zerosum.probe.layout.Uncovered` before it computes anything;
:mod:`~zerosum.probe.rules.again` then handles the call. A :class:`~zerosum.probe.rules.site.Site` holds the state that all rules
need.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

import zsl_kernels as zk
from zerosum.probe.rules import broadcast, embedding, grouped_mm, linear, linear_cross_entropy, norm

Rule = Callable[..., Any]


class Known(NamedTuple):
    """An operation that :mod:`zsl_kernels.weight_uses.eager` implements.

    ``kind`` is its name there. ``bind`` is the function that binds its arguments, and ``places`` has the positions of input, weight
    and bias among them. ``backward`` is the function that its node calls when it has no native implementation.
    """

    kind: str
    bind: Callable[..., tuple[Any, ...]]
    places: tuple[int, int, int]
    backward: Callable[..., Any]


RULES: dict[Callable[..., Any], Rule] = {
    F.linear: linear.rule,
    **dict.fromkeys(
        (torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.__matmul__), linear.matmul_rule
    ),
    **dict.fromkeys((torch.addmm, Tensor.addmm), linear.addmm_rule),
    F.embedding: embedding.rule,
    Tensor.__getitem__: embedding.getitem_rule,
    F.layer_norm: norm.layer_norm_rule,
    F.rms_norm: norm.rms_norm_rule,
    F.group_norm: norm.group_norm_rule,
    **dict.fromkeys(
        (torch.mul, torch.multiply, Tensor.mul, Tensor.multiply, Tensor.__mul__, Tensor.__rmul__), broadcast.scale_rule
    ),
    **dict.fromkeys(broadcast.FUNCTIONS, broadcast.rule),
    **dict.fromkeys((torch.prelu, Tensor.prelu), broadcast.prelu_rule),
    **dict.fromkeys(grouped_mm.FUNCTIONS, grouped_mm.rule),
    zk.linear_cross_entropy: linear_cross_entropy.rule,
}

# Operations that run without Python when a call is like an earlier one. Their backward pass needs Python except in the plain cases.
KNOWN: dict[Callable[..., Any], Known] = {
    F.linear: Known("linear", linear.linear_arguments, (0, 1, 2), linear.backward),
    torch.addmm: Known("addmm", linear.addmm_arguments, (1, 2, 0), linear.addmm_backward),
    F.layer_norm: Known("layer_norm", norm.layer_norm_arguments, (0, 2, 3), norm.layer_norm_backward),
}

# The autograd.Functions that a user's rule covers. The torch function mode does not see their `apply` by itself.
APPLIED: dict[type[torch.autograd.Function], Rule] = {}

F_ = TypeVar("F_", bound=Callable[..., Any])


def rule(function: Callable[..., Any] | type[torch.autograd.Function]) -> Callable[[F_], F_]:
    """Register the decorated function as the rule for a torch function or an ``autograd.Function``.

    ``replacement(*args, **kwargs)`` is called in place of ``function(*args, **kwargs)`` (or ``function.apply(*args)``) while a
    probe measures and a trainable weight is among the arguments. It computes the same result from covered operations::

        @zerosum.rule(FusedHead)  # a torch.autograd.Function: FusedHead.apply(h, weight, targets) is the mean of the rows' losses
        def fused_head(h, weight, targets):
            losses = zk.linear_cross_entropy(h[None], weight, targets[None])
            return losses.sum() / (targets != -100).sum()

    The step then computes what the rule computes, which equals the original result up to rounding. A rule replaces an earlier rule
    for the same function.

    Args:
        function: a function that supports torch's ``__torch_function__`` protocol (``F.bilinear``, ``torch.baddbmm``, …), or a
            subclass of ``torch.autograd.Function``.

    Raises:
        TypeError: ``function`` is neither.
    """
    if not callable(function):
        raise TypeError(f"function: expected a torch function or an autograd.Function, got {type(function).__name__}")

    def register(replacement: F_) -> F_:
        def run(context: Any, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            with context.watching():
                return replacement(*args, **kwargs)

        if isinstance(function, type) and issubclass(function, torch.autograd.Function):
            APPLIED[function] = run
        else:
            RULES[function] = run
            KNOWN.pop(function, None)
        return replacement

    return register
