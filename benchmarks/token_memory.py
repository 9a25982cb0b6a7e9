"""The peak of :func:`zerosum.token_report` in copies of the parameters, the model itself and a direction included.

For a model whose weights outweigh its activations: ``python -m benchmarks.token_memory [width] [layers]`` prints a table. The
limit is tested by ``tests/zerosum/test_tokens_memory.py``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import zerosum
from zerosum.training.model import GPT, GPTConfig

VOCAB, HEADS, POSITIONS, SEQUENCES, DRAWS = 64, 4, 16, 2, 64


def peak_of(call: Callable[[], object]) -> int:
    """The most bytes of tensors that a call holds at once on the CPU, beyond those that were there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        result = call()
    del result
    assert profiled.profiler is not None
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def token_peak(model: GPT, *, directed: bool, sample: int | None, tied: bool = False) -> float:
    """In copies of the parameters."""
    if tied:
        model.head.weight = model.embedding.weight
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randint(VOCAB, (SEQUENCES, POSITIONS), generator=generator) for _ in range(2))
    direction: dict[str, Tensor] | None = None
    if directed:
        direction = {name: torch.randn(p.shape, generator=generator) for name, p in model.named_parameters()}
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    peak = peak_of(lambda: zerosum.token_report(model, x, y, direction=direction, sample=sample))
    return 1 + directed + peak / parameters


def small_model(width: int = 512, layers: int = 4) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(VOCAB, width, layers, HEADS, POSITIONS))


if __name__ == "__main__":
    sizes = map(int, sys.argv[1:3])
    model = small_model(*sizes)
    print("| token_report | peak, copies of the parameters |\n|---|---|")
    for name, sample in (("exact", None), (f"{DRAWS} draws", DRAWS)):
        for directed in (False, True):
            print(
                f"| {name}{', with a direction' * directed} | {token_peak(model, directed=directed, sample=sample):.1f} |",
                flush=True,
            )
