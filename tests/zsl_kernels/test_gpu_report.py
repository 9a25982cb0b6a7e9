"""The GPU kernels' report: its models are the paper's, its rows what was compiled and predicted, its claims marked as such."""

import re

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.gpu import report, sass
from tests.zsl_kernels.test_sass import variant
from zerosum.training.model import GPT, GPTConfig
from zsl_kernels.configs import CONFIGS
from zsl_kernels.gpus import GPUS, H100


@pytest.mark.parametrize(("width", "layers"), [(256, 4), (512, 8)])
def test_its_models_are_those_that_are_trained(width, layers):
    with torch.device("meta"):
        model = GPT(GPTConfig(width=width, layers=layers, heads=4, vocab=report.V, positions=16))
    trained = sorted(tuple(m.weight.shape) for m in model.modules() if isinstance(m, torch.nn.Linear))
    assert sorted((O, K) for count, O, K in report.weights(width, layers) for _ in range(count)) == trained


def test_predictions_add_up():
    for gram in (False, True):
        found = report.predict(H100, "bfloat16", "78M", 8, gram)
        work = 2 * 8 * report.T * sum(count * O * K for count, O, K in report.weights(*report.MODELS["78M"]))
        assert found.peak_share == pytest.approx(work / (1e-3 * found.milliseconds) / H100.half_flops)
        assert found.ratio == pytest.approx(found.peak_share / found.plain_peak_share)
        assert 0 < found.peak_share < found.plain_peak_share < 1
        assert sum(found.limits.values()) == pytest.approx(1)
        assert sum(found.chosen.values()) == pytest.approx(1)
    assert found.milliseconds > report.predict(H100, "bfloat16", "78M", 8, False).milliseconds


def test_what_falls_short_of_the_plain_product_names_its_limit():
    found = report.predict(H100, "bfloat16", "472M", 32, False)
    for milliseconds in (found.plain_milliseconds, found.plain_milliseconds / 0.5):
        row = report.Prediction(**{**vars(found), "milliseconds": milliseconds}).row()
        assert len(row) == len(report.PREDICTED)
        limits = row[report.PREDICTED.index("limits")]
        assert max(found.limits, key=found.limits.get) in limits
        assert limits.startswith("**") == (milliseconds > found.plain_milliseconds)


def test_a_compiled_kernel_is_a_row():
    compiled = sass.compile_triton(variant(), 90)
    found = report.kernel("some", H100, "half", variant().config, compiled.usage, compiled.shared)
    assert found.loops
    assert all(set(loop) == {"HGMMA"} for loop in found.loops)
    assert (found.step_flops, found.step_bytes) == (2 * 128 * 64 * 32, 2 * (128 + 64) * 32)
    # Both bounds of what a multiprocessor holds: 64 Ki registers, and 228 KiB of shared memory, of which each block has one more.
    assert found.blocks * 8 * 32 * found.registers <= 1 << 16
    assert found.blocks * (found.shared + 1024) <= 228 << 10
    assert len(found.row()) == len(report.COMPILED)


@pytest.mark.parametrize("arch", GPUS)
def test_every_shipped_configuration_has_a_row(arch):
    shipped = {(v.dtype, v.config) for v in report.shipped(arch)}
    for kernel, kinds in CONFIGS[arch].items():
        for kind, configs in kinds.items():
            assert {(kind, config) for config in configs} <= shipped, (kernel, kind)


def test_says_that_nothing_was_measured_and_what_was_assumed():
    predictions = [report.predict(gpu, "bfloat16", "14M", 8, True) for gpu in GPUS.values()]
    text = report.report([], predictions, ["Something is missing."])
    assert "Nothing here was measured on a GPU" in text
    assert "Something is missing." in text
    for gpu in GPUS.values():
        assert re.search(rf"^### {gpu.name}, bfloat16, predicted$", text, re.MULTILINE)
        assert f"{gpu.l2_bandwidth / 1e12:g}" in text
