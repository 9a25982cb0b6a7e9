"""Whose an activation's rows are: followed from operation to operation, so that nothing is attributed by a coincidence of sizes.

An activation is taken to be (N, …). What departs from that is noted when it happens: rows that were flattened, indexed or sorted, a
batch dimension that was moved, and tensors that depend on no input at all (positions, masks), whose first dimension is not the
examples whatever its size. An operation that is not known to keep rows apart leaves them marked as nobody's, and a weight
that is used on them is reported as not covered.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, is_dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary


class Uncovered(Exception):
    """Why a rule cannot cover a call."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Dimension 0 holds cells of a grid (N, per), flattened or picked from it. ``index`` None: all of them, in order."""

    per: int
    count: int
    index: Tensor | None = None

    def cells(self) -> Tensor:
        return torch.arange(self.count) if self.index is None else self.index

    def agrees(self, other: Note | None, cells: bool) -> bool:
        """Whether the other's rows are the same examples', one by one, and with ``cells`` of the same part of them."""
        if not isinstance(other, Rows) or other.count != self.count or (cells and other.per != self.per):
            return False
        if self.index is other.index and (self.index is not None or self.per == other.per):
            return True
        mine, its = self.cells() // (1 if cells else self.per), other.cells() // (1 if cells else other.per)
        return torch.equal(mine.cpu(), its.cpu())


@dataclass(frozen=True)
class Moved:
    """The examples are dimension ``axis``, and where positions are examples, those are dimension ``positions``."""

    axis: int
    positions: int | None = None

    def below(self) -> Moved:
        """The same of a part along dimension 0, which must be another one."""
        return Moved(self.axis - 1, None if self.positions is None else self.positions - 1)


@dataclass(frozen=True)
class Single:
    """All of it is one example's."""

    example: int


@dataclass(frozen=True)
class Total:
    """A sum or mean over the examples, as a loss is."""


@dataclass(frozen=True)
class Nobodys:
    """Not known of whom, or of several examples at once, as ``mixed`` says."""

    reason: str
    mixed: bool = False


class Constant:
    """Depends on no input."""


@dataclass(frozen=True)
class Blank(Constant):
    """Made in the image of a tensor of data, such as ``zeros_like(x)``: a constant until rows are written into it."""

    image: Rows | None  # of the tensor's rows


CONSTANT = Constant()
_UNKNOWN = Nobodys("the function is not known")
Note = Rows | Moved | Single | Total | Nobodys
Data = list[tuple[Tensor, "Note | None"]]

_NAMES = {
    "factories": """
        arange zeros ones full linspace eye empty tril_indices triu_indices tensor as_tensor from_numpy rand randn randint
        randperm
    """,
    "blanks": "zeros_like ones_like empty_like full_like rand_like randn_like new_zeros new_ones new_empty new_full new_tensor",
    "reshapes": "reshape view flatten unflatten squeeze unsqueeze view_as reshape_as _unsafe_view",
    "moves": "transpose permute movedim moveaxis swapaxes swapdims t adjoint T mT H mH",
    "losses": """
        cross_entropy nll_loss mse_loss l1_loss smooth_l1_loss huber_loss kl_div binary_cross_entropy
        binary_cross_entropy_with_logits
    """,
    # What leaves a sum over examples one.
    "linear": """
        sum mean add sub mul div neg clone to float double half bfloat16 type stack cat squeeze unsqueeze view reshape flatten
        unbind detach add_ sub_ mul_ div_ __getitem__ __add__ __radd__ __iadd__ __sub__ __rsub__ __isub__ __mul__ __rmul__
        __imul__ __truediv__ __itruediv__ __neg__
    """,
    # What else leaves the examples of (N, …) where they are.
    "standard": """
        adaptive_avg_pool1d adaptive_avg_pool2d avg_pool1d avg_pool2d max_pool1d max_pool2d interpolate pad unfold pixel_shuffle
        expand_as dropout1d dropout2d feature_dropout alpha_dropout masked_select group_norm instance_norm batch_norm gather
        scatter scatter_ scatter_add_ diagonal view_as_complex view_as_real bernoulli_ fill_ detach_ native_layer_norm
    """,
    # Row r of the result depends on row r of the operands alone.
    "rowwise": """
        abs add addcdiv addcmul baddbmm bernoulli bfloat16 bmm bool celu clamp clamp_max clamp_min clone contiguous copysign cos
        detach div divide dropout elu embedding eq erf erfc exp exp2 expm1 float floor floor_divide fmod ge gelu glu grouped_mm
        _grouped_mm gt half hardsigmoid hardswish hardtanh int layer_norm le leaky_relu lerp linear_cross_entropy log log10
        log1p log2 logical_and logical_not logical_or logit logsigmoid long lt masked_fill maximum minimum mish mul multiply
        nan_to_num ne neg normal_ pow prelu real imag reciprocal relu relu6 remainder requires_grad_ rms_norm round rrelu rsqrt rsub
        scaled_dot_product_attention selu sgn sigmoid sign silu sin softplus softsign sqrt square sub subtract tan tanh
        tanhshrink threshold to tril triu true_divide trunc type type_as uniform_ where xlogy add_ clamp_ copy_ div_
        masked_fill_ mul_ relu_ silu_ sub_ zero_ __add__ __and__ __eq__ __floordiv__ __ge__ __gt__ __iadd__ __imul__ __invert__
        __isub__ __itruediv__ __le__ __lt__ __mod__ __mul__ __ne__ __neg__ __or__ __pow__ __radd__ __rmul__ __rpow__ __rsub__
        __rtruediv__ __sub__ __truediv__
    """,
}
_KIND = {kind: frozenset(names.split()) for kind, names in _NAMES.items()}
_FACTORIES, _BLANKS, _RESHAPES, _MOVES = (_KIND[kind] for kind in ("factories", "blanks", "reshapes", "moves"))
_LOSSES, _LINEAR, _STANDARD = (_KIND[kind] for kind in ("losses", "linear", "standard"))
_ROWWISE = _KIND["rowwise"] | _LOSSES
# Operands that may come by keyword, in the order in which every function has them.
_KEYWORDS = ("input", "mat1", "batch1", "other", "mat2", "batch2", "weight", "dim", "index", "mask", "source", "src")
# Accessors have no names of their own.
ACCESSORS = {getattr(Tensor, name).__get__: name for name in ("T", "mT", "H", "mH", "real", "imag")}
_INDEXES = {"__getitem__", "index_select"}
_PRODUCTS = {"matmul", "mm", "__matmul__", "linear", "addmm"}
# Of products: the place of the first operand, and the dimensions of both that are summed over.
_CONTRACTED = {
    **dict.fromkeys(("matmul", "mm", "__matmul__", "bmm", "mv"), (0, -1, -2)),
    **dict.fromkeys(("addmm", "baddbmm"), (1, -1, -2)),
    "linear": (0, -1, -1),
}
# The same, if the dimension they work along is another one: where it stands among the arguments, and its default.
_EVERY = None
_ALONG: dict[str, tuple[int, int | None]] = {
    **dict.fromkeys(("sum", "mean", "prod", "amax", "amin", "any", "all", "argmax", "argmin", "max", "min"), (1, _EVERY)),
    **dict.fromkeys(("softmax", "log_softmax", "softmin", "logsumexp", "cumsum", "cumprod", "var", "std", "median"), (1, _EVERY)),
    **dict.fromkeys(("gather", "scatter", "scatter_", "scatter_add", "select", "narrow", "flip", "count_nonzero"), (1, _EVERY)),
    **dict.fromkeys(("cat", "concat", "stack", "unbind"), (1, 0)),
    **dict.fromkeys(("chunk", "split", "tensor_split"), (2, 0)),
    **dict.fromkeys(("sort", "argsort"), (1, -1)),
    **dict.fromkeys(("topk", "kthvalue"), (2, -1)),
    **dict.fromkeys(("normalize", "cosine_similarity"), (2, 1)),
    **dict.fromkeys(("norm", "roll"), (2, _EVERY)),
    "one_hot": (9, -1),
}


class Call(NamedTuple):
    """One call of a function, as notes are made of it."""

    func: Callable[..., Any]
    name: str
    given: tuple[Any, ...]  # its positional arguments
    args: tuple[Any, ...]  # these, and operands that came by keyword, in the order in which the function has them
    kwargs: dict[str, Any]
    data: Data  # the operands that are neither weights nor constants, with their notes
    result: Any

    def along(self, x: Tensor) -> set[int | None]:
        """The dimensions of ``x`` that the function works along; all of them where it does not say."""
        place, default = _ALONG[self.name]
        dim = self.args[place] if len(self.args) > place else default
        if self.name == "flip" and len(self.args) > 2:
            dim = self.args[1:]
        dim = next((self.kwargs[key] for key in ("dim", "dims", "axis") if key in self.kwargs), dim)
        dims = dim if isinstance(dim, (tuple, list)) else (dim,)
        if any(not isinstance(d, int) or isinstance(d, bool) for d in dims):
            return set(range(max(x.ndim, 1)))
        return {d % max(x.ndim, 1) for d in dims}

    def along_first(self, x: Tensor) -> bool:
        return 0 in self.along(x)


class Provenance:
    """Notes on the tensors of one pass. ``lead`` is the shape (N,), or (N, T) where every position is an example."""

    def __init__(self, positions: bool, num_examples: int | None) -> None:
        self.positions = positions
        self.inseparable = "positions cannot be run one by one" if positions else ""  # why nothing is run again for one example
        self._given = num_examples
        self._notes = WeakIdKeyDictionary()
        self.lead: tuple[int, ...] | None = None
        self.mixed = False  # whether examples seem to have met in this pass, ...
        self.proven = False  # ... and whether a gradient said so

    def begin_pass(self) -> None:
        self.lead = None
        self.mixed = self.proven = False

    @property
    def examples(self) -> int:
        return math.prod(self.lead) if self.lead is not None else 0

    def unbatched(self) -> AbstractContextManager[Any]:
        """In which the results of a backward pass are computed."""
        return nullcontext()

    def see_input(self, x: Tensor) -> None:
        """The first tensor that enters the model, or that meets a weight, says what N (and T) is."""
        if self.lead is not None or x.ndim < (2 if self.positions else 1):
            return
        N = x.shape[0] if self._given is None else self._given
        self.lead = (N, x.shape[1]) if self.positions else (N,)

    def note(self, x: Tensor) -> Note | Constant | None:
        note = self._notes.get(x)
        return None if isinstance(note, Moved) and not note.axis and note.positions in (None, 1) else note

    def forget(self, x: Tensor) -> None:
        """Lets ``x`` be data."""
        if isinstance(self._notes.get(x), Constant):
            del self._notes[x]

    def other_batch(self, x: Tensor) -> bool:
        """Whether a tensor that enters the model is of another number of examples."""
        return self._given is None and self.lead is not None and x.shape[: len(self.lead)] != self.lead

    def all_standard(self, operands: Any) -> bool:
        """Whether nothing but (N, …) and constants is among them."""
        notes = [self.note(x) for x in flatten((operands,)) if isinstance(x, Tensor)]
        return not self.positions and all(note is None or isinstance(note, Constant) for note in notes)

    def axis(self, x: Tensor) -> int:
        note = self.note(x)
        return note.axis if isinstance(note, Moved) else 0

    def declare(self, x: Tensor, note: Note | Constant) -> None:
        """Says what is known of ``x``; ``Moved(0)`` that it is (N, …)."""
        self._notes[x] = note

    def is_constant(self, x: Tensor) -> bool:
        return not x.requires_grad and (x.ndim == 0 or isinstance(self.note(x), Constant))

    def declare_rows(self, x: Tensor, ids: Tensor) -> None:
        if self.lead is None:
            self.lead = None if self._given is None or self.positions else (self._given,)
        if self.lead is None or self.positions:
            raise RuntimeError("zerosum.example_ids: expected a probe with num_examples and sequences as examples")
        if ids.ndim != 1 or x.ndim == 0 or ids.shape[0] != x.shape[0] or ids.is_floating_point():
            raise ValueError(
                f"ids: expected {x.shape[0] if x.ndim else 0} integers, one for each row, got {ids.dtype} {tuple(ids.shape)}"
            )
        if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= self.lead[0]):
            raise ValueError(f"ids: expected values in [0, {self.lead[0]}), got {int(ids.min())} to {int(ids.max())}")
        self._notes[x] = Rows(1, len(ids), ids.long())

    def layout(self, x: Tensor, features: int) -> Layout:
        """How ``x`` (…, *features) is divided among the examples."""
        note = self.note(x)
        if isinstance(note, (Nobodys, Total)):
            reason = note.reason if isinstance(note, Nobodys) else "they were summed over the examples"
            raise Uncovered(f"rows whose examples are not known: {reason}")
        if isinstance(note, Moved):
            if self.positions or note.axis >= x.ndim - features:
                raise Uncovered(f"rows whose examples are dimension {note.axis}")
            return Layout(self.examples, 1, axis=note.axis)
        if self.lead is None:
            self.see_input(x)
        lead, rows = self.lead, x.shape[: x.ndim - features]
        if isinstance(note, Single):
            if self.positions:
                raise Uncovered("rows of one example")
            ids = torch.full((rows[0] if rows else 1,), note.example, device=x.device)
            return Layout(self.examples, 1, ids)
        if lead is None:
            raise Uncovered(f"rows {tuple(rows)}, which have no dimension of {'positions' if self.positions else 'examples'}")
        N = lead[0]
        if not isinstance(note, Rows):
            if tuple(rows[: len(lead)]) != lead:
                what = f"N = {N} examples" if len(lead) == 1 else f"(N, T) = {lead} positions"
                raise Uncovered(f"rows {tuple(rows)}, which do not start with {what}")
            return Layout(self.examples, len(lead), None)
        if not self.positions:
            if note.index is None:
                return Layout(N, 1, None, note.per)
            return Layout(N, 1, (note.index // note.per).to(x.device))
        if note.per != lead[1]:
            raise Uncovered(f"rows of {note.per} parts for each example, which are not its {lead[1]} positions")
        return Layout(self.examples, 1, None if note.index is None else note.index.to(x.device))

    def follow(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[Tensor], result: Any
    ) -> bool:
        """Notes what is to be known of a call's results; ``tensors`` are its operands but for weights.

        Returns whether the function is not known, and where the examples are in its results has to be found out.
        """
        name = ACCESSORS.get(func) or str(getattr(func, "__name__", ""))
        given, args = args, (*args, *(kwargs[key] for key in _KEYWORDS if key in kwargs))
        if not tensors:
            if name in _FACTORIES and isinstance(result, Tensor):
                self._notes[result] = CONSTANT
            return False
        notes = [self.note(x) for x in tensors]
        results = [r for r in flatten((result,)) if isinstance(r, Tensor) and self._notes.get(r) is None]
        if name in _BLANKS:
            image = self._rows_of(tensors[0], notes[0]) if self.lead is not None else None
            for r in results:
                self._notes[r] = Blank(image if image is not None and r.ndim and r.shape[0] == image.count else None)
            return False
        data: Data = []
        for x, n in zip(tensors, notes, strict=True):
            if not isinstance(n, Constant) and (x.ndim or x.requires_grad):
                data.append((x, n))
        if not data:
            for r in results:
                self._notes[r] = CONSTANT
            return False
        call = Call(func, name, given, args, kwargs, data, result)
        if writes(name) and isinstance(result, Tensor) and given and result is given[0]:
            self._written(call, result)
            return False
        if self.lead is None:
            return False
        unknown = False
        for r in results:
            # What carries no gradient and is not an index of rows cannot mislead.
            note = self._note_of(call, r)
            self.mixed = self.mixed or (isinstance(note, Nobodys) and note.mixed and r.requires_grad)
            if note is _UNKNOWN:
                unknown = unknown or r.requires_grad
            elif note is not None and (r.requires_grad or not r.is_floating_point() or not isinstance(note, (Nobodys, Total))):
                self._notes[r] = note
        return unknown

    def _written(self, call: Call, x: Tensor) -> None:
        """What is known of ``x`` after call.data was written into it."""
        before = self._notes.get(x)
        into = before.image if isinstance(before, Blank) else self._rows_of(x, self.note(x))
        places = call.name in ("__setitem__", "index_add_", "index_copy_", "masked_scatter_")
        value = call.args[-1] if places else None
        sources = [(y, n) for y, n in call.data if y is not x and (y is value if places else y.is_floating_point())]
        if isinstance(before, Constant):
            del self._notes[x]
        if self.lead is None or not sources:
            if into is not None and isinstance(before, Blank):
                self._put(x, self._note_of_rows(into))
            return
        index = call.args[2] if call.name.startswith("index") else call.args[1] if places else None
        first = index[0] if isinstance(index, tuple) and index else index
        source, note = sources[-1]
        if places and isinstance(first, Tensor):
            self._put(x, self._scattered(first, into, self._rows_of(source, note), x))
        elif places and (first is Ellipsis or (isinstance(first, slice) and first == slice(None))) and into is not None:
            rows = self._rows_of(source, note)
            same = source.ndim < x.ndim or source.shape[0] == 1 or (rows is not None and into.agrees(rows, self.positions))
            self._put(x, self._note_of_rows(into) if same else Nobodys("others were written into them", mixed=True))
        elif not places and isinstance(before, Constant) and source.ndim == x.ndim:
            self._put(x, note)
        else:
            now = self.note(x)
            agree = [now.agrees(n, self.positions) if isinstance(now, Rows) else now == n for _, n in sources]
            if places or not all(agree):
                self._put(x, Nobodys(f"{call.name} may have mixed them"))

    def _put(self, x: Tensor, note: Note | None) -> None:
        """Replaces what was known of ``x``."""
        self._notes[x] = Moved(0) if note is None else note

    def _masked(self, mask: Tensor, rows: Rows | None, x: Tensor) -> Note | None:
        """Rows put where a mask (N, …) is true, in order."""
        N = self.lead[0] if self.lead is not None else -1
        if rows is None or mask.dtype != torch.bool or mask.shape[:1] != (N,) or x.shape[0] != N:
            return Nobodys("others were written into them")
        mask = mask.squeeze(-1) if mask.ndim == x.ndim and mask.shape[-1] == 1 else mask
        mine = mask.flatten().nonzero()[:, 0] // max(math.prod(mask.shape[1:]), 1)
        its = rows.cells().to(mine.device) // rows.per
        return Moved(0) if torch.equal(mine, its) else Nobodys("others were written into them")

    def _note_of_rows(self, rows: Rows) -> Note | None:
        """A note that says no more than it must."""
        plain = self.lead is not None and rows.per == 1 and rows.index is None and rows.count == self.lead[0]
        return None if plain else rows

    def _scattered(self, index: Tensor, into: Rows | None, rows: Rows | None, x: Tensor) -> Note | None:
        """Rows put at ``index``: of the examples that are there already, or in a new order."""
        if index.dtype == torch.bool:
            return self._masked(index, rows, x)
        if rows is None or index.ndim != 1 or self.lead is None:
            return Nobodys("others were written into them")
        cells = rows.cells().to(index.device)
        if x.ndim and x.shape[0] == self.lead[0] and torch.equal(index, cells // rows.per):
            return Moved(0)
        if into is not None and torch.equal(into.cells().to(index.device)[index] // into.per, cells // rows.per):
            return self._note_of_rows(into)
        if index.shape[0] == x.shape[0] and torch.equal(index.sort()[0], torch.arange(len(index), device=index.device)):
            return self._note_of_rows(self._picked(rows.per, torch.empty_like(cells).index_copy_(0, index, cells)))
        return Nobodys("others were written into them")

    def _note_of(self, call: Call, r: Tensor) -> Note | None:
        first, note = call.data[0]
        if not any(isinstance(n, (Rows, Moved, Single, Total, Nobodys)) or self._standard(x, n) for x, n in call.data):
            return None
        if call.name in ("index_add", "index_copy", "scatter_add"):
            _, _, index, source = call.args[:4]
            image = self._notes.get(call.args[0])
            into = image.image if isinstance(image, Blank) else self._rows_of(call.args[0], self.note(call.args[0]))
            rows = self._rows_of(source, self.note(source)) if isinstance(source, Tensor) else None
            return self._scattered(index, into, rows, call.args[0])
        if call.name == "masked_scatter":
            rows = self._rows_of(call.args[2], self.note(call.args[2]))
            return self._masked(call.args[1], rows, call.args[0])
        if call.name in _INDEXES:
            if first is not call.args[0]:
                return note  # entries of a weight, one for each index
            call = call._replace(data=call.data[:1])  # what picks rows is not among them
        if call.name == "nonzero" or (call.name == "where" and len(call.args) == 1):
            return None
        if call.name in _LOSSES and any(isinstance(n, Moved) and not n.axis for _, n in call.data):
            return Total() if r.ndim == 0 else None  # (N, classes, T)
        if (bad := next((n for _, n in call.data if isinstance(n, Nobodys)), None)) is not None:
            return bad
        if any(isinstance(n, Total) for _, n in call.data):
            return self._of_totals(call)
        if any(isinstance(n, Single) for _, n in call.data):
            return self._of_singles(call)
        if call.name in _CONTRACTED and (problem := self._contraction(call)) is not None:
            return problem
        if call.name in _RESHAPES:
            return self._reshaped(first, note, r)
        if call.name == "__getitem__":
            return self._indexed(first, note, call.args[1], r)
        if call.name == "index_select":
            _, dim, index = call.args
            return self._indexed(first, note, index if dim % first.ndim == 0 else (slice(None),), r)
        if call.name in _MOVES:
            return self._moved(call, first, note, r)
        if call.name in ("repeat_interleave", "repeat", "tile"):
            return self._repeated(call, first, note, r)
        if call.name in ("cat", "concat", "stack") and call.along_first(first):
            return self._joined(call, r)
        parts = (
            isinstance(call.result, (tuple, list))
            and call.name in ("unbind", "__iter__")
            and call._replace(name="unbind").along_first(first)
        )
        if parts and self._standard(first, note):
            return next((Single(i) for i, part in enumerate(call.result) if part is r), None)
        if call.name == "select" and note is None and self._standard(first, note) and call.along_first(first):
            return Single(int(call.kwargs.get("index", call.args[2] if len(call.args) > 2 else 0)) % first.shape[0])
        if call.name in ("chunk", "split", "tensor_split") and call.along_first(first):
            return self._divided(first, note, call.result, r)
        if all(n is None for _, n in call.data):
            return self._of_standard(call, r)
        return self._kept(call, r)

    def _contraction(self, call: Call) -> Nobodys | None:
        """Whether a product sums over the examples, or puts them elsewhere."""
        place, *dims = _CONTRACTED[call.name]
        for operand, dim in zip(call.args[place : place + 2], dims, strict=False):
            note = next((n for x, n in call.data if x is operand), Total())
            if isinstance(note, Total) or not (isinstance(note, (Rows, Moved)) or self._standard(operand, note)):
                continue
            axis = note.axis if isinstance(note, Moved) else 0
            dim = dim if operand.ndim > 1 else -1
            if axis == dim % operand.ndim:
                return Nobodys(f"{call.name} sums over them", mixed=True)
            if operand is call.args[place + 1] and operand.ndim <= 2:
                return Nobodys(f"{call.name} may have mixed them")
        return None

    def _of_standard(self, call: Call, r: Tensor) -> Note | None:
        """Of operands (N, …), which most functions keep apart."""
        x = call.data[0][0]
        if not self._standard(x, None):
            return None
        if call.name in _LOSSES:
            return Total() if r.ndim == 0 else None
        if call.name in _ROWWISE and any(1 < y.ndim < r.ndim and y.requires_grad and self._standard(y, n) for y, n in call.data):
            return Nobodys(f"{call.name} broadcasts rows of examples over something else", mixed=True)
        if call.name in _ALONG and call.along_first(x):
            return Total() if call.name in ("sum", "mean") else Nobodys(f"{call.name} mixes them", mixed=True)
        if call.name in _PRODUCTS and _mixes_rows(call.data):
            return Nobodys(f"{call.name} of activations mixes them", mixed=True)
        if call.name == "batch_norm" and call.kwargs.get("training", call.args[5] if len(call.args) > 5 else False):
            return Nobodys("batch_norm in training mode mixes them", mixed=True)
        if call.name in ("expand", "broadcast_to"):
            return None if r.ndim == x.ndim else Nobodys(f"{call.name} may have moved them")
        known = call.name in _ROWWISE or call.name in _ALONG or call.name in _PRODUCTS or call.name in _STANDARD
        return None if known else _UNKNOWN

    @staticmethod
    def _of_totals(call: Call) -> Note:
        alone = all(isinstance(n, Total) for _, n in call.data)
        if (
            alone
            and (len(call.data) == 1 or call.name not in ("mul", "__mul__", "div", "__truediv__", "pow", "__pow__"))
            and call.name in _LINEAR
        ):
            return Total()
        return Nobodys(f"{call.name} of a total mixes them", mixed=True)

    def _standard(self, x: Tensor, note: Note | Constant | None) -> bool:
        return note is None and self.lead is not None and x.ndim > 0 and x.shape[0] == self.lead[0]

    @staticmethod
    def _of_singles(call: Call) -> Note | None:
        whose = [n for _, n in call.data]
        if all(n == whose[0] for n in whose):
            return whose[0]
        joins = call.name in ("stack", "cat", "concat") and call.along_first(call.data[0][0])
        if joins and all(isinstance(n, Single) for n in whose):
            counts = torch.tensor([1 if call.name == "stack" else len(x) for x, _ in call.data])
            cells = torch.tensor([n.example for n in whose if isinstance(n, Single)]).repeat_interleave(counts)
            return Rows(1, len(cells), cells)
        return Nobodys(f"{call.name} may have mixed them")

    def _picked(self, per: int, cells: Tensor) -> Rows:
        """Rows of these cells; all cells in order are as good as flattened."""
        assert self.lead is not None
        if len(cells) == self.lead[0] * per and torch.equal(cells, torch.arange(len(cells), device=cells.device)):
            return Rows(per, len(cells))
        return Rows(per, len(cells), cells)

    def _reshaped(self, x: Tensor, note: Note | None, r: Tensor) -> Note | None:
        assert self.lead is not None
        N = self.lead[0]
        if isinstance(note, Moved):
            upto = max(note.axis, note.positions or 0) + 1
            if r.shape[:upto] == x.shape[:upto]:
                return note
            return Nobodys("their dimension of examples was moved and reshaped")
        if isinstance(note, Rows):
            if r.ndim and r.shape[0] == note.count:
                return note
            if note.index is None and r.ndim and r.shape[0] == N:
                return None
            if r.ndim and note.count and r.shape[0] == _product_of_leading(x, r) and r.shape[0] % note.count == 0:
                times = r.shape[0] // note.count
                if note.index is None:
                    return Rows(note.per * times, r.shape[0])
                inner = torch.arange(times, device=note.index.device)
                return Rows(note.per * times, r.shape[0], (note.index[:, None] * times + inner).flatten())
            if note.index is not None and r.ndim and r.shape[0] and note.count % r.shape[0] == 0:
                cells = note.index.view(r.shape[0], -1)
                if r.shape[:2] == cells.shape and bool((cells == cells[:, :1]).all()):  # parts of one cell, side by side
                    return self._picked(note.per, cells[:, 0])
            return Nobodys("they were reshaped")
        if not self._standard(x, note) or (r.ndim and r.shape[0] == N):
            return None
        if r.ndim and N and r.shape[0] == _product_of_leading(x, r):
            return Rows(r.shape[0] // N, r.shape[0])
        if r.ndim > 1 and r.shape[:2] == (1, N):  # unsqueeze(0)
            return Moved(1)
        return Nobodys("they were reshaped") if r.requires_grad else None

    def _indexed(self, x: Tensor, note: Note | None, index: Any, r: Any) -> Note | None:
        assert self.lead is not None
        if isinstance(note, Moved):
            if r.shape[: note.axis + 1] == x.shape[: note.axis + 1]:
                return note
            if isinstance(index, int) and r.shape == x.shape[1:] and note.axis and note.positions != 0:
                return note.below()
            return Nobodys("they were indexed")
        if not isinstance(note, Rows) and not self._standard(x, note):
            return None
        rows = note if isinstance(note, Rows) else Rows(1, x.shape[0])
        first = index[0] if isinstance(index, tuple) and index else index
        rest = index[1:] if isinstance(index, tuple) else ()
        if isinstance(first, list):
            first = torch.tensor(first)
        if first is Ellipsis and sum(i is not None for i in rest) >= x.ndim:
            first, rest = rest[0], rest[1:]
        if first is Ellipsis or (isinstance(first, slice) and first == slice(None)):
            return note
        if first is None:
            return Moved(1) if not isinstance(note, Rows) and r.shape[1:2] == x.shape[:1] else Nobodys("they were indexed")
        if isinstance(first, int) and rows.per == 1 and rows.index is None:
            return Single(first % x.shape[0])
        if isinstance(first, slice):
            cells = rows.cells()[first]
            return self._picked(rows.per, cells)
        if isinstance(first, Tensor) and first.dtype == torch.bool and not any(isinstance(i, (Tensor, list)) for i in rest):
            where = first.nonzero()
            if first.ndim == 1:
                return Rows(rows.per, len(where), rows.cells().to(where.device)[where[:, 0]])
            inner = math.prod(first.shape[1:])
            flat = first.flatten().nonzero()[:, 0]
            cells = rows.cells().to(flat.device)[flat // inner] * inner + flat % inner
            return Rows(rows.per * inner, len(cells), cells)
        if isinstance(first, Tensor) and first.ndim == 1 and r.ndim and r.shape[0] == len(first):
            cells = rows.cells().to(first.device)[first]
            return self._picked(rows.per, cells)
        return Nobodys("they were indexed") if r.requires_grad else None

    def _rows_of(self, x: Tensor, note: Note | Constant | None) -> Rows | None:
        """What dimension 0 holds, also where that is simply the examples."""
        if isinstance(note, Rows):
            return note
        return Rows(1, x.shape[0]) if self._standard(x, note) else None

    def _repeated(self, call: Call, x: Tensor, note: Note | None, r: Tensor) -> Note | None:
        """Rows several times over, each by itself or all together."""
        rows = self._rows_of(x, note)
        repeats = next((a for a in (*call.args[1:], *call.kwargs.values()) if isinstance(a, Tensor)), None)
        along_first = call.name != "repeat_interleave" or call.kwargs.get("dim", call.args[2] if len(call.args) > 2 else None) in (
            0,
            -x.ndim,
        )
        if rows is None or not along_first:
            kept = r.ndim == x.ndim and r.shape[:2] == x.shape[:2] if isinstance(note, Moved) else not isinstance(note, Moved)
            return note if kept else Nobodys(f"{call.name} may have mixed them")
        if repeats is not None and call.name == "repeat_interleave":
            return self._picked(rows.per, rows.cells().to(x.device).repeat_interleave(repeats))
        if r.ndim == x.ndim and r.shape[0] == x.shape[0]:
            return note
        times = r.shape[0] // max(x.shape[0], 1)
        if (
            r.ndim != x.ndim
            or r.shape[0] != x.shape[0] * times
            or any(isinstance(a, Tensor) for a in (*call.args[1:], *call.kwargs.values()))
        ):
            return Nobodys(f"{call.name} may have mixed them")
        cells = rows.cells().to(x.device)
        return self._picked(rows.per, cells.repeat_interleave(times) if call.name == "repeat_interleave" else cells.repeat(times))

    def _joined(self, call: Call, r: Tensor) -> Note | None:
        parts = [self._rows_of(x, n) for x, n in call.data]
        if call.name == "stack":
            return Moved(1) if all(self._standard(x, n) for x, n in call.data) else Nobodys("they were stacked")
        found = [rows for rows in parts if rows is not None]
        if len(found) != len(parts) or len({rows.per for rows in found}) != 1 or sum(rows.count for rows in found) != r.shape[0]:
            return Nobodys("they were joined with others") if found else None
        return self._picked(found[0].per, torch.cat([rows.cells() for rows in found]))

    def _divided(self, x: Tensor, note: Note | None, parts: Any, r: Tensor) -> Note | None:
        rows = self._rows_of(x, note)
        if rows is None:
            return note
        start = 0
        for part in parts:
            if part is r:
                return self._picked(rows.per, rows.cells()[start : start + part.shape[0]])
            start += part.shape[0]
        return None

    def _moved(self, call: Call, x: Tensor, note: Note | None, r: Tensor) -> Note | None:
        if isinstance(note, Nobodys):
            return note
        if isinstance(note, Rows):
            return (
                note
                if r.ndim == x.ndim and r.stride(0) == x.stride(0) and r.shape[0] == x.shape[0]
                else Nobodys("they were transposed")
            )
        axis = note.axis if isinstance(note, Moved) else 0
        if not isinstance(note, Moved) and not self._standard(x, note):
            return note
        # Where the dimension went: its size says so in a tensor of different sizes.
        rest = {key: value for key, value in call.kwargs.items() if key != "input"}
        out = call.func(torch.empty(tuple(range(2, x.ndim + 2)), device="meta"), *call.given[1:], **rest)
        at = list(out.shape)
        if not self.positions or x.ndim < 2:
            return Moved(at.index(axis + 2))
        t = note.positions if isinstance(note, Moved) and note.positions is not None else 1
        return Moved(at.index(axis + 2), at.index(t + 2))

    def _kept(self, call: Call, r: Tensor) -> Note | None:
        """Of rows or moved dimensions, which only functions that are known to may leave as they are."""
        noted = [(x, n) for x, n in call.data if n is not None]
        # (Of rows, those that are parts of the least divided examples: others may be told from them, but not they from others.)
        x, note = min(noted, key=lambda pair: pair[1].per if isinstance(pair[1], Rows) else 0)
        # Operands that broadcast are everybody's.
        full = [(y, n) for y, n in call.data if y.ndim == r.ndim and y.shape[0] != 1]
        same = (note.agrees(n, self.positions) if isinstance(note, Rows) else n == note for _, n in noted)
        if not all(same) or (call.name in _PRODUCTS and _mixes_rows(call.data)):
            return Nobodys(f"{call.name} mixes them", mixed=True)
        if isinstance(note, Rows):
            if any(n is None and self._standard(y, n) and y.shape[0] == note.count for y, n in full):
                return Nobodys(f"{call.name} mixes them", mixed=True)
            kept = r.ndim > 0 and r.shape[0] == note.count
            if call.name in _LOSSES and r.ndim == 0:
                return Total()
            alike = call.name in _LOSSES or all(y.ndim == x.ndim for y, _ in noted)
            if kept and alike and (call.name in _ROWWISE or call.name in _PRODUCTS):
                return note
            if call.name in _ALONG:
                if kept and not call.along_first(x):
                    return note
                if call.name in ("sum", "mean"):
                    return Total()
                if call.name == "sort" and x.ndim == 1 and isinstance(call.result, tuple):
                    return self._picked(note.per, note.cells().to(call.result[1].device)[call.result[1]])
        if isinstance(note, Moved) and self.lead is not None:
            N = self.lead[0]
            batched = call.name in ("scaled_dot_product_attention", "bmm", "baddbmm", "matmul", "__matmul__")
            apart = not batched or len(noted) == 1 or note.axis < r.ndim - 2
            where = r.ndim == x.ndim and r.shape[note.axis] == N
            if note.positions is not None:
                where = where and r.shape[note.positions] == x.shape[note.positions]
            along = call.name in _ALONG and call.along(x)
            if (
                where
                and apart
                and (call.name in _ROWWISE or call.name in _PRODUCTS or (along and not along & {note.axis, note.positions}))
            ):
                return note
            if call.name == "unbind" and call.along_first(x) and note.axis and note.positions != 0:
                return note.below()
        known = call.name in _ROWWISE or call.name in _ALONG or call.name in _PRODUCTS
        plain = isinstance(note, Moved) or (isinstance(note, Rows) and note.index is None)
        return _UNKNOWN if plain and not known else Nobodys(f"{call.name} may have mixed them")


def _product_of_leading(x: Tensor, r: Tensor) -> int:
    """The size of r's dimension 0 where it merges leading dimensions of x, else -1."""
    for j in range(1, x.ndim + 1):
        if x.shape[j:] == r.shape[1:]:
            return math.prod(x.shape[:j])
        # What follows may be divided anew, as long as the first dimension is whole ones of x.
        if j > 1 and math.prod(x.shape[:j]) == r.shape[0] and math.prod(x.shape[j:]) == math.prod(r.shape[1:]):
            return math.prod(x.shape[:j])
    return -1


def _mixes_rows(data: Data) -> bool:
    """Whether a product is of two matrices of activations, each of whose rows meets every row of the other."""
    matrices = [y for y, n in data if y.ndim == 2 and (n is not None or not y.is_leaf)]
    return len(matrices) > 1 and all(y.ndim <= 2 for y, _ in data)


def writes(name: str) -> bool:
    """Whether a function works in place."""
    return (
        name == "__setitem__"
        or (name.endswith("_") and not name.endswith("__"))
        or (name.startswith("__i") and name != "__invert__")
    )


@dataclass(frozen=True)
class Layout:
    """How an activation (rows, *features) is divided among E examples."""

    examples: int
    lead: int  # leading dimensions that are the examples, where ``ids`` and ``per`` are not given
    ids: Tensor | None = None  # the example of each index of dimension 0
    per: int | None = None  # dimension 0 is the examples times this many parts
    axis: int = 0  # the dimension that is the examples

    def rows(self, x: Tensor) -> Tensor:
        """(E, T, F), or (P, F) with :meth:`row_ids`."""
        x = x.movedim(self.axis, 0)
        if self.ids is None:
            return x.reshape(self.examples, x.shape[:-1].numel() // max(self.examples, 1), x.shape[-1])
        return x.reshape(-1, x.shape[-1])

    def row_ids(self, x: Tensor) -> Tensor | None:
        """The example of each of ``rows(x)``, where they are ragged."""
        if self.ids is None:
            return None
        return self.ids.repeat_interleave(x.shape[:-1].numel() // max(len(self.ids), 1))

    def slice(self, x: Tensor, mine: slice) -> tuple[Tensor, Tensor | None]:
        """Some rows of ``x`` (P, F), and the example of each."""
        ids = self.row_ids(x)
        if ids is None:
            ids = torch.arange(self.examples, device=x.device).repeat_interleave(len(x) // max(self.examples, 1))
        return x[mine], ids[mine]

    def ragged(self, x: Tensor) -> dict[str, Any]:
        """What tells an op of ``zsl_kernels`` whose the rows are, where they are ragged."""
        ids = self.row_ids(x)
        return {} if ids is None else {"example_ids": ids, "num_examples": self.examples}

    def per_example(self, g: Tensor, keep: int) -> Tensor:
        """(rows, …) → (E, …): summed over an example's parts; the first ``keep`` dimensions are rows."""
        if self.ids is not None:
            return g.new_zeros(self.examples, *g.shape[1:]).index_add_(0, self.ids, g)
        if self.per is not None:
            return g.reshape(self.examples, self.per, *g.shape[1:]).sum(1)
        return g.flatten(0, keep - 1) if keep > 1 else g


def flatten(values: Iterable[Any]) -> Iterable[Any]:
    """The leaves of nested lists, tuples, dictionaries and dataclasses."""
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from flatten(value)
        elif isinstance(value, dict):
            yield from flatten(value.values())
        elif is_dataclass(value) and not isinstance(value, type):
            yield from flatten(vars(value).values())
        else:
            yield value
