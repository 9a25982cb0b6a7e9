"""The command line. Each module here is one command: its options in ``add``, what it does in ``run``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import zsl_kernels as zk
from zerosum.cli import bench, demo, doctor, fit, measure, plot
from zerosum.cli.arguments import failed, refuse
from zerosum.training.run import Refused

DESCRIPTION = """\
Zero-sum learning, measured while a model trains: how far examples' gradients, and the
changes of their losses, cancel.

  zerosum doctor    says what works on this machine, and what to do about what does not
  zerosum demo      trains a small GPT on text that is here already, and measures it
  zerosum measure   measures checkpoints: of the demo, of transformers, or your own
  zerosum fit       finds where a loss curve decelerates, and says how sure that is
  zerosum plot      draws the figures of one run or several
  zerosum bench     measures what the statistics cost here, against other ways to them
"""

COMMANDS = (demo, measure, fit, plot, bench, doctor)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns the process's exit code: 0 done, 1 failed, 2 refused, 130 interrupted."""
    options = _parser().parse_args(arguments)
    try:
        ended = options.run(options)
        sys.stdout.flush()
        return ended
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read the output has enough, as `| head`; what is left would complain when Python ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Refused as refusal:
        return refuse(options.command, str(refusal))
    except OSError as error:  # a disk that fills up on the way
        return failed(options.command, error)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="zerosum", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"zsl_kernels {zk.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", title="commands")
    for command in COMMANDS:
        command.add(commands)
    return parser
