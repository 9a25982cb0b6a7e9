"""Models that ``fully_shard`` has sharded, on two and four processes (gloo)."""

from tests.zerosum.distributed.workers import run


def test_fsdp() -> None:
    run("tests.zerosum.distributed.fsdp_cases", 2)


def test_meshes() -> None:
    run("tests.zerosum.distributed.mesh_cases", 4)
