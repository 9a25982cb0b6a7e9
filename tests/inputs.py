"""Inputs, calls and oracles of the ops, in one place for tests and benchmarks.

A :class:`Problem` describes a call's operands and makes them from a seed; :data:`CALLS` has every public op as a function of them;
:func:`expected` and :func:`expected_gradients` say what comes out, from the reference in float64. Letters as in the library.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache, reduce

import torch
from torch import Tensor

import zsl_kernels as zk
from tests import error_budgets
from tests.devices import running_on
from tests.error_budgets import Error, Sizes, rounding_of_result
from zsl_kernels import call_cache
from zsl_kernels.planning import choose, gpu_cost
from zsl_kernels.planning.call import Call, Candidate
from zsl_kernels.types import sum_dtype

# The tests run the GPU's kernels on CPU tensors in processes of their own, which this names: "triton", "cuda", or "hopper" for the
# kernels of impl="cuda" that compute capability 9.0 alone has.
EMULATED = os.environ.get("ZSL_TEST_EMULATED")


DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


# Operands ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inputs:
    """``a`` (N, T, K), ``b`` (N, T, O), ``direction`` (O, K), ``weights`` (N,), and a second set of M examples."""

    a: Tensor
    b: Tensor
    direction: Tensor
    weights: Tensor
    a2: Tensor
    b2: Tensor

    def replace(self, **tensors: Tensor) -> Inputs:
        return dataclasses.replace(self, **tensors)

    def tensors(self) -> dict[str, Tensor]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


def _permuted(x: Tensor) -> Tensor:
    """The same values with the last dimension outermost in memory."""
    return x.movedim(-1, 0).contiguous().movedim(0, -1)


def _sliced(x: Tensor) -> Tensor:
    """The same values at odd strides and an odd offset; what lies between them is NaN, so that reading it shows."""
    sizes = [(step + 2) * size + 1 for step, size in enumerate(x.shape)]
    base = torch.full(sizes, math.nan, dtype=x.dtype)
    view = base[tuple(slice(1, None, step + 2) for step in range(x.ndim))]
    view.copy_(x)
    return view


# "shared" is "contiguous" but for ``a`` and ``a2``, which hold one example expanded over all (stride 0).
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": torch.Tensor.contiguous,
    "permuted": _permuted,
    "sliced": _sliced,
    "shared": torch.Tensor.contiguous,
}

# "integers" are so small that no order of summation rounds: results are exact. "wide" spreads magnitudes over five decades.
VALUES: dict[str, Callable[[tuple[int, ...], torch.Generator], Tensor]] = {
    "normal": lambda shape, g: torch.randn(shape, generator=g, dtype=torch.float64),
    "wide": lambda shape, g: (
        torch.randn(shape, generator=g, dtype=torch.float64)
        * torch.exp2(torch.rand(shape, generator=g, dtype=torch.float64) * 16 - 8)
    ),
    "integers": lambda shape, g: torch.randint(-1, 2, shape, generator=g, dtype=torch.float64),
}


@dataclass(frozen=True)
class Problem:
    """What to make. Equal problems make equal tensors."""

    N: int
    T: int
    K: int
    O: int
    M: int = 3
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    values: str = "normal"
    seed: int = 0

    def __str__(self) -> str:
        return f"N{self.N}_T{self.T}_K{self.K}_O{self.O}-{str(self.dtype).removeprefix('torch.')}-{self.layout}-{self.values}"

    def make(self) -> Inputs:
        generator = torch.Generator().manual_seed(self.seed)
        lay = LAYOUTS[self.layout]

        def draw(*shape: int) -> Tensor:
            return lay(VALUES[self.values](shape, generator).to(self.dtype))

        def inputs(examples: int) -> Tensor:
            return draw(1, self.T, self.K).expand(examples, -1, -1) if self.layout == "shared" else draw(examples, self.T, self.K)

        return Inputs(
            a=inputs(self.N),
            b=draw(self.N, self.T, self.O),
            direction=draw(self.O, self.K),
            weights=draw(self.N),
            a2=inputs(self.M),
            b2=draw(self.M, self.T, self.O),
        )


# Sizes around every edge of the kernels: the register tiles (rows 6, 12 and 16, columns 4 to 32), the output tile (192 × 384), the
# chunk of positions (256), the Gram's blocks of 3 and 4 examples, the ghost's blocks of 96 rows.
SIZES: dict[str, tuple[int, int, int, int]] = {
    "one number": (1, 1, 1, 1),
    "below a register tile": (2, 3, 7, 5),
    "on the register tile": (4, 16, 64, 24),
    "off the register tile": (3, 5, 33, 13),
    "one example": (1, 9, 70, 50),
    "one position": (7, 1, 40, 25),
    "many short examples": (50, 2, 17, 9),
    "many examples": (600, 1, 20, 12),
    "long examples": (2, 100, 20, 30),
    "one chunk": (2, 256, 33, 13),
    "past one chunk": (2, 257, 33, 13),
    "past two chunks": (3, 513, 19, 7),
    "many features": (3, 2, 600, 5),
    "past one tile": (3, 4, 391, 197),
}
EMPTY_SIZES: dict[str, tuple[int, int, int, int]] = {
    "no examples": (0, 4, 5, 6),
    "no positions": (3, 0, 5, 6),
    "no inputs": (3, 4, 0, 6),
    "no outputs": (3, 4, 5, 0),
}


def problems() -> list[Problem]:
    """Every size; every dtype × layout off the tile; every dtype × wide values; every dtype where positions or outputs are many."""
    found = [Problem(*size) for size in SIZES.values()]
    for dtype in DTYPES:
        found += [Problem(*SIZES["off the register tile"], dtype=dtype, layout=layout) for layout in LAYOUTS]
        found += [Problem(*SIZES[name], dtype=dtype) for name in ("one position", "past one chunk", "past one tile")]
        # Shared inputs are packed once for each tile and chunk: several of either.
        found += [Problem(*size, dtype=dtype, layout="shared") for size in (SIZES["past two chunks"], (3, 5, 150, 50))]
        found += [Problem(5, 33, 45, 19, dtype=dtype, values="wide")]
    found += [Problem(*SIZES["past one tile"], dtype=dtype, layout="shared") for dtype in (torch.float32, torch.bfloat16)]
    return list(dict.fromkeys(found))


def exact_problems() -> list[Problem]:
    """Integers: a result must be equal, whatever the order of summation. Every dtype × layout, on both sides of a chunk."""
    sizes = (SIZES["one position"], (9, 11, 45, 31), SIZES["past one chunk"])
    return [
        Problem(*size, dtype=dtype, layout=layout, values="integers") for size in sizes for dtype in DTYPES for layout in LAYOUTS
    ]


# Ragged rows, and the embedding's part of a tied weight ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Irregular:
    """Ragged rows, ``lengths`` of them for each example, in a shuffled order; if not ``ragged``, (N, T, ·) of one length. With S an
    embedding's part too: S rows for each example, shuffled, among them duplicates and negative ids."""

    lengths: tuple[int, ...]
    K: int
    O: int
    S: int = 0
    ragged: bool = True
    dtype: torch.dtype = torch.float32
    e_dtype: torch.dtype | None = None
    layout: str = "contiguous"
    values: str = "normal"
    seed: int = 0

    def __str__(self) -> str:
        form = "ragged" if self.ragged else "regular"
        sizes = f"{form}{len(self.lengths)}x{max(self.lengths, default=0)}_K{self.K}_O{self.O}_S{self.S}"
        return f"{sizes}-{str(self.dtype).removeprefix('torch.')}-{self.layout}-{self.values}"

    def make(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        N, R = len(self.lengths), sum(self.lengths)

        def draw(*shape: int) -> Tensor:
            return LAYOUTS[self.layout](VALUES[self.values](shape, generator).to(self.dtype))

        def shuffled(repeats: Tensor) -> Tensor:
            ids = torch.arange(N).repeat_interleave(repeats)
            return ids[torch.randperm(len(ids), generator=generator)]

        rows = (R,) if self.ragged else (N, max(self.lengths, default=0))
        x = {"a": draw(*rows, self.K), "b": draw(*rows, self.O), "direction": draw(self.O, self.K), "weights": draw(N)}
        if self.ragged:
            x["example_ids"] = shuffled(torch.tensor(self.lengths, dtype=torch.int64))
        if self.S:
            tied = (N * self.S,) if self.ragged else (N, self.S)
            # Every other id is one of the first three: an example has duplicates.
            ids = torch.randint(-1, self.O, tied, generator=generator)
            few = torch.randint(0, min(3, self.O), tied, generator=generator)
            x["ids"] = torch.where(torch.rand(tied, generator=generator) < 0.5, few, ids)
            x["e"] = draw(*tied, self.K).to(self.e_dtype or self.dtype)
            if self.ragged:
                x["e_examples"] = shuffled(torch.full((N,), self.S))
        return x


def irregular_options(x: dict[str, Tensor]) -> dict[str, object]:
    """The keyword arguments of :func:`zk.interference` for such operands; the other ops take those but for ``embedding``."""
    options: dict[str, object] = {}
    if "example_ids" in x:
        options |= {"example_ids": x["example_ids"], "num_examples": len(x["weights"])}
    if "e" in x:
        options["embedding"] = tuple(x[name] for name in ("ids", "e", "e_examples") if name in x)
    return options


IRREGULAR_CALLS: dict[str, Callable[[dict[str, Tensor], str], dict[str, Tensor]]] = {
    "interference": lambda x, impl: _fields(zk.interference(x["a"], x["b"], impl=impl, **irregular_options(x))),
    "interference, all": lambda x, impl: _fields(
        zk.interference(x["a"], x["b"], direction=x["direction"], gram=True, impl=impl, **irregular_options(x))
    ),
    "interference, direction": lambda x, impl: _fields(
        zk.interference(x["a"], x["b"], direction=x["direction"], impl=impl, **irregular_options(x))
    ),
    "gram": lambda x, impl: {"gram": zk.gram(x["a"], x["b"], impl=impl, **irregular_options(x))},
    "dot": lambda x, impl: {"dot": zk.dot(x["a"], x["b"], x["direction"], impl=impl, **irregular_options(x))},
    "sq_norm": lambda x, impl: {"sq_norm": zk.sq_norm(x["a"], x["b"], impl=impl, **irregular_options(x))},
    "weighted_grad": lambda x, impl: {
        "weighted_grad": zk.weighted_grad(x["a"], x["b"], x["weights"], impl=impl, **irregular_options(x))
    },
}
# The operands that results depend on, where there are others than a and b.
IRREGULAR_OPERANDS = {
    "interference, all": ("a", "b", "direction"),
    "dot": ("a", "b", "direction"),
    "weighted_grad": ("a", "b", "weights"),
}


# Calls and implementations -------------------------------------------------------------------------------------------------------

Results = dict[str, Tensor]


def _fields(sums: zk.InterferenceSums) -> Results:
    return {name: x for name, x in sums._asdict().items() if x is not None}


CALLS: dict[str, Callable[[Inputs, str], Results]] = {
    "interference": lambda x, impl: _fields(zk.interference(x.a, x.b, impl=impl)),
    "interference, direction": lambda x, impl: _fields(zk.interference(x.a, x.b, direction=x.direction, impl=impl)),
    "interference, gram": lambda x, impl: _fields(zk.interference(x.a, x.b, gram=True, impl=impl)),
    "interference, all": lambda x, impl: _fields(zk.interference(x.a, x.b, direction=x.direction, gram=True, impl=impl)),
    "gram": lambda x, impl: {"gram": zk.gram(x.a, x.b, impl=impl)},
    "cross gram": lambda x, impl: {"gram": zk.gram(x.a, x.b, x.a2, x.b2, impl=impl)},
    "dot": lambda x, impl: {"dot": zk.dot(x.a, x.b, x.direction, impl=impl)},
    "sq_norm": lambda x, impl: {"sq_norm": zk.sq_norm(x.a, x.b, impl=impl)},
    "weighted_grad": lambda x, impl: {"weighted_grad": zk.weighted_grad(x.a, x.b, x.weights, impl=impl)},
}
# The tensors each call reads.
OPERANDS: dict[str, tuple[str, ...]] = {
    "interference": ("a", "b"),
    "interference, direction": ("a", "b", "direction"),
    "interference, gram": ("a", "b"),
    "interference, all": ("a", "b", "direction"),
    "gram": ("a", "b"),
    "cross gram": ("a", "b", "a2", "b2"),
    "dot": ("a", "b", "direction"),
    "sq_norm": ("a", "b"),
    "weighted_grad": ("a", "b", "weights"),
}
# The others have no derivative of their own.
DIFFERENTIATED = ("interference, all", "gram", "cross gram", "dot", "sq_norm", "weighted_grad")


def cpu_isas() -> list[str]:
    return list(zk.build_info()["cpu_isas"])


def implementations() -> list[str]:
    """ "chunked" and "cpu-<isa>" for every instruction set of this processor; "cpu" where the kernels are not built. In a process
    that emulates a GPU's kernels those alone."""
    if EMULATED:
        return [EMULATED]
    return ["chunked", *([f"cpu-{isa}" for isa in cpu_isas()] or ["cpu"])]


def gpu_implementations() -> list[str]:
    """ "<impl>@cuda", on a machine that has such a device."""
    if EMULATED or not torch.cuda.is_available():
        return []
    hopper = ("hopper",) if torch.cuda.get_device_capability() == (9, 0) else ()
    return [f"{impl}@cuda" for impl in ("chunked", "triton", "cuda", *hopper)]


@contextmanager
def ways_of_cuda(impl: str) -> Iterator[None]:
    """Of the ways of impl="cuda" those of compute capability 9.0 alone, or the others for the ops that they have."""
    if impl not in ("cuda", "hopper"):
        yield
        return
    before = choose.GPU_WAYS["cuda"]
    others = [way for way in before if way is not gpu_cost.hopper]

    def rest(call: Call) -> Iterator[Candidate]:
        found = [candidate for way in others for candidate in way(call)]
        yield from found or gpu_cost.hopper(call)

    choose.GPU_WAYS["cuda"] = (gpu_cost.hopper,) if impl == "hopper" else (rest,)
    _forget_plans()
    try:
        yield
    finally:
        choose.GPU_WAYS["cuda"] = before
        _forget_plans()


def _forget_plans() -> None:
    choose.choose.cache_clear()
    call_cache.forget()


@contextmanager
def running(implementation: str) -> Iterator[str]:
    """Selects the instruction set or the device; gives the name for ``impl=``."""
    impl, _, device = implementation.partition("@")
    if device or impl == EMULATED:
        arithmetic = error_budgets.DEVICE_HOPPER if impl == "hopper" else error_budgets.DEVICE
        computing = error_budgets.computing_by(arithmetic) if device else nullcontext()
        with running_on(device or "cpu"), computing, ways_of_cuda(impl):
            yield "cuda" if impl == "hopper" else impl
        return
    impl, _, isa = implementation.partition("-")
    if not isa:
        yield impl
        return
    cpu_isas()  # loads the library
    before = torch.ops.zsl_cpu.isa()
    torch.ops.zsl_cpu.use_isa(isa)
    try:
        yield impl
    finally:
        torch.ops.zsl_cpu.use_isa(before)


# Oracles -------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Expected:
    """One result: in float64, the sum of its terms' magnitudes, and its error in units of that; tests/error_budgets.py says why."""

    truth: Tensor
    scale: Tensor
    error: Error
    dtype: torch.dtype  # of the result
    sums: torch.dtype  # in which terms are added
    operands: torch.dtype | None = None  # that of all operands
    beside: Tensor | float = 0.0  # an absolute error that follows from another one's

    def rounding(self) -> Tensor:
        return rounding_of_result(self.truth, self.dtype)

    def allowed(self) -> Tensor:
        """Beside the rounding of the result."""
        return self.error.units(self.sums, self.operands) * torch.finfo(self.sums).eps * self.scale + self.beside

    def share(self, x: Tensor) -> float:
        """The largest error of x beyond the rounding of the result, as a part of what is allowed."""
        beyond = ((x.double() - self.truth).abs() - self.rounding()).clamp(min=0)
        return torch.where(beyond == 0, 0.0, beyond / self.allowed()).max().item() if beyond.numel() else 0.0


def sums_of(g: Tensor, direction: Tensor | None = None) -> Results:
    """Every field of the sums of gradients (N, *shape) that are held, by its definition."""
    flat = g.reshape(g.shape[0], math.prod(g.shape[1:]))
    found = {
        "grad_sum": g.sum(0),
        "abs_sum": g.abs().sum(0),
        "sq_sum": g.square().sum(0),
        "l1": flat.abs().sum(1),
        "sq_norm": flat.square().sum(1),
        "gram": flat @ flat.T,
    }
    if direction is not None:
        p = flat * direction.to(g.dtype).reshape(-1)
        found |= {"dot": p.sum(1), "abs_dot": p.abs().sum(1)}
    return found


# From named tensors to named results.
Computation = Callable[[dict[str, Tensor]], dict[str, Tensor | None]]


def expectations(
    compute: Computation,
    tensors: dict[str, Tensor],
    errors: dict[str, Error],
    dtypes: dict[str, torch.dtype] | None = None,
    operands: torch.dtype | None = None,
) -> dict[str, Expected]:
    """``errors``: of each result of ``compute``; ``dtypes``: of those that do not have the dtype of the sums; ``operands``: the
    dtype of the operands that are multiplied, without it that of all tensors."""

    def run(change: Callable[[Tensor], Tensor]) -> dict[str, Tensor | None]:
        return compute({name: change(x) if x.is_floating_point() else x for name, x in tensors.items()})

    if operands is None:
        operands = reduce(torch.promote_types, (x.dtype for x in tensors.values() if x.is_floating_point()))
    sums = sum_dtype(operands)
    truth, scale = run(Tensor.double), run(lambda x: x.double().abs())
    return {
        name: Expected(x, scale[name], errors[name], (dtypes or {}).get(name, sums), sums, operands)
        for name, x in truth.items()
        if x is not None
    }


def sizes_of(problem: Problem) -> Sizes:
    return Sizes(problem.N, problem.T, problem.K, problem.O, M=problem.M, dtype=sum_dtype(problem.dtype))


def irregular_sizes_of(problem: Irregular) -> Sizes:
    N, T = len(problem.lengths), max(problem.lengths, default=0)
    return Sizes(N, T, problem.K, problem.O, S=problem.S, dtype=sum_dtype(problem.dtype))


@lru_cache(maxsize=512)
def expected_irregular(problem: Irregular, call: str) -> dict[str, Expected]:
    errors = error_budgets.call(call, irregular_sizes_of(problem))
    return expectations(lambda x: IRREGULAR_CALLS[call](x, "reference"), problem.make(), errors, operands=problem.dtype)


@lru_cache(maxsize=512)
def expected(problem: Problem, call: str) -> dict[str, Expected]:
    errors = error_budgets.call(call, sizes_of(problem))
    return expectations(lambda x: CALLS[call](Inputs(**x), "reference"), problem.make().tensors(), errors)


def assert_within_budget(actual: Tensor, e: Expected, what: object = "") -> None:
    assert actual.shape == e.truth.shape, what
    assert actual.dtype == e.dtype, what
    share = e.share(actual)
    assert share <= 1, f"{what}: error of {share:.3g} budgets, of {e.error.units(e.sums, e.operands):.3g} eps x sum of magnitudes"


def assert_exact(actual: Tensor, e: Expected, what: object = "") -> None:
    """Equal. The terms are integers whose magnitudes sum to what float32 represents, so no order of summation rounds."""
    assert e.scale.numel() == 0 or e.scale.max() < 2**24, f"{what}: this problem rounds"
    torch.testing.assert_close(actual, e.truth.to(e.dtype), rtol=0, atol=0, msg=lambda m: f"{what}: {m}")


# Gradients -----------------------------------------------------------------------------------------------------------------------


def gradients(
    call: str, inputs: Inputs, impl: str, cotangents: Results, wanted: tuple[str, ...] | None = None
) -> dict[str, Tensor | None]:
    """Of Σ cotangent · field over the fields named in ``cotangents``, for the operands in ``wanted`` (all that the call reads)."""
    names = OPERANDS[call] if wanted is None else wanted
    leaves = {name: getattr(inputs, name).detach().requires_grad_() for name in names}
    results = CALLS[call](inputs.replace(**leaves), impl)
    outputs = [results[name] for name in cotangents]
    found = torch.autograd.grad(outputs, list(leaves.values()), list(cotangents.values()), allow_unused=True)
    return dict(zip(leaves, found, strict=True))


def irregular_gradients(call: str, x: dict[str, Tensor], impl: str, wanted: tuple[str, ...], given: Results) -> Results:
    """Of Σ given · field, for the operands in ``wanted``."""
    leaves = {name: x[name].detach().clone().requires_grad_() for name in wanted}
    results = IRREGULAR_CALLS[call]({**x, **leaves}, impl)
    found = torch.autograd.grad([results[name] for name in given], list(leaves.values()), list(given.values()))
    return dict(zip(leaves, found, strict=True))


def cotangents(problem: Problem, call: str, fields: tuple[str, ...] | None = None) -> Results:
    generator = torch.Generator().manual_seed(problem.seed + 1)
    draw = VALUES["integers" if problem.values == "integers" else "normal"]
    results = {name: draw(tuple(e.truth.shape), generator).to(e.dtype) for name, e in expected(problem, call).items()}
    return results if fields is None else {name: results[name] for name in fields}


@lru_cache(maxsize=256)
def expected_gradients(problem: Problem, call: str, fields: tuple[str, ...] | None = None) -> dict[str, Expected]:
    operands, given = problem.make().tensors(), cotangents(problem, call, fields)

    def compute(x: dict[str, Tensor]) -> dict[str, Tensor | None]:
        return gradients(
            call, Inputs(**{name: x[name] for name in operands}), "reference", {name: x[f"c.{name}"] for name in given}
        )

    dtypes = {name: x.dtype for name, x in operands.items()}
    tensors = {**operands, **{f"c.{name}": c for name, c in given.items()}}
    # Cotangents are float32 beside operands of half precision.
    return expectations(compute, tensors, error_budgets.gradients(call, sizes_of(problem)), dtypes, problem.dtype)
