"""``zerosum measure``: measures zero-sum learning at checkpoints."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from zerosum.cli.arguments import add_autocast, add_command, add_device, chosen, memory, missing, positive, refuse, span, whole
from zerosum.files import parse, read_bytes
from zerosum.metrics import METRICS
from zerosum.terminal import shown

if TYPE_CHECKING:
    from zerosum.checkpoints import Checkpoint, Loaded
    from zerosum.evaluation import Sample
    from zerosum.measurement import Measurement
    from zerosum.records import Record, RecordFile

DESCRIPTION = """\
Measures zero-sum learning at checkpoints: how far the gradients of examples, and the
changes of tokens' losses, cancel. Each checkpoint becomes one line of JSON.

CHECKPOINTS is one checkpoint or a folder of them:
  - a run of `zerosum demo` (with --keep-checkpoints for more than its newest);
  - folders of transformers: config.json and *.safetensors, as in checkpoint-1000;
  - state dicts (.safetensors, .pt, .pth, .bin, .ckpt) with --model module:function.
Nothing is downloaded. Files that are more than tensors and numbers are refused: loading
such a pickle could run any code.

What is measured, over the N sequences of T tokens that are drawn from DATA:
  D_grad, C_g, ...  of the gradients of examples. An example is a sequence; or a position,
                    a cheap proxy; or a token, as in the paper, exact or from --sample
  C_g, C_uG, C_ug   along an update: the step that the checkpoint's own optimizer makes
                    ("optimizer"), minus a gradient ("gradient"), or the way to the next
                    checkpoint ("next")
  held_out, train   loss changes of tokens by that one step, on DATA and on the batch that
                    the step is from ("gradient" needs --learning-rate for it)
  interval          loss changes of tokens since the checkpoint before

Ctrl-C finishes the present checkpoint, a second one drops it; the same command goes on.
"""

EXAMPLES = """\
examples:
  a run of the demo, on some text:
    zerosum demo --keep-checkpoints --out runs/demo
    zerosum measure runs/demo --data held-out.txt
  a folder of transformers' checkpoints, on token ids, from some training data:
    zerosum measure out/ --data val.bin --train-data train.bin --positions 256
    zerosum measure out/checkpoint-500 --data val.txt    (by the tokenizer in that folder)
    zerosum measure out/ --data val.txt --tokenizer base-model/
  state dicts, with the function `build` of model.py that returns the model:
    zerosum measure ckpt/ --model model:build --data val.npy --update next
  the paper's measure, one example for each token, from 2000 tokens:
    zerosum measure out/ --data val.bin --examples token --sample 2000
"""

COLUMNS = ("loss", *(name for name, metric in METRICS.items() if metric.column), "train.D", "held_out.D", "interval.D")


def add(commands: Any) -> None:
    parser = add_command(commands, "measure", run, "measure checkpoints", DESCRIPTION, EXAMPLES)
    add = parser.add_argument
    add("checkpoints", type=Path, metavar="CHECKPOINTS", help="a checkpoint, or a folder of them")
    add("--out", type=Path, metavar="FILE", help="where the lines go (measured-NAME.jsonl)")
    add("--name", metavar="NAME", help="the run's name in the lines (that of its folder)")
    add("--steps", type=span, default=(0, 2**63 - 1), metavar="A:B", help="measure checkpoints from step A to B only")
    add("--step", type=whole(0), metavar="N", help="the step of a single checkpoint whose name does not say it")
    add_device(add, "measure")
    add_autocast(add, "compute gradients")
    add("--threads", type=whole(1, os.cpu_count() or 1), metavar="N", help="processor threads (torch's choice)")

    add = parser.add_argument_group("data").add_argument
    add("--data", type=Path, required=True, metavar="FILE", help="text, .jsonl of texts or ids, or ids in .bin or .npy")
    add("--train-data", type=Path, metavar="FILE", help="where the step's batch is from (other sequences of --data)")
    add("--sequences", type=whole(1), default=8, metavar="N", help="sequences to measure on (%(default)s)")
    add("--positions", type=whole(1), metavar="T", help="tokens in a sequence (the model's longest, at most 1024)")
    add("--train-sequences", type=whole(1), metavar="N", help="sequences in the step's batch (as many as --sequences)")
    add("--seed", type=whole(0), default=0, metavar="N", help="fixes what is drawn (%(default)s)")
    add("--dtype", choices=("uint16", "uint32"), default="uint16", help="of the ids in a .bin file (%(default)s)")
    add("--field", metavar="NAME", help="of a .jsonl file (input_ids, tokens or text, whichever it has)")
    add("--tokenizer", type=Path, metavar="DIR", help="transformers' tokenizer for text (the checkpoint's, or bytes)")
    add("--evaluation-name", metavar="NAME", help="what to call DATA in the lines (its file's name)")

    add = parser.add_argument_group("what to measure").add_argument
    add("--examples", choices=("sequence", "position", "token"), default="sequence", help="(%(default)s)")
    add("--sample", type=whole(8), metavar="N", help="tokens to sample, for --examples token (all, exactly)")
    add("--update", choices=("optimizer", "gradient", "next", "none"), help="(optimizer where its state is there, or gradient)")
    add("--learning-rate", type=positive, metavar="X", help="of the step (the optimizer's; a gradient's has none)")
    add("--clip", type=positive, default=1.0, metavar="X", help="norm that the step's gradient is clipped to (%(default)s)")
    add("--memory", type=memory, default=memory("2GB"), metavar="SIZE", help="for gradients of tokens (2GB)")

    add = parser.add_argument_group("how to load").add_argument
    add("--model", metavar="MODULE:FUNCTION", help="builds the model of state dicts; modules of this folder are found")
    add("--model-config", type=_keywords, default={}, metavar="JSON", help="its keyword arguments, or a .json file of them")
    add("--losses", metavar="MODULE:FUNCTION", help="(model, x, y) to token losses (N, T), where they are not of its logits")
    add("--attention", choices=("sdpa", "eager"), default="sdpa", help="of transformers' models (%(default)s)")
    add("--unsafe-pickle", action="store_true", help="load any pickle: runs whatever code is in the file")


def run(options: argparse.Namespace) -> int:
    if absent := missing("tqdm"):
        return refuse("measure", absent)
    if options.sample and options.examples != "token":
        return refuse("measure", f"--sample: only --examples token samples, not --examples {options.examples}")
    # Imported here, because `zerosum doctor` must work without them.
    from zerosum.records import RecordFile
    from zerosum.runs import RunError, check_record

    if options.threads:
        torch.set_num_threads(options.threads)
    measurement, selected = prepare(options)
    out = options.out or Path(f"measured-{measurement.series.run}.jsonl")
    try:
        file = RecordFile(out)
    except ValueError as error:
        return refuse("measure", f"--out: {error}; choose another file")
    except OSError as error:
        return refuse("measure", f"--out: cannot use {out}: {error.strerror or error}")
    with file:
        try:
            for number, entry in enumerate(file.records, 1):
                check_record(entry, f"{out} line {number}")
        except RunError as error:
            return refuse("measure", f"--out: {error}; choose another file")
        waiting = unmeasured(measurement, selected, file)
        introduce(measurement, selected, waiting)
        ended = measure(measurement, waiting, file)
        finish([entry for entry in file.records if entry.get("run") == measurement.series.run], out)
    return ended


def prepare(options: argparse.Namespace) -> tuple[Measurement, list[Checkpoint]]:
    """Find the checkpoints, inspect the first one, and draw the data."""
    from zerosum.checkpoints import Options, TransformersCheckpoint, find
    from zerosum.evaluation import tokenizer_in
    from zerosum.measurement import Measurement, Settings
    from zerosum.training.run import Refused

    names = ("model", "model_config", "losses", "attention", "unsafe_pickle")
    series = find(options.checkpoints, Options(**{name: getattr(options, name) for name in names}), options.step)
    series = replace(series, run=options.name or series.run)
    first, last = options.steps
    update = options.update
    selected = [checkpoint for checkpoint in series.checkpoints if first <= checkpoint.step <= last]
    if update == "next":
        selected = [checkpoint for checkpoint in selected if checkpoint is not series.checkpoints[-1]]
    if not selected:
        there = ", ".join(str(checkpoint.step) for checkpoint in series.checkpoints)
        needed = " with a next one" if update == "next" else ""
        raise Refused(f"no checkpoint{needed} between the steps of --steps: there are steps {there}")
    if update is None:
        update = "optimizer" if selected[0].has_optimizer else "gradient"
    how = (options.learning_rate, options.clip, options.seed, options.autocast)
    settings = Settings(options.examples, options.sample, update, *how)
    if options.tokenizer is None and isinstance(selected[0], TransformersCheckpoint):
        options.tokenizer = tokenizer_in(selected[0].path)
    evaluation, batch = draw(options, selected[0].load(), update in ("optimizer", "gradient"))
    return Measurement(series, settings, evaluation, batch, options.memory, chosen(options.device)), selected


def draw(options: argparse.Namespace, loaded: Loaded, step: bool) -> tuple[Sample, Sample | None]:
    """Draw the evaluation set and the step's batch, which comes from another file or from the rest of the same file."""
    from zerosum.evaluation import Sample, TokenData
    from zerosum.training.run import Refused

    longest = loaded.positions
    if options.positions is None and longest is None:
        raise Refused("--positions: the model does not say how long its sequences may be")
    positions = options.positions or min(longest or 0, 1024)
    if longest is not None and positions > longest:
        raise Refused(f"--positions: expected at most {longest}, the longest sequence of the model, got {positions}")

    def data(path: Path) -> TokenData:
        return TokenData.read(path, options.dtype, options.tokenizer, options.field)

    held_out = data(options.data)
    wanted = options.train_sequences or options.sequences
    apart = step and options.train_data is not None and options.train_data.resolve() != options.data.resolve()
    sizes = [options.sequences] + [wanted] * (step and not apart)
    drawn = held_out.draw(sizes, positions, options.seed, loaded.vocab)
    if apart:
        drawn += data(options.train_data).draw([wanted], positions, options.seed, loaded.vocab)
    name = options.evaluation_name or options.data.name
    samples = [Sample(name, *drawn[0])]
    samples += [Sample(options.train_data.name if apart else name, *d) for d in drawn[1:]]
    return samples[0], samples[1] if step else None


def unmeasured(measurement: Measurement, selected: Sequence[Checkpoint], file: RecordFile) -> list[Checkpoint]:
    """Return the checkpoints that have no record in the file yet.

    Raises:
        Refused: the file has records of the run that were measured in another way.
    """
    from zerosum.training.run import Refused, differences

    series = measurement.series
    steps = {checkpoint.step: checkpoint for checkpoint in series.checkpoints}
    done = set()
    for entry in file.records:
        if entry["kind"] != "checkpoint" or entry.get("run") != series.run:
            continue
        entry = {
            **entry,
            "settings": {"autocast": False} | (entry.get("settings") or {}),
        }  # older files were measured without it, and do not record it
        # If a step's checkpoint is no longer in the folder, its neighbors are unknown.
        like = measurement.identity(steps.get(entry["step"], selected[0]))
        own = set() if entry["step"] in steps else {"checkpoint", "interval"}
        there, here = ({k: v for k, v in _flat(x).items() if k in _flat(like) and k not in own} for x in (entry, like))
        if differing := differences(there, here):
            raise Refused(
                f"--out: {file.path} has run {series.run!r} measured in another way, step {entry['step']}: {differing}; "
                "choose another file, or another --name"
            )
        done.add(entry["step"])
    return [checkpoint for checkpoint in selected if checkpoint.step not in done]


def introduce(measurement: Measurement, selected: Sequence[Checkpoint], waiting: Sequence[Checkpoint]) -> None:
    series, evaluation, settings = measurement.series, measurement.evaluation, measurement.settings
    sequences, positions = evaluation.x.shape
    several = f"{len(selected)} checkpoints of {shown(series.run)}, steps {selected[0].step} to {selected[-1].step}"
    parts = [several if len(selected) > 1 else f"One checkpoint of {shown(series.run)}, step {selected[0].step}"]
    if len(waiting) < len(selected):
        parts.append(f"{len(selected) - len(waiting)} measured already")
    print("; ".join(parts) + ".")
    how = f"{sequences} sequences of {positions} tokens of {shown(evaluation.name)} ({evaluation.digest})"
    sampled = f", {settings.sample} of them sampled" if settings.sample else ""
    print(f"Measured on {how}; an example is a {settings.examples}{sampled}; update: {settings.update}.")


def measure(measurement: Measurement, waiting: Sequence[Checkpoint], file: RecordFile) -> int:
    """Measure and write one checkpoint after another; return the process's exit code."""
    from tqdm import tqdm

    from zerosum.interrupt import Interrupt

    with tqdm(total=len(waiting), unit="checkpoint", disable=None, dynamic_ncols=True) as bar, Interrupt() as interrupt:
        for number, checkpoint in enumerate(waiting, 1):
            bar.set_description(f"step {checkpoint.step}")
            with tqdm(unit="token", disable=None, dynamic_ncols=True, leave=False, delay=1) as tokens:

                def progress(done: int, total: int, tokens: Any = tokens) -> None:
                    tokens.total = total
                    tokens.update(done - tokens.n)

                file.append(measurement.measure(checkpoint, progress))
            bar.update()
            if interrupt.asked and number < len(waiting):
                bar.close()
                print(f"\nStopped after step {checkpoint.step}: {len(waiting) - number} left. The same command goes on from there.")
                return 130
    return 0


def finish(records: list[Record], out: Path) -> None:
    """Print a table of the file's records, and what the user can do with them."""
    if not records:
        return
    names = [name for name in COLUMNS if any(name in entry["metrics"] for entry in records)]
    records = sorted(records, key=lambda entry: entry["step"])
    rows = [["step", *names], *([str(entry["step"]), *(_cell(entry, name) for name in names)] for entry in records)]
    found = [(name, entry["metrics"].get(name)) for entry in records for name in names]
    # Take the last step at which the metric has a value.
    last: dict[str, dict[str, Any]] = {name: metric for name, metric in found if metric and metric.get("value") is not None}
    below = [["random signs", *(_number(last.get(name, {}).get("null"), "") for name in names)]]
    if any("error" in metric for metric in last.values()):
        below.append(["standard error", *(_number(last.get(name, {}).get("error"), "") for name in names)])
    rows += below
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.rjust, row, widths)) for row in rows]
    rule = "─" * len(lines[0])
    print("\n".join(["", lines[0], rule, *lines[1 : -len(below)], rule, *lines[-len(below) :]]))
    print(_over(records, names))
    if len(records) > 1:
        print(f"{' and '.join(line[0] for line in below).capitalize()}: at the last step where a column has a value.")
    if lost := [str(entry["step"]) for entry in records if _missing(entry)]:
        print(f"The loss is not finite at step {', '.join(lost)}: — stands for what has no value.")
    if uncovered := {name: reason for entry in records for name, reason in (entry.get("not_covered") or {}).items()}:
        name, reason = next(iter(uncovered.items()))
        more = f" and {len(uncovered) - 1} more" if len(uncovered) > 1 else ""
        least = min(entry.get("covered") or 0 for entry in records)
        print(f"At least {least:.1%} of the coordinates covered; not: {shown(name)}{more} ({shown(reason)}).")
    print(f"\nIn {shown(out)}. Next: zerosum plot {shown(out)}")


def _missing(entry: Record) -> bool:
    """Whether the loss is not finite."""
    loss = entry["metrics"].get("loss")
    return loss is None or loss.get("value") is None


def _over(records: list[Record], names: Sequence[str]) -> str:
    """Describe what the columns are over."""
    counts = {n for entry in records if (n := (entry["metrics"].get("D_grad") or {}).get("n"))}
    gradients = "D_grad and C are" if "C_g" in names else "D_grad is"
    over = f"{gradients} over {_counts(counts)} {records[-1]['examples']}s" if counts else "No gradient was covered"
    if counts and records[-1].get("sampled") is not None:
        over += f", estimated from {records[-1]['sampled']} draws"
    evaluation, train = records[-1]["evaluation"], records[-1]["train"]
    over += f"; losses and their changes over {_tokens(evaluation)}"
    return over + (f", train.D over {_tokens(train)}, the step's batch." if "train.D" in names else ".")


def _tokens(data: dict[str, Any]) -> str:
    return f"{data['sequences'] * data['positions']} tokens of {shown(data['name'])}"


def _cell(entry: Record, name: str) -> str:
    metric = entry["metrics"].get(name)
    return "" if metric is None else _number(metric.get("value"))


def _number(x: float | None, none: str = "—") -> str:
    return none if x is None or not math.isfinite(x) else f"{x:.4f}"


def _counts(counts: set[int]) -> str:
    return " or ".join(map(str, sorted(counts)))


def _flat(x: dict[str, Any]) -> dict[str, Any]:
    """Flatten nested dictionaries to keys such as "a.b", so that a difference can be named."""
    flat: dict[str, Any] = {}
    for key, value in x.items():
        flat |= {f"{key}.{inner}": v for inner, v in value.items()} if isinstance(value, dict) else {key: value}
    return flat


def _keywords(text: str) -> dict[str, Any]:
    try:
        found = parse(read_bytes(Path(text)) if text.endswith(".json") else text)
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"expected a JSON object or a .json file of one: {error}") from None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object, got {text!r}")
    return found
