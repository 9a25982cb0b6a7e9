"""Lets the probe measure tensor-parallel parameters, which are DTensors over one mesh dimension (``parallelize_module``).

Every rank of the mesh has the same examples.

- Sharded weights: this rank holds rows (sharded by outputs) or columns (sharded by inputs) of the weight, and already has the
  operands of their gradient. A use runs on local tensors by the ordinary rules, and yields each example's gradient of this rank's
  part. Σ|g| and the other sums are exact there; norms and dot products are added over the ranks.
- Norms: every rank holds the whole weight. Under sequence parallelism, a rank has only the gradient from its positions, so the
  examples' (N, K) gradients are first added over the ranks.

Rows are attributed to examples on whole rows, which are gathered for this, so that all ranks find the same attribution.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from zerosum.probe.contributions import Contributions, Dense
from zerosum.probe.layout import Uncovered
from zerosum.probe.parameters import Gather, GradSource, ParameterProbe
from zerosum.probe.results import Results
from zerosum.probe.rules import broadcast, embedding, linear, norm

MIXED_ROWS = "one use takes whole rows, and another takes only this rank's part of the rows"


class Part:
    """Describes which part of a parameter this rank holds."""

    def __init__(self, parameter: DTensor) -> None:
        self.mesh = parameter.device_mesh
        (self.placement,) = parameter.placements
        self._shape, self._stride = parameter.shape, parameter.stride()

    @property
    def is_whole(self) -> bool:
        return self.placement.is_replicate()

    @property
    def group(self) -> dist.ProcessGroup:
        return self.mesh.get_group()

    def own(self, x: Tensor) -> Tensor:
        """Return this rank's part of a tensor that has the parameter's shape."""
        whole = DTensor.from_local(x, self.mesh, [Replicate()], run_check=False)
        return whole.redistribute(placements=[self.placement]).to_local()

    def as_dtensor(self, x: Tensor) -> DTensor:
        return DTensor.from_local(x, self.mesh, [self.placement], run_check=False, shape=self._shape, stride=self._stride)


class PartProbe(ParameterProbe):
    """Probes a parameter of which this rank holds a part."""

    def __init__(self, context: Any, names: list[str], parameter: Any) -> None:
        super().__init__(context, names, parameter)
        self.part = Part(parameter)
        with torch.no_grad():
            self.like = parameter.to_local()

    def renew(self, context: Any, direction: Tensor | None, gram: bool) -> None:
        if direction is not None:
            direction = self.part.own(direction.full_tensor() if isinstance(direction, DTensor) else direction)
        super().renew(context, direction, gram)
        self._of_rows: bool | None = None  # whether its uses take only a part of the rows

    def uses(self, of_rows: bool) -> None:
        """Note a use that takes all rows, or only this rank's part of them."""
        if self._of_rows not in (None, of_rows):
            raise Uncovered(MIXED_ROWS)
        self._of_rows = of_rows

    def stands_alone(self, piece: Any) -> bool:
        return False  # uses take the local tensor that the gathering node returns

    def whole_gradient(self, grad: Tensor) -> Tensor:
        """Return the gradient over all rows, from the one that autograd computes over this rank's rows."""
        if self._of_rows:
            grad = grad.contiguous()
            dist.all_reduce(grad, group=self.part.group)
        return grad

    def gradient(self, contributions: Contributions) -> Tensor:
        if self._of_rows:
            now = self.context.current
            assert now is not None
            found = Contributions(self.base)
            found.add(self.base, Dense(self.whole_gradient(contributions.materialize(now.examples, self.like))))
            contributions = found
        return super().gradient(contributions)

    def on_gradient(self, grad: Tensor) -> None:
        if isinstance(grad, DTensor):
            if grad.placements != (self.part.placement,):
                self.refuse("part of its gradient comes from an unsupported operation on DTensors")
            grad = grad.to_local()
        super().on_gradient(grad)

    def take_results(self, results: Results) -> None:
        results.own()
        super().take_results(results)


class GatherPart(Gather):
    """Passes a parameter's local tensor to its uses, and returns its gradient as a DTensor."""

    @staticmethod
    def forward(ctx: Any, tensor: Any, source: GradSource) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.source = source
        return tensor.to_local().detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None]:
        source: PartProbe = ctx.source
        with torch._C.DisableTorchFunction():
            found, _ = Gather.backward(ctx, None if grad is None else source.whole_gradient(grad))
            return None if found is None else source.part.as_dtensor(found), None


PartProbe.gather = GatherPart


# Rules ---------------------------------------------------------------------------------------------------------------------------


def _linear(context: Any, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, weight, bias = cast(tuple[Any, Any, Any], linear.linear_arguments(*args, **kwargs))
    placement = _placement(weight)
    x = _activation(x, weight, Shard(x.ndim - 1) if placement.is_shard(1) else Replicate())
    by_output, by_input = placement.is_shard(0), placement.is_shard(1)
    mine = x.to_local(grad_placements=[Partial() if by_output else x.placements[0]])
    last = x.ndim - 1
    shape = torch.Size((*x.shape[:-1], weight.shape[0]))
    with _WholeRows(context, partial(_whole, weight.device_mesh, Shard(last), shape) if by_output else None):
        y = linear.rule(context, func, (mine, _own(context, weight), None if by_input else _own(context, bias)), {})
    y = _dtensor(y, weight, Shard(last) if by_output else Partial() if by_input else Replicate(), shape)
    if by_input and bias is not None:
        # The bias is whole on each rank, and is added to the sum over the ranks.
        y = y.redistribute(placements=[Replicate()])
        if context.ref(bias) is None:
            return y + bias
        _see(context, bias, False)
        y = _dtensor(broadcast.rule(context, torch.add, (y.to_local(), bias), {}), weight, Replicate(), shape)
    return y


def _embedding(context: Any, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    given, weight = cast(tuple[Any, Any], embedding.lookup_arguments(*args, **kwargs)[:2])
    placement = _placement(weight)
    ids = _activation(given, weight, Replicate()).to_local()
    if not embedding.plain(args, kwargs):
        raise Uncovered("max_norm, scale_grad_by_freq or sparse gradients")
    rows = embedding.rows(ids, weight, *args[2:], **{key: x for key, x in kwargs.items() if key not in ("input", "weight")})
    shape = torch.Size((*ids.shape, weight.shape[1]))
    if placement.is_shard(0):
        size = -(-weight.shape[0] // weight.device_mesh.size())
        first = size * weight.device_mesh.get_local_rank()
        count = max(min(weight.shape[0] - first, size), 0)
        inside = (ids >= first) & (ids < first + count)
        at = torch.where(inside, ids - first, 0)
        with _WholeRows(context, partial(_whole, weight.device_mesh, Partial(), shape)):
            y = embedding.lookup(context, weight, at, torch.where(inside & (rows >= 0), rows - first, -1))
        return _dtensor(torch.where(inside.unsqueeze(-1), y, 0), weight, Partial(), shape)
    by_output = placement.is_shard(1)
    with _WholeRows(context, partial(_whole, weight.device_mesh, Shard(ids.ndim), shape) if by_output else None):
        y = embedding.lookup(context, weight, ids, rows)
    return _dtensor(y, weight, Shard(ids.ndim) if by_output else Replicate(), shape)


def _rowwise(rule: Callable[..., Any], context: Any, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Cover a norm, or a product of each row with a vector, whose weights are whole on each rank. The rows may be sharded."""
    operands: list[Any] = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
    weights = [x for x in operands if context.ref(x) is not None]
    (x, *others) = [x for x in operands if context.ref(x) is None and x.ndim > 1]
    if others or not all(_placement(w).is_replicate() and w.ndim == 1 for w in weights):
        raise Uncovered("operands other than whole vectors and an activation")
    placement = _placement(x)
    if not (placement.is_replicate() or (isinstance(placement, Shard) and placement.dim < x.ndim - 1)):
        raise Uncovered("an activation whose rows are divided over the ranks")
    mine, of_rows = x.to_local(), placement.is_shard()
    for w in weights:
        _see(context, w, of_rows)

    def local(y: Any) -> Any:
        return mine if y is x else y if context.ref(y) is not None or not isinstance(y, DTensor) else y.to_local()

    lead = x.shape[:-1]
    with _WholeRows(context, partial(_whole, x.device_mesh, placement, x.shape) if of_rows else None, lead):
        y = rule(context, func, tuple(map(local, args)), {key: local(y) for key, y in kwargs.items()})
    return _dtensor(y, x, placement, x.shape)


RULES: dict[Callable[..., Any], Callable[..., Any]] = {
    F.linear: _linear,
    F.embedding: _embedding,
    F.layer_norm: partial(_rowwise, norm.layer_norm_rule),
    F.rms_norm: partial(_rowwise, norm.rms_norm_rule),
    **dict.fromkeys((torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__), partial(_rowwise, broadcast.scale_rule)),
}


class _WholeRows:
    """Attributes the uses seen in it by whole rows; ``gather`` computes these from a gradient of this rank's part."""

    def __init__(self, context: Any, gather: Callable[[Tensor], Tensor] | None, lead: torch.Size | None = None) -> None:
        self._context, self._gather, self._lead = context, gather, lead

    def __enter__(self) -> None:
        self._before = len(self._context.sites)

    def __exit__(self, *exception: Any) -> None:
        if self._gather is not None:
            for site in self._context.sites[self._before :]:
                site.rows_of = self._gather
                if self._lead is not None:
                    site.lead = self._lead


def _whole(mesh: Any, placement: Placement, shape: torch.Size, x: Tensor) -> Tensor:
    return DTensor.from_local(x, mesh, [placement], run_check=False, shape=shape, stride=_strides(shape)).full_tensor()


def _placement(x: Any) -> Placement:
    if not isinstance(x, DTensor) or len(x.placements) != 1:
        raise Uncovered("operands that are not all DTensors of one mesh dimension")
    return x.placements[0]


def _activation(x: Any, weight: DTensor, placement: Placement) -> DTensor:
    _placement(x)
    if x.device_mesh != weight.device_mesh:
        raise Uncovered("operands of two meshes")
    return x.redistribute(placements=[placement])


def _own(context: Any, weight: Any) -> Any:
    """Return what a rule takes: the weight itself if the probe measures it, and otherwise its local tensor."""
    if weight is None:
        return None
    if context.ref(weight) is None:
        return weight.to_local() if isinstance(weight, DTensor) else weight
    _see(context, weight, False)
    return weight


def _see(context: Any, weight: Tensor, of_rows: bool) -> None:
    source = context.ref(weight).source
    if not isinstance(source, PartProbe):
        raise Uncovered("a weight that is not a DTensor")
    source.uses(of_rows)


def _dtensor(x: Tensor, like: DTensor, placement: Placement, shape: torch.Size) -> DTensor:
    return DTensor.from_local(x, like.device_mesh, [placement], run_check=False, shape=shape, stride=_strides(shape))


def _strides(shape: torch.Size) -> tuple[int, ...]:
    return tuple(math.prod(shape[k + 1 :]) for k in range(len(shape)))
