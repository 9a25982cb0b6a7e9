"""Fused norms of a GPU, whose derivatives torch cannot vectorize: token passes take derivatives of their own.

There is no fused kernel on a CPU. One that behaves like it, a derivative that warns under vmap and runs once for each example,
stands in for it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import zerosum
from tests.zerosum.oracle import error
from tests.zerosum.test_tokens import VOCAB, Mixing, Norms, assert_exact, batch, cross_entropies, gpt, small, squares
from tests.zerosum.transformers_models import ARCHITECTURES
from zerosum.probe.rules.norm import rms_norm_by_parts
from zerosum.training.model import token_losses

SLOW = "There is a performance drop because we have not yet implemented the batching rule for aten::_fused_rms_norm_backward"
rms_norm = torch.rms_norm


class Fused(torch.autograd.Function):
    """RMSNorm with a derivative that cannot be vectorized."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: Sequence[int], weight: Tensor | None, eps: float | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.shape, ctx.eps = shape, eps
        return rms_norm(x, shape, weight, eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch._C._functorch.is_batchedtensor(grad):
            warnings.warn(SLOW, UserWarning, stacklevel=2)
        x, weight = ctx.saved_tensors
        with torch.enable_grad():
            inputs = [y if y is None else y.detach().requires_grad_() for y in (x, weight)]
            y = rms_norm_by_parts(inputs[0], ctx.shape, inputs[1], ctx.eps)
            found = iter(torch.autograd.grad(y, [z for z in inputs if z is not None], grad))
        grads = [None if z is None else next(found) for z in inputs]
        return grads[0], None, grads[1], None


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Where F.rms_norm is fused, and a derivative that is not vectorized an error."""

    def rms_norm(input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None) -> Tensor:
        return Fused.apply(input, normalized_shape, weight, eps)

    monkeypatch.setattr(torch, "rms_norm", rms_norm)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "There is a performance drop", UserWarning)
        yield


class Bare(Mixing):
    """Norms without weights, and with a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        self.scaled = nn.RMSNorm(12)
        self.scaled.weight.requires_grad_(False).normal_()

    def middle(self, x: Tensor) -> Tensor:
        return super().middle(self.scaled(F.rms_norm(x, (12,), eps=1e-4)))


class TorchNorms(Norms):
    """The same from torch.nn, behind the mixing too."""

    def middle(self, x: Tensor) -> Tensor:
        return self.rms(super().middle(self.rms(x)))


def llama() -> nn.Module:
    return next(a for a in ARCHITECTURES if a.name == "llama-sdpa").model(torch.float64)


CASES: dict[str, tuple[Callable[[], nn.Module], Any, int]] = {
    "own": (gpt, token_losses, VOCAB),
    "llama": (llama, cross_entropies, VOCAB),
    "weights": (lambda: small(Norms), squares, 11),
    "on both sides": (lambda: small(TorchNorms), squares, 11),
    "without weights": (lambda: small(Bare), squares, 11),
}


@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("sample", [None, 8])
def test_no_derivative_runs_once_for_each_example(name: str, sample: int | None) -> None:
    kind, losses, vocab = CASES[name]
    model, (x, y) = kind(), batch(2, 6, vocab)
    if sample is None:
        assert_exact(model, x, y, losses, rtol=1e-6 if name == "llama" else 1e-9)  # its variances are in float32
    else:
        zerosum.token_report(model, x, y, losses=losses, sample=sample)


@pytest.mark.usefixtures("fused")
def test_the_stand_in_does_not_vectorize() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    y = F.rms_norm(x, (4,))
    with pytest.raises(UserWarning, match="performance drop"):
        torch.func.vmap(lambda g: torch.autograd.grad(y, x, g)[0])(torch.randn(2, 3, 4))


@pytest.mark.parametrize("eps", [None, 1e-3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(8,), (6, 8)])
def test_the_parts_are_the_whole(shape: tuple[int, ...], dtype: torch.dtype, eps: float | None) -> None:
    """Values and gradients, to the bit: where torch has no fused kernel it does the same."""
    torch.manual_seed(0)
    x, weight, g = (1e-3 * torch.randn(4, 6, 8)).to(dtype), torch.randn(shape).to(dtype), torch.randn(4, 6, 8).to(dtype)
    found = []
    for function in (F.rms_norm, rms_norm_by_parts):
        for w in (None, weight):
            inputs = [y.clone().requires_grad_() for y in (x, w) if y is not None]
            y = function(inputs[0], shape, *inputs[1:], eps=eps)
            assert y.dtype == dtype
            found.append([y, *torch.autograd.grad(y, inputs, g)])
    for theirs, ours in zip(found[:2], found[2:], strict=True):
        for a, b in zip(theirs, ours, strict=True):
            assert error(b.double(), a.double()) <= 2 * torch.finfo(dtype).eps


def test_under_autocast_the_result_is_of_the_same_dtype() -> None:
    def losses(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return token_losses(model, x, y).float()

    model, (x, y) = gpt(torch.float32), batch(2, 6, VOCAB)
    report = zerosum.token_report(model, x, y, losses=losses)
    assert report.coverage.share == 1
