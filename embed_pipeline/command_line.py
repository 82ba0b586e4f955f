"""`embed-pipeline`: look at the store and the report without opening a UI.

Each command imports what it needs: `--help`, completion and a mistyped option answer without reading a library.
"""

from __future__ import annotations

import logging
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from embed_pipeline.errors import UserError
from embed_pipeline.model_files import MODEL_FOLDER

if TYPE_CHECKING:
    from rich.console import RenderableType

    from embed_pipeline.artifacts import Artifact, PipelineStore
    from embed_pipeline.champions import Champion, Promotion
    from embed_pipeline.mining.exchange import Format


class ReadableErrors(click.Group):
    """A UserError is shown as its message, without a traceback."""

    def invoke(self, ctx: click.Context) -> object:
        from embed_pipeline.artifacts import store_root
        from embed_pipeline.disk import plain_disk_errors

        try:
            with plain_disk_errors(store_root()):
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
    from embed_pipeline.evaluation.history import history_of
    from embed_pipeline.evaluation.report import terminal_table, write_report
    from embed_pipeline.evaluation.results import REPORT_FILE

    store = _store(pipeline)
    evaluation = store.current("evaluation")
    evaluation.verify()  # figures that somebody changed are not shown as if they had been measured
    _print(terminal_table(evaluation.path))
    for asset, version in evaluation.manifest.inputs.items():
        if asset == "cleaned_pairs":
            continue
        artifact = store.get(asset, version)
        made = artifact.manifest.created_at[:16].replace("T", " ")
        click.echo(f"{asset:<15} {artifact.path / MODEL_FOLDER}")
        if store.was_reused(asset):
            click.echo(f"{'':<15} nothing changed since it was made ({made} UTC): the last run did not train it again")
    # Drawn again: what became of the candidate, and who served when, is known only after its evaluation.
    click.echo(f"{'report':<15} {write_report(evaluation.path, store.folder / REPORT_FILE, history_of(store))}")


@main.command()
@click.argument("pipeline", required=False)
def versions(pipeline: str | None) -> None:
    """List every version, oldest first.

    Each with what it was made from; * marks the current one.
    """
    from embed_pipeline.artifacts import ASSETS, pipelines_in, store_root
    from embed_pipeline.champions import read_waiting
    from embed_pipeline.disk import readable_size

    for store in [_store(pipeline)] if pipeline else pipelines_in(store_root()):
        for asset in ASSETS:
            current = store.current(asset).version if store.has_current(asset) else None
            for artifact in store.versions(asset):
                mark = "*" if artifact.version == current else " "
                made = artifact.manifest.created_at[:16].replace("T", " ")
                click.echo(f"{mark} {_title(artifact):<50} {made} UTC  {readable_size(artifact.size()):>7}")
                for name, version in artifact.manifest.inputs.items():
                    click.echo(f"      from {name} {version}")
        if (waits := read_waiting(store)) is not None:
            click.echo(f"! {store.pipeline}/champion: {waits.sentence(store.pipeline)}")


@main.command()
@click.argument("pipeline")
def verify(pipeline: str) -> None:
    """Compare current files with their manifests.

    Every file of every current version of PIPELINE is compared.
    """
    from embed_pipeline.artifacts import ASSETS

    store = _store(pipeline)
    for asset in ASSETS:
        if store.has_current(asset):
            artifact = store.current(asset)
            artifact.verify()
            click.echo(f"{pipeline}/{asset} {artifact.version}: {len(artifact.manifest.files)} files as published")


@main.command()
@click.argument("pipeline")
def check(pipeline: str) -> None:
    """Tell whether PIPELINE was made with other libraries.

    Of every current version of PIPELINE it says whether the libraries that are installed made it.
    """
    from embed_pipeline.libraries import COMPUTED, LIBRARIES_OF_MODELS, upgrades_since

    store = _store(pipeline)
    for asset in COMPUTED:
        if store.has_current(asset):
            artifact = store.current(asset)
            upgrades = upgrades_since(artifact)
            told = upgrades or f"made with the installed {', '.join(LIBRARIES_OF_MODELS)}"
            click.echo(f"{_title(artifact)}: {told}")


@main.command("join")
@click.argument("pipelines", nargs=-1)
@click.option("--jobs", type=click.IntRange(min=1), help="Leave after so many; without it, stay for ever.")
def join_jobs(pipelines: tuple[str, ...], jobs: int | None) -> None:
    """Be a node for the jobs of PIPELINES.

    These are the jobs that `launch.kind: nodes` announces; of all pipelines in the store, if none is named.

    Only this user's jobs are done: announcement and job file have to lie in the store, belong to the user that runs
    this, and be writable by nobody else.
    """
    from embed_pipeline.artifacts import store_root
    from embed_pipeline.launch.nodes import NODES_FOLDER, join

    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO)
    store = store_root()
    click.echo(f"waiting for jobs of {', '.join(pipelines) or 'every pipeline'} in {store}", err=True)

    def folders() -> list[Path]:
        named = pipelines or sorted(path.name for path in store.glob("*") if path.is_dir())
        return [store / name / NODES_FOLDER for name in named]

    # Stopped as a service is, it ends what it takes part in; so does Ctrl-C.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    join(store, folders, jobs=jobs)


@main.command()
@click.argument("pipeline")
@click.option("--verify", is_flag=True, help="Load every model in both ways and compare it with the evaluation.")
@click.option("--settle", is_flag=True, help="Move MLflow's aliases to where the store's pointer says, if they differ.")
def champion(pipeline: str, verify: bool, settle: bool) -> None:
    """Show the champion and how to load it.

    Tells what serves for PIPELINE, since when and why. Exit code 1 where anything disagrees.
    """
    from embed_pipeline.champions import models_of, read_history, read_waiting
    from embed_pipeline.tracking import promotion
    from embed_pipeline.tracking.registry import load_lines

    store = _store(pipeline)
    history = read_history(store)
    if settle:
        for sentence in promotion.settle(store):
            click.echo(f"settled: {sentence}")
    if (waits := read_waiting(store)) is not None:
        click.echo(f"waiting: {waits.sentence(pipeline)}", err=True)
    if not history.promotions:
        raise click.ClickException(f"nothing was promoted in {pipeline} yet: materialize {pipeline}/champion")
    last, serving = history.promotions[-1], history.champion
    if serving is None:
        click.echo(f"{pipeline} has no champion since {_minute(last.at)}: {_said(last)}")
    else:
        for model, registered in zip(models_of(store, serving), serving.registered, strict=True):
            click.echo(f"{model.manifest.asset:<15} {model.version}, {registered.name} version {registered.version}")
        click.echo(f"{'since':<15} {_minute(last.at)}, promotion {last.number}: {_said(last)}")
        click.echo(f"{'verdict':<15} {serving.verdict}")
        if (before := history.previous) is not None:
            click.echo(f"{'before':<15} {before.title}")
        for line in _on_the_hub(store, serving):
            click.echo(line)
        click.echo(f"\n{load_lines(store, serving)}\n")
        if verify:
            difference = promotion.check_loads(store, serving)
            click.echo(f"loaded from MLflow and by path: both give what was evaluated, to {difference:.1e}")
    if told := promotion.disagreements(store):
        raise click.ClickException("; ".join([*told, f"`embed-pipeline champion {pipeline} --settle` puts it right"]))
    click.echo("MLflow's aliases stand where the store's pointer says")


@main.command()
@click.argument("pipeline")
def history(pipeline: str) -> None:
    """List promotions, rollbacks and retirements of PIPELINE.

    The oldest comes first.
    """
    from rich.table import Table

    from embed_pipeline.champions import read_history
    from embed_pipeline.evaluation.history import history_of
    from embed_pipeline.evaluation.verdict import METRIC_NAMES

    store = _store(pipeline)
    promotions = read_history(store).promotions
    if not promotions:
        click.echo(f"nothing was promoted in {pipeline} yet: materialize {pipeline}/champion")
        return
    points = {point.version: point for point in history_of(store)}
    table = Table("", "when", "event", "embedder", "reranker", "metric", "by", "reason", box=None)
    for entry in promotions:
        who = entry.champion
        point = points.get(who.evaluation) if who else None
        table.add_row(
            str(entry.number),
            _minute(entry.at),
            entry.event.replace("_", " "),
            who.embedder if who else "nobody",
            (who.reranker if who else None) or "",
            f"{METRIC_NAMES[point.metric]} {point.serving:.3f}" if point else "",
            entry.by,
            entry.reason,
        )
    _print(table)


@main.command()
@click.argument("pipeline")
@click.option("--reason", required=True, help="Kept in the history.")
@click.option("--to", help="Number of a promotion, or a version that served; without it, the champion of before.")
def rollback(pipeline: str, reason: str, to: str | None) -> None:
    """Bring back a former champion of PIPELINE.

    MLflow's aliases and the store's pointer are moved, both or neither.
    """
    from embed_pipeline.tracking.promotion import roll_back

    done = roll_back(_store(pipeline), to=to, reason=reason)
    assert done.champion is not None
    click.echo(f"{done.champion.title}: in service again, {_said(done)}")


@main.command()
@click.argument("pipeline")
@click.option("--reason", required=True, help="Kept in the history.")
def retire(pipeline: str, reason: str) -> None:
    """Take the champion of PIPELINE out of service.

    Nobody takes its place.
    """
    from embed_pipeline.tracking.promotion import retire as take_out

    click.echo(f"{pipeline} has no champion any more: {_said(take_out(_store(pipeline), reason=reason))}")


@main.command()
@click.argument("pipeline")
@click.option("--yes", is_flag=True, help="Delete; without it, only show what would go.")
def prune(pipeline: str, yes: bool) -> None:
    """Delete versions and leftovers that are not in use.

    That is versions that nothing in use was made from, leftovers of runs, and cached embeddings.

    In use are the current versions, the champion, the one that a rollback goes back to, and one that waits for MLflow.
    """
    from embed_pipeline.champions import read_history, read_waiting
    from embed_pipeline.disk import readable_size

    store = _store(pipeline)
    if making := store.in_the_making():
        raise click.ClickException(
            f"a run is making {', '.join(path.name.split('~')[0] for path in making)} and may need what would go. "
            f"Wait for it; if it died on another machine, or the process that {making[0].name} names is none of this "
            f"program's, delete {making[0]}"
        )
    history = read_history(store)
    serving = [champion for champion in (history.champion, history.previous) if champion is not None]
    keep = [version for champion in serving for version in champion.versions]
    if (waits := read_waiting(store)) is not None:
        keep += waits.versions
    old = store.prunable(keep=keep)
    for artifact in old:
        click.echo(f"{_verb(yes)} {_title(artifact)} ({readable_size(artifact.size())})")
        if yes:
            store.remove(artifact)
    for folder in store.abandoned():
        click.echo(f"{_verb(yes)} {folder}")
        if yes:
            store.remove_folder(folder)
    for path in store.foreign():
        click.echo(f"left alone {path}: this program did not write it")
    for path in store.set_aside():
        click.echo(f"left alone {path}: it was damaged or in the way. Delete it when you have seen it")
    if not yes:
        click.echo("nothing was deleted; add --yes to do it")


@main.command("replay-metrics")
@click.argument("pipeline")
def replay_metrics(pipeline: str) -> None:
    """Send MLflow what it was not told while it was away.

    That is what PIPELINE's runs recorded. A candidate that waits for MLflow is promoted.

    Exit code 1 where something still waits. The next run of the pipeline sends by itself, and that of its champion
    promotes; runs that are at work are left alone.
    """
    from embed_pipeline.champions import read_waiting
    from embed_pipeline.masking import without_password
    from embed_pipeline.tracking.delivery import replay
    from embed_pipeline.tracking.journal import waiting
    from embed_pipeline.tracking.server import tracking_uri

    store = _store(pipeline)
    before = waiting(store.folder)
    left = replay(store.folder, seconds=None)
    for one in before:
        if one.journal not in [other.journal for other in left]:
            click.echo(f"sent: {one.sentence.replace('wait in', 'waited in')}")
    if left:
        where = without_password(tracking_uri())
        raise click.ClickException(f"MLflow at {where} was not told: {'; '.join(one.sentence for one in left)}")
    click.echo(f"MLflow has everything of {pipeline}")
    if read_waiting(store) is not None:
        from embed_pipeline.settings import TrackingSettings
        from embed_pipeline.tracking.promotion import promote_waiting
        from embed_pipeline.tracking.runs import tracked_run

        promoted = promote_waiting(store, lambda: tracked_run(TrackingSettings(), store, "champion", None))
        assert promoted is not None
        click.echo(f"{promoted.champion.title}: waited for MLflow, serves now")


@main.command("export-negatives")
@click.argument("pipeline")
@click.option(
    "--format",
    required=True,
    type=click.Choice(["flag-embedding", "triplets", "tuples", "pairs"]),
    help="FlagEmbedding's jsonl, or parquet for sentence-transformers.",
)
@click.option("--output", required=True, type=click.Path(dir_okay=False, path_type=Path), help=".jsonl or .parquet")
@click.option("--source", help="An extra source; without it, the pipeline's own.")
@click.option("--negatives", type=click.IntRange(min=1), help="tuples: so many of each query; by default, the most.")
def export_negatives(pipeline: str, format: Format, output: Path, source: str | None, negatives: int | None) -> None:
    """Write hard negatives for another trainer.

    The current ones of PIPELINE are written, whole or not at all.
    """
    from embed_pipeline.mining.exchange import export_negatives as export
    from embed_pipeline.tables import source_folder

    store = _store(pipeline)
    mined = store.current("hard_negatives")
    if source is not None and source not in mined.report["extra_sources"]:
        known = ", ".join(mined.report["extra_sources"]) or "none"
        raise click.ClickException(f"no extra source '{source}' was mined for {pipeline}; mined: {known}")
    if negatives is not None and format != "tuples":
        raise click.ClickException(f"--negatives belongs to --format tuples, not to {format}")
    cleaned = store.get("cleaned_pairs", mined.input("cleaned_pairs"))
    for artifact in (mined, cleaned):
        artifact.verify()
    done = export(
        source_folder(cleaned.path, source),
        source_folder(mined.path, source),
        format,
        output,
        prompt=mined.manifest.recipe.settings["encoding"]["query_prompt"],
        num_negatives=negatives,
    )
    click.echo(f"{output}: {done.sentence}")


def _store(pipeline: str) -> PipelineStore:
    from embed_pipeline.artifacts import PipelineStore, pipelines_in, store_root

    known = [store.pipeline for store in pipelines_in(store_root())]
    if pipeline not in known:
        raise click.ClickException(
            f"no pipeline '{pipeline}' in {store_root()}; there: {', '.join(known) or 'nothing yet'}. "
            "Set DAGSTER_HOME or EMBED_PIPELINE_STORE if yours lie elsewhere"
        )
    return PipelineStore(store_root(), pipeline)


def _on_the_hub(store: PipelineStore, serving: Champion) -> list[str]:
    """Where the last push lies, and whether it is of who serves."""
    if not store.has_current("hub"):
        return []
    from embed_pipeline.publishing.pushing import PushReport

    last = store.current("hub")
    same = all(last.manifest.inputs.get(asset) == version for asset, version in serving.models)
    old = "" if same else ", an earlier champion: materialize hub"
    pushed = PushReport.model_validate(last.report).pushed
    return [f"{'on the Hub':<15} {kind} {at.url}, {_minute(at.at)}{old}" for kind, at in pushed.items()]


def _print(shown: RenderableType) -> None:
    """Texts that people wrote (reasons, names) are shown as they are: brackets and colons in them mean nothing."""
    from rich.console import Console

    Console(markup=False, emoji=False, highlight=False).print(shown)


def _minute(at: str) -> str:
    return f"{at[:16].replace('T', ' ')} UTC"


def _said(entry: Promotion) -> str:
    reason = "" if entry.event == "promoted" else f", because: {entry.reason}"  # the verdict tells
    return f"{entry.event.replace('_', ' ')} by {entry.by}{reason}"


def _verb(really: bool) -> str:
    return "deleted" if really else "would delete"


def _title(artifact: Artifact) -> str:
    return f"{artifact.manifest.pipeline}/{artifact.manifest.asset} {artifact.version}"
