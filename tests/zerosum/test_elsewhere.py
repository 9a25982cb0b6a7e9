"""The probe on another device than the CPU, without one: nothing forgets its device, and little waits for it."""

import json
import subprocess
import sys
from functools import cache

import pytest

from tests.zerosum.models import DEVICE_KINDS
from zerosum.training.demo import demo
from zerosum.training.loop import Settings

# What a pass waits for although nothing is proved in it, or why it is proved in every pass.
WAITING = {
    "SlicedWeight": "whether slices overlap",
    "CustomFunction": "whether each example's losses are separate",
    "Mixture": "which rows are whose",
    "MixtureSorted": "which rows are whose",
    "MixtureOfModules": "which rows are whose",
    "Packed": "which rows are whose",
    "LoopOverExamples": "which rows are whose",
    "ReZero": "which rows are whose: gradients of zero say nothing",
    "CheckpointedReentrant": "which rows are whose, in each checkpoint",
}


NAMES = [kind.__name__ for kind in DEVICE_KINDS]
ALWAYS = NAMES[::3]  # the models of `make test`
OTHERS = pytest.mark.slow("further models")


def models(names):
    return [name if name in ALWAYS else pytest.param(name, marks=OTHERS) for name in names]


@pytest.fixture(scope="module")
def line_of(project_environment):
    """What the driver says of a model, by its name. It runs once for the models of a tier."""

    @cache
    def lines(always):
        names = [name for name in NAMES if (name in ALWAYS) == always]
        command = [sys.executable, "-m", "tests.zerosum.elsewhere_driver", *names, *(["Late"] if always else [])]
        done = subprocess.run(command, env=project_environment, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr[-3000:]
        return {line["model"]: line for line in map(json.loads, done.stdout.splitlines())}

    return lambda name: lines(name in (*ALWAYS, "Late"))[name]


@pytest.mark.parametrize("name", models(NAMES))
def test_says_what_it_says_on_the_cpu(name, line_of):
    line = line_of(name)
    assert "error" not in line, line["error"]


@pytest.mark.parametrize("name", models(name for name in NAMES if name not in WAITING))
def test_does_not_wait_for_the_device(name, line_of):
    assert line_of(name)["reads"] == 0


def test_a_gradient_that_was_not_all_seen_is_told_by_the_report(line_of):
    assert line_of("Late") == {
        "model": "Late",
        "reads": 0,
        "not_covered": {"weight": "part of its gradient came through an operation that the probe cannot see"},
    }


def test_tokens_are_measured_as_on_the_cpu(project_environment):
    command = [sys.executable, "-m", "tests.zerosum.elsewhere_tokens_driver"]
    done = subprocess.run(command, env=project_environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {line["name"]: line for line in map(json.loads, done.stdout.splitlines())}
    assert found.keys() == {"exact", "sampled", "exact, kept on the CPU", "sampled, kept on the CPU"}
    for name, line in found.items():
        kept = "CPU" in name
        assert line["devices"] == ["cpu" if kept else "npy"]
        assert line["same"] is (True if kept else None)
        pairs = line["pairs"]
        assert "D_grad" in pairs
        for name, (here, there) in pairs.items():
            assert there == pytest.approx(here, rel=1e-9), name


def test_the_demo_and_measure_say_there_what_they_say_on_the_cpu(project_environment, tmp_path, capsys):
    text, run = tmp_path / "text.txt", tmp_path / "run"
    text.write_bytes(b"".join(b"%d green bottles hanging on the wall. " % n for n in range(200)))
    assert demo(Settings(2, 0, 32, 1, 4, 16), [text], run, keep_checkpoints=True) == 0
    command = [sys.executable, "-m", "tests.zerosum.elsewhere_measure_driver", str(run), str(text)]
    done = subprocess.run(command, env=project_environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {line["name"]: line["pairs"] for line in map(json.loads, done.stdout.splitlines())}
    assert found.keys() == {"optimizer", "gradient", "next", "none", "training"}
    for pairs in found.values():
        assert {"D_grad", "grad_norm"} <= pairs.keys()
        for name, (here, there) in pairs.items():
            # Sums of float32 in another order; a D near zero is a difference of them.
            assert there == pytest.approx(here, rel=1e-4, abs=1e-5), name


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


def test_results_of_unknown_size_are_waited_for(project_environment):
    program = (
        "import os, torch\nfrom tests import elsewhere\n"
        "import zsl_kernels as zk\n"
        "with elsewhere.elsewhere() as device:\n"
        "    x, n = torch.arange(4, device=device), torch.ones(4, dtype=torch.long, device=device)\n"
        "    calls = [lambda: x.nonzero(), lambda: x.unique_consecutive(), lambda: x[x > 1], lambda: x.repeat_interleave(n),\n"
        "             lambda: x.repeat_interleave(n, output_size=4), lambda: x[n], lambda: x.sort(),\n"
        "             lambda: zk.weighted_grad(x[:, None].float(), n[:, None].float(), n.float(), example_ids=x, num_examples=4)]\n"
        "    for call in calls:\n"
        "        elsewhere.READS[0] = 0\n        call()\n        print(elsewhere.READS[0], end=' ', flush=True)\n"
        "os._exit(0)"
    )
    done = subprocess.run([sys.executable, "-c", program], env=project_environment, capture_output=True, text=True, timeout=100)
    assert done.stdout.split() == ["1"] * 4 + ["0"] * 4, done.stderr[-2000:]
