"""How the Triton kernels of the ghost products, the derivatives and the head are compiled, as a launch would.

A launch compiles a kernel for the kinds of its arguments: a pointer's or an integer's divisibility by 16, a stride of 1, an absent
pointer. A variant is one such combination, of aligned operands in row-major order, for one shipped configuration.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.gpu.sass import Variant
from zsl_kernels.backends.triton.backward import derivative_kernel, product_kernel
from zsl_kernels.backends.triton.ghost import ghost_kernel
from zsl_kernels.backends.triton.linear_cross_entropy import linear_cross_entropy_backward_kernel, linear_cross_entropy_kernel
from zsl_kernels.planning.tiles import CONFIGS, GHOST_SHORT, Config

# Of the operands by kind of configuration; float16 compiles as bfloat16 does.
_ELEMENT = {"half": "bf16", "float32": "fp32"}
# Counts, of which nothing is known; the sizes of layers are multiples of 16.
_COUNTS = ("N", "M", "R", "parts", "examples")

Pointers = dict[str, str | None]


def variants(arch: int) -> Iterator[Variant]:
    """Every shipped configuration with the flags that launches combine."""
    for kind, element in _ELEMENT.items():
        for kernel, of_kernel in _VARIANTS.items():
            for config in CONFIGS[arch][kernel][kind]:
                yield from of_kernel(kind, config, element)


def _variant(name: str, kind: str, config: Config, kernel: Any, pointers: Pointers, **constants: object) -> Variant:
    """``pointers``: the types of what they point to, None for an absent one."""
    absent = {parameter: None for parameter, element in pointers.items() if element is None}
    signature = {parameter: f"*{pointers[parameter]}" if parameter in pointers else "i32" for parameter in kernel.arg_names}
    return Variant(name, kernel, kind, config, signature, constants | absent, _COUNTS)


def _tile(config: Config, kind: str) -> dict[str, Any]:
    precision = "tf32x3" if kind == "float32" else "tf32"
    return {"ROWS": config.rows, "COLS": config.cols, "DEPTH": config.depth, "PRECISION": precision}


def _ghost(kind: str, config: Config, element: str, lengths: tuple[int, ...] = ()) -> Iterator[Variant]:
    pointers: Pointers = {"p_a": element, "p_b": element, "p_a2": element, "p_b2": element, "p_out": "fp64"}
    units = {"stride_ak": 1, "stride_bo": 1, "stride_a2k": 1, "stride_b2o": 1}
    for each in lengths or (config.rows,):
        for norms in (False, True):
            flags = {"ITSELF": True, "NORMS": norms, "ROWS_EACH": each, "COLS_EACH": each, **units, **_tile(config, kind)}
            yield _variant(f"ghost {each}{' norms' if norms else ''}", kind, config, ghost_kernel, pointers, **flags)


def _ghost_short(kind: str, config: Config, element: str) -> Iterator[Variant]:
    yield from _ghost(kind, config, element, tuple(1 << power for power in range(GHOST_SHORT.bit_length())))


_COTANGENTS = ("p_u", "p_grad", "p_abs", "p_sq", "p_l1", "p_sq_norm", "p_dot", "p_abs_dot")
_OPTIONAL = ("p_begin", "p_slot", "p_added", *_COTANGENTS, "p_d_added")
_IRREGULAR: Pointers = {"p_begin": "i64", "p_slot": "i64", "p_added": "fp32"}


def _gradient(kind: str, config: Config, element: str) -> Iterator[Variant]:
    for name, given in (("", {}), (", ragged", {"p_begin": "i64"})):
        yield _derivative_of(f"gradient{name}", kind, config, element, given, GRADIENT=True, MIXED=False)


def _derivative(kind: str, config: Config, element: str) -> Iterator[Variant]:
    forms: dict[str, tuple[Pointers, bool]] = {
        "of sq_norm": ({"p_sq_norm": "fp32"}, False),
        "of all": (dict.fromkeys(_COTANGENTS, "fp32"), False),
        "of all, ragged, added and mixed": (dict.fromkeys(_OPTIONAL, "fp32") | _IRREGULAR, True),
    }
    yield _derivative_of("gradient, ragged and added", kind, config, element, _IRREGULAR, GRADIENT=True, MIXED=False)
    for name, (given, mixed) in forms.items():
        yield _derivative_of(f"derivative {name}", kind, config, element, given, GRADIENT=False, MIXED=mixed)


def _derivative_of(name: str, kind: str, config: Config, element: str, given: Pointers, **flags: object) -> Variant:
    pointers: Pointers = {**dict.fromkeys(_OPTIONAL), **given, "p_a": element, "p_b": element, "p_s": "fp32"}
    constants = flags | {"stride_ak": 1, "stride_bo": 1} | _tile(config, kind)
    return _variant(name, kind, config, derivative_kernel, pointers, **constants)


def _product(kind: str, config: Config, element: str) -> Iterator[Variant]:
    tables = ("p_begin", "p_example", "p_first_tile")
    # da = b s, of which a row of s has the columns; db = a sᵀ.
    for name, unit in (("da", "stride_sf"), ("db", "stride_sc")):
        for ragged in (False, True):
            of = {"p_x": element, "p_s": "fp32", "p_out": element, **dict.fromkeys(tables, "i64" if ragged else None)}
            flags = {"stride_xc": 1, unit: 1, "stride_outf": 1, "ADD": False, **_tile(config, kind)}
            yield _variant(f"product {name}{' ragged' if ragged else ''}", kind, config, product_kernel, of, **flags)
    of = {"p_x": element, "p_s": "fp32", "p_out": "fp32", **dict.fromkeys(tables)}
    flags = {"stride_xc": 1, "stride_sf": 1, "stride_outf": 1, "ADD": True, **_tile(config, kind)}
    yield _variant("product da added", kind, config, product_kernel, of, **flags)


def _head(kind: str, config: Config, element: str) -> Iterator[Variant]:
    units = {"stride_hk": 1, "stride_wk": 1}
    # Under autocast the weight is wider.
    for name, weight in (("", element), (" of a float32 weight", "fp32"))[: 2 if element != "fp32" else 1]:
        of: Pointers = {"p_h": element, "p_w": weight, "p_target": "i64"}
        results: Pointers = {"p_highest": "fp32", "p_total": "fp64", "p_at_target": "fp32"}
        yield _variant(f"head{name}", kind, config, linear_cross_entropy_kernel, of | results, **units, **_tile(config, kind))
        rest: Pointers = {"p_shift": "fp32", "p_scale": "fp32", "p_c": "fp32", "p_out": element}
        kernel = linear_cross_entropy_backward_kernel
        yield _variant(f"head backward{name}", kind, config, kernel, of | rest, **units, **_tile(config, kind))


_VARIANTS = {
    "ghost": _ghost,
    "ghost_short": _ghost_short,
    "gradient": _gradient,
    "derivative": _derivative,
    "product": _product,
    "linear_cross_entropy": _head,
}
