"""What an asset tells a person: its version, tables, inline pictures, links; and errors meant to be read."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import dagster as dg

from embed_pipeline.artifacts import Produced
from embed_pipeline.errors import UserError


@contextmanager
def readable_errors() -> Iterator[None]:
    """A UserError becomes the step's failure with its message alone; retrying would not mend it."""
    try:
        yield
    except UserError as error:
        raise dg.Failure(description=str(error), allow_retries=False) from error


def materialized(
    context: dg.AssetExecutionContext, produced: Produced, metadata: Mapping[str, Any]
) -> dg.MaterializeResult:
    """Report a version; the data version is the artifact's, so automation compares content and not times."""
    artifact = produced.artifact
    made = f"made {artifact.manifest.created_at}"
    if produced.reused:
        context.log.info(f"unchanged: version {artifact.version} ({made}) is used again, nothing was computed")
    else:
        context.log.info(f"published version {artifact.version} at {artifact.path}")
    links = {"mlflow": dg.MetadataValue.url(link)} if (link := artifact.manifest.runs.mlflow_link) else {}
    return dg.MaterializeResult(
        data_version=dg.DataVersion(artifact.version),
        metadata={
            **metadata,
            **links,
            "version": artifact.version,
            "reused": produced.reused,
            "folder": dg.MetadataValue.path(str(artifact.path)),
        },
    )


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> dg.MarkdownMetadataValue:
    """A table in the UI; cells are escaped so that a user's text cannot break it."""
    lines = [list(header), ["---"] * len(header), *rows]
    return dg.MetadataValue.md("\n".join("| " + " | ".join(_cell(c) for c in line) + " |" for line in lines))


def picture(svg: str, title: str) -> dg.MarkdownMetadataValue:
    """An SVG inline in the UI (Dagster strips <img> tags but shows data URIs)."""
    encoded = base64.b64encode(svg.encode()).decode()
    return dg.MetadataValue.md(f"![{title}](data:image/svg+xml;base64,{encoded})")


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    text = str(value).replace("|", "\\|").replace("\n", " ")
    return text if len(text) <= 300 else text[:299] + "…"
