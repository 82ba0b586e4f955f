"""Who is the champion, and who was when: the pointer in the store, and its history.

    <store>/<pipeline>/champion                    a symbolic link to the promotion in force: the pointer
    <store>/<pipeline>/promotions/0003/            one entry of the history
        promotion.json                             who took over, from whom, when, why, by whose hand
        embedder -> ../../embedder/<version>/model
        reranker -> ../../reranker/<version>/model, where the pipeline has one
        serving.json                               with it: the embedder's share in the final score

    <store>/<pipeline>/promotions/waiting.json     a candidate that passed the gate while MLflow did not answer

An entry is written beside the history first and comes into force when the link is moved, in one rename. An entry that
the link never reached is a promotion that was cut short: it does not count, and the next one takes its number.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from embed_pipeline.artifacts import Artifact, PipelineStore
from embed_pipeline.errors import ArtifactError
from embed_pipeline.model_files import MODEL_FOLDER, SERVING_FILE

logger = logging.getLogger(__name__)

POINTER = "champion"
PROMOTIONS = "promotions"
PROMOTION_FILE = "promotion.json"
WAITING_FILE = "waiting.json"

Event = Literal["promoted", "rolled_back", "retired"]


class RegisteredModel(BaseModel):
    """One version of a model in MLflow's registry."""

    model_config = ConfigDict(frozen=True)

    name: str
    version: str

    @property
    def uri(self) -> str:
        return f"models:/{self.name}/{self.version}"


class Champion(BaseModel):
    """An embedder, and a reranker that serves with it or none, as versions of the store and of MLflow's registry."""

    model_config = ConfigDict(frozen=True)

    embedder_asset: str  # `embedder`, or `merged_embedder` where it was merged with its base
    embedder: str  # versions in the store
    reranker: str | None = None
    cleaned_pairs: str  # what they were trained on
    evaluation: str  # what promoted them
    verdict: str  # the gate's sentence
    registered_embedder: RegisteredModel
    registered_reranker: RegisteredModel | None = None

    @property
    def key(self) -> str:
        """The identity of what serves, whatever promoted it; see `pair_key`."""
        return _key(self.embedder, self.reranker)

    @property
    def title(self) -> str:
        """For sentences: embedder 0123, reranker 4567"""
        return f"embedder {self.embedder}" + (f", reranker {self.reranker}" if self.reranker else "")

    @property
    def registered(self) -> tuple[RegisteredModel, ...]:
        """The embedder's, then the reranker's where there is one."""
        both = (self.registered_embedder, self.registered_reranker)
        return tuple(model for model in both if model is not None)

    @property
    def models(self) -> tuple[tuple[str, str], ...]:
        """(asset, version) in the store, the embedder first."""
        embedder = (self.embedder_asset, self.embedder)
        return (embedder,) if self.reranker is None else (embedder, ("reranker", self.reranker))

    @property
    def versions(self) -> tuple[tuple[str, str], ...]:
        """(asset, version) in the store: the models, and the evaluation that promoted them."""
        return (*self.models, ("evaluation", self.evaluation))


class Promotion(BaseModel):
    """An entry of the history: from `at` on, `champion` serves."""

    model_config = ConfigDict(frozen=True)

    number: int
    event: Event
    at: str  # UTC, ISO 8601
    by: str  # who asked for it: a Dagster run, or a user on a machine
    reason: str
    champion: Champion | None  # None: nobody serves (retired)
    replaced: Champion | None  # who served before


class History(BaseModel):
    """All promotions in force so far, oldest first."""

    model_config = ConfigDict(frozen=True)

    promotions: tuple[Promotion, ...] = ()

    @property
    def champion(self) -> Champion | None:
        return self.promotions[-1].champion if self.promotions else None

    @property
    def previous(self) -> Champion | None:
        """What a rollback goes back to: who served last, the champion and whoever was taken down left out."""
        serving = self.champion.key if self.champion else None
        for promotion in reversed(self.promotions):
            past = promotion.replaced
            if past is not None and past.key != serving and self.taken_down(past.key) is None:
                return past
        return None

    def taken_down(self, key: str) -> Promotion | None:
        """The rollback or retirement that ended the pair `key`, unless it was promoted again after it."""
        for promotion in reversed(self.promotions):
            if promotion.champion is not None and promotion.champion.key == key:
                return None
            if promotion.replaced is not None and promotion.replaced.key == key and promotion.event != "promoted":
                return promotion
        return None

    def beaten_by(self, key: str) -> Champion | None:
        """Who served when the pair `key` was promoted, if it is the champion now."""
        if self.champion is None or self.champion.key != key:
            return None
        for promotion in reversed(self.promotions):
            if promotion.event == "promoted" and promotion.champion is not None and promotion.champion.key == key:
                return promotion.replaced
        return None


class Waiting(BaseModel):
    """A candidate that passed the gate and is not registered yet, because MLflow did not answer."""

    model_config = ConfigDict(frozen=True)

    embedder_asset: str
    embedder: str  # versions in the store
    reranker: str | None
    evaluation: str  # what let it pass
    smoke_test: bool
    since: str  # UTC, ISO 8601
    by: str  # who asked for the promotion
    because: str  # what MLflow, or what stands before it, answered

    @property
    def versions(self) -> tuple[tuple[str, str], ...]:
        """(asset, version) in the store: the models, and the evaluation that let them pass."""
        reranker = (("reranker", self.reranker),) if self.reranker else ()
        return ((self.embedder_asset, self.embedder), *reranker, ("evaluation", self.evaluation))

    def sentence(self, pipeline: str) -> str:
        reranker = f", reranker {self.reranker}" if self.reranker else ""
        return (
            f"embedder {self.embedder}{reranker} passed the gate and waits for MLflow since {self.since}, because: "
            f"{self.because}. Nothing has moved: who served before still serves. It is registered by the next run of "
            f"{pipeline}/champion, or by `embed-pipeline replay-metrics {pipeline}`, once MLflow answers"
        )


def pair_key(embedder: Artifact, reranker: Artifact | None) -> str:
    """What `Champion.key` would be for these two, or for the embedder alone."""
    return _key(embedder.version, reranker.version if reranker else None)


def _key(embedder: str, reranker: str | None) -> str:
    return embedder if reranker is None else f"{embedder}+{reranker}"


def pointer(store: PipelineStore) -> Path:
    """Where the champion's models are found: `embedder/` and, where there is one, `reranker/` below it."""
    return store.folder / POINTER


def read_history(store: PipelineStore) -> History:
    """The promotions in force; raises ArtifactError when the pointer or an entry of the history cannot be right."""
    entries = []
    for number in range(1, _last_in_force(store) + 1):
        path = _entry(store, number) / PROMOTION_FILE
        try:
            entry = Promotion.model_validate_json(path.read_bytes())
        except (OSError, ValueError) as error:
            raise _unclear(store, f"{path} cannot be read ({error}), but the pointer stands behind it") from error
        if entry.number != number:
            raise _unclear(store, f"{path} is promotion {entry.number}: it was copied there from another place")
        entries.append(entry)
    return History(promotions=tuple(entries))


def _last_in_force(store: PipelineStore) -> int:
    """Number of the promotion that the pointer stands on; 0 where nothing was promoted yet."""
    link = pointer(store)
    try:
        last = int(link.readlink().name)
    except FileNotFoundError:
        last = 0
    except (OSError, ValueError):
        raise _unclear(store, f"{link} is not a link to a promotion") from None
    # One entry behind the pointer was cut short; a second one was written when the first was in force.
    if (later := _entry(store, last + 2)).exists():
        raise _unclear(store, f"{later} stands, but {link} {f'was set back to {last}' if last else 'is gone'}")
    return last


def _unclear(store: PipelineStore, found: str) -> ArtifactError:
    return ArtifactError(
        f"{found}: who is the champion of {store.pipeline} cannot be told. Restore {store.folder / PROMOTIONS} and "
        f"{pointer(store)} (a link to its last entry) from a backup of the store"
    )


@contextmanager
def changing(store: PipelineStore) -> Iterator[History]:
    """Alone among all processes of this machine: the history as it stands, to be followed by one `record`."""
    folder = store.folder / PROMOTIONS
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield read_history(store)


def record(
    store: PipelineStore, history: History, event: Event, champion: Champion | None, *, by: str, reason: str
) -> Promotion:
    """Bring `champion` into force, inside of `changing`; the last act is one rename, so it happened or it did not."""
    assert len(history.promotions) == _last_in_force(store), "the history has moved on: record inside of changing"
    promotion = Promotion(
        number=len(history.promotions) + 1,
        event=event,
        at=datetime.now(UTC).isoformat(timespec="seconds"),
        by=by,
        reason=reason,
        champion=champion,
        replaced=history.champion,
    )
    folder = _entry(store, promotion.number)
    if folder.exists():  # of a promotion that was cut short before the link was moved
        shutil.rmtree(folder)
    folder.mkdir()
    if champion is not None:
        for name, model in zip(("embedder", "reranker"), models_of(store, champion), strict=False):
            (folder / name).symlink_to(Path(os.path.relpath(model.path / MODEL_FOLDER, folder)))
            if name == "reranker":
                shutil.copy2(model.path / SERVING_FILE, folder / SERVING_FILE)
    (folder / PROMOTION_FILE).write_text(promotion.model_dump_json(indent=2) + "\n", encoding="utf-8")
    link = store.folder / f".{POINTER}.{promotion.number}"
    link.unlink(missing_ok=True)
    link.symlink_to(Path(PROMOTIONS) / folder.name)
    link.replace(pointer(store))
    (store.folder / PROMOTIONS / WAITING_FILE).unlink(missing_ok=True)  # whoever waited was compared with another
    return promotion


def read_waiting(store: PipelineStore) -> Waiting | None:
    """The candidate that waits for MLflow, if one does."""
    path = store.folder / PROMOTIONS / WAITING_FILE
    try:
        return Waiting.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:  # a note to a person: the evaluation decides what is promoted
        logger.warning("%s cannot be read, who waits for MLflow is not told: %s", path, error)
        return None


def let_wait(store: PipelineStore, waiting: Waiting | None) -> None:
    """Note who waits for MLflow, in place of whoever waited before; None: nobody. Inside of `changing`."""
    path = store.folder / PROMOTIONS / WAITING_FILE
    if waiting is None:
        path.unlink(missing_ok=True)
        return
    whole = path.with_suffix(".json~")
    whole.write_text(waiting.model_dump_json(indent=2) + "\n", encoding="utf-8")
    whole.replace(path)


def models_of(store: PipelineStore, champion: Champion) -> tuple[Artifact, ...]:
    """The champion's embedder in the store, then its reranker if it has one; raises ArtifactError when one is gone."""
    return tuple(store.get(asset, version) for asset, version in champion.models)


def _entry(store: PipelineStore, number: int) -> Path:
    return store.folder / PROMOTIONS / f"{number:04d}"
