"""The result type and the dtype rule that every layer of the library shares."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

INPUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that results have: float64 for float64 inputs, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class InterferenceSums(NamedTuple):
    """Sums over examples and per-example scalars of the gradients g_i = b_iᵀ a_i. A field that was not asked for is None."""

    grad_sum: Tensor  # (O, K)  Σ_i g_i, the weight gradient
    abs_sum: Tensor  # (O, K)  Σ_i |g_i|
    sq_sum: Tensor  # (O, K)  Σ_i g_i²
    l1: Tensor  # (N,)  Σ_j |g_ij|
    sq_norm: Tensor  # (N,)  Σ_j g_ij²
    dot: Tensor | None  # (N,)  Σ_j g_ij u_j
    abs_dot: Tensor | None  # (N,)  Σ_j |g_ij u_j|
    gram: Tensor | None  # (N, N)  ⟨g_i, g_k⟩

    def asked_for(self, direction: Tensor | None, gram: bool) -> InterferenceSums:
        """None for what was not asked for: an op's schema has no optional results, and returns empty tensors there."""
        if direction is None:
            self = self._replace(dot=None, abs_dot=None)
        return self if gram else self._replace(gram=None)


class EmbeddingSums(NamedTuple):
    """The same of an embedding's gradients, of which all rows but ``rows`` are zero for every example.

    ``grad_sum`` and its kin hold the touched rows alone: ``weight.new_zeros(V, K).index_copy(0, rows, grad_sum)`` is dense.
    """

    rows: Tensor  # (U,) int64, ascending: the rows that some example touches; with max_rows (max_rows,), -1 behind them
    grad_sum: Tensor  # (U, K)  Σ_i g_i
    abs_sum: Tensor  # (U, K)  Σ_i |g_i|
    sq_sum: Tensor  # (U, K)  Σ_i g_i²
    l1: Tensor  # (N,)  Σ_j |g_ij|
    sq_norm: Tensor  # (N,)  Σ_j g_ij²
    dot: Tensor | None  # (N,)  Σ_j g_ij u_j
    abs_dot: Tensor | None  # (N,)  Σ_j |g_ij u_j|
    gram: Tensor | None  # (N, N)  ⟨g_i, g_k⟩

    def with_rows(self, max_rows: int | None) -> EmbeddingSums:
        """With as many rows, if they are given: those behind the touched ones are -1, and their sums zero."""
        if max_rows is None:
            return self
        U = self.rows.shape[0]
        if max_rows < U:
            raise ValueError(f"max_rows: expected at least {U}, the number of rows that are touched, got {max_rows}")
        more = max_rows - U
        if not more:
            return self
        rows = torch.nn.functional.pad(self.rows, (0, more), value=-1)
        grad_sum, abs_sum, sq_sum = (torch.nn.functional.pad(x, (0, 0, 0, more)) for x in self[1:4])
        return self._replace(rows=rows, grad_sum=grad_sum, abs_sum=abs_sum, sq_sum=sq_sum)


class Cotangents(NamedTuple):
    """Derivatives of a loss with respect to the fields of :class:`InterferenceSums`, but for the Gram; None where it has none."""

    grad_sum: Tensor | None = None
    abs_sum: Tensor | None = None
    sq_sum: Tensor | None = None
    l1: Tensor | None = None
    sq_norm: Tensor | None = None
    dot: Tensor | None = None
    abs_dot: Tensor | None = None

    def at(self, select: Callable[[Tensor], Tensor]) -> Cotangents:
        """With those of the weight-shaped sums for some coordinates alone."""
        grad_sum, abs_sum, sq_sum = (None if x is None else select(x) for x in self[:3])
        return self._replace(grad_sum=grad_sum, abs_sum=abs_sum, sq_sum=sq_sum)

    def derivative(self, g: Tensor, u: Tensor | None, each: Callable[[Tensor], Tensor]) -> Tensor:
        """∂loss/∂g, of the shape of ``g``: c_grad + sign(g) (c_abs + c_l1_i) + 2 g (c_sq + c_sqn_i) + u c_dot_i
        + |u| sign(g) c_absdot_i. The weight-shaped ones and the direction ``u`` broadcast against ``g``, and so does what ``each``
        makes of an (N,)."""
        s = torch.zeros_like(g)
        if self.grad_sum is not None:
            s += self.grad_sum
        if self.abs_sum is not None:
            s += g.sign() * self.abs_sum
        if self.l1 is not None:
            s += g.sign() * each(self.l1)
        if self.sq_sum is not None:
            s += 2 * g * self.sq_sum
        if self.sq_norm is not None:
            s += 2 * g * each(self.sq_norm)
        if self.dot is not None and u is not None:
            s += each(self.dot) * u
        if self.abs_dot is not None and u is not None:
            s += each(self.abs_dot) * g.sign() * u.abs()
        return s


class CoordinateSums(NamedTuple):
    """Sums over coordinates j of G = grad_sum, A = abs_sum, Q = sq_sum and a direction u, as Python floats; 0/0 counts as 0.

    They add over parameters and tiles, and every ratio of interference over a set of parameters follows from them.
    """

    touched: float  # Σ_j [A_j ≠ 0]
    ratio: float  # Σ_j |G_j| / A_j
    root_ratio: float  # Σ_j √Q_j / A_j
    grad_sq: float  # Σ_j G_j²
    sq: float  # Σ_j Q_j
    p_sum: float = 0.0  # Σ_j |G_j u_j|
    p_abs: float = 0.0  # Σ_j A_j |u_j|
    p_root: float = 0.0  # Σ_j √Q_j |u_j|
