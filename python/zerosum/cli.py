"""The command line: ``zerosum demo`` and ``zerosum doctor``."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

import zsl_kernels as zk

DESCRIPTION = """\
Zero-sum learning, measured while a model trains: how far examples' gradients, and the
changes of their losses, cancel.

  zerosum doctor    says what works on this machine, and what to do about what does not
  zerosum demo      trains a small GPT on text that is here already, and measures it
"""

DEMO = """\
Trains a small GPT and measures zero-sum learning at log-spaced steps, in about 3 minutes
on 2 cores. Nothing is downloaded: the text is the Python standard library's own sources,
or yours. The run's folder gets a report, plots and every number.

Ctrl-C leaves a readable folder; the same command goes on from there. The same options
give the same numbers on the same machine.
"""

DEMO_EXAMPLES = """\
examples:
  zerosum demo
  zerosum demo --steps 200 --out runs/short
  zerosum demo --text war-and-peace.txt --seed 1
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns the process's exit code: 0 done, 1 failed, 2 refused, 130 interrupted."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="zerosum", description=DESCRIPTION, formatter_class=plain)
    parser.add_argument("--version", action="version", version=f"zsl_kernels {zk.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", title="commands")

    demo = commands.add_parser(
        "demo", help="train a small GPT and measure it", description=DEMO, epilog=DEMO_EXAMPLES, formatter_class=plain
    )
    demo.set_defaults(run=run_demo)
    add = demo.add_argument
    add("--text", nargs="+", type=Path, default=[], metavar="FILE", help="text to learn (the standard library's sources)")
    add("--out", type=Path, metavar="DIR", help="folder of the run (runs/demo-NAME, named after the options)")
    add("--steps", type=_whole(1), default=1000, metavar="N", help="optimizer steps (%(default)s)")
    add("--seed", type=_whole(0), default=0, metavar="N", help="fixes the weights and the batches (%(default)s)")
    add("--threads", type=_whole(1, os.cpu_count() or 1), metavar="N", help="processor threads (torch's choice)")
    add("--sequences", type=_whole(2), default=32, metavar="N", help="sequences in a batch: the examples of D_grad (%(default)s)")
    add("--positions", type=_whole(2), default=128, metavar="N", help="bytes in a sequence (%(default)s)")
    add("--width", type=_width, default=128, metavar="N", help="width of the model, a multiple of 32 (%(default)s)")
    add("--layers", type=_whole(1), default=4, metavar="N", help="layers of the model (%(default)s)")
    add("--learning-rate", type=_positive, default=3e-3, metavar="X", help="after a warm-up of 20 steps (%(default)s)")

    doctor = commands.add_parser("doctor", help="say what works on this machine", description="Says what is live and checks it.")
    doctor.set_defaults(run=run_doctor)
    return parser


def _whole(least: int, most: int = 2**63 - 1) -> Callable[[str], int]:
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


def _width(text: str) -> int:
    value = _whole(1)(text)
    if value % 32:
        raise argparse.ArgumentTypeError(f"expected a multiple of 32, got {text!r}")
    return value


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number > 0, got {text!r}")
    return value


def run_demo(options: argparse.Namespace) -> int:
    missing = [name for name in ("matplotlib", "tqdm") if importlib.util.find_spec(name) is None]
    if missing:
        return _refuse("demo", f"needs {' and '.join(missing)}: pip install 'zsl_kernels[demo]'")
    # Here, not above: `zerosum doctor` must work without them.
    from zerosum.training.demo import demo
    from zerosum.training.loop import Settings
    from zerosum.training.run import Refused

    if options.threads:
        torch.set_num_threads(options.threads)
    names = ("steps", "seed", "width", "layers", "sequences", "positions", "learning_rate")
    try:
        return demo(Settings(**{name: getattr(options, name) for name in names}), options.text, options.out)
    except Refused as refusal:
        return _refuse("demo", str(refusal))
    except OSError as error:  # a disk that fills up on the way
        print(f"zerosum demo: {error}", file=sys.stderr)
        return 1


def _refuse(command: str, reason: str) -> int:
    print(f"zerosum {command}: {reason}", file=sys.stderr)
    return 2


def run_doctor(options: argparse.Namespace) -> int:
    info = zk.build_info()
    print(f"zsl_kernels {zk.__version__}, torch {info['torch']}, {info['threads']} threads\n")
    isas = ", ".join(map(str, info["cpu_isas"]))  # type: ignore[call-overload]
    live = {"cpu": f"live with {info['cpu_isa']} (built for: {isas})", "chunked": "live (plain PyTorch, any device)"}
    for impl in ("cpu", "triton", "cuda"):
        print(f"  {impl:<10} {live.get(impl, 'live') if info[impl] == 'live' else f'not live: {info[impl]}'}")
    print(f"  {'chunked':<10} {live['chunked']}")
    for name in ("matplotlib", "tqdm"):
        found = importlib.util.find_spec(name) is not None
        print(f"  {name:<10} {'live' if found else 'not live: `zerosum demo` needs it, pip install zsl_kernels[demo]'}")
    # Not built is a choice; built and not loading is a fault.
    broken = info["cpu"] != "live" and not str(info["cpu"]).startswith("it was not built")
    print("\nChecked against the reference:")
    devices = {"chunked": "cpu", "cpu": "cpu", "triton": "cuda", "cuda": "cuda"}
    wrong = [impl for impl, device in devices.items() if info.get(impl, "live") == "live" and not _check(impl, device)]
    if broken or wrong:
        print(f"\nNot well: {', '.join([*wrong, *(['cpu does not load'] if broken else [])])}.")
        return 1
    print("\nAll is well." if info["cpu"] == "live" else "\nAll is well, but slow: the kernels are not built, see cpu above.")
    return 0


def _check(impl: str, device: str) -> bool:
    """One call with every result, on odd sizes, against the specification in float64."""
    generator = torch.Generator().manual_seed(0)
    a, b, u = (torch.randn(*shape, generator=generator) for shape in ((5, 33, 70), (5, 33, 45), (45, 70)))
    truth = zk.interference(a.double(), b.double(), direction=u.double(), gram=True, impl="reference")
    try:
        found = zk.interference(a.to(device), b.to(device), direction=u.to(device), gram=True, impl=impl)
    except RuntimeError as error:
        print(f"  {impl:<10} failed: {error}")
        return False
    errors = {name: float((getattr(found, name).cpu() - x).norm() / x.norm()) for name, x in truth._asdict().items()}
    worst = max(errors, key=lambda name: errors[name])
    good = errors[worst] < 1e-5
    print(f"  {impl:<10} {'ok' if good else 'WRONG'}, largest relative error {errors[worst]:.1e} ({worst})")
    return good
