"""Two ranks of Lightning's Trainer under DistributedDataParallel, of which Lightning starts the second: each writes its report.

python -m tests.zerosum.integrations.lightning_driver FOLDER
"""

import json
import sys
import warnings
from pathlib import Path

import torch

from tests.zerosum.integrations.test_lightning import Module, trained
from zerosum.integrations.lightning import ZeroSumCallback


def main() -> None:
    folder = Path(sys.argv[1])
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    callback = ZeroSumCallback(out=folder / "run")
    trainer = trained(folder, Module(), callback, devices=2, strategy="ddp", gradient_clip_val=0.01, max_steps=1)
    metrics = {key: float(x) for key, x in trainer.callback_metrics.items()}
    (folder / f"rank-{trainer.global_rank}.json").write_text(json.dumps([callback.report.to_dict(), metrics]))


if __name__ == "__main__":
    main()
