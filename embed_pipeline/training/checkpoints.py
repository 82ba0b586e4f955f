"""Checkpoints of a training: written whole or not at all, verified before use, and exact.

A training that goes on from one ends with the weights of one that was never interrupted, bit by bit on a CPU: besides
weights and optimizer a checkpoint holds every rank's random numbers, the place in the data, what dev has said, and the
log. It is a folder `step-<N>` whose manifest.json is written last and names the job that wrote it. Nothing else is ever
read, and no pickle is: of what torch saved, tensors and plain values alone are loaded. One that cannot be used is set
aside, and the next older one is tried.

They lie in `checkpoints` of the job's output, which may be a link to a folder that outlives the output. A training that
is asked to end (cancelled, preempted) writes one first, if it is fast enough for its torchrun. Where none can be
written, or somebody deletes the folder, the training goes on without.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_pt_utils import safe_globals

from embed_pipeline.artifacts import sha256_of
from embed_pipeline.model_files import CHECKPOINTS_FOLDER, TRAINING_LOG_FILE
from embed_pipeline.training.callbacks import DevEvaluation
from embed_pipeline.training.dev_choice import State
from embed_pipeline.training.engines import Prepared
from embed_pipeline.training.job import TrainingJob
from embed_pipeline.training.modules import learnt_by_losses, losses_of
from embed_pipeline.training.process import Rank, from_all, from_main, wait
from embed_pipeline.training.reporting import Reporter

logger = logging.getLogger(__name__)

KEPT = 2  # the newest, and one more should it be broken
# Beside them lies what was found about the memory before the first step: a training that goes on keeps it.
BATCH_SIZE_FILE, SUB_BATCH_SIZE_FILE = "batch_size.json", "sub_batch_size.json"
_MANIFEST = "manifest.json"
_PROGRESS = "progress.json"
_WEIGHTS = "weights.pt"
_BEST = "best.safetensors"
_STATE = "trainer_state.json"
_STEP = re.compile(r"step-(\d+)")
_PARTIAL = re.compile(r"\.step-\d+-[0-9a-f]{8}")
_LIBRARIES = ("torch", "transformers", "accelerate", "sentence-transformers", "FlagEmbedding", "peft")


class Checkpoints(TrainerCallback):
    """Writes one every `checkpoint_minutes`, and lets a training begin at the newest good one.

    Goes last among the callbacks, so that what the others did in a step is in the checkpoint of that step.
    """

    def __init__(
        self,
        job: TrainingJob,
        rank: Rank,
        prepared: Prepared[Any],
        evaluation: DevEvaluation,
        reporter: Reporter | None,
    ) -> None:
        self.folder = job.output / CHECKPOINTS_FOLDER
        self.log = job.output / TRAINING_LOG_FILE
        self.minutes = job.settings.checkpoint_minutes
        self.is_main, self.evaluation, self.reporter = rank.is_main, evaluation, reporter
        self.writer = _writer(job, rank, prepared)
        self.saved_at = time.monotonic()
        # The place in the data: the epoch, and how many of its steps were made when the training began.
        self.epoch, self.steps = 0, 0
        self.epoch_began = 0
        self.steps_before, self.seconds_before = 0, 0.0
        self.asked_to_end = False
        # Of what is being written: two trainings that believe to be alone do not write into each other's folders.
        self.token = from_main(secrets.token_hex(4))
        # transformers saves and loads for its own kinds of model; when, where and what are ours.
        self.trainer = cast("Any", prepared.trainer)
        self.init_training_state = self.trainer._init_training_state
        self.trainer._save_checkpoint = lambda model, trial: self.save()
        self.trainer._load_from_checkpoint = self._load_weights
        self.trainer._init_training_state = self._init_training_state

    def resume(self) -> str | None:
        """The newest checkpoint, for `Trainer.train`; what is not the Trainer's own is taken up here."""
        newest = self._begin() if self.is_main else None
        name = from_main(newest and newest.name)
        if name is None:
            return None
        found = self.folder / name
        told = json.loads((found / _PROGRESS).read_text())
        self.epoch, self.steps = told["epoch"], told["steps"]
        self.steps_before, self.seconds_before = told["step"], told["seconds"]
        self.evaluation.go_on(told["dev"], found / _BEST)
        if self.reporter is not None:
            self.reporter.go_on(found / TRAINING_LOG_FILE, told["seconds"])
            logger.info("going on after step %d, from %s", told["step"], found)
        return str(found)

    # ------------------------------------------------------------------------------- events of the Trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.epoch -= 1
        # torchrun sends SIGTERM to every rank, and SIGKILL some seconds later.
        if self.minutes is not None and "TORCHELASTIC_RUN_ID" in os.environ:
            signal.signal(signal.SIGTERM, lambda *_: setattr(self, "asked_to_end", True))

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **named: Any
    ) -> None:
        self.epoch += 1
        self.epoch_began, self.steps = state.global_step - self.steps, 0
        # Not every sampler is reached by accelerate, and fewer are when batches are skipped.
        for part in _parts(named["train_dataloader"]):
            part.set_epoch(self.epoch)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.minutes is None or control.should_training_stop or state.global_step >= state.max_steps:
            return
        logged = state.global_step % max(1, int(args.logging_steps)) == 0
        if logged:  # the ranks have to agree, which costs a little
            due = time.monotonic() - self.saved_at >= self.minutes * 60
            told = from_all((due, self.asked_to_end))
            self.asked_to_end = any(asked for _, asked in told)
            control.should_save = told[0][0]
        if self.asked_to_end and (logged or args.world_size == 1):
            control.should_save = True

    # ----------------------------------------------------------------------------------------------- writing

    def save(self) -> None:
        """Every rank comes here after the same step. Where it cannot be written, the training goes on without it."""
        step = self.trainer.state.global_step
        partial = self.folder / f".step-{step}-{self.token}"
        error = from_main(_made(partial) if self.is_main else None)
        errors = [error] if error else [told for told in from_all(self._write(partial, step)) if told]
        if self.is_main:
            if not errors:
                errors = [told for told in (self._publish(partial, step),) if told]
            if errors:
                shutil.rmtree(partial, ignore_errors=True)
                logger.warning("step %d has no checkpoint, the training goes on: %s", step, errors[0])
        self.saved_at = time.monotonic()
        if self.asked_to_end:
            wait()
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)

    def _write(self, folder: Path, step: int) -> str | None:
        """This rank's part; what went wrong."""
        try:
            self.trainer._save_optimizer_and_scheduler(str(folder))
            self.trainer._save_scaler(str(folder))
            self.trainer._save_rng_state(str(folder))
            if self.is_main:
                assert self.reporter is not None
                self.trainer.state.save_to_json(str(folder / _STATE))
                torch.save(_tensors(self.trainer), folder / _WEIGHTS)
                if self.evaluation.best_weights.is_file():
                    shutil.copyfile(self.evaluation.best_weights, folder / _BEST)
                shutil.copyfile(self.log, folder / TRAINING_LOG_FILE)
                progress = {
                    "step": step,
                    "epoch": self.epoch,
                    "steps": step - self.epoch_began,
                    "seconds": self.reporter.seconds,
                    "dev": self.evaluation.told(),
                }
                (folder / _PROGRESS).write_text(json.dumps(progress))
        except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
            return str(error)
        return None

    def _publish(self, partial: Path, step: int) -> str | None:
        """Name what every rank has written to; what went wrong."""
        try:
            files = {path.name: sha256_of(path) for path in sorted(partial.iterdir())}
            (partial / _MANIFEST).write_text(json.dumps({"writer": self.writer, "files": files}, indent=2))
            final = self.folder / f"step-{step}"
            if final.exists():  # of another training by this recipe, or broken
                self._set_aside(final)
            partial.rename(final)
            # Those of other writers stay: they are not ours to count or to delete.
            own = [path for path in _by_step(self.folder) if (path / _MANIFEST).is_file() and not self._foreign(path)]
            for old in own[KEPT:]:
                shutil.rmtree(old)
        except OSError as error:
            return str(error)
        return None

    # ----------------------------------------------------------------------------------------------- reading

    def _begin(self) -> Path | None:
        """Make the folder, clear away what a killed training was writing, and find the newest checkpoint of use."""
        with suppress(OSError):  # then none is written, which is told when one is due
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in self.folder.iterdir():
                if _PARTIAL.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path, ignore_errors=True)
        for path in _by_step(self.folder):
            why = self._foreign(path)
            if why is None and not (path / _MANIFEST).is_file():
                why = f"it has no {_MANIFEST}, so no training here wrote it"
            if why is None and (why := self._broken(path)) is not None:
                why = f"{why}. It lies at {self._set_aside(path)} now"
            if why is None:
                return path
            logger.warning("%s is not used: %s", path, why)
        return None

    def _set_aside(self, path: Path) -> Path:
        aside = path.with_name(f"unused-{path.name}-{secrets.token_hex(4)}")
        try:
            path.rename(aside)
        except OSError:  # read-only, or gone
            return path
        return aside

    def _foreign(self, path: Path) -> str | None:
        """Why a checkpoint is none of this job's, if its manifest can be read."""
        try:
            writer = json.loads((path / _MANIFEST).read_text())["writer"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None
        if writer != self.writer:
            return "it was written by another job, other versions of the libraries, or on another kind of machine"
        return None

    def _broken(self, path: Path) -> str | None:
        """Why a checkpoint of this job cannot be gone on from."""
        try:
            files = json.loads((path / _MANIFEST).read_text())["files"]
            for name, digest in files.items():
                if sha256_of(path / name) != digest:
                    return f"{name} is not what was written"
            if missing := [name for name in (_PROGRESS, _STATE, _WEIGHTS, TRAINING_LOG_FILE) if name not in files]:
                return f"its {_MANIFEST} does not list {', '.join(missing)}"
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            return f"it has no good {_MANIFEST}, or not every file: {error}"
        try:
            return self._unreadable(path, list(files))
        except Exception as error:  # whatever torch and transformers make of a file that nobody here wrote
            return f"it cannot be loaded: {type(error).__name__}: {error}"

    def _unreadable(self, path: Path, files: list[str]) -> str | None:
        """Read a checkpoint as `resume` and the Trainer will; what does not fit this training."""
        told, step = json.loads((path / _PROGRESS).read_text()), _step(path)
        state = TrainerState.load_from_json(str(path / _STATE))
        if told["step"] != step or state.global_step != step or not isinstance(told["seconds"], int | float):
            return f"{_PROGRESS} or {_STATE} are not of step {step}"
        if not all(isinstance(told[name], int) for name in ("epoch", "steps")):
            return f"{_PROGRESS} names no place in the data"
        if told["dev"].keys() != self.evaluation.told().keys():
            return f"{_PROGRESS} has other figures of dev"
        for name in ("before", "best", "last"):
            if told["dev"][name] is not None:
                State.of(told["dev"][name])
        (path / TRAINING_LOG_FILE).read_text()
        if _BEST in files:
            safe_open(path / _BEST, "pt").keys()
        with safe_globals():
            for name in files:
                if name.endswith((".pt", ".pth")):
                    loaded = torch.load(path / name, map_location="cpu", weights_only=True, mmap=True)
                    if name == _WEIGHTS and _shapes(loaded) != _shapes(_tensors(self.trainer)):
                        return f"{name} is of another model"
        return None

    def _load_weights(self, folder: str, model: nn.Module | None = None) -> None:
        found = torch.load(Path(folder) / _WEIGHTS, map_location="cpu", weights_only=True)
        self.trainer.model.load_state_dict(found["model"])
        with torch.no_grad():
            for name, parameter in _learnt_by_losses(self.trainer):
                parameter.copy_(found["losses"][name])

    def _init_training_state(self, max_steps: int, steps_an_epoch: int, *given: Any) -> tuple[int, int]:
        found: tuple[int, int] = self.init_training_state(max_steps, steps_an_epoch, *given)
        if self.trainer.state.global_step == 0:
            return found
        # transformers counts by the steps that an epoch was said to have; equal texts never share a batch, so it may
        # have fewer.
        if self.steps >= steps_an_epoch:
            self.epoch, self.steps = self.epoch + 1, 0
        return self.epoch, self.steps * self.trainer.args.gradient_accumulation_steps


def _writer(job: TrainingJob, rank: Rank, prepared: Prepared[Any]) -> str:
    """Who may go on from a checkpoint: SHA-256 of everything that decides what a step does, but for paths."""
    unimportant = {"checkpoint_minutes", "collective_timeout_minutes", "logging_steps", "preflight"}
    without: Any = {"guides": True, "teachers": True, "settings": unimportant}
    told = job.model_dump(mode="json", exclude=without)
    told = {name: value for name, value in told.items() if not isinstance(getattr(job, name), Path)}
    arithmetic = [rank.world_size, rank.device.partition(":")[0], rank.precision, rank.threads]
    whole = [told, prepared.rows, arithmetic, [version(name) for name in _LIBRARIES]]
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()


def remove_checkpoints(folder: Path) -> None:
    """Delete the checkpoints in `folder` and what lies with them, and the folder if nothing else is there."""
    with suppress(OSError):
        for name in (BATCH_SIZE_FILE, SUB_BATCH_SIZE_FILE):
            (folder / name).unlink(missing_ok=True)
        for path in _by_step(folder):
            if (path / _MANIFEST).is_file():
                shutil.rmtree(path, ignore_errors=True)
        folder.rmdir()


def _made(folder: Path) -> str | None:
    """Make a folder; why it could not be made. Its parent is not made again: whoever deleted it may be at work."""
    try:
        folder.mkdir()
    except FileNotFoundError:
        return f"{folder.parent} was deleted, or its claim was lost"
    except OSError as error:
        return str(error)
    return None


def _by_step(folder: Path) -> list[Path]:
    """The newest first."""
    found = [path for path in folder.glob("step-*") if _STEP.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=_step, reverse=True)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _shapes(tensors: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {part: {name: tensor.shape for name, tensor in named.items()} for part, named in tensors.items()}


def _tensors(trainer: Any) -> dict[str, Any]:
    return {"model": trainer.model.state_dict(), "losses": {n: p.detach() for n, p in _learnt_by_losses(trainer)}}


def _learnt_by_losses(trainer: Any) -> Iterator[tuple[str, nn.Parameter]]:
    """What sentence-transformers' losses learn themselves: classifiers, projections."""
    return learnt_by_losses(losses_of(trainer), trainer.model)


def _parts(loader: Any) -> Iterator[Any]:
    """What of a data loader wants to know the epoch."""
    seen: set[int] = set()
    waiting = [loader]
    while waiting:
        part = waiting.pop()
        if part is None or id(part) in seen:
            continue
        seen.add(id(part))
        if hasattr(part, "set_epoch"):
            yield part
        waiting += [getattr(part, name, None) for name in ("batch_sampler", "sampler", "dataset")]
