"""lightning.Trainer with one more line, in bfloat16, with accumulation and clipping."""

import inspect
import statistics

import lightning
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from zerosum.integrations.lightning import ZeroSumCallback

LENGTH = 32


class Bytes(lightning.LightningModule):
    """A byte from the ones before it, by a small transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(256, 32)
        self.positions = torch.nn.Embedding(LENGTH, 32)
        layer = torch.nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True, norm_first=True)
        self.body = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = torch.nn.Linear(32, 256)

    def training_step(self, batch: list[torch.Tensor], number: int) -> torch.Tensor:
        x, y = batch[0][:, :-1], batch[0][:, 1:]
        mask = torch.nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        h = self.embedding(x) + self.positions.weight[: x.shape[1]]
        return F.cross_entropy(self.head(self.body(h, mask=mask, is_causal=True)).mT, y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def main() -> None:
    lightning.seed_everything(0)
    text = torch.tensor(list(inspect.getsource(statistics).encode()[: 64 * LENGTH])).view(-1, LENGTH)
    callback = ZeroSumCallback(every=2)
    trainer = lightning.Trainer(
        accelerator="cpu",
        precision="bf16-mixed",
        max_epochs=1,
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(Bytes(), DataLoader(TensorDataset(text), batch_size=8, shuffle=True))
    print(f"D_grad {trainer.callback_metrics['zerosum/D_grad']:.3f}")
    print(callback.report)


if __name__ == "__main__":
    main()
