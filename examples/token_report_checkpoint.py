"""Every token's own gradient at a checkpoint of transformers, and how far the losses of tokens change against each other by a step.
Run it with: python examples/token_report_checkpoint.py (needs transformers; a random model, a few seconds on a CPU)."""

import tempfile

import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import zerosum

VOCAB, PAD = 64, -100


def save_random_model(folder: str) -> None:
    config = GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=32, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(folder)


def random_batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (N, T) and their successors; the end of the second sequence is padding, whose tokens are no examples."""
    tokens = torch.randint(VOCAB, (4, 17))
    x, y = tokens[:, :-1], tokens[:, 1:].clone()
    y[1, 10:] = PAD
    return x, y


def main() -> None:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        save_random_model(folder)
        model = AutoModelForCausalLM.from_pretrained(folder)
    x, y = random_batch()

    print("Exact, every token an example:")
    print(zerosum.token_report(model, x, y))  # the logits are found in what the model returns

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    held_out = random_batch()
    with zerosum.changes.Step(model, {"train": (x, y), "held_out": held_out}) as step:
        labels = torch.cat([x[:, :1], y], 1)  # transformers shifts them itself
        model(torch.cat([x, x[:, -1:]], 1), labels=labels).loss.backward()
        optimizer.step()
    for name in ("train.D", "train.mean", "held_out.D", "held_out.mean"):
        print(f"{name:>14}: {step.metrics[name].value:.4g} over {step.metrics[name].n} tokens")

    print("\nAlong that step, from 32 draws:")
    print(zerosum.token_report(model, x, y, direction=step.update, sample=32))


if __name__ == "__main__":
    main()
