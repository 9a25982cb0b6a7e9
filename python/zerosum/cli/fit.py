"""``zerosum fit``: finds where loss curves decelerate."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from zerosum import tables
from zerosum.cli.arguments import add_command, missing, positive, refuse, whole
from zerosum.curves import CurveError, read_curve
from zerosum.deceleration import HEAD, LEVEL, Deceleration, fit
from zerosum.files import parse, read_bytes, replace_text
from zerosum.records import finite
from zerosum.terminal import shown

DESCRIPTION = """\
Fits a broken power law to each loss curve: two straight lines on log-log axes that meet at
step t_d and loss L_d, after which the loss falls as t^-r_d. Says how well each number is
known, and "no break found" where two lines are not surely better than one.

A CURVE is a .csv, .tsv, .jsonl, .json, .npy or .npz file, a run's folder or its metrics.jsonl,
trainer_state.json of transformers, or TensorBoard's event file or the folder of it. The columns
called step and loss, or the like, are found; --step and --loss name others.

Losses of single batches are averaged over a window of a sixth of the steps before (so t_d
comes some 9 % late, as in published fits), then thinned; --smoothed takes every row as it is.
"""

EXAMPLES = """\
examples:
  zerosum fit runs/demo-1a2b3c4d
  zerosum fit small.csv large.csv --step iteration --loss lm_loss --json fits.json
  zerosum fit lightning_logs/version_0 --loss train/loss
  zerosum fit validation.csv --smoothed --final 1000000

columns of the table:
  L_d, t_d, r_d   loss and step where the two lines meet, and the slope after; ± one
                  standard error
  L̂_T, L_T        the loss that the second line predicts for the last step (or --final),
                  and the last one of the curve
  RSLE            root mean squared error of ln L
  n               points that were fitted; losses that are averaged err together, which the
                  errors and the verdict take into account

exit code: 0 fitted, whatever was found; 2 a curve cannot be used, and nothing is written.
"""


def add(commands: Any) -> None:
    parser = add_command(commands, "fit", run, "find where a loss curve decelerates", DESCRIPTION, EXAMPLES)
    add = parser.add_argument
    add("curves", nargs="+", type=Path, metavar="CURVE", help="a file with steps and losses")
    add("--step", metavar="COLUMN", help="the column of the steps; keys of nested JSON are joined by dots (the obvious one)")
    add("--loss", metavar="COLUMN", help="the column, or TensorBoard's tag, of the losses (the obvious one)")
    add("--smoothed", action="store_true", help="the losses are averages already: take every row as it is")
    add("--last-of-repeats", action="store_true", help="where steps go back, as after a restart, keep what was written last")
    add(
        "--first", type=whole(0), default=100, metavar="STEP", help="fit only steps after this one: after the warm-up (%(default)s)"
    )
    add("--final", type=positive, metavar="STEP", help="the step to predict the loss of (the curve's last)")
    add("--bootstrap", type=whole(0), default=200, metavar="N", help="resamples behind the intervals in --json (%(default)s)")
    add("--seed", type=whole(0), default=0, metavar="N", help="fixes the resamples (%(default)s)")
    add("--json", type=Path, metavar="OUT", help="write every number here, with errors and intervals")


def run(options: argparse.Namespace) -> int:
    if absent := missing("scipy"):
        return refuse("fit", absent)
    fits: dict[str, Deceleration] = {}
    try:
        if options.json:
            _check_output(options.json)
        for path in options.curves:
            steps, losses = read_curve(path, step=options.step, loss=options.loss, last_of_repeats=options.last_of_repeats)
            names = ("smoothed", "first", "final", "bootstrap", "seed")
            try:
                fits[str(path)] = fit(steps, losses, **{name: getattr(options, name) for name in names})
            except CurveError as error:
                raise CurveError(f"{path}: {error}") from None
        if options.json:
            _write(options.json, fits, options.bootstrap)
    except (CurveError, ModuleNotFoundError) as error:
        return refuse("fit", str(error))
    except OSError as error:
        return refuse("fit", f"--json: cannot write {options.json}: {error.strerror or error}")
    print(tables.text([["curve", *HEAD], *([name, *found.cells()] for name, found in fits.items())]))
    print()
    for name, found in fits.items():
        print(f"{shown(name)}: {found.verdict}." if len(fits) > 1 else f"{found.verdict[0].upper()}{found.verdict[1:]}.")
    return 0


def _check_output(path: Path) -> None:
    """Refuse to replace a file that no fit wrote: ``--json a.csv b.csv`` would overwrite a.csv.

    Raises:
        CurveError: the file holds something else.
    """
    try:
        content = parse(read_bytes(path))
    except FileNotFoundError:
        return
    except ValueError:
        content = None
    if not isinstance(content, dict) or not {"interval_level", "curves"} <= content.keys():
        raise CurveError(f"--json: {path} has something else in it than fits; choose another file")


def _write(path: Path, fits: Mapping[str, Deceleration], bootstrap: int) -> None:
    curves = {name: finite(asdict(found) | {"d1": found.d1}) for name, found in fits.items()}
    content = {"interval_level": LEVEL if bootstrap else None, "curves": curves}
    replace_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
