"""scale_bias_grad in plain PyTorch: per-example gradients of normalization scales and of biases."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from zsl_kernels.backends.chunked.groups import sum_by
from zsl_kernels.planning.cpu_cost import CHUNKED_BYTES
from zsl_kernels.types import sum_dtype


def scale_bias_grad(
    x: Tensor | None,
    b: Tensor,
    mean: Tensor | None,
    rstd: Tensor | None,
    example_ids: Tensor | None,
    num_examples: int,
    bias: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Process some examples at a time. With ``example_ids``, the products at all positions are materialized."""
    dtype = sum_dtype(b.dtype) if x is None else sum_dtype(torch.promote_types(x.dtype, b.dtype))

    def per_example(g: Tensor) -> Tensor:
        if example_ids is None:
            return g.sum(1, dtype=dtype)
        return sum_by(g.reshape(g.shape[1:]).to(dtype), example_ids, num_examples)

    scale = None
    if x is not None:
        step = max(1, CHUNKED_BYTES // (dtype.itemsize * max(1, math.prod(x.shape[1:]))))
        parts = []
        for start in range(0, max(x.shape[0], 1), step):
            n = slice(start, start + step)
            normed = x[n].to(dtype)
            if mean is not None:
                normed = normed - mean[n, :, None].to(dtype)
            if rstd is not None:
                normed = normed * rstd[n, :, None].to(dtype)
            parts.append(per_example(b[n].to(dtype) * normed))
        scale = torch.cat(parts)
    return scale, per_example(b) if bias else None
