"""One rule for each operation that uses a parameter. To cover another: write a module with a ``rule`` and enter it here.

A rule gets the capture and the call's arguments. It returns the instrumented call's result, or None to leave the call alone, in
which case a differentiable use of a tracked parameter is reported as not covered.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F

from zerosum.layers import linear

RULES: dict[Callable[..., Any], Callable[..., Any]] = {
    F.linear: linear.rule,
}
