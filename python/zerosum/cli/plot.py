"""``zerosum plot``: draws the paper's figures for one or several runs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from zerosum.cli.arguments import add_command, failed, missing, positive, refuse
from zerosum.plots import paper
from zerosum.runs import read_runs
from zerosum.terminal import shown

DESCRIPTION = """\
Draws the figures of the paper on zero-sum learning, with all the runs in each of them.

{figures}

A RUN is a folder of `zerosum demo`, or a folder of such folders, a file of `zerosum measure`,
or a loss curve: CSV, JSON lines, NumPy or TensorBoard, which the loss figure alone can use.
A folder of `zerosum demo --seeds` is one run: the mean over its seeds, in a band of ± one
standard error. Dashed lines are what random signs would give. Each panel says what it is over; runs that
differ in that are told apart. What a run lacks is said, and the rest of it is drawn.
""".format(figures="\n".join(f"  {name:<14} {figure.shows}" for name, figure in paper.FIGURES.items()))

EXAMPLES = """\
examples:
  zerosum plot runs/demo-1a2b3c4d
  zerosum plot 14M.jsonl 78M.jsonl 285M.jsonl --out figures
  zerosum plot runs/a runs/b --labels "plain AdamW" "with Muon" --figures loss plane
  zerosum plot loss.csv --figures loss --format svg
"""


def add(commands: Any) -> None:
    parser = add_command(commands, "plot", run, "draw the figures of one run or several", DESCRIPTION, EXAMPLES)
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder, a file of records, or a loss curve")
    add("--out", type=Path, default=Path("figures"), metavar="DIR", help="folder of the figures (%(default)s)")
    add(
        "--figures", nargs="+", choices=paper.FIGURES, default=tuple(paper.FIGURES), metavar="NAME", help="which of the above (all)"
    )
    add("--format", nargs="+", choices=("png", "svg"), default=("png", "svg"), metavar="KIND", help="png, svg or both (both)")
    add("--labels", nargs="+", default=(), metavar="LABEL", help="a name for each RUN (what its file says)")
    add("--first", type=positive, default=100.0, metavar="STEP", help="fit the loss of later steps than this (100)")
    add("--smoothed", action="store_true", help="the loss curves are moving averages already")
    add("--step", metavar="COLUMN", help="the column of a loss curve's steps (the obvious one)")
    add("--loss", metavar="COLUMN", help="the column, or TensorBoard's tag, of its losses (the obvious one)")


def run(options: argparse.Namespace) -> int:
    if absent := missing("matplotlib", "scipy"):
        return refuse("plot", absent)
    try:
        chosen = {"smoothed": options.smoothed, "step": options.step, "loss": options.loss}
        runs, notes = read_runs(options.runs, options.labels, **chosen)
        options.out.mkdir(parents=True, exist_ok=True)
    except (ValueError, ModuleNotFoundError) as error:
        return refuse("plot", str(error))
    except OSError as error:
        return refuse("plot", f"--out: cannot use {options.out}: {error.strerror or error}")
    for note in notes:
        print(f"zerosum plot: {shown(note)}", file=sys.stderr)
    print("Runs: " + ", ".join(shown(run.name) for run in runs))
    written = []
    for name in dict.fromkeys(options.figures):
        try:
            paths = paper.write(runs, options.out, [name], tuple(dict.fromkeys(options.format)), options.first)
        except OSError as error:
            return failed("plot", error)
        written += paths
        print(f"{name:<14} {', '.join(map(shown, paths)) or 'left out'}")
        for run in runs:
            if lacking := paper.lacking(name, run):
                where = "is in part of it" if paper.drawable(name, run) else "is not in it"
                print(f"{'':<14}   {shown(run.name)} {where}: no {', '.join(lacking)}")
    if not written:
        print("zerosum plot: no run has what any of these figures needs", file=sys.stderr)
        return 1
    return 0
