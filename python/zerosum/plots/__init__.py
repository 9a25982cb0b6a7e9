"""Figures: functions from a run's records, or from several runs, to matplotlib figures. Null lines, what random signs would give,
are dashed.

``run`` has the demo's figures of one run; ``paper`` those of Mircea et al. (2025) of one run or several; ``axes`` what figures
share. Needs matplotlib, which ``pip install 'zsl_kernels[demo]'`` brings. No display is used.
"""

from zerosum.plots import paper
from zerosum.plots.axes import save
from zerosum.plots.run import FIGURES, decomposition, loss, loss_interference, write

__all__ = ["FIGURES", "decomposition", "loss", "loss_interference", "paper", "save", "write"]
