"""What a result was measured on and with. No host names and no paths: results are published."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import zsl_kernels as zk


def describe(device: str | None = None) -> dict[str, object]:
    """Machine, software, commit and date, as plain values; with ``device``, what that is."""
    build = zk.build_info()
    about = {"device": _device(device)} if device else {}
    return about | {
        "version": zk.__version__,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _commit(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": build["threads"],
        "isa": build["cpu_isa"],
        "isas": build["cpu_isas"],
        "torch": build["torch"],
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "load at start": round(os.getloadavg()[0], 2),
    }


def busy(machine: dict[str, Any]) -> bool:
    """Whether the machine did other work when it was described."""
    return machine["load at start"] > 0.5


def line(machine: dict[str, Any]) -> str:
    """The description in one line."""
    load = f"load at start {machine['load at start']}"
    if busy(machine):
        load += " (BUSY: threads wait for each other, and ratios mean little)"
    if "device" in machine:
        software = f"torch {machine['torch']}, commit {machine['commit']}"
        return f"{machine['device']}, {machine['cpu']}, {software}, {machine['date']}, {load}"
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, kernels for {machine['isa']}, "
        f"torch {machine['torch']}, commit {machine['commit']}, {machine['date']}, {load}"
    )


def _device(device: str) -> str:
    if device.split(":")[0] != "cuda":
        return f"{device} (whether the benchmarks run, not how fast)"
    about = torch.cuda.get_device_properties(device)
    return f"{about.name}, {about.multi_processor_count} SMs, {about.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else None
    family = re.search(r"^cpu family\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if found else None
    name = found[1].strip() if found else platform.processor() or platform.machine()
    return f"{name} (family {family[1].strip()})" if family else name


def _commit() -> str:
    """The commit's short id, with "+ changes" if tracked files other than the results differ from it; "unknown" for an installed
    package."""
    here = Path(__file__).parent

    def git(*args: str) -> str:
        return subprocess.run(("git", *args), cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # the folder may be in a repository of something else
        changes = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(exclude,top)benchmarks/results")
        return git("rev-parse", "--short=12", "HEAD") + (" + changes" if changes else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
