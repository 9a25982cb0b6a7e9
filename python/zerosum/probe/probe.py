"""Defines :class:`Probe`, which computes per-example gradient statistics of a training step during its backward pass."""

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
    """Computes ``Σ_i g_i``, ``Σ_i |g_i|``, ``Σ_i g_i²`` and each example's norms and dot products for every trainable parameter.

    ``g_i = torch.autograd.grad(losses[i], parameter)`` is the gradient of example i. The probe computes the sums in place of the
    ordinary weight-gradient product::

        probe = zerosum.Probe(model)
        for x, y in batches:
            with probe:
                losses = per_example_loss(model(x), y)  # (N,)
                losses.sum().backward()                 # .grad as always
            report = probe.report()

    The probe watches the model's operations as they run, in any module, and changes nothing in the model. It *proves* which row
    of an activation belongs to which example: once for each structure of the step, it differentiates reweighted losses. Several
    forward and backward passes in one block are micro-batches: their sums are added and their examples are concatenated. The probe
    ignores operations under ``torch.no_grad``. A compiled model stays compiled after its step is proved.

    Args:
        model: the module whose trainable parameters are measured.
        examples: what counts as an example. "sequence": one index of the losses' example dimension. "position": one position, N·T
            in all; its gradient is the outer product of one row of the backward pass.
        direction: maps parameter names to tensors of the parameters' shapes, such as an update Δ. Adds ``dot``, ``abs_dot`` and
            the metrics C_g, C_uG and C_ug. Every covered parameter needs a direction.
        gram: whether to compute the inner products of all pairs of examples.
        loss_reduction: how the differentiated loss was made of the examples' losses ℓ_i; g_i is the gradient of the unreduced ℓ_i.
            "auto": read the reduction off the loss (see :mod:`zerosum.probe.loss_tail`). Sums, means, gradient accumulation and a
            gradient scaler then give the same results. "sum" or "mean": that reduction over the examples. A number, or a tensor
            with one entry per example: what each ℓ_i was divided by before the sum.
        num_examples: N. Needed only if neither the model's first input tensor nor the losses show it.
        strict: whether to raise an error that names the parameter, if no rule covers one of its uses or if it is not covered at the
            end of the block. By default, the probe differentiates such an operation again for each example.
        grad_scaler: the ``torch.amp.GradScaler`` that scales the loss; results are of the unscaled loss. Not needed with
            ``loss_reduction="auto"``.
        verify: when to prove which rows belong to which examples. "once": on the first pass of each structure; with fewer than 8
            examples also on its next few passes, because a few rows that the data sorts can be in order by chance. "always": on
            every pass. An integer k: also on every k-th pass of a structure. "never": assume that rows are (N, …), without proof.
            Unless "never", rows in irregular order, such as those of experts, are proved on every pass.
        every: measure only every k-th block. Other blocks add no cost and leave :meth:`report` unchanged.
        process_group: the processes that train the same model on other examples, for instance ``torch.distributed.group.WORLD``
            under DistributedDataParallel (it is None before ``init_process_group``). :meth:`report` then covers all their examples.
            None: the report covers this process's examples, or all ranks' examples if the model's parameters are sharded.

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it.
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
                "examples: one backward pass does not determine the gradients of single tokens' losses; use "
                "zerosum.token_report(model, x, y) instead of examples='token'"
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
        self._along: Mapping[str, Tensor] | None = None  # the direction of the last measured block
        self._blocks = 0
        self._skipping = False
        self.every = every

    @property
    def direction(self) -> Mapping[str, Tensor] | None:
        """The direction for the dot products of later blocks. You may set it between blocks."""
        return self._direction

    @direction.setter
    def direction(self, direction: Mapping[str, Tensor] | None) -> None:
        check_direction(self._model, direction)
        self._direction = direction

    @property
    def every(self) -> int:
        """k, where every k-th block is measured."""
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
        """Whether the probe is open and measures the block."""
        return self._capture is not None

    def __enter__(self) -> Probe:
        if self._capture is not None:
            warnings.warn(
                "zerosum.Probe: an exception left the probe open; closing it and starting a new block", UserWarning, stacklevel=2
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
        """Close a block that an exception left open, without a report."""
        capture, self._capture = self._capture, None
        if capture is not None:
            capture.stop()
            capture.release()

    def check_repeatable(self) -> None:
        """Raise an error if the probe's settings make blocks of the same step differ, or make them wait for other processes."""
        check_whole(self._model, "zerosum.capture")
        if self._process_group is not None:
            raise ValueError("probe: expected no process_group; call captured.report().all_reduce(group) instead")
        if self._every != 1:
            raise ValueError(f"probe: expected every=1, got every={self._every}; replay the step only where you want to measure it")
        if self._verify not in ("once", "never"):
            raise ValueError(f"probe: expected verify='once' or 'never', got verify={self._verify!r}")
        if self._grad_scaler is not None:
            raise ValueError("probe: expected no grad_scaler: its scale is read in every block; use loss_reduction='auto' instead")

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
        """Return the results of the last completed ``with`` block that was measured.

        With ``process_group``, the first call after a block performs :meth:`Report.all_reduce`: every process of the group must
        make it. Later calls return the same report without communication.
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
        """Return the report without :meth:`Report.settled`, so that it need not wait for results on the device."""
        if self._report is None:
            return self.report()
        return self._report

    def _look_for_views(self, coverage: Coverage) -> None:
        """Make later blocks look for views of weights if some uses of a parameter were not seen: a view may have hidden them."""
        self._structures.views |= UNSEEN in coverage.not_covered.values()

    def _direction_of(self, names: list[str]) -> Tensor | None:
        if self._direction is None:
            return None
        return next((self._direction[name] for name in names if name in self._direction), None)


def check_direction(model: nn.Module, direction: Mapping[str, Tensor] | None) -> None:
    """Raise an error unless ``direction`` maps names of the model's parameters to tensors of their shapes."""
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
            "process_group: expected None for a model with sharded parameters, whose reports already cover all ranks' examples"
        )
