"""``Triton``, the Triton backend: it selects the launch for each call. The first call that may use Triton imports it."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from zsl_kernels.backends.chunked import gradients
from zsl_kernels.backends.gpu import GpuBackend
from zsl_kernels.planning.choose import Plan
from zsl_kernels.tied import AddedRows
from zsl_kernels.types import Cotangents, InterferenceSums


class Triton(GpuBackend):
    name = "triton"
    # The other ops are plain matrix products or handle small parameters.
    ops = frozenset(
        {
            "interference",
            "interference_backward",
            "gram",
            "sq_norm",
            "linear_cross_entropy",
            "coordinate_sums",
        }
    )

    def emulated(self) -> bool:
        """Return whether Triton's interpreter emulates the kernels."""
        return os.environ.get("TRITON_INTERPRET") == "1"

    def load(self) -> str | None:
        importlib.import_module("triton")
        return None

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
        from zsl_kernels.backends.triton import interference, rank_one

        with torch.cuda.device_of(a):
            if plan.way == "rank-one":
                return gradients.rank_one(a, b, direction, gram, rank_one.sums(plan, a.squeeze(1), b.squeeze(1)))
            return interference.interference(plan, a, b, direction, gram, begin, added)

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
        from zsl_kernels.backends.triton import backward

        return backward.backward(plan, a, b, direction, c, mix, a2, b2, want, begin, added)

    def gram(self, plan: Plan, a: Tensor, b: Tensor, a2: Tensor | None, b2: Tensor | None, begin: Tensor | None = None) -> Tensor:
        from zsl_kernels.backends.triton import ghost, interference

        with torch.cuda.device_of(a):
            if plan.way == "ghost":
                return ghost.gram(plan, a, b, a2, b2)
            return interference.gram(plan, a, b, a2, b2, begin)

    def sq_norm(self, plan: Plan, a: Tensor, b: Tensor, begin: Tensor | None = None) -> Tensor:
        from zsl_kernels.backends.triton import ghost, interference

        with torch.cuda.device_of(a):
            if plan.way == "ghost":
                return ghost.sq_norm(plan, a, b)
            return interference.sq_norm(plan, a, b, begin)

    def coordinate_sums_of_many(
        self,
        grad_sums: Sequence[Tensor],
        abs_sums: Sequence[Tensor],
        sq_sums: Sequence[Tensor],
        directions: Sequence[Tensor | None],
    ) -> Tensor:
        from zsl_kernels.backends.triton import coordinates

        return coordinates.coordinate_sums_of_many(grad_sums, abs_sums, sq_sums, directions)

    def linear_cross_entropy_forward(self, h: Tensor, weight: Tensor, target: Tensor, chunk: int) -> tuple[Tensor, Tensor, Tensor]:
        from zsl_kernels.backends.triton import linear_cross_entropy

        return linear_cross_entropy.forward(h, weight, target)

    def linear_cross_entropy_gradients(
        self, h: Tensor, weight: Tensor, target: Tensor, shift: Tensor, scale: Tensor, c: Tensor, chunk: int
    ) -> Iterator[tuple[int, int, Tensor]]:
        from zsl_kernels.backends.triton import linear_cross_entropy

        return linear_cross_entropy.output_gradients(h, weight, target, shift, scale, c, chunk)
