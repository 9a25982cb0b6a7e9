"""Covers the fused head of TRL's trainers, whose weight an ``autograd.Function`` would hide from the probe."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from zerosum.probe import rule


def register() -> None:
    """Registers :func:`fused_head` as the rule for TRL's function, where this TRL has it as it is known here. Elsewhere the probe
    differentiates the whole loss again for each example, which is exact too, and slow."""
    try:
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    except ImportError:
        return
    if list(inspect.signature(ChunkedLogProbFunction.forward).parameters)[1:] == list(inspect.signature(fused_head).parameters):
        rule(ChunkedLogProbFunction)(fused_head)


def fused_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    chunk_size: int,
    final_logit_softcapping: float | None = None,
    logit_scale: float = 1.0,
    outputs: Sequence[str] = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"),
) -> tuple[Tensor | None, ...]:
    """``log_softmax(z)[targets]`` with ``z = softcap(logit_scale · (hidden @ weight.T + bias)) / temperature``, (R,) of rows
    (R, K), and what else ``outputs`` names. It holds the logits (R, V); TRL's function has ``chunk_size`` columns at a time."""
    z = F.linear(hidden, weight, bias).float() * logit_scale
    if final_logit_softcapping is not None:
        z = final_logit_softcapping * torch.tanh(z / final_logit_softcapping)
    z = z / temperature
    log_p = z.log_softmax(-1)
    found = log_p.gather(-1, targets[:, None]).squeeze(-1)
    entropy = -(log_p.exp() * log_p).sum(-1) if "entropy" in outputs else None
    with torch.no_grad():
        log_sum_sq_probs = (2 * log_p).logsumexp(-1) if "log_sum_sq_probs" in outputs else None
        mean_logits = z.mean(-1) if "mean_logits" in outputs else None
        is_top1 = z.argmax(-1) == targets if "is_top1" in outputs else None
    return found, entropy, log_sum_sq_probs, mean_logits, is_top1
