"""dense_interference in plain PyTorch: the statistics of materialized gradients."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from zsl_kernels.planning.cpu_cost import CHUNKED_BYTES
from zsl_kernels.types import InterferenceSums, sum_dtype


def dense_interference(g: Tensor, direction: Tensor | None, gram: bool) -> InterferenceSums:
    """Process a block of coordinates of all examples at a time, so that the temporaries have bounded size."""
    N, shape, dtype = g.shape[0], g.shape[1:], sum_dtype(g.dtype)
    flat = g.reshape(N, math.prod(shape))
    u = None if direction is None else direction.reshape(-1).to(dtype)
    sums = [flat.new_zeros(flat.shape[1], dtype=dtype) for _ in range(3)]
    scalars = [flat.new_zeros(N, dtype=torch.float64) for _ in range(4)]
    pairs = flat.new_zeros((N, N) if gram else (0, 0), dtype=torch.float64)
    columns = max(1, CHUNKED_BYTES // (dtype.itemsize * max(N, 1)))
    for start in range(0, flat.shape[1], columns):
        block = slice(start, start + columns)
        v = flat[:, block].to(dtype)
        size, square = v.abs(), v.square()
        terms = [size, square]
        if u is not None:
            p = v * u[block]
            terms += [p, p.abs()]
        for total, part in zip(sums, (v, size, square), strict=True):
            total[block] = part.sum(0)
        for scalar, term in zip(scalars, terms, strict=False):
            scalar += term.sum(1, dtype=torch.float64)
        if gram:
            pairs += v @ v.T
    results = (x.to(dtype) for x in (*scalars, pairs))
    return InterferenceSums(*(x.view(shape) for x in sums), *results).asked_for(direction, gram)
