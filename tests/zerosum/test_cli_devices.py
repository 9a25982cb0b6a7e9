"""--device and --autocast of the commands that compute."""

import json

import pytest
import torch

from zerosum.cli import main
from zerosum.cli.arguments import chosen, device

DEMO = ("--steps", "2", "--width", "32", "--layers", "1", "--sequences", "4", "--positions", "16", "--device", "cpu")
COMMANDS = (["demo"], ["measure", "nothing", "--data", "nothing"], ["doctor"])


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
@pytest.mark.parametrize("name", ["meta", "cuda:99", "gpu", "cpu:x"])
def test_a_device_that_is_not_there_is_refused_before_anything_is_done(name, command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*command, "--device", name])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "--device: expected a device" in said
    assert repr(name) in said


def test_without_the_option_a_gpu_is_taken_where_there_is_one(monkeypatch):
    for there, expected in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert chosen(None) == torch.device(expected)
        assert chosen(device("cpu")) == torch.device("cpu")


def test_doctor_checks_what_runs_on_the_device(capsys):
    assert main(["doctor", "--device", "cpu"]) == 0
    checked = capsys.readouterr().out.partition("Checked against the reference:")[2]
    assert "chunked" in checked
    assert "triton" not in checked


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_bytes(b"".join(b"%d green bottles hanging on the wall. " % n for n in range(200)))
    return path


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def close(found, expected):
    """As far as eight bits of a product's operands are, and not to the last bit."""
    return found != expected and found == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("examples", ["sequence", "token"])
def test_autocast_rounds_gradients_and_no_losses(examples, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--text", str(text), "--out", "run", *DEMO]) == 0
    how = [
        "measure",
        "run",
        "--data",
        str(text),
        "--positions",
        "16",
        "--examples",
        examples,
        "--device",
        "cpu",
        "--out",
        "m.jsonl",
    ]
    assert main([*how, "--name", "plain"]) == 0
    assert main([*how, "--name", "autocast", "--autocast"]) == 0
    plain, rounded = ({name: m["value"] for name, m in entry["metrics"].items()} for entry in records(tmp_path / "m.jsonl"))
    assert rounded["loss"] == plain["loss"]
    for name in ("D_grad", "grad_norm", "C_g"):
        assert close(rounded[name], plain[name]), name


def test_what_a_step_does_to_losses_is_not_rounded(text, tmp_path, monkeypatch):
    """A step so short that it changes losses by less than rounding products to bfloat16 does."""
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--text", str(text), "--out", "run", *DEMO]) == 0
    how = ["measure", "run", "--data", str(text), "--positions", "16", "--device", "cpu", "--out", "m.jsonl"]
    how += ["--update", "gradient", "--learning-rate", "1e-3"]
    assert main([*how, "--name", "plain"]) == 0
    assert main([*how, "--name", "autocast", "--autocast"]) == 0
    plain, rounded = (entry["metrics"] for entry in records(tmp_path / "m.jsonl"))
    for name in ("held_out.M", "train.M"):
        assert close(rounded[name]["value"], plain[name]["value"]), name
        assert plain[name]["value"] < 2**-9 * plain["loss"]["value"]


def test_a_run_under_autocast_says_so_and_is_measured_as_any(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--text", str(text), "--out", "plain", *DEMO]) == 0
    assert main(["demo", "--text", str(text), "--out", "rounded", "--autocast", *DEMO]) == 0
    plain, rounded = (records(tmp_path / name / "metrics.jsonl")[0]["metrics"] for name in ("plain", "rounded"))
    assert rounded["train.loss"]["value"] == pytest.approx(plain["train.loss"]["value"], rel=0.01)
    assert close(rounded["train.grad_norm"]["value"], plain["train.grad_norm"]["value"])
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("plain", "rounded")]
    assert configs[1].pop("autocast") is True
    assert configs[0] == configs[1]
    assert main(["measure", "rounded", "--data", str(text), "--positions", "16", "--device", "cpu"]) == 0
    assert main(["demo", "--text", str(text), "--out", "rounded", *DEMO]) == 2  # another run


def test_lines_that_do_not_say_autocast_were_measured_without(text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--text", str(text), "--out", "run", *DEMO]) == 0
    how = ["measure", "run", "--data", str(text), "--positions", "16", "--device", "cpu", "--out", "m.jsonl"]
    assert main(how) == 0
    lines = records(tmp_path / "m.jsonl")
    for entry in lines:
        assert entry["settings"].pop("autocast") is False
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in lines))
    capsys.readouterr()
    assert main(how) == 0
    assert "1 measured already" in capsys.readouterr().out
    assert main([*how, "--autocast"]) == 2
    assert "settings.autocast is False there and True here" in capsys.readouterr().err
