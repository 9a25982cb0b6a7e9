"""Callbacks that measure optimizer steps of other libraries' training loops.

:mod:`zerosum.integrations.transformers` and :mod:`zerosum.integrations.lightning` each have a ``ZeroSumCallback``.
Neither library is imported before its module is.
"""
