"""The probe on another device than the CPU, without one: nothing forgets its device, and little waits for it."""

import json
import subprocess
import sys

import pytest

from tests.zerosum.models import ZOO

# The CPU's fused cells refuse tensors that say they are elsewhere.
LEFT_OUT = ("Recurrent", "RecurrentSequenceFirst")

# Reads of values that they may make: an embedding's touched rows are counted, once.
WITHOUT_WAITING = {"TwoLayers": 1, "UsedTwice": 1, "Tied": 3, "Conv1D": 1, "SplitQKV": 1, "LoRA": 1, "LayerNorms": 1, "OneHot": 0}


@pytest.fixture(scope="module")
def lines(project_environment):
    names = [kind.__name__ for kind in ZOO if not kind.random and kind.__name__ not in LEFT_OUT]
    command = [sys.executable, "-m", "tests.zerosum.elsewhere_driver", *names]
    done = subprocess.run(command, env=project_environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return {line["model"]: line for line in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("name", [kind.__name__ for kind in ZOO if not kind.random and kind.__name__ not in LEFT_OUT])
def test_says_what_it_says_on_the_cpu(name, lines):
    assert "error" not in lines[name], lines[name]["error"]


@pytest.mark.parametrize("name", WITHOUT_WAITING)
def test_does_not_wait_for_the_device(name, lines):
    assert lines[name]["reads"] <= WITHOUT_WAITING[name]


def test_a_forgotten_device_would_be_noticed(project_environment):
    program = (
        "import os, torch\nfrom tests.elsewhere import elsewhere\n"
        "with elsewhere() as device:\n"
        "    x = torch.randn(3, device=device)\n"
        "    try:\n        x + torch.randn(3)\n"
        "    except RuntimeError as error:\n        print(error, flush=True)\n"
        "os._exit(0)"
    )
    done = subprocess.run([sys.executable, "-c", program], env=project_environment, capture_output=True, text=True, timeout=100)
    assert "on the CPU meet others" in done.stdout, done.stderr[-2000:]
