"""``zerosum demo``: trains a small GPT and measures it."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch

from zerosum.cli.arguments import add_autocast, add_command, add_device, chosen, missing, positive, refuse, whole, width
from zerosum.training.optimizers import OPTIMIZERS

DESCRIPTION = """\
Trains a small GPT and measures zero-sum learning at log-spaced steps, in about 3 minutes
on 2 cores. Nothing is downloaded: the text is the Python standard library's own sources,
or yours. The run's folder gets a report, plots and every number. With --sizes 3, three widths
learn from the same batches, and their decelerations and interference are compared. With
--seeds 3, each model trains three times, from other weights and on other batches: tables
have the mean ± its standard error, and figures a band of that width. A GPU is used where
there is one.

The optimizers are torch's own:
{optimizers}
One learning rate serves both parts of muon: Muon scales its updates to the size of AdamW's.
Every gradient is clipped to the norm 1.

Ctrl-C leaves a readable folder; the same command goes on from there. The same options
give the same numbers on the same machine.
""".format(optimizers="\n".join(f"  {name:<10} {part}" for name, recipe in OPTIMIZERS.items() for part in recipe.parts))

EXAMPLES = """\
examples:
  zerosum demo
  zerosum demo --steps 200 --out runs/short
  zerosum demo --sizes 3 --layers 3
  zerosum demo --seeds 3 --optimizer muon --learning-rate 1e-2
  zerosum demo --width 768 --layers 12 --device cuda
  zerosum demo --text war-and-peace.txt --seed 1
"""


def add(commands: Any) -> None:
    rates = ", ".join(f"{name} {recipe.rate:g}" for name, recipe in OPTIMIZERS.items())
    parser = add_command(commands, "demo", run, "train a small GPT and measure it", DESCRIPTION, EXAMPLES)
    add = parser.add_argument
    add("--text", nargs="+", type=Path, default=[], metavar="FILE", help="text to learn (the standard library's sources)")
    add("--out", type=Path, metavar="DIR", help="folder of the run (runs/demo-NAME, named after the options)")
    add("--sizes", type=whole(1), default=1, metavar="N", help="models to train and compare: --width, half of it, … (%(default)s)")
    add(
        "--seeds",
        type=whole(1),
        default=1,
        metavar="N",
        help="seeds to train each model with: --seed, the next, … (%(default)s)",
    )
    add("--steps", type=whole(1), default=1000, metavar="N", help="optimizer steps (%(default)s)")
    add("--seed", type=whole(0), default=0, metavar="N", help="fixes the weights and the batches (%(default)s)")
    add_device(add, "train")
    add_autocast(add, "train")
    add("--threads", type=whole(1, os.cpu_count() or 1), metavar="N", help="processor threads (torch's choice)")
    add("--sequences", type=whole(2), default=32, metavar="N", help="sequences in a batch: the examples of D_grad (%(default)s)")
    add("--positions", type=whole(2), default=128, metavar="N", help="bytes in a sequence (%(default)s)")
    add("--width", type=width, default=128, metavar="N", help="width of the model, a multiple of 32 (%(default)s)")
    add("--layers", type=whole(1), default=4, metavar="N", help="layers of the model (%(default)s)")
    add("--optimizer", choices=OPTIMIZERS, default="adamw", help="torch's own, as listed above (%(default)s)")
    add("--learning-rate", type=positive, metavar="X", help=f"after a warm-up of 20 steps ({rates})")
    add("--keep-checkpoints", action="store_true", help="keep the checkpoint of every measured step, for `zerosum measure`")


def run(options: argparse.Namespace) -> int:
    if absent := missing("matplotlib", "tqdm", *(["scipy"] if options.sizes * options.seeds > 1 else [])):
        return refuse("demo", absent)
    # Imported here, because `zerosum doctor` must work without them.
    from zerosum.training.demo import demo
    from zerosum.training.loop import Settings

    if options.threads:
        torch.set_num_threads(options.threads)
    names = ("steps", "seed", "width", "layers", "sequences", "positions", "autocast", "optimizer")
    rate = options.learning_rate or OPTIMIZERS[options.optimizer].rate
    settings = Settings(**{name: getattr(options, name) for name in names}, learning_rate=rate)
    device = chosen(options.device)
    return demo(settings, options.text, options.out, options.sizes, options.keep_checkpoints, device, options.seeds)
