"""A CUDA graph without a device: the operations of a step on the CPU are recorded, and run again on the same memory.

As on a device, what is recorded may read no value, and Python does not run again: a replay that needs it, or memory that was given
away, gives other numbers than the step itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
_READS = {aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default, aten.nonzero.default}
_READS |= {aten.masked_select.default, aten._unique2.default, aten.unique_consecutive.default, aten.bincount.default}


class _Operations(TorchDispatchMode):
    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "zsl":  # its implementation is Python, whose own operations are to come here too
            with self:
                return func._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **kwargs)
        if func in _READS:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        found = func(*args, **kwargs)
        self._recorder.operation(func, args, kwargs, found)
        return found


class Recorder:
    """Stands for a CUDA graph in :data:`zerosum.graphs.RECORDERS`."""

    def __init__(self, device: torch.device, pool: Any) -> None:
        self._calls: list[Callable[[], object]] = []
        self.recording = False
        self.counts: Counter[str] = Counter()

    def operation(self, func: Any, args: Any, kwargs: Any, found: Any) -> None:
        """Of PyTorch's. Tensors are kept, as a graph keeps its pool."""
        self.counts[func.overloadpacket.__name__] += 1
        results = [x for x in tree_leaves(found) if isinstance(x, Tensor)]
        held = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        new = [k for k, x in enumerate(results) if x.untyped_storage()._cdata not in held]
        if not func._schema.is_mutable and not new:
            self._calls.append(lambda: (args, kwargs, found))  # a view
        elif func.overloadpacket.__name__ in ("empty", "new_empty", "empty_like", "empty_strided"):
            self._calls.append(lambda: found)
        else:

            def again() -> None:
                values = [x for x in tree_leaves(func(*args, **kwargs)) if isinstance(x, Tensor)]
                for k in new:
                    results[k].copy_(values[k])

            self._calls.append(again)

    def warm_up(self, run: Callable[[], object]) -> None:
        run()

    def record(self, run: Callable[[], object]) -> None:
        self.recording = True
        try:
            with _Operations(self):
                run()
        finally:
            self.recording = False

    def replay(self) -> None:
        with torch.no_grad():
            for call in self._calls:
                call()
