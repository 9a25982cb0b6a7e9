"""Steps of models that ``fully_shard`` has sharded, held to one process with the whole batch."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils.checkpoint import checkpoint

import zerosum
from tests.zerosum import models
from tests.zerosum.distributed.ddp_cases import Deep, T, data, model_of, within
from tests.zerosum.oracle import PASSES, assert_truth, direction_for, error, per_example_gradients, trainable
from tests.zerosum.steps import square_losses
from zerosum.distributed import fsdp


class Whole:
    """A report with whole sums in the place of shards."""

    def __init__(self, report: zerosum.Report) -> None:
        self._report = report

    def __getattr__(self, name: str) -> Any:
        return getattr(self._report, name)

    def __contains__(self, name: str) -> bool:
        return name in self._report

    def __getitem__(self, name: str) -> Any:
        return _WholeParameter(self._report[name])


class _WholeParameter:
    def __init__(self, p: zerosum.ParameterReport) -> None:
        self._p = p

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._p, name)
        return value.full_tensor() if isinstance(value, DTensor) else value


def shard(model: nn.Module, **options: Any) -> nn.Module:
    for child in list(model.children())[1:]:
        fully_shard(child, **options)
    return fully_shard(model, **options)


def check(
    rank: int,
    world: int,
    kind: type[nn.Module] = Deep,
    *,
    passes: int = PASSES,
    per_rank: Callable[[int], int] = lambda rank: 2 + rank,
    sharded: Callable[..., nn.Module] = shard,
    sharded_directions: bool = False,
    **options: Any,
) -> tuple[zerosum.Report, nn.Module]:
    batches = data(world, per_rank)
    model = model_of(kind)
    whole = copy.deepcopy(model)
    truth = per_example_gradients(square_losses(whole(torch.cat(batches))), whole, trainable(whole))
    torch.manual_seed(3)
    direction = direction_for(model)
    model = sharded(model, **options)
    along = dict(direction)
    if sharded_directions:
        like = dict(model.named_parameters())
        along = {name: distribute_tensor(u, like[name].device_mesh, like[name].placements) for name, u in direction.items()}
    probe = zerosum.Probe(model, direction=along, gram=True)
    for _ in range(passes):
        model.zero_grad()
        with probe:
            square_losses(model(batches[rank])).sum().backward()
        report = probe.report()
        assert report.num_examples == sum(map(len, batches))
        assert_truth(Whole(report), truth, direction, gram=within(batches))
        for name, p in model.named_parameters():
            if not p.requires_grad:
                continue
            g = report[name].abs_sum
            assert (g.placements, g.device_mesh, g.shape) == (p.placements, p.device_mesh, p.shape)
            assert g.to_local().shape == p.to_local().shape
            assert error(p.grad.full_tensor() * world, truth[name].sum(0)) < 1e-9, f"{name}: .grad"
            assert not isinstance(g.to_local(), DTensor)
    return report, whole


def case_resharded(rank: int, world: int) -> None:
    check(rank, world)


def case_kept(rank: int, world: int) -> None:
    check(rank, world, reshard_after_forward=False)


def case_unsharded_before(rank: int, world: int) -> None:
    """Parameters that stay gathered after the backward pass, and so are no DTensors when a block begins."""
    batches, model = data(world), model_of(Deep)
    truth = per_example_gradients(square_losses(model(torch.cat(batches))), model, trainable(model))
    model = shard(model)
    assert isinstance(model, FSDPModule)
    model.set_reshard_after_backward(False)
    model.unshard()
    probe = zerosum.Probe(model)
    for _ in range(PASSES):
        with probe:
            square_losses(model(batches[rank])).sum().backward()
        assert_truth(Whole(probe.report()), truth, gram=False)


def case_tied(rank: int, world: int) -> None:
    check(rank, world, models.Tied, sharded=fully_shard)


def case_used_twice(rank: int, world: int) -> None:
    check(rank, world, models.UsedTwice)


def case_functions_of_weights(rank: int, world: int) -> None:
    check(rank, world, models.LoRAMerged, sharded=fully_shard)


def case_sharded_directions(rank: int, world: int) -> None:
    check(rank, world, sharded_directions=True)


def case_second_dimension(rank: int, world: int) -> None:
    """Weights whose second dimension is sharded, where the number of ranks divides it."""
    check(rank, world, shard_placement_fn=lambda p: Shard(p.ndim - 1) if p.shape[-1] % world == 0 else Shard(0))


def case_sorted_rows(rank: int, world: int) -> None:
    """Rows in no regular order, which are attributed in every pass."""
    check(rank, world, models.MixtureSorted, sharded=fully_shard, per_rank=lambda rank: 3)


def case_checkpoint(rank: int, world: int) -> None:
    check(rank, world, Recomputed)


class Recomputed(Deep):
    def between(self, x: Tensor) -> Tensor:
        return checkpoint(super().between, x, use_reentrant=False)


class Reentrant(Deep):
    def between(self, x: Tensor) -> Tensor:
        return torch.tanh(checkpoint(self.middle, self.norm(x), use_reentrant=True))


def case_checkpoint_inside(rank: int, world: int) -> None:
    """An FSDP module whose inside is computed again, as activation checkpointing wraps it."""

    def sharded(model: nn.Module) -> nn.Module:
        model.middle = checkpoint_wrapper(model.middle)
        return shard(model)

    batches, model = data(world), model_of(Deep)
    truth = per_example_gradients(square_losses(model(torch.cat(batches))), model, trainable(model))
    probe = zerosum.Probe(sharded(model))
    for _ in range(PASSES):
        with probe:
            square_losses(model(batches[rank])).sum().backward()
        report = Whole(probe.report())
        report.coverage.not_covered.pop("", None)
        names = {name: name.replace("middle.", "middle._checkpoint_wrapped_module.") for name in truth}
        for name, g in truth.items():
            assert error(report[names[name]].abs_sum, g.abs().sum(0)) < 1e-9, name
            assert error(report[names[name]].sq_norm, g.flatten(1).square().sum(1)) < 1e-9, name


def case_several_steps(rank: int, world: int) -> None:
    """Parameters change between blocks, and what is gathered again in the backward pass is the new ones."""
    batches, model = data(world), model_of(Deep)
    whole = copy.deepcopy(model)
    model = shard(model)
    probe = zerosum.Probe(model)
    for _ in range(4):
        truth = per_example_gradients(square_losses(whole(torch.cat(batches))), whole, trainable(whole))
        with probe:
            square_losses(model(batches[rank])).sum().backward()
        assert_truth(Whole(probe.report()), truth, gram=False)
        for name, p in model.named_parameters():
            with torch.no_grad():
                p -= 0.3 * p.grad * world
                whole.get_parameter(name).sub_(0.3 * truth[name].sum(0))
            p.grad = None


def case_accumulation(rank: int, world: int) -> None:
    accumulate(rank, world)


def accumulate(rank: int, world: int, **options: Any) -> None:
    """Micro-batches, with gradients reduced in the last one alone or in all."""
    batches = [data(world, lambda rank: 2), data(world, lambda rank: 3), data(world, lambda rank: 2)]
    model = model_of(Deep)
    order = torch.cat([torch.cat([batch[k] for batch in batches]) for k in range(world)])
    truth = per_example_gradients(square_losses(model(order)), model, trainable(model))
    blocks = torch.block_diag(*(torch.ones(n, n) for _ in range(world) for n in (2, 3, 2))).bool()
    model = shard(model, **options)
    assert isinstance(model, FSDPModule)
    probe = zerosum.Probe(model, gram=True)
    for synced in (False, True):
        model.zero_grad()
        with probe:
            for k, batch in enumerate(batches):
                model.set_requires_gradient_sync(synced or k == 2)
                square_losses(model(batch[rank])).sum().backward()
        assert_truth(Whole(probe.report()), truth, gram=blocks)
        for name, p in model.named_parameters():
            assert error(p.grad.full_tensor() * world, truth[name].sum(0)) < 1e-9


def case_scales(rank: int, world: int) -> None:
    """Means over other numbers of examples."""
    batches, model = data(world), model_of(Deep)
    sizes = torch.cat([torch.full((len(batch),), float(len(batch)), dtype=torch.float64) for batch in batches])
    factors = len(sizes) / world / sizes
    truth = per_example_gradients(square_losses(model(torch.cat(batches))) * factors, model, trainable(model))
    model = shard(model)
    probe = zerosum.Probe(model)
    for _ in range(PASSES):
        with probe:
            (7 * square_losses(model(batches[rank])).mean()).backward()
        assert_truth(Whole(probe.report()), truth, gram=False)
    explicit = zerosum.Probe(model, loss_reduction="mean")
    with pytest.raises(ValueError, match="needs the same number of examples on all ranks"), explicit:
        square_losses(model(batches[rank])).mean().backward()


def case_explicit_scale(rank: int, world: int) -> None:
    batches, model = data(world, lambda rank: 3), model_of(Deep)
    truth = per_example_gradients(square_losses(model(torch.cat(batches))), model, trainable(model))
    model = shard(model)
    probe = zerosum.Probe(model, loss_reduction="mean")
    for _ in range(2):
        with probe:
            for _ in range(2):
                square_losses(model(batches[rank])).mean().backward()
        both = {name: torch.cat([part.repeat(2, *[1] * (g.ndim - 1)) for part in g.chunk(world)]) for name, g in truth.items()}
        assert_truth(Whole(probe.report()), both, gram=False)


def case_a_structure_that_one_rank_meets(rank: int, world: int) -> None:
    """One rank proves a step that the others know."""
    model = model_of(Deep)
    lengths = [T if rank == 0 else T - 1, T, T]
    whole = copy.deepcopy(model)
    model = shard(model)
    probe = zerosum.Probe(model)
    for length in lengths:
        batches = [batch[:, : length if k == rank else T] for k, batch in enumerate(data(world, lambda rank: 9))]
        with probe:
            square_losses(model(batches[rank])).sum().backward()
        everyone = [None] * world
        dist.all_gather_object(everyone, batches[rank])
        parts = [per_example_gradients(square_losses(whole(batch)), whole, trainable(whole)) for batch in everyone]
        truth = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        assert_truth(Whole(probe.report()), truth, gram=False)
    assert probe.report().proof.extra == 0


def refusing(model: nn.Module, tokens: Tensor) -> zerosum.Report:
    """Of one step, in which the probe warns."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with (probe := zerosum.Probe(model)):
            square_losses(model(tokens)).sum().backward()
    return probe.report()


def case_refused_on_one_rank(rank: int, world: int) -> None:
    batches, model = data(world, lambda rank: 3), model_of(models.TwoLayers)
    model.mixes = rank == 1
    model.forward = partial(_mixing, model)
    model = fully_shard(model)
    report = refusing(model, batches[rank])
    assert list(report) == ["head.weight"]
    assert report.coverage.not_covered["first.weight"].startswith("not covered on rank 1: ")
    assert report.num_examples == 3 * world


def _mixing(model: Any, tokens: Tensor) -> Tensor:
    x = model.first(model.embedding(tokens))
    return model.head(torch.tanh(x.roll(1, 0) * x if model.mixes else x))


def case_metrics(rank: int, world: int) -> None:
    """All metrics are those of one process with the whole batch."""
    batches, model = data(world), model_of(Deep)
    direction = direction_for(model)
    with (one := zerosum.Probe(model, direction=direction)):
        square_losses(model(torch.cat(batches))).sum().backward()
    expected = one.report()
    model = shard(model)
    with (probe := zerosum.Probe(model, direction=direction)):
        square_losses(model(batches[rank])).sum().backward()
    found = probe.report()
    assert found.metrics.keys() == expected.metrics.keys()
    for of in ("", *found):
        mine, theirs = (report[of].metrics if of else report.metrics for report in (found, expected))
        for key, metric in theirs.items():
            assert [x is None for x in mine[key]] == [x is None for x in metric], key
            for a, b in zip(mine[key], metric, strict=True):
                assert a is None or a == pytest.approx(b, rel=1e-7), (of, key)
    assert found.coverage.share == 1
    assert found.scope == expected.scope


def case_mixed_precision(rank: int, world: int) -> None:
    """Parameters that are gathered in bfloat16: the sums are float32, of what the step computes in bfloat16."""
    batches = data(world)
    torch.manual_seed(2)
    model = models.varied(Deep())
    whole = copy.deepcopy(model).bfloat16()
    model = shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    probe, one = zerosum.Probe(model), zerosum.Probe(whole)
    for _ in range(PASSES):
        model.zero_grad()
        with probe:
            square_losses(model(batches[rank])).sum().backward()
        report = probe.report()
        parts = []
        for batch in batches:
            with one:
                square_losses(whole(batch)).sum().backward()
            parts.append(one.report())
        for name, p in model.named_parameters():
            assert report[name].abs_sum.dtype == torch.float32
            # The same kernels have seen the same numbers; the ranks' sums are added in float32.
            for field in ("abs_sum", "sq_sum"):
                found, expected = (
                    x.float() for x in (getattr(report[name], field).full_tensor(), sum(getattr(r[name], field) for r in parts))
                )
                assert error(found, expected) < 1e-5, (name, field)
            assert error(report[name].sq_norm, torch.cat([r[name].sq_norm for r in parts])) < 1e-5
            assert error(p.grad.full_tensor() * world, report[name].grad_sum.full_tensor()) < 2**-7
            whole.zero_grad()


def case_offload(rank: int, world: int) -> None:
    """Shards that stay on the CPU. (Here all does.)"""
    check(rank, world, offload_policy=CPUOffloadPolicy(pin_memory=False))


def case_skipped_blocks(rank: int, world: int) -> None:
    """In blocks that are not measured nothing is reduced twice, and FSDP is left as it was."""
    batches, model = data(world), shard(model_of(Deep))
    probe = zerosum.Probe(model, every=2)
    for k in range(4):
        with probe:
            square_losses(model(batches[rank])).sum().backward()
        assert probe.report().num_examples == sum(map(len, batches)), k
    for module in model.modules():
        if isinstance(module, FSDPModule):
            assert all("post_backward" not in vars(group) for group in module._get_fsdp_state()._fsdp_param_groups)
    assert not any(p._backward_hooks for p in model.parameters())


def case_memory(rank: int, world: int) -> None:
    """After the block no gathered parameter and no sum of one's size is held."""
    model = shard(model_of(Deep))
    probe = zerosum.Probe(model)
    batches = data(world)
    for _ in range(PASSES):
        with probe:
            square_losses(model(batches[rank])).sum().backward()
    for module in model.modules():
        if isinstance(module, FSDPModule):
            for group in module._get_fsdp_state()._fsdp_param_groups:
                for p in group.fsdp_params:
                    assert all(x.untyped_storage().size() == 0 for x in p.all_gather_outputs)
    report = probe.report()
    for name in report:
        mine = report[name].abs_sum.to_local()
        assert mine.untyped_storage().nbytes() <= 3 * max(mine.numel(), 1) * mine.element_size()


def case_bytes(rank: int, world: int) -> None:
    """Each backward pass sends three float32 numbers for each coordinate (here of even shards) by reduce_scatter."""
    model = shard(models.varied(Even()))
    probe, sent, plain = zerosum.Probe(model), [], fsdp._reduce_scatter

    def reduce_scatter(part: Tensor, whole: Tensor, **options: Any) -> Any:
        sent.append(whole.nbytes)
        return plain(part, whole, **options)

    fsdp._reduce_scatter = reduce_scatter
    try:
        with probe:
            for _ in range(2):
                square_losses(model(data(world)[rank])).sum().backward()
    finally:
        fsdp._reduce_scatter = plain
    assert sum(sent) == 2 * 12 * sum(p.numel() for p in model.parameters())


class Even(Deep):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(12, models.WIDTH), nn.Linear(12, 4)


def case_without_proof(rank: int, world: int) -> None:
    """With verify="never" nothing is gathered beside FSDP's own, and the numbers are the same."""
    batches, model = data(world), model_of(Deep)
    truth = per_example_gradients(square_losses(model(torch.cat(batches))), model, trainable(model))
    model = shard(model)
    probe = zerosum.Probe(model, verify="never", loss_reduction="sum")
    for _ in range(PASSES):
        with probe:
            square_losses(model(batches[rank])).sum().backward()
        assert_truth(Whole(probe.report()), truth, gram=False)
        assert probe.report().proof.extra == 0


def case_hidden_uses(rank: int, world: int) -> None:
    """A weight that a custom function uses is not covered, since the whole loss is not differentiated again for each example."""
    model = models.CustomFunction().double()
    names = trainable(model)
    model = fully_shard(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with (probe := zerosum.Probe(model)):
            square_losses(model(data(world)[rank])).sum().backward()
    report = probe.report()
    assert report.coverage.not_covered
    assert any("does not differentiate the whole loss again" in why for why in report.coverage.not_covered.values())
    assert {*report, *report.coverage.not_covered} == set(names)
    assert len(report) > 0


def case_refusals(rank: int, world: int) -> None:
    batches = data(world)
    model = model_of(Deep)
    with pytest.raises(NotImplementedError, match=r"'0.weight' is not sharded, but other parameters are: call fully_shard"):
        zerosum.Probe(nn.Sequential(model.first, fully_shard(model.middle)).double())
    flat = FullyShardedDataParallel(model_of(Deep), device_id=torch.device("cpu"))
    with pytest.raises(NotImplementedError, match=r"FSDP1.*fully_shard \(FSDP2\)"):
        zerosum.Probe(flat)
    model = fully_shard(model_of(Deep))
    with (probe := zerosum.Probe(model)):
        square_losses(model(batches[rank])).sum().backward()
    with pytest.raises(ValueError, match=r"process_group: expected None for a model with sharded parameters"):
        zerosum.Probe(model, process_group=dist.group.WORLD)
    with pytest.raises(NotImplementedError, match=r"DTensor, .* zerosum\.capture needs whole parameters"):
        probe.check_repeatable()
    report = probe.report()
    for call in (report.all_reduce, lambda: zerosum.merge([report]), lambda: pickle.dumps(report)):
        with pytest.raises(NotImplementedError, match="the report's sums are shards"):
            call()
    with pytest.raises(NotImplementedError, match=r"'embedding\.weight' is a DTensor, .* token_report"):
        zerosum.token_report(model, batches[rank], batches[rank])
    with (again := zerosum.Probe(model)):
        x = model(batches[rank])
        zerosum.auxiliary(term := 1e-3 * x.mean())
        with pytest.raises(NotImplementedError, match=r"zerosum\.auxiliary"):
            (square_losses(x).sum() + term).backward()
    assert not again.report()


def case_reentrant_checkpoint(rank: int, world: int) -> None:
    """Whose weights' gradients come in a backward pass of its own."""

    batches, model = data(world, lambda rank: 3), model_of(Reentrant)
    model = fully_shard(model)
    report = refusing(model, batches[rank])
    assert "with fully_shard, use checkpoint(..., use_reentrant=False)" in report.coverage.not_covered["middle.weight"]
    assert "head.weight" in report
