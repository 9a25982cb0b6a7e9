"""What a backend says that it has, it has; and every op reaches it by the method of its name."""

import pytest
import torch

import zsl_kernels as zk
from tests.inputs import Problem
from zsl_kernels.backends.base import OPS, Backend
from zsl_kernels.backends.dispatch import BACKENDS, IMPLS, impls_for

# The methods of an op, where they are not one of its name.
METHODS = {
    "coordinate_sums": ("coordinate_sums_of_many",),
    "linear_cross_entropy": ("linear_cross_entropy_forward", "linear_cross_entropy_gradients"),
}


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=lambda backend: backend.name)
@pytest.mark.parametrize("op", sorted(OPS))
def test_a_backend_has_the_methods_of_its_ops_and_no_others(backend, op):
    for name in METHODS.get(op, (op,)):
        own = getattr(type(backend), name) is not getattr(Backend, name)
        assert own == (op in backend.ops) == backend.has(op, torch.float32)


def test_the_names_are_the_documented_ones():
    assert set(BACKENDS) | {"auto", "reference"} == set(IMPLS)
    assert all(backend.ops <= OPS for backend in BACKENDS.values())


def test_a_call_reaches_the_method_of_the_backend_that_is_named(monkeypatch):
    asked = []
    chunked = BACKENDS["chunked"]
    before = type(chunked).sq_norm

    def sq_norm(self, plan, *operands):
        asked.append(plan.impl)
        return before(self, plan, *operands)

    monkeypatch.setattr(type(chunked), "sq_norm", sq_norm)
    x = Problem(3, 5, 4, 6).make()
    assert torch.equal(zk.sq_norm(x.a, x.b, impl="chunked"), before(chunked, None, x.a, x.b))
    assert asked == ["chunked"]


def test_auto_prefers_the_kernels_of_the_device_and_always_has_the_portable_form():
    for op in OPS:
        found = impls_for(torch.device("cpu"), "auto", op, torch.float32)
        assert found[-1] == "chunked"
        assert set(found) <= {"cpu", "chunked"}
