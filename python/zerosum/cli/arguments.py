"""Provides what the commands' options share."""

from __future__ import annotations

import argparse
import importlib.util
import re
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import torch

from zerosum.terminal import shown


class Parser(argparse.ArgumentParser):
    """A parser that reports invalid arguments on one line, whatever they contain."""

    def error(self, message: str) -> NoReturn:
        super().error(shown(message))


def add_command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], help: str, description: str, epilog: str | None = None
) -> argparse.ArgumentParser:
    """Add a command whose ``run`` returns the process's exit code. Its texts are shown as written."""
    plain = argparse.RawDescriptionHelpFormatter
    parser = commands.add_parser(name, help=help, description=description, epilog=epilog, formatter_class=plain)
    parser.set_defaults(run=run, command=name)
    return parser


def refuse(command: str, reason: str) -> int:
    """Print why a command cannot run; return its exit code."""
    print(f"zerosum {command}: {shown(reason)}", file=sys.stderr)
    return 2


def failed(command: str, error: OSError) -> int:
    """Print which file caused which error, for example on a full disk; return the exit code."""
    said = ": ".join(str(part) for part in (error.filename, error.strerror) if part)
    print(f"zerosum {command}: {shown(said or error)}", file=sys.stderr)
    return 1


def missing(*names: str) -> str:
    """Say which of these packages are not installed, and how to install them; empty if none are missing."""
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


def device(text: str) -> torch.device:
    """Parse a device that torch has on this machine."""
    try:
        found = torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"expected a device such as cpu, cuda or cuda:1, got {text!r}") from None
    if found.type != "meta":
        try:
            torch.empty(0, device=found)
            return found
        except (RuntimeError, AssertionError, NotImplementedError):
            pass
    raise argparse.ArgumentTypeError(f"expected a device that torch has here, got {text!r}")


def add_device(add: Callable[..., Any], what: str) -> None:
    add("--device", type=device, metavar="NAME", help=f"where to {what}: cpu, cuda, cuda:1 (a GPU, where there is one)")


def add_autocast(add: Callable[..., Any], what: str) -> None:
    add("--autocast", action="store_true", help=f"{what} with products in bfloat16; losses are measured in float32 all the same")


def chosen(device: torch.device | None) -> torch.device:
    """Return the device that was requested, or else a GPU, or else the CPU."""
    return device or torch.device("cuda" if torch.cuda.is_available() else "cpu")


def memory(text: str) -> int:
    """Parse a number of bytes, as in 2GB, 500MB or 1.5GiB."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", text.strip().lower())
    if found is None or not float(found[1]) or (found[3] and not found[2]):
        raise argparse.ArgumentTypeError(f"expected a size such as 2GB or 500MB, got {text!r}")
    return int(float(found[1]) * (1024 if found[3] else 1000) ** " kmgt".index(found[2] or " "))


def span(text: str) -> tuple[int, int]:
    """Parse A:B, both included; either may be omitted."""
    first, colon, last = text.partition(":")
    try:
        found = int(first or 0), int(last or 2**63 - 1)
    except ValueError:
        colon = ""
    if not colon or not 0 <= found[0] <= found[1]:
        raise argparse.ArgumentTypeError(f"expected A:B, steps from A to B, got {text!r}")
    return found
