"""The probe: per-example gradient statistics of a real training step, taken while the step computes its gradients."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from zerosum.layers import RULES
from zerosum.report import Report
from zerosum.tracking import Tracked


class Probe:
    """Measures, for every covered parameter, ``Σ_i g_i``, ``Σ_i |g_i|``, ``Σ_i g_i²`` and each example's norms and dots, where
    ``g_i = torch.autograd.grad(losses[i], parameter)``, in place of the ordinary weight-gradient product::

        probe = zerosum.Probe(model)
        with probe:
            losses = per_example_loss(model(x), y)  # (N,)
            losses.sum().backward()                 # .grad as always
        report = probe.report()

    One forward and one backward pass belong in the ``with`` block; what runs under ``torch.no_grad`` is ignored. The model is
    never changed: calls of torch functions are watched while the block is open. A probe can be used again; each block starts anew.

    Args:
        model: the module whose trainable parameters are to be covered.
        examples: "sequence": an example is one index of the first dimension, (N, T, ·) activations.
        direction: a tensor of the parameter's shape for each parameter name, such as an update Δ; gives ``dot``, ``abs_dot`` and
            the metrics C_g, C_uG and C_ug. Covered parameters without a direction are an error.
        gram: whether to compute the (N, N) inner products.
        loss_reduction: what is differentiated, "sum" or "mean" of the N examples' losses. g_i is the gradient of ℓ_i itself
            either way.
        num_examples: N, where the first linear layer's input does not tell.

    Raises:
        TypeError, ValueError: an argument is not of these; the message names it.
    """

    def __init__(
        self,
        model: nn.Module,
        examples: str = "sequence",
        direction: Mapping[str, Tensor] | None = None,
        gram: bool = False,
        loss_reduction: str = "sum",
        *,
        num_examples: int | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        if examples != "sequence":
            raise ValueError(f"examples: expected 'sequence', got {examples!r}")
        if loss_reduction not in ("sum", "mean"):
            raise ValueError(f"loss_reduction: expected 'sum' or 'mean', got {loss_reduction!r}")
        if num_examples is not None and (not isinstance(num_examples, int) or num_examples < 1):
            raise ValueError(f"num_examples: expected a positive integer, got {num_examples!r}")
        _check_direction(model, direction)
        self._model = model
        self._direction = direction
        self._gram = gram
        self._loss_reduction = loss_reduction
        self._num_examples = num_examples
        self._capture: Capture | None = None
        self._report: Report | None = None

    def __enter__(self) -> Probe:
        if self._capture is not None or any(isinstance(mode, Capture) for mode in _active_modes()):
            raise RuntimeError("a probe is open already: close it before opening another")
        self._report = None
        names: dict[nn.Parameter, list[str]] = {}
        for name, parameter in self._model.named_parameters(remove_duplicate=False):
            names.setdefault(parameter, []).append(name)
        tracked = {}
        for parameter, known_as in names.items():
            if parameter.requires_grad:
                direction = None if self._direction is None else _direction_of(self._direction, known_as)
                tracked[parameter] = Tracked(known_as[0], parameter, direction, self._gram)
        self._names = {name: known_as[0] for known_as in names.values() for name in known_as}
        self._capture = Capture(tracked, self._num_examples)
        self._capture.__enter__()
        return self

    def __exit__(self, exception_type: type[BaseException] | None, *rest: Any) -> None:
        capture, self._capture = self._capture, None
        assert capture is not None
        capture.__exit__(exception_type, *rest)
        capture.open = False
        if exception_type is not None:
            return
        with torch.no_grad():
            for tracked in capture.parameters:
                tracked.finish()
        self._report = Report(capture.parameters, capture.num_examples or 0, self._loss_reduction, self._names)

    def report(self) -> Report:
        """The results of the last completed ``with`` block."""
        if self._report is None:
            state = "is still open" if self._capture is not None else "has not completed a `with` block"
            raise RuntimeError(f"no report: the probe {state}")
        return self._report


class Capture(TorchFunctionMode):
    """Watches torch function calls and hands those with a rule, on a tracked parameter, to it."""

    def __init__(self, tracked: dict[nn.Parameter, Tracked], num_examples: int | None) -> None:
        super().__init__()
        self._tracked = {id(parameter): t for parameter, t in tracked.items()}
        self.parameters = list(tracked.values())
        self.num_examples = num_examples
        self.open = True
        self.backward_began = False

    def begin_use(self) -> None:
        """Refuses a second batch, whose examples would be taken for further uses of the first's."""
        if self.backward_began:
            raise RuntimeError(
                "zerosum.Probe: expected one forward and one backward pass in a `with` block, got a forward pass after a backward "
                "pass; open the probe anew for each batch"
            )

    def tracked(self, x: Any) -> Tracked | None:
        return self._tracked.get(id(x))

    def examples_problem(self, rows: torch.Size) -> str:
        """Why rows of this shape are not (N, …), or an empty string. The first rows seen say what N is."""
        if not rows:
            return "an input without a dimension of examples"
        if self.num_examples is None:
            self.num_examples = rows[0]
        if rows[0] != self.num_examples:
            return f"rows {tuple(rows)}, which do not start with N = {self.num_examples} examples"
        return ""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if not torch.is_grad_enabled():
            return func(*args, **kwargs)
        rule = RULES.get(func)
        if rule is not None and (result := rule(self, args, kwargs)) is not None:
            return result
        result = func(*args, **kwargs)
        used = [t for t in map(self.tracked, _flatten((*args, *kwargs.values()))) if t is not None]
        if used and any(isinstance(x, Tensor) and x.requires_grad for x in _flatten((result,))):
            for t in used:
                t.refuse(f"used by {getattr(func, '__name__', func)}, which no rule covers")
        return result


def _flatten(values: Iterable[Any]) -> Iterable[Any]:
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _flatten(value)
        else:
            yield value


def _active_modes() -> list[TorchFunctionMode]:
    return torch.overrides._get_current_function_mode_stack()


def _direction_of(direction: Mapping[str, Tensor], names: list[str]) -> Tensor | None:
    return next((direction[name] for name in names if name in direction), None)


def _check_direction(model: nn.Module, direction: Mapping[str, Tensor] | None) -> None:
    if direction is None:
        return
    if not isinstance(direction, Mapping):
        raise TypeError(f"direction: expected a mapping from parameter names to tensors, got {type(direction).__name__}")
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, u in direction.items():
        if name not in parameters:
            raise ValueError(f"direction: {name!r} is not a parameter of the model")
        if not isinstance(u, Tensor) or u.shape != parameters[name].shape:
            got = tuple(u.shape) if isinstance(u, Tensor) else type(u).__name__
            raise ValueError(f"direction[{name!r}]: expected a tensor of shape {tuple(parameters[name].shape)}, got {got}")
