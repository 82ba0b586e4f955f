"""Encoding, scoring and searching as files: what a rank needs to know to take its share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from embed_pipeline.settings import EncodingSettings, Precision

JOB_FILE = "job.json"
Task = Literal["query", "document", "sentence"]


class InferenceJob(BaseModel):
    """`folder` lies on storage that every rank sees; ranks meet nowhere else. Models are local folders."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    entry_point: ClassVar[str] = "embed_pipeline.models.rank"  # the module that torchrun runs

    folder: Path = Field(description="where results are left")
    world_size: int = Field(ge=1, description="processes that must take part, over all nodes")

    def write(self) -> Path:
        path = self.folder / JOB_FILE
        path.write_text(self.model_dump_json(indent=2) + "\n")
        return path


class BlocksJob(InferenceJob):
    """`blocks` are the numbers of those to compute, of the texts that `blocks.write_texts` left in `folder`."""

    blocks: tuple[int, ...]
    model: Path
    precision: Precision
    trust_remote_code: bool
    batch_size: int


class EncodingJob(BlocksJob):
    kind: Literal["encoding"] = "encoding"
    encoding: EncodingSettings | None = Field(description="laid over what the model's folder says")
    task: Task


class ScoringJob(BlocksJob):
    kind: Literal["scoring"] = "scoring"
    max_length: int | None
    seed: int | None = Field(description="of a head that the model does not bring")


class SearchJob(InferenceJob):
    """Each rank searches all queries in its share of the passages."""

    kind: Literal["search"] = "search"
    queries: Path = Field(description="(n, d) float32 in a .npy file")
    passages: Path = Field(description="(m, d) float32 in a .npy file")
    top_k: int


AnyInferenceJob = Annotated[EncodingJob | ScoringJob | SearchJob, Field(discriminator="kind")]


def read_job(path: Path) -> EncodingJob | ScoringJob | SearchJob:
    adapter: TypeAdapter[EncodingJob | ScoringJob | SearchJob] = TypeAdapter(AnyInferenceJob)
    return adapter.validate_json(path.read_bytes())
