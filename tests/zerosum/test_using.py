"""What statistics are put to use for: clipping, updates without conflict, the batch size, and penalties on gradients."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import zerosum
import zsl_kernels as zk
from tests.zerosum.oracle import PASSES, assert_truth, gradients, per_example_gradients, trainable
from zerosum.metrics import gradient_metrics
from zerosum.training.model import GPT, GPTConfig, token_losses
from zsl_kernels import CoordinateSums

N, T, VOCAB = 5, 6, 11


@pytest.fixture(autouse=True)
def twice_differentiable() -> Iterator[None]:
    """The fused attention's derivative is not."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


class Step:
    """A GPT in float64 and a batch."""

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.model = GPT(GPTConfig(VOCAB, 8, 2, 2, T)).double()
        self.x, self.y = torch.randint(VOCAB, (2, N, T))

    def losses(self) -> Tensor:
        return token_losses(self.model, self.x, self.y).mean(1)

    def truth(self) -> dict[str, Tensor]:
        return per_example_gradients(self.losses(), self.model, trainable(self.model))

    def reweighted(self, probe: zerosum.Probe, weigh: Callable[[zerosum.Report], Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The weights, and what a second backward pass through the probed graph leaves in ``.grad``."""
        self.model.zero_grad()
        with probe:
            losses = self.losses()
            losses.mean().backward(retain_graph=True)
        weights = weigh(probe.report())
        self.model.zero_grad()
        (weights * losses).sum().backward()
        return weights, gradients(self.model)


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12 * float(value.abs().max()), msg=name)


def weighted(truth: dict[str, Tensor], weights: Tensor) -> dict[str, Tensor]:
    return {name: torch.tensordot(weights, g, 1) for name, g in truth.items()}


# Clipping.


def test_clipping_is_that_of_each_example_s_gradient() -> None:
    """In each pass of a probe: the first is proved, later ones go by what is known."""
    step = Step()
    truth = step.truth()
    norms = torch.cat([g.flatten(1) for g in truth.values()], 1).norm(dim=1)
    max_norm = float(norms.median())
    clipped = {name: torch.zeros_like(g[0]) for name, g in truth.items()}
    for i in range(N):
        for name, g in truth.items():
            clipped[name] += g[i] * min(1.0, max_norm / float(norms[i]))
    probe = zerosum.Probe(step.model)
    for _ in range(PASSES):
        weights, found = step.reweighted(probe, lambda report: zerosum.weights.clip(report, max_norm))
        assert int((weights == 1).sum()) == N // 2 + 1
        assert_close(found, clipped)


def test_clipping_is_over_all_micro_batches() -> None:
    step = Step()
    probe, kept = zerosum.Probe(step.model), []
    with probe:
        for rows in (slice(0, 3), slice(3, N)):
            losses = token_losses(step.model, step.x[rows], step.y[rows]).mean(1)
            (losses.sum() / N).backward(retain_graph=True)
            kept.append(losses)
    weights = zerosum.weights.clip(probe.report(), 1e-2)
    step.model.zero_grad()
    for w, losses in zip(weights.split([3, N - 3]), kept, strict=True):
        (w * losses).sum().backward()
    truth = step.truth()
    norms = torch.cat([g.flatten(1) for g in truth.values()], 1).norm(dim=1)
    assert float(norms.min()) > 1e-2
    assert_close(gradients(step.model), weighted(truth, 1e-2 / norms))


class Parts(nn.Module):
    """A second part that is used where it is asked for, and one that never is."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.never = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(3, 3)

    def forward(self, x: Tensor, mix: bool = False) -> Tensor:
        h = self.first(x)
        return self.second((h - h.mean(0)).relu() if mix else h.relu())


def probed(model: nn.Module, x: Tensor, **options: bool) -> zerosum.Report:
    probe = zerosum.Probe(model)
    with probe:
        model(x, **options).square().sum((1, 2)).sum().backward()
    return probe.report()


def test_norms_that_are_not_known_do_not_clip() -> None:
    torch.manual_seed(0)
    model, x = Parts().double(), torch.randn(4, 2, 3, dtype=torch.float64)
    assert zerosum.weights.clip(probed(model, x), 1e-3).shape == (4,)  # what no loss reaches has no gradient
    with pytest.warns(UserWarning, match="coupled before the loss"):
        report = probed(model, x, mix=True)
    with pytest.raises(ValueError, match=r"report: expected every .* not covered: first\.weight \(.*; first\.bias"):
        zerosum.weights.clip(report, 1.0)
    x[2] = torch.nan
    with pytest.raises(ValueError, match=r"report: expected finite gradients, .* first\.weight"):
        zerosum.weights.clip(probed(model, x), 1.0)
    with pytest.raises(ValueError, match="max_norm: expected a positive number, got 0"):
        zerosum.weights.clip(probed(model, x), 0)


def test_an_example_without_a_gradient_is_not_divided_by() -> None:
    model = nn.Linear(3, 2, bias=False).double()
    probe = zerosum.Probe(model)
    x = torch.ones(4, 1, 3, dtype=torch.float64)
    x[1] = 0
    with probe:
        model(x).sum((1, 2)).sum().backward()
    weights = zerosum.weights.clip(probe.report(), 1.0)
    torch.testing.assert_close(weights, torch.tensor([6**-0.5, 1, 6**-0.5, 6**-0.5], dtype=torch.float64), rtol=1e-14, atol=0)


# Conflicts.


def drawn(n: int, p: int, seed: int) -> Tensor:
    """Gradients of different sizes with something in common."""
    generator = torch.Generator().manual_seed(seed)
    g = torch.randn(n, p, generator=generator, dtype=torch.float64) + 0.1
    return g * torch.randn(n, 1, generator=generator, dtype=torch.float64).exp()


def rounding(gram: Tensor) -> float:
    """Of the Gram's eigenvalues and of products with it, N ε of its trace; as much again of the solution."""
    return 4 * len(gram) * torch.finfo(torch.float64).eps * float(gram.trace())


# One example; fewer coordinates than examples, so that zero may be a convex combination; more; many.
SIZES = [(1, 3), (8, 2), (8, 40), (32, 20)]


@pytest.mark.parametrize(("n", "p"), SIZES)
def test_mgda_meets_the_conditions_of_its_minimum(n: int, p: int) -> None:
    """⟨g_i, G⟩ ≥ ‖G‖², and equal where w_i > 0, which for a convex problem is necessary and enough."""
    for seed in range(10):
        g = drawn(n, p, seed)
        gram = g @ g.T
        w = zerosum.weights.mgda(gram)
        along, size, bound = gram @ w, float(w @ gram @ w), rounding(gram)
        assert bool((w >= 0).all())
        assert float(w.sum()) == pytest.approx(1, rel=1e-12)
        assert float(along.min()) >= size - bound
        assert float((along - size)[w > 0].abs().max()) <= bound


@pytest.mark.parametrize(("n", "p"), [(1, 3), (2, 4), (6, 3), (6, 20)])
def test_upgrad_is_the_mean_of_projections_onto_the_cone_without_conflicts(n: int, p: int) -> None:
    for seed in range(3):
        g = drawn(n, p, seed)
        gram = g @ g.T
        found = zerosum.weights.upgrad(gram) @ g
        expected = torch.stack([projection(x, g) for x in g]).mean(0)
        # Where p < n the projections lie on few edges of the cone, and g_k d = 0 holds to the root of the Gram's rounding.
        assert float((found - expected).norm()) <= rounding(gram) ** 0.5


def projection(x: Tensor, g: Tensor) -> Tensor:
    """Of x onto {d: g d ≥ 0}: of all sets of examples, that for which x + Σ z_k g_k has no inner product with them, z ≥ 0, and is
    in the cone."""
    for chosen in itertools.product((False, True), repeat=len(g)):
        active = g[torch.tensor(chosen)]
        z = -torch.linalg.pinv(active.T) @ x
        d = x + z @ active
        if bool((z >= -1e-9).all()) and bool((g @ d >= -1e-9 * g.norm() ** 2).all()):
            return d
    raise AssertionError("a projection exists")


@pytest.mark.parametrize(("n", "p"), SIZES)
def test_upgrad_conflicts_with_no_example(n: int, p: int) -> None:
    for seed in range(10):
        g = drawn(n, p, seed)
        gram = g @ g.T
        w = zerosum.weights.upgrad(gram)
        assert float(w.min()) >= (1 - 1e-12) / n
        # (Few coordinates: weights of hundreds, by which the Gram's rounding is multiplied.)
        assert float((gram @ w).min()) >= -rounding(gram) * float(w.norm().clamp(min=1))


def test_without_conflicts_upgrad_is_the_mean() -> None:
    g = drawn(5, 30, 0).abs()
    assert torch.equal(zerosum.weights.upgrad(g @ g.T), torch.full((5,), 0.2, dtype=torch.float64))


def test_weights_do_not_depend_on_the_unit_of_the_gradients() -> None:
    g = drawn(8, 40, 1)
    for weigh in (zerosum.weights.mgda, zerosum.weights.upgrad):
        one = weigh(g @ g.T)
        for factor in (1e-30, 1e30):
            torch.testing.assert_close(weigh(factor * (g @ g.T)), one, rtol=1e-9, atol=1e-12)
        assert bool(weigh(torch.zeros(3, 3)).isfinite().all())


def test_weights_have_the_gram_s_dtype_and_stand_its_rounding() -> None:
    g = drawn(8, 3, 2).float()
    for weigh in (zerosum.weights.mgda, zerosum.weights.upgrad):
        single, double = weigh(g @ g.T), weigh(g.double() @ g.double().T)
        assert single.dtype == torch.float32
        # A Gram of rank 3: float32's rounding is in the other 5 eigenvalues, and its root in the gradients.
        update, expected = single.double() @ g.double(), double @ g.double()
        assert float((update - expected).norm()) <= (rounding(g @ g.T) * 2**29) ** 0.5


@pytest.mark.parametrize("weigh", [zerosum.weights.mgda, zerosum.weights.upgrad])
def test_what_is_no_gram_is_refused(weigh: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(TypeError, match=r"gram: expected a torch\.Tensor, got NoneType"):
        weigh(None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"gram: expected shape \(N, N\) with N >= 1, got \(2, 3\)"):
        weigh(torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"gram: expected finite numbers, .* different micro-batches are NaN"):
        weigh(torch.tensor([[1.0, torch.nan], [torch.nan, 1.0]]))
    with pytest.raises(ValueError, match="gram: expected no negative eigenvalue, got -1 beside the largest, 3"):
        weigh(torch.tensor([[1.0, 2.0], [2.0, 1.0]]))


def test_torchjd_takes_the_gram_and_finds_no_shorter_combination() -> None:
    """Its Frank-Wolfe steps come within 4 max ‖g_i − g_k‖² / (steps + 2) of the least ‖G‖² (Jaggi, 2013)."""
    aggregation = pytest.importorskip("torchjd.aggregation")
    for seed in range(3):
        g = drawn(8, 40, seed)
        gram = g @ g.T
        theirs, mine = aggregation.MGDAWeighting(epsilon=1e-12, max_iters=1000)(gram), zerosum.weights.mgda(gram)
        excess = float(theirs @ gram @ theirs - mine @ gram @ mine)
        assert -rounding(gram) <= excess <= 4 * float(torch.cdist(g, g).max()) ** 2 / 1002


def test_torchjd_projects_alike() -> None:
    aggregation = pytest.importorskip("torchjd.aggregation")
    try:
        theirs = aggregation.UPGradWeighting()
    except ImportError as missing:
        pytest.skip(f"torchjd's solver is missing: {missing}")
    for seed in range(5):
        g = drawn(8, 40, seed)
        gram = g @ g.T
        found, expected = zerosum.weights.upgrad(gram), theirs(gram)
        # It adds 1e-4 of the trace to the diagonal.
        assert float((found - expected).norm()) <= 1e-2 * float(expected.norm())


@pytest.mark.parametrize("weigh", [zerosum.weights.mgda, zerosum.weights.upgrad])
def test_the_update_is_the_weighted_sum_and_conflicts_with_no_example(weigh: Callable[[Tensor], Tensor]) -> None:
    step = Step()
    step.x = step.x[:1].expand(N, T)  # the same text, continued in different ways
    truth = step.truth()

    def of_report(report: zerosum.Report) -> Tensor:
        assert report.gram is not None
        assert float(report.gram.min()) < 0
        return weigh(report.gram)

    weights, found = step.reweighted(zerosum.Probe(step.model, gram=True), of_report)
    assert_close(found, weighted(truth, weights))
    along = sum(g.flatten(1) @ found[name].flatten() for name, g in truth.items())
    scale = sum(float(g.norm() ** 2) for g in truth.values())
    assert float(along.min()) >= -1e-12 * scale


# The batch size.


def test_both_parts_of_the_noise_scale_are_unbiased_of_drawn_gradients() -> None:
    """To 4 standard errors of the mean over many batches of few examples, where a ratio of the two is far off."""
    n, p, repeats = 4, 20, 20_000
    generator = torch.Generator().manual_seed(0)
    mean = 0.2 * torch.randn(p, generator=generator, dtype=torch.float64)
    spread = torch.rand(p, generator=generator, dtype=torch.float64)
    g = mean + spread * torch.randn(repeats, n, p, generator=generator, dtype=torch.float64)
    sums = [CoordinateSums(0.0, 0.0, 0.0, *pair) for pair in zip(*squares(g), strict=True)]
    each = [gradient_metrics(s, torch.ones(n), torch.ones(n)) for s in sums]
    for name, expected in (("noise_trace", float(spread.square().sum())), ("grad_norm_sq", float(mean.square().sum()))):
        found = torch.tensor([metrics[name].value for metrics in each], dtype=torch.float64)
        error = float(found.std()) / repeats**0.5
        assert error < 0.02 * expected  # the test can tell
        assert float(found.mean()) == pytest.approx(expected, abs=4 * error), name


def squares(g: Tensor) -> tuple[list[float], list[float]]:
    """‖Σ_i g_i‖² and Σ_i ‖g_i‖² of each batch of gradients (batches, n, p)."""
    return g.sum(1).square().sum(1).tolist(), g.square().sum((1, 2)).tolist()


def test_a_report_has_both_parts_and_they_are_those_of_the_gradients() -> None:
    step = Step()
    probe = zerosum.Probe(step.model)
    with probe:
        step.losses().mean().backward()
    g = torch.cat([g.flatten(1) for g in step.truth().values()], 1)
    metrics = probe.report().metrics
    assert metrics["noise_trace"].value == pytest.approx(float(g.var(0).sum()), rel=1e-9)
    assert metrics["grad_norm_sq"].value == pytest.approx(float(g.mean(0).square().sum() - g.var(0).sum() / N), rel=1e-9)


# Penalties.


def disagreement(factors: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Σ over layers of 1 − Σ|Σ_i g_i| / Σ|g_i|."""
    sums = [zk.interference(a, b) for a, b in factors]
    return torch.stack([1 - s.grad_sum.abs().sum() / s.abs_sum.sum() for s in sums]).sum()


def conflict(factors: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Σ over layers of minus the mean cosine of two examples' gradients."""
    found = []
    for a, b in factors:
        gram = zk.gram(a, b)
        norms = gram.diagonal().sqrt()
        cosines = gram / norms[:, None] / norms
        found.append((cosines.trace() - cosines.sum()) / (N * N - N))
    return torch.stack(found).sum()


def by_definition(penalty: Callable[[list[tuple[Tensor, Tensor]]], Tensor], losses: Tensor, weights: list[Tensor]) -> Tensor:
    """The penalty of gradients that autograd found one example at a time, as one factor: g_i = 1ᵀ g_i, row by row."""
    rows = [torch.autograd.grad(loss, weights, create_graph=True) for loss in losses]
    total = []
    for gradients_of_one in zip(*rows, strict=True):
        g = torch.stack(gradients_of_one)
        if penalty is disagreement:
            total.append(1 - g.sum(0).abs().sum() / g.abs().sum())
        else:
            cosine = F.cosine_similarity(g.flatten(1)[:, None], g.flatten(1)[None], dim=2)
            total.append((cosine.diagonal().sum() - cosine.sum()) / (N * N - N))
    return torch.stack(total).sum()


@pytest.mark.parametrize("penalty", [disagreement, conflict])
def test_a_penalty_s_gradient_is_that_of_its_definition(penalty: Callable[[list[tuple[Tensor, Tensor]]], Tensor]) -> None:
    """Of every parameter: through the layers' inputs, through the gradients of their outputs, and through attention."""
    step = Step()
    layers = [step.model.blocks[0].attention.qkv, step.model.blocks[1].mlp.down, step.model.head]
    parameters = dict(step.model.named_parameters())
    expected = by_definition(penalty, step.losses(), [layer.weight for layer in layers])
    truth = dict(zip(parameters, torch.autograd.grad(expected, list(parameters.values())), strict=True))
    with zerosum.Factors(*layers) as factors:
        losses = step.losses()
    value = penalty(factors.of(losses.sum(), create_graph=True))
    assert float(value.detach()) == pytest.approx(float(expected.detach()), rel=1e-10)
    step.model.zero_grad()
    value.backward()
    assert_close(gradients(step.model), truth)
    assert all(bool(g.any()) for g in truth.values())


def test_a_penalty_s_gradient_is_what_moves_it() -> None:
    """Along a random direction, by central differences, whose error is that of h² and of ε / h."""
    step = Step()
    parameters = list(step.model.parameters())

    def value() -> Tensor:
        with zerosum.Factors(step.model.head) as factors:
            losses = step.losses()
        return conflict(factors.of(losses.sum(), create_graph=True))

    slopes = torch.autograd.grad(value(), parameters)
    direction = [torch.randn_like(p) for p in parameters]
    ends, h = [], 1e-5
    for sign in (1, -2):
        with torch.no_grad():
            for p, u in zip(parameters, direction, strict=True):
                p.add_(u, alpha=sign * h)
        ends.append(float(value().detach()))
    expected = sum(float((s * u).sum()) for s, u in zip(slopes, direction, strict=True))
    assert (ends[0] - ends[1]) / (2 * h) == pytest.approx(expected, rel=1e-6)


def test_a_probe_measures_the_losses_beside_a_penalty() -> None:
    """Set apart as ``auxiliary``, the penalty is in ``.grad`` and not in the report. Otherwise nothing is reported: examples meet
    in it, and no second derivative of the op could show that."""
    step = Step()
    truth = step.truth()

    def train() -> None:
        step.model.zero_grad()
        with zerosum.Factors(step.model.head, step.model.blocks[0].mlp.up) as factors:
            losses = step.losses()
        penalty = disagreement(factors.of(losses.sum(), create_graph=True))
        if apart:
            zerosum.auxiliary(penalty)
        (losses.mean() + penalty).backward()

    apart = False
    train()
    plain = gradients(step.model)
    for apart in (True, False):
        probe = zerosum.Probe(step.model, gram=True)
        for _ in range(PASSES):
            with probe:
                train()
            assert_close(gradients(step.model), plain)
            report = probe.report()
            if apart:
                assert report.coverage.share == 1
                assert_truth(report, truth)
            else:
                assert not len(report)
                assert report.coverage.not_covered["head.weight"].startswith("the examples are coupled before the loss")


class Often(nn.Module):
    """A layer that runs three times, on inputs with different numbers of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last = nn.Linear(3, 3), nn.Linear(3, 2)
        self.checkpointed = False

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x).relu()
        h = self.layer(h.mean(1)) + (checkpoint(self.inner, h, use_reentrant=False) if self.checkpointed else self.inner(h))
        return self.last(h).square().sum(1)

    def inner(self, h: Tensor) -> Tensor:
        return self.layer(h.tanh()).sin().sum(1)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_factors_are_of_all_uses_of_a_layer(checkpointed: bool) -> None:
    """Of inputs (N, T, K) and (N, K). What other hooks do to the output is no part of the layer."""
    torch.manual_seed(0)
    model, x = Often().double(), torch.randn(N, 4, 3, dtype=torch.float64)
    model.checkpointed = checkpointed
    model.last.register_forward_hook(lambda _, inputs, output: 3 * output)
    with zerosum.Factors(model.layer, model.last) as factors:
        losses = model(x)
        found = factors.of(losses.sum())
    assert [tuple(a.shape) for a, _ in found] == [(N, 9, 3), (N, 1, 3)]
    truth = per_example_gradients(losses, model, ["layer.weight", "last.weight"])
    for (a, b), g in zip(found, truth.values(), strict=True):
        torch.testing.assert_close(torch.einsum("nto,ntk->nok", b, a), g, rtol=1e-12, atol=1e-13)
    for (a, _), (again, _) in zip(found, factors.of(losses.sum()), strict=True):
        assert torch.equal(a, again)


def test_factors_give_the_clipped_gradient_without_a_second_backward_pass() -> None:
    step = Step()
    names = [name for name in trainable(step.model) if name != "embedding.weight"]
    layers = [step.model.get_submodule(name.removesuffix(".weight")) for name in names]
    with zerosum.Factors(*layers) as factors:  # type: ignore[arg-type]
        losses = step.losses()
    pairs = factors.of(losses.sum())
    norms = torch.stack([zk.sq_norm(a, b) for a, b in pairs]).sum(0).sqrt()
    weights = (norms.median() / norms).clamp(max=1)
    truth = per_example_gradients(losses, step.model, names)
    flat = torch.cat([g.flatten(1) for g in truth.values()], 1)
    torch.testing.assert_close(norms, flat.norm(dim=1), rtol=1e-12, atol=0)
    assert_close(
        {name: zk.weighted_grad(a, b, weights) for name, (a, b) in zip(names, pairs, strict=True)}, weighted(truth, weights)
    )


def test_factors_under_autocast_have_one_dtype() -> None:
    layer = nn.Linear(3, 2)
    with zerosum.Factors(layer) as factors, torch.autocast("cpu", torch.bfloat16):
        losses = layer(torch.randn(4, 5, 3)).float().square().sum((1, 2))
    ((a, b),) = factors.of(losses.sum())
    assert a.dtype == b.dtype == torch.bfloat16


def test_what_has_no_factors_is_refused() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    layer, other = nn.Linear(3, 3), nn.Linear(3, 3)
    with pytest.raises(TypeError, match=r"layers\[1\]: expected an nn\.Linear with its own forward, got Scaled"):
        zerosum.Factors(layer, Scaled(3, 3))
    with pytest.raises(TypeError, match=r"layers\[0\]: .* got Embedding"):
        zerosum.Factors(nn.Embedding(3, 3))  # type: ignore[arg-type]
    for layers in ((), (layer, layer)):
        with pytest.raises(ValueError, match="layers: expected one or more distinct layers"):
            zerosum.Factors(*layers)
    with zerosum.Factors(layer, other) as factors:
        loss = layer(torch.randn(2, 3)).sum()
    with pytest.raises(RuntimeError, match="did not run in the block"):
        factors.of(loss)
    with zerosum.Factors(layer, other) as factors:
        loss = layer(torch.randn(2, 3)).sum()
        other(torch.randn(2, 3))
    with pytest.raises(RuntimeError, match="the loss does not depend on Linear"):
        factors.of(loss)
    with pytest.raises(ValueError, match=r"loss: expected one number, .* got shape \(2,\)"):
        factors.of(loss.expand(2))
    with pytest.raises(RuntimeError, match="ran without gradients"), zerosum.Factors(layer) as factors, torch.no_grad():
        layer(torch.randn(2, 3))
    assert not layer._forward_hooks
    for shapes, said in (([(3,)], r"got \(3,\)"), ([(2, 3), (4, 3)], r"got \(2, 3\), \(4, 3\)")):
        with zerosum.Factors(layer) as factors:
            loss = torch.stack([layer(torch.randn(shape)).sum() for shape in shapes]).sum()
        with pytest.raises(ValueError, match=rf"expected inputs of shape \(N, …, K\) with the same N in all uses, {said}"):
            factors.of(loss)
    for input_too in (False, True):
        x = torch.randn(2, 4, 3)
        with zerosum.Factors(layer) as factors:
            loss = (layer(x) if input_too else layer(x).relu_()).sum()
        if input_too:
            x.zero_()
        with pytest.raises(RuntimeError, match="its input or its output was modified in place after it ran"):
            factors.of(loss)
