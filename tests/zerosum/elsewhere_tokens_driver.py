"""Measures tokens' own gradients on a device that is not there (tests/elsewhere.py), and prints what was found there and here."""

from __future__ import annotations

import copy
import json
import os
import sys
import warnings
from typing import Any

import torch

import zerosum
from tests import elsewhere
from tests.zerosum.elsewhere_driver import move
from zerosum.training.model import GPT, GPTConfig

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    model = GPT(GPTConfig(31, 16, 2, 2, 8)).double()
    x, y = torch.randint(31, (2, 8)), torch.randint(31, (2, 8))
    direction = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    # (There is no forward mode for tensors of a subclass: a sample goes without a direction.)
    options: dict[str, dict[str, Any]] = {"exact": {"direction": direction}, "sampled": {"sample": 12}}
    options |= {f"{name}, kept on the CPU": {**how, "results_device": "cpu"} for name, how in options.items()}
    here = {name: zerosum.token_report(copy.deepcopy(model), x, y, **how).metrics for name, how in options.items()}
    with elsewhere.elsewhere() as device:
        there = move(model, device)
        x, y = x.to(device), y.to(device)
        direction = {name: u.to(device) for name, u in direction.items()}
        sums: dict[str, Any] = {}
        for name, how in options.items():
            report = zerosum.token_report(there, x, y, **(how | ({"direction": direction} if "direction" in how else {})))
            pairs = {key: (metric.value, report.metrics[key].value) for key, metric in here[name].items()}
            fields = ("grad_sum", "abs_sum", "sq_sum" if "exact" in name else "abs_error")
            sums[name] = {key: [getattr(report[key], field) for field in fields] for key in report}
            devices = sorted({x.device.type for fields in sums[name].values() for x in fields})
            kind, _, kept = name.partition(", ")
            same = None
            if kept:
                pairs_of_sums = [pair for key in sums[kind] for pair in zip(sums[kind][key], sums[name][key], strict=True)]
                same = all(torch.equal(one.cpu(), other) for one, other in pairs_of_sums)
            print(json.dumps({"name": name, "pairs": pairs, "devices": devices, "same": same}), flush=True)
    sys.stdout.flush()
    os._exit(0)
