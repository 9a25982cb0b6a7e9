"""The ops under torch.compile, and the registrations that it relies on."""

import pytest
import torch
from torch.library import opcheck

import zsl_kernels as zk
from tests.inputs import CALLS, OPERANDS, Problem, running
from zsl_kernels.backends import dispatch

PROBLEM = Problem(3, 5, 33, 13, M=2, dtype=torch.float64)


def op_samples():
    """Every registered op with arguments that take each of its branches: before ``impl``, and after it."""
    x = PROBLEM.make()
    a, b, a2, b2, u, w = (t.requires_grad_() for t in (x.a, x.b, x.a2, x.b2, x.direction, x.weights))
    c_pairs, c_each, c_matrix = torch.ones(3, 3, dtype=a.dtype), torch.ones(3, dtype=a.dtype), torch.ones(13, 33, dtype=a.dtype)
    plain = [t.detach() for t in (a, b)]
    cs = [c_matrix] * 3 + [c_each] * 4
    nones = [None] * 7
    sums = [c_matrix, c_matrix, c_matrix]
    # The same rows as ragged ones, unsorted, and the embedding's part of a tied weight.
    ra, rb = (t.detach().flatten(0, 1).requires_grad_() for t in (a, b))
    rows = [t.detach() for t in (ra, rb)]
    ragged = (torch.arange(15, dtype=torch.int32) % 3, 4)
    tied = (torch.tensor([1, -1, 12, 1]), torch.ones(4, 33, dtype=a.dtype, requires_grad=True), torch.tensor([0, 0, 2, 0]))
    tied_plain = (tied[0], tied[1].detach(), tied[2])
    c_four, c_square = torch.ones(4, dtype=a.dtype), torch.ones(4, 4, dtype=a.dtype)
    none = (None, 0, None, None, None)
    ragged_cs = [c_matrix] * 3 + [c_four] * 4
    return {
        "interference": ("interference", (a, b, None, False)),
        "interference, all": ("interference", (a, b, u, True)),
        "gram": ("gram", (a, b, None, None)),
        "gram, cross": ("gram", (a, b, a2, b2)),
        "sq_norm": ("sq_norm", (a, b)),
        "dot": ("dot", (a, b, u)),
        "weighted_grad": ("weighted_grad", (a, b, w, None, None)),
        "weighted_grad, signed": ("weighted_grad", (*plain, c_each, c_each, c_matrix)),
        "backward": ("interference_backward", (*plain, c_matrix, *cs, c_pairs, *plain, True, True, False), none),
        "backward, a": ("interference_backward", (*plain, None, c_matrix, *nones[1:], None, *plain, True, False, False), none),
        "backward, b": ("interference_backward", (*plain, None, *nones, c_pairs, *plain, False, True, False), none),
        "interference, ragged": ("interference", (ra, rb, u, True), ragged),
        "interference, tied": ("interference", (a, b, None, True), (None, 0, *tied)),
        "interference, ragged and tied": ("interference", (ra, rb, None, False), (*ragged, *tied)),
        "gram, ragged": ("gram", (ra, rb, None, None), ragged),
        "sq_norm, ragged": ("sq_norm", (ra, rb), ragged),
        "dot, ragged": ("dot", (ra, rb, u), ragged),
        "weighted_grad, ragged": ("weighted_grad", (ra, rb, c_four.clone().requires_grad_(), None, None), ragged),
        "backward, ragged and tied": (
            "interference_backward",
            (*rows, c_matrix, *ragged_cs, c_square, *rows, True, True, True),
            (*ragged, *tied_plain),
        ),
        "coordinate_sums": ("coordinate_sums", (*sums, None)),
        "coordinate_sums, direction": ("coordinate_sums", (*sums, c_matrix)),
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sample", op_samples())
@pytest.mark.parametrize("impl", ["chunked", "cpu"], indirect=True)
def test_opcheck(sample, dtype, impl):
    """Schema, fake (also of what was asked for in bf16, whose results are float32) and autograd registration agree with the op."""
    name, args, *rest = op_samples()[sample]
    if name == "coordinate_sums" and dtype == torch.bfloat16:
        pytest.skip("sums are float32 or float64")
    args = [
        x.detach().to(dtype).requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for x in (*args, impl, *(rest[0] if rest else ()))
    ]
    checks = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if dtype == torch.bfloat16:
        checks.remove("test_aot_dispatch_dynamic")  # compares gradients at bf16's own tolerance; test_autograd does so exactly
    opcheck(getattr(torch.ops.zsl, name).default, tuple(args), test_utils=checks)


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


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # inductor's own
def test_the_first_call_may_be_compiled(impl, monkeypatch):
    """Nothing has been loaded by then, where the backend is loaded by the first call."""
    torch._dynamo.reset()
    for backend in (dispatch.TRITON, dispatch.CUDA):
        monkeypatch.setattr(backend, "_loaded", False)
    x = Problem(3, 5, 33, 13).make()
    compiled = torch.compile(lambda a, b: zk.gram(a, b, impl=impl), fullgraph=True, backend="eager")
    assert torch.equal(compiled(x.a, x.b), zk.gram(x.a, x.b, impl=impl))


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
