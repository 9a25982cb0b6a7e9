"""Measuring every token's own gradient, or a sample's."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from zerosum.changes import POSITIONS, Losses, eval_mode, first_order_changes
from zerosum.probe import check_direction
from zerosum.probe.contributions import Contributions, Sums
from zerosum.probe.parameters import ParameterProbe
from zerosum.probe.report import Coverage, Report, is_embedding
from zerosum.probe.results import Pass, Results, add_up
from zerosum.tokens.passes import ChunkParameter, ChunkPass, Cut, TailPass, find_cut, rounding
from zerosum.tokens.report import ParameterEstimate, SampledReport, Scalars
from zerosum.tokens.sampling import Draws
from zerosum.training.model import token_losses

Progress = Callable[[int, int], None]
# More tokens at once gain little: a weight's inputs are shared by a chunk, and its products are wide enough with these.
LARGEST_CHUNK = 24
# Tensors of the largest activation's size, for each token of a chunk, that a vectorized backward pass holds at once.
HELD = 5


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
) -> Report | SampledReport:
    """For g_it = ``torch.autograd.grad(losses(model, x, y)[i, t], parameter)``, the gradient of each token's loss: Σ g, Σ|g|, Σ g²,
    norms and dots, of every trainable parameter.

    Exact by default: every token is an example, N·T in all, in the order of ``x.flatten()``. With ``sample`` the numerators Σ g are
    exact, and so are what lies behind the last mixing of positions and, with a direction, every token's dot; Σ|g|, norms and
    Σ_j |p_ij| are estimated from that many draws, and metrics carry standard errors.

    The model runs in eval mode, one sequence at a time, and is left as it was; gradients in ``.grad`` are not touched. If it is
    causal, positions behind a chunk of tokens are cut off.

    Args:
        model: computes each sequence by itself, by the same operations.
        x: (N, T) token ids.
        y: (N, T) targets.
        losses: ``losses(model, x, y)`` gives the (N, T) losses.
        direction: a tensor of the parameter's shape for each parameter name, such as an update Δ.
        sample: how many tokens to draw, at least 8; None for all tokens.
        memory: bytes that a chunk's backward pass may take, beyond the model, the sums and one forward pass. It sets how many
            tokens go back at once.
        seed: fixes the draws.
        progress: called with the numbers of tokens that are done and that there are to do.

    Raises:
        TypeError, ValueError: an argument is not of these, or ``memory`` is too small for one token; the message names it.
    """
    _check(model, x, y, losses, direction, sample, memory)
    with eval_mode(model), torch.enable_grad():
        measurement = _Measurement(model, x, y, losses, direction, memory, seed, progress)
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
    if not callable(losses):
        raise TypeError(f"losses: expected a function of (model, x, y), got {type(losses).__name__}")
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
    ) -> None:
        self.model, self.x, self.y, self.losses = model, x, y, losses
        self.direction, self.memory = direction, memory
        self.progress = progress or (lambda done, total: None)
        self.generator = torch.Generator().manual_seed(seed)
        short = min(x.shape[1], 64)
        self.cut: Cut = find_cut(model, losses, x[:1, :short], y[:1, :short], self.generator)
        self.causal = self._is_causal()
        self.most = max(POSITIONS // x.shape[1], 1) if self._runs_together(short) else 1  # sequences in one pass over the tail
        self.tail = TailPass(model, losses, self.cut, self._direction_of)
        self.tied = TailPass(model, losses, self.cut, self._direction_of, measure=False) if self.cut.tied else None
        self.chunks = ChunkPass(model, losses, self.cut, self._direction_of)
        self.largest = self.chunks.largest(x[:1], y[:1])

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
        """Whether losses depend on no later token."""
        T = self.x.shape[1]
        if T < 2:
            return True
        whole, half = (self.losses(self.model, self.x[:1, :t], self.y[:1, :t])[:, : T // 2] for t in (T, T // 2))
        return bool(torch.allclose(whole, half, rtol=1e-3, atol=1e-4))

    def exact(self) -> Report:
        N, T = self.x.shape
        tokens = torch.arange(T, device=self.x.device)
        every = torch.ones(T, dtype=torch.float64, device=self.x.device)
        # The uses of a tied head are as large as the logits: kept for one sequence at a time.
        for which in self._micro_batches(1 if self.cut.tied else self.most):
            cut, rows, uses = self.tail.run(self.x[which], self.y[which])
            for k, i in enumerate(range(N)[which]):
                mine = slice(k * T, (k + 1) * T)
                self._take_back(i, tokens, cut.sizes[mine], rows[mine], every, uses, i * T, N * T)
        self._refuse_strayed()
        tracked = self._in_order([*self.tail.finish(), *(self._result(t) for t in self.chunks.tracked)])
        return Report(tracked, [Pass(0, N * T)])

    def _runs_together(self, short: int) -> bool:
        """Whether several sequences in one batch can be told apart at the cut, as those of (T, N, ·) models cannot."""
        pass_ = TailPass(self.model, self.losses, self.cut, lambda names: None, measure=False)
        try:
            alone, both = (pass_.run(self.x[:n, :short], self.y[:n, :short])[0].sizes for n in (1, min(len(self.x), 2)))
        except RuntimeError:
            return False
        finally:
            pass_.close()
        return bool(torch.allclose(alone, both[:short], rtol=min(0.1, 1e3 * pass_.eps)))

    def _micro_batches(self, size: int) -> list[slice]:
        """Sequences that run together."""
        return [slice(start, min(start + size, len(self.x))) for start in range(0, len(self.x), size)]

    def _refuse_strayed(self) -> None:
        for t in [*self.tail.tracked, *self.chunks.tracked]:
            if id(t.parameter) in self.tail.strayed:
                t.refuse("not all sequences use it on one side of the last mixing of positions, as experts are used")

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
        """Tokens (R,) of sequence i, by rising position, with these weights; ``sizes`` (T,) and ``rows`` (T, F) are the sequence's
        at the cut, and ``uses`` those of tied weights in its tail."""
        size = self._chunk_size()
        for start in range(0, len(tokens), size):
            at, factors = tokens[start : start + size], weights[start : start + size]
            # Of a single position the dimension of positions could not be told from that of sequences.
            upto = max(int(at[-1]) + 1, 2) if self.causal else self.x.shape[1]
            x, y = self.x[i : i + 1, :upto], self.y[i : i + 1, :upto]
            with torch.no_grad():
                tail = {key: value.picked(at).scaled(factors) for key, value in uses.items()}
            self.chunks.run(x, y, at, rows[at], factors, tail, sizes[: x.shape[1]])
            self.progress(done + start + len(at), total)

    def _chunk_size(self) -> int:
        """How many tokens' backward passes the memory holds."""
        each = HELD * self.largest
        if each > self.memory:
            raise ValueError(f"memory: expected at least {each} bytes, for the backward pass of one token, got {self.memory}")
        return min(LARGEST_CHUNK, self.memory // max(each, 1))

    def _result(self, t: ChunkParameter) -> ParameterProbe:
        """A parameter of the chunks, with results as those of a probe."""
        exact = self._checked(t)
        if exact is None or t.total is None:
            return t
        scalars = {name: torch.cat(parts) for name, parts in t.total.scalars.items()}
        fields = {name: scalars.get(name) for name in ("dot", "abs_dot", "gram")}
        sums = Sums(exact, t.total.abs_sum, t.total.sq_sum, scalars["l1"], scalars["sq_norm"], **fields)
        t.results = Results(sums, Pass(0, self.x.numel()), t.parameter)
        add_up([(t.results, t.direction)])
        return t

    def _checked(self, t: ChunkParameter, exactly: bool = True) -> Tensor | None:
        """Its gradient's sum over all tokens, if it is covered. The tokens' gradients must add up to it."""
        total, exact = t.total, self.tail.sums.get(id(t.parameter))
        if not t.problem and (total is None or exact is None):
            t.refuse("no gradient reached it")
        if t.problem or total is None or exact is None:
            return None
        exact = exact.to(total.abs_sum.dtype)
        error = float((total.grad_sum - exact).double().norm())
        if exactly and error > rounding(self.tail.eps, _size(t), max(map(_size, self.chunks.tracked))):
            t.refuse("its tokens' gradients do not add up to its gradient: some use of it was not seen")
            return None
        return exact

    def sampled(self, n: int) -> SampledReport:
        N, T = self.x.shape
        signs = torch.randint(2, (N, T), generator=self.generator).mul(2).sub(1).to(self.x.device)
        at_cut, sizes = [], []
        for which in self._micro_batches(self.most):
            cut, rows, _ = self.tail.run(self.x[which], self.y[which], signs[which])
            at_cut.append(rows.view(-1, T, rows.shape[1]))
            sizes.append(cut.sizes.view(-1, T))
        cuts = torch.cat(at_cut), torch.cat(sizes)  # (N, T, F) and (N, T)
        bound = torch.linalg.vector_norm(cuts[0], dim=2, dtype=torch.float64).flatten()
        dot = None
        if self.direction is not None:
            dot = first_order_changes(self.model, self.x, self.y, self.direction, losses=self.losses).flatten()
        halves = Draws.proportional(bound, n, self.generator).halves()
        self._take_back_draws(halves[0], *cuts, 0, n)
        first = self.chunks.take_scalars()
        for t in self.chunks.tracked:
            t.direction = self._influence(t, len(halves[0]))
        self._take_back_draws(halves[1], *cuts, len(halves[0]), n)
        second = self.chunks.take_scalars()
        self._refuse_strayed()
        self.tail.finish()
        return self._estimate(halves, first, second, dot)

    def _take_back_draws(self, draws: Draws, rows: Tensor, sizes: Tensor, done: int, total: int) -> None:
        """Sequence by sequence."""
        T, device = self.x.shape[1], self.x.device
        for i in (draws.tokens // T).unique().tolist():
            mine = (draws.tokens // T == i).nonzero().flatten()
            uses = {} if self.tied is None else self.tied.run(self.x[i : i + 1], self.y[i : i + 1])[2]
            tokens, weights = (draws.tokens[mine] % T).to(device), draws.weights[mine].to(device)
            self._take_back(i, tokens, sizes[i], rows[i], weights, uses, done + int(mine[0]), total)

    def _influence(self, t: ChunkParameter, draws: int) -> Tensor | None:
        """∂(Σ_j |G_j| / A_j)/∂A_j up to its sign, for A_j = Σ_i |g_ij| as these draws tell it, which are half of all."""
        if t.total is None or t.problem or is_embedding(t.how, t.parameter.shape):
            return None
        sizes, total = 2 * t.total.abs_sum, self.tail.sums[id(t.parameter)].abs()
        # 1/A² of an estimate A is too large by the factor 1 + 3 var A / A², to second order.
        return torch.where(sizes > total, total / (sizes.square() + 3 * 4 * t.total.variance(draws)), 0)

    def _estimate(
        self,
        halves: tuple[Draws, Draws],
        first: dict[str, Tensor],
        second: dict[str, Tensor],
        dot: Tensor | None,
    ) -> SampledReport:
        n = len(halves[0]) + len(halves[1])
        parameters, tracked = [], self._in_order([*self.tail.tracked, *self.chunks.tracked])
        exact = {"l1": 0.0, "sq_norm": 0.0}
        for t in tracked:
            if isinstance(t, ChunkParameter):
                grad_sum = self._checked(t, exactly=False)
                if grad_sum is None or t.total is None:
                    continue
                abs_sum = t.total.abs_sum
                error = t.total.variance(n).sqrt()
            else:
                if t.results is None:
                    continue
                sums = t.results.sums
                grad_sum, abs_sum = (x.view(t.parameter.shape) for x in (self.tail.sums[id(t.parameter)], sums.abs_sum))
                error = torch.zeros_like(abs_sum)
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
        # Where all parameters are the tail's, or only embeddings are not, a half has no scalars of its own: they are zero.
        zeros = [torch.zeros(len(half), dtype=torch.float64, device=self.x.device) for half in halves]
        l1, sq_norm = (
            torch.cat([part.get(name, zero) for part, zero in zip((first, second), zeros, strict=True)])
            for name in ("l1", "sq_norm")
        )
        abs_dot, influence = (part.get("abs_dot", zero) for part, zero in zip((first, second), zeros, strict=True))
        scalars = Scalars(l1, sq_norm, abs_dot, influence, exact["l1"], exact["sq_norm"])
        embeddings = {t.name for t in tracked if is_embedding(t.how, t.parameter.shape)}
        names = {name: t.name for t in tracked for name in t.names}
        return SampledReport(parameters, names, coverage, embeddings, halves, scalars, dot, self.x.numel())

    def _in_order(self, tracked: list[ParameterProbe]) -> list[ParameterProbe]:
        places = {id(p): k for k, p in enumerate(self.model.parameters())}
        return sorted(tracked, key=lambda t: places[id(t.parameter)])


def _size(t: ChunkParameter) -> float:
    return 0.0 if t.total is None else float(t.total.abs_sum.double().norm())
