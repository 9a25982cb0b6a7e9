"""One weight: statistics of its per-example gradients, gᵢ = bᵢᵀ aᵢ, against the product of an ordinary step and held gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import zsl_kernels as zk
from zerosum.bench.statistics import SUMS, Statistics
from zerosum.bench.ways import HELD, Pass, Way
from zsl_kernels.backends import reference

WEIGHT = "weight"  # the one parameter


@dataclass(frozen=True)
class Operands:
    """``a`` (N, T, K), ``b`` (N, T, O) and a ``direction`` (O, K)."""

    a: Tensor
    b: Tensor
    direction: Tensor

    @classmethod
    def make(cls, N: int, T: int, O: int, K: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> Operands:
        torch.manual_seed(0)
        a, b, direction = (torch.empty(*shape).normal_() for shape in ((N, T, K), (N, T, O), (O, K)))
        return cls(*(x.to(device, dtype) for x in (a, b, direction)))


def weight_gradient(a: Tensor, b: Tensor) -> Tensor:
    """bᵀ a over examples and positions: the dW product of an ordinary training step, which is the baseline."""
    return b.flatten(0, 1).T @ a.flatten(0, 1)


def read(found: zk.InterferenceSums) -> Statistics:
    """As the statistics of a step with one parameter."""
    grad_sum, abs_sum, sq_sum = ({WEIGHT: x} for x in (found.grad_sum, found.abs_sum, found.sq_sum))
    return Statistics((WEIGHT,), grad_sum, abs_sum, sq_sum, found.l1, found.sq_norm, found.dot, found.abs_dot, found.gram)


def _way(call: Callable[[Operands], Statistics]) -> Callable[[Operands], Pass]:
    def start(x: Operands) -> Pass:
        def run() -> Callable[[], Statistics]:
            found = call(x)
            return lambda: found

        return run

    return start


OPS: tuple[Way[Operands], ...] = (
    Way("dW", ("grad_sum",), _way(lambda x: Statistics((WEIGHT,), {WEIGHT: weight_gradient(x.a, x.b)}))),
    Way("interference", SUMS, _way(lambda x: read(zk.interference(x.a, x.b))), ours=True),
    Way(
        "  with a direction",
        (*SUMS, "dot", "abs_dot"),
        _way(lambda x: read(zk.interference(x.a, x.b, direction=x.direction))),
        ours=True,
    ),
    Way("  with the Gram", (*SUMS, "gram"), _way(lambda x: read(zk.interference(x.a, x.b, gram=True))), ours=True),
    Way("gram", ("gram",), _way(lambda x: Statistics((WEIGHT,), gram=zk.gram(x.a, x.b))), ours=True),
    Way(
        "materialized",
        SUMS,
        _way(lambda x: read(reference.interference(x.a, x.b, None, False))),
        (HELD,),
    ),
)
