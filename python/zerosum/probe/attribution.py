"""Whose is a row? Differentiate Σ_i w_i ℓ_i with weights that are signed powers of two, and read the weight off the row's gradient.

Products and sums scale by a power of two without rounding. So where a row of an activation depends on no loss but ℓ_i, its
gradient becomes exactly w_i times what it was, and the factor names the example. A row whose gradient fits no weight serves several
examples: the proof that they meet there. Sixteen weights name 16 examples in one backward pass and 256 in two; one more pass with
weights drawn at random makes sure that no row fits by chance.

The losses are told apart at a *cut*: tensors with a dimension of examples through which all of the gradient passes
(:func:`find_cut`). What lies between the cut and the root of the backward pass must keep examples apart as well, which its second
derivative shows (:func:`couples`).
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.hooks import RemovableHandle

from zerosum.distributed import ddp
from zerosum.probe.layout import Layout

UNREACHED = -1  # no loss's gradient reaches the row
MIXED = -2  # several losses' gradients reach it
BASE = 16  # weights of one pass: ±2^k for k from -3 to 4
SMALLEST = 2.0**-3
PROJECTIONS = 3
QUANTILES = (0.5, 0.9, 0.99, 0.999)
CLEAR = 0.25  # an error up to which a row's weight can be read through noise
MOST_LOST = 0.5  # of the rows, that may be lost in noise
MOST_STRANGE = 0.01  # of the rows, whose weights may be read wrong


def digits(examples: int) -> int:
    """How many passes name that many examples."""
    count, passes = BASE, 1
    while count < examples:
        count, passes = count * BASE, passes + 1
    return passes


def weights_of_digit(examples: int, digit: int) -> Tensor:
    """(E,) float64 weights that spell one digit of each example's number."""
    d = torch.arange(examples) // BASE**digit % BASE
    return _weight(d)


def random_weights(examples: int) -> Tensor:
    """(E,) float64 weights that are the same in every process, and of no pattern."""
    generator = torch.Generator().manual_seed(examples)
    return _weight(torch.randint(BASE, (examples,), generator=generator))


def _weight(digit: Tensor) -> Tensor:
    return torch.where(digit % 2 == 0, 1.0, -1.0).double() * 2.0 ** (digit // 2 - 3).double()


def along(weights: Tensor, axis: int, like: Tensor) -> Tensor:
    """(E,) weights as a tensor that broadcasts along a dimension of ``like``, or along its first two where E is their product."""
    behind = like.ndim - axis - 1
    if len(weights) != like.shape[axis]:
        return weights.to(like).view(like.shape[0], like.shape[1], *[1] * (behind - 1))
    return weights.to(like).view(-1, *[1] * behind)


@contextmanager
def repeatable(edges: Sequence[GradientEdge]) -> Iterator[None]:
    """Where backward passes give the same bits again, as far as PyTorch's operations can. Those of the CPU do so anyway."""
    if all(_device(edge).type == "cpu" for edge in edges):
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    handles: list[RemovableHandle] = []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*[dD]eterministic")  # of operations that have no other form, and of cuBLAS
        try:
            torch.use_deterministic_algorithms(True, warn_only=True)
            # Fused attention can add in order, but does so only where warnings would be errors.
            for node in nodes_between([edge.node for edge in edges], set()):
                if "AttentionBackward" in node.name():
                    handles.append(node.register_prehook(lambda _: torch.use_deterministic_algorithms(True)))
                    if node.name() == "ScaledDotProductCudnnAttentionBackward0":
                        handles.append(node.register_hook(partial(_attention_again, node)))
                    handles.append(node.register_hook(lambda *_: torch.use_deterministic_algorithms(True, warn_only=True)))
            yield
        finally:
            for handle in handles:
                handle.remove()
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _attention_again(node: Any, found: Sequence[Tensor | None], grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...] | None:
    """The gradients of an attention's query, key and value by another kernel: cuDNN's cannot add in order. None where it drops out
    weights, which another kernel would draw anew."""
    grad, dropped = grads[0], node._saved_dropout_p
    if grad is None or dropped:
        return None
    operands = [x.detach().requires_grad_() for x in (node._saved_query, node._saved_key, node._saved_value)]
    query, key, value = operands
    options = {"attn_mask": node._saved_attn_bias, "is_causal": node._saved_is_causal, "scale": node._saved_scale}
    if query.shape[1] != key.shape[1]:
        options["enable_gqa"] = True
    kernels = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with torch.enable_grad(), sdpa_kernel(kernels):
        again = F.scaled_dot_product_attention(query, key, value, **options)
    of_operands = torch.autograd.grad(again, operands, grad)
    of_them = (None if old is None else new for old, new in zip(found, of_operands, strict=False))
    return *of_them, *found[len(operands) :]


@dataclass
class Signature:
    """What is kept of a gradient (R, F): for each row some projections, and its norm. Both scale as the row does."""

    projected: Tensor  # (R, PROJECTIONS) float64, or (R, 1) where rows are single numbers
    norm: Tensor  # (R,)
    lead: torch.Size
    eps: float

    @property
    def strength(self) -> Tensor:
        """(R,) the largest projection: next to nothing beside the norm where a row lies across the directions by chance."""
        return self.projected.abs().amax(1)

    @classmethod
    def of(cls, rows: Tensor) -> Signature:
        """``rows`` is (*lead, F)."""
        lead, width = rows.shape[:-1], rows.shape[-1]
        flat = rows.detach().reshape(-1, width).double()
        if width == 1:
            return cls(flat, flat[:, 0].abs(), lead, torch.finfo(rows.dtype).eps)
        generator = torch.Generator().manual_seed(width)
        directions = torch.randn(width, PROJECTIONS, generator=generator, dtype=torch.float64).to(flat.device)
        return cls(flat @ directions, torch.linalg.vector_norm(flat, dim=1), lead, torch.finfo(rows.dtype).eps)


def follows(plain: Signature, weighted: Signature, weights: Tensor) -> Tensor:
    """(R,) whether each row is the plain one times its own weight, (R,), up to rounding of its dtype."""
    return error_of(plain, weighted, weights) <= tolerance(plain.eps) * plain.norm


def error_of(plain: Signature, weighted: Signature, weights: Tensor) -> Tensor:
    """(R,) how far each row is from the plain one times its own weight, (R,), as a part of the weight."""
    return (weighted.projected - weights[:, None] * plain.projected).abs().amax(1) / weights.abs()


@dataclass
class Noise:
    """How far a pass is from one that scales exactly, as where a device adds by atomics, or where float16 underflows."""

    plain: Signature
    samples: tuple[Tensor, Tensor]  # (R,) of each row, by two passes
    largest: Tensor  # (R,) of more samples

    @classmethod
    def between(cls, plain: Signature, again: Sequence[Signature], scaled: Sequence[Signature]) -> Noise | None:
        """``again``: of further plain passes; ``scaled``: of passes in which all weights are ``SMALLEST``. None where all of them
        are the first to the last bit.

        All of four samples of a noisy row, each of three projections, are small by chance once in millions. Single numbers are one
        sample of their noise: those that lie together in the last dimension are taken together.
        """
        ones = torch.ones_like(plain.norm)
        errors = [*(error_of(plain, x, ones) for x in again), *(error_of(plain, x, SMALLEST * ones) for x in scaled)]
        largest = torch.stack(errors).nan_to_num(nan=0.0).amax(0)
        if not bool((largest > 0).any()):
            return None
        if plain.projected.shape[1] == 1 and len(plain.lead):
            together = largest.view(plain.lead).square().mean(-1, keepdim=True).sqrt()
            largest = torch.maximum(largest, together.expand(plain.lead).reshape(-1))
        return cls(plain, (errors[0], errors[-1]), largest)

    @property
    def size(self) -> Tensor:
        """(R,) as a part of what can be read of a row."""
        return self.largest / self.plain.strength

    def explains(self, errors: Tensor, where: Tensor) -> bool:
        """Whether a pass with weights has errors (R,) that are distributed as those of a pass without, as parts of the rows' norms.

        Those of rows of one example are. The weights of other examples are up to 128 times the own one: the largest errors of
        rows of several examples are many times the part of the others. One sample says which rows are far from lost in noise, the
        other is what their errors are compared with. (A weight that is read wrong makes an error of any size.)
        """
        first, second = self.samples
        chosen = where & (first <= CLEAR / 2 * self.plain.strength)
        if not bool(chosen.any()):
            return False
        found, expected = (_sample((x / self.plain.norm)[chosen].clamp(max=2 * CLEAR)) for x in (errors, second))
        return all(float(found.quantile(q)) <= 3 * float(expected.quantile(q)) + tolerance(self.plain.eps) for q in QUANTILES)


def _sample(x: Tensor) -> Tensor:
    """At most so many numbers as torch sorts."""
    x = x.nan_to_num(nan=0.0)
    return x[:: len(x) // (1 << 22) + 1]


def tolerance(eps: float) -> float:
    """Scaling by a power of two is exact, but two runs of one pass may sum in another order, as atomics do, and a few derivatives
    round: that of ``logcumsumexp`` takes the logarithm of the gradient, and was seen to be off by 4000 units. So 9e-13 of a row is
    allowed in float64, 8e-6 in float32. A part of a row that is smaller than that and belongs to another example is not noticed."""
    if eps > 1e-5:
        return eps
    return 4096 * eps if eps < 1e-10 else 64 * eps


def read_digit(plain: Signature, weighted: Signature) -> tuple[Tensor, Tensor]:
    """(R,) the digit that each row spells, and (R,) whether it spells one."""
    at = plain.projected.abs().argmax(1, keepdim=True)
    ratio = (weighted.projected.gather(1, at) / plain.projected.gather(1, at))[:, 0]
    exponent = ratio.abs().log2().round().nan_to_num(nan=99.0, posinf=99.0, neginf=99.0)
    valid = (exponent >= -3) & (exponent <= 4)
    return 2 * (exponent.clamp(-3, 4).long() + 3) + (ratio < 0), valid


def name_rows(
    plain: Signature, spelled: Sequence[Signature], checked: Signature, examples: int, noise: Noise | None = None
) -> Tensor:
    """(*lead) the example of each row, or UNREACHED or MIXED."""
    names = torch.zeros(len(plain.norm), dtype=torch.long, device=plain.norm.device)
    fits = torch.ones_like(names, dtype=torch.bool)
    errors = []
    for digit, weighted in enumerate(spelled):
        found, valid = read_digit(plain, weighted)
        names += found * BASE**digit
        fits &= valid
        errors.append(error_of(plain, weighted, _weight(found)))
    fits &= names < examples
    errors.append(error_of(plain, checked, random_weights(examples).to(plain.norm.device)[names.clamp(max=examples - 1)]))
    # What is left of gradients that cancel fits no weight where a pass does not repeat to the last bit. It counts for nothing.
    largest = plain.norm.nan_to_num(posinf=0.0).max() if len(plain.norm) else plain.norm.new_zeros(())
    quiet = plain.norm <= plain.eps * largest
    finite = plain.norm.isfinite()
    for weighted in spelled:
        quiet = quiet & (weighted.norm <= BASE * plain.eps * largest)
        finite = finite & weighted.norm.isfinite()
    if noise is not None:
        tells = finite & ~quiet
        clear = fits & (torch.stack([*errors, *noise.samples]).amax(0) <= CLEAR * plain.strength)
        enough = int((clear & tells).sum()) >= (1 - MOST_LOST) * int(tells.sum())
        if enough and all(noise.explains(x, tells) for x in errors):
            names[~clear] = MIXED
            names[~tells] = UNREACHED
            # An error past CLEAR takes some noise; another weight that is clear takes much.
            lost, doubtful = tells & ~clear & (noise.size > CLEAR / 8), noise.size > CLEAR / 2
            shape = plain.lead
            return _through_noise(names.view(shape), lost.view(shape), doubtful.view(shape), examples)
    for x in errors:
        fits &= x <= tolerance(plain.eps) * plain.norm
    names[~fits] = MIXED
    names[~fits & quiet] = UNREACHED
    names[~finite] = UNREACHED  # infinities and NaN tell nothing
    return names.view(plain.lead)


def _through_noise(names: Tensor, lost: Tensor, doubtful: Tensor, examples: int) -> Tensor:
    """Names that were read through noise. Where all rows are in a regular order but those that are ``lost`` and a few ``doubtful``
    ones, the order says whose these are. In no order nothing says it."""
    for axis, _, inner in _candidates(names.shape, examples):
        mine = torch.arange(names.shape[axis], device=names.device) // inner % examples
        strange = (names != mine.view(-1, *[1] * (names.ndim - axis - 1))) & (names >= 0)
        if not bool((strange & ~doubtful).any()) and int(strange.sum()) <= MOST_STRANGE * names.numel():
            return names.masked_fill(lost | strange, UNREACHED)
    return names


def layout_of(names: Tensor, examples: int) -> tuple[Layout, bool]:
    """The layout that names rows so, and whether it is the only one: where some rows are unreached, several may fit."""
    if examples <= 1:
        return Layout(examples), True
    reached = names >= 0
    fitting: list[tuple[tuple[int, int, int], Tensor]] = []
    complete = bool(reached.all())
    for axis, outer, inner in _candidates(names.shape, examples):
        mine = torch.arange(names.shape[axis], device=names.device) // inner % examples
        mine = mine.view(-1, *[1] * (names.ndim - axis - 1))
        if bool(((names == mine) | ~reached).all()):
            fitting.append(((axis, outer, inner), mine))
            if complete:
                break
    if fitting:
        (axis, outer, inner), first = fitting[0]
        alike = all(torch.equal(first.expand(names.shape), other.expand(names.shape)) for _, other in fitting[1:])
        return Layout(examples, axis, outer, inner), alike
    return Layout(examples, ids=names.clamp(min=0).reshape(-1)), True


def _candidates(lead: torch.Size, examples: int) -> Iterable[tuple[int, int, int]]:
    """(axis, outer, inner) of the regular layouts, the usual ones first."""
    found = []
    for axis, size in enumerate(lead):
        if size and size % examples == 0:
            rest = size // examples
            for outer in range(1, rest + 1):
                if rest % outer == 0 and (outer == 1 or outer == rest or rest <= 64):
                    found.append((outer != 1, axis, outer, rest // outer))
    return [(axis, outer, inner) for _, axis, outer, inner in sorted(found)]


# The loss end ---------------------------------------------------------------------------------------------------------------------


def shape_of(edge: GradientEdge) -> tuple[int, ...]:
    """Of the tensor that the edge is the gradient of."""
    return tuple(int(n) for n in edge.node._input_metadata[edge.output_nr].shape)


def edge_of(tensor: Tensor | GradientEdge) -> GradientEdge:
    return tensor if isinstance(tensor, GradientEdge) else torch.autograd.graph.get_gradient_edge(tensor)


@dataclass
class Cut:
    """Tensors that tell the losses apart: ``edges``, each with its dimension of examples. ``bypass``: nodes by which a part of the
    gradient goes past them."""

    edges: list[GradientEdge]
    axes: list[int]
    bypass: list[Node] = field(default_factory=list)


def find_cut(
    roots: Sequence[GradientEdge],
    examples: int,
    barrier: Any,
    skip: set[tuple[Node, int]],
    tier: int = 0,
    ignored: Iterable[Node] = (),
    positions: int = 0,
) -> Cut:
    """The last tensors before the roots that have a dimension of examples, but for those of ``skip``; with ``positions``, a second
    one of positions. The dimension is the first in ``tier`` 0; in tier k, the k-th that has their number.

    ``barrier(node)``: whether a node belongs to a use of a weight, beyond which no losses are looked for. Nodes in ``ignored`` are
    auxiliary losses.
    """
    cut = Cut([], [])
    stack, seen, ignored = list(reversed(roots)), set(), set(ignored)
    while stack:
        edge = stack.pop()
        if edge.node is None or (edge.node, edge.output_nr) in seen or edge.node in ignored:
            continue
        seen.add((edge.node, edge.output_nr))
        shape = shape_of(edge)
        fitting = [d for d, n in enumerate(shape) if n == examples]
        if positions and shape[:2] != (examples, positions):
            fitting = []
        leaf = getattr(edge.node, "variable", None) is not None
        if not leaf and (edge.node, edge.output_nr) not in skip and fitting and (fitting[0] == 0 or tier):
            cut.edges.append(edge)
            cut.axes.append(fitting[min(max(tier - 1, 0), len(fitting) - 1)])
            continue
        if leaf or barrier(edge.node):
            cut.bypass.append(edge.node)
            continue
        for node, number in reversed(edge.node.next_functions):
            if node is not None:
                stack.append(GradientEdge(node, number))
    return cut


Hook = Callable[[tuple[Tensor | None, ...]], tuple[Tensor | None, ...] | None]


@contextmanager
def hooked(hooks: Iterable[tuple[Node, Hook]]) -> Iterator[None]:
    """In which nodes hand the gradients of their results to hooks, which may give others."""
    handles = [node.register_prehook(hook) for node, hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def stopping(edges: Sequence[GradientEdge]) -> AbstractContextManager[None]:
    """In which backward passes go no further than some tensors, whose gradients can still be had.

    A tensor of a cut may be computed from another one: a penalty on hidden states beside the losses, losses that count twice. What
    reaches it by the other one is not to be counted with both.
    """

    def stop(number: int, grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        return tuple(torch.zeros_like(g) if k == number and g is not None else g for k, g in enumerate(grads))

    return hooked((e.node, partial(stop, e.output_nr)) for e in edges if len(edges) > 1)


def nested(edges: Sequence[GradientEdge]) -> bool:
    """Whether some tensors are computed from others of them."""
    nodes = {e.node for e in edges}
    return len(nodes) > 1 and any(
        not nodes.isdisjoint(nodes_between([x for x, _ in node.next_functions if x is not None], set())) for node in nodes
    )


class Unproved(Exception):
    """Why nothing can be said of what lies behind a cut."""


def derivative(
    roots: Sequence[GradientEdge], grads: Sequence[Tensor | None], edges: Sequence[GradientEdge]
) -> tuple[Tensor | None, ...]:
    """What was differentiated by some tensors, to be differentiated again. A result without a graph is a constant.

    Raises:
        Unproved: an operation behind the tensors cannot be differentiated twice, or does not tell whether it can.
    """
    given = [
        torch.ones(shape_of(e), device=_device(e), dtype=_dtype(e)) if g is None else g for e, g in zip(roots, grads, strict=True)
    ]
    with torch.enable_grad(), stopping(edges):
        try:
            found = torch.autograd.grad(list(roots), list(edges), given, create_graph=True, allow_unused=True)
        except RuntimeError as problem:
            raise Unproved(str(problem).splitlines()[0]) from problem
    # A user's function may compute its backward pass of numbers that it kept, which says nothing of what they depend on.
    ends = {e.node for e in edges}
    for node in nodes_between([e.node for e in roots], ends):
        own = any(hasattr(node, name) for name in ("site", "again", "source"))
        users = isinstance(node, torch.autograd.function.BackwardCFunction) and not own and not ddp.is_sink(node)
        if users and not ends.isdisjoint(nodes_between([node], set())):
            raise Unproved(f"{node.name()} is a user-defined function")
    return found


def nodes_between(nodes: Iterable[Node], stop: set[Node]) -> Iterable[Node]:
    """What some nodes lead to, up to those of ``stop``."""
    seen: set[Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node in seen or node in stop:
            continue
        seen.add(node)
        yield node
        stack.extend(x for x, _ in node.next_functions if x is not None)


def couples(
    roots: Sequence[GradientEdge], grads: Sequence[Tensor | None], cut: Cut, examples: int, labels: Tensor | None = None
) -> str:
    """Why the gradient at one example's part of the cut depends on another's, or an empty string. ``labels``: the example of each
    of the cut's rows, where these are not the examples; rows of none (-1) are one more example.

    The Hessian H of what was differentiated with respect to the cut has no entries between examples exactly where H (w ∘ v), for
    random v and weights w of the examples, is w ∘ (H v). Nor may the gradient depend on what goes past the cut, which several
    examples may have made. (Weights, and functions of them alone, none has made.)
    """
    past = {n for n in cut.bypass if getattr(n, "variable", None) is None and not hasattr(n, "source")}
    if op := _of_gradients(roots, cut.edges):
        return f"the loss contains {op} of their gradients; wrap that part in zerosum.auxiliary(part)"
    with torch.enable_grad(), stopping(cut.edges), repeatable(cut.edges):
        first = derivative(roots, grads, cut.edges)
        ordered = [g for g in first if g is not None and g.requires_grad]
        if not ordered:
            return ""
        known = nodes_between([g.grad_fn for g in ordered if g.grad_fn is not None], {e.node for e in cut.edges})
        if any(node in past for node in known):
            return "the loss is not a sum over them"
        rows_of = examples if labels is None else len(labels)
        generator = torch.Generator().manual_seed(rows_of)
        v = [torch.randn(g.shape, generator=generator, dtype=torch.float64).to(g) for g in ordered]
        axes = [axis for g, axis in zip(first, cut.axes, strict=True) if g is not None and g.requires_grad]
        weights = random_weights(examples) if labels is None else random_weights(examples + 1)[labels.cpu()]
        coded = [x * along(weights, axis, x) for x, axis in zip(v, axes, strict=True)]
        try:
            plain, weighted = (torch.autograd.grad(ordered, cut.edges, x, retain_graph=True, allow_unused=True) for x in (v, coded))
        except RuntimeError as problem:
            raise Unproved(str(problem).splitlines()[0]) from problem
    for x, y, axis in zip(plain, weighted, cut.axes, strict=True):
        if x is None or y is None:
            continue
        rows, other = (z.movedim(axis, 0).reshape(rows_of, -1).double() for z in (x, y))  # (With positions, axis is 0.)
        w = weights.to(rows.device)[:, None]
        bound = 256 * torch.finfo(x.dtype).eps * w.abs() * rows.norm(dim=1, keepdim=True)
        # Against what was summed: a product with v cancels.
        bound = bound + 64 * torch.finfo(x.dtype).eps * rows.abs().max()
        if not bool(((other - w * rows).abs() <= bound).all()):
            return "the loss is not a sum over them"
    return ""


# How torch names the derivative of an op of zsl_kernels. None of them can be differentiated twice.
OP = re.compile("GeneratedBackwardFor_zsl_(.*)_defaultBackward")


def _of_gradients(roots: Sequence[GradientEdge], edges: Sequence[GradientEdge]) -> str:
    """The op of examples' gradients, such as ``zk.interference``, by which a penalty is computed of some tensors; or nothing. What
    it is taken of may be any examples, and its second derivative, which would tell, does not exist."""
    ends = {e.node for e in edges}
    for node in nodes_between([e.node for e in roots], ends):
        if (op := OP.fullmatch(node.name())) and not ends.isdisjoint(nodes_between([node], set())):
            return f"zk.{op[1]}"
    return ""


def _device(edge: GradientEdge) -> torch.device:
    return edge.node._input_metadata[edge.output_nr].device


def _dtype(edge: GradientEdge) -> torch.dtype:
    return edge.node._input_metadata[edge.output_nr].dtype


def reached_leaves(nodes: Iterable[Node], gathered: bool = True) -> set[int]:
    """The ids of the leaf tensors that some nodes lead to; with ``gathered=False``, by other paths than the uses of weights that
    the probe has seen."""
    found: set[int] = set()
    seen: set[Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node in seen or (not gathered and hasattr(node, "source")):
            continue
        seen.add(node)
        if (leaf := getattr(node, "variable", None)) is not None:
            found.add(id(leaf))
        following = [x for x, _ in node.next_functions if x is not None and x not in seen]
        if not gathered and (site := getattr(node, "site", None)) is not None:
            own = {id(tensor) for tensor in site.alone_weights}
            following = [x for x in following if id(getattr(x, "variable", None)) not in own]
        stack.extend(following)
    return found
