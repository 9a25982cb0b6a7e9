"""Lets the probe measure a model that ``torch.distributed.fsdp.fully_shard`` (FSDP2, HSDP) has sharded.

While a module runs, it uses gathered parameters, which are always the same objects: the probe watches those. Each rank has its own
examples, so its sums are partial sums over all ranks. They are reduced to the owners of the shards at the point where FSDP reduces
the gradients of the same parameters, so that the ranks' collectives stay in FSDP's order. At the end of the block, the scalars of
all ranks' examples are concatenated. The report then covers all ranks' examples, and its weight-shaped sums are DTensors like the
parameters.

A rank that proves a step differentiates it again. This needs the parameters but runs none of FSDP's collectives. Therefore, if any
rank needs a proof, all ranks first gather all parameters. :class:`~zerosum.distributed.shards.Shards` handles the parameters
together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from zerosum.probe.contributions import SCALARS, WEIGHT_SHAPED, Sums, densified
from zerosum.probe.parameters import ParameterProbe
from zerosum.probe.results import Results
from zsl_kernels.types import sum_dtype

_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor  # the older name is deprecated
TWICE = "the backward pass computed its gradient twice"


class Shard:
    """The part of a parameter that this rank owns, and how a sum over the ranks is reduced to it."""

    def __init__(self, parameter: Any) -> None:
        self._parameter = parameter  # FSDP's parameter object
        info = parameter.mesh_info
        self._sharded = info.shard_mesh_dim is not None
        self._replicated = info.replicate_mesh_dim is not None
        self._info = info
        self.dim: int = parameter.fsdp_placement.dim

    @property
    def parts(self) -> int:
        return self._info.shard_mesh_size if self._sharded else 1

    @property
    def groups(self) -> list[dist.ProcessGroup]:
        """The process groups of ranks with different examples, outermost first. Together they are the ranks of the mesh."""
        found = [self._info.replicate_process_group] if self._replicated else []
        return [*found, self._info.shard_process_group] if self._sharded else found

    @property
    def owners(self) -> dist.ProcessGroup | None:
        """The process group of the ranks that hold the parts of one parameter."""
        return self._info.shard_process_group if self._sharded else None

    def own(self, x: Tensor, dim: int | None = None) -> Tensor:
        """Return this rank's part of a tensor that has the parameter's layout."""
        dim = self.dim if dim is None else dim
        if not self._sharded:
            return x
        size = -(-x.shape[dim] // self.parts)
        start = min(size * self._info.shard_mesh_rank, x.shape[dim])
        return x.narrow(dim, start, min(size, x.shape[dim] - start))

    def reduced(self, x: Tensor) -> Tensor:
        """Return this rank's part of the sum of (F, *parameter.shape) over the ranks."""
        dim = self.dim + 1
        mine = self.own(x, dim)
        if self._sharded:
            size = -(-x.shape[dim] // self.parts)
            rows = x.new_zeros(self.parts * size, *x.shape[:dim], *x.shape[dim + 1 :])  # the scattered dimension must be first
            rows[: x.shape[dim]] = x.movedim(dim, 0)
            part = rows.new_empty(size, *rows.shape[1:])
            _reduce_scatter(part, rows, group=self._info.shard_process_group)
            mine = part[: mine.shape[dim]].movedim(0, dim)
        mine = mine.contiguous()
        if self._replicated:
            dist.all_reduce(mine, group=self._info.replicate_process_group)
        return mine

    def as_dtensor(self, x: Tensor) -> DTensor:
        """Return this rank's part as a tensor that is sharded like the parameter."""
        like: DTensor = self._parameter.sharded_param
        return DTensor.from_local(x, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride())


class AfterBackward:
    """Replaces a parameter group's ``post_backward``: reduces the probe's sums, then calls the original."""

    def __init__(self, group: Any, extra: Callable[[], bool], probes: dict[nn.Parameter, ParameterProbe]) -> None:
        self._plain = group.post_backward
        self._extra = extra
        self._group = group
        known = (probes.get(p._unsharded_param) for p in group.fsdp_params)
        self._probes = [t for t in known if isinstance(t, ShardedProbe)]

    def __call__(self, *unused: Any) -> None:
        if self._extra():
            return
        unused_too = getattr(self._group, "reduce_scatter_unused_params", False)
        with torch.no_grad():
            for t in self._probes:
                if t.arrived or unused_too:
                    t.reduce()
        self._plain(*unused)


class ShardedProbe(ParameterProbe):
    """Probes a parameter of which this rank holds a shard. It watches the gathered parameter; its results are those of the
    shard."""

    shard: Shard
    sums: Tensor | None  # (3, *shard), over the ranks and the passes so far
    arrived = False  # whether its gradient arrived in this backward pass
    _waiting: Results | None = None  # this rank's contribution

    def renew(self, context: Any, direction: Tensor | None, gram: bool) -> None:
        if isinstance(direction, DTensor):
            direction = direction.full_tensor()
        super().renew(context, direction, gram)
        self.marks.merges = True  # so that `on_gradient` is called for each gradient
        self.sums, self.arrived, self._waiting = None, False, None

    def on_gradient(self, grad: Tensor) -> None:
        if self.context.nested:
            self.refuse("a reentrant checkpoint uses it: with fully_shard, use checkpoint(..., use_reentrant=False)")
        self.arrived |= not self.context.nested
        super().on_gradient(grad)

    def take_marked(self) -> bool:
        taken = super().take_marked()
        self.arrived |= taken
        return taken

    def take_results(self, results: Results) -> None:
        if self._waiting is not None:
            self.refuse(TWICE)
            return
        self._waiting = results

    def reduce(self) -> None:
        """Add up the ranks' contributions to this backward pass. All ranks must call it, even without a contribution."""
        waiting, self._waiting, self.arrived = self._waiting, None, False
        like, now = self.like, self.context.current
        if waiting is None:
            mine = torch.zeros(len(WEIGHT_SHAPED), *like.shape, dtype=sum_dtype(like.dtype), device=like.device)
        else:
            sums = densified(waiting.sums, like.shape[0])
            mine = torch.stack([getattr(sums, field).view(like.shape) for field in WEIGHT_SHAPED])
        total = scaled(self.shard.reduced(mine), 1.0 if now is None else now.scale)
        self.sums = total if self.sums is None else self.sums.add_(total)
        if waiting is not None:
            nothing = total.new_empty(0)
            rest = Sums(nothing, nothing, nothing, *(getattr(waiting.sums, field) for field in SCALARS))
            super().take_results(Results(rest, waiting.latest, nothing))

    def refuse(self, problem: str) -> None:
        super().refuse(problem)
        self._waiting = None

    def end_pass(self) -> None:
        super().end_pass()
        if self._waiting is not None:
            self.refuse("its statistics were computed after FSDP had reduced its gradient")
        self.arrived, self._waiting = False, None


def groups_of(module: FSDPModule) -> list[Any]:
    """Return FSDP's groups of parameters that are gathered together."""
    state = module._get_fsdp_state()
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]


def scaled(sums: Tensor, by: float) -> Tensor:
    """Scale Σ g, Σ |g| and Σ g² (3, …) as if every gradient were multiplied by a number."""
    if by == 1:
        return sums
    factors = sums.new_tensor([by**power for power in WEIGHT_SHAPED.values()])
    return sums * factors.view(-1, *[1] * (sums.ndim - 1))
