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
        elif layout == "padded":  # 16 bytes can be read at a time, and what lies behind a row is NaN
            wide = np.full((*shape[:-1], -(-shape[-1] // 8) * 8), 0xFFFF, np.uint16) if element else np.full(1, np.nan, np.float32)
            wide = wide.view(data.dtype) if element else np.resize(wide, (*shape[:-1], -(-shape[-1] // 8) * 8))
            wide[..., : shape[-1]] = data
            data = wide[..., : shape[-1]]
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


def embedding(
    module: ModuleType, element: int, N: int, T: int, V: int, K: int, layout: str, window: int, *, ragged: bool = False
) -> None:
    """All launches of a call, with the Gram in slabs of two rows. Half of the positions name row 1; some are skipped, and nobody
    touches the last of the rows that there is memory for."""
    rng = np.random.default_rng(N + T)
    lead = (1, N * T) if ragged else (N, T)
    b = Numbers(rng, element, *lead, K, layout=layout)
    P, padding = N * T, 2
    ids = np.where(rng.random(P) < 0.5, 1, rng.integers(-1, V, P))
    example = rng.integers(0, N, P) if ragged else np.arange(P) // T
    if layout == "dense":  # 16 bytes can be read at a time, where K has whole ones
        u = Mapped.of_copy((V, K), np.float32)
        u[...] = rng.standard_normal((V, K))
    else:
        u = rng.standard_normal((K, V)).T
    used = (ids >= 0) & (ids != padding)
    rows = np.unique(ids[used])
    most = min(V, P) + 1
    examples = example.ctypes.data if ragged else 0
    positions = (ids.ctypes.data, examples, P, lead[1], N, V, padding)
    keys = np.zeros(P, np.int64)
    module.embedding_keys(positions, keys.ctypes.data, 0)
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    chunk = 100
    counts, touched = np.full(-(-P // chunk), -1), np.full(1, -1)
    places, found_rows = np.full((P, 2), -1), np.full(most, -9)
    arrays = (keys, order, counts if chunk < P else None, places, found_rows, touched)
    module.embedding_places(positions, b.strided(), chunk, *(0 if x is None else x.ctypes.data for x in arrays), 0)
    name = f"{ELEMENTS[element]}, embedding, {layout}, N, T, V, K = {N}, {T}, {V}, {K}, windows of {window}"
    if touched[0] != len(rows) or not np.array_equal(found_rows[: len(rows)], rows):
        sys.exit(f"wrong: {name}: touched rows {found_rows[: touched[0]]} instead of {rows}")
    groups, windows = -(-K // (256 if element else 128)), -(-P // window)
    sums = [Mapped.of_copy((most, K), np.float32) for _ in range(3)]
    pieces, open_pairs = Mapped.of_copy((windows, 8, K), np.float32), np.full(windows, -9, np.int32)
    scalars, held = Mapped.of_copy((groups, P, 4), np.float32), 2
    out = tuple(x.ctypes.data for x in (places, found_rows, pieces, open_pairs, scalars, *sums))
    along = (u.ctypes.data, 0 if u.itemsize == 4 else 3, *(stride // u.itemsize for stride in u.strides))
    slab, gram = Mapped.of_copy((N, held * K), np.float32), np.zeros((N, N))
    for first in range(0, most, held):
        module.embedding_clear((slab.ctypes.data, first, held), slab.size, touched.ctypes.data, 0)
        module.embedding(positions, element, b.strided(), K, window, out, along, (slab.ctypes.data, first, held), 0)
        gram += slab.astype(np.float64) @ slab.T
    by_example = np.argsort(example, kind="stable")
    begin = np.searchsorted(example[by_example], np.arange(N + 1))
    members = (begin.ctypes.data, by_example.ctypes.data) if ragged else (0, 0)
    results = np.full((4, N), np.nan, np.float32)
    ends = tuple(x.ctypes.data for x in results)
    filled = (found_rows.ctypes.data, *(x.ctypes.data for x in sums), most, K, 2)
    module.embedding_finish(positions, (scalars.ctypes.data, groups, 4, *members, ends), filled, touched.ctypes.data, 0)
    if (found_rows[len(rows) :] != -1).any() or any(x[len(rows) :].any() for x in sums):
        sys.exit(f"wrong: {name}: rows that nobody touched hold something")
    g, size = np.zeros((N, V, K)), np.zeros((N, V, K))
    values = b.values.reshape(P, K)
    np.add.at(g, (example[used], ids[used]), values[used])
    np.add.at(size, (example[used], ids[used]), np.abs(values[used]))
    out = Results.__new__(Results)
    out.sums, out.u = [x[: len(rows)] for x in sums], u[rows]
    out.scalars, out.pairs = results[None], gram[None]
    out.check(name, g[:, rows], size[:, rows])


def embedding_cases(module: ModuleType, short: bool) -> None:
    for element in (1,) if short else range(3):
        for layout in ("dense", "spread") if short else ("dense", "features first", "spread", "shared"):
            embedding(module, element, 5, 30, 40, 37, layout, 16)
    embedding(module, 0, 3, 150, 6, 132, "dense", 8)  # rows and pairs past several windows, columns past a group
    embedding(module, 1, 2, 200, 3, 264, "dense", 4, ragged=True)
    embedding(module, 2, 40, 1, 3, 8, "dense", 16)
    embedding(module, 2, 4, 20, 30, 43, "padded", 16)
    embedding(module, 0, 4, 20, 30, 131, "padded", 16)
    embedding(module, 0, 1, 90, 4, 5, "dense", 128)  # one window, which is not full


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


SLAB_UNIT = 512


def dense(
    module: ModuleType, element: int, N: int, P: int, layout: str, lanes: int, blocks: int, parts: int, along: bool, gram: bool
) -> None:
    """Of gradients that are held: ``lanes`` warps share coordinates, ``blocks`` of which there are, by ``parts`` of examples."""
    rng = np.random.default_rng(N + P)
    check_dense(module, element, Numbers(rng, element, N, 1, P, layout=layout), layout, lanes, blocks, parts, along, gram)


def check_dense(
    module: ModuleType, element: int, g: Numbers, name: str, lanes: int, blocks: int, parts: int, along: bool, gram: bool
) -> None:
    N, _, P = g.values.shape
    part, fields = -(-N // parts), 4 if along else 2
    padded = -(-P // SLAB_UNIT) * SLAB_UNIT if gram else P
    u = np.random.default_rng(1).standard_normal((1, 2 * P)).astype(np.float32)[:, :: 2 if P % 2 else 1][:, :P] if along else None
    out = Results.__new__(Results)
    out.sums, out.u = [Mapped.of_copy((1, P), np.float32) for _ in range(3)], u
    scalars = np.zeros((4, N), np.float32)
    scalars[:fields] = np.nan
    out.scalars, out.pairs = scalars[None], None
    partial_sums, partial_scalars = Mapped.of_copy((parts, 3, P), np.float32), np.full((blocks, fields, N), np.nan)
    slab = Mapped.of_copy((N, padded), np.uint16 if element == 1 else np.float32) if gram else None
    module.dense(
        (blocks, parts, part, lanes, padded),
        element,
        g.strided(),
        N,
        P,
        (0, 0) if u is None else (u.ctypes.data, u.strides[1] // 4),
        (*(x.ctypes.data for x in out.sums), *(scalars.ctypes.data + 4 * N * f if f < fields else 0 for f in range(4))),
        (partial_sums.ctypes.data, partial_scalars.ctypes.data, 0 if slab is None else slab.ctypes.data),
        0,
    )
    adding = []
    if parts > 1:
        adding.append((partial_sums.ctypes.data, False, parts, 3 * P, P, [x.ctypes.data for x in out.sums], 0))
    if blocks > 1:
        results = [scalars.ctypes.data + 4 * N * f for f in range(fields)]
        adding.append((partial_scalars.ctypes.data, True, blocks, fields * N, N, results, 0))
    if slab is not None:
        pairs, total = np.full((2, N, N), np.nan), Mapped.of_copy((N, N), np.float32)
        module.slab_gram(slab.ctypes.data, 0, element == 1, N, N, padded, pairs.ctypes.data, False, 2, 0)
        adding.append((pairs.ctypes.data, True, 2, N * N, N * N, [total.ctypes.data], N))
    if adding:
        module.add_partials(adding, 0)
    if slab is not None:
        out.pairs = total[None].astype(np.float64)
        if not np.array_equal(total, total.T):
            sys.exit("wrong: a Gram that is not symmetric")
    shape = f"{ELEMENTS[element]}, {name}, N, P = {N}, {P}, {lanes} lanes, {blocks} blocks, {parts} parts"
    out.check(f"dense, {shape}", g.values, np.abs(g.values))


def scale_bias(
    module: ModuleType, elements: tuple[int | None, int], sizes: tuple[int, int, int], layout: str, lanes: int, parts: int
) -> None:
    """Of regular rows, with both statistics. Of x and b the element types; without one for x the bias alone."""
    rng, (x_element, b_element) = np.random.default_rng(sum(sizes)), elements
    x = None if x_element is None else Numbers(rng, x_element, *sizes, layout=layout)
    check_scale_bias(module, elements, x, Numbers(rng, b_element, *sizes, layout=layout), layout, lanes, parts)


def ragged_scale_bias(
    module: ModuleType, elements: tuple[int | None, int], lengths: list[int], K: int, ordered: bool, lanes: int, parts: int
) -> None:
    rng, (x_element, b_element), R = np.random.default_rng(6), elements, sum(lengths)
    x = None if x_element is None else Numbers(rng, x_element, R, K)
    check_scale_bias(module, elements, x, Numbers(rng, b_element, R, K), "ragged", lanes, parts, lengths, ordered)


def check_scale_bias(
    module: ModuleType,
    elements: tuple[int | None, int],
    x: Numbers | None,
    b: Numbers,
    name: str,
    lanes: int,
    parts: int,
    lengths: list[int] | None = None,
    ordered: bool = True,
) -> None:
    rng, rows, K = np.random.default_rng(7), b.values.shape[:-1], b.values.shape[-1]
    mean, rstd = rng.standard_normal(rows).astype(np.float32), rng.standard_normal((*rows[::-1],)).astype(np.float32).T
    N, T = (len(lengths), 0) if lengths is not None else rows
    begin = order = None
    terms = {"bias": b.values}
    sizes = {"bias": np.abs(b.values)}
    if x is not None:
        terms["scale"] = b.values * (x.values - mean[..., None]) * rstd[..., None]
        sizes["scale"] = np.abs(b.values) * (np.abs(x.values) + np.abs(mean[..., None])) * np.abs(rstd[..., None])
    if lengths is not None:
        begin = np.concatenate([[0], np.cumsum(lengths)])
        order = np.arange(len(mean)) if ordered else rng.permutation(len(mean))
        of = [order[begin[i] : begin[i + 1]] for i in range(N)]

    def per_example(y: np.ndarray) -> np.ndarray:
        return y.sum(1) if lengths is None else np.stack([y[rows].sum(0) for rows in of])

    work = np.full((len(terms), parts, N, K), np.nan, np.float32)
    module.scale_bias(
        parts,
        lanes,
        elements[0] or 0,
        elements[1],
        (0, 0, 0, 0) if x is None else x.strided(),
        b.strided(),
        *((y.ctypes.data, *([0] * (2 - y.ndim)), *(stride // 4 for stride in y.strides)) for y in (mean, rstd)),
        *(N, T, K),
        0 if begin is None else begin.ctypes.data,
        0 if order is None or ordered else order.ctypes.data,
        0 if x is None else work[1].ctypes.data,
        work[0].ctypes.data,
        N * K,
        0,
    )
    for found, (field, term), size in zip(work, terms.items(), sizes.values(), strict=True):
        total = Mapped.of_copy((N, K), np.float32)
        module.add_partials([(found.ctypes.data, False, parts, N * K, N * K, [total.ctypes.data], 0)], 0)
        types = " and ".join(ELEMENTS[e] for e in elements if e is not None)
        what = f"{field} of {types}, {name}, N, T, K = {N}, {T}, {K}, {lanes} lanes, {parts} parts"
        expect(what, total, per_example(term), per_example(size))


def row_cases(module: ModuleType, short: bool) -> None:
    for element in range(3):
        for layout in ("dense", "spread") if short else ("dense", "features first", "spread", "shared"):
            dense(module, element, 11, 300, layout, 8, 2, 1, along=True, gram=True)
            scale_bias(module, (element, element), (2, 37, 72), layout, 16, 2)
        dense(module, element, 9, 2600, "dense", 1, 1, 2, along=element != 1, gram=False)  # more coordinates than a block has
    dense(module, 1, 130, 40, "dense", 4, 1, 2, along=True, gram=True)  # more examples than a warp has at a time
    dense(module, 0, 7, 1024, "dense", 2, 3, 1, along=False, gram=True)
    dense(module, 2, 5, 513, "dense", 8, 4, 3, along=True, gram=False)  # blocks and parts that have nothing
    for elements in ((0, 1), (1, 0)) if short else ((x, b) for x in (None, 0, 1, 2) for b in range(3)):
        scale_bias(module, elements, (2, 70, 264), "dense", 32, 1)
        ragged_scale_bias(module, elements, [0, 33, 1, 70, 0, 5], 40, False, 2, 3)
    ragged_scale_bias(module, (None, 2), [3, 0, 9], 1, True, 1, 1)


def far_row_cases(module: ModuleType) -> None:
    """Strides past 31 bits, of examples, positions and coordinates."""
    for stride in (2**31 + 8, 2**31 + 3):
        with Spread(Numbers(np.random.default_rng(8), 1, 2, 1, 16), (stride, 16, 1)) as g:
            check_dense(module, 1, g, f"stride {stride}", 8, 1, 1, True, False)
        for strides in ((stride, 16, 1), (16, stride, 1)):
            x = Numbers(np.random.default_rng(9), 0, 2, 2, 16)
            with Spread(Numbers(np.random.default_rng(8), 1, 2, 2, 16), strides) as b:
                check_scale_bias(module, (0, 1), x, b, f"strides {strides}", 2, 1)
    with Spread(Numbers(np.random.default_rng(8), 1, 2, 1, 16), (1, 1, 2**28 + 1)) as g:
        check_dense(module, 1, g, "far coordinates", 8, 1, 1, True, False)


class Spread:
    """Numbers at strides over memory of which a few pages are touched."""

    def __init__(self, numbers: Numbers, strides: tuple[int, ...]):
        self.numbers, itemsize = numbers, numbers.data.itemsize
        shape = numbers.data.shape
        size = itemsize * (1 + sum(x * (n - 1) for x, n in zip(strides, shape, strict=True)))
        self.memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
        flat = np.frombuffer(self.memory, numbers.data.dtype)
        wide = np.lib.stride_tricks.as_strided(flat, shape, [itemsize * x for x in strides])
        wide[...] = numbers.data
        numbers.data = wide

    def __enter__(self) -> Numbers:
        return self.numbers

    def __exit__(self, *_: object) -> None:
        del self.numbers.data  # before the memory, to which it refers
        self.memory.close()


HOPPER_TILE, HOPPER_WARPS, BOX = 128, 8, 64
SUMS, SCALARS, WEIGHTED = 1, 2, 3  # folds


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
    """Sums, scalars and the Gram in two launches' worth of tiles; with ``lengths`` ragged, with added rows. Before, without these
    rows, the other folds."""
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
    begin_of = 0 if begin is None else mapped_a.first_step.ctypes.data
    operands = (mapped_a.mapped, mapped_b.mapped, (N, -(-T // BOX), begin_of, 1 if element else 6, O, K))
    name = f"hopper, {ELEMENTS[element]}, {layout}, N, T, K, O = {N}, {T}, {K}, {O}, {parts} parts{', ragged' if lengths else ''}"
    whole = tiles // 2 if parts > 1 else tiles
    hopper_scalars(module, element, operands, (0, tiles, whole, parts, 8), g, size, name)
    hopper_weighted(module, element, operands, (0, tiles, whole, parts, 8), g, size, name)
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
            SUMS,
            *operands,
            (start, count, whole, parts, 8),
            (
                *(x.ctypes.data for x in out.sums),
                *(scalars.ctypes.data + 4 * N * f for f in range(4)),
                partials.ctypes.data,
                work.ctypes.data,
                slab.ctypes.data,
                u.ctypes.data,
                *(stride // 4 for stride in u.strides),
                *(0, 0),
            ),
            added,
            0,
        )
        pairs = np.full((2, N, N), np.nan)
        module.slab_gram(slab.ctypes.data, 0, not exact, N, N, slab.shape[1], pairs.ctypes.data, False, 2, 0)
        out.pairs += pairs.sum(0)
        cross = np.full((1, N, 1), np.nan)
        module.slab_gram(slab.ctypes.data, slab.ctypes.data, not exact, N, 1, slab.shape[1], cross.ctypes.data, False, 1, 0)
        expect("the Gram of two slabs", cross[0, :1, 0], pairs.sum(0)[0, :1], pairs.sum(0)[0, :1])
    if not exact:  # of gradients that were rounded to bfloat16
        expect_rounded(out.pairs[0], g, size)
        out.pairs = None
    out.check(name, g, size)


def hopper_scalars(
    module: ModuleType,
    element: int,
    operands: tuple[tuple[int, ...], ...],
    schedule: tuple[int, ...],
    g: np.ndarray,
    size: np.ndarray,
    name: str,
) -> None:
    """Squared norms and products with a direction, each alone and both; parts need no workspace."""
    N, O, K = g.shape
    u = np.random.default_rng(6).standard_normal((K, O)).astype(np.float32).T
    terms, scales = {"sq_norm": g * g, "dot": g * u}, {"sq_norm": size**2, "dot": size * np.abs(u)}
    for asked in (("sq_norm",), ("dot",), ("sq_norm", "dot")):
        found = {field: np.full(N, np.nan, np.float32) for field in asked}
        partials = np.full((len(asked), N, schedule[1] * HOPPER_WARPS), np.nan, np.float32)
        pointers = [found[field].ctypes.data if field in found else 0 for field in ("l1", "sq_norm", "dot", "abs_dot")]
        direction = (u.ctypes.data, *(stride // 4 for stride in u.strides)) if "dot" in asked else (0, 0, 0)
        out = (0, 0, 0, *pointers, partials.ctypes.data, 0, 0, *direction, 0, 0)
        module.hopper(element, 0, SCALARS, *operands, schedule, out, (0, 0, 0), 0)
        for field, x in found.items():
            expect(f"{name}: {field} of {' and '.join(asked)}", x, terms[field].sum((1, 2)), scales[field].sum((1, 2)))


def hopper_weighted(
    module: ModuleType,
    element: int,
    operands: tuple[tuple[int, ...], ...],
    schedule: tuple[int, ...],
    g: np.ndarray,
    size: np.ndarray,
    name: str,
) -> None:
    """Σ w g, and with sign(u) Σ v |g|."""
    rng, (N, O, K) = np.random.default_rng(7), g.shape
    _, count, whole, parts, _ = schedule
    w, v = (rng.standard_normal(N).astype(np.float32) for _ in range(2))
    u = (rng.standard_normal((K, O)) * (rng.random((K, O)) < 0.8)).astype(np.float32).T
    for signed in (False, True):
        found = Mapped.of_copy((O, K), np.float32)
        work = Mapped.of_copy(((count - whole) * parts, HOPPER_TILE**2), np.float32)
        direction = (u.ctypes.data, *(stride // 4 for stride in u.strides)) if signed else (0, 0, 0)
        weights = (w.ctypes.data, v.ctypes.data if signed else 0)
        out = (found.ctypes.data, *[0] * 7, work.ctypes.data, 0, *direction, *weights)
        module.hopper(element, 0, WEIGHTED, *operands, schedule, out, (0, 0, 0), 0)
        want, scale = np.einsum("n,nok->ok", w, g), np.einsum("n,nok->ok", np.abs(w), size)
        if signed:
            want += np.sign(u) * np.einsum("n,nok->ok", v, np.abs(g))
            scale += np.einsum("n,nok->ok", np.abs(v), size)
        expect(f"{name}: weighted{', signed' if signed else ''}", found, want, scale)


def hopper_infinite(module: ModuleType) -> None:
    """Outside of the weight the kernel forms zero times infinity, which no scalar has."""
    N, T, K, O = 2, 3, 40, 24
    rng = np.random.default_rng(8)
    a, b = Numbers(rng, 2, N, T, K), Numbers(rng, 2, N, T, O)
    a.data[0, 1, 2] = np.inf
    mapped_a, mapped_b = (Mapped(module, x, 2) for x in (a, b))
    found, partials = np.full(N, np.nan, np.float32), np.full((1, N, HOPPER_WARPS), np.nan, np.float32)
    out = (0, 0, 0, 0, found.ctypes.data, 0, 0, partials.ctypes.data, *[0] * 7)
    operands = (mapped_a.mapped, mapped_b.mapped, (N, 1, 0, 1, O, K))
    module.hopper(2, 0, SCALARS, *operands, (0, 1, 1, 1, 8), out, (0, 0, 0), 0)
    if not (found[0] == np.inf and np.isfinite(found[1])):
        sys.exit(f"wrong: norms of an infinite gradient and of another: {found}")


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
    hopper_infinite(module)
    hopper(module, 2, 67, 1, 8, 8, "dense", 1)  # more than one run of examples, and than one group of the Gram's


def main(path: str, *cases: str) -> None:
    """``short``: every tile with one kind of element, of which each has one, and the layouts that are copied in other ways."""
    module = load(path)
    layouts = ("dense", "spread") if "short" in cases else ("dense", "features first", "spread", "shared")
    wanted = [case for case in cases if case != "short"] or ["regular", "groups", "cross", "ragged", "embedding", "hopper", "rows"]
    if "hopper" in wanted:
        hopper_cases(module, "short" in cases)
    if "rows" in wanted:
        row_cases(module, "short" in cases)
    if "embedding" in wanted:
        embedding_cases(module, "short" in cases)
    if "far" in wanted:
        far_row_cases(module)
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
        if "groups" in wanted:
            groups(module, tile, tile % 3, slots + slots // 2 + 1, 3, 17, 33)
            cross(module, tile, tile % 3, slots, slots // 2 + 1, 3, 2, 17, 33)
            regular(module, tile, tile % 3, 2 * 64 + 5, 2, 17, 33, "dense", gram=False)
    print("ok")


if __name__ == "__main__":
    main(*sys.argv[1:])
