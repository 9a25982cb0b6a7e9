"""One of two processes that add up their reports: prints what it found as JSON.

python -m tests.zerosum.all_reduce_driver FILE RANK
"""

import json
import sys
import warnings

import torch
import torch.distributed as dist
from torch import nn

from tests.zerosum.oracle import assert_truth
from tests.zerosum.test_report_data import Step, blocks

PARTS = [[slice(0, 2)], [slice(2, 5), slice(5, 7)]]  # of each rank


def main() -> None:
    file, rank = sys.argv[1], int(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    found: dict[str, object] = {}

    step = Step(gram=True, along=True)
    report = step.report(*PARTS[rank]).all_reduce(direction=step.direction)
    assert_truth(report, step.truth(), step.direction, gram=blocks(2, 3, 2))
    whole = step.report(slice(0, 2), slice(2, 5), slice(5, 7))
    for name, metric in whole.metrics.items():
        assert abs(report.metrics[name].value - metric.value) <= 1e-9 * abs(metric.value), name
        assert report.metrics[name].n == 7
    found["whole batch"] = "right"
    found["blocks"] = [len(block) for block in report.gram_blocks or []]

    step = Step()
    step.model.zero_grad()
    with step.probe, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        losses = step.losses(slice(3, 7))
        (losses.prod() if rank == 0 else losses.sum()).backward()
    report = step.probe.report().all_reduce()
    found["not covered"] = list(report.coverage.not_covered)

    report = step.report(PARTS[rank][0])
    if rank == 1:
        nn.utils.clip_grad_norm_(step.model.parameters(), 1e-3)
    try:
        report.all_reduce()
    except RuntimeError as error:
        found["clipped"] = str(error)
    print(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
