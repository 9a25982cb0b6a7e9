"""What a chunk of tokens takes, in processes of their own: no more than the budget, and more with more of it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

STATUS = Path("/proc/self/status")
# Peaks are the process's high-water mark. With a fixed threshold glibc gives freed memory back, so that they are of what is held.
PROGRAM = """
import re, sys
from pathlib import Path
import torch
import zerosum
from zerosum.training.model import GPT, GPTConfig
torch.set_num_threads(1)
torch.manual_seed(0)
model = GPT(GPTConfig(vocab=64, width=32, layers=2, heads=4, positions=256))
x = torch.randint(64, (1, 256))
chunks = []
memory, sample = map(int, sys.argv[1:])
zerosum.token_report(model, x, x, sample=sample, memory=memory, progress=lambda done, total: chunks.append(done))
peak = re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1]
print(max(b - a for a, b in zip([0, *chunks], chunks)), 1024 * int(peak))
"""
MB = 2**20
# The scores of attention, (heads, T, T), are the largest activation: 1 MB for each token.
ONE_TOKEN = 5 * MB


def chunk_and_peak(environment: dict[str, str], memory: int, sample: int) -> tuple[int, int]:
    environment = {**os.environ, **environment, "MALLOC_MMAP_THRESHOLD_": str(2**17)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(memory), str(sample)], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr[-2000:]
    chunk, peak = map(int, done.stdout.split())
    return chunk, peak


@pytest.mark.skipif(not STATUS.exists() or not re.search("VmHWM", STATUS.read_text()), reason="there is no high-water mark to read")
def test_a_chunk_stays_within_its_budget(project_environment: dict[str, str]) -> None:
    least, smallest = chunk_and_peak(project_environment, ONE_TOKEN, sample=16)
    assert least == 1
    budget = 80 * MB
    chunk, peak = chunk_and_peak(project_environment, budget, sample=32)
    assert chunk == 16
    # The smallest has everything else in it, and one token.
    assert peak - smallest + ONE_TOKEN < budget + 8 * MB
    # And most of what was allowed is used.
    assert peak - smallest > 0.5 * (budget - ONE_TOKEN)
