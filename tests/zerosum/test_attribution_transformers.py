"""Real architectures the way they are trained: ``labels=``, classifiers, experts with a balance loss, prompts, packed documents.

The truth is one backward pass for each example's own loss, computed from the logits. N is also the number of heads (4), of
key-value heads (2), of experts (4), of labels (3), and T.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import zerosum
from tests.zerosum.oracle import gradients, trainable
from tests.zerosum.steps import assert_gradients, assert_one_truth, check, check_or_told, quiet, truth_of
from tests.zerosum.transformers_models import IGNORED, PAD, bert, build, decoder, gpt2, lengths_mask, t5, tokens

SIZES = [(3, 6), (4, 6), (4, 4), (2, 5), (1, 6)]
sizes = pytest.mark.parametrize(("n", "t"), SIZES)
# Norms, softmax and the loss are in float32 inside of these models, whatever their parameters.
RTOL = 2e-5
# Attention ignores what is added to all keys: their bias has no gradient but rounding.
VANISHING = ("key.bias", "k_proj.bias")


def perturbed(make: Callable[[], nn.Module], dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    model = make().train()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.2)
    return model.to(dtype)


def classifier(family: str, **config: Any) -> Callable[[], nn.Module]:
    if family == "GPT2":
        dropouts = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
        sizes = dict(n_embd=16, n_layer=2, n_head=4, n_positions=16)
    elif family == "Bert":
        dropouts = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, classifier_dropout=0.0)
        sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24, max_position_embeddings=16)
    else:
        dropouts = {}
        sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=24)
    return build(family, "ForSequenceClassification", "sdpa", **sizes, **dropouts, **config)


def padded(n: int, t: int) -> dict[str, Tensor]:
    torch.manual_seed(1)
    mask = lengths_mask(n, t)
    return {"input_ids": tokens(n, t).masked_fill(mask == 0, PAD), "attention_mask": mask}


FAMILIES = ["GPT2", "Llama", "Qwen2", "Bert"]


@sizes
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_classifier_with_the_loss_outside(family: str, reduction: str, n: int, t: int) -> None:
    """The last token's row of each example is picked by number."""
    model, inputs = perturbed(classifier(family, num_labels=3)), padded(n, t)
    classes = torch.randint(3, (n,))

    def losses() -> Tensor:
        return F.cross_entropy(model(**inputs).logits, classes, reduction="none")

    step = None if reduction == "none" else lambda: F.cross_entropy(model(**inputs).logits, classes, reduction=reduction).backward()
    check(model, losses, step, rtol=RTOL, vanishing=VANISHING, directed=n > 1)


@sizes
@pytest.mark.parametrize("problem", ["single label", "regression", "several labels"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_classifier_with_labels(family: str, problem: str, n: int, t: int) -> None:
    if problem == "regression" and n == 1:
        pytest.skip("the library squeezes the only example away")
    model, inputs = perturbed(classifier(family, num_labels=1 if problem == "regression" else 3)), padded(n, t)
    labels = {
        "single label": torch.randint(3, (n,)),
        "regression": torch.randn(n, dtype=torch.float64),
        "several labels": torch.randint(2, (n, 3)).double(),
    }[problem]

    def losses() -> Tensor:
        logits = model(**inputs).logits
        if problem == "single label":
            return F.cross_entropy(logits, labels, reduction="none")
        if problem == "regression":
            return (logits.squeeze(1) - labels).square()
        return F.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(1)

    check(model, losses, lambda: model(**inputs, labels=labels).loss.backward(), rtol=RTOL, vanishing=VANISHING, directed=n > 1)


# Language models with labels.


def mixtral(experts: str, **config: Any) -> Callable[[], nn.Module]:
    sizes = dict(num_local_experts=4, num_experts_per_tok=2, experts_implementation=experts)
    return decoder("Mixtral", "eager", **sizes, **config)


CAUSAL: dict[str, Callable[[], nn.Module]] = {
    "gpt2": gpt2("sdpa"),
    "gpt2, eager": gpt2("eager"),
    "llama": decoder("Llama", "sdpa"),
    "llama, tied": decoder("Llama", "eager", tie_word_embeddings=True),
    "qwen3": decoder("Qwen3", "sdpa", head_dim=6),
    "gemma2": decoder("Gemma2", "eager", head_dim=4, query_pre_attn_scalar=4, sliding_window=3),
    "mixtral, eager": mixtral("eager"),
    "mixtral, batched_mm": mixtral("batched_mm"),
}


def labels_of(inputs: dict[str, Tensor]) -> Tensor:
    """The tokens themselves, but for the padding and for a part of the first example."""
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, IGNORED)
    labels[0, : labels.shape[1] // 2] = IGNORED
    return labels


def shifted_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, int]:
    """(N,) sums over an example's next tokens, and the number of all."""
    rows = F.cross_entropy(logits.float()[:, :-1].mT, labels[:, 1:], reduction="none")
    return rows.sum(1), int((labels[:, 1:] != IGNORED).sum())


def mean_weight_one(sums: Tensor, valid: int) -> Tensor:
    return sums * len(sums) / valid


@sizes
@pytest.mark.parametrize("divisor", ["tokens", "a number", "a tensor", "steps"])
@pytest.mark.parametrize("name", CAUSAL)
def test_a_language_model_with_labels(name: str, divisor: str, n: int, t: int) -> None:
    """Next tokens: the mean over all valid ones, a sum over ``num_items_in_batch``, and a mean over steps of accumulation."""
    model, inputs = perturbed(CAUSAL[name]), padded(n, t)
    labels = labels_of(inputs)
    items = {"a number": {"num_items_in_batch": 37}, "a tensor": {"num_items_in_batch": torch.tensor(11)}}.get(divisor, {})

    def step() -> None:
        loss = model(**inputs, labels=labels, **items).loss
        (loss / 8 if divisor == "steps" else loss).backward()

    losses = lambda: mean_weight_one(*shifted_losses(model(**inputs).logits, labels))  # noqa: E731
    check(model, losses, step, rtol=RTOL, vanishing=VANISHING, directed=n > 1)


@pytest.mark.parametrize(("n", "t"), [(3, 6), (4, 4), (4, 6)])
def test_experts_in_one_grouped_product_with_labels(n: int, t: int) -> None:
    """In float32: torch's grouped product takes no float64."""
    model, inputs = perturbed(mixtral("grouped_mm"), torch.float32), padded(n, t)
    labels = labels_of(inputs)
    check(
        model,
        lambda: mean_weight_one(*shifted_losses(model(**inputs).logits, labels)),
        lambda: model(**inputs, labels=labels).loss.backward(),
        rtol=1e-4,
    )


@sizes
def test_masked_words_with_labels(n: int, t: int) -> None:
    model, inputs = perturbed(bert("sdpa")), padded(n, t)
    labels = inputs["input_ids"].masked_fill((inputs["attention_mask"] == 0) | (torch.arange(t) % 2 == 1), IGNORED)

    def losses() -> Tensor:
        rows = F.cross_entropy(model(**inputs).logits.mT, labels, reduction="none")
        return mean_weight_one(rows.sum(1), int((labels != IGNORED).sum()))

    check(model, losses, lambda: model(**inputs, labels=labels).loss.backward(), rtol=RTOL, vanishing=VANISHING, directed=n > 1)


@sizes
@pytest.mark.parametrize("gated", [False, True])
def test_a_translation_model_with_labels(gated: bool, n: int, t: int) -> None:
    """The source is N sequences of t positions, the target of 4."""
    model = perturbed(t5(**({"feed_forward_proj": "gated-gelu"} if gated else {})))
    inputs = padded(n, t)
    labels = tokens(n, 4).masked_fill(lengths_mask(n, 4) == 0, IGNORED)

    def losses() -> Tensor:
        logits = model(**inputs, decoder_input_ids=model.prepare_decoder_input_ids_from_labels(labels)).logits
        rows = F.cross_entropy(logits.mT, labels, reduction="none")
        return mean_weight_one(rows.sum(1), int((labels != IGNORED).sum()))

    check(model, losses, lambda: model(**inputs, labels=labels).loss.backward(), rtol=RTOL)


@pytest.mark.parametrize(("n", "t"), [(3, 6), (4, 4)])
def test_questions_with_labels(n: int, t: int) -> None:
    """Two cross entropies over the positions, for the start and the end of an answer. What is added to all positions counts
    nowhere."""
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24, max_position_embeddings=16)
    dropouts = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model, inputs = perturbed(build("Bert", "ForQuestionAnswering", "sdpa", **sizes, **dropouts)), padded(n, t)
    start, end = torch.randint(t, (2, n))

    def losses() -> Tensor:
        out = model(**inputs)
        ends = zip((out.start_logits, out.end_logits), (start, end), strict=True)
        return sum(F.cross_entropy(logits, y, reduction="none") for logits, y in ends) / 2

    check(
        model,
        losses,
        lambda: model(**inputs, start_positions=start, end_positions=end).loss.backward(),
        rtol=RTOL,
        vanishing=(*VANISHING, "layer.1.output.LayerNorm.bias", "qa_outputs.bias"),
    )


@pytest.mark.parametrize("how", [False, True])
@pytest.mark.parametrize(("n", "t"), [(3, 6), (4, 4), (1, 6)])
@pytest.mark.parametrize("name", ["gpt2", "llama", "mixtral, eager"])
def test_gradient_checkpointing_with_labels(name: str, how: bool, n: int, t: int) -> None:
    model, inputs = perturbed(CAUSAL[name]), padded(n, t)
    labels = labels_of(inputs)
    model.activation_checkpointing_enable({"use_reentrant": how})
    check(
        model,
        lambda: mean_weight_one(*shifted_losses(model(**inputs).logits, labels)),
        lambda: model(**inputs, labels=labels).loss.backward(),
        rtol=RTOL,
        vanishing=VANISHING,
        directed=n > 1,
    )


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_accumulation_as_a_trainer_does_it(name: str) -> None:
    """One number of tokens for all micro-batches: an average example of all, or of its micro-batch, weighs one."""
    model, inputs = perturbed(CAUSAL[name]), padded(4, 6)
    labels = labels_of(inputs)
    halves = [slice(0, 2), slice(2, 4)]
    items = int((labels[:, 1:] != IGNORED).sum())

    def step() -> None:
        for part in halves:
            batch = {key: x[part] for key, x in inputs.items()}
            model(**batch, labels=labels[part], num_items_in_batch=items).loss.backward()

    with (probe := zerosum.Probe(model, gram=True)):
        step()
    report, ones = probe.report(), torch.ones(2, 2)
    found = []
    for together in (True, False):

        def losses(together: bool = together) -> Tensor:
            if together:
                return mean_weight_one(*shifted_losses(model(**inputs).logits, labels))
            parts = [shifted_losses(model(**{k: x[p] for k, x in inputs.items()}).logits, labels[p]) for p in halves]
            return torch.cat([mean_weight_one(*part) for part in parts])

        truth = truth_of(model, losses)
        assert set(report) == set(truth)
        try:
            assert_one_truth(report, truth, None, (1.0,), rtol=RTOL, gram=torch.block_diag(ones, ones).bool())
        except AssertionError as error:
            found.append(str(error))
    assert len(found) < 2, found


# Experts with a balance loss.


@pytest.mark.parametrize(("n", "t"), [(3, 6), (4, 6), (4, 4)])
@pytest.mark.parametrize("experts", ["eager", "batched_mm"])
@pytest.mark.parametrize("told", [True, False])
def test_a_balance_loss_inside_of_the_model_refuses_what_it_reaches(told: bool, experts: str, n: int, t: int) -> None:
    """It is over all tokens together. The routers and what lies below them are named; the rest is the examples' own."""
    model = perturbed(mixtral(experts, output_router_logits=True, router_aux_loss_coef=0.5))
    inputs = padded(n, t)
    labels = labels_of(inputs)
    balance = model(**inputs, labels=labels).aux_loss
    names = trainable(model)
    reached = torch.autograd.grad(balance, [model.get_parameter(name) for name in names], allow_unused=True)
    refused = tuple(name for name, g in zip(names, reached, strict=True) if g is not None and g.any())
    assert refused
    assert "lm_head.weight" not in refused
    report = check(
        model,
        lambda: mean_weight_one(*shifted_losses(model(**inputs).logits, labels)),
        lambda: model(**inputs, labels=labels).loss.backward(),
        refused=refused,
        rtol=RTOL,
        **({"num_examples": n} if told else {}),
    )
    assert "lm_head.weight" in report
    with quiet(), pytest.raises(NotImplementedError, match="is not covered"), zerosum.Probe(model, strict=True):
        model(**inputs, labels=labels).loss.backward()


@pytest.mark.parametrize(("n", "t"), [(3, 6), (4, 6), (4, 4)])
@pytest.mark.parametrize("experts", ["eager", "batched_mm"])
def test_a_balance_loss_that_is_marked(experts: str, n: int, t: int) -> None:
    """The same loss, added by the training loop: the report is of the examples' own, all of it."""
    model, inputs = perturbed(mixtral(experts, router_aux_loss_coef=0.5)), padded(n, t)
    labels = labels_of(inputs)

    def step() -> None:
        out = model(**inputs, output_router_logits=True)
        sums, valid = shifted_losses(out.logits, labels)
        (sums.sum() / valid + zerosum.auxiliary(0.5 * out.aux_loss)).backward()

    # Losses (N,) are the examples' losses.
    check(model, lambda: shifted_losses(model(**inputs).logits, labels)[0], step, rtol=RTOL)


# Prompts, packed documents.


@pytest.mark.parametrize(("n", "t", "prompts"), [(3, 5, 2), (4, 4, 4), (3, 5, 3), (1, 5, 2)])
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_prompts_before_the_embeddings(name: str, frozen: bool, n: int, t: int, prompts: int) -> None:
    """As prompt tuning does it: rows of a table are expanded and joined to the embeddings, without targets."""

    class Prompted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base, self.prompt = perturbed(CAUSAL[name]), nn.Embedding(prompts, 16, dtype=torch.float64)
            self.base.requires_grad_(not frozen)

        def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> Any:
            numbers = torch.arange(prompts).unsqueeze(0).expand(len(input_ids), -1)
            embeddings = torch.cat([self.prompt(numbers), self.base.get_input_embeddings()(input_ids)], 1)
            mask = torch.cat([attention_mask.new_ones(len(input_ids), prompts), attention_mask], 1)
            if labels is not None:
                labels = torch.cat([labels.new_full((len(labels), prompts), IGNORED), labels], 1)
            return self.base(inputs_embeds=embeddings, attention_mask=mask, labels=labels)

    torch.manual_seed(0)
    model, inputs = Prompted(), padded(n, t)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, IGNORED)

    def losses() -> Tensor:
        logits = model(**inputs).logits[:, prompts - 1 :]
        rows = F.cross_entropy(logits.float()[:, :-1].mT, labels, reduction="none")
        return mean_weight_one(rows.sum(1), int((labels != IGNORED).sum()))

    check(model, losses, lambda: model(**inputs, labels=labels).loss.backward(), rtol=RTOL)


def packed(lengths: tuple[int, ...]) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Ids (R,), the model's inputs (1, R) as a collator that flattens makes them, and labels without first tokens."""
    torch.manual_seed(1)
    ids = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    positions = torch.cat([torch.arange(length) for length in lengths])
    input_ids = tokens(1, len(ids))
    mask = (ids[:, None] == ids) & torch.ones(len(ids), len(ids)).tril().bool()
    inputs = {"input_ids": input_ids, "position_ids": positions[None], "attention_mask": mask[None, None]}
    return ids, inputs, input_ids.masked_fill(positions == 0, IGNORED)


@pytest.mark.parametrize("lengths", [(4, 5, 3), (3, 3, 3), (2, 2, 2, 2), (6,)])
@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_documents_in_one_row_with_losses_of_each(name: str, told: bool, lengths: tuple[int, ...]) -> None:
    ids, inputs, labels = packed(lengths)
    model = perturbed(CAUSAL[name])

    def losses() -> Tensor:
        rows = F.cross_entropy(model(**inputs).logits[0, :-1], labels[0, 1:], reduction="none")
        return rows.new_zeros(len(lengths)).index_add(0, ids[1:], rows)

    if told:
        check(model, losses, rtol=RTOL, num_examples=len(lengths))
    else:
        check_or_told(model, losses, rtol=RTOL)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_documents_in_one_row_with_labels_are_not_one_example_without_a_word(name: str) -> None:
    """Three documents and one total: the documents are the examples, or something is said."""
    ids, inputs, labels = packed((4, 5, 3))
    model = perturbed(CAUSAL[name])

    def losses() -> Tensor:
        rows = F.cross_entropy(model(**inputs).logits[0, :-1].float(), labels[0, 1:], reduction="none")
        return mean_weight_one(rows.new_zeros(3).index_add(0, ids[1:], rows), int((labels[0, 1:] != IGNORED).sum()))

    check_or_told(model, losses, lambda: model(**inputs, labels=labels).loss.backward(), rtol=RTOL)


@pytest.mark.parametrize("name", ["gpt2", "llama", "mixtral, eager"])
def test_the_step_with_labels_is_the_plain_one(name: str) -> None:
    """Loss to the bit, gradients to rounding, and no random numbers are drawn."""
    model, inputs = perturbed(CAUSAL[name]), padded(4, 6)
    labels = labels_of(inputs)
    torch.manual_seed(2)
    plain = model(**inputs, labels=labels).loss
    plain.backward()
    expected = gradients(model)
    model.zero_grad()
    torch.manual_seed(2)
    state = torch.get_rng_state()
    with zerosum.Probe(model):
        loss = model(**inputs, labels=labels).loss
        loss.backward()
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(loss, plain)
    assert_gradients(gradients(model), expected, RTOL)
