"""Zero-sum learning, measured while a model trains: :class:`Probe` takes per-example gradient statistics of a real training step.

The mathematics is in :mod:`zerosum.metrics`, the kernels in :mod:`zsl_kernels`. On the command line: ``zerosum --help``.
"""

from zerosum.capture import example_ids
from zerosum.probe import Probe
from zerosum.report import Coverage, ParameterReport, Report

__all__ = ["Coverage", "ParameterReport", "Probe", "Report", "example_ids"]
