"""Times the kernels on a device, and writes benchmarks/results/gpu_kernels.md.

``python -m benchmarks.gpu.kernels``: some minutes. They are timed in CUDA graphs, so the host's time is not in
it. ``--device cpu --quick`` shows whether it runs.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

import zsl_kernels as zk
from benchmarks.cases import Case
from zerosum.bench.ops import weight_gradient
from zsl_kernels.ops import interference_backward
from zsl_kernels.types import Cotangents

RESULT = Path(__file__).parents[1] / "results" / "gpu_kernels.md"
# A block's matrices of several widths, few and many examples, a head, short examples.
CASES = [
    Case(8, 1024, 768, 768),
    Case(32, 1024, 768, 768),
    Case(8, 1024, 3072, 768),
    Case(8, 1024, 2048, 2048),
    Case(32, 1024, 2048, 2048),
    Case(8, 1024, 4096, 4096),
    Case(8, 1024, 50304, 768),
    Case(32, 256, 4096, 1024),
    Case(64, 128, 2048, 2048),
]
# N, T, K and V of embeddings: token ids, drawn as words are; a small table; narrow rows.
EMBEDDINGS = [(8, 1024, 768, 50304), (32, 256, 768, 50304), (32, 1024, 2048, 50304), (64, 1024, 768, 2), (32, 1024, 64, 4096)]


def microseconds(run: Callable[[], object], device: str) -> float:
    """In the median, without the host's time where the device has graphs."""
    if device.startswith("cuda"):
        from triton.testing import do_bench_cudagraph

        return 1e3 * do_bench_cudagraph(run, rep=25, return_mode="median")
    times = []
    for _ in range(3):
        begin = perf_counter()
        run()
        times.append(perf_counter() - begin)
    return 1e6 * statistics.median(times)


# Of the tables. The last ops have one result each; "weighted, signed" is the derivative of abs_dot along the direction.
HEAD = ["", "dW, µs", "sums", "with a direction", "with the Gram", "sq_norm", "dot", "weighted_grad", "weighted, signed", "ways"]


def kernels(case: Case, dtype: torch.dtype, device: str) -> list[str]:
    """A line of the table: the plain product in microseconds, and the others as ratios to it."""
    a, b = (torch.randn(case.N, case.T, size, device=device).to(dtype) for size in (case.K, case.O))
    u = torch.randn(case.O, case.K, device=device)
    w, v = torch.randn(2, case.N, device=device)
    before = microseconds(lambda: weight_gradient(a, b), device)
    found = [
        microseconds(lambda: zk.interference(a, b), device),
        microseconds(lambda: zk.interference(a, b, direction=u), device),
        microseconds(lambda: zk.interference(a, b, gram=True), device),
        microseconds(lambda: zk.sq_norm(a, b), device),
        microseconds(lambda: zk.dot(a, b, u), device),
        microseconds(lambda: zk.weighted_grad(a, b, w), device),
        microseconds(lambda: torch.ops.zsl.weighted_grad(a, b, w, v, u, "auto"), device),
    ]
    plain = (before + microseconds(lambda: weight_gradient(a, b), device)) / 2
    ops = ("interference", "sq_norm", "dot", "weighted_grad")
    ways = [zk.plan(op, N=case.N, T=case.T, K=case.K, O=case.O, dtype=dtype, device=device).way for op in ops]
    return [str(case), f"{plain:.0f}", *(f"{time / plain:.2f}" for time in found), ", ".join(dict.fromkeys(ways))]


def derivatives(case: Case, dtype: torch.dtype, device: str) -> list[str]:
    """A line of the table: the three products that a derivative with respect to a and b needs, in microseconds, and the derivatives
    of Σ|g|, of the squared norms and of the Gram as ratios to them."""
    a, b = (torch.randn(case.N, case.T, size, device=device).to(dtype) for size in (case.K, case.O))
    weight = torch.randn(case.O, case.K, device=device).to(dtype)
    c_abs, c_norm = torch.randn(case.O, case.K, device=device), torch.randn(case.N, device=device)
    mix = torch.randn(case.N, case.N, device=device)

    def products() -> object:
        return weight_gradient(a, b), b @ weight, a @ weight.T

    def run(c: Cotangents, mix: Tensor | None = None) -> float:
        arguments = (a, b, None, *c, mix, a, b, True, True, False, "auto", None, 0, None, None, None)
        return microseconds(lambda: interference_backward.op(*arguments), device)

    before = microseconds(products, device)
    found = [run(Cotangents(abs_sum=c_abs)), run(Cotangents(sq_norm=c_norm)), run(Cotangents(), mix)]
    plain = (before + microseconds(products, device)) / 2
    return [f"{case}, {_short(dtype)}", f"{plain:.0f}", *(f"{time / plain:.2f}" for time in found)]


def allowing_tf32(case: Case, device: str) -> list[str]:
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        return kernels(case, torch.float32, device)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def coordinate_sums(rows: int, cols: int, device: str) -> list[str]:
    sums = [torch.randn(rows, cols, device=device).abs() for _ in range(3)]
    time = microseconds(lambda: zk.coordinate_sums_of_many(*([x] for x in sums)), device)
    copied = microseconds(lambda: sums[0] + sums[1], device)  # three matrices are moved here too
    return [f"{rows} × {cols}", f"{time:.0f}", f"{time / copied:.2f}"]


def dense(N: int, P: int, dtype: torch.dtype, device: str) -> list[str]:
    """A line of the table: PyTorch's sum of the gradients, which reads them once, in microseconds, and others as ratios to it."""
    g, u = torch.randn(N, P, device=device).to(dtype), torch.randn(P, device=device)
    return _to_a_read(
        f"N={N} P={P} {_short(dtype)}",
        lambda: g.sum(),
        [
            lambda: zk.dense_interference(g),
            lambda: zk.dense_interference(g, direction=u),
            lambda: zk.dense_interference(g, direction=u, gram=True),
            lambda: zk.dense_interference(g, direction=u, gram=True, impl="chunked"),
        ],
        device,
    )


def scale_bias(N: int, T: int, K: int, dtype: torch.dtype, device: str) -> list[str]:
    """The same of a norm's scale and bias, of which x and b are read."""
    x, b = (torch.randn(N, T, K, device=device).to(dtype) for _ in range(2))
    mean, rstd = (torch.randn(N, T, device=device) for _ in range(2))
    return _to_a_read(
        f"N={N} T={T} K={K} {_short(dtype)}",
        lambda: (x.sum(), b.sum()),
        [
            lambda: zk.scale_bias_grad(x, b, mean=mean, rstd=rstd),
            lambda: zk.scale_grad(x, b, rstd=rstd),
            lambda: zk.bias_grad(b),
            lambda: zk.scale_bias_grad(x, b, mean=mean, rstd=rstd, impl="chunked"),
        ],
        device,
    )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _to_a_read(label: str, read: Callable[[], object], runs: list[Callable[[], object]], device: str) -> list[str]:
    before = microseconds(read, device)
    found = [microseconds(run, device) for run in runs]
    plain = (before + microseconds(read, device)) / 2
    return [label, f"{plain:.1f}", *(f"{time / plain:.2f}" for time in found)]


def embedding(sizes: tuple[int, int, int, int], dtype: torch.dtype, device: str) -> list[str]:
    """Reading b once in microseconds, and the op as ratios to it. With max_rows, for a graph cannot wait for a device."""
    N, T, K, V = sizes
    generator = torch.Generator().manual_seed(0)
    ids = torch.multinomial(1 / (torch.arange(V) + 2.7), N * T, replacement=True, generator=generator).view(N, T).to(device)
    b, u = torch.randn(N, T, K, device=device).to(dtype), torch.randn(V, K, device=device)
    same = torch.zeros_like(ids)

    def run(ids: Tensor, **options: Any) -> object:
        return zk.embedding_interference(ids, b, V, max_rows=min(V, N * T), **options)

    runs = [lambda: run(ids), lambda: run(ids, direction=u), lambda: run(ids, gram=True), lambda: run(same)]
    return _to_a_read(f"N={N} T={T} K={K} V={V} {_short(dtype)}", lambda: b.sum(dtype=torch.float32), runs, device)


def table(head: list[str], rows: list[list[str]]) -> str:
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="one small case of each; writes nothing")
    options = parser.parse_args()
    device = options.device
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else "the CPU"
    cases = [Case(2, 16, 24, 32)] if options.quick else CASES
    title = f"# Kernels on {name}"
    parts = [f"{title}\n\n`python -m benchmarks.gpu.kernels`, torch {torch.__version__}. Ratios are to the plain product dW."]
    for title, rows in (
        ("bfloat16", [kernels(case, torch.bfloat16, device) for case in cases]),
        ("float32", [kernels(case, torch.float32, device) for case in cases]),
        ("float32, tf32 allowed for both", [allowing_tf32(case, device) for case in cases]),
    ):
        parts.append(f"## {title}\n\n{table(HEAD, rows)}")
    some = cases if options.quick else [CASES[0], CASES[2], CASES[7], CASES[8]]
    rows = [derivatives(case, dtype, device) for case in some for dtype in (torch.bfloat16, torch.float32)]
    head = ["", "three products, µs", "of abs_sum", "of sq_norm", "of the Gram"]
    parts.append(f"## Derivatives with respect to a and b\n\nRatios are to dW, b W and a Wᵀ.\n\n{table(head, rows)}")
    sizes = [(8, 8)] if options.quick else [(768, 768), (4096, 4096), (50304, 768)]
    rows = [coordinate_sums(*size, device) for size in sizes]
    parts.append(f"## coordinate_sums\n\n{table(['matrix', 'µs', 'to an addition of two'], rows)}")
    held = [(2, 24)] if options.quick else [(8, 768), (32, 768), (32, 50304), (8, 4096 * 4096), (200, 768 * 768)]
    rows = [dense(*size, dtype, device) for size in held for dtype in (torch.bfloat16, torch.float32)]
    head = ["gradients", "their sum, µs", "sums", "with a direction", "and the Gram", "by PyTorch"]
    parts.append(f"## dense_interference\n\n{table(head, rows)}")
    norms = [(2, 16, 24)] if options.quick else [(8, 1024, 768), (32, 1024, 768), (8, 1024, 4096), (8, 12288, 64)]
    rows = [scale_bias(*size, dtype, device) for size in norms for dtype in (torch.bfloat16, torch.float32)]
    head = ["operands", "their sums, µs", "scale and bias", "scale", "bias", "scale and bias by PyTorch"]
    parts.append(f"## scale_bias_grad\n\n{table(head, rows)}")
    tables = [(2, 16, 24, 32)] if options.quick else EMBEDDINGS
    rows = [embedding(one, dtype, device) for one in tables for dtype in (torch.bfloat16, torch.float32)]
    head = ["", "reading b, µs", "sums", "with a direction", "with the Gram", "sums, one id everywhere"]
    parts.append(f"## embedding_interference\n\nRatios are to reading b once.\n\n{table(head, rows)}")
    text = "\n\n".join(parts) + "\n"
    print(text)
    if not options.quick:
        RESULT.write_text(text)


if __name__ == "__main__":
    main()
