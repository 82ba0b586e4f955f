"""`embed-pipeline`: look at the store and the report without opening a UI."""

from __future__ import annotations

import click
from rich.console import Console

from embed_pipeline.artifacts import ASSETS, Artifact, PipelineStore, pipelines_in, store_root
from embed_pipeline.errors import UserError
from embed_pipeline.training.job import MODEL_FOLDER


class ReadableErrors(click.Group):
    """A UserError is shown as its message, without a traceback."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except UserError as error:
            raise click.ClickException(str(error)) from error


@click.group(cls=ReadableErrors)
def main() -> None:
    """Look at what the pipelines made. The store is EMBED_PIPELINE_STORE, or `store` under DAGSTER_HOME."""


@main.command()
@click.argument("pipeline")
def report(pipeline: str) -> None:
    """Print the current evaluation of PIPELINE as a table."""
    from embed_pipeline.evaluation.report import terminal_table
    from embed_pipeline.evaluation.results import REPORT_FILE

    store = _store(pipeline)
    evaluation = store.current("evaluation")
    Console().print(terminal_table(evaluation.path))
    for asset in ("embedder", "reranker"):
        artifact = store.get(asset, evaluation.input(asset))
        made = artifact.manifest.created_at[:16].replace("T", " ")
        click.echo(f"{asset:<9} {artifact.path / MODEL_FOLDER}")
        if store.was_reused(asset):
            click.echo(
                f"          nothing changed since it was trained ({made} UTC): the last run did not train it again"
            )
    click.echo(f"report    {evaluation.path / REPORT_FILE}")


@main.command()
@click.argument("pipeline", required=False)
def versions(pipeline: str | None) -> None:
    """List every version, oldest first, and what it was made from (* marks the current one)."""
    for store in [_store(pipeline)] if pipeline else pipelines_in(store_root()):
        for asset in ASSETS:
            current = store.current(asset).version if store.has_current(asset) else None
            for artifact in store.versions(asset):
                mark = "*" if artifact.version == current else " "
                made = artifact.manifest.created_at[:16].replace("T", " ")
                click.echo(f"{mark} {_title(artifact):<50} {made} UTC  {_size(artifact.size()):>7}")
                for name, version in artifact.manifest.inputs.items():
                    click.echo(f"      from {name} {version}")


@main.command()
@click.argument("pipeline")
def verify(pipeline: str) -> None:
    """Compare every file of every current version of PIPELINE with its manifest."""
    store = _store(pipeline)
    for asset in ASSETS:
        if store.has_current(asset):
            artifact = store.current(asset)
            artifact.verify()
            click.echo(f"{pipeline}/{asset} {artifact.version}: {len(artifact.manifest.files)} files as published")


@main.command()
@click.argument("pipeline")
@click.option("--yes", is_flag=True, help="Delete; without it, only show what would go.")
def prune(pipeline: str, yes: bool) -> None:
    """Delete versions that nothing current was made from, leftovers of killed runs, and cached embeddings."""
    store = _store(pipeline)
    if making := store.in_the_making():
        raise click.ClickException(
            f"a run is making {', '.join(path.name.split('~')[0] for path in making)} and may need what would go. "
            f"Wait for it; if it died on another machine, delete {making[0]}"
        )
    old = store.prunable()
    for artifact in old:
        click.echo(f"{_verb(yes)} {_title(artifact)} ({_size(artifact.size())})")
        if yes:
            store.remove(artifact)
    for folder in store.abandoned():
        click.echo(f"{_verb(yes)} {folder}")
        if yes:
            store.remove_folder(folder)
    if not yes:
        click.echo("nothing was deleted; add --yes to do it")


def _store(pipeline: str) -> PipelineStore:
    known = [store.pipeline for store in pipelines_in(store_root())]
    if pipeline not in known:
        raise click.ClickException(
            f"no pipeline '{pipeline}' in {store_root()}; there: {', '.join(known) or 'nothing yet'}. "
            "Set DAGSTER_HOME or EMBED_PIPELINE_STORE if yours lie elsewhere"
        )
    return PipelineStore(store_root(), pipeline)


def _verb(really: bool) -> str:
    return "deleted" if really else "would delete"


def _title(artifact: Artifact) -> str:
    return f"{artifact.manifest.pipeline}/{artifact.manifest.asset} {artifact.version}"


def _size(size: float) -> str:
    for unit in ("B", "KB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
