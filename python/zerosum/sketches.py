"""Computes sketches: short vectors of fixed length that represent examples' gradients, for any number of examples."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from zerosum.changes import eval_mode
from zerosum.distributed import check_whole
from zerosum.grams import check_batch, check_covered, losses_of_each, trainable_alone
from zerosum.probe import Probe, Report
from zerosum.probe.capture import Capture
from zerosum.probe.contributions import Contribution, Contributions, OuterProduct, Piece, RowGather, StreamedHead, Sums
from zerosum.probe.parameters import ParameterProbe
from zsl_kernels.types import sum_dtype


class Sketch:
    """Estimates inner products of two batches' per-example gradients as ``sketch(*batch) @ sketch(*other).T``::

        sketch = zerosum.Sketch(model, losses, width=512)
        rows = torch.cat([sketch(x, y) for x, y in batches])   # (N, 512): all that is kept of N examples
        gram = rows @ rows.T                                   # (N, N), or any part of it

    Column j of row i is Σ over weights of p_jᵀ g_i q_j / √width. Here g_i is the gradient as a matrix, and p_j and q_j are random
    signs of its rows and columns, drawn for each weight and column. The product is computed from the weight's uses, as p_jᵀ b_t ·
    a_tᵀ q_j for each position t, so no gradient is formed. This takes (O + K) · width products for each position, and the same
    count of numbers in memory for the signs of each weight (O, K). A call also takes one probed step.

    The estimate of ⟨g_i, g_k⟩ is unbiased, and the columns are independent. Its standard error is at most 3 ‖g_i‖ ‖g_k‖ / √width: E
    ⟨g, p qᵀ⟩⁴ ≤ 9 ‖g‖⁴ by Khintchine's inequality for p and for q, a sum over independently signed weights keeps that bound, and
    the Cauchy-Schwarz inequality extends it to pairs. If many weights and directions share the gradient, the standard error is near
    that of Gaussian directions, √(‖g_i‖² ‖g_k‖² + ⟨g_i, g_k⟩²) / √width. Width 900 thus gives each cosine to 0.1, and means over
    pairs much better.

    Args:
        model: a model that processes each example independently. It runs in eval mode and is left unchanged; ``.grad`` is not
            touched.
        losses: ``losses(model, *batch)`` returns the losses (n,) of n examples.
        width: the number of columns.
        seed: the seed of the signs. The same seed and parameters give the same signs in any process, so sketches with the same seed
            can be compared.
        parameters: names of the parameters whose gradients are sketched; None means all trainable ones.

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it.
        NotImplementedError: the model's parameters are sharded.
    """

    def __init__(
        self,
        model: nn.Module,
        losses: Callable[..., Tensor],
        *,
        width: int = 256,
        seed: int = 0,
        parameters: Iterable[str] | None = None,
    ) -> None:
        if not callable(losses):
            raise TypeError(f"losses: expected a function of (model, *batch), got {type(losses).__name__}")
        if not isinstance(width, int) or isinstance(width, bool) or width < 1:
            raise ValueError(f"width: expected a positive integer, got {width!r}")
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise TypeError(f"seed: expected an integer, got {type(seed).__name__}")
        check_whole(model, "Sketch")
        self._losses, self._parameters = losses, None if parameters is None else list(parameters)
        with trainable_alone(model, self._parameters):
            self._probe = _SketchProbe(model, width, seed)

    def __call__(self, *batch: Tensor) -> Tensor:
        """Sketch a batch of n examples: (n, width) float32, or float64 if the model is float64.

        Raises:
            TypeError, ValueError: the batch does not consist of tensors with n examples, or the losses are not (n,).
            RuntimeError: a parameter's per-example gradients are unknown; the message names the parameter and the reason.
        """
        n, model = check_batch("batch", batch), self._probe.model
        with trainable_alone(model, self._parameters), eval_mode(model), torch.enable_grad():
            with self._probe as probe:
                losses_of_each(self._losses, model, batch).sum().backward()
            check_covered(probe.report())
        found = self._probe.sketch
        if found is None:
            return torch.zeros(n, self._probe.width, device=batch[0].device)
        return found


class _SketchedParameter(ParameterProbe):
    """A parameter probe that also projects the contributions of the uses."""

    immediate = False  # so that contributions reach `_finish`
    signs: Callable[[str, Tensor], tuple[Tensor, Tensor | None]]
    sketch: Tensor | None = None

    def _finish(self, contributions: Contributions) -> Sums:
        now = self.context.current
        assert now is not None
        self.sketch = project(contributions, self.parameter, now.examples, *self.signs(self.name, self.parameter))
        return super()._finish(contributions)


class _SketchProbe(Probe):
    parameter_type = _SketchedParameter

    def __init__(self, model: nn.Module, width: int, seed: int) -> None:
        super().__init__(model, loss_reduction="sum")
        self._structures.compiled = None  # compiled code stores sums instead of contributions
        self.width, self._seed = width, seed
        self._signs: dict[str, tuple[Tensor, Tensor | None]] = {}
        self.sketch: Tensor | None = None

    def __enter__(self) -> Probe:
        super().__enter__()
        assert self._capture is not None
        self.sketch = None
        for t in self._capture.parameters:
            assert isinstance(t, _SketchedParameter)
            t.signs, t.sketch = self.signs, None
        return self

    def _finish(self, capture: Capture) -> Report:
        report = super()._finish(capture)
        for t in capture.parameters:
            if isinstance(t, _SketchedParameter) and t.sketch is not None and t.name in report:
                mine = t.sketch * self.width**-0.5
                self.sketch = mine if self.sketch is None else self.sketch + mine.to(self.sketch.device)
                t.sketch = None
        return report

    def signs(self, name: str, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the signs of a weight's rows (R, width) and columns (C, width), as a matrix.

        The latter is None if there is one column.
        """
        if name not in self._signs:
            digest = hashlib.sha256(f"{self._seed}/{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
            R, C = as_matrix(weight.shape)
            drawn = torch.randint(2, (R + C if C > 1 else R, self.width), generator=generator, dtype=torch.int8)
            both = drawn.to(weight.device, sum_dtype(weight.dtype)).mul_(2).sub_(1)
            self._signs[name] = both[:R], both[R:] if C > 1 else None
        return self._signs[name]


def as_matrix(shape: torch.Size) -> tuple[int, int]:
    """Return the numbers of rows and columns of a weight as a matrix. A weight with one dimension is one column."""
    return (shape[0], shape[1:].numel()) if len(shape) > 1 else (shape.numel(), 1)


def project(contributions: Contributions, weight: Tensor, examples: int, rows: Tensor, columns: Tensor | None) -> Tensor:
    """Return p_jᵀ g_i q_j (E, width) for each example and for each of the columns p_j of ``rows`` and q_j of ``columns``."""
    base, total = contributions.base, rows.new_zeros(examples, rows.shape[1])
    rest = Contributions(base)
    for piece, uses in contributions.of_piece.items():
        for use in uses:
            place = _place(piece, base)
            if columns is None or place is None or not isinstance(use, OuterProduct | RowGather | StreamedHead):
                rest.add(piece, use)
                continue
            r, c = place
            _add_use(total, use, rows[r : r + piece.size[0]], columns[c : c + piece.size[1]])
    if rest:
        g = rest.materialize(examples, weight).to(rows.dtype).reshape(examples, len(rows), -1)
        total += (g[:, :, 0] @ rows) if columns is None else torch.einsum("erc,rk,ck->ek", g, rows, columns)
    return total


def _place(piece: Piece, base: Piece) -> tuple[int, int] | None:
    """Return the first row and column of a piece of a row-major matrix; None if the piece or its base has another layout."""
    if len(base.size) != 2 or base.stride != (base.size[1], 1) or len(piece.size) != 2 or piece.stride != base.stride:
        return None
    r, c = divmod(piece.offset - base.offset, base.size[1])
    return (r, c) if c + piece.size[1] <= base.size[1] else None


def _add_use(total: Tensor, use: Contribution, rows: Tensor, columns: Tensor) -> None:
    dtype = rows.dtype
    if isinstance(use, StreamedHead):
        projected = sum((b.to(dtype) @ rows[lo:hi] for lo, hi, b in use.chunks()), start=total.new_zeros(()))
        total += (projected * (use.h.to(dtype) @ columns)).sum(1)
        return
    if isinstance(use, OuterProduct):
        found = (use.left.to(dtype) @ rows) * (use.right.to(dtype) @ columns)
    else:
        assert isinstance(use, RowGather)
        at = use.rows.long()
        found = rows[at.clamp(min=0)] * (use.e.to(dtype) @ columns) * (at >= 0).unsqueeze(-1)
    if use.ids is None:
        total += found.sum(1)
    else:
        total.index_add_(0, use.ids, found)
