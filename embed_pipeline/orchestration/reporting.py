"""What an asset tells a person: its version, tables, inline pictures, links; and errors meant to be read."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg

from embed_pipeline.artifacts import Artifact, Produced, store_root
from embed_pipeline.disk import plain_disk_errors
from embed_pipeline.errors import UserError
from embed_pipeline.launch.parent_death import end_with_parent
from embed_pipeline.libraries import upgrades_since
from embed_pipeline.markdown import escaped, table
from embed_pipeline.model_files import MODEL_FOLDER
from embed_pipeline.tracking.journal import told_where, waiting

if TYPE_CHECKING:
    from embed_pipeline.evaluation.gate import GateReport


@contextmanager
def readable_errors() -> Iterator[None]:
    """A UserError becomes the step's failure with its message alone, tried again only where its cause may pass.

    A step that has a process of its own ends with that of its run: when that one is killed, the step would go on for
    nobody, beside the run that takes over.
    """
    end_with_parent()
    try:
        with plain_disk_errors(store_root()):
            yield
    except UserError as error:
        raise dg.Failure(description=str(error), allow_retries=error.passing) from error


def materialized(
    context: dg.AssetExecutionContext, produced: Produced, metadata: Mapping[str, Any]
) -> dg.MaterializeResult:
    """Report a version. Its content is the data version, so automation compares what is handed over, not times."""
    artifact = produced.artifact
    made = f"made {artifact.manifest.created_at}"
    if produced.reused:
        context.log.info(f"unchanged: version {artifact.version} ({made}) is used again, nothing was computed")
    else:
        context.log.info(f"published version {artifact.version} at {artifact.path}")
    upgrades = upgrades_since(artifact)
    if upgrades is not None:
        context.log.warning(
            f"version {artifact.version} was {upgrades}. It is used as it is; `retrain_after_library_upgrade` would "
            "make it anew"
        )
    links = {"mlflow": dg.MetadataValue.url(link)} if (link := artifact.manifest.runs.mlflow_link) else {}
    return dg.MaterializeResult(
        data_version=dg.DataVersion(artifact.content),
        metadata={
            **metadata,
            **links,
            **waiting_metadata(context, artifact.path.parents[1], artifact.manifest.asset),
            **({"library_upgrades": upgrades} if upgrades else {}),
            "version": artifact.version,
            "reused": produced.reused,
            "folder": dg.MetadataValue.path(str(artifact.path)),
        },
    )


def waiting_metadata(context: dg.AssetExecutionContext, store: Path, asset: str) -> dict[str, str]:
    """What MLflow was not told of the runs of `asset`, if anything: for the materialization, and a warning."""
    left = waiting(store, asset)
    if not left:
        return {}
    told = told_where(left, store.name)
    context.log.warning(f"MLflow was not told everything: {told}")
    return {"mlflow_waiting": told}


def training_metadata(model: Artifact) -> dict[str, Any]:
    """What a training has to show: its figures, its curve, and how to load what it made."""
    from embed_pipeline.training.plot import training_curve

    curve = picture(training_curve(model.path), "loss and the dev figure over steps")
    card = (model.path / MODEL_FOLDER / "README.md").read_text()
    figures: dict[str, Any] = {
        name: value for name, value in model.report.items() if isinstance(value, int | float | str)
    }
    figures |= {f"truncated_{kind}": share for kind, share in model.report.get("truncated", {}).items()}
    if warnings := model.report.get("warnings"):
        figures["warnings"] = dg.MetadataValue.md("\n".join(f"- {escaped(warning)}" for warning in warnings))
    return {**figures, "curve": curve, "card": dg.MetadataValue.md(card.partition("---\n")[2].partition("---\n")[2])}


def gate_metadata(gate: GateReport) -> dict[str, Any]:
    """The verdict in one sentence, then every demand with what was found."""
    from embed_pipeline.evaluation.verdict import METRIC_NAMES, SYSTEM_NAMES

    demands = [
        (
            "met" if judged.met else "NOT MET",
            f"{SYSTEM_NAMES[judged.found.system]} {judged.demand} than {SYSTEM_NAMES[judged.against].lower()}",
            METRIC_NAMES[judged.found.metric],
            judged.found.baseline_value,
            judged.found.value,
            judged.found.gain,
            f"{judged.found.interval_low:+.4f} to {judged.found.interval_high:+.4f}",
            judged.found.p_value,
            judged.found.num_queries,
            f"{'gain' if judged.demand == 'better' else 'loss'} {judged.allowed:g}",
        )
        for judged in gate.judgements
    ]
    header = ["", "demand", "metric", "before", "after", "gain", "interval", "p", "queries", "limit"]
    guards = [("held" if guard.passed else "LOST", guard.sentence) for guard in gate.guards]
    return {
        "verdict": gate.sentence,
        **({"reasons": markdown_table(["why not"], [(reason,) for reason in gate.reasons])} if gate.reasons else {}),
        "demands": markdown_table(header, demands),
        **({"guard_sets": markdown_table(["", "guard set"], guards)} if guards else {}),
    }


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> dg.MarkdownMetadataValue:
    """A table in the UI, whatever a user's texts hold; long ones are cut."""
    return dg.MetadataValue.md(table(header, rows, longest=300))


def picture(svg: str, title: str) -> dg.MarkdownMetadataValue:
    """An SVG inline in the UI (Dagster strips <img> tags but shows data URIs)."""
    encoded = base64.b64encode(svg.encode()).decode()
    return dg.MetadataValue.md(f"![{title}](data:image/svg+xml;base64,{encoded})")
