"""The probe of a model that ``torch.distributed.fsdp.fully_shard`` (FSDP2, HSDP) has sharded.

While a module runs, its parameters are the gathered ones, and always the same objects: the probe watches those. Each rank has
examples of its own, so its sums are parts of sums over all ranks. They are reduced to the owners of the shards in the place where
FSDP reduces the gradients of the same parameters, so that the ranks' collectives come in FSDP's own order. When the block is over,
the examples' scalars of all ranks are put behind one another. A report is then of all ranks' examples, and its weight-shaped sums
are DTensors like the parameters.

A rank that proves a step differentiates it again, which needs the parameters but calls no collective of FSDP's: all of them are
gathered before, on all ranks, if one of them proves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from zerosum.distributed.reports import Joint, Ranks
from zerosum.probe.contributions import SCALARS, WEIGHT_SHAPED, Sums, densified
from zerosum.probe.parameters import ParameterProbe
from zerosum.probe.report import Report
from zerosum.probe.results import Pass, Results, add_up
from zerosum.probe.stored import report_of_results
from zsl_kernels.types import sum_dtype

_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor  # (the older name is deprecated)
TWICE = "the backward pass went through it twice"


class Shard:
    """Which part of a parameter is this rank's, and how the ranks' parts of a sum become it."""

    def __init__(self, parameter: Any) -> None:
        self._parameter = parameter  # FSDP's
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
        """Of the ranks that have other examples, from the outermost: all of them together are the ranks of the mesh."""
        found = [self._info.replicate_process_group] if self._replicated else []
        return [*found, self._info.shard_process_group] if self._sharded else found

    @property
    def owners(self) -> dist.ProcessGroup | None:
        """Of the ranks that have the parts of one parameter."""
        return self._info.shard_process_group if self._sharded else None

    def own(self, x: Tensor, dim: int | None = None) -> Tensor:
        """This rank's part of a tensor that is laid out as the parameter."""
        dim = self.dim if dim is None else dim
        if not self._sharded:
            return x
        size = -(-x.shape[dim] // self.parts)
        start = min(size * self._info.shard_mesh_rank, x.shape[dim])
        return x.narrow(dim, start, min(size, x.shape[dim] - start))

    def reduced(self, x: Tensor) -> Tensor:
        """This rank's part of the sum of (F, *parameter.shape) over the ranks."""
        dim = self.dim + 1
        mine = self.own(x, dim)
        if self._sharded:
            size = -(-x.shape[dim] // self.parts)
            rows = x.new_zeros(self.parts * size, *x.shape[:dim], *x.shape[dim + 1 :])  # (what is to be scattered comes first)
            rows[: x.shape[dim]] = x.movedim(dim, 0)
            part = rows.new_empty(size, *rows.shape[1:])
            _reduce_scatter(part, rows, group=self._info.shard_process_group)
            mine = part[: mine.shape[dim]].movedim(0, dim)
        mine = mine.contiguous()
        if self._replicated:
            dist.all_reduce(mine, group=self._info.replicate_process_group)
        return mine

    def as_dtensor(self, x: Tensor) -> DTensor:
        """This rank's part, as a tensor that is sharded like the parameter."""
        like: DTensor = self._parameter.sharded_param
        return DTensor.from_local(x, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride())


class Shards:
    """The sharded parameters of a model."""

    def __init__(self, modules: Sequence[FSDPModule]) -> None:
        self._modules = modules
        self._groups = list(dict.fromkeys(group for module in modules for group in _groups(module)))
        parameters = [p for group in self._groups for p in group.fsdp_params]
        with self.gathered(all(hasattr(p, "_unsharded_param") for p in parameters)):
            self.of = {p._unsharded_param: Shard(p) for p in parameters}
        self.whole: dict[tuple[nn.Module, str], nn.Parameter] = {}  # by where they are
        for p in parameters:
            info = p._module_info
            places = [(info.module, info.param_name), *zip(info.shared_modules, info.shared_param_names, strict=True)]
            self.whole |= dict.fromkeys(places, p._unsharded_param)
        self._any = next(iter(self.of.values()))
        self._ranks = Ranks(self._any.groups)

    @classmethod
    def find(cls, model: nn.Module) -> Shards | None:
        modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
        return cls(modules) if any(_groups(module) for module in modules) else None

    def probe(self, context: Any, names: list[str], parameter: nn.Parameter) -> ParameterProbe:
        """What watches a gathered parameter."""
        t = ShardedProbe(context, names, parameter)
        t.shard = self.of[parameter]
        return t

    def any(self, flag: bool) -> bool:
        """Whether it is so on any rank. All ranks call it."""
        return self._ranks.any(flag, self._device)

    def joint(self, report: Report, passes: Sequence[Pass], probes: Sequence[ParameterProbe]) -> Report:
        """The report of all ranks' examples, from each rank's report of its own. All ranks call it."""
        scales = self._ranks.everyone([p.scale for p in passes])
        if any(other != scales[0] for other in scales):
            raise ValueError(
                f"loss_reduction: expected the same numbers of examples on all ranks where it is explicit, got scales {scales}; "
                "use loss_reduction='auto'"
            )
        joint = Joint(self._ranks, report)
        found, shapes, directions = {}, {}, {}
        for t in probes:
            if t.name not in joint.covered:
                continue
            assert isinstance(t, ShardedProbe)
            scalars, grams = joint.scalars(t.name)
            assert t.sums is not None  # one rank has reduced them with all others
            grad_sum, abs_sum, sq_sum = _scaled(t.sums, joint.common).unbind()
            mine = Sums(grad_sum, abs_sum, sq_sum, **scalars, gram=None)
            found[t.name] = Results.held(mine, grams, mine.abs_sum.shape)
            found[t.name].placed = t.shard.as_dtensor
            shapes[t.name] = t.parameter.shape
            directions[t.name] = None if t.direction is None else t.shard.own(t.direction)
        add_up(((results, directions[name]) for name, results in found.items()), self._add_over_owners)
        return report_of_results(
            found, shapes, report, joint.how, joint.not_covered, joint.proofs, joint.num_examples, joint.unreached
        )

    def _add_over_owners(self, x: Tensor) -> Tensor:
        if (group := self._any.owners) is not None:
            dist.all_reduce(x, group=group)
        return x

    @property
    def _device(self) -> torch.device:
        return self._groups[0].device

    @contextmanager
    def gathered(self, already: bool = False) -> Iterator[None]:
        """In which all parameters are gathered."""
        sharded = [] if already else [group for group in self._groups if not group.is_unsharded]
        if sharded:
            for module in self._modules:
                module.unshard()
        try:
            yield
        finally:
            for group in sharded:
                group.reshard()

    @contextmanager
    def watched(self, extra: Callable[[], bool], probes: Sequence[ParameterProbe]) -> Iterator[None]:
        """In which sums are reduced where FSDP reduces gradients, and nothing happens in backward passes that are ``extra``."""
        known = {t.parameter: t for t in probes}
        for group in self._groups:
            group.post_backward = _AfterBackward(group, extra, known)
        try:
            yield
        finally:
            for group in self._groups:
                del group.post_backward


class _AfterBackward:
    """What runs in the place of a group's ``post_backward``."""

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
    """A parameter of which this rank keeps a shard. It watches the gathered one, and its results are the shard's."""

    shard: Shard
    sums: Tensor | None  # (3, *shard), over the ranks and the passes so far
    arrived = False  # whether its gradient has come in this backward pass
    _waiting: Results | None = None  # this rank's part

    def renew(self, context: Any, direction: Tensor | None, gram: bool) -> None:
        if isinstance(direction, DTensor):
            direction = direction.full_tensor()
        super().renew(context, direction, gram)
        self.marks.merges = True  # so that it is told of each gradient
        self.sums, self.arrived, self._waiting = None, False, None

    def on_gradient(self, grad: Tensor) -> None:
        if self.context.nested:
            self.refuse("it is used in a reentrant checkpoint: with fully_shard use checkpoint(..., use_reentrant=False)")
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
        """Adds the ranks' parts of this backward pass up. All ranks call it, whether they have a part or not."""
        waiting, self._waiting, self.arrived = self._waiting, None, False
        like, now = self.parameter, self.context.current
        if waiting is None:
            mine = torch.zeros(len(WEIGHT_SHAPED), *like.shape, dtype=sum_dtype(like.dtype), device=like.device)
        else:
            sums = densified(waiting.sums, like.shape[0])
            mine = torch.stack([getattr(sums, field).view(like.shape) for field in WEIGHT_SHAPED])
        total = _scaled(self.shard.reduced(mine), 1.0 if now is None else now.scale)
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
            self.refuse("its statistics came after FSDP had reduced its gradient")
        self.arrived, self._waiting = False, None


def check(model: nn.Module) -> frozenset[nn.Parameter]:
    """The parameters, as they are outside of the step, that FSDP shards.

    Raises:
        NotImplementedError: they are sharded in a way that is not supported.
    """
    groups = [group for module in model.modules() if isinstance(module, FSDPModule) for group in _groups(module)]
    found: set[nn.Parameter] = set()
    meshes = set()
    for p in [p for group in groups for p in group.fsdp_params]:
        if p.is_dtensor:
            raise NotImplementedError(
                f"model: {p._param_fqn or p._module_info.param_name!r} is both tensor parallel and sharded by fully_shard, which "
                "is not supported: shard the model by fully_shard alone, over all ranks"
            )
        meshes.add(p.mesh_info.mesh)
        found |= {p.sharded_param, getattr(p, "_unsharded_param", p.sharded_param)}
    if len(meshes) > 1:
        raise NotImplementedError(f"model: its parameters are sharded over {len(meshes)} meshes; one is supported")
    return frozenset(found)


def _groups(module: FSDPModule) -> list[Any]:
    """FSDP's groups of parameters that are gathered together."""
    state = module._get_fsdp_state()
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]


def _scaled(sums: Tensor, by: float) -> Tensor:
    """Σ g, Σ |g| and Σ g² (3, …) of gradients times a number."""
    if by == 1:
        return sums
    factors = sums.new_tensor([by**power for power in WEIGHT_SHAPED.values()])
    return sums * factors.view(-1, *[1] * (sums.ndim - 1))
