"""Lets the probe measure a model whose parameters are sharded by ``fully_shard``, by tensor parallelism, or by both."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from zerosum.distributed import tensor_parallel
from zerosum.distributed.fsdp import AfterBackward, Shard, ShardedProbe, groups_of, scaled
from zerosum.distributed.reports import Joint, Ranks
from zerosum.distributed.tensor_parallel import Part, PartProbe
from zerosum.probe.contributions import WEIGHT_SHAPED, Sums, densified
from zerosum.probe.parameters import ParameterProbe
from zerosum.probe.report import Report
from zerosum.probe.results import Pass, Results, add_up
from zerosum.probe.stored import report_of_results


class ShardedPartProbe(ShardedProbe, PartProbe):
    """Probes a part of a tensor-parallel parameter of which this rank holds a shard."""


class Shards:
    """The sharded parameters of a model.

    Ranks have different examples along FSDP's dimensions of the mesh, and the same ones along the tensor-parallel dimension.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
        self._groups = list(dict.fromkeys(group for module in self._modules for group in groups_of(module)))
        parameters = [p for group in self._groups for p in group.fsdp_params]
        with self.gathered(all(hasattr(p, "_unsharded_param") for p in parameters)):
            self._shards = {p._unsharded_param: Shard(p) for p in parameters}
        self.whole: dict[tuple[nn.Module, str], nn.Parameter] = {}  # the gathered parameters by module and name
        for p in parameters:
            info = p._module_info
            places = [(info.module, info.param_name), *zip(info.shared_modules, info.shared_param_names, strict=True)]
            self.whole |= dict.fromkeys(places, p._unsharded_param)
        one = next(iter(self._shards.values()), None)
        self._ranks = Ranks([] if one is None else one.groups)
        self._owners = None if one is None else one.owners
        parts = [Part(p) for p in (self._shards or model.parameters()) if isinstance(p, DTensor)]
        self._parallel = parts[0] if parts else None

    def probe(self, context: Any, names: list[str], parameter: nn.Parameter) -> ParameterProbe:
        """Create the probe of a parameter, which watches the object that the running model uses."""
        shard, part = self._shards.get(parameter), isinstance(parameter, DTensor)
        if shard is None:
            return (PartProbe if part else ParameterProbe)(context, names, parameter)
        t = (ShardedPartProbe if part else ShardedProbe)(context, names, parameter)
        t.shard = shard
        return t

    def is_parallel(self, tensors: Sequence[Tensor]) -> bool:
        """Whether any operand of a call is a DTensor of a tensor-parallel model."""
        return self._parallel is not None and any(isinstance(x, DTensor) for x in tensors)

    @staticmethod
    def rule(func: Any) -> Callable[..., Any] | None:
        """Return the rule of an operation with such operands."""
        return tensor_parallel.RULES.get(func)

    @staticmethod
    def check_loss(outputs: Any) -> None:
        """Raise an error if the differentiated losses are divided over the ranks."""
        if any(isinstance(x, DTensor) for x in (outputs if isinstance(outputs, (list, tuple)) else [outputs])):
            raise NotImplementedError(
                "zerosum.Probe: a loss that is a DTensor (as with loss_parallel) is not supported: compute it from whole logits, "
                "with ColwiseParallel(output_layouts=Replicate()) for the head"
            )

    # Collective operations -------------------------------------------------------------------------------------------------------

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank with different examples. (Ranks with the same examples agree anyway.)"""
        return self._ranks.any(flag, self._groups[0].device) if self._groups else flag

    def joint(self, report: Report, passes: Sequence[Pass], probes: Sequence[ParameterProbe]) -> Report:
        """Combine each rank's own report into the report of all ranks' examples. All ranks must call it."""
        scales = self._ranks.everyone([p.scale for p in passes])
        if any(other != scales[0] for other in scales):
            raise ValueError(
                f"loss_reduction: an explicit value needs the same number of examples on all ranks, got scales {scales}; "
                "use loss_reduction='auto'"
            )
        joint = Joint(self._ranks, report)
        if self._parallel is not None:
            for missing in Ranks([self._parallel.group]).everyone(joint.not_covered):
                joint.lose(missing)
        found, shapes, directions, counted = {}, {}, {}, []
        for t in probes:
            if t.name not in joint.covered:
                continue
            sums, u = _sums(t), t.direction
            scalars, grams = joint.scalars(t.name, self._over_parts if _is_part(t) else _same)
            grad_sum, abs_sum, sq_sum = scaled(sums, joint.common).unbind()
            found[t.name] = results = Results.held(Sums(grad_sum, abs_sum, sq_sum, **scalars, gram=None), grams, abs_sum.shape)
            if isinstance(t, ShardedProbe):
                results.placed = t.shard.as_dtensor
                u = None if u is None else t.shard.own(u)
            elif isinstance(t, PartProbe):
                results.placed = t.part.as_dtensor
            shapes[t.name], directions[t.name] = t.parameter.shape, u
            counted.append(_is_part(t) or self._is_first)
        add_up(
            ((results, directions[name]) for name, results in found.items()),
            lambda rows: self._over_parts(self._over_owners(rows * rows.new_tensor(counted).unsqueeze(1))),
        )
        return report_of_results(
            found, shapes, report, joint.how, joint.not_covered, joint.proofs, joint.num_examples, joint.unreached
        )

    @property
    def _is_first(self) -> bool:
        """Whether this rank counts values that are the same on all ranks of the tensor-parallel dimension."""
        return self._parallel is None or self._parallel.mesh.get_local_rank() == 0

    def _over_owners(self, x: Tensor) -> Tensor:
        if self._owners is not None:
            dist.all_reduce(x, group=self._owners)
        return x

    def _over_parts(self, x: Tensor) -> Tensor:
        if self._parallel is not None:
            dist.all_reduce(x, group=self._parallel.group)
        return x

    @contextmanager
    def gathered(self, already: bool = False) -> Iterator[None]:
        """Keep all of FSDP's parameters gathered."""
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
        """Reduce sums where FSDP reduces gradients, and make FSDP skip backward passes that are ``extra``."""
        known = {t.parameter: t for t in probes}
        for group in self._groups:
            group.post_backward = AfterBackward(group, extra, known)
        try:
            yield
        finally:
            for group in self._groups:
                del group.post_backward


def _sums(t: ParameterProbe) -> Tensor:
    """Return this rank's part of the block's sums, (3, …)."""
    if isinstance(t, ShardedProbe):
        assert t.sums is not None  # a rank that covers it has reduced them with all others
        return t.sums
    if t.results is None:
        raise AssertionError("expected ranks with the same examples to cover the same parameters")
    sums = densified(t.results.sums, t.like.shape[0] if t.like.ndim else 1)
    return scaled(torch.stack([getattr(sums, field).view(t.like.shape) for field in WEIGHT_SHAPED]), t.results.scale)


def _is_part(t: ParameterProbe) -> bool:
    return isinstance(t, PartProbe) and not t.part.is_whole


def _same(x: Tensor) -> Tensor:
    return x


def check(model: nn.Module) -> None:
    """Raise an error if a model's parameters are sharded in an unsupported way."""
    groups = [group for module in model.modules() if isinstance(module, FSDPModule) for group in groups_of(module)]
    sharded: set[nn.Parameter] = set()
    meshes = set()
    for p in [p for group in groups for p in group.fsdp_params]:
        spec = p._unsharded_dtensor_spec if p.is_dtensor else None
        if getattr(p.mesh_info, "is_spmd_mesh", False) or (spec is not None and len(spec.placements) != 1):
            raise NotImplementedError(
                f"model: {p._module_info.param_name!r} is sharded over a mesh with more dimensions than FSDP's and one for tensor "
                "parallelism, which is not supported: use parallelize_module and fully_shard on submeshes"
            )
        meshes.add(p.mesh_info.mesh)
        sharded |= {p.sharded_param, getattr(p, "_unsharded_param", p.sharded_param)}
    if len(meshes) > 1:
        raise NotImplementedError(f"model: its parameters are sharded over {len(meshes)} meshes; one is supported")
    parallel = set()
    for name, p in model.named_parameters():
        if p in sharded:
            continue
        if p.requires_grad and sharded:
            raise NotImplementedError(
                f"model: {name!r} is not sharded, but other parameters are: call fully_shard on the whole model last, as PyTorch "
                "advises, and leave trained parameters out of ignored_params"
            )
        if isinstance(p, DTensor):
            if p.device_mesh.ndim != 1 or not (p.placements[0].is_shard() or p.placements[0].is_replicate()):
                raise NotImplementedError(
                    f"model: {name!r} is a DTensor of {p.placements}; only tensor parallelism over one mesh dimension is supported"
                )
            parallel.add(p.device_mesh)
    if len(parallel) > 1:
        raise NotImplementedError(f"model: its parameters are parallel over {len(parallel)} meshes; one is supported")
