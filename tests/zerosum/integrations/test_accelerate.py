"""A loop with Accelerate: accumulation and clipping, against one backward pass for each example."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import zerosum
from tests.zerosum.integrations.tiny import BYTES, TEXT, block_mask
from tests.zerosum.oracle import assert_truth, per_example_gradients, trainable
from zerosum.training.model import GPT, GPTConfig

accelerate = pytest.importorskip("accelerate")


@pytest.mark.filterwarnings("ignore:.*pin_memory:UserWarning")
def test_a_step_of_an_accelerated_loop_is_the_truth() -> None:
    torch.manual_seed(0)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    plain = GPT(GPTConfig(vocab=BYTES, width=16, layers=2, heads=4, positions=9)).double()
    rows = torch.tensor(list(TEXT[:60])).view(6, 10)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    model, optimizer, loader = accelerator.prepare(plain, optimizer, DataLoader(TensorDataset(rows), batch_size=3))
    losses = F.cross_entropy(plain(rows[:, :-1]).mT, rows[:, 1:], reduction="none").mean(1)
    truth = per_example_gradients(losses, plain, trainable(plain))
    probe = zerosum.Probe(accelerator.unwrap_model(model), gram=True)
    probe.__enter__()
    for (batch,) in loader:
        with accelerator.accumulate(model):
            accelerator.backward(F.cross_entropy(model(batch[:, :-1]).mT, batch[:, 1:]))
            if accelerator.sync_gradients:
                probe.__exit__(None)
                assert_truth(probe.report(), truth, gram=block_mask([3, 3]))
                accelerator.clip_grad_norm_(model.parameters(), 0.01)
            optimizer.step()
            optimizer.zero_grad()
    assert probe.report().coverage.share == 1
