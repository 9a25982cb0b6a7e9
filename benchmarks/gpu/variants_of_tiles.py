"""How the Triton kernels are compiled: every shipped configuration, with the combinations of arguments that need most registers.

Compiled without a GPU by the tests, which look at the machine code, and by the report.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from benchmarks.gpu.sass import Variant
from zsl_kernels.backends.triton.interference import FOLD_BLOCK, FOLD_WARPS, fold_kernel, interference_kernel
from zsl_kernels.backends.triton.rank_one import RUN, rank_one_kernel
from zsl_kernels.planning.tiles import CONFIGS, UNALIGNED, Config

_SUMS = ("grad_ptr", "abs_ptr", "sq_ptr", "scalars_ptr")
_ADDED = ("bound_ptr", "feature_ptr", "added_ptr")
_OPTIONAL = (*_SUMS, "direction_ptr", "begin_ptr", *_ADDED, "slab_ptr")
_INTEGERS = ("begin_ptr", "bound_ptr", "feature_ptr")
# Never multiples of 16 for certain; nor are sizes and strides, of operands that are not aligned.
_COUNTS = ("N", "T", "E", "per_part", "first_row", "first_col", "num_rows", "num_cols", "slab_rows")


class _Form(NamedTuple):
    name: str
    present: tuple[str, ...]  # of the optional arguments
    even: bool = True  # whether tiles cover the weight exactly


# The combinations that are left out have a part of these one's work.
_FORMS = {
    "interference": (
        _Form("", _SUMS),
        _Form("direction", (*_SUMS, "direction_ptr")),
        _Form("direction, added, ragged", (*_SUMS, "direction_ptr", "begin_ptr", *_ADDED)),
        _Form("direction, uneven", (*_SUMS, "direction_ptr"), False),
        _Form("direction, ragged, uneven", (*_SUMS, "direction_ptr", "begin_ptr"), False),
        _Form("direction, added, uneven", (*_SUMS, "direction_ptr", *_ADDED), False),
        _Form("direction, added, ragged, uneven", (*_SUMS, "direction_ptr", "begin_ptr", *_ADDED), False),
    ),
    "sq_norm": (
        _Form("", ("scalars_ptr",)),
        _Form("ragged, uneven", ("scalars_ptr", "begin_ptr"), False),
        _Form("stored", ("slab_ptr",)),
        _Form("stored, added, ragged", ("slab_ptr", "begin_ptr", *_ADDED)),
        _Form("stored, added, uneven", ("slab_ptr", *_ADDED), False),
        _Form("stored, added, ragged, uneven", ("slab_ptr", "begin_ptr", *_ADDED), False),
    ),
}
_ELEMENTS = {"half": ("bf16", "fp16"), "float32": ("fp32",)}


def variants(arch: int) -> Iterator[Variant]:
    for kernel in ("interference", "sq_norm", "rank_one"):
        for dtype, configs in CONFIGS[arch][kernel].items():
            for config in configs:
                # What float16 needs is what bfloat16 needs: one form shows that it compiles.
                for element in _ELEMENTS[dtype]:
                    yield from _of(kernel, dtype, element, config, aligned=True, everything=element != "fp16")
            yield from _of(kernel, dtype, _ELEMENTS[dtype][0], UNALIGNED[kernel], aligned=False)
    for direction in (False, True):
        yield _variant(
            "fold, direction" if direction else "fold",
            fold_kernel,
            "float32",
            "fp32",
            Config(1, FOLD_BLOCK, 1, FOLD_WARPS, 1),
            {"BLOCK": FOLD_BLOCK, "RUN": 64} | ({} if direction else {"direction_ptr": None}),
            _COUNTS,
        )


def _of(kernel: str, dtype: str, element: str, config: Config, *, aligned: bool, everything: bool = True) -> Iterator[Variant]:
    precision = "tf32x3" if dtype == "float32" else "ieee"
    constants: dict[str, object] = {"ROWS": config.rows, "COLS": config.cols, "DEPTH": config.depth, "PRECISION": precision}
    constants |= {"stride_ak": 1, "stride_bo": 1} if aligned else {}
    label = f"{kernel}, {element}" + ("" if aligned else ", unaligned")
    # Nothing is known of the sizes and strides of operands that are not aligned.
    odd = _COUNTS if aligned else None
    if kernel == "rank_one":
        yield _variant(label, rank_one_kernel, dtype, element, config, constants | {"SQUARES": "tf32x3", "RUN": RUN}, odd)
        return
    forms = [form for form in _FORMS[kernel] if aligned or not form.even]
    for form in forms if everything else forms[:1]:
        absent = {name: None for name in _OPTIONAL if name not in form.present}
        given = constants | absent | {"RUN": 64, "EVEN": form.even}
        yield _variant(", ".join(filter(None, (label, form.name))), interference_kernel, dtype, element, config, given, odd)


def _variant(
    name: str, kernel: Any, dtype: str, element: str, config: Config, constants: dict[str, object], odd: tuple[str, ...] | None
) -> Variant:
    def type_of(argument: str) -> str:
        if not argument.endswith("_ptr"):
            return "i32"
        return "*i64" if argument in _INTEGERS else f"*{element}" if argument in ("a_ptr", "b_ptr") else "*fp32"

    signature = {argument: type_of(argument) for argument in kernel.arg_names if argument not in constants}
    numbers = tuple(argument for argument in signature if not argument.endswith("_ptr"))
    odd = numbers if odd is None else tuple(argument for argument in numbers if argument in odd)
    return Variant(name, kernel, dtype, config, signature, constants, odd)
