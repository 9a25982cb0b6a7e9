"""Defines :func:`token_report`, which measures the gradient of every token's loss, or of a sample of tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property

import torch
from torch import Tensor, nn

from zerosum.changes import IGNORED, POSITIONS, Losses, eval_mode, first_order_changes
from zerosum.distributed import check_whole
from zerosum.probe import check_direction
from zerosum.probe.contributions import Contributions, Sums
from zerosum.probe.parameters import ParameterProbe
from zerosum.probe.report import Coverage, Report, is_embedding
from zerosum.probe.results import Pass, Results, add_up
from zerosum.tokens.memory import Budget, SavedTensors, distance, placeholder, size_of
from zerosum.tokens.passes import ChunkParameter, ChunkPass, Cut, Subject, TailPass, find_cut, rounding
from zerosum.tokens.report import ParameterEstimate, SampledReport, Scalars
from zerosum.tokens.sampling import Draws
from zerosum.training.model import token_losses
from zsl_kernels.types import sum_dtype

Progress = Callable[[int, int], None]
# Larger chunks gain little: a chunk shares a weight's inputs, and with this many tokens its products are wide enough.
LARGEST_CHUNK = 24


def token_report(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    losses: Losses = token_losses,
    direction: Mapping[str, Tensor] | None = None,
    sample: int | None = None,
    memory: int = 2 * 2**30,
    seed: int = 0,
    progress: Progress | None = None,
    results_device: torch.device | str | None = None,
) -> Report | SampledReport:
    """Compute Σ g, Σ|g|, Σ g², norms and dot products of per-token gradients, for every trainable parameter.

    The gradient of token (i, t) is g_it = ``torch.autograd.grad(losses(model, x, y)[i, t], parameter)``.

    - By default, the results are exact. Every token is an example, N·T in all, in the order of ``x.flatten()``.
    - Tokens whose target is -100 do not count. N and every (N,) tensor leave them out, and their losses are not read.
    - With ``sample``, some results remain exact: the sums Σ g, all statistics of weights after the last mixing of positions, and,
      with a direction, every token's dot product. Σ|g|, norms and Σ_j |p_ij| are estimated from that many draws, and metrics carry
      standard errors.

    The model runs in eval mode, one sequence at a time. It is left unchanged, and so are gradients in ``.grad``. If the model is
    causal, the passes skip the positions after a chunk of tokens.

    Args:
        model: must compute each sequence separately and by the same operations.
        x: (N, T) token ids.
        y: (N, T) targets.
        losses: ``losses(model, x, y)`` returns the (N, T) losses. By default, they are the cross entropies of the logits that
            ``model(x)`` returns: a tensor (N, T, vocab), a ``.logits`` or "logits" of the output, or the first entry of a tuple.
        direction: a tensor of the parameter's shape for each parameter name, such as an update Δ.
        sample: how many tokens to draw, at least 8; None for all tokens.
        memory: a limit, in bytes, on what is held in addition to the model, ``direction`` and the sums. (The sums are four tensors
            of each weight's shape, or five with ``sample``.) The limit includes activations, the gradients of backward passes, the
            uses of a tied head, one weight's sums while they are added and, with ``sample``, each token's row at the last mixing of
            positions. It excludes the kernels' workspaces, some tens of MB at most. The limit and the first sequence's forward
            passes determine how many sequences and tokens run at once.
        seed: the seed of the draws.
        progress: called with the number of tokens done and the total number.
        results_device: the device that holds the sums; None for the weights' own devices. With "cpu", a GPU holds the sums of one
            weight at a time, and the report's sums are on the CPU, equal up to rounding. Scalars stay on the model's device.

    Raises:
        TypeError, ValueError: an argument is invalid, all targets are -100, or ``memory`` is too small for one sequence and one
            token; the message names the argument.
    """
    _check(model, x, y, losses, direction, sample, memory)
    kept_on = _device(results_device)
    with eval_mode(model), torch.enable_grad():
        measurement = _Measurement(model, x, y, losses, direction, memory, seed, progress, kept_on, sample is None)
        try:
            return measurement.exact() if sample is None else measurement.sampled(sample)
        finally:
            measurement.close()


def _check(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    losses: Losses,
    direction: Mapping[str, Tensor] | None,
    sample: int | None,
    memory: int,
) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    for name, tokens in (("x", x), ("y", y)):
        if not isinstance(tokens, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(tokens).__name__}")
    if x.ndim != 2 or x.shape != y.shape or not x.numel():
        raise ValueError(f"x, y: expected (N, T) token ids and targets, got shapes {tuple(x.shape)} and {tuple(y.shape)}")
    if bool((y == IGNORED).all()):
        raise ValueError(f"y: expected at least one target other than {IGNORED} (the mark of no target), got none")
    if not callable(losses):
        raise TypeError(f"losses: expected a function of (model, x, y), got {type(losses).__name__}")
    check_whole(model, "token_report")
    check_direction(model, direction)
    if direction is not None:
        names: dict[nn.Parameter, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if parameter.requires_grad:
                names.setdefault(parameter, []).append(name)
        missing = [known[0] for known in names.values() if direction.keys().isdisjoint(known)]
        if missing:
            raise ValueError(f"direction: expected one for every trainable parameter, got none for {', '.join(missing)}")
    if sample is not None and (not isinstance(sample, int) or sample < 8):
        raise ValueError(f"sample: expected None or at least 8 draws, got {sample!r}")
    if not isinstance(memory, int) or memory < 1:
        raise ValueError(f"memory: expected a positive number of bytes, got {memory!r}")


def _device(results_device: torch.device | str | None) -> torch.device | None:
    if results_device is None or isinstance(results_device, torch.device):
        return results_device
    if not isinstance(results_device, str):
        raise TypeError(f"results_device: expected None or a device, got {type(results_device).__name__}")
    try:
        return torch.device(results_device)
    except RuntimeError:
        raise ValueError(f"results_device: expected a device such as 'cpu' or 'cuda:1', got {results_device!r}") from None


class _Measurement:
    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        losses: Losses,
        direction: Mapping[str, Tensor] | None,
        memory: int,
        seed: int,
        progress: Progress | None,
        kept_on: torch.device | None,
        exactly: bool,
    ) -> None:
        self.model, self.x, self.y, self.losses = model, x, y, losses
        self.direction, self.memory, self.kept_on = direction, memory, kept_on
        self.progress = progress or (lambda done, total: None)
        self.generator = torch.Generator().manual_seed(seed)
        counted = (y != IGNORED).flatten()
        self.examples: Tensor | None = None if bool(counted.all()) else counted
        self.places = counted.nonzero().flatten().cpu()  # index of each example in x.flatten()
        # Only rows with losses show whether rows are separate, so every token here gets a target.
        short = min(x.shape[1], 64)
        first_x, first_y = x[:2, :short], y[:2, :short]
        if self.examples is not None:
            first_y = first_y.where(first_y != IGNORED, y.flatten()[int(self.places[0])])
        self.cut: Cut = find_cut(model, losses, first_x[:1], first_y[:1], self.generator)
        self.causal = self._is_causal()
        half = max(short // 2, min(short, 2))  # two halves take no more memory than one whole sequence
        together = self._run_together(first_x[:, :half], first_y[:, :half])
        # The uses of a tied head are as large as the logits, so they are kept for one sequence at a time.
        self.most = max(POSITIONS // x.shape[1], 1) if together and not (exactly and self.cut.tied) else 1
        subject = Subject(model, losses, self.cut, self.examples is not None, kept_on)
        self.tail = TailPass(subject, self._direction_of)
        self.tied = None
        if self.cut.tied and not exactly:
            self.tied = TailPass(subject, self._direction_of, measure=False)
        self.chunks = ChunkPass(subject, self._direction_of, checked=exactly)
        weight = max((p.numel() * sum_dtype(p.dtype).itemsize for p in model.parameters() if p.requires_grad), default=0)
        self.budget = Budget(memory, self.chunks.weigh(x[:1], y[:1]), weight)

    def close(self) -> None:
        for one in (self.tail, self.tied, self.chunks):
            if one is not None:
                one.close()

    def _direction_of(self, names: list[str]) -> Tensor | None:
        if self.direction is None:
            return None
        return next((self.direction[name] for name in names if name in self.direction), None)

    @torch.no_grad()
    def _is_causal(self) -> bool:
        """Whether no loss depends on a later token."""
        T = self.x.shape[1]
        if T < 2:
            return True
        whole, half = (self.losses(self.model, self.x[:1, :t], self.y[:1, :t])[:, : T // 2] for t in (T, T // 2))
        if self.examples is not None:
            whole, half = (values.masked_fill(self.y[:1, : T // 2] == IGNORED, 0) for values in (whole, half))
        return bool(torch.allclose(whole, half, rtol=1e-3, atol=1e-4))

    def exact(self) -> Report:
        total, done = len(self.places), 0
        for which in self._micro_batches():
            sizes, rows, uses = self._run_tail(which)
            self.budget.keep(size_of(rows))
            for i in range(len(self.x))[which]:
                tokens = self._examples_of(i)
                every = torch.ones(len(tokens), dtype=torch.float64, device=self.x.device)
                mine = self._rows_of(i - which.start)
                self._take_back(i, tokens, sizes[mine], rows[mine], every, uses, done, total)
                done += len(tokens)
            del sizes, rows, uses
            self.budget.keep(0)
        self._refuse_strayed()
        tracked = self._in_order([*self.tail.finish(self.examples), *(self._result(t) for t in self.chunks.tracked)])
        with torch.no_grad():
            add_up((t.results, t.direction) for t in tracked if t.results is not None)
        return Report(tracked, [Pass(0, total)])

    def _rows_of(self, k: int) -> slice:
        """Return the rows of the k-th sequence of a micro-batch."""
        T = self.x.shape[1]
        return slice(k * T, (k + 1) * T)

    def _examples_of(self, i: int) -> Tensor:
        """Return the positions of sequence i that are examples."""
        T = self.x.shape[1]
        return (self.places[self.places // T == i] % T).to(self.x.device)

    def _run_together(self, x: Tensor, y: Tensor) -> bool:
        """Whether several sequences of a batch can be separated at the cut. For models that compute (T, N, ·), they cannot."""
        pass_ = TailPass(Subject(self.model, self.losses, self.cut), lambda names: None, measure=False)
        try:
            alone, both = (pass_.run(x[:n], y[:n])[0] for n in (1, len(x)))
        except RuntimeError:
            return False
        finally:
            pass_.close()
        return bool(torch.allclose(alone, both[: x.shape[1]], rtol=min(0.1, 1e3 * pass_.eps)))

    def _micro_batches(self) -> Iterator[slice]:
        """Yield slices of sequences that run together. The first sequence runs alone, to learn how much memory one needs."""
        start, size = 0, 1
        while start < len(self.x):
            yield slice(start, min(start + size, len(self.x)))
            start, size = start + size, min(self.most, self.budget.sequences())

    def _run_tail(self, which: slice, signs: Tensor | None = None) -> tuple[Tensor, Tensor, dict[int, Contributions]]:
        saved = SavedTensors(self.model) if not which.start else None
        sizes, rows, uses = self.tail.run(self.x[which], self.y[which], signs, saved)
        if saved is not None:
            held = [x for one in uses.values() for x in one.tensors()]
            self.budget.note_pass(saved, size_of(rows), size_of(*held), self.x.shape[1])
        return sizes, rows, uses

    def _refuse_strayed(self) -> None:
        for t in [*self.tail.tracked, *self.chunks.tracked]:
            if id(t.parameter) in self.tail.strayed:
                t.refuse("some sequences use it before the last mixing of positions and others after it, as with experts")

    def _take_back(
        self,
        i: int,
        tokens: Tensor,
        sizes: Tensor,
        rows: Tensor,
        weights: Tensor,
        uses: Mapping[int, Contributions],
        done: int,
        total: int,
    ) -> None:
        """Run the tokens (R,) of sequence i, in rising order and with these weights, backward from the cut.

        ``sizes`` (T,) and ``rows`` (T, F) are the sequence's values at the cut; ``uses`` are those of tied weights in its tail.
        """
        size = min(LARGEST_CHUNK, self.budget.tokens()) if len(tokens) else 1
        for start in range(0, len(tokens), size):
            at, factors = tokens[start : start + size], weights[start : start + size]
            # With a single position, the position dimension could not be told from the sequence dimension.
            upto = max(int(at[-1]) + 1, 2) if self.causal else self.x.shape[1]
            x, y = self.x[i : i + 1, :upto], self.y[i : i + 1, :upto]
            with torch.no_grad():
                tail = {key: value.picked(at).scaled(factors) for key, value in uses.items()}
            self.chunks.run(x, y, at, rows[at], factors, tail, sizes[: x.shape[1]])
            self.progress(done + start + len(at), total)

    def _result(self, t: ChunkParameter) -> ParameterProbe:
        """Return a parameter of the chunks with its results, in the form of a probe's."""
        exact = self._checked(t)
        if exact is None or t.total is None:
            return t
        scalars = {name: torch.cat(parts) for name, parts in t.total.scalars.items()}
        fields = {name: scalars.get(name) for name in ("dot", "abs_dot", "gram")}
        sums = Sums(exact, t.total.abs_sum, t.total.sq_sum, scalars["l1"], scalars["sq_norm"], **fields)
        t.results = Results(sums, Pass(0, len(self.places)), t.parameter)
        t.total = None
        return t

    def _checked(self, t: ChunkParameter) -> Tensor | None:
        """Return the sum of a covered parameter's gradient over all tokens, after checking that the tokens' gradients add up to
        it."""
        total, exact = t.total, self.tail.sums.get(id(t.parameter))
        if not t.problem and (total is None or exact is None):
            t.refuse("no gradient reached it")
        if t.problem or total is None or exact is None:
            return None
        exact = exact.to(total.abs_sum.dtype)
        if total.grad_sum is not None:
            error = distance(total.grad_sum, exact)
            if error > rounding(self.tail.eps, _size(t), self.largest_sum):
                t.refuse("its tokens' gradients do not add up to its gradient: some use of it was not observed")
                return None
        return exact

    @cached_property
    def largest_sum(self) -> float:
        return max(map(_size, self.chunks.tracked))

    def sampled(self, n: int) -> SampledReport:
        N, T = self.x.shape
        signs = torch.randint(2, (N, T), generator=self.generator).mul(2).sub(1).to(self.x.device)
        at_cut: list[Tensor] = []  # (T, F) for each sequence
        sizes: list[Tensor] = []  # (T,)
        for which in self._micro_batches():
            size, rows = self._run_tail(which, signs[which])[:2]
            at_cut += rows.view(-1, T, rows.shape[1])
            sizes += size.view(-1, T)
            self.budget.keep(len(self.x) * size_of(at_cut[0]))
        cuts = at_cut, sizes
        bound = torch.cat([torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64) for rows in at_cut]).cpu()[self.places]
        dot = None
        if self.direction is not None:
            dot = first_order_changes(
                self.model, self.x, self.y, self.direction, losses=self.losses, micro_batch=min(self.most, self.budget.sequences())
            ).flatten()
            dot = dot if self.examples is None else dot[self.examples]
        halves = Draws.proportional(bound, n, self.generator).halves()
        self._take_back_draws(halves[0], *cuts, 0, n)
        first = self.chunks.take_scalars()
        for t in self.chunks.tracked:
            t.direction = self._influence(t, len(halves[0]))
        self._take_back_draws(halves[1], *cuts, len(halves[0]), n)
        second = self.chunks.take_scalars()
        self._refuse_strayed()
        self.tail.finish(self.examples)
        return self._estimate(halves, first, second, dot)

    def _take_back_draws(self, draws: Draws, rows: list[Tensor], sizes: list[Tensor], done: int, total: int) -> None:
        """Run the draws backward, sequence by sequence."""
        T, device = self.x.shape[1], self.x.device
        places = self.places[draws.tokens]
        for i in (places // T).unique().tolist():
            mine = (places // T == i).nonzero().flatten()
            uses = {} if self.tied is None else self.tied.run(self.x[i : i + 1], self.y[i : i + 1])[2]
            tokens, weights = (places[mine] % T).to(device), draws.weights[mine].to(device)
            self._take_back(i, tokens, sizes[i], rows[i], weights, uses, done + int(mine[0]), total)

    def _influence(self, t: ChunkParameter, draws: int) -> Tensor | None:
        """Compute ∂(Σ_j |G_j| / A_j)/∂A_j up to its sign, with A_j = Σ_i |g_ij| estimated from these draws, half of all draws."""
        if t.total is None or t.problem or is_embedding(t.how, t.parameter.shape):
            return None
        sizes, total = 2 * t.total.abs_sum, self.tail.sums[id(t.parameter)].abs()
        # The square of the reciprocal of an estimate A is too large by the factor 1 + 3 var A / A², to second order.
        squares = t.total.variance(draws).mul_(3 * 4).addcmul_(sizes, sizes)
        return torch.where(sizes > total, total.div_(squares), 0)

    def _estimate(
        self,
        halves: tuple[Draws, Draws],
        first: dict[str, Tensor],
        second: dict[str, Tensor],
        dot: Tensor | None,
    ) -> SampledReport:
        n = len(halves[0]) + len(halves[1])
        parameters, tracked = [], self._in_order([*self.tail.tracked, *self.chunks.tracked])
        for one in self.chunks.tracked:
            one.direction = None  # it was the influence, needed by the draws only
        exact = {"l1": 0.0, "sq_norm": 0.0}
        for t in tracked:
            if isinstance(t, ChunkParameter):
                grad_sum = self._checked(t)
                if grad_sum is None or t.total is None:
                    continue
                abs_sum = t.total.abs_sum
                error = t.total.variance(n).sqrt_()
                t.total = None
            else:
                if t.results is None:
                    continue
                sums = t.results.sums
                grad_sum, abs_sum = (
                    sums.spread(x, t.parameter.shape).view(t.parameter.shape) for x in (t.results.grad_sum, sums.abs_sum)
                )
                error = placeholder(abs_sum)
                exact["l1"] += float(sums.l1.double().sum())
                exact["sq_norm"] += float(sums.sq_norm.double().sum())
            estimate = ParameterEstimate(
                name=t.name,
                how=" + ".join(t.how),
                grad_sum=grad_sum,
                abs_sum=abs_sum,
                abs_error=error,
                signed_sum=self.tail.signed[id(t.parameter)],
                direction=self._direction_of(t.names),
                exact=not isinstance(t, ChunkParameter),
            )
            parameters.append(estimate)
        coverage = Coverage(
            covered={p.name: p.how for p in parameters},
            not_covered={t.name: t.problem for t in tracked if t.problem},
            sizes={t.name: t.parameter.numel() for t in tracked},
        )
        # If only embeddings lie before the cut, or nothing does, a half has no scalars of its own: they are zero.
        zeros = [torch.zeros(len(half), dtype=torch.float64, device=self.x.device) for half in halves]
        l1, sq_norm = (
            torch.cat([part.get(name, zero) for part, zero in zip((first, second), zeros, strict=True)])
            for name in ("l1", "sq_norm")
        )
        abs_dot, influence = (part.get("abs_dot", zero) for part, zero in zip((first, second), zeros, strict=True))
        scalars = Scalars(l1, sq_norm, abs_dot, influence, exact["l1"], exact["sq_norm"])
        embeddings = {t.name for t in tracked if is_embedding(t.how, t.parameter.shape)}
        names = {name: t.name for t in tracked for name in t.names}
        return SampledReport(parameters, names, coverage, embeddings, halves, scalars, dot, len(self.places))

    def _in_order(self, tracked: list[ParameterProbe]) -> list[ParameterProbe]:
        places = {id(p): k for k, p in enumerate(self.model.parameters())}
        return sorted(tracked, key=lambda t: places[id(t.parameter)])


def _size(t: ChunkParameter) -> float:
    return 0.0 if t.total is None else distance(t.total.abs_sum)
