"""Sums over all tokens, estimated from some of them.

Tokens are drawn with replacement, token i with probability p_i, and a drawn one counts w = 1/(n p_i) times. So Σ_i |g_ij| is
estimated without bias, and the spread of the n weighted terms tells the estimate's standard error. Where p_i is
proportional to the size of the term the spread is least (Hansen and Hurwitz, 1943); the norm of the loss's gradient at the
cut, through which all of g_i passes, is known for every token and close to it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# This share of the draws ignores the bound, so that no weight is large where the bound is far too small.
UNIFORM = 0.1


@dataclass(frozen=True)
class Draws:
    """``tokens`` (n,) are indices into the N·T tokens, and ``weights`` (n,) how many tokens each of them stands for."""

    tokens: Tensor
    weights: Tensor

    @classmethod
    def proportional(cls, bound: Tensor, n: int, generator: torch.Generator) -> Draws:
        """``n`` draws from tokens with these bounds (N·T,) of their gradients' norms."""
        bound = bound.double().cpu()
        total = bound.sum()
        even = torch.full_like(bound, 1 / len(bound))
        p = (1 - UNIFORM) * bound / total + UNIFORM * even if bool(total.isfinite()) and total > 0 else even
        tokens = torch.multinomial(p, n, replacement=True, generator=generator)
        return cls(tokens, 1 / (n * p[tokens]))

    def __len__(self) -> int:
        return len(self.tokens)

    def halves(self) -> tuple[Draws, Draws]:
        """The first and the second half of them, each by rising token."""
        k = len(self) // 2
        found = []
        for tokens, weights in ((self.tokens[:k], self.weights[:k]), (self.tokens[k:], self.weights[k:])):
            order = tokens.argsort()
            found.append(Draws(tokens[order], weights[order]))
        return found[0], found[1]

    def joined(self, other: Draws) -> Draws:
        return Draws(torch.cat([self.tokens, other.tokens]), torch.cat([self.weights, other.weights]))

    def total(self, x: Tensor) -> float:
        """Σ over all tokens of what ``x`` (n,) says of the drawn ones."""
        return float((self.weights * x.double().cpu()).sum())

    def error(self, x: Tensor, n: int | None = None) -> float:
        """The standard error of a total over ``n`` draws, these or more of their kind, from ``x`` (len(self),) of these."""
        k, n = len(self), len(self) if n is None else n
        if k < 2:
            return math.nan
        # A total is the mean of n terms n·w·x, where n·w = 1/p is the same for any n.
        terms = self.weights * n * x.double().cpu()
        return float(terms.std() / math.sqrt(n))
