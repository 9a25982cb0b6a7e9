"""What a call costs where there is next to nothing to compute: Python and dispatch, once for every weight of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import zsl_kernels as zk

N, T, K, O, V = 4, 16, 32, 32, 50
WEIGHTS = 150  # of a GPT-2 as large as the smallest
CALLS = 100  # of a round: one alone is as short as reading the clock twice

TITLE = "host time of a call, fp32, one thread"
NOTE = (
    f"Microseconds of a call at N={N}, T={T}, K={K}, O={O}, where most of it is Python and dispatch, and as a ratio to a call of "
    f"torch on the same operands, which computes less. In the last rows the call is about {WEIGHTS} weights of {O} × {K}."
)


def operands() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    a, x, b = torch.randn(3, N, T, K, generator=generator)
    mean, rstd = torch.randn(2, N, T, generator=generator)
    ids = torch.randint(0, V, (N, T), generator=generator)
    return {"a": a, "b": b, "x": x, "mean": mean, "rstd": rstd.exp(), "ids": ids, "g": b[:, 0].contiguous(), "u": torch.ones(O, K)}


def sums_of_weights() -> list[list[Tensor]]:
    g = torch.randn(WEIGHTS, N, O, K, generator=torch.Generator().manual_seed(0))
    return [[x.clone() for x in sums] for sums in (g.sum(1), g.abs().sum(1), g.square().sum(1))]


def one_by_one(sums: list[list[Tensor]]) -> Tensor:
    return torch.stack([torch.ops.zsl.coordinate_sums(*tensors, None, "auto") for tensors in zip(*sums, strict=True)])


def ratios_by_torch(sums: list[list[Tensor]]) -> Tensor:
    return torch.stack([(g.abs() / a).sum() for g, a, _ in zip(*sums, strict=True)])


def rows() -> dict[str, tuple[str, Callable[[], object], Callable[[], object]]]:
    """The baseline's name, the subject and the baseline of each row."""
    v = operands()
    a, b, x, ids, g, u = (v[name] for name in ("a", "b", "x", "ids", "g", "u"))
    normed = {"mean": v["mean"], "rstd": v["rstd"]}
    sums = sums_of_weights()

    def product() -> Tensor:
        return b.flatten(0, 1).T @ a.flatten(0, 1)

    def scale() -> Tensor:
        return (b * ((x - v["mean"][..., None]) * v["rstd"][..., None])).sum(1)

    return {
        "interference": ("dW", lambda: zk.interference(a, b), product),
        "interference, direction": ("dW", lambda: zk.interference(a, b, direction=u), product),
        "interference, Gram": ("dW", lambda: zk.interference(a, b, gram=True), product),
        "dense_interference": ("sum", lambda: zk.dense_interference(g), lambda: g.sum(0)),
        "bias_grad": ("sum", lambda: zk.bias_grad(b), lambda: b.sum(1)),
        "scale_grad": ("torch", lambda: zk.scale_grad(x, b, **normed), scale),
        "scale_bias_grad": ("torch", lambda: zk.scale_bias_grad(x, b, **normed), lambda: (scale(), b.sum(1))),
        "embedding_interference": (
            "embedding_dense_backward",
            lambda: zk.embedding_interference(ids, b, V),
            lambda: torch.ops.aten.embedding_dense_backward(b, ids, V, -1, False),
        ),
        "coordinate_sums, one by one": ("ratios", lambda: one_by_one(sums), lambda: ratios_by_torch(sums)),
        "coordinate_sums_of_many": ("ratios", lambda: zk.coordinate_sums_of_many(*sums), lambda: ratios_by_torch(sums)),
    }


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def repeated(function: Callable[[], object], calls: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(calls):
            function()

    return run


@pytest.mark.parametrize("row", rows())
def test_host_time(compare, table, row):
    against, subject, baseline = rows()[row]
    calls = CALLS if "coordinate_sums" not in row else 1
    compare(
        table(TITLE, NOTE),
        f"{row} ({against})",
        "call",
        repeated(subject, calls),
        repeated(baseline, calls),
        against="torch",
        microseconds=True,
        shares=(calls, calls),
    )
