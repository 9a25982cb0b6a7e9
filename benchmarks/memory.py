"""Peak memory of one thing in a fresh process: ``python -m benchmarks.memory step "probe + Gram"`` prints bytes.

The peak is the process's own high-water mark. Bytes of ``op`` and ``head`` are counted from just before the call, those of ``step``
from zero. A ``step`` is the project's GPT's, or with a family and sizes (``GPT-2 256 4 4096 64 64``) that of a model of
transformers.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import zsl_kernels as zk
from benchmarks.cases import Case
from benchmarks.heads import HEADS, Head, HeadCase
from benchmarks.transformer_steps import ModelCase, TransformerWorkload
from zerosum.bench.memory import RETURNING, peak
from zerosum.bench.ways import STEPS
from zerosum.bench.workload import Workload
from zsl_kernels.backends import reference


class Operands(NamedTuple):
    a: Tensor
    b: Tensor
    direction: Tensor


OPS = {
    "interference": lambda x: zk.interference(x.a, x.b, direction=x.direction),
    "interference + Gram": lambda x: zk.interference(x.a, x.b, direction=x.direction, gram=True),
    "chunked": lambda x: zk.interference(x.a, x.b, direction=x.direction, impl="chunked"),
    "materialized": lambda x: reference.interference(x.a, x.b, x.direction, False),
}


def step_peak(name: str, work: Workload, steps: int = 4) -> int:
    run = next(way for way in STEPS if way.name == name).start(work)
    for _ in range(steps):
        run()
    return peak()


def op_peak(name: str, case: Case) -> int:
    OPS[name](operands(Case(2, 4, 32, 32)))  # threads, libraries and their buffers
    x = operands(case)
    before = peak()
    OPS[name](x)
    return peak() - before


def head_peak(name: str, case: HeadCase) -> int:
    HEADS[name](Head.make(HeadCase(2, 4, 32, 500, case.dtype)))
    x = Head.make(case)
    before = peak()
    HEADS[name](x)
    return peak() - before


def operands(case: Case) -> Operands:
    """Made without temporaries, which would raise the mark."""
    return Operands(torch.ones(case.N, case.T, case.K), torch.ones(case.N, case.T, case.O), torch.ones(case.O, case.K))


def in_fresh_process(*arguments: object, returning: bool = True) -> int:
    """With ``returning``, freed memory is not kept for reuse."""
    command = [sys.executable, "-m", "benchmarks.memory", *map(str, arguments)]
    environment = {**os.environ, **(RETURNING if returning else {})}
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


if __name__ == "__main__":
    kind, variant, *sizes = sys.argv[1:]
    torch.set_grad_enabled(kind == "step")
    if kind == "head":
        *sizes, dtype = sizes
        print(head_peak(variant, HeadCase(*map(int, sizes), dtype)))
    elif kind == "step":
        family, *numbers = sizes or [None]
        print(step_peak(variant, TransformerWorkload.of(ModelCase(family, *map(int, numbers))) if family else Workload.make()))
    else:
        print(op_peak(variant, Case(*map(int, sizes))))
