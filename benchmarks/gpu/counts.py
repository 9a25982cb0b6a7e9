"""What each op and a captured step do on a device, counted without one: ``python -m benchmarks.gpu.counts``.

The CUDA backend runs on CPU tensors with launches that do nothing. Counted are its own launches, PyTorch's operations that would be
launches too, and allocations, and timed is the Python of a repeated call. Nothing depends on the tensors' values, so a device does
the same. A step runs on the CPU in its steady state, where ``zerosum.capture`` would record it, and its operations are counted:
those of this library are as many launches as the first tables say.
"""

from __future__ import annotations

import os
import timeit
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import zerosum
from benchmarks.gpu.report import markdown
from zerosum.bench import machine
from zerosum.training.model import GPT, GPTConfig, token_losses
from zsl_kernels.backends.cuda import module
from zsl_kernels.backends.cuda.recorded import Repeated
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


READS = {"_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "_unique2", "unique_consecutive", "bincount"}


class Counts(NamedTuple):
    launches: tuple[str, ...]  # of this library, in order
    others: tuple[str, ...]  # PyTorch's operations that are launches
    allocations: int
    microseconds: float | None  # of Python, the fastest of some; None where it was not timed


class StepCounts(NamedTuple):
    """Of the operations of one forward and backward pass."""

    own: Counter[str]  # of this library
    others: int  # PyTorch's that are launches
    allocations: int
    reads: int  # that a host waits for


class _Launches:
    """The compiled module, of which every function does nothing but be counted."""

    flat: ClassVar[dict[str, object]] = {}  # of a repeated call's launches nothing is run

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
        name = function.overloadpacket.__name__
        self.called.append(name if function.namespace == "aten" else f"zsl.{name}")
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
        "dense_interference": partial(Repeated(lambda g: CUDA.dense_interference(g, None, False), tuple), g),
        "dense_interference, Gram": partial(Repeated(lambda g: CUDA.dense_interference(g, None, True), tuple), g),
        "scale_bias_grad": partial(Repeated(lambda *x: CUDA.scale_bias_grad(*x, None, N, True), tuple), x, x, mean, rstd),
        "embedding_interference": lambda: CUDA.embedding_interference(ids, x, None, N, V, -1, None, False, rows),
        "embedding_interference, Gram": lambda: CUDA.embedding_interference(ids, x, None, N, V, -1, None, True, rows),
    }
    return {name: call for name, call in calls.items() if name not in ops or name in plans}


def counts(dtype: torch.dtype, arch: int = 90, timed: bool = False) -> dict[str, Counts]:
    """Of every op that a device of the architecture has, by its name."""
    found = {}
    with _architecture(arch) as launches:
        for name, call in _calls(dtype).items():
            launches.called.clear()
            call()
            launched = tuple(launches.called)  # a call that was recorded does not pass here again
            with _Operations() as operations:
                call()
            used = Counter(operations.called)
            others = tuple(op for op in operations.called if op not in _ALLOCATIONS | _VIEWS)
            found[name] = Counts(launched, others, sum(used[op] for op in _ALLOCATIONS), 1e6 * _fastest(call) if timed else None)
    return found


def _fastest(call: Callable[[], object], rounds: int = 20, calls: int = 20) -> float:
    """Seconds."""
    return min(timeit.repeat(call, number=calls, repeat=rounds)) / calls


def step_counts(**options: Any) -> StepCounts:
    """Of a step of the project's GPT under ``zerosum.Probe(model, **options)`` in its steady state, or with ``probed=False`` under
    none."""
    probed = options.pop("probed", True)
    model = GPT(GPTConfig(vocab=64, width=32, layers=2, heads=4, positions=16))
    x, y = torch.randint(64, (2, N, 16), generator=torch.Generator().manual_seed(0))
    probe = zerosum.Probe(model, **options) if probed else nullcontext()
    operations = _Operations()
    for last in (False, False, False, True):
        model.zero_grad()
        with operations if last else nullcontext(), probe:
            token_losses(model, x, y).mean(1).sum().backward()
    names = Counter(operations.called)
    own = Counter({name.removeprefix("zsl."): n for name, n in names.items() if name.startswith("zsl.")})
    others = names.total() - own.total() - sum(names[op] for op in _ALLOCATIONS | _VIEWS)
    return StepCounts(own, others, sum(names[op] for op in _ALLOCATIONS), sum(names[op] for op in READS))


def main() -> None:
    print(f"Counted without a device, and timed on {machine.line(machine.describe())}.\n")
    for dtype, arch in ((torch.bfloat16, 90), (torch.float32, 90), (torch.float32, 80)):
        found = counts(dtype, arch, timed=True)
        rows = [
            [name, ", ".join(x.launches), ", ".join(x.others), str(x.allocations), f"{x.microseconds:.0f}"]
            for name, x in found.items()
        ]
        table = markdown(["op", "launches", "of PyTorch", "allocations", "µs of Python"], rows)
        print(f"{str(dtype).removeprefix('torch.')}, compute capability {arch / 10}\n\n{table}\n")
    steps = {
        "plain": step_counts(probed=False),
        "probed": step_counts(),
        "probed, Gram": step_counts(gram=True),
    }
    rows = [
        [name, str(x.others), ", ".join(f"{op} × {n}" for op, n in x.own.items()), str(x.allocations), str(x.reads)]
        for name, x in steps.items()
    ]
    print("A step of a GPT with 2 layers as a graph records it\n")
    print(markdown(["step", "operations of PyTorch", "of this library", "allocations", "reads"], rows))


if __name__ == "__main__":
    main()
