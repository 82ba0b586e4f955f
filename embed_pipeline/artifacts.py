"""Versions on disk: staged, manifest-checked, published whole or not at all. The only home of a path.

    <store>/<pipeline>/<asset>/<version>/...      one published version, with its manifest.json
    <store>/<pipeline>/<asset>/recipes/<digest>   which version a recipe made
    <store>/<pipeline>/<asset>/current.json       the version that later stages use
    <store>/<pipeline>/raw_pairs/read.json        the state of the raw files that the current raw rows were read from
    <store>/<pipeline>/.runs/<run>/<asset>        the version that one run made or found, which its later stages use
    <store>/.script_lists/                        which raw files the scripts of all pipelines wrote
    <store>/<pipeline>/.staging/                  what is being made
    <store>/<pipeline>/.checkpoints/              what a training goes on from after it was killed, by asset and recipe
    <store>/<pipeline>/.embeddings/               encoded texts, by model and content; can be deleted
    <store>/<pipeline>/.set_aside/                what was damaged or in the way; nothing reads it, a person deletes it

A *recipe* is everything that decides the result: the inputs' content, settings, seed, code version. A recipe that was
made before is not made again. What a stage hands over has a *content* id: for tables the hash of the rows that later
stages read, for models the hash of their recipe. Recipes name inputs by content, so a raw row that changes nothing but
the list of rejected rows retrains nothing; manifests name them by version, so every model leads back to its very rows.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, LeaseCompromise, SoftFileLease, Timeout
from pydantic import BaseModel, ConfigDict

from embed_pipeline.disk import plain_disk_errors
from embed_pipeline.errors import ArtifactError, ConfigurationError
from embed_pipeline.masking import without_password

logger = logging.getLogger(__name__)

ASSETS = (
    *("raw_pairs", "cleaned_pairs", "hard_negatives", "embedder", "merged_embedder", "reranker", "evaluation"),
    *("exports", "hub"),  # of the champion
)
MANIFEST = "manifest.json"
SET_ASIDE = ".set_aside"
SMOKE_TEST_STORE = "smoke-test"  # no pipeline can be called so
DIGITS = 16
_YES, _NO = ("1", "true", "yes", "on"), ("", "0", "false", "no", "off")
RUN_GOES_ON = timedelta(hours=1)  # between two stages; while one works, its staging folder tells
RUN_IS_OVER = timedelta(days=7)
# A claim on checkpoints that was not renewed for so long is another's to take. Whoever waits measures it with its own
# steady clock, so the clocks of machines need not agree. All who share a store must use the same.
LEASE_SECONDS = 60.0
_VERSION = re.compile(rf"[0-9a-f]{{{DIGITS}}}")
_STAGED = re.compile(r"(?P<what>[a-z_]+)~(?P<machine>.+)~(?P<process>\d{1,9})~[0-9a-f]{8}")
LIBRARIES = (
    "accelerate",
    "bm25s",
    "dagster",
    "datasets",
    "datasketch",
    "duckdb",
    "FlagEmbedding",
    "ir_measures",
    "mlflow",
    "numpy",
    "pyarrow",
    "sentence-transformers",
    "torch",
    "transformers",
)


def home() -> Path:
    """Folder of everything this machine keeps: DAGSTER_HOME, or `dagster_home` where the command runs."""
    return folder_in("DAGSTER_HOME") or Path("dagster_home").absolute()


def folder_in(variable: str) -> Path | None:
    """The folder that an environment variable names, `~` expanded; None where it is unset or empty.

    Raises ConfigurationError for an address, which would become a local folder of that name.
    """
    given = os.environ.get(variable, "").strip()
    return local_folder(given, variable) if given else None


def local_folder(given: str, variable: str) -> Path:
    """`folder_in` for one of several folders in a variable."""
    if "://" in given:
        raise ConfigurationError(
            f"{variable}: found {without_password(given)}, expected a local folder. Mount what lies elsewhere, and "
            "name the folder where it is mounted"
        )
    try:
        return Path(given).expanduser().absolute()
    except RuntimeError:
        raise ConfigurationError(f"{variable}: found {given}, and no such user has a home folder") from None


def is_smoke_test() -> bool:
    """Whether EMBED_PIPELINE_SMOKE_TEST asks every pipeline for a run in small.

    Raises ConfigurationError where it says neither yes nor no.
    """
    given = os.environ.get("EMBED_PIPELINE_SMOKE_TEST", "")
    said = given.strip().lower()
    if said not in (*_YES, *_NO):
        raise ConfigurationError(
            f"EMBED_PIPELINE_SMOKE_TEST: found '{given}', expected one of {', '.join(_YES)} or {', '.join(_NO[1:])}"
        )
    return said in _YES


def store_root() -> Path:
    """EMBED_PIPELINE_STORE, or `store` in the home folder; a smoke test has a store of its own inside of it."""
    root = folder_in("EMBED_PIPELINE_STORE") or home() / "store"
    return root / SMOKE_TEST_STORE if is_smoke_test() else root


class Recipe(BaseModel):
    """Everything that decides an artifact's content."""

    # As constants, which `digest` refuses: as null, infinity would be taken for a setting that is not there.
    model_config = ConfigDict(frozen=True, ser_json_inf_nan="constants")

    inputs: dict[str, str]  # name -> content of an artifact, or digest of a model or of files
    settings: dict[str, Any]
    seed: int
    code_version: str

    @property
    def digest(self) -> str:
        canonical = json.dumps(self.model_dump(mode="json"), sort_keys=True, ensure_ascii=False, allow_nan=False)
        return hashlib.sha256(canonical.encode()).hexdigest()[:DIGITS]


class FileEntry(BaseModel):
    bytes: int
    sha256: str


class RunIds(BaseModel):
    """Where a version was made, for whoever asks later."""

    dagster: str | None = None
    mlflow: str | None = None
    mlflow_link: str | None = None


class Manifest(BaseModel):
    pipeline: str
    asset: str
    version: str  # the folder: one for every recipe
    content: str  # what is handed over: equal for equal tables, whatever they were made from
    recipe: Recipe
    inputs: dict[str, str]  # asset -> version that this was made from
    created_at: str
    libraries: dict[str, str]
    python: str
    machine: str
    runs: RunIds
    report: dict[str, Any]
    files: dict[str, FileEntry]


@dataclass(frozen=True)
class Artifact:
    """One published version."""

    path: Path
    manifest: Manifest

    @property
    def version(self) -> str:
        return self.manifest.version

    @property
    def content(self) -> str:
        return self.manifest.content

    @property
    def report(self) -> dict[str, Any]:
        """What the stage said of it: counts, scores, seconds."""
        return self.manifest.report

    def input(self, asset: str) -> str:
        """The version of the upstream `asset` that this one was made from."""
        return self.manifest.inputs[asset]

    def size(self) -> int:
        """Bytes on disk, manifest excluded."""
        return sum(entry.bytes for entry in self.manifest.files.values())

    def verify(self) -> None:
        """Compare all files with the manifest, byte for byte; raises ArtifactError naming the first that differs."""
        for name, entry in self.manifest.files.items():
            path = self.path / name
            if not path.is_file():
                raise ArtifactError(
                    f"{path} is missing: the manifest of {_title(self.manifest)} lists it. {_mend(self.manifest.asset)}"
                )
            found = path.stat().st_size
            if found != entry.bytes or sha256_of(path) != entry.sha256:
                raise ArtifactError(
                    f"{path} was changed after {_title(self.manifest)} was published "
                    f"({entry.bytes} bytes, sha256 {entry.sha256[:12]}.. expected; {found} bytes found). "
                    f"{_mend(self.manifest.asset)}"
                )
        known = {self.path / name for name in (*self.manifest.files, MANIFEST)}
        for path in sorted(self.path.rglob("*")):
            if not path.is_dir() and path not in known:
                raise ArtifactError(
                    f"{path} was added after {_title(self.manifest)} was published. {_mend(self.manifest.asset)}"
                )


def _mend(asset: str) -> str:
    return (
        f"Materialize {asset} again: a damaged version is set aside and made anew from the same inputs. One that is "
        "made no more can be moved out of the store"
    )


@dataclass(frozen=True)
class Made:
    """What making an artifact has to say of it: a JSON-serialisable report, and the runs it happened in."""

    report: Mapping[str, Any]
    runs: RunIds


@dataclass(frozen=True)
class Produced:
    artifact: Artifact
    reused: bool  # True: the recipe had been made before and nothing was computed


class PipelineStore:
    """The versions of one pipeline."""

    def __init__(self, root: Path, pipeline: str, run: str | None = None) -> None:
        self.folder = root / pipeline
        self.pipeline = pipeline
        self.run = run  # an orchestrator's run: its stages pass their versions on to each other, whatever others do

    @property
    def embeddings_folder(self) -> Path:
        return self.folder / ".embeddings"

    @property
    def script_lists(self) -> Path:
        """What scripts wrote into which folder: one for all pipelines, and for smoke tests, which build the same."""
        root = self.folder.parent
        return (root.parent if root.name == SMOKE_TEST_STORE else root) / ".script_lists"

    def current(self, asset: str) -> Artifact:
        """The version later stages use: this run's own, else the last one made.

        Raises ArtifactError when the asset was never materialized.
        """
        of_run = self._of_run(asset)
        if of_run is not None and os.path.lexists(of_run):
            if (noted := _noted(of_run)) is None:
                raise ArtifactError(
                    f"{of_run} names no version, so it cannot be told what this run made. Delete it and materialize "
                    f"{self.pipeline}/{asset} again, or start a new run"
                )
            return self.get(asset, noted)
        version, _ = self._read_current(asset)
        if not self.has(asset, version):
            raise ArtifactError(
                f"{self._current_file(asset)} points to version {version}, which is not there. "
                f"Materialize {self.pipeline}/{asset} again; it is found, or made from the same inputs"
            )
        return self.get(asset, version)

    def has_current(self, asset: str) -> bool:
        return os.path.lexists(self._current_file(asset))  # `current` tells of what is no pointer

    def whole_current(self, asset: str) -> Artifact | None:
        """The version later stages use where there is one and it is as published; the log tells why it is not."""
        if not self.has_current(asset):
            return None
        try:
            artifact = self.current(asset)
            artifact.verify()
        except ArtifactError as error:
            logger.warning("%s", error)
            return None
        return artifact

    def has(self, asset: str, version: str) -> bool:
        return (self.folder / asset / version / MANIFEST).is_file()

    def was_reused(self, asset: str) -> bool:
        """Whether the last materialization of the asset found its version made before."""
        return self._read_current(asset)[1]

    def note_read(self, raw: Artifact, state: str) -> None:
        """Remember the state of the raw files that `raw` was read from, or found to be the content of."""
        with plain_disk_errors(self.folder):
            self._write(self._read_file, json.dumps({"version": raw.version, "state": state}))

    def state_read(self, raw: Artifact) -> str | None:
        """The state of the raw files when `raw` was read from them last, None when another version was since."""
        try:
            noted = json.loads(self._read_file.read_text())
            return str(noted["state"]) if noted["version"] == raw.version else None
        except (FileNotFoundError, IsADirectoryError, ValueError, KeyError, TypeError, RecursionError):
            # Then the files are read again.
            return None

    def get(self, asset: str, version: str) -> Artifact:
        """One version by its name; raises ArtifactError when it is absent, or its manifest is not as published."""
        path = self.folder / asset / version
        try:
            told = json.loads((path / MANIFEST).read_bytes())
            seal = told.pop("seal", None)
            manifest = Manifest.model_validate(told)
        except FileNotFoundError:
            if path.is_dir():
                raise ArtifactError(f"{path} has no {MANIFEST}. {_mend(asset)}") from None
            known = ", ".join(self._versions(asset)) or "none"
            raise ArtifactError(f"{self.pipeline}/{asset} has no version {version}; versions there: {known}") from None
        except (NotADirectoryError, IsADirectoryError, ValueError, AttributeError, RecursionError) as error:
            raise ArtifactError(f"{path / MANIFEST} cannot be read: {error}. {_mend(asset)}") from error
        if (manifest.pipeline, manifest.asset, manifest.version) != (self.pipeline, asset, version):
            raise ArtifactError(
                f"{path} holds {_title(manifest)}, not {self.pipeline}/{asset} version {version}: it was copied there "
                f"from somewhere else. {_mend(asset)}"
            )
        if seal != _seal(told):
            raise ArtifactError(
                f"{path / MANIFEST} was edited after {_title(manifest)} was published, or an "
                f"older embed_pipeline published it. {_mend(asset)}"
            )
        return Artifact(path, manifest)

    def versions(self, asset: str) -> list[Artifact]:
        """The published versions of an asset, oldest first; the log tells of those that cannot be read."""
        found = []
        for version in self._versions(asset):
            try:
                found.append(self.get(asset, version))
            except ArtifactError as error:
                logger.warning("passed over: %s", error)
        return sorted(found, key=lambda artifact: artifact.manifest.created_at)

    def find(self, asset: str, recipe: Recipe) -> Artifact | None:
        """The version that `recipe` made before, if every file of it is as published; else it is set aside."""
        pointer = self._pointer(asset, recipe)
        version = _noted(pointer)
        if version is None or self._is_by_another(asset, version, recipe):
            if os.path.lexists(pointer):
                self._set_aside(pointer, "it does not name the version that this recipe made")
            # Whoever published a version may have been killed before it could note its recipe.
            made = (a.version for a in reversed(self.versions(asset)) if a.manifest.recipe.digest == recipe.digest)
            version = next(made, None)
        if version is None:
            return None
        artifact = self._whole(asset, version)
        if artifact is not None and not pointer.is_file():
            self._write(pointer, version)
        return artifact

    def produce(
        self,
        asset: str,
        recipe: Recipe,
        inputs: Sequence[Artifact],
        make: Callable[[Path], Made],
        *,
        content: Sequence[str] | None,
        claim: Claim | None = None,
    ) -> Produced:
        """Return the version that `recipe` stands for, making it only if it was never made.

        `make` fills the empty folder it is given, after every file of `inputs` was compared with its manifest.
        `content` lists the files that are handed over (tables); None takes the recipe's digest (models). The new
        version becomes current in one rename; if `make` raises, nothing of it stays. `claim` is taken before `make`
        is called; where another process is making the same, that may take a while.

        Raises DiskError where the store is full or may not be written, ArtifactError where an input is damaged, or it
        or the folder that is being filled was deleted meanwhile.
        """
        with plain_disk_errors(self.folder):
            found = self.find(asset, recipe)
            if found is None and claim is not None and claim.take():
                found = self.find(asset, recipe)
            if found is not None:
                self._make_current(found, reused=True)
                return Produced(found, reused=True)
            for artifact in inputs:
                artifact.verify()
            staging = self._staging(asset)
            self._make_room(staging.parent)
            staging.mkdir()
            made = self._make(asset, inputs, make, staging)
            # From here on the work is done: a failure to publish leaves it in the staging folder.
            content_id = recipe.digest if content is None else _content_id(staging, content)
            artifact = self._publish(asset, content_id, recipe, inputs, staging, made)
            self._write(self._pointer(asset, recipe), artifact.version)
            self._make_current(artifact, reused=False)
            return Produced(artifact, reused=False)

    def _make(self, asset: str, inputs: Sequence[Artifact], make: Callable[[Path], Made], staging: Path) -> Made:
        """Call `make`; where it fails because somebody deleted what it reads or writes, that is the error."""
        try:
            # Taken before anything is cleaned up, which frees space.
            with plain_disk_errors(self.folder):
                made = make(staging)
            if not staging.is_dir():
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(staging))
        except Exception as error:
            if not staging.is_dir():
                raise ArtifactError(
                    f"{staging} was deleted while {self.pipeline}/{asset} was being made in it. Leave .staging alone "
                    f"while a run is at work, and materialize {asset} again; a training goes on from its last "
                    "checkpoint",
                    passing=True,
                ) from error
            shutil.rmtree(staging, ignore_errors=True)
            for artifact in inputs:
                if not all((artifact.path / name).is_file() for name in (MANIFEST, *artifact.manifest.files)):
                    raise ArtifactError(
                        f"{artifact.path}, or a file of it, was deleted while {self.pipeline}/{asset} was being made "
                        f"from it. Materialize {self.pipeline}/{artifact.manifest.asset} again, then {asset}"
                    ) from error
            raise
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        return made

    def lineage(self, artifact: Artifact) -> dict[str, set[str]]:
        """asset -> versions that `artifact` was made from, itself included; inputs that were deleted are left out."""
        made_from: dict[str, set[str]] = {artifact.manifest.asset: {artifact.version}}
        for asset, version in artifact.manifest.inputs.items():
            if self.has(asset, version):
                for name, versions in self.lineage(self.get(asset, version)).items():
                    made_from.setdefault(name, set()).update(versions)
        return made_from

    def prunable(self, keep: Iterable[tuple[str, str]] = ()) -> list[Artifact]:
        """Versions that nothing in use was made from: what is current, what a run may go on with, and `keep`.

        `keep` names (asset, version) pairs; those that are not there any more are passed over.
        """
        used = [*keep, *((asset, self.current(asset).version) for asset in ASSETS if self.has_current(asset))]
        for run in self._runs(younger_than=RUN_GOES_ON):
            notes = [(path.name, _noted(path)) for path in run.iterdir() if path.name in ASSETS]
            used += [(asset, version) for asset, version in notes if version is not None]
        kept: dict[str, set[str]] = {}
        for asset, version in used:
            if self.has(asset, version):
                for name, versions in self.lineage(self.get(asset, version)).items():
                    kept.setdefault(name, set()).update(versions)
        # Evaluations stay: they are small, and they are the history.
        return [
            artifact
            for asset in ASSETS
            if asset != "evaluation"
            for artifact in self.versions(asset)
            if artifact.version not in kept.get(asset, set())
        ]

    def remove(self, artifact: Artifact) -> None:
        """Delete a version: the files that were published with it. What else lies in its folder is set aside."""
        grave = self._bury(artifact.path)
        if grave is None:
            return
        for name in (*artifact.manifest.files, MANIFEST):
            (grave / name).unlink(missing_ok=True)
        if any(not path.is_dir() or path.is_symlink() for path in grave.rglob("*")):
            told = artifact.manifest
            name = f"{told.asset}~{told.version}"
            self._set_aside(grave, f"it was not published with {_title(told)}, which was deleted", name)
        else:
            shutil.rmtree(grave)

    def remove_folder(self, folder: Path) -> None:
        """Delete what this store keeps for itself; of a link, the link alone.

        It leaves its place in one rename, so nobody sees half of it.
        """
        if (grave := self._bury(folder)) is not None:
            shutil.rmtree(grave)

    def _bury(self, path: Path) -> Path | None:
        """Move a folder to where what is deleted lies; None where it was a link, or a file: those are gone by then."""
        if path.is_symlink() or not path.is_dir():
            path.unlink(missing_ok=True)
            return None
        grave = self._staging("removed")
        self._make_room(grave.parent)
        path.rename(grave)
        return grave

    @contextmanager
    def claim(self, asset: str, recipe: Recipe) -> Iterator[Claim]:
        """The right to train by `recipe` from and to its checkpoints; it has to be taken, and ends with the body."""
        claim = Claim(self, asset, self.folder / ".checkpoints" / asset / recipe.digest)
        try:
            yield claim
        finally:
            claim.release()

    def in_the_making(self) -> list[Path]:
        """Staging folders that a process of this or another machine may be filling right now."""
        return [path for path in self._staged() if _may_be_alive(path.name)]

    def abandoned(self) -> list[Path]:
        """Staging folders whose process is gone, what runs and trainings long over left, and cached embeddings."""
        dead = [path for path in self._staged() if not _may_be_alive(path.name)]
        recent = self._runs(younger_than=RUN_IS_OVER)
        old = [path for path in self._runs() if path not in recent]
        since = (datetime.now(UTC) - RUN_IS_OVER).timestamp()
        left = self.folder.glob(".checkpoints/*/*")
        old += [path for path in sorted(left) if path.is_dir() and _last_touched(path, Claim.FILE) < since]
        return [*dead, *old, *([self.embeddings_folder] if self.embeddings_folder.is_dir() else [])]

    def foreign(self) -> list[Path]:
        """What lies among the store's own leftovers and is none of them: it is left alone."""
        staging, runs = self.folder / ".staging", self.folder / ".runs"
        strangers = [path for path in _entries(staging) if not _is_staged(path)]
        return [*strangers, *(path for path in _entries(runs) if not path.is_dir())]

    def set_aside(self) -> list[Path]:
        """What was damaged or in the way, and waits for a person to look at it."""
        return [path for path in _entries(self.folder / SET_ASIDE) if not path.name.startswith(".")]

    def _runs(self, younger_than: timedelta | None = None) -> list[Path]:
        """What runs passed on, a folder each; only those that were written to in so much time, if it is given."""
        found = [path for path in _entries(self.folder / ".runs") if path.is_dir()]
        if younger_than is None:
            return found
        since = (datetime.now(UTC) - younger_than).timestamp()
        return [path for path in found if path.stat().st_mtime >= since]

    def _versions(self, asset: str) -> list[str]:
        return sorted(path.parent.name for path in (self.folder / asset).glob(f"*/{MANIFEST}"))

    def _current_file(self, asset: str) -> Path:
        return self.folder / asset / "current.json"

    def _read_current(self, asset: str) -> tuple[str, bool]:
        """The version last made, and whether it was found made before; raises ArtifactError when there is none."""
        pointer = self._current_file(asset)
        try:
            told = json.loads(pointer.read_text())
            if not _VERSION.fullmatch(version := str(told["version"])):
                raise ValueError(f"{version[:40]!r} is no version")
            return version, bool(told["reused"])
        except FileNotFoundError:
            raise ArtifactError(
                f"{self.pipeline}/{asset} has no version in {self.folder}. Materialize it first: "
                f'dagster asset materialize -m embed_pipeline.definitions --select "{self.pipeline}/{asset}"'
            ) from None
        except (IsADirectoryError, NotADirectoryError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise ArtifactError(
                f"{pointer} cannot be read: {error!r}. Materialize {self.pipeline}/{asset} again; it is written anew"
            ) from error

    def _staged(self) -> list[Path]:
        return [path for path in _entries(self.folder / ".staging") if _is_staged(path)]

    def _staging(self, what: str) -> Path:
        name = "~".join([what, platform.node(), str(os.getpid()), uuid.uuid4().hex[:8]])
        return self.folder / ".staging" / name

    def _publish(
        self, asset: str, content: str, recipe: Recipe, inputs: Sequence[Artifact], staging: Path, made: Made
    ) -> Artifact:
        files = {
            path.relative_to(staging).as_posix(): FileEntry(bytes=path.stat().st_size, sha256=sha256_of(path))
            for path in sorted(staging.rglob("*"))
            if path.is_file()
        }
        manifest = Manifest(
            pipeline=self.pipeline,
            asset=asset,
            version=hashlib.sha256(f"{content}{recipe.digest}".encode()).hexdigest()[:DIGITS],
            content=content,
            recipe=recipe,
            inputs={artifact.manifest.asset: artifact.version for artifact in inputs},
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
            libraries={name: importlib.metadata.version(name) for name in LIBRARIES},
            python=platform.python_version(),
            machine=f"{platform.machine()}, {os.cpu_count()} cores",
            runs=made.runs,
            report=dict(made.report),
            files=files,
        )
        told = json.loads(manifest.model_dump_json())
        self._write(staging / MANIFEST, json.dumps({**told, "seal": _seal(told)}, indent=2, ensure_ascii=False))
        path = self.folder / asset / manifest.version
        self._make_room(path.parent)
        # Another run may have published the same version; what else is in the way is set aside.
        while (standing := self._whole(asset, manifest.version)) is None:
            try:
                staging.rename(path)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                continue  # it did so just now
            return self.get(asset, manifest.version)
        shutil.rmtree(staging)
        return standing

    def _whole(self, asset: str, version: str) -> Artifact | None:
        """The version, every file compared with its manifest. What stands in its place and is not, is set aside."""
        path = self.folder / asset / version
        if not os.path.lexists(path):
            return None
        try:
            return self._verified(asset, version)
        except ArtifactError:
            # Alone, and looked at again: another process may have put a whole one there.
            self._make_room(self.folder / SET_ASIDE)
            with FileLock(self.folder / SET_ASIDE / ".lock"):
                try:
                    return self._verified(asset, version)
                except ArtifactError as error:
                    self._set_aside(path, str(error))
        return None

    def _verified(self, asset: str, version: str) -> Artifact:
        artifact = self.get(asset, version)
        artifact.verify()
        return artifact

    def _is_by_another(self, asset: str, version: str, recipe: Recipe) -> bool:
        """Whether a version says of itself that another recipe made it."""
        try:
            return self.get(asset, version).manifest.recipe.digest != recipe.digest
        except ArtifactError:
            return False

    def _set_aside(self, path: Path, why: str, name: str | None = None) -> None:
        """Move a file, folder or link out of the way, and tell where to; nothing is lost."""
        place = (self.folder if path != self.folder else self.folder.parent) / SET_ASIDE
        place.mkdir(parents=True, exist_ok=True)
        when = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
        known_by = name or f"{path.parent.name}~{path.name}".lstrip(".")
        target = place / f"{known_by}~{when}-{uuid.uuid4().hex[:8]}"
        with suppress(FileNotFoundError):  # another process did it
            path.rename(target)
            logger.warning("%s was set aside, it lies at %s now: %s", path, target, why)

    def _make_room(self, folder: Path) -> None:
        """Make a folder of this pipeline; a file that stands in the way of it, or of one above it, is set aside."""
        root = self.folder.parent
        for above in (root, *root.parents):
            if above.exists():
                if not above.is_dir():
                    raise ConfigurationError(
                        f"the store {root} cannot be used: {above} is a file, a folder was expected. Name another in "
                        "EMBED_PIPELINE_STORE (or DAGSTER_HOME), or move the file"
                    )
                break
        within = folder.relative_to(root)
        for part in (root / above for above in (*reversed(within.parents), within)):
            if os.path.lexists(part) and not part.is_dir():
                self._set_aside(part, "a folder of the store has to be there")
        folder.mkdir(parents=True, exist_ok=True)

    def _make_current(self, artifact: Artifact, reused: bool) -> None:
        pointer = self._current_file(artifact.manifest.asset)
        self._write(pointer, json.dumps({"version": artifact.version, "reused": reused}))
        if (of_run := self._of_run(artifact.manifest.asset)) is not None:
            self._write(of_run, artifact.version)

    @property
    def _read_file(self) -> Path:
        return self.folder / "raw_pairs" / "read.json"

    def _of_run(self, asset: str) -> Path | None:
        return self.folder / ".runs" / self.run / asset if self.run else None

    def _pointer(self, asset: str, recipe: Recipe) -> Path:
        return self.folder / asset / "recipes" / recipe.digest

    def _write(self, path: Path, text: str) -> None:
        """Write a file of this pipeline: whole or not at all."""
        self._make_room(path.parent)
        if path.is_dir() and not path.is_symlink():
            self._set_aside(path, "a file of the store has to be there")
        partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
        try:
            partial.write_text(text, encoding="utf-8")
            partial.replace(path)
        except BaseException:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            raise


class Claim:
    """The right to train by one recipe from and to the checkpoints that trainings by it leave, which outlive them.

    It is a lease: a file with its owner, machine and process, renewed while it is held. A process that died on this
    machine has lost it at once, one on another machine after LEASE_SECONDS of silence.
    """

    FILE = "claim"

    def __init__(self, store: PipelineStore, asset: str, path: Path) -> None:
        self.store, self.asset, self.path = store, asset, path
        self.folder: Path | None = None  # of the checkpoints, while the claim is held
        self.link: Path | None = None  # through which a training reaches them; it goes when the claim is lost
        self._lease: SoftFileLease | None = None

    def take(self) -> bool:
        """Take the claim, and wait for whoever has it; True where it had to wait, so that the world has changed.

        Where the other one is still at work after the wait, there is no `folder`: train without checkpoints.
        """
        waited = False
        try:
            self.store._make_room(self.path)
            lease = SoftFileLease(
                self.path / self.FILE, lease_duration=LEASE_SECONDS, on_compromise=self._lost, thread_local=False
            )
            try:
                lease.acquire(timeout=0)
            except Timeout:
                waited, seconds = True, LEASE_SECONDS * 1.25
                logger.warning(
                    "%s is trained by the same recipe in %s: waiting at most %.0f s for it, in case it has died",
                    self.asset, _owner(lease), seconds,
                )  # fmt: skip
                lease.acquire(timeout=seconds)
        except Timeout:
            logger.warning(
                "%s is still being trained in %s: this run trains it as well, from the start and without checkpoints; "
                "the first to end is published",
                self.asset, _owner(lease),
            )  # fmt: skip
            return waited
        except (OSError, ValueError) as error:  # filelock's own errors of a foreign claim are ValueErrors
            logger.warning("%s is trained without checkpoints, %s cannot be claimed: %s", self.asset, self.path, error)
            return waited
        self._lease, self.folder = lease, self.path
        return waited

    def remove(self) -> None:
        """Delete the checkpoints, for what they led to stands; those that another process has claimed stay."""
        if self.path.is_dir() and self._lease is None:
            lease = SoftFileLease(self.path / self.FILE, lease_duration=LEASE_SECONDS, thread_local=False)
            try:
                lease.acquire(timeout=0)
            except (Timeout, OSError, ValueError):
                return
            self._lease = lease
        if self._lease is not None and self.path.is_dir():
            self.store.remove_folder(self.path)
        self.release()

    def release(self) -> None:
        self.folder = None
        if self._lease is not None:
            with suppress(OSError):
                self._lease.release()
            self._lease = None

    def _lost(self, compromise: LeaseCompromise) -> None:
        """Called in the thread that renews the claim."""
        logger.warning(
            "the claim on %s is lost (%s): the training of %s goes on without checkpoints",
            self.path, compromise.reason, self.asset,
        )  # fmt: skip
        if self.link is not None:
            with suppress(OSError):
                self.link.unlink(missing_ok=True)


def _owner(lease: SoftFileLease) -> str:
    owner = lease.owner
    return f"process {owner.pid} on {owner.hostname}" if owner is not None else "an unknown process"


def pipelines_in(root: Path) -> Iterator[PipelineStore]:
    """The pipelines that have anything in the store at `root`."""
    if root.is_dir():
        for folder in sorted(root.iterdir()):
            if folder.is_dir() and folder.name != SMOKE_TEST_STORE and not folder.name.startswith("."):
                yield PipelineStore(root, folder.name)


def _is_staged(path: Path) -> bool:
    """Whether this store named it, and nobody else put it among what is being made."""
    return _STAGED.fullmatch(path.name) is not None and path.is_dir() and not path.is_symlink()


def _may_be_alive(staging_name: str) -> bool:
    named = _STAGED.fullmatch(staging_name)
    assert named is not None
    return named["machine"] != platform.node() or psutil.pid_exists(int(named["process"]))


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _noted(path: Path) -> str | None:
    """The version that a file of one line names; None where there is no such file, or it names none."""
    try:
        noted = path.read_text().strip()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, ValueError):
        return None
    return noted if _VERSION.fullmatch(noted) else None


def _last_touched(folder: Path, file: str) -> float:
    """When a folder or one of its files changed last, in seconds since 1970."""
    both = [path for path in (folder, folder / file) if path.exists()]
    return max((path.stat().st_mtime for path in both), default=0.0)


def _content_id(folder: Path, names: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for name in names:
        digest.update(f"{name}\0{sha256_of(folder / name)}\0".encode())
    return digest.hexdigest()[:DIGITS]


def _seal(told: Mapping[str, Any]) -> str:
    """Digest of a manifest's content: it tells a hand's edit, not a forger's."""
    return hashlib.sha256(json.dumps(told, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _title(manifest: Manifest) -> str:
    return f"{manifest.pipeline}/{manifest.asset} version {manifest.version}"
