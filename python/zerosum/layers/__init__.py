"""One rule for each operation that uses a weight. To cover another: write a ``rule`` in a module here and enter it in ``RULES``.

A rule gets the capture, the function and the call's arguments, of which at least one is a weight (or a view, or a function of
weights alone) and at least one an activation. It returns the instrumented call's result, whose backward leaves with the weight
what its per-example gradient is made of (see :mod:`zerosum.uses`), or raises :class:`~zerosum.provenance.Uncovered` before it has
computed anything; then :mod:`~zerosum.layers.fallback` takes the call. A :class:`~zerosum.layers.site.Site` holds what they share.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import zsl_kernels as zk
from zerosum.layers import broadcast, embedding, grouped, head, linear, norm

RULES: dict[Callable[..., Any], Callable[..., Any]] = {
    F.linear: linear.rule,
    **dict.fromkeys((torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__), linear.matmul_rule),
    **dict.fromkeys((torch.addmm, Tensor.addmm), linear.addmm_rule),
    F.embedding: embedding.rule,
    Tensor.__getitem__: embedding.getitem_rule,
    F.layer_norm: norm.layer_norm_rule,
    F.rms_norm: norm.rms_norm_rule,
    F.group_norm: norm.group_norm_rule,
    F.batch_norm: norm.batch_norm_rule,
    **dict.fromkeys(
        (torch.mul, torch.multiply, Tensor.mul, Tensor.multiply, Tensor.__mul__, Tensor.__rmul__), broadcast.scale_rule
    ),
    **dict.fromkeys(broadcast.FUNCTIONS, broadcast.rule),
    **dict.fromkeys((torch.cat, torch.concat, torch.concatenate), broadcast.cat_rule),
    **dict.fromkeys(grouped.FUNCTIONS, grouped.rule),
    zk.linear_cross_entropy: head.rule,
}
