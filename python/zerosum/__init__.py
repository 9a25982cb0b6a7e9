"""Measures zero-sum learning while a model trains.

- :class:`Probe` computes per-example gradient statistics of a real training step.
- :func:`token_report` computes the same statistics with every token's loss as an example.
- :mod:`~zerosum.changes` measures how an update changes the losses.
- :mod:`~zerosum.deceleration` fits loss curves and locates where the loss decelerates.
- :mod:`~zerosum.weights` and :class:`Factors` let a training step use the statistics.

The metrics are defined in :mod:`zerosum.metrics`; the kernels are in :mod:`zsl_kernels`. For the command line, run
``zerosum --help``.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zerosum import changes, deceleration, weights
    from zerosum.factors import Factors
    from zerosum.grams import gram_between
    from zerosum.graphs import CapturedStep, capture
    from zerosum.probe import Coverage, ParameterReport, Probe, Report, auxiliary, example_ids, rule
    from zerosum.probe.stored import ReportSum, load_report, merge
    from zerosum.sketches import Sketch
    from zerosum.tokens import SampledReport, token_report
    from zsl_kernels import __version__

__all__ = [
    "CapturedStep",
    "Coverage",
    "Factors",
    "ParameterReport",
    "Probe",
    "Report",
    "ReportSum",
    "SampledReport",
    "Sketch",
    "__version__",
    "auxiliary",
    "capture",
    "changes",
    "deceleration",
    "example_ids",
    "gram_between",
    "load_report",
    "merge",
    "rule",
    "token_report",
    "weights",
]

# A name is imported when it is first used. The command line is in this package, too: before it imports torch, which takes seconds,
# it sets up what Ctrl-C does then.
_NAMES = {
    "factors": "Factors",
    "grams": "gram_between",
    "graphs": "CapturedStep capture",
    "probe": "Coverage ParameterReport Probe Report auxiliary example_ids rule",
    "probe.stored": "ReportSum load_report merge",
    "sketches": "Sketch",
    "tokens": "SampledReport token_report",
}
_MODULES = {name: f"{__name__}.{module}" for module, names in _NAMES.items() for name in names.split()}
_MODULES["__version__"] = "zsl_kernels"


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        globals()[name] = found = getattr(import_module(_MODULES[name]), name)
        return found
    missing = AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name)
    if name.startswith("__"):
        raise missing
    try:
        return import_module(f"{__name__}.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"{__name__}.{name}":
            raise
    raise missing


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
