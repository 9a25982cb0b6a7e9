"""Uses that a probe knows from earlier passes: they run without Python, their results are the same bits, and what is not as before
is noticed."""

from __future__ import annotations

import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import zerosum
import zsl_kernels as zk
from tests.zerosum.oracle import PASSES, assert_truth, direction_for, gradients, per_example_gradients, trainable
from zerosum.probe import capture, proof, rules
from zerosum.probe.rules import linear, norm
from zsl_kernels.weight_uses import eager as uses

N, T, WIDTH = 8, 6, 12

pytestmark = pytest.mark.skipif(uses.Call is None, reason="the compiled kernels are not live")


class Conv1D(nn.Module):
    """A transposed weight, as GPT-2's."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) / inputs**0.5)
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)


class Block(nn.Module):
    """Every operation that is known without Python, with and without a bias, and with a frozen weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, 10)
        self.plain = nn.Linear(10, WIDTH, bias=False)
        self.transposed = Conv1D(WIDTH, 9)
        self.frozen = nn.Linear(9, WIDTH)
        self.frozen.weight.requires_grad_(False)
        self.norm = nn.LayerNorm(WIDTH)
        self.scale_alone = nn.LayerNorm(WIDTH, bias=False)
        self.last = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.scale_alone(self.norm(x + self.plain(F.gelu(self.first(x)))))
        return self.last(self.frozen(self.transposed(x)).tanh())


def setup(dtype: torch.dtype = torch.float64) -> tuple[Block, Tensor]:
    torch.manual_seed(0)
    return Block().to(dtype), torch.randn(N, T, WIDTH, dtype=dtype)


def losses_of(output: Tensor) -> Tensor:
    return output.square().flatten(1).mean(1)


def step(probe: zerosum.Probe, model: nn.Module, x: Tensor) -> zerosum.Report:
    model.zero_grad()
    with probe:
        losses_of(model(x)).sum().backward()
    return probe.report()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The backward passes of uses that went through Python."""
    seen: list[str] = []

    def counted(name: str, function: Callable[..., object]) -> Callable[..., object]:
        def run(*args: object) -> object:
            seen.append(name)
            return function(*args)

        return run

    monkeypatch.setattr(linear, "_backward", counted("linear", linear._backward))
    monkeypatch.setattr(norm, "_layer_norm_gradients", counted("norm", norm._layer_norm_gradients))
    return seen


def known_report() -> tuple[Block, Tensor, dict[str, Tensor], zerosum.Report]:
    """A model, its input, a direction, and the report of a pass of which every use is known."""
    model, x = setup()
    direction = direction_for(model)
    probe = zerosum.Probe(model, direction=direction)
    for _ in range(PASSES):
        report = step(probe, model, x)
    return model, x, direction, report


def test_sums_over_coordinates_of_known_uses() -> None:
    """They are computed before anybody reads the sums that they are of."""
    model, x, direction, report = known_report()
    truth = per_example_gradients(losses_of(model(x)), model, trainable(model))
    for name, g in truth.items():
        expected = zk.coordinate_sums(g.sum(0), g.abs().sum(0), g.square().sum(0), direction=direction[name])
        assert report[name].coordinates == pytest.approx(expected, rel=1e-9), name


def test_a_known_gradient_that_was_written_to_is_not_read() -> None:
    model, *_, report = known_report()
    for p in model.parameters():
        if p.grad is not None:
            p.grad.mul_(2)
    for name in report:
        with pytest.raises(RuntimeError, match="modified in place after the probe"):
            _ = report[name].grad_sum


@pytest.mark.parametrize("gram", [False, True])
def test_a_known_pass_runs_without_python(calls: list[str], gram: bool) -> None:
    model, x = setup()
    direction = direction_for(model)
    probe = zerosum.Probe(model, gram=gram, direction=direction)
    for _ in range(PASSES - 1):
        step(probe, model, x)
    assert calls
    calls.clear()
    for _ in range(2):
        x = torch.randn_like(x)
        report = step(probe, model, x)
        assert_truth(report, per_example_gradients(losses_of(model(x)), model, trainable(model)), direction, gram=gram, rtol=1e-12)
    assert not calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gram", [False, True])
def test_the_bits_are_those_of_the_python_functions(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, gram: bool) -> None:
    model, x = setup(dtype)
    direction = direction_for(model)
    found: list[dict[str, Tensor]] = []
    for known in (True, False):
        if not known:
            monkeypatch.setattr(uses, "Call", None)
        probe = zerosum.Probe(model, gram=gram, direction=direction)
        for _ in range(PASSES + 1):
            report = step(probe, model, x)
        fields = ("grad_sum", "abs_sum", "sq_sum", "l1", "sq_norm", "dot", "abs_dot", *(["gram"] if gram else []))
        found.append({f"{name}.{field}": getattr(report[name], field).clone() for name in report for field in fields})
        found[-1] |= {f"{name}.grad": g for name, g in gradients(model).items()}
    assert found[0].keys() == found[1].keys()
    assert [key for key in found[0] if not torch.equal(found[0][key], found[1][key])] == []


@pytest.mark.parametrize("lead", [(N, T), (N,), (N, 2, 3), (N * T,), (T, N)], ids=str)
def test_rows_of_any_shape(lead: tuple[int, ...]) -> None:
    model, _ = setup()
    probe = zerosum.Probe(model, gram=True, num_examples=N)

    def losses(output: Tensor) -> Tensor:
        each = output.square().mean(-1)
        return each.sum(0) if lead == (T, N) else each.view(N, -1).sum(1)

    for _ in range(PASSES + 1):
        x = torch.randn(*lead, WIDTH, dtype=torch.float64)
        model.zero_grad()
        with probe:
            losses(model(x)).sum().backward()
        assert_truth(probe.report(), per_example_gradients(losses(model(x)), model, trainable(model)), rtol=1e-11)


def test_a_gradient_of_other_strides() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, 5), nn.LayerNorm(5)).double()
    probe = zerosum.Probe(model, gram=True)
    for _ in range(PASSES + 1):
        x = torch.randn(N, T, WIDTH, dtype=torch.float64)
        model.zero_grad()
        with probe:
            losses = model(x).transpose(1, 2).square()[:, :, ::2].sum((1, 2))
            losses.sum().backward()
        truth = per_example_gradients(model(x).transpose(1, 2).square()[:, :, ::2].sum((1, 2)), model, trainable(model))
        assert_truth(probe.report(), truth, rtol=1e-11)


@pytest.mark.parametrize("passes", [1, 2, 3])
def test_micro_batches(calls: list[str], passes: int) -> None:
    model, x = setup()
    probe = zerosum.Probe(model, gram=True)
    present = torch.block_diag(*[torch.ones(N, N)] * passes).bool()
    for k in range(PASSES + 1):
        xs = [torch.randn_like(x) for _ in range(passes)]
        model.zero_grad()
        calls.clear()
        with probe:
            for part in xs:
                losses_of(model(part)).sum().backward()
        report = probe.report()
        truth = per_example_gradients(losses_of(model(torch.cat(xs))), model, trainable(model))
        assert_truth(report, truth, gram=present, rtol=1e-11)
        for name, g in gradients(model).items():
            torch.testing.assert_close(report[name].grad_sum, g, rtol=1e-12, atol=1e-15)
        assert bool(calls) == (k < PASSES - 1)


class Hidden(torch.autograd.Function):
    """A use of a weight that the probe cannot see: its apply is no torch function."""

    @staticmethod
    def forward(ctx: object, x: Tensor, weight: Tensor) -> Tensor:
        return x + weight.sum()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, grad.sum().expand(5, WIDTH)


@pytest.mark.parametrize("accumulate", [False, True])
def test_a_use_that_comes_later_and_is_not_seen_refuses_the_weight(accumulate: bool) -> None:
    model, x = setup()
    probe = zerosum.Probe(model)
    for k in range(PASSES + 2):
        hidden = k == PASSES
        if not accumulate:
            model.zero_grad()
        with probe:
            output = model(x)
            if hidden:
                output = Hidden.apply(output, model.last.weight)
            losses_of(output).sum().backward()
        report = probe.report()
        assert ("last.weight" in report) != hidden, report.coverage
        assert "last.bias" in report


def test_a_second_use_is_noticed() -> None:
    model, x = setup()
    probe = zerosum.Probe(model)
    for k in range(PASSES + 3):
        twice = k >= PASSES
        model.zero_grad()
        with probe:
            output = model(x)
            if twice:
                output = output + model.last(x)
            losses_of(output).sum().backward()
        output = model(x) + (model.last(x) if twice else 0)
        assert_truth(probe.report(), per_example_gradients(losses_of(output), model, trainable(model)), gram=False)


class InTwoPlaces(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.other, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor, way: str) -> Tensor:
        if way == "second":
            return self.last(self.other(x))
        return self.last(x) + (self.last(x.sin()) if way == "both" else 0)


def test_two_known_uses_of_one_weight() -> None:
    """Each of the two places has been the weight's only use before."""
    torch.manual_seed(0)
    model = InTwoPlaces().double()
    probe = zerosum.Probe(model, gram=True)
    for way in (*["second"] * PASSES, *["first"] * PASSES, *["both"] * PASSES):
        x = torch.randn(N, T, WIDTH, dtype=torch.float64, requires_grad=True)  # as the activation in the second place
        model.zero_grad()
        with probe:
            losses_of(model(x, way)).sum().backward()
        assert_truth(probe.report(), per_example_gradients(losses_of(model(x, way)), model, trainable(model)))


def test_a_graph_of_an_earlier_forward_pass() -> None:
    """As where a generator's output is taken by a discriminator twice, and differentiated once."""
    model, x = setup()
    probe = zerosum.Probe(model.last)
    for _ in range(PASSES + 1):
        model.zero_grad()
        with warnings.catch_warnings(), probe:
            warnings.simplefilter("ignore")
            early = losses_of(model(x))
            losses_of(model(x)).sum().backward()
            losses_of(model(x))
            early.sum().backward()  # the probe knows the uses of the last forward pass alone
        grads = gradients(model)
        report = probe.report()
        model.zero_grad()
        (2 * losses_of(model(x))).sum().backward()
        for name, g in gradients(model).items():
            torch.testing.assert_close(grads[name], g, rtol=1e-12, atol=0)
        truth = per_example_gradients(losses_of(model(x)), model, [f"last.{name}" for name in report])
        assert report.num_examples == N
        for name in report:
            torch.testing.assert_close(report[name].abs_sum, truth[f"last.{name}"].abs().sum(0), rtol=1e-12, atol=0)


def test_a_graph_of_an_earlier_block_is_no_part_of_this_one() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"early": nn.Linear(WIDTH, 5), "late": nn.Linear(WIDTH, 5)}).double()
    x = torch.randn(N, T, WIDTH, dtype=torch.float64)
    probe = zerosum.Probe(model)
    last = {}
    for name in ("early", "late"):
        for _ in range(PASSES):
            with probe:
                last[name] = losses_of(model[name](x))
                last[name].sum().backward(retain_graph=True)
    model.zero_grad()
    with probe:
        (losses_of(model["late"](x)) + last["early"]).sum().backward()
    report = probe.report()
    assert "early.weight" not in report
    assert "early.bias" not in report
    truth = per_example_gradients(losses_of(model["late"](x)), model, ["late.weight", "late.bias"])
    for name, g in truth.items():
        torch.testing.assert_close(report[name].abs_sum, g.abs().sum(0), rtol=1e-12, atol=0)


def test_a_graph_that_is_differentiated_after_the_block_and_during_a_later_one(calls: list[str]) -> None:
    model, x = setup()
    probe = zerosum.Probe(model)
    for _ in range(PASSES):
        step(probe, model, x)
    with probe:
        kept = losses_of(model(x))
        kept.sum().backward(retain_graph=True)
    model.zero_grad()
    kept.sum().backward(retain_graph=True)
    plain = gradients(model)
    model.zero_grad()
    losses_of(model(x)).sum().backward()
    for name, g in gradients(model).items():
        torch.testing.assert_close(plain[name], g, rtol=1e-12, atol=0)
    model.zero_grad()
    with probe:
        kept.sum().backward()
    for name, g in gradients(model).items():
        torch.testing.assert_close(plain[name], g, rtol=1e-12, atol=0)
    assert len(probe.report()) == 0


@pytest.mark.filterwarnings("ignore:Using backward:UserWarning")
def test_gradients_that_are_differentiated_again(calls: list[str]) -> None:
    model, x = setup()
    probe = zerosum.Probe(model, gram=True)
    for _ in range(PASSES):
        step(probe, model, x)
    calls.clear()
    model.zero_grad()
    with probe:
        losses_of(model(x)).sum().backward(create_graph=True)
    assert calls
    assert model.last.weight.grad is not None
    assert model.last.weight.grad.requires_grad
    assert_truth(probe.report(), per_example_gradients(losses_of(model(x)), model, trainable(model)))


def autocast_step(probe: zerosum.Probe | None, model: nn.Module, x: Tensor, layout: str) -> dict[str, Tensor]:
    """Losses and gradients, of rows of other strides too."""
    model.zero_grad()
    leaf = x.clone().requires_grad_()
    given = leaf.transpose(0, 1).contiguous().transpose(0, 1) if layout == "transposed" else leaf
    with nullcontext() if probe is None else probe, torch.autocast("cpu", dtype=torch.bfloat16):
        losses = losses_of(model(given).float())
        losses.sum().backward()
    assert leaf.grad is not None
    return {"losses": losses.detach(), "x": leaf.grad, **gradients(model)}


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_under_autocast(monkeypatch: pytest.MonkeyPatch, layout: str) -> None:
    """What the model computes is what it computes without a probe, to the bit. Statistics are those of the Python functions."""
    model, x = setup(torch.float32)
    model.norm = model.scale_alone = nn.Identity()  # type: ignore[assignment] # norms of the CPU go by their rule there
    direction = direction_for(model)
    plain = autocast_step(None, model, x, layout)
    found: list[dict[str, Tensor]] = []
    for known in (True, False):
        if not known:
            monkeypatch.setattr(uses, "Call", None)
        probe = zerosum.Probe(model, gram=True, direction=direction)
        for _ in range(PASSES + 1):
            got = autocast_step(probe, model, x, layout)
        assert torch.equal(got["losses"], plain["losses"])
        assert torch.equal(got["x"], plain["x"])
        report = probe.report()
        fields = ("grad_sum", "abs_sum", "sq_sum", "l1", "sq_norm", "dot", "abs_dot", "gram")
        found.append({f"{name}.{field}": getattr(report[name], field).clone() for name in report for field in fields} | got)
        shorts = [call.short for call in probe._structures.calls.values()]
        assert any(shorts) == known
    assert found[0].keys() == found[1].keys()
    assert [key for key in found[0] if not torch.equal(found[0][key], found[1][key])] == []


@pytest.mark.filterwarnings("ignore:Using backward:UserWarning")
def test_gradients_under_autocast_that_are_differentiated_again() -> None:
    """The gradient of the input is a product with the weight, of which a penalty has a derivative."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(WIDTH, 10), nn.Tanh(), nn.Linear(10, 5)), torch.randn(N, T, WIDTH)
    probe = zerosum.Probe(model)
    for _ in range(PASSES):
        autocast_step(probe, model, x, "contiguous")
    found = []
    for context in (nullcontext(), probe):
        model.zero_grad()
        leaf = x.clone().requires_grad_()
        with context, torch.autocast("cpu", dtype=torch.bfloat16):
            losses_of(model(leaf).float()).sum().backward(create_graph=True)
        assert leaf.grad is not None
        found.append(torch.autograd.grad(leaf.grad.square().sum(), list(model.parameters()), allow_unused=True))
    for got, want in zip(found[1], found[0], strict=True):
        assert (got is None) == (want is None)
        assert got is None or (got - want).norm() <= 2**-7 * want.norm()  # of bfloat16 products, once more rounded


class Operand(nn.Module):
    """A product of activations, later of a weight, or a view of one, of the same shape."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, 7)
        self.other = nn.Parameter(torch.randn(N, 7))
        self.last = nn.Linear(7, 5)

    def forward(self, x: Tensor, way: str) -> Tensor:
        h = self.first(x)
        operand = {"weight": self.other, "view": self.other.view(N, 7)}.get(way, h)
        return self.last(operand) * h.sum(1, keepdim=True) + self.other.sum() * h.mean()


@pytest.mark.parametrize("way", ["weight", "view"])
def test_an_activation_is_a_weight_later(way: str) -> None:
    torch.manual_seed(0)
    model = Operand().double()
    probe = zerosum.Probe(model, num_examples=N)
    for k in range(PASSES + 2):
        x, now = torch.randn(N, WIDTH, dtype=torch.float64), way if k >= PASSES else ""

        def losses() -> Tensor:
            return model(x, now).square().sum(1)  # noqa: B023

        model.zero_grad()
        with warnings.catch_warnings(), probe:
            warnings.simplefilter("ignore")
            losses().sum().backward()
        grads = gradients(model)
        truth = per_example_gradients(losses(), model, trainable(model))
        for name, g in truth.items():
            torch.testing.assert_close(grads[name], g.sum(0), rtol=1e-10, atol=1e-12)
        assert_truth(probe.report(), truth, gram=False, refusable=True)


def test_a_rule_that_is_registered_later_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RULES", "KNOWN"):
        for module in (rules, capture):
            monkeypatch.setattr(module, name, dict(getattr(rules, name)))
    capture.RULES, capture.KNOWN = rules.RULES, rules.KNOWN
    model, x = setup()
    probe, called = zerosum.Probe(model), []
    for k in range(PASSES + 3):
        if k == PASSES:

            @zerosum.rule(F.linear)
            def double(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
                called.append(1)
                y = x @ weight.mT
                return y if bias is None else y + bias

        report = step(probe, model, x)
        assert_truth(report, per_example_gradients(losses_of(model(x)), model, trainable(model)), gram=False)
        assert bool(called) == (k >= PASSES)


class Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))  # type: ignore[operator]


def test_a_mode_sees_the_operations() -> None:
    model, x = setup()
    probe = zerosum.Probe(model)
    for _ in range(PASSES):
        step(probe, model, x)
    with Count() as mode:
        report = step(probe, model, x)
    assert sum("zsl" in name and "interference" in name for name in mode.seen) >= 4
    assert_truth(report, per_example_gradients(losses_of(model(x)), model, trainable(model)), gram=False)


def test_another_instruction_set_and_number_of_threads(calls: list[str]) -> None:
    model, x = setup()
    probe = zerosum.Probe(model)
    truth = per_example_gradients(losses_of(model(x)), model, trainable(model))
    before, threads = zk.build_info()["cpu_isa"], torch.get_num_threads()
    try:
        last = None
        for isa in (*zk.build_info()["cpu_isas"], before):
            for count in (1, max(threads, 2)):
                torch.ops.zsl_cpu.use_isa(isa)
                torch.set_num_threads(count)
                calls.clear()
                assert_truth(step(probe, model, x), truth, gram=False)
                assert "linear" in calls or last == (isa, count)  # planned anew
                assert_truth(step(probe, model, x), truth, gram=False)
                calls.clear()
                assert_truth(step(probe, model, x), truth, gram=False)
                assert not calls
                last = isa, count
    finally:
        torch.ops.zsl_cpu.use_isa(before)
        torch.set_num_threads(threads)


def test_a_weight_that_is_replaced(calls: list[str]) -> None:
    model, x = setup()
    probe = zerosum.Probe(model)
    for k in range(PASSES + 4):
        if k == PASSES:
            model.last.weight.data = torch.randn(WIDTH, 5, dtype=torch.float64).mT  # of other strides
        if k == PASSES + 2:
            model.last.weight = nn.Parameter(torch.randn(5, WIDTH, dtype=torch.float64))
        assert_truth(step(probe, model, x), per_example_gradients(losses_of(model(x)), model, trainable(model)), gram=False)


def test_a_hook_that_is_registered_inside_and_removed_again() -> None:
    model, x = setup()
    probe, seen = zerosum.Probe(model), []
    for _ in range(PASSES + 1):
        model.zero_grad()
        with probe:
            handle = model.last.weight.register_hook(lambda g: seen.append(g.norm().item()))
            losses_of(model(x)).sum().backward()
            handle.remove()
        assert "last.weight" in probe.report()
        assert len(seen) == 1
        seen.clear()
        assert not model.last.weight._backward_hooks


def test_a_hook_that_changes_the_gradient_is_not_taken_for_the_gradient() -> None:
    model, x = setup()
    model.last.weight.register_hook(lambda g: g * 2)
    probe = zerosum.Probe(model)
    truth = per_example_gradients(losses_of(model(x)), model, trainable(model))
    for _ in range(PASSES + 1):
        report = step(probe, model, x)
        # (The probe's hook comes after: what came is not what the use has left.)
        assert "last.weight" not in report
        assert_truth(report, truth, gram=False, refusable=True)


def test_without_the_compiled_kernels(tmp_path: Path) -> None:
    shutil.copytree(Path(zk.__file__).parent, tmp_path / "zsl_kernels", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    script = """
import torch, zerosum
from tests.zerosum.test_known_uses import N, setup, step, losses_of
from tests.zerosum.oracle import assert_truth, per_example_gradients, trainable
from zsl_kernels.weight_uses import eager as uses
assert uses.Call is None
model, x = setup()
probe = zerosum.Probe(model, gram=True)
for _ in range(4):
    assert_truth(step(probe, model, x), per_example_gradients(losses_of(model(x)), model, trainable(model)))
"""
    root = Path(__file__).parents[2]
    path = f"{tmp_path}:{root / 'python'}:{root}"
    environment = {"PYTHONPATH": path, "PATH": ""}
    run = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_what_is_kept_of_a_structure_says_which_uses_are_regular() -> None:
    model, x = setup()
    probe = zerosum.Probe(model)
    for _ in range(2):
        step(probe, model, x)
    (stored,) = probe._structures.found.values()
    assert isinstance(stored, proof.Stored)
    assert stored.short == (N, bytes([1] * len(stored.layouts)))
