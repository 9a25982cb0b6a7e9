"""Two ranks of Lightning's Trainer, of which Lightning starts the second: each writes its report and what it logged.

python -m tests.zerosum.integrations.lightning_driver ddp|fully_shard FOLDER
"""

import json
import sys
import warnings
from pathlib import Path

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.fsdp import fully_shard

from tests.zerosum.integrations.test_lightning import Module, trained
from zerosum.integrations.lightning import ZeroSumCallback


class Sharded(Module):
    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]
        for block in self.model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(self.model, mesh=mesh)

    def training_step(self, batch: list[Tensor], number: int) -> Tensor:
        return self.tokens(batch[0]).mean()


def main() -> None:
    how, folder = sys.argv[1], Path(sys.argv[2])
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    callback = ZeroSumCallback(out=folder / "run")
    module, strategy = (Module(), "ddp") if how == "ddp" else (Sharded(), ModelParallelStrategy(2, 1))
    trainer = trained(folder, module, callback, devices=2, strategy=strategy, gradient_clip_val=0.01, max_steps=1)
    metrics = {key: float(x) for key, x in trainer.callback_metrics.items()}
    (folder / f"rank-{trainer.global_rank}.json").write_text(json.dumps([callback.report.to_dict(), metrics]))


if __name__ == "__main__":
    main()
