"""The probe: per-example gradient statistics of a real training step, taken while the step computes its gradients."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from zerosum.distributed import check_supported, check_whole, is_sharded
from zerosum.probe.capture import Capture, open_captures
from zerosum.probe.compiled import CompiledSteps
from zerosum.probe.loss_scale import Loss, check_loss_reduction, check_shape
from zerosum.probe.parameters import UNSEEN, ParameterProbe
from zerosum.probe.proof import Prover, Structures
from zerosum.probe.report import Coverage, Report
from zerosum.probe.results import common_scale


class Probe:
    """Measures, for every trainable parameter, ``Σ_i g_i``, ``Σ_i |g_i|``, ``Σ_i g_i²`` and each example's norms and dots, where
    ``g_i = torch.autograd.grad(losses[i], parameter)``, in place of the ordinary weight-gradient product::

        probe = zerosum.Probe(model)
        for x, y in batches:
            with probe:
                losses = per_example_loss(model(x), y)  # (N,)
                losses.sum().backward()                 # .grad as always
            report = probe.report()

    Uses of parameters are seen as the model's operations run, whatever the module that they are in; nothing in the model is
    changed. Whose row is whose is *proved* by differentiating the losses under other weights, once for each structure of the step.
    Several forward and backward passes in one block are micro-batches: sums add, examples come one after another. What runs under
    ``torch.no_grad`` is ignored. Compiled models stay compiled once their step is proved.

    Args:
        model: the module whose trainable parameters are to be covered.
        examples: "sequence": an example is one index of the losses' dimension of examples. "position": an example is one
            position, N·T in all, whose gradient is what one backward pass tells of it: the outer product of one row.
        direction: a tensor of the parameter's shape for each parameter name, such as an update Δ; gives ``dot``, ``abs_dot`` and
            the metrics C_g, C_uG and C_ug. Covered parameters without a direction are an error.
        gram: whether to compute the inner products of all pairs of examples.
        loss_reduction: what is differentiated. "auto": what the losses show (see :mod:`zerosum.probe.loss_tail`), so that a sum, a
            mean, accumulation steps and a gradient scaler give the same results. "sum" or "mean" of the examples' losses, or what
            each example's loss was divided by before they were added, as a number or a tensor with one entry for each example:
            g_i is then the gradient of ℓ_i as it was before.
        num_examples: N, where neither the first tensor that enters the model nor the losses tell.
        strict: raise, with the parameter's name, where no rule covers a use, instead of differentiating the operation again for
            each example; and at the end of the block, where a parameter is not covered.
        grad_scaler: the ``torch.amp.GradScaler`` that scales the loss; results are of the loss as it was. "auto" needs none.
        verify: "once": rows are attributed when a structure is met first, and then looked up; with fewer than 8 examples, also in
            its next passes, until rows that the data sorts cannot have come in order by chance. "always": in every pass. k: also in
            every k-th pass of a structure. "never": rows are taken to be (N, …), without proof. Rows in no regular order, such as
            those of experts, are attributed in every pass but with "never".
        every: measure in every k-th block alone; the others cost nothing, and :meth:`report` stays that of the last one measured.
        process_group: processes that train the same model on other examples, as under DistributedDataParallel, such as
            ``torch.distributed.group.WORLD`` (None before ``init_process_group``). :meth:`report` is then of all their examples.
            None: of this process's, or of all ranks' where the model's parameters are sharded.

    Raises:
        TypeError, ValueError: an argument is not of these; the message names it.
    """

    parameter_type: type[ParameterProbe] = ParameterProbe

    def __init__(
        self,
        model: nn.Module,
        examples: str = "sequence",
        direction: Mapping[str, Tensor] | None = None,
        gram: bool = False,
        loss_reduction: str | float | Tensor = "auto",
        *,
        num_examples: int | None = None,
        strict: bool = False,
        grad_scaler: torch.amp.GradScaler | None = None,
        verify: str | int = "once",
        every: int = 1,
        process_group: dist.ProcessGroup | None = None,
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
        if verify not in ("once", "always", "never") and (
            isinstance(verify, (bool, str)) or not isinstance(verify, int) or verify < 1
        ):
            raise ValueError(f"verify: expected 'once', 'always', 'never' or a positive integer, got {verify!r}")
        check_supported(model)
        _check_process_group(model, process_group)
        self._model: nn.Module = model
        self._positions = examples == "position"
        self.direction = direction
        self._gram = gram
        self._loss_reduction = loss_reduction
        self._num_examples = num_examples
        self._strict = strict
        self._grad_scaler = grad_scaler
        self._verify = verify
        self._process_group = process_group
        self._structures = Structures()
        if verify == "once" and not strict and not self._positions:
            self._structures.compiled = CompiledSteps()
        self._capture: Capture | None = None
        self._report: Report | None = None
        self._to_join = False  # whether it is of this process's examples, and is to be of all processes'
        self._along: Mapping[str, Tensor] | None = None  # the direction that it was measured along
        self._blocks = 0
        self._skipping = False
        self.every = every

    @property
    def direction(self) -> Mapping[str, Tensor] | None:
        """What blocks from now on measure dots with; it may be set between blocks."""
        return self._direction

    @direction.setter
    def direction(self, direction: Mapping[str, Tensor] | None) -> None:
        check_direction(self._model, direction)
        self._direction = direction

    @property
    def every(self) -> int:
        """How many blocks there are for one that is measured."""
        return self._every

    @every.setter
    def every(self, every: int) -> None:
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise ValueError(f"every: expected a positive integer, got {every!r}")
        self._every = every

    @property
    def model(self) -> nn.Module:
        return self._model

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        return self._process_group

    @property
    def measuring(self) -> bool:
        """Whether the probe is open, and measures."""
        return self._capture is not None

    def __enter__(self) -> Probe:
        if self._capture is not None:
            warnings.warn(
                "zerosum.Probe: an exception left the probe open; it is closed, and starts anew", UserWarning, stacklevel=2
            )
            self.close()
        if open_captures():
            raise RuntimeError("a probe is open already: close it before opening another")
        self._skipping = self._blocks % self._every != 0
        self._blocks += 1
        if self._skipping:
            return self
        self._report = None
        loss = None
        if not (isinstance(self._loss_reduction, str) and self._loss_reduction == "auto"):
            loss = Loss(self._loss_reduction, 1.0 if self._grad_scaler is None else self._grad_scaler.get_scale())
        self._prover = Prover(
            positions=self._positions,
            num_examples=self._num_examples,
            loss=loss,
            verify=self._verify,
            structures=self._structures,
        )
        capture = Capture(
            self._model,
            prover=self._prover,
            structures=self._structures,
            direction=self._direction_of,
            gram=self._gram,
            strict=self._strict,
            parameter_type=self.parameter_type,
        )
        capture.start()
        self._capture = capture
        return self

    def __exit__(self, exception_type: type[BaseException] | None, *rest: Any) -> None:
        if self._skipping:
            self._skipping = False
            return
        capture, self._capture = self._capture, None
        if capture is None:
            return
        capture.stop()
        try:
            if exception_type is None:
                self._report = self._finish(capture)
                self._to_join, self._along = self._process_group is not None, self._direction
        finally:
            capture.release()

    def close(self) -> None:
        """Ends a block that an exception left open; nothing is reported."""
        capture, self._capture = self._capture, None
        if capture is not None:
            capture.stop()
            capture.release()

    def check_repeatable(self) -> None:
        """Raises where blocks of the same step do not do the same, or wait for other processes."""
        check_whole(self._model, "zerosum.capture")
        if self._process_group is not None:
            raise ValueError("probe: expected no process_group; call captured.report().all_reduce(group) instead")
        if self._every != 1:
            raise ValueError(f"probe: expected every=1, got every={self._every}; replay the step where it is to be measured")
        if self._verify not in ("once", "never"):
            raise ValueError(f"probe: expected verify='once' or 'never', got verify={self._verify!r}")
        if self._grad_scaler is not None:
            raise ValueError("probe: expected no grad_scaler, whose scale is read in every block; loss_reduction='auto' needs none")

    def _finish(self, capture: Capture) -> Report:
        passes = [p for p in capture.passes if any(t.results is not None and p in t.results.passes for t in capture.parameters)]
        with torch.no_grad():
            if passes and self._prover.loss is not None:
                self._prover.loss.check(sum(p.examples for p in passes))
            scale = common_scale(passes)
            for parameter in capture.parameters:
                parameter.finish()
                if parameter.results is not None:
                    parameter.results.finish(passes)
                    parameter.results.common = scale
            capture.add_up()
        self._structures.tracks = self._structures.tracks and not capture.proofs
        report = Report(capture.parameters, passes, capture.proofs)
        if capture.shards is not None:
            report = capture.shards.joint(report.settled(), passes, capture.parameters)
        self._look_for_views(report.coverage)
        if self._strict and (report := report.settled()).coverage.not_covered:
            name, reason = next(iter(report.coverage.not_covered.items()))
            raise NotImplementedError(f"zerosum.Probe(strict=True): {name} is not covered: {reason}")
        return report

    def report(self) -> Report:
        """The results of the last completed ``with`` block that was measured.

        With ``process_group`` its first call after a block is that of :meth:`Report.all_reduce`, which every process of the group
        makes, and sends as much. Later calls send nothing, and return the same.
        """
        if self._report is None:
            state = "is still open" if self._capture is not None else "has not completed a `with` block"
            raise RuntimeError(f"no report: the probe {state}")
        self._report = self._report.settled()
        self._look_for_views(self._report.coverage)
        if self._to_join:
            self._report = self._report.all_reduce(self._process_group, direction=self._along)
            self._to_join, self._along = False, None
        return self._report

    def unsettled_report(self) -> Report:
        """:meth:`report`, but for :meth:`Report.settled`: of results that the device has not computed yet."""
        if self._report is None:
            return self.report()
        return self._report

    def _look_for_views(self, coverage: Coverage) -> None:
        """In the blocks to come: what was not seen may be a view of a weight. None is looked for where none was used before."""
        self._structures.views |= UNSEEN in coverage.not_covered.values()

    def _direction_of(self, names: list[str]) -> Tensor | None:
        if self._direction is None:
            return None
        return next((self._direction[name] for name in names if name in self._direction), None)


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


def _check_process_group(model: nn.Module, group: dist.ProcessGroup | None) -> None:
    if group is None:
        return
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"process_group: expected a torch.distributed.ProcessGroup or None, got {type(group).__name__}")
    if is_sharded(model):
        raise ValueError(
            "process_group: expected None for a model whose parameters are sharded: its reports are of all ranks' examples"
        )
