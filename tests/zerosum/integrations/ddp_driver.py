"""One of two ranks of a Trainer under DistributedDataParallel: writes what it logged as JSON.

RANK, WORLD_SIZE and the like are in the environment, as torchrun sets them. python -m tests.zerosum.integrations.ddp_driver FOLDER
"""

import json
import sys
import warnings
from pathlib import Path

import torch

from tests.zerosum.integrations.test_transformers import Recording, logged, trained, without_key_bias
from tests.zerosum.integrations.tiny import gpt2
from zerosum.integrations.transformers import ZeroSumCallback


def main() -> None:
    folder = Path(sys.argv[1])
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    callback = ZeroSumCallback(every=100, out=folder / "run")
    trainer = trained(
        folder, without_key_bias(gpt2()), callback, trainer=Recording, ddp_backend="gloo", max_grad_norm=0.01, max_steps=1
    )
    keys = {key for entry in trainer.state.log_history for key in entry if key.startswith("zerosum/")}
    found = {key: logged(trainer, key)[1] for key in keys}
    (folder / f"rank-{trainer.args.process_index}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
