"""Small models, named for what makes them hard to measure. Each takes (N, T) integer tokens below 11, or says otherwise."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, OUT = 8, 5


class TwoLayers(nn.Module):
    """Embedding, then linear layers with and without a bias."""

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


class Tied(nn.Module):
    """Head and embedding share a weight: one of its uses has no rule."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, WIDTH)
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


COVERED = [TwoLayers, UsedTwice, OneUseDetached, TwoNames, Frozen, Functional, Pooled, FourDimensional]
