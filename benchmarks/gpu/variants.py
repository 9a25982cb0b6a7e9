"""Every shipped configuration of every Triton kernel, as launches compile it, for the tests and the report."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from benchmarks.gpu import variants_of_others, variants_of_tiles
from benchmarks.gpu.sass import Variant


def variants(arch: int) -> Iterator[Variant]:
    return chain(variants_of_tiles.variants(arch), variants_of_others.variants(arch))
