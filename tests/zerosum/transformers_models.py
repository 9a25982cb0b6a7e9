"""Tiny random transformers of real architectures, from their configurations alone: no weights are downloaded.

N examples of T positions; an encoder-decoder has a source of T - 2, or 3. Dropout is off, and every parameter is perturbed, so that
no bias is zero, no norm is one and no two layers are alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zerosum.training.model import GPT, GPTConfig

transformers = pytest.importorskip("transformers")

VOCAB, IGNORED = 61, -100
PAD, BOS, EOS = 0, 1, 2


@dataclass(frozen=True)
class Architecture:
    """A model, a batch for it, and how far float64 can be trusted.

    ``rounds`` says where the model computes in float32 although its parameters are float64. The truth itself is rounded there, and
    not as a measurement of all examples at once is: 1e-6 is asked for, not 1e-9. ``vanishing`` are the ends of names of parameters
    whose gradient is zero by mathematics and rounding noise by arithmetic. ``dtype`` is the widest that the model runs in.
    """

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[int, int], dict[str, Tensor]]
    rounds: str = ""
    vanishing: tuple[str, ...] = ()
    dtype: torch.dtype = torch.float64

    def model(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        model = self.build().train()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
        return model.to(dtype)

    def inputs(self, n: int, t: int, seed: int = 1) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        return self.batch(n, t)

    def losses(self, model: nn.Module, inputs: dict[str, Tensor], per_token: str = "sum") -> Tensor:
        """(N,): the "sum" or the "mean" of the cross entropies of an example's tokens, without ignored ones."""
        inputs = dict(inputs)
        targets = inputs.pop("targets")
        output = model(**inputs)
        logits = output if isinstance(output, Tensor) else output.logits
        tokens = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none")
        sums = tokens.view(targets.shape).sum(1)
        return sums if per_token == "sum" else sums / (targets != IGNORED).sum(1)


def tokens(n: int, t: int) -> Tensor:
    return torch.randint(EOS + 1, VOCAB, (n, t))


def plain(n: int, t: int) -> dict[str, Tensor]:
    """Sequences of one length."""
    return {"input_ids": tokens(n, t), "targets": tokens(n, t)}


def own(n: int, t: int) -> dict[str, Tensor]:
    return {"tokens": tokens(n, t), "targets": tokens(n, t)}


def lengths_mask(n: int, t: int) -> Tensor:
    """(N, T), 1 at an example's positions: lengths T, T - 1, T - 2, T, …"""
    return (torch.arange(t) < (t - torch.arange(n) % 3)[:, None]).long()


def right_padded(n: int, t: int) -> dict[str, Tensor]:
    """Different lengths: padding at the end, whose targets are ignored."""
    mask = lengths_mask(n, t)
    return {
        "input_ids": tokens(n, t).masked_fill(mask == 0, PAD),
        "attention_mask": mask,
        "targets": tokens(n, t).masked_fill(mask == 0, IGNORED),
    }


def left_padded(n: int, t: int) -> dict[str, Tensor]:
    """Padding at the beginning, with positions that count from an example's first token."""
    batch = {key: value.flip(1) for key, value in right_padded(n, t).items()}
    return batch | {"position_ids": (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)}


def masked_words(n: int, t: int) -> dict[str, Tensor]:
    """BERT's: two segments, padding, and targets at some positions only."""
    batch = right_padded(n, t)
    segments = (torch.arange(t) >= t // 2).long().expand(n, t).clone()
    hidden = torch.arange(t) % 3 == 1
    return batch | {"token_type_ids": segments, "targets": batch["targets"].masked_fill(~hidden, IGNORED)}


def pairs(n: int, t: int) -> dict[str, Tensor]:
    """An encoder's and a decoder's sequences, of different lengths, both padded."""
    source = right_padded(n, max(t - 2, 3))
    mask = lengths_mask(n, t)
    return {
        "input_ids": source["input_ids"],
        "attention_mask": source["attention_mask"],
        "decoder_input_ids": tokens(n, t).masked_fill(mask == 0, PAD),
        "targets": tokens(n, t).masked_fill(mask == 0, IGNORED),
    }


def square_pairs(n: int, t: int) -> dict[str, Tensor]:
    """An encoder's and a decoder's sequences of one length."""
    return pairs(n, t + 2) | {"decoder_input_ids": tokens(n, t), "targets": tokens(n, t)}


def build(family: str, head: str, attention: str, **config: Any) -> Callable[[], nn.Module]:
    """The builder of a transformers model: ``family`` and ``head`` name its classes."""

    def make() -> nn.Module:
        kind = getattr(transformers, f"{family}{head}")
        ids = dict(vocab_size=VOCAB, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS)
        settings = getattr(transformers, f"{family}Config")(**ids, use_cache=False, **config)
        return kind._from_config(settings, attn_implementation=attention)

    return make


def decoder(family: str, attention: str, **config: Any) -> Callable[[], nn.Module]:
    """Two layers of a decoder in Llama's vocabulary of settings: 4 heads of queries, 2 of keys and values."""
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=24)
    return build(family, "ForCausalLM", attention, **sizes, max_position_embeddings=16, **config)


def gpt2(attention: str, **config: Any) -> Callable[[], nn.Module]:
    dropouts = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    return build("GPT2", "LMHeadModel", attention, n_embd=16, n_layer=2, n_head=4, n_positions=16, **dropouts, **config)


def mixtral(experts: str) -> Callable[[], nn.Module]:
    sizes = dict(num_local_experts=5, num_experts_per_tok=2, experts_implementation=experts)
    return decoder("Mixtral", "eager", **sizes)


def bert(attention: str) -> Callable[[], nn.Module]:
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24, max_position_embeddings=16)
    dropouts = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return build("Bert", "ForMaskedLM", attention, **sizes, **dropouts)


def t5(**config: Any) -> Callable[[], nn.Module]:
    sizes = dict(d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, relative_attention_num_buckets=6)
    return build("T5", "ForConditionalGeneration", "eager", **sizes, dropout_rate=0.0, decoder_start_token_id=PAD, **config)


NORM = "RMSNorm normalizes in float32"
SOFTMAX = "attention's softmax is in float32"
ROUTER = "the router's softmax is in float32"

ARCHITECTURES = [
    Architecture("gpt2-eager", gpt2("eager"), plain),
    Architecture("gpt2-sdpa-left-padded", gpt2("sdpa"), left_padded),
    Architecture("llama-eager-padded", decoder("Llama", "eager"), right_padded, rounds=f"{NORM}; {SOFTMAX}"),
    Architecture("llama-sdpa", decoder("Llama", "sdpa", attention_bias=True, mlp_bias=True), plain, rounds=NORM),
    Architecture("llama-sdpa-tied-padded", decoder("Llama", "sdpa", tie_word_embeddings=True), right_padded, rounds=NORM),
    Architecture("qwen2-sdpa", decoder("Qwen2", "sdpa"), plain, rounds=NORM),
    Architecture("qwen3-eager", decoder("Qwen3", "eager", head_dim=6), plain, rounds=f"{NORM}; {SOFTMAX}"),
    Architecture("olmo2-sdpa", decoder("Olmo2", "sdpa"), plain, rounds=NORM),
    Architecture("gemma-sdpa", decoder("Gemma", "sdpa", head_dim=4), plain, rounds="RMSNorm is in float32, weight and all"),
    Architecture(
        "gemma2-eager",
        decoder("Gemma2", "eager", head_dim=4, query_pre_attn_scalar=4, sliding_window=3),
        plain,
        rounds=f"RMSNorm is in float32, weight and all; {SOFTMAX}",
    ),
    Architecture("mixtral-eager", mixtral("eager"), plain, rounds=f"{NORM}; {ROUTER}; {SOFTMAX}"),
    Architecture("mixtral-batched_mm", mixtral("batched_mm"), plain, rounds=f"{NORM}; {ROUTER}; {SOFTMAX}"),
    # torch's grouped product takes no float64.
    Architecture("mixtral-grouped_mm", mixtral("grouped_mm"), plain, rounds="everything is in float32", dtype=torch.float32),
    # Attention's softmax ignores what is added to all of a query's scores: a bias of the keys has no gradient.
    Architecture("bert-eager-padded", bert("eager"), masked_words, vanishing=("attention.self.key.bias",)),
    Architecture("bert-sdpa-padded", bert("sdpa"), masked_words, vanishing=("attention.self.key.bias",)),
    Architecture("t5-relu-padded", t5(), pairs, rounds="RMSNorm's variance is in float32"),
    Architecture("t5-gated-square", t5(feed_forward_proj="gated-gelu"), square_pairs, rounds="RMSNorm's variance is in float32"),
    Architecture("own-gpt", lambda: GPT(GPTConfig(vocab=VOCAB, width=16, layers=2, heads=4, positions=16)), own),
]
