"""Estimates sums over all tokens from a sample of tokens.

Tokens are drawn with replacement. Token i has probability p_i, and each time it is drawn it has weight w = 1/(n p_i). This
estimates Σ_i |g_ij| without bias, and the spread of the n weighted terms gives the standard error. The variance is smallest if p_i
is proportional to the size of the term (Hansen and Hurwitz, 1943). The norm of the loss's gradient at the cut is close to that and
known for every token, because all of g_i passes through the cut.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# This share of the draws ignores the bound, so that no weight gets large where the bound is far too small.
UNIFORM = 0.1


@dataclass(frozen=True)
class Draws:
    """A sample: ``tokens`` (n,) are indices into the N·T tokens, and ``weights`` (n,) say how many tokens each one represents."""

    tokens: Tensor
    weights: Tensor

    @classmethod
    def proportional(cls, bound: Tensor, n: int, generator: torch.Generator) -> Draws:
        """Draw ``n`` tokens, given bounds (N·T,) of the norms of their gradients."""
        bound = bound.double().cpu()
        total = bound.sum()
        even = torch.full_like(bound, 1 / len(bound))
        p = (1 - UNIFORM) * bound / total + UNIFORM * even if bool(total.isfinite()) and total > 0 else even
        tokens = torch.multinomial(p, n, replacement=True, generator=generator)
        return cls(tokens, 1 / (n * p[tokens]))

    def __len__(self) -> int:
        return len(self.tokens)

    def halves(self) -> tuple[Draws, Draws]:
        """Return the first and the second half of the draws, each sorted by token."""
        k = len(self) // 2
        found = []
        for tokens, weights in ((self.tokens[:k], self.weights[:k]), (self.tokens[k:], self.weights[k:])):
            order = tokens.argsort()
            found.append(Draws(tokens[order], weights[order]))
        return found[0], found[1]

    def joined(self, other: Draws) -> Draws:
        return Draws(torch.cat([self.tokens, other.tokens]), torch.cat([self.weights, other.weights]))

    def total(self, x: Tensor) -> float:
        """Estimate the sum over all tokens from the values ``x`` (n,) of the drawn ones."""
        return float((self.weights * x.double().cpu()).sum())

    def error(self, x: Tensor, n: int | None = None) -> float:
        """Estimate the standard error of a total over ``n`` such draws, from the values ``x`` (len(self),) of these draws."""
        k, n = len(self), len(self) if n is None else n
        if k < 2:
            return math.nan
        # A total is the mean of n terms n·w·x, and n·w = 1/p does not depend on n.
        terms = self.weights * n * x.double().cpu()
        return float(terms.std() / math.sqrt(n))
