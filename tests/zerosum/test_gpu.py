"""The probe on a device: the zoo against the truth, and the project's GPT against the probe on the CPU."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import zerosum
import zsl_kernels as zk
from tests.zerosum.models import ZOO, Packed, TwoLayers
from tests.zerosum.oracle import PASSES, assert_truth, direction_for, per_example_gradients, trainable
from zerosum.training.model import GPT, GPTConfig, token_losses

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device that torch can use"),
]
FIELDS = ("grad_sum", "abs_sum", "sq_sum", "l1", "sq_norm", "gram")


def assert_same(found: zerosum.Report, expected: zerosum.Report, rtol: float) -> None:
    assert set(found) == set(expected)
    assert found.coverage.covered == expected.coverage.covered
    for name in expected:
        for field in FIELDS:
            want = getattr(expected[name], field)
            error = (getattr(found[name], field).cpu() - want).norm()
            assert error <= rtol * want.norm() + 1e-12, (name, field, error)


@pytest.mark.parametrize("kind", ZOO)
def test_every_field_of_every_parameter_is_the_truth(kind: type[TwoLayers]) -> None:
    """Which is the device's own, one backward pass for each example: some of its operations round float64 as no CPU does."""
    torch.manual_seed(0)
    model, tokens = kind().double().train().cuda(), torch.randint(0, 11, (3, 6)).cuda()

    def losses() -> Tensor:
        torch.manual_seed(1)
        return model(tokens).square().flatten(1).mean(1)

    truth, direction = per_example_gradients(losses(), model, trainable(model)), direction_for(model)
    probe = zerosum.Probe(model, direction=direction, gram=True, num_examples=3 if kind is Packed else None)
    for _ in range(PASSES):
        with probe:
            losses().sum().backward()
        assert_truth(probe.report(), truth, direction, rtol=max(kind.rtol, 1e-9), refusable=kind.refusable)


@pytest.mark.parametrize("backend", ["FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_attention_that_adds_by_atomics_couples_nothing(dtype: torch.dtype, backend: str) -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab=512, width=256, layers=4, heads=4, positions=1024)).cuda()
    x, y = torch.randint(512, (2, 8, 1024), device="cuda")
    probe = zerosum.Probe(model)
    for _ in range(PASSES):
        with probe, torch.nn.attention.sdpa_kernel(getattr(torch.nn.attention.SDPBackend, backend)):
            with torch.autocast("cuda", dtype=dtype):
                losses = token_losses(model, x, y).mean(1)
            (losses.sum() * (65536 if dtype == torch.float16 else 1)).backward()
        assert probe.report().coverage.share == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gpt_in_its_own_precision(dtype: torch.dtype) -> None:
    """float32 through the kernels; bfloat16 by autocast, against the CPU's float32."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab=512, width=128, layers=2, heads=4, positions=64))
    x, y = torch.randint(512, (2, 8, 64))
    reports = []
    for device in ("cpu", "cuda"):
        copied = copy.deepcopy(model).to(device)
        probe = zerosum.Probe(copied, gram=True)
        with probe, torch.autocast(device, dtype=torch.bfloat16, enabled=dtype != torch.float32 and device == "cuda"):
            token_losses(copied, x.to(device), y.to(device)).mean(1).sum().backward()
        reports.append(probe.report())
    assert_same(reports[1], reports[0], 1e-4 if dtype == torch.float32 else 5e-2)


def test_a_fused_head() -> None:
    torch.manual_seed(0)
    h, weight, targets = torch.randn(4, 32, 64), torch.randn(1000, 64), torch.randint(1000, (4, 32))
    found = []
    for device in ("cpu", "cuda"):
        leaves = [x.to(device).detach().requires_grad_() for x in (h, weight)]
        got: list[zk.InterferenceSums] = []
        losses = zk.linear_cross_entropy(*leaves, targets.to(device), statistics=got.append, gram=True)
        losses.sum().backward()
        found.append([losses, *(x.grad for x in leaves), got[0].abs_sum, got[0].gram])
    plain = F.cross_entropy((h @ weight.T).movedim(-1, 1), targets, reduction="none")
    torch.testing.assert_close(found[1][0].cpu(), plain, rtol=1e-4, atol=1e-4)
    for x, y in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(x.cpu(), y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gram", [False, True])
def test_a_captured_step_is_the_eager_one_to_the_bit(gram: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab=512, width=128, layers=2, heads=4, positions=64)).cuda()
    x, y = torch.randint(512, (2, 8, 64)).cuda()

    def step() -> Tensor:
        # (The backward pass of fused attention adds by atomics in half precision.)
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=dtype != torch.float32), sdpa_kernel(SDPBackend.MATH):
            losses = token_losses(model, x, y).mean(1)
        losses.mean().backward()
        return losses

    captured, eager = zerosum.capture(step, zerosum.Probe(model, gram=gram)), zerosum.Probe(model, gram=gram)
    for _ in range(2):
        x.copy_(torch.randint(512, x.shape))
        y.copy_(torch.randint(512, y.shape))
        losses, report = captured.replay().clone(), captured.report()
        found = {
            name: [getattr(report[name], f).clone() for f in FIELDS if getattr(report[name], f) is not None] for name in report
        }
        for _ in range(2):  # once to be proved
            model.zero_grad()
            with eager:
                expected = step()
        assert torch.equal(losses, expected)
        for name, fields in found.items():
            wanted = [getattr(eager.report()[name], f) for f in FIELDS if getattr(eager.report()[name], f) is not None]
            assert all(torch.equal(a, b) for a, b in zip(fields, wanted, strict=True)), name
