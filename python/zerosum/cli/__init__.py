"""The command line. Each module here is one command: ``add`` defines its options, and ``run`` executes it."""

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
    """Run one command and return the process's exit code: 0 done, 1 failed, 2 refused, 130 interrupted.

    Args:
        arguments: the command and its options. None means those of the process, which should then end after this call.
    """
    with handling(signal.SIGTERM, signal.SIG_DFL, terminate), shielded():
        try:
            # Until torch is imported, Ctrl-C ends the process at once: an exception would end it in the middle of a library's
            # import.
            with handling(signal.SIGINT, signal.default_int_handler, leave):
                parser = _parser()
            try:
                return _run(parser, arguments)
            finally:
                if sys.stdout is not None:
                    sys.stdout.flush()
        except KeyboardInterrupt:
            if arguments is None:  # a second Ctrl-C finds the process already ending
                signal.signal(signal.SIGINT, leave)
            print("\nInterrupted.", file=sys.stderr)
            return 130
        except BrokenPipeError:  # the reader has closed the pipe, as `| head` does
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
    except OSError as error:  # for example, the disk filled up
        return failed(options.command, error)


def _forget_output() -> None:
    """Discard the rest of the output, which would cause an error message when Python ends."""
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
