"""Per-document gradient statistics of packed batches: documents one after another in one row, as DataCollatorWithFlattening makes
them. Run it with: python examples/packed_batches.py (needs transformers; a random model, a few seconds on a CPU)."""

import tempfile

import torch
from transformers import AutoModelForCausalLM, DataCollatorWithFlattening, LlamaConfig, LlamaForCausalLM

import zerosum

VOCAB, STEPS = 64, 6


def save_random_model(folder: str) -> None:
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def random_documents() -> list[dict[str, list[int]]]:
    """Of different lengths, 96 tokens in all."""
    lengths = [5, 17, 9, 12, 21, 8, 10, 14]
    return [{"input_ids": torch.randint(VOCAB, (n,)).tolist()} for n in lengths]


def main() -> None:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        save_random_model(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, use_cache=False)  # with a cache, documents attend to each other
    collate = DataCollatorWithFlattening(return_tensors="pt")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    probe = zerosum.Probe(model)
    for step in range(STEPS):
        batch = collate(random_documents())  # input_ids, labels and position_ids, (1, 96)
        optimizer.zero_grad()
        with probe:
            # A document starts where its positions do. Without this line the whole row is one example.
            zerosum.example_ids(batch["input_ids"], position_ids=batch["position_ids"])
            loss = model(**batch).loss  # a mean over all tokens: what it is of each document is read off the loss
            loss.backward()
        optimizer.step()
        metrics = probe.report().metrics
        print(f"step {step}: loss {loss.item():.3f}, {probe.report().num_examples} documents, D_grad {metrics['D_grad'].value:.3f}")
    print(probe.report())


if __name__ == "__main__":
    main()
