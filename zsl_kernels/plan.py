"""The cost model: which way, and which tile, for one call.

A pure function of integers, so that it can be printed and tested. Every way of computing an op is a candidate with its number of
floating-point operations (*work*: a multiply-add counts as two) and its *cost*, the work weighted with how fast that kind of work
goes, in units of the direct kernel's product. The cheapest candidate wins. Left out on purpose: the operands' layout, and every
cache but the one that the tile is sized for.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

OPS = ("interference", "gram", "dot", "sq_norm", "weighted_grad")

# Output rows and columns of a tile. Larger ones pack the operands less often; smaller ones keep the sums closer. Multiples of
# every register tile (csrc/cpu).
TILE_O, TILE_K = 192, 384
ROWS, COLS = 12, 32
CHUNK = 256  # positions packed at a time
# The Gram keeps a tile of every example; past this many bytes for each worker the tile shrinks.
STORED_BYTES = 16 << 20
# The chunked form's workspace: the gradients of all examples for a slab of output rows.
CHUNKED_BYTES = 32 << 20
GHOST_SIDE = 96  # rows of a ghost block

# Relative costs, from `make bench` on x86-64.
_FOLD = 12.0  # folding one element of one g_i into the sums and scalars
_FOLD_SCALAR = 4.0  # the same into one scalar
_PAIR = 1.4  # one operation of the pairwise products of stored tiles
_GHOST = 1.3  # one operation of the ghost form
_MATMUL = 1.2  # one operation of a library matrix product
_CHUNKED_FOLD = 40.0  # folding one element of one g_i from memory, one pass for each sum


@dataclass(frozen=True)
class Candidate:
    """One way of computing an op."""

    impl: str
    way: str  # "direct", "ghost", "rank-one", "chunked" or "matmul"
    tile: tuple[int, int]  # output rows × columns handled at a time
    work: float  # floating-point operations
    cost: float  # weighted work
    workspace: int  # bytes, for each thread (chunked: in all)


@dataclass(frozen=True)
class Plan:
    """What a call does. ``print`` it to see the candidates; ``impl``, ``way`` and ``tile`` are the choice."""

    call: str
    candidates: tuple[Candidate, ...]  # cheapest first

    @property
    def chosen(self) -> Candidate:
        return self.candidates[0]

    @property
    def impl(self) -> str:
        return self.chosen.impl

    @property
    def way(self) -> str:
        return self.chosen.way

    @property
    def tile(self) -> tuple[int, int]:
        return self.chosen.tile

    def __str__(self) -> str:
        lines = [f"{self.call}: {self.way} ({self.impl})"]
        for c in self.candidates:
            lines.append(
                f"  {'->' if c is self.chosen else '  '} {c.way:<9}{c.impl:<9}{c.work / 1e9:>10.3f} GFLOP"
                f"{c.cost / max(self.chosen.cost, 1.0):>8.2f} x cost   tile {c.tile[0]:>5} x {c.tile[1]:<5}{c.workspace / 2**20:>8.2f} MiB"
            )
        return "\n".join(lines)


def chunk_rows(examples: int, O: int, K: int, itemsize: int) -> int:
    """Output rows of a slab of the chunked form: its two buffers of (examples, rows, K) fit ``CHUNKED_BYTES``."""
    return max(1, min(max(O, 1), CHUNKED_BYTES // max(2 * examples * K * itemsize, 1)))


def _split(size: int, limit: int, unit: int) -> int:
    """The part when ``size`` is cut evenly into as few parts of at most ``limit`` as possible, in whole units."""
    parts = -(-max(size, 1) // limit)
    return -(-max(size, 1) // (parts * unit)) * unit


def _direct_tile(O: int, K: int, stored: int, itemsize: int, threads: int) -> tuple[int, int]:
    """Shrinks the tile while the stored tiles exceed their budget or a thread would have none."""
    limit_o, limit_k = TILE_O, TILE_K
    while True:
        rows, cols = _split(O, limit_o, ROWS), _split(K, limit_k, COLS)
        fits = stored * rows * cols * itemsize <= STORED_BYTES and -(-O // rows) * -(-K // cols) >= threads
        if fits or (rows <= ROWS and cols <= COLS):
            return rows, cols
        if cols >= 2 * rows or rows <= ROWS:
            limit_k = max(COLS, cols // 2)
        else:
            limit_o = max(ROWS, rows // 2)


@lru_cache(maxsize=4096)
def choose(
    op: str, N: int, T: int, K: int, O: int, M: int | None, gram: bool, itemsize: int, threads: int, impls: tuple[str, ...]
) -> Plan:
    """The plan among ``impls``. ``M``: examples of the second set of ``gram``; None for the Gram of one set with itself."""
    others = M or 0
    formed = N + others if op == "gram" else N  # gradients that the direct and the chunked form compute
    product = 2.0 * formed * T * O * K
    pairs = {"interference": float(N * N) if gram else 0.0, "gram": float(2 * N * M if M else N * N)}.get(op, 0.0)
    fold = {"interference": _FOLD, "sq_norm": _FOLD_SCALAR, "dot": _FOLD_SCALAR, "weighted_grad": _FOLD_SCALAR, "gram": 1.0}[op]
    elements = float(formed) * O * K
    found = []

    if "cpu" in impls:
        stored = formed if op == "gram" or gram else 0
        tile = _direct_tile(O, K, stored, itemsize, threads)
        work = product + pairs * O * K
        workspace = itemsize * (tile[0] * tile[1] * (4 + stored) + min(T, CHUNK) * sum(tile))
        found.append(Candidate("cpu", "direct", tile, work, product + _PAIR * pairs * O * K + fold * elements, workspace))
        if op in ("gram", "sq_norm"):
            # A norm meets only its own example, but a block is computed whole: short examples share one in vain.
            meetings = float(N * T) * max(T, GHOST_SIDE) if op == "sq_norm" else pairs * T * T
            work = 2.0 * meetings * (O + K) if op == "sq_norm" else meetings * (O + K)
            found.append(Candidate("cpu", "ghost", (GHOST_SIDE,) * 2, work, _GHOST * work, itemsize * GHOST_SIDE * 2 * (CHUNK + GHOST_SIDE)))
    if "chunked" in impls:
        rows = chunk_rows(formed, O, K, itemsize)
        if T == 1 and op in ("interference", "gram", "sq_norm"):
            work = (6.0 * N * O * K if op == "interference" else 0.0) + pairs * (O + K) + 4.0 * formed * (O + K)
            found.append(Candidate("chunked", "rank-one", (O, K), work, _MATMUL * work, itemsize * 2 * formed * (O + K)))
        if op in ("dot", "weighted_grad"):
            found.append(Candidate("chunked", "matmul", (O, K), product, _MATMUL * product, itemsize * N * T * O))
        else:
            work = product + 2.0 * pairs * O * K
            cost = _MATMUL * work + (_CHUNKED_FOLD if op == "interference" else _FOLD) * elements
            found.append(Candidate("chunked", "chunked", (rows, K), work, cost, 2 * itemsize * formed * rows * K))
    shape = f"N={N}, T={T}, K={K}, O={O}" + (f", M={M}" if M else "") + (", gram" if gram else "")
    return Plan(f"{op}({shape})", tuple(sorted(found, key=lambda c: c.cost)))
