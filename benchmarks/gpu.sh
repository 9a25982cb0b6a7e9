#!/usr/bin/env bash
# On a machine with a CUDA device: the parity suite on it, then the benchmarks, kept in benchmarks/results: gpu_kernels.md,
# gpu_steps.md, bench_cuda and gpu, .json and .md each.
# Meant to take some ten minutes on a recent device, with pytest-xdist. Needs a CUDA build of torch, and nvcc for the kernels in
# CUDA C++. Options go to the benchmarks.
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
if "$python" -c "import xdist" 2>/dev/null; then
  # pytest-benchmark warns that it does nothing there, and warnings are errors.
  workers=(-n auto --maxprocesses 16 -p no:benchmark)
else
  echo "pytest-xdist is not installed: the tests will take several times as long" >&2
fi
# The benchmarks are run whatever the tests find: the hour on a device may be the only one. A failure of either is the script's.
failed=0
"$python" -m pytest tests -m gpu "${workers[@]}" || failed=$?
"$python" -m benchmarks.gpu.kernels || failed=$?
"$python" -m benchmarks.gpu.steps || failed=$?
"$python" -m zerosum bench --device cuda --json benchmarks/results/bench_cuda.json --markdown benchmarks/results/bench_cuda.md || failed=$?
"$python" -m pytest benchmarks/gpu --device cuda --results gpu "$@" || failed=$?
exit "$failed"
