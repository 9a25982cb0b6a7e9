"""Measures tokens' own gradients on a device that is not there (tests/elsewhere.py), and prints what was found there and here."""

from __future__ import annotations

import copy
import json
import os
import sys
import warnings

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
    options = {"exact": {"direction": direction}, "sampled": {"sample": 12}}
    here = {name: zerosum.token_report(copy.deepcopy(model), x, y, **how).metrics for name, how in options.items()}
    with elsewhere.elsewhere() as device:
        there = move(model, device)
        x, y = x.to(device), y.to(device)
        options["exact"]["direction"] = {name: u.to(device) for name, u in direction.items()}
        for name, how in options.items():
            found = zerosum.token_report(there, x, y, **how).metrics
            pairs = {key: (metric.value, found[key].value) for key, metric in here[name].items()}
            print(json.dumps({"name": name, "pairs": pairs}), flush=True)
    sys.stdout.flush()
    os._exit(0)
