"""The metrics of zero-sum learning: pure functions of sums and scalars.

Definitions are those of Mircea et al., "Training Dynamics Underlying Language Model Scaling Laws: Loss Deceleration and Zero-Sum
Learning" (ACL 2025): constructive interference C(x) = |Σ x_i| / Σ |x_i|, destructive interference D(x) = 1 − C(x), magnitude
M(x) = mean |x_i|, over the N examples i.

Random signs alone give C > 0, so every C and D comes with its null: the value that is expected when each example's contribution
keeps its size but has a random sign. E|Σ ε_i x_i| is √(2/π) √(Σ x_i²) as N grows (it lies between 0.886 and 1.253 times that
for any x, the bounds of Khintchine's inequality).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from zsl_kernels import CoordinateSums

SIGN_FLIP = math.sqrt(2 / math.pi)


class Metric(NamedTuple):
    """One number, the examples it is over, what random signs would have given, the number's standard error where it was
    estimated from a sample, and its value without the bias that a finite N gives it. None where that has no meaning."""

    value: float
    n: int
    null: float | None = None
    error: float | None = None
    debiased: float | None = None

    def __float__(self) -> float:
        return self.value


def _ratio(numerator: float, denominator: float) -> float:
    """0/0 has no value: NaN, not an exception."""
    return numerator / denominator if denominator != 0 else math.nan


def number_interference(x: Tensor) -> dict[str, Metric]:
    """C, D and M of numbers x_i, one for each example, and their mean: ``|mean| = M · (1 − D)`` exactly. NaNs come through."""
    x = x.detach().double().flatten()
    n = x.numel()
    total, size = x.sum().item(), x.abs().sum().item()
    null = _ratio(SIGN_FLIP * x.square().sum().sqrt().item(), size)
    c = _ratio(abs(total), size)
    return {
        "C": Metric(c, n, null),
        "D": Metric(1 - c, n, 1 - null),
        "M": Metric(_ratio(size, n), n),
        "mean": Metric(_ratio(total, n), n),
    }


def add_coordinates(parts: Iterable[CoordinateSums]) -> CoordinateSums:
    """The sums of several parameters, or of one parameter's pieces, together."""
    return CoordinateSums(*(math.fsum(column) for column in zip(*parts, strict=True)))


def gradient_metrics(
    sums: CoordinateSums,
    l1: Tensor,
    sq_norm: Tensor,
    dot: Tensor | None = None,
    gram: Tensor | None = None,
    batches: Sequence[int] | None = None,
) -> dict[str, Metric]:
    """Every gradient metric of a set of parameters, from its summed coordinates and the examples' (N,) scalars over the set.

    ``batches`` says how many examples each micro-batch has: the Gram's entries are known within one.

    ========================  ==============================================================================================
    ``D_grad``                D over examples for each coordinate, then the plain mean over touched coordinates
    ``grad_norm``             ‖Σ_i g_i‖₂ / N, the norm of the mean gradient
    ``example_norm``          √(mean_i ‖g_i‖²)
    ``example_l1``            mean_i ‖g_i‖₁
    ``noise_scale``           tr Σ / |G|², the simple noise scale of McCandlish et al. (2018), both parts unbiased; in examples
    ``mean_dot_ratio``        mean_{i≠k} ⟨g_i, g_k⟩ / mean_i ‖g_i‖²
    ``C_g``                   Σ_j |Σ_i p_ij| / Σ_j Σ_i |p_ij|, with p_ij = g_ij u_j along the direction u
    ``C_uG``                  |Σ_j Σ_i p_ij| / Σ_j |Σ_i p_ij|
    ``C_ug``                  Σ_i |Σ_j p_ij| / Σ_i Σ_j |p_ij|
    ``C``, ``D``, ``M``       of the examples' first-order changes Σ_j p_ij; exactly C = C_g · C_uG / C_ug
    ``mean_cosine``           mean over pairs i < k of ⟨g_i, g_k⟩ / (‖g_i‖ ‖g_k‖), from the Gram
    ``negative_pairs``        the share of pairs i < k with ⟨g_i, g_k⟩ < 0
    ========================  ==============================================================================================
    """
    n = l1.numel()
    mean_sq, mean_grad_sq = _ratio(sums.sq, n), _ratio(sums.grad_sq, n * n)
    pair_dot = _ratio(sums.grad_sq - sums.sq, n * (n - 1))  # mean ⟨g_i, g_k⟩ over i ≠ k: the unbiased |G|²
    found = {
        "D_grad": Metric(1 - _ratio(sums.ratio, sums.touched), n, 1 - _ratio(SIGN_FLIP * sums.root_ratio, sums.touched)),
        "grad_norm": Metric(math.sqrt(mean_grad_sq) if mean_grad_sq >= 0 else math.nan, n),
        "example_norm": Metric(math.sqrt(mean_sq) if mean_sq >= 0 else math.nan, n),
        "example_l1": Metric(l1.double().mean().item() if n else math.nan, n),
        "noise_scale": Metric(_ratio(mean_sq - pair_dot, pair_dot), n),
        "mean_dot_ratio": Metric(_ratio(pair_dot, mean_sq), n, 0.0),
    }
    if dot is not None:
        dot = dot.double()
        total, size = abs(dot.sum().item()), dot.abs().sum().item()
        null_total = SIGN_FLIP * dot.square().sum().sqrt().item()
        found["C_g"] = Metric(_ratio(sums.p_sum, sums.p_abs), n, _ratio(SIGN_FLIP * sums.p_root, sums.p_abs))
        found["C_uG"] = Metric(_ratio(total, sums.p_sum), n, _ratio(null_total, SIGN_FLIP * sums.p_root))
        found["C_ug"] = Metric(_ratio(size, sums.p_abs), n)
        found |= {key: metric for key, metric in number_interference(dot).items() if key != "mean"}
    if gram is not None:
        norms = gram.double().diagonal().clamp(min=0).sqrt()
        sizes = torch.tensor([len(gram)] if batches is None else batches)
        batch = torch.arange(len(sizes)).repeat_interleave(sizes).to(gram.device)
        above = (batch[:, None] == batch[None, :]).triu(1)
        cosines = (gram.double() / (norms[:, None] * norms[None, :]))[above]
        pairs = cosines.numel()
        found["mean_cosine"] = Metric(cosines.mean().item() if pairs else math.nan, n, 0.0)
        found["negative_pairs"] = Metric((gram[above] < 0).double().mean().item() if pairs else math.nan, n, 0.5)
    return found
