"""The demo's parts: model, text, the measured training step, records, the run's folder, and the words for its numbers."""

from __future__ import annotations

import copy
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests.zerosum.oracle import per_example_gradients
from zerosum.changes import Step
from zerosum.metrics import Metric, number_interference
from zerosum.records import Curve, Record, RecordFile, curve, encode, mean_curve, record, slopes, smooth
from zerosum.training.comparison import compare, mean_and_error
from zerosum.training.data import Corpus, draw, standard_library
from zerosum.training.loop import Settings, Trainer, probe_steps
from zerosum.training.model import GPT, GPTConfig, normalize, rotate, rotations, token_losses
from zerosum.training.run import Refused, RunFolder, fingerprint
from zerosum.training.summary import measuring_share, summarize

SMALL = GPTConfig(vocab=17, width=32, layers=2, heads=2, positions=12)


# The model.


def test_a_prediction_depends_on_earlier_tokens_only() -> None:
    torch.manual_seed(0)
    model, tokens = GPT(SMALL), torch.randint(0, 17, (3, 12))
    changed = tokens.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 17
    before, after = model(tokens), model(changed)
    assert before.shape == (3, 12, 17)
    torch.testing.assert_close(before[:, :7], after[:, :7])
    assert not torch.isclose(before[:, 7:], after[:, 7:]).all(-1).any()


def test_the_first_loss_is_that_of_a_uniform_guess() -> None:
    torch.manual_seed(0)
    x, y = torch.randint(0, 17, (2, 8, 12)).unbind()
    losses = token_losses(GPT(SMALL), x, y)
    assert losses.shape == (8, 12)
    assert losses.mean().item() == pytest.approx(math.log(17), abs=0.05)


def test_every_weight_but_the_embedding_belongs_to_a_linear_without_bias() -> None:
    model = GPT(SMALL)
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert linear == {name for name, _ in model.named_parameters()} - {"embedding.weight"}
    assert len(linear) == 4 * SMALL.layers + 1


def test_rotated_products_depend_on_the_distance_of_positions_only() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 16)
    cos, sin = rotations(20, 16)
    products = rotate(q.expand(20, 16), cos, sin) @ rotate(k.expand(20, 16), cos, sin).T
    for distance in (0, 3, 11):
        along = products.diagonal(distance)
        torch.testing.assert_close(along, along[0].expand_as(along), rtol=1e-5, atol=1e-5)


def test_normalized_rows_have_mean_square_one() -> None:
    torch.testing.assert_close(normalize(torch.randn(5, 64) * 40).square().mean(-1), torch.ones(5))


@pytest.mark.parametrize(("size", "value"), [("vocab", 0), ("layers", 1.5), ("width", 30), ("heads", 5)])
def test_a_bad_size_is_named(size: str, value: float) -> None:
    with pytest.raises(ValueError, match=r"^(width|vocab|layers|heads): expected"):
        GPTConfig(**{**SMALL.__dict__, size: value})


def test_too_long_a_sequence_is_refused() -> None:
    with pytest.raises(ValueError, match=r"tokens: expected shape \(N, T <= 12\), got \(1, 13\)"):
        GPT(SMALL)(torch.zeros(1, 13, dtype=torch.long))


# The text.


def write_files(folder: Path, count: int) -> list[Path]:
    paths = [folder / f"{i:02}.txt" for i in range(count)]
    for i, path in enumerate(paths):
        path.write_bytes(bytes([i]) * 20)
    return paths


def test_every_tenth_file_is_held_out(tmp_path: Path) -> None:
    corpus = Corpus.read(write_files(tmp_path, 23))
    assert set(corpus.held_out.tolist()) == {9, 19}
    assert set(corpus.train.tolist()) == set(range(23)) - {9, 19}
    assert corpus.files == 23


def test_of_few_files_the_last_tenth_of_each_is_held_out(tmp_path: Path) -> None:
    corpus = Corpus.read(write_files(tmp_path, 3))
    assert corpus.held_out.tolist() == [0, 0, 1, 1, 2, 2]
    assert len(corpus.train) == 54


def test_the_digest_tells_texts_and_their_borders_apart(tmp_path: Path) -> None:
    paths = write_files(tmp_path, 2)
    first = Corpus.read(paths).digest
    assert Corpus.read(paths).digest == first
    paths[0].write_bytes(bytes(21))
    paths[1].write_bytes(bytes([1]) * 19)
    assert Corpus.read(paths).digest != first


def test_a_batch_is_windows_of_the_text_fixed_by_seed_and_number() -> None:
    text = torch.arange(200, dtype=torch.uint8)
    x, y = draw(text, 50, 9, seed=3, number=4)
    assert x.shape == y.shape == (50, 9)
    assert torch.equal(y, x + 1)  # the text counts, so the next byte is one more
    assert torch.equal(draw(text, 50, 9, seed=3, number=4)[0], x)
    assert not torch.equal(draw(text, 50, 9, seed=3, number=5)[0], x)
    assert not torch.equal(draw(text, 50, 9, seed=4, number=4)[0], x)


def test_the_shortest_text_has_one_window() -> None:
    x, y = draw(torch.arange(10, dtype=torch.uint8), 4, 9, seed=0, number=0)
    assert torch.equal(x, torch.arange(9).expand(4, 9))
    assert y[0, -1] == 9


def test_the_standard_library_is_found_without_its_tests() -> None:
    paths = standard_library()
    assert {"argparse.py", "textwrap.py"} <= {path.name for path in paths}
    assert not {"site-packages", "test"} & {part for path in paths for part in path.parts[-3:]}
    assert paths == sorted(paths)


# The loop.


def trainer(**settings: float) -> Trainer:
    text = torch.from_numpy(np.random.default_rng(0).choice(np.frombuffer(b"abcde fgh", np.uint8), 3000))
    return Trainer(
        Settings(**{"steps": 8, "width": 32, "layers": 1, "sequences": 4, "positions": 10, **settings}),  # type: ignore[arg-type]
        Corpus(train=text[:2500], held_out=text[2500:], files=1, digest=""),
    )


def weights(t: Trainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in t.model.parameters()])


def test_probes_are_log_spaced_and_have_both_ends() -> None:
    assert probe_steps(1) == [1]
    assert probe_steps(12) == [1, 2, 3, 4, 6, 7, 10, 12]
    steps = probe_steps(5000)
    assert steps[-1] == 5000
    assert sum(100 <= step < 1000 for step in steps) == 8


def test_a_probed_step_trains_like_an_ordinary_one() -> None:
    plain, probed = trainer(), trainer()
    for step in (1, 2, 3):
        trained = plain.step(step)
        measured = probed.probed_step(step)
        assert measured.trained["train.loss"].value == pytest.approx(trained["train.loss"].value, rel=1e-6)
        assert measured.finite
        torch.testing.assert_close(weights(probed), weights(plain), rtol=1e-4, atol=1e-6)


def test_what_a_probed_step_measures() -> None:
    t, same = trainer(), trainer()
    for step in (1, 2):
        t.step(step), same.step(step)
    x, y = same.batch(3)
    before = [token_losses(same.model, *batch).detach() for batch in ((x, y), same.held_out)]
    names = [name for name, _ in same.model.named_parameters()]
    g = per_example_gradients(token_losses(same.model, x, y).mean(1), same.model, names)
    same.step(3)
    found = t.probed_step(3)
    after = [token_losses(same.model, *batch).detach() for batch in ((x, y), same.held_out)]

    assert not found.coverage.not_covered
    outside = [name for name in names if name != "embedding.weight"]
    shares = torch.cat([(g[name].sum(0).abs() / g[name].abs().sum(0)).flatten() for name in outside])
    assert found.measured["D_grad"].value == pytest.approx(1 - shares.nanmean().item(), rel=1e-4)
    assert found.measured["D_grad"].n == 4
    for name, b, a in zip(("train", "held_out"), before, after, strict=True):
        assert found.measured[f"{name}.loss"].value == pytest.approx(b.mean().item(), rel=1e-5)
        for key, metric in number_interference(a - b).items():
            assert found.measured[f"{name}.{key}"].n == b.numel()
            assert found.measured[f"{name}.{key}"].value == pytest.approx(metric.value, rel=1e-2, abs=1e-4)


def test_the_decomposition_multiplies_to_the_first_order_interference() -> None:
    t = trainer()
    for step in range(1, 6):
        found = t.probed_step(step).measured
        product = found["C_g"].value * found["C_uG"].value / found["C_ug"].value
        assert product == pytest.approx(found["first_order.C"].value, rel=1e-6)


def test_weights_come_back_after_an_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    t = trainer()
    with Step(t.model, {"train": t.batch(1)}) as change:
        t.step(1)
    new = weights(t)

    def broken(batch: object) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(t, "_backward", broken)
    with pytest.raises(RuntimeError, match="broken"):
        t._along_update(t.batch(1), change)
    assert torch.equal(weights(t), new)


def test_a_trainer_goes_on_from_its_state() -> None:
    t, resumed = trainer(), trainer()
    for step in (1, 2, 3):
        t.step(step)
    resumed.load_state_dict(copy.deepcopy(t.state_dict()))
    assert resumed.step(4)["train.loss"].value == t.step(4)["train.loss"].value
    assert torch.equal(weights(resumed), weights(t))


def test_the_seed_leaves_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    assert not torch.equal(weights(trainer(seed=0)), weights(trainer(seed=1)))
    assert torch.equal(torch.get_rng_state(), state)


def test_the_cost_is_of_both_kinds_of_pass() -> None:
    plain, probed = trainer().probe_cost(pairs=2)
    assert len(plain) == len(probed) == 2
    assert min(*plain, *probed) > 0


# Records.


def test_a_record_is_a_line_of_valid_json_also_with_nan() -> None:
    line = encode(record("probe", 3, {"D": Metric(math.nan, 5, 0.5), "M": Metric(math.inf, 5)}, seconds=0.1))
    assert line.count("\n") == 1
    metrics = json.loads(line)["metrics"]
    assert metrics == {"D": {"value": None, "n": 5, "null": 0.5}, "M": {"value": None, "n": 5, "null": None}}
    found = curve([json.loads(line)], "probe", "D")
    assert np.isnan(found.values[0])
    assert (found.steps[0], found.nulls[0], found.n) == (3, 0.5, 5)


def test_a_last_line_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    path, line = tmp_path / "records.jsonl", encode(record("step", 1, {}))
    path.write_text(line + line[:7])
    with RecordFile(path) as file:
        assert [entry["step"] for entry in file.records] == [1]
        file.append(record("step", 2, {}))
    assert [json.loads(found)["step"] for found in path.read_text().splitlines()] == [1, 2]


def test_the_moving_average_has_a_window_that_grows_with_the_step() -> None:
    values = np.arange(1.0, 13.0)
    expected = [values[max(int(j / 1.2), 1) - 1 : j].mean() for j in range(1, 13)]
    np.testing.assert_allclose(smooth(values), expected)


def test_slopes_of_a_curve_with_a_break() -> None:
    steps = np.arange(1, 2001)
    loss = np.where(steps < 100, steps**-0.5, 100**-0.5 * (steps / 100) ** -0.1)
    found = slopes(Curve(steps, loss, loss, 1))
    assert found is not None
    steepest, last = found
    assert steepest.slope == pytest.approx(-0.5, abs=0.02)
    assert steepest.last <= 110
    assert last.slope == pytest.approx(-0.1, abs=0.01)
    assert (last.last, last.first) == (2000, 633)


@pytest.mark.parametrize("loss", [np.ones(5), np.full(50, math.nan), np.zeros(50)])
def test_no_slopes_where_there_are_none(loss: np.ndarray) -> None:
    assert slopes(Curve(np.arange(1, len(loss) + 1), loss, loss, 1)) is None


# The run's folder.

CONFIG = {"steps": 8, "seed": 0}


def test_a_run_goes_on_after_its_checkpoint_without_later_records(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run", CONFIG)
    assert (folder.step, folder.state, folder.records) == (0, None, [])
    for step in (1, 2, 3):
        folder.append(record("step", step, {"train.loss": Metric(1.0 / step, 4)}))
        if step == 2:
            folder.checkpoint(step, {"x": {"w": torch.ones(2)}})
    folder.close()
    with folder.metrics.open("a") as file:
        file.write('{"kind": "st')  # cut off by a crash

    again = RunFolder(tmp_path / "run", CONFIG)
    again.append(record("step", 3, {}))
    again.close()
    assert again.step == 2
    assert again.state is not None
    assert torch.equal(again.state["x"]["w"], torch.ones(2))
    assert [entry["step"] for entry in map(json.loads, folder.metrics.read_text().splitlines())] == [1, 2, 3]
    assert not list(folder.path.glob("*.new"))


def test_without_a_checkpoint_a_run_starts_anew(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, CONFIG)
    folder.append(record("step", 1, {}))
    folder.close()
    again = RunFolder(tmp_path, CONFIG)
    again.close()
    assert (again.step, again.records) == (0, [])


def test_another_run_is_refused_by_the_names_of_what_differs(tmp_path: Path) -> None:
    RunFolder(tmp_path, CONFIG).close()
    with pytest.raises(Refused, match=r"cannot resume: seed is 0 there and 7 here$"):
        RunFolder(tmp_path, {**CONFIG, "seed": 7})


@pytest.mark.parametrize("name", ["notes.txt", "metrics.jsonl"])
def test_a_folder_of_something_else_is_left_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(Refused, match="files in it that are not of a run"):
        RunFolder(tmp_path, CONFIG)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    ("name", "content"),
    [("config.json", "[1]"), ("config.json", "{"), ("metrics.jsonl", "what\n"), ("checkpoint.pt", "what"), ("checkpoint.pt", "")],
)
def test_a_damaged_folder_is_refused(tmp_path: Path, name: str, content: str) -> None:
    RunFolder(tmp_path, CONFIG).close()
    (tmp_path / name).write_text(content)
    with pytest.raises(Refused, match=name):
        RunFolder(tmp_path, CONFIG)


def test_a_fingerprint_depends_on_the_values_not_on_their_order() -> None:
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1}) != fingerprint({"a": 1, "b": 3})


# The words.


def run_records(d_grad: tuple[float, float], d_tokens: tuple[float, float], late_slope: float = -0.1) -> list[Record]:
    """Records of a made-up run of 1000 steps whose metrics go from one value to another."""
    found = []
    for step in range(1, 1001):
        loss = 5 * (step**-0.4 if step < 50 else 50**-0.4 * (step / 50) ** late_slope)
        found.append(record("step", step, {"train.loss": Metric(loss, 64)}, seconds=0.1))
        if step not in probe_steps(1000):
            continue
        at = math.log10(step) / 3
        grad, tokens = (first + at * (last - first) for first, last in (d_grad, d_tokens))
        metrics = {
            "D_grad": Metric(grad, 4, 0.7),
            "C_g": Metric(1 - grad, 4, 0.3),
            "C_uG": Metric(0.5, 4, 0.2),
            "C_ug": Metric(0.25, 4),
        }
        for name in ("train", "held_out"):
            values = {"loss": loss, "M": 0.1, "mean": -0.01}
            metrics |= {f"{name}.{key}": Metric(value, 64) for key, value in values.items()}
            metrics[f"{name}.D"] = Metric(tokens, 64, 0.9)
        found.append(record("probe", step, metrics, seconds=0.4, covered=0.9, not_covered=["embedding.weight"], finite=True))
    return [json.loads(encode(entry)) for entry in found]


@pytest.mark.parametrize(
    ("d_grad", "said"),
    [
        ((0.2, 0.6), r"rose from 0.200 to 0.600 \(random signs: 0.700\): .* agree better than"),
        ((0.9, 0.71), "fell from 0.900 to 0.710 .* agree no better than"),
        ((0.8, 0.81), "hardly changed, 0.800 to 0.810 .* oppose each other more than"),
        ((0.8, math.nan), "at the last probe it had no value"),
    ],
)
def test_words_follow_the_gradients(d_grad: tuple[float, float], said: str) -> None:
    assert re.search(said, summarize(run_records(d_grad, (0.1, 0.5))).findings[1])


@pytest.mark.parametrize(("last", "said"), [(0.5, "5.0 times as well"), (0.8, "cancel as fully as"), (0.95, "cancel as fully as")])
def test_words_follow_the_tokens(last: float, said: str) -> None:
    train, held_out = summarize(run_records((0.2, 0.6), (0.1, last))).findings[2:4]
    assert said in train
    assert said in held_out
    assert "lowered the mean loss by 0.010" in train


@pytest.mark.parametrize(
    ("slope", "said"),
    [(-0.1, "4.0 times flatter, it decelerated"), (-0.4, "not decelerated"), (0.0, "stopped falling"), (0.1, "it rises")],
)
def test_words_follow_the_loss(slope: float, said: str) -> None:
    assert said in summarize(run_records((0.2, 0.6), (0.1, 0.5), slope)).findings[0]


def loss_records(losses: np.ndarray) -> list[Record]:
    """Those of a run, with other training losses."""
    found = run_records((0.2, 0.6), (0.1, 0.5))
    for entry in found:
        if entry["kind"] == "step":
            entry["metrics"]["train.loss"]["value"] = float(losses[entry["step"] - 1])
    return found


@pytest.mark.parametrize("noise", [0.005, 0.02, 0.05])
@pytest.mark.parametrize("slope", [0.0, -0.15, -0.4])
def test_batches_that_differ_are_no_deceleration(slope: float, noise: float) -> None:
    steps = np.arange(1, 1001)
    said = []
    for seed in range(8):
        wiggle = np.exp(noise * np.random.default_rng(seed).normal(size=1000))
        said.append(summarize(loss_records(6 * steps**slope * wiggle)).findings[0])
    assert not [one for one in said if "it decelerated" in one]
    if slope:
        assert all("it has not decelerated yet" in one for one in said)
    broken = 6 * np.where(steps < 100, steps**-0.4, 100**-0.4 * (steps / 100) ** -0.1)
    assert "it decelerated" in summarize(loss_records(broken * wiggle)).findings[0]


def test_words_follow_a_loss_that_rises_or_ends() -> None:
    steps = np.arange(1, 1001)
    rising = 5 * np.where(steps < 100, steps**-0.4, 100**-0.4 * (steps / 100) ** 0.3)
    assert summarize(loss_records(rising)).findings[0].endswith("between steps 317 and 1000: it rises.")
    constant = summarize(loss_records(np.full(1000, 5.0))).findings[0]
    assert constant.endswith("It did not fall by more than batches differ: the last log-log slope is 0.00 ± 0.00.")
    ended = np.append(rising[:-1], math.nan)
    assert summarize(loss_records(ended)).findings[0].endswith("Training stopped at step 1000, where it was no longer a number.")


def test_small_numbers_are_not_shown_as_zero() -> None:
    records = run_records((0.2, 0.6), (0.1, 0.5))
    for entry in records:
        if entry["kind"] == "probe":
            entry["metrics"] |= {"train.M": {"value": 1.3e-5, "n": 64}, "train.mean": {"value": -4e-6, "n": 64, "null": 0.0}}
    summary = summarize(records)
    assert (
        "Their mean size M hardly changed, 1.3e-05 to 1.3e-05; the last measured step lowered the mean loss by 4e-06"
        in (summary.findings[2])
    )
    (row,) = (line for line in summary.text().splitlines() if line.startswith("M of loss changes, training batch"))
    assert "1.3e-05" in row


def test_the_table_has_values_nulls_and_examples() -> None:
    summary = summarize(run_records((0.2, 0.6), (0.1, 0.5)))
    assert summary.steps == [1, 10, 100, 1000]
    rows = {row.name: row for row in summary.rows}
    assert rows["D_grad, gradient interference"].values == pytest.approx([0.2, 1 / 3, 7 / 15, 0.6])
    assert rows["D_grad, gradient interference"].null == 0.7
    assert rows["D_grad, gradient interference"].n == "4 sequences"
    assert rows["C_uG / C_ug along the update"].values == [2.0] * 4
    assert rows["C_uG / C_ug along the update"].null == pytest.approx(0.8)
    text = summary.text()
    assert "90.0% of the coordinates (not covered: embedding.weight)" in " ".join(text.split())
    assert len({len(line) for line in text.splitlines()[:2]}) == 1
    assert max(map(len, text.splitlines())) <= 112
    assert summary.markdown().splitlines()[1].startswith("| --- | --: |")


def test_a_run_without_a_probe_says_so() -> None:
    assert "No step was measured yet." in summarize([record("step", 1, {})]).text()


def test_words_follow_the_cost() -> None:
    cost = record("cost", 1000, {}, plain_seconds=[0.1, 0.2, 0.3], probed_seconds=[0.11, 0.3, 0.3])
    said = summarize([*run_records((0.2, 0.6), (0.1, 0.5)), cost]).findings[-1]
    assert "cost +50% of a forward and backward pass (300 against 200 ms: medians of 3 in turns; the fastest of each: +10%)" in said


def test_a_run_of_probed_steps_alone_has_no_share() -> None:
    cost = record("cost", 1, {}, plain_seconds=[0.1], probed_seconds=[0.2])
    records = [entry for entry in run_records((0.2, 0.6), (0.1, 0.5)) if entry["step"] == 1]
    assert summarize([*records, cost]).findings[-1].endswith("of each: +100%).")


def test_the_share_of_measuring() -> None:
    records = [
        *(record("step", step, {}, seconds=seconds) for step, seconds in ((1, 1.0), (2, 1.0), (3, 1.5))),
        record("probe", 3, {}, seconds=1.5),
    ]
    assert measuring_share(records) == pytest.approx(2.0 / 5.0)


# Several widths and seeds.


def seed_records(shift: float) -> list[Record]:
    """A made-up run that decelerates at step 50; another ``shift`` is another seed."""
    found = run_records((0.2, 0.6 + shift), (0.1, 0.5 + 2 * shift))
    for entry in found:
        for name, metric in entry["metrics"].items():
            if name.endswith((".loss", ".M")):
                metric["value"] *= 1 + shift
    found[-1]["metrics"]["tokens.D_grad"] = {"value": 0.8 + shift, "n": 64, "null": 0.9}
    return found


def test_the_mean_curve_has_standard_errors_and_the_steps_of_all() -> None:
    steps = [np.array([1, 2, 4]), np.array([1, 4, 8]), np.array([1, 3, 4])]
    values = [np.array([1.0, 9.0, 2.0]), np.array([2.0, 4.0, 9.0]), np.array([6.0, 9.0, 6.0])]
    found = mean_curve([Curve(s, v, v / 2, 7) for s, v in zip(steps, values, strict=True)])
    assert found.steps.tolist() == [1, 4]
    assert found.values.tolist() == pytest.approx([3, 4])
    assert found.nulls.tolist() == pytest.approx([1.5, 2])
    assert found.n == 7
    assert found.errors is not None
    assert found.errors.tolist() == pytest.approx([math.sqrt(7 / 3), math.sqrt(4 / 3)])  # variances of 7 and 4, of three seeds
    alone = mean_curve([Curve(steps[0], values[0], values[0], 7)])
    assert alone.values.tolist() == values[0].tolist()
    assert alone.errors is not None
    assert np.isnan(alone.errors).all()


def test_means_have_errors_where_there_are_seeds() -> None:
    assert mean_and_error([1.0, 2.0, 6.0]) == "3.0 ± 1.5"
    assert mean_and_error([0.5]) == "0.500"
    assert mean_and_error([]) == "–"


def test_several_seeds_are_compared_by_means_and_errors() -> None:
    pytest.importorskip("scipy")
    seeds = [seed_records(shift) for shift in (0.0, 0.01, 0.05)]
    found = compare({32: seeds, 64: seeds[:1]})
    losses, interference = (
        [dict(zip(head, line, strict=True)) for line in lines] for head, *lines in (found.losses, found.interference)
    )
    assert [line["width"] for line in losses] == ["32", "64"]
    assert [line["seeds"] for line in losses] == ["3", "1"]
    assert losses[0]["D_grad"] == "0.820 ± 0.015"
    assert interference[0]["D_grad"] == "0.620 ± 0.015"
    assert interference[0]["D"] == "0.540 ± 0.031"
    assert interference[0]["M"] == "0.1020 ± 0.0015"
    assert interference[1]["M"] == "0.1"
    # These decelerate before the first step that is fitted.
    assert losses[0]["verdict"] == "deceleration in 0 of 3"
    assert losses[0]["L_d"] == "–"
    assert "Width 32, seed 3 of 3: no break found" in found.text()
    assert "± is one standard error of the mean over the seeds" in " ".join(found.text().split())


def test_decelerations_of_seeds_are_averaged() -> None:
    pytest.importorskip("scipy")
    steps = np.arange(1, 3001.0)
    runs = []
    for level in (1.0, 1.1, 1.3):
        losses = 5 * level * np.where(steps < 400, steps**-0.3, 400**-0.3 * (steps / 400) ** -0.05)
        runs.append(
            [record("step", int(step), {"train.loss": Metric(float(loss), 64)}) for step, loss in zip(steps, losses, strict=True)]
        )
    straight = [record("step", int(step), {"train.loss": Metric(float(5 * step**-0.3), 64)}) for step in steps]
    found = compare({32: [*runs, straight]})
    line = dict(zip(found.losses[0], found.losses[1], strict=True))
    assert line["verdict"] == "deceleration in 3 of 4"
    mean, error = map(float, line["L_d"].split(" ± "))
    each = [float(sentence.partition("L_d = ")[2].partition(" ±")[0]) for sentence in found.findings[:3]]
    assert mean == pytest.approx(np.mean(each), rel=1e-2)
    assert error == pytest.approx(np.std(each, ddof=1) / math.sqrt(3), rel=0.05)


def test_a_probe_has_the_interference_of_every_parameter() -> None:
    t, same = trainer(), trainer()
    for step in (1, 2):
        t.step(step), same.step(step)
    x, y = same.batch(3)
    names = [name for name, _ in same.model.named_parameters()]
    g = per_example_gradients(token_losses(same.model, x, y).mean(1), same.model, names)
    before = {name: p.detach().clone() for name, p in same.model.named_parameters()}
    same.step(3)
    found = t.probed_step(3).measured
    for name, p in same.model.named_parameters():
        shares = g[name].sum(0).abs() / g[name].abs().sum(0)
        assert found[f"D_grad/{name}"].value == pytest.approx(1 - shares.nanmean().item(), rel=1e-4)
        along = g[name] * (p.detach() - before[name])
        agreement = along.sum(0).abs().sum() / along.abs().sum()
        assert found[f"C_g/{name}"].value == pytest.approx(agreement.item(), rel=1e-3)
        assert (found[f"D_grad/{name}"].n, found[f"C_g/{name}"].n) == (4, 4)
