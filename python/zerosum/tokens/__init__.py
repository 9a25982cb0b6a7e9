"""The true per-token gradient: g_i is the gradient of one predicted token's loss, which reaches every earlier position.

:func:`token_report` measures it, exactly or from a sample of tokens, at a small fraction of the cost of one backward pass for each
token. ``passes`` has the two passes over a sequence, ``cut`` finds where they meet, ``sampling`` and ``report`` estimate.
"""

from zerosum.tokens.measure import token_report
from zerosum.tokens.report import ParameterEstimate, SampledReport

__all__ = ["ParameterEstimate", "SampledReport", "token_report"]
