"""The ops' tests run on poisoned memory: whatever torch.empty gives, in Python and in C++, is NaN (0xFF in byte workspaces)."""

import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_memory():
    before = torch.are_deterministic_algorithms_enabled()
    # On a device some of PyTorch's own operations have no deterministic form; poison is the point here.
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
    yield
    torch.use_deterministic_algorithms(before)
