"""The study of docs/muon.md: what it measures of a run, its tables, and that the page has those of the results."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("scipy")
pytest.importorskip("tqdm")

from benchmarks import muon
from zerosum.changes import between
from zerosum.checkpoints import find
from zerosum.metrics import Metric
from zerosum.records import encode, record
from zerosum.training.data import Corpus
from zerosum.training.demo import demo
from zerosum.training.loop import Trainer, held_out_batch


def rows() -> list[muon.Row]:
    """Made-up runs of two rates and three seeds; Muon is 0.1 better, and of one seed no deceleration was found."""
    found = []
    for optimizer, better in (("adamw", 0.0), ("muon", 0.1)):
        for rate, worse in ((0.01, 0.0), (0.03, 0.3)):
            for seed, shift in enumerate((0.0, 0.01, 0.05)):
                loss = 2 + worse + 10 * shift - better - shift * better
                row = {name: 0.5 + shift for name in muon.QUANTITIES} | {
                    f"{key}_null": 0.9 for key in ("D_grad", "D_step", "D_double")
                }
                row |= {"optimizer": optimizer, "rate": rate, "seed": seed, "loss": loss, "verdict": ""}
                if optimizer == "muon" and seed == 2:
                    row |= dict.fromkeys(("L_d", "t_d", "r_d"))
                found.append(row)
    return found


def test_the_page_has_the_tables_of_the_results() -> None:
    page = muon.PAGE.read_text(encoding="utf-8")
    results = json.loads(muon.RESULTS.read_text(encoding="utf-8"))
    assert "| AdamW |" in page
    assert muon.replaced(page, muon.page_tables(results["runs"])) == page
    assert "python -m benchmarks.muon" in page
    assert f"({muon.PICTURE.relative_to(muon.PAGE.parent)})" in page
    assert results["about"]["steps"] == muon.STEPS


def test_tables_have_means_errors_and_numbers_of_seeds() -> None:
    losses, changes, paired = muon.page_tables(rows()).split("\n\n")
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in losses.splitlines()]
    line = dict(zip(cells[0], cells[4], strict=True))  # Muon at 0.01
    assert (line["optimizer"], line["learning rate"], line["seeds"], line["decelerate"]) == ("Muon", "0.01", "3", "2")
    mean, error = (float(x) for x in line["loss, step 1500"].split(" ± "))
    each = np.array([1.9, 1.999, 2.395])
    assert mean == pytest.approx(each.mean(), abs=0.01)
    assert error == pytest.approx(each.std(ddof=1) / math.sqrt(3), rel=0.05)
    assert line["L_d"] == "0.5050 ± 0.0050"
    assert changes.splitlines()[-1].startswith("| random signs |  |  | 0.900 | 0.900 |  |")
    difference = [cell.strip() for cell in paired.splitlines()[-1].split("|")[1:-1]]
    assert difference[:2] == ["the best rates, 0.01 and 0.01", "3"]
    # Paired by seed: the seeds' own spread, which is a hundred times as large, is not in the error.
    assert difference[3] == "−0.1020 ± 0.0015"


def test_the_figure_has_every_quantity_with_both_optimizers(tmp_path: Path) -> None:
    figure = muon.picture(rows())
    assert [axes.get_title(loc="left") for axes in figure.axes] == [quantity.title for quantity in muon.QUANTITIES.values()]
    for axes in figure.axes:
        assert len(axes.containers) == 2
        low, high = axes.get_ylim()
        assert all(low < y < high for line in axes.lines for y in line.get_ydata())
    muon.save(figure, tmp_path / "figure.png")


def test_a_run_is_measured_from_its_records_and_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(muon, "STEPS", 6)
    monkeypatch.setattr(muon, "EARLY", 2)
    monkeypatch.setattr(muon, "SIZES", {"width": 32, "layers": 1, "sequences": 4, "positions": 16})
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 60)
    run, corpus = muon.settings("muon", 0.01, 3), Corpus.read([text])
    assert demo(run, [text], tmp_path / "run", keep_checkpoints=True) == 0
    row = muon.measure(tmp_path / "run", run, corpus)
    entries = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    probes = {entry["step"]: entry["metrics"] for entry in entries if entry["kind"] == "probe"}
    assert (row["optimizer"], row["rate"], row["seed"]) == ("muon", 0.01, 3)
    assert row["early_loss"] == probes[2]["held_out.loss"]["value"]
    assert row["loss"] == probes[6]["held_out.loss"]["value"]
    assert row["D_grad"] == probes[6]["tokens.D_grad"]["value"]
    assert row["D_step"] == pytest.approx(np.mean([probes[step]["held_out.D"]["value"] for step in (3, 4, 6)]))
    assert row["M_step"] == pytest.approx(np.mean([probes[step]["held_out.M"]["value"] for step in (3, 4, 6)]))
    trainer = Trainer(run, corpus)
    assert all(torch.equal(a, b) for a, b in zip(trainer.held_out, held_out_batch(corpus, run), strict=True))
    kept = {checkpoint.step: checkpoint.load().model.state_dict() for checkpoint in find(tmp_path / "run").checkpoints}
    changes = between(trainer.model, kept[3], kept[6], *trainer.held_out).metrics
    assert row["D_double"] == pytest.approx(changes["interval.D"].value, rel=1e-6)
    assert row["M_double"] == pytest.approx(changes["interval.M"].value, rel=1e-6)
    assert row["L_d"] is None
    assert "too short" in row["verdict"]


def test_the_deceleration_of_a_run_is_its_fit(tmp_path: Path) -> None:
    steps = np.arange(1, 1501.0)
    losses = 5 * np.where(steps < 400, steps**-0.3, 400**-0.3 * (steps / 400) ** -0.05)
    entries = [record("step", int(step), {"train.loss": Metric(float(loss), 64)}) for step, loss in zip(steps, losses, strict=True)]
    found = muon._deceleration(muon.curve([json.loads(encode(entry)) for entry in entries], "step", "train.loss"))
    assert found["verdict"].startswith("deceleration")
    assert found["L_d"] == pytest.approx(5 * 400**-0.3, rel=0.03)
    assert found["r_d"] == pytest.approx(0.05, abs=0.01)
