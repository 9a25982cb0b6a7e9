"""TRL's SFTTrainer on packed batches: each document is an example, and the fused head is covered."""

import inspect
import statistics
import tempfile

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from zerosum.integrations.transformers import ZeroSumCallback

LONGEST = 64


def main() -> None:
    torch.manual_seed(0)
    ids = dict(vocab_size=256, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    model = LlamaForCausalLM(LlamaConfig(**ids, **sizes, max_position_embeddings=LONGEST))
    lines = [line for line in inspect.getsource(statistics).encode().splitlines() if len(line) > 20]
    data = Dataset.from_list([{"input_ids": list(line[:LONGEST])} for line in lines[:120]])  # a byte is a token
    words = Tokenizer(models.WordLevel({chr(i): i for i in range(256)}, unk_token=chr(3)))  # it is only asked for its padding
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token=chr(0), eos_token=chr(2), unk_token=chr(3))
    callback = ZeroSumCallback(every=2)
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            folder,
            packing=True,
            max_length=LONGEST,
            per_device_train_batch_size=4,
            max_steps=4,
            learning_rate=3e-3,
            gradient_checkpointing=False,
            bf16=False,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        SFTTrainer(model, arguments, train_dataset=data, processing_class=tokenizer, callbacks=[callback]).train()
    print(callback.report)


if __name__ == "__main__":
    main()
