"""Zero-sum learning, measured while a model trains: :class:`Probe` takes per-example gradient statistics of a real training step,
and :func:`token_report` those of every token's own loss. :mod:`~zerosum.changes` has loss changes, :mod:`~zerosum.deceleration`
fits of loss curves. :mod:`~zerosum.weights` and :class:`Factors` put statistics to use in the step itself.

The mathematics is in :mod:`zerosum.metrics`, the kernels in :mod:`zsl_kernels`. On the command line: ``zerosum --help``.
"""

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
