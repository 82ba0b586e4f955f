"""Versions on disk: staged, manifest-checked, published whole or not at all. The only home of a path.

    <home>/store/<pipeline>/<asset>/<version>/...      one published version, with its manifest.json
    <home>/store/<pipeline>/<asset>/recipes/<digest>   which version a recipe made
    <home>/store/<pipeline>/<asset>/current.json       the version that later stages use
    <home>/store/<pipeline>/.staging/                  what is being made
    <home>/store/<pipeline>/.embeddings/               encoded texts, by model and content; can be deleted

A *recipe* is everything that decides the result: input versions, settings, seed, code version. A recipe that was made
before is not made again. The version of a table is the hash of its content, so an input that changed without changing
the table retrains nothing; the version of a model is the hash of its recipe.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
from pydantic import BaseModel, ConfigDict

from embed_pipeline.errors import ArtifactError

ASSETS = ("raw_pairs", "cleaned_pairs", "hard_negatives", "embedder", "reranker", "evaluation")
MANIFEST = "manifest.json"
VERSION_DIGITS = 16
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
    return Path(os.environ.get("DAGSTER_HOME") or "dagster_home").absolute()


def store_root() -> Path:
    """EMBED_PIPELINE_STORE, or `store` in the home folder."""
    given = os.environ.get("EMBED_PIPELINE_STORE")
    return Path(given).absolute() if given else home() / "store"


class Recipe(BaseModel):
    """Everything that decides an artifact's content."""

    model_config = ConfigDict(frozen=True)

    inputs: dict[str, str]  # name -> version or digest; names of assets are followed as lineage
    settings: dict[str, Any]
    seed: int
    code_version: str

    @property
    def digest(self) -> str:
        canonical = json.dumps(self.model_dump(mode="json"), sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(canonical.encode()).hexdigest()[:VERSION_DIGITS]


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
    version: str
    recipe: Recipe
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
    def report(self) -> dict[str, Any]:
        """What the stage said of it: counts, scores, seconds."""
        return self.manifest.report

    def input(self, asset: str) -> str:
        """The version of the upstream `asset` that this one was made from."""
        return self.manifest.recipe.inputs[asset]

    def size(self) -> int:
        """Bytes on disk, manifest excluded."""
        return sum(entry.bytes for entry in self.manifest.files.values())

    def verify(self) -> None:
        """Compare every file with the manifest, byte for byte; raises ArtifactError naming the first that differs."""
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

    def __init__(self, root: Path, pipeline: str) -> None:
        self.folder = root / pipeline
        self.pipeline = pipeline

    @property
    def embeddings_folder(self) -> Path:
        return self.folder / ".embeddings"

    def current(self, asset: str) -> Artifact:
        """The version later stages use; raises ArtifactError when the asset was never materialized."""
        pointer = self.folder / asset / "current.json"
        if not pointer.is_file():
            raise ArtifactError(
                f"{self.pipeline}/{asset} has no version in {self.folder}. Materialize it first: "
                f'dagster asset materialize -m embed_pipeline.definitions --select "{self.pipeline}/{asset}"'
            )
        return self.get(asset, json.loads(pointer.read_text())["version"])

    def has_current(self, asset: str) -> bool:
        return (self.folder / asset / "current.json").is_file()

    def get(self, asset: str, version: str) -> Artifact:
        """One version by its name; raises ArtifactError when it is absent or its manifest cannot be read."""
        path = self.folder / asset / version
        try:
            manifest = Manifest.model_validate_json((path / MANIFEST).read_bytes())
        except FileNotFoundError:
            known = ", ".join(a.version for a in self.versions(asset)) or "none"
            raise ArtifactError(f"{self.pipeline}/{asset} has no version {version}; versions there: {known}") from None
        except ValueError as error:
            raise ArtifactError(f"{path / MANIFEST} cannot be read: {error}. {_MEND}") from error
        return Artifact(path, manifest)

    def versions(self, asset: str) -> list[Artifact]:
        """All published versions of an asset, oldest first."""
        manifests = (self.folder / asset).glob(f"*/{MANIFEST}")
        found = [Artifact(path.parent, Manifest.model_validate_json(path.read_bytes())) for path in manifests]
        return sorted(found, key=lambda artifact: artifact.manifest.created_at)

    def find(self, asset: str, recipe: Recipe) -> Artifact | None:
        """The version that `recipe` made before, if it still stands complete."""
        pointer = self.folder / asset / "recipes" / recipe.digest
        if not pointer.is_file():
            return None
        version = pointer.read_text().strip()
        return self.get(asset, version) if (self.folder / asset / version / MANIFEST).is_file() else None

    def produce(
        self,
        asset: str,
        recipe: Recipe,
        make: Callable[[Path], Made],
        *,
        content: Sequence[str] | None,
    ) -> Produced:
        """Return the version that `recipe` stands for, making it only if it was never made.

        `make` fills the empty folder it is given. `content` lists the files whose bytes are the version (tables); None
        takes the recipe's digest (models). The new version becomes current in one rename; if `make` raises, nothing of
        it stays.
        """
        found = self.find(asset, recipe)
        if found is None:
            staging = self.folder / ".staging" / f"{asset}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
            staging.mkdir(parents=True)
            try:
                made = make(staging)
                version = recipe.digest if content is None else _content_version(staging, content)
                artifact = self._publish(asset, version, recipe, staging, made)
            finally:
                shutil.rmtree(staging, ignore_errors=True)
            self._write(self.folder / asset / "recipes" / recipe.digest, version)
        else:
            artifact = found
        self._write(self.folder / asset / "current.json", json.dumps({"version": artifact.version}))
        return Produced(artifact, reused=found is not None)

    def lineage(self, artifact: Artifact) -> dict[str, set[str]]:
        """asset -> versions that `artifact` was made from, itself included."""
        made_from: dict[str, set[str]] = {artifact.manifest.asset: {artifact.version}}
        for asset, version in artifact.manifest.recipe.inputs.items():
            if asset in ASSETS:
                for name, versions in self.lineage(self.get(asset, version)).items():
                    made_from.setdefault(name, set()).update(versions)
        return made_from

    def prunable(self) -> list[Artifact]:
        """Versions that are not current and that nothing current was made from."""
        kept: dict[str, set[str]] = {}
        for asset in ASSETS:
            if self.has_current(asset):
                for name, versions in self.lineage(self.current(asset)).items():
                    kept.setdefault(name, set()).update(versions)
        return [a for asset in ASSETS for a in self.versions(asset) if a.version not in kept.get(asset, set())]

    def remove(self, artifact: Artifact) -> None:
        """Delete a version."""
        self.remove_folder(artifact.path)

    def remove_folder(self, folder: Path) -> None:
        """Delete a folder of this store; it leaves its place in one rename, so nobody sees half of it."""
        grave = self.folder / ".staging" / f"removed-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        grave.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(grave)
        shutil.rmtree(grave)

    def abandoned(self) -> list[Path]:
        """Staging folders whose process is gone, and all cached embeddings: safe to delete, rebuilt when needed."""
        staged = (self.folder / ".staging").glob("*-*-*") if (self.folder / ".staging").is_dir() else iter(())
        dead = [path for path in staged if not psutil.pid_exists(int(path.name.split("-")[-2]))]
        return dead + ([self.embeddings_folder] if self.embeddings_folder.is_dir() else [])

    def _publish(self, asset: str, version: str, recipe: Recipe, staging: Path, made: Made) -> Artifact:
        files = {
            path.relative_to(staging).as_posix(): FileEntry(bytes=path.stat().st_size, sha256=sha256_of(path))
            for path in sorted(staging.rglob("*"))
            if path.is_file()
        }
        manifest = Manifest(
            pipeline=self.pipeline,
            asset=asset,
            version=version,
            recipe=recipe,
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
            libraries={name: importlib.metadata.version(name) for name in LIBRARIES},
            python=platform.python_version(),
            machine=f"{platform.machine()}, {os.cpu_count()} cores",
            runs=made.runs,
            report=dict(made.report),
            files=files,
        )
        self._write(staging / MANIFEST, manifest.model_dump_json(indent=2))
        path = self.folder / asset / version
        path.parent.mkdir(parents=True, exist_ok=True)
        if not (path / MANIFEST).is_file():
            try:
                staging.rename(path)
            except OSError:
                # Another run published the same version first; anything else is a real error.
                if not (path / MANIFEST).is_file():
                    raise
        return self.get(asset, version)

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
            if folder.is_dir():
                yield PipelineStore(root, folder.name)


def _content_version(folder: Path, names: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for name in names:
        digest.update(f"{name}\0{sha256_of(folder / name)}\0".encode())
    return digest.hexdigest()[:VERSION_DIGITS]


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _title(manifest: Manifest) -> str:
    return f"{manifest.pipeline}/{manifest.asset} version {manifest.version}"
