"""AdamW and Muon over learning rates: the runs, the tables and the figure of ``docs/muon.md``.

``python -m benchmarks.muon`` trains every run in ``runs/muon`` (the same command goes on with what is left), measures them, and
writes ``benchmarks/results/muon.json``, ``docs/assets/muon.png`` and the tables of the page.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from zerosum import tables
from zerosum.changes import between
from zerosum.curves import CurveError
from zerosum.deceleration import fit
from zerosum.files import replace_text
from zerosum.plots.axes import GREY, Entry, interference_axis, legend, panels, save, styles, value_axis
from zerosum.records import Curve, curve
from zerosum.training.comparison import FIRST, mean_and_error
from zerosum.training.data import Corpus, standard_library
from zerosum.training.demo import demo
from zerosum.training.loop import Settings, held_out_batch
from zerosum.training.model import GPT
from zerosum.training.run import KEPT

ROOT = Path(__file__).parents[1]
RESULTS, PAGE, PICTURE = ROOT / "benchmarks/results/muon.json", ROOT / "docs/muon.md", ROOT / "docs/assets/muon.png"
OPTIMIZERS = ("adamw", "muon")
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
SEEDS = 3
STEPS, EARLY = 1500, 133  # the last step, and an early one that is measured
SIZES = {"width": 32, "layers": 2, "sequences": 16, "positions": 64}
TITLES = {"adamw": "AdamW", "muon": "Muon"}

Row = dict[str, Any]  # what was measured of one run, by the names of ``QUANTITIES``; None where there is nothing


class Quantity(NamedTuple):
    """Its head in the tables, its title and unit in the figure, and the figure's axis: log, linear, or spaced by log(1 − D)."""

    head: str
    title: str
    unit: str
    scale: str


QUANTITIES = {
    "early_loss": Quantity(f"loss, step {EARLY}", f"Held-out loss at step {EARLY}", "nats per byte", "log"),
    "loss": Quantity(f"loss, step {STEPS}", f"Held-out loss at step {STEPS}", "nats per byte", "log"),
    "L_d": Quantity("L_d", "Loss at the deceleration, L_d", "nats per byte", "log"),
    "t_d": Quantity("t_d", "Step of the deceleration, t_d", "steps", "log"),
    "r_d": Quantity("r_d", "Slope after it, r_d", "no unit", "linear"),
    "D_grad": Quantity("D_grad", "D of the tokens' gradients", "no unit", "interference"),
    "D_step": Quantity("D, Δt = 1", "D of loss changes, Δt = 1", "no unit", "interference"),
    "M_step": Quantity("M, Δt = 1", "M of loss changes, Δt = 1", "nats", "log"),
    "D_double": Quantity("D, Δt = t", "D of loss changes, Δt = t", "no unit", "interference"),
    "M_double": Quantity("M, Δt = t", "M of loss changes, Δt = t", "nats", "log"),
}
LOSSES, INTERFERENCE = list(QUANTITIES)[:5], list(QUANTITIES)[5:]


def settings(optimizer: str, rate: float, seed: int) -> Settings:
    return Settings(steps=STEPS, seed=seed, learning_rate=rate, optimizer=optimizer, **SIZES)


def measure(folder: Path, run: Settings, corpus: Corpus) -> Row:
    """One run's numbers, from its records and its checkpoints.

    D and M of Δt = 1 are means over the measured steps of the last doubling; those of Δt = t are of the doubling itself.
    """
    with (folder / "metrics.jsonl").open(encoding="utf-8") as file:
        records = [json.loads(line) for line in file]
    train, held_out, d_grad = (
        curve(records, *of) for of in (("step", "train.loss"), ("probe", "held_out.loss"), ("probe", "tokens.D_grad"))
    )
    at = dict(zip(held_out.steps.tolist(), held_out.values.tolist(), strict=True))
    row: Row = {"optimizer": run.optimizer, "rate": run.learning_rate, "seed": run.seed}
    row |= {"early_loss": at[EARLY], "loss": at[STEPS]} | _deceleration(train)
    row |= {"D_grad": float(d_grad.values[-1]), "D_grad_null": float(d_grad.nulls[-1]), "D_grad_n": d_grad.n}
    d, m = (curve(records, "probe", f"held_out.{key}") for key in ("D", "M"))
    late = d.steps >= STEPS // 2
    row |= {"D_step": float(d.values[late].mean()), "D_step_null": float(d.nulls[late].mean()), "D_step_n": d.n}
    row["M_step"] = float(m.values[late].mean())
    model = GPT(run.model)
    before, after = (
        torch.load(folder / KEPT / f"step-{step:06d}.pt", weights_only=True)["state"]["model"] for step in (STEPS // 2, STEPS)
    )
    changes = between(model, before, after, *held_out_batch(corpus, run)).metrics
    d_double, m_double = changes["interval.D"], changes["interval.M"]
    return row | {"D_double": d_double.value, "D_double_null": d_double.null, "M_double": m_double.value}


def _deceleration(loss: Curve) -> Row:
    try:
        found = fit(loss.steps, loss.values, first=FIRST, bootstrap=0)
    except CurveError as error:
        return {"verdict": str(error), "L_d": None, "t_d": None, "r_d": None}
    return {"verdict": found.verdict} | {key: getattr(found, key) if found.found else None for key in ("L_d", "t_d", "r_d")}


def chosen(rows: Sequence[Row], optimizer: str, rate: float) -> list[Row]:
    """The seeds of one optimizer and rate."""
    return [row for row in rows if (row["optimizer"], row["rate"]) == (optimizer, rate)]


def rates(rows: Sequence[Row], optimizer: str) -> list[float]:
    return sorted({row["rate"] for row in rows if row["optimizer"] == optimizer})


def values(rows: Sequence[Row], quantity: str) -> list[float]:
    """Those of a quantity that are there."""
    return [row[quantity] for row in rows if row[quantity] is not None]


def best(rows: Sequence[Row], optimizer: str) -> float:
    """The rate with the lowest mean loss at the last step."""
    return min(rates(rows, optimizer), key=lambda rate: np.mean(values(chosen(rows, optimizer, rate), "loss")))


def page_tables(rows: Sequence[Row]) -> str:
    """Losses and decelerations; interference; and the differences between the optimizers, seed by seed."""
    head = ["optimizer", "learning rate", "seeds"]
    losses = [[*head, *(QUANTITIES[key].head for key in LOSSES), "decelerate"]]
    changes = [[*head, *(QUANTITIES[key].head for key in INTERFERENCE)]]
    for optimizer in OPTIMIZERS:
        for rate in rates(rows, optimizer):
            seeds = chosen(rows, optimizer, rate)
            named = [TITLES[optimizer], f"{rate:g}", str(len(seeds))]
            losses.append([*named, *(mean_and_error(values(seeds, key), ".4g") for key in LOSSES), str(len(values(seeds, "L_d")))])
            changes.append([*named, *(mean_and_error(values(seeds, key), ".4g") for key in INTERFERENCE)])
    nulls = [
        "random signs",
        "",
        "",
        *("" if key[0] == "M" else f"{np.mean(values(rows, f'{key}_null')):.3f}" for key in INTERFERENCE),
    ]
    changes.append(nulls)
    return "\n\n".join(tables.markdown(cells, left=2) for cells in (losses, changes, differences(rows)))


def differences(rows: Sequence[Row]) -> list[list[str]]:
    """Muon less AdamW, the mean over seeds, which have the same first weights and batches, with its standard error: at equal rates,
    and each at its best one."""
    keys = ["early_loss", "loss", *INTERFERENCE]
    cells = [["Muon − AdamW, at", "seeds", *(QUANTITIES[key].head for key in keys)]]
    muon, adamw = (best(rows, optimizer) for optimizer in reversed(OPTIMIZERS))
    pairs = [(f"{rate:g} both", rate, rate) for rate in rates(rows, "muon") if rate in rates(rows, "adamw")]
    for name, a_rate, b_rate in [*pairs, (f"the best rates, {muon:g} and {adamw:g}", muon, adamw)]:
        others = {row["seed"]: row for row in chosen(rows, "adamw", b_rate)}
        paired = [(row, others[row["seed"]]) for row in chosen(rows, "muon", a_rate) if row["seed"] in others]
        cells.append(
            [
                name,
                str(len(paired)),
                *(mean_and_error([m[key] - a[key] for m, a in paired], ".4g").replace("-", "−") for key in keys),
            ]
        )
    return cells


def picture(rows: Sequence[Row]) -> Figure:
    """Every quantity against the learning rate: each seed a small mark, and the mean with its standard error."""
    figure, grid = panels(2, 5, 16.5, 6.0)
    shown = [axes for row in grid for axes in row]
    for axes, (key, quantity) in zip(shown, QUANTITIES.items(), strict=True):
        for optimizer, style in zip(OPTIMIZERS, styles(len(OPTIMIZERS)), strict=True):
            seeds = {rate: chosen(rows, optimizer, rate) for rate in rates(rows, optimizer)}
            groups = {rate: found for rate, of in seeds.items() if (found := values(of, key))}
            for rate, found in groups.items():
                axes.plot([rate] * len(found), found, "_", color=style.color, markersize=7, alpha=0.6)
            if groups:
                means, errors = zip(*(_mean(found) for found in groups.values()), strict=True)
                axes.errorbar(list(groups), means, errors, color=style.color, marker=style.marker, markersize=5, capsize=3)
            if has_null := f"{key}_null" in rows[0]:
                nulls = [np.mean(values(of, f"{key}_null")) for of in seeds.values()]
                axes.plot(list(seeds), nulls, "--", color=style.color, linewidth=1.2, alpha=0.8)
        every = np.array(values(rows, key) + (values(rows, f"{key}_null") if has_null else []))
        if quantity.scale == "interference":
            interference_axis(axes, every, "")
        elif quantity.scale == "log":
            value_axis(axes, every)
        axes.set_xscale("log")
        axes.set_xticks(RATES, [f"{rate:g}" for rate in RATES])
        axes.minorticks_off()
        axes.set_title(quantity.title, fontsize=10, loc="left")
        axes.set_ylabel(quantity.unit, fontsize=9)
    for axes in grid[1]:
        axes.set_xlabel("learning rate")
    entries = [
        Entry(Line2D([], [], color=style.color, marker=style.marker), TITLES[optimizer])
        for optimizer, style in zip(OPTIMIZERS, styles(len(OPTIMIZERS)), strict=True)
    ]
    bars = Line2D([], [], color=GREY, marker="_", linestyle="none")
    null = Line2D([], [], color=GREY, linestyle="--")
    entries += [
        Entry(bars, "a seed; the lines are means over seeds ± one standard error"),
        Entry(null, "what random signs would give (null)"),
    ]
    legend(figure, entries)
    return figure


def _mean(found: Sequence[float]) -> tuple[float, float]:
    return float(np.mean(found)), float(np.std(found, ddof=1)) / math.sqrt(len(found)) if len(found) > 1 else 0.0


def replaced(page: str, found: str) -> str:
    """The page with other tables."""
    return re.sub(r"(<!-- tables -->\n).*?(<!-- end of tables -->)", lambda m: f"{m[1]}\n{found}\n\n{m[2]}", page, flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.muon", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/muon"), help="folder of the runs (%(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    corpus = Corpus.read(standard_library())
    rows = []
    for optimizer in OPTIMIZERS:
        for rate in RATES:
            folder = options.out / f"{optimizer}-{rate:g}"
            if ended := demo(settings(optimizer, rate, 0), out=folder, keep_checkpoints=True, seeds=SEEDS):
                raise SystemExit(ended)
            rows += [measure(folder / f"seed-{seed}", settings(optimizer, rate, seed), corpus) for seed in range(SEEDS)]
    about = {"torch": torch.__version__, "text": corpus.digest, "steps": STEPS, **SIZES}
    replace_text(RESULTS, json.dumps({"about": about, "runs": rows}, indent=1) + "\n")
    PICTURE.parent.mkdir(exist_ok=True)
    save(picture(rows), PICTURE)
    replace_text(PAGE, replaced(PAGE.read_text(encoding="utf-8"), page_tables(rows)))


if __name__ == "__main__":
    main()
