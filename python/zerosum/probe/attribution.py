"""Finds which example each row of an activation belongs to, by differentiating reweighted losses.

The method differentiates Σ_i w_i ℓ_i, where the weights w_i are signed powers of two, and reads the weight off each row's gradient.
Products and sums scale by a power of two without rounding. If a row of an activation depends on ℓ_i only, its gradient is therefore
multiplied by exactly w_i, and the factor identifies the example. A row whose gradient fits no weight depends on several examples,
which proves that they interact there. Sixteen weights identify 16 examples in one backward pass and 256 in two. One more pass, with
random weights, makes sure that no row fits by chance.

The losses are reweighted at a *cut*: tensors with an example dimension through which all of the gradient passes (:func:`find_cut`).
The computation between the cut and the root of the backward pass must keep examples separate as well, which its second derivative
shows (:func:`couples`).
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

UNREACHED = -1  # the row receives no gradient from any loss
MIXED = -2  # the row receives gradients from several losses
BASE = 16  # weights of one pass: ±2^k for k from -3 to 4
SMALLEST = 2.0**-3
PROJECTIONS = 3
QUANTILES = (0.5, 0.9, 0.99, 0.999)
CLEAR = 0.25  # the largest error at which a row's weight can be read through noise
MOST_LOST = 0.5  # the largest share of rows that noise may hide
MOST_STRANGE = 0.01  # the largest share of rows whose weights may be misread


def digits(examples: int) -> int:
    """Return how many passes identify that many examples."""
    count, passes = BASE, 1
    while count < examples:
        count, passes = count * BASE, passes + 1
    return passes


def weights_of_digit(examples: int, digit: int) -> Tensor:
    """Return (E,) float64 weights that encode one digit of each example's number."""
    d = torch.arange(examples) // BASE**digit % BASE
    return _weight(d)


def random_weights(examples: int) -> Tensor:
    """Return (E,) float64 pseudorandom weights, the same in every process."""
    generator = torch.Generator().manual_seed(examples)
    return _weight(torch.randint(BASE, (examples,), generator=generator))


def _weight(digit: Tensor) -> Tensor:
    return torch.where(digit % 2 == 0, 1.0, -1.0).double() * 2.0 ** (digit // 2 - 3).double()


def along(weights: Tensor, axis: int, like: Tensor) -> Tensor:
    """Reshape (E,) weights to broadcast along a dimension of ``like``, or along its first two if E is the product of their
    sizes."""
    behind = like.ndim - axis - 1
    if len(weights) != like.shape[axis]:
        return weights.to(like).view(like.shape[0], like.shape[1], *[1] * (behind - 1))
    return weights.to(like).view(-1, *[1] * behind)


@contextmanager
def repeatable(edges: Sequence[GradientEdge]) -> Iterator[None]:
    """Make backward passes bitwise repeatable, as far as PyTorch's operations allow. On the CPU they already are."""
    if all(_device(edge).type == "cpu" for edge in edges):
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    handles: list[RemovableHandle] = []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*[dD]eterministic")  # from cuBLAS, and operations without a deterministic form
        try:
            torch.use_deterministic_algorithms(True, warn_only=True)
            # Fused attention can sum in a fixed order, but does so only if nondeterminism is an error rather than a warning.
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
    """Compute the gradients of an attention's query, key and value with another kernel, because cuDNN's cannot sum in a fixed
    order. Return None if it uses dropout, which another kernel would draw anew."""
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
    """Summarizes a gradient (R, F): some projections and the norm of each row. Both scale with the row."""

    projected: Tensor  # (R, PROJECTIONS) float64, or (R, 1) if rows are single numbers
    norm: Tensor  # (R,)
    lead: torch.Size
    eps: float

    @property
    def strength(self) -> Tensor:
        """The largest projection of each row, (R,). It is far below the norm if a row is nearly orthogonal to the directions."""
        return self.projected.abs().amax(1)

    @classmethod
    def of(cls, rows: Tensor) -> Signature:
        """Summarize ``rows`` (*lead, F)."""
        lead, width = rows.shape[:-1], rows.shape[-1]
        flat = rows.detach().reshape(-1, width).double()
        if width == 1:
            return cls(flat, flat[:, 0].abs(), lead, torch.finfo(rows.dtype).eps)
        generator = torch.Generator().manual_seed(width)
        directions = torch.randn(width, PROJECTIONS, generator=generator, dtype=torch.float64).to(flat.device)
        return cls(flat @ directions, torch.linalg.vector_norm(flat, dim=1), lead, torch.finfo(rows.dtype).eps)


def follows(plain: Signature, weighted: Signature, weights: Tensor) -> Tensor:
    """Return (R,) whether each row is the plain one times its own weight, given (R,), up to rounding of its dtype."""
    return error_of(plain, weighted, weights) <= tolerance(plain.eps) * plain.norm


def error_of(plain: Signature, weighted: Signature, weights: Tensor) -> Tensor:
    """Return (R,) how far each row is from the plain one times its own weight, given (R,), relative to the weight."""
    return (weighted.projected - weights[:, None] * plain.projected).abs().amax(1) / weights.abs()


@dataclass
class Noise:
    """How far a pass is from exact scaling, for instance because a device sums with atomics or float16 underflows."""

    plain: Signature
    samples: tuple[Tensor, Tensor]  # errors (R,) of the rows in two passes
    largest: Tensor  # (R,) the largest error over all samples

    @classmethod
    def between(cls, plain: Signature, again: Sequence[Signature], scaled: Sequence[Signature]) -> Noise | None:
        """Measure the noise from further plain passes ``again``, and from passes ``scaled`` in which all weights are ``SMALLEST``.
        Return None if all of them equal the first pass bit for bit.

        For a noisy row, all of four samples of three projections are small by chance once in millions. A row of one number has only
        one sample of its noise, so such rows are pooled along the last dimension.
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
        """The noise (R,) relative to what can be read of a row."""
        return self.largest / self.plain.strength

    def explains(self, errors: Tensor, where: Tensor) -> bool:
        """Whether a weighted pass has errors (R,) with the distribution of a plain pass's, relative to the rows' norms.

        This holds for rows of one example. The weights of other examples are up to 128 times as large as a row's own, so the
        largest errors of rows of several examples are far above it. One sample selects the rows that noise does not hide, and the
        other is what their errors are compared with. (A misread weight makes an error of any size.)
        """
        first, second = self.samples
        chosen = where & (first <= CLEAR / 2 * self.plain.strength)
        if not bool(chosen.any()):
            return False
        found, expected = (_sample((x / self.plain.norm)[chosen].clamp(max=2 * CLEAR)) for x in (errors, second))
        return all(float(found.quantile(q)) <= 3 * float(expected.quantile(q)) + tolerance(self.plain.eps) for q in QUANTILES)


def _sample(x: Tensor) -> Tensor:
    """Return at most as many numbers as torch can sort."""
    x = x.nan_to_num(nan=0.0)
    return x[:: len(x) // (1 << 22) + 1]


def tolerance(eps: float) -> float:
    """Return the relative error that is allowed for a row.

    Scaling by a power of two is exact. However, two runs of a pass may sum in a different order, for instance with atomics, and a
    few derivatives round: that of ``logcumsumexp`` takes the logarithm of the gradient, with an observed error of 4000 units. The
    result is 9e-13 in float64 and 8e-6 in float32. A smaller contribution of another example to a row goes unnoticed.
    """
    if eps > 1e-5:
        return eps
    return 4096 * eps if eps < 1e-10 else 64 * eps


def read_digit(plain: Signature, weighted: Signature) -> tuple[Tensor, Tensor]:
    """Return (R,) the digit that each row encodes, and (R,) whether it encodes one."""
    at = plain.projected.abs().argmax(1, keepdim=True)
    ratio = (weighted.projected.gather(1, at) / plain.projected.gather(1, at))[:, 0]
    exponent = ratio.abs().log2().round().nan_to_num(nan=99.0, posinf=99.0, neginf=99.0)
    valid = (exponent >= -3) & (exponent <= 4)
    return 2 * (exponent.clamp(-3, 4).long() + 3) + (ratio < 0), valid


def name_rows(
    plain: Signature, spelled: Sequence[Signature], checked: Signature, examples: int, noise: Noise | None = None
) -> Tensor:
    """Return (*lead) the example of each row, or UNREACHED or MIXED."""
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
    # If a pass is not bitwise repeatable, the remainder of gradients that cancel fits no weight. Such rows do not count.
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
            # Little noise can move an error past CLEAR, but only much noise makes a row fit another weight clearly.
            lost, doubtful = tells & ~clear & (noise.size > CLEAR / 8), noise.size > CLEAR / 2
            shape = plain.lead
            return _through_noise(names.view(shape), lost.view(shape), doubtful.view(shape), examples)
    for x in errors:
        fits &= x <= tolerance(plain.eps) * plain.norm
    names[~fits] = MIXED
    names[~fits & quiet] = UNREACHED
    names[~finite] = UNREACHED  # infinities and NaN carry no information
    return names.view(plain.lead)


def _through_noise(names: Tensor, lost: Tensor, doubtful: Tensor, examples: int) -> Tensor:
    """Return the rows' names when they were read through noise. If all rows are in a regular order, except ``lost`` rows and a few
    ``doubtful`` ones, that order determines the exceptions. Without a regular order, they stay undetermined."""
    for axis, _, inner in _candidates(names.shape, examples):
        mine = torch.arange(names.shape[axis], device=names.device) // inner % examples
        strange = (names != mine.view(-1, *[1] * (names.ndim - axis - 1))) & (names >= 0)
        if not bool((strange & ~doubtful).any()) and int(strange.sum()) <= MOST_STRANGE * names.numel():
            return names.masked_fill(lost | strange, UNREACHED)
    return names


def layout_of(names: Tensor, examples: int) -> tuple[Layout, bool]:
    """Return the layout that names rows so, and whether it is the only one: with unreached rows, several may fit."""
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
    """Return (axis, outer, inner) of the regular layouts that fit, the usual ones first."""
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
    """Return the shape of the tensor whose gradient the edge carries."""
    return tuple(int(n) for n in edge.node._input_metadata[edge.output_nr].shape)


def edge_of(tensor: Tensor | GradientEdge) -> GradientEdge:
    return tensor if isinstance(tensor, GradientEdge) else torch.autograd.graph.get_gradient_edge(tensor)


@dataclass
class Cut:
    """Tensors that separate the losses: ``edges``, each with its example dimension. ``bypass`` lists nodes through which part of
    the gradient passes them by."""

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
    """Find the tensors closest to the roots that have an example dimension and, with ``positions``, a second one of positions.

    In ``tier`` 0 the first dimension must have the examples' number; in tier k it is the k-th dimension that has it. Edges in
    ``skip`` are passed over. ``barrier(node)`` says whether a node belongs to a use of a weight, beyond which no losses are
    searched. Nodes in ``ignored`` are auxiliary losses.
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
    """Pass the gradients of nodes' results to hooks, which may replace them."""
    handles = [node.register_prehook(hook) for node, hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def stopping(edges: Sequence[GradientEdge]) -> AbstractContextManager[None]:
    """Stop backward passes at some tensors, whose gradients are still available.

    A tensor of a cut may be computed from another one, for instance if a penalty on hidden states is added to the losses. What
    reaches the second tensor through the first must not be counted for both.
    """

    def stop(number: int, grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        return tuple(torch.zeros_like(g) if k == number and g is not None else g for k, g in enumerate(grads))

    return hooked((e.node, partial(stop, e.output_nr)) for e in edges if len(edges) > 1)


def nested(edges: Sequence[GradientEdge]) -> bool:
    """Whether some of the tensors are computed from others of them."""
    nodes = {e.node for e in edges}
    return len(nodes) > 1 and any(
        not nodes.isdisjoint(nodes_between([x for x, _ in node.next_functions if x is not None], set())) for node in nodes
    )


class Unproved(Exception):
    """Raised when nothing can be proved about the computation after a cut; the message is the reason."""


def derivative(
    roots: Sequence[GradientEdge], grads: Sequence[Tensor | None], edges: Sequence[GradientEdge]
) -> tuple[Tensor | None, ...]:
    """Differentiate the loss with respect to some tensors, so that it can be differentiated again. A result without a graph is
    constant.

    Raises:
        Unproved: an operation after the tensors cannot be differentiated twice, or it is unknown whether it can.
    """
    given = [
        torch.ones(shape_of(e), device=_device(e), dtype=_dtype(e)) if g is None else g for e, g in zip(roots, grads, strict=True)
    ]
    with torch.enable_grad(), stopping(edges):
        try:
            found = torch.autograd.grad(list(roots), list(edges), given, create_graph=True, allow_unused=True)
        except RuntimeError as problem:
            raise Unproved(str(problem).splitlines()[0]) from problem
    # A user's function may compute its backward from numbers that it saved, which hides what these depend on.
    ends = {e.node for e in edges}
    for node in nodes_between([e.node for e in roots], ends):
        own = any(hasattr(node, name) for name in ("site", "again", "source"))
        users = isinstance(node, torch.autograd.function.BackwardCFunction) and not own and not ddp.is_sink(node)
        if users and not ends.isdisjoint(nodes_between([node], set())):
            raise Unproved(f"{node.name()} is a user-defined function")
    return found


def nodes_between(nodes: Iterable[Node], stop: set[Node]) -> Iterable[Node]:
    """Yield some nodes and all nodes that they lead to, up to those in ``stop``."""
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
    """Return why the gradient at one example's part of the cut depends on another example, or an empty string.

    ``labels`` gives the example of each of the cut's rows, if rows are not examples; rows of none (-1) count as one more example.

    Let H be the Hessian of the loss with respect to the cut. It has no entries between examples exactly if H (w ∘ v) = w ∘ (H v)
    for random v and weights w of the examples. The gradient must not depend on what bypasses the cut either, which several examples
    may have produced. (Weights, and tensors computed from weights only, do not come from examples.)
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
        rows, other = (z.movedim(axis, 0).reshape(rows_of, -1).double() for z in (x, y))  # with positions, axis is 0
        w = weights.to(rows.device)[:, None]
        bound = 256 * torch.finfo(x.dtype).eps * w.abs() * rows.norm(dim=1, keepdim=True)
        # The bound is relative to the summands, because a product with v cancels.
        bound = bound + 64 * torch.finfo(x.dtype).eps * rows.abs().max()
        if not bool(((other - w * rows).abs() <= bound).all()):
            return "the loss is not a sum over them"
    return ""


# torch's name for the derivative of an op of zsl_kernels. None of these can be differentiated twice.
OP = re.compile("GeneratedBackwardFor_zsl_(.*)_defaultBackward")


def _of_gradients(roots: Sequence[GradientEdge], edges: Sequence[GradientEdge]) -> str:
    """Return the op of examples' gradients, such as ``zk.interference``, that computes a penalty from some tensors, or "". The
    penalty may couple any examples, and its second derivative, which would show that, does not exist."""
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
    """Return the ids of the leaf tensors that some nodes lead to. With ``gathered=False``, paths through observed uses of weights
    do not count."""
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
