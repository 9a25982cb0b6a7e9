"""coordinate_sums: reduce a weight's Σ g, Σ|g| and Σ g² over its coordinates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from zsl_kernels import call_cache
from zsl_kernels.backends import cpu
from zsl_kernels.backends.dispatch import IMPLS, backend_for
from zsl_kernels.ops.registration import define
from zsl_kernels.types import INPUT_DTYPES, CoordinateSums
from zsl_kernels.validation import check_elements, check_tensor


def coordinate_sums(
    grad_sum: Tensor, abs_sum: Tensor, sq_sum: Tensor, *, direction: Tensor | None = None, impl: str = "auto"
) -> CoordinateSums:
    """``(grad_sum.abs() / abs_sum).sum()`` and the other fields of :class:`CoordinateSums`, in one pass; 0/0 counts as 0.

    The arguments are results of :func:`interference`: float32 or float64 tensors that all have the same shape. ``direction`` may
    have any floating dtype. The results are accumulated in float64 and returned as Python floats, so they are not differentiable.
    """
    _check_sums((grad_sum, abs_sum, sq_sum, direction))
    _check_coordinate_impl(impl)
    with torch.no_grad():
        return CoordinateSums(*op(grad_sum, abs_sum, sq_sum, direction, impl).tolist())


def coordinate_sums_of_many(
    grad_sums: Sequence[Tensor],
    abs_sums: Sequence[Tensor],
    sq_sums: Sequence[Tensor],
    directions: Sequence[Tensor | None] | None = None,
    *,
    impl: str = "auto",
) -> Tensor:
    """``torch.stack([(G.abs() / A).sum(), …])`` for many weights in one call.

    Row w contains the fields of :func:`coordinate_sums` for ``grad_sums[w]``, ``abs_sums[w]``, ``sq_sums[w]`` and
    ``directions[w]``. The result for a weight is bitwise identical whether or not other weights are in the call.

    The call does not synchronize with a device: the result stays on the device of the sums. It is not differentiable.

    Args:
        grad_sums, abs_sums, sq_sums: W tensors each, float32 or float64, on one device. The three tensors of a weight have the
            same shape.
        directions: for each weight a tensor of its shape and any floating dtype, or None. None instead of the list means that no
            weight has a direction.
        impl: see the package's documentation.

    Returns: (W, 8) float64. The columns follow ``CoordinateSums._fields``. Columns that need a direction are 0 without one.

    Raises:
        TypeError: an argument is not a tensor or has an unsupported dtype.
        ValueError: an argument has the wrong length, shape or device, or ``impl`` is unknown.
        RuntimeError: the named ``impl`` is not available on this machine.
    """
    us = [None] * len(grad_sums) if directions is None else directions
    lists: list[list[Any]] = [list(x) for x in (grad_sums, abs_sums, sq_sums, us)]
    with torch.no_grad():
        if (sums := _at_once(impl, *lists)) is not None:
            return sums
        _check_sums_of_many(*lists)
        _check_coordinate_impl(impl)
        return op_of_many(*lists, impl)


_SUM_NAMES = ("grad_sum", "abs_sum", "sq_sum", "direction")
_SUM_DTYPES = (torch.float32, torch.float64)


def _check_sums_of_many(*lists: list[Any]) -> None:
    for name, found in zip(_SUM_NAMES, lists, strict=True):
        if len(found) != len(lists[0]):
            raise ValueError(f"{name}s: expected {len(lists[0])} tensors, one for each of grad_sums, got {len(found)}")
    for w, tensors in enumerate(zip(*lists, strict=True)):
        _check_sums(tensors, w)
        device, first = tensors[0].device, lists[0][0].device
        if device != first:
            raise ValueError(f"grad_sums[{w}]: expected a tensor on {first}, the device of grad_sums[0], got one on {device}")


def _check_sums(tensors: tuple[Any, ...], w: int | None = None) -> None:
    """Check the tensors of one weight. ``w`` is its index in a call with many weights."""
    like = tensors[0]
    if isinstance(like, Tensor):
        check_elements("grad_sum" if w is None else f"grad_sums[{w}]", *like.shape)
    for i, x in enumerate(tensors if tensors[3] is not None else tensors[:3]):
        dtypes = INPUT_DTYPES if i == 3 else _SUM_DTYPES
        good = isinstance(x, Tensor) and x.dtype in dtypes and x.shape == like.shape and x.device == like.device
        if good and x.device.type != "meta":
            continue
        name, like_name = (n if w is None else f"{n}s[{w}]" for n in (_SUM_NAMES[i], _SUM_NAMES[0]))
        check_tensor(name, x)
        if x.shape != like.shape:
            raise ValueError(f"{name}: expected the shape of {like_name}, {tuple(like.shape)}, got {tuple(x.shape)}")
        if x.dtype not in dtypes:
            raise TypeError(f"{name}: expected float32 or float64, got {x.dtype}")
        raise ValueError(f"{name}: expected a tensor with data on {like.device}, the device of {like_name}, got one on {x.device}")


def _check_coordinate_impl(impl: str) -> None:
    if impl == "reference":
        raise ValueError("impl: expected 'auto', 'chunked', 'cpu' or 'triton' for coordinate_sums, got 'reference'")


def _at_once(impl: str, *lists: list[Any]) -> Tensor | None:
    """Compute coordinate_sums_of_many on the CPU without the registered op, or return None if that is not possible.

    Invalid arguments also give None; the caller then checks them. Checking them first would take longer than the sums.
    """
    if impl not in ("auto", "cpu") or cpu.MISSING is not None or not call_cache.plain(*lists):
        return None
    if lists[0] and (lists[0][0] is None or not lists[0][0].is_cpu):
        return None
    try:
        return cpu.kernels.coordinate_sums_of_many.default(*lists)
    except RuntimeError:
        return None


def _coordinate_sums(grad_sum: Tensor, abs_sum: Tensor, sq_sum: Tensor, direction: Tensor | None, impl: str) -> Tensor:
    backend = backend_for("coordinate_sums", grad_sum.device, impl, grad_sum.dtype)
    return backend.coordinate_sums_of_many([grad_sum], [abs_sum], [sq_sum], [direction]).view(len(CoordinateSums._fields))


def _coordinate_sums_of_many(
    grad_sums: Sequence[Tensor],
    abs_sums: Sequence[Tensor],
    sq_sums: Sequence[Tensor],
    directions: Sequence[Tensor | None],
    impl: str,
) -> Tensor:
    if not grad_sums:  # no tensor, so no device to choose a backend by
        if impl not in IMPLS:
            raise ValueError(f"impl: expected one of {', '.join(IMPLS)}, got {impl!r}")
        return torch.empty(0, len(CoordinateSums._fields), dtype=torch.float64)
    directions = directions or [None] * len(grad_sums)
    owners = {x.dtype: backend_for("coordinate_sums", x.device, impl, x.dtype) for x in grad_sums}
    if len(set(owners.values())) == 1:
        return owners[grad_sums[0].dtype].coordinate_sums_of_many(grad_sums, abs_sums, sq_sums, directions)
    # Different dtypes may need different backends. Stack the rows: indexed assignment would synchronize with the device.
    rows: dict[int, Tensor] = {}
    for owner in set(owners.values()):
        places = [w for w, x in enumerate(grad_sums) if owners[x.dtype] is owner]
        grads, sizes, squares = ([x[w] for w in places] for x in (grad_sums, abs_sums, sq_sums))
        found = owner.coordinate_sums_of_many(grads, sizes, squares, [directions[w] for w in places])
        rows.update(zip(places, found.unbind(), strict=True))
    return torch.stack([rows[w] for w in range(len(grad_sums))])


def _coordinate_sums_of_many_fake(grad_sums: Sequence[Tensor], *rest: Any) -> Tensor:
    size = (len(grad_sums), len(CoordinateSums._fields))
    return grad_sums[0].new_empty(size, dtype=torch.float64) if grad_sums else torch.empty(size, dtype=torch.float64)


op = define(
    "coordinate_sums(Tensor grad_sum, Tensor abs_sum, Tensor sq_sum, Tensor? direction, str impl) -> Tensor",
    _coordinate_sums,
    lambda grad_sum, abs_sum, sq_sum, direction, impl: grad_sum.new_empty(8, dtype=torch.float64),
)
op_of_many = define(
    "coordinate_sums_of_many(Tensor[] grad_sums, Tensor[] abs_sums, Tensor[] sq_sums, Tensor?[] directions, str impl) -> Tensor",
    _coordinate_sums_of_many,
    _coordinate_sums_of_many_fake,
)
