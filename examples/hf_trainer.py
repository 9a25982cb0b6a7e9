"""Measures every 10th step of ``transformers.Trainer``: one argument, ``callbacks=[ZeroSumCallback(every=10)]``.

A small Llama with random weights learns this very file, byte by byte. With ``--records FILE``, ``zerosum plot FILE`` draws what was
measured. The numbers also reach TensorBoard and W&B, where the Trainer reports to them.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from zerosum.integrations.transformers import ZeroSumCallback

POSITIONS = 32

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--records", help="a file for zerosum plot")
records = parser.parse_args().records

torch.manual_seed(0)
text = torch.tensor(list(Path(__file__).read_bytes()))
rows = [{"input_ids": row, "labels": row} for row in text.unfold(0, POSITIONS, POSITIONS // 4)]
model = LlamaForCausalLM(
    LlamaConfig(vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
)

with tempfile.TemporaryDirectory() as folder:
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=folder,
            max_steps=30,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            learning_rate=3e-3,
            logging_steps=10,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=rows,
        callbacks=[ZeroSumCallback(every=10, gram=True, out=records)],
    )
    trainer.train()

for entry in trainer.state.log_history:
    if "zerosum/D_grad" in entry:
        print(f"step {entry['step']}: D_grad {entry['zerosum/D_grad']:.3f} (random signs: {entry['zerosum/D_grad_null']:.3f})")
