"""TRL's SFTTrainer, whose head is fused, on padded and on packed batches, against one backward pass for each document."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import zerosum
from tests.zerosum.integrations.tiny import BYTES, copy_of, documents, llama
from tests.zerosum.oracle import assert_truth, per_example_gradients, trainable

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
transformers = pytest.importorskip("transformers")

from zerosum.integrations.transformers import ZeroSumCallback  # noqa: E402
from zerosum.integrations.trl import cover_fused_head  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory:UserWarning"),
    # Attention implementations other than FlashAttention: documents are kept apart by position_ids all the same.
    pytest.mark.filterwarnings("ignore:.*[Ff]lash:UserWarning"),
]

# The truth is of the same float32 model; its sums over up to 100 rows are added in another order, through two layers and back.
FLOAT32 = 1e-5


class Recording(trl.SFTTrainer):
    """Keeps the model before the first step."""

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        if not hasattr(self, "before"):
            self.before = copy_of(self.model)
            self.before.forward = type(self.model).forward.__get__(self.before)  # without the fused head
            self.batches = []
        self.batches.append({key: x.clone() for key, x in args[1].items() if isinstance(x, Tensor)})
        return super().training_step(*args, **kwargs)


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({chr(i): i for i in range(BYTES)}, unk_token=chr(3)))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token=chr(0), eos_token=chr(2), unk_token=chr(3))


def trained(tmp_path: Path, callback: ZeroSumCallback, **options: Any) -> Recording:
    settings: dict[str, Any] = dict(
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_steps=1,
        max_grad_norm=0.0,
        learning_rate=0.0,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        gradient_checkpointing=False,
        bf16=False,
        max_length=None,
    )
    data = datasets.Dataset.from_list([{"input_ids": document} for document in documents(8)])
    arguments = trl.SFTConfig(str(tmp_path), **(settings | options))
    made = Recording(llama(), arguments, train_dataset=data, processing_class=tokenizer(), callbacks=[callback])
    made.train()
    return made


def documents_of(batches: list[dict[str, Tensor]]) -> list[Tensor]:
    """The documents of padded and of packed batches, in their order."""
    found = []
    for batch in batches:
        ids = batch["input_ids"]
        if "attention_mask" in batch:
            found += [row[mask.bool()] for row, mask in zip(ids, batch["attention_mask"], strict=True)]
        else:
            starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
            found += [ids[0, a:b] for a, b in zip(starts, [*starts[1:], ids.shape[1]], strict=True)]
    return found


def losses_one_by_one(model: Any, found: list[Tensor]) -> Tensor:
    """(N,): each document alone, Σ of its tokens' losses, divided by the mean number of tokens."""
    sums = [F.cross_entropy(model(d[None]).logits[0, :-1], d[1:], reduction="sum") for d in found]
    return torch.stack(sums) * (len(found) / sum(len(d) - 1 for d in found))


@pytest.mark.parametrize(
    "options",
    [{}, {"padding_free": True}, {"packing": True, "max_length": 32, "per_device_train_batch_size": 2}],
    ids=["padded", "padding-free", "packed"],
)
def test_documents_are_the_examples_and_the_fused_head_is_covered(tmp_path: Path, options: dict[str, Any]) -> None:
    callback = ZeroSumCallback()
    trainer = trained(tmp_path, callback, **options)
    found = documents_of(trainer.batches)
    assert callback.report.num_examples == len(found) == 8
    assert callback.report.coverage.share == 1
    truth = per_example_gradients(losses_one_by_one(trainer.before, found), trainer.before, trainable(trainer.before))
    assert_truth(callback.report, truth, rtol=FLOAT32, gram=False)
    own = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert "mean_token_accuracy" in own  # what TRL gathers for its own log is still there


def test_several_processes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trl.SFTConfig, "world_size", 2)
    with pytest.raises(NotImplementedError, match="several under DistributedDataParallel, got 2 under NO"):
        trained(tmp_path, ZeroSumCallback())


def scores(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, settings: tuple[Any, ...]) -> Tensor:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    return ChunkedLogProbFunction.apply(hidden, weight, bias, targets, *settings, ("entropy",))


class Head(torch.nn.Module):
    def __init__(self, bias: bool, settings: tuple[Any, ...]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = torch.nn.Linear(6, 11, bias=bias, dtype=torch.float64)
        self.settings = settings

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        found = scores(x.flatten(0, 1), self.head.weight, self.head.bias, y.flatten(), self.settings)
        return found[0].view(y.shape), found[1]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("settings", [(1.0, 4, None, 1.0), (0.7, 4, None, 1.3), (0.7, 4, 2.0, 1.3)])
def test_the_fused_head_computes_what_trl_does(bias: bool, settings: tuple[Any, ...]) -> None:
    """With temperature, logits' scale and softcap. TRL's own function computes in float32."""
    cover_fused_head()
    model = Head(bias, settings)
    x, y = torch.randn(3, 5, 6, dtype=torch.float64), torch.randint(11, (3, 5))
    truth = per_example_gradients(-model(x, y)[0].sum(1), model, trainable(model))
    probe = zerosum.Probe(model, loss_reduction="sum")
    with probe:
        log_p, entropy = model(x, y)
        (-log_p).sum(1).sum().backward()
    assert_truth(probe.report(), truth, rtol=1e-5, gram=False)
    torch.testing.assert_close(log_p.double(), model(x, y)[0].double(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(entropy, model(x, y)[1], rtol=0, atol=0)


def test_a_loss_of_the_entropy_is_refused() -> None:
    cover_fused_head()
    model = Head(False, (1.0, 4, None, 1.0))
    x, y = torch.randn(3, 5, 6, dtype=torch.float64), torch.randint(11, (3, 5))
    with zerosum.Probe(model):
        log_p, entropy = model(x, y)
        loss = -log_p.sum() + 0.1 * entropy.sum()
        with pytest.raises(NotImplementedError, match="entropy"):
            loss.backward()
