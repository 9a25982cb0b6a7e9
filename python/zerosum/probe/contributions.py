"""Represents what one use of a weight contributes to every example's gradient, and combines several uses into one result.

A use does not hold the per-example gradients themselves. A weight's per-example gradient is the sum over its uses, and every |·|
and square applies to that sum. Therefore uses are collected until the backward pass has reached all of them, and are then combined
in the cheapest exact way.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

import zsl_kernels as zk
from zsl_kernels.streamed_head import HeadSums, output_gradients
from zsl_kernels.tied import Embedding
from zsl_kernels.types import sum_dtype


class Piece(NamedTuple):
    """A weight or a view of it, described by its geometry in the weight's storage."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, x: Tensor) -> Piece:
        return cls(tuple(x.size()), tuple(x.stride()), int(x.storage_offset()))

    def view(self, x: Tensor, base: Piece) -> Tensor:
        """Return this piece of ``x``, a dense tensor with the layout of the whole weight ``base``."""
        return x.as_strided(self.size, self.stride, x.storage_offset() + self.offset - base.offset)

    @property
    def numel(self) -> int:
        return math.prod(self.size)

    @property
    def extent(self) -> int:
        """The number of memory entries from the first to the last one of the piece."""
        return 1 + sum((n - 1) * s for n, s in zip(self.size, self.stride, strict=True)) if self.numel else 0

    @property
    def repeats(self) -> bool:
        """Whether a dimension repeats one memory entry (has stride 0)."""
        return any(s == 0 and n > 1 for n, s in zip(self.size, self.stride, strict=True))

    @property
    def overlaps(self) -> bool:
        """Whether a memory entry may occur twice for any other reason."""
        reach = 0
        for s, n in sorted((s, n) for n, s in zip(self.size, self.stride, strict=True) if n > 1 and s):
            if s <= reach:
                return True
            reach += (n - 1) * s
        return False

    @property
    def transposed(self) -> bool:
        return len(self.size) == 2 and self.stride[0] < self.stride[1]

    def t(self) -> Piece:
        return Piece(self.size[::-1], self.stride[::-1], self.offset)


@dataclass
class OuterProduct:
    """Represents g_i = Σ_t left_itᵀ right_it, by (E, T, R) and (E, T, C), or by rows (P, R) and (P, C) with the example of each."""

    left: Tensor
    right: Tensor
    ids: Tensor | None = None

    def transposed(self) -> OuterProduct:
        return OuterProduct(self.right, self.left, self.ids)

    def flat(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the rows with the example of each."""
        if self.ids is not None:
            return self.left, self.right, self.ids
        E, T = self.left.shape[:2]
        ids = torch.arange(E, device=self.left.device).repeat_interleave(T)
        return self.left.flatten(0, 1), self.right.flatten(0, 1), ids

    def grad_sum(self) -> Tensor:
        return self.left.flatten(0, -2).mT @ self.right.flatten(0, -2)

    def materialize(self, examples: int, dtype: torch.dtype) -> Tensor:
        left, right = self.left.to(dtype), self.right.to(dtype)
        if self.ids is None:
            return left.mT @ right
        g = left.new_zeros(examples, left.shape[1], right.shape[1])
        for i in range(examples):
            mine = self.ids == i
            torch.mm(left[mine].mT, right[mine], out=g[i])
        return g

    def scaled(self, by: Tensor) -> OuterProduct:
        factor = by.to(self.left.dtype)
        return OuterProduct(
            self.left * (factor[:, None, None] if self.ids is None else factor[self.ids, None]), self.right, self.ids
        )

    def picked(self, examples: Tensor) -> OuterProduct:
        """Return the contribution of some examples, in this order."""
        if self.ids is None:
            return OuterProduct(self.left[examples], self.right[examples])
        which, ids = (self.ids[:, None] == examples).nonzero(as_tuple=True)
        return OuterProduct(self.left[which], self.right[which], ids)


@dataclass
class RowGather:
    """Represents g_i with rows Σ_{t: ids_it = v} e_it, by (E, T) and (E, T, K), or by (P,) and (P, K) with the example of each.
    Negative ids are skipped."""

    rows: Tensor
    e: Tensor
    num_rows: int
    ids: Tensor | None = None

    def grad_sum(self) -> Tensor:
        total = self.e.new_zeros(self.num_rows + 1, self.e.shape[-1])
        at = self.rows.flatten().long()
        return total.index_add_(0, torch.where(at < 0, self.num_rows, at), self.e.flatten(0, -2))[:-1]

    def materialize(self, examples: int, dtype: torch.dtype) -> Tensor:
        ids = self.ids
        if ids is None:
            ids = torch.arange(examples, device=self.e.device).repeat_interleave(self.rows.shape[1])
        at = self.rows.flatten().long()
        g = torch.zeros(examples, self.num_rows + 1, self.e.shape[-1], dtype=dtype, device=self.e.device)
        g.index_put_((ids, torch.where(at < 0, self.num_rows, at)), self.e.flatten(0, -2).to(dtype), accumulate=True)
        return g[:, :-1]

    def scaled(self, by: Tensor) -> RowGather:
        factor = by.to(self.e.dtype)
        e = self.e * (factor[:, None, None] if self.ids is None else factor[self.ids, None])
        return RowGather(self.rows, e, self.num_rows, self.ids)

    def picked(self, examples: Tensor) -> RowGather:
        if self.ids is None:
            return RowGather(self.rows[examples], self.e[examples], self.num_rows)
        which, ids = (self.ids[:, None] == examples).nonzero(as_tuple=True)
        return RowGather(self.rows[which], self.e[which], self.num_rows, ids)


@dataclass
class Dense:
    """Holds g_i itself, (E, *piece), for parameters that are small enough."""

    g: Tensor

    def grad_sum(self) -> Tensor:
        return self.g.sum(0)

    def materialize(self, examples: int, dtype: torch.dtype) -> Tensor:
        return self.g.to(dtype)

    def scaled(self, by: Tensor) -> Dense:
        return Dense(self.g * by.to(self.g.dtype).view(-1, *[1] * (self.g.ndim - 1)))

    def picked(self, examples: Tensor) -> Dense:
        return Dense(self.g[examples])


@dataclass
class DiagonalRows:
    """Represents g_i that is (*piece[1:]) in row i and zero elsewhere, by (E, *piece[1:]), for a weight repeated for the
    examples."""

    g: Tensor

    def grad_sum(self) -> Tensor:
        return self.g

    def materialize(self, examples: int, dtype: torch.dtype) -> Tensor:
        g = self.g.new_zeros(examples, *self.g.shape, dtype=dtype)
        g.diagonal(dim1=0, dim2=1).copy_(self.g.movedim(0, -1))
        return g

    def scaled(self, by: Tensor) -> DiagonalRows:
        return DiagonalRows(self.g * by.to(self.g.dtype).view(-1, *[1] * (self.g.ndim - 1)))

    def picked(self, examples: Tensor) -> DiagonalRows:
        raise NotImplementedError("a weight that was repeated for all examples cannot be restricted to some of them")


@dataclass
class StreamedHead:
    """Represents a use by :func:`zsl_kernels.linear_cross_entropy`: a product whose left side, the gradient of the logits, is
    computed one chunk of the vocabulary at a time."""

    h: Tensor
    weight: Tensor
    targets: Tensor
    lse: Tensor
    c: Tensor
    ignore_index: int
    chunk: int
    sums: Sums | None = None  # set if they were computed along the way

    def chunks(self) -> Iterator[tuple[int, int, Tensor]]:
        return output_gradients(self.h, self.weight, self.targets, self.lse, self.c, self.ignore_index, self.chunk)

    def grad_sum(self) -> Tensor:
        if self.sums is not None:
            return self.sums.grad_sum
        return torch.cat([b.flatten(0, -2).mT @ self.h.flatten(0, -2) for _, _, b in self.chunks()])

    def materialize(self, examples: int, dtype: torch.dtype) -> Tensor:
        return torch.cat([OuterProduct(b, self.h).materialize(examples, dtype) for _, _, b in self.chunks()], 1)

    def scaled(self, by: Tensor) -> StreamedHead:
        c = self.c * by.to(self.c.dtype)[:, None]
        return StreamedHead(self.h, self.weight, self.targets, self.lse, c, self.ignore_index, self.chunk)

    def picked(self, examples: Tensor) -> StreamedHead:
        h, targets, lse, c = (x[examples] for x in (self.h, self.targets, self.lse, self.c))
        return StreamedHead(h, self.weight, targets, lse, c, self.ignore_index, self.chunk)


Contribution = OuterProduct | RowGather | Dense | DiagonalRows | StreamedHead


@dataclass
class Sums:
    """The fields of :class:`zsl_kernels.InterferenceSums` for one parameter, restricted to the touched rows ``rows`` if given.

    ``padded``: some of ``rows`` may be -1, where the sums are zero. Only the device then knows how many rows are touched."""

    grad_sum: Tensor
    abs_sum: Tensor
    sq_sum: Tensor
    l1: Tensor
    sq_norm: Tensor
    dot: Tensor | None
    abs_dot: Tensor | None
    gram: Tensor | None
    rows: Tensor | None = None
    padded: bool = field(default=False, init=False)

    def spread(self, x: Tensor, shape: torch.Size) -> Tensor:
        """Expand one of the sums to all rows of a weight of this shape."""
        if self.rows is None:
            return x
        if self.padded:
            return x.new_zeros(shape).index_add_(0, self.rows.clamp(min=0), x)
        return x.new_zeros(shape).index_copy_(0, self.rows, x)

    def at_rows(self, x: Tensor) -> Tensor:
        """Return the rows of a weight-shaped tensor that the sums have, with zeros for rows of -1."""
        if self.rows is None:
            return x
        if not self.padded:
            return x[self.rows]
        return x.index_select(0, self.rows.clamp(min=0)).masked_fill_((self.rows < 0).unsqueeze(1), 0)


# The fields, with the power of g by which each scales.
SCALARS = {"l1": 1, "sq_norm": 2, "dot": 1, "abs_dot": 1, "gram": 2}
WEIGHT_SHAPED = {"grad_sum": 1, "abs_sum": 1, "sq_sum": 2}


@dataclass
class Request:
    """What to compute from a weight's gradients."""

    examples: int
    direction: Tensor | None
    gram: bool
    scale: Tensor | None = None  # (E,): the examples' factors, if they differ


@dataclass
class Contributions:
    """The contributions of one weight's uses in one backward pass, by the piece of the weight that each used."""

    base: Piece
    of_piece: dict[Piece, list[Contribution]] = field(default_factory=dict)

    def add(self, piece: Piece, use: Contribution) -> None:
        if isinstance(use, OuterProduct) and piece.transposed:
            piece, use = piece.t(), use.transposed()
        if isinstance(use, DiagonalRows) and piece.stride[0] == 0:
            piece, use = Piece(piece.size[1:], piece.stride[1:], piece.offset), Dense(use.g)
        if isinstance(use, Dense):
            # Entries repeated in memory are a single entry, whose gradient is the sum.
            repeated = [d for d, (n, s) in enumerate(zip(piece.size, piece.stride, strict=True)) if s == 0 or n == 1]
            if repeated:
                use = Dense(use.g.sum([d + 1 for d in repeated]))
                kept = [d for d in range(len(piece.size)) if d not in repeated]
                piece = Piece(tuple(piece.size[d] for d in kept), tuple(piece.stride[d] for d in kept), piece.offset)
        self.of_piece.setdefault(piece, []).append(use)

    def __bool__(self) -> bool:
        return bool(self.of_piece)

    @property
    def eps(self) -> float:
        """The unit roundoff of the least precise use."""
        return max((torch.finfo(dtype_of(use)).eps for uses in self.of_piece.values() for use in uses), default=0.0)

    def scaled(self, by: Tensor) -> Contributions:
        """Return them with every example's gradient multiplied by its factor."""
        return Contributions(self.base, {piece: [use.scaled(by) for use in uses] for piece, uses in self.of_piece.items()})

    def picked(self, examples: Tensor) -> Contributions:
        """Return the contributions of some examples, in this order."""
        return Contributions(self.base, {piece: [use.picked(examples) for use in uses] for piece, uses in self.of_piece.items()})

    def tensors(self) -> list[Tensor]:
        """Return the tensors that the uses hold."""
        return [x for uses in self.of_piece.values() for use in uses for x in vars(use).values() if isinstance(x, Tensor)]

    def extend(self, other: Contributions) -> None:
        for piece, uses in other.of_piece.items():
            self.of_piece.setdefault(piece, []).extend(uses)

    def grad_sum(self, like: Tensor) -> Tensor:
        """Return Σ_i g_i only, in the shape and dtype of the weight ``like``."""
        total = _zeros(like, self.base, sum_dtype(like.dtype))
        for piece, uses in self.of_piece.items():
            for use in uses:
                piece.view(total, self.base).add_(use.grad_sum().reshape(piece.size))
        return total.to(like.dtype)

    def materialize(self, examples: int, like: Tensor) -> Tensor:
        """Return the (E, *weight) gradients."""
        dtype, extent = sum_dtype(like.dtype), self.base.extent
        total = torch.zeros(examples, extent, dtype=dtype, device=like.device)
        for piece, uses in self.of_piece.items():
            mine = total.as_strided((examples, *piece.size), (extent, *piece.stride), piece.offset - self.base.offset)
            for use in uses:
                mine.add_(use.materialize(examples, dtype).reshape(examples, *piece.size))
        return total.as_strided((examples, *self.base.size), (extent, *self.base.stride))

    def combine(self, like: Tensor, asked: Request) -> Sums:
        """Compute every requested field of the sum over the uses."""
        if asked.scale is not None:
            self.of_piece = self.scaled(asked.scale).of_piece
        if len(self.of_piece) == 1:
            ((piece, uses),) = self.of_piece.items()
            if piece == self.base:
                return _combine_piece(piece, uses, asked, asked.direction)
            if piece.numel == self.base.numel and piece == _squeezed(self.base) and all(isinstance(use, Dense) for use in uses):
                sums = _combine_piece(piece, uses, asked, None if asked.direction is None else asked.direction.reshape(piece.size))
                for name in WEIGHT_SHAPED:
                    setattr(sums, name, getattr(sums, name).view(self.base.size))
                return sums
        if not _disjoint(tuple(self.of_piece), self.base):
            return _dense(Dense(self.materialize(asked.examples, like)), asked, asked.direction)
        dtype = sum_dtype(like.dtype)
        total = Sums(*(_zeros(like, self.base, dtype) for _ in WEIGHT_SHAPED), *[None] * 5)
        direction = None
        if asked.direction is not None:
            direction = _zeros(like, self.base, asked.direction.dtype).copy_(asked.direction)
        for piece, uses in self.of_piece.items():
            part = _combine_piece(piece, uses, asked, None if direction is None else piece.view(direction, self.base))
            part = densified(part, piece.size[0] if piece.size else 1)
            for name in WEIGHT_SHAPED:
                piece.view(getattr(total, name), self.base).copy_(getattr(part, name).view(piece.size))
            for name in SCALARS:
                if (value := getattr(part, name)) is not None:
                    before = getattr(total, name)
                    setattr(total, name, value if before is None else before + value)
        return total


def _squeezed(piece: Piece) -> Piece:
    """Return the piece without its dimensions of size 1."""
    kept = [d for d, n in enumerate(piece.size) if n != 1]
    return Piece(tuple(piece.size[d] for d in kept), tuple(piece.stride[d] for d in kept), piece.offset)


def _zeros(like: Tensor, base: Piece, dtype: torch.dtype) -> Tensor:
    """Return zeros with the weight's memory layout, so that pieces of the weight apply to them."""
    return torch.empty_strided(base.size, base.stride, dtype=dtype, device=like.device).zero_()


def _disjoint(pieces: Sequence[Piece], base: Piece) -> bool:
    """Whether every entry of the weight belongs to at most one piece, and at most once."""
    ordered = sorted(pieces, key=lambda piece: piece.offset)
    gaps = all(a.offset + a.extent <= b.offset for a, b in itertools.pairwise(ordered))
    if gaps and not any(piece.overlaps or piece.repeats for piece in pieces):
        return True
    end = max(piece.offset + piece.extent for piece in pieces)
    seen = torch.zeros(end - base.offset, dtype=torch.uint8)
    for piece in pieces:
        if piece.overlaps or piece.repeats:
            return False
        part = seen.as_strided(piece.size, piece.stride, piece.offset - base.offset)
        if part.any():
            return False
        part.fill_(1)
    return True


def _combine_piece(piece: Piece, uses: list[Contribution], asked: Request, direction: Tensor | None) -> Sums:
    products = [use for use in uses if isinstance(use, OuterProduct)]
    lookups = [use for use in uses if isinstance(use, RowGather)]
    heads = [use for use in uses if isinstance(use, StreamedHead)]
    if len(products) == len(uses):
        return _products(products, None, asked, direction)
    if len(lookups) == len(uses):
        return _lookups(_one_lookup(lookups), asked, direction)
    if len(products) + len(lookups) == len(uses):
        return _products(products, _one_lookup(lookups), asked, direction)
    if len(heads) == len(uses) == 1 and heads[0].sums is not None:
        return heads[0].sums
    if len(heads) == 1 and len(lookups) == len(uses) - 1:
        return _head(heads[0], _one_lookup(lookups) if lookups else None, asked, direction)
    dtype = sum_dtype(torch.float64 if any(dtype_of(use) == torch.float64 for use in uses) else torch.float32)
    parts = [use.materialize(asked.examples, dtype).reshape(-1, *piece.size) for use in uses]
    return _dense(Dense(parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)), asked, direction)


def dtype_of(use: Contribution) -> torch.dtype:
    """Return the dtype in which the use's part of the gradient was computed."""
    if isinstance(use, OuterProduct):
        return use.left.dtype
    if isinstance(use, RowGather):
        return use.e.dtype
    return use.h.dtype if isinstance(use, StreamedHead) else use.g.dtype


def _one_product(uses: list[OuterProduct]) -> OuterProduct:
    if len(uses) == 1:
        return uses[0]
    dtype = max((use.left.dtype for use in uses), key=lambda dtype: dtype.itemsize)
    uses = [OuterProduct(use.left.to(dtype), use.right.to(dtype), use.ids) for use in uses]
    if all(use.ids is None for use in uses):
        return OuterProduct(torch.cat([use.left for use in uses], 1), torch.cat([use.right for use in uses], 1))
    return OuterProduct(*(torch.cat(parts) for parts in zip(*(use.flat() for use in uses), strict=True)))


def _one_lookup(uses: list[RowGather]) -> RowGather:
    if len(uses) == 1:
        return uses[0]
    if all(use.ids is None for use in uses):
        return RowGather(torch.cat([use.rows for use in uses], 1), torch.cat([use.e for use in uses], 1), uses[0].num_rows)
    return RowGather(
        torch.cat([use.rows.flatten() for use in uses]),
        torch.cat([use.e.flatten(0, -2) for use in uses]),
        uses[0].num_rows,
        torch.cat([_example_ids(use) for use in uses]),
    )


def _example_ids(use: RowGather) -> Tensor:
    if use.ids is not None:
        return use.ids
    E, T = use.rows.shape
    return torch.arange(E, device=use.rows.device).repeat_interleave(T)


def _products(uses: list[OuterProduct], lookup: RowGather | None, asked: Request, direction: Tensor | None) -> Sums:
    product = _one_product(uses)
    embedding: tuple[Tensor, ...] | None = None
    if lookup is not None:
        embedding = (lookup.rows, lookup.e)
        if product.ids is not None or lookup.ids is not None:
            product = OuterProduct(*product.flat())
            embedding = (lookup.rows.flatten(), lookup.e.flatten(0, -2), _example_ids(lookup))
    # interference's a and b are a weight's columns and rows.
    sums = zk.interference(
        product.right,
        product.left,
        direction=direction,
        gram=asked.gram,
        example_ids=product.ids,
        num_examples=None if product.ids is None else asked.examples,
        embedding=embedding,
    )
    return Sums(*sums)


def _lookups(lookup: RowGather, asked: Request, direction: Tensor | None) -> Sums:
    most = most_rows(lookup)
    sums = zk.embedding_interference(
        lookup.rows,
        lookup.e,
        lookup.num_rows,
        direction=direction,
        gram=asked.gram,
        max_rows=most,
        example_ids=lookup.ids,
        num_examples=None if lookup.ids is None else asked.examples,
    )
    fields = {name: getattr(sums, name) for name in (*WEIGHT_SHAPED, *SCALARS)}
    found = Sums(**fields, rows=sums.rows)
    found.padded = most is not None
    return found


def most_rows(lookup: RowGather) -> int | None:
    """Return the number of rows for a lookup's sums, an upper bound on a device so that nothing waits for a count of the touched
    rows. On the CPU, counting costs nothing."""
    return None if lookup.e.device.type == "cpu" else min(lookup.num_rows, lookup.rows.numel())


def _dense(use: Dense, asked: Request, direction: Tensor | None) -> Sums:
    flat = use.g.reshape(asked.examples, math.prod(use.g.shape[1:]))
    u = None if direction is None else direction.reshape(-1)
    sums = Sums(*zk.dense_interference(flat, direction=u, gram=asked.gram))
    for name in WEIGHT_SHAPED:
        setattr(sums, name, getattr(sums, name).view(use.g.shape[1:]))
    return sums


def _head(use: StreamedHead, lookup: RowGather | None, asked: Request, direction: Tensor | None) -> Sums:
    """Yield the head's chunks of the vocabulary, each with the embedding's rows in its range."""
    sums = HeadSums(use.h, use.weight.shape[0], direction, asked.gram)
    embedding = None
    if lookup is not None:
        embedding = Embedding(lookup.rows.flatten().long(), lookup.e.flatten(0, -2), _example_ids(lookup))
    for lo, hi, b in use.chunks():
        sums.add(lo, hi, b, embedding)
    return Sums(*sums.result())


def densified(sums: Sums, num_rows: int) -> Sums:
    """Expand sums over touched rows to sums over all rows."""
    if sums.rows is None:
        return sums
    full = [sums.spread(x, torch.Size((num_rows, *x.shape[1:]))) for x in (sums.grad_sum, sums.abs_sum, sums.sq_sum)]
    return Sums(*full, *(getattr(sums, name) for name in SCALARS))
