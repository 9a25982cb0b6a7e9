"""Records a call of the CUDA backend once and repeats it without Python.

A call consists of allocations and launches (:class:`zsl_kernels.backends.cuda.module.Launches`). The shapes, strides and dtypes of
the operands determine all arguments of the launches except addresses. :func:`record` runs a call and records these arguments and
the origin of each address. It returns an object (csrc/bindings/recorded.cpp) that repeats the allocations and launches for other
operands with the same shapes, strides and dtypes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from zsl_kernels.backends import cpu
from zsl_kernels.backends.cuda import module

Recorded: Any = None
if cpu.MISSING is None:
    from zsl_kernels._cpu import Recorded  # type: ignore[no-redef]

Results = tuple[Tensor | None, ...]
Call = Callable[..., Results]

_ALLOCATIONS = {"empty", "new_empty", "empty_strided", "empty_like"}
_ALIGNMENT = 256  # bytes, between arrays that share an allocation
_NUMBER = 4  # bytes of an allocated element


class _Allocation(NamedTuple):
    tensor: Tensor  # kept alive so that its memory is not reused while the call is recorded

    @property
    def begin(self) -> int:
        return self.tensor.untyped_storage().data_ptr()

    @property
    def bytes(self) -> int:
        return self.tensor.untyped_storage().nbytes()


class _Launch(NamedTuple):
    name: str
    numbers: list[int]
    streams: list[int]  # the indices of the stream among the numbers


class _Operations(TorchDispatchMode):
    """Records the allocations of PyTorch, and whether another operation ran."""

    def __init__(self) -> None:
        super().__init__()
        self.allocations: list[_Allocation] = []
        self.other = ""  # the first operation that computes a new tensor or writes to one

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if name in _ALLOCATIONS:
            self.allocations.append(_Allocation(found))
        elif not _storages(found) <= _storages((args, kwargs)) or function._schema.is_mutable:
            self.other = self.other or name
        return found


def _storages(x: Any) -> set[int]:
    """Return the storages of all tensors in x. An operation such as ``to`` returned a view if it returned an operand's storage."""
    return {y.untyped_storage()._cdata for y in tree_leaves(x) if isinstance(y, Tensor)}


class _Recorder:
    """Replaces the compiled module and records the launches."""

    def __init__(self, compiled: Any, stream: int) -> None:
        self.compiled, self.stream = compiled, stream
        self.launches: list[_Launch] = []

    def __getattr__(self, name: str) -> Any:
        function = getattr(self.compiled, name)
        if name not in module.LAUNCHES:
            return function

        def launch(*arguments: Any) -> None:
            numbers: list[int] = []
            streams: list[int] = []
            for x in _flat(arguments):
                if x is module.STREAM:
                    streams.append(len(numbers))
                numbers.append(int(x))
            self.launches.append(_Launch(name, numbers, streams))
            function(*_with_stream(arguments, self.stream))

        return launch


def _flat(x: Any) -> Iterator[Any]:
    """Flatten nested arguments in the way that csrc/bindings/cuda_module.cpp expects."""
    if isinstance(x, list):
        yield len(x)
    if isinstance(x, (list, tuple)):
        for y in x:
            yield from _flat(y)
    else:
        yield x


def _with_stream(x: Any, stream: int) -> Any:
    if isinstance(x, (list, tuple)):
        return type(x)(_with_stream(y, stream) for y in x)
    return stream if x is module.STREAM else x


def record(call: Call, operands: Sequence[Tensor | None]) -> tuple[Any, Any]:
    """Run ``call(*operands)``. Return its results, which are float32, and the recorded call, or None if it cannot be repeated.

    A call cannot be repeated if

    - a PyTorch operation other than an allocation ran;
    - operands share memory, so that the origin of an address is ambiguous;
    - the CPU extension, which repeats calls, was not built.
    """
    device = next(x.device for x in operands if x is not None)
    recorder, operations = _Recorder(module.compiled(), module.current_stream(device)), _Operations()
    with module.standing_in(recorder), operations:
        results = call(*operands)
    if Recorded is None or operations.other or any(x is not None and x.is_neg() for x in operands) or _overlap(operands):
        return results, None
    return results, _repeated(recorder, operations.allocations, operands, results, device)


def _overlap(operands: Sequence[Tensor | None]) -> bool:
    ranges = sorted((x.data_ptr(), x.data_ptr() + _bytes(x)) for x in operands if x is not None and _bytes(x))
    return any(begin < end for (_, end), (begin, _) in itertools.pairwise(ranges))


def _repeated(
    recorder: _Recorder,
    allocations: Sequence[_Allocation],
    operands: Sequence[Tensor | None],
    results: Results,
    device: torch.device,
) -> Any:
    places = [_Place(x.data_ptr(), _bytes(x), k, 0) for k, x in enumerate(operands) if x is not None and _bytes(x)]
    sizes: list[list[int]] = []
    held: dict[int, tuple[int, int]] = {}  # by address: the shared allocation, and the offset in it in bytes
    for k, group in enumerate(_grouped(allocations, results)):
        total = 0
        for allocation in group:
            places.append(_Place(allocation.begin, allocation.bytes, len(operands) + k, total))
            held[allocation.begin] = k, total
            total += allocation.bytes + -allocation.bytes % (_ALIGNMENT if len(group) > 1 else _NUMBER)
        sizes.append([total // _NUMBER])
    found: list[Any] = []
    for x in results:
        if x is None:
            found.append(None)
            continue
        if x.dtype != torch.float32 or x.untyped_storage().data_ptr() not in held:
            return None
        k, start = held[x.untyped_storage().data_ptr()]
        found.append((k, list(x.shape), list(x.stride()), start // _NUMBER + x.storage_offset()))
    flat = recorder.compiled.flat
    launches = [(flat.get(launch.name), launch.numbers, _addresses(launch, places)) for launch in recorder.launches]
    return Recorded(list(operands), device, sizes, launches, found)


class _Place(NamedTuple):
    begin: int
    bytes: int
    source: int
    offset: int  # bytes from the beginning of the source


def _addresses(launch: _Launch, places: Iterable[_Place]) -> list[tuple[int, int, int]]:
    """Return (index of the number, source, offset) for each address. Small numbers are sizes or strides and not addresses."""
    found = [(at, -1, 0) for at in launch.streams]
    for at, number in enumerate(launch.numbers):
        if at in launch.streams or number < 1 << 20:
            continue
        for begin, length, source, offset in places:
            if begin <= number < begin + length:
                found.append((at, source, offset + number - begin))
                break
    return found


def _bytes(x: Tensor) -> int:
    """Return the bytes from the first to the last element."""
    if not x.numel():
        return 0
    return (1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))) * x.element_size()


def _grouped(allocations: Sequence[_Allocation], results: Results) -> list[list[_Allocation]]:
    """Group tensors into shared allocations, which saves time. Tensors that share one have the same lifetime.

    The first result, which becomes a weight's ``.grad``, has its own allocation. The other results of its size share one. The
    smaller results share one. Everything else is a workspace.
    """
    by_address = {x.begin: x for x in allocations if x.bytes}
    kept: list[_Allocation] = []
    for x in results:
        allocation = None if x is None else by_address.pop(x.untyped_storage().data_ptr(), None)
        if allocation is not None:
            kept.append(allocation)
    first, others = kept[:1], kept[1:]
    large = [x for x in others if x.bytes == first[0].bytes]
    small = [x for x in others if x.bytes != first[0].bytes]
    return [group for group in (first, large, small, list(by_address.values())) if group]


class Repeated:
    """A function that records its first call whose operands share no memory, and then repeats it.

    It calls ``call`` instead if the operands have another layout, if the recorded call cannot be repeated, or if ``setting()`` has
    changed. ``setting()`` returns the PyTorch precision settings that the results depend on.
    """

    def __init__(self, call: Call, make: Callable[[Results], Any], setting: Callable[[], object] | None = None) -> None:
        self._call, self._make, self._setting = call, make, setting
        self._set: object = None
        self._native: Any = None
        self._tried = False

    def __call__(self, *operands: Tensor | None) -> Any:
        if self._native is not None and (self._setting is None or self._setting() == self._set):
            found = self._native(*operands)
            if found is not None:
                return self._make(found)
        elif not self._tried and not _overlap(operands):
            self._tried = True
            self._set = None if self._setting is None else self._setting()
            found, self._native = record(self._call, operands)
            return found
        return self._call(*operands)
