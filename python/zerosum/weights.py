"""Computes weights w_i of a step's examples, for the update Σ_i w_i g_i: clipping, and two ways to resolve gradient conflicts.

The weights come from a report. The update comes from a second backward pass through the graph that the first pass kept::

    with probe:
        losses = per_example_loss(model(x), y)           # (N,)
        losses.mean().backward(retain_graph=True)
    w = zerosum.weights.clip(probe.report(), max_norm=1.0)
    model.zero_grad()
    (w * losses).mean().backward()                       # outside of the block
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from zerosum.probe import Report

# How far below zero a Gram's smallest eigenvalue may be, relative to the largest one. Rounding in float32 gives about 1e-6.
NEGATIVE = 1e-3


def clip(report: Report, max_norm: float) -> Tensor:
    """Compute the weights that clip each example's gradient to ``max_norm``: ``(max_norm / report.sq_norm.sqrt()).clamp(max=1)``.

    The norm is over all trainable parameters together. It is the norm of the gradient of ℓ_i as the report has it: with
    ``loss_reduction="auto"`` it does not depend on the divisor of the losses.

    Args:
        report: a probe's report. Its gradients must be finite, and every parameter that a loss depends on must be covered.
        max_norm: c > 0.

    Returns:
        (N,) float64, in (0, 1]; 1 for an example whose gradient is zero.

    Raises:
        ValueError: ``max_norm`` is not positive; or a norm is unknown, because a parameter is not covered or a gradient is not
            finite. The message names the parameter.
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm: expected a positive number, got {max_norm!r}")
    # (A parameter that no gradient reached has a zero gradient for every example.)
    missing = {name: reason for name, reason in report.coverage.not_covered.items() if name not in report.unreached}
    if missing or report.sq_norm is None:
        said = "; ".join(f"{name} ({reason})" for name, reason in missing.items()) or "there is no parameter"
        raise ValueError(f"report: expected every parameter's gradient in the norms, but not covered: {said}")
    if report.not_finite:
        raise ValueError(f"report: expected finite gradients, got NaN or infinity in {', '.join(report.not_finite)}")
    norms = report.sq_norm.clamp(min=0).sqrt()
    return torch.where(norms > max_norm, max_norm / norms, 1.0)


def mgda(gram: Tensor) -> Tensor:
    """Compute ``argmin_w w @ gram @ w`` over w ≥ 0 with Σ w_i = 1: the weights of the shortest convex combination Σ_i w_i g_i.

    This is the multiple-gradient descent algorithm (Désidéri, 2012). With G = Σ_i w_i g_i, every ⟨g_i, G⟩ is at least ‖G‖², and
    equal to it if w_i > 0: a small step along −G raises no example's loss, to first order. G is zero if no direction lowers all
    losses.

    The problem is solved exactly, as the nonnegative least-squares problem min ‖R x‖² + (1 − Σ x_i)² with RᵀR = gram, whose
    solution is a multiple of w. This needs scipy and waits for the device.

    Args:
        gram: (N, N) inner products of the examples' gradients, such as ``report.gram`` or one parameter's.

    Returns:
        (N,) with the Gram's dtype and device.

    Raises:
        TypeError, ValueError: ``gram`` is not such a matrix; the message says what it is.
        ModuleNotFoundError: scipy is missing.
    """
    root = _root(gram)
    n = root.shape[1]
    x = _nonnegative(np.vstack([root, np.ones((1, n))]), np.append(np.zeros(len(root)), 1.0))
    return torch.from_numpy(x / x.sum()).to(gram)


def upgrad(gram: Tensor) -> Tensor:
    """Compute the weights of the mean of conflict-free projections: ``(1/N) Σ_i argmin_v v @ gram @ v`` over v ≥ e_i.

    Each g_i is projected onto the cone of directions that conflict with no example, {d: ⟨g_k, d⟩ ≥ 0 for all k}. The mean of the
    projections is Σ_i w_i g_i. This is the unconflicting projection of gradients (Quinton and Rey, 2024). If no two gradients
    conflict, all w_i are 1/N, and the result is the mean.

    Each projection is solved exactly, as the nonnegative least-squares problem min ‖R z + R e_i‖² with RᵀR = gram and v = e_i + z.
    There are N problems with N unknowns each. This needs scipy and waits for the device. Arguments, result and errors are those of
    :func:`mgda`.
    """
    root = _root(gram)
    n = root.shape[1]
    projected = [_nonnegative(root, -root[:, i]) for i in range(n)]
    return torch.from_numpy((1 + np.sum(projected, axis=0)) / n).to(gram)


def _root(gram: Tensor) -> np.ndarray:
    """Return R with RᵀR = gram / mean of its diagonal, from its eigenvectors.

    Eigenvalues that rounding made negative become zero.
    """
    if not isinstance(gram, Tensor):
        raise TypeError(f"gram: expected a torch.Tensor, got {type(gram).__name__}")
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1] or not len(gram):
        raise ValueError(f"gram: expected shape (N, N) with N >= 1, got {tuple(gram.shape)}")
    matrix = gram.detach().double().cpu().numpy()
    if not np.isfinite(matrix).all():
        raise ValueError(
            "gram: expected finite numbers, got NaN or infinity (the entries of two examples in different micro-batches are NaN)"
        )
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    if values[0] < -NEGATIVE * max(values[-1], 0.0):
        raise ValueError(f"gram: expected no negative eigenvalue, got {values[0]:.3g} beside the largest, {values[-1]:.3g}")
    scale = values.clip(min=0).mean()
    return np.sqrt(values.clip(min=0) / (scale or 1.0))[:, None] * vectors.T


def _nonnegative(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return argmin ‖a x − b‖ over x ≥ 0."""
    # Imported here, because `import zerosum` must work without scipy.
    from scipy.optimize import nnls

    x, _ = nnls(a, b, maxiter=100 * a.shape[1])
    return x
