"""Predicts the time of each algorithm on the CPU, and of PyTorch's matrix products on any device.

Each function returns a candidate with its floating-point operations (*work*: a multiply-add counts as two), its memory traffic and
its predicted time. The time is the work, weighted by the relative cost of each kind of operation, divided by a nominal rate. The
cost of one operation in the direct kernel's matrix product is 1. The model deliberately ignores the layout of the operands and all
caches except the one that the tile is sized for.
"""

from __future__ import annotations

from zsl_kernels.planning import gpu_cost
from zsl_kernels.planning.call import Call, Candidate

# Output rows and columns of a tile, multiples of every register tile (csrc/cpu), that of AMX with its 16 rows included. Larger
# tiles pack the operands less often; smaller tiles keep the sums in a faster cache. Where a tile shrinks in steps of 12 rows, some
# of AMX's rows stay empty.
TILE_O, TILE_K = 192, 384
ROWS, COLS = 12, 32
CHUNK = 256  # positions packed at a time
SUM_RUN = 64  # examples whose gradients are summed before their sum is added to the total
# The Gram matrix needs a tile of every example. The tile shrinks if these exceed this many bytes per thread.
STORED_BYTES = 16 << 20
# The workspace of the chunked algorithm: the gradients of all examples for a slab of output rows.
CHUNKED_BYTES = 32 << 20
GHOST_SIDE = 96  # rows of a ghost block

# Costs relative to one operation of the direct kernel's matrix product. benchmarks/costs.py fits them on x86-64; the values lie
# halfway between AVX2 and AVX-512. On AMX bfloat16 products are several times as fast, so these ratios differ there; they have not
# been measured since the AMX kernels use tile instructions of their own. The first two tables are the cost of accumulating one
# element of one g_i into the results: in registers, and from memory with one pass per result.
_FOLD = {"interference": 35.0, "gram": 5.0, "dot": 16.0, "sq_norm": 5.5, "weighted_grad": 6.0}
_FOLD["interference_backward"] = _FOLD["interference"]
_CHUNKED_FOLD = {"interference": 220.0, "interference_backward": 220.0, "gram": 60.0, "sq_norm": 45.0}
# The cost of one operation of the pairwise products of stored tiles, of the ghost algorithm, and of a library matrix product.
_PAIR = 1.5
_GHOST = 1.6
_MATMUL = 1.5
# Operations per second of the direct kernel's matrix product on one thread: between AVX2 and AVX-512 in
# benchmarks/results/latest.md. It converts costs to seconds for every algorithm alike, so no choice depends on it.
_RATE = 130e9
# The chunked algorithm on a GPU: passes over its slabs, which stay in the L2 cache, and launches per slab.
_PASSES = {"interference": 14, "interference_backward": 20, "gram": 3, "sq_norm": 3}
_LAUNCHES = {"interference": 12, "interference_backward": 20, "gram": 4, "sq_norm": 3}


def chunk_rows(examples: int, O: int, K: int, itemsize: int) -> int:
    """Return the output rows of a slab of the chunked algorithm. Its two buffers (examples, rows, K) fit in ``CHUNKED_BYTES``."""
    return max(1, min(max(O, 1), CHUNKED_BYTES // max(2 * examples * K * itemsize, 1)))


def _cpu(call: Call, way: str, tile: tuple[int, int], work: float, cost: float, workspace: int) -> Candidate:
    time = cost / (_RATE * max(call.threads, 1))
    return Candidate("cpu", way, way, tile, work, call.operand_bytes + call.result_bytes, time, workspace)


def _library(call: Call, way: str, tile: tuple[int, int], work: float, cost: float, workspace: int, slabs: int = 0) -> Candidate:
    """Return a candidate of PyTorch's matrix products, followed by passes over a workspace for each of ``slabs``.

    Without slabs the workspace is as large as the operands. On a GPU it is then written to memory and read back.
    """
    moved = call.operand_bytes + call.result_bytes + (2.0 * workspace if call.gpu is not None and not slabs else 0.0)
    if call.gpu is None:
        return Candidate("chunked", way, "library", tile, work, moved, cost / (_RATE * max(call.threads, 1)), workspace)
    launches = 4 + slabs * _LAUNCHES.get(call.op, 0)
    passes = call.itemsize * call.elements * _PASSES[call.op] if slabs else 0.0
    products = gpu_cost.library(call.gpu, work, moved, launches, "float64" if call.itemsize == 8 else "float32")
    time, limit = gpu_cost.total([products, gpu_cost.Time(l2=passes / call.gpu.l2_bandwidth, launches=0)])
    return Candidate("chunked", way, "library", tile, work, moved, time, workspace, limit, passes)


def _split(size: int, limit: int, unit: int) -> int:
    """Divide ``size`` evenly into as few parts of at most ``limit`` as possible; return a part's size in whole units."""
    parts = -(-max(size, 1) // limit)
    return -(-max(size, 1) // (parts * unit)) * unit


def _direct_tile(call: Call, stored: int) -> tuple[int, int]:
    """Return the tile, made smaller until the stored tiles fit in their budget and every thread has a tile."""
    limit_o, limit_k = TILE_O, TILE_K
    while True:
        rows, cols = _split(call.O, limit_o, ROWS), _split(call.K, limit_k, COLS)
        tiles = -(-call.O // rows) * -(-call.K // cols)
        fits = stored * rows * cols * call.itemsize <= STORED_BYTES and tiles >= call.threads
        if fits or (rows <= ROWS and cols <= COLS):
            return rows, cols
        if cols >= 2 * rows or rows <= ROWS:
            limit_k = max(COLS, cols // 2)
        else:
            limit_o = max(ROWS, rows // 2)


def direct(call: Call) -> Candidate:
    stored = call.formed if call.pairs else 0
    tile = _direct_tile(call, stored)
    pairs = call.pairs * call.O * call.K
    cost = call.product + _PAIR * pairs + _FOLD[call.op] * call.elements
    sums = 7 if call.N > SUM_RUN else 4  # including the tile of the direction
    workspace = call.itemsize * (tile[0] * tile[1] * (sums + stored) + min(call.T, CHUNK) * sum(tile))
    return _cpu(call, "direct", tile, call.product + pairs, cost, workspace)


def ghost(call: Call) -> Candidate | None:
    if call.irregular:
        return None
    if call.op == "gram":
        work = call.pairs * call.T**2 * (call.O + call.K)
    elif call.op == "sq_norm":
        work = 2.0 * call.N * call.T * _rows_met(call.T) * (call.O + call.K)
    else:
        return None
    workspace = call.itemsize * 2 * GHOST_SIDE * (CHUNK + GHOST_SIDE)
    return _cpu(call, "ghost", (GHOST_SIDE, GHOST_SIDE), work, _GHOST * work, workspace)


def _rows_met(T: int) -> float:
    """Return the number of rows that the ghost algorithm multiplies with each row when it computes norms only.

    It computes whole blocks, on and above the diagonal. An example inside of one block is multiplied with that block, an example
    that spans two with both, and a long one with half of itself and with the blocks at its ends.
    """
    if T > GHOST_SIDE:
        return T / 2 + 1.5 * GHOST_SIDE
    return GHOST_SIDE if T == 0 or GHOST_SIDE % T == 0 else 2.0 * GHOST_SIDE


def rank_one(call: Call) -> Candidate | None:
    if call.T != 1 or call.irregular or call.op not in ("interference", "gram", "sq_norm"):
        return None
    sums = 6.0 * call.elements if call.op == "interference" else 0.0
    work = sums + call.pairs * (call.O + call.K) + 4.0 * call.formed * (call.O + call.K)
    workspace = call.itemsize * 2 * call.formed * (call.O + call.K)
    return _library(call, "rank-one", (call.O, call.K), work, _MATMUL * work, workspace)


def matmul(call: Call) -> Candidate | None:
    if call.op not in ("dot", "weighted_grad"):
        return None
    # Copies of the operands in the sum dtype, in which they are multiplied, and one scaled or multiplied operand.
    widened = call.O + call.K if call.operand_itemsize < call.itemsize else 0
    scaled = min(call.O, call.K) if call.op == "dot" else call.O
    workspace = call.itemsize * call.N * call.T * (widened + scaled)
    return _library(call, "matmul", (call.O, call.K), call.product, _MATMUL * call.product, workspace)


def chunked(call: Call) -> Candidate | None:
    if call.op in ("dot", "weighted_grad") or rank_one(call) is not None:
        return None
    rows = chunk_rows(call.formed, call.O, call.K, call.itemsize)
    work = call.product + 2 * call.pairs * call.O * call.K
    cost = _MATMUL * work + _CHUNKED_FOLD[call.op] * call.elements
    workspace = 2 * call.itemsize * call.formed * rows * call.K
    return _library(call, "chunked", (rows, call.K), work, cost, workspace, slabs=-(-call.O // rows))
