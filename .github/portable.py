"""What an installation without compiled kernels has to do: the ops by their definition, and a probed step."""

import torch
import torch.nn.functional as F

import zerosum
import zsl_kernels as zk

assert zk.build_info()["cpu"] != "live", zk.build_info()
torch.manual_seed(0)
a, b = torch.randn(3, 5, 7), torch.randn(3, 5, 6)
for found, expected in zip(zk.interference(a, b, gram=True), zk.interference(a, b, gram=True, impl="reference"), strict=True):
    torch.testing.assert_close(found, expected)

model = torch.nn.Linear(7, 6)
probe = zerosum.Probe(model)
with probe:
    F.cross_entropy(model(a).mT, torch.randint(6, (3, 5)), reduction="none").mean(1).sum().backward()
report = probe.report()
assert report.coverage.share == 1, report.coverage
torch.testing.assert_close(report["weight"].grad_sum, model.weight.grad)
print(report)
