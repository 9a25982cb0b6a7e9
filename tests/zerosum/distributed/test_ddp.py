"""DistributedDataParallel on two processes (gloo)."""

from tests.zerosum.distributed.workers import run


def test_ddp() -> None:
    run("tests.zerosum.distributed.ddp_cases", 2)
