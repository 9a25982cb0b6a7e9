"""The plots: every curve named with its examples, its null dashed, axes with units; and nothing that breaks on odd runs."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from matplotlib.figure import Figure

from tests.zerosum.test_training import run_records
from zerosum import plots
from zerosum.records import Record


@pytest.fixture
def records() -> list[Record]:
    return run_records((0.2, 0.6), (0.1, 0.5))


def labels(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_loss(records: list[Record]) -> None:
    figure = plots.loss(records)
    (axes,) = figure.axes
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert "nats per byte" in axes.get_ylabel()
    assert labels(figure)[:3] == [
        "training batch (N = 64 tokens)",
        "training batch, log moving average",
        "held-out text (N = 64 tokens)",
    ]
    assert labels(figure)[3:] == ["steepest half decade: slope −0.40", "last half decade: slope −0.10"]


def test_loss_interference(records: list[Record]) -> None:
    figure = plots.loss_interference(records)
    left, right = figure.axes
    assert [line.get_linestyle() for line in left.lines] == ["-", "--", "-", "--"]
    assert set(left.lines[1].get_ydata()) == {0.9}
    assert labels(figure) == [
        "training batch (N = 64 tokens)",
        "training batch, random signs",
        "held-out text (N = 64 tokens)",
        "held-out text, random signs",
    ]
    assert len({line.get_color() for line in right.lines}) == 2
    assert "nats" in right.get_ylabel()


def test_decomposition(records: list[Record]) -> None:
    figure = plots.decomposition(records)
    assert [axes.get_ylabel().split(" along")[0] for axes in figure.axes] == ["C_g", "C_uG / C_ug", "D_grad"]
    for axes, null in zip(figure.axes, (0.3, 0.8, 0.7), strict=True):
        measured, dashed = axes.lines
        assert dashed.get_linestyle() == "--"
        assert dashed.get_ydata() == pytest.approx(null)
        assert measured.get_color() == dashed.get_color()
    assert labels(figure)[0] == "training batch (N = 4 sequences)"


def test_legends_lie_outside_the_panels(records: list[Record]) -> None:
    for draw in plots.FIGURES.values():
        figure = draw(records)
        figure.savefig("/dev/null", format="png")  # lays it out
        legend = figure.legends[0].get_window_extent()
        assert legend.x0 >= 0
        assert legend.x1 <= figure.bbox.x1
        assert all(legend.y1 <= axes.get_window_extent().y0 for axes in figure.axes)


@pytest.mark.parametrize("case", ["one probe", "nan", "zero"])
def test_odd_runs_are_drawn(records: list[Record], case: str, tmp_path: Path) -> None:
    if case == "one probe":
        records = [entry for entry in records if entry["step"] == 1]
    else:
        for entry in records:
            for metric in entry["metrics"].values():
                metric["value"] = None if case == "nan" else 0.0
    paths = plots.write(records, tmp_path)
    assert [path.name for path in paths] == ["loss.png", "interference.png", "decomposition.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    assert len(list(tmp_path.iterdir())) == 3


def test_ticks_cover_what_is_drawn(records: list[Record]) -> None:
    axes = plots.loss(records).axes[0]
    low, high = axes.get_ylim()
    assert len([tick for tick in axes.get_yticks() if low <= tick <= high]) >= 3
    assert not math.isnan(low)
