"""What the commands' options have in common."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable
from typing import Any


def add_command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], help: str, description: str, epilog: str | None = None
) -> argparse.ArgumentParser:
    """A command whose ``run`` returns the process's exit code; its texts are shown as they are written."""
    plain = argparse.RawDescriptionHelpFormatter
    parser = commands.add_parser(name, help=help, description=description, epilog=epilog, formatter_class=plain)
    parser.set_defaults(run=run)
    return parser


def refuse(command: str, reason: str) -> int:
    """Says why a command cannot run; its exit code."""
    print(f"zerosum {command}: {reason}", file=sys.stderr)
    return 2


def missing(*names: str) -> str:
    """Which of these packages are not installed, and how to get them; empty where all are."""
    absent = [name for name in names if importlib.util.find_spec(name) is None]
    return f"needs {' and '.join(absent)}: pip install 'zsl_kernels[demo]'" if absent else ""


def whole(least: int, most: int = 2**63 - 1) -> Callable[[str], int]:
    expected = f"a whole number >= {least}" if most == 2**63 - 1 else f"a whole number from {least} to {most}, the processors here"

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
        return value

    return parse


def width(text: str) -> int:
    value = whole(1)(text)
    if value % 32:
        raise argparse.ArgumentTypeError(f"expected a multiple of 32, got {text!r}")
    return value


def positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number > 0, got {text!r}")
    return value
