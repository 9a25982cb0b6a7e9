"""How far a result may be from its exact value. The limits follow from the arithmetic of the ops, not from a measured error.

The unit
    A result is a sum of terms, and a term is a product of operands. Errors are counted in units of eps × Σ|terms|, where eps is
    that of the dtype in which terms are added: float64 for float64 operands, float32 for all others. Σ|terms| is the same formula
    with the magnitudes of all operands, computed in float64. A budget thus depends on the op, the field, the sizes and the dtype.

One rounding
    A value that is rounded to nearest moves by eps/2 of its magnitude at most. :func:`rounding` counts such roundings, which meet
    each term once: those of a product, of a conversion, of a square. They are added up as if all had one sign.

A chain of additions
    A sum of n terms rounds n partial sums. Each has a magnitude of Σ|terms| at most: n/2 units are the worst case. Roundings to
    nearest have random signs, and the standard deviation of their sum is what counts for large n. One rounding of a partial sum
    S is uniform in ±eps |S| / 2: a deviation of eps |S| / √12. If the partial sums grow evenly to Σ|terms|, the mean of their
    squares is Σ|terms|² / 3, and the deviation of a chain is √n / 6 units. Three facts make this an upper estimate: an eps is
    relative to the power of two below a number, which makes the true deviation smaller by a quarter; terms of both signs have
    smaller partial sums; blocked and pairwise sums have shorter chains. Only an order that puts the largest terms first makes the
    partial sums larger, by √3 at most.

    The budget is six deviations, which is √n units, or the worst case n/2, if that is less. So many are needed because the tests
    compare millions of numbers, of which the largest error counts; and even the order that is largest first keeps 4.7 of the true
    deviations. It holds for every order of summation, and so for every library and processor.

Chains in chains
    A gradient g is a chain over positions, and a field is a chain over examples or features of such gradients. The errors of
    different chains are independent: their variances add, Σ n. A square or a product of two gradients takes the inner error twice,
    with one sign if both are the same gradient: twice the deviation, four times the variance.

Where float64 ends a chain
    The ops add float32 scalars (l1, sq_norm, dot, abs_dot) in float32 for short runs alone, of ``RUN`` numbers at most, and then in
    float64, or by a cascade or tree whose chains are as short. :func:`scalar` has that length. Gram matrices are not among them:
    a portable matrix product adds in its own way.

Several ways
    Some results have more than one formula, among which the library chooses by size. The budget is that of the worst of them
    (:func:`either`), so that no test must know the choice.

Results in half precision
    A result of less precision than the sums is rounded once more, by half an eps of its own dtype times its magnitude. That is not
    in proportion to Σ|terms|, so it is a term of its own (:func:`rounding_of_result`). A head's b is such a result too, and what
    follows from its rounding is a worst case: it may come close to the budget on every machine, and past it on none.

The truth of float64
    There is no wider dtype to compare with: the reference computes in float64 and errs by the same law. The error of a difference
    of two such results has twice the variance and twice the worst case.

Matrix units of a GPU
    They multiply float32 numbers as three products of tf32 parts, and cut sums off instead of rounding them. :class:`Arithmetic`
    has the terms for that, for a device and for an emulation of one.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

# Standard deviations of a chain that a budget allows, and a chain's deviation over √n.
DEVIATIONS = 6.0
SPREAD = 1 / 6
# Numbers that are added in float32 before float64 takes over: 64 vectors of a row, 48 of a register tile, 16 on each of four levels
# of PyTorch's cascade.
RUN = 64
# Roundings that an exponential counts as. PyTorch's and the C libraries' are within one eps of the exact value, a GPU's within two,
# and NumPy's, by which Triton's interpreter computes, within 2.52.
EXP = 6
HALF = (torch.bfloat16, torch.float16)


# Arithmetic ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arithmetic:
    """What a processor's products add to the budget of rounding to nearest.

    ``split``: units by which a product of two float32 numbers may err beyond its rounding if it is made of three tf32 products. The
    product of the two smaller parts, which is left out, is 2⁻²² of the product, or two units. What the smaller parts cannot hold is
    at most two more. On a device each of the three products is cut off within its own step, too.

    ``cuts``: additions that cut off, for each term of a product's sum. They lose an eps of the partial sum at most, always towards
    zero, so that their errors add up without the root. A matrix unit takes 16 half precision terms at a time, and 8 of tf32, in
    three products. The partial sums grow evenly, so the mean of them is half of Σ|terms|: half a unit for each such addition.

    ``factor``: units by which half precision products with a float32 factor err, which the unit reads as tf32: 2⁻¹¹ of it.

    ``slab``: units by which a product of two gradients errs that are rounded to bfloat16 before. The kernels of compute capability
    9.0 hold those of bfloat16 operands so for the Gram: each errs by 2⁻⁹ of it at most, and both by 2¹⁵ units.
    """

    split: float = 0.0
    cuts: float = 0.0
    cuts_of_half: float = 0.0
    factor: float = 0.0
    slab: float = 0.0


ROUNDING = Arithmetic()
# The threads of a CPU that stand in for CUDA's: tf32 parts, and sums that round. Triton's interpreter multiplies in float32.
EMULATED_CUDA = Arithmetic(split=4.0)
DEVICE = Arithmetic(split=4.0 + 3.0, cuts=3 / 8, cuts_of_half=1 / 16, factor=2.0**12)
SLAB = 2.0**15
# float32 products are six of bfloat16 parts there: what is left out is less than of tf32, and a unit's sums are as long.
EMULATED_HOPPER, DEVICE_HOPPER = (dataclasses.replace(x, slab=SLAB) for x in (EMULATED_CUDA, DEVICE))

_arithmetic = {"cuda": EMULATED_CUDA, "hopper": EMULATED_HOPPER}.get(os.environ.get("ZSL_TEST_EMULATED", ""), ROUNDING)


@contextmanager
def computing_by(arithmetic: Arithmetic) -> Iterator[None]:
    global _arithmetic
    before, _arithmetic = _arithmetic, arithmetic
    try:
        yield
    finally:
        _arithmetic = before


# Errors --------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Error:
    """The error of a result in units of eps × Σ|terms|; see the module's docstring. Sums are those of independent errors."""

    variance: float = 0.0  # of the chains
    worst: float = 0.0  # of the chains
    fixed: float = 0.0  # roundings of each term
    products: float = 0.0  # matrix products of operands that each term went through
    wide: float = 0.0  # matrix products of what is float32 even if the operands have half precision
    length: float = 0.0  # the lengths of sums that a matrix unit may form
    factors: float = 0.0  # factors of such products that are float32 where the other operand has half precision
    slabs: float = 0.0  # products of gradients, which may be rounded to bfloat16 before where the operands are

    def __add__(self, other: Error) -> Error:
        return Error(*(getattr(self, f.name) + getattr(other, f.name) for f in dataclasses.fields(Error)))

    def times(self, m: int) -> Error:
        """Of a term that has the number with this error as a factor m times."""
        found = Error(*(m * getattr(self, f.name) for f in dataclasses.fields(Error)))
        return dataclasses.replace(found, variance=m * m * self.variance)

    def units(self, dtype: torch.dtype, operands: torch.dtype | None = None) -> float:
        """The budget where terms are added in ``dtype``, in the arithmetic in force; ``operands``: their dtype, if another."""
        half = operands in HALF
        e = self + self if dtype == torch.float64 else self
        found = min(DEVIATIONS * math.sqrt(e.variance), e.worst) + e.fixed + _arithmetic.split * e.wide
        if half:
            found += _arithmetic.slab * e.slabs if operands == torch.bfloat16 else 0.0
            return found + _arithmetic.cuts_of_half * e.length / 2 + _arithmetic.factor * e.factors
        return found + _arithmetic.split * e.products + _arithmetic.cuts * e.length / 2


EXACT = Error()


def chain(n: int) -> Error:
    return Error(variance=n * SPREAD**2, worst=n / 2)


def rounding(count: float = 1) -> Error:
    return Error(fixed=count / 2)


def product(n: int) -> Error:
    """A matrix product of operands: products of two, rounded, and a chain of n of them."""
    return chain(n) + rounding() + Error(products=1, length=n)


def product_of_gradients(n: int) -> Error:
    """The same of float32 gradients. The sums are rounded on a device too: PyTorch's products of float32 are, and CUDA kernels add
    the steps of the matrix unit themselves."""
    return chain(n) + rounding() + Error(wide=1)


def gram_of_gradients(n: int) -> Error:
    """The same of gradients that a kernel has formed."""
    return product_of_gradients(n) + Error(slabs=1)


def either(*errors: Error) -> Error:
    return Error(*(max(getattr(e, f.name) for e in errors) for f in dataclasses.fields(Error)))


def scalar(n: int, dtype: torch.dtype) -> Error:
    """A sum of n numbers that float64 ends, or a cascade."""
    return chain(n if dtype == torch.float64 else min(n, RUN) + math.ceil(math.log2(max(n, 1))))


def rounding_of_result(truth: Tensor, dtype: torch.dtype) -> Tensor:
    """Absolute: below the normal numbers the distance of numbers is constant. The truth of float64 is rounded as well."""
    info = torch.finfo(dtype)
    return info.eps * (1.0 if dtype == torch.float64 else 0.5) * truth.abs().clamp(min=info.smallest_normal)


# The ops' errors -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sizes:
    """N examples of at most T positions, K and O features, and at most S rows of a tied embedding for each example. M examples of a
    second set. ``dtype``: in which terms are added."""

    N: int
    T: int
    K: int
    O: int
    S: int = 0
    M: int = 0
    dtype: torch.dtype = torch.float32

    @property
    def gradient(self) -> Error:
        """g_i, to which the embedding's rows are added."""
        return product(self.T) + chain(self.S)


def _sums(g: Error, N: int) -> dict[str, Error]:
    # A sum of squares may be a product of squared operands, which half precision cannot hold.
    return {"grad_sum": g + chain(N), "abs_sum": g + chain(N), "sq_sum": g.times(2) + rounding() + chain(N) + Error(wide=1)}


def interference(s: Sizes) -> dict[str, Error]:
    """Also of gram, dot and sq_norm alone."""
    g, every = s.gradient, scalar(s.O * s.K, s.dtype)
    # Of one position: Σ|b| Σ|a|.
    factored = scalar(s.K, s.dtype) + scalar(s.O, s.dtype) + rounding(3)
    # bᵀu first, and then a; or the other way round.
    along = either(g, product(s.K), product(s.O)) + rounding()
    # Σ_ts (a_s·a_t)(b_s·b_t), which forms no gradient.
    ghost = product(s.K) + product(s.O) + rounding() + scalar(s.T * s.T, s.dtype)
    return {
        **_sums(g, s.N),
        "l1": either(g + every, factored),
        "sq_norm": either(g.times(2) + rounding() + every, factored, ghost),
        "dot": along + every,
        "abs_dot": along + every,
        "gram": either(g.times(2) + gram_of_gradients(s.O * s.K), ghost),
    }


def weighted_grad(s: Sizes) -> dict[str, Error]:
    """One product over the positions of all examples, or a sum of gradients; the weights are rounded in."""
    return {"weighted_grad": either(product(s.N * s.T), s.gradient + chain(s.N)) + rounding()}


def call(name: str, s: Sizes) -> dict[str, Error]:
    return weighted_grad(s) if name == "weighted_grad" else interference(s)


def gradients(name: str, s: Sizes) -> dict[str, Error]:
    """The derivatives of an op with respect to its operands: da_i = b_i s_i and db_i = a_i s_iᵀ, where s_i is the derivative with
    respect to g_i. It is formed from g_i, which is computed again."""
    g, mixed = s.gradient, s.gradient + rounding(2)
    # Up to seven terms, each a product of two or three factors.
    tile = g + rounding(3) + chain(7)
    tiles = {
        "interference": tile,
        "interference, direction": tile,
        "interference, gram": tile + chain(s.N),
        "interference, all": tile + chain(s.N),
        "gram": mixed + chain(s.N),
        "cross gram": mixed + chain(s.M),
        "sq_norm": mixed,
        "dot": rounding(),
        "weighted_grad": rounding(),
    }
    held = Error(factors=1)
    found = {"a": tiles[name] + held + product(s.O), "b": tiles[name] + held + product(s.K), "e": tiles[name]}
    if name == "cross gram":
        other = mixed + chain(s.N) + held
        found |= {"a2": other + product(s.O), "b2": other + product(s.K)}
    # Σ c_i g_i + sign(u) Σ d_i |g_i|
    found["direction"] = weighted_grad(s)["weighted_grad"] + rounding()
    found["weights"] = interference(s)["dot"]
    return found


def dense(N: int, features: int, dtype: torch.dtype) -> dict[str, Error]:
    """Of gradients that are held."""
    return _of_held(EXACT, N, features, dtype)


def embedding(N: int, T: int, K: int, V: int, dtype: torch.dtype) -> dict[str, Error]:
    """An example's gradient has at most T rows that are not zero, and each is a sum of at most T rows."""
    return _of_held(chain(T), N, min(T, V) * K, dtype)


def _of_held(g: Error, N: int, features: int, dtype: torch.dtype) -> dict[str, Error]:
    every = scalar(features, dtype)
    return {
        **_sums(g, N),
        "l1": g + every,
        "sq_norm": g.times(2) + rounding() + every,
        "dot": g + rounding() + every,
        "abs_dot": g + rounding() + every,
        "gram": g.times(2) + product_of_gradients(features),
    }


def gradients_of_square(field: str, fields: dict[str, Error], g: Error, N: int) -> dict[str, Error]:
    """Of Σ field² with respect to gradients g_i that are held, or to what they are sums of, and to the direction: the derivative
    with respect to the field is twice the field and has its error."""
    tile = fields[field] + g + rounding(3) + chain(7)
    return {"g": tile + product(N) if field == "gram" else tile, "direction": fields[field] + g + rounding(2) + chain(N)}


def scale_bias(T: int) -> dict[str, Error]:
    """Σ_t b_t (x_t − mean_t) rstd_t and Σ_t b_t."""
    return {"scale": rounding(3) + chain(T), "bias": chain(T)}


# The head ------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HeadErrors:
    """Absolute errors of what a head computes from its logits, and the magnitude of b's terms. The logits' errors are in units of
    L = Σ|h w|, so that what follows from them depends on the problem and not on the sizes alone."""

    losses: Tensor
    lse: Tensor
    b: Tensor
    b_size: Tensor


def head(h: Tensor, weight: Tensor, onehot: Tensor, c: Tensor, dtype: torch.dtype) -> HeadErrors:
    """All in float64; ``c`` is zero where a position is ignored, ``dtype`` that of the operands."""
    half = dtype in HALF
    sums = torch.float32 if half else dtype
    K, V = h.shape[2], weight.shape[0]

    def units(e: Error) -> float:
        return torch.finfo(sums).eps * e.units(sums, dtype)

    logit = product(K)
    # Σ exp: differences from the highest logit, exp of them, and float32 sums that float64 ends.
    total = rounding(EXP) + scalar(V, sums)
    p, size, c = torch.softmax(h @ weight.T, -1), h.abs() @ weight.abs().T, c.abs()[..., None]
    # The loss is Σ p x − x_target to the first order: two independent errors. The differences from the highest logit, which are up
    # to 2 L, are rounded.
    of_two = logit + logit + rounding(2)
    b_size = c * (p + onehot)
    # b = (p − onehot) c: exp, its factor, their product, and the difference. Before, log p = x − lse is rounded, once more for a
    # base of two. The logits are computed anew for it, maybe in another order: their errors do not cancel against those of lse.
    b = units(total + rounding(EXP + 3)) * b_size
    b += c * (units(logit) * p * (size + (p * size).sum(-1, keepdim=True)) + units(rounding(2)) * torch.special.entr(p))
    if half:
        b += rounding_of_result(c * (p - onehot), dtype) * (c != 0)
    return HeadErrors(
        losses=units(of_two) * size.amax(-1) + units(total + rounding()),
        lse=units(logit + rounding(2)) * size.amax(-1) + units(total),
        b=b,
        b_size=b_size,
    )


def head_gradients(s: Sizes) -> dict[str, Error]:
    """b @ weight, in chunks of the vocabulary, and bᵀ h, of which the statistics' sum is one form. O is V."""
    return {"h.grad": product(s.O), "weight.grad": either(product(s.N * s.T), s.gradient + chain(s.N))}
