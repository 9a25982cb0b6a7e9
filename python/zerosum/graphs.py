"""Records probed steps as CUDA graphs, which replay without work on the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from zerosum.probe import Probe, Report

# The proof of a structure with few examples takes several passes. A step that needs more passes than this is proved in every pass.
MOST_WARM_UPS = 16
# Passes without a proof before the recording: in the first, libraries choose algorithms and allocate memory.
STEADY = 2


class Recorder(Protocol):
    """The interface of objects that record a device's work."""

    def warm_up(self, run: Callable[[], object]) -> None:
        """Run the step in the way in which it will be recorded."""

    def record(self, run: Callable[[], object]) -> None:
        """Run the step once, and keep the work that it gives the device. The device may or may not do this work now."""

    def replay(self) -> None:
        """Repeat the recorded work on the same memory."""


class _CudaGraph:
    def __init__(self, device: torch.device, pool: Any) -> None:
        self._device, self._pool = device, pool
        self._graph = torch.cuda.CUDAGraph()
        # All passes use one stream: work on the default stream cannot be recorded, and autograd's nodes stay on the stream of their
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


# By device type.
RECORDERS: dict[str, Callable[[torch.device, Any], Recorder]] = {"cuda": _CudaGraph}


class CapturedStep:
    """A recorded step, as :func:`capture` returns it.

    Attributes:
        result: what ``step`` returned, with its tensors detached. They hold the values of the last replay.
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
        """Run the step on the current content of its inputs' memory, and return :attr:`result`. ``.grad`` is this step's gradient.

        Raises:
            RuntimeError: the probe's direction has changed since the recording.
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
        """Return the results of the last replay. The next replay overwrites them: later reads of this report raise an error.

        Raises:
            RuntimeError: the step was not replayed yet.
        """
        if not self._replays:
            raise RuntimeError("no report: the step was recorded, but not replayed yet")
        mine = self._replays
        return self._report.reread(lambda: self._replays == mine, self._versions)


def capture(step: Callable[[], Any], probe: Probe, *, pool: Any = None) -> CapturedStep:
    """Record ``with probe: step()`` as a CUDA graph, which replays without work on the host::

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

    The step first runs 2 to 16 times, until no pass needs a proof any more. Its side effects remain: changes of running statistics,
    random numbers, and of parameters if it contains an optimizer. Gradients are set to None before each of these passes and before
    the recording, so a replay overwrites gradients and never adds to them. Put micro-batches whose gradients add up into one step.

    Args:
        step: a forward and a backward pass on tensors that keep their memory, with or without ``torch.autocast``. It may scale the
            loss by a ``torch.amp.GradScaler``, and may call anything that PyTorch can record: no ``.item()``, no new shapes.
        probe: a probe with ``every=1``, ``verify`` "once" or "never", and a constant ``loss_reduction``. The step must not enter
            it.
        pool: the memory pool of other graphs that never run at the same time, as in ``torch.cuda.graph``.

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it.
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
        result = None  # otherwise it keeps the last pass's graph alive, and with it autograd's nodes of the parameters
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
