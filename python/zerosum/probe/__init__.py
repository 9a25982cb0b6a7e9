"""Computes per-example gradient statistics of a training step.

Start reading at :mod:`~zerosum.probe.probe`, then :mod:`~zerosum.probe.capture`. To support a new operation, add a rule to
:mod:`~zerosum.probe.rules`.
"""

from zerosum.probe.capture import auxiliary, example_ids
from zerosum.probe.probe import Probe, check_direction
from zerosum.probe.report import Coverage, ParameterReport, Report
from zerosum.probe.rules import rule

__all__ = ["Coverage", "ParameterReport", "Probe", "Report", "auxiliary", "check_direction", "example_ids", "rule"]
