"""MLflow's model registry: embedder and reranker as versions of `<pipeline>-embedder` and `<pipeline>-reranker`.

A pipeline without a reranker has the first of the two names alone.

A version is registered once, with its signature, an input example, the exact packages it was evaluated with, the
figures of its evaluation, and tags that lead back to the store. Aliases say what it is: `champion` serves, `previous`
is what a rollback goes back to, `challenger` is the last candidate that did not pass.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from embed_pipeline.artifacts import Artifact, PipelineStore, sha256_of
from embed_pipeline.champions import Champion, RegisteredModel, models_of, pointer
from embed_pipeline.errors import ModelError, TrackingError
from embed_pipeline.evaluation.parity import Parity, read_parity
from embed_pipeline.masking import without_password
from embed_pipeline.model_files import JOB_FILE, MODEL_FOLDER, SERVING_FILE
from embed_pipeline.models.source import weights_digest
from embed_pipeline.settings import ModelSource
from embed_pipeline.tracking.delivery import DAGSTER_RUN_TAG
from embed_pipeline.tracking.metrics import valid_name
from embed_pipeline.tracking.runs import TrackedRun
from embed_pipeline.tracking.server import fail_in_seconds, tracking_uri, ui_address

if TYPE_CHECKING:
    from mlflow.models import Model
    from sentence_transformers import SentenceTransformer

logger = logging.getLogger(__name__)

CHAMPION, PREVIOUS, CHALLENGER = "champion", "previous", "challenger"
Kind = Literal["embedder", "reranker"]
Aliases = Mapping[tuple[str, str], str | None]
"""(registered model, alias) -> the version it stands at, None: nowhere."""

# What a machine needs to load the models, in the versions that they were evaluated with.
PACKAGES = ("mlflow", "numpy", "pandas", "sentence-transformers", "torch", "transformers")
TAG = "embed_pipeline."
_FILES_TAG = f"{TAG}files"  # of a version: the digest of its files


@dataclass(frozen=True)
class Candidate:
    """An embedder, the reranker that serves with it if there is one, and the evaluation that judged them."""

    embedder: Artifact
    reranker: Artifact | None
    evaluation: Artifact

    @property
    def models(self) -> tuple[tuple[Kind, Artifact], ...]:
        """The embedder first."""
        embedder: tuple[Kind, Artifact] = ("embedder", self.embedder)
        return (embedder,) if self.reranker is None else (embedder, ("reranker", self.reranker))

    @property
    def title(self) -> str:
        """For sentences: embedder 0123, reranker 4567"""
        return ", ".join(f"{kind} {model.version}" for kind, model in self.models)

    def verify(self) -> None:
        """Compare every file with its manifest; raises ArtifactError naming the first that differs."""
        for artifact in (*(model for _, model in self.models), self.evaluation):
            artifact.verify()


def registered_name(pipeline: str, kind: Kind, *, smoke_test: bool) -> str:
    """A smoke test registers under names of its own: what it made must not serve anybody."""
    return f"{pipeline}-{kind}{'-smoke-test' if smoke_test else ''}"


def link_to(model: RegisteredModel) -> str:
    """Where a person sees this version."""
    return f"{ui_address().rstrip('/')}/#/models/{model.name}/versions/{model.version}"


class Registry:
    """The registry that MLFLOW_TRACKING_URI leads to. Every method raises TrackingError when it does not answer."""

    def __init__(self) -> None:
        with _answering():
            import mlflow

            fail_in_seconds()
            self._client: Any = mlflow.MlflowClient(tracking_uri())

    def find(self, name: str, model: Artifact) -> RegisteredModel | None:
        """The version of `name` that holds exactly these weights, if there is one."""
        wanted = {"version": model.version, "weights": weights_digest(model.path / MODEL_FOLDER)}
        tags = " and ".join(f"tags.`{TAG}{key}` = '{value}'" for key, value in wanted.items())
        with _answering():
            found = self._client.search_model_versions(f"name = '{name}' and {tags}")
        found = [version for version in found if _FILES_TAG in version.tags]  # else it could not be checked
        newest = max(found, key=lambda version: int(version.version), default=None)
        return None if newest is None else RegisteredModel(name=name, version=str(newest.version))

    def register(
        self, store: PipelineStore, candidate: Candidate, kind: Kind, name: str, tracked: TrackedRun
    ) -> RegisteredModel:
        """A new version of `name`, logged in the run `tracked`: the candidate's embedder or reranker."""
        model = dict(candidate.models)[kind]
        parity = read_parity(candidate.evaluation.path)
        save = _save_embedder if kind == "embedder" else _save_reranker
        tags = _lineage(store, candidate, model)
        with _answering(), tempfile.TemporaryDirectory() as folder:
            from mlflow.entities import LoggedModelOutput, LoggedModelStatus
            from mlflow.models import Model

            client = self._client
            logged = client.create_logged_model(tracked.experiment_id, name, tracked.run_id, tags, model_type=kind)
            described = Model(
                artifact_path=logged.artifact_location,
                run_id=tracked.run_id,
                model_uuid=logged.model_id,
                model_id=logged.model_id,
            )
            saved = Path(folder) / name
            save(model, saved, parity, described, trusted=trusts_code(store, model))
            tags[_FILES_TAG] = _files_digest(saved)
            client.log_model_artifacts(logged.model_id, str(saved))
            client.finalize_logged_model(logged.model_id, LoggedModelStatus.READY)
            client.log_outputs(tracked.run_id, [LoggedModelOutput(logged.model_id, step=0)])
            self._log_figures(tracked, logged.model_id, candidate.evaluation, kind)
            self._create_name(name)
            version = client.create_model_version(
                name,
                f"models:/{logged.model_id}",
                tracked.run_id,
                tags,
                description=candidate.evaluation.report["gate"]["sentence"],
                model_id=logged.model_id,
            )
            registered = RegisteredModel(name=name, version=str(version.version))
            # As `mlflow.register_model` does: the logged model's page then names its versions.
            client.set_logged_model_tags(logged.model_id, {"mlflow.modelVersions": f"[{registered.model_dump_json()}]"})
        logger.info("registered %s as %s", model.version, registered.uri)
        return registered

    def check(self, embedder: RegisteredModel, reranker: RegisteredModel | None, parity: Parity) -> float:
        """Load them as a user would and compare what they give with what was evaluated: the largest difference.

        A model brings Python code with it, so its files are compared with what was registered first.

        Raises ModelError when one is not what was registered, cannot be loaded or differs by more than the tolerance.
        """
        with tempfile.TemporaryDirectory() as folder:
            model = _loading(embedder, lambda: self._load_embedder(self._download(embedder, folder)))
            largest = parity.check_embedder(model, f"{embedder.uri} as MLflow loads it")
        if reranker is None:
            return largest
        with tempfile.TemporaryDirectory() as folder:
            score = _loading(reranker, lambda: self._load_reranker(self._download(reranker, folder)))
            return max(largest, parity.check_reranker(score, f"{reranker.uri} as MLflow loads it"))

    def aliases(self, names: Sequence[str]) -> Aliases:
        """Where `champion`, `previous` and `challenger` of the models `names` stand."""
        with _answering():
            found = {model.name: model.aliases for name in names for model in self._models(name)}
        return {
            (name, alias): str(version) if (version := found.get(name, {}).get(alias)) is not None else None
            for name in names
            for alias in (CHAMPION, PREVIOUS, CHALLENGER)
        }

    def move(self, wanted: Aliases) -> None:
        """Make every alias in `wanted` stand where it says; those that do already are left alone."""
        now = self.aliases(sorted({name for name, _ in wanted}))
        with _answering():
            for (name, alias), version in wanted.items():
                if now[name, alias] == version:
                    continue
                if version is None:
                    self._client.delete_registered_model_alias(name, alias)
                else:
                    self._client.set_registered_model_alias(name, alias, version)

    def holds(self, champion: Champion) -> bool:
        """Whether all of its versions are still there, and are its models: a new database counts from 1 again."""
        for model, (_, version) in zip(champion.registered, champion.models, strict=True):
            with _answering():
                found = self._client.search_model_versions(
                    f"name = '{model.name}' and tags.`{TAG}version` = '{version}'"
                )
            if model.version not in {str(one.version) for one in found}:
                return False
        return True

    def _models(self, name: str) -> list[Any]:
        return list(self._client.search_registered_models(f"name = '{name}'"))

    def _create_name(self, name: str) -> None:
        if not self._models(name):
            self._client.create_registered_model(name)

    def _log_figures(self, tracked: TrackedRun, model_id: str, evaluation: Artifact, kind: Kind) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        figures = {
            f"{kind}/{row['metric']}{suffix}": row[key]
            for row in evaluation.report["summary"]
            if row["system"] == kind
            for key, suffix in (("value", ""), ("gain", "_gain_over_base"))
        }
        metrics = [Metric(valid_name(name), value, now, 0, model_id=model_id) for name, value in figures.items()]
        self._client.log_batch(tracked.run_id, metrics=metrics)

    def _download(self, model: RegisteredModel, folder: str) -> str:
        """Its files as they were registered; raises ModelError where they are others."""
        import mlflow

        registered = self._client.get_model_version(model.name, model.version).tags.get(_FILES_TAG)
        files: str = mlflow.artifacts.download_artifacts(artifact_uri=model.uri, dst_path=folder)
        if _files_digest(Path(files)) != registered:
            raise ModelError("its files are not those that were registered, so none of them was loaded")
        return files

    @staticmethod
    def _load_embedder(folder: str) -> SentenceTransformer:
        import mlflow.sentence_transformers

        return mlflow.sentence_transformers.load_model(folder)

    @staticmethod
    def _load_reranker(folder: str) -> Callable[[Sequence[tuple[str, str]]], Any]:
        import mlflow.pyfunc
        import pandas as pd

        model = mlflow.pyfunc.load_model(folder)
        return lambda pairs: model.predict(pd.DataFrame(pairs, columns=["query", "passage"]), params={"batch_size": 1})


def _files_digest(folder: Path) -> str:
    """SHA-256 over the names and contents of a model's files, but for the note that a download adds."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != "registered_model_meta":
            digest.update(f"{path.relative_to(folder).as_posix()}\0{sha256_of(path)}\0".encode())
    return digest.hexdigest()


def load_lines(store: PipelineStore, champion: Champion) -> str:
    """Python that loads the champion, from the registry and by path; each model is one line."""
    names = [model.name for model in champion.registered]
    trusted = [", trust_remote_code=True" if trusts_code(store, model) else "" for model in models_of(store, champion)]
    lines = [
        f"import mlflow  # with MLFLOW_TRACKING_URI={without_password(tracking_uri())}",
        f'embedder = mlflow.sentence_transformers.load_model("models:/{names[0]}@{CHAMPION}")',
        *(f'reranker = mlflow.pyfunc.load_model("models:/{name}@{CHAMPION}")' for name in names[1:]),
        "",
        f"from sentence_transformers import {'CrossEncoder, ' if names[1:] else ''}SentenceTransformer",
        f'embedder = SentenceTransformer("{pointer(store) / "embedder"}"{trusted[0]})',
        *(f'reranker = CrossEncoder("{pointer(store) / "reranker"}"{trust})' for trust in trusted[1:]),
    ]
    return "\n".join(lines)


@contextmanager
def _answering() -> Iterator[None]:
    """What goes wrong between here and MLflow is told as a TrackingError that may pass.

    MLflow looks some things up at the address in the environment, whatever address its client was given.
    """
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    before = {name: os.environ.get(name) for name in ("MLFLOW_TRACKING_URI", "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR")}
    os.environ["MLFLOW_TRACKING_URI"] = tracking_uri()
    os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"
    try:
        yield
    except (MlflowException, SQLAlchemyError, OSError) as error:
        told = without_password(f"MLflow at {tracking_uri()} does not do as it is asked: {error}")
        raise TrackingError(told, passing=True) from error
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _loading(model: RegisteredModel, load: Callable[[], Any]) -> Any:
    try:
        with _answering():
            return load()
    except TrackingError:
        raise
    except Exception as error:  # anything that a broken model may raise
        raise ModelError(
            f"{model.uri} is registered, but does not load: {error}. Delete this version in MLflow and materialize "
            "champion again, which registers it anew from the store"
        ) from error


# ------------------------------------------------------------------------------------------- what is saved


def _save_embedder(model: Artifact, path: Path, parity: Parity, described: Model, *, trusted: bool) -> None:
    """In MLflow's own flavour. Its pyfunc encodes questions; `params` tell it to encode passages."""
    import mlflow.sentence_transformers
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema, TensorSpec

    from embed_pipeline.models.embedder import load_sentence_transformer

    folder = model.path / MODEL_FOLDER
    loaded = load_sentence_transformer(folder, device="cpu", trust_remote_code=trusted)
    dimension = len(parity.query_embeddings[0])
    task = [ParamSpec(name, "string", "query") for name in ("prompt_name", "task")]
    signature = ModelSignature(
        inputs=Schema([ColSpec("string")]),
        outputs=Schema([TensorSpec(np.dtype("float32"), (-1, dimension))]),
        params=ParamSchema(task),
    )
    mlflow.sentence_transformers.save_model(
        loaded,
        str(path),
        mlflow_model=described,
        signature=signature,
        input_example=parity.queries[:2],
        pip_requirements=_requirements(),
        create_model_card=False,
    )
    data = path / mlflow.sentence_transformers.SENTENCE_TRANSFORMERS_DATA_PATH
    shutil.copy2(folder / "README.md", data)
    if not trusted:
        _name_no_code(data)


def _save_reranker(model: Artifact, path: Path, parity: Parity, described: Model, *, trusted: bool) -> None:
    """As a pyfunc whose code is one file that travels with the model; see `served_reranker`."""
    import mlflow.pyfunc
    import numpy as np
    import pandas as pd
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema, TensorSpec

    signature = ModelSignature(
        inputs=Schema([ColSpec("string", "query"), ColSpec("string", "passage")]),
        outputs=Schema([TensorSpec(np.dtype("float32"), (-1,))]),
        params=ParamSchema([ParamSpec("batch_size", "integer", 32)]),
    )
    mlflow.pyfunc.save_model(
        str(path),
        python_model=str(Path(__file__).with_name("served_reranker.py")),
        artifacts={"model": str(model.path / MODEL_FOLDER)},
        model_config={"trust_remote_code": trusted},
        mlflow_model=described,
        signature=signature,
        input_example=pd.DataFrame(parity.pairs[:2], columns=["query", "passage"]),
        pip_requirements=_requirements(),
        # The share of the embedder's score in the final ranking; see `models.blend`.
        metadata=json.loads((model.path / SERVING_FILE).read_text()),
    )


def _requirements() -> list[str]:
    """With exact versions; a build such as +cpu belongs to a machine, not to a model."""
    return [f"{name}=={importlib.metadata.version(name).partition('+')[0]}" for name in PACKAGES]


def _name_no_code(folder: Path) -> None:
    """MLflow loads with `trust_remote_code`: a model trained without its authors' code must not name any."""
    for path in folder.rglob("*.json"):
        content = json.loads(path.read_text())
        if isinstance(content, dict) and content.pop("auto_map", None) is not None:
            path.write_text(json.dumps(content, indent=2) + "\n")


# ------------------------------------------------------------------------------------------------ lineage


def trusts_code(store: PipelineStore, model: Artifact) -> bool:
    """Whether Python code that comes with the model may run: it was trained so."""
    return bool(_job(store, model)["trust_remote_code"])


def _lineage(store: PipelineStore, candidate: Candidate, model: Artifact) -> dict[str, str]:
    tags = {
        "pipeline": store.pipeline,
        "asset": model.manifest.asset,
        "version": model.version,
        "content": model.content,
        "weights": weights_digest(model.path / MODEL_FOLDER),
        "cleaned_pairs": candidate.evaluation.input("cleaned_pairs"),
        "evaluation": candidate.evaluation.version,
        "base_model": _title(_job(store, model)["settings"]["base_model"]),
        "training_run": model.manifest.runs.mlflow,
    }
    named = {f"{TAG}{key}": value for key, value in tags.items() if value is not None}
    dagster_run = model.manifest.runs.dagster
    return named if dagster_run is None else {**named, DAGSTER_RUN_TAG: dagster_run}


def _job(store: PipelineStore, model: Artifact) -> dict[str, Any]:
    """The training job that made the weights; a merged embedder's are those of the embedder it was merged from."""
    if model.manifest.asset == "merged_embedder":
        model = store.get("embedder", model.input("embedder"))
    job: dict[str, Any] = json.loads((model.path / JOB_FILE).read_text())
    return job


def _title(base_model: Mapping[str, Any] | str) -> str:
    if isinstance(base_model, str):
        return base_model
    source = ModelSource.model_validate(base_model)
    if source.hub is not None:
        return f"{source.hub}@{source.revision}"
    return f"{source.package}:{source.folder}" if source.package else str(source.path)
