"""Training steps of models of ``transformers`` with random weights, all of whose parameters a probe covers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zerosum.bench.workload import Workload


@dataclass(frozen=True)
class ModelCase:
    """An architecture, its width, layers and vocabulary, and a batch of N sequences of T tokens."""

    family: str
    width: int
    layers: int
    vocab: int
    N: int
    T: int

    def __str__(self) -> str:
        return f"{self.family} d={self.width} L={self.layers} V={self.vocab} N={self.N} T={self.T}"


@dataclass(frozen=True)
class TransformerWorkload(Workload):
    """The same for a model whose logits are a field of its output."""

    @classmethod
    def of(cls, case: ModelCase, device: torch.device | str = "cpu", autocast: bool = False) -> TransformerWorkload:
        torch.manual_seed(0)
        model = MODELS[case.family](case).to(device)
        return cls(model, *torch.randint(case.vocab, (2, case.N, case.T)).to(device), autocast)

    def losses_of(self, model: Callable[..., Any], x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.autocast):
            logits = model(input_ids=x).logits
            return F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").view(y.shape).mean(1)


def _gpt2(case: ModelCase) -> nn.Module:
    """Biases, LayerNorm, learned positions, and a head that is tied to the embedding."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=case.vocab,
        n_embd=case.width,
        n_layer=case.layers,
        n_head=case.width // 64,
        n_positions=case.T,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config)


def _llama(case: ModelCase) -> nn.Module:
    """RMSNorm, SwiGLU, fewer keys than queries, and a head of its own."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=case.vocab,
        hidden_size=case.width,
        intermediate_size=8 * case.width // 3 // 64 * 64,
        num_hidden_layers=case.layers,
        num_attention_heads=case.width // 64,
        num_key_value_heads=case.width // 128,
        max_position_embeddings=case.T,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config)


MODELS = {"GPT-2": _gpt2, "Llama": _llama}
