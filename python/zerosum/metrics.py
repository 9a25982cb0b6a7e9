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


@dataclass(frozen=True)
class Gradients:
    """What the gradient metrics of a set of parameters are computed from.

    Letters: examples i and k of N, coordinates j, g_ij the gradients, u a direction, p_ij = g_ij u_j.

    Attributes:
        sums: over coordinates. size: the number of coordinates, where it is known.
        l1, sq_norm: ‖g_i‖₁ and ‖g_i‖², (N,).
        dot: Σ_j p_ij, (N,); None without a direction.
        grams: the Gram of each micro-batch; empty without one. NaN stands for an inner product that was not computed.
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
        """Of the examples' first-order changes Σ_j p_ij."""
        assert self.dot is not None
        return NumberSums.of(self.dot)

    @cached_property
    def _known(self) -> list[tuple[Tensor, Tensor]]:
        """Each Gram in float64, and which of its entries were computed."""
        found = []
        for gram in self.grams:
            gram = gram.double()
            # By Cauchy and Schwarz an inner product that was computed is a number where both norms are.
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
        """⟨g_i, Σ_{k≠i} g_k⟩ of each example i, over its pairs that are known; without the examples that have none."""
        found = [np.empty(0)]
        for gram, known in self._known:
            pairs = known.clone().fill_diagonal_(False)
            found.append(torch.where(pairs, gram, 0).sum(1)[pairs.any(1)].cpu().numpy())
        return np.concatenate(found)

    @cached_property
    def cosine_quantiles(self) -> dict[float, Metric]:
        """The null's are those of the cosines with either sign."""
        _, cosines = self.pairs
        levels = (0.05, 0.5, 0.95)
        if not cosines.size:
            return {level: Metric(math.nan, self.n) for level in levels}
        found = (np.quantile(x, levels).tolist() for x in (cosines, np.concatenate([cosines, -cosines])))
        return {level: Metric(value, self.n, null) for level, value, null in zip(levels, *found, strict=True)}


class Definition(NamedTuple):
    """A gradient metric: how it is computed, what it needs, and where it is shown besides reports, records and loggers.

    ``compute`` returns None where the metric has no meaning. ``needs`` is "", "direction" or "gram". With ``outside_embeddings``
    it is over the coordinates outside of embeddings, and once more over all as ``…_all``. ``label`` names its row in the table of
    ``zerosum demo``, and ``column`` puts it into the table of ``zerosum measure``.
    """

    compute: Callable[[Gradients], Metric | None]
    needs: str
    outside_embeddings: bool
    label: str
    column: bool


# By name, in the order in which they are shown.
METRICS: dict[str, Definition] = {}
Compute = TypeVar("Compute", bound=Callable[[Gradients], Metric | None])


def gradient_metric(
    needs: str = "", *, outside_embeddings: bool = False, label: str = "", column: bool = False
) -> Callable[[Compute], Compute]:
    """Enters the decorated function in ``METRICS`` under its own name; see :class:`Definition`."""

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
    embeddings: the paper's D(∇ℓ) is the mean over these. Without it D_grad is over the whole set. The Gram may come as one for each
    micro-batch, or lack inner products, NaN between examples of different micro-batches: those pairs do not count.

    D_grad, C_g and C_uG have no debiased value: it would need the U-statistic of each coordinate, which these sums do not tell.
    They depend on N, as their nulls do: compare them at one N, or against the null. Nulls are exact expectations, with these
    exceptions: those with √(2/π) (see above); grad_norm's, which is the root of the mean square and so a little high where few
    directions carry the gradients; C_uG's, which is a ratio of expectations; and the quantiles'.
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
    """Of D_grad's coordinates, those that some example's gradient touches."""
    return Metric(g.sums.touched, g.n)


@gradient_metric(outside_embeddings=True)
def untouched(g: Gradients) -> Metric | None:
    """Of D_grad's coordinates, those that no example touches: their D is 0/0."""
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
    # Signs of the examples make the pairs' signs uncorrelated, though not independent.
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
    """The share of negative numbers; signs at random make half of those negative that are not zero. NaNs come through."""
    if not x.size:
        return Metric(math.nan, n)
    negative, either = (float(np.where(np.isnan(x), math.nan, found).mean()) for found in (x < 0, x != 0))
    return Metric(negative, n, either / 2)
