"""What a backend is: one implementation of the ops, on some devices and for some dtypes.

To add one, derive from :class:`Backend`, name its ops in ``ops``, and list it in ``dispatch.BACKENDS``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from zsl_kernels.planning.choose import Plan
from zsl_kernels.tied import AddedRows
from zsl_kernels.types import INPUT_DTYPES, Cotangents, EmbeddingSums, InterferenceSums

# Every op that a backend may have a kernel for.
OPS = frozenset(
    {
        "interference",
        "interference_backward",
        "gram",
        "sq_norm",
        "dot",
        "weighted_grad",
        "coordinate_sums",
        "dense_interference",
        "embedding_interference",
        "scale_bias_grad",
        "linear_cross_entropy",
    }
)


Results = Any  # a tuple of tensors and Nones, or a named one
Interference = Callable[[Tensor, Tensor, Tensor | None], InterferenceSums]


class Backend(ABC):
    """The methods are called outside of autograd and autocast, with operands that have been checked.

    Letters as everywhere: a (N, T, K) and b (N, T, O), or ragged rows (R, K) and (R, O) that are sorted by example, example i's
    being [begin[i], begin[i + 1]). ``added`` are rows of an embedding with the same weight. Results have the sum dtype.
    """

    name: ClassVar[str]
    ops: ClassVar[frozenset[str]] = OPS  # that it has kernels for
    dtypes: ClassVar[frozenset[torch.dtype]] = frozenset(INPUT_DTYPES)  # of the operands
    # Whether its kernels check ids as they read them, of any integer dtype. Others get ids that were checked, in int64.
    checks_ids: ClassVar[bool] = False

    @abstractmethod
    def why_not(self, device: torch.device | None = None) -> str | None:
        """Why it is not available on this machine, or on this device of it, or None if it is."""

    @abstractmethod
    def takes(self, device: torch.device) -> bool:
        """Whether its kernels run on tensors of that device."""

    def has(self, op: str | None, dtype: torch.dtype | None) -> bool:
        """Whether it has a kernel for the op and the dtype; None stands for any."""
        return (op is None or op in self.ops) and (dtype is None or dtype in self.dtypes)

    def lacks(self, op: str | None, device: torch.device, arch: int | None = None) -> str | None:
        """Why this device, or one of the architecture ``arch``, has no kernel for the op although others have one, or None."""
        return None

    def interference(
        self,
        plan: Plan,
        a: Tensor,
        b: Tensor,
        direction: Tensor | None,
        gram: bool,
        begin: Tensor | None = None,
        added: AddedRows | None = None,
    ) -> InterferenceSums:
        raise NotImplementedError

    def prepare_interference(self, plan: Plan, a: Tensor, b: Tensor, direction: Tensor | None, call: Interference) -> Interference:
        """What repeated calls with operands of these shapes and dtypes go to: ``call``, which is :meth:`interference` outside of
        autograd and autocast, or something shorter that does the same."""
        return call

    def prepare(self, call: Callable[..., Results], make: Callable[..., Results]) -> Callable[..., Results]:
        """The same of another op's ``call``. ``make`` makes its results of a tuple."""
        return call

    def interference_backward(
        self,
        plan: Plan,
        a: Tensor,
        b: Tensor,
        direction: Tensor | None,
        c: Cotangents,
        mix: Tensor | None,
        a2: Tensor,
        b2: Tensor,
        want: tuple[bool, bool, bool],
        begin: Tensor | None = None,
        added: AddedRows | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Derivatives with respect to a, b and the added rows, as far as they are wanted: da_i = b_i s_i and db_i = a_i s_iᵀ, where
        s_i is the derivative with respect to g_i. ``mix`` (N, M) weighs the gradients of a second set of examples in it; ragged
        rows and added ones have no second set but themselves. csrc/cpu/kernels.h has the formula."""
        raise NotImplementedError

    def gram(self, plan: Plan, a: Tensor, b: Tensor, a2: Tensor | None, b2: Tensor | None, begin: Tensor | None = None) -> Tensor:
        raise NotImplementedError

    def sq_norm(self, plan: Plan, a: Tensor, b: Tensor, begin: Tensor | None = None) -> Tensor:
        raise NotImplementedError

    def dot(self, plan: Plan, a: Tensor, b: Tensor, direction: Tensor, begin: Tensor | None = None) -> Tensor:
        raise NotImplementedError

    def weighted_grad(
        self,
        plan: Plan,
        a: Tensor,
        b: Tensor,
        weights: Tensor,
        abs_weights: Tensor | None,
        direction: Tensor | None,
        begin: Tensor | None = None,
    ) -> Tensor:
        """Σ_i w_i g_i + sign(u) Σ_i v_i |g_i|, the second term with ``abs_weights`` v and ``direction`` u."""
        raise NotImplementedError

    def coordinate_sums_of_many(
        self,
        grad_sums: Sequence[Tensor],
        abs_sums: Sequence[Tensor],
        sq_sums: Sequence[Tensor],
        directions: Sequence[Tensor | None],
    ) -> Tensor:
        """(weights, 8) float64, in the order of ``CoordinateSums``."""
        raise NotImplementedError

    def dense_interference(self, g: Tensor, direction: Tensor | None, gram: bool) -> InterferenceSums:
        raise NotImplementedError

    def embedding_interference(
        self,
        ids: Tensor,
        b: Tensor,
        example_ids: Tensor | None,
        num_examples: int,
        num_embeddings: int,
        padding_idx: int,
        direction: Tensor | None,
        gram: bool,
        max_rows: int | None = None,
    ) -> EmbeddingSums:
        """ids (N, T) and b (N, T, K); with ``example_ids`` (T,), (1, T) and (1, T, K).

        With ``max_rows`` the sums have as many rows: zeros, of the row −1, behind those that are touched.
        """
        raise NotImplementedError

    def scale_bias_grad(
        self,
        x: Tensor | None,
        b: Tensor,
        mean: Tensor | None,
        rstd: Tensor | None,
        example_ids: Tensor | None,
        num_examples: int,
        bias: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        """x and b (N, T, K), mean and rstd (N, T); with ``example_ids`` (T,), (1, T, K) and (1, T)."""
        raise NotImplementedError

    def linear_cross_entropy_forward(self, h: Tensor, weight: Tensor, target: Tensor, chunk: int) -> tuple[Tensor, Tensor, Tensor]:
        """``logits.amax(1)``, ``(logits - amax).exp().sum(1)`` and ``logits.gather(1, target)``.

        Of ``logits = h.flatten(0, 1) @ weight.T``; all are (N·T, 1), the second in float64. Where ``target`` (N·T, 1) is −1, the
        last is any.
        """
        raise NotImplementedError

    def linear_cross_entropy_gradients(
        self, h: Tensor, weight: Tensor, target: Tensor, shift: Tensor, scale: Tensor, c: Tensor, chunk: int
    ) -> Iterator[tuple[int, int, Tensor]]:
        """``(lo, hi, b[:, lo:hi])`` in ``h``'s dtype with ``b = (logits - shift).exp() * scale``, less ``c`` at the target.

        Operands but the first two are (N·T, 1); b is in one buffer that the next chunk overwrites.
        """
        raise NotImplementedError
