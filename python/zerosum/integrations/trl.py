"""Covers the fused head of TRL's trainers, which computes each token's log-probability in its own ``autograd.Function``."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import zerosum
import zsl_kernels as zk


@functools.cache
def cover_fused_head() -> None:
    """Register a rule so that every probe measures ``trl.kernels.chunked_logprob.ChunkedLogProbFunction``, if TRL has it."""
    try:
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    except ImportError:  # another version of TRL: the probe reports that it does not cover the head
        return

    @zerosum.rule(ChunkedLogProbFunction)
    def log_probs(
        hidden: Tensor,  # (R, K)
        weight: Tensor,  # (V, K)
        bias: Tensor | None,
        targets: Tensor,  # (R,)
        temperature: float,
        chunk_size: int,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = (),
    ) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            settings = (temperature, chunk_size, softcap, logit_scale, outputs)
            _, entropy, *others = ChunkedLogProbFunction.apply(hidden, weight, bias, targets, *settings)
        scale = logit_scale / temperature
        if bias is None and softcap is None:
            losses = zk.linear_cross_entropy((hidden if scale == 1 else hidden * scale)[None], weight, targets[None])[0]
        else:
            logits = F.linear(hidden, weight, bias).float() * logit_scale
            logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
            losses = F.cross_entropy(logits / temperature, targets, reduction="none")
        return -losses, None if entropy is None else _NotMeasured.apply(entropy, losses), *others


class _NotMeasured(torch.autograd.Function):
    """Passes the entropy through for logging. It has no gradient, so a loss that depends on it is refused."""

    @staticmethod
    def forward(ctx: Any, entropy: Tensor, losses: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        return entropy.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[None, None]:
        if grad is not None:
            raise NotImplementedError("zerosum: a loss that depends on the tokens' entropy is not supported with TRL's fused head")
        return None, None
