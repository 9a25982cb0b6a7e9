"""``Chunked``, the portable backend: it forwards each op to the module of this package that computes it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from zsl_kernels.backends.base import Backend
from zsl_kernels.backends.chunked import coordinates, dense, embedding, gradients, linear_cross_entropy, scale_bias
from zsl_kernels.planning.choose import Plan
from zsl_kernels.tied import AddedRows
from zsl_kernels.types import Cotangents, EmbeddingSums, InterferenceSums


class Chunked(Backend):
    name = "chunked"

    def why_not(self, device: torch.device | None = None) -> str | None:
        return None

    def takes(self, device: torch.device) -> bool:
        return True

    def interference(
        self,
        plan: Plan,
        a: Tensor,
        b: Tensor,
        direction: Tensor | None,
        gram: bool,
        begin: Tensor | None = None,
        added: AddedRows | None = None,
    ) -> InterferenceSums:
        return gradients.interference(a, b, direction, gram, begin, added)

    def interference_backward(
        self,
        plan: Plan,
        a: Tensor,
        b: Tensor,
        direction: Tensor | None,
        c: Cotangents,
        mix: Tensor | None,
        a2: Tensor,
        b2: Tensor,
        want: tuple[bool, bool, bool],
        begin: Tensor | None = None,
        added: AddedRows | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return gradients.interference_backward(a, b, direction, c, mix, a2, b2, want, begin, added)

    def gram(self, plan: Plan, a: Tensor, b: Tensor, a2: Tensor | None, b2: Tensor | None, begin: Tensor | None = None) -> Tensor:
        return gradients.gram(a, b, a2, b2, begin)

    def sq_norm(self, plan: Plan, a: Tensor, b: Tensor, begin: Tensor | None = None) -> Tensor:
        return gradients.sq_norm(a, b, begin)

    def dot(self, plan: Plan, a: Tensor, b: Tensor, direction: Tensor, begin: Tensor | None = None) -> Tensor:
        return gradients.dot(a, b, direction, begin)

    def weighted_grad(
        self,
        plan: Plan,
        a: Tensor,
        b: Tensor,
        weights: Tensor,
        abs_weights: Tensor | None,
        direction: Tensor | None,
        begin: Tensor | None = None,
    ) -> Tensor:
        return gradients.weighted_grad(a, b, weights, abs_weights, direction, begin)

    def coordinate_sums_of_many(
        self,
        grad_sums: Sequence[Tensor],
        abs_sums: Sequence[Tensor],
        sq_sums: Sequence[Tensor],
        directions: Sequence[Tensor | None],
    ) -> Tensor:
        return coordinates.coordinate_sums_of_many(grad_sums, abs_sums, sq_sums, directions)

    def dense_interference(self, g: Tensor, direction: Tensor | None, gram: bool) -> InterferenceSums:
        return dense.dense_interference(g, direction, gram)

    def embedding_interference(
        self,
        ids: Tensor,
        b: Tensor,
        example_ids: Tensor | None,
        num_examples: int,
        num_embeddings: int,
        padding_idx: int,
        direction: Tensor | None,
        gram: bool,
        max_rows: int | None = None,
    ) -> EmbeddingSums:
        sizes = (num_examples, num_embeddings, padding_idx)
        return embedding.embedding_interference(ids, b, example_ids, *sizes, direction, gram, max_rows)

    def scale_bias_grad(
        self,
        x: Tensor | None,
        b: Tensor,
        mean: Tensor | None,
        rstd: Tensor | None,
        example_ids: Tensor | None,
        num_examples: int,
        bias: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        return scale_bias.scale_bias_grad(x, b, mean, rstd, example_ids, num_examples, bias)

    def linear_cross_entropy_forward(self, h: Tensor, weight: Tensor, target: Tensor, chunk: int) -> tuple[Tensor, Tensor, Tensor]:
        return linear_cross_entropy.forward(h, weight, target, chunk)

    def linear_cross_entropy_gradients(
        self, h: Tensor, weight: Tensor, target: Tensor, shift: Tensor, scale: Tensor, c: Tensor, chunk: int
    ) -> Iterator[tuple[int, int, Tensor]]:
        return linear_cross_entropy.output_gradients(h, weight, target, shift, scale, c, chunk)
