"""The ops under torch.compile, and the registrations that it relies on."""

import pytest
import torch
from torch.library import opcheck

from tests.inputs import CALLS, OPERANDS, Problem, running

PROBLEM = Problem(3, 5, 33, 13, M=2, dtype=torch.float64)


def op_samples():
    """Every registered op with arguments that take each of its branches."""
    x = PROBLEM.make()
    a, b, a2, b2, u, w = (t.requires_grad_() for t in (x.a, x.b, x.a2, x.b2, x.direction, x.weights))
    c_pairs, c_each, c_matrix = torch.ones(3, 3, dtype=a.dtype), torch.ones(3, dtype=a.dtype), torch.ones(13, 33, dtype=a.dtype)
    plain = [t.detach() for t in (a, b)]
    cs = [c_matrix] * 3 + [c_each] * 4
    nones = [None] * 7
    sums = [c_matrix, c_matrix, c_matrix]
    return {
        "interference": ("interference", (a, b, None, False)),
        "interference, all": ("interference", (a, b, u, True)),
        "gram": ("gram", (a, b, None, None)),
        "gram, cross": ("gram", (a, b, a2, b2)),
        "sq_norm": ("sq_norm", (a, b)),
        "dot": ("dot", (a, b, u)),
        "weighted_grad": ("weighted_grad", (a, b, w, None, None)),
        "weighted_grad, signed": ("weighted_grad", (*plain, c_each, c_each, c_matrix)),
        "backward": ("interference_backward", (*plain, c_matrix, *cs, c_pairs, *plain, True, True)),
        "backward, a": ("interference_backward", (*plain, None, c_matrix, *nones[1:], None, *plain, True, False)),
        "backward, b": ("interference_backward", (*plain, None, *nones, c_pairs, *plain, False, True)),
        "coordinate_sums": ("coordinate_sums", (*sums, None)),
        "coordinate_sums, direction": ("coordinate_sums", (*sums, c_matrix)),
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sample", op_samples())
@pytest.mark.parametrize("impl", ["chunked", "cpu"], indirect=True)
def test_opcheck(sample, dtype, impl):
    """Schema, fake (also of what was asked for in bf16, whose results are float32) and autograd registration agree with the op."""
    name, args = op_samples()[sample]
    if name == "coordinate_sums" and dtype == torch.bfloat16:
        pytest.skip("sums are float32 or float64")
    args = [x.detach().to(dtype).requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x for x in args]
    checks = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if dtype == torch.bfloat16:
        checks.remove("test_aot_dispatch_dynamic")  # compares gradients at bf16's own tolerance; test_autograd does so exactly
    opcheck(getattr(torch.ops.zsl, name).default, (*args, impl), test_utils=checks)


def forward_and_backward(function, call, x, impl):
    leaves = {name: getattr(x, name).detach().clone().requires_grad_() for name in OPERANDS[call]}
    results = function(x.replace(**leaves), impl)
    sum(field.sum() for field in results.values()).backward()
    return {**results, **{f"d{name}": leaf.grad for name, leaf in leaves.items()}}


def assert_same(compiled, call, x, impl):
    want = forward_and_backward(CALLS[call], call, x, impl)
    for name, result in forward_and_backward(compiled, call, x, impl).items():
        torch.testing.assert_close(result, want[name], msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize(("backend", "dynamic"), [("eager", False), ("aot_eager", True)], ids=["eager-static", "aot_eager-dynamic"])
@pytest.mark.parametrize("call", ["interference, all", "gram", "cross gram", "dot", "sq_norm", "weighted_grad"])
@pytest.mark.parametrize("implementation", ["auto", "chunked"])
def test_public_functions_compile_as_one_graph(call, backend, dynamic, implementation):
    torch._dynamo.reset()
    with running(implementation) as impl:
        compiled = torch.compile(CALLS[call], fullgraph=True, backend=backend, dynamic=dynamic)
        assert_same(compiled, call, PROBLEM.make(), impl)


def test_one_dynamic_graph_serves_other_sizes():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(CALLS["interference, all"], fullgraph=True, backend=counter, dynamic=True)
    for size in ((3, 5, 33, 13), (4, 9, 20, 7), (6, 300, 50, 41)):
        assert_same(compiled, "interference, all", Problem(*size, dtype=torch.float64).make(), "auto")
    assert counter.frame_count == 1


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # inductor's own
def test_inductor():
    torch._dynamo.reset()

    def function(x, impl):
        return {name: field * 2 for name, field in CALLS["interference, all"](x, impl).items()}

    compiled = torch.compile(function, fullgraph=True)
    x = PROBLEM.make()
    want = forward_and_backward(function, "interference, all", x, "auto")
    for name, result in forward_and_backward(compiled, "interference, all", x, "auto").items():
        torch.testing.assert_close(result, want[name])
