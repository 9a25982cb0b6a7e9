"""The ops' tests run on poisoned memory: whatever torch.empty gives, in Python and in C++, is NaN (0xFF in byte workspaces)."""

import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_memory():
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)
