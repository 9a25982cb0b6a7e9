"""Packed batches of real architectures, as ``DataCollatorWithFlattening`` and TRL make them, against each document run alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import zerosum
from tests.zerosum.oracle import assert_truth
from tests.zerosum.steps import check, truth_of
from tests.zerosum.test_attribution_transformers import CAUSAL, RTOL, VANISHING, mixtral, perturbed
from tests.zerosum.transformers_models import IGNORED, PAD, decoder, gpt2, tokens

LENGTHS = [(4, 5, 3), (3, 3, 3), (1, 4, 1), (6,), (2, 2, 2, 2), (12,) + (1,) * 3]
MODELS: dict[str, Callable[[], nn.Module]] = {
    "gpt2": CAUSAL["gpt2"],
    "gpt2, eager": CAUSAL["gpt2, eager"],
    "llama": CAUSAL["llama"],
    "llama, eager": decoder("Llama", "eager"),
    "llama, tied": CAUSAL["llama, tied"],
    "qwen3": CAUSAL["qwen3"],
    "mixtral": mixtral("batched_mm"),
}
# A document of two tokens has one loss, of a position that attends to itself alone: queries and keys have no gradient.
NO_QUERIES = (*VANISHING, "q_proj.weight", "k_proj.weight", "q_norm.weight", "k_norm.weight")


class Documents:
    """Documents in B rows, padded at the end; ``batch`` is what the model gets. No document's first token has a loss."""

    def __init__(self, *rows: tuple[int, ...], padding: int = 0, seed: int = 1) -> None:
        torch.manual_seed(seed)
        self.documents = [tokens(1, n) for row in rows for n in row]
        R = max(map(sum, rows)) + padding
        ids, positions = torch.full((2, len(rows), R), -1)
        x, documents = torch.full((len(rows), R), PAD), iter(enumerate(self.documents))
        for k, row in enumerate(rows):
            first = 0
            for n in row:
                mine = slice(first, first + n)
                ids[k, mine], x[k, mine] = next(documents)
                positions[k, mine] = torch.arange(n)
                first += n
        self.ids, self.positions = ids, positions
        self.batch = {"input_ids": x, "position_ids": positions.clamp(min=0), "labels": x.masked_fill(positions <= 0, IGNORED)}
        self.valid = int((self.batch["labels"] != IGNORED).sum())

    def losses(self, model: nn.Module) -> Tensor:
        """(N,) sums of the documents run alone, over the mean number of losses of those that have any."""
        logits = [model(input_ids=x).logits[0].float() for x in self.documents]
        sums = [F.cross_entropy(y[:-1], x[0, 1:], reduction="sum") for y, x in zip(logits, self.documents, strict=True)]
        active = sum(x.shape[1] > 1 for x in self.documents)
        return torch.stack(sums) * active / self.valid


def vanishing(lengths: tuple[int, ...]) -> tuple[str, ...]:
    return NO_QUERIES if max(lengths) <= 2 else VANISHING


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("name", MODELS)
def test_labels_and_positions_that_restart(name: str, lengths: tuple[int, ...]) -> None:
    """``labels=`` and no attention mask: the library keeps documents apart by their positions."""
    model, docs = perturbed(MODELS[name]), Documents(lengths)

    def step() -> None:
        zerosum.example_ids(docs.batch["input_ids"], position_ids=docs.positions)
        model(**docs.batch).loss.backward()

    check(model, lambda: docs.losses(model), step, rtol=RTOL, vanishing=vanishing(lengths), directed=False)


@pytest.mark.parametrize("rows", [((3, 2), (4, 1)), ((3, 4), (5,)), ((4,), (4,)), ((2, 2, 2), (2, 2, 2))])
@pytest.mark.parametrize("items", [None, 7])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_several_packed_rows(name: str, items: int | None, rows: tuple[tuple[int, ...], ...]) -> None:
    """(B, R), padded, with the mean of the batch or Trainer's number of items."""
    model, docs = perturbed(MODELS[name]), Documents(*rows)
    more = {} if items is None else {"num_items_in_batch": items}

    def step() -> None:
        zerosum.example_ids(docs.batch["input_ids"], position_ids=docs.positions)
        model(**docs.batch, **more).loss.backward()

    lengths = tuple(n for row in rows for n in row)
    check(model, lambda: docs.losses(model), step, rtol=RTOL, vanishing=vanishing(lengths), directed=False)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_one_proof_serves_a_run(checkpointed: bool) -> None:
    """Batches of one number of rows, of documents of any lengths."""
    model = perturbed(MODELS["llama"])
    if checkpointed:
        model.activation_checkpointing_enable({"use_reentrant": False})
    probe, proved = zerosum.Probe(model), []
    for k, lengths in enumerate([(3,) * 8, (2, 5, 3, 4, 2, 3, 1, 4), (2, 10, 12), (24,), (2, 2, 2, 3, 3, 3, 4, 5)]):
        docs = Documents(lengths, seed=k)
        truth = truth_of(model, lambda docs=docs: docs.losses(model))
        model.zero_grad()
        with probe:
            zerosum.example_ids(docs.batch["input_ids"], position_ids=docs.positions)
            model(**docs.batch).loss.backward()
        assert_truth(probe.report(), truth, rtol=RTOL, gram=False, vanishing=VANISHING)
        proved.append(probe.report().proof.proved)
    assert proved == [1, 0, 0, 0, 0]


def test_a_cache_lets_documents_meet_which_is_said() -> None:
    """The library keeps documents apart only where there is no cache; what lies before attention is refused."""
    model, docs = perturbed(MODELS["llama"]), Documents((4, 5, 3))
    model.config.use_cache = True
    probe = zerosum.Probe(model)

    def step() -> None:
        with probe:
            zerosum.example_ids(docs.batch["input_ids"], position_ids=docs.positions)
            model(**docs.batch).loss.backward()

    with pytest.warns(UserWarning, match=r"serve several examples .*documents interact there.*use_cache is False"):
        step()
    assert {"model.embed_tokens.weight", "model.layers.1.self_attn.v_proj.weight"} <= set(probe.report().coverage.not_covered)
    assert {"model.layers.1.mlp.up_proj.weight", "lm_head.weight"} <= set(probe.report())


def test_a_reentrant_checkpoint_is_refused_with_a_word() -> None:
    model, docs = perturbed(MODELS["llama"]), Documents((4, 5, 3))
    model.activation_checkpointing_enable({"use_reentrant": True})
    truth = truth_of(model, lambda: docs.losses(model))
    model.zero_grad()
    probe = zerosum.Probe(model)

    def step() -> None:
        with probe:
            zerosum.example_ids(docs.batch["input_ids"], position_ids=docs.positions)
            model(**docs.batch).loss.backward()

    with pytest.warns(UserWarning, match="a reentrant checkpoint's result has rows .* in no regular order: the weights inside"):
        step()
    report = probe.report()
    assert set(report) == {"model.norm.weight", "lm_head.weight"}
    assert_truth(report, truth, rtol=RTOL, gram=False, vanishing=VANISHING, refusable=True)


def test_a_compiled_model_runs_uncompiled() -> None:
    model, docs = perturbed(MODELS["llama"]), Documents((3, 2, 4, 1, 2, 2, 3, 3))
    compiled = torch.compile(model, backend="eager")
    truth = truth_of(model, lambda: docs.losses(model))
    probe = zerosum.Probe(compiled)
    for _ in range(4):
        model.zero_grad()
        with probe:
            zerosum.example_ids(docs.batch["input_ids"], position_ids=docs.positions)
            compiled(**docs.batch).loss.backward()
        report = probe.report()
        assert_truth(report, {f"_orig_mod.{k}": g for k, g in truth.items()}, rtol=RTOL, gram=False, vanishing=VANISHING)


# The collator of transformers -----------------------------------------------------------------------------------------------------


def flattened(**options: Any) -> dict[str, Any]:
    from transformers import DataCollatorWithFlattening

    torch.manual_seed(1)
    features = [{"input_ids": tokens(1, n)[0].tolist()} for n in (4, 5, 3)]
    return dict(DataCollatorWithFlattening(return_tensors="pt", **options)(features))


@pytest.mark.parametrize("options", [{}, {"return_flash_attn_kwargs": True, "return_position_ids": False}])
def test_a_flattened_batch_is_not_one_example_without_a_word(options: dict[str, Any]) -> None:
    model, batch = perturbed(MODELS["llama"]), flattened(**options)
    probe = zerosum.Probe(model)
    with pytest.warns(UserWarning, match=r"3 documents in one row.* D_grad .* zerosum.example_ids"), probe:
        model(**batch).loss.backward()
    assert probe.report().num_examples == 1
    with probe:  # it is said once
        model(**batch).loss.backward()


def test_no_word_where_nothing_is_packed_or_all_is_said() -> None:
    model, batch = perturbed(MODELS["llama"]), flattened()
    positions = torch.arange(12)[None]
    with zerosum.Probe(model):
        model(batch["input_ids"], position_ids=positions, labels=batch["input_ids"]).loss.backward()
    with zerosum.Probe(model, num_examples=1):
        model(**batch).loss.backward()
    with (probe := zerosum.Probe(model)):
        zerosum.example_ids(batch["input_ids"], position_ids=batch["position_ids"])
        model(**batch).loss.backward()
    assert probe.report().num_examples == 3


def test_cumulative_lengths_of_the_collator() -> None:
    model, batch = perturbed(MODELS["llama"]), flattened(return_flash_attn_kwargs=True)
    docs = Documents((4, 5, 3))
    assert torch.equal(docs.batch["input_ids"], batch["input_ids"])

    def step() -> None:
        zerosum.example_ids(batch["input_ids"], cu_seqlens=batch["cu_seq_lens_q"])
        model(**batch).loss.backward()

    check(model, lambda: docs.losses(model), step, rtol=RTOL, vanishing=VANISHING, directed=False)


# Fused losses ---------------------------------------------------------------------------------------------------------------------


class FusedLinearCrossEntropy(torch.autograd.Function):
    """As Liger and TRL do it: chunks of rows (R, D), their logits never held, and gradients computed on the way forward."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        valid, total = (targets != IGNORED).sum(), rows.new_zeros(())
        grads, grad_weight = torch.zeros_like(rows), torch.zeros_like(weight)
        for first in range(0, len(rows), 5):
            mine = slice(first, first + 5)
            with torch.enable_grad():
                h, w = rows[mine].detach().requires_grad_(), weight.detach().requires_grad_()
                loss = F.cross_entropy(h @ w.T, targets[mine], reduction="sum") / valid
            grads[mine], g = torch.autograd.grad(loss, (h, w))
            grad_weight += g
            total += loss.detach()
        ctx.save_for_backward(grads, grad_weight)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        grads, grad_weight = ctx.saved_tensors
        return grads * grad, grad_weight * grad, None


def fused_step(model: nn.Module, docs: Documents) -> None:
    """Next tokens: the rows are all but the last, whose targets are the labels but the first."""
    zerosum.example_ids(docs.batch["input_ids"], position_ids=docs.positions)
    h = model.base_model(docs.batch["input_ids"], position_ids=docs.batch["position_ids"]).last_hidden_state
    targets = docs.batch["labels"][:, 1:].flatten()
    FusedLinearCrossEntropy.apply(h[:, :-1].flatten(0, 1), model.lm_head.weight, targets).backward()


@pytest.mark.parametrize("rows", [((4, 5, 3),), ((3, 3, 3),), ((3, 4), (5,))])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_fused_head_is_named_and_what_d_grad_is_over(name: str, rows: tuple[tuple[int, ...], ...]) -> None:
    make = gpt2("sdpa", tie_word_embeddings=False) if name == "gpt2" else MODELS[name]
    model, docs = perturbed(make), Documents(*rows)
    truth = truth_of(model, lambda: docs.losses(model))
    model.zero_grad()
    # The total is formed inside of the function: what a mean over the documents was multiplied by has to be said.
    probe = zerosum.Probe(model, loss_reduction=float(len(docs.documents)))
    with warnings.catch_warnings(record=True) as said, probe:
        warnings.simplefilter("always")
        fused_step(model, docs)
    assert any("lm_head.weight enters the loss by an operation that the probe cannot see" in str(w.message) for w in said)
    report = probe.report()
    assert set(report.coverage.not_covered) == {"lm_head.weight"}
    assert_truth(report, truth, rtol=RTOL, gram=False, vanishing=VANISHING, refusable=True)
    line = next(line for line in str(report).splitlines() if line.startswith("D_grad is over"))
    count, embeddings = len(truth), 2 if name == "gpt2" else 1
    assert line.startswith(f"D_grad is over {count - embeddings - 1} of {count} trainable parameters, without ")
    assert "lm_head.weight (not covered)" in line
    assert line.count("(embedding)") == embeddings


def test_a_rule_covers_the_fused_head() -> None:
    from zerosum.probe.rules import APPLIED

    model, docs = perturbed(MODELS["llama"]), Documents((4, 5, 3))

    @zerosum.rule(FusedLinearCrossEntropy)
    def _(rows: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(rows, weight), targets)

    try:
        check(model, lambda: docs.losses(model), lambda: fused_step(model, docs), rtol=RTOL, vanishing=VANISHING, directed=False)
    finally:
        del APPLIED[FusedLinearCrossEntropy]
