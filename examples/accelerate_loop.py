"""A loop with Hugging Face Accelerate: accumulation, `accelerator.backward`, clipping. `# +` marks what the probe adds."""

import inspect
import statistics

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset

import zerosum  # +
from zerosum.training.model import GPT, GPTConfig

LENGTH, ACCUMULATED = 32, 2


def main() -> None:
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATED)
    model = GPT(GPTConfig(vocab=256, width=32, layers=2, heads=4, positions=LENGTH))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    text = torch.tensor(list(inspect.getsource(statistics).encode()[: 65 * LENGTH])).unfold(0, LENGTH + 1, LENGTH)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(TensorDataset(text), batch_size=4))
    probe = zerosum.Probe(accelerator.unwrap_model(model))  # +
    for number, (batch,) in enumerate(loader):
        with accelerator.accumulate(model):
            if number % ACCUMULATED == 0:  # +
                probe.__enter__()  # the block goes over all micro-batches of a step  # +
            loss = F.cross_entropy(model(batch[:, :-1]).mT, batch[:, 1:])
            accelerator.backward(loss)  # divides by the number that is accumulated: the report does not depend on it
            if accelerator.sync_gradients:
                probe.__exit__(None)  # before the gradients are clipped  # +
                d = probe.report().metrics["D_grad"]  # +
                print(f"{probe.report().num_examples} examples: D_grad {d.value:.3f}, with random signs {d.null:.3f}")  # +
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    print(probe.report())  # +


if __name__ == "__main__":
    main()
