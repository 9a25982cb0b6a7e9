"""scale_grad, bias_grad and scale_bias_grad: per-example gradients of normalization scales and of biases."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zsl_kernels import call_cache
from zsl_kernels.backends import cpu, dispatch, reference
from zsl_kernels.backends.dispatch import CPU, backend_for
from zsl_kernels.ops.registration import Grads, define, differentiable, empty, outside_autocast
from zsl_kernels.validation import check_device, check_elements, check_examples, check_range, check_tensor, long


def bias_grad(b: Tensor, *, example_ids: Tensor | None = None, num_examples: int | None = None, impl: str = "auto") -> Tensor:
    """``b.sum(1)``: the per-example gradients (N, O) of a bias, accumulated in float32 or better.

    The function is differentiable in ``b``.

    Args:
        b: (N, T, O), the gradients with respect to the biased output; (R, O) with ``example_ids``.
        example_ids, num_examples: for ragged rows. The result is then ``zeros(N, O).index_add(0, example_ids, b)``.
        impl: see the package's documentation.

    Raises: the same errors as :func:`zsl_kernels.embedding_interference`.
    """
    kind = None
    if example_ids is None and num_examples is None:
        kind = call_cache.kind_of("bias", impl, None, b)
        if kind is not None and (call := call_cache.find(kind)) is not None:
            return call(b, None, None, None)[1]
    N = _check_positions("b", b, example_ids, num_examples, impl)
    _, bias = _run(None, b, None, None, example_ids, N, True, impl, kind)
    return bias


def scale_grad(
    x: Tensor,
    b: Tensor,
    *,
    mean: Tensor | None = None,
    rstd: Tensor | None = None,
    example_ids: Tensor | None = None,
    num_examples: int | None = None,
    impl: str = "auto",
) -> Tensor:
    """``(b * (x - mean) * rstd).sum(1)``: the per-example gradients (N, K) of a normalization layer's elementwise scale.

    Pass both ``mean`` and ``rstd`` for a LayerNorm, only ``rstd`` for an RMSNorm, and neither for a plain scale. The function reads
    ``x`` and ``b`` once and is differentiable in all four tensors.

    Args:
        x: (N, T, K), the inputs of the normalization layer; (R, K) with ``example_ids``.
        b: the gradients with respect to the scaled output. It has the shape of ``x`` and may have another dtype.
        mean, rstd: (N, T) or (N, T, 1); (R,) or (R, 1) with ``example_ids``. Any floating dtype.
        example_ids, num_examples: for ragged rows.
        impl: see the package's documentation.

    Raises: the same errors as :func:`zsl_kernels.embedding_interference`.
    """
    kind = None
    if example_ids is None and num_examples is None:
        kind = call_cache.kind_of("scale", impl, None, b, x, mean, rstd)
        if kind is not None and (call := call_cache.find(kind)) is not None:
            return call(b, x, mean, rstd)[0]
    N = _check_scale(x, b, mean, rstd, example_ids, num_examples, impl)
    scale, _ = _run(x, b, mean, rstd, example_ids, N, False, impl, kind)
    return scale


def scale_bias_grad(
    x: Tensor,
    b: Tensor,
    *,
    mean: Tensor | None = None,
    rstd: Tensor | None = None,
    example_ids: Tensor | None = None,
    num_examples: int | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """``(b * (x - mean) * rstd).sum(1), b.sum(1)``: :func:`scale_grad` and :func:`bias_grad` in one pass over ``x`` and ``b``."""
    kind = None
    if example_ids is None and num_examples is None:
        kind = call_cache.kind_of("scale and bias", impl, None, b, x, mean, rstd)
        if kind is not None and (call := call_cache.find(kind)) is not None:
            return call(b, x, mean, rstd)
    N = _check_scale(x, b, mean, rstd, example_ids, num_examples, impl)
    return _run(x, b, mean, rstd, example_ids, N, True, impl, kind)


def _run(
    x: Tensor | None,
    b: Tensor,
    mean: Tensor | None,
    rstd: Tensor | None,
    example_ids: Tensor | None,
    N: int,
    bias: bool,
    impl: str,
    kind: call_cache.Kind | None,
) -> tuple[Any, Any]:
    """Run the op. With a ``kind``, run the kernel's function and store it for later calls of the same kind."""
    if kind is not None:
        return call_cache.keep(kind, _call(x, b, bias, impl))(b, x, mean, rstd)
    if example_ids is not None:
        b = b.unsqueeze(0)
        x, mean, rstd = (None if y is None else y.unsqueeze(0) for y in (x, mean, rstd))
    mean, rstd = (y.squeeze(2) if y is not None and y.ndim == 3 else y for y in (mean, rstd))
    if impl == "reference":
        return reference.scale_bias_grad(x, b, mean, rstd, example_ids, N)
    return op(x, b, mean, rstd, example_ids, N, bias, impl)


def _check_positions(name: str, x: Tensor, example_ids: Tensor | None, num_examples: int | None, impl: str) -> int:
    check_tensor(name, x)
    if x.ndim != (3 if example_ids is None else 2):
        wanted = "a 3-D tensor (N, T, K)" if example_ids is None else "a 2-D tensor (R, K) because example_ids is given"
        raise ValueError(f"{name}: expected {wanted}, got shape {tuple(x.shape)}")
    check_elements(name, *x.shape)
    dispatch.impls_for(x.device, impl)
    N = check_examples(x, name, example_ids, num_examples)
    check_elements("num_examples", N, x.shape[-1])
    return N


def _check_scale(
    x: Tensor,
    b: Tensor,
    mean: Tensor | None,
    rstd: Tensor | None,
    example_ids: Tensor | None,
    num_examples: int | None,
    impl: str,
) -> int:
    N = _check_positions("x", x, example_ids, num_examples, impl)
    check_tensor("b", b)
    if b.shape != x.shape:
        raise ValueError(f"b: expected the shape of x, {tuple(x.shape)}, got {tuple(b.shape)}")
    check_device("b", b, "x", x)
    for name, y in (("mean", mean), ("rstd", rstd)):
        if y is None:
            continue
        check_tensor(name, y)
        if y.shape not in (x.shape[:-1], (*x.shape[:-1], 1)):
            raise ValueError(f"{name}: expected shape {tuple(x.shape[:-1])} or {(*x.shape[:-1], 1)}, got {tuple(y.shape)}")
        check_device(name, y, "x", x)
    return N


def _call(x: Tensor | None, b: Tensor, bias: bool, impl: str) -> Callable[..., tuple[Tensor | None, Tensor | None]]:
    """Return the function of (b, x, mean, rstd) that the op runs for tensors like x and b if examples are a dimension."""
    N, backend = b.shape[0], backend_for("scale_bias_grad", b.device, impl, _sum_like(x, b).dtype)
    if backend is CPU:
        kernel = cpu.kernels.scale_bias_grad.default
        return lambda b, x, mean, rstd: kernel(x, b, mean, rstd, None, N, bias)

    def call(b: Tensor, x: Tensor | None, mean: Tensor | None, rstd: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        mean, rstd = (y.squeeze(2) if y is not None and y.ndim == 3 else y for y in (mean, rstd))
        return backend.scale_bias_grad(x, b, mean, rstd, None, N, bias)

    return backend.prepare(call_cache.below_autograd(outside_autocast(call)), tuple)


def _sum_like(x: Tensor | None, b: Tensor) -> Tensor:
    """Return the tensor whose dtype determines the sum dtype."""
    return x if x is not None and x.dtype == torch.float64 else b


def _scale_bias(
    x: Tensor | None, b: Tensor, mean: Tensor | None, rstd: Tensor | None, example_ids: Tensor | None, num_examples: int, *rest: Any
) -> tuple[Tensor, Tensor]:
    bias, impl = rest
    backend = backend_for("scale_bias_grad", b.device, impl, _sum_like(x, b).dtype)
    if not backend.checks_ids:
        check_range("example_ids", example_ids, num_examples)
        example_ids = long(example_ids)
    scale, total = backend.scale_bias_grad(x, b, mean, rstd, example_ids, num_examples, bias)
    like = _sum_like(x, b)
    return empty(like, 0, 0) if scale is None else scale, empty(like, 0, 0) if total is None else total


def _scale_bias_fake(x: Tensor | None, b: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *_, num_examples, bias, _ = rest
    like, size = _sum_like(x, b), (num_examples, b.shape[2])
    return empty(like, *(size if x is not None else (0, 0))), empty(like, *(size if bias else (0, 0)))


op = define(
    "scale_bias_grad(Tensor? x, Tensor b, Tensor? mean, Tensor? rstd, Tensor? example_ids, SymInt num_examples, bool bias, "
    "str impl) -> (Tensor, Tensor)",
    _scale_bias,
    _scale_bias_fake,
)


def _scale_bias_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, b, mean, rstd, example_ids, _, ctx.bias, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, b, mean, rstd, example_ids)


def _scale_bias_grad(ctx: Any, c_scale: Tensor | None, c_bias: Tensor | None) -> Grads:
    x, b, mean, rstd, example_ids = ctx.saved_tensors
    need_x, need_b, need_mean, need_rstd = ctx.needs_input_grad[:4]

    def at_positions(c: Tensor) -> Tensor:
        return c.unsqueeze(1) if example_ids is None else c.index_select(0, example_ids.long()).unsqueeze(0)

    dx = db = dmean = drstd = None
    if x is not None and c_scale is not None:
        dtype = c_scale.dtype
        c = at_positions(c_scale)
        centered = x.to(dtype) if mean is None else x.to(dtype) - mean.to(dtype).unsqueeze(-1)
        factor = None if rstd is None else rstd.to(dtype).unsqueeze(-1)
        cb = c * b.to(dtype)
        d_centered = cb if factor is None else cb * factor
        if need_x:
            dx = d_centered.to(x.dtype)
        if need_mean:
            dmean = -d_centered.sum(-1).to(mean.dtype)
        if need_rstd:
            drstd = (cb * centered).sum(-1).to(rstd.dtype)
        if need_b:
            db = c * (centered if factor is None else centered * factor)
    if need_b and ctx.bias and c_bias is not None:
        own = at_positions(c_bias).expand(b.shape)
        db = own if db is None else db + own
    return dx, None if db is None else db.to(b.dtype), dmean, drstd, None, None, None, None


differentiable(op, _scale_bias_setup, _scale_bias_grad)
