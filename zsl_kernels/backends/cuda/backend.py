"""``Cuda``, the CUDA backend: it selects the launch of the compiled kernels (csrc/cuda) for each call."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from zsl_kernels.backends.base import Interference, Results
from zsl_kernels.backends.cuda import embedding, hopper, module, persistent, rows
from zsl_kernels.backends.cuda.recorded import Repeated
from zsl_kernels.backends.gpu import GpuBackend, gpu_of
from zsl_kernels.planning.choose import Plan
from zsl_kernels.planning.gpu_cost import has_hopper
from zsl_kernels.tied import AddedRows
from zsl_kernels.types import EmbeddingSums, InterferenceSums


class Cuda(GpuBackend):
    name = "cuda"
    ops = frozenset(
        {
            "interference",
            "gram",
            "sq_norm",
            "dot",
            "weighted_grad",
            "embedding_interference",
            "dense_interference",
            "scale_bias_grad",
        }
    )

    def emulated(self) -> bool:
        return module.emulated()

    def load(self) -> str | None:
        return module.missing()

    def lacks(self, op: str | None, device: torch.device, arch: int | None = None) -> str | None:
        if op not in ("sq_norm", "dot", "weighted_grad") or has_hopper(gpu_of(device, arch)):
            return None
        return "it needs compute capability 9.0 and a build with nvcc 12 or newer"

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
        launch = hopper.interference if plan.way == "hopper" else persistent.interference
        return launch(plan, a, b, direction, gram, begin, added)

    def prepare_interference(self, plan: Plan, a: Tensor, b: Tensor, direction: Tensor | None, call: Interference) -> Interference:
        if plan.way == "hopper" and plan.call.gram and not hopper.in_one_slab(plan, a.dtype):
            return call  # a recorded call would allocate all slabs at the same time
        repeated = Repeated(call, InterferenceSums._make, hopper.setting(a.dtype, plan.call.gram))
        if direction is None or direction.dtype == torch.float32:
            return repeated
        return lambda a, b, direction: repeated(a, b, None if direction is None else direction.float())  # the kernels read float32

    def prepare(self, call: Callable[..., Results], make: Callable[..., Results]) -> Callable[..., Results]:
        return Repeated(call, make)

    def gram(self, plan: Plan, a: Tensor, b: Tensor, a2: Tensor | None, b2: Tensor | None, begin: Tensor | None = None) -> Tensor:
        launch = hopper.gram if plan.way == "hopper" else persistent.gram
        return launch(plan, a, b, a2, b2, begin)

    def sq_norm(self, plan: Plan, a: Tensor, b: Tensor, begin: Tensor | None = None) -> Tensor:
        return hopper.sq_norm(plan, a, b, begin)

    def dot(self, plan: Plan, a: Tensor, b: Tensor, direction: Tensor, begin: Tensor | None = None) -> Tensor:
        return hopper.dot(plan, a, b, direction, begin)

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
        return hopper.weighted_grad(plan, a, b, weights, abs_weights, direction, begin)

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
        # A smaller max_rows is possible only on the CPU, where the kernels are emulated.
        known = max_rows if max_rows is not None and max_rows >= min(num_embeddings, ids.numel()) else None
        sizes = (num_examples, num_embeddings, padding_idx)
        return embedding.embedding_interference(ids, b, example_ids, *sizes, direction, gram, known).with_rows(max_rows)

    def dense_interference(self, g: Tensor, direction: Tensor | None, gram: bool) -> InterferenceSums:
        return rows.dense_interference(g, direction, gram)

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
        return rows.scale_bias_grad(x, b, mean, rstd, example_ids, num_examples, bias)
