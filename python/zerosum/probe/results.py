"""Holds a weight's sums and scalars, over one backward pass or over several."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

import zsl_kernels as zk
from zerosum.probe.contributions import SCALARS, WEIGHT_SHAPED, Sums, densified
from zsl_kernels import CoordinateSums
from zsl_kernels.types import sum_dtype
from zsl_kernels.weight_uses.eager import Left, coordinate_sums_of_left


@dataclass(eq=False)
class Pass:
    """One measured backward pass: its number of examples, and how its loss relates to the examples' own losses.

    g_i = ``scale`` · the gradient of what was differentiated, times ``denominators[i]`` if these differ. ``factors`` lead to one
    more factor for all passes of a block (:func:`common_scale`).
    """

    number: int
    examples: int
    scale: float = 1.0
    denominators: Tensor | None = None
    factors: tuple[Tensor, Tensor] | None = None  # the number of examples with losses, and Σ c over them, if read off the loss
    unbatched: Any = field(default=nullcontext, repr=False)  # the context in which results are computed

    @property
    def simple(self) -> bool:
        """Whether a use's statistics are those of its gradient without scaling."""
        return self.denominators is None and self.unbatched is nullcontext


class Scale:
    """A number that may be on a device. Reading ``value`` waits for the device once."""

    def __init__(self, number: Tensor | float, factors: tuple[Tensor, Tensor] | None = None) -> None:
        self._number = number
        self.factors = factors  # the sums of :attr:`Pass.factors` that it was computed from

    @classmethod
    def of_factors(cls, count: Tensor, total: Tensor) -> Scale:
        """Return n / |Σ c|, which gives an average example weight one."""
        return cls(torch.where((count > 0) & (total != 0), count / total.abs(), 1.0), (count, total))

    def reread(self) -> Scale:
        return Scale(self._number, self.factors)

    @cached_property
    def value(self) -> float:
        return float(self._number)


ONE = Scale(1.0)


class _Scalars(NamedTuple):
    """The scalars of one pass, without its sums."""

    l1: Tensor
    sq_norm: Tensor
    dot: Tensor | None
    abs_dot: Tensor | None
    gram: Tensor | None

    @classmethod
    def of(cls, sums: Sums) -> _Scalars:
        return cls(sums.l1, sums.sq_norm, sums.dot, sums.abs_dot, sums.gram)


class Results:
    """A parameter's sums and scalars for the loss that was differentiated, over its passes.

    ``grad_sum`` shares the memory that autograd stored as ``.grad``, so it takes none of its own. Its version counter shows whether
    someone has written to it since.
    """

    left: Left | None = None  # sums that nobody has read yet
    common = ONE  # the factor of all of the block's results
    coordinates: tuple[_Table, int] | None = None
    placed: Callable[[Tensor], Tensor] | None = None  # turns a shard into a DTensor
    _scale: float | None = None  # None for the scale of its only pass
    _is_current: Callable[[], bool] | None = None
    _grams: list[Tensor] | None = None  # of several passes
    _absent = False  # whether grad_sum was overwritten before the results were stored

    def __init__(self, sums: Sums | Left, of: Pass, parameter: Tensor) -> None:
        if isinstance(sums, Left):
            self.left, self._version = sums, sums.version
        else:
            self.sums = sums
            self.hold(sums.grad_sum)
        self.latest = of
        self.passes = {of}
        self._shape, self._dtype = parameter.shape, parameter.dtype
        self._scalars: dict[Pass, _Scalars] = {}  # of several passes

    @classmethod
    def held(
        cls,
        sums: Sums,
        grams: list[Tensor] | None,
        shape: torch.Size,
        coordinates: CoordinateSums | None = None,
        absent: bool = False,
    ) -> Results:
        """Build results that belong to no step: sums and scalars of the losses themselves, in memory that nobody else writes to.

        ``absent``: Σ g is missing, because it had been overwritten.
        """
        mine = cls.__new__(cls)
        mine.sums, mine.passes, mine._scalars, mine._scale = sums, set(), {}, 1.0
        mine._shape, mine._dtype, mine._grams = shape, sums.abs_sum.dtype, grams
        mine.hold(sums.grad_sum)
        mine._absent = absent
        if coordinates is not None:
            mine.coordinates = _Table(torch.tensor([coordinates], dtype=torch.float64)), 0
        return mine

    @cached_property
    def sums(self) -> Sums:
        assert self.left is not None
        sums, self.left = Sums(*self.left.tensors()), None
        self.grad_sum = sums.grad_sum
        return sums

    @cached_property
    def grad_sum(self) -> Tensor:
        return self.sums.grad_sum

    @property
    def grams(self) -> list[Tensor] | None:
        """The Gram matrix of each pass."""
        return self._grams if self._grams is not None else None if self.sums.gram is None else [self.sums.gram]

    @property
    def scale(self) -> float:
        return self.latest.scale if self._scale is None else self._scale

    def own(self) -> None:
        """Replace ``grad_sum`` by a copy, because its memory is about to be overwritten."""
        self.sums.grad_sum = self.sums.grad_sum.clone()
        self.hold(self.sums.grad_sum)

    def hold(self, grad_sum: Tensor) -> None:
        self.grad_sum, self._version = grad_sum, grad_sum._version

    @property
    def version(self) -> int:
        """The version counter of the memory that holds ``grad_sum``."""
        return self.grad_sum._version if self.left is None else self.left.version

    @property
    def written_to(self) -> bool:
        return self._absent or self.version != self._version

    def reread(self, is_current: Callable[[], bool] | None, version: int, memo: dict[Any, Any]) -> Results:
        """Return results that read the tensors' present contents. ``memo`` holds what the results of one block share."""
        mine = copy.copy(self)
        mine._is_current, mine._version = is_current, version
        mine.common = memo.setdefault(self.common, self.common.reread())
        if self.coordinates is not None:
            table, row = self.coordinates
            mine.coordinates = memo.setdefault(table, table.reread()), row
        return mine

    def check_current(self, name: str) -> None:
        if self._is_current is not None and not self._is_current():
            raise RuntimeError(
                f"{name!r}: a later replay of the step has overwritten these results: "
                "read what you need from a report before the next replay"
            )

    def merge(self, other: Results) -> None:
        """Add another micro-batch: add its sums, and append its examples."""
        num_rows = self._shape[0] if len(self._shape) else 1
        mine, its = densified(self.sums, num_rows), densified(other.sums, num_rows)
        first = self._scale is None
        for name, power in WEIGHT_SHAPED.items():
            # The first time, not in place: autograd owns the memory of the first gradient and adds to it.
            total, more = getattr(mine, name), getattr(its, name) * other.scale**power
            total = total * self.scale**power if first else total
            setattr(mine, name, total.add_(more.view(total.shape)))
        mine.rows = None
        self.sums, self._scale = mine, 1.0
        self.hold(mine.grad_sum)
        self.passes |= other.passes
        # Keep scalars only: the passes' sums are as large as the weight. (Those of earlier passes are gone already.)
        for one in (self, other) if first else (other,):
            self._scalars[one.latest] = _Scalars.of(one.sums)
        self.latest = other.latest
        self.coordinates = None

    def check_version(self, name: str) -> None:
        if self.written_to:
            raise RuntimeError(
                f"grad_sum of {name!r} shares memory with the parameter's .grad, which was modified in place after the probe "
                "(gradient clipping, zero_grad(set_to_none=False), …): read grad_sum before that"
            )

    def finish(self, passes: Sequence[Pass]) -> None:
        """Concatenate the scalars of all of the block's passes, with zeros for passes that did not reach the weight."""
        if self._scale is None:
            if len(passes) == 1:
                return
            self._scalars[self.latest] = _Scalars.of(self.sums)
        blocks: dict[str, list[Tensor | None]] = {name: [] for name in SCALARS}
        dtype, device = sum_dtype(self._dtype), self.sums.l1.device
        scaled = self._scale is not None
        for one in passes:
            E = one.examples
            for name, power in SCALARS.items() if E else ():
                if one in self._scalars:
                    value = getattr(self._scalars[one], name)
                    blocks[name].append(value if value is None or not scaled else value * one.scale**power)
                elif getattr(self.sums, name) is not None:
                    blocks[name].append(torch.zeros((E, E) if name == "gram" else (E,), dtype=dtype, device=device))
        for name, parts in blocks.items():
            known = [part for part in parts if part is not None]
            if not parts or len(known) < len(parts):
                continue
            if name == "gram":  # not joined: the joint Gram has an entry for every pair of examples, and most are unknown
                self.sums.gram, self._grams = None, known
            else:
                setattr(self.sums, name, torch.cat(known))
        self._scalars.clear()


def common_scale(passes: Iterable[Pass]) -> Scale:
    """Return n / |Σ c| over the passes of a block, which gives an average example weight one."""
    known = [p.factors for p in passes if p.factors is not None]
    if not known:
        return ONE
    count, total = (torch.stack(parts).sum() for parts in zip(*known, strict=True))
    return Scale.of_factors(count, total)


def add_up(results: Iterable[tuple[Results, Tensor | None]], total: Callable[[Tensor], Tensor] | None = None) -> None:
    """Compute the missing sums over coordinates in one call, and in a second call for sums that nobody has read yet. The results
    stay on the device.

    ``total`` turns sums over this process's coordinates into sums over all coordinates.
    """
    waiting = [(r, u) for r, u in results if r.coordinates is None]
    if total is None:
        left = [(r, r.left) for r, _ in waiting if r.left is not None]
        if left and (rows := coordinate_sums_of_left([x for _, x in left])) is not None:
            table = _Table(rows)
            for k, (r, _) in enumerate(left):
                r.coordinates = table, k
            waiting = [(r, u) for r, u in waiting if r.left is None]
    if not waiting:
        return
    grads, sizes, squares, directions = [], [], [], []
    for r, u in waiting:
        s = r.sums
        shape = s.abs_sum.shape
        if u is not None:
            u = s.at_rows(u.to(s.abs_sum.device)).reshape(shape)
        grads.append(s.grad_sum if s.grad_sum.shape == shape else s.grad_sum.view(shape))
        sizes.append(s.abs_sum)
        squares.append(s.sq_sum)
        directions.append(u)
    with torch.no_grad():
        found = zk.coordinate_sums_of_many(grads, sizes, squares, None if all(u is None for u in directions) else directions)
    table = _Table(found if total is None else total(found))
    for k, (r, _) in enumerate(waiting):
        r.coordinates = table, k


class _Table:
    """Sums over coordinates of several weights, one row each, which are copied from their device once, when one is read."""

    def __init__(self, rows: Tensor) -> None:
        self._rows = rows

    def reread(self) -> _Table:
        return _Table(self._rows)

    @cached_property
    def rows(self) -> list[list[float]]:
        return self._rows.tolist()


def coordinate_sums(coordinates: tuple[_Table, int]) -> CoordinateSums:
    """Read what :func:`add_up` left on the device, which waits for it."""
    table, row = coordinates
    return CoordinateSums(*table.rows[row])
