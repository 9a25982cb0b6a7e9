"""The ops of weights' uses in compiled code, without a probe: they compute what the calls do, and tell a listener."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import opcheck

from zsl_kernels.weight_uses.compiled import listen

N, T, K, O, V = 2, 3, 4, 5, 7
NOBODY = torch.tensor(-1)


def tensor(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype).requires_grad_()


def cases() -> dict[str, tuple[Any, tuple[Any, ...], Callable[..., Tensor]]]:
    """The op, its arguments, and the call that it stands for, as a function of those."""
    torch.manual_seed(0)
    x, ids, ops = tensor(N, T, K), torch.tensor([[1, 0, 3], [3, 6, 1]]), torch.ops.zsl
    rows, shape = tensor(N * T, K), [N, T, K]
    return {
        "linear": (
            ops.use_product.default,
            (x, tensor(O, K), tensor(O), "linear", NOBODY, shape),
            lambda x, w, b, *_: F.linear(x, w, b),
        ),
        "no bias": (ops.use_product.default, (x, tensor(O, K), None, "linear", NOBODY, shape), lambda x, w, *_: F.linear(x, w)),
        "addmm": (
            ops.use_product.default,
            (rows, tensor(K, O), tensor(O), "addmm", NOBODY, [N * T, K]),
            lambda x, w, b, *_: torch.addmm(b, x, w),
        ),
        "lower": (
            ops.use_product.default,
            (tensor(N, T, K, dtype=torch.bfloat16), tensor(O, K, dtype=torch.float32), None, "linear", NOBODY, shape),
            lambda x, w, *_: F.linear(x, w.to(x.dtype)),
        ),
        "lookup": (ops.use_lookup.default, (ids, tensor(V, K), -1, NOBODY, [N, T]), lambda i, w, *_: F.embedding(i, w)),
        "padded": (ops.use_lookup.default, (ids, tensor(V, K), 3, NOBODY, [N, T]), lambda i, w, *_: F.embedding(i, w, 3)),
        "scale": (ops.use_scale.default, (x, tensor(K), tensor(K), "layer_norm", NOBODY, shape), lambda x, w, b, *_: x * w + b),
        "shift": (ops.use_scale.default, (x, None, tensor(K), "layer_norm", NOBODY, shape), lambda x, w, b, *_: x + b),
        "shared": (ops.use_shared.default, (x, tensor(1, T, K), NOBODY, shape), lambda x, y, *_: x + y),
        "unknown": (ops.use_unknown.default, (tensor(O, K), NOBODY), lambda w, _: w.clone()),
    }


@pytest.mark.parametrize("name", list(cases()))
def test_results_and_gradients_are_those_of_the_call(name: str) -> None:
    op, arguments, call = cases()[name]
    found, expected = op(*arguments), call(*arguments)
    found = found if isinstance(found, Tensor) else found[0]
    torch.testing.assert_close(found, expected)
    inputs = [x for x in arguments if isinstance(x, Tensor) and x.requires_grad]
    grad = torch.randn_like(found)
    torch.testing.assert_close(torch.autograd.grad(found, inputs, grad), torch.autograd.grad(expected, inputs, grad))


@pytest.mark.parametrize("name", list(cases()))
def test_opcheck(name: str) -> None:
    op, arguments, _ = cases()[name]
    opcheck(op, arguments)


class Ear:
    """Notes what it is told, and computes gradients of its own."""

    def __init__(self) -> None:
        self.entered: list[tuple[str, list[Any]]] = []
        self.left: list[int] = []
        self.unknown_weights: list[Tensor] = []

    def enter(self, kind: str, tensors: Any) -> int:
        self.entered.append((kind, [None if x is None else x.shape for x in tensors]))
        return len(self.entered)

    def leave(self, stamp: int, grad: Tensor, saved: Any, wanted: Any) -> tuple[Tensor | None, Tensor | None]:
        self.left.append(stamp)
        return grad.new_full((O, K), 8.0), None

    def unknown(self, weight: Tensor) -> None:
        self.unknown_weights.append(weight)


def test_a_listener_is_told_and_asked() -> None:
    ear = Ear()
    token, x, weight, bias = listen(ear), tensor(N, T, K), tensor(O, K), tensor(O)
    first, second = (torch.ops.zsl.use_product.default(x, weight, bias, "linear", token, [N, T, K])[0] for _ in range(2))
    assert ear.entered == [("linear", [x.shape, weight.shape, bias.shape])] * 2
    second.sum().backward()
    first.sum().backward()
    assert ear.left == [2, 1]
    assert bool((weight.grad == 16).all())
    assert bool((bias.grad == 2 * N * T).all())
    torch.ops.zsl.use_unknown.default(weight, token).sum().backward()
    assert len(ear.unknown_weights) == 1


def test_a_listener_that_is_gone_is_not_missed() -> None:
    ear = Ear()
    token, x, weight = listen(ear), tensor(N, T, K), tensor(O, K)
    y = torch.ops.zsl.use_product.default(x, weight, None, "linear", token, [N, T, K])[0]
    del ear
    y.sum().backward()
    torch.testing.assert_close(weight.grad, x.detach().sum((0, 1)).expand(O, K))
