"""Steps of DistributedDataParallel, held to one process with the whole batch."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import zerosum
from tests.zerosum import models
from tests.zerosum.oracle import PASSES, assert_truth, direction_for, error, per_example_gradients, trainable
from tests.zerosum.steps import square_losses
from zerosum.probe.capture import open_captures

T = 5


class Deep(models.TwoLayers):
    """With a norm and another layer between the two."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(12)
        self.middle = nn.Linear(12, 12)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.between(torch.tanh(self.first(self.embedding(tokens)))))

    def between(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.middle(self.norm(x)))


def data(world: int, per_rank: Callable[[int], int] = lambda rank: 2 + rank) -> list[Tensor]:
    """Each rank's tokens: other numbers of examples on each, unless said otherwise."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 11, (per_rank(rank), T), generator=generator) for rank in range(world)]


def model_of(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(2)
    return models.varied(kind().double())


def within(batches: list[Tensor]) -> Tensor:
    """Which inner products of examples are known: those of one rank."""
    return torch.block_diag(*(torch.ones(len(batch), len(batch)) for batch in batches)).bool()


def own(g: Tensor, batches: list[Tensor], rank: int) -> Tensor:
    """A rank's part of (N, …)."""
    return g.split([len(batch) for batch in batches])[rank]


def check(
    rank: int,
    world: int,
    kind: type[nn.Module] = models.TwoLayers,
    *,
    batches: list[Tensor] | None = None,
    inside: bool = False,
    wrapped: Callable[[nn.Module], nn.Module] = lambda model: model,
    passes: int = PASSES,
    **options: Any,
) -> zerosum.Report:
    """Steps of which rank r has the r-th batch. The probe is on the wrapper, or with ``inside`` on the module in it."""
    batches = data(world) if batches is None else batches
    model = model_of(kind)
    whole = copy.deepcopy(model)
    truth = per_example_gradients(square_losses(whole(torch.cat(batches))), whole, trainable(whole))
    torch.manual_seed(3)
    direction = direction_for(model)
    ddp = DistributedDataParallel(model, **options)
    prefix = "" if inside else "module."
    runs = wrapped(ddp)
    watched = model if inside else runs
    named = {name.removeprefix("_orig_mod.").removeprefix(prefix): name for name, _ in watched.named_parameters()}
    along = {named[n]: u for n, u in direction.items()}
    probe = zerosum.Probe(watched, direction=along, gram=True)
    for _ in range(passes):
        ddp.zero_grad()
        with probe:
            square_losses(runs(batches[rank])).sum().backward()
        mine = {name: own(g, batches, rank) for name, g in truth.items()}
        assert_truth(Renamed(probe.report(), named), mine, direction)
        report = probe.report().all_reduce(direction=along)
        assert report.num_examples == sum(map(len, batches))
        assert_truth(Renamed(report, named), truth, direction, gram=within(batches))
        for name, p in model.named_parameters():
            if p.grad is not None:
                assert error(p.grad * world, truth[name].sum(0)) < 1e-9, f"{name}: .grad"
    return report


class Renamed:
    """A report by other names."""

    def __init__(self, report: zerosum.Report, names: dict[str, str]) -> None:
        self._report, self._renamed = report, names
        back = {name: short for short, name in names.items()}
        c = report.coverage
        parts = ({back[name]: said for name, said in of.items()} for of in (c.covered, c.not_covered, c.sizes))
        self.coverage = zerosum.Coverage(*parts)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._report, name)

    def __getitem__(self, name: str) -> zerosum.ParameterReport:
        return self._report[self._renamed[name]]

    def __contains__(self, name: str) -> bool:
        return self._renamed[name] in self._report


def case_sum(rank: int, world: int) -> None:
    check(rank, world)


def case_without_python(rank: int, world: int) -> None:
    """The uses that run as nodes in C++ from the third block on, where neither a direction nor a Gram is asked for."""
    batches, model = data(world), model_of(Deep)
    truth = per_example_gradients(square_losses(model(torch.cat(batches))), model, trainable(model))
    for options in ({}, {"gradient_as_bucket_view": True}):
        ddp = DistributedDataParallel(model, **options)  # type: ignore[arg-type]
        probe = zerosum.Probe(ddp)
        for _ in range(PASSES):
            ddp.zero_grad()
            with probe:
                square_losses(ddp(batches[rank])).sum().backward()
            named = {name: f"module.{name}" for name in truth}
            assert_truth(Renamed(probe.report(), named), {name: own(g, batches, rank) for name, g in truth.items()}, gram=False)
            assert_truth(Renamed(probe.report().all_reduce(), named), truth, gram=False)


def case_bucket_views(rank: int, world: int) -> None:
    check(rank, world, gradient_as_bucket_view=True)


def case_static_graph(rank: int, world: int) -> None:
    check(rank, world, static_graph=True)


def case_module_inside(rank: int, world: int) -> None:
    check(rank, world, inside=True)


def case_tied(rank: int, world: int) -> None:
    check(rank, world, models.Tied, gradient_as_bucket_view=True)


def case_used_twice(rank: int, world: int) -> None:
    check(rank, world, models.UsedTwice)


def case_functions_of_weights(rank: int, world: int) -> None:
    check(rank, world, models.LoRAMerged)


class Alternating(Deep):
    """The tokens say which of two layers runs."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(12, 12)

    def forward(self, tokens: Tensor) -> Tensor:
        x = torch.tanh(self.first(self.embedding(tokens)))
        return self.head(self.between(x) if tokens[0, 0] == 0 else self.other(x))


def case_unused_parameters(rank: int, world: int) -> None:
    """Ranks that use other parameters: the others' examples have zeros there."""
    batches = data(world)
    for k, batch in enumerate(batches):
        batch[:, 0] = k  # (all examples of a rank take one way)
    torch.manual_seed(2)
    model = models.varied(Alternating().double())
    truth = [per_example_gradients(square_losses(model(batch)), model, trainable(model)) for batch in batches]
    whole = {name: torch.cat([part[name] for part in truth]) for name in truth[0]}
    ddp = DistributedDataParallel(model, find_unused_parameters=True)
    probe = zerosum.Probe(model, gram=True)
    for _ in range(PASSES):
        ddp.zero_grad()
        with probe:
            square_losses(ddp(batches[rank])).sum().backward()
        local, report = probe.report(), probe.report().all_reduce()
        assert ("other.weight" in local) == (rank > 0)
        assert not report.coverage.not_covered
        assert_truth(report, whole, gram=within(batches))
    assert report["other.weight"].how == "linear"


def case_unreached_on_all(rank: int, world: int) -> None:
    """A parameter that no rank's examples reach stays what it is."""
    report = check(rank, world, models.Unreached, find_unused_parameters=True)
    assert report.coverage.not_covered
    assert report.unreached == set(report.coverage.not_covered)


def case_scales(rank: int, world: int) -> None:
    """Each rank's mean divides by its own number of examples: an average example of all ranks weighs one."""
    batches = data(world)
    model = model_of(models.TwoLayers)
    sizes = torch.cat([torch.full((len(batch),), float(len(batch)), dtype=torch.float64) for batch in batches])
    factors = len(sizes) / world / sizes
    truth = per_example_gradients(square_losses(model(torch.cat(batches))) * factors, model, trainable(model))
    ddp = DistributedDataParallel(model)
    probe = zerosum.Probe(ddp.module)
    for _ in range(PASSES):
        ddp.zero_grad()
        with probe:
            (7 * square_losses(ddp(batches[rank])).mean()).backward()
        assert_truth(probe.report().all_reduce(), truth, gram=False)
    explicit = zerosum.Probe(ddp.module, loss_reduction="mean")
    with explicit:
        square_losses(ddp(batches[rank])).mean().backward()
    own = {name: g / factors.view(-1, *[1] * (g.ndim - 1)) for name, g in truth.items()}
    assert_truth(explicit.report().all_reduce(), own, gram=False)


def case_accumulation(rank: int, world: int) -> None:
    """Micro-batches, of which the last is averaged over the ranks, or all are; the gradients of an earlier block stay in .grad."""
    batches = [data(world, lambda rank: 2), data(world, lambda rank: 3), data(world, lambda rank: 2)]
    model = model_of(models.Tied)
    order = torch.cat([torch.cat([batch[k] for batch in batches]) for k in range(world)])
    truth = per_example_gradients(square_losses(model(order)), model, [n for n, _ in model.named_parameters()])
    blocks = torch.block_diag(*(torch.ones(n, n) for _ in range(world) for n in (2, 3, 2))).bool()
    for options in ({}, {"gradient_as_bucket_view": True}):
        ddp = DistributedDataParallel(model, **options)  # type: ignore[arg-type]
        probe = zerosum.Probe(ddp.module, gram=True)
        for synced in (False, True):
            ddp.zero_grad()
            for _ in range(2):
                with probe:
                    for k, batch in enumerate(batches):
                        with nullcontext() if synced or k == 2 else ddp.no_sync():
                            square_losses(ddp(batch[rank])).sum().backward()
                assert_truth(probe.report().all_reduce(), truth, gram=blocks)


def case_float32_metrics(rank: int, world: int) -> None:
    """All metrics are those of one process with the whole batch."""
    torch.manual_seed(2)
    model = models.varied(Deep())
    batches = data(world)
    direction = direction_for(model)
    with (one := zerosum.Probe(model, direction=direction)):
        square_losses(model(torch.cat(batches))).sum().backward()
    expected = one.report().metrics
    ddp = DistributedDataParallel(model)
    with (probe := zerosum.Probe(model, direction=direction)):
        square_losses(ddp(batches[rank])).sum().backward()
    found = probe.report().all_reduce(direction=direction).metrics
    assert found.keys() == expected.keys()
    for key, metric in expected.items():
        # Sums of a few hundred terms in float32; ratios of them and differences from one, of which none is below 0.01 here.
        assert [x is None for x in found[key]] == [x is None for x in metric], key
        for a, b in zip(found[key], metric, strict=True):
            assert a is None or a == pytest.approx(b, rel=1e-3), key
    local = probe.report().metrics["D_grad"]
    assert local.value != pytest.approx(found["D_grad"].value, rel=1e-3)
    assert local.n == len(batches[rank])
    d = probe.report()["head.weight"]  # whose local numbers do not come of the averaged .grad
    with (alone := zerosum.Probe(model)):
        square_losses(model(batches[rank])).sum().backward()
    torch.testing.assert_close(d.grad_sum, alone.report()["head.weight"].grad_sum)
    assert d.metrics["D_grad"].value == pytest.approx(alone.report()["head.weight"].metrics["D_grad"].value, rel=1e-4)


def case_one_rank_alone(rank: int, world: int) -> None:
    """Measuring on one rank calls no collective: others step as ever, with the same gradients."""
    for options in ({}, {"static_graph": True}, {"find_unused_parameters": True}):
        model = model_of(Deep)
        plain = DistributedDataParallel(copy.deepcopy(model), **options)  # type: ignore[arg-type]
        ddp = DistributedDataParallel(model, **options)  # type: ignore[arg-type]
        batches = data(world)
        probe = zerosum.Probe(model)
        for _ in range(PASSES):
            for one in (plain, ddp):
                one.zero_grad()
            square_losses(plain(batches[rank])).sum().backward()
            with probe if rank == 1 else nullcontext():
                square_losses(ddp(batches[rank])).sum().backward()
            for name, p in model.named_parameters():
                assert error(p.grad, plain.module.get_parameter(name).grad) < 1e-12, name
        if rank == 1:
            truth = per_example_gradients(square_losses(model(batches[1])), model, trainable(model))
            assert_truth(probe.report(), truth, gram=False)


def case_compiled(rank: int, world: int) -> None:
    """A compiled wrapper, and a wrapper of a compiled model, which stay compiled from the third block on."""
    compiled = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        def run(*given: Tensor) -> Any:
            compiled.append(bool(open_captures()))
            return graph(*given)

        return run

    check(rank, world, batches=data(world, lambda rank: 8), wrapped=partial(torch.compile, backend=backend), passes=5)
    assert compiled.count(True) >= 2, "no block ran compiled"


def case_clipping(rank: int, world: int) -> None:
    """What is done to .grad after the step is nothing to the report, which has its own sums."""
    batches, model = data(world), model_of(models.TwoLayers)
    ddp = DistributedDataParallel(model)
    with (probe := zerosum.Probe(model)):
        square_losses(ddp(batches[rank])).sum().backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    truth = per_example_gradients(square_losses(model(torch.cat(batches))), model, trainable(model))
    assert_truth(probe.report().all_reduce(), truth, gram=False)


def case_groups(rank: int, world: int) -> None:
    """A group of its own."""
    group = dist.new_group([0, 1])
    batches, model = data(world), model_of(models.TwoLayers)
    with (probe := zerosum.Probe(model)):
        square_losses(model(batches[rank])).sum().backward()
    truth = per_example_gradients(square_losses(model(torch.cat(batches))), model, trainable(model))
    assert_truth(probe.report().all_reduce(group), truth, gram=False)


def case_bytes(rank: int, world: int) -> None:
    """all_reduce sends three float32 numbers for each coordinate. A report of one rank's examples sends nothing."""
    model = models.varied(Deep())
    ddp = DistributedDataParallel(model)
    with (probe := zerosum.Probe(model)):
        square_losses(ddp(data(world)[rank])).sum().backward()
    with reduced_bytes() as sent:
        local = probe.report()
        assert local.metrics
        assert not sent
        local.all_reduce()
    assert sum(sent) == 12 * sum(p.numel() for p in model.parameters())


@contextmanager
def reduced_bytes() -> Iterator[list[int]]:
    """The sizes of what ``dist.all_reduce`` is called with."""
    sent: list[int] = []
    plain = dist.all_reduce

    def all_reduce(x: Tensor, *rest: Any, **options: Any) -> Any:
        sent.append(x.nbytes)
        return plain(x, *rest, **options)

    dist.all_reduce = all_reduce
    try:
        yield sent
    finally:
        dist.all_reduce = plain


def case_process_group(rank: int, world: int) -> None:
    """A probe that joins the ranks' reports by itself: the same as all_reduce, sent once, along the block's direction."""
    batches, model = data(world), models.varied(Deep())
    direction = direction_for(model)
    ddp = DistributedDataParallel(model)
    found = []
    for group in (None, dist.group.WORLD):
        probe = zerosum.Probe(model, direction=direction, gram=True, every=2, process_group=group)
        ddp.zero_grad()
        with probe:
            square_losses(ddp(batches[rank])).sum().backward()
        probe.direction = None  # of the blocks to come
        with reduced_bytes() as sent:
            report = probe.report()
            assert (not sent) == (group is None)
            report = report.all_reduce(direction=direction) if group is None else report
            with probe:  # is not measured
                square_losses(ddp(batches[rank])).sum().backward()
            assert group is None or probe.report() is report
        assert sum(sent) == 12 * sum(p.numel() for p in model.parameters())
        found.append(report)
    mine, expected = found[1], found[0]
    assert mine.num_examples == sum(map(len, batches))
    assert (mine.metrics, mine.coverage, mine.proof) == (expected.metrics, expected.coverage, expected.proof)
    for name in expected:
        for field in ("grad_sum", "abs_sum", "sq_sum", "l1", "sq_norm", "dot", "abs_dot"):
            assert torch.equal(getattr(mine[name], field), getattr(expected[name], field)), (name, field)
        assert all(map(torch.equal, mine[name].gram_blocks, expected[name].gram_blocks))
    with pytest.raises(TypeError, match=r"process_group: expected a torch\.distributed\.ProcessGroup or None, got str"):
        zerosum.Probe(model, process_group="world")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"expected no process_group; call captured\.report\(\)\.all_reduce"):
        probe.check_repeatable()


def case_refusals(rank: int, world: int) -> None:
    """Errors come on all ranks alike, with the rank at fault."""
    batches, model = data(world), model_of(models.TwoLayers)

    def report(**options: Any) -> zerosum.Report:
        model.zero_grad()
        with (probe := zerosum.Probe(model, **options)):
            square_losses(model(batches[rank])).sum().backward()
        return probe.report()

    def told(found: zerosum.Report, *messages: str, **arguments: Any) -> None:
        with pytest.raises((RuntimeError, ValueError), match=messages[rank]):
            found.all_reduce(**arguments)

    written = report()
    if rank == 1:
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    told(written, "rank 1 of the group has no report to add: grad_sum of", "grad_sum of 'first.weight' shares memory")
    direction = direction_for(model) if rank == 0 else None
    told(report(direction=direction), "got different ones on rank 1", "got different ones on rank 1", direction=direction)
    if rank == 1:
        model.head.requires_grad_(False)
    told(report(), "got different ones on rank 1", "got different ones on rank 0")


def case_refused_on_one_rank(rank: int, world: int) -> None:
    """A parameter that one rank does not cover is not covered, and the reason names the rank."""
    batches, model = data(world, lambda rank: 3), model_of(models.TwoLayers)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with (probe := zerosum.Probe(model)):
            x = model.first(model.embedding(batches[rank]))
            x = x.roll(1, 0) * x if rank == 1 else x
            square_losses(model.head(torch.tanh(x))).sum().backward()
    report = probe.report().all_reduce()
    assert list(report) == ["head.weight"]
    assert report.coverage.not_covered["first.weight"].startswith("not covered on rank 1: ")
    assert report.num_examples == 3 * world
