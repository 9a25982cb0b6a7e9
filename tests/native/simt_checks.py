"""Calls the kernels' module on NumPy arrays and compares with NumPy in float64. No torch here, so that sanitizers can watch.

``python simt_checks.py module.so [case ...]``: exits with 1 where a result is wrong. Cases are made so that every tile meets its
edges: sizes that fill no tile, several blocks, strides of every kind, rows that are ragged or added, groups of examples.
"""

from __future__ import annotations

import importlib.util
import mmap
import sys
from types import ModuleType

import numpy as np

MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0)  # of Python 3.13 on
ELEMENTS = ("float32", "bfloat16", "float16")


def load(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.rsplit("/", 1)[-1].split(".")[0], path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def blocks(module: ModuleType, tile: int, O: int, K: int) -> int:
    """As few as give some of them several tiles, and none of them none."""
    rows, cols = module.tiles()[tile][:2]
    return min(3, -(-O // rows) * -(-K // cols))


class Numbers:
    """Random numbers of an element type: as the kernel reads them, and their values."""

    def __init__(self, rng: np.random.Generator, element: int, *shape: int, layout: str = "dense"):
        values = rng.standard_normal(shape).astype(np.float32)
        if element == 1:
            bits = values.view(np.uint32) & 0xFFFF0000
            values, data = bits.view(np.float32), (bits >> 16).astype(np.uint16)
        else:
            data = values.astype(np.float16 if element == 2 else np.float32)
        self.values = data.astype(np.float64) if element != 1 else values.astype(np.float64)
        if layout == "features first":
            data = np.moveaxis(np.ascontiguousarray(np.moveaxis(data, -1, 0)), 0, -1)
        elif layout == "spread":
            wide = np.zeros(tuple(2 * size + 1 for size in shape), data.dtype)
            wide[tuple(slice(1, None, 2) for _ in shape)] = data
            data = wide[tuple(slice(1, None, 2) for _ in shape)]
        elif layout == "shared":
            data = np.broadcast_to(data[:1].copy(), shape)
            self.values = np.broadcast_to(self.values[:1], shape)
        self.data = data

    def strided(self) -> tuple[int, ...]:
        strides = [stride // self.data.itemsize for stride in self.data.strides]
        return (self.data.ctypes.data, *([0] * (3 - len(strides))), *strides)


def expect(what: str, found: np.ndarray, want: np.ndarray, scale: np.ndarray) -> None:
    error = np.abs(found - want)
    bad = ~(error <= 1e-5 * (scale + 1e-30))
    if bad.any():
        at = tuple(int(x[0]) for x in np.nonzero(bad))
        sys.exit(f"wrong: {what}: {int(bad.sum())} of {bad.size}, first at {at}: {found[at]} instead of {want[at]}")


class Results:
    """Memory for what a launch writes, full of NaN."""

    def __init__(self, module: ModuleType, tile: int, N: int, O: int, K: int, u: np.ndarray | None, gram: bool):
        self.blocks = blocks(module, tile, O, K)
        shares = self.blocks * module.tiles()[tile][5]
        self.sums = [np.full((O, K), np.nan, np.float32) for _ in range(3)]
        self.scalars = np.full((self.blocks, 4, N), np.nan)
        self.pairs = np.full((shares, N, N), np.nan) if gram else None
        self.u = u

    def pointers(self) -> tuple[int, ...]:
        pairs = 0 if self.pairs is None else self.pairs.ctypes.data
        u = (0, 0, 0) if self.u is None else (self.u.ctypes.data, *(stride // 4 for stride in self.u.strides))
        return (*(x.ctypes.data for x in self.sums), self.scalars.ctypes.data, pairs, *u)

    def check(self, what: str, g: np.ndarray, size: np.ndarray) -> None:
        """g: (N, O, K), and the sums of its terms' magnitudes."""
        for name, found, term, scale in zip(
            ("grad_sum", "abs_sum", "sq_sum"), self.sums, (g, np.abs(g), g * g), (size, size, size**2), strict=True
        ):
            expect(f"{what}: {name}", found, term.sum(0), scale.sum(0))
        u = np.zeros(g.shape[1:]) if self.u is None else self.u
        p, p_size = g * u, size * np.abs(u)
        terms, scales = (np.abs(g), g * g, p, np.abs(p)), (size, size**2, p_size, p_size)
        for name, found, term, scale in zip(("l1", "sq_norm", "dot", "abs_dot"), self.scalars.sum(0), terms, scales, strict=True):
            expect(f"{what}: {name}", found, term.sum((1, 2)), scale.sum((1, 2)))
        if self.pairs is not None:
            expect_gram(f"{what}: gram", self.pairs.sum(0), g, size)


def expect_gram(what: str, found: np.ndarray, g: np.ndarray, size: np.ndarray) -> None:
    """On and above the diagonal: below it nothing is written."""
    upper = np.triu(np.ones(found.shape, bool))
    g, size = g.reshape(len(g), -1), size.reshape(len(g), -1)
    expect(what, found[upper], (g @ g.T)[upper], (size @ size.T)[upper])


def gradients(a: Numbers, b: Numbers) -> tuple[np.ndarray, np.ndarray]:
    """(N, O, K), and the sums of their terms' magnitudes."""
    products = [np.einsum("nto,ntk->nok", y, x) for x, y in ((a.values, b.values), (np.abs(a.values), np.abs(b.values)))]
    return products[0], products[1]


def regular(module: ModuleType, tile: int, element: int, N: int, T: int, K: int, O: int, layout: str, gram: bool) -> None:
    rng = np.random.default_rng(N + T)
    a, b = Numbers(rng, element, N, T, K, layout=layout), Numbers(rng, element, N, T, O, layout=layout)
    u = rng.standard_normal((K, O)).astype(np.float32).T
    out = Results(module, tile, N, O, K, u, gram)
    held = min(N, module.tiles()[tile][2] if gram else 4)
    launch = (tile, out.blocks, 1, 0)
    module.gram(launch, element, (O, K, held, N, True), a.strided(), b.strided(), N, T, 0, (0, 0, 0), out.pointers())
    name = f"{ELEMENTS[element]}, tile {tile}, {layout}, N, T, K, O = {N}, {T}, {K}, {O}"
    out.check(name, *gradients(a, b))


def groups(module: ModuleType, tile: int, element: int, N: int, T: int, K: int, O: int) -> None:
    """The Gram alone of more examples than a block can hold."""
    rng = np.random.default_rng(1)
    a, b = Numbers(rng, element, N, T, K), Numbers(rng, element, N, T, O)
    slots, count = module.tiles()[tile][2], blocks(module, tile, O, K)
    shares = count * module.tiles()[tile][5]
    size = slots // 2
    parts = -(-N // size)
    pairs = np.full((shares, N, N), np.nan)
    launch, out = (tile, count, parts * (parts + 1) // 2, 0), (0, 0, 0, 0, pairs.ctypes.data, 0, 0, 0)
    module.gram(launch, element, (O, K, slots, size, True), a.strided(), b.strided(), N, T, 0, (0, 0, 0), out)
    expect_gram(f"{ELEMENTS[element]}, groups of tile {tile}: gram", pairs.sum(0), *gradients(a, b))


def cross(module: ModuleType, tile: int, element: int, N: int, M: int, T: int, T2: int, K: int, O: int) -> None:
    rng = np.random.default_rng(2)
    a, b = Numbers(rng, element, N, T, K), Numbers(rng, element, N, T, O, layout="features first")
    a2, b2 = Numbers(rng, element, M, T2, K, layout="spread"), Numbers(rng, element, M, T2, O)
    slots, count = module.tiles()[tile][2], blocks(module, tile, O, K)
    shares = count * module.tiles()[tile][5]
    size = max(N, M) if slots >= N + M else slots // 2
    launch = (tile, count, -(-N // size) * -(-M // size), 0)
    pairs = np.full((shares, N, M), np.nan)
    shape = (O, K, min(N + M, slots), size, True)
    sets = (a.strided(), b.strided(), N, T, a2.strided(), b2.strided(), M, T2)
    module.cross_gram(launch, element, shape, *sets, pairs.ctypes.data)
    (g, g_size), (h, h_size) = ([x.reshape(len(x), -1) for x in gradients(*operands)] for operands in ((a, b), (a2, b2)))
    expect(f"{ELEMENTS[element]}, cross gram of tile {tile}", pairs.sum(0), g @ h.T, g_size @ h_size.T)


def ragged(module: ModuleType, tile: int, element: int, lengths: list[int], K: int, O: int, added: bool) -> None:
    rng = np.random.default_rng(3)
    N, begin = len(lengths), np.concatenate([[0], np.cumsum(lengths)])
    a, b = Numbers(rng, element, int(begin[-1]), K), Numbers(rng, element, int(begin[-1]), O)
    parts = [(a.values[begin[i] : begin[i + 1]], b.values[begin[i] : begin[i + 1]]) for i in range(N)]
    g, size = np.stack([y.T @ x for x, y in parts]), np.stack([np.abs(y).T @ np.abs(x) for x, y in parts])
    rows, feature, values = (0, 0, 0), np.zeros(0, np.int64), np.zeros((0, K), np.float32)
    if added:
        features = [np.sort(rng.choice(O, min(O, i % 5), replace=False)) for i in range(N)]
        added_begin = np.concatenate([[0], np.cumsum([len(x) for x in features])])
        feature, values = np.concatenate(features), rng.standard_normal((int(added_begin[-1]), K)).astype(np.float32)
        for i in range(N):
            for p in range(added_begin[i], added_begin[i + 1]):
                g[i, feature[p]] += values[p]
                size[i, feature[p]] += np.abs(values[p])
        rows = (added_begin.ctypes.data, feature.ctypes.data, values.ctypes.data)
    out = Results(module, tile, N, O, K, None, True)
    shape = (O, K, N, N, True)
    module.gram((tile, out.blocks, 1, 0), element, shape, a.strided(), b.strided(), N, 0, begin.ctypes.data, rows, out.pointers())
    out.check(f"{ELEMENTS[element]}, ragged, tile {tile}{', added rows' if added else ''}", g, size)


def embedding(module: ModuleType, tile: int, element: int, N: int, T: int, V: int, K: int, layout: str) -> None:
    rng = np.random.default_rng(4)
    ids, b = rng.integers(0, V, (N, T)), Numbers(rng, element, N, T, K, layout=layout)
    rows = np.unique(ids)
    u = rng.standard_normal((V, K)).astype(np.float32)
    order = np.argsort(np.searchsorted(rows, ids).ravel() * N + np.arange(N).repeat(T), kind="stable")
    key = (np.searchsorted(rows, ids).ravel() * N + np.arange(N).repeat(T))[order]
    pair, starts = np.unique(key, return_index=True)
    place_begin = np.append(starts, len(key)).astype(np.int64)
    pair_row, pair_example = np.ascontiguousarray(pair // N), np.ascontiguousarray(pair % N)
    row_begin = np.searchsorted(pair_row, np.arange(len(rows) + 1)).astype(np.int64)
    arrays = (row_begin, pair_row, pair_example, place_begin, order.astype(np.int64), rows)
    out = Results(module, tile, N, len(rows), K, u, True)
    shape = (len(rows), K, N, N, True)
    pointers = [x.ctypes.data for x in arrays]
    module.embedding((tile, out.blocks, 1, 0), element, shape, b.strided(), N, T, *pointers, out.pointers())
    g, size = np.zeros((N, V, K)), np.zeros((N, V, K))
    for i in range(N):
        np.add.at(g[i], ids[i], b.values[i])
        np.add.at(size[i], ids[i], np.abs(b.values[i]))
    out.u = u[rows]
    out.check(f"{ELEMENTS[element]}, embedding, tile {tile}, {layout}", g[:, rows], size[:, rows])


def far(module: ModuleType, element: int, stride: int, along: int) -> None:
    """Strides past 31 bits, over memory of which a few pages are touched; of the dimension ``along``."""
    rng = np.random.default_rng(5)
    N, T, K, O = 2, 2, 8, 8
    a, b = Numbers(rng, element, N, T, K), Numbers(rng, element, N, T, O)
    strides = [64, 8, 1] if along == 0 else [8, 64, 1] if along == 1 else [8, 16, 1]
    strides[along] = stride
    itemsize = a.data.itemsize
    size = itemsize * (1 + sum(x * (n - 1) for x, n in zip(strides, (N, T, K), strict=True)))
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE) as memory:
        flat = np.frombuffer(memory, a.data.dtype)
        wide = np.lib.stride_tricks.as_strided(flat, (N, T, K), [itemsize * x for x in strides])
        wide[...] = a.data
        a.data = wide
        out = Results(module, 0, N, O, K, None, True)
        shape = (O, K, N, N, True)
        module.gram((0, out.blocks, 1, 0), element, shape, a.strided(), b.strided(), N, T, 0, (0, 0, 0), out.pointers())
        del flat, wide, a.data
    out.check(f"{ELEMENTS[element]}, stride {stride} of dimension {along}", *gradients(a, b))


HOPPER_TILE, HOPPER_WARPS, BOX = 128, 8, 64


class Mapped:
    """An operand as boxes address it: of half precision as it is, or the copy that the module makes of it."""

    def __init__(self, module: ModuleType, x: Numbers, element: int, begin: np.ndarray | None = None):
        self.first_step = None
        if begin is not None:
            steps = np.maximum(1, -(-np.diff(begin) // BOX))
            self.first_step = np.concatenate([[0], np.cumsum(steps)]).astype(np.int32)
        F = x.data.shape[-1]
        if element and begin is None and F % 8 == 0 and x.data.flags.c_contiguous:
            self.held = self.of_copy(x.data.shape, np.uint16)
            self.held[...] = x.data.view(np.uint16)
            N, T, _ = x.data.shape
            self.mapped = (self.held.ctypes.data, 1, N, T, F, N * T * F, T * F, F)
            return
        pitch, parts = -(-F // 8) * 8, 1 if element else 4
        N, T = (1, int(self.first_step[-1]) * BOX) if begin is not None else x.data.shape[:2]
        self.held = self.of_copy((parts, N, T, pitch), np.uint16)
        part = N * T * pitch
        pointers = (0, 0) if begin is None else (begin.ctypes.data, self.first_step.ctypes.data)
        count = N if begin is None else len(begin) - 1
        module.pack(x.strided(), element, count, T, *pointers, F, pitch, part, True, self.held.ctypes.data, 2, 0)
        self.mapped = (self.held.ctypes.data, parts, N, T, F, part, T * pitch, pitch)

    @staticmethod
    def of_copy(shape: tuple[int, ...], dtype: type) -> np.ndarray:
        """Memory of the exact size, at a multiple of 16 bytes, full of NaN."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        raw = np.full(size + 16, 0xFF, np.uint8)
        skip = -raw.ctypes.data % 16
        return raw[skip : skip + size].view(dtype).reshape(shape)


def hopper(
    module: ModuleType, element: int, N: int, T: int, K: int, O: int, layout: str, parts: int, lengths: list[int] | None = None
) -> None:
    """Sums, scalars and the Gram in two launches' worth of tiles; with ``lengths`` ragged, with added rows."""
    rng = np.random.default_rng(N + T + K)
    begin = None
    if lengths is None:
        a, b = Numbers(rng, element, N, T, K, layout=layout), Numbers(rng, element, N, T, O, layout=layout)
        g, size = gradients(a, b)
    else:
        N, begin = len(lengths), np.concatenate([[0], np.cumsum(lengths)])
        a, b = Numbers(rng, element, int(begin[-1]), K, layout=layout), Numbers(rng, element, int(begin[-1]), O, layout=layout)
        pieces = [(a.values[begin[i] : begin[i + 1]], b.values[begin[i] : begin[i + 1]]) for i in range(N)]
        g, size = np.stack([y.T @ x for x, y in pieces]), np.stack([np.abs(y).T @ np.abs(x) for x, y in pieces])
    mapped_a, mapped_b = (Mapped(module, x, element, begin) for x in (a, b))
    down, across = -(-O // HOPPER_TILE), -(-K // HOPPER_TILE)
    tiles = down * across
    added, held = (0, 0, 0), []
    if lengths is not None:
        rows = [np.sort(rng.choice(O, min(O, i % 5), replace=False)) for i in range(N)]
        feature, values = np.concatenate(rows), rng.standard_normal((sum(map(len, rows)), K)).astype(np.float32)
        first = np.concatenate([[0], np.cumsum([len(x) for x in rows])])
        edges = np.minimum(np.arange(down + 1) * HOPPER_TILE, O)
        bound = np.stack([first[i] + np.searchsorted(rows[i], edges) for i in range(N)]).astype(np.int64)
        for i in range(N):
            for p in range(first[i], first[i + 1]):
                g[i, feature[p]] += values[p]
                size[i, feature[p]] += np.abs(values[p])
        held = [bound, feature, values]
        added = tuple(x.ctypes.data for x in held)
    u = rng.standard_normal((K, O)).astype(np.float32).T
    out = Results.__new__(Results)
    out.sums, out.u = [Mapped.of_copy((O, K), np.float32) for _ in range(3)], u
    scalars = np.full((4, N), np.nan, np.float32)
    out.scalars, out.pairs = scalars[None], np.zeros((1, N, N))
    exact = element != 1
    for start in range(0, tiles, max(1, tiles - 1)):  # the last tile in a launch of its own
        count = min(max(1, tiles - 1), tiles - start)
        whole = count // 2 if parts > 1 else count
        partials = np.full((4, N, count * HOPPER_WARPS), np.nan, np.float32)
        work = Mapped.of_copy(((count - whole) * parts, 3 * HOPPER_TILE**2), np.float32)
        slab = Mapped.of_copy((N, count * HOPPER_TILE**2), np.float32 if exact else np.uint16)
        module.hopper(
            element,
            2 if exact else 1,
            True,
            mapped_a.mapped,
            mapped_b.mapped,
            (N, -(-T // BOX), 0 if begin is None else mapped_a.first_step.ctypes.data, 1 if element else 6, O, K),
            (start, count, whole, parts, 8),
            (
                *(x.ctypes.data for x in out.sums),
                *(scalars.ctypes.data + 4 * N * f for f in range(4)),
                partials.ctypes.data,
                work.ctypes.data,
                slab.ctypes.data,
                u.ctypes.data,
                *(stride // 4 for stride in u.strides),
            ),
            added,
            0,
        )
        pairs = np.full((2, N, N), np.nan)
        module.slab_gram(slab.ctypes.data, 0, not exact, N, N, slab.shape[1], pairs.ctypes.data, 2, 0)
        out.pairs += pairs.sum(0)
        cross = np.full((1, N, 1), np.nan)
        module.slab_gram(slab.ctypes.data, slab.ctypes.data, not exact, N, 1, slab.shape[1], cross.ctypes.data, 1, 0)
        expect("the Gram of two slabs", cross[0, :1, 0], pairs.sum(0)[0, :1], pairs.sum(0)[0, :1])
    if not exact:  # of gradients that were rounded to bfloat16
        expect_rounded(out.pairs[0], g, size)
        out.pairs = None
    name = f"hopper, {ELEMENTS[element]}, {layout}, N, T, K, O = {N}, {T}, {K}, {O}, {parts} parts{', ragged' if lengths else ''}"
    out.check(name, g, size)


def expect_rounded(found: np.ndarray, g: np.ndarray, size: np.ndarray) -> None:
    upper = np.triu(np.ones(found.shape, bool))
    g, size = g.reshape(len(g), -1), size.reshape(len(g), -1)
    expect("the Gram of rounded gradients", found[upper], (g @ g.T)[upper], 2.0**-8 / 1e-5 * (size @ size.T)[upper])


def hopper_cases(module: ModuleType, short: bool) -> None:
    for element in (1,) if short else range(3):
        for layout in ("dense", "spread") if short else ("dense", "features first", "spread", "shared"):
            hopper(module, element, 3, 70, 136, 40, layout, 1)
    hopper(module, 1, 7, 400, 128, 136, "dense", 3)  # more steps than stages, tiles that are split over the examples
    hopper(module, 0, 5, 3, 17, 130, "dense", 2, [0, 33, 1, 130, 64])
    hopper(module, 2, 67, 1, 8, 8, "dense", 1)  # more than one run of examples, and than one group of the Gram's


def main(path: str, *cases: str) -> None:
    """``short``: every tile with one kind of element, of which each has one, and the layouts that are copied in other ways."""
    module = load(path)
    layouts = ("dense", "spread") if "short" in cases else ("dense", "features first", "spread", "shared")
    wanted = [case for case in cases if case != "short"] or ["regular", "groups", "cross", "ragged", "embedding", "hopper"]
    if "hopper" in wanted:
        hopper_cases(module, "short" in cases)
    if "far" in wanted:
        for element, along in ((0, 0), (1, 1), (2, 0)):
            far(module, element, 2**31 + 8, along)  # 16 bytes at a time
            far(module, element, 2**31 + 3, along)
        far(module, 1, 2**28 + 1, 2)  # times seven
    for tile, (*_, slots, _, _, _) in enumerate(module.tiles()):
        for element in (tile % 3,) if "short" in cases else range(3):
            if "regular" in wanted:
                for layout in layouts:
                    regular(module, tile, element, min(slots, 11), 37, 41, 69, layout, gram=True)
                regular(module, tile, element, slots, 1, 24, 40, "dense", gram=True)
                regular(module, tile, element, slots - 1, 70, 64, 64, "dense", gram=True)
            if "ragged" in wanted:
                ragged(module, tile, element, [0, 33, 1, 70, 0, 5], 41, 69, added=tile % 2 == 0)
            if "cross" in wanted:
                cross(module, tile, element, 3, slots - 3, 5, 40, 33, 35)
            if "embedding" in wanted:
                embedding(module, tile, element, min(slots, 9), 13, 50, 37, "dense" if element else "spread")
        if "groups" in wanted:
            groups(module, tile, tile % 3, slots + slots // 2 + 1, 3, 17, 33)
            cross(module, tile, tile % 3, slots, slots // 2 + 1, 3, 2, 17, 33)
            regular(module, tile, tile % 3, 2 * 64 + 5, 2, 17, 33, "dense", gram=False)
    print("ok")


if __name__ == "__main__":
    main(*sys.argv[1:])
