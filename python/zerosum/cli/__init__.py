"""The command line. Each module here is one command: its options in ``add``, what it does in ``run``."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from zerosum.interrupt import handling, leave, terminate
from zerosum.terminal import shielded

if TYPE_CHECKING:
    import argparse

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


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns the process's exit code: 0 done, 1 failed, 2 refused, 130 interrupted.

    Args:
        arguments: the command and its options; those of the process if None, which is then to end with this call.
    """
    with handling(signal.SIGTERM, signal.SIG_DFL, terminate), shielded():
        try:
            # Until torch is imported Ctrl-C leaves at once: as an exception it would end in the midst of a library's own import.
            with handling(signal.SIGINT, signal.default_int_handler, leave):
                parser = _parser()
            try:
                return _run(parser, arguments)
            finally:
                if sys.stdout is not None:
                    sys.stdout.flush()
        except KeyboardInterrupt:
            if arguments is None:  # a second Ctrl-C finds the process on its way out
                signal.signal(signal.SIGINT, leave)
            print("\nInterrupted.", file=sys.stderr)
            return 130
        except BrokenPipeError:  # whoever read the output has enough, as `| head`
            _forget_output()
            return 1
        except OSError as error:
            _forget_output()
            print(f"zerosum: cannot write the output: {error.strerror or error}", file=sys.stderr)
            return 1


def _run(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> int:
    from zerosum.cli.arguments import failed, refuse
    from zerosum.training.run import Refused

    options = parser.parse_args(arguments)
    try:
        return options.run(options)
    except BrokenPipeError:
        raise
    except Refused as refusal:
        return refuse(options.command, str(refusal))
    except OSError as error:  # a disk that fills up on the way
        return failed(options.command, error)


def _forget_output() -> None:
    """What is left of the output would complain when Python ends."""
    if sys.stdout is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser() -> argparse.ArgumentParser:
    import argparse

    import zsl_kernels as zk
    from zerosum.cli import bench, demo, doctor, fit, measure, plot
    from zerosum.cli.arguments import Parser

    parser = Parser(prog="zerosum", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"zsl_kernels {zk.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", title="commands")
    for command in (demo, measure, fit, plot, bench, doctor):
        command.add(commands)
    return parser
