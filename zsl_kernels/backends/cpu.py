"""The CPU backend: it calls the compiled kernels of csrc/cpu.

csrc/bindings registers the kernels as functions in ``torch.ops.zsl_cpu``: product_ops.cpp those of layer inputs and output
gradients, row_ops.cpp the others.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from zsl_kernels.backends.base import OPS, Backend
from zsl_kernels.planning.call import Call
from zsl_kernels.planning.choose import Plan, choose
from zsl_kernels.tied import AddedRows
from zsl_kernels.types import Cotangents, EmbeddingSums, InterferenceSums

kernels = torch.ops.zsl_cpu


def _load() -> str | None:
    """Load the compiled library. Return why this failed, or None."""
    library = Path(__file__).parents[1] / "_cpu.so"
    if not library.exists():
        return "it was not built: reinstall with a C++ compiler and ZSL_BUILD_NATIVE unset"
    try:
        importlib.import_module("zsl_kernels._cpu")
        kernels.isa()
    except (ImportError, RuntimeError) as error:
        return f"{error}; if you changed torch after the installation, reinstall zsl_kernels"
    return None


# Load the library once, on import. torch.compile would trace a cached function and warn about it.
MISSING = _load()


class Cpu(Backend):
    name = "cpu"
    # The chunked backend implements the head on the CPU too, with this module's `product`.
    ops = OPS - {"linear_cross_entropy"}
    checks_ids = True

    def why_not(self, device: torch.device | None = None) -> str | None:
        return MISSING

    def takes(self, device: torch.device) -> bool:
        return device.type == "cpu"

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
        return InterferenceSums(*kernels.interference(a, b, direction, gram, *plan.tile, begin, *_pointers(added)))

    def gram(self, plan: Plan, a: Tensor, b: Tensor, a2: Tensor | None, b2: Tensor | None, begin: Tensor | None = None) -> Tensor:
        itself = a2 is None
        a2, b2 = (a, b) if itself else (a2, b2)
        if plan.way == "ghost":
            return kernels.ghost(a, b, a2, b2, itself, False)
        return kernels.gram_direct(a, b, a2, b2, itself, *plan.tile, begin)

    def dot(self, plan: Plan, a: Tensor, b: Tensor, direction: Tensor, begin: Tensor | None = None) -> Tensor:
        return kernels.dot_direct(a, b, direction, *plan.tile, begin)

    def sq_norm(self, plan: Plan, a: Tensor, b: Tensor, begin: Tensor | None = None) -> Tensor:
        if plan.way == "ghost":
            return kernels.ghost(a, b, a, b, True, True)
        return kernels.sq_norm_direct(a, b, *plan.tile, begin)

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
        return kernels.weighted_grad(a, b, weights, abs_weights, direction, *plan.tile, begin)

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
        found = kernels.backward(a, b, direction, *c, mix, a2, b2, *want, *plan.tile, begin, *_pointers(added))
        da, db, d_added = (x if wanted else None for x, wanted in zip(found, want, strict=True))
        return da, db, d_added

    def coordinate_sums_of_many(
        self,
        grad_sums: Sequence[Tensor],
        abs_sums: Sequence[Tensor],
        sq_sums: Sequence[Tensor],
        directions: Sequence[Tensor | None],
    ) -> Tensor:
        return kernels.coordinate_sums_of_many.default(grad_sums, abs_sums, sq_sums, directions)

    def dense_interference(self, g: Tensor, direction: Tensor | None, gram: bool) -> InterferenceSums:
        return InterferenceSums._make(kernels.dense_interference(g, direction, gram))

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
        found = kernels.embedding_interference(ids, b, example_ids, num_examples, num_embeddings, padding_idx, direction, gram)
        return EmbeddingSums._make(found).with_rows(max_rows)

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
        return kernels.scale_bias_grad(x, b, mean, rstd, example_ids, num_examples, bias)


def product(x: Tensor, y: Tensor, out: Tensor) -> None:
    """Compute ``out = x @ y`` in the sum dtype, for operands of any dtype, as the gradient of a single example."""
    call = Call("weighted_grad", 1, x.shape[1], y.shape[1], x.shape[0], threads=torch.get_num_threads())
    kernels.product(x, y, out, *choose(call, ("cpu",)).tile)


def _pointers(added: AddedRows | None) -> tuple[Tensor | None, ...]:
    return (None, None, None) if added is None else (added.begin, added.feature, added.values)
