"""Runs ``zerosum demo``: trains a small GPT, measures it while it trains, and writes a folder with the results.

Needs matplotlib and tqdm (``pip install 'zsl_kernels[demo]'``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from tqdm import tqdm

import zsl_kernels
from zerosum import plots
from zerosum.interrupt import Interrupt
from zerosum.plots import paper
from zerosum.records import Record, record
from zerosum.runs import read_runs
from zerosum.training.comparison import FIRST, compare
from zerosum.training.data import Corpus, standard_library
from zerosum.training.loop import HEAD_SIZE, Settings, Trainer, probe_steps
from zerosum.training.optimizers import recipe
from zerosum.training.run import Folder, Refused, RunFolder, fingerprint
from zerosum.training.summary import Summary, summarize

DONE, DIVERGED, INTERRUPTED = 0, 1, 130
CPU = torch.device("cpu")
FIGURES = ("loss", "interference", "gradients", "layers", "depths")  # the figures that compare several runs


def demo(
    settings: Settings,
    text: Sequence[Path] = (),
    out: Path | None = None,
    sizes: int = 1,
    keep_checkpoints: bool = False,
    device: torch.device = CPU,
    seeds: int = 1,
) -> int:
    """Start or resume the run that the arguments describe, and return the process's exit code.

    Args:
        settings: what determines the run, together with the text and torch's number of threads.
        text: files to train on; the standard library's sources if empty.
        out: the run's folder, or for several runs, the folder that contains theirs. If None, a folder under ``runs`` that is named
            after the configuration.
        sizes: how many models to train on the same batches: the one of ``settings`` and smaller ones before it, each half as wide
            as the next.
        keep_checkpoints: whether to keep the checkpoint of every measured step instead of only the newest one.
        device: where to train. A device other than the CPU is part of the configuration.
        seeds: how often to train each model: with the seed of ``settings`` and the seeds that follow it.

    Raises:
        Refused: the text, the folder or the sizes cannot be used; the message says why.
    """
    widths = halvings(settings.width, sizes)
    corpus = read(text, settings.positions)
    config = configuration(settings, corpus, device)
    source = " given" if text else " of the Python standard library"
    if sizes == seeds == 1:
        folder = RunFolder(out or Path("runs") / f"demo-{fingerprint(config)}", config)
        ended, summary = run(settings, corpus, folder, config, source, keep_checkpoints, device)
        print(f"\n{summary.text()}\n\nIn {folder.path}: {written(folder)}")
        return ended
    each = [[replace(settings, width=width, seed=settings.seed + i) for i in range(seeds)] for width in widths]
    return compare_runs(each, corpus, source, out, keep_checkpoints, device)


def compare_runs(
    settings: Sequence[Sequence[Settings]],
    corpus: Corpus,
    source: str,
    out: Path | None,
    keep_checkpoints: bool,
    device: torch.device,
) -> int:
    """Run every width with every seed, each in its own folder, then write the tables that compare them.

    The same command resumes with the runs that remain. ``settings`` has the seeds of each width.
    """
    widths, seeds = [one[0].width for one in settings], [one.seed for one in settings[0]]
    config = configuration(settings[0][0], corpus, device)
    if len(widths) > 1:
        config["width"] = widths
    if len(seeds) > 1:
        config["seed"] = seeds
    folder = Folder(out or Path("runs") / f"demo-{fingerprint(config)}", config)
    runs: dict[int, list[Sequence[Record]]] = {width: [] for width in widths}
    places: dict[str, str] = {}
    worst = DONE
    for number, one in enumerate((one for group in settings for one in group), 1):
        own = configuration(one, corpus, device)
        parent = folder
        if len(widths) > 1 and len(seeds) > 1:
            parent = Folder(folder.path / f"width-{one.width}", {**own, "seed": seeds})
        own_folder = RunFolder(parent.path / (f"seed-{one.seed}" if len(seeds) > 1 else f"width-{one.width}"), own)
        name = ", ".join([*([f"width {one.width}"] if len(widths) > 1 else []), *([f"seed {one.seed}"] if len(seeds) > 1 else [])])
        print(f"Run {number} of {len(widths) * len(seeds)}: {name}.")
        ended, _ = run(one, corpus, own_folder, own, source, keep_checkpoints, device)
        if ended == INTERRUPTED:
            return ended
        print(f"In {own_folder.path}: {written(own_folder)}\n")
        runs[one.width].append(own_folder.records)
        places[name] = own_folder.path.relative_to(folder.path).as_posix()
        worst = max(worst, ended)
    comparison = compare(runs)
    listed = "\n".join(f"- [{name}]({place}/report.md)" for name, place in places.items())
    figures = paper.write(read_runs([folder.path])[0], folder.path, FIGURES, ("png",), FIRST)
    of = " and ".join([*(["widths"] if len(widths) > 1 else []), *(["seeds"] if len(seeds) > 1 else [])])
    parts = [
        f"# Zero-sum learning in small GPTs of several {of}",
        comparison.markdown(),
        "\n\n".join(f"![{path.stem}]({path.name})" for path in figures),
        f"## Runs\n\n{listed}",
        settings_table(config),
    ]
    folder.write("report.md", "\n\n".join(parts) + "\n")
    print(f"{comparison.text()}\n\nIn {folder.path}: {', '.join(['report.md', *(path.name for path in figures)])}")
    return worst


def halvings(width: int, sizes: int) -> list[int]:
    """Return ``sizes`` widths up to ``width``, each half of the next."""
    unit = HEAD_SIZE << (sizes - 1)
    if width % unit:
        raise Refused(f"--sizes {sizes}: expected --width to be a multiple of {unit}, for it is halved, got {width}")
    return [width >> halved for halved in reversed(range(sizes))]


def run(
    settings: Settings,
    corpus: Corpus,
    folder: RunFolder,
    config: dict[str, Any],
    source: str,
    keep_checkpoints: bool,
    device: torch.device,
) -> tuple[int, Summary]:
    """Run one run until it ends or Ctrl-C stops it. Return the exit code and the run's summary."""
    trainer = Trainer(settings, corpus, device)
    if folder.state:
        trainer.load_state_dict(folder.state)
    introduce(trainer, source)
    print(f"Folder: {folder.path}")
    try:
        if any(entry["kind"] == "cost" for entry in folder.records):
            print("This run is complete already; give another --out, --seed or --steps for a new one.")
            ended = DONE
        else:
            if folder.step:
                print(f"Resuming after step {folder.step}.")
            ended = train(trainer, folder, keep_checkpoints)
        return ended, finish(folder, config)
    finally:
        folder.close()


def introduce(trainer: Trainer, source: str) -> None:
    settings, corpus = trainer.settings, trainer.corpus
    parameters = sum(p.numel() for p in trainer.model.parameters())
    files = f"{corpus.files} file{'' if corpus.files == 1 else 's'}{source}"
    print(f"A GPT of {parameters / 1e6:.2f} M parameters learns to predict the bytes of {files}")
    print(f"({len(corpus.train) / 1e6:.2f} MB, and {len(corpus.held_out) / 1e6:.2f} MB held out).")
    print(f"{settings.steps} steps of {settings.sequences} sequences of {settings.positions} bytes, measured at log-spaced steps.")


def read(text: Sequence[Path], positions: int) -> Corpus:
    """Read the text, and refuse it if it is too short to draw sequences from."""
    try:
        corpus = Corpus.read(text or standard_library())
    except OSError as error:
        raise Refused(f"--text: cannot read {error.filename}: {error.strerror}") from error
    for part, name in ((corpus.train, "train on"), (corpus.held_out, "hold out")):
        if len(part) <= positions:
            raise Refused(
                f"--text: expected more than {positions} bytes (--positions) to {name}, got {len(part)}; "
                "every tenth file is held out, or the last tenth of each of fewer than ten"
            )
    return corpus


def configuration(settings: Settings, corpus: Corpus, device: torch.device) -> dict[str, Any]:
    """Return everything that a run's numbers depend on, apart from the machine."""
    versions = {"torch": torch.__version__, "zsl_kernels": zsl_kernels.__version__}
    there = {} if device.type == "cpu" else {"device": device.type}
    named = asdict(settings)
    if not settings.autocast:  # keeps the configuration of runs from before this option existed
        del named["autocast"]
    rules = {"optimizer_rules": str(recipe(settings.optimizer))}
    return {**named, **rules, "text": corpus.digest, "threads": torch.get_num_threads(), **there, **versions}


def train(trainer: Trainer, folder: RunFolder, keep_checkpoints: bool = False) -> int:
    """Train from the folder's last step to the end, with a record for each step and each probe."""
    steps, probed = trainer.settings.steps, set(probe_steps(trainer.settings.steps))
    with tqdm(total=steps, initial=folder.step, unit="step", disable=None, dynamic_ncols=True) as bar, Interrupt() as interrupt:
        shown: dict[str, str] = {}
        for step in range(folder.step + 1, steps + 1):
            loss = advance(trainer, folder, step, step in probed, shown)
            bar.set_postfix(shown, refresh=False)
            bar.update()
            if not math.isfinite(loss):
                bar.close()
                print(f"Step {step}: the loss is not finite, training stopped. A lower --learning-rate may help.")
                return DIVERGED
            if step in probed or interrupt.asked:
                folder.checkpoint(step, trainer.state_dict(), keep=keep_checkpoints and step in probed)
            if interrupt.asked:
                bar.close()
                print(f"\nStopped after step {step} of {steps}. The same command goes on from there.")
                return INTERRUPTED
        plain, with_probe = ([round(seconds, 6) for seconds in times] for times in trainer.probe_cost())
        folder.append(record("cost", steps, {}, plain_seconds=plain, probed_seconds=with_probe))
    return INTERRUPTED if interrupt.asked else DONE  # an interrupt during the cost measurement also stops the other sizes


def advance(trainer: Trainer, folder: RunFolder, step: int, probed: bool, shown: dict[str, str]) -> float:
    """Train one step and write its records. Return the loss before the step, and update ``shown`` for the progress bar."""
    start = perf_counter()
    probe = trainer.probed_step(step) if probed else None
    trained = probe.trained if probe else trainer.step(step)
    seconds = probe.step_seconds if probe else perf_counter() - start
    folder.append(record("step", step, trained, seconds=round(seconds, 4)))
    if probe:
        about = {"covered": probe.coverage.share, "not_covered": list(probe.coverage.not_covered), "finite": probe.finite}
        folder.append(record("probe", step, probe.measured, seconds=round(probe.around_seconds, 4), **about))
        shown |= {
            label: f"{probe.measured[name].value:.2f}" for label, name in (("D_grad", "D_grad"), ("D_held_out", "held_out.D"))
        }
    loss = trained["train.loss"].value
    shown["loss"] = f"{loss:.3f}"
    return loss


def finish(folder: RunFolder, config: dict[str, Any]) -> Summary:
    """Draw the figures and write the summary of the records."""
    summary = summarize(folder.records)
    figures = plots.write(folder.records, folder.path) if summary.rows else []
    images = "\n\n".join(f"![{path.stem}]({path.name})" for path in figures)
    parts = ["# Zero-sum learning in a small GPT", summary.markdown(), images, settings_table(config)]
    folder.write("report.md", "\n\n".join(parts) + "\n")
    return summary


def settings_table(config: dict[str, Any]) -> str:
    settings = "\n".join(f"| {key} | {value} |" for key, value in config.items())
    return f"## Settings\n\n| | |\n| --- | --- |\n{settings}"


def written(folder: RunFolder) -> str:
    """List the files for the user to look at."""
    figures = sorted(path.name for path in folder.path.glob("*.png"))
    return ", ".join(["report.md", *figures, "metrics.jsonl"])
