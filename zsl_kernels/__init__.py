"""Per-example gradient inner products and destructive-interference sums, without materializing every per-example gradient.

Letters, the same everywhere: N examples, T positions, K input features, O output features; ``a`` (N, T, K) are a layer's inputs,
``b`` (N, T, O) the gradients of Σ_i ℓ_i with respect to its outputs, and g_i = b_iᵀ a_i (O, K) is the gradient of example i.

All functions take float32, bfloat16, float16 or float64 inputs of any strides (an ``a`` expanded over the examples is read once),
accumulate in float32 or better, and return float32 (float64 for float64 inputs). They are differentiable once in every tensor
argument, and trace under ``torch.compile(fullgraph=True)``. ``impl`` names an implementation ("reference", "chunked",
"cpu"); "auto" follows :func:`plan`. A named one never falls back.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zsl_kernels import ops, reference
from zsl_kernels.backends import build_info, impls_for, plan
from zsl_kernels.types import INPUT_DTYPES, CoordinateSums, InterferenceSums

__all__ = [
    "CoordinateSums",
    "InterferenceSums",
    "build_info",
    "coordinate_sums",
    "dot",
    "gram",
    "interference",
    "plan",
    "sq_norm",
    "weighted_grad",
]
__version__ = "0.1.0"


def interference(
    a: Tensor, b: Tensor, *, direction: Tensor | None = None, gram: bool = False, impl: str = "auto"
) -> InterferenceSums:
    """All sums and scalars of the per-example gradients in one pass. With ``g = torch.einsum("nto,ntk->nok", b, a)``::

        grad_sum = g.sum(0)             # (O, K), the weight gradient
        abs_sum  = g.abs().sum(0)       # (O, K)
        sq_sum   = g.square().sum(0)    # (O, K)
        l1       = g.abs().sum((1, 2))          # (N,)
        sq_norm  = g.square().sum((1, 2))       # (N,)
        dot      = (g * direction).sum((1, 2))          # (N,), with a direction
        abs_dot  = (g * direction).abs().sum((1, 2))    # (N,), with a direction
        gram     = torch.einsum("iok,jok->ij", g, g)    # (N, N), with gram=True

    The scalars over all coordinates are accumulated in float64. Time: about that of ``grad_sum`` alone. Memory: the results and one
    tile for each thread, whatever N and T are (with ``gram``, one tile of each example, bounded).

    Args:
        a: (N, T, K) inputs.
        b: (N, T, O) output gradients, of the dtype and device of ``a``.
        direction: (O, K), any floating dtype, for example a parameter's update.
        gram: whether to compute the pairwise inner products.
        impl: see the module's documentation.

    Raises:
        TypeError: an argument is not a tensor or has another dtype.
        ValueError: an argument has another shape or device, or ``impl`` is unknown.
        RuntimeError: the named ``impl`` is not available on this machine; the message says why.
    """
    _check_pair("a", a, "b", b, impl)
    if direction is not None:
        _check_direction(direction, a, b)
    if impl == "reference":
        return reference.interference(a, b, direction, gram)
    return ops.interference(a, b, direction, bool(gram), impl)


def gram(a: Tensor, b: Tensor, a2: Tensor | None = None, b2: Tensor | None = None, *, impl: str = "auto") -> Tensor:
    """``torch.einsum("iok,jok->ij", g, g2)``: inner products of gradients, (N, N) of one set with itself or (N, M) with a second.

    The direct way forms each gradient tile once; the ghost way, Σ_ts (a_it·a2_js)(b_it·b2_js), forms none and wins for short
    sequences in wide layers. :func:`plan` says which.

    Args:
        a, b: (N, T, K) and (N, T, O).
        a2, b2: (M, T, K) and (M, T, O), both or neither.
        impl: see the module's documentation.

    Raises: as :func:`interference`.
    """
    _check_pair("a", a, "b", b, impl)
    if (a2 is None) != (b2 is None):
        raise ValueError(f"a2, b2: expected both or neither, got {'b2' if a2 is None else 'a2'} alone")
    if a2 is not None and b2 is not None:
        _check_pair("a2", a2, "b2", b2, impl)
        for name, x, like in (("a2", a2, a), ("b2", b2, b)):
            if x.dtype != like.dtype or x.device != like.device:
                raise TypeError(f"{name}: expected {like.dtype} on {like.device} as a and b, got {x.dtype} on {x.device}")
            if x.shape[1:] != like.shape[1:]:
                raise ValueError(f"{name}: expected (M, {like.shape[1]}, {like.shape[2]}) to go with a and b, got {tuple(x.shape)}")
    if impl == "reference":
        return reference.gram(a, b, a if a2 is None else a2, b if b2 is None else b2)
    return torch.ops.zsl.gram(a, b, a2, b2, impl)


def dot(a: Tensor, b: Tensor, direction: Tensor, *, impl: str = "auto") -> Tensor:
    """``(g * direction).sum((1, 2))``: each example's gradient along ``direction`` (O, K); (N,).

    Arguments and errors as :func:`interference`.
    """
    _check_pair("a", a, "b", b, impl)
    _check_direction(direction, a, b)
    if impl == "reference":
        return reference.dot(a, b, direction)
    return torch.ops.zsl.dot(a, b, direction, impl)


def sq_norm(a: Tensor, b: Tensor, *, impl: str = "auto") -> Tensor:
    """``g.square().sum((1, 2))``: each example's squared gradient norm; (N,).

    Arguments and errors as :func:`interference`.
    """
    _check_pair("a", a, "b", b, impl)
    if impl == "reference":
        return reference.sq_norm(a, b)
    return torch.ops.zsl.sq_norm(a, b, impl)


def weighted_grad(a: Tensor, b: Tensor, weights: Tensor, *, impl: str = "auto") -> Tensor:
    """``torch.einsum("n,nok->ok", weights, g)``: the weighted sum of the examples' gradients, (O, K); ``weights`` is (N,).

    Per-example clipping and reweighting need no other gradient. Arguments and errors as :func:`interference`.
    """
    _check_pair("a", a, "b", b, impl)
    _check_tensor("weights", weights)
    if weights.shape != a.shape[:1]:
        raise ValueError(f"weights: expected shape ({a.shape[0]},), one for each example, got {tuple(weights.shape)}")
    if weights.device != a.device:
        raise ValueError(f"weights: expected a tensor on {a.device} as a, got one on {weights.device}")
    if impl == "reference":
        return reference.weighted_grad(a, b, weights)
    return torch.ops.zsl.weighted_grad(a, b, weights, None, None, impl)


def coordinate_sums(
    grad_sum: Tensor, abs_sum: Tensor, sq_sum: Tensor, *, direction: Tensor | None = None, impl: str = "auto"
) -> CoordinateSums:
    """``(grad_sum.abs() / abs_sum).sum()`` and its kin (:class:`CoordinateSums`) in one pass over the sums, with 0/0 as 0.

    Reads the results of :func:`interference`: float32 or float64 tensors of one shape, any. Returns Python floats, accumulated in
    float64, and is not differentiable.
    """
    tensors = {"grad_sum": grad_sum, "abs_sum": abs_sum, "sq_sum": sq_sum}
    for name, x in (tensors if direction is None else {**tensors, "direction": direction}).items():
        _check_tensor(name, x)
        if x.shape != grad_sum.shape:
            raise ValueError(f"{name}: expected shape {tuple(grad_sum.shape)} as grad_sum, got {tuple(x.shape)}")
        if name != "direction" and x.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{name}: expected float32 or float64, got {x.dtype}")
        if x.device != grad_sum.device or x.device.type == "meta":
            raise ValueError(f"{name}: expected a tensor with data on {grad_sum.device} as grad_sum, got one on {x.device}")
    if impl == "reference":
        raise ValueError("impl: coordinate_sums has no reference of its own; expected 'auto', 'chunked' or 'cpu'")
    with torch.no_grad():
        return CoordinateSums(*torch.ops.zsl.coordinate_sums(grad_sum, abs_sum, sq_sum, direction, impl).tolist())


def _check_tensor(name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in INPUT_DTYPES:
        raise TypeError(f"{name}: expected float32, bfloat16, float16 or float64, got {x.dtype}")


def _check_pair(a_name: str, a: Tensor, b_name: str, b: Tensor, impl: str) -> None:
    for name, x, letters in ((a_name, a, "N, T, K"), (b_name, b, "N, T, O")):
        _check_tensor(name, x)
        if x.ndim != 3:
            hint = "; for one position for each example, unsqueeze(1)" if x.ndim == 2 else ""
            raise ValueError(f"{name}: expected a 3-D tensor ({letters}), got shape {tuple(x.shape)}{hint}")
    if b.dtype != a.dtype:
        raise TypeError(f"{b_name}: expected {a.dtype} as {a_name}, got {b.dtype}")
    if b.device != a.device:
        raise ValueError(f"{b_name}: expected a tensor on {a.device} as {a_name}, got one on {b.device}")
    if b.shape[:2] != a.shape[:2]:
        raise ValueError(f"{b_name}: expected shape ({a.shape[0]}, {a.shape[1]}, O) to go with {a_name}, got {tuple(b.shape)}")
    impls_for(a.device, impl)


def _check_direction(direction: Tensor, a: Tensor, b: Tensor) -> None:
    _check_tensor("direction", direction)
    if direction.shape != (b.shape[2], a.shape[2]):
        raise ValueError(
            f"direction: expected shape ({b.shape[2]}, {a.shape[2]}), that of the weight, got {tuple(direction.shape)}"
        )
    if direction.device != a.device:
        raise ValueError(f"direction: expected a tensor on {a.device} as a, got one on {direction.device}")
