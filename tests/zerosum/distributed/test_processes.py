"""The probe in several processes (gloo). Cases share processes, which take longer to start than all of them to run."""

from tests.zerosum.distributed.workers import run

HERE = "tests.zerosum.distributed"


def test_two_processes() -> None:
    run(2, f"{HERE}.ddp_cases", f"{HERE}.fsdp_cases", f"{HERE}.parallel_cases")


def test_four_processes() -> None:
    run(4, f"{HERE}.mesh_cases")
