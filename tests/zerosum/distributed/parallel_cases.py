"""Tensor-parallel models, held to one process with whole parameters."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module

import zerosum
from tests.zerosum import models
from tests.zerosum.distributed.ddp_cases import data, within
from tests.zerosum.distributed.fsdp_cases import Whole
from tests.zerosum.oracle import PASSES, assert_truth, direction_for, error, per_example_gradients, trainable
from tests.zerosum.steps import square_losses
from zerosum.probe.capture import Capture


class Block(nn.Module):
    def __init__(self, norm: type[nn.Module], bias: bool) -> None:
        super().__init__()
        self.norm = norm(8)
        self.up = nn.Linear(8, 12, bias=bias)
        self.down = nn.Linear(12, 8, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Transformer(nn.Module):
    """Without attention, which has no weights but its products'. 13 tokens are not divided by the number of ranks."""

    def __init__(self, norm: type[nn.Module] = nn.LayerNorm, bias: bool = True) -> None:
        super().__init__()
        self.tokens = nn.Embedding(13, 8, padding_idx=3)
        self.layers = nn.ModuleList([Block(norm, bias) for _ in range(2)])
        self.norm = norm(8)
        self.head = nn.Linear(8, 5, bias=bias)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


PLAIN = {"tokens": RowwiseParallel(input_layouts=Replicate()), "head": ColwiseParallel(output_layouts=Replicate())}
PLAIN_LAYER = {"up": ColwiseParallel(), "down": RowwiseParallel()}


def parallelize(
    model: Transformer, mesh: DeviceMesh, own: Mapping[str, Any] = PLAIN, of_layer: Mapping[str, Any] = PLAIN_LAYER
) -> None:
    parallelize_module(model, mesh, dict(own))
    for layer in model.layers:
        parallelize_module(layer, mesh, dict(of_layer))


def sequence_parallel(model: Transformer, mesh: DeviceMesh) -> None:
    """As torchtitan divides a transformer."""
    own = {
        "tokens": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "norm": SequenceParallel(),
        "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }
    layer = {
        "norm": SequenceParallel(),
        "up": ColwiseParallel(input_layouts=Shard(1)),
        "down": RowwiseParallel(output_layouts=Shard(1)),
    }
    parallelize(model, mesh, own, layer)


def check(
    model: nn.Module,
    divide: Any,
    batches: list[Tensor],
    mine: int,
    *,
    sharded: Any = lambda model: model,
    refused: tuple[str, ...] = (),
    gram: bool = True,
) -> zerosum.Report:
    """Steps with the ``mine``-th batch."""
    model = models.varied(model.double())
    whole = copy.deepcopy(model)
    everything = torch.cat(batches)
    truth = per_example_gradients(square_losses(whole(everything)), whole, trainable(whole))
    torch.manual_seed(3)
    direction = direction_for(model)
    plain = copy.deepcopy(model)
    for one in (plain, model):
        divide(one)
        sharded(one)
    probe = zerosum.Probe(model, direction=direction, gram=gram)
    truth = {name: g for name, g in truth.items() if not name.startswith(refused or ("-",))}
    for _ in range(PASSES):
        for one in (plain, model):
            one.zero_grad()
        square_losses(plain(batches[mine])).sum().backward()
        with probe:
            square_losses(model(batches[mine])).sum().backward()
        report = probe.report()
        assert report.num_examples == len(everything)
        assert_truth(Whole(report), truth, direction, gram=within(batches) if gram else False)
        for name, p in model.named_parameters():
            found, expected = (x.full_tensor() if isinstance(x, DTensor) else x for x in (p.grad, plain.get_parameter(name).grad))
            assert error(found, expected) < 1e-12, f"{name}: .grad"
            if name in report and isinstance(p, DTensor):
                assert report[name].sq_sum.placements == p.placements
    return report


def case_columns_and_rows(rank: int, world: int) -> None:
    mesh = init_device_mesh("cpu", (world,))
    report = check(Transformer(), lambda model: parallelize(model, mesh), data(1), 0)
    assert report.coverage.share == 1


def case_embedding_by_columns(rank: int, world: int) -> None:
    mesh = init_device_mesh("cpu", (world,))
    own = {**PLAIN, "tokens": ColwiseParallel(output_layouts=Replicate())}
    check(Transformer(), lambda model: parallelize(model, mesh, own), data(1), 0)


def case_without_biases(rank: int, world: int) -> None:
    mesh = init_device_mesh("cpu", (world,))
    check(Transformer(nn.RMSNorm, False), lambda model: parallelize(model, mesh), data(1), 0)


def case_sequence_parallel(rank: int, world: int) -> None:
    mesh = init_device_mesh("cpu", (world,))
    tokens = [torch.randint(0, 13, (3, 6), generator=torch.Generator().manual_seed(1))]
    for norm, bias in ((nn.LayerNorm, True), (nn.RMSNorm, False)):
        report = check(Transformer(norm, bias), lambda model: sequence_parallel(model, mesh), tokens, 0)
        assert report.coverage.share == 1
    # Six positions are a number of examples, too.
    check(Transformer(), lambda model: sequence_parallel(model, mesh), [tokens[0].repeat(2, 1)], 0)


def case_metrics(rank: int, world: int) -> None:
    """All metrics are those of one process; parameters that are whole on each rank count once."""
    model = Transformer().double()
    direction, whole = direction_for(model), copy.deepcopy(model)
    (tokens,) = data(1, lambda rank: 4)
    tokens = tokens[:, :4]
    with (one := zerosum.Probe(whole, direction=direction, gram=True)):
        square_losses(whole(tokens)).sum().backward()
    expected = one.report()
    sequence_parallel(model, init_device_mesh("cpu", (world,)))
    with (probe := zerosum.Probe(model, direction=direction, gram=True)):
        square_losses(model(tokens)).sum().backward()
    found = probe.report()
    assert found.metrics.keys() == expected.metrics.keys()
    for of in ("", *found):
        mine, theirs = (report[of].metrics if of else report.metrics for report in (found, expected))
        for key, metric in theirs.items():
            for a, b in zip(mine[key], metric, strict=True):
                assert a is b is None or a == pytest.approx(b, rel=1e-7), (of, key)


class Scale(nn.Module):
    """A norm as transformers writes it."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def case_norm_by_parts(rank: int, world: int) -> None:
    mesh = init_device_mesh("cpu", (world,))
    tokens = [torch.randint(0, 13, (3, 6), generator=torch.Generator().manual_seed(1))]
    check(Transformer(Scale, False), lambda model: sequence_parallel(model, mesh), tokens, 0)


def case_coupled_in_part(rank: int, world: int) -> None:
    """Examples meet in the first rank's part of a layer alone: all ranks find it out together, by the same backward passes."""
    mesh = init_device_mesh("cpu", (world,))
    model = Transformer()
    model.layers[1].down = MeetingInHalf(12, 8)
    refused = ("tokens", "layers.0", "layers.1.norm", "layers.1.up")
    seen: list[tuple[str, float]] = []

    def sign(capture: Capture, site: Any, rows: Tensor) -> None:
        seen.append((site.label, rows.square().sum().item()))
        plain(capture, site, rows)

    plain, Capture.sign = Capture.sign, sign  # type: ignore[method-assign]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            check(model, lambda model: parallelize(model, mesh), data(1, lambda rank: 4), 0, refused=refused)
    finally:
        Capture.sign = plain  # type: ignore[method-assign]
    everyone: list[Any] = [None] * world
    dist.all_gather_object(everyone, seen)
    assert all(other == seen for other in everyone)
    assert len(seen) > 20


class MeetingInHalf(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(self.weight, DTensor):
            return super().forward(torch.where(torch.arange(12) < 6, x * x.roll(1, 0), x))
        mine = x.to_local()
        if self.weight.device_mesh.get_local_rank() == 0:
            mine = mine * mine.roll(1, 0)
        return super().forward(DTensor.from_local(mine, x.device_mesh, x.placements, run_check=False))


def case_coupled(rank: int, world: int) -> None:
    """Examples that meet are found out on all ranks alike."""

    class Meeting(Transformer):
        def forward(self, tokens: Tensor) -> Tensor:
            x = self.tokens(tokens)
            x = self.layers[0](x)
            return self.head(self.norm(self.layers[1](x * x.roll(1, 0))))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mesh = init_device_mesh("cpu", (world,))
        check(Meeting(), lambda model: parallelize(model, mesh), data(1, lambda rank: 4), 0, refused=("tokens", "layers.0"))


def case_unknown_operations(rank: int, world: int) -> None:
    """An operation on DTensors that no rule covers refuses its weight, and the step goes on."""

    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, 2 * self.weight, self.bias)

    model = Transformer()
    model.layers[0].up = Scaled(8, 12)
    report = check_refused(model, world)
    assert report.coverage.not_covered == {
        "layers.0.up.weight": "not covered on rank 0: used by mul, a function of parameters that are DTensors"
    }


def check_refused(model: nn.Module, world: int) -> zerosum.Report:
    mesh = init_device_mesh("cpu", (world,))
    return check(model, lambda model: parallelize(model, mesh), data(1), 0, refused=("layers.0.up.weight",))


def case_loss_of_dtensors(rank: int, world: int) -> None:
    """A loss that is a DTensor is refused before anything is computed."""
    mesh = init_device_mesh("cpu", (world,))
    model = Transformer().double()
    own = {**PLAIN, "head": ColwiseParallel(use_local_output=False)}
    parallelize(model, mesh, own)
    with pytest.raises(NotImplementedError, match="a loss that is a DTensor"), zerosum.Probe(model):
        model(data(1)[0]).square().sum().backward()
