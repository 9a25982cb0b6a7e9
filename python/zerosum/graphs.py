"""Probed steps as CUDA graphs: recorded once, and replayed without the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from zerosum.probe import Probe, Report

# A structure of few examples is proved in several passes. More than these are those of a step that is proved in every pass.
MOST_WARM_UPS = 16
# Passes that nothing is proved in, before one is recorded: libraries choose algorithms and allocate in the first.
STEADY = 2


class Recorder(Protocol):
    """What records the work of a device."""

    def warm_up(self, run: Callable[[], object]) -> None:
        """Runs it as it will be recorded."""

    def record(self, run: Callable[[], object]) -> None:
        """Runs it once, and keeps what it asks of the device, which may be done then or not."""

    def replay(self) -> None:
        """What was recorded, on the same memory."""


class _CudaGraph:
    def __init__(self, device: torch.device, pool: Any) -> None:
        self._device, self._pool = device, pool
        self._graph = torch.cuda.CUDAGraph()
        # One for all passes: work on the default stream cannot be recorded, and autograd's nodes stay with the stream of their
        # first pass.
        self._stream = torch.cuda.Stream(device)

    def warm_up(self, run: Callable[[], object]) -> None:
        with torch.cuda.device(self._device):
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                run()
            torch.cuda.current_stream().wait_stream(self._stream)

    def record(self, run: Callable[[], object]) -> None:
        with torch.cuda.device(self._device), torch.cuda.graph(self._graph, pool=self._pool, stream=self._stream):
            run()

    def replay(self) -> None:
        self._graph.replay()


# By the kind of device.
RECORDERS: dict[str, Callable[[torch.device, Any], Recorder]] = {"cuda": _CudaGraph}


class CapturedStep:
    """A recorded step, as :func:`capture` returns it.

    Attributes:
        result: what ``step`` returned, its tensors detached. They hold the values of the last replay.
    """

    def __init__(self, recorder: Recorder, probe: Probe, parameters: list[nn.Parameter], result: Any) -> None:
        self.result = result
        self._recorder, self._probe = recorder, probe
        self._direction = probe.direction
        self._report = probe.unsettled_report()
        self._gradients: list[tuple[nn.Parameter, Tensor | None]] = [(p, p.grad) for p in parameters]
        self._replays = 0
        self._versions: dict[str, int] = {}

    def replay(self) -> Any:
        """Runs the step on what its inputs' memory holds now, and returns :attr:`result`. ``.grad`` is this step's gradient.

        Raises:
            RuntimeError: the probe's direction is another than when the step was recorded.
        """
        if self._probe.direction is not self._direction:
            raise RuntimeError(
                "direction: the step was recorded with another; copy new values into its tensors (copy_), or capture the step again"
            )
        self._recorder.replay()
        self._replays += 1
        for p, grad in self._gradients:
            p.grad = grad  # zero_grad() may have set it to None
        self._versions = self._report.versions()
        return self.result

    def report(self) -> Report:
        """The results of the last replay. The next one overwrites them: what is read of the report after that raises an error.

        Raises:
            RuntimeError: the step was not replayed yet.
        """
        if not self._replays:
            raise RuntimeError("no report: the step was recorded, but not replayed yet")
        mine = self._replays
        return self._report.reread(lambda: self._replays == mine, self._versions)


def capture(step: Callable[[], Any], probe: Probe, *, pool: Any = None) -> CapturedStep:
    """Records ``with probe: step()`` as a CUDA graph, which replays without the host's work::

        def step():
            losses = per_example_loss(model(x), y)
            losses.sum().backward()
            return losses

        captured = zerosum.capture(step, probe)
        for tokens, targets in batches:
            x.copy_(tokens)                  # the memory that the step reads
            y.copy_(targets)
            losses = captured.replay()       # .grad as always
            optimizer.step()
            print(captured.report())         # where it is wanted

    The step runs 2 to 16 times first, until nothing in it is proved any more. What it changes stays changed: running statistics,
    random numbers, and parameters if it has an optimizer in it. Gradients are set to None before each of these passes and before
    the recording, so a replay writes them and adds to none. Micro-batches whose gradients are to be added up belong into one step.

    Args:
        step: a forward and a backward pass, of tensors that stay where they are, under ``torch.autocast`` or not. It may scale the
            loss by a ``torch.amp.GradScaler``, and may call what PyTorch can record: no ``.item()``, no new shapes.
        probe: with ``every=1``, ``verify`` "once" or "never" and a ``loss_reduction`` that does not change. The step does not
            open it.
        pool: the memory pool of other graphs that never run at the same time, as ``torch.cuda.graph`` takes it.

    Raises:
        TypeError, ValueError: an argument is not of these; the message names it.
        RuntimeError: the step is proved in every pass, or waits for the device.
    """
    if not callable(step):
        raise TypeError(f"step: expected a function without arguments, got {type(step).__name__}")
    if not isinstance(probe, Probe):
        raise TypeError(f"probe: expected a zerosum.Probe, got {type(probe).__name__}")
    parameters = [p for p in probe.model.parameters() if p.requires_grad]
    devices = {p.device for p in parameters}
    if len(devices) != 1 or (device := next(iter(devices))).type not in RECORDERS:
        found = ", ".join(sorted(map(str, devices))) or "no parameters"
        raise ValueError(f"probe: expected a model whose trainable parameters are on one CUDA device, got {found}")
    probe.check_repeatable()

    result: Any = None

    def run() -> None:
        nonlocal result
        result = None  # which would keep the last pass's graph alive, and with it autograd's nodes of the parameters
        with probe:
            result = tree_map_only(Tensor, Tensor.detach, step())
            if not probe.measuring:
                raise ValueError("step: expected one that does not open the probe; capture does")

    recorder = RECORDERS[device.type](device, pool)
    steady = 0
    for _ in range(MOST_WARM_UPS):
        _without_gradients(parameters)
        recorder.warm_up(run)
        steady = 0 if probe.report().proof.proved else steady + 1
        if steady == STEADY:
            break
    else:
        raise RuntimeError(
            "step: it is proved in every pass, as rows in no regular order are (those of experts); "
            'expected a regular one, or Probe(verify="never")'
        )
    _without_gradients(parameters)
    try:
        recorder.record(run)
    except RuntimeError as error:
        raise RuntimeError(f"step: it cannot be recorded, as it waits for the device or calls what cannot be: {error}") from error
    return CapturedStep(recorder, probe, parameters, result)


def _without_gradients(parameters: list[nn.Parameter]) -> None:
    for p in parameters:
        p.grad = None
