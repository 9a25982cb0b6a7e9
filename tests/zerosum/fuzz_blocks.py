"""Blocks of which :mod:`tests.zerosum.fuzz` composes random models: (N, T, W) in, (N, T', W) out.

``BLOCKS`` keep the examples apart and the shape; ``RESHAPING`` keep the examples apart and change T; ``WRAPPERS`` send an inner
block's rows another way and bring them back; ``MIXING`` lets examples meet. W is even. Any N and T must do, 1 too.
"""

from __future__ import annotations

import functools
import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

LONGEST = 32  # positions that a table has rows for


class Block(nn.Module):
    """``run(block, x)``, with modules, parameters and constants as the block's attributes."""

    def __init__(self, run: Callable[[Any, Tensor], Tensor], **parts: Any) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


@dataclass
class Draw:
    """The sizes of a model, and the random choices in it. Tensors come from torch's generator."""

    r: random.Random
    n: int
    t: int
    w: int

    def linear(self, i: int | None = None, o: int | None = None) -> nn.Linear:
        return nn.Linear(self.w if i is None else i, self.w if o is None else o, bias=self.r.random() < 0.7)

    def matrix(self, *shape: int) -> nn.Parameter:
        shape = shape or (self.w, self.w)
        return nn.Parameter(torch.randn(*shape) / shape[-1] ** 0.5)

    def vector(self, size: int | None = None) -> nn.Parameter:
        return nn.Parameter(torch.randn(self.w if size is None else size))

    def varied(self, module: nn.Module) -> nn.Module:
        """With noise on its parameters: a norm's ones and zeros hide mistakes."""
        with torch.no_grad():
            for p in module.parameters():
                p.add_(torch.randn_like(p), alpha=0.3)
        return module

    def constant(self, *shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    @property
    def rows(self) -> int:
        """The number of rows of a table, of experts, or of prompts: a size that coincides, or a small one."""
        return self.r.choice([self.n, self.t, self.w, 2, 3, 4])


Make = Callable[[Draw], nn.Module]


def turned(size: int) -> Tensor:
    """An order that is not its own inverse from three on."""
    return torch.arange(size).roll(1)


def bits(x: Tensor) -> Tensor:
    """0 or 1 for each row, by the data; it carries no gradient."""
    return (x.detach()[..., 0] > 0).long()


def number(x: Tensor, count: int) -> Tensor:
    """A number below ``count`` for each row, by the data."""
    return (x.detach().sum(-1) * 7.3).floor().long() % count


# Products with a weight.

PRODUCTS: dict[str, Make] = {
    "linear": lambda d: Block(lambda m, x: m.l(x), l=d.linear()),
    "two linear": lambda d: Block(lambda m, x: m.b(F.gelu(m.a(x))), a=d.linear(o=2 * d.w), b=d.linear(i=2 * d.w)),
    "gated": lambda d: Block(lambda m, x: m.c(F.silu(m.a(x)) * m.b(x)), a=d.linear(), b=d.linear(), c=d.linear()),
    "functional": lambda d: Block(lambda m, x: F.linear(input=x, weight=m.w, bias=m.b), w=d.matrix(), b=d.vector()),
    "matmul": lambda d: Block(lambda m, x: x @ m.w, w=d.matrix()),
    "matmul on the left": lambda d: Block(lambda m, x: (m.w @ x.mT).mT, w=d.matrix()),
    "transposed": lambda d: Block(lambda m, x: F.linear(x, m.w.T), w=d.matrix()),
    "addmm": lambda d: Block(
        lambda m, x: torch.addmm(m.b, x.flatten(0, 1), m.w, beta=0.5, alpha=2).view_as(x), w=d.matrix(), b=d.vector()
    ),
    "mm": lambda d: Block(lambda m, x: torch.mm(x.reshape(-1, x.shape[-1]), m.w).reshape(x.shape), w=d.matrix()),
    "einsum": lambda d: Block(lambda m, x: torch.einsum("ntd,de->nte", x, m.w), w=d.matrix()),
    "einsum, weight first": lambda d: Block(lambda m, x: torch.einsum("ed,...d->...e", m.w, x), w=d.matrix()),
    "einsum of three": lambda d: Block(lambda m, x: torch.einsum("ntd,de,ef->ntf", x, m.w, m.v), w=d.matrix(), v=d.matrix()),
    "einsum to the positions first": lambda d: Block(
        lambda m, x: torch.einsum("tne,ef->ntf", torch.einsum("ntd,de->tne", x, m.w), m.v), w=d.matrix(), v=d.matrix()
    ),
    "tensordot": lambda d: Block(lambda m, x: torch.tensordot(x, m.w, dims=([2], [1])), w=d.matrix()),
    "bmm, expanded": lambda d: Block(lambda m, x: torch.bmm(x, m.w.expand(len(x), -1, -1)), w=d.matrix()),
    "baddbmm, expanded": lambda d: Block(
        lambda m, x: torch.baddbmm(m.b, x, m.w.expand(len(x), -1, -1)), w=d.matrix(), b=d.vector()
    ),
    "multi_dot": lambda d: Block(
        lambda m, x: torch.linalg.multi_dot([x.flatten(0, 1), m.w, m.v]).view_as(x), w=d.matrix(d.w, 2), v=d.matrix(2, d.w)
    ),
    "chunks of one weight": lambda d: Block(
        lambda m, x: sum(F.linear(c, w) for c, w in zip(x.chunk(2, -1), m.w.chunk(2, 1), strict=True)), w=d.matrix()
    ),
    "joined weights": lambda d: Block(
        lambda m, x: F.linear(x, torch.cat([m.a, m.b])), a=d.matrix(d.w // 2, d.w), b=d.matrix(d.w - d.w // 2, d.w)
    ),
    "rows of a weight": lambda d: Block(lambda m, x: F.linear(x, m.w[: x.shape[-1]]), w=d.matrix(d.w + 3, d.w)),
    "LoRA": lambda d: Block(
        lambda m, x: m.base(x) + m.up(m.down(x)) * 1.5,
        base=d.linear().requires_grad_(False),
        down=d.linear(o=2),
        up=d.linear(i=2),
    ),
    "LoRA, merged": lambda d: Block(
        lambda m, x: F.linear(x, m.base.weight + 1.5 * m.up @ m.down),
        base=d.linear().requires_grad_(False),
        down=d.matrix(2, d.w),
        up=d.matrix(d.w, 2),
    ),
    "weight norm": lambda d: Block(lambda m, x: m.l(x), l=parametrizations.weight_norm(d.linear())),
    "orthogonal": lambda d: Block(lambda m, x: m.l(x), l=parametrizations.orthogonal(nn.Linear(d.w, d.w))),
    "weight of unit columns": lambda d: Block(lambda m, x: F.linear(x, F.normalize(m.w, dim=1) * m.g), w=d.matrix(), g=d.vector(1)),
    "straight through": lambda d: Block(lambda m, x: F.linear(x, m.w + (m.w.round() - m.w).detach()), w=d.matrix()),
    "Toeplitz": lambda d: Block(lambda m, x: F.linear(x, m.b.unfold(0, x.shape[-1], 1)), b=d.vector(2 * d.w - 1)),
    "bilinear": lambda d: Block(lambda m, x: m.f(x, torch.sin(x)), f=nn.Bilinear(d.w, d.w, d.w)),
    "weights of each example": lambda d: Block(
        lambda m, x: torch.bmm(x, m.l(x.mean(1)).unflatten(-1, (x.shape[-1], -1))) / 3, l=d.linear(o=d.w * d.w)
    ),
    "a matrix for each head": lambda d: Block(
        lambda m, x: torch.einsum("nthk,hkl->nthl", x.unflatten(-1, (2, -1)), m.w).flatten(-2), w=d.matrix(2, d.w // 2, d.w // 2)
    ),
    "a matrix for each head, batched": lambda d: Block(
        lambda m, x: (x.unflatten(-1, (2, -1)).transpose(1, 2) @ m.w).transpose(1, 2).flatten(-2),
        w=d.matrix(2, d.w // 2, d.w // 2),
    ),
    "layer over positions": lambda d: Block(
        lambda m, x: x + (m.w[: x.shape[1], : x.shape[1]] @ x), w=nn.Parameter(torch.randn(LONGEST, LONGEST) / 4)
    ),
    "layer over positions, mT": lambda d: Block(
        lambda m, x: x + F.linear(x.mT, m.w[: x.shape[1], : x.shape[1]]).mT, w=nn.Parameter(torch.randn(LONGEST, LONGEST) / 4)
    ),
    "rows one by one": lambda d: Block(
        lambda m, x: torch.stack([torch.stack([m.w @ row for row in each]) for each in x]), w=d.matrix()
    ),
    "position by position": lambda d: Block(lambda m, x: torch.stack([m.l(row) for row in x.unbind(1)], 1), l=d.linear()),
    "one vector for each example": lambda d: Block(lambda m, x: x + m.l(x.mean(1))[:, None], l=d.linear()),
    "some features": lambda d: Block(
        lambda m, x: torch.cat([m.l(x[..., : x.shape[-1] // 2]), x[..., x.shape[-1] // 2 :]], -1), l=d.linear(d.w // 2, d.w // 2)
    ),
    "distances": lambda d: Block(lambda m, x: torch.cdist(x, m.w), w=d.matrix()),
    "cosine similarity": lambda d: Block(lambda m, x: F.normalize(x, dim=-1) @ F.normalize(m.w, dim=0), w=d.matrix()),
}


# Convolutions and norms.


def hand_norm(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)


CONVOLUTIONS: dict[str, Make] = {
    "conv1d": lambda d: Block(lambda m, x: m.c(x.mT).mT, c=nn.Conv1d(d.w, d.w, 3, padding=1)),
    "depthwise conv1d": lambda d: Block(lambda m, x: m.c(x.mT).mT, c=nn.Conv1d(d.w, d.w, 3, padding=1, groups=d.w, bias=False)),
    "causal conv1d": lambda d: Block(lambda m, x: m.c(F.pad(x.mT, (2, 0))).mT, c=nn.Conv1d(d.w, d.w, 2, dilation=2)),
    "functional conv1d": lambda d: Block(lambda m, x: F.conv1d(x.mT, m.w[..., None], m.b).mT, w=d.matrix(), b=d.vector()),
    "conv2d": lambda d: Block(lambda m, x: m.c(x.mT[..., None]).squeeze(-1).mT, c=nn.Conv2d(d.w, d.w, (3, 1), padding=(1, 0))),
    "conv2d of one channel": lambda d: Block(lambda m, x: m.c(x[:, None]).sum(1), c=nn.Conv2d(1, 2, 3, padding=1)),
    "transposed conv1d": lambda d: Block(lambda m, x: m.c(x.mT).mT, c=nn.ConvTranspose1d(d.w, d.w, 3, padding=1)),
    "unfold": lambda d: Block(lambda m, x: m.l(F.unfold(x[:, None], (3, x.shape[-1]), padding=(1, 0)).mT), l=d.linear(i=3 * d.w)),
}

NORMS: dict[str, Make] = {
    "layer norm": lambda d: Block(lambda m, x: m.f(x), f=d.varied(nn.LayerNorm(d.w))),
    "layer norm over heads": lambda d: Block(
        lambda m, x: m.f(x.unflatten(-1, (2, -1))).flatten(-2), f=d.varied(nn.LayerNorm((2, d.w // 2)))
    ),
    "rms norm": lambda d: Block(lambda m, x: m.f(x), f=d.varied(nn.RMSNorm(d.w))),
    "rms norm by hand": lambda d: Block(lambda m, x: m.w * hand_norm(x), w=d.vector()),
    "rms norm with an offset": lambda d: Block(lambda m, x: hand_norm(x) * (1 + m.w), w=d.vector()),
    "norm of heads": lambda d: Block(
        lambda m, x: (m.w * hand_norm(x.unflatten(-1, (2, -1)).transpose(1, 2))).transpose(1, 2).flatten(-2), w=d.vector(d.w // 2)
    ),
    "group norm": lambda d: Block(lambda m, x: m.f(x.mT).mT, f=d.varied(nn.GroupNorm(2, d.w))),
    "instance norm": lambda d: Block(
        lambda m, x: m.f(torch.cat([x, x.sin()], 1).mT).mT[:, : x.shape[1]], f=d.varied(nn.InstanceNorm1d(d.w, affine=True))
    ),
    "batch norm in evaluation": lambda d: Block(
        lambda m, x: F.batch_norm(x.mT, m.mean, m.mean.square() + 1, m.w, m.b).mT, w=d.vector(), b=d.vector(), mean=d.constant(d.w)
    ),
}


# Attention.


def attend(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """With two heads."""
    parts = (y.unflatten(-1, (2, -1)).transpose(1, 2) for y in (q, k, v))
    return F.scaled_dot_product_attention(*parts, **options).transpose(1, 2).flatten(-2)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    q, k, v = (y.unflatten(-1, (2, -1)).transpose(1, 2) for y in (q, k, v))
    return (torch.softmax(q @ k.mT / k.shape[-1] ** 0.5 + bias, -1) @ v).transpose(1, 2).flatten(-2)


def rotated(x: Tensor) -> Tensor:
    t = torch.arange(x.shape[1], dtype=x.dtype)[:, None]
    return x * t.cos() + torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2) * t.sin()


def relative(m: Any, x: Tensor) -> Tensor:
    t = torch.arange(x.shape[1])
    bias = m.table((t[:, None] - t).abs()).permute(2, 0, 1).unsqueeze(0)
    return x + softmax_attention(x, m.k(x), m.v(x), bias)


def padding_mask(x: Tensor) -> Tensor:
    """(N, 1, 1, T): positions to attend to, by the data; the first is always one."""
    kept = bits(x).bool()
    kept[:, 0] = True
    return kept[:, None, None, :]


ATTENTION: dict[str, Make] = {
    "attention": lambda d: Block(
        lambda m, x: x + attend(m.q(x), m.k(x), m.v(x), is_causal=True), q=d.linear(), k=d.linear(), v=d.linear()
    ),
    "attention of one product": lambda d: Block(
        lambda m, x: x + m.o(softmax_attention(*m.qkv(x).chunk(3, -1))), qkv=d.linear(o=3 * d.w), o=d.linear()
    ),
    "attention with padding": lambda d: Block(
        lambda m, x: x + attend(m.q(x), x, m.v(x), attn_mask=padding_mask(x)), q=d.linear(), v=d.linear()
    ),
    "attention by einsum": lambda d: Block(
        lambda m, x: x + torch.einsum("nts,nsd->ntd", torch.einsum("ntd,nsd->nts", m.q(x), x).softmax(-1), m.v(x)),
        q=d.linear(),
        v=d.linear(),
    ),
    "attention with relative positions": lambda d: Block(relative, table=nn.Embedding(LONGEST, 2), k=d.linear(), v=d.linear()),
    "rotary attention": lambda d: Block(
        lambda m, x: x + attend(rotated(m.q(x)), rotated(m.k(x)), x, is_causal=True), q=d.linear(), k=d.linear()
    ),
    "grouped queries": lambda d: Block(
        lambda m, x: x + attend(m.q(x), m.k(x).repeat(1, 1, 2), m.v(x).repeat_interleave(2, -1)),
        q=d.linear(),
        k=d.linear(o=d.w // 2),
        v=d.linear(o=d.w // 2),
    ),
    "linear attention": lambda d: Block(
        lambda m, x: x + torch.einsum("ntd,nde->nte", F.elu(m.q(x)) + 1, torch.einsum("nsd,nse->nde", F.elu(m.k(x)) + 1, x)) / 9,
        q=d.linear(),
        k=d.linear(),
    ),
    "latents": lambda d: Block(
        lambda m, x: x + F.softmax(x @ m.z.mT, -1) @ m.l(F.softmax(m.z @ x.mT, -1) @ x), z=d.matrix(d.rows, d.w), l=d.linear()
    ),
    "MultiheadAttention": lambda d: Block(
        lambda m, x: x + m.a(x, x, x, need_weights=False)[0], a=d.varied(nn.MultiheadAttention(d.w, 2, batch_first=True))
    ),
    "MultiheadAttention, sequence first": lambda d: Block(
        lambda m, x: x + m.a(*[x.transpose(0, 1)] * 3)[0].transpose(0, 1), a=d.varied(nn.MultiheadAttention(d.w, 2))
    ),
    "TransformerEncoderLayer": lambda d: Block(
        lambda m, x: m.a(x),
        a=nn.TransformerEncoderLayer(
            d.w, 2, 2 * d.w, dropout=0.0, batch_first=True, norm_first=d.r.random() < 0.5, activation=d.r.choice(["relu", "gelu"])
        ),
    ),
    "temperature of heads": lambda d: Block(
        lambda m, x: x + softmax_attention(x * m.s.repeat_interleave(x.shape[-1] // 2), x, m.v(x)), s=d.vector(2), v=d.linear()
    ),
}


# Tables and positions.

TABLES: dict[str, Make] = {
    "positions": lambda d: Block(lambda m, x: x + m.e(torch.arange(x.shape[1])), e=nn.Embedding(LONGEST, d.w)),
    "positions (1, T)": lambda d: Block(
        lambda m, x: x + m.l(m.e(torch.arange(x.shape[1])[None])), e=nn.Embedding(LONGEST, d.w), l=d.linear()
    ),
    "positions (N, T)": lambda d: Block(
        lambda m, x: x + m.e(torch.arange(x.shape[1]).expand(x.shape[:2])), e=nn.Embedding(LONGEST, d.w)
    ),
    "sliced positions": lambda d: Block(lambda m, x: x + m.p[:, : x.shape[1]], p=d.matrix(1, LONGEST, d.w)),
    "constant positions": lambda d: Block(lambda m, x: m.l(x + m.p[: x.shape[1]]), l=d.linear(), p=d.constant(LONGEST, d.w)),
    "kinds of rows": lambda d: Block(lambda m, x: x + m.e(bits(x)), e=nn.Embedding(2, d.w)),
    "table[ids]": lambda d: Block(lambda m, x: x + m.e[number(x, len(m.e))], e=d.matrix(d.rows, d.w)),
    "index_select": lambda d: Block(
        lambda m, x: x + m.e.index_select(0, number(x, len(m.e)).flatten()).view_as(x), e=d.matrix(d.rows, d.w)
    ),
    "one-hot rows": lambda d: Block(
        lambda m, x: x + F.one_hot(number(x, len(m.e)), len(m.e)).to(x.dtype) @ m.e, e=d.matrix(d.rows, d.w)
    ),
    "embedding of each example": lambda d: Block(
        lambda m, x: x + m.e(number(x.mean(1), m.e.num_embeddings))[:, None], e=nn.Embedding(d.rows, d.w)
    ),
    "padded embedding": lambda d: Block(lambda m, x: x + m.e(number(x, 3)), e=nn.Embedding(3, d.w, padding_idx=1)),
    "constant table in a list": lambda d: Block(
        lambda m, x: m.l(x + m.tables[0][number(x, len(m.tables[0]))]), l=d.linear(), tables=[d.constant(d.rows, d.w)]
    ),
    "constant table in a dictionary": lambda d: Block(
        lambda m, x: m.l(x + F.embedding(number(x, len(m.tables["a"])), m.tables["a"])),
        l=d.linear(),
        tables={"a": d.constant(d.rows, d.w)},
    ),
    "codebook": lambda d: Block(
        lambda m, x: x + (m.e[torch.cdist(x.detach(), m.e.detach()).argmin(-1)] - x).tanh(), e=d.matrix(d.rows + 1, d.w)
    ),
    "bag of rows": lambda d: Block(lambda m, x: x + m.e(number(x, 5))[:, None], e=nn.EmbeddingBag(5, d.w, mode="mean")),
    "gathered from an expanded table": lambda d: Block(
        lambda m, x: x + m.e.expand(len(x), -1, -1).gather(1, number(x, len(m.e))[..., None].expand_as(x)), e=d.matrix(d.rows, d.w)
    ),
}


# Experts.


def routed(m: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows = x.flatten(0, 1)
    weights, chosen = m.router(rows).softmax(-1).topk(min(2, len(m.up)), dim=-1)
    return rows, weights, chosen


def expert(m: Any, rows: Tensor, k: int) -> Tensor:
    return torch.tanh(rows @ m.up[k]) @ m.down[k]


def by_adding(m: Any, x: Tensor) -> Tensor:
    rows, weights, chosen = routed(m, x)
    out = torch.zeros_like(rows)
    for k in chosen.unique().tolist():
        row, rank = torch.where(chosen == k)
        out.index_add_(0, row, expert(m, rows[row], k) * weights[row, rank, None])
    return out.view_as(x)


def by_masks(m: Any, x: Tensor) -> Tensor:
    rows, weights, chosen = routed(m, x)
    scores = torch.zeros(len(rows), len(m.up), dtype=x.dtype).scatter(1, chosen, weights)
    return sum((scores[:, k, None] * expert(m, rows, k) for k in range(len(m.up))), torch.zeros_like(rows)).view_as(x)


def by_sorting(m: Any, x: Tensor) -> Tensor:
    rows, weights, chosen = routed(m, x)
    order = chosen.flatten().argsort(stable=True)
    parts = rows[order // chosen.shape[1]].split(chosen.flatten().bincount(minlength=len(m.up)).tolist())
    out = torch.cat([expert(m, part, k) for k, part in enumerate(parts)])[order.argsort()]
    return (out.view(*chosen.shape, -1) * weights[..., None]).sum(1).view_as(x)


def by_gathering(m: Any, x: Tensor) -> Tensor:
    rows, weights, chosen = routed(m, x)
    hidden = torch.tanh(torch.einsum("rk,rekh->reh", rows, m.up[chosen]))
    return torch.einsum("reh,rehk,re->rk", hidden, m.down[chosen], weights).view_as(x)


def by_buffers(m: Any, x: Tensor) -> Tensor:
    rows, weights, chosen = routed(m, x)
    mask = F.one_hot(chosen, len(m.up)).flatten(0, 1)
    place = (mask.cumsum(0) * mask).sum(-1) - 1
    send = (F.one_hot(place, int(place.max()) + 1)[:, None, :] * mask[..., None]).view(*chosen.shape, len(m.up), -1).to(x.dtype)
    out = torch.bmm(torch.tanh(torch.bmm(torch.einsum("rcep,rk->epk", send, rows), m.up)), m.down)
    return torch.einsum("rcep,epk,rc->rk", send, out, weights).view_as(x)


def by_dense_products(m: Any, x: Tensor) -> Tensor:
    rows, weights, chosen = routed(m, x)
    scores = torch.zeros(len(rows), len(m.up), dtype=x.dtype).scatter(1, chosen, weights)
    out = torch.bmm(torch.tanh(torch.bmm(rows.expand(len(m.up), -1, -1), m.up)), m.down)
    return (out * scores.T[..., None]).sum(0).view_as(x)


def by_writing(m: Any, x: Tensor) -> Tensor:
    rows = x.flatten(0, 1)
    probability, chosen = m.router(rows).softmax(-1).max(-1)
    out = rows.clone()
    for k in chosen.unique().tolist():
        (row,) = torch.where(chosen == k)
        out[row] = m.experts[k](rows[row]) * probability[row, None]
    return out.view_as(x)


def by_pairs(m: Any, x: Tensor) -> Tensor:
    out, choice = torch.zeros_like(x), number(x, len(m.experts))
    for k, each in enumerate(m.experts):
        i, j = torch.where(choice == k)
        out[i, j] += each(x[i, j])
    return out


def by_examples(m: Any, x: Tensor) -> Tensor:
    """An expert for an example as a whole."""
    choice = number(x.mean(1), len(m.experts))
    return torch.stack([m.experts[int(k)](row) for k, row in zip(choice, x, strict=True)])


def mixture(send: Callable[[Any, Tensor], Tensor]) -> Make:
    def make(d: Draw) -> nn.Module:
        e = max(d.rows, 1)
        return Block(send, router=d.linear(o=e), up=d.matrix(e, d.w, 5), down=d.matrix(e, 5, d.w))

    return make


def modules(send: Callable[[Any, Tensor], Tensor]) -> Make:
    def make(d: Draw) -> nn.Module:
        e = max(d.rows, 1)
        return Block(send, router=d.linear(o=e), experts=nn.ModuleList(d.linear() for _ in range(e)))

    return make


EXPERTS: dict[str, Make] = {
    f"experts {send.__name__.replace('_', ' ')}": mixture(send)
    for send in (by_adding, by_masks, by_sorting, by_gathering, by_buffers, by_dense_products)
} | {f"experts {send.__name__.replace('_', ' ')}": modules(send) for send in (by_writing, by_pairs, by_examples)}


# Rows and features by index; joins.


def along(x: Tensor, order: Tensor) -> Tensor:
    return order.view(1, -1, 1).expand_as(x)


def linear_then(f: Callable[[Tensor], Tensor]) -> Make:
    """The function between two layers."""
    return lambda d: Block(lambda m, x: m.b(torch.tanh(f(m.a(x)))), a=d.linear(), b=d.linear())


def picked(x: Tensor) -> Tensor:
    """One position of each example, by the data, added to all."""
    return x + x[torch.arange(len(x)), number(x.mean(1), x.shape[1])][:, None]


def masked(x: Tensor) -> Tensor:
    mask = bits(x).bool()
    return torch.zeros_like(x).index_put((mask,), torch.tanh(x[mask]) * 2)


def sliced(x: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    out[:, 1:] = x[:, :-1]
    out[:, 0] += x[:, -1]
    return out


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "index_add of positions": lambda x: torch.zeros_like(x).index_add(1, turned(x.shape[1]), x),
    "index_add of features": lambda x: torch.zeros_like(x).index_add(-1, turned(x.shape[-1]), x),
    "index_copy of positions": lambda x: torch.zeros_like(x).index_copy(-2, turned(x.shape[1]), x),
    "index_select of features": lambda x: x.index_select(2, turned(x.shape[-1])),
    "scatter of positions": lambda x: torch.zeros_like(x).scatter(1, along(x, turned(x.shape[1])), x),
    "scatter_add of features": lambda x: torch.zeros_like(x).scatter_add(2, (x.detach() > 0).long(), x),
    "gather of positions": lambda x: x.gather(1, x.detach().argsort(1)),
    "take_along_dim": lambda x: x.take_along_dim(x.detach().argsort(-1), -1),
    "a position that is picked": picked,
    "rows of a mask": masked,
    "written slices": sliced,
    "roll": lambda x: x.roll(1, 1) + x.roll(-1, -1),
    "flip": lambda x: x.flip(1) - x.flip(-1),
    "sort": lambda x: x.sort(1)[0],
    "topk": lambda x: x + x.topk(1, dim=1)[0],
    "maximum of positions": lambda x: x + x.amax(1, keepdim=True) + x.max(1, keepdim=True)[0],
    "cumsum": lambda x: x.cumsum(1) / 3,
    "softmax of positions": lambda x: x.softmax(1) + x.log_softmax(-1) / 5,
    "constant graph of positions": lambda x: torch.eye(x.shape[1], dtype=x.dtype).roll(1, 0) @ x,
    "constant graph of positions, einsum": lambda x: torch.einsum(
        "ts,nsk->ntk", torch.eye(x.shape[1], dtype=x.dtype).roll(1, 0), x
    ),
    "windows": lambda x: F.pad(x.mT, (1, 1)).unfold(2, 3, 1).sum(-1).mT / 3,
    "pairs stacked behind": lambda x: torch.stack([x, x.sin()], -1).sum(-1),
    "pairs stacked in front": lambda x: torch.stack([x, x.sin()]).mean(0),
    "pairs stacked between": lambda x: torch.stack([x, x.sin()], 1).mean(1),
    "as many stacked as examples": lambda x: torch.stack([x] * len(x)).mean(0) + torch.stack([x] * len(x), 1).mean(1),
    "cat and chunk": lambda x: sum(torch.cat([x, x.cos()]).chunk(2), torch.zeros(())),
    "cat of positions": lambda x: torch.cat([x, x.cos()], 1).unflatten(1, (2, -1)).sum(1),
    "cat of features": lambda x: F.glu(torch.cat([x, x.cos()], -1)),
    "positions unbound": lambda x: torch.stack([y * (k + 1) for k, y in enumerate(x.unbind(1))], 1) / 4,
    "features unbound": lambda x: torch.stack(list(x.unbind(-1))[::-1], -1),
    "columns as tokens": lambda x: torch.stack([c.unsqueeze(-1) for c in x.unbind(-1)], -2).squeeze(-1),
    "min of two": lambda x: torch.min(x, x.mean(1, keepdim=True)) + torch.maximum(x, -x),
    "where": lambda x: torch.where(x > 0, x, 0.1 * x) + torch.where(bits(x).bool()[..., None], x, x.exp().clamp(max=2)),
    "spectrum of features": lambda x: torch.fft.irfft(torch.fft.rfft(x, dim=-1) * 0.5, n=x.shape[-1], dim=-1),
    "spectrum of positions": lambda x: torch.fft.fft(x, dim=1).real / x.shape[1],
    "outer products": lambda x: torch.einsum("nti,ntj->nij", x, x).mean(1, keepdim=True) / 3 + x,
    "four dimensions": lambda x: x.unflatten(-1, (2, -1)).permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1).flatten(-2),
    "interpolated": lambda x: F.interpolate(x.mT, scale_factor=2, mode="nearest").mT.unflatten(1, (-1, 2)).sum(2),
    "pooled windows": lambda x: F.avg_pool1d(x.mT, 3, 1, 1).mT + F.max_pool1d(x.mT, 3, 1, 1).mT,
    "normalized": lambda x: F.normalize(x, dim=-1) + F.normalize(x, dim=1),
    "data times constant of each": lambda x: x * torch.arange(1, len(x) + 1, dtype=x.dtype).view(-1, 1, 1) / len(x),
    "centered, detached": lambda x: x - x.detach().mean(0),
    "numbers of its own": lambda x: x / (1 + x.detach().abs().amax((1, 2), keepdim=True)),
    "in place": lambda x: x.mul(2).add_(x).tanh_(),
    "in place, on a view": lambda x: in_place_view(x),
    "custom function": lambda x: Squared.apply(x),
    "vmap over examples": lambda x: torch.vmap(lambda row: torch.tanh(row) * row.mean())(x),
    "vmap over positions": lambda x: torch.vmap(lambda row: torch.tanh(row) + row, in_dims=1, out_dims=1)(x),
    "script": lambda x: scripted()(x),
    "checkpoint of a function": lambda x: checkpoint(torch.sin, x, use_reentrant=False),
    "reentrant checkpoint of a function": lambda x: checkpoint(torch.sin, x, use_reentrant=True),
}


def in_place_view(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, ::2].mul_(0.5)
    y.select(-1, 0).add_(1)
    return y


class Squared(torch.autograd.Function):
    """A user's function without a weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square() / 2 + x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * (ctx.saved_tensors[0] + 1)


class HiddenProduct(torch.autograd.Function):
    """x wᵀ by a function that no mode sees into."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w.T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return grad @ w, grad.flatten(0, -2).T @ x.flatten(0, -2)


@functools.cache
def scripted() -> Callable[[Tensor], Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own: its compiler is old
        return torch.jit.trace(lambda x: torch.tanh(x) + x / 2, torch.zeros(2, 2, 2, dtype=torch.float64), check_trace=False)


# Recurrences, scalars, and the rest.


def cell(kind: str) -> Make:
    def run(m: Any, x: Tensor) -> Tensor:
        state, out = None, []
        for t in range(x.shape[1]):
            state = m.cell(x[:, t], state)
            out.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(out, 1)

    return lambda d: Block(run, cell=getattr(nn, kind)(d.w, d.w))


def recurrence(m: Any, x: Tensor) -> Tensor:
    h, out = torch.zeros(len(x), x.shape[-1], dtype=x.dtype), []
    for t in range(x.shape[1]):
        h = torch.tanh(m.input(x[:, t]) + h @ m.state)
        out.append(h)
    return torch.stack(out, 1)


def scan(m: Any, x: Tensor) -> Tensor:
    """A diagonal state-space model."""
    h, out = x.new_zeros(x[:, 0].shape), []
    decay = m.decay.sigmoid()
    for row in x.unbind(1):
        h = decay * h + m.enter * row
        out.append(m.leave * h)
    return torch.stack(out, 1)


def vmapped(m: Any, x: Tensor) -> Tensor:
    return torch.vmap(lambda row: torch.tanh(row @ m.w))(x)


def functional_call(m: Any, x: Tensor) -> Tensor:
    return torch.func.functional_call(m.l, dict(m.l.named_parameters()), (x,))


def averaged(m: Any, x: Tensor) -> Tensor:
    """A buffer that follows the data, and is subtracted as it was before."""
    y = x - m.average
    if m.training:
        with torch.no_grad():
            m.average = m.average.lerp(x.mean((0, 1)), 0.1)
    return m.l(y)


REST: dict[str, Make] = {
    "RNNCell": cell("RNNCell"),
    "GRUCell": cell("GRUCell"),
    "LSTMCell": cell("LSTMCell"),
    "GRU": lambda d: Block(lambda m, x: m.rnn(x)[0], rnn=nn.GRU(d.w, d.w, batch_first=True)),
    "LSTM, two directions, sequence first": lambda d: Block(
        lambda m, x: m.rnn(x.transpose(0, 1))[0].transpose(0, 1), rnn=nn.LSTM(d.w, d.w // 2, bidirectional=True)
    ),
    "RNN": lambda d: Block(lambda m, x: m.rnn(x)[0], rnn=nn.RNN(d.w, d.w, batch_first=True)),
    "recurrence by hand": lambda d: Block(recurrence, input=d.linear(), state=d.matrix()),
    "state space": lambda d: Block(scan, decay=d.vector(), enter=d.vector(), leave=d.vector()),
    "scale": lambda d: Block(lambda m, x: x * m.s, s=d.vector()),
    "shift": lambda d: Block(lambda m, x: x + m.s, s=d.vector()),
    "shift with a factor": lambda d: Block(lambda m, x: torch.add(x, m.s, alpha=2), s=d.vector()),
    "scalars": lambda d: Block(
        lambda m, x: x * m.a.sigmoid() + torch.tanh(x) * m.b, a=nn.Parameter(torch.tensor(0.3)), b=d.vector(1)
    ),
    "gate": lambda d: Block(lambda m, x: x + m.a * m.l(x), a=nn.Parameter(torch.tensor(0.1)), l=d.linear()),
    "gate of zero": lambda d: Block(lambda m, x: x + m.a * m.l(x), a=nn.Parameter(torch.tensor(0.0)), l=d.linear()),
    "PReLU": lambda d: Block(lambda m, x: m.f(x.mT).mT, f=nn.PReLU(d.r.choice([1, d.w]))),
    "lerp": lambda d: Block(lambda m, x: torch.lerp(x, x.sin(), m.s.sigmoid()), s=d.vector()),
    "where with a weight": lambda d: Block(lambda m, x: torch.where(x > 0, x, m.s), s=d.vector()),
    "power": lambda d: Block(lambda m, x: (x.abs() + 0.5).pow(m.s.sigmoid()), s=d.vector()),
    "clamp": lambda d: Block(lambda m, x: x.clamp(m.s - 1, m.s + 1), s=d.vector()),
    "elementwise max": lambda d: Block(lambda m, x: torch.maximum(x, m.s), s=d.vector()),
    "scale in place": lambda d: Block(lambda m, x: x.clone().mul_(m.s).add_(m.s), s=d.vector()),
    "scale of each position": lambda d: Block(lambda m, x: x * m.s[: x.shape[1]], s=d.matrix(LONGEST, 1)),
    "a function of a vector": lambda d: Block(lambda m, x: x * F.softplus(m.s) + m.s.mean(), s=d.vector()),
    "stacked with a weight": lambda d: Block(lambda m, x: torch.stack([x, m.s.expand_as(x)]).sum(0), s=d.vector()),
    "list of layers": lambda d: Block(lambda m, x: torch.stack([m.a(x), m.b(x), x]).mean(0), a=d.linear(), b=d.linear()),
    "weighted list of layers": lambda d: Block(
        lambda m, x: torch.einsum("k,kntd->ntd", m.s.softmax(0), torch.stack([m.a(x), x])), a=d.linear(), s=d.vector(2)
    ),
    "twice": lambda d: Block(lambda m, x: m.l(torch.tanh(m.l(x))), l=d.linear()),
    "thrice, on other rows": lambda d: Block(
        lambda m, x: torch.tanh(m.l(x)) + m.l(x.mean(1))[:, None] + m.l(x[:, :1]), l=d.linear()
    ),
    "matrix and table": lambda d: Block(lambda m, x: x @ m.w + F.embedding(bits(x), m.w), w=d.matrix()),
    "matrix and its transpose": lambda d: Block(lambda m, x: F.linear(torch.tanh(x @ m.w), m.w), w=d.matrix()),
    "a branch that is detached": lambda d: Block(lambda m, x: m.a(x) + m.b(x).detach(), a=d.linear(), b=d.linear()),
    "a branch that is dropped": lambda d: Block(lambda m, x: (m.b(x), m.a(x))[1], a=d.linear(), b=d.linear()),
    "an input that is detached": lambda d: Block(lambda m, x: x + m.a(x.detach()), a=d.linear()),
    "a module that is not used": lambda d: Block(lambda m, x: m.a(x), a=d.linear(), b=d.linear()),
    "frozen": lambda d: Block(lambda m, x: m.b(m.a(x)), a=d.linear().requires_grad_(False), b=d.linear()),
    "frozen weight": lambda d: Block(lambda m, x: x @ m.w + m.b, w=d.matrix().requires_grad_(False), b=d.vector()),
    "without gradients": lambda d: Block(lambda m, x: m.a(x + no_grad(m.a, x)), a=d.linear()),
    "moving average": lambda d: Block(averaged, l=d.linear(), average=nn.Buffer(torch.zeros(d.w))),
    "hidden weight": lambda d: Block(lambda m, x: x + HiddenProduct.apply(x, m.w), w=d.matrix()),
    "vmap with a weight": lambda d: Block(vmapped, w=d.matrix()),
    "functional_call": lambda d: Block(functional_call, l=d.linear()),
    "keyword arguments": lambda d: Block(
        lambda m, x: F.layer_norm(input=m.l(input=x), normalized_shape=(x.shape[-1],), weight=m.w), l=d.linear(), w=d.vector()
    ),
    "some examples alone": lambda d: Block(lambda m, x: torch.where((x.detach()[:, :1, :1] > 0), m.l(x), x), l=d.linear()),
    "dropout": lambda d: Block(lambda m, x: m.l(F.dropout(x, 0.3, m.training)), l=d.linear()),
    "dropout of channels": lambda d: Block(lambda m, x: m.l(F.dropout1d(x.mT, 0.3, m.training).mT), l=d.linear()),
    "noise": lambda d: Block(lambda m, x: m.l(x + 0.1 * torch.randn_like(x)), l=d.linear()),
    "dropped paths": lambda d: Block(
        lambda m, x: x + torch.bernoulli(torch.full((len(x), 1, 1), 0.5, dtype=x.dtype)) * m.l(x), l=d.linear()
    ),
}
RANDOM = {"dropout", "dropout of channels", "noise", "dropped paths"}
# What an example alone computes otherwise, although no gradient connects it with others.
OF_THE_BATCH = {*RANDOM, "moving average", "centered, detached", "data times constant of each"}


def no_grad(module: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return module(x)


BLOCKS: dict[str, Make] = {
    **PRODUCTS,
    **CONVOLUTIONS,
    **NORMS,
    **ATTENTION,
    **TABLES,
    **EXPERTS,
    **{name: linear_then(f) for name, f in FUNCTIONS.items()},
    **REST,
}


# What changes the number of positions.


def attention_pool(m: Any, x: Tensor) -> Tensor:
    return (m.l(x).softmax(1) * x).sum(1, keepdim=True)


RESHAPING: dict[str, Make] = {
    "class token": lambda d: Block(lambda m, x: torch.cat([m.p.expand(len(x), -1, -1), x], 1), p=d.matrix(1, 1, d.w)),
    "prompt": lambda d: Block(
        lambda m, x: torch.cat([m.e(torch.arange(m.e.num_embeddings))[None].expand(len(x), -1, -1), x], 1),
        e=nn.Embedding(min(d.rows, 4), d.w),
    ),
    "prompt, looked up for each": lambda d: Block(
        lambda m, x: torch.cat([m.e(torch.arange(m.e.num_embeddings).expand(len(x), -1)), x], 1),
        e=nn.Embedding(min(d.rows, 4), d.w),
    ),
    "repeated suffix": lambda d: Block(lambda m, x: torch.cat([x, m.p.repeat(len(x), 1, 1)], 1), p=d.matrix(2, d.w)),
    "prompt of constants": lambda d: Block(lambda m, x: torch.cat([x.new_ones(len(x), 1, x.shape[-1]), x], 1)),
    "mean pool": lambda d: Block(lambda m, x: x.mean(1, keepdim=True)),
    "max pool": lambda d: Block(lambda m, x: x.amax(1)[:, None]),
    "attention pool": lambda d: Block(attention_pool, l=d.linear(o=1)),
    "queries": lambda d: Block(lambda m, x: F.softmax(m.q @ x.mT, -1) @ x, q=d.matrix(min(d.rows, 4), d.w)),
    "queries, expanded": lambda d: Block(
        lambda m, x: F.scaled_dot_product_attention(m.q.expand(len(x), -1, -1), x, x), q=d.matrix(min(d.rows, 4), d.w)
    ),
    "last position": lambda d: Block(lambda m, x: x[:, -1:]),
    "one position": lambda d: Block(lambda m, x: x[torch.arange(len(x)), number(x.mean(1), x.shape[1])].unsqueeze(1)),
    "every second position": lambda d: Block(lambda m, x: x[:, ::2]),
    "positions twice": lambda d: Block(lambda m, x: x.repeat_interleave(2, 1)[:, : LONGEST // 2]),
    "strided conv1d": lambda d: Block(lambda m, x: m.c(x.mT).mT, c=nn.Conv1d(d.w, d.w, 2, 2, padding=1)),
    "patches": lambda d: Block(
        lambda m, x: m.l(F.pad(x, (0, 0, 0, x.shape[1] % 2)).unflatten(1, (-1, 2)).flatten(2)), l=d.linear(i=2 * d.w)
    ),
}


# Other ways for an inner block's rows.


def shuffled(f: nn.Module, x: Tensor) -> Tensor:
    order = x.detach().flatten(1).sum(1).argsort()
    return f(x[order])[order.argsort()]


def permuted_by_product(f: nn.Module, x: Tensor) -> Tensor:
    p = F.one_hot(turned(len(x)), len(x)).to(x.dtype)
    return torch.tensordot(p.T, f(torch.tensordot(p, x, dims=1)), dims=1)


def shuffled_rows(f: nn.Module, x: Tensor) -> Tensor:
    """Rows (N·T, 1, W) in the order of the data."""
    rows = x.flatten(0, 1)
    order = rows.detach().sum(-1).argsort()
    return torch.zeros_like(rows).index_copy(0, order, f(rows[order].unsqueeze(1)).squeeze(1)).view_as(x)


def halves(f: nn.Module, x: Tensor) -> Tensor:
    parts = (x[: len(x) // 2], x[len(x) // 2 :])
    return torch.cat([f(part) if len(part) else part for part in parts])


WRAPPERS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "in a checkpoint": lambda f, x: checkpoint(f, x, use_reentrant=False),
    "in a reentrant checkpoint": lambda f, x: checkpoint(f, x, use_reentrant=True),
    "in two checkpoints": lambda f, x: checkpoint(lambda y: checkpoint(f, y.sin(), use_reentrant=False), x, use_reentrant=False),
    "with a residual": lambda f, x: x + f(x),
    "on flat rows": lambda f, x: f(x.flatten(0, 1).unsqueeze(1)).squeeze(1).view_as(x),
    "on shuffled rows": shuffled_rows,
    "on examples in order": shuffled,
    "on examples by a product": permuted_by_product,
    "on reversed examples": lambda f, x: f(x.flip(0)).flip(0),
    "on rolled examples": lambda f, x: f(x.roll(1, 0)).roll(-1, 0),
    "on halves of the batch": halves,
    "example by example": lambda f, x: torch.cat([f(row) for row in x.split(1)]),
    "examples stacked": lambda f, x: torch.stack([f(row[None])[0] for row in x]),
    "on each example twice": lambda f, x: f(x.repeat_interleave(2, 0))[::2],
    "on the batch twice": lambda f, x: f(torch.cat([x, x.cos()])).chunk(2)[0],
    "on pairs of the batch": lambda f, x: torch.sub(*f(torch.cat([x, x.cos()])).chunk(2)),
    "two passes": lambda f, x: f(x) * f(x.cos()),
    "with another dimension": lambda f, x: f(x.unsqueeze(1).flatten(0, 1)),
    "on transposed positions": lambda f, x: f(x.flip(1)).flip(1),
    "into zeros": lambda f, x: torch.zeros_like(x).index_add(0, torch.arange(len(x)), f(x)),
}


# Examples that meet.


class Centered(torch.autograd.Function):
    """A user's function that mixes examples."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x - 0.5 * x.mean(0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad - 0.5 * grad.mean(0)


MIXING: dict[str, Callable[[Tensor], Tensor]] = {
    "centered": lambda x: x - 0.5 * x.mean(0),
    "centered, dimension kept": lambda x: x - 0.5 * x.mean(0, keepdim=True),
    "batch norm": lambda x: F.batch_norm(torch.cat([x, x.cos()], 1).mT, None, None, training=True).mT[:, : x.shape[1]],
    "softmax": lambda x: x.softmax(0) + x,
    "the one before": lambda x: x + 0.3 * x.roll(1, 0),
    "the first": lambda x: x + 0.3 * x[:1],
    "cumulated rows": lambda x: x.flatten(0, 1).cumsum(0).view_as(x) / 4,
    "attention over examples": lambda x: x + F.scaled_dot_product_attention(*[x.transpose(0, 1)] * 3).transpose(0, 1),
    "graph": lambda x: torch.einsum("nm,mtk->ntk", torch.eye(len(x), dtype=x.dtype) + 0.3, x),
    "products": lambda x: x * (1 + 0.3 * x[turned(len(x))]),
    "custom function": Centered.apply,
    "vmap": torch.vmap(lambda column: column - 0.5 * column.mean(), in_dims=2, out_dims=2),
    "checkpoint": lambda x: checkpoint(lambda y: y - 0.5 * y.mean(0), x, use_reentrant=False),
    "reentrant checkpoint": lambda x: checkpoint(lambda y: y - 0.5 * y.mean(0), x, use_reentrant=True),
}
