"""The Triton kernels on CPU tensors: the suites of the ops in a process where Triton interprets them; and their arithmetic."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from tests.inputs import EMULATED

HERE = Path(__file__).parent
# Of `make test-slow`, each in a process of its own. In some of these files no test is of such small operands that the interpreter
# takes it.
GROUPS = (
    ("emulated_triton_tiles",),
    ("emulated_triton_others",),
    ("test_interference",),
    ("test_gram", "test_dot_norm_weighted", "test_ragged", "test_errors"),
    ("test_tied", "test_properties", "test_autograd"),
    ("test_compile", "test_integer_operands", "test_linear_cross_entropy", "test_coordinate_sums"),
)


@pytest.mark.skipif(EMULATED is not None, reason="this is such a process")
@pytest.mark.parametrize(
    ("tier", "names"),
    [
        *(("not slow", tuple(name for group in groups for name in group)) for groups in (GROUPS[:2], GROUPS[2:])),
        *(pytest.param("slow", names, marks=pytest.mark.slow("the further cases of emulated kernels")) for names in GROUPS),
    ],
    ids=lambda x: x if isinstance(x, str) else x[0],
)
def test_the_suites_pass_under_the_interpreter(tier, names, project_environment):
    files = [str(HERE / f"{name}.py") for name in names]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning", "-m", tier, *files]
    environment = {**project_environment, "TRITON_INTERPRET": "1", "ZSL_TEST_EMULATED": "triton"}
    done = subprocess.run(command, env=environment, cwd=HERE.parent.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None, done.stdout[-2000:]
    assert int(passed[1]) >= 20  # so many that it is not the filter that passes


def tf32(x: np.ndarray, half: int) -> np.ndarray:
    """11 significant bits: the nearest, or without ``half`` a unit what is cut off."""
    return ((x.view(np.uint32).astype(np.uint64) + half) & 0xFFFFE000).astype(np.uint32).view(np.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_three_products_of_tf32_are_nearly_as_good_as_float32(dtype):
    """The interpreter multiplies in float32 whatever it is told. The product of the smaller parts is left out, and what they
    cannot hold: of one product, of values or of their squares, below four eps at worst and some 0.6 on average."""
    generator = torch.Generator().manual_seed(0)
    x, y = ((torch.randn(1 << 16, generator=generator) * 10).to(dtype).float().numpy() for _ in range(2))
    for a, b in ((x, y), (x * x, y * y)):
        a_big, b_big = tf32(a, 0x1000), tf32(b, 0x1000)
        a_small, b_small = tf32(a - a_big, 0), tf32(b - b_big, 0)
        product = sum(p.astype(np.float64) * q for p, q in ((a_big, b_big), (a_big, b_small), (a_small, b_big)))
        truth = a.astype(np.float64) * b
        units = (product - truth)[truth != 0] / np.abs(truth[truth != 0]) * 2.0**23
        assert np.abs(units).max() < 4
        assert np.sqrt(np.mean(units**2)) < 0.7


@pytest.mark.parametrize("setting", ["none", "ieee", "tf32"])
def test_precision_is_tf32_only_where_torch_allows_it(setting, monkeypatch):
    from zsl_kernels.backends.triton.tiles import precision

    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = setting
        assert precision(torch.float32) == ("tf32" if setting == "tf32" else "tf32x3")
        assert precision(torch.bfloat16) == "ieee"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def test_reading_the_precision_does_not_raise_after_the_older_settings():
    code = (
        "import torch\n"
        "torch.set_float32_matmul_precision('high')\n"
        "torch.backends.cuda.matmul.allow_tf32 = True\n"
        "torch.backends.cuda.matmul.fp32_precision = 'tf32'\n"
        "from zsl_kernels.backends.triton.tiles import precision\n"
        "assert precision(torch.float32) == 'tf32'\n"
    )
    root = str(HERE.parent.parent)
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": root})
