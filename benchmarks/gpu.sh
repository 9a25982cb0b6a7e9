#!/usr/bin/env bash
# On a machine with a CUDA device: the parity suite on it, then the benchmarks, kept as benchmarks/results/gpu.json and gpu.md.
# Under ten minutes on a recent device. Needs a CUDA build of torch, and nvcc for the kernels in CUDA C++. Options go to the benchmarks.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
"$python" - <<'PYTHON'
import sys
import zsl_kernels as zk

info = zk.build_info()
print({name: info[name] for name in ("torch", "triton", "cuda")})
dead = [f"{name}: {info[name]}" for name in ("triton", "cuda") if info[name] != "live"]
sys.exit("not live: " + "; ".join(dead) if dead else 0)
PYTHON
# The tests mostly wait for Triton's compiler: in several processes, where pytest-xdist is installed.
workers=()
if "$python" -c "import xdist" 2>/dev/null; then workers=(-n 8); fi
"$python" -m pytest tests -m gpu "${workers[@]}"
"$python" -m pytest benchmarks/gpu --device cuda --results gpu "$@"
