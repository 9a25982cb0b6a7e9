"""The plots: every curve named with its examples, its null dashed, axes with units; and nothing that breaks on odd runs."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from tests.zerosum.test_runs import checkpoints, write
from tests.zerosum.test_training import run_records, seed_records
from zerosum import plots
from zerosum.plots import paper, save
from zerosum.plots.axes import MARKERS, PALETTE, interference_axis, panels, step_axis, styles
from zerosum.records import Curve, Record, smooth
from zerosum.runs import Run, read_runs


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


# The paper's figures.

DRAWN = {name: drawing.draw for name, drawing in paper.FIGURES.items()}


def measured_runs(tmp_path: Path, *groups: list[Record]) -> list[Run]:
    return read_runs([write(tmp_path / f"{i}.jsonl", group) for i, group in enumerate(groups)])[0]


@pytest.fixture
def three(tmp_path: Path) -> list[Run]:
    return measured_runs(tmp_path, *(checkpoints(name) for name in ("14M", "78M", "285M")))


def entries(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def texts(figure: Figure) -> list[str]:
    return [text.get_text().replace("\n", " ").strip() for axes in figure.axes for text in axes.texts]


def lines_of(axes: Axes, linestyle: str, run: int = 0) -> list[Line2D]:
    color = PALETTE[run]
    return [line for line in axes.lines if line.get_linestyle() == linestyle and line.get_color() == color]


def xy(line: Line2D) -> tuple[list[float], list[float]]:
    return list(np.asarray(line.get_xdata(), float)), list(np.asarray(line.get_ydata(), float))


@pytest.mark.parametrize("kind", list(paper.CHANGES))
def test_interference_draws_d_with_its_null_and_m(three: list[Run], kind: str) -> None:
    figure = paper.interference(three)
    column = list(paper.CHANGES).index(kind)
    upper, lower = figure.axes[column], figure.axes[column + 3]
    for i, run in enumerate(three):
        d, m = run.curves(f"{kind}.D", f"{kind}.M")
        assert xy(*lines_of(upper, "-", i)) == (d.steps.tolist(), d.values.tolist())
        assert xy(*lines_of(upper, "--", i)) == (d.steps.tolist(), [0.95] * len(d))
        assert xy(*lines_of(lower, "-", i)) == (m.steps.tolist(), m.values.tolist())
    low, high = lower.get_ylim()
    assert low < m.values.min() < m.values.max() < high
    assert (upper.get_title(loc="left"), lower.get_yscale()) == (paper.CHANGES[kind], "log")
    assert "nats" in figure.axes[3].get_ylabel()
    assert entries(figure) == ["14M", "78M", "285M", "what random signs would give (null)"]


def test_one_run_of_one_measure_is_one_column(tmp_path: Path) -> None:
    records = checkpoints()
    for entry in records:
        entry["metrics"] = {name: metric for name, metric in entry["metrics"].items() if not name.startswith(("train", "interval"))}
    runs = measured_runs(tmp_path, records)
    assert len(paper.interference(runs).axes) == 2
    assert len(paper.plane(runs).axes) == 1


def test_the_plane_has_both_ends_and_lines_of_equal_change(three: list[Run]) -> None:
    figure = paper.plane(three)
    axes = figure.axes[2]
    d, m = three[1].curves("interval.D", "interval.M")
    trajectory, first, last = (xy(line) for line in axes.lines if line.get_color() == PALETTE[1])
    assert trajectory == (m.values.tolist(), d.values.tolist())
    assert first == ([m.values[0]], [d.values[0]])
    assert last == ([m.values[-1]], [d.values[-1]])
    iso = [xy(line) for line in axes.lines if line.get_color() == "#bbbbbb"]
    values = sorted(float(text.get_text()) for text in axes.texts if text.get_text()[0].isdigit())
    assert len(iso) == len(values) >= 2
    for (m_ends, d_ends), value in zip(iso, values, strict=True):
        assert [m * (1 - d) for m, d in zip(m_ends, d_ends, strict=True)] == pytest.approx([value] * 2)
    assert entries(figure)[0] == "14M: steps 64 (hollow) to 512 (large)"


def test_gradients_have_nulls_errors_and_an_axis_for_the_last_per_cent(three: list[Run]) -> None:
    figure = paper.gradients(three)
    (axes,) = figure.axes
    c = three[0].curve("D_grad")
    assert xy(*lines_of(axes, "-")) == (c.steps.tolist(), c.values.tolist())
    assert xy(*lines_of(axes, "--"))[1] == [0.99] * 4
    bars = axes.containers[0].lines[2][0].get_segments()
    assert [list(bar[:, 1]) for bar in bars] == [pytest.approx([d - 0.0005, d + 0.0005]) for d in c.values]
    scale = axes.transData.transform
    heights = [scale((64, d))[1] for d in (0.98, 0.99, 0.995)]
    assert heights[1] - heights[0] == pytest.approx(heights[2] - heights[1])
    ticks = [label.get_text() for label in axes.get_yticklabels()]
    assert {"0.98", "0.985", "0.99"} <= set(ticks)
    assert entries(figure)[-1] == "± one standard error of the sampling"


def test_the_decomposition_has_c_g_and_the_ratio_with_errors(three: list[Run]) -> None:
    left, right = paper.decomposition(three).axes
    assert xy(*lines_of(left, "-"))[1] == pytest.approx([0.03, 0.025, 0.02, 0.015])
    ratio = 0.6 / np.array([0.1, 0.09, 0.08, 0.07])
    assert xy(*lines_of(right, "-"))[1] == pytest.approx(ratio)
    assert xy(*lines_of(right, "--"))[1] == pytest.approx(ratio / 10)
    bars = right.containers[0].lines[2][0].get_segments()
    relative = 0.01 / np.array([0.1, 0.09, 0.08, 0.07])  # of C_ug, and C_uG is exact
    assert [bar[1, 1] - bar[0, 1] for bar in bars] == pytest.approx(2 * ratio * relative)


def test_pairs_have_a_band_of_cosines_and_the_share_of_opposed_examples(three: list[Run]) -> None:
    figure = paper.pairs(three)
    left, right = figure.axes
    assert not any("seeds" in entry for entry in entries(figure))
    assert xy(*lines_of(left, "-"))[1] == pytest.approx([0.1, 0.08, 0.06, 0.04])
    assert xy(*lines_of(left, "--"))[1] == [0] * 4
    corners = left.collections[0].get_paths()[0].vertices
    at_first, at_last = (sorted(set(corners[corners[:, 0] == step, 1])) for step in (64, 512))
    assert at_first == pytest.approx([-0.2, 0.4])
    assert at_last == pytest.approx([-0.23, 0.31])
    assert xy(*lines_of(right, "-"))[1] == pytest.approx([0.2, 0.3, 0.4, 0.5])
    assert xy(*lines_of(right, "--"))[1] == [0.5] * 4


def test_runs_without_a_gram_are_in_no_panel_of_pairs(tmp_path: Path) -> None:
    without = checkpoints("a")
    for entry in without:
        entry["metrics"] = {name: metric for name, metric in entry["metrics"].items() if not name.startswith("cosine")}
    runs = measured_runs(tmp_path, without, checkpoints("b"))
    left, right = paper.pairs(runs).axes
    assert not lines_of(left, "-", 0)
    assert len(lines_of(right, "-", 0)) == 1
    assert paper.lacking("pairs", runs[0]) == ["cosine_median", "cosine_q05", "cosine_q95"]


def test_a_panel_says_what_it_is_over(three: list[Run]) -> None:
    assert texts(paper.gradients(three)) == ["N = 256 tokens of C4 validation (8 × 32), 100 sampled"]
    assert texts(paper.decomposition(three))[0] == (
        "N = 256 tokens of C4 validation (8 × 32), 100 sampled, along the optimizer's step"
    )
    assert texts(paper.interference(three)) == [
        "N = 256 tokens of C4 train (8 × 32), by the optimizer's step",
        "N = 256 tokens of C4 validation (8 × 32), by the optimizer's step",
        "N = 256 tokens of C4 validation (8 × 32), Δt = t",
    ]


def test_runs_that_differ_in_what_they_are_over_say_so_one_by_one(tmp_path: Path) -> None:
    pile = {"name": "The Pile", "sequences": 4, "positions": 64, "digest": "9"}
    runs = measured_runs(tmp_path, checkpoints("a"), checkpoints("b", evaluation=pile, examples="sequence", sampled=None))
    figure = paper.gradients(runs)
    assert texts(figure) == ["what this is over differs between runs: see the legend"]
    assert [entry.replace("\n", " ") for entry in entries(figure)[:2]] == [
        "a: N = 256 tokens of C4 validation (8 × 32); 100 sampled",
        "b: N = 256 sequences of The Pile (4 × 64); exact",
    ]
    figure = paper.interference(runs)
    assert texts(figure)[0] == "N = 256 tokens of C4 train (8 × 32), by the optimizer's step"
    assert entries(figure)[1] == "b: N = 256 tokens of The Pile (4 × 64)"


def broken(steps: np.ndarray) -> np.ndarray:
    return np.where(steps < 1000, 20 * steps**-0.2, 20 * 1000**-0.2 * (steps / 1000) ** -0.05)


def training_run(name: str, losses: np.ndarray, smoothed: bool = True) -> Run:
    steps = np.arange(1, len(losses) + 1)
    return Run(name, Path(name), Curve(steps, losses, np.full(len(steps), np.nan), 64), smoothed)


def test_the_loss_has_its_two_segments_and_the_break() -> None:
    pytest.importorskip("scipy")
    steps = np.arange(1, 20_001.0)
    run = training_run("14M", broken(steps))
    figure = paper.loss([run])
    (axes,) = figure.axes
    curve, early, late, mark = axes.lines
    x, y = xy(curve)
    assert y == pytest.approx(broken(np.array(x)))
    assert (x[0], x[-1]) == (1, 20_000)
    ((step,), (level,)) = xy(mark)
    assert step == pytest.approx(1000, rel=0.02)
    assert xy(early)[0] == [100, step]
    assert xy(early)[1] == pytest.approx([20 * 100**-0.2, level], rel=0.01)
    assert xy(late)[0] == [step, 20_000]
    assert xy(late)[1] == pytest.approx([level, broken(steps)[-1]], rel=0.01)
    assert entries(figure)[0].startswith("14M: L_d = 5.0")
    assert ", t_d = " in entries(figure)[0]
    assert entries(figure)[1] == "the fit's two straight segments"
    assert texts(figure) == ["training loss before each step, N = 64 tokens, a moving average"]
    assert axes.get_ylabel() == "loss (nats per token)"


def test_a_loss_without_a_break_says_so() -> None:
    pytest.importorskip("scipy")
    noise = np.random.default_rng(0).normal(0, 0.02, 3000)
    figure = paper.loss([training_run("straight", 20 * np.arange(1, 3001.0) ** -0.2 * np.exp(noise), smoothed=False)])
    assert "straight: no break found" in entries(figure)[0].replace("\n", " ")
    assert "the fit's two straight segments" not in entries(figure)
    raw, average, one = figure.axes[0].lines
    assert one.get_linestyle() == ":"
    assert np.diff(np.log(one.get_ydata())) == pytest.approx(np.diff(np.log(one.get_xdata())) * -0.2, rel=0.05)
    assert entries(figure)[-1] == "the fit, where no deceleration was found"
    jumps = [np.abs(np.diff(xy(line)[1])[-500:]).mean() for line in (raw, average)]
    assert jumps[0] > 5 * jumps[1]


def test_a_loss_that_cannot_be_fitted_is_drawn_and_says_why() -> None:
    pytest.importorskip("scipy")
    figure = paper.loss([training_run("short", np.linspace(4, 3, 50))])
    assert entries(figure)[0].startswith("short: not fitted: the curve is too short")
    losses = np.linspace(4, 3, 500)
    losses[300] = np.nan
    figure = paper.loss([training_run("diverged", losses, smoothed=False)])
    assert entries(figure)[0].startswith("diverged: not fitted: row 300: loss: expected a finite number > 0, got nan")
    assert np.isnan(figure.axes[0].lines[0].get_ydata()[300])


def test_a_long_loss_is_thinned_from_its_first_row_to_its_last() -> None:
    pytest.importorskip("scipy")
    steps = np.arange(1, 200_001.0)
    x, y = xy(paper.loss([training_run("long", broken(steps), smoothed=False)]).axes[0].lines[0])
    assert len(x) <= paper.POINTS
    assert (x[0], x[-1]) == (1, 200_000)
    assert y == pytest.approx(broken(np.array(x)))


def test_the_loss_of_checkpoints_is_points_on_their_evaluation_set(three: list[Run]) -> None:
    figure = paper.loss(three)
    assert [line.get_linestyle() for line in figure.axes[0].lines] == ["None"] * 3
    assert xy(figure.axes[0].lines[0]) == ([64, 128, 256, 512], [8, 7.5, 7, 6.5])
    assert entries(figure)[0] == "14M: checkpoints, N = 256 tokens of C4 validation (8 × 32)"


def test_a_run_has_one_colour_and_marker_in_every_panel(tmp_path: Path) -> None:
    """Also where another run is not in the panel."""
    without = checkpoints("a")
    for entry in without:
        del entry["metrics"]["D_grad"]
    runs = measured_runs(tmp_path, without, checkpoints("b"))
    for draw in DRAWN.values():
        found = {(line.get_color(), line.get_marker()) for axes in draw(runs).axes for line in axes.lines}
        assert {color for color, marker in found if marker == MARKERS[1]} == {PALETTE[1]}
        assert {marker for color, marker in found if color == PALETTE[1]} <= {MARKERS[1], "None"}


@pytest.mark.parametrize("name", list(DRAWN))
def test_what_no_run_has_is_refused_by_name(name: str, tmp_path: Path) -> None:
    records = checkpoints()
    for entry in records:
        entry["metrics"] = {"mean_cosine": {"value": 0.5, "n": 256, "null": 0.0}}
    runs = measured_runs(tmp_path, records)
    with pytest.raises(ValueError, match="runs: expected one at least that has"):
        DRAWN[name](runs)
    assert not paper.drawable(name, runs[0])
    assert paper.lacking(name, runs[0])


def test_layers_have_a_panel_for_each_kind_and_the_mean_over_depths(three: list[Run]) -> None:
    figure = paper.layers(three)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["embedding", "up", "down"]
    # Of depths 0 and 1: 0.9 + 0.005 (1 + 2) / 2, and 0.9 + 0.005 (3 + 4) / 2.
    for axes, mean in zip(figure.axes, (0.9, 0.9075, 0.9175), strict=True):
        steps, values = xy(*lines_of(axes, "-", 1))
        assert steps == [64, 128, 256, 512]
        assert values == pytest.approx([mean + 0.01 * i for i in range(4)])
        assert xy(*lines_of(axes, "--", 1))[1] == pytest.approx([0.97] * 4)
    assert texts(figure)[0] == "N = 256 tokens of C4 validation (8 × 32), 100 sampled"
    assert "D(∇ℓ)" in figure.axes[0].get_ylabel()
    assert figure.axes[1].get_xlabel() == "optimizer step"


def test_depths_are_drawn_at_the_first_and_the_last_step(three: list[Run]) -> None:
    figure = paper.depths(three)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["up", "down"]
    up, down = figure.axes
    assert xy(*lines_of(up, ":")) == ([0, 1], pytest.approx([0.905, 0.91]))
    assert xy(*lines_of(up, "-")) == ([0, 1], pytest.approx([0.935, 0.94]))
    assert xy(*lines_of(down, "-")) == ([0, 1], pytest.approx([0.945, 0.95]))
    assert "block" in down.get_xlabel()
    assert entries(figure)[0] == "14M: steps 64 (hollow) and 512"


@pytest.mark.parametrize(
    ("names", "titles"),
    [
        (["transformer.h.0.attn.c_attn.weight", "transformer.h.1.attn.c_attn.weight"], ["attn.c_attn"]),
        (["layers.0.up.weight", "layers.0.up.bias"], ["up", "up.bias"]),
        (["encoder.0.up.weight", "decoder.0.up.weight"], ["encoder.*.up.weight", "decoder.*.up.weight"]),
        (["layers.3.experts.0.up.weight", "layers.3.experts.1.up.weight"], ["experts.0.up", "experts.1.up"]),
        (["conv1.weight", "h2.0.w"], ["conv1", "w"]),
        (["head.weight"], ["head"]),
    ],
)
def test_kinds_of_parameters_have_short_titles(names: list[str], titles: list[str], tmp_path: Path) -> None:
    records = checkpoints(steps=(64,))
    records[0]["metrics"] = {f"D_grad/{name}": {"value": 0.5, "n": 4, "null": 0.6} for name in names}
    figure = paper.layers(measured_runs(tmp_path, records))
    assert [axes.get_title(loc="left") for axes in figure.axes] == titles


# Several seeds.


@pytest.fixture
def seeds(tmp_path: Path) -> Run:
    """A folder as `zerosum demo --seeds 3` leaves it, with two blocks."""
    folder = tmp_path / "three"
    for i, shift in enumerate((0.0, 0.01, 0.05)):
        records = seed_records(shift)
        for entry in records:
            if entry["kind"] == "probe":
                for k in range(2):
                    entry["metrics"][f"D_grad/blocks.{k}.up.weight"] = {"value": 0.5 + shift * (1 + k), "n": 4, "null": 0.7}
        write(folder / f"seed-{i}" / "metrics.jsonl", records)
    (folder / "config.json").write_text(json.dumps({"seed": [0, 1, 2], "width": 32}))
    (run,), notes = read_runs([folder])
    assert not notes
    return run


def band_of(axes: Axes) -> tuple[list[float], list[float]]:
    """The lower and the upper edge of a panel's band, from left to right."""
    vertices = axes.collections[0].get_paths()[0].vertices
    xs = sorted(set(vertices[:, 0]))
    edges = [vertices[vertices[:, 0] == x][:, 1] for x in xs]
    return [edge.min() for edge in edges], [edge.max() for edge in edges]


def test_a_folder_of_seeds_is_one_run_and_a_seed_of_it_another(seeds: Run) -> None:
    assert (seeds.name, len(seeds.repeats)) == ("three", 3)
    c = seeds.curve("D_grad")
    assert c.values[-1] == pytest.approx(0.62)
    assert c.errors is not None
    error = np.std([0.6, 0.61, 0.65], ddof=1) / math.sqrt(3)
    assert c.errors[-1] == pytest.approx(error)
    assert seeds.loss is not None
    assert seeds.loss.errors is not None
    assert np.isfinite(seeds.loss.errors).all()
    ((alone,), _), (others, _) = (read_runs([seeds.source / one for one in names]) for names in (["seed-1"], ["seed-0", "seed-2"]))
    assert (alone.name, alone.repeats) == ("seed-1", ())
    assert [other.repeats for other in others] == [(), ()]
    assert others[1].curve("D_grad").values[-1] == pytest.approx(0.65)


def test_seeds_are_drawn_as_a_mean_in_a_band(seeds: Run) -> None:
    (axes,) = paper.gradients([seeds]).axes
    c = seeds.curve("D_grad")
    assert xy(*lines_of(axes, "-"))[1] == pytest.approx(c.values)
    low, high = band_of(axes)
    assert c.errors is not None
    assert low == pytest.approx(c.values - c.errors)
    assert high == pytest.approx(c.values + c.errors)
    assert entries(paper.gradients([seeds])) == [
        "three: mean of 3 seeds",
        "what random signs would give (null)",
        "± one standard error over the seeds",
    ]


def test_the_band_of_a_mean_over_depths_is_over_seeds_alone(seeds: Run) -> None:
    (axes,) = paper.layers([seeds]).axes
    each = 0.5 + 1.5 * np.array([0.0, 0.01, 0.05])  # the mean over the two depths, of each seed
    low, high = band_of(axes)
    assert xy(*lines_of(axes, "-"))[1][-1] == pytest.approx(each.mean())
    assert (high[-1] - low[-1]) / 2 == pytest.approx(each.std(ddof=1) / math.sqrt(3))
    (axes,) = paper.depths([seeds]).axes
    low, high = band_of(axes)
    errors = [np.std([0.0, 0.01 * k, 0.05 * k], ddof=1) / math.sqrt(3) for k in (1, 2)]
    assert (np.array(high) - low) / 2 == pytest.approx(errors)


def test_the_loss_of_seeds_says_how_many_decelerate(seeds: Run) -> None:
    pytest.importorskip("scipy")
    figure = paper.loss([seeds])
    assert entries(figure)[0].startswith("three: 0 of 3 seeds decelerate")
    assert "± one standard error over the seeds" in entries(figure)
    averages = np.array([smooth(run.loss.values)[-1] for run in seeds.repeats if run.loss is not None])
    low, high = band_of(figure.axes[0])
    assert (high[-1] - low[-1]) / 2 == pytest.approx(averages.std(ddof=1) / math.sqrt(3))
    steps = np.arange(1, 3001.0)
    repeats = tuple(training_run(f"seed-{i}", broken(steps) * scale, smoothed=False) for i, scale in enumerate((1, 1.02)))
    means = np.mean([run.loss.values for run in repeats if run.loss is not None], axis=0)
    said = entries(paper.loss([replace(training_run("two", means, smoothed=False), repeats=repeats)]))[0]
    assert said.startswith("two: 2 of 2 seeds decelerate, L_d = 5.")
    assert said.count(" ± ") >= 2


@pytest.mark.parametrize("name", ["interference", "plane", "decomposition"])
def test_seeds_are_in_the_other_figures(name: str, seeds: Run) -> None:
    figure = DRAWN[name]([seeds])
    assert entries(figure)[0].startswith("three: mean of 3 seeds")
    if name != "plane":
        assert all(len(axes.collections) == 1 for axes in figure.axes)


# What all figures have in common.


def luminance(color: str) -> float:
    """Relative luminance, WCAG 2."""
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def lightness(color: str) -> float:
    """CIE L*: what a grey print shows, 0 to 100."""
    return 116 * luminance(color) ** (1 / 3) - 16 if luminance(color) > 0.009 else 903.3 * luminance(color)


def test_the_colours_can_be_told_apart() -> None:
    okabe_ito = {"#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7"}
    assert set(PALETTE) < okabe_ito
    assert all(1.05 / (luminance(color) + 0.05) >= 2 for color in PALETTE)  # contrast to white
    grey = sorted(map(lightness, PALETTE[:4]))
    assert min(np.diff(grey)) >= 10
    assert len({style.marker for style in styles(8)}) == 8
    assert len(set(styles(56))) == 56


@pytest.mark.parametrize("name", list(DRAWN))
@pytest.mark.parametrize("case", ["one step", "step 0", "nan", "no null", "zero", "extreme", "ten long names"])
def test_odd_runs_have_whole_figures(name: str, case: str, tmp_path: Path) -> None:
    pytest.importorskip("scipy")
    names = [f"_a-very-long-name/with$odd$characters_{'x' * 60}-{i}" for i in range(10 if case == "ten long names" else 2)]
    steps = {"one step": (256, 512), "step 0": (0, 1, 2, 4)}.get(case, (64, 128, 256, 512))
    groups = [checkpoints(name, steps) for name in names]
    for entry in (entry for group in groups for entry in group):
        for key, metric in entry["metrics"].items():
            if case == "nan" and entry["step"] == 128:
                metric["value"] = None
            if case == "no null":
                metric["null"] = None
            if case == "zero":
                metric["value"] = 0.0
            if case == "extreme":
                metric["value"] = (0.9999 + 1e-6 * entry["step"] / 64) if "D" in key else metric["value"] * 1e-9
    if case == "one step":
        groups = [group[-1:] for group in groups]
    figure = DRAWN[name](measured_runs(tmp_path, *groups))
    path = tmp_path / "figure.png"
    save(figure, path)
    assert path.read_bytes().startswith(b"\x89PNG")
    box = figure.legends[0].get_window_extent()
    assert box.x0 >= 0
    assert box.y0 >= 0
    assert box.x1 <= figure.bbox.x1
    for axes in figure.axes:
        assert axes.get_window_extent().width > 100
        assert axes.get_window_extent().height > 100
        assert axes.xaxis.get_label_text() or axes.get_window_extent().y0 > min(a.get_window_extent().y0 for a in figure.axes)
        assert box.y1 <= axes.get_window_extent().y0
        assert axes.title.get_window_extent().y1 <= figure.bbox.y1
        low, high = axes.get_xlim()
        assert low < high
        assert [x for x in axes.get_xticks() if low <= x <= high]
    assert len(entries(figure)) >= len(names)
    assert all("with$odd$" in entry for entry in entries(figure)[: len(names)])
    assert not any(text.get_parse_math() for text in figure.legends[0].get_texts())


@pytest.mark.parametrize(
    ("steps", "labels"),
    [
        ([1, 1000], ["1", "10", "100", "1k"]),
        ([0, 1, 64], ["0", "1", "2", "5", "10", "20", "50"]),
        ([512, 1024, 2048], ["512", "1,024", "2,048"]),
        ([7], ["7"]),
        ([0], ["0"]),
        ([1, 2**18], ["1", "10", "100", "1k", "10k", "100k"]),
        (range(2000, 8000), ["2k", "3k", "4k", "5k", "6k", "7k", "8k"]),
    ],
)
def test_steps_can_be_read(steps: list[int], labels: list[str]) -> None:
    figure, ((axes,),) = panels(1, 1, 5, 4)
    step_axis(axes, np.array(steps))
    low, high = axes.get_xlim()
    assert low < min(steps) <= max(steps) < high
    assert [label.get_text() for label in axes.get_xticklabels()] == labels
    assert figure.axes == [axes]


@pytest.mark.parametrize("d", [[0.1, 0.5], [0.5, 0.9999], [0.99, 0.991], [0.9999], [0.0], [1.0], [-0.2, 0.7], [0.2, 1 - 1e-9]])
def test_d_can_be_read(d: list[float]) -> None:
    figure, ((axes,),) = panels(1, 1, 5, 4)
    interference_axis(axes, np.array([*d, np.nan]), "D")
    low, high = axes.get_ylim()
    assert all(low < x < high for x in d if x < 1)
    ticks = [float(label.get_text().replace("−", "-")) for label in axes.get_yticklabels()]
    assert ticks == pytest.approx(axes.get_yticks())
    assert 2 <= len(ticks) <= 12
    heights = axes.transData.transform([(1, tick) for tick in ticks])[:, 1]
    assert min(np.diff(heights)) > 8  # pixels, at 100 to the inch
    assert figure.axes == [axes]


def test_a_file_is_replaced_as_a_whole_and_the_same_figure_gives_the_same_bytes(three: list[Run], tmp_path: Path) -> None:
    folder = tmp_path / "figures"
    folder.mkdir()
    for kind in ("png", "svg"):
        path = folder / f"plane.{kind}"
        save(paper.plane(three), path)
        first = path.read_bytes()
        path.write_text("older")
        save(paper.plane(three), path)
        assert path.read_bytes() == first
    assert b"<dc:date>" not in first
    assert sorted(path.name for path in folder.iterdir()) == ["plane.png", "plane.svg"]


def test_what_fails_leaves_the_older_file(three: list[Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plane.png"
    path.write_text("older")

    def full(self: Figure, file: Path, **options: object) -> None:
        Path(file).write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full)
    with pytest.raises(OSError, match="No space left"):
        save(paper.plane(three), path)
    assert path.read_text() == "older"
    assert [file.name for file in tmp_path.glob("*.new")] == []


def test_no_figure_stays_open(three: list[Run]) -> None:
    """The figures are not pyplot's: nothing keeps them, or shows them, but their user."""
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    paper.interference(three)
    assert plt.get_fignums() == before
