"""``Backend``, the interface of an implementation of the ops for certain devices and dtypes.

To add a backend, derive from :class:`Backend`, list its ops in ``ops``, and add it to ``dispatch.BACKENDS``.
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

# Every op that a backend can implement.
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
    """An implementation of the ops. Its methods are called outside of autograd and autocast, with checked operands.

    The operands are a (N, T, K) and b (N, T, O), or ragged rows (R, K) and (R, O) that are sorted by example. Example i then has
    the rows [begin[i], begin[i + 1]). ``added`` contains rows of an embedding with the same weight. Results have the sum dtype.
    """

    name: ClassVar[str]
    ops: ClassVar[frozenset[str]] = OPS  # the implemented ops
    dtypes: ClassVar[frozenset[torch.dtype]] = frozenset(INPUT_DTYPES)  # the supported dtypes of the operands
    # Whether the kernels accept ids of any integer dtype and check them. Other backends get checked ids in int64.
    checks_ids: ClassVar[bool] = False

    @abstractmethod
    def why_not(self, device: torch.device | None = None) -> str | None:
        """Return why the backend is not available on this machine, or on this device, or None if it is available."""

    @abstractmethod
    def takes(self, device: torch.device) -> bool:
        """Return whether the kernels run on tensors of this device."""

    def has(self, op: str | None, dtype: torch.dtype | None) -> bool:
        """Return whether the backend implements the op for the dtype. None means any op or dtype."""
        return (op is None or op in self.ops) and (dtype is None or dtype in self.dtypes)

    def lacks(self, op: str | None, device: torch.device, arch: int | None = None) -> str | None:
        """Return why an implemented op has no kernel on this device (or on the architecture ``arch``), or None if it has one."""
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
        """Compute :func:`zsl_kernels.interference`."""
        raise NotImplementedError

    def prepare_interference(self, plan: Plan, a: Tensor, b: Tensor, direction: Tensor | None, call: Interference) -> Interference:
        """Return a function for repeated calls with operands of these shapes and dtypes.

        ``call`` is :meth:`interference`, outside of autograd and autocast. Return it, or a faster function that does the same.
        """
        return call

    def prepare(self, call: Callable[..., Results], make: Callable[..., Results]) -> Callable[..., Results]:
        """Do the same for another op's ``call``. ``make`` converts a tuple to the op's results."""
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
        """Return the derivatives with respect to a, b and the added rows that ``want`` requests; the others are None.

        They are da_i = b_i s_i and db_i = a_i s_iᵀ, where s_i is the derivative with respect to g_i. csrc/cpu/kernels.h has its
        formula. ``mix`` (N, M) contains the weights in s_i of the gradients of a second set of examples, a2 and b2. With ragged or
        added rows the second set is the first.
        """
        raise NotImplementedError

    def gram(self, plan: Plan, a: Tensor, b: Tensor, a2: Tensor | None, b2: Tensor | None, begin: Tensor | None = None) -> Tensor:
        """Compute :func:`zsl_kernels.gram`."""
        raise NotImplementedError

    def sq_norm(self, plan: Plan, a: Tensor, b: Tensor, begin: Tensor | None = None) -> Tensor:
        """Compute :func:`zsl_kernels.sq_norm`."""
        raise NotImplementedError

    def dot(self, plan: Plan, a: Tensor, b: Tensor, direction: Tensor, begin: Tensor | None = None) -> Tensor:
        """Compute :func:`zsl_kernels.dot`."""
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
        """Return Σ_i w_i g_i + sign(u) Σ_i v_i |g_i|. The second term needs ``abs_weights`` v and ``direction`` u."""
        raise NotImplementedError

    def coordinate_sums_of_many(
        self,
        grad_sums: Sequence[Tensor],
        abs_sums: Sequence[Tensor],
        sq_sums: Sequence[Tensor],
        directions: Sequence[Tensor | None],
    ) -> Tensor:
        """Return (weights, 8) in float64, in the order of ``CoordinateSums``."""
        raise NotImplementedError

    def dense_interference(self, g: Tensor, direction: Tensor | None, gram: bool) -> InterferenceSums:
        """Compute :func:`zsl_kernels.dense_interference`."""
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
        """Compute :func:`zsl_kernels.embedding_interference` for ids (N, T) and b (N, T, K).

        With ``example_ids`` (T,), the operands are ids (1, T) and b (1, T, K).

        With ``max_rows`` the sums have that many rows. The rows after the touched ones are zero and have the index −1.
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
        """Compute :func:`zsl_kernels.scale_bias_grad` for x and b (N, T, K), mean and rstd (N, T).

        With ``example_ids`` (T,), the operands are (1, T, K) and (1, T). Without x there is no scale gradient.
        """
        raise NotImplementedError

    def linear_cross_entropy_forward(self, h: Tensor, weight: Tensor, target: Tensor, chunk: int) -> tuple[Tensor, Tensor, Tensor]:
        """``logits.amax(1)``, ``(logits - amax).exp().sum(1)`` and ``logits.gather(1, target)``.

        Here ``logits = h.flatten(0, 1) @ weight.T``. The results are (N·T, 1), the second in float64. Where ``target`` (N·T, 1) is
        −1, the last result is arbitrary.
        """
        raise NotImplementedError

    def linear_cross_entropy_gradients(
        self, h: Tensor, weight: Tensor, target: Tensor, shift: Tensor, scale: Tensor, c: Tensor, chunk: int
    ) -> Iterator[tuple[int, int, Tensor]]:
        """Yield ``(lo, hi, b[:, lo:hi])`` with ``b = (logits - shift).exp() * scale``, minus ``c`` at the target.

        b has the dtype of ``h``. The next chunk overwrites its buffer. ``target``, ``shift``, ``scale`` and ``c`` are (N·T, 1).
        """
        raise NotImplementedError
