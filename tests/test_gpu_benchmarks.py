"""That the device's benchmarks run, on the CPU: the hour there is a device is not the hour to find out."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_benchmarks_of_a_device_run(project_environment):
    command = [sys.executable, "-m", "pytest", "benchmarks/gpu", "--device", "cpu", "--quick", "--benchmark-disable"]
    done = subprocess.run(command, env=project_environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert " passed" in done.stdout
    assert "failed" not in done.stdout


def test_the_kernels_are_timed(project_environment):
    command = [sys.executable, "-m", "benchmarks.gpu.kernels", "--device", "cpu", "--quick"]
    done = subprocess.run(command, env=project_environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [line for line in done.stdout.splitlines() if line.startswith("#")] == [
        "# Kernels on the CPU",
        "## bfloat16",
        "## float32",
        "## float32, tf32 allowed for both",
        "## Derivatives with respect to a and b",
        "## coordinate_sums",
        "## dense_interference",
        "## scale_bias_grad",
        "## embedding_interference",
    ]


def test_steps_are_timed(project_environment):
    command = [sys.executable, "-m", "benchmarks.gpu.steps", "--device", "cpu", "--quick", "--modes", "eager", "captured"]
    done = subprocess.run(command, env=project_environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [line.split("|")[1].strip() for line in done.stdout.splitlines() if line.startswith("| GPT")] == [
        f"{model}, eager, {step}"
        for model in ("GPT, bfloat16 by autocast", "GPT, float32", "GPT-2, bfloat16 by autocast")
        for step in ("plain", "probe", "probe, with the Gram")
    ]


def test_the_script_says_what_is_missing(project_environment):
    environment = {**project_environment, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([ROOT / "benchmarks" / "gpu.sh"], env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode != 0
    assert "not live: triton: this machine has no CUDA device" in done.stderr, os.linesep.join([done.stdout, done.stderr])


def test_the_script_runs_the_benchmarks_whatever_the_tests_find(tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$@"\ncase "$*" in *" tests "*) exit 3;; esac\n')
    python.chmod(0o755)
    command = [ROOT / "benchmarks" / "gpu.sh", "-k", "head"]
    done = subprocess.run(command, env={**os.environ, "PYTHON": str(python)}, capture_output=True, text=True, timeout=100)
    assert "pytest tests -m gpu -n auto --maxprocesses 16 -p no:benchmark" in done.stdout, done.stderr
    assert "-m benchmarks.gpu.kernels" in done.stdout
    assert "-m benchmarks.gpu.steps" in done.stdout
    assert "-m zerosum bench --device cuda --json benchmarks/results/bench_cuda.json" in done.stdout
    assert "pytest benchmarks/gpu --device cuda --results gpu -k head" in done.stdout
    assert done.returncode == 3
