"""The metrics of zero-sum learning: pure functions of sums and scalars.

Definitions are those of Mircea et al., "Training Dynamics Underlying Language Model Scaling Laws: Loss Deceleration and Zero-Sum
Learning" (ACL 2025): constructive interference C(x) = |Σ x_i| / Σ |x_i|, destructive interference D(x) = 1 − C(x), magnitude
M(x) = mean |x_i|, over the N examples i.

Random signs alone give C > 0, so every C and D comes with its null: the value that is expected when each example's contribution
keeps its size but has a random sign. E|Σ ε_i x_i| is √(2/π) √(Σ x_i²) as N grows (it lies between 0.886 and 1.253 times that
for any x, the bounds of Khintchine's inequality). Numbers that signs leave as they are, such as M, have no null.

For the same reason |Σ x_i| / N overstates |E x|, the more so the fewer the examples. Its square, less the examples' own part, is
the U-statistic ((Σ x_i)² − Σ x_i²) / (N (N − 1)), the mean of x_i x_k over pairs, whose expectation is (E x)² exactly where
examples are independent (tokens of one sequence are not, quite). ``debiased`` values, which estimate what infinitely many examples
would give, are made of its root, or of 0 where it is negative. The root of an unbiased square is not unbiased: in standard errors
of the mean, the bias of |E x| goes from +0.8 at E x = 0 to 0.36 at most, either way. It is the smaller one where C is near its
null, which is where it matters. From C of about 1.3 times the null on, the plain value has less: debiased ones are then too low,
by 12 % at 3 times and 1 % at 8 times the null.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from zsl_kernels import CoordinateSums, InterferenceSums

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


def ratio(numerator: float, denominator: float) -> float:
    """0/0 has no value: NaN, not an exception."""
    return numerator / denominator if denominator != 0 else math.nan


def root(x: float) -> float:
    """The root of what estimates a square, and may therefore be negative. NaNs come through."""
    return math.sqrt(x) if not x < 0 else 0.0


@dataclass(frozen=True)
class NumberSums:
    """What the metrics of numbers x_i need. ``NumberSums.of(x) + NumberSums.of(y)`` is that of both: it adds over micro-batches."""

    n: int
    total: float  # Σ x_i
    abs: float  # Σ |x_i|
    sq: float  # Σ x_i²

    @classmethod
    def of(cls, x: Tensor) -> NumberSums:
        """Of any shape; summed in float64."""
        x = x.detach().double()
        return cls(x.numel(), x.sum().item(), x.abs().sum().item(), x.square().sum().item())

    def __add__(self, other: NumberSums) -> NumberSums:
        return NumberSums(self.n + other.n, self.total + other.total, self.abs + other.abs, self.sq + other.sq)

    def metrics(self) -> dict[str, Metric]:
        """C, D and M of the numbers, and their mean: ``|mean| = M · (1 − D)`` exactly. NaNs come through.

        C and D have nulls and debiased values; M and the mean are unbiased as they are.
        """
        n = self.n
        c, null = ratio(abs(self.total), self.abs), ratio(SIGN_FLIP * math.sqrt(self.sq), self.abs)
        debiased = ratio(root((self.total * self.total - self.sq) * n / (n - 1)), self.abs) if n > 1 else None
        return {
            "C": Metric(c, n, null, debiased=debiased),
            "D": Metric(1 - c, n, 1 - null, debiased=None if debiased is None else 1 - debiased),
            "M": Metric(ratio(self.abs, n), n),
            "mean": Metric(ratio(self.total, n), n, 0.0),
        }


def number_interference(x: Tensor) -> dict[str, Metric]:
    """C, D, M and the mean of numbers x_i, one for each example; see :meth:`NumberSums.metrics`."""
    return NumberSums.of(x).metrics()


def add_coordinates(parts: Iterable[CoordinateSums]) -> CoordinateSums:
    """The sums of several parameters, or of one parameter's pieces, together; zeros for none."""
    none = CoordinateSums(touched=0.0, ratio=0.0, root_ratio=0.0, grad_sq=0.0, sq=0.0)
    return CoordinateSums(*(math.fsum(column) for column in zip(none, *parts, strict=True)))


def merge_sums(*parts: InterferenceSums) -> InterferenceSums:
    """The results of micro-batches as those of one batch: ``zk.interference(torch.cat([a, a2]), torch.cat([b, b2]), …)`` from the
    results for (a, b) and (a2, b2), but for the Gram's entries between micro-batches, which nobody computed: they are NaN.

    Sums add and scalars come one after another, so that merging is associative (to rounding). The parts are left as they are.

    Raises:
        ValueError: no part was given, or a part's weight has another shape, or a field that another lacks.
    """
    if not parts:
        raise ValueError("parts: expected at least one micro-batch's sums, got none")
    for k, part in enumerate(parts):
        if part.grad_sum.shape != parts[0].grad_sum.shape:
            shapes = tuple(parts[0].grad_sum.shape), tuple(part.grad_sum.shape)
            raise ValueError(f"parts[{k}]: expected sums of shape {shapes[0]} as parts[0], got {shapes[1]}")
        for name in ("dot", "abs_dot", "gram"):
            if (getattr(part, name) is None) != (getattr(parts[0], name) is None):
                had, got = ("none", "one") if getattr(parts[0], name) is None else ("one", "none")
                raise ValueError(f"parts[{k}].{name}: expected {had} as parts[0], got {got}")
    columns = dict(zip(InterferenceSums._fields, zip(*parts, strict=True), strict=True))
    merged: dict[str, Tensor | None] = {}
    for name, column in columns.items():
        tensors = [x for x in column if x is not None]
        if not tensors:
            merged[name] = None
        elif name == "gram":
            merged[name] = block_diagonal(tensors)
        elif name in ("grad_sum", "abs_sum", "sq_sum"):
            merged[name] = torch.stack(tensors).sum(0)
        else:
            merged[name] = torch.cat(tensors)
    return InterferenceSums(**merged)  # type: ignore[arg-type]


def block_diagonal(blocks: Sequence[Tensor]) -> Tensor:
    """The Gram of micro-batches' Grams. Inner products of examples in different ones are not known: NaN."""
    if len(blocks) == 1:
        return blocks[0]
    sizes = [len(block) for block in blocks]
    out = blocks[0].new_full((sum(sizes), sum(sizes)), math.nan)
    at = 0
    for block, size in zip(blocks, sizes, strict=True):
        out[at : at + size, at : at + size] = block
        at += size
    return out


def gradient_metrics(
    sums: CoordinateSums,
    l1: Tensor,
    sq_norm: Tensor,
    dot: Tensor | None = None,
    gram: Tensor | Sequence[Tensor] | None = None,
    *,
    size: int | None = None,
    non_embedding: tuple[CoordinateSums, int] | None = None,
) -> dict[str, Metric]:
    """Every gradient metric of a set of parameters, from its summed coordinates and the examples' (N,) scalars over the set.

    ``size`` is the number of the set's coordinates, and ``non_embedding`` the sums and the number of those outside of embeddings,
    which the paper's D(∇ℓ) is the mean over. Without it D_grad is over the whole set. The Gram may come as one for each
    micro-batch, or lack inner products, NaN between examples of different micro-batches: those pairs do not count.

    ========================  ==============================================================================================
    ``D_grad``                D over examples for each coordinate, then the plain mean over touched non-embedding coordinates
    ``touched``, ``untouched``  of D_grad's coordinates, those that some example's gradient touches, and those that have 0/0
    ``…_all``                 the same three over the whole set, with ``non_embedding``
    ``grad_norm``             ‖Σ_i g_i‖₂ / N, the norm of the mean gradient; debiased
    ``example_norm``          √(mean_i ‖g_i‖²)
    ``example_l1``            mean_i ‖g_i‖₁
    ``noise_trace``           tr Σ = Σ_i ‖g_i − Ḡ‖² / (N − 1), Ḡ the mean gradient: the trace of the examples' covariance; unbiased
    ``grad_norm_sq``          |G|², estimated by mean_{i≠k} ⟨g_i, g_k⟩, so that it may be negative; unbiased
    ``noise_scale``           tr Σ / |G|², the simple noise scale of McCandlish et al. (2018), in examples. A ratio of unbiased
                              numbers is biased: over a run, average the two above, and then divide
    ``mean_dot_ratio``        mean_{i≠k} ⟨g_i, g_k⟩ / mean_i ‖g_i‖², both parts unbiased
    ``C_g``                   Σ_j |Σ_i p_ij| / Σ_j Σ_i |p_ij|, with p_ij = g_ij u_j along the direction u
    ``C_uG``                  |Σ_j Σ_i p_ij| / Σ_j |Σ_i p_ij|
    ``C_ug``                  Σ_i |Σ_j p_ij| / Σ_i Σ_j |p_ij|
    ``C``, ``D``, ``M``       of the examples' first-order changes Σ_j p_ij; exactly C = C_g · C_uG / C_ug; C and D debiased
    ``mean_cosine``           mean over pairs i < k of ⟨g_i, g_k⟩ / (‖g_i‖ ‖g_k‖), from the Gram; unbiased
    ``cosine_std``            the standard deviation of the pairs' cosines; ``cosine_q05``, ``cosine_median``, ``cosine_q95``:
                              their quantiles
    ``negative_pairs``        the share of pairs i < k with ⟨g_i, g_k⟩ < 0
    ========================  ==============================================================================================

    D_grad, C_g and C_uG have no debiased value: it would need the U-statistic of each coordinate, which these sums do not tell.
    They depend on N, as their nulls do: compare them at one N, or against the null. Nulls are exact expectations, but for those
    with √(2/π) (see above), grad_norm's, which is the root of the mean square and so a little high where few directions carry the
    gradients, C_uG's, which is a ratio of expectations, and the quantiles', which are those of the cosines with either sign.
    """
    n = l1.numel()
    mean_sq, mean_grad_sq = ratio(sums.sq, n), ratio(sums.grad_sq, n * n)
    pair_dot = ratio(sums.grad_sq - sums.sq, n * (n - 1))  # mean ⟨g_i, g_k⟩ over i ≠ k: the unbiased |G|²
    if non_embedding is None:
        found = _coordinate_metrics(sums, size, n)
    else:
        found = _coordinate_metrics(*non_embedding, n)
        found |= {f"{name}_all": metric for name, metric in _coordinate_metrics(sums, size, n).items()}
    found |= {
        "grad_norm": Metric(root(mean_grad_sq), n, root(mean_sq / n) if n else None, debiased=root(pair_dot) if n > 1 else None),
        "example_norm": Metric(root(mean_sq), n),
        "example_l1": Metric(l1.double().mean().item() if n else math.nan, n),
        "noise_trace": Metric(mean_sq - pair_dot, n, mean_sq),
        "grad_norm_sq": Metric(pair_dot, n, 0.0),
        "noise_scale": Metric(ratio(mean_sq - pair_dot, pair_dot), n),
        "mean_dot_ratio": Metric(ratio(pair_dot, mean_sq), n, 0.0),
    }
    if dot is not None:
        numbers = NumberSums.of(dot)
        null_total = SIGN_FLIP * math.sqrt(numbers.sq)
        found["C_g"] = Metric(ratio(sums.p_sum, sums.p_abs), n, ratio(SIGN_FLIP * sums.p_root, sums.p_abs))
        found["C_uG"] = Metric(ratio(abs(numbers.total), sums.p_sum), n, ratio(null_total, SIGN_FLIP * sums.p_root))
        found["C_ug"] = Metric(ratio(numbers.abs, sums.p_abs), n)
        found |= {key: metric for key, metric in numbers.metrics().items() if key != "mean"}
    return found if gram is None else found | _cosine_metrics([gram] if isinstance(gram, Tensor) else gram)


def _coordinate_metrics(sums: CoordinateSums, size: int | None, n: int) -> dict[str, Metric]:
    d_grad = 1 - ratio(sums.ratio, sums.touched)
    found = {
        "D_grad": Metric(d_grad, n, 1 - ratio(SIGN_FLIP * sums.root_ratio, sums.touched)),
        "touched": Metric(sums.touched, n),
    }
    return found if size is None else found | {"untouched": Metric(size - sums.touched, n)}


def _pairs(gram: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The inner products and the cosines of the pairs i < k whose inner product is known."""
    gram = gram.double()
    diagonal = gram.diagonal()
    norms = diagonal.clamp(min=0).sqrt()
    # By Cauchy and Schwarz an inner product that was computed is a number where both norms are.
    known = ~(gram.isnan() & ~(diagonal[:, None].isnan() | diagonal[None, :].isnan()))
    pairs = known.triu(1)
    return gram[pairs].cpu().numpy(), (gram / (norms[:, None] * norms[None, :]))[pairs].cpu().numpy()


def _cosine_metrics(grams: Sequence[Tensor]) -> dict[str, Metric]:
    n = sum(map(len, grams))
    dots, cosines = (np.concatenate(parts) for parts in zip(*map(_pairs, grams), strict=True))
    if not cosines.size:
        names = ("mean_cosine", "cosine_std", "cosine_q05", "cosine_median", "cosine_q95", "negative_pairs")
        return {name: Metric(math.nan, n) for name in names}
    # Signs of the examples make the pairs' signs uncorrelated, though not independent.
    std = float(cosines.std(ddof=1)) if cosines.size > 1 else math.nan
    found = {
        "mean_cosine": Metric(float(cosines.mean()), n, 0.0),
        "cosine_std": Metric(std, n, math.sqrt(float(np.square(cosines).mean()))),
    }
    levels = {"cosine_q05": 0.05, "cosine_median": 0.5, "cosine_q95": 0.95}
    both = np.concatenate([cosines, -cosines])
    for name, value, null in zip(levels, *(np.quantile(x, list(levels.values())) for x in (cosines, both)), strict=True):
        found[name] = Metric(float(value), n, float(null))
    negative, either = (float(np.where(np.isnan(dots), math.nan, x).mean()) for x in (dots < 0, dots != 0))
    return found | {"negative_pairs": Metric(negative, n, either / 2)}
