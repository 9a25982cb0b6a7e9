"""What each op does on a device, counted without one: ``python -m benchmarks.gpu.counts``.

The CUDA backend runs on CPU tensors with launches that do nothing. Counted are its own launches, PyTorch's operations that would be
launches too, and allocations. Nothing depends on the tensors' values, so a device does the same.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gpu.report import markdown
from zsl_kernels.backends.cuda import module
from zsl_kernels.backends.dispatch import CUDA, plan_call

# Those that allocate and those that only look at memory in another way. All others are launches.
_ALLOCATIONS = {"empty", "new_empty", "empty_like", "empty_strided", "resize_"}
_VIEWS = {
    "view",
    "_unsafe_view",
    "reshape",
    "select",
    "slice",
    "alias",
    "expand",
    "unsqueeze",
    "squeeze",
    "t",
    "transpose",
    "detach",
    "unbind",
}
N, T, K, O, V = 8, 256, 768, 1024, 5000


class Counts(NamedTuple):
    launches: tuple[str, ...]  # of this library, in order
    others: tuple[str, ...]  # PyTorch's operations that are launches
    allocations: int


class _Launches:
    """The compiled module, of which every function does nothing but be counted."""

    def __init__(self) -> None:
        self.called: list[str] = []

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *arguments: self.called.append(name)

    def versions(self) -> tuple[int, int]:
        return 13000, 13000


class _Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.called: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.called.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


@contextmanager
def _architecture(arch: int) -> Iterator[_Launches]:
    before = os.environ.get("ZSL_GPU_ARCH")
    os.environ["ZSL_GPU_ARCH"] = str(arch)
    launches = _Launches()
    module.emulate(launches)
    try:
        yield launches
    finally:
        module.emulate(None)
        if before is None:
            del os.environ["ZSL_GPU_ARCH"]
        else:
            os.environ["ZSL_GPU_ARCH"] = before


def _calls(dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    a, b = torch.zeros(N, T, K, dtype=dtype), torch.zeros(N, T, O, dtype=dtype)
    u, w, g = torch.zeros(O, K), torch.zeros(N), torch.zeros(N, 4096, dtype=dtype)
    x, mean, rstd = torch.zeros(N, T, K, dtype=dtype), torch.zeros(N, T), torch.zeros(N, T)
    ids, rows = torch.zeros(N, T, dtype=torch.int64), min(V, N * T)

    def planned(op: str, **options: Any) -> Any:
        return plan_call(op, a, b, impl="cuda", **options)

    device = torch.device("cpu")
    ops = ("interference", "gram", "sq_norm", "dot", "weighted_grad")
    plans = {op: planned(op) for op in ops if CUDA.lacks(op, device) is None}
    with_gram = planned("interference", gram=True)

    def repeated(plan: Any, u: torch.Tensor | None = None) -> Callable[[], object]:
        gram = plan.call.gram
        call = CUDA.prepare_interference(plan, a, b, u, lambda a, b, u: CUDA.interference(plan, a, b, u, gram))
        return lambda: call(a, b, u)

    calls: dict[str, Callable[[], object]] = {
        "interference": repeated(plans["interference"]),
        "interference, direction": repeated(plans["interference"], u),
        "interference, Gram": repeated(with_gram),
        "gram": lambda: CUDA.gram(plans["gram"], a, b, None, None),
        "sq_norm": lambda: CUDA.sq_norm(plans["sq_norm"], a, b),
        "dot": lambda: CUDA.dot(plans["dot"], a, b, u),
        "weighted_grad": lambda: CUDA.weighted_grad(plans["weighted_grad"], a, b, w, None, None),
        "dense_interference": lambda: CUDA.dense_interference(g, None, False),
        "dense_interference, Gram": lambda: CUDA.dense_interference(g, None, True),
        "scale_bias_grad": lambda: CUDA.scale_bias_grad(x, x, mean, rstd, None, N, True),
        "embedding_interference": lambda: CUDA.embedding_interference(ids, x, None, N, V, -1, None, False, rows),
        "embedding_interference, Gram": lambda: CUDA.embedding_interference(ids, x, None, N, V, -1, None, True, rows),
    }
    return {name: call for name, call in calls.items() if name not in ops or name in plans}


def counts(dtype: torch.dtype, arch: int = 90) -> dict[str, Counts]:
    """Of every op that a device of the architecture has, by its name."""
    found = {}
    with _architecture(arch) as launches:
        for name, call in _calls(dtype).items():
            launches.called.clear()
            with _Operations() as operations:
                call()
            used = Counter(operations.called)
            others = tuple(op for op in operations.called if op not in _ALLOCATIONS | _VIEWS)
            found[name] = Counts(tuple(launches.called), others, sum(used[op] for op in _ALLOCATIONS))
    return found


def main() -> None:
    for dtype, arch in ((torch.bfloat16, 90), (torch.float32, 90), (torch.float32, 80)):
        found = counts(dtype, arch)
        rows = [[name, ", ".join(x.launches), ", ".join(x.others), str(x.allocations)] for name, x in found.items()]
        table = markdown(["op", "launches", "of PyTorch", "allocations"], rows)
        print(f"{str(dtype).removeprefix('torch.')}, compute capability {arch / 10}\n\n{table}\n")


if __name__ == "__main__":
    main()
