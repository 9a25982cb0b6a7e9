"""``zerosum bench``: the ways agree with each other, and what the command prints, writes and refuses."""

from __future__ import annotations

import json
import math
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from zerosum import cli
from zerosum.bench import accuracy, run
from zerosum.bench.cases import Case, OpCase, StepCase
from zerosum.bench.memory import Forks
from zerosum.bench.ways import Way
from zerosum.training.model import GPTConfig

TINY = ("bench", "--device", "cpu", "--quick", "--sizes", "3x8", "--width", "32", "--layers", "1", "--vocab", "40")
STEP = StepCase(GPTConfig(vocab=40, width=32, layers=1, heads=1, positions=8), 3).small()
OP = OpCase(3, 8, 32, 32).small()


@pytest.fixture(autouse=True)
def _briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    """No comparison goes on after its least rounds."""
    monkeypatch.setattr(cli.bench, "QUICK", cli.bench.QUICK._replace(seconds=1e-3))


@pytest.fixture
def ours_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peers take seconds to import, with warnings."""
    monkeypatch.setattr(run, "available", lambda case: [way for way in case.ways if not way.package])


def rounding(case: Case[Any], unit: float) -> dict[str, float]:
    """How far the statistics may be from the truth: their gradients differ from the exact ones by ``share`` of each gradient's
    norm, and |Σ|g| − Σ|g'|| ≤ Σ|g − g'|, ‖·‖ of which is at most Σᵢ ‖gᵢ − gᵢ'‖. A square and a product have two factors.

    ``share`` is that of PyTorch's own backward pass in the same precision; other orders of the same sums err by a few
    times as much.
    """
    work = case.make("cpu")
    exact = accuracy.of_step(work) if isinstance(case, StepCase) else accuracy.of_op(work)
    flat = torch.cat([g.flatten(1) for g in exact.values()], 1)
    plain = accuracy.errors(case, case.ways[:1], "cpu")[case.ways[0].name]["grad_sum"]
    share = 4 * max(plain, unit)
    norms = flat.norm(dim=1)
    sizes = {
        "grad_sum": norms.sum() / flat.sum(0).norm(),
        "abs_sum": norms.sum() / flat.abs().sum(0).norm(),
        "sq_sum": 2 * norms.square().sum() / flat.square().sum(0).norm(),
        "l1": math.sqrt(flat.shape[1]) * norms.norm() / flat.abs().sum(1).norm(),
        "sq_norm": 2 * norms.square().norm() / norms.square().norm(),
        "gram": 2 * norms.square().sum() / (flat @ flat.T).norm(),
        "dot": math.inf,  # along any direction there is as much cancellation as one likes; abs_dot has the same terms
        "abs_dot": 1e2,
    }
    return {name: share * float(size) for name, size in sizes.items()}


def ways_of(case: Case[Any]) -> list[Any]:
    return [pytest.param(case, way, id=f"{type(case).__name__}-{way.name.strip()}") for way in case.ways]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("case", "way"), [*ways_of(STEP), *ways_of(OP)])
def test_every_way_computes_what_it_says_and_it_is_the_truth(case: Case[Any], way: Way[Any]) -> None:
    if way.package:
        pytest.importorskip(way.package)
    work = case.make("cpu")
    step = way.start(work)
    for _ in range(2):  # what one pass leaves behind is not in the next
        found = step()()
    assert found.computed == way.computes
    without = {"embedding.weight"} if any("without the embedding" in note for note in way.notes) else set()
    names = {name for name, _ in work.model.named_parameters()} if isinstance(case, StepCase) else {"weight"}
    assert set(found.parameters) == names - without
    allowed = rounding(case, 2.0**-24)
    for name, error in accuracy.compare(found, accuracy.truth(work, found)).items():
        assert error <= allowed[name], name


def main(*more: str) -> int:
    return cli.main([*TINY, *more])


@pytest.mark.usefixtures("ours_alone")
def test_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {name: tmp_path / f"bench.{end}" for name, end in (("json", "json"), ("markdown", "md"), ("figure", "png"))}
    assert main(*(text for name, path in files.items() for text in (f"--{name}", str(path)))) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 120
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in files.values())
    found = json.loads(files["json"].read_text())
    sections = {section["title"]: section for section in found["sections"]}
    assert list(sections) == ["One weight, N=3 T=8 O=128 K=32, float32", "Training step, N=3 T=8, float32"]
    for section in sections.values():
        assert section["title"] in printed
        assert section["title"] in files["markdown"].read_text()
        for row in section["rows"]:
            assert "problem" not in row or row["problem"] is None, row
            assert row["ratio"]["median"] > 0
            assert row["ratio"]["low"] <= row["ratio"]["median"] <= row["ratio"]["high"]
            assert row["rounds"] >= 3
            assert row["way"] in printed
    assert {error for case in found["accuracy"] for of in case["errors"].values() for error in of} >= {
        "grad_sum",
        "abs_sum",
        "gram",
    }
    assert files["figure"].read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sizes", "8"], "--sizes: expected NxT"),
        (["--sizes", "1x8"], "--sizes: expected NxT"),
        (["--width", "33"], "--width"),
        (["--dtype", "float16"], "--dtype"),
        (["--figure", "bench.pdf"], "--figure: expected a .png or .svg file, got bench.pdf"),
        (["--json", "."], "--json: cannot write .: it is a directory"),
        (["--json", "absent/bench.json"], "--json: cannot write absent/bench.json: No such file or directory"),
        (["--device", "cuda:7"], "--device"),
    ],
)
def test_bad_options_are_named(
    options: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        code = main(*options)
    except SystemExit as ended:
        code = ended.code
    assert code == 2
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("ours_alone")
def test_an_interruption_prints_what_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compare, calls = run.compare, []

    def interrupted(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return compare(*arguments)

    monkeypatch.setattr(run, "compare", interrupted)
    assert threading.current_thread() is threading.main_thread()
    assert main("--json", str(tmp_path / "bench.json")) == 130
    printed = capsys.readouterr().out
    assert "Stopped: this is what was measured so far. No file was written." in printed
    assert "interference" in printed
    assert not list(tmp_path.iterdir())


def test_a_way_that_fails_is_named_and_the_others_are_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(work: Any) -> Any:
        raise NotImplementedError("no rule for it\nand more")

    monkeypatch.setattr(Forks, "peak", lambda *_: 1_000_000)
    first, second, *_ = OpCase.ways
    monkeypatch.setattr(OpCase, "ways", (first, Way("failing", ("gram",), fails), second))
    monkeypatch.setattr(StepCase, "ways", StepCase.ways[:2])
    assert main() == 0
    printed = capsys.readouterr().out
    assert "NotImplementedError: no rule for it" in printed
    assert "and more" not in printed
    assert "interference" in printed
