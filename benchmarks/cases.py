"""Sizes and inputs of the op-level benchmarks. Letters as everywhere: N examples, T positions, O and K features."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from tests.inputs import Inputs, Problem


@dataclass(frozen=True)
class Case:
    """One layer and one batch."""

    N: int
    T: int
    O: int
    K: int

    def __str__(self) -> str:
        return f"N={self.N} T={self.T} O={self.O} K={self.K}"

    @property
    def flops(self) -> float:
        """Of the weight gradient's product; a multiply-add counts as two."""
        return 2.0 * self.N * self.T * self.O * self.K


@lru_cache(maxsize=32)
def inputs(case: Case, dtype: torch.dtype = torch.float32) -> Inputs:
    """As the tests make them."""
    return Problem(N=case.N, T=case.T, K=case.K, O=case.O, M=0, dtype=dtype).make()
