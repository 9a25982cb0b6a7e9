"""Measures loss interference: how an update changes the loss of every token, exactly and to first order.

There are three kinds of updates:

- One optimizer step (:class:`Step`, Δt = 1).
- The difference between two checkpoints (:func:`between`, Δt = t).
- Any direction Δ. :func:`first_order_changes` computes Δ̃ℓ_i = Σ_j g_ij Δ_j of all tokens by forward-mode differentiation, without
  computing any token's gradient.

A function ``losses(model, x, y)`` returns the (N, T) losses of tokens x (N, T), with the next tokens y (N, T) as targets. By
default they are the cross entropies of the model's logits; the model may return these as transformers' models do
(:mod:`zerosum.training.model`). Tokens whose target is ``IGNORED`` do not count, as in ``F.cross_entropy``.

Losses are computed a few sequences at a time, in the model's precision and under the caller's autocast. The model is in eval mode:
otherwise dropout would differ between two evaluations and look like a change. Its training modes and the random state are restored.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from zerosum.metrics import Metric, number_interference
from zerosum.probe.loss_scale import check_shape
from zerosum.training.model import token_losses

Losses = Callable[[nn.Module, Tensor, Tensor], Tensor]
Batch = tuple[Tensor, Tensor]

IGNORED = -100
# Positions per pass by default: the logits of a vocabulary of 50304 then take 0.4 GB.
POSITIONS = 2048


def evaluate(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    losses: Losses = token_losses,
    at: Mapping[str, Tensor] | None = None,
    micro_batch: int | None = None,
) -> Tensor:
    """Compute ``losses(model.eval(), x, y)``, (N, T), without gradients, a few sequences at a time.

    Args:
        model: the model. Its training modes and the random state are restored.
        x, y: (N, T) tokens and the next tokens, on the model's device.
        losses: see the module's documentation.
        at: values by name that replace the model's own parameters and buffers; cast to their dtype and device.
        micro_batch: sequences per pass; None for as many as have 2048 positions.

    Raises:
        TypeError, ValueError: an argument or the result of ``losses`` is invalid; the message names it.
    """
    bound = _Bound(model, losses)
    values = None if at is None else _values(model, "at", at)
    with _evaluating(model):
        return torch.cat([bound.losses(part, values) for part in _micro_batches(x, y, micro_batch)])


def first_order_changes(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    update: Mapping[str, Tensor],
    *,
    losses: Losses = token_losses,
    at: Mapping[str, Tensor] | None = None,
    micro_batch: int | None = None,
) -> Tensor:
    """Compute ``torch.func.jvp(lambda θ: losses(model at θ, x, y), (θ,), (Δ,))[1]``: Σ_j g_ij Δ_j of every token i, (N, T).

    It takes about as long as one forward and backward pass, for any number of tokens. It computes in the model's precision, to
    which ``update`` is cast. Attention uses torch's plain kernels, which hold (N, heads, T, T), because the fused ones have no
    forward-mode derivative. A compiled model runs uncompiled.

    Args:
        update: Δ by parameter name, of the parameter's shape; parameters without an entry do not change.
        at: the weights at which the derivative is taken, such as those before a step; None for the model's own values.
        model, x, y, losses, micro_batch: as in :func:`evaluate`.

    Raises:
        TypeError, ValueError: as in :func:`evaluate`.
        NotImplementedError: an operation has no forward-mode derivative; the message names it.
    """
    bound = _Bound(model, losses)
    parameters = dict(model.named_parameters())
    tangents = _values(model, "update", update)
    if stray := tangents.keys() - parameters.keys():
        raise ValueError(f"update: expected names of parameters, got the buffer {min(stray)!r}")
    values = {} if at is None else _values(model, "at", at)
    with ExitStack() as stack:
        stack.enter_context(_evaluating(model))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(_naming_operations())
        stack.enter_context(forward_ad.dual_level())
        with warnings.catch_warnings():
            # torch itself triggers this warning when it makes its first dual tensor.
            warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", DeprecationWarning)
            duals = {name: forward_ad.make_dual(values.get(name, parameters[name].detach()), u) for name, u in tangents.items()}
        found = []
        for part in _micro_batches(x, y, micro_batch):
            primal, tangent = forward_ad.unpack_dual(bound.losses(part, values | duals))
            found.append(torch.zeros_like(primal) if tangent is None else tangent.clone())
        return torch.cat(found)


class Interval(NamedTuple):
    """Losses at two checkpoints, (N, T) each, and the metrics of their change."""

    before: Tensor
    after: Tensor
    metrics: dict[str, Metric]


def between(
    model: nn.Module,
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    x: Tensor,
    y: Tensor,
    *,
    losses: Losses = token_losses,
    micro_batch: int | None = None,
) -> Interval:
    """Compute C, D, M and the mean of ``losses(model at after, x, y) - losses(model at before, x, y)``, named ``interval.*``.

    Args:
        before, after: ``model.state_dict()`` of two checkpoints. Of tied parameters, one name is enough.
        model, x, y, losses, micro_batch: as in :func:`evaluate`. The model's own values are neither used nor changed.

    Raises:
        TypeError, ValueError: as in :func:`evaluate`, or a parameter is missing.
    """
    found: list[Tensor] = []
    for name, state in (("before", before), ("after", after)):
        values = _values(model, name, state)
        missing = [parameter for parameter, _ in model.named_parameters() if parameter not in values]
        if missing:
            raise ValueError(f"{name}: expected a value for every parameter of the model, got none for {', '.join(missing)}")
        found.append(evaluate(model, x, y, losses=losses, at=values, micro_batch=micro_batch))
    first, last = found
    return Interval(first, last, prefixed("interval", change_metrics(first, last, y)))


class Step:
    """Computes one optimizer step's update, and the losses of some batches before and after the step::

        with zerosum.changes.Step(model, {"train": (x, y), "held_out": (x2, y2)}) as step:
            loss(model(x), y).backward()  # your own step: clipping, schedule, scaler, autocast, ...
            clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        step.metrics["train.D"], step.metrics["held_out.M"]  # of the changes of the tokens' losses, with N and null
        first_order_changes(model, x, y, step.update, at=step.weights)

    The block may hold several micro-batches. For Δt = 1 it must hold exactly one optimizer step. The object holds two more copies
    of the trainable parameters until it is freed.

    Attributes, after the block:
        weights: the trainable parameters before the step, by name, and the buffers that it changed, such as a batch norm's running
            means.
        update: Δ by name, the change of the parameters, in float32 (float64 for float64 parameters). It is the change of the
            parameters as rounded to their dtype, not of master weights that an optimizer may keep.
        before, after: (N, T) losses by batch name. Both are computed with the buffers from before the step, because Δ contains only
            parameters.
        metrics: for each batch, C, D, M and the mean of the changes, such as ``train.D``, and the mean loss before the step, such
            as ``train.loss``.

    Args:
        model: the model, which stays in the state in which the step leaves it.
        data: batches (x, y) by name, as in :func:`evaluate`. The names prefix the metrics and show which set they are of.
        losses, micro_batch: as in :func:`evaluate`. If the parameters, or an autocast opened around the block, are bfloat16 or
            float16, a warning says that a small step changes the losses by less than their rounding error, which D and M then
            include. Open autocast for your own pass inside the block, and the losses are computed in float32.

    Raises:
        TypeError, ValueError: as in :func:`evaluate`.
        RuntimeError: at the end of the block, if no parameter changed, for instance with a learning rate of 0.
    """

    weights: dict[str, Tensor]
    update: dict[str, Tensor]
    before: dict[str, Tensor]
    after: dict[str, Tensor]
    metrics: dict[str, Metric]

    def __init__(
        self, model: nn.Module, data: Mapping[str, Batch], *, losses: Losses = token_losses, micro_batch: int | None = None
    ) -> None:
        _check_model(model)
        if not isinstance(data, Mapping) or not data:
            got = "an empty one" if isinstance(data, Mapping) else type(data).__name__
            raise TypeError(f"data: expected a mapping from names to batches (x, y), got {got}")
        for name, batch in data.items():
            if not isinstance(batch, tuple | list) or len(batch) != 2:
                raise TypeError(f"data[{name!r}]: expected a pair of tensors (x, y), got {type(batch).__name__}")
        self._model = model
        self._data = dict(data)
        self._losses = losses
        self._micro_batch = micro_batch

    def __enter__(self) -> Step:
        if low := _low_precision(self._model):
            warnings.warn(
                f"Step: losses are computed in {low}; a small step changes them by less than their rounding error, which D and M "
                "include. Open autocast inside the block, or measure a float32 copy of the model",
                stacklevel=2,
            )
        self.before = self._evaluate()
        self._buffers = {name: b.clone() for name, b in self._model.named_buffers()}
        self.weights = {name: p.detach().clone() for name, p in self._model.named_parameters() if p.requires_grad}
        return self

    def __exit__(self, exception_type: type[BaseException] | None, *rest: Any) -> None:
        if exception_type is not None:
            return
        parameters = dict(self._model.named_parameters())
        self.update = {name: _difference(parameters[name].detach(), w) for name, w in self.weights.items()}
        if not any(u.any() for u in self.update.values()):
            raise RuntimeError(
                "the step changed no parameter, so there is no interference to measure: its learning rate was 0, a GradScaler "
                "skipped it, or optimizer.step() is not inside the block"
            )
        buffers = dict(self._model.named_buffers())
        moved = {name: b for name, b in self._buffers.items() if name in buffers and not torch.equal(b, buffers[name])}
        self.weights |= moved
        self.after = self._evaluate(moved)
        self.metrics = {}
        for name, (_, y) in self._data.items():
            before, after = self.before[name], self.after[name]
            counted = before.double()[y != IGNORED]
            found = {"loss": Metric(counted.mean().item(), counted.numel()), **change_metrics(before, after, y)}
            self.metrics |= prefixed(name, found)

    def _evaluate(self, at: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        return {
            name: evaluate(self._model, x, y, losses=self._losses, at=at, micro_batch=self._micro_batch)
            for name, (x, y) in self._data.items()
        }


def change_metrics(before: Tensor, after: Tensor, y: Tensor | None = None) -> dict[str, Metric]:
    """Compute C, D, M and the mean of ``after - before``, without tokens whose ``y`` is ``IGNORED``. The shapes must be equal."""
    _check_same("after", after, "before", before)
    return number_interference(_counted(after.double() - before.double(), y))


def first_order_metrics(changes: Tensor, first_order: Tensor, y: Tensor | None = None) -> dict[str, Metric]:
    """Compare the true loss changes Δℓ with the first-order ones Δ̃ℓ, without tokens whose ``y`` is ``IGNORED``.

    ================================  ======================================================================================
    ``first_order.C|D|M|mean``        of Δ̃ℓ
    ``first_order.relative_error``    ‖Δℓ − Δ̃ℓ‖ / ‖Δℓ‖
    ``first_order.sign_agreement``    the share of examples whose two changes have the same sign
    ``first_order.correlation``       Pearson's correlation of Δℓ with Δ̃ℓ
    ================================  ======================================================================================

    The nulls are for random signs of Δℓ; the null of the relative error is the root of the mean square.
    """
    _check_same("first_order", first_order, "changes", changes)
    true, linear = _counted(changes.double(), y), _counted(first_order.double(), y)
    n = true.numel()
    found = number_interference(linear)
    if n:
        error, true_size = (true - linear).norm(), true.norm()
        chance = (1 + (linear.norm() / true_size).square()).sqrt()
        found["relative_error"] = Metric((error / true_size).item(), n, chance.item())
        still = ((true == 0) & (linear == 0)).sum().item()
        moving = ((true != 0) & (linear != 0)).sum().item()
        agreeing = (true.sign() == linear.sign()).sum().item()
        nan = (error - error).item()  # 0, or NaN if the error is not finite
        found["sign_agreement"] = Metric(agreeing / n + nan, n, (still + moving / 2) / n + nan)
    if n > 1:
        found["correlation"] = Metric(torch.corrcoef(torch.stack([true, linear]))[0, 1].item(), n, 0.0)
    return prefixed("first_order", found)


def prefixed(prefix: str, metrics: Mapping[str, Metric]) -> dict[str, Metric]:
    return {f"{prefix}.{name}": metric for name, metric in metrics.items()}


def _low_precision(model: nn.Module) -> str:
    """Return the name of the dtype that the model computes in if it has fewer than 32 bits, and "" otherwise."""
    for p in model.parameters():
        if p.is_floating_point():
            autocast = torch.is_autocast_enabled(p.device.type)
            dtype = torch.get_autocast_dtype(p.device.type) if autocast else p.dtype
            if dtype.itemsize < 4:
                return str(dtype).removeprefix("torch.")
    return ""


class _Bound(nn.Module):
    """A model with its loss function. ``functional_call`` on it also replaces parameters that the loss function reads."""

    def __init__(self, model: nn.Module, losses: Losses) -> None:
        _check_model(model)
        if not callable(losses):
            raise TypeError(f"losses: expected a function of (model, x, y), got {type(losses).__name__}")
        super().__init__()
        self.model = model
        self._function = losses

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self._function(self.model, x, y)

    def losses(self, batch: Batch, values: Mapping[str, Tensor] | None) -> Tensor:
        if values:
            found = torch.func.functional_call(self, {f"model.{name}": value for name, value in values.items()}, batch)
        else:
            found = self(*batch)
        shape = tuple(batch[1].shape)
        if not isinstance(found, Tensor) or found.shape != shape:
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"losses: expected a function that returns one loss per token, shape {shape} like y, got {got}")
        return found


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put the model into eval mode, and restore its training modes and the random state on exit.

    It clears autocast's cache of cast weights at both ends. Casts from before a step would hide the step, and casts made here would
    cut off the gradients of the caller's own pass.
    """
    modes = [(module, module.training) for module in model.modules()]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    torch.clear_autocast_cache()
    try:
        with torch.random.fork_rng(devices=list(devices)):
            model.eval()
            yield
    finally:
        torch.clear_autocast_cache()
        for module, training in modes:
            module.training = training


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model into eval mode and disable gradients."""
    with eval_mode(model), torch.no_grad():
        yield


@contextmanager
def _naming_operations() -> Iterator[None]:
    """Name the operation that has no forward-mode derivative. torch does not name an autograd.Function."""
    try:
        yield
    except NotImplementedError as error:
        message = str(error)
        if "forward AD" in message:
            operation = message.partition("forward AD with ")[2].partition(" ")[0]
        elif "jvp function" in message:
            frame, operation = error.__traceback__, "an autograd.Function"
            while frame is not None:
                function = frame.tb_frame.f_locals.get("cls")
                if isinstance(function, type) and issubclass(function, torch.autograd.Function):
                    operation = f"{function.__module__}.{function.__qualname__}"
                frame = frame.tb_next
        else:
            raise
        raise NotImplementedError(
            f"first_order_changes: {operation} has no forward-mode derivative; use another implementation of it in `losses` or in "
            "the model's configuration"
        ) from error


def _values(model: nn.Module, argument: str, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the values by the first name of each tensor, cast to the dtype and device of the model's own."""
    if not isinstance(given, Mapping):
        raise TypeError(f"{argument}: expected a mapping from names to tensors, got {type(given).__name__}")
    own: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    own |= dict(model.named_buffers(remove_duplicate=False))
    first: dict[int, str] = {}
    for name, tensor in own.items():
        first.setdefault(id(tensor), name)
    found: dict[str, Tensor] = {}
    for name, value in given.items():
        if name not in own:
            raise ValueError(f"{argument}: {name!r} is neither a parameter nor a buffer of the model")
        check_shape(f"{argument}[{name!r}]", value, own[name])
        known = first[id(own[name])]
        value = value.detach().to(own[name])
        if known in found and not torch.equal(found[known], value):
            raise ValueError(f"{argument}[{name!r}]: expected the values of {known!r}, to which it is tied, got different ones")
        found[known] = value
    return found


def _micro_batches(x: Tensor, y: Tensor, size: int | None) -> list[Batch]:
    for name, tokens in (("x", x), ("y", y)):
        if not isinstance(tokens, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(tokens).__name__}")
        if tokens.ndim != 2 or not tokens.numel():
            raise ValueError(f"{name}: expected at least one token, of shape (N, T), got {tuple(tokens.shape)}")
    _check_same("y", y, "x", x)
    if size is None:
        size = max(1, POSITIONS // x.shape[1])
    elif not isinstance(size, int) or size < 1:
        raise ValueError(f"micro_batch: expected a positive integer or None, got {size!r}")
    return list(zip(x.split(size), y.split(size), strict=True))


def _difference(after: Tensor, before: Tensor) -> Tensor:
    wide = torch.promote_types(after.dtype, torch.float32)
    return after.to(wide) - before.to(wide)


def _counted(numbers: Tensor, y: Tensor | None) -> Tensor:
    if y is None:
        return numbers.flatten()
    _check_same("y", y, "the losses", numbers)
    return numbers[y != IGNORED]


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")


def _check_same(name: str, x: Tensor, like_name: str, like: Tensor) -> None:
    if x.shape != like.shape:
        raise ValueError(f"{name}: expected shape {tuple(like.shape)} as {like_name}, got {tuple(x.shape)}")
