"""Maps the rows of packed sequences to examples as the user declares it: by ids, cumulative lengths, or positions that restart.

B rows of R positions hold N documents. The cut is at tensors that have these B·R rows (:meth:`Packed.ends`), and
:mod:`~zerosum.probe.attribution` finds which rows reach each use of a weight. If these are the declared rows in the declared order
(:class:`Place`), the next batch's ids determine its rows without another proof, whatever its lengths are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from zerosum.probe.attribution import layout_of
from zerosum.probe.layout import Layout

# The positions of a row that a tensor may have: all, or all but the last or the first one, as shifted losses do.
_PARTS = (slice(None), slice(None, -1), slice(1, None))


@dataclass(frozen=True)
class End:
    """The shape of rows of losses: ``size`` along one dimension or, with ``positions``, (size, positions) along the first two."""

    part: int
    size: int
    positions: int


@dataclass(frozen=True)
class Place:
    """Where a use's rows contain the packed rows: a part of them, along ``dims`` dimensions from ``axis`` on."""

    part: int
    axis: int
    dims: int


@dataclass(frozen=True, eq=False)
class Packed:
    """The declared rows. ``labels`` (B, R) is the example of each row, from 0 to ``examples`` - 1, or -1 for rows of no example."""

    labels: Tensor
    examples: int
    _parts: dict[int, Tensor] = field(default_factory=dict)
    _layouts: dict[tuple[Place, torch.Size], Layout] = field(default_factory=dict)

    @cached_property
    def padded(self) -> bool:
        """Whether some rows belong to no example."""
        return bool((self.labels < 0).any())

    def same_as(self, other: Packed) -> bool:
        return self.examples == other.examples and torch.equal(self.labels, other.labels)

    def part(self, number: int) -> Tensor:
        """Return the labels of one of the parts, flattened; the same tensor each time."""
        if number not in self._parts:
            self._parts[number] = self.labels[:, _PARTS[number]].flatten()
        return self._parts[number]

    def ends(self) -> Iterator[End]:
        """Yield the shapes that rows of losses may have."""
        B, R = self.labels.shape
        for number, length in ((0, R), (1, R - 1), (2, R - 1)):
            if length > 0:
                yield End(number, B * length, 0)
                if B > 1:
                    yield End(number, B, length)

    def _fitting(self, lead: torch.Size) -> Iterator[tuple[Place, Tensor]]:
        """Yield the places that rows of this shape may have, each with the labels of all rows."""
        B, R = self.labels.shape
        for number, length in ((0, R), (1, R - 1), (2, R - 1)):
            mine = self.labels[:, _PARTS[number]]
            for axis in range(len(lead)):
                behind = [1] * (len(lead) - axis - 1)
                if lead[axis] == B * length:
                    yield Place(number, axis, 1), mine.reshape(-1, *behind).expand(lead)
                elif B > 1 and behind and (lead[axis], lead[axis + 1]) == (B, length):
                    yield Place(number, axis, 2), mine.reshape(B, length, *behind[1:]).expand(lead)

    def place_of(self, names: Tensor) -> Place | None:
        """Return the only place that fits rows with these names, (*lead); None if no place or several places fit."""
        reached = names >= 0
        if not bool(reached.any()) or bool((names < -1).any()):
            return None
        fitting = [place for place, mine in self._fitting(names.shape) if bool(((mine.to(names.device) == names) | ~reached).all())]
        return fitting[0] if len(fitting) == 1 else None

    def disagrees(self, names: Tensor) -> bool:
        """Whether rows with these names are the packed rows but belong to other examples than declared."""
        found = [mine.to(names.device) for place, mine in self._fitting(names.shape) if place.part == 0]
        known = names >= 0
        return bool(found) and all(bool((known & (mine >= 0) & (names != mine)).any()) for mine in found)

    def layout(self, place: Place, lead: torch.Size) -> Layout:
        """Return the layout of a use's rows at a place."""
        key = place, lead
        if key not in self._layouts:
            mine = next(mine for one, mine in self._fitting(lead) if one == place)
            self._layouts[key] = layout_of(mine, self.examples)[0]
        return self._layouts[key]

    def layout_by_shape(self, lead: torch.Size) -> Layout | None:
        """Return the layout of rows whose first dimensions are the packed rows, judged by shape only."""
        B = self.labels.shape[0]
        for place, _ in self._fitting(lead):
            if place.part == 0 and (place.axis == 0 or (B == 1 and place.axis == 1 and lead[0] == 1)):
                return self.layout(place, lead)
        return None


def declared(x: Tensor, ids: Any, cu_seqlens: Any, position_ids: Any) -> tuple[Packed, str]:
    """Parse the arguments of :func:`zerosum.example_ids`. Return the declared rows and the name of the argument given."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a torch.Tensor, got {type(x).__name__}")
    given = {"ids": ids, "cu_seqlens": cu_seqlens, "position_ids": position_ids}
    given = {name: value for name, value in given.items() if value is not None}
    if len(given) != 1:
        raise TypeError(f"zerosum.example_ids: expected one of ids, cu_seqlens and position_ids, got {', '.join(given) or 'none'}")
    ((name, value),) = given.items()
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor of integers, got {type(value).__name__}")
    if name == "cu_seqlens":
        labels = _of_lengths(x, value)
    else:
        labels = _rows(x, name, value)
        labels = labels.clamp(min=-1) if name == "ids" else _of_positions(labels)
    examples = int(labels.max()) + 1 if labels.numel() else 0
    if not examples:
        raise ValueError(f"{name}: expected at least one row that belongs to an example, got none of {labels.numel()}")
    return Packed(labels, examples), name


def _rows(x: Tensor, name: str, value: Tensor) -> Tensor:
    """Return (B, R) integers, one per row of ``x``."""
    whole = not x.is_floating_point()  # tokens: every dimension counts rows
    if value.ndim == 2:
        expected, what = tuple(x.shape[:2]), f"integers {tuple(x.shape[:2])}, one per row"
    else:
        one_row = x.ndim > 1 and x.shape[0] == 1 and (whole or len(value) != 1)
        expected = (x.shape[1] if one_row else x.shape[0],) if x.ndim else ()
        what = f"{expected[0] if expected else 'no'} integers, one per row"
    integers = not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
    if value.ndim not in (1, 2) or tuple(value.shape) != expected or not integers:
        raise ValueError(f"{name}: expected {what}, got {value.dtype} {tuple(value.shape)}")
    if name == "ids" and value.numel() and int(value.min()) < -1:
        raise ValueError(f"ids: expected values >= 0, or -1 for rows of no example, got {int(value.min())}")
    return value.detach().long().reshape(-1, value.shape[-1])


def _of_lengths(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Return (1, R) labels from cumulative lengths (N + 1,); rows after the last document belong to none."""
    whole = not x.is_floating_point()
    if x.ndim == 0 or (whole and x.ndim > 1 and x.shape[0] != 1):
        raise ValueError(f"x: expected a single row of documents with cu_seqlens, (R, …) or (1, R, …), got {tuple(x.shape)}")
    one_row = x.ndim > 1 and x.shape[0] == 1
    R = x.shape[1] if one_row else x.shape[0]
    ends = cu_seqlens.detach()
    if ends.ndim != 1 or len(ends) < 2 or ends.is_floating_point() or ends.dtype == torch.bool:
        raise ValueError(f"cu_seqlens: expected N + 1 integers, got {ends.dtype} {tuple(ends.shape)}")
    ends = ends.long()
    lengths = ends.diff()
    if int(ends[0]) or int(ends[-1]) > R or int(lengths.min()) < 0:
        raise ValueError(f"cu_seqlens: expected increasing numbers from 0 to at most {R} rows, got {ends.tolist()}")
    if not int(lengths.min()):
        raise ValueError(
            f"cu_seqlens: expected documents of at least one row, got an empty one at index {int(lengths.argmin())}; "
            "cu_seqlens.unique_consecutive() removes it"
        )
    labels = torch.full((1, R), -1, device=ends.device)
    labels[0, : int(ends[-1])] = torch.arange(len(lengths), device=ends.device).repeat_interleave(lengths)
    return labels


def starts(position_ids: Tensor) -> Tensor:
    """Return a (B, R) mask of document starts, where positions (B, R) restart; a negative position belongs to no document."""
    before = torch.cat([torch.full_like(position_ids[:, :1], -1), position_ids[:, :-1]], 1)
    return (position_ids >= 0) & ((position_ids <= before) | (before < 0) | (position_ids == 0))


def _of_positions(position_ids: Tensor) -> Tensor:
    number = starts(position_ids).flatten().cumsum(0).view(position_ids.shape) - 1
    return number.masked_fill(position_ids < 0, -1)
