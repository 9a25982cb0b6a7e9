"""Defines the report of a sample of tokens, which estimates statistics of all tokens."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from zerosum.metrics import SIGN_FLIP, Metric, number_interference, ratio, root
from zerosum.probe.report import ByName, Coverage
from zerosum.tokens.memory import distance, slices
from zerosum.tokens.sampling import Draws


@dataclass(frozen=True)
class ParameterEstimate:
    """One parameter's sums over all tokens: ``grad_sum`` is exact; ``abs_sum`` is an estimate with standard error ``abs_error``.

    ``signed_sum`` is Σ_i ε_i g_i with random signs ε_i, the same for all parameters. It is a single draw of the null, which the
    mean over coordinates makes precise. If ``exact`` is true, ``abs_sum`` is exact, too.
    """

    name: str
    how: str
    grad_sum: Tensor
    abs_sum: Tensor
    abs_error: Tensor
    signed_sum: Tensor
    direction: Tensor | None
    exact: bool

    def ratio(self, numerator: Tensor) -> Tensor:
        """Compute |numerator| / Σ_i |g_i| for each coordinate, between 0 and 1.

        The reciprocal of an estimate A is too large by the factor 1 + var A / A², to second order; this is corrected. A coordinate
        that some token touched, but no drawn token, was touched by few tokens, so its ratio is set to 1.
        """
        return _ratio(*(x.double() for x in (numerator, self.abs_sum, self.abs_error)))

    def total_ratio(self, numerator: Tensor) -> float:
        """Compute the sum of :meth:`ratio` over all coordinates."""
        return _total(_ratio(*parts).sum() for parts in slices(numerator, self.abs_sum, self.abs_error))

    @property
    def touched(self) -> Tensor:
        return (self.abs_sum > 0) | (self.grad_sum != 0)


def _ratio(numerator: Tensor, size: Tensor, error: Tensor) -> Tensor:
    share = numerator.abs() * size / (size.square() + error.square())
    return torch.where(size.square() > 0, share, (numerator != 0).double()).clamp(max=1)


def _total(parts: Iterable[Tensor]) -> float:
    """Return their sum, with one wait for the device."""
    return float(torch.stack(list(parts)).sum())


@dataclass(frozen=True)
class Scalars:
    """Scalars of the drawn tokens, (n,), over the sampled parameters, and totals over all tokens for the exact parameters.

    ``abs_dot`` is known for the first half of the draws only, and ``influence`` for the second: Σ_j |g_ij| ∂D_grad/∂(Σ_i |g_ij|),
    up to its sign.
    """

    l1: Tensor
    sq_norm: Tensor
    abs_dot: Tensor
    influence: Tensor
    exact_l1: float
    exact_sq_norm: float


class SampledReport(ByName[ParameterEstimate]):
    """The results of :func:`zerosum.tokens.token_report` for a sample. ``report[name]`` is one parameter's estimate.

    Attributes:
        num_examples: the number of tokens that count: N·T without those that have no target.
        draws: the drawn tokens, by their number among the examples, and their weights.
        dot: (num_examples,) first-order loss changes of all tokens along the direction, exact; None without a direction.
        coverage: as in :class:`zerosum.Report`.
    """

    def __init__(
        self,
        parameters: list[ParameterEstimate],
        names: dict[str, str],
        coverage: Coverage,
        embeddings: set[str],
        halves: tuple[Draws, Draws],
        scalars: Scalars,
        dot: Tensor | None,
        num_examples: int,
    ) -> None:
        super().__init__({p.name: p for p in parameters}, names, coverage)
        self._embeddings = embeddings
        self._scalars = scalars
        self.draws = halves[0].joined(halves[1])
        self._halves = halves
        self.dot = dot
        self.num_examples = num_examples
        self.metrics = self._metrics() if parameters else {}

    @property
    def finite(self) -> bool:
        return all(bool(p.abs_sum.isfinite().all()) for p in self._parameters.values())

    def _metrics(self) -> dict[str, Metric]:
        N, draws, scalars = self.num_examples, self.draws, self._scalars
        parameters = list(self._parameters.values())
        grad_sq = sum(distance(p.grad_sum) ** 2 for p in parameters)
        sq, sq_error = scalars.exact_sq_norm + draws.total(scalars.sq_norm), draws.error(scalars.sq_norm)
        l1, l1_error = scalars.exact_l1 + draws.total(scalars.l1), draws.error(scalars.l1)
        mean_sq, pair_dot = sq / N, (grad_sq - sq) / (N * (N - 1)) if N > 1 else math.nan
        pair_slope = 1 / (N * (N - 1)) if N > 1 else math.nan  # how fast pair_dot falls as sq rises
        noise_slope = ratio(1 / N, pair_dot) + mean_sq * ratio(pair_slope, pair_dot**2)
        ratio_slope = ratio(pair_slope, mean_sq) + ratio(pair_dot, mean_sq**2) / N
        found = {
            **self._interference(parameters),
            "grad_norm": Metric(math.sqrt(grad_sq) / N, N, root(mean_sq / N), debiased=root(pair_dot)),
            "example_norm": Metric(math.sqrt(mean_sq), N, error=ratio(sq_error / N, 2 * math.sqrt(mean_sq))),
            "example_l1": Metric(l1 / N, N, error=l1_error / N),
            "noise_trace": Metric(mean_sq - pair_dot, N, mean_sq, sq_error * (1 / N + pair_slope)),
            "grad_norm_sq": Metric(pair_dot, N, 0.0, sq_error * pair_slope),
            "noise_scale": Metric(ratio(mean_sq - pair_dot, pair_dot), N, error=sq_error * abs(noise_slope)),
            "mean_dot_ratio": Metric(ratio(pair_dot, mean_sq), N, 0.0, sq_error * abs(ratio_slope)),
        }
        if self.dot is not None:
            found |= self._decomposition(parameters)
        return found

    def _interference(self, parameters: list[ParameterEstimate]) -> dict[str, Metric]:
        """Compute D_grad, without embeddings (``D_grad``) and over all coordinates (``D_grad_all``)."""
        found = {}
        for name, chosen in (
            ("D_grad", [p for p in parameters if p.name not in self._embeddings]),
            ("D_grad_all", parameters),
        ):
            touched = sum(int(p.touched.sum()) for p in chosen)
            value = ratio(sum(p.total_ratio(p.grad_sum) for p in chosen), touched)
            null = ratio(sum(p.total_ratio(p.signed_sum) for p in chosen), touched)
            error = ratio(self._halves[1].error(self._scalars.influence, len(self.draws)), touched) if name == "D_grad" else None
            found[name] = Metric(1 - value, self.num_examples, 1 - null, error)
            suffix = name.removeprefix("D_grad")
            found[f"touched{suffix}"] = Metric(touched, self.num_examples)
            found[f"untouched{suffix}"] = Metric(sum(p.abs_sum.numel() for p in chosen) - touched, self.num_examples)
        return found

    def _decomposition(self, parameters: list[ParameterEstimate]) -> dict[str, Metric]:
        assert self.dot is not None
        N = self.num_examples
        totals: list[Tensor] = []
        for p in parameters:
            assert p.direction is not None
            for u, g, size, signed in slices(p.direction.to(p.grad_sum.device), p.grad_sum, p.abs_sum, p.signed_sum):
                totals.append(torch.stack([(u * g).abs().sum(), (u.abs() * size).sum(), (u * signed).abs().sum()]))
        p_sum, p_abs, p_signed = torch.stack(totals).sum(0).tolist()
        relative = ratio(self._halves[0].error(self._scalars.abs_dot, len(self.draws)), p_abs)
        changes = number_interference(self.dot)
        total = float(self.dot.double().sum())
        c_g, c_ug = ratio(p_sum, p_abs), ratio(float(self.dot.double().abs().sum()), p_abs)
        null_total = SIGN_FLIP * float(self.dot.double().norm())
        return {
            "C_g": Metric(c_g, N, ratio(p_signed, p_abs), c_g * relative),
            "C_uG": Metric(ratio(abs(total), p_sum), N, ratio(null_total, p_signed)),
            "C_ug": Metric(c_ug, N, error=c_ug * relative),
            **{key: metric for key, metric in changes.items() if key != "mean"},
        }

    def __str__(self) -> str:
        lines = [f"{self.num_examples} tokens, estimated from {len(self.draws)} draws; {self.coverage}"]
        for name, metric in self.metrics.items():
            error = "" if metric.error is None else f" ± {metric.error:.2g}"
            null = "" if metric.null is None else f"   (random signs: {metric.null:.4g})"
            lines.append(f"{name:>16} {metric.value:12.5g}{error}{null}")
        return "\n".join(lines)
