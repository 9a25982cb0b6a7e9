"""Checks of arguments that every public function shares: errors name the argument, what was expected and what came."""

from __future__ import annotations

from torch import Tensor

from zsl_kernels.types import INPUT_DTYPES


def check_tensor(name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in INPUT_DTYPES:
        raise TypeError(f"{name}: expected float32, bfloat16, float16 or float64, got {x.dtype}")


def check_ids(ids: Tensor | None, example_ids: Tensor | None, num_examples: int, num_embeddings: int) -> None:
    """That ids name rows and examples that there are. Reads their values: the ops call it, not the public functions."""
    if ids is not None and ids.numel() and (largest := int(ids.max())) >= num_embeddings:
        raise IndexError(f"ids: expected values below num_embeddings ({num_embeddings}), got {largest}")
    if example_ids is not None and example_ids.numel():
        least, most = (int(x) for x in example_ids.aminmax())
        if least < 0 or most >= num_examples:
            raise IndexError(f"example_ids: expected values from 0 to num_examples - 1 ({num_examples - 1}), got {least} to {most}")
