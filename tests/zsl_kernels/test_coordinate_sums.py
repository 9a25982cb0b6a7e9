"""coordinate_sums against its definition."""

import math

import pytest
import torch

import zsl_kernels as zk


def definition(grad_sum, abs_sum, sq_sum, u):
    G, A, Q = (x.double() for x in (grad_sum, abs_sum, sq_sum))
    U = torch.zeros_like(G) if u is None else u.double().abs()
    touched = A != 0
    return zk.CoordinateSums(
        touched=touched.sum().item(),
        ratio=(G.abs() / A)[touched].sum().item(),
        root_ratio=(Q.sqrt() / A)[touched].sum().item(),
        grad_sq=G.square().sum().item(),
        sq=Q.sum().item(),
        p_sum=(G.abs() * U).sum().item(),
        p_abs=(A * U).sum().item(),
        p_root=(Q.sqrt() * U).sum().item(),
    )


def sums(*shape, dtype=torch.float32):
    """As interference gives them, from four examples of which none touches every fifth coordinate."""
    g = torch.randn(4, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    g.view(4, -1)[:, ::5] = 0
    return [x.to(dtype) for x in (g.sum(0), g.abs().sum(0), g.square().sum(0))]


# Below, on and past a vector; the kernel's block; a worker's block; the chunked form's.
@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (16, 16), (33, 31), (1 << 14,), (129, 513), (0,), (0, 7)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("direction", [False, True])
def test_is_the_definition(direction, dtype, shape, impl):
    tensors = sums(*shape, dtype=dtype)
    u = torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(1)) if direction else None
    got = zk.coordinate_sums(*tensors, direction=u, impl=impl)
    # Terms are positive and float32's last digits average out: far less than the 1e-6 of each.
    assert got == pytest.approx(definition(*tensors, u), rel=1e-6)
    assert all(isinstance(x, float) for x in got)


def test_reads_any_layout(impl):
    tensors = sums(33, 31)
    u = torch.randn(31, 33).T
    transposed = [x.T.contiguous().T for x in tensors]
    assert zk.coordinate_sums(*transposed, direction=u, impl=impl) == pytest.approx(definition(*tensors, u), rel=1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
def test_what_is_not_finite_comes_through(value, impl):
    tensors = sums(33, 31)
    for x in tensors:
        x[7, 11] = value
    got = zk.coordinate_sums(*tensors, direction=torch.ones(33, 31), impl=impl)
    assert [name for name, x in got._asdict().items() if math.isfinite(x)] == ["touched"]


def test_is_bitwise_repeatable(impl):
    tensors = sums(300, 301)
    assert zk.coordinate_sums(*tensors, impl=impl) == zk.coordinate_sums(*tensors, impl=impl)
