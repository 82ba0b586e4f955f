"""Versions on disk: staged, manifest-checked, published whole or not at all. The only home of a path.

    <store>/<pipeline>/<asset>/<version>/...      one published version, with its manifest.json
    <store>/<pipeline>/<asset>/recipes/<digest>   which version a recipe made
    <store>/<pipeline>/<asset>/current.json       the version that later stages use
    <store>/<pipeline>/raw_pairs/read.json        the state of the raw files that the current raw rows were read from
    <store>/<pipeline>/.runs/<run>/<asset>        the version that one run made or found, which its later stages use
    <store>/<pipeline>/.staging/                  what is being made
    <store>/<pipeline>/.embeddings/               encoded texts, by model and content; can be deleted

A *recipe* is everything that decides the result: the inputs' content, settings, seed, code version. A recipe that was
made before is not made again. What a stage hands over has a *content* id: for tables the hash of the rows that later
stages read, for models the hash of their recipe. Recipes name inputs by content, so a raw row that changes nothing but
the list of rejected rows retrains nothing; manifests name them by version, so every model leads back to its very rows.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
from pydantic import BaseModel, ConfigDict

from embed_pipeline.errors import ArtifactError, ConfigurationError
from embed_pipeline.masking import without_password

ASSETS = (
    *("raw_pairs", "cleaned_pairs", "hard_negatives", "embedder", "merged_embedder", "reranker", "evaluation"),
    *("exports", "hub"),  # of the champion
)
MANIFEST = "manifest.json"
SMOKE_TEST_STORE = "smoke-test"  # no pipeline can be called so
DIGITS = 16
_YES, _NO = ("1", "true", "yes", "on"), ("", "0", "false", "no", "off")
RUN_GOES_ON = timedelta(hours=1)  # between two stages; while one works, its staging folder tells
RUN_IS_OVER = timedelta(days=7)
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

    def is_whole(self) -> bool:
        """Whether every file is there with its size: a look, not a proof (see `verify`)."""
        paths = {self.path / name: entry.bytes for name, entry in self.manifest.files.items()}
        return all(path.is_file() and path.stat().st_size == size for path, size in paths.items())

    def verify(self) -> None:
        """Compare all files with the manifest, byte for byte; raises ArtifactError naming the first that differs."""
        for name, entry in self.manifest.files.items():
            path = self.path / name
            if not path.is_file():
                raise ArtifactError(f"{path} is missing: the manifest of {_title(self.manifest)} lists it. {_MEND}")
            found = path.stat().st_size
            if found != entry.bytes or sha256_of(path) != entry.sha256:
                raise ArtifactError(
                    f"{path} was changed after {_title(self.manifest)} was published "
                    f"({entry.bytes} bytes, sha256 {entry.sha256[:12]}.. expected; {found} bytes found). {_MEND}"
                )
        known = {self.path / name for name in (*self.manifest.files, MANIFEST)}
        for path in sorted(self.path.rglob("*")):
            if not path.is_dir() and path not in known:
                raise ArtifactError(f"{path} was added after {_title(self.manifest)} was published. {_MEND}")


_MEND = "Delete that version's folder and materialize the asset again; it is rebuilt from the same inputs"


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

    def current(self, asset: str) -> Artifact:
        """The version later stages use: this run's own, else the last one made.

        Raises ArtifactError when the asset was never materialized.
        """
        of_run = self._of_run(asset)
        if of_run is not None and of_run.is_file():
            return self.get(asset, of_run.read_text().strip())
        version, _ = self._read_current(asset)
        if not self.has(asset, version):
            raise ArtifactError(
                f"{self._current_file(asset)} points to version {version}, which is not there. "
                f"Materialize {self.pipeline}/{asset} again; it is found, or made from the same inputs"
            )
        return self.get(asset, version)

    def has_current(self, asset: str) -> bool:
        return self._current_file(asset).is_file()

    def has(self, asset: str, version: str) -> bool:
        return (self.folder / asset / version / MANIFEST).is_file()

    def was_reused(self, asset: str) -> bool:
        """Whether the last materialization of the asset found its version made before."""
        return self._read_current(asset)[1]

    def note_read(self, raw: Artifact, state: str) -> None:
        """Remember the state of the raw files that `raw` was read from, or found to be the content of."""
        self._write(self._read_file, json.dumps({"version": raw.version, "state": state}))

    def state_read(self, raw: Artifact) -> str | None:
        """The state of the raw files when `raw` was read from them last, None when another version was since."""
        try:
            noted = json.loads(self._read_file.read_text())
        except FileNotFoundError:
            return None
        return noted["state"] if noted["version"] == raw.version else None

    def get(self, asset: str, version: str) -> Artifact:
        """One version by its name; raises ArtifactError when it is absent, or its manifest is not as published."""
        path = self.folder / asset / version
        try:
            told = json.loads((path / MANIFEST).read_bytes())
            seal = told.pop("seal", None)
            manifest = Manifest.model_validate(told)
        except FileNotFoundError:
            known = ", ".join(self._versions(asset)) or "none"
            raise ArtifactError(f"{self.pipeline}/{asset} has no version {version}; versions there: {known}") from None
        except (ValueError, AttributeError) as error:
            raise ArtifactError(f"{path / MANIFEST} cannot be read: {error}. {_MEND}") from error
        if (manifest.pipeline, manifest.asset, manifest.version) != (self.pipeline, asset, version):
            raise ArtifactError(
                f"{path} holds {_title(manifest)}, not {self.pipeline}/{asset} version {version}: it was copied there "
                f"from somewhere else. {_MEND}"
            )
        if seal != _seal(told):
            raise ArtifactError(
                f"{path / MANIFEST} was edited after {_title(manifest)} was published, or an "
                f"older embed_pipeline published it. {_MEND}"
            )
        return Artifact(path, manifest)

    def versions(self, asset: str) -> list[Artifact]:
        """All published versions of an asset, oldest first."""
        found = [self.get(asset, version) for version in self._versions(asset)]
        return sorted(found, key=lambda artifact: artifact.manifest.created_at)

    def find(self, asset: str, recipe: Recipe) -> Artifact | None:
        """The version that `recipe` made before, if it still stands complete."""
        pointer = self.folder / asset / "recipes" / recipe.digest
        if not pointer.is_file():
            return None
        version = pointer.read_text().strip()
        if not self.has(asset, version):
            return None
        artifact = self.get(asset, version)
        return artifact if artifact.is_whole() else None

    def produce(
        self,
        asset: str,
        recipe: Recipe,
        inputs: Sequence[Artifact],
        make: Callable[[Path], Made],
        *,
        content: Sequence[str] | None,
    ) -> Produced:
        """Return the version that `recipe` stands for, making it only if it was never made.

        `make` fills the empty folder it is given, after every file of `inputs` was compared with its manifest.
        `content` lists the files that are handed over (tables); None takes the recipe's digest (models). The new
        version becomes current in one rename; if `make` raises, nothing of it stays.
        """
        found = self.find(asset, recipe)
        if found is not None:
            self._make_current(found, reused=True)
            return Produced(found, reused=True)
        for artifact in inputs:
            artifact.verify()
        staging = self._staging(asset)
        staging.mkdir(parents=True)
        try:
            made = make(staging)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        # From here on the work is done: a failure to publish leaves it in the staging folder.
        content_id = recipe.digest if content is None else _content_id(staging, content)
        artifact = self._publish(asset, content_id, recipe, inputs, staging, made)
        self._write(self.folder / asset / "recipes" / recipe.digest, artifact.version)
        self._make_current(artifact, reused=False)
        return Produced(artifact, reused=False)

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
            used += [(path.name, path.read_text().strip()) for path in run.iterdir() if path.name in ASSETS]
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
        """Delete a version."""
        self.remove_folder(artifact.path)

    def remove_folder(self, folder: Path) -> None:
        """Delete a folder of this store; it leaves its place in one rename, so nobody sees half of it."""
        grave = self._staging("removed")
        grave.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(grave)
        shutil.rmtree(grave)

    def checkpoints(self, asset: str, recipe: Recipe) -> Path | None:
        """A folder in which trainings by `recipe` keep what they need to go on after being killed; it outlives them.

        None while another process of this machine trains by the same recipe.
        """
        folder = self._checkpoints(asset, recipe)
        folder.mkdir(parents=True, exist_ok=True)
        claim = folder / "claim"
        machine, _, process = claim.read_text().rpartition("~") if claim.is_file() else ("", "", "")
        if machine == platform.node() and int(process) != os.getpid() and psutil.pid_exists(int(process)):
            return None
        self._write(claim, f"{platform.node()}~{os.getpid()}")
        return folder

    def remove_checkpoints(self, asset: str, recipe: Recipe) -> None:
        """The version that they led to stands."""
        if self._checkpoints(asset, recipe).is_dir():
            self.remove_folder(self._checkpoints(asset, recipe))

    def _checkpoints(self, asset: str, recipe: Recipe) -> Path:
        return self.folder / ".checkpoints" / asset / recipe.digest

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
        old += [path for path in sorted(left) if path.stat().st_mtime < since]
        return [*dead, *old, *([self.embeddings_folder] if self.embeddings_folder.is_dir() else [])]

    def _runs(self, younger_than: timedelta | None = None) -> list[Path]:
        """What runs passed on, a folder each; only those that were written to in so much time, if it is given."""
        folder = self.folder / ".runs"
        found = sorted(folder.iterdir()) if folder.is_dir() else []
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
            return str(told["version"]), bool(told["reused"])
        except FileNotFoundError:
            raise ArtifactError(
                f"{self.pipeline}/{asset} has no version in {self.folder}. Materialize it first: "
                f'dagster asset materialize -m embed_pipeline.definitions --select "{self.pipeline}/{asset}"'
            ) from None
        except (ValueError, KeyError, TypeError) as error:
            raise ArtifactError(
                f"{pointer} cannot be read: {error!r}. Materialize {self.pipeline}/{asset} again; it is written anew"
            ) from error

    def _staged(self) -> list[Path]:
        folder = self.folder / ".staging"
        return sorted(folder.iterdir()) if folder.is_dir() else []

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
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir() and not self.get(asset, manifest.version).is_whole():
            self.remove_folder(path)
        try:
            staging.rename(path)
        except OSError:
            # Another run published the same version first; anything else is a real error.
            if not (path / MANIFEST).is_file():
                raise
            shutil.rmtree(staging)
        return self.get(asset, manifest.version)

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

    @staticmethod
    def _write(path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)


def pipelines_in(root: Path) -> Iterator[PipelineStore]:
    """The pipelines that have anything in the store at `root`."""
    if root.is_dir():
        for folder in sorted(root.iterdir()):
            if folder.is_dir() and folder.name != SMOKE_TEST_STORE:
                yield PipelineStore(root, folder.name)


def _may_be_alive(staging_name: str) -> bool:
    _, machine, process, _ = staging_name.split("~")
    return machine != platform.node() or psutil.pid_exists(int(process))


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
