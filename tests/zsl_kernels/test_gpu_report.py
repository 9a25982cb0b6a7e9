"""The GPU kernels' report: its models are the paper's, its rows what was compiled and predicted, and it says which is which."""

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.gpu import report, sass
from tests.zsl_kernels.test_sass import variant
from zerosum.training.model import GPT, GPTConfig
from zsl_kernels.planning.devices import A100, GPUS, H100
from zsl_kernels.planning.tiles import CONFIGS


@pytest.mark.parametrize(("width", "layers"), [(256, 4), (512, 8)])
def test_its_models_are_those_that_are_trained(width, layers):
    with torch.device("meta"):
        model = GPT(GPTConfig(width=width, layers=layers, heads=4, vocab=report.V, positions=16))
    trained = sorted(tuple(m.weight.shape) for m in model.modules() if isinstance(m, torch.nn.Linear))
    assert sorted((O, K) for count, O, K in report.weights(width, layers) for _ in range(count)) == trained


def test_predictions_add_up():
    for gram in (False, True):
        found = report.predict(A100, "bfloat16", "78M", gram)
        assert found.ratio == pytest.approx(found.milliseconds / found.plain_milliseconds)
        assert found.ratio > 1
        assert sum(found.chosen.values()) == pytest.approx(1)
        assert len(found.row()) == len(report.PREDICTED)
    assert found.milliseconds > report.predict(A100, "bfloat16", "78M", False).milliseconds


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


def test_predictions_are_of_devices_that_were_not_measured_and_say_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "triton_kernels", list)
    monkeypatch.setattr(report, "cuda_kernels", lambda library: [])
    monkeypatch.setattr(report, "other_kernels", lambda library: [])
    report.main()
    text = (tmp_path / "gpu_report.md").read_text()
    assert "No device but an H100 was measured" in text
    rows = [line for line in text[text.index("## Predicted") :].splitlines() if line.startswith("| ")]
    assert {line.split(" | ")[0][2:] for line in rows[2:]} == {"A100", "B200"}
    assert len(list(tmp_path.iterdir())) == 1
