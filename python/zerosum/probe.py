"""The probe: per-example gradient statistics of a real training step, taken while the step computes its gradients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from zerosum.capture import Capture
from zerosum.loss import Loss, check_loss_reduction, check_shape
from zerosum.provenance import Provenance
from zerosum.report import Report


class Probe:
    """Measures, for every trainable parameter, ``Σ_i g_i``, ``Σ_i |g_i|``, ``Σ_i g_i²`` and each example's norms and dots, where
    ``g_i = torch.autograd.grad(losses[i], parameter)``, in place of the ordinary weight-gradient product::

        probe = zerosum.Probe(model)
        with probe:
            losses = per_example_loss(model(x), y)  # (N,)
            losses.sum().backward()                 # .grad as always
        report = probe.report()

    Uses of parameters are seen as the model's operations run, whatever the module that they are in; nothing in the model is
    changed. Several forward and backward passes in one block are micro-batches: sums add, examples come one after another. What
    runs under ``torch.no_grad`` is ignored. Compiled models run uncompiled inside of the block. A probe can be used again; each
    block starts anew.

    Args:
        model: the module whose trainable parameters are to be covered.
        examples: "sequence": an example is one index of the first dimension, (N, T, ·) activations. "position": an example is one
            position, N·T in all, whose gradient is what one backward pass tells of it: the outer product of one row.
        direction: a tensor of the parameter's shape for each parameter name, such as an update Δ; gives ``dot``, ``abs_dot`` and
            the metrics C_g, C_uG and C_ug. Covered parameters without a direction are an error.
        gram: whether to compute the inner products of all pairs of examples.
        loss_reduction: what is differentiated: "sum" or "mean" of the examples' losses, or what each example's loss was divided by
            before they were added, as a number or a tensor with one entry for each example. g_i is the gradient of ℓ_i itself
            either way.
        num_examples: N, where the first tensor that enters the model does not tell.
        strict: raise, with the parameter's name, where no rule covers a use, instead of running the operation again for each
            example; and at the end of the block, where a parameter is not covered.
        grad_scaler: the ``torch.amp.GradScaler`` that scales the loss; results are of the loss as it was.

    Raises:
        TypeError, ValueError: an argument is not of these; the message names it.
    """

    def __init__(
        self,
        model: nn.Module,
        examples: str = "sequence",
        direction: Mapping[str, Tensor] | None = None,
        gram: bool = False,
        loss_reduction: str | float | Tensor = "sum",
        *,
        num_examples: int | None = None,
        strict: bool = False,
        grad_scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        if examples == "token":
            raise ValueError(
                "examples: one backward pass does not tell the gradients of tokens' own losses; measure them with "
                "zerosum.token_report(model, x, y)"
            )
        if examples not in ("sequence", "position"):
            raise ValueError(f"examples: expected 'sequence' or 'position', got {examples!r}")
        check_loss_reduction(loss_reduction)
        if num_examples is not None and (not isinstance(num_examples, int) or num_examples < 1):
            raise ValueError(f"num_examples: expected a positive integer, got {num_examples!r}")
        if grad_scaler is not None and not hasattr(grad_scaler, "get_scale"):
            raise TypeError(f"grad_scaler: expected a torch.amp.GradScaler, got {type(grad_scaler).__name__}")
        check_direction(model, direction)
        self._model = model
        self._positions = examples == "position"
        self._direction = direction
        self._gram = gram
        self._loss_reduction = loss_reduction
        self._num_examples = num_examples
        self._strict = strict
        self._grad_scaler = grad_scaler
        self._capture: Capture | None = None
        self._report: Report | None = None

    def __enter__(self) -> Probe:
        if self._capture is not None or any(isinstance(mode, Capture) for mode in _active_modes()):
            raise RuntimeError("a probe is open already: close it before opening another")
        self._report = None
        self._loss = Loss(self._loss_reduction, 1.0 if self._grad_scaler is None else self._grad_scaler.get_scale())
        capture = Capture(
            self._model,
            provenance=Provenance(self._positions, self._num_examples),
            loss=self._loss,
            direction=self._direction_of,
            gram=self._gram,
            strict=self._strict,
        )
        capture.start()
        self._capture = capture
        return self

    def __exit__(self, exception_type: type[BaseException] | None, *rest: Any) -> None:
        capture, self._capture = self._capture, None
        assert capture is not None
        capture.stop()
        try:
            if exception_type is None:
                self._report = self._finish(capture)
        finally:
            capture.release()

    def _finish(self, capture: Capture) -> Report:
        with torch.no_grad():
            capture.finish()
            batches = capture.batches
            if batches:
                self._loss.check(sum(batches))
            for tracked in capture.parameters:
                tracked.finish()
        report = Report(capture.parameters, batches)
        if self._strict and report.coverage.not_covered:
            name, reason = next(iter(report.coverage.not_covered.items()))
            raise NotImplementedError(f"zerosum.Probe(strict=True): {name} is not covered: {reason}")
        return report

    def report(self) -> Report:
        """The results of the last completed ``with`` block."""
        if self._report is None:
            state = "is still open" if self._capture is not None else "has not completed a `with` block"
            raise RuntimeError(f"no report: the probe {state}")
        return self._report

    def _direction_of(self, names: list[str]) -> Tensor | None:
        if self._direction is None:
            return None
        return next((self._direction[name] for name in names if name in self._direction), None)


def _active_modes() -> list[Any]:
    return torch.overrides._get_current_function_mode_stack()


def check_direction(model: nn.Module, direction: Mapping[str, Tensor] | None) -> None:
    """Raises where ``direction`` is not a tensor of the parameter's shape for names of the model's parameters."""
    if direction is None:
        return
    if not isinstance(direction, Mapping):
        raise TypeError(f"direction: expected a mapping from parameter names to tensors, got {type(direction).__name__}")
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, u in direction.items():
        if name not in parameters:
            raise ValueError(f"direction: {name!r} is not a parameter of the model")
        check_shape(f"direction[{name!r}]", u, parameters[name])
