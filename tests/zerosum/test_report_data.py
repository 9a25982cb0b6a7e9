"""Reports as data: files, pickles, several as one, all processes' as one, tables."""

import copy
import gc
import json
import pickle
import subprocess
import sys
import weakref

import pytest
import torch
from torch import nn

import zerosum
from tests.zerosum.oracle import assert_truth, direction_for, per_example_gradients, trainable
from zerosum.training.model import GPT, GPTConfig, token_losses

FIELDS = ("grad_sum", "abs_sum", "sq_sum", "l1", "sq_norm", "dot", "abs_dot", "gram")
T, V = 6, 11


class Step:
    """A model with a table, of which some rows are touched, and reports of parts of a batch."""

    def __init__(self, n=7, **options):
        torch.manual_seed(0)
        self.model = GPT(GPTConfig(vocab=V, width=8, layers=1, heads=2, positions=T)).double()
        self.x, self.y = torch.randint(V - 2, (2, n, T))
        self.direction = direction_for(self.model) if options.pop("along", False) else None
        self.probe = zerosum.Probe(self.model, direction=self.direction, **options)

    def losses(self, part):
        return token_losses(self.model, self.x[part], self.y[part]).mean(1)

    def report(self, *parts):
        """Of one block with these micro-batches."""
        self.model.zero_grad()
        with self.probe:
            for part in parts or (slice(None),):
                self.losses(part).sum().backward()
        return self.probe.report()

    def truth(self):
        return per_example_gradients(self.losses(slice(None)), self.model, trainable(self.model))


def same(found, expected, names=None):
    """To the bit."""
    assert found.num_examples == expected.num_examples
    assert list(found) == list(expected)
    assert found.coverage == expected.coverage
    assert found.unreached == expected.unreached
    assert found.proof == expected.proof
    for name in expected:
        assert found[name].how == expected[name].how
        assert found[name].coordinates == expected[name].coordinates
        for field in FIELDS:
            mine, its = getattr(found[name], field), getattr(expected[name], field)
            assert (mine is None) == (its is None), (name, field)
            if its is not None:
                assert mine.shape == its.shape
                assert torch.equal(mine.nan_to_num(7), its.nan_to_num(7)), (name, field)
    assert str(found) == str(expected)


def copied(report, tmp_path):
    return copy.deepcopy(report)


def pickled(report, tmp_path):
    return pickle.loads(pickle.dumps(report))


def stored(report, tmp_path):
    report.save(tmp_path / "report.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["report.safetensors"]
    return zerosum.load_report(tmp_path / "report.safetensors")


HOW = pytest.mark.parametrize("how", [copied, pickled, stored])


@HOW
@pytest.mark.parametrize("options", [{}, {"gram": True}, {"gram": True, "along": True}], ids=str)
@pytest.mark.parametrize("parts", [(), (slice(0, 3), slice(3, 7))], ids=["one pass", "micro-batches"])
def test_a_copy_says_the_same_to_the_bit(parts, options, how, tmp_path):
    step = Step(**options)
    report = step.report(*parts)
    found = how(report, tmp_path)
    same(found, report)
    same(how(found, tmp_path), report)
    one = pickle.loads(pickle.dumps(report["head.weight"]))
    assert torch.equal(one.grad_sum, report["head.weight"].grad_sum)
    assert one.metrics.keys() == report["head.weight"].metrics.keys()


@HOW
def test_a_copy_says_which_parameters_no_loss_reaches(how, tmp_path):
    step = Step()
    step.model.register_parameter("spare", nn.Parameter(torch.ones(3)))
    report = step.report()
    assert report.unreached == {"spare"}
    same(how(report, tmp_path), report)


@HOW
def test_a_copy_outlives_the_step_and_the_model(how, tmp_path):
    step = Step()
    report = step.report()
    expected = {name: report[name].grad_sum.clone() for name in report}
    found, model = how(report, tmp_path), weakref.ref(step.model)
    for p in step.model.parameters():
        p.grad.mul_(0)
    for name, grad_sum in expected.items():
        assert torch.equal(found[name].grad_sum, grad_sum)
    del step, report, p
    gc.collect()
    assert model() is None


@HOW
def test_a_gradient_that_was_overwritten_is_lost_alone(how, tmp_path):
    step = Step()
    report = step.report()
    report.metrics  # noqa: B018
    before = {name: report[name].abs_sum.clone() for name in report}
    grad_sum = report["embedding.weight"].grad_sum.clone()
    nn.utils.clip_grad_norm_(step.model.parameters(), 1e-3)
    found = how(report, tmp_path)
    for name, abs_sum in before.items():
        assert torch.equal(found[name].abs_sum, abs_sum)
        if name == "embedding.weight":  # whose touched rows have memory of their own
            assert torch.equal(found[name].grad_sum, grad_sum)
            continue
        with pytest.raises(RuntimeError, match=f"grad_sum of {name!r}"):
            found[name].grad_sum  # noqa: B018
    assert found.metrics["D_grad"].value == report.metrics["D_grad"].value


def test_what_is_no_report_is_refused_by_name(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "x.safetensors"
    with pytest.raises(FileNotFoundError):
        zerosum.load_report(path)
    save_file({"a": torch.ones(2)}, path)
    with pytest.raises(ValueError, match=r"path: expected a report that Report\.save wrote, got another safetensors file"):
        zerosum.load_report(path)
    save_file({"a": torch.ones(2)}, path, {"zerosum_report": json.dumps({"format": 99})})
    with pytest.raises(ValueError, match="path: expected a report of format 1, got 99"):
        zerosum.load_report(path)
    save_file({"a": torch.ones(2)}, path, {"zerosum_report": json.dumps({"format": 1})})
    with pytest.raises(ValueError, match="is broken, or is no report"):
        zerosum.load_report(path)
    Step().report().save(path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="is broken, or is no report"):
        zerosum.load_report(path)


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    path, step = tmp_path / "x.safetensors", Step()
    step.report().save(path)
    before = path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        step.report().save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


# Several as one ------------------------------------------------------------------------------------------------------------------


def blocks(*sizes):
    return torch.block_diag(*(torch.ones(n, n) for n in sizes)).bool()


@pytest.mark.parametrize("along", [False, True])
def test_merged_reports_are_one_of_the_whole_batch(along):
    step = Step(gram=True, along=along)
    parts = [copy.deepcopy(step.report(part)) for part in (slice(0, 1), slice(1, 4), slice(4, 7))]
    found = zerosum.merge(parts, direction=step.direction)
    assert_truth(found, step.truth(), step.direction, gram=blocks(1, 3, 3))
    assert [len(block) for block in found.gram_blocks] == [1, 3, 3]
    whole = step.report(slice(0, 1), slice(1, 4), slice(4, 7))
    assert found.metrics.keys() == whole.metrics.keys()
    for name, metric in whole.metrics.items():
        assert (found.metrics[name].value, found.metrics[name].n) == pytest.approx((metric.value, 7), rel=1e-9), name
        assert (found.metrics[name].null is None) == (metric.null is None)
        assert metric.null is None or found.metrics[name].null == pytest.approx(metric.null, rel=1e-9), name
    assert found.coverage == whole.coverage
    assert found.proof.passes == 3


def test_merging_is_associative():
    step = Step(gram=True)
    a, b, c = (copy.deepcopy(step.report(part)) for part in (slice(0, 2), slice(2, 3), slice(3, 7)))
    left, right = zerosum.merge([zerosum.merge([a, b]), c]), zerosum.merge([a, zerosum.merge([b, c])])
    for name in left:
        for field in FIELDS:
            mine, its = getattr(left[name], field), getattr(right[name], field)
            assert (mine is None) == (its is None)
            # Two additions of float64 numbers in another order.
            assert mine is None or torch.allclose(
                mine, its, rtol=0, atol=4 * 2.0**-53 * its.nan_to_num().abs().max(), equal_nan=True
            )
    same(zerosum.merge([a]), a)


def test_merging_leaves_the_reports_as_they_were():
    step = Step(gram=True)
    a, b = (copy.deepcopy(step.report(part)) for part in (slice(0, 2), slice(2, 7)))
    before = copy.deepcopy(a), copy.deepcopy(b)
    merged = zerosum.merge([a, b])
    for name in merged:
        for x in (merged[name].grad_sum, merged[name].l1, merged[name].gram_blocks[0]):
            x.zero_()
    same(a, before[0])
    same(b, before[1])


class Switched(nn.Module):
    """A branch that some steps leave out, by which examples do not reach it."""

    def __init__(self):
        super().__init__()
        self.inner, self.branch, self.on = nn.Linear(3, 3), nn.Linear(3, 3), True

    def forward(self, x):
        y = self.inner(x)
        return self.branch(y.tanh()) + y if self.on else y


@pytest.mark.parametrize("gram", [False, True])
@pytest.mark.parametrize("order", [(True, False, True), (False, True, False), (False, False)])
def test_examples_that_do_not_reach_a_parameter_have_zeros(order, gram):
    torch.manual_seed(0)
    model = Switched().double()
    probe, reports, truth = zerosum.Probe(model, gram=gram), [], []
    for n, model.on in enumerate(order, 1):
        x = torch.randn(n, 4, 3).double()
        model.zero_grad()
        with probe:
            model(x).square().mean((1, 2)).sum().backward()
        reports.append(copy.deepcopy(probe.report()))
        truth.append(per_example_gradients(model(x).square().mean((1, 2)), model, trainable(model)))
    found = zerosum.merge(reports)
    if True not in order:
        assert found.unreached == {"branch.weight", "branch.bias"}
        assert list(found.coverage.not_covered) == ["branch.weight", "branch.bias"]
        assert list(found) == ["inner.weight", "inner.bias"]
        return
    expected = {name: torch.cat([part[name] for part in truth]) for name in truth[0]}
    sizes = range(1, len(order) + 1)
    assert_truth(found, expected, gram=blocks(*sizes) if gram else False)
    assert list(found) == list(expected)
    assert not found.unreached


def test_what_one_report_cannot_cover_is_not_covered():
    step = Step()
    a = copy.deepcopy(step.report(slice(0, 3)))
    mixing = step.model.blocks[0].register_forward_hook(lambda module, inputs, y: y - y.mean(0))
    with pytest.warns(UserWarning, match="coupled"):
        b = copy.deepcopy(step.report(slice(3, 7)))
    mixing.remove()
    refused = set(a) - set(b)
    assert refused
    for pair in ((a, b), (b, a)):
        found = zerosum.merge(pair)
        assert list(found) == [name for name in a if name not in refused]
        for name in refused:
            assert found.coverage.not_covered[name] == f"not covered in every report: {b.coverage.not_covered[name]}"
        assert found.coverage.covered.keys() == set(found)


def test_reports_that_do_not_belong_together_are_refused():
    step, other = Step(gram=True), Step(along=True)
    other.model = nn.Linear(3, 2)
    report = step.report()
    with pytest.raises(ValueError, match="reports: expected one at least, got none"):
        zerosum.merge([])
    with pytest.raises(TypeError, match=r"report: expected a zerosum\.Report, got int"):
        zerosum.merge([3])
    with pytest.raises(ValueError, match="reports: expected all with a Gram, or none"):
        zerosum.merge([report, Step().report()])
    with pytest.raises(ValueError, match="direction: expected the one that the reports have"):
        zerosum.merge([Step(along=True).report()])
    with pytest.raises(ValueError, match="report: expected one with l1, sq_norm as the others, got l1, sq_norm, dot, abs_dot"):
        zerosum.merge([report, Step(gram=True, along=True).report()])
    linear = zerosum.Probe(nn.Linear(3, 2).double(), gram=True)
    with linear:
        linear.model(torch.randn(4, 3).double()).square().sum(1).sum().backward()
    with pytest.raises(ValueError, match="report: expected one of the same parameters, got no coordinates of"):
        zerosum.merge([report, linear.report()])
    nn.utils.clip_grad_norm_(step.model.parameters(), 1e-3)
    with pytest.raises(RuntimeError, match="modified in place after the probe"):
        zerosum.merge([report])


def test_a_sum_of_reports_is_theirs_and_goes_on():
    step, total = Step(gram=True), zerosum.ReportSum()
    with pytest.raises(RuntimeError, match="nothing was added yet"):
        total.report()
    total.add(step.report(slice(0, 3)))
    first = total.report()
    kept = copy.deepcopy(first)
    total.add(step.report(slice(3, 7)))
    assert_truth(total.report(), step.truth(), gram=False)
    same(first, kept)
    assert total.num_examples == 7
    step.report()
    nn.utils.clip_grad_norm_(step.model.parameters(), 1e-3)
    with pytest.raises(RuntimeError, match="modified in place"):
        total.add(step.probe.report())
    assert_truth(total.report(), step.truth(), gram=False)


def test_a_sum_of_reports_holds_sums_of_one():
    step, total = Step(), zerosum.ReportSum()
    for k in range(30):
        total.add(step.report(slice(k % 7, k % 7 + 1)))
        if k == 4:
            gc.collect()
            before = [len(gc.get_objects())]
    held = {id(x) for sums in total._sums.values() for x in sums.values()}
    assert len(held) == 3 * len(list(step.model.parameters()))
    gc.collect()
    # Scalars alone: two fields of each parameter, and the evidence of each pass.
    assert len(gc.get_objects()) - before[0] < 26 * (2 * len(total._sums) + 10)
    assert total.report().num_examples == 30


def test_micro_batches_grams_are_kept_as_blocks():
    step = Step(n=64, gram=True)
    report = step.report(*(slice(k, k + 2) for k in range(0, 64, 2)))
    results = report["head.weight"]._results
    assert sum(gram.numel() for gram in results.grams) == 32 * 4
    assert results.sums.gram is None
    assert [len(block) for block in report.gram_blocks] == [2] * 32
    assert_truth(report, step.truth(), gram=blocks(*[2] * 32))


# For loggers and tables ----------------------------------------------------------------------------------------------------------


def test_metrics_as_a_flat_dictionary():
    report = Step(gram=True, along=True).report()
    found = report.to_dict()
    assert all(type(value) is float for value in found.values())
    assert found["num_examples"] == 7
    assert found["coverage"] == 1
    for name, metric in report.metrics.items():
        for key, value in ((name, metric.value), (f"{name}_null", metric.null), (f"{name}_debiased", metric.debiased)):
            assert (key in found) == (value is not None)
            assert value is None or found[key] == pytest.approx(value, rel=0, abs=0, nan_ok=True)
    more = report.to_dict(parameters=True)
    assert found.items() <= {k: v for k, v in more.items() if "/" not in k}.items() or any(v != v for v in found.values())
    assert more["head.weight/D_grad"] == report["head.weight"].metrics["D_grad"].value


def test_a_table_has_a_row_for_each_parameter():
    report = Step().report()
    rows = report.table()
    assert [row["name"] for row in rows] == list(report)
    for row in rows:
        p = report[row["name"]]
        assert (row["how"], row["size"], row["shape"]) == (p.how, p.abs_sum.numel(), tuple(p.abs_sum.shape))
        assert row["D_grad"] == p.metrics["D_grad"].value


def test_parameters_by_module():
    step = Step(gram=True)
    report = step.report()
    groups = report.by_module()
    assert list(groups) == list(dict.fromkeys(name.split(".")[0] for name in report.coverage.sizes))
    assert sorted(name for group in groups.values() for name in group) == sorted(report)
    truth = step.truth()
    block = {name: g for name, g in truth.items() if name.startswith("blocks.0.")}
    assert_truth(report.by_module(2)["blocks.0"], block)
    deepest = report.by_module(9)
    assert {name.rpartition(".")[0] for name in report} == set(deepest)
    with pytest.raises(ValueError, match="depth: expected a positive integer, got 0"):
        report.by_module(0)


def test_a_report_fits_into_a_terminal():
    lines = repr(Step(gram=True, along=True).report()).splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 100
    assert lines[0].startswith("Report of 7 examples, ")


# All processes -------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def said(project_environment, tmp_path_factory):
    meeting = tmp_path_factory.mktemp("gloo") / "file"
    command = [sys.executable, "-m", "tests.zerosum.all_reduce_driver", str(meeting)]
    ranks = [
        subprocess.Popen([*command, str(rank)], env=project_environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    found = [process.communicate(timeout=300) for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], found[0][1][-2000:] + found[1][1][-2000:]
    return [json.loads(out) for out, _ in found]


def test_every_rank_has_the_report_of_all_examples(said):
    for rank in said:
        assert rank["whole batch"] == "right"
        assert rank["blocks"] == [2, 3, 2]


def test_what_one_rank_does_not_cover_no_rank_covers(said):
    for rank in said:
        assert "head.weight" in rank["not covered"]


def test_an_error_on_one_rank_is_told_on_every_rank(said):
    assert "modified in place" in said[1]["clipped"]
    assert "rank 1 of the group has no report to add" in said[0]["clipped"]


def test_without_a_process_group_it_says_so():
    with pytest.raises(RuntimeError, match="all_reduce: no process group is initialized"):
        Step().report().all_reduce()
