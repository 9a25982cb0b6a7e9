"""LoRA with transformers.Trainer: the adapters' gradients are measured, the frozen weights have none."""

import inspect
import statistics
import tempfile

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from zerosum.integrations.transformers import ZeroSumCallback

LENGTH = 32


def main() -> None:
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    base = LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes, max_position_embeddings=LENGTH))
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], use_dora=True))
    text = inspect.getsource(statistics).encode()  # a byte is a token
    pieces = [list(text[i : i + LENGTH]) for i in range(0, 64 * LENGTH, LENGTH)]
    data = [{"input_ids": piece, "labels": piece} for piece in pieces]
    callback = ZeroSumCallback(every=4)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=8,
            max_steps=8,
            learning_rate=1e-2,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        Trainer(model, arguments, train_dataset=data, callbacks=[callback]).train()
    report = callback.report
    for kind in ("lora_A", "lora_B", "magnitude"):
        found = [report[name].metrics["D_grad"].value for name in report if kind in name]
        print(f"{kind}: mean D_grad of {len(found)} weights {sum(found) / len(found):.3f}")
    print(report)


if __name__ == "__main__":
    main()
