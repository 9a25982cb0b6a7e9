"""``zerosum bench``: measures what the statistics cost on this machine, compared with other ways to compute them."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from zerosum.cli.arguments import add_command, add_device, chosen, missing, refuse, whole, width
from zerosum.interrupt import Interrupt

if TYPE_CHECKING:
    from zerosum.bench.cases import Case

DESCRIPTION = """\
Measures what statistics of per-example gradients cost on this machine, in about 2 minutes:
time, peak memory, and accuracy against float64.

  one weight       zk.interference and zk.gram against torch's weight gradient dW, and
                   against gradients that are all held
  training step    a probed step of a small GPT against the plain one, and against
                   vmap(grad), a loop over the examples, and Opacus, TorchJD and BackPACK
                   where they are installed (pip install 'zsl_kernels[peers]')

Each way computes what it can of the same statistics; the table says what that is. Ways and
their baselines run in turns, and a ratio is the median over the rounds. Ctrl-C prints what
was measured so far.
"""

EXAMPLES = """\
examples:
  zerosum bench
  zerosum bench --quick
  zerosum bench --sizes 8x256 32x128 --json bench.json --figure bench.png
  zerosum bench --device cuda --sizes 8x1024 --dtype bfloat16

exit code: 0 measured, even if a way failed, which the table says; 2 refused; 130 interrupted.
"""


class Batch(NamedTuple):
    """N sequences of T tokens."""

    N: int
    T: int


class Defaults(NamedTuple):
    sizes: tuple[Batch, ...]
    width: int
    layers: int
    vocab: int
    dtypes: tuple[str, ...]
    seconds: float


CPU = Defaults((Batch(8, 256),), 256, 4, 4096, ("float32",), 30)
CUDA = Defaults((Batch(8, 1024),), 768, 12, 50304, ("bfloat16", "float32"), 30)
QUICK = Defaults((Batch(8, 64),), 256, 2, 1024, ("float32",), 3)


def add(commands: Any) -> None:
    parser = add_command(commands, "bench", run, "measure cost and accuracy against other ways", DESCRIPTION, EXAMPLES)
    add = parser.add_argument
    add("--sizes", nargs="+", type=batch, metavar="NxT", help="batches of N sequences of T tokens (8x256; on a GPU 8x1024)")
    add("--quick", action="store_true", help="one small batch and GPT, fewer rounds: half a minute, less exact")
    add_device(add, "measure")
    add("--dtype", nargs="+", choices=("float32", "bfloat16"), metavar="NAME", help="float32, or bfloat16, in steps by autocast")
    add("--threads", type=whole(1, os.cpu_count() or 1), metavar="N", help="processor threads (torch's choice)")
    add("--width", type=width, metavar="N", help="width of the GPT, a multiple of 32 (256; on a GPU 768)")
    add("--layers", type=whole(1), metavar="N", help="layers of the GPT (4; on a GPU 12)")
    add("--vocab", type=whole(2), metavar="N", help="vocabulary of the GPT (4096; on a GPU 50304)")
    add("--json", type=Path, metavar="FILE", help="write every number here")
    add("--markdown", type=Path, metavar="FILE", help="write the tables here")
    add("--figure", type=Path, metavar="FILE", help="draw them here: a .png or .svg file (needs matplotlib)")


def batch(text: str) -> Batch:
    found = re.fullmatch(r"(\d+)[x×](\d+)", text)
    if not found or int(found[1]) < 2 or int(found[2]) < 1:
        raise argparse.ArgumentTypeError(f"expected NxT, such as 8x256, with N >= 2 and T >= 1, got {text!r}")
    return Batch(int(found[1]), int(found[2]))


def run(options: argparse.Namespace) -> int:
    from zerosum.bench.machine import busy
    from zerosum.bench.run import measure, measurements
    from zerosum.files import replace_text
    from zerosum.records import finite

    if options.figure and options.figure.suffix not in (".png", ".svg"):
        return refuse("bench", f"--figure: expected a .png or .svg file, got {options.figure}")
    for name in ("json", "markdown", "figure"):
        if (path := getattr(options, name)) and (reason := _unwritable(path)):
            return refuse("bench", f"--{name}: cannot write {path}: {reason}")
    if absent := missing("tqdm", *(["matplotlib"] if options.figure else [])):
        print(f"zerosum bench: the progress bar and --figure: {absent}", file=sys.stderr)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = chosen(options.device)
    defaults = QUICK if options.quick else CPU if device.type == "cpu" else CUDA
    cases = _cases(options, defaults)
    with _progress(measurements(cases)) as progress, Interrupt() as interrupt:
        result = measure(cases, device, defaults.seconds, progress, lambda: interrupt.asked)
    print(result.text())
    if busy(result.machine):
        print("\nThe machine did other work at the start. Measure again when it is quiet, or set OMP_WAIT_POLICY=passive.")
    if not result.complete:
        print("\nStopped: this is what was measured so far. No file was written.")
        return 130
    if options.json:
        replace_text(options.json, json.dumps(finite(result.as_json()), indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    if options.markdown:
        replace_text(options.markdown, result.markdown())
    if options.figure and not missing("matplotlib"):
        from zerosum.bench import picture

        picture.write(result, options.figure)
    return 0


def _cases(options: argparse.Namespace, defaults: Defaults) -> list[Case[Any]]:
    """Return a case for a weight with four outputs for each input, and one for a step, for each batch and precision."""
    from zerosum.bench.cases import OpCase, StepCase
    from zerosum.training.model import GPTConfig

    wide, layers, vocab = (getattr(options, name) or getattr(defaults, name) for name in ("width", "layers", "vocab"))
    heads = wide // (64 if wide % 64 == 0 else 32)
    cases: list[Case[Any]] = []
    for dtype in dict.fromkeys(options.dtype or defaults.dtypes):
        for N, T in dict.fromkeys(options.sizes or defaults.sizes):
            cases += [OpCase(N, T, 4 * wide, wide, dtype), StepCase(GPTConfig(vocab, wide, layers, heads, T), N, dtype)]
    return cases


def _unwritable(path: Path) -> str:
    """Say why a file cannot be written, so that the command fails early; empty if it can be written."""
    if path.is_dir():
        return "it is a directory"
    new = path.with_name(f"{path.name}.new")
    try:
        new.touch()
        new.unlink()
    except OSError as error:
        return error.strerror or str(error)
    return ""


@contextmanager
def _progress(total: int) -> Iterator[Callable[[str], None]]:
    """Show a progress bar if tqdm is installed and there is a terminal. The yielded function tells it what comes next."""
    if missing("tqdm"):
        yield lambda what: None
        return
    from tqdm import tqdm

    with tqdm(total=total, unit="measurement", disable=None, dynamic_ncols=True) as bar:
        begun = False

        def progress(what: str) -> None:
            nonlocal begun
            bar.update(begun)
            bar.set_description(what)
            begun = True

        yield progress
        bar.update(begun)
