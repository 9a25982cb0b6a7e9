"""Argument checks shared by the public functions. Every error names the argument, the expected value and the given one."""

from __future__ import annotations

import torch
from torch import Tensor

from zsl_kernels.types import INPUT_DTYPES

# More elements than memory can hold; only a tensor with stride 0 can claim more. csrc/bindings/workers.h has the same limit. Below
# it, no size in bytes that is computed from a tensor overflows.
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
    """Check that a tensor of these sizes is not too large. A size of 0 counts as 1, because kernels still loop over the others."""
    if torch.compiler.is_compiling():  # comparing a symbolic size with the bound would add a guard to the graph
        return
    count: int | torch.SymInt = 1
    for size in sizes:
        count *= size or 1
    if count > MOST_ELEMENTS:
        raise ValueError(f"{name}: expected at most 2**48 elements, got {' x '.join(map(str, sizes))}")


def check_device(name: str, x: Tensor, like_name: str, like: Tensor) -> None:
    if x.device != like.device:
        raise ValueError(f"{name}: expected a tensor on {like.device}, the device of {like_name}, got one on {x.device}")


def check_examples(x: Tensor, name: str, example_ids: object, num_examples: object) -> int:
    """Check the example ids and return N. ``x`` is (N, …), or (R, …) if ``example_ids`` gives the example of each row."""
    if example_ids is None:
        if num_examples is not None:
            raise ValueError(f"num_examples: only valid with example_ids; otherwise N is {name}.shape[0]; got {num_examples}")
        return x.shape[0]
    check_integers("example_ids", example_ids)
    assert isinstance(example_ids, Tensor)
    if example_ids.shape != x.shape[:1]:
        raise ValueError(f"example_ids: expected shape ({x.shape[0]},), one for each row of {name}, got {tuple(example_ids.shape)}")
    check_device("example_ids", example_ids, name, x)
    if num_examples is None:
        raise ValueError("num_examples: expected an integer because example_ids is given, got None")
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
    """Check that ids are integers in [0, size), or any integers below ``size`` with ``negative``.

    It reads the values on the CPU only: elsewhere this would synchronize. The ops call it; the public functions do not.
    """
    if ids is None:
        return
    check_integers(name, ids)
    if ids.device.type != "cpu" or ids.numel() == 0:
        return
    least, most = (int(x) for x in ids.long().aminmax())
    if ids.dtype == torch.uint64 and least < 0:  # values beyond the range of int64 have wrapped around
        least, most = 0, least + (1 << 64)
    if most >= size or (least < 0 and not negative):
        raise IndexError(f"{name}: expected values in [0, {size}), got {most if most >= size else least}")


def long(x: Tensor | None) -> Tensor | None:
    """Convert to int64; keep None."""
    return None if x is None else x.long()
