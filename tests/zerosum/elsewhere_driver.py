"""Runs the probe on models on a device that is not there (tests/elsewhere.py), and prints a line of JSON for each. Arguments: their
names, of the zoo's classes or Late.

A process of its own: torch then knows another kind of device, and the autograd engine's thread for it does not end with the
interpreter.
"""

from __future__ import annotations

import copy
import json
import os
import sys
import warnings

import torch
import torch.nn.functional as F
from torch import nn

import zerosum
from tests import elsewhere
from tests.zerosum.models import DEVICE_KINDS, Packed
from tests.zerosum.test_adversarial import Hidden
from tests.zerosum.test_gpu import assert_same


def move(model: nn.Module, device: torch.device) -> nn.Module:
    """As ``model.to(device)``, which gives each name of a tied parameter one of its own where tensors are of a subclass."""
    moved: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                if p not in moved:
                    moved[p] = nn.Parameter(p.detach().to(device), p.requires_grad)
                module._parameters[name] = moved[p]
        for name, x in module._buffers.items():
            if x is not None:
                module._buffers[name] = x.to(device)
    return model


def report_of(model: nn.Module, tokens: torch.Tensor, packed: bool) -> tuple[zerosum.Report, int]:
    """Of the first pass after three examples were proved, and how often that waited for the device."""
    probe = zerosum.Probe(model, gram=True, num_examples=len(tokens) if packed else None)
    for _ in range(7):
        elsewhere.READS[0] = 0
        model.zero_grad()
        with probe:
            model(tokens).square().flatten(1).mean(1).sum().backward()
    reads = elsewhere.READS[0]
    return probe.report(), reads


def run(kind: type[nn.Module]) -> dict[str, object]:
    torch.manual_seed(0)
    model, tokens = kind().double().train(), torch.randint(0, 11, (3, 6))
    expected, _ = report_of(copy.deepcopy(model), tokens, kind is Packed)
    with elsewhere.elsewhere() as device:
        there, tokens = move(model, device), tokens.to(device)
        found, reads = report_of(there, tokens, kind is Packed)
        assert_same(found, expected, max(kind.rtol, 1e-9))  # type: ignore[attr-defined]
    return {"reads": reads}


class Late(nn.Module):
    """A function of a weight, and from some pass on a use of the weight beside it that no mode sees."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.weight, self.hidden = nn.Embedding(11, 12), nn.Parameter(torch.randn(12, 12) / 4), False

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        y = F.linear(self.table(tokens), 1 + self.weight)
        return Hidden.apply(y, self.weight, 1.0) if self.hidden else y


def run_late() -> dict[str, object]:
    """What is not covered when it is hidden, on the CPU and there, and how often that waited before the report was asked for."""
    torch.manual_seed(0)
    here, batch = Late().double(), torch.randint(0, 11, (9, 6))
    with elsewhere.elsewhere() as device:
        said, proofs = [], []
        for model, tokens in ((copy.deepcopy(here), batch), (move(here, device), batch.to(device))):
            probe = zerosum.Probe(model)
            for model.hidden in (False, False, True):
                elsewhere.READS[0] = 0
                model.zero_grad()
                with probe:
                    model(tokens).square().flatten(1).mean(1).sum().backward()
            reads, report = elsewhere.READS[0], probe.report()
            proofs.append(report.proof.proved)
            said.append((list(report), report.coverage.not_covered))
        assert proofs == [0, 0]
        assert said[0] == said[1], said
    return {"reads": reads, "not_covered": said[1][1]}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    names = sys.argv[1:]
    for kind in (kind for kind in DEVICE_KINDS if kind.__name__ in names):
        try:
            line = run(kind)
        except Exception as error:
            line = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps({"model": kind.__name__, **line}), flush=True)
    if "Late" in names:
        print(json.dumps({"model": "Late", **run_late()}), flush=True)
    sys.stdout.flush()
    os._exit(0)
