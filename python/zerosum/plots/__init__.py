"""Draws figures: functions that turn the records of one or several runs into matplotlib figures.

Dashed null lines show what random signs would give. ``run`` has the demo's figures of one run. ``paper`` has the figures of Mircea
et al. (2025) of one or several runs. ``axes`` has the parts that figures share. Needs matplotlib (``pip install
'zsl_kernels[demo]'``), but no display.
"""

from zerosum.plots import paper
from zerosum.plots.axes import save
from zerosum.plots.run import FIGURES, decomposition, loss, loss_interference, write

__all__ = ["FIGURES", "decomposition", "loss", "loss_interference", "paper", "save", "write"]
