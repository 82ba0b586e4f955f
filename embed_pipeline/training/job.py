"""A training as one file: everything a trainer needs to know, and nothing about where it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from embed_pipeline.errors import TrainingError
from embed_pipeline.fitting import FittedEmbedderSettings, FittedRerankerSettings, FittedSettings
from embed_pipeline.losses import SourceKind
from embed_pipeline.settings import ExtraSourceSettings, TrainingSettings


class TrainingJob(BaseModel):
    """`base_model` is a local folder whose weights were checked by `models.source.locate`.

    Relative paths are relative to the job file, so a published job still finds what was published with it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    entry_point: ClassVar[str]  # the module that torchrun runs

    settings: FittedSettings
    seed: int
    base_model: Path
    trust_remote_code: bool = False
    source_name: str = Field(description="of the pipeline's own source: the pipeline's name")
    source_kind: SourceKind = "pairs"
    extra_sources: tuple[ExtraSourceSettings, ...] = ()
    cleaned_pairs: Path = Field(description="folder with queries, passages and qrels, or with examples")
    hard_negatives: Path | None = Field(description="folder with the negatives of the train queries; null if not mined")
    output: Path = Field(description="folder to leave everything in; see training.output")
    world_size: int = Field(1, ge=1, description="processes that must take part, over all nodes")

    @field_validator("settings", mode="before")
    @classmethod
    def _of_a_pipeline(cls, given: Any) -> Any:
        """A pipeline's settings in which every number is given are fitted."""
        return given.model_dump() if isinstance(given, TrainingSettings) else given

    def write(self, path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.model_dump_json(indent=2) + "\n")
        return path

    @classmethod
    def read(cls, path: Path) -> Self:
        """Raises TrainingError when the file is not such a job."""
        try:
            job = cls.model_validate_json(path.read_bytes())
        except (OSError, ValidationError) as error:
            raise TrainingError(f"{path} is not a job for {cls.entry_point}: {error}") from error
        paths = {name: value for name, value in job if isinstance(value, Path)}
        return job.model_copy(update={name: path.absolute().parent / value for name, value in paths.items()})


class EmbedderJob(TrainingJob):
    entry_point: ClassVar[str] = "embed_pipeline.training.embedder"
    kind: Literal["embedder"] = "embedder"
    settings: FittedEmbedderSettings
    guides: dict[str, Path] = Field(default_factory=dict, description="folder of a source's guide, by its name")
    teachers: dict[str, Path] = Field(default_factory=dict, description="folder of a source's teacher, by its name")


class RerankerJob(TrainingJob):
    """The negatives and the candidates are those that the fine-tuned embedder retrieves."""

    entry_point: ClassVar[str] = "embed_pipeline.training.reranker"
    kind: Literal["reranker"] = "reranker"
    settings: FittedRerankerSettings
    dev_candidates: Path = Field(description="parquet of tables.CANDIDATES for the dev queries")
