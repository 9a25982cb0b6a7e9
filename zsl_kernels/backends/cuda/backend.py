"""The CUDA backend: which launch of the compiled kernels (csrc/cuda) a call goes to."""

from __future__ import annotations

from torch import Tensor

from zsl_kernels.backends.cuda import hopper, module, persistent, rows
from zsl_kernels.backends.gpu import GpuBackend
from zsl_kernels.planning.choose import Plan
from zsl_kernels.tied import AddedRows
from zsl_kernels.types import EmbeddingSums, InterferenceSums


class Cuda(GpuBackend):
    name = "cuda"
    ops = frozenset({"interference", "gram", "embedding_interference", "dense_interference", "scale_bias_grad"})

    def emulated(self) -> bool:
        return module.emulated()

    def load(self) -> str | None:
        return module.missing()

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

    def gram(self, plan: Plan, a: Tensor, b: Tensor, a2: Tensor | None, b2: Tensor | None, begin: Tensor | None = None) -> Tensor:
        launch = hopper.gram if plan.way == "hopper" else persistent.gram
        return launch(plan, a, b, a2, b2, begin)

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
    ) -> EmbeddingSums:
        return persistent.embedding_interference(ids, b, example_ids, num_examples, padding_idx, direction, gram)

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
