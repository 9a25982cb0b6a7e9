"""Computes statistics of true per-token gradients: g_i is the gradient of one predicted token's loss.

Such a gradient reaches every earlier position. :func:`token_report` measures them, exactly or from a sample of tokens, at a small
fraction of the cost of one backward pass per token. ``passes`` contains the two passes over a sequence, ``cut`` finds the tensor at
which they meet, and ``sampling`` and ``report`` compute estimates.
"""

from zerosum.tokens.measure import token_report
from zerosum.tokens.report import ParameterEstimate, SampledReport

__all__ = ["ParameterEstimate", "SampledReport", "token_report"]
