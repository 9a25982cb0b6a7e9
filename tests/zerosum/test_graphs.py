"""Steps that are recorded and replayed, on a recorder that stands for a CUDA graph (tests/recording.py)."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import zerosum
from tests import recording
from zerosum import graphs
from zerosum.probe import capture as probe_capture
from zerosum.probe import contributions
from zerosum.probe.parameters import UNSEEN, ParameterProbe
from zerosum.training.model import GPT, GPTConfig, token_losses
from zsl_kernels import call_cache
from zsl_kernels.backends import dispatch
from zsl_kernels.backends.chunked import embedding

N, T, V = 8, 6, 11


@pytest.fixture(autouse=True)
def without_a_device(monkeypatch):
    """What a probe does on a device, on the CPU: uses of weights run in Python, sizes follow from shapes, and the operations are
    PyTorch's, which the recorder sees."""
    call_cache.forget()
    monkeypatch.setattr(probe_capture, "KNOWN", {})
    monkeypatch.setattr(contributions, "most_rows", lambda lookup: min(lookup.num_rows, lookup.rows.numel()))
    monkeypatch.setattr(ParameterProbe, "may_read", lambda self, x: False)
    impls_for, pairs_of = dispatch.impls_for, embedding.pairs_of
    monkeypatch.setattr(embedding, "pairs_of", lambda *arguments: pairs_of(*arguments[:-1], exact=False))
    monkeypatch.setattr(dispatch, "impls_for", lambda device, _, *rest: impls_for(device, "chunked", *rest))
    yield
    call_cache.forget()


class Observed(TorchDispatchMode):
    """In which ops go the way that they go where they are recorded."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.fixture
def made(monkeypatch):
    """The recorders that were made."""
    found = []

    def make(device, pool):
        found.append(recording.Recorder(device, pool))
        return found[-1]

    monkeypatch.setitem(graphs.RECORDERS, "cpu", make)
    return found


def gpt(**options):
    torch.manual_seed(0)
    return GPT(GPTConfig(vocab=V, width=16, layers=2, heads=2, positions=T, **options))


def batch(seed, n=N):
    return torch.randint(V, (2, n, T), generator=torch.Generator().manual_seed(seed))


def same_bits(found, expected):
    assert found.num_examples == expected.num_examples
    assert list(found) == list(expected)
    assert found.coverage == expected.coverage
    for name in found:
        for field in ("grad_sum", "abs_sum", "sq_sum", "l1", "sq_norm", "dot", "abs_dot", "gram"):
            mine, its = getattr(found[name], field), getattr(expected[name], field)
            assert (mine is None) == (its is None), (name, field)
            assert mine is None or torch.equal(mine, its), (name, field)
        assert found[name].coordinates == expected[name].coordinates
    assert found.metrics.keys() == expected.metrics.keys()
    for name, metric in found.metrics.items():
        assert metric.value == pytest.approx(expected.metrics[name].value, rel=0, abs=0, nan_ok=True), name


def plain(losses):
    losses.sum().backward()


def mean(losses):
    losses.mean().backward()


SCALER = torch.amp.GradScaler("cpu", init_scale=2.0**7)


def scaled(losses):
    SCALER.scale(losses.mean()).backward()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("end", [plain, mean, scaled])
@pytest.mark.parametrize("options", [{}, {"gram": True}, {"direction": True, "gram": True}], ids=str)
def test_a_replay_is_the_step_itself_to_the_bit(options, end, autocast, made):
    model, (x, y) = gpt(), batch(0)
    if options.get("direction"):
        options = {**options, "direction": {name: torch.randn_like(p) for name, p in model.named_parameters()}}

    def step(x=x, y=y):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            losses = token_losses(model, x, y).mean(1)
        end(losses)
        return losses

    captured = zerosum.capture(step, zerosum.Probe(model, **options))
    eager = zerosum.Probe(model, **options)
    for seed in (1, 2):
        if end is scaled:
            SCALER.update(2.0 ** (6 + seed))  # what is read off the loss is another number in each replay
        tokens = batch(seed)
        x.copy_(tokens[0])
        y.copy_(tokens[1])
        losses, gradients = captured.replay(), {name: p.grad.clone() for name, p in model.named_parameters()}
        report = captured.report()
        assert not report.coverage.not_covered
        for _ in range(2):  # once to be proved
            model.zero_grad()
            with Observed(), eager:
                expected = step(*tokens.clone())
        assert torch.equal(losses, expected)
        for name, p in model.named_parameters():
            assert torch.equal(gradients[name], p.grad), name
        same_bits(report, eager.report())


@pytest.mark.parametrize("n", [1, 2, T, V])
def test_few_examples_are_proved_before_they_are_recorded(n, made):
    """And as many as there are positions, or rows of the table."""
    model, (x, y) = gpt(), batch(0, n)

    def step(x=x, y=y):
        token_losses(model, x, y).mean(1).mean().backward()

    captured, eager = zerosum.capture(step, zerosum.Probe(model, gram=True)), zerosum.Probe(model, gram=True)
    tokens = batch(5, n)
    x.copy_(tokens[0])
    y.copy_(tokens[1])
    captured.replay()
    report = captured.report()
    for _ in range(graphs.MOST_WARM_UPS):
        model.zero_grad()
        with Observed(), eager:
            step(*tokens)
    same_bits(report, eager.report())


def test_micro_batches_are_one_step(made):
    model, (x, y) = gpt(), batch(0)

    def step(x=x, y=y):
        for part in range(2):
            (token_losses(model, x[part::2], y[part::2]).mean(1).sum() / N).backward()

    captured, eager = (zerosum.capture(step, zerosum.Probe(model)), zerosum.Probe(model))
    tokens = batch(3)
    x.copy_(tokens[0])
    y.copy_(tokens[1])
    captured.replay()
    report = captured.report()
    for _ in range(4):
        model.zero_grad()
        with Observed(), eager:
            step(*tokens)
    same_bits(report, eager.report())


def test_a_function_of_a_weight_is_recorded_and_a_part_that_is_not_seen_is_told_of_its_replay(made):
    torch.manual_seed(0)
    table, weight, hidden = torch.nn.Embedding(V, 12), torch.nn.Parameter(torch.randn(12, 12) / 4), torch.zeros(())
    model, (x, _) = torch.nn.Module(), batch(0)
    model.table, model.weight = table, weight
    weight.register_hook(lambda grad: grad * (1 + hidden))

    def step():
        torch.nn.functional.linear(table(x), 1 + weight).square().flatten(1).mean(1).sum().backward()

    captured = zerosum.capture(step, zerosum.Probe(model))
    captured.replay()
    report, eager = captured.report(), zerosum.Probe(model)
    for _ in range(graphs.STEADY):
        model.zero_grad()
        with Observed(), eager:
            step()
    same_bits(report, eager.report())
    assert list(report) == ["weight", "table.weight"]
    hidden.fill_(1)
    captured.replay()
    assert captured.report().coverage.not_covered == {"weight": UNSEEN}
    hidden.fill_(0)
    captured.replay()
    same_bits(captured.report(), eager.report())


def test_operations_that_are_recorded(made):
    """Nothing is read (the recorder refuses it), and a replay does not run the model's Python again."""
    model, (x, y) = gpt(), batch(0)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    captured = zerosum.capture(lambda: token_losses(model, x, y).mean(1).sum().backward(), zerosum.Probe(model))
    before = len(calls)
    captured.replay()
    assert len(calls) == before
    assert made[0].counts["bmm"] + made[0].counts["mm"] > 10


def test_zero_grad_between_replays_takes_no_gradient_away(made):
    model, (x, y) = gpt(), batch(0)
    captured = zerosum.capture(lambda: token_losses(model, x, y).mean(1).sum().backward(), zerosum.Probe(model))
    captured.replay()
    first = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    captured.replay()
    for name, p in model.named_parameters():
        assert torch.equal(p.grad, first[name])


def test_a_training_run_is_the_same(made):
    losses = []
    for recorded in (False, True):
        model, (x, y) = gpt(), batch(0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        probe = zerosum.Probe(model)

        def step(model=model, x=x, y=y):
            losses = token_losses(model, x, y).mean(1)
            losses.mean().backward()
            return losses

        captured = zerosum.capture(step, probe) if recorded else None
        mine = []
        for seed in range(4):
            for to, tokens in zip((x, y), batch(seed), strict=True):
                to.copy_(tokens)
            optimizer.zero_grad()
            if captured is None:
                with Observed(), probe:
                    found = step()
                report = probe.report()
            else:
                found, report = captured.replay(), captured.report()
            mine.append((found.mean().item(), report.metrics["D_grad"].value))
            optimizer.step()
        losses.append(mine)
    assert losses[0] == losses[1]


def test_a_report_is_of_its_replay(made):
    model, (x, y) = gpt(), batch(0)
    captured = zerosum.capture(lambda: token_losses(model, x, y).mean(1).sum().backward(), zerosum.Probe(model))
    with pytest.raises(RuntimeError, match="not replayed yet"):
        captured.report()
    captured.replay()
    report = captured.report()
    metrics = report.metrics
    name = next(name for name in report if not report[name].is_embedding)
    report[name].grad_sum.mul_(2)  # as clipping does, where .grad is the same memory
    with pytest.raises(RuntimeError, match="modified in place"):
        _ = report[name].grad_sum
    with pytest.raises(RuntimeError, match="modified in place"):
        _ = captured.report()[name].grad_sum
    assert torch.isfinite(report[name].abs_sum).all()
    captured.replay()
    assert report.metrics is metrics  # was read before
    for read in (lambda p: p.abs_sum, lambda p: p.l1, lambda p: p.coordinates, lambda p: p.grad_sum):
        with pytest.raises(RuntimeError, match="a later replay of the step has overwritten"):
            read(captured_of(report, name))
    _ = captured.report()[name].grad_sum


def captured_of(report, name):
    """The parameter's report without what it has read before."""
    mine = report[name]
    for field in ("l1", "coordinates"):
        mine.__dict__.pop(field, None)
    return mine


def test_a_step_that_waits_is_named(made):
    model, (x, y) = gpt(), batch(0)

    def step():
        losses = token_losses(model, x, y).mean(1)
        losses.sum().backward()
        return losses.mean().item()

    probe = zerosum.Probe(model)
    with pytest.raises(RuntimeError, match=r"cannot be recorded.*capturing"):
        zerosum.capture(step, probe)
    with probe:  # is none the worse for it
        token_losses(model, x, y).mean(1).sum().backward()
    assert not probe.report().coverage.not_covered


def test_bad_arguments_are_named(made):
    model, (x, y) = gpt(), batch(0)

    def step():
        token_losses(model, x, y).mean(1).sum().backward()

    def opens():
        with probe:
            step()

    probe = zerosum.Probe(model)
    with pytest.raises(TypeError, match="step: expected a function"):
        zerosum.capture(3, probe)
    with pytest.raises(TypeError, match=r"probe: expected a zerosum\.Probe"):
        zerosum.capture(step, model)
    with pytest.raises(ValueError, match="every=1, got every=3"):
        zerosum.capture(step, zerosum.Probe(model, every=3))
    with pytest.raises(ValueError, match="verify='once' or 'never', got verify='always'"):
        zerosum.capture(step, zerosum.Probe(model, verify="always"))
    with pytest.raises(ValueError, match="expected no grad_scaler"):
        zerosum.capture(step, zerosum.Probe(model, grad_scaler=SCALER))
    with pytest.warns(UserWarning, match="left the probe open"), pytest.raises(ValueError, match="does not open the probe"):
        zerosum.capture(opens, probe)
    with pytest.raises(ValueError, match="on one CUDA device, got meta"):
        zerosum.capture(step, zerosum.Probe(torch.nn.Linear(2, 2, device="meta")))
    captured = zerosum.capture(step, probe)
    captured.replay()
    probe.direction = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    with pytest.raises(RuntimeError, match="direction: the step was recorded with another"):
        captured.replay()


def test_on_the_cpu_there_is_nothing_to_record():
    with pytest.raises(ValueError, match="on one CUDA device, got cpu"):
        zerosum.capture(lambda: None, zerosum.Probe(torch.nn.Linear(2, 2)))


class Graphed(torch.autograd.Function):
    """As ``torch.cuda.make_graphed_callables`` has it: a product whose gradients are the same memory in every pass."""

    @staticmethod
    def forward(ctx, x, weight, static):
        ctx.save_for_backward(x, weight)
        ctx.static = static
        return x @ weight.T

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        torch.mm(grad.flatten(0, 1).T, x.flatten(0, 1), out=ctx.static)
        return grad @ weight, ctx.static.detach(), None


class WithGraphed(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.weight = torch.nn.Linear(5, 5), torch.nn.Parameter(torch.randn(4, 5))
        self.static = torch.empty(4, 5)

    def forward(self, x):
        return Graphed.apply(self.first(x).tanh(), self.weight, self.static)


def test_a_graphed_module_is_measured_by_the_loss_of_each_example():
    torch.manual_seed(0)
    model, x = WithGraphed(), torch.randn(8, 6, 5)
    probe = zerosum.Probe(model)
    for _ in range(2):
        model.zero_grad()
        with probe:
            (model(x) ** 3).sum((1, 2)).sum().backward()
    assert probe.report().coverage.covered["weight"] == "the loss, differentiated again for each example"
    each = [torch.autograd.grad((model(one[None]) ** 3).sum(), model.weight)[0].clone() for one in x]
    torch.testing.assert_close(probe.report()["weight"].abs_sum, torch.stack(each).abs().sum(0))
