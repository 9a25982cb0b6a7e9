"""transformers.Trainer with one more line: each third step's gradient interference is logged, and recorded for `zerosum plot`."""

import inspect
import statistics
import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from zerosum.integrations.transformers import ZeroSumCallback

LENGTH, STEPS = 32, 12


def main() -> None:
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes, max_position_embeddings=LENGTH))
    text = inspect.getsource(statistics).encode()  # a byte is a token
    pieces = [list(text[i : i + LENGTH]) for i in range(0, 64 * LENGTH, LENGTH)]
    data = [{"input_ids": piece, "labels": piece} for piece in pieces]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            max_steps=STEPS,
            learning_rate=3e-3,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        callback = ZeroSumCallback(every=3, gram=True, out=f"{folder}/run")
        trainer = Trainer(model, arguments, train_dataset=data, callbacks=[callback])
        trainer.train()
    for entry in trainer.state.log_history:
        if "zerosum/D_grad" in entry:
            null = entry["zerosum/null/D_grad"]
            print(f"step {entry['step']}: D_grad {entry['zerosum/D_grad']:.3f}, with random signs {null:.3f}")
    print(callback.report)


if __name__ == "__main__":
    main()
