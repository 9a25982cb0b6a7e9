"""Small models, named for what makes them hard to measure. Each takes (N, T >= 4) integer tokens below 11.

``ZOO`` is all of them. No example depends on another, so a loop over the examples is the truth for each.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

WIDTH, OUT = 8, 5


class TwoLayers(nn.Module):
    """Embedding, then linear layers with and without a bias. The others are variations of it."""

    rtol: ClassVar[float] = 1e-9  # what float64 parameters can be measured to
    random: ClassVar[bool] = False  # whether a forward pass draws random numbers
    refusable: ClassVar[bool] = False  # whether naming a parameter as not covered is an honest answer

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, WIDTH)
        self.first = nn.Linear(WIDTH, 12)
        self.head = nn.Linear(12, OUT, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.first(self.embedding(tokens))))


class UsedTwice(TwoLayers):
    """One module runs twice, so an example's gradient is the sum of two uses."""

    def __init__(self) -> None:
        super().__init__()
        self.again = nn.Linear(12, 12)

    def forward(self, tokens: Tensor) -> Tensor:
        x = torch.tanh(self.first(self.embedding(tokens)))
        x = x + self.again(x)
        return self.head(x + self.again(torch.tanh(x)))


class OneUseDetached(UsedTwice):
    """A module's second use reaches no loss."""

    def forward(self, tokens: Tensor) -> Tensor:
        x = torch.tanh(self.first(self.embedding(tokens)))
        x = x + self.again(x)
        return self.head(x + self.again(torch.tanh(x)).detach())


class TwoNames(TwoLayers):
    """One module registered under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.middle = nn.Linear(12, 12)
        self.alias = self.middle

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.alias(torch.tanh(self.middle(self.first(self.embedding(tokens))))))


class Frozen(TwoLayers):
    """A frozen weight with a trainable bias, between trainable layers."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(12, 12)
        self.frozen.weight.requires_grad_(False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.frozen(torch.tanh(self.first(self.embedding(tokens)))))


class Functional(TwoLayers):
    """Calls of F.linear without a module, by keyword, on a bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Parameter(torch.randn(12, 12) / 4)

    def forward(self, tokens: Tensor) -> Tensor:
        x = torch.tanh(self.first(self.embedding(tokens)))
        return self.head(F.linear(input=x, weight=self.router))


class Pooled(TwoLayers):
    """A head on (N, K) rows: one position for each example."""

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.first(self.embedding(tokens))).mean(1))


class FourDimensional(TwoLayers):
    """Linear layers on (N, H, W, K), permuted on the way."""

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens).unflatten(1, (2, -1))
        x = torch.tanh(self.first(x.permute(0, 2, 1, 3)))
        return self.head(x)


class Tied(TwoLayers):
    """Head and embedding share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.first(self.embedding(tokens))))


class Flattened(TwoLayers):
    """A head on (N·T, K) rows, which no longer say whose they are."""

    def forward(self, tokens: Tensor) -> Tensor:
        x = torch.tanh(self.first(self.embedding(tokens)))
        return self.head(x.flatten(0, 1)).unflatten(0, tokens.shape)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) / 2)


def varied(module: nn.Module) -> nn.Module:
    """The module with noise on its parameters: a norm's ones and zeros hide mistakes."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
    return module


class Between(TwoLayers):
    """A ``middle`` from (N, T, 12) to (N, T, 12), between an embedding with a layer and a head; here nothing."""

    def middle(self, x: Tensor) -> Tensor:
        return x

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.middle(torch.tanh(self.first(self.embedding(tokens)))))


# A parameter that is used more than once.


class UsedThrice(Between):
    """One module runs three times: on (N, T, K), on (N, K), and on other positions."""

    def __init__(self) -> None:
        super().__init__()
        self.again = nn.Linear(12, 12)

    def middle(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.again(x))
        return x + self.again(x.mean(1)).unsqueeze(1) + self.again(x[:, 1:] * x[:, :-1]).sum(1, keepdim=True)


class SharedWeight(Between):
    """One weight in two modules, each with a bias of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(12, 12), nn.Linear(12, 12)
        self.right.weight = self.left.weight

    def middle(self, x: Tensor) -> Tensor:
        return self.right(torch.tanh(self.left(x)))


class TiedWithBias(Tied):
    """A tied head with a bias, whose logits are scaled and capped; the embedding is scaled too."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = parameter(11)

    def forward(self, tokens: Tensor) -> Tensor:
        x = torch.tanh(self.first(self.embedding(tokens) * WIDTH**0.5))
        return 3 * torch.tanh((self.head(x) + self.bias) / 3)


class TiedTransposed(Tied):
    """A tied head that is a product with the transposed embedding, not a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        del self.head

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.tanh(self.first(self.embedding(tokens))) @ self.embedding.weight.T


class TwoEmbeddings(TwoLayers):
    """One table is looked up twice, at other ids."""

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + 2 * self.embedding((tokens + 1) % 11)
        return self.head(torch.tanh(self.first(x)))


class MixedUses(TwoLayers):
    """A square weight is a linear layer's, a product's and, row by row, an embedding's."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = parameter(12, 12)

    def forward(self, tokens: Tensor) -> Tensor:
        x = torch.tanh(self.first(self.embedding(tokens)))
        return self.head(F.linear(x, self.weight) + torch.tanh(x @ self.weight) + F.embedding(tokens, self.weight))


# Products with a parameter that are not F.linear with the whole of it.


class Conv1D(Between):
    """GPT-2's layer: ``addmm(bias, rows, weight)`` with the weight (in, out)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = parameter(12, 12), parameter(12)

    def middle(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], 12)


class TransposedWeight(Between):
    """``F.linear`` with a transposed parameter, in three spellings."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = parameter(12, 12), parameter(12, 12), parameter(12, 12)

    def middle(self, x: Tensor) -> Tensor:
        return F.linear(x, self.a.T) + F.linear(x, self.b.t()) + F.linear(x, self.c.transpose(0, 1).contiguous())


class SlicedWeight(Between):
    """``F.linear`` with slices of one weight and of one bias; rows 20 to 23 are never used."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = parameter(24, 12), parameter(24)

    def middle(self, x: Tensor) -> Tensor:
        left = F.linear(x, self.weight[:12], self.bias[:12])
        return left + F.pad(F.linear(x, self.weight[12:20], self.bias[12:20]), (0, 4)) + F.linear(x, self.weight[6:18])


class SplitQKV(Between):
    """Attention with one weight, chunked into those of queries, keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.bias = parameter(36, 12), parameter(36)

    def middle(self, x: Tensor) -> Tensor:
        parts = zip(self.qkv.chunk(3), self.bias.split(12), strict=True)
        return F.scaled_dot_product_attention(*(F.linear(x, w, b) for w, b in parts))


class JoinedQKV(Between):
    """Attention with one product, by a weight that is joined of two parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv = parameter(12, 12), parameter(24, 12)

    def middle(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*F.linear(x, torch.cat([self.q, self.kv])).chunk(3, dim=-1))


class Products(Between):
    """``x @ w``, ``torch.matmul`` and ``torch.einsum``, the parameter last and first."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (parameter(12, 12) for _ in range(4))

    def middle(self, x: Tensor) -> Tensor:
        x = torch.tanh(x @ self.a) + torch.tanh(torch.matmul(x, self.b))
        return torch.einsum("ntd,do->nto", x, self.c) + torch.einsum("od,ntd->nto", self.d, x)


class Heads(Between):
    """A 3-D weight with a matrix for each head, in a product of 4-D tensors and in an einsum."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = parameter(3, 12, 4), parameter(3, 4, 12)

    def middle(self, x: Tensor) -> Tensor:
        heads = torch.tanh(torch.einsum("ntd,hdk->nhtk", x, self.down))
        return (heads @ self.up).sum(1)


class BatchedProduct(Between):
    """``torch.bmm`` and ``torch.baddbmm`` with a weight that is expanded over the examples."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.bias = parameter(12, 12), parameter(12, 12), parameter(12)

    def middle(self, x: Tensor) -> Tensor:
        expanded = self.a.unsqueeze(0).expand(x.shape[0], -1, -1)
        return torch.baddbmm(self.bias, torch.bmm(x, expanded).tanh(), self.b.expand(x.shape[0], 12, 12))


class Bilinear(Between):
    """``nn.Bilinear``: a product of two inputs and a 3-D weight."""

    def __init__(self) -> None:
        super().__init__()
        self.form = nn.Bilinear(12, 12, 12)

    def middle(self, x: Tensor) -> Tensor:
        return self.form(x, torch.sin(x))


# Weights that are functions of parameters alone.


class WeightNormalised(Between):
    """``g v / ‖v‖`` by hand, and torch's parametrization."""

    def __init__(self) -> None:
        super().__init__()
        self.v, self.g = parameter(12, 12), parameter(12, 1)
        self.parametrized = nn.utils.parametrizations.weight_norm(nn.Linear(12, 12))

    def middle(self, x: Tensor) -> Tensor:
        return self.parametrized(torch.tanh(F.linear(x, self.g * self.v / self.v.norm(dim=1, keepdim=True))))


class LoRA(Between):
    """A frozen layer with a trained product of two thin ones beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(12, 12).requires_grad_(False)
        self.down, self.up = nn.Linear(12, 2, bias=False), nn.Linear(2, 12, bias=False)
        self.scaling = 1.5

    def middle(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x)) * self.scaling


class LoRAMerged(LoRA):
    """The same, added to the frozen weight before its use."""

    def middle(self, x: Tensor) -> Tensor:
        weight = self.base.weight + self.scaling * self.up.weight @ self.down.weight
        return F.linear(x, weight, self.base.bias)


class Cast(Between):
    """Weights that change their type on the way: float32 parameters would be rounded to bfloat16, float64 ones to float32."""

    rtol = 1e-6

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.scale = parameter(12, 12), parameter(12)

    def middle(self, x: Tensor) -> Tensor:
        return (F.linear(x.float(), self.weight.float()) * self.scale.float()).to(x.dtype)


# Rows that do not say whose they are.


class Mixture(Between):
    """Experts in 3-D weights, as transformers 5 writes them: a router on (N·T, K) rows, slices, and rows added back by index.

    The last expert is never chosen, the first by some examples only.
    """

    def __init__(self) -> None:
        super().__init__()
        self.router = parameter(4, 12)
        self.gate_up, self.down = parameter(5, 20, 12), parameter(5, 12, 10)

    def route(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The weights and the numbers of each row's two experts."""
        weights, chosen = torch.topk(F.softmax(F.linear(rows, self.router), dim=-1), 2, dim=-1)
        return weights / weights.sum(-1, keepdim=True), chosen

    def middle(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        weights, chosen = self.route(rows)
        out = torch.zeros_like(rows)
        for expert in chosen.unique().tolist():
            row, rank = torch.where(chosen == expert)
            gate, up = F.linear(rows[row], self.gate_up[expert]).chunk(2, dim=-1)
            y = F.linear(F.silu(gate) * up, self.down[expert]) * weights[row, rank, None]
            out.index_add_(0, row, y)
        return out.view(x.shape)


class MixtureSorted(Mixture):
    """The same mathematics with a matrix gathered for each row, in the experts' order, as "batched_mm" does."""

    def middle(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        weights, chosen = self.route(rows)
        experts, order = chosen.flatten().sort(stable=True)
        states = rows[order // 2].unsqueeze(-1)
        gate, up = torch.bmm(self.gate_up[experts], states).squeeze(-1).chunk(2, dim=-1)
        y = torch.bmm(self.down[experts], (F.silu(gate) * up).unsqueeze(-1)).squeeze(-1)
        y = y * weights.flatten()[order, None]
        return torch.zeros_like(y).index_copy(0, order, y).view(*x.shape[:-1], 2, -1).sum(-2)


class MixtureDense(Mixture):
    """Every expert sees every row, in one batched product over (experts, N·T, K) with biases, as GPT-OSS and Llama 4 do."""

    def __init__(self) -> None:
        super().__init__()
        self.up_bias, self.down_bias = parameter(4, 20), parameter(4, 12)

    def middle(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        weights, chosen = self.route(rows)
        scores = torch.zeros(len(rows), 4, dtype=x.dtype, device=x.device).scatter(1, chosen, weights)
        repeated = rows.repeat(4, 1).view(4, -1, rows.shape[-1])
        hidden = torch.bmm(repeated, self.gate_up[:4].transpose(1, 2)) + self.up_bias[:, None, :]
        y = torch.bmm(torch.tanh(hidden[..., :10]) * hidden[..., 10:], self.down[:4].transpose(1, 2)) + self.down_bias[:, None, :]
        return (y * scores.T[..., None]).sum(0).view(x.shape)


class MixtureOfModules(Between):
    """Experts that are modules of their own, one of which no row chooses."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(12, 3)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12)) for _ in range(4))

    def middle(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        probability, chosen = F.softmax(self.router(rows), dim=-1).max(-1)
        out = rows.clone()
        for number in chosen.unique().tolist():
            (row,) = torch.where(chosen == number)
            out[row] = self.experts[number](rows[row]) * probability[row, None]
        return out.unflatten(0, x.shape[:2])


class Packed(TwoLayers):
    """Sequences of different lengths in one long one, without the padding: T, T - 1 or T - 2 positions each."""

    refusable = True

    def forward(self, tokens: Tensor) -> Tensor:
        n, t = tokens.shape
        kept = torch.arange(t, device=tokens.device) < t - tokens[:, :1] % 3
        rows = self.head(torch.tanh(self.first(self.embedding(tokens[kept]))))
        return torch.zeros(n, t, OUT, dtype=rows.dtype, device=rows.device).masked_scatter(kept.unsqueeze(-1), rows)


class SequenceFirst(TwoLayers):
    """Layers on (T, N, K), as nn.Transformer has them by default."""

    def forward(self, tokens: Tensor) -> Tensor:
        x = torch.tanh(self.first(self.embedding(tokens).transpose(0, 1)))
        return self.head(x).transpose(0, 1)


class ChannelsFirst(Between):
    """A layer on (N, K, T), whose last dimension is T's: it mixes positions, with T no feature elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(4, 4)

    def middle(self, x: Tensor) -> Tensor:
        return self.mix(x[:, :4].mT).mT


class LoopOverExamples(TwoLayers):
    """A layer that takes one example's vector at a time: 1-D inputs."""

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens).mean(1)
        return torch.stack([self.head(torch.tanh(self.first(x[i]))) for i in range(len(x))])


class LoopOverPositions(Between):
    """A recurrent cell that takes one position at a time: (N, K) inputs, T uses."""

    def __init__(self) -> None:
        super().__init__()
        self.state = nn.Linear(12, 12)

    def middle(self, x: Tensor) -> Tensor:
        states = [x[:, 0]]
        for t in range(1, x.shape[1]):
            states.append(torch.tanh(self.state(states[-1])) + x[:, t])
        return torch.stack(states, 1)


class HalfOfThePositions(Between):
    """Layers that see other positions than their neighbours: a prefix, a stride, a reversed sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 12)

    def middle(self, x: Tensor) -> Tensor:
        return self.a(x[:, :2]).sum(1, keepdim=True) + self.b(x[:, ::2]).sum(1, keepdim=True) + self.c(x.flip(1))


# Parameters that are added, and positions.


class PositionsOnce(TwoLayers):
    """A table of positions is looked up once and broadcast over the examples."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Embedding(16, WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.position(torch.arange(tokens.shape[1], device=tokens.device))
        return self.head(torch.tanh(self.first(x)))


class PositionsFirst(PositionsOnce):
    """The positions are looked up before anything that has N rows."""

    def forward(self, tokens: Tensor) -> Tensor:
        positions = self.position(torch.arange(tokens.shape[1], device=tokens.device))
        return self.head(torch.tanh(self.first(positions + self.embedding(tokens))))


class PositionsOnceTwice(PositionsOnce):
    """(1, T, d) positions, which a layer sees before they are broadcast, and another table at T - t."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(WIDTH, WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        ids = torch.arange(tokens.shape[1], device=tokens.device).unsqueeze(0)
        x = self.embedding(tokens) + self.project(self.position(ids)) + self.position(ids.flip(1)) * 0.5
        return self.head(torch.tanh(self.first(x)))


class PositionsOfEach(PositionsOnce):
    """Positions (N, T), expanded."""

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.position(torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens))
        return self.head(torch.tanh(self.first(x)))


class PositionParameter(Between):
    """Positions that are parameters: (4, d) and (1, 4, d) added as they are, (16, d) sliced."""

    def __init__(self) -> None:
        super().__init__()
        self.flat, self.batched, self.long = parameter(4, 12), parameter(1, 4, 12), parameter(16, 12)

    def middle(self, x: Tensor) -> Tensor:
        x = x + self.long[: x.shape[1]]
        return torch.tanh(x[:, :4] + self.flat) + self.batched


class ClassToken(Between):
    """A parameter that is expanded over the examples and put before the positions, one repeated and put behind."""

    def __init__(self) -> None:
        super().__init__()
        self.cls, self.end = parameter(1, 1, 12), parameter(1, 2, 12)
        self.mix = nn.Linear(12, 12)

    def middle(self, x: Tensor) -> Tensor:
        n = x.shape[0]
        x = torch.cat([self.cls.expand(n, -1, -1), x, self.end.repeat(n, 1, 1)], dim=1)
        return self.mix(F.scaled_dot_product_attention(x, x, x))


class PromptTokens(Between):
    """Learned queries that attend to the example, (3, d): the parameter's product with an activation, one for each example."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = parameter(3, 12)

    def middle(self, x: Tensor) -> Tensor:
        return F.softmax(self.queries @ x.mT, dim=-1) @ x


class BiasOnly(Between):
    """Biases that are added by themselves, subtracted, and added with a factor."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = parameter(12), parameter(12), parameter(1)

    def middle(self, x: Tensor) -> Tensor:
        return torch.add(torch.tanh(x + self.a) - self.b, self.c, alpha=2)


class PaddedEmbedding(TwoLayers):
    """A table with a padding row, which gets no gradient, and rows that no example has."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, WIDTH, padding_idx=3)


class MeanOfEmbeddings(TwoLayers):
    """An example is the mean of its embeddings."""

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.first(self.embedding(tokens).mean(1))))


class BagOfEmbeddings(TwoLayers):
    """The same by nn.EmbeddingBag."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.EmbeddingBag(11, WIDTH, mode="mean")


class IndexedTable(TwoLayers):
    """Tables that are indexed without an embedding: ``table[tokens]`` and ``index_select``."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.other = parameter(11, WIDTH), parameter(11, WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.table[tokens] + self.other.index_select(0, tokens.flatten()).view(*tokens.shape, WIDTH)
        return self.head(torch.tanh(self.first(x)))


class OneHot(TwoLayers):
    """An embedding that is a linear layer on one-hot rows."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Linear(11, WIDTH, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        rows = F.one_hot(tokens, 11).to(self.embedding.weight.dtype)
        return self.head(torch.tanh(self.first(self.embedding(rows))))


# Norms and scales.


class LayerNorms(Between):
    """LayerNorm with a bias, without one, and over two dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = varied(nn.LayerNorm(12)), varied(nn.LayerNorm(12, bias=False))
        self.c = varied(nn.LayerNorm((3, 4)))

    def middle(self, x: Tensor) -> Tensor:
        return self.c(self.b(torch.tanh(self.a(x))).unflatten(-1, (3, 4))).flatten(-2)


class RMSNorms(Between):
    """torch's RMSNorm, one by hand, and Gemma's, whose factor is ``1 + weight``."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.weight, self.offset = varied(nn.RMSNorm(12)), parameter(12), parameter(12)

    def middle(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.norm(x))
        x = self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))
        x = torch.tanh(x)
        return (1 + self.offset) * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))


class GemmaNorm(Between):
    """Gemma's norm in its own words: activations and ``1 + weight`` in float32."""

    rtol = 1e-6

    def __init__(self) -> None:
        super().__init__()
        self.weight = parameter(12)

    def middle(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6)
        return (y * (1.0 + self.weight.float())).type_as(x)


class HeadNorms(Between):
    """Norms of queries and keys, whose weight is shared by the heads: (N, T, heads, size) and (N, heads, T, size)."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(12, 12), nn.Linear(12, 12)
        self.q_norm, self.k_norm = parameter(4), varied(nn.RMSNorm(4))

    def middle(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (3, 4)) for y in (self.q(x), self.k(x), x))
        q = self.q_norm * F.rms_norm(q, (4,))
        k = self.k_norm(k.transpose(1, 2))
        return F.scaled_dot_product_attention(q.transpose(1, 2), k, v.transpose(1, 2)).transpose(1, 2).flatten(-2)


class GroupNormed(Between):
    """GroupNorm on (N, channels, T)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = varied(nn.GroupNorm(3, 12))

    def middle(self, x: Tensor) -> Tensor:
        return self.norm(x.mT).mT


class Scalars(Between):
    """Factors without a dimension, with one, on either side, in an exponential, as a divisor; LayerScale."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.one, self.gamma = nn.Parameter(torch.tensor(0.7)), parameter(1), parameter(12)
        self.alpha, self.divisor = nn.Parameter(torch.tensor(0.3)), nn.Parameter(torch.tensor(1.7))

    def middle(self, x: Tensor) -> Tensor:
        return self.scale * x * self.alpha.exp() / self.divisor + torch.tanh(x * self.gamma) * self.one


class LearnedSlopes(Between):
    """PReLU with a slope for each channel, of (N, channels, T) and of (N, K), with one slope, and by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.of_channels, self.one = nn.PReLU(12), nn.PReLU()
        self.slopes, self.of_mean = parameter(12), parameter(12)

    def middle(self, x: Tensor) -> Tensor:
        y = self.one(self.of_channels(x.mT).mT)
        y = F.prelu(input=(y - 0.2).transpose(1, 2), weight=self.slopes).transpose(1, 2)
        return y + torch.prelu(x.mean(1), self.of_mean)[:, None]


class Temperature(Between):
    """A factor for each head on attention's scores: a parameter (heads, 1, 1) against (N, heads, T, T)."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = parameter(3, 1, 1)
        self.relative = nn.Embedding(16, 3)

    def middle(self, x: Tensor) -> Tensor:
        y, t = x.unflatten(-1, (3, 4)).transpose(1, 2), torch.arange(x.shape[1], device=x.device)
        bias = self.relative((t[:, None] - t).abs()).permute(2, 0, 1).unsqueeze(0)
        return (F.softmax(y @ y.mT * self.temperature + bias, dim=-1) @ y).transpose(1, 2).flatten(-2)


class ReZero(Between):
    """A branch with factor zero: its parameters' gradients are reached, and zero."""

    def __init__(self) -> None:
        super().__init__()
        self.branch, self.alpha = nn.Linear(12, 12), nn.Parameter(torch.zeros(()))

    def middle(self, x: Tensor) -> Tensor:
        return x + self.alpha * self.branch(x)


class LearnedActivation(Between):
    """PReLU, whose slope is a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.activation = nn.PReLU()

    def middle(self, x: Tensor) -> Tensor:
        return self.activation(x)


# Layers without a rule, for an exact fallback.


class Convolution(Between):
    """Conv1d over the positions, and a depthwise one."""

    def __init__(self) -> None:
        super().__init__()
        self.full, self.depthwise = nn.Conv1d(12, 12, 3, padding=1), nn.Conv1d(12, 12, 3, padding=2, groups=12, bias=False)

    def middle(self, x: Tensor) -> Tensor:
        return self.depthwise(torch.tanh(self.full(x.mT)))[..., :-2].mT


class Recurrent(Between):
    """A GRU."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRU(12, 12, batch_first=True)

    def middle(self, x: Tensor) -> Tensor:
        return self.cell(x)[0]


class RecurrentSequenceFirst(Between):
    """A bidirectional LSTM on (T, N, K), torch's default."""

    refusable = True

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTM(12, 6, bidirectional=True)

    def middle(self, x: Tensor) -> Tensor:
        return self.cell(x.transpose(0, 1))[0].transpose(0, 1)


class TorchAttention(Between):
    """nn.MultiheadAttention: a module that hands its parameters to a function of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = varied(nn.MultiheadAttention(12, 3, batch_first=True))

    def middle(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class SquaredProduct(torch.autograd.Function):
    """``(x @ w.T).square()`` with a backward of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return F.linear(x, w).square()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        grad = 2 * grad * F.linear(x, w)
        return grad @ w, grad.flatten(0, -2).mT @ x.flatten(0, -2)


class CustomFunction(Between):
    """An autograd.Function of the user's, which torch functions do not show."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = parameter(12, 12)

    def middle(self, x: Tensor) -> Tensor:
        return SquaredProduct.apply(x, self.weight)


# What reaches no loss, or does so another way.


class Unreached(Between):
    """A module that is never called, one whose output is dropped, and one behind a detach."""

    def __init__(self) -> None:
        super().__init__()
        self.never, self.dropped, self.detached = nn.Linear(12, 12), nn.Linear(12, 12), nn.LayerNorm(12)

    def middle(self, x: Tensor) -> Tensor:
        self.dropped(x)
        return x + self.detached(x).detach()


class DetachedInput(Between):
    """A layer whose input needs no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.probe = nn.Linear(12, 12)

    def middle(self, x: Tensor) -> Tensor:
        return x + self.probe(x.detach())


class FrozenParts(Between):
    """A frozen bias, a frozen embedding, a frozen norm with its bias trained."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = varied(nn.LayerNorm(12))
        for p in (self.first.bias, self.embedding.weight, self.norm.weight):
            p.requires_grad_(False)

    def middle(self, x: Tensor) -> Tensor:
        return self.norm(x)


class SomeExamplesOnly(TwoLayers):
    """A layer that some examples alone go through: those with an even first token."""

    def __init__(self) -> None:
        super().__init__()
        self.rare = nn.Linear(12, 12)

    def forward(self, tokens: Tensor) -> Tensor:
        x = torch.tanh(self.first(self.embedding(tokens)))
        return self.head(torch.where((tokens[:, :1] % 2 == 0).unsqueeze(-1), self.rare(x), x))


class Dropout(Between):
    """Random in training: the same seed gives the same masks."""

    random = True

    def __init__(self) -> None:
        super().__init__()
        self.again, self.drop = nn.Linear(12, 12), nn.Dropout(0.3)

    def middle(self, x: Tensor) -> Tensor:
        return F.dropout(self.again(self.drop(x)), 0.2, self.training)


class InPlace(Between):
    """A layer's output is changed in place: added to, multiplied by and clipped."""

    def __init__(self) -> None:
        super().__init__()
        self.again = nn.Linear(12, 12)

    def middle(self, x: Tensor) -> Tensor:
        y = self.again(x)
        y.add_(x).mul_(2)
        return y.relu_()


class InPlaceParameters(Between):
    """Parameters in in-place operations on activations."""

    def __init__(self) -> None:
        super().__init__()
        self.again, self.bias, self.scale = nn.Linear(12, 12), parameter(12), parameter(12)

    def middle(self, x: Tensor) -> Tensor:
        y = self.again(x)
        y += self.bias
        y = torch.tanh(y).clone()
        y.mul_(self.scale)
        return y


class ByKeyword(TwoLayers):
    """Modules and functions that are called by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = varied(nn.LayerNorm(12))

    def forward(self, tokens: Tensor) -> Tensor:
        x = torch.tanh(self.first(input=self.embedding(input=tokens)))
        return self.head(input=F.layer_norm(input=x, normalized_shape=(12,), weight=self.norm.weight, bias=self.norm.bias))


class Residual(Between):
    """Blocks of blocks with direct parameters, in a list and a dictionary."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.weight = parameter(12), parameter(12, 12)
            self.inner = nn.ModuleDict({"a": nn.Linear(12, 12), "b": nn.Linear(12, 12, bias=False)})

        def forward(self, x: Tensor) -> Tensor:
            return x + self.inner["b"](torch.tanh(self.inner["a"](x))) * self.scale + F.linear(x, self.weight)

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(self.Block() for _ in range(2))
        self.extra = nn.ParameterList([parameter(12)])

    def middle(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(torch.tanh(x))
        return x + self.extra[0]


COVERED = [TwoLayers, UsedTwice, OneUseDetached, TwoNames, Frozen, Functional, Pooled, FourDimensional]
ZOO = [kind for kind in list(vars().values()) if isinstance(kind, type) and issubclass(kind, TwoLayers) and kind is not Between]


class Checkpointed(TwoLayers):
    """What a checkpoint computes again runs in the device's own thread."""

    reentrant = False

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        return self.head(checkpoint(lambda y: torch.tanh(self.first(y)), x, use_reentrant=self.reentrant))


class CheckpointedReentrant(Checkpointed):
    reentrant = True


# The CPU's fused cells refuse tensors that say they are elsewhere.
LEFT_OUT = ("Recurrent", "RecurrentSequenceFirst")
# What tests on another device run: the zoo that repeats to the last bit, and checkpoints.
DEVICE_KINDS = [*(kind for kind in ZOO if not kind.random and kind.__name__ not in LEFT_OUT), Checkpointed, CheckpointedReentrant]
