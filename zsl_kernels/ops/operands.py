"""Checks and conversions of the operands that the ops share: a, b, the direction, ragged rows and tied embeddings."""

from __future__ import annotations

import torch
from torch import Tensor

from zsl_kernels.backends.dispatch import impls_for
from zsl_kernels.ragged import Groups, group
from zsl_kernels.tied import Embedding
from zsl_kernels.validation import MOST_ELEMENTS, check_device, check_elements, check_examples, check_integers, check_tensor

# The last arguments in the schemas of the ops.
RAGGED = "Tensor? example_ids=None, SymInt num_examples=0"
EMBEDDING = "Tensor? embedding_ids=None, Tensor? embedding_grads=None, Tensor? embedding_example_ids=None"


def check_pair(
    a_name: str,
    a: Tensor,
    b_name: str,
    b: Tensor,
    impl: str,
    example_ids: Tensor | None = None,
    num_examples: int | None = None,
) -> int:
    """Check a, b, ``impl`` and the example ids; return N."""
    ragged = example_ids is not None
    for name, x, last in ((a_name, a, "K"), (b_name, b, "O")):
        check_tensor(name, x)
        if x.ndim != (2 if ragged else 3):
            hint = "; use unsqueeze(1) for one position per example, or pass example_ids for ragged rows" if x.ndim == 2 else ""
            expected = f"a 2-D tensor (R, {last}) with example_ids" if ragged else f"a 3-D tensor (N, T, {last})"
            raise ValueError(f"{name}: expected {expected}, got shape {tuple(x.shape)}{hint}")
    if b.dtype != a.dtype:
        raise TypeError(f"{b_name}: expected {a.dtype}, the dtype of {a_name}, got {b.dtype}")
    check_device(b_name, b, a_name, a)
    if b.shape[:-1] != a.shape[:-1]:
        sizes = ", ".join(map(str, a.shape[:-1]))
        raise ValueError(f"{b_name}: expected shape ({sizes}, O) to match {a_name}, got {tuple(b.shape)}")
    # One cheap test for operands of ordinary size: calls on small operands are short.
    if not torch.compiler.is_compiling() and not 0 < a.numel() * b.numel() <= MOST_ELEMENTS:
        check_elements(a_name, *a.shape)
        check_elements(b_name, *b.shape)
        check_elements(f"{a_name}, {b_name}: the weight", b.shape[-1], a.shape[-1])
    impls_for(a.device, impl)
    return check_examples(a, a_name, example_ids, num_examples)


def check_embedding(embedding: tuple[Tensor, ...], a: Tensor, b: Tensor, N: int, ragged: bool) -> Embedding:
    """Check ``embedding`` and return it as the ops take it: flattened rows, each with its example."""
    names = "ids (Q,), e (Q, K), example ids (Q,)" if ragged else "ids (N, S), e (N, S, K)"
    if not isinstance(embedding, tuple | list) or len(embedding) != (3 if ragged else 2):
        got = f"{len(embedding)} items" if isinstance(embedding, tuple | list) else type(embedding).__name__
        raise TypeError(f"embedding: expected a tuple ({names}), got {got}")
    ids, e = embedding[:2]
    check_tensor("embedding: e", e)
    K = a.shape[-1]
    check_elements("embedding: e", *e.shape)
    check_elements("embedding: examples times rows of the weight", N, b.shape[-1])
    if e.ndim != (2 if ragged else 3) or e.shape[-1] != K or (not ragged and e.shape[0] != N):
        raise ValueError(f"embedding: e: expected shape {f'(Q, {K})' if ragged else f'({N}, S, {K})'}, got {tuple(e.shape)}")
    check_device("embedding: e", e, "a", a)
    named = {"ids": (ids, e.shape[:-1])} | ({"example ids": (embedding[2], e.shape[:1])} if ragged else {})
    for name, (x, shape) in named.items():
        check_integers(f"embedding: {name}", x)
        if x.shape != shape:
            raise ValueError(f"embedding: {name}: expected shape {tuple(shape)}, got {tuple(x.shape)}")
        check_device(f"embedding: {name}", x, "a", a)
    if ragged:
        return Embedding(ids, e, embedding[2])
    examples = torch.arange(N, device=a.device).unsqueeze(1).expand(N, e.shape[1])
    return Embedding(ids.flatten(), e.flatten(0, 1), examples.flatten())


def check_direction(direction: Tensor, a: Tensor, b: Tensor) -> None:
    check_tensor("direction", direction)
    if direction.shape != (b.shape[-1], a.shape[-1]):
        raise ValueError(
            f"direction: expected the shape of the weight, ({b.shape[-1]}, {a.shape[-1]}), got {tuple(direction.shape)}"
        )
    check_device("direction", direction, "a", a)


def count(a: Tensor, example_ids: Tensor | None, num_examples: int) -> int:
    """Return N."""
    return a.shape[0] if example_ids is None else num_examples


def grouped(
    a: Tensor, b: Tensor, example_ids: Tensor | None, num_examples: int
) -> tuple[Tensor, Tensor, Tensor | None, Groups | None]:
    """Return a and b with ragged rows sorted by example. With ragged rows also return their offsets and the grouping."""
    if example_ids is None:
        return a, b, None, None
    # An op may be called directly, without the public function's checks. Valid ids are not checked twice.
    if example_ids.shape != a.shape[:1] or not 0 <= num_examples <= MOST_ELEMENTS:
        check_examples(a, "a", example_ids, num_examples)
    groups = group(example_ids, num_examples)
    return groups.gather(a), groups.gather(b), groups.begin, groups


def embedding_of(ids: Tensor | None = None, grads: Tensor | None = None, example_ids: Tensor | None = None) -> Embedding | None:
    return None if ids is None or grads is None or example_ids is None else Embedding(ids, grads, example_ids)
