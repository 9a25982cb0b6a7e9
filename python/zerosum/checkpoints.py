"""Finds checkpoints and loads them as models that can be measured.

It reads three kinds: runs of ``zerosum demo``, transformers folders, and plain state dicts with a function that builds the model.
It downloads nothing, runs no code from a checkpoint's folder, and loads no unrestricted pickle unless asked to.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import pickle
import re
import sys
import traceback
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zerosum.files import open_file, parse, read_bytes
from zerosum.training.loop import Settings
from zerosum.training.model import GPT, logits_of
from zerosum.training.optimizers import build
from zerosum.training.run import KEPT, Refused, read_checkpoint

Losses = Callable[[nn.Module, Tensor, Tensor], Tensor]

WEIGHTS = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
# The names of other files that training frameworks write beside the weights.
_NOT_WEIGHTS = re.compile(r"(optim|optimizer|scheduler|scaler|rng_state|training_args|train)(_.*)?\.(pt|pth|bin)")
_OPTIMIZERS = ("optimizer.pt", "optim.pt")
# The first pattern that matches gives the step. A bare number may be a version or a size, so it counts only if it is the whole
# name.
_STEPS = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"(?:step|iter|iteration)s?[-_=. ]?(\d+)(?![0-9a-z])",
        r"(?:checkpoint|ckpt)[-_=. ]?(\d+)(?![0-9a-z])",
        r"^model[-_](\d+)$",
        r"^(\d+)$",
    )
)
_LISTED = 8


def next_token_losses(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Return :func:`zerosum.training.model.token_losses` in float32, whatever the dtype of the logits."""
    logits = logits_of(model(x), x)
    return F.cross_entropy(logits.flatten(0, 1).float(), y.flatten(), reduction="none").view(y.shape)


@dataclass(frozen=True)
class Options:
    """Options for checkpoints that do not contain this information themselves.

    Attributes:
        model: "module:function" that builds the model of a plain state dict.
        model_config: the function's keyword arguments.
        losses: "module:function" of ``(model, x, y)`` for the token losses, if they do not follow from the model's logits.
        attention: the attention implementation of a transformers model, "eager" or "sdpa".
        unsafe_pickle: load files that need an unrestricted pickle. Such a file can run any code.
    """

    model: str | None = None
    model_config: Mapping[str, Any] = field(default_factory=dict)
    losses: str | None = None
    attention: str = "sdpa"
    unsafe_pickle: bool = False


@dataclass(frozen=True)
class Loaded:
    """A checkpoint in memory.

    Attributes:
        model: the model with its weights, in float32 and in evaluation mode (no dropout).
        losses: ``losses(model, x, y)`` returns the loss of each predicted token, (N, T).
        vocab: the number of token ids; None if only the losses know it.
        positions: the longest sequence; None if the model does not say.
        optimizer: the optimizer's ``state_dict()``; None if the checkpoint has none.
        build_optimizer: builds the optimizer that the state belongs to; None if it must be inferred from the state alone.
    """

    model: nn.Module
    losses: Losses
    vocab: int | None
    positions: int | None
    optimizer: dict[str, Any] | None
    build_optimizer: Callable[[nn.Module], torch.optim.Optimizer] | None = None

    def weights(self) -> dict[str, Tensor]:
        """Return the trainable parameters' values, not copied."""
        return {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}


@dataclass(frozen=True)
class Checkpoint(ABC):
    """A checkpoint's location; ``load`` reads it."""

    path: Path
    step: int
    options: Options

    @property
    @abstractmethod
    def has_optimizer(self) -> bool:
        """Whether the checkpoint has an optimizer's state."""

    def load(self, optimizer: bool = False) -> Loaded:
        """Read the weights, and with ``optimizer=True`` also the optimizer's state if there is one.

        Raises:
            Refused: the file is damaged, does not fit the model, or needs an unrestricted pickle.
        """
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)  # seeds what a model draws when it is built and no checkpoint stores
                model, state = self._load(optimizer)
        except OSError as error:
            raise Refused(f"{self.path}: cannot read: {error.strerror or error}") from error
        model.eval()
        losses = next_token_losses if self.options.losses is None else _own_losses(self.options.losses)
        return Loaded(model, losses, self._vocab(model), _positions(model), state, self._builder())

    def _builder(self) -> Callable[[nn.Module], torch.optim.Optimizer] | None:
        """Return a function that builds the optimizer that the state belongs to, if known."""
        return None

    @abstractmethod
    def _load(self, optimizer: bool) -> tuple[nn.Module, dict[str, Any] | None]: ...

    @torch.no_grad()
    def _vocab(self, model: nn.Module) -> int | None:
        """Return the width of the logits. This also tests whether the model runs."""
        if self.options.losses is not None:
            return None
        try:
            x = torch.zeros(1, 2, dtype=torch.long)
            return logits_of(model(x), x).shape[-1]
        except Exception as error:
            raise Refused(
                f"{self.path}: the model cannot be measured: called with token ids of shape (1, 2) it says: {_line(error)}; "
                "--losses module:function can say how the losses of tokens are computed"
            ) from error


@dataclass(frozen=True)
class DemoCheckpoint(Checkpoint):
    """A checkpoint of a run of ``zerosum demo``. Its sizes are in the run's ``config.json``."""

    settings: Settings

    has_optimizer = True

    def _load(self, optimizer: bool) -> tuple[nn.Module, dict[str, Any] | None]:
        try:
            model = GPT(self.settings.model)
        except (TypeError, ValueError, RuntimeError) as error:
            raise Refused(f"{self.path}: its run's config.json has the sizes of no model: {_line(error)}") from error
        state = read_checkpoint(self.path, self.step)["state"]
        _fill(model, state["model"], self.path)
        if optimizer:
            for group in state["optimizer"]["param_groups"]:
                group["lr"] = self.settings.rate(self.step + 1)  # the state holds the rate of the step before
        return model, state["optimizer"] if optimizer else None

    def _builder(self) -> Callable[[nn.Module], torch.optim.Optimizer]:
        return lambda model: build(self.settings.optimizer, model, self.settings.learning_rate)


@dataclass(frozen=True)
class TransformersCheckpoint(Checkpoint):
    """A transformers folder: ``config.json`` and safetensors, whole or in shards."""

    @property
    def has_optimizer(self) -> bool:
        return (self.path / "optimizer.pt").exists()

    def _load(self, optimizer: bool) -> tuple[nn.Module, dict[str, Any] | None]:
        if importlib.util.find_spec("transformers") is None:
            raise Refused(f"{self.path}: needs transformers: pip install 'zsl_kernels[checkpoints]'")
        if not list(self.path.glob("*.safetensors")):
            raise Refused(f"{self.path}: expected weights in *.safetensors, found none; save_pretrained() writes them")
        import transformers

        build: Any = transformers.AutoModelForCausalLM.from_pretrained  # its type omits what the last option returns
        with _quiet(transformers):
            try:
                model, found = build(
                    self.path,
                    local_files_only=True,
                    trust_remote_code=False,
                    use_safetensors=True,
                    dtype=torch.float32,
                    attn_implementation=self.options.attention,
                    output_loading_info=True,
                )
            except Exception as error:  # transformers and safetensors raise errors without a common base class
                raise Refused(f"{self.path}: transformers cannot load it: {_line(error)}") from error
        # transformers only warns about missing weights, which it draws at random: the measurements would be meaningless.
        _check_keys(self.path, sorted(found["missing_keys"]), sorted(found["unexpected_keys"]))
        model.config.use_cache = False
        state = read(self.path / "optimizer.pt", self.options.unsafe_pickle) if optimizer and self.has_optimizer else None
        return model, state


@dataclass(frozen=True)
class StateDictCheckpoint(Checkpoint):
    """A file of tensors by name, with or without an optimizer's state, for a model that ``Options.model`` builds."""

    @property
    def has_optimizer(self) -> bool:
        return self._optimizer(self._content()) is not None or self._beside is not None

    @property
    def _beside(self) -> Path | None:
        """The optimizer's file in the same folder, if the folder has no other weights."""
        alone = len(_weight_files(self.path.parent)) == 1
        return next((file for name in _OPTIMIZERS if alone and (file := self.path.parent / name).exists()), None)

    def _content(self) -> Any:
        return read(self.path, self.options.unsafe_pickle)

    def _load(self, optimizer: bool) -> tuple[nn.Module, dict[str, Any] | None]:
        if self.options.model is None:
            raise Refused(f"{self.path}: a state dict does not say how to build its model: --model module:function does")
        build = _function(self.options.model, "--model")
        model = _call(f"--model: {self.options.model}", build, **self.options.model_config)
        if not isinstance(model, nn.Module):
            raise Refused(f"--model: expected {self.options.model} to return a torch.nn.Module, got {type(model).__name__}")
        content = self._content()
        _fill(model.float(), self._tensors(content), self.path)  # float32 first, because copying into bfloat16 rounds
        if not optimizer:
            return model, None
        state = self._optimizer(content)
        return model, read(self._beside, self.options.unsafe_pickle) if state is None and self._beside else state

    def _tensors(self, content: Any) -> dict[str, Tensor]:
        if isinstance(content, nn.Module):  # from an unrestricted pickle
            return content.state_dict()
        names = ("model_state_dict", "state_dict", "model")
        nested = [content[name] for name in names if isinstance(content, Mapping) and isinstance(content.get(name), Mapping)]
        tensors = nested[0] if nested else content
        if not isinstance(tensors, Mapping) or not tensors or not all(isinstance(x, Tensor) for x in tensors.values()):
            raise Refused(f"{self.path}: expected tensors by name, or such under {' or '.join(names)}; got {_described(content)}")
        return dict(tensors)

    @staticmethod
    def _optimizer(content: Any) -> dict[str, Any] | None:
        names = ("optimizer_state_dict", "optimizer", "optim")
        found = [content[name] for name in names if isinstance(content, Mapping) and isinstance(content.get(name), Mapping)]
        return next((state for state in found if "param_groups" in state), None)


@dataclass(frozen=True)
class Series:
    """The checkpoints of a run by step, and the run's name."""

    run: str
    root: Path
    checkpoints: list[Checkpoint]

    def name(self, checkpoint: Checkpoint) -> str:
        """Return the checkpoint's path within the run."""
        path = checkpoint.path
        return path.relative_to(self.root).as_posix() if path != self.root else path.name


def find(path: Path, options: Options | None = None, step: int | None = None) -> Series:
    """Find the checkpoints at ``path``: a file, a checkpoint's folder, or a folder of checkpoints.

    In a folder, this takes the sub-folders that hold checkpoints, or else the files. Their names contain the steps, as in
    ``checkpoint-1000``, ``step_1000`` and ``model-step1000.safetensors``. ``step`` is the step of a single checkpoint whose name
    does not contain it.

    Raises:
        Refused: there is no checkpoint, two have the same step, a name does not contain a step, or a file is damaged.
    """
    options = options or Options()
    path = Path(os.path.abspath(path))  # a run is named after its folder, never ".."
    try:
        found = list(_found(path, options, step))
    except OSError as error:
        raise Refused(f"{error.filename or path}: cannot read: {error.strerror or error}") from error
    if not found:
        kinds = "a run of `zerosum demo`, folders of transformers, or state dicts (" + ", ".join(WEIGHTS) + ")"
        raise Refused(f"{path}: no checkpoint there: expected {kinds}")
    if step is not None and (len(found) > 1 or isinstance(found[0], DemoCheckpoint)):
        raise Refused(f"--step: it is for a single checkpoint whose name does not say its step, not for {path}")
    found.sort(key=lambda checkpoint: checkpoint.step)
    for first, second in pairwise(found):
        if first.step == second.step:
            raise Refused(f"{path}: two checkpoints of step {first.step}: {first.path.name} and {second.path.name}")
    root = path if path.is_dir() else path.parent
    run = root.parent if root.name == KEPT else root
    single = path.is_file() and not isinstance(found[0], DemoCheckpoint)
    return Series(path.stem if single else run.name, root, found)


def step_of(name: str) -> int | None:
    """Return the step that a file's or folder's name contains; None if it contains none."""
    stem = name[: -len(suffix)] if (suffix := Path(name).suffix) in WEIGHTS else name
    return next((int(found[-1]) for pattern in _STEPS if (found := pattern.findall(stem))), None)


def read(path: Path, unsafe_pickle: bool = False) -> Any:
    """Read a file of tensors to the CPU.

    Raises:
        Refused: the file is damaged, or it needs an unrestricted pickle and ``unsafe_pickle`` is not set.
    """
    if path.suffix == ".safetensors":
        open_file(path).close()  # refuses a pipe or a device
        if importlib.util.find_spec("safetensors") is None:
            raise Refused(f"{path}: needs safetensors: pip install 'zsl_kernels[checkpoints]'")
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise Refused(f"{path}: damaged: {_line(error)}") from error
    with open_file(path) as file:  # a file that cannot be read is not damaged
        whole = zipfile.is_zipfile(file)
    try:
        return torch.load(path, map_location="cpu", weights_only=not unsafe_pickle, mmap=whole)
    except pickle.UnpicklingError as error:
        if unsafe_pickle or not whole:
            raise Refused(f"{path}: damaged, or not a file of torch.save") from error
        raise Refused(
            f"{path}: it holds more than tensors and numbers, and loading it could run any code. Save the model's state_dict(); "
            "or, if you trust whoever wrote the file, ask for it: --unsafe-pickle"
        ) from error
    except Exception as error:  # a truncated file may raise an OSError, and a pickle raises whatever its code raises
        raise Refused(f"{path}: damaged, or not a file of torch.save: {type(error).__name__}: {_line(error)}") from error


def _found(path: Path, options: Options, step: int | None) -> Iterator[Checkpoint]:
    if not path.exists():
        raise Refused(f"{path}: no such file or folder")
    if options.model is None and (demo := _demo_run(path)) is not None:
        yield from _of_demo(path, *demo, options)
        return
    if path.is_file():
        yield StateDictCheckpoint(path, _step(path, step), options)
        return
    if options.model is None and (runs := [folder.name for folder in _folders(path) if _demo_run(folder)]):
        raise Refused(f"{path}: expected one run, got a folder of runs of `zerosum demo`: {_listed(runs)}")
    whole = _alone(path, options)
    # A folder that is named like a checkpoint but has no weights is damaged. Other folders may be unrelated.
    folders = [folder for folder in _folders(path) if step_of(folder.name) is not None or (not whole and _alone(folder, options))]
    for folder in folders:
        if (one := _alone(folder, options)) is None:
            raise Refused(f"{folder}: no weights there: expected a transformers folder, or one file of {', '.join(WEIGHTS)}")
        yield replace(one, step=_step(folder, step))
    if whole and not folders:
        yield replace(whole, step=_step(whole.path if step_of(whole.path.name) is not None else path, step))
    elif not folders:
        for file in _weight_files(path):
            yield StateDictCheckpoint(file, _step(file, step), options)


def _alone(folder: Path, options: Options) -> Checkpoint | None:
    """Return the single checkpoint in a folder, with an unknown step; None if there is not exactly one."""
    if options.model is None and "model_type" in _json(folder / "config.json"):
        return TransformersCheckpoint(folder, -1, options)
    files = _weight_files(folder)
    return StateDictCheckpoint(files[0], -1, options) if len(files) == 1 else None


def _folders(path: Path) -> list[Path]:
    return sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _weight_files(folder: Path) -> list[Path]:
    files = (entry for entry in folder.iterdir() if entry.is_file() and entry.suffix in WEIGHTS)
    return sorted(file for file in files if not file.name.startswith(".") and not _NOT_WEIGHTS.fullmatch(file.name))


def _step(path: Path, given: int | None) -> int:
    if given is not None:
        return given
    step = step_of(path.name)
    if step is None and path.is_dir():
        step = _json(path / "trainer_state.json").get("global_step")
    if step is None:
        raise Refused(f"{path}: no step in the name: expected one such as checkpoint-1000 or step_1000 (of one checkpoint: --step)")
    return step


def _demo_run(path: Path) -> tuple[Path, Settings] | None:
    """Return the folder and the settings of the ``zerosum demo`` run that a path is in; None if it is in no such run."""
    for folder in (path, path.parent, path.parent.parent) if path.name != KEPT else (path, path.parent):
        config = _json(folder / "config.json")
        known = {f.name: config[f.name] for f in fields(Settings) if f.name in config}
        names = {f.name for f in fields(Settings)} - {"autocast", "optimizer"}  # not every run's configuration has these
        # Runs of several sizes or seeds have a folder each, inside a folder whose configuration lists the sizes or seeds.
        one = all(isinstance(config.get(name), int) for name in ("width", "seed"))
        if one and names | {"zsl_kernels"} <= config.keys() and (folder == path or _is_of_demo(path, folder)):
            return folder, Settings(**known)
    return None


def _is_of_demo(path: Path, folder: Path) -> bool:
    return path in (folder / "checkpoint.pt", folder / KEPT) or path.parent == folder / KEPT


def _of_demo(path: Path, folder: Path, settings: Settings, options: Options) -> Iterator[Checkpoint]:
    kept = sorted((folder / KEPT).glob("*.pt")) if path in (folder, folder / KEPT) else []
    steps = set()
    for file in [path] if path.is_file() else [*kept, *([folder / "checkpoint.pt"] if path == folder else [])]:
        if not file.exists():
            continue  # the run has not reached its first checkpoint
        content = read(file)
        if not isinstance(content, dict) or content.keys() != {"step", "state"}:
            raise Refused(f"{file}: not a checkpoint of `zerosum demo`: {_described(content)}")
        named = step_of(file.name)
        if named is not None and named != content["step"]:
            raise Refused(f"{file}: expected the checkpoint of step {named}, as its name says, got step {content['step']}")
        if content["step"] not in steps:  # the newest may also be among the kept ones
            steps.add(content["step"])
            yield DemoCheckpoint(file, content["step"], options, settings)


def _fill(model: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Load tensors into the model. Every tensor of the model must be there, and no other."""
    own = model.state_dict()
    for prefix in ("module.", "_orig_mod.", "model.") * 2:  # the prefixes of DistributedDataParallel, torch.compile and Lightning
        if all(name.startswith(prefix) for name in tensors) and not all(name.startswith(prefix) for name in own):
            tensors = {name.removeprefix(prefix): x for name, x in tensors.items()}
    quantized = [name for name, x in tensors.items() if name in own and own[name].is_floating_point() > x.is_floating_point()]
    if quantized:
        got = f"{tensors[quantized[0]].dtype} in {_listed(quantized)}"
        raise Refused(f"{path}: does not fit the model: expected floating-point weights, got {got}")
    try:
        missing, unexpected = model.load_state_dict(tensors, strict=False)
    except RuntimeError as error:  # the shapes do not match
        raise Refused(f"{path}: does not fit the model: {_line(error)}") from error
    places = {_place(x) for name, x in own.items() if name in tensors}
    _check_keys(path, [name for name in missing if _place(own[name]) not in places], unexpected)  # tied weights are saved once


def _place(x: Tensor) -> tuple[object, ...]:
    return x.data_ptr(), tuple(x.shape), x.stride()


def _check_keys(path: Path, missing: list[str], unexpected: list[str]) -> None:
    said = [f"{title} {_listed(names)}" for title, names in (("missing:", missing), ("unexpected:", unexpected)) if names]
    if said:
        raise Refused(f"{path}: does not fit the model: {'; '.join(said)}")


def _listed(names: list[str]) -> str:
    return ", ".join(names[:_LISTED]) + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")


def _function(spec: str, option: str) -> Callable[..., Any]:
    """Import ``module:function``. Modules in the current folder are also found."""
    module, _, name = spec.partition(":")
    if not module or not name.isidentifier():
        raise Refused(f"{option}: expected module:function, got {spec!r}")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise Refused(f"{option}: cannot import {spec}: {error}") from error
    except Exception as error:
        raise Refused(f"{option}: cannot import {spec}: {type(error).__name__}: {_line(error)}") from error
    if not callable(function):
        raise Refused(f"{option}: expected a function, {spec} is of type {type(function).__name__}")
    return function


def _call(what: str, function: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
    """Call the user's function. If it fails, the message says where."""
    try:
        return function(*arguments, **keywords)
    except NotImplementedError:  # an operation lacks a forward-mode derivative; everything else is measured
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)[1:]  # the first frame is this call
        place = f" ({frames[0].filename}, line {frames[0].lineno})" if frames else ""
        raise Refused(f"{what} raises {type(error).__name__}: {_line(error)}{place}") from error


def _own_losses(spec: str) -> Losses:
    function = _function(spec, "--losses")

    def losses(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        found = _call(f"--losses: {spec}", function, model, x, y)
        if not isinstance(found, Tensor) or found.shape != y.shape:
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise Refused(f"--losses: expected {spec} to return a loss for each token, {tuple(y.shape)}, got {got}")
        return found

    return losses


def _positions(model: nn.Module) -> int | None:
    names = ("max_position_embeddings", "n_positions", "positions", "block_size")
    sizes = (getattr(getattr(model, "config", None), name, None) for name in names)
    return next((size for size in sizes if isinstance(size, int)), None)


def _json(path: Path) -> dict[str, Any]:
    """Read a file's JSON object; empty if there is none."""
    if not path.is_file():
        return {}
    try:
        content = parse(read_bytes(path))
    except ValueError as error:
        raise Refused(f"{path}: damaged: {error}") from None
    return content if isinstance(content, dict) else {}


def _described(content: Any) -> str:
    if not isinstance(content, Mapping):
        return type(content).__name__
    return f"a dictionary of {_listed(sorted(map(str, content)))}" if content else "an empty dictionary"


def _line(error: Exception) -> str:
    """Return an error's text on one line."""
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Turn off transformers' progress bars and its loading report. Missing weights are an error here."""
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
