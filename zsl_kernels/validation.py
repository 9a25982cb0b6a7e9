"""Checks of arguments that every public function shares: errors name the argument, what was expected and what came."""

from __future__ import annotations

import torch
from torch import Tensor

from zsl_kernels.types import INPUT_DTYPES

# More than an address space holds; a tensor of stride 0 may claim them. csrc/bindings/workers.h has the same number: below it no
# number of bytes overflows, whatever is made of the tensor.
MOST_ELEMENTS = 1 << 48


def check_tensor(name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in INPUT_DTYPES:
        raise TypeError(f"{name}: expected float32, bfloat16, float16 or float64, got {x.dtype}")


def check_integers(name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
    if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        raise TypeError(f"{name}: expected integers, got {x.dtype}")


def check_elements(name: str, *sizes: int | torch.SymInt) -> None:
    """That a tensor of these sizes is not out of all bounds. An empty dimension counts as one: the others are looped over, too."""
    if torch.compiler.is_compiling():  # a bound on a size that is a symbol would be a guard of the graph
        return
    count: int | torch.SymInt = 1
    for size in sizes:
        count *= size or 1
    if count > MOST_ELEMENTS:
        raise ValueError(f"{name}: expected at most 2**48 elements, got {' x '.join(map(str, sizes))}")


def check_device(name: str, x: Tensor, like_name: str, like: Tensor) -> None:
    if x.device != like.device:
        raise ValueError(f"{name}: expected a tensor on {like.device} as {like_name}, got one on {x.device}")


def check_examples(x: Tensor, name: str, example_ids: object, num_examples: object) -> int:
    """N; ``x`` is (N, …), or (R, …) where ``example_ids`` say whose its rows are."""
    if example_ids is None:
        if num_examples is not None:
            raise ValueError(f"num_examples: expected with example_ids only, {name}'s first dimension says it; got {num_examples}")
        return x.shape[0]
    check_integers("example_ids", example_ids)
    assert isinstance(example_ids, Tensor)
    if example_ids.shape != x.shape[:1]:
        raise ValueError(f"example_ids: expected shape ({x.shape[0]},), one for each row of {name}, got {tuple(example_ids.shape)}")
    check_device("example_ids", example_ids, name, x)
    if num_examples is None:
        raise ValueError("num_examples: expected the number of examples, as example_ids are given; got None")
    N = check_size("num_examples", num_examples)
    check_elements("num_examples", N)
    return N


def check_size(name: str, size: object) -> int:
    if not isinstance(size, int | torch.SymInt) or isinstance(size, bool):
        raise TypeError(f"{name}: expected an integer, got {type(size).__name__}")
    if size < 0:
        raise ValueError(f"{name}: expected a size >= 0, got {size}")
    return size  # type: ignore[return-value]


def check_range(name: str, ids: Tensor | None, size: int, negative: bool = False) -> None:
    """That ids are integers below ``size`` and, but for ``negative``, not below zero.

    Reads their values, on the CPU alone: elsewhere it would wait. The ops call it, not the public functions.
    """
    if ids is None:
        return
    check_integers(name, ids)
    if ids.device.type != "cpu" or ids.numel() == 0:
        return
    least, most = (int(x) for x in ids.long().aminmax())
    if ids.dtype == torch.uint64 and least < 0:  # past what int64 holds
        least, most = 0, least + (1 << 64)
    if most >= size or (least < 0 and not negative):
        raise IndexError(f"{name}: expected values in [0, {size}), got {most if most >= size else least}")


def long(x: Tensor | None) -> Tensor | None:
    """As int64, if it is there."""
    return None if x is None else x.long()
