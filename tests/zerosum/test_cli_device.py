"""--device of the commands that compute."""

import pytest
import torch

from zerosum.cli import main
from zerosum.cli.arguments import chosen, device

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
