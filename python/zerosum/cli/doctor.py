"""``zerosum doctor``: reports what works on this machine."""

from __future__ import annotations

import argparse
import importlib.util
from typing import Any

import torch

import zsl_kernels as zk
from zerosum.cli.arguments import add_command, device


def add(commands: Any) -> None:
    parser = add_command(commands, "doctor", run, "say what works on this machine", "Says what is live and checks it.")
    parser.add_argument("--device", type=device, metavar="NAME", help="check what runs on this device alone: cpu, cuda, cuda:1")


def run(options: argparse.Namespace) -> int:
    info = zk.build_info()
    print(f"zsl_kernels {zk.__version__}, torch {info['torch']}, {info['threads']} threads\n")
    isas = ", ".join(map(str, info["cpu_isas"]))  # type: ignore[call-overload]
    live = {"cpu": f"live with {info['cpu_isa']} (built for: {isas})", "chunked": "live (plain PyTorch, any device)"}
    for impl in ("cpu", "triton", "cuda"):
        print(f"  {impl:<10} {live.get(impl, 'live') if info[impl] == 'live' else f'not live: {info[impl]}'}")
    print(f"  {'chunked':<10} {live['chunked']}")
    for name, command in (("matplotlib", "demo"), ("tqdm", "demo"), ("scipy", "fit")):
        found = importlib.util.find_spec(name) is not None
        print(f"  {name:<10} {'live' if found else f'not live: `zerosum {command}` needs it, pip install zsl_kernels[demo]'}")
    # A missing extension is a choice; an extension that does not load is a fault.
    broken = info["cpu"] != "live" and not str(info["cpu"]).startswith("it was not built")
    print("\nChecked against the reference:")
    wrong = [impl for impl, there in _places(options.device) if info.get(impl, "live") == "live" and not _check(impl, there)]
    if broken or wrong:
        print(f"\nNot well: {', '.join([*wrong, *(['cpu does not load'] if broken else [])])}.")
        return 1
    print("\nAll is well." if info["cpu"] == "live" else "\nAll is well, but slow: the kernels are not built, see cpu above.")
    return 0


def _places(device: torch.device | None) -> list[tuple[str, str]]:
    """Return the implementations that run on the device (or on any device), and where to check each."""
    if device is None:
        return [("chunked", "cpu"), ("cpu", "cpu"), ("triton", "cuda"), ("cuda", "cuda")]
    own = {"cpu": ["cpu"], "cuda": ["triton", "cuda"]}.get(device.type, [])
    return [(impl, str(device)) for impl in ("chunked", *own)]


def _check(impl: str, device: str) -> bool:
    """Compare one call, with every result and odd sizes, with the reference in float64."""
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
