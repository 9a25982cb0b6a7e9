"""The result types and the dtype rule shared by every layer of the library."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

INPUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of results: float64 for float64 inputs, otherwise float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class InterferenceSums(NamedTuple):
    """Sums over examples, and per-example scalars, of the gradients g_i = b_iᵀ a_i. A field that was not requested is None."""

    grad_sum: Tensor  # (O, K)  Σ_i g_i, the weight gradient
    abs_sum: Tensor  # (O, K)  Σ_i |g_i|
    sq_sum: Tensor  # (O, K)  Σ_i g_i²
    l1: Tensor  # (N,)  Σ_j |g_ij|
    sq_norm: Tensor  # (N,)  Σ_j g_ij²
    dot: Tensor | None  # (N,)  Σ_j g_ij u_j
    abs_dot: Tensor | None  # (N,)  Σ_j |g_ij u_j|
    gram: Tensor | None  # (N, N)  ⟨g_i, g_k⟩

    def asked_for(self, direction: Tensor | None, gram: bool) -> InterferenceSums:
        """Replace fields that were not requested by None. Ops return empty tensors there: schemas have no optional results."""
        if direction is None:
            self = self._replace(dot=None, abs_dot=None)
        return self if gram else self._replace(gram=None)


class EmbeddingSums(NamedTuple):
    """The fields of :class:`InterferenceSums` for an embedding, whose gradients are zero outside of the touched rows.

    ``rows`` lists the touched rows. ``grad_sum``, ``abs_sum`` and ``sq_sum`` contain only these rows. The dense equivalent is
    ``weight.new_zeros(V, K).index_copy(0, rows, grad_sum)``; remove the padding of ``max_rows`` (entries of -1) first.
    """

    rows: Tensor  # (U,) int64, ascending: the touched rows; with max_rows (max_rows,), padded with -1
    grad_sum: Tensor  # (U, K)  Σ_i g_i
    abs_sum: Tensor  # (U, K)  Σ_i |g_i|
    sq_sum: Tensor  # (U, K)  Σ_i g_i²
    l1: Tensor  # (N,)  Σ_j |g_ij|
    sq_norm: Tensor  # (N,)  Σ_j g_ij²
    dot: Tensor | None  # (N,)  Σ_j g_ij u_j
    abs_dot: Tensor | None  # (N,)  Σ_j |g_ij u_j|
    gram: Tensor | None  # (N, N)  ⟨g_i, g_k⟩

    def with_rows(self, max_rows: int | None) -> EmbeddingSums:
        """Pad to ``max_rows`` rows, if it is given: the padding of ``rows`` is -1, and the padding of the sums is zero."""
        if max_rows is None:
            return self
        U = self.rows.shape[0]
        if max_rows < U:
            raise ValueError(f"max_rows: expected at least {U}, the number of touched rows, got {max_rows}")
        more = max_rows - U
        if not more:
            return self
        rows = torch.nn.functional.pad(self.rows, (0, more), value=-1)
        grad_sum, abs_sum, sq_sum = (torch.nn.functional.pad(x, (0, 0, 0, more)) for x in self[1:4])
        return self._replace(rows=rows, grad_sum=grad_sum, abs_sum=abs_sum, sq_sum=sq_sum)


class Cotangents(NamedTuple):
    """Derivatives of a loss with respect to the fields of :class:`InterferenceSums` except ``gram``; None means zero."""

    grad_sum: Tensor | None = None
    abs_sum: Tensor | None = None
    sq_sum: Tensor | None = None
    l1: Tensor | None = None
    sq_norm: Tensor | None = None
    dot: Tensor | None = None
    abs_dot: Tensor | None = None

    def at(self, select: Callable[[Tensor], Tensor]) -> Cotangents:
        """Apply ``select`` to the derivatives of the weight-shaped sums, for example to slice them."""
        grad_sum, abs_sum, sq_sum = (None if x is None else select(x) for x in self[:3])
        return self._replace(grad_sum=grad_sum, abs_sum=abs_sum, sq_sum=sq_sum)

    def derivative(self, g: Tensor, u: Tensor | None, each: Callable[[Tensor], Tensor]) -> Tensor:
        """Return ∂loss/∂g: c_grad + sign(g) (c_abs + c_l1_i) + 2 g (c_sq + c_sqn_i) + u c_dot_i + |u| sign(g) c_absdot_i.

        The result has the shape of ``g``. The weight-shaped derivatives and the direction ``u`` must broadcast against ``g``.
        ``each`` reshapes a per-example (N,) tensor so that it broadcasts too.
        """
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

    They are additive over parameters and tiles. Every interference ratio of a set of parameters is computed from them.
    """

    touched: float  # Σ_j [A_j ≠ 0]
    ratio: float  # Σ_j |G_j| / A_j
    root_ratio: float  # Σ_j √Q_j / A_j
    grad_sq: float  # Σ_j G_j²
    sq: float  # Σ_j Q_j
    p_sum: float = 0.0  # Σ_j |G_j u_j|
    p_abs: float = 0.0  # Σ_j A_j |u_j|
    p_root: float = 0.0  # Σ_j √Q_j |u_j|
