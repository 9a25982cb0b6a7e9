"""Tiny models and texts for trainers, and the truth of one of their steps: one backward pass for each example, in float64."""

from __future__ import annotations

import copy
import inspect
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zerosum.oracle import per_example_gradients, trainable
from zerosum.metrics import SIGN_FLIP

transformers = pytest.importorskip("transformers")

BYTES, IGNORED = 256, -100
TEXT = inspect.getsource(statistics).encode()
LENGTHS = (9, 12, 7, 12, 10, 8, 11, 12)


def gpt2(dtype: torch.dtype = torch.float64, **config: Any) -> nn.Module:
    """A GPT-2 of two layers, whose float64 form computes in float64 up to the loss."""
    torch.manual_seed(0)
    sizes = dict(n_embd=16, n_layer=2, n_head=4, n_positions=24, vocab_size=BYTES, bos_token_id=0, eos_token_id=0)
    dropouts = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    settings = transformers.GPT2Config(**{**sizes, **dropouts, **config}, use_cache=False)
    model = transformers.GPT2LMHeadModel(settings)
    with torch.no_grad():  # no bias is zero, and no norm is one
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    return model.to(dtype)


def llama(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    ids = dict(vocab_size=BYTES, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **ids, max_position_embeddings=64)).to(dtype)


def documents(count: int) -> list[list[int]]:
    """Pieces of a text of different lengths, as bytes."""
    return [list(TEXT[50 * i : 50 * i + LENGTHS[i % len(LENGTHS)]]) for i in range(count)]


def padded(examples: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
    """A collator: pads at the end, where there are no targets."""
    longest = max(len(example["input_ids"]) for example in examples)
    rows = [torch.tensor(example["input_ids"]) for example in examples]

    def pad(values: Iterable[Tensor], value: int) -> Tensor:
        return torch.stack([F.pad(x, (0, longest - len(x)), value=value) for x in values])

    mask = pad((torch.ones_like(row) for row in rows), 0)
    return {"input_ids": pad(rows, 0), "attention_mask": mask, "labels": pad(rows, IGNORED)}


def sums_of_tokens(logits: Tensor, labels: Tensor) -> Tensor:
    """(N,): each sequence's sum of its tokens' cross entropies."""
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], ignore_index=IGNORED, reduction="none")
    return losses.sum(1)


def truth_of(
    model: nn.Module,
    batches: Sequence[dict[str, Tensor]],
    losses: Callable[[nn.Module, dict[str, Tensor]], Tensor] | None = None,
    first: int = 1,
) -> dict[str, Tensor]:
    """(N, *shape) for each trainable parameter: the gradients of Σ ℓ_r over an example's tokens, divided by the mean number of
    tokens of an example of the step, from the ``first`` on. ``model`` is a copy of the step's, before it."""
    names = trainable(model)
    found = losses or (lambda m, b: sums_of_tokens(m(**{k: x for k, x in b.items() if k != "labels"}).logits, b["labels"]))
    parts = [per_example_gradients(found(model, batch), model, names) for batch in batches]
    tokens = sum(int((batch["labels"][:, first:] != IGNORED).sum()) for batch in batches)
    examples = sum(len(batch["labels"]) for batch in batches)
    return {name: torch.cat([part[name] for part in parts]).double() * (examples / tokens) for name in names}


def expected_logs(truth: dict[str, Tensor], embeddings: Sequence[str], direction: dict[str, Tensor]) -> dict[str, float]:
    """What a callback logs, by the definitions of the metrics."""

    def flat(names: Iterable[str]) -> Tensor:
        return torch.cat([truth[name].flatten(1) for name in names], 1)

    def interference(g: Tensor) -> tuple[float, float]:
        g = g[:, g.abs().sum(0) > 0]
        c, null = g.sum(0).abs() / g.abs().sum(0), SIGN_FLIP * g.square().sum(0).sqrt() / g.abs().sum(0)
        return 1 - c.mean().item(), 1 - null.mean().item()

    g = flat(truth)
    n = len(g)
    d, d_null = interference(flat(name for name in truth if name not in embeddings))
    p = g * torch.cat([direction[name].double().flatten() for name in truth])
    pairs = (g.sum(0).square().sum() - g.square().sum()) / (n * (n - 1))
    return {
        "zerosum/D_grad": d,
        "zerosum/null/D_grad": d_null,
        "zerosum/D_grad_all": interference(g)[0],
        "zerosum/grad_norm": g.mean(0).norm().item(),
        "zerosum/example_norm": g.square().sum(1).mean().sqrt().item(),
        "zerosum/example_l1": g.abs().sum(1).mean().item(),
        "zerosum/mean_dot_ratio": (pairs / g.square().sum(1).mean()).item(),
        "zerosum/C_g": (p.sum(0).abs().sum() / p.abs().sum()).item(),
        "zerosum/C_uG": (p.sum().abs() / p.sum(0).abs().sum()).item(),
        "zerosum/C_ug": (p.sum(1).abs().sum() / p.abs().sum()).item(),
        "zerosum/examples": float(n),
        "zerosum/covered": 1.0,
        "zerosum/finite": 1.0,
    }


def block_mask(sizes: Sequence[int]) -> Tensor:
    """(N, N): which pairs are of one micro-batch."""
    return torch.block_diag(*(torch.ones(n, n) for n in sizes)).bool()


def copy_of(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)
