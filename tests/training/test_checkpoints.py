"""A training that was killed goes on to the weights of one that was not."""

from __future__ import annotations

import importlib
import io
import json
import logging
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from small_problem import Trained, launch, read_output
from test_one_process import KINDS, same_weights

from embed_pipeline.artifacts import sha256_of
from embed_pipeline.errors import TrainingError
from embed_pipeline.launch.job import Site, launch_job
from embed_pipeline.models import bfloat16
from embed_pipeline.settings import ExtraSourceSettings, LaunchSettings
from embed_pipeline.training.callbacks import Reporting
from embed_pipeline.training.checkpoints import Checkpoints
from embed_pipeline.training.job import TrainingJob

ALWAYS = {"checkpoint_minutes": 0, "logging_steps": 4, "evaluations": 4, "early_stopping_patience": 4}


DIMENSIONS = {"matryoshka_dims": [32, 16, 8], "n_dims_per_step": 2}
MATRYOSHKA = {"loss_wrapper": "MatryoshkaLoss", "loss_wrapper_arguments": DIMENSIONS}
LORA = {"lora": {"r": 4, "target_modules": "all-linear"}}


class PulledPlugError(Exception):
    pass


@pytest.fixture
def interrupted(
    job_of: Callable[..., TrainingJob], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Trained]:
    """A training that ends without warning when it logs `at`, and is started again."""

    def run(
        kind: str,
        at: int,
        change: Callable[[TrainingJob], TrainingJob] = lambda job: job,
        between: Callable[[Path], None] = lambda folder: None,
        **settings: Any,
    ) -> Trained:
        job = change(job_of(kind, tmp_path / f"{kind}-{at}", **settings))
        entry = importlib.import_module(job.entry_point)
        file = job.write(tmp_path / f"{kind}-{at}.json")
        with monkeypatch.context() as patch:
            report = Reporting.on_log

            def pull(self: Reporting, args: Any, state: Any, control: Any, logs: Any = None, **named: Any) -> None:
                report(self, args, state, control, logs, **named)
                if state.global_step == at:
                    raise PulledPlugError

            patch.setattr(Reporting, "on_log", pull)
            with pytest.raises(PulledPlugError):
                entry.main(file)
        between(job.output / "checkpoints")
        entry.main(file)
        return read_output(job)

    return run


def figures(trained: Trained) -> list[dict[str, float]]:
    """The log but for what depends on the clock, and the loss, which is a mean since the last start."""
    rows = [{k: v for k, v in row.items() if k != "seconds" and not k.startswith("train_")} for row in trained.log]
    return [row for row in rows if set(row) != {"step"}]


# Of 24 steps in two epochs, with a checkpoint four steps before.
WITHIN, BETWEEN, IN_THE_SECOND = 8, 16, 20


@pytest.mark.parametrize(
    ("kind", "settings", "at"),
    [
        *((kind, settings, IN_THE_SECOND) for kind, settings in KINDS),
        pytest.param(*KINDS[0], WITHIN, marks=pytest.mark.slow),
        pytest.param(*KINDS[1], BETWEEN, marks=pytest.mark.slow),
        ("reranker", {"batch_sampler": "group_by_length"}, IN_THE_SECOND),
        # Several sources, a loss that learns something itself, fewer batches an epoch than were announced.
        ("embedder", {"dropout": 0.1, "gradient_accumulation_steps": 2, "sources": True}, 8),
        pytest.param("embedder", MATRYOSHKA, IN_THE_SECOND, marks=pytest.mark.slow),
        pytest.param("embedder", LORA, IN_THE_SECOND, marks=pytest.mark.slow),
    ],
)
def test_it_ends_with_the_weights_of_an_undisturbed_one(
    train_here: Callable[..., Trained],
    interrupted: Callable[..., Trained],
    kind: str,
    settings: dict[str, Any],
    at: int,
) -> None:
    change = with_sources if settings.pop("sources", False) else lambda job: job
    undisturbed = train_here(kind, change, **settings, **ALWAYS)
    resumed = interrupted(kind, at, change, **settings, **ALWAYS)
    assert undisturbed.summary["steps"] > at
    assert same_weights(undisturbed, resumed)
    assert figures(undisturbed) == figures(resumed)
    same = ("steps", "epochs", "dev_before", "dev_kept", "kept_step", "kept_because", "dev_gain")
    assert {key: undisturbed.summary[key] for key in same} == {key: resumed.summary[key] for key in same}
    assert not (resumed.job.output / "checkpoints").exists()


def test_only_whole_checkpoints_of_the_same_job_are_used(
    train_here: Callable[..., Trained], interrupted: Callable[..., Trained], caplog: pytest.LogCaptureFixture
) -> None:
    def spoil(folder: Path) -> None:
        assert sorted(path.name for path in folder.glob("step-*")) == ["step-4", "step-6"]
        weights = folder / "step-6" / "weights.pt"
        weights.write_bytes(weights.read_bytes()[:-1] + b"x")
        foreign = folder / "step-9"
        shutil.copytree(folder / "step-4", foreign)
        manifest = json.loads((foreign / "manifest.json").read_text())
        (foreign / "manifest.json").write_text(json.dumps({**manifest, "writer": "somebody else"}))

    settings = {**ALWAYS, "epochs": 1, "logging_steps": 2}
    undisturbed = train_here("embedder", **settings)
    with caplog.at_level(logging.INFO):
        resumed = interrupted("embedder", 8, between=spoil, **settings)
    assert same_weights(undisturbed, resumed)
    assert "step-9 is not used: it was written by another job" in caplog.text
    assert "step-6 is not used: weights.pt is not what was written" in caplog.text
    assert "going on after step 4" in caplog.text


def test_a_checkpoint_of_other_arithmetic_is_not_taken(
    train_here: Callable[..., Trained],
    interrupted: Callable[..., Trained],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The job says `auto` both times, as one does whose devices are known on its cluster alone."""
    info = tmp_path / "cpuinfo"
    monkeypatch.setattr(bfloat16, "CPU_INFO", info)
    info.write_text("flags : avx512bw avx512vl avx512dq amx_tile amx_bf16\n")

    def move(_: Path) -> None:
        info.write_text("flags : avx2\n")

    settings = {"precision": "auto", "max_steps": 10, **ALWAYS}
    moved = interrupted("embedder", 8, between=move, **settings)
    assert "step-4 is not used: it was written by another job" in caplog.text
    assert moved.summary["precision"] == "float32"
    assert same_weights(moved, train_here("embedder", **settings))


def forge(checkpoint: Path, name: str, content: bytes) -> None:
    """Another content of a file, and a manifest that vouches for it."""
    (checkpoint / name).write_bytes(content)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"][name] = sha256_of(checkpoint / name)
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def pickled(path: Path) -> bytes:
    """Code that runs where a pickle is loaded as one."""

    class Harm:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (path,))

    content = io.BytesIO()
    torch.save(Harm(), content)
    return content.getvalue()


def test_a_forged_checkpoint_is_set_aside_for_the_next_older_one(
    train_here: Callable[..., Trained],
    interrupted: Callable[..., Trained],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    harmed = tmp_path / "harmed"
    smaller = io.BytesIO()
    torch.save({"model": {"weight": torch.zeros(1)}, "losses": {}}, smaller)
    forged = {
        "optimizer.pt": pickled(harmed),
        "rng_state.pth": pickled(harmed),
        "scheduler.pt": b"garbage",
        "weights.pt": smaller.getvalue(),
        "progress.json": b"[]",
        "trainer_state.json": b"{",
        "best.safetensors": b"garbage",
    }

    def spoil(folder: Path) -> None:
        good = folder / "step-6"
        for number, (name, content) in enumerate(forged.items()):
            copy = folder / f"step-{100 + number}"
            shutil.copytree(good, copy)
            # Of its own step in every other file.
            for told in ("progress.json", "trainer_state.json"):
                text = (copy / told).read_text()
                forge(copy, told, text.replace('step": 6', f'step": {100 + number}').encode())
            forge(copy, name, content)
        (folder / "step-x").mkdir()
        (folder / "step-200").write_text("no folder")
        (folder / "step-201").mkdir()

    settings = {**ALWAYS, "epochs": 1, "logging_steps": 2}
    undisturbed = train_here("embedder", **settings)
    with caplog.at_level(logging.INFO):
        resumed = interrupted("embedder", 8, between=spoil, **settings)

    assert not harmed.exists()
    assert "going on after step 6" in caplog.text
    assert caplog.text.count("is not used: ") == len(forged) + 1
    assert caplog.text.count("it cannot be loaded: ") == len(forged) - 1
    assert "weights.pt is of another model" in caplog.text
    assert same_weights(undisturbed, resumed)
    left = {path.name.partition("-")[0] for path in (resumed.job.output / "checkpoints").iterdir()}
    assert left == {"unused", "step"}, "what nobody here wrote is not deleted"


def test_a_training_goes_on_when_its_checkpoints_are_deleted(
    train_here: Callable[..., Trained], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    save = Checkpoints.save

    def deleted(self: Checkpoints) -> None:
        if self.trainer.state.global_step == 3:
            shutil.rmtree(self.folder)
        save(self)

    monkeypatch.setattr(Checkpoints, "save", deleted)
    trained = train_here("embedder", max_steps=4, **{**ALWAYS, "logging_steps": 1})
    assert trained.summary["steps"] == 4
    assert "step 3 has no checkpoint, the training goes on" in caplog.text
    assert "checkpoints was deleted" in caplog.text


def test_a_training_deletes_of_its_output_only_what_it_wrote(
    train_here: Callable[..., Trained], monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = Checkpoints._begin

    def with_mine(self: Checkpoints) -> Path | None:
        for folder in (self.folder, self.folder / "step-1", self.folder.parent / "work"):
            folder.mkdir(exist_ok=True)
            (folder / "mine.txt").write_text("mine")
        return begin(self)

    monkeypatch.setattr(Checkpoints, "_begin", with_mine)
    output = train_here("embedder", max_steps=4, **{**ALWAYS, "logging_steps": 2}).job.output
    left = {path.relative_to(output).as_posix() for path in output.rglob("mine.txt")}
    assert left == {"checkpoints/mine.txt", "checkpoints/step-1/mine.txt", "work/mine.txt"}
    assert {path.name for path in (output / "checkpoints").iterdir()} == {"mine.txt", "step-1"}


def test_a_full_disk_costs_a_checkpoint_and_not_the_training(
    train_here: Callable[..., Trained], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("embed_pipeline.training.checkpoints.torch.save", full)
    trained = train_here("embedder", max_steps=2, **{**ALWAYS, "logging_steps": 1})
    assert trained.summary["steps"] == 2
    assert "step 1 has no checkpoint, the training goes on: [Errno 28] No space left on device" in caplog.text


@pytest.mark.parametrize("whom", [pytest.param("rank 0", marks=pytest.mark.slow), "rank 1", "torchrun"])
def test_two_processes_go_on_after_a_kill(
    train: Callable[..., Trained], job_of: Callable[..., TrainingJob], tmp_path: Path, whom: str
) -> None:
    settings = {**ALWAYS, "world_size": 2, "epochs": 3, "logging_steps": 2}
    job = job_of("embedder", tmp_path / "output", **settings)
    kill_when(job, whom, lambda: (job.output / "checkpoints" / "step-4").is_dir())
    with pytest.raises(TrainingError):
        launch(job, tmp_path)
    assert list((job.output / "checkpoints").glob("step-*"))
    launch(job, tmp_path)
    assert same_weights(train("embedder", **settings), read_output(job))


def test_torchrun_itself_starts_all_processes_again(
    train: Callable[..., Trained], job_of: Callable[..., TrainingJob], tmp_path: Path
) -> None:
    settings = {**ALWAYS, "world_size": 2, "epochs": 3, "logging_steps": 2}
    job = job_of("embedder", tmp_path / "output", **settings)
    kill_when(job, "rank 1", lambda: (job.output / "checkpoints" / "step-4").is_dir())
    site = Site(LaunchSettings(max_restarts=1), tmp_path)
    launch_job(job, job.write(tmp_path / "job.json"), None, site)
    resumed = read_output(job)
    assert same_weights(train("embedder", **settings), resumed)
    steps = [row["step"] for row in resumed.log if "loss" in row]
    assert steps == sorted(set(steps))


def test_a_training_that_is_asked_to_end_writes_a_checkpoint_first(
    train: Callable[..., Trained], job_of: Callable[..., TrainingJob], tmp_path: Path
) -> None:
    settings = {**ALWAYS, "checkpoint_minutes": 60, "world_size": 2, "epochs": 3, "logging_steps": 2}
    job = job_of("embedder", tmp_path / "output", **settings)

    def preempt() -> None:
        log = job.output / "training_log.jsonl"
        while not (log.is_file() and '"step": 4' in log.read_text()):
            time.sleep(0.01)
        (torchrun,) = (p for p in psutil.Process().children() if "embed_pipeline.launch.agent" in p.cmdline())
        torchrun.terminate()

    threading.Thread(target=preempt, daemon=True).start()
    with pytest.raises(TrainingError, match=r"SIGTERM|signal: 15"):
        launch(job, tmp_path)
    (checkpoint,) = (job.output / "checkpoints").glob("step-*")
    assert int(checkpoint.name.removeprefix("step-")) >= 4
    launch(job, tmp_path)
    assert same_weights(train("embedder", **settings), read_output(job))


def with_sources(job: TrainingJob) -> TrainingJob:
    told: list[dict[str, Any]] = [
        {"name": "sts", "kind": "scored", "path": "x"},
        {"name": "entailment", "kind": "labelled", "path": "x", "loss": "SoftmaxLoss"},
    ]
    extra = tuple(ExtraSourceSettings.model_validate(source) for source in told)
    return job.model_copy(update={"extra_sources": extra})


def kill_when(job: TrainingJob, whom: str, ready: Callable[[], bool]) -> None:
    """SIGKILL to a process of the training that this process starts next."""

    def wait_and_kill() -> None:
        while not ready():
            time.sleep(0.01)
        ranks = [
            process
            for process in psutil.Process().children(recursive=True)
            if "RANK" in process.environ() and job.entry_point in " ".join(process.cmdline())
        ]
        ranks.sort(key=lambda process: int(process.environ()["RANK"]))
        (ranks[0].parent() if whom == "torchrun" else ranks[int(whom[-1])]).kill()

    threading.Thread(target=wait_and_kill, daemon=True).start()
