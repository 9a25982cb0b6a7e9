"""A device that is not there: tensors that say they are on it, hold their values on the CPU, and refuse to meet a CPU tensor.

What runs on it forgets no ``device=``, and moves nothing over on the way; only ``.to``, ``.cpu`` and reading a value cross. Those
reads are counted, since on a real device each of them waits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "npy"
_setup_privateuseone_for_python_backend(NAME)
DEVICE = torch.device(NAME, 0)
# autocast asks the device's module what it can do.
torch.npy.get_amp_supported_dtype = lambda: [torch.bfloat16]  # type: ignore[attr-defined]

aten = torch.ops.aten
_CROSS = {aten._to_copy.default, aten.copy_.default, aten.equal.default}
_READ = {aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default}
_SELECTIONS = {
    *(aten.nonzero.default, aten.masked_select.default, aten._unique2.default),
    *(aten.unique_dim.default, aten.unique_consecutive.default),
}
_INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}


class _There(Tensor):
    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> _There:
        x = Tensor._make_wrapper_subclass(
            cls, held.shape, held.stride(), held.storage_offset(), dtype=held.dtype, layout=held.layout, device=DEVICE
        )
        x.held = held
        return x

    def __repr__(self, **options: Any) -> str:
        return f"There({self.held!r})"

    def tolist(self) -> Any:
        READS[0] += 1
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if func.namespace == "zsl":  # its implementation is Python, whose own operations are to come here too
        with _Factories():
            return func._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **kwargs)
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
    strangers = [x for x in tensors if not isinstance(x, _There) and x.ndim > 0]
    if strangers and any(isinstance(x, _There) for x in tensors) and func not in _CROSS:
        raise RuntimeError(f"{func}: tensors of {[tuple(x.shape) for x in strangers]} on the CPU meet others on {DEVICE}")
    if func in _READ or _has_unknown_size(func, args, kwargs):
        READS[0] += 1
    device = kwargs.get("device")
    there = (device is None and any(isinstance(x, _There) for x in tensors)) or (device and torch.device(device).type == NAME)
    if device is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    held_args, held_kwargs = tree_map(lambda x: x.held if isinstance(x, _There) else x, (args, kwargs))
    found = func(*held_args, **held_kwargs)
    if not there:
        return found
    wrapped = tree_map(lambda x: _There(x) if isinstance(x, Tensor) else x, found)
    return return_and_correct_aliasing(func, args, kwargs, wrapped)


def _has_unknown_size(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether the result's size is that of values, for which a device is waited for."""
    if func is aten.repeat_interleave.Tensor:
        return kwargs.get("output_size") is None
    masked = func in _INDEXED and any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
    return masked or func in _SELECTIONS


READS = [0]


class _Factories(TorchDispatchMode):
    """Operations without a tensor that is there: those that make or bring one."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


@contextmanager
def elsewhere() -> Iterator[torch.device]:
    with _Factories():
        yield DEVICE
