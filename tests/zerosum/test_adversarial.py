"""The probe where it is easily fooled: odd ways to use a weight, sizes that coincide, rows that wander, and unusual steps.

Each case is a function of (model, x), which stands between two layers and keeps examples apart: the truth is one backward pass for
each.
"""

from __future__ import annotations

import copy
import pickle
import random
import threading
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import zerosum
from tests.zerosum.models import Between, Convolution, Products, Tied, TwoLayers, WeightNormalised, parameter, varied
from tests.zerosum.oracle import PASSES, assert_truth, direction_for, gradients, per_example_gradients, trainable

Middle = Callable[[Any, Tensor], Tensor]
# (N, T) at width 12: all different, all alike, N or T the width, one example, one position.
SIZES = [(3, 6), (12, 12), (12, 4), (4, 12), (1, 6), (3, 1)]


class Case(Between):
    """A matrix (12, 12), a vector (12) and two layers, used by the case."""

    def __init__(self, case: Middle) -> None:
        super().__init__()
        self.case = case
        self.w, self.b = parameter(12, 12), parameter(12)
        self.again, self.post = nn.Linear(12, 12), nn.Linear(12, 12)

    def middle(self, x: Tensor) -> Tensor:
        return self.case(self, x)


def tokens_of(n: int, t: int) -> Tensor:
    return torch.randint(0, 11, (n, t))


def losses_of(output: Tensor) -> Tensor:
    return output.square().flatten(1).mean(1)


def sum_backward(model: nn.Module, tokens: Tensor) -> None:
    losses_of(model(tokens)).sum().backward()


def check(
    model: nn.Module,
    tokens: Tensor,
    *,
    step: Callable[[nn.Module, Tensor], None] = sum_backward,
    losses: Callable[[nn.Module, Tensor], Tensor] = lambda model, tokens: losses_of(model(tokens)),
    refusable: tuple[str, ...] = (),
) -> zerosum.Report:
    """The step's gradients are those of the step without a probe, and every field is the truth. ``refusable``: what may be
    missing."""
    truth, direction = per_example_gradients(losses(model, tokens), model, trainable(model)), direction_for(model)
    step(model, tokens)
    plain = gradients(model)
    probe = zerosum.Probe(model, direction=direction, gram=True)
    how = []
    for _ in range(PASSES):
        model.zero_grad()
        with probe:
            step(model, tokens)
        report = probe.report()
        how.append(report.coverage.covered)
        torch.testing.assert_close(gradients(model), plain, rtol=1e-9, atol=1e-12)
        assert report.num_examples == len(tokens)
        assert_truth(report, truth, direction, refusable=bool(refusable))
        reached = {name for name in report.coverage.not_covered if truth[name].any()}
        assert reached <= set(refusable), report.coverage
    assert how[2] == how[1], "known passes take another way"
    return report


def positive(x: Tensor) -> Tensor:
    """Ids 0 and 1, (N, T)."""
    return (x.detach()[..., 0] > 0).long()


# Ways to use a matrix or a vector.

USES: dict[str, Middle] = {
    "add alpha": lambda m, x: torch.add(x, m.b, alpha=2),
    "weight minus alpha": lambda m, x: torch.sub(m.b, x, alpha=3),
    "rsub": lambda m, x: torch.rsub(m.b, x),
    "lerp": lambda m, x: torch.lerp(x, 2 * x, torch.sigmoid(m.b)),
    "where": lambda m, x: torch.where(x > 0, m.b, x),
    "clamp between weights": lambda m, x: x.clamp(m.b - 1, m.b + 1),
    "elementwise max": lambda m, x: torch.max(x, m.b),
    "hypot": lambda m, x: torch.hypot(x, m.b),
    "power": lambda m, x: x.abs().add(0.1).pow(m.b),
    "number to the power": lambda m, x: 2.0 ** (x * m.b),
    "addcmul": lambda m, x: torch.addcmul(x, x, m.b, value=0.5),
    "addcdiv": lambda m, x: torch.addcdiv(x, m.b, x.exp(), value=2),
    "outer product": lambda m, x: torch.einsum("nt,k->ntk", x.mean(-1), m.b),
    "product of weights": lambda m, x: x + torch.mv(m.w, m.b),
    "matrix times vector": lambda m, x: x * torch.matmul(x, m.b)[..., None],
    "tensordot": lambda m, x: torch.tensordot(x, m.w, dims=([2], [1])),
    "inner": lambda m, x: torch.inner(x, m.w),
    "weight on the left": lambda m, x: (m.w @ x.mT).mT,
    "weight times rows one by one": lambda m, x: torch.stack([m.w @ row for row in x.flatten(0, 1)]).view_as(x),
    "addmm with factors": lambda m, x: torch.addmm(m.b, x.flatten(0, 1), m.w, beta=0.5, alpha=2).view_as(x),
    "baddbmm with factors": lambda m, x: torch.baddbmm(x @ m.w, x, m.w.expand(len(x), 12, 12), beta=0.5, alpha=2),
    "multi_dot": lambda m, x: torch.linalg.multi_dot([x.flatten(0, 1), m.w, m.w]).view_as(x),
    "distances": lambda m, x: torch.cdist(x, m.w),
    "cosine similarity": lambda m, x: x * F.cosine_similarity(x, m.b, dim=-1)[..., None],
    "einsum of three": lambda m, x: torch.einsum("ntk,kl,lo->nto", x, m.w, m.w),
    "einsum by numbers": lambda m, x: torch.einsum(x, [0, 1, 2], m.w, [3, 2], [0, 1, 3]),
    "einsum with an ellipsis": lambda m, x: torch.einsum("...k,ok->...o", x, m.w),
    "glu beside a weight": lambda m, x: F.glu(torch.cat([x, m.b.expand_as(x)], -1)),
    "stacked with a weight": lambda m, x: torch.stack([x, m.b.expand_as(x)]).sum(0),
    "prefix": lambda m, x: torch.cat([m.w[None].expand(len(x), -1, -1), x], 1)[:, : x.shape[1]] + x,
    "repeated prefix": lambda m, x: torch.cat([m.w.repeat(len(x), 1, 1), x], 1)[:, 3 : 3 + x.shape[1]],
    "index_add along positions": lambda m, x: x.index_add(1, torch.tensor([0]), m.b.expand(len(x), 1, 12)),
    "convolution": lambda m, x: F.conv1d(x.mT, m.w[..., None], m.b).mT,
    "transposed convolution": lambda m, x: F.conv_transpose1d(x.mT, m.w[..., None], m.b).mT,
    "convolution of images": lambda m, x: F.conv2d(x.mT[..., None], m.w[..., None, None]).squeeze(-1).mT,
    "unfold and a wider weight": lambda m, x: F.linear(F.unfold(x[:, None], (3, 12), padding=(1, 0)).mT, m.w.repeat(1, 3)),
    "batch_norm in evaluation": lambda m, x: F.batch_norm(x.mT, 0 * m.b.detach(), 0 * m.b.detach() + 1, m.b, m.b).mT,
    "layer_norm over two dimensions": lambda m, x: F.layer_norm(x, x.shape[1:], m.w[: x.shape[1]], m.w[-x.shape[1] :]),
    "prelu over channels": lambda m, x: F.prelu(x.mT, m.b).mT,
    "attention to a weight": lambda m, x: F.scaled_dot_product_attention(x, *[m.w.expand(len(x), 12, 12)] * 2),
    "attention with a weight as mask": lambda m, x: F.scaled_dot_product_attention(
        x, x, x, attn_mask=m.w[: x.shape[1], : x.shape[1]]
    ),
    "embedding with a padding row": lambda m, x: x + F.embedding(positive(x), m.w, padding_idx=1),
    "take": lambda m, x: x + torch.take(m.b, (x > 0).long()),
    "take_along_dim": lambda m, x: x + torch.take_along_dim(m.w[None], (x > 0).long(), 1),
    "gather from an expanded weight": lambda m, x: x + m.w.expand(len(x), 12, 12).gather(1, (x > 0).long()),
    "index_select of flat ids": lambda m, x: x + m.w.index_select(0, positive(x).flatten()).view_as(x),
    "columns by ids": lambda m, x: x + m.w[:, positive(x)].movedim(0, -1),
    "entries by two ids": lambda m, x: x + m.w[positive(x), positive(-x)][..., None],
    "in place": lambda m, x: x.clone().mul_(m.b).add_(m.b).div_(m.b.exp()),
    "halves of both": lambda m, x: sum(F.linear(c, w) for c, w in zip(x.chunk(2, -1), m.w.chunk(2, 1), strict=True)),
    "layer for each position": lambda m, x: torch.stack([F.linear(row, m.w) for row in x.unbind(1)], 1),
    "diagonal and whole": lambda m, x: x * m.w.diagonal() + F.linear(x, m.w),
    "overlapping slices": lambda m, x: (
        F.linear(x, m.w[:8]).repeat(1, 1, 3)[..., :12] + F.linear(x, m.w[4:]).repeat(1, 1, 2)[..., :12]
    ),
    "transposed and reshaped": lambda m, x: F.linear(x, m.w.T.reshape(12, 12)) + x @ m.w.view(6, 24).view(12, 12),
    "straight through": lambda m, x: F.linear(x, m.w + (m.w.round() - m.w).detach()),
    "twice its transpose": lambda m, x: F.linear(x, 2 * m.w.T),
    "twice its transpose, in a product and a table": lambda m, x: x @ (2 * m.w.T) + F.embedding(positive(x), 2 * m.w.T),
    "twice its transpose, by einsum": lambda m, x: torch.einsum("ntk,ok->nto", x, m.w.T * 2),
    "inverse": lambda m, x: F.linear(x, torch.linalg.inv(m.w + 3 * torch.eye(12, dtype=x.dtype))),
    "one row for all outputs": lambda m, x: F.linear(x, m.b.expand(12, 12)),
    "one row for all outputs, by einsum": lambda m, x: torch.einsum("ntk,ok->nto", x, m.b.expand(12, 12)),
    "Toeplitz": lambda m, x: F.linear(x, m.w.flatten()[:23].unfold(0, 12, 1)),
    "overlapping in memory": lambda m, x: F.linear(x, m.w.as_strided((12, 12), (1, 1))),
    "bilinear, expanded": lambda m, x: F.bilinear(x, x, m.w.expand(12, 12, 12)),
    "sequence first, expanded": lambda m, x: torch.bmm(x.transpose(0, 1), m.w.expand(x.shape[1], 12, 12)).transpose(0, 1),
    "rotary, as real numbers": lambda m, x: x * m.b + torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2) * m.w[0],
    "written into a constant": lambda m, x: x * torch.zeros(12, dtype=x.dtype).index_put((torch.arange(12),), m.b),
    "scaled by its own norm, detached": lambda m, x: F.linear(x, m.w / m.w.detach().norm(dim=1, keepdim=True)),
}


@pytest.mark.parametrize(("n", "t"), SIZES)
@pytest.mark.parametrize("use", USES)
def test_a_use_of_a_weight(use: str, n: int, t: int) -> None:
    torch.manual_seed(0)
    check(Case(USES[use]).double(), tokens_of(n, t))


# Functions of a weight alone, whose result a layer uses.

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "matrix_exp": torch.linalg.matrix_exp,
    "cumprod": lambda w: w.cumprod(1),
    "singular values": lambda w: torch.linalg.svdvals(w).diag() @ w,
    "bicubic": lambda w: F.interpolate(w[None, None, :6, :6], size=(12, 12), mode="bicubic")[0, 0],
    "roll and flip": lambda w: w.roll(1, 0).flip(1),
    "convolution with itself": lambda w: F.conv1d(w[None], w[:, :, None])[0],
    "kronecker": lambda w: torch.kron(w[:3, :4], w[:4, :3]),
    "rows by index": lambda w: w[torch.arange(11, -1, -1)],
    "circular padding": lambda w: F.pad(w[None, :, :10], (1, 1), mode="circular")[0],
    "normalized": lambda w: (w - w.mean()) / w.std(),
    "checkpoint": lambda w: checkpoint(torch.tanh, w, use_reentrant=False),
    "gram": lambda w: w @ w.T,
}


@pytest.mark.parametrize(("n", "t"), [(3, 6), (12, 4)])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_function_of_a_weight(function: str, n: int, t: int) -> None:
    torch.manual_seed(0)
    check(Case(lambda m, x: F.linear(x, FUNCTIONS[function](m.w))).double(), tokens_of(n, t))


PARAMETRIZATIONS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight_norm": parametrizations.weight_norm,
    "orthogonal": parametrizations.orthogonal,
    "householder": lambda module: parametrizations.orthogonal(module, orthogonal_map="householder"),
}


@pytest.mark.parametrize("n", [3, 12])
@pytest.mark.parametrize("name", PARAMETRIZATIONS)
def test_a_parametrization(name: str, n: int) -> None:
    torch.manual_seed(0)
    model = Case(lambda m, x: m.again(torch.tanh(x)))
    PARAMETRIZATIONS[name](model.again)
    check(model.double(), tokens_of(n, 5))


@pytest.mark.parametrize("layout", ["transposed", "with gaps", "in a larger storage"])
@pytest.mark.parametrize(
    "use",
    [
        *("inner", "weight on the left", "einsum with an ellipsis", "convolution", "distances"),
        *("overlapping slices", "diagonal and whole"),
    ],
)
def test_a_weight_of_another_memory_layout(use: str, layout: str) -> None:
    torch.manual_seed(0)
    model, memory = Case(USES[use]).double(), torch.randn(24, 24, dtype=torch.float64)
    model.w = nn.Parameter(
        {
            "transposed": memory[:12, :12].clone().T,
            "with gaps": memory[3:15, 2:14],
            "in a larger storage": memory.view(-1)[10:154].view(12, 12),
        }[layout]
    )
    check(model, tokens_of(3, 6))


# Rows that wander and come back.

INNER: dict[str, Middle] = {
    "layer": lambda m, x: torch.tanh(m.again(x)),
    "product": lambda m, x: x @ m.w,
    "einsum": lambda m, x: torch.einsum("...k,ok->...o", x, m.w),
    "scale": lambda m, x: x * m.b,
    "shift": lambda m, x: x + m.b,
    "layer_norm": lambda m, x: F.layer_norm(x, (12,), m.b, m.b),
    "rms_norm": lambda m, x: F.rms_norm(x, (12,), m.b),
    "function of a weight": lambda m, x: F.linear(x, m.w * 2 + 1),
    "heads": lambda m, x: (x.unflatten(-1, (3, 4)) * m.b[:4]).flatten(-2),
}


def flat(f: Middle) -> Middle:
    return lambda m, x: f(m, x.flatten(0, 1)).view_as(x)


def shuffled(f: Middle) -> Middle:
    def run(m: Any, x: Tensor) -> Tensor:
        order = x.detach().flatten(1).sum(1).argsort()
        return f(m, x[order])[order.argsort()]

    return run


def turned(x: Tensor) -> Tensor:
    """An order of ``x`` that is none of its own inverse from three rows on."""
    return torch.arange(len(x)).roll(1)


def written(y: Tensor, order: Tensor, how: str) -> Tensor:
    out = torch.zeros_like(y)
    if how == "write":
        out[order] = y
        return out
    return out.index_add_(0, order, y)


def masked(f: Middle) -> Middle:
    return lambda m, x: torch.zeros_like(x).index_put((positive(x).bool(),), f(m, x[positive(x).bool()]))


WAYS: dict[str, Callable[[Middle], Middle]] = {
    "flat": flat,
    "shuffled": shuffled,
    "shuffled rows": lambda f: flat(shuffled(f)),
    "sequence first": lambda f: lambda m, x: f(m, x.transpose(0, 1)).transpose(0, 1),
    "moveaxis": lambda f: lambda m, x: torch.moveaxis(f(m, torch.moveaxis(x, 1, 0)), 0, 1),
    "two halves of the batch": lambda f: lambda m, x: torch.cat([f(m, x[: len(x) // 2]), f(m, x[len(x) // 2 :])]),
    "example by example": lambda f: lambda m, x: torch.stack([f(m, x[i]) for i in range(len(x))]),
    "slices of one example": lambda f: lambda m, x: torch.cat([f(m, x[i : i + 1]) for i in range(len(x))]),
    "position by position": lambda f: lambda m, x: torch.stack([f(m, x[:, i]) for i in range(x.shape[1])], 1),
    "one more dimension behind": lambda f: lambda m, x: f(m, x.unsqueeze(1)).squeeze(1),
    "each example twice": lambda f: lambda m, x: f(m, x.repeat_interleave(2, 0))[::2],
    "each row twice": lambda f: lambda m, x: f(m, x.flatten(0, 1).repeat_interleave(2, 0)).view(-1, 2, 12).sum(1).view_as(x),
    "masked": masked,
    "reversed": lambda f: lambda m, x: f(m, x.flip(0)).flip(0),
    "rolled": lambda f: lambda m, x: f(m, x.roll(1, 0)).roll(-1, 0),
    "rolled rows": lambda f: flat(lambda m, r: f(m, r.roll(1, 0)).roll(-1, 0)),
    "rows and features reversed": lambda f: flat(lambda m, r: f(m, r.flip(1, 0)).flip(1, 0)),
    "shuffled and transposed": lambda f: lambda m, x: f(m, x[turned(x)].mT.contiguous().mT)[turned(x).argsort()],
    "selected from behind": lambda f: lambda m, x: f(m, x.index_select(-3, turned(x))).index_select(-3, turned(x).argsort()),
    "examples unbound": lambda f: lambda m, x: torch.stack([f(m, y) for y in x.unbind()]),
    "examples iterated": lambda f: lambda m, x: torch.stack([f(m, y) for y in x]),
    "examples selected": lambda f: lambda m, x: torch.stack([f(m, x.select(0, i)) for i in range(len(x))]),
    "examples split": lambda f: lambda m, x: torch.stack([f(m, y.squeeze(0)) for y in x.split(1)]),
    "transposed by einsum": lambda f: lambda m, x: torch.einsum("ntd->tnd", f(m, torch.einsum("ntd->tnd", x))),
    "expanded before": lambda f: lambda m, x: f(m, x.expand(len(x), *x.shape)).mean(0),
    "sequence first, each twice": lambda f: lambda m, x: f(m, x.transpose(0, 1).repeat_interleave(2, 0))[::2].transpose(0, 1),
    "put back by writing": lambda f: flat(lambda m, r: written(f(m, r[turned(r)]), turned(r), "write")),
    "put back by adding": lambda f: flat(lambda m, r: written(f(m, r[turned(r)]), turned(r), "index_add_")),
}


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("way", WAYS)
def test_rows_that_wander_and_come_back(way: str, inner: str) -> None:
    """A use, then another one another way, at sizes that coincide and sizes that do not."""
    draw = random.Random(f"{way}, {inner}")
    first, second = WAYS[way](INNER[inner]), WAYS[draw.choice(sorted(WAYS))](INNER[draw.choice(sorted(INNER))])
    n, t = draw.choice([(3, 6), (4, 4), (12, 12), (12, 3), (2, 2), (1, 4), (4, 1), (6, 2)])
    torch.manual_seed(0)
    check(Case(lambda m, x: second(m, x + first(m, x))).double(), tokens_of(n, t))


# Examples that meet before the loss: the weights that their rows feed are refused, and no others.


def layer(m: Any, x: Tensor) -> Tensor:
    return torch.tanh(m.again(x))


def neighbours(x: Tensor) -> Tensor:
    """(N, N): each example and the next."""
    return torch.eye(len(x), dtype=x.dtype) + torch.eye(len(x), dtype=x.dtype).roll(1, 0)


MEETINGS: dict[str, Middle] = {
    "the one before": lambda m, x: x + layer(m, x.roll(1, 0)),
    "memory": lambda m, x: x + layer(m, torch.cat([torch.zeros_like(x[:1]), x[:-1]])),
    "reversed for good": lambda m, x: layer(m, x).flip(0),
    "centred": lambda m, x: layer(m, x - x.mean(0)),
    "centred, dimension kept": lambda m, x: layer(m, x - x.mean(0, keepdim=True)),
    "cumulated": lambda m, x: layer(m, x.cumsum(0)),
    "cumulated by aten": lambda m, x: layer(m, torch.ops.aten.cumsum(x, 0)),
    "softmax": lambda m, x: layer(m, x.softmax(0)),
    "sorted": lambda m, x: layer(m, x.sort(0)[0]),
    "pooled gram": lambda m, x: x + layer(m, x.mean(1) @ x.mean(1).T @ x.mean(1))[:, None],
    "graph": lambda m, x: x + torch.einsum("nm,mtk->ntk", neighbours(x), layer(m, x)),
    "graph and a weight": lambda m, x: x + torch.einsum("nm,mtk,kl->ntl", neighbours(x), layer(m, x), m.w),
    "graph on the left": lambda m, x: x + layer(m, (neighbours(x) @ x.flatten(1)).view_as(x)),
    "graph on the left of sequences": lambda m, x: x + layer(m, torch.matmul(neighbours(x), x.transpose(0, 1)).transpose(0, 1)),
    "graph on the left of batches": lambda m, x: (
        x + layer(m, torch.bmm(neighbours(x).expand(x.shape[1], -1, -1), x.transpose(0, 1)).transpose(0, 1))
    ),
    "graph as a layer": lambda m, x: x + layer(m, F.linear(x.flatten(1).T, neighbours(x)).T.reshape(x.shape)),
    "Fourier": lambda m, x: x + layer(m, torch.fft.fft(x, dim=0).real),
    "in a reentrant checkpoint": lambda m, x: checkpoint(lambda y: layer(m, y).cumsum(0), x, use_reentrant=True),
    "in a reentrant checkpoint, before the layer": lambda m, x: checkpoint(
        lambda y: layer(m, y - y.mean(0)), x, use_reentrant=True
    ),
    "sparse graph": lambda m, x: x + layer(m, torch.sparse.mm(neighbours(x).to_sparse(), x.flatten(1)).view_as(x)),
    "mixup": lambda m, x: layer(m, 0.7 * x + 0.3 * x[turned(x)]),
    "pairs": lambda m, x: x + layer(m, x * x[turned(x)]),
    "prototype": lambda m, x: x + layer(m, x - x[0]),
    "prototype, dimension kept": lambda m, x: x + layer(m, x - x[:1]),
    "one example times data": lambda m, x: x + layer(m, x[0] * x.detach()),
    "attention over examples": lambda m, x: layer(m, F.scaled_dot_product_attention(*[x.transpose(0, 1)] * 3)).transpose(0, 1),
    "batch_norm without weights": lambda m, x: layer(m, F.batch_norm(x.mT, None, None, training=True).mT),
    "rows centred": flat(lambda m, r: layer(m, r - r.mean(0))),
    "rows centred, the mean first": flat(lambda m, r: layer(m, -r.mean(0) + r)),
    "rows normalized": flat(lambda m, r: layer(m, F.normalize(r, 1, 0))),
    "behind the last use": lambda m, x: x + layer(m, x) + x.flatten(0, 1).cumsum(0).view_as(x),
    "as many copies as examples": lambda m, x: (
        x + layer(m, x.mean(1).repeat_interleave(torch.tensor([2, 0] + [1] * (len(x) - 2)), 0))[:, None]
    ),
    "in a checkpoint": lambda m, x: checkpoint(lambda y: layer(m, y - y.mean(0)), x, use_reentrant=False),
    "in a module of its own": lambda m, x: x + nn.BatchNorm1d(12, affine=False, dtype=x.dtype)(m.again(x).mT).mT,
}


@pytest.mark.parametrize(("n", "t"), [(3, 6), (4, 4)])
@pytest.mark.parametrize("meeting", MEETINGS)
def test_examples_that_meet_in_the_model_are_refused(meeting: str, n: int, t: int) -> None:
    """What is reported is the gradient of each example's own loss, and a refusal comes with a warning."""
    torch.manual_seed(0)
    model, tokens = Case(MEETINGS[meeting]).double(), tokens_of(n, t)
    reentrant = "reentrant" in meeting  # torch.autograd.grad, and so the truth, cannot be had through such a checkpoint
    truth = {} if reentrant else per_example_gradients(losses_of(model(tokens)), model, trainable(model))
    sum_backward(model, tokens)
    plain = gradients(model)
    model.zero_grad()
    direction, probe = direction_for(model), None
    probe = zerosum.Probe(model, direction=direction, gram=True)
    with warnings.catch_warnings(record=True) as caught, probe:
        warnings.simplefilter("always")
        sum_backward(model, tokens)
    eps = torch.finfo(next(iter(plain.values())).dtype).eps
    torch.testing.assert_close(gradients(model), plain, rtol=16 * eps, atol=16 * eps)
    report = probe.report()
    refused = {name for name, reason in report.coverage.not_covered.items() if "coupled before the loss" in reason}
    assert any("coupled before the loss" in str(warning.message) for warning in caught) == bool(refused)
    assert "head.weight" in report
    if reentrant:
        assert {"embedding.weight", "first.weight", "first.bias"} <= refused
    else:
        assert_truth(report, truth, direction, refusable=True)
        assert set(report.coverage.not_covered) - refused <= {"w", "b", "post.weight", "post.bias"}  # which are not used


def in_batch_contrast(m: nn.Module, tokens: Tensor) -> Tensor:
    z = F.normalize(m(tokens).mean(1), dim=-1)
    return F.cross_entropy(z @ z.T, torch.arange(len(z)), reduction="sum")


JOINT_LOSSES: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "contrast": in_batch_contrast,
    "weights of all losses": lambda m, tokens: (losses_of(m(tokens)) * losses_of(m(tokens)).softmax(0)).sum(),
    "logsumexp": lambda m, tokens: losses_of(m(tokens)).logsumexp(0),
    "variance": lambda m, tokens: losses_of(m(tokens)).var(),
    "root of the sum": lambda m, tokens: losses_of(m(tokens)).sum().sqrt(),
    "square of the sum": lambda m, tokens: losses_of(m(tokens)).sum() ** 2,
    "product of sums": lambda m, tokens: losses_of(m(tokens)).sum() * losses_of(m(tokens)).mean(),
    "norm of all": lambda m, tokens: m(tokens).norm(),
    "distances": lambda m, tokens: torch.cdist(m(tokens).flatten(1), m(tokens).flatten(1)).sum(),
    "differences": lambda m, tokens: (m(tokens)[:, None] - m(tokens)[None]).square().sum(),
}


@pytest.mark.parametrize("loss", JOINT_LOSSES)
def test_a_loss_of_the_examples_together_is_refused(loss: str) -> None:
    torch.manual_seed(0)
    assert_coupled(TwoLayers().double(), tokens_of(3, 6), lambda m, tokens: JOINT_LOSSES[loss](m, tokens).backward())


def assert_coupled(model: nn.Module, tokens: Tensor, step: Callable[[nn.Module, Tensor], None] = sum_backward) -> None:
    """The step runs as ever, a warning says what happened, and nothing is reported."""
    step(model, tokens)
    plain = gradients(model)
    model.zero_grad()
    probe = zerosum.Probe(model, direction=direction_for(model), gram=True)
    with pytest.warns(UserWarning, match="the examples are coupled before the loss"), probe:
        step(model, tokens)
    eps = torch.finfo(next(iter(plain.values())).dtype).eps
    torch.testing.assert_close(gradients(model), plain, rtol=16 * eps, atol=16 * eps)
    assert not probe.report().coverage.covered


PICKED: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "the largest": (lambda losses: losses.max(), lambda losses: (losses == losses.max()).double()),
    "the hardest": (lambda losses: losses.topk(2)[0].sum(), lambda losses: (losses >= losses.topk(2)[0][-1]).double()),
}


@pytest.mark.parametrize("pick", PICKED)
def test_a_loss_of_some_examples_alone_is_theirs(pick: str) -> None:
    """The others have weight 0, and those that count have mean weight 1."""
    torch.manual_seed(0)
    model, tokens = TwoLayers().double(), tokens_of(3, 6)
    total, weights = PICKED[pick]
    losses = losses_of(model(tokens))
    truth = per_example_gradients(losses * weights(losses.detach()), model, trainable(model))
    with (probe := zerosum.Probe(model, gram=True)):
        total(losses_of(model(tokens))).backward()
    assert_truth(probe.report(), truth)


class Experts(Between):
    """Three experts and a layer behind them, which shows where the rows are after they were sent."""

    def __init__(self, send: Middle) -> None:
        super().__init__()
        self.send = send
        self.experts, self.behind = nn.ModuleList(nn.Linear(12, 12) for _ in range(3)), nn.Linear(12, 12)

    def middle(self, x: Tensor) -> Tensor:
        return self.behind(self.send(self, x))


def chosen(rows: Tensor) -> Tensor:
    return (rows.detach()[..., 0] * 5).floor().long() % 3


def by_sorting(m: Experts, x: Tensor) -> Tensor:
    rows = x.flatten(0, 1)
    order, counts = chosen(rows).argsort(stable=True), chosen(rows).bincount(minlength=3).tolist()
    parts = zip(m.experts, rows[order].split(counts), strict=True)
    return torch.cat([torch.tanh(e(part)) for e, part in parts])[order.argsort()].view_as(x)


def by_writing(m: Experts, x: Tensor) -> Tensor:
    rows = x.flatten(0, 1)
    out, choice = torch.zeros_like(rows), chosen(rows)
    for k, e in enumerate(m.experts):
        mine = (choice == k).nonzero()[:, 0]
        out[mine] = torch.tanh(e(rows[mine]))
    return out.view_as(x)


def by_pairs(m: Experts, x: Tensor) -> Tensor:
    out, choice = torch.zeros_like(x), chosen(x)
    for k, e in enumerate(m.experts):
        i, j = torch.where(choice == k)
        out[i, j] += e(x[i, j])
    return out


@pytest.mark.parametrize(("n", "t"), [(3, 6), (4, 4)])
@pytest.mark.parametrize("send", [by_sorting, by_writing, by_pairs])
def test_rows_that_are_sent_to_experts(send: Middle, n: int, t: int) -> None:
    torch.manual_seed(0)
    check(Experts(send).double(), tokens_of(n, t))


class Torchs(Between):
    """torch's own attention, transformer and recurrent modules."""

    def __init__(self, kind: str, batch_first: bool) -> None:
        super().__init__()
        self.batch_first = batch_first
        if kind == "attention":
            self.inner: nn.Module = nn.MultiheadAttention(12, 4, batch_first=batch_first)
        elif kind == "transformer":
            self.inner = nn.Transformer(12, 4, 1, 1, 16, dropout=0.0, batch_first=batch_first)
        else:
            self.inner = getattr(nn, kind)(12, 12, batch_first=batch_first)

    def middle(self, x: Tensor) -> Tensor:
        y = x if self.batch_first else x.transpose(0, 1)
        if isinstance(self.inner, nn.MultiheadAttention):
            y = self.inner(y, y, y, attn_mask=torch.ones(x.shape[1], x.shape[1]).triu(1).bool(), need_weights=False)[0]
        elif isinstance(self.inner, nn.Transformer):
            y = self.inner(y, 2 * y, tgt_mask=nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype))
        else:
            y = self.inner(y)[0]
        return y if self.batch_first else y.transpose(0, 1)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize(("n", "t"), [(3, 6), (4, 4)])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kind", ["attention", "transformer", "GRU", "LSTM"])
def test_torchs_own_modules(kind: str, batch_first: bool, n: int, t: int) -> None:
    torch.manual_seed(0)
    check(Torchs(kind, batch_first).double(), tokens_of(n, t))


# Steps.


def by_grad(model: nn.Module, tokens: Tensor) -> None:
    names, parameters = zip(*model.named_parameters(), strict=True)
    for name, g in zip(names, torch.autograd.grad(losses_of(model(tokens)).sum(), parameters), strict=True):
        model.get_parameter(name).grad = g


def by_the_engine(model: nn.Module, tokens: Tensor) -> None:
    losses = losses_of(model(tokens))
    torch.autograd.backward(losses, torch.ones_like(losses))


def by_functional_call(model: nn.Module, tokens: Tensor) -> None:
    losses_of(torch.func.functional_call(model, dict(model.named_parameters()), (tokens,))).sum().backward()


def with_saved_tensors_packed(model: nn.Module, tokens: Tensor) -> None:
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda x: x):
        sum_backward(model, tokens)


def beside_a_thread(model: nn.Module, tokens: Tensor) -> None:
    losses = losses_of(model(tokens))
    in_a_thread(lambda: model(tokens_of(5, 7)))
    losses.sum().backward()


def with_an_optimizer(model: nn.Module, tokens: Tensor) -> None:
    sum_backward(model, tokens)
    torch.optim.SGD(model.parameters(), lr=0.0).step()


def after_a_threads_forward(model: nn.Module, tokens: Tensor) -> None:
    in_a_thread(lambda: model(tokens_of(5, 7)))
    sum_backward(model, tokens)


def backward_in_a_thread(model: nn.Module, tokens: Tensor) -> None:
    in_a_thread(losses_of(model(tokens)).sum().backward)


def in_a_thread(call: Callable[[], Any]) -> None:
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()


def after_another_batch_is_thrown_away(model: nn.Module, tokens: Tensor) -> None:
    model(tokens[:2])
    model.eval()(tokens[:1])
    sum_backward(model.train(), tokens)


def with_another_backward_between(model: nn.Module, tokens: Tensor) -> None:
    losses, other = losses_of(model(tokens)), torch.ones(2, requires_grad=True)
    other.sum().backward()
    torch.autograd.grad(other.sum(), other)
    losses.sum().backward()


def with_the_gradient_of_an_activation_before(model: nn.Module, tokens: Tensor) -> None:
    kept: list[Tensor] = []
    handle = model.head.register_forward_pre_hook(lambda module, args: kept.append(args[0]))
    loss = losses_of(model(tokens)).sum()
    handle.remove()
    torch.autograd.grad(loss, kept, retain_graph=True)
    loss.backward()


def in_two_parts(model: nn.Module, tokens: Tensor) -> None:
    loss, parameters = losses_of(model(tokens)).sum(), list(model.parameters())
    loss.backward(inputs=parameters[:1], retain_graph=True)
    loss.backward(inputs=parameters[1:])


def beside_functional_transforms(model: nn.Module, tokens: Tensor) -> None:
    def loss(parameters: dict[str, Tensor], tokens: Tensor) -> Tensor:
        return losses_of(torch.func.functional_call(model, parameters, (tokens,))).sum()

    parameters = {name: p.detach() for name, p in model.named_parameters()}
    torch.func.grad(loss)(dict(model.named_parameters()), tokens)
    torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, tokens[:, None])
    sum_backward(model, tokens)


def beside_forward_mode(model: nn.Module, tokens: Tensor) -> None:
    with torch.autograd.forward_ad.dual_level():
        x = torch.ones(2, 3, model.head.in_features, dtype=torch.float64)
        model.head(torch.autograd.forward_ad.make_dual(x, 2 * x))
    sum_backward(model, tokens)


def beside_copies(model: nn.Module, tokens: Tensor) -> None:
    """A teacher, and an average of the weights."""
    teacher, average = copy.deepcopy(model), torch.optim.swa_utils.AveragedModel(model)
    (losses_of(model(tokens)) + 0 * losses_of(teacher(tokens)).detach()).sum().backward()
    average.update_parameters(model)
    losses_of(average(tokens)).sum().backward()


def in_a_wrapper(model: nn.Module, tokens: Tensor) -> None:
    losses_of(nn.DataParallel(model)(tokens)).sum().backward()


STEPS = [
    *(by_grad, by_the_engine, by_functional_call, with_saved_tensors_packed, beside_a_thread, with_an_optimizer),
    *(after_a_threads_forward, after_another_batch_is_thrown_away, with_another_backward_between),
    *(with_the_gradient_of_an_activation_before, in_two_parts, beside_functional_transforms, beside_forward_mode, beside_copies),
    in_a_wrapper,
]


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch's own, of forward mode
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("kind", [TwoLayers, Tied, Products, Convolution, WeightNormalised])
def test_an_unusual_step(kind: type[TwoLayers], step: Callable[[nn.Module, Tensor], None]) -> None:
    torch.manual_seed(0)
    check(kind().double(), tokens_of(3, 6), step=step)


def test_a_backward_pass_in_another_thread_is_not_seen() -> None:
    torch.manual_seed(0)
    model, tokens = TwoLayers().double(), tokens_of(3, 6)
    backward_in_a_thread(model, tokens)
    plain = gradients(model)
    model.zero_grad()
    with (probe := zerosum.Probe(model)):
        backward_in_a_thread(model, tokens)
    torch.testing.assert_close(gradients(model), plain, rtol=1e-12, atol=1e-14)
    assert all("another thread" in reason for reason in probe.report().coverage.not_covered.values())
    assert not probe.report().coverage.covered


class Block(Between):
    """Convolution, ReLU in place and a norm written to: what a fallback returns may be modified."""

    def __init__(self, in_checkpoint: bool) -> None:
        super().__init__()
        self.in_checkpoint = in_checkpoint
        self.convolution = nn.Sequential(nn.Conv1d(12, 12, 3, padding=1), nn.ReLU(inplace=True))
        self.norm = varied(nn.LayerNorm(12))

    def middle(self, x: Tensor) -> Tensor:
        if not self.in_checkpoint:
            return self.norm(self.convolution(x.mT).mT).mul_(2)
        return checkpoint(lambda y: self.norm(self.convolution(y.mT).mT), x, use_reentrant=False)


@pytest.mark.parametrize("in_checkpoint", [False, True])
def test_a_fallback_in_a_checkpoint_or_before_an_operation_in_place(in_checkpoint: bool) -> None:
    torch.manual_seed(0)
    check(Block(in_checkpoint).double(), tokens_of(3, 6))


class Product(nn.Module):
    """x wᵀ by a function that no mode sees. Keeps a list, a counter and a moving average of what it was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.kept, self.calls = parameter(12, 12), [], 0
        self.register_buffer("average", torch.zeros(12))

    def forward(self, x: Tensor) -> Tensor:
        y = Hidden.apply(x, self.weight, 1.0)
        self.kept.clear()
        self.kept.append(y)
        self.calls += 1
        self.average.mul_(0.9).add_(x.detach().mean((0, 1)), alpha=0.1)
        return y


def test_a_module_that_is_run_again_keeps_what_the_real_call_left_in_it() -> None:
    torch.manual_seed(0)
    model, tokens = Case(lambda m, x: m.again(x)).double(), tokens_of(3, 6)
    model.again = Product().double()

    check(model, tokens)
    assert (len(model.again.kept), model.again.calls) == (1, 2 + PASSES)
    assert len(model.again.kept[0]) == len(tokens)


@pytest.mark.parametrize("make", [torch.LongTensor, lambda ids: torch.from_numpy(np.array(ids))])
@pytest.mark.parametrize("n", [3, 4])
def test_positions_that_are_made_where_no_mode_sees(n: int, make: Callable[[list[int]], Tensor]) -> None:
    torch.manual_seed(0)
    check(Case(lambda m, x: torch.tanh(m.again(x + F.embedding(make([0, 1, 2, 3]), m.w)))).double(), tokens_of(n, 4))


class Batches(TwoLayers):
    """Takes its tokens in a dictionary and flattens them at once."""

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        x = self.head(torch.tanh(self.first(self.embedding(batch["tokens"].flatten()))))
        return x.view(*batch["tokens"].shape, -1)


def test_inputs_in_a_dictionary() -> None:
    torch.manual_seed(0)
    model, tokens = Batches().double(), tokens_of(3, 6)
    truth = per_example_gradients(losses_of(model({"tokens": tokens})), model, trainable(model))
    with (probe := zerosum.Probe(model, gram=True)):
        losses_of(model({"tokens": tokens})).sum().backward()
    assert_truth(probe.report(), truth)


@pytest.mark.parametrize(("n", "t"), [(0, 6), (3, 0)])
@pytest.mark.parametrize("kind", [TwoLayers, Tied])
def test_a_batch_of_nothing(kind: type[TwoLayers], n: int, t: int) -> None:
    model = kind().double()
    with (probe := zerosum.Probe(model, gram=True)):
        model(tokens_of(n, t)).square().sum().backward()
    report = probe.report()
    assert report.num_examples == n
    assert all(not report[name].abs_sum.any() and report[name].l1.shape == (n,) for name in report)


def test_gradients_that_are_clipped_or_hooked_in_the_block() -> None:
    """What shares memory with them says so when it is read; the rest is the truth of the step as it was."""
    torch.manual_seed(0)
    model, tokens = TwoLayers().double(), tokens_of(3, 6)
    truth = per_example_gradients(losses_of(model(tokens)), model, trainable(model))
    with (probe := zerosum.Probe(model)):
        sum_backward(model, tokens)
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    report = probe.report()
    for name, g in truth.items():
        torch.testing.assert_close(report[name].abs_sum, g.abs().sum(0), rtol=1e-9, atol=0)
    with pytest.raises(RuntimeError, match=r"head\.weight.*modified in place"):
        _ = report["head.weight"].grad_sum


def test_a_backward_pass_that_failed_is_not_counted() -> None:
    torch.manual_seed(0)

    def step(model: nn.Module, tokens: Tensor) -> None:
        output = model(tokens)
        handle = model.embedding.weight.register_hook(lambda grad: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            losses_of(output).sum().backward()
        handle.remove()
        model.zero_grad()
        sum_backward(model, tokens)

    model, tokens = TwoLayers().double(), tokens_of(3, 6)
    truth = per_example_gradients(losses_of(model(tokens)), model, trainable(model))
    with (probe := zerosum.Probe(model, gram=True)):
        step(model, tokens)
    assert_truth(probe.report(), truth, refusable=True)
    assert set(probe.report().coverage.not_covered.values()) <= {"a backward pass raised an error before it ended"}


@pytest.mark.parametrize("kind", [TwoLayers, Tied])
def test_a_model_can_be_pickled_in_the_block(kind: type[TwoLayers]) -> None:
    torch.manual_seed(0)
    model, tokens = kind().double(), tokens_of(3, 6)
    truth = per_example_gradients(losses_of(model(tokens)), model, trainable(model))
    with (probe := zerosum.Probe(model, gram=True)):
        losses = losses_of(model(tokens))
        again = pickle.loads(pickle.dumps(model))
        losses.sum().backward()
    assert_truth(probe.report(), truth)
    sum_backward(again, tokens)
    torch.testing.assert_close(gradients(again), gradients(model), rtol=1e-9, atol=1e-12)


def test_two_forward_passes_of_one_loss() -> None:
    """A pair of inputs for each example: its gradient is the sum over both."""
    torch.manual_seed(0)
    for kind in (TwoLayers, Tied, WeightNormalised):
        model = kind().double()

        def losses(model: nn.Module, tokens: Tensor) -> Tensor:
            return (losses_of(model(tokens)) - losses_of(model((tokens + 1) % 11))).square()

        check(model, tokens_of(3, 6), losses=losses, step=lambda model, tokens: losses(model, tokens).sum().backward())


@pytest.mark.parametrize("lost", ["forward", "backward", "after backward"])
def test_a_probe_can_be_used_again_after_an_exception(lost: str) -> None:
    torch.manual_seed(0)
    model, tokens = Products().double(), tokens_of(3, 6)
    truth, probe = per_example_gradients(losses_of(model(tokens)), model, trainable(model)), zerosum.Probe(model, gram=True)

    def fail() -> None:
        with probe:
            output = model(tokens)
            if lost == "backward":
                output.register_hook(lambda grad: 1 // 0)
            if lost != "forward":
                losses_of(output).sum().backward()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    model.zero_grad()
    with probe:
        sum_backward(model, tokens)
    assert_truth(probe.report(), truth)
    assert all(p._backward_hooks is None for p in model.parameters())


class Checkpoints(Between):
    """A checkpoint in a checkpoint, with a norm, a function of weights, and a layer that is used outside too."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Linear(12, 12), varied(nn.LayerNorm(12))
        self.b = parametrizations.weight_norm(nn.Linear(12, 12))

    def middle(self, x: Tensor) -> Tensor:
        def inner(y: Tensor) -> Tensor:
            return torch.tanh(self.b(self.norm(y)))

        def outer(y: Tensor) -> Tensor:
            return torch.sin(checkpoint(inner, torch.tanh(self.a(y)), use_reentrant=False))

        return checkpoint(outer, x, use_reentrant=False) + self.a(x)


@pytest.mark.parametrize(("n", "t"), [(3, 6), (4, 4)])
def test_a_checkpoint_in_a_checkpoint(n: int, t: int) -> None:
    torch.manual_seed(0)
    check(Checkpoints().double(), tokens_of(n, t))


@pytest.mark.parametrize("kind", [TwoLayers, Tied, Products, Convolution])
def test_denominators_micro_batches_and_a_scaler_at_once(kind: type[TwoLayers]) -> None:
    torch.manual_seed(0)
    model, tokens = kind().double(), tokens_of(5, 6)
    denominators = torch.tensor([1.0, 2.0, 5.0, 0.5, 3.0], dtype=torch.float64)
    truth, direction = per_example_gradients(losses_of(model(tokens)), model, trainable(model)), direction_for(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    probe = zerosum.Probe(model, direction=direction, gram=True, loss_reduction=denominators, grad_scaler=scaler)
    with probe:
        for part in (slice(0, 2), slice(2, 5)):
            scaler.scale((losses_of(model(tokens[part])) / denominators[part]).sum()).backward()
    known = torch.block_diag(torch.ones(2, 2), torch.ones(3, 3)).bool()
    assert_truth(probe.report(), truth, direction, gram=known)


# What the probe cannot see.


class Hidden(torch.autograd.Function):
    """x + c·x wᵀ by a function of its own, which no mode sees."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, c: float) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.c = c
        return x + c * (x @ w.T)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, w = ctx.saved_tensors
        return grad + ctx.c * (grad @ w), ctx.c * (grad.flatten(0, 1).T @ x.flatten(0, 1)), None


@pytest.mark.parametrize("size", [1.0, 1e-3])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("use", ["inner", "einsum with an ellipsis", "straight through", "twice its transpose"])
def test_a_hidden_use_beside_one_that_is_seen_is_measured(use: str, first: bool, size: float) -> None:
    torch.manual_seed(0)
    seen = USES[use]
    model = Case(lambda m, x: seen(m, Hidden.apply(x, m.w, size)) if first else Hidden.apply(seen(m, x), m.w, size)).double()
    report = check(model, tokens_of(3, 6))
    assert report.coverage.covered["w"].endswith("the loss, differentiated again for each example")


def test_a_complex_weight_is_refused_by_name() -> None:
    torch.manual_seed(0)
    model = Case(lambda m, x: torch.view_as_real(F.linear(torch.view_as_complex(x.unflatten(-1, (6, 2))), m.c)).flatten(-2))
    model.c = nn.Parameter(torch.randn(6, 6, dtype=torch.complex64))
    with (probe := zerosum.Probe(model, direction=direction_for(model), gram=True)):
        sum_backward(model, tokens_of(3, 6))
    report = probe.report()
    assert "complex" in report.coverage.not_covered["c"]
    assert "head.weight" in report


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_hidden_use_is_measured_in_low_precision_too(dtype: torch.dtype, first: bool) -> None:
    torch.manual_seed(0)
    model = Case(lambda m, x: F.linear(Hidden.apply(x, m.w, 1.0), m.w) if first else Hidden.apply(F.linear(x, m.w), m.w, 1.0))
    model, tokens = model.to(dtype), tokens_of(3, 6)
    truth = per_example_gradients(losses_of(model(tokens)), model, ["w"])
    with (probe := zerosum.Probe(model)):
        sum_backward(model, tokens)
    torch.testing.assert_close(
        probe.report()["w"].abs_sum, truth["w"].float().abs().sum(0), rtol=4 * torch.finfo(dtype).eps, atol=0
    )


WITHOUT_RULES: dict[str, Middle] = {
    "pairs as complex numbers": lambda m, x: torch.view_as_real(
        torch.view_as_complex(x.unflatten(-1, (6, 2))) * torch.view_as_complex(m.w[:6, :2])
    ).flatten(-2),
    "filter": lambda m, x: torch.fft.irfft(torch.fft.rfft(x) * torch.fft.rfft(m.w[0]), n=12),
    "real and imaginary parts": lambda m, x: torch.view_as_real(
        torch.view_as_complex(x.unflatten(-1, (6, 2))) * torch.complex(m.w[0, :6], m.w[1, :6])
    ).flatten(-2),
    "several results": lambda m, x: F.linear(x, m.w.sort(1)[0]),
}


@pytest.mark.parametrize("n", [3, 12])
@pytest.mark.parametrize("use", WITHOUT_RULES)
def test_functions_of_weights_without_a_rule(use: str, n: int) -> None:
    """Complex numbers, several results: the whole loss is differentiated for each example."""
    torch.manual_seed(0)
    check(Case(WITHOUT_RULES[use]).double(), tokens_of(n, 5))


def test_a_mixing_vector_that_is_not_a_weight_is_no_obstacle() -> None:
    """Inputs standardized over the batch: what depends on no weight may mix examples."""
    torch.manual_seed(0)

    class Standardized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.layer((x - x.mean((0, 1))) / x.std((0, 1))))

    check(Standardized().double(), torch.randn(3, 6, 8, dtype=torch.float64))
