"""The probe in several processes (gloo). Cases share processes, which take longer to start than all of them to run."""

import subprocess
import sys
from pathlib import Path

from tests.zerosum.distributed.workers import run

HERE = "tests.zerosum.distributed"
EXAMPLE = Path(__file__).parents[3] / "examples" / "ddp.py"


def test_two_processes() -> None:
    run(2, f"{HERE}.ddp_cases", f"{HERE}.fsdp_cases", f"{HERE}.parallel_cases")


def test_four_processes() -> None:
    run(4, f"{HERE}.mesh_cases")


def test_torchrun(project_environment: dict[str, str]) -> None:
    """The example, as torchrun starts it, has one report of both ranks' examples, as the processes that it starts itself have."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = project_environment | {"OMP_NUM_THREADS": "1"}
    said = [
        subprocess.run([sys.executable, *how, EXAMPLE], env=environment, capture_output=True, text=True, timeout=200)
        for how in (torchrun, [])
    ]
    assert [run.returncode for run in said] == [0, 0], said[0].stderr[-2000:] + said[1].stderr[-2000:]
    assert said[0].stdout == said[1].stdout
    assert said[0].stdout.count("N = 16") == 3
