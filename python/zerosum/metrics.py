"""Defines the metrics of zero-sum learning as pure functions of sums and scalars.

The definitions are from Mircea et al., "Training Dynamics Underlying Language Model Scaling Laws: Loss Deceleration and Zero-Sum
Learning" (ACL 2025): constructive interference C(x) = |Σ x_i| / Σ |x_i|, destructive interference D(x) = 1 − C(x), magnitude M(x) =
mean |x_i|, over the N examples i.

Random signs alone give C > 0. Every C and D therefore comes with its null: the expected value if each example's contribution keeps
its size but has a random sign. E|Σ ε_i x_i| approaches √(2/π) √(Σ x_i²) as N grows. For any x it lies between 0.886 and 1.253 times
that value, by Khintchine's inequality. Numbers that do not depend on signs, such as M, have no null.

For the same reason |Σ x_i| / N overestimates |E x|, most of all for few examples. The U-statistic ((Σ x_i)² − Σ x_i²) / (N (N − 1))
is its square without the examples' own part: the mean of x_i x_k over pairs. Its expectation is exactly (E x)² if examples are
independent (tokens of one sequence are not quite independent). ``debiased`` values estimate the value for infinitely many examples.
They use the root of the U-statistic, or 0 if it is negative. The root of an unbiased square is not unbiased. Debiasing reduces the
bias of |E x|, in standard errors of the mean, from +0.8 at E x = 0 to at most 0.36 in either direction. The debiased value has the
smaller bias if C is near its null, which is where bias matters. If C exceeds about 1.3 times the null, the plain value has the
smaller bias: debiased values are then too low, by 12 % at 3 times and 1 % at 8 times the null.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from zsl_kernels import CoordinateSums

SIGN_FLIP = math.sqrt(2 / math.pi)


class Metric(NamedTuple):
    """A number and its context: the number of examples, the null, the standard error and the debiased value.

    The null is what random signs would have given. The standard error is there if the number was estimated from a sample. The
    debiased value is free of the bias that a finite N causes. Each is None if it has no meaning.
    """

    value: float
    n: int
    null: float | None = None
    error: float | None = None
    debiased: float | None = None

    def __float__(self) -> float:
        return self.value


def ratio(numerator: float, denominator: float) -> float:
    """Divide; 0/0 is NaN, not an exception."""
    return numerator / denominator if denominator != 0 else math.nan


def root(x: float) -> float:
    """Return the root of an estimate of a square, or 0 if the estimate is negative. NaN stays NaN."""
    return math.sqrt(x) if not x < 0 else 0.0


@dataclass(frozen=True)
class NumberSums:
    """The sums that the metrics of numbers x_i need.

    They add over micro-batches: ``NumberSums.of(x) + NumberSums.of(y)`` has the sums of both.
    """

    n: int
    total: float  # Σ x_i
    abs: float  # Σ |x_i|
    sq: float  # Σ x_i²

    @classmethod
    def of(cls, x: Tensor) -> NumberSums:
        """Sum a tensor of any shape, in float64."""
        x = x.detach().double()
        return cls(x.numel(), x.sum().item(), x.abs().sum().item(), x.square().sum().item())

    def __add__(self, other: NumberSums) -> NumberSums:
        return NumberSums(self.n + other.n, self.total + other.total, self.abs + other.abs, self.sq + other.sq)

    def metrics(self) -> dict[str, Metric]:
        """Return C, D and M of the numbers, and their mean: ``|mean| = M · (1 − D)`` exactly. NaN stays NaN.

        C and D have nulls and debiased values. M and the mean need none, because they are unbiased.
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
    """Return C, D, M and the mean of numbers x_i, one for each example; see :meth:`NumberSums.metrics`."""
    return NumberSums.of(x).metrics()


def add_coordinates(parts: Iterable[CoordinateSums]) -> CoordinateSums:
    """Add the sums of several parameters, or of one parameter's pieces. No parts give zeros."""
    none = CoordinateSums(touched=0.0, ratio=0.0, root_ratio=0.0, grad_sq=0.0, sq=0.0)
    return CoordinateSums(*(math.fsum(column) for column in zip(none, *parts, strict=True)))


def block_diagonal(blocks: Sequence[Tensor]) -> Tensor:
    """Combine the Grams of micro-batches. Inner products between micro-batches are unknown, hence NaN."""
    if len(blocks) == 1:
        return blocks[0]
    sizes = [len(block) for block in blocks]
    out = blocks[0].new_full((sum(sizes), sum(sizes)), math.nan)
    at = 0
    for block, size in zip(blocks, sizes, strict=True):
        out[at : at + size, at : at + size] = block
        at += size
    return out


@dataclass(frozen=True)
class Gradients:
    """The input of the gradient metrics for a set of parameters.

    Notation: examples i and k of N, coordinates j, gradients g_ij, a direction u, p_ij = g_ij u_j.

    Attributes:
        sums: sums over coordinates. size: the number of coordinates, if known.
        l1, sq_norm: ‖g_i‖₁ and ‖g_i‖², (N,).
        dot: Σ_j p_ij, (N,); None without a direction.
        grams: the Gram of each micro-batch; empty without a Gram. NaN means that an inner product was not computed.
    """

    sums: CoordinateSums
    l1: Tensor
    sq_norm: Tensor
    dot: Tensor | None = None
    grams: tuple[Tensor, ...] = ()
    size: int | None = None

    @property
    def n(self) -> int:
        return self.l1.numel()

    @property
    def mean_sq(self) -> float:
        """mean_i ‖g_i‖²"""
        return ratio(self.sums.sq, self.n)

    @property
    def pair_dot(self) -> float:
        """mean_{i≠k} ⟨g_i, g_k⟩: the unbiased |G|²."""
        return ratio(self.sums.grad_sq - self.sums.sq, self.n * (self.n - 1))

    @cached_property
    def changes(self) -> NumberSums:
        """The sums of the examples' first-order changes Σ_j p_ij."""
        assert self.dot is not None
        return NumberSums.of(self.dot)

    @cached_property
    def _known(self) -> list[tuple[Tensor, Tensor]]:
        """Each Gram in float64, and a mask of the entries that were computed."""
        found = []
        for gram in self.grams:
            gram = gram.double()
            # By the Cauchy-Schwarz inequality, a computed inner product is not NaN unless a norm is.
            unknown = gram.diagonal().isnan()
            found.append((gram, ~(gram.isnan() & ~(unknown[:, None] | unknown[None, :]))))
        return found

    @cached_property
    def pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """The inner products and the cosines of the pairs i < k whose inner product is known."""
        dots, cosines = [np.empty(0)], [np.empty(0)]
        for gram, known in self._known:
            chosen = known.triu(1)
            norms = gram.diagonal().clamp(min=0).sqrt()
            dots.append(gram[chosen].cpu().numpy())
            cosines.append((gram / (norms[:, None] * norms[None, :]))[chosen].cpu().numpy())
        return np.concatenate(dots), np.concatenate(cosines)

    @cached_property
    def others(self) -> np.ndarray:
        """⟨g_i, Σ_{k≠i} g_k⟩ of each example i over its known pairs. Examples without known pairs are left out."""
        found = [np.empty(0)]
        for gram, known in self._known:
            pairs = known.clone().fill_diagonal_(False)
            found.append(torch.where(pairs, gram, 0).sum(1)[pairs.any(1)].cpu().numpy())
        return np.concatenate(found)

    @cached_property
    def cosine_quantiles(self) -> dict[float, Metric]:
        """The quantiles of the pairs' cosines. The null is the quantile of the cosines with both signs."""
        _, cosines = self.pairs
        levels = (0.05, 0.5, 0.95)
        if not cosines.size:
            return {level: Metric(math.nan, self.n) for level in levels}
        found = (np.quantile(x, levels).tolist() for x in (cosines, np.concatenate([cosines, -cosines])))
        return {level: Metric(value, self.n, null) for level, value, null in zip(levels, *found, strict=True)}


class Definition(NamedTuple):
    """A gradient metric: how to compute it, what it needs, and where to show it besides reports, records and loggers.

    ``compute`` returns None if the metric has no meaning. ``needs`` is "", "direction" or "gram". With ``outside_embeddings`` the
    metric is over the coordinates outside of embeddings, and ``…_all`` is the same over all coordinates. ``label`` names its row in
    the table of ``zerosum demo``. ``column`` adds it to the table of ``zerosum measure``.
    """

    compute: Callable[[Gradients], Metric | None]
    needs: str
    outside_embeddings: bool
    label: str
    column: bool


# By name, in display order.
METRICS: dict[str, Definition] = {}
Compute = TypeVar("Compute", bound=Callable[[Gradients], Metric | None])


def gradient_metric(
    needs: str = "", *, outside_embeddings: bool = False, label: str = "", column: bool = False
) -> Callable[[Compute], Compute]:
    """Register the decorated function in ``METRICS`` under its own name; see :class:`Definition`."""

    def enter(compute: Compute) -> Compute:
        METRICS[compute.__name__] = Definition(compute, needs, outside_embeddings, label, column)
        return compute

    return enter


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
    """Compute every metric of ``METRICS`` for a set of parameters, from its summed coordinates and the examples' (N,) scalars.

    ``size`` is the number of the set's coordinates. ``non_embedding`` has the sums and the number of the coordinates outside of
    embeddings: the paper's D(∇ℓ) is the mean over these. Without it, D_grad is over the whole set. There may be one Gram for each
    micro-batch. A Gram may also contain NaN for unknown inner products between examples of different micro-batches: those pairs do
    not count.

    D_grad, C_g and C_uG have no debiased value, because it would need the U-statistic of each coordinate, which these sums do not
    contain. These metrics and their nulls depend on N: compare them at one N, or against the null. Nulls are exact expectations,
    with these exceptions:

    - The nulls with √(2/π) (see above) hold for large N.
    - The null of grad_norm is the root of the mean square, and so a little high if few directions carry the gradients.
    - The null of C_uG is a ratio of expectations.
    - The nulls of the quantiles are approximate.
    """
    grams = () if gram is None else (gram,) if isinstance(gram, Tensor) else tuple(gram)
    whole = Gradients(sums, l1, sq_norm, dot, grams, size)
    outside = whole if non_embedding is None else replace(whole, sums=non_embedding[0], size=non_embedding[1])
    there = {"": True, "direction": dot is not None, "gram": gram is not None}
    found: dict[str, Metric | None] = {}
    special = {name: metric for name, metric in METRICS.items() if metric.outside_embeddings}
    found |= {name: metric.compute(outside) for name, metric in special.items()}
    if non_embedding is not None:
        found |= {f"{name}_all": metric.compute(whole) for name, metric in special.items()}
    found |= {name: metric.compute(whole) for name, metric in METRICS.items() if name not in special and there[metric.needs]}
    return {name: metric for name, metric in found.items() if metric is not None}


@gradient_metric(outside_embeddings=True, label="D_grad, gradient interference", column=True)
def D_grad(g: Gradients) -> Metric:
    """D over examples for each coordinate, then the plain mean over touched coordinates."""
    null = 1 - ratio(SIGN_FLIP * g.sums.root_ratio, g.sums.touched)
    return Metric(1 - ratio(g.sums.ratio, g.sums.touched), g.n, null)


@gradient_metric(outside_embeddings=True)
def touched(g: Gradients) -> Metric:
    """The number of D_grad's coordinates that some example's gradient touches."""
    return Metric(g.sums.touched, g.n)


@gradient_metric(outside_embeddings=True)
def untouched(g: Gradients) -> Metric | None:
    """The number of D_grad's coordinates that no example touches: their D is 0/0."""
    return None if g.size is None else Metric(g.size - g.sums.touched, g.n)


@gradient_metric()
def grad_norm(g: Gradients) -> Metric:
    """‖Σ_i g_i‖₂ / N, the norm of the mean gradient; debiased."""
    value, null = root(ratio(g.sums.grad_sq, g.n * g.n)), root(g.mean_sq / g.n) if g.n else None
    return Metric(value, g.n, null, debiased=root(g.pair_dot) if g.n > 1 else None)


@gradient_metric()
def example_norm(g: Gradients) -> Metric:
    """√(mean_i ‖g_i‖²)"""
    return Metric(root(g.mean_sq), g.n)


@gradient_metric()
def example_l1(g: Gradients) -> Metric:
    """mean_i ‖g_i‖₁"""
    return Metric(g.l1.double().mean().item() if g.n else math.nan, g.n)


@gradient_metric()
def noise_trace(g: Gradients) -> Metric:
    """tr Σ = Σ_i ‖g_i − Ḡ‖² / (N − 1), Ḡ the mean gradient: the trace of the examples' covariance; unbiased."""
    return Metric(g.mean_sq - g.pair_dot, g.n, g.mean_sq)


@gradient_metric()
def grad_norm_sq(g: Gradients) -> Metric:
    """|G|², estimated by mean_{i≠k} ⟨g_i, g_k⟩, so that it may be negative; unbiased."""
    return Metric(g.pair_dot, g.n, 0.0)


@gradient_metric()
def noise_scale(g: Gradients) -> Metric:
    """tr Σ / |G|², the simple noise scale of McCandlish et al. (2018), in examples.

    A ratio of unbiased numbers is biased: over a run, average noise_trace and grad_norm_sq, and then divide.
    """
    return Metric(ratio(g.mean_sq - g.pair_dot, g.pair_dot), g.n)


@gradient_metric()
def mean_dot_ratio(g: Gradients) -> Metric:
    """mean_{i≠k} ⟨g_i, g_k⟩ / mean_i ‖g_i‖², both parts unbiased."""
    return Metric(ratio(g.pair_dot, g.mean_sq), g.n, 0.0)


@gradient_metric("direction", label="C_g along the update", column=True)
def C_g(g: Gradients) -> Metric:
    """Σ_j |Σ_i p_ij| / Σ_j Σ_i |p_ij|"""
    return Metric(ratio(g.sums.p_sum, g.sums.p_abs), g.n, ratio(SIGN_FLIP * g.sums.p_root, g.sums.p_abs))


@gradient_metric("direction", column=True)
def C_uG(g: Gradients) -> Metric:
    """|Σ_j Σ_i p_ij| / Σ_j |Σ_i p_ij|"""
    null_total = SIGN_FLIP * math.sqrt(g.changes.sq)
    return Metric(ratio(abs(g.changes.total), g.sums.p_sum), g.n, ratio(null_total, SIGN_FLIP * g.sums.p_root))


@gradient_metric("direction", column=True)
def C_ug(g: Gradients) -> Metric:
    """Σ_i |Σ_j p_ij| / Σ_i Σ_j |p_ij|"""
    return Metric(ratio(g.changes.abs, g.sums.p_abs), g.n)


@gradient_metric("direction")
def C(g: Gradients) -> Metric:
    """C of the examples' first-order changes Σ_j p_ij: exactly C_g · C_uG / C_ug; debiased."""
    return g.changes.metrics()["C"]


@gradient_metric("direction")
def D(g: Gradients) -> Metric:
    """1 − C; debiased."""
    return g.changes.metrics()["D"]


@gradient_metric("direction")
def M(g: Gradients) -> Metric:
    """mean_i |Σ_j p_ij|"""
    return g.changes.metrics()["M"]


@gradient_metric("gram")
def mean_cosine(g: Gradients) -> Metric:
    """Mean over pairs i < k of ⟨g_i, g_k⟩ / (‖g_i‖ ‖g_k‖); unbiased."""
    _, cosines = g.pairs
    return Metric(float(cosines.mean()), g.n, 0.0) if cosines.size else Metric(math.nan, g.n)


@gradient_metric("gram")
def cosine_std(g: Gradients) -> Metric:
    """The standard deviation of the pairs' cosines."""
    _, cosines = g.pairs
    if not cosines.size:
        return Metric(math.nan, g.n)
    # Random signs of the examples make the pairs' signs uncorrelated, though not independent.
    std = float(cosines.std(ddof=1)) if cosines.size > 1 else math.nan
    return Metric(std, g.n, math.sqrt(float(np.square(cosines).mean())))


@gradient_metric("gram")
def cosine_q05(g: Gradients) -> Metric:
    """The 5 % quantile of the pairs' cosines."""
    return g.cosine_quantiles[0.05]


@gradient_metric("gram")
def cosine_median(g: Gradients) -> Metric:
    """The median of the pairs' cosines."""
    return g.cosine_quantiles[0.5]


@gradient_metric("gram")
def cosine_q95(g: Gradients) -> Metric:
    """The 95 % quantile of the pairs' cosines."""
    return g.cosine_quantiles[0.95]


@gradient_metric("gram")
def negative_pairs(g: Gradients) -> Metric:
    """The share of pairs i < k with ⟨g_i, g_k⟩ < 0."""
    return share_below_zero(g.pairs[0], g.n)


@gradient_metric("gram", label="opposed_examples, hurt by the others' step")
def opposed_examples(g: Gradients) -> Metric:
    """The share of examples i with ⟨g_i, Σ_{k≠i} g_k⟩ < 0: a small step along the others' gradient raises their losses."""
    return share_below_zero(g.others, g.n)


def share_below_zero(x: np.ndarray, n: int) -> Metric:
    """Return the share of negative numbers. Random signs make half of the nonzero numbers negative. NaN stays NaN."""
    if not x.size:
        return Metric(math.nan, n)
    negative, either = (float(np.where(np.isnan(x), math.nan, found).mean()) for found in (x < 0, x != 0))
    return Metric(negative, n, either / 2)
