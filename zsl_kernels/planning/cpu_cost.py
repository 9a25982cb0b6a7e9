"""The predicted time of each way of computing a call on the CPU, and of PyTorch's own products on any device.

Every way is a candidate with its number of floating-point operations (*work*: a multiply-add counts as two), its traffic and the
time that they predict: the work weighted with how fast that kind of work goes, in units of the direct kernel's product, over a
nominal rate of that product. Left out on purpose: the operands' layout, and every cache but the one that the tile is sized for.
"""

from __future__ import annotations

from zsl_kernels.planning import gpu_cost
from zsl_kernels.planning.call import Call, Candidate

# Output rows and columns of a tile. Larger ones pack the operands less often; smaller ones keep the sums closer. Multiples of
# every register tile (csrc/cpu), that of AMX with its 16 rows too. A tile that is cut to 12s of rows leaves some of those empty.
TILE_O, TILE_K = 192, 384
ROWS, COLS = 12, 32
CHUNK = 256  # positions packed at a time
SUM_RUN = 64  # examples whose gradients are added before their sum joins the others'
# The Gram keeps a tile of every example; past this many bytes for each worker the tile shrinks.
STORED_BYTES = 16 << 20
# The chunked form's workspace: the gradients of all examples for a slab of output rows.
CHUNKED_BYTES = 32 << 20
GHOST_SIDE = 96  # rows of a ghost block

# Costs relative to one operation of the direct kernel's products, as benchmarks/costs.py fits them on x86-64, halfway between AVX2
# and AVX-512. AMX multiplies bfloat16 several times as fast: its ratios would be others, and were not measured since its kernels
# multiply by tile instructions of their own. First of folding one element of one g_i: in registers, and from memory with a pass
# for each result.
_FOLD = {"interference": 35.0, "gram": 5.0, "dot": 16.0, "sq_norm": 5.5, "weighted_grad": 6.0}
_FOLD["interference_backward"] = _FOLD["interference"]
_CHUNKED_FOLD = {"interference": 220.0, "interference_backward": 220.0, "gram": 60.0, "sq_norm": 45.0}
# Then of one operation: of the pairwise products of stored tiles, of the ghost form, of a library matrix product.
_PAIR = 1.5
_GHOST = 1.6
_MATMUL = 1.5
# Operations in a second of the direct kernel's products on one thread: between AVX2 and AVX-512 in benchmarks/results/latest.md. It
# turns costs into seconds, the same for every way, so no choice depends on it.
_RATE = 130e9
# The chunked form on a GPU: passes over its slabs, which stay in the second-level cache, and launches for each slab.
_PASSES = {"interference": 14, "interference_backward": 20, "gram": 3, "sq_norm": 3}
_LAUNCHES = {"interference": 12, "interference_backward": 20, "gram": 4, "sq_norm": 3}


def chunk_rows(examples: int, O: int, K: int, itemsize: int) -> int:
    """Output rows of a slab of the chunked form: its two buffers of (examples, rows, K) fit ``CHUNKED_BYTES``."""
    return max(1, min(max(O, 1), CHUNKED_BYTES // max(2 * examples * K * itemsize, 1)))


def _cpu(call: Call, way: str, tile: tuple[int, int], work: float, cost: float, workspace: int) -> Candidate:
    time = cost / (_RATE * max(call.threads, 1))
    return Candidate("cpu", way, way, tile, work, call.operand_bytes + call.result_bytes, time, workspace)


def _library(call: Call, way: str, tile: tuple[int, int], work: float, cost: float, workspace: int, slabs: int = 0) -> Candidate:
    """PyTorch's own products, and for each of ``slabs`` the passes over a workspace that follow them.

    Without slabs the workspace is as large as the operands: on a GPU it is written to memory, and read again.
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
    """The part when ``size`` is cut evenly into as few parts of at most ``limit`` as possible, in whole units."""
    parts = -(-max(size, 1) // limit)
    return -(-max(size, 1) // (parts * unit)) * unit


def _direct_tile(call: Call, stored: int) -> tuple[int, int]:
    """Shrinks the tile while the stored tiles exceed their budget or a thread would have none."""
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
    sums = 7 if call.N > SUM_RUN else 4  # with the direction's tile
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
    """Rows with which the ghost form multiplies each row for the norms alone. Blocks are computed whole, on or above the diagonal:
    an example within one block meets that block, one across two both, a long one half of itself and the blocks at its ends."""
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
    # The operands in the dtype of the sums, in which they are multiplied, and one of them scaled or multiplied.
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
