"""`champion`: what serves, in MLflow's registry and in the store."""

from collections.abc import Mapping
from hashlib import sha256
from typing import Any

import dagster as dg

from embed_pipeline.artifacts import DIGITS, PipelineStore
from embed_pipeline.champions import Promotion, pointer, read_waiting
from embed_pipeline.errors import TrackingError
from embed_pipeline.markdown import fenced
from embed_pipeline.orchestration.automation import retry_policy
from embed_pipeline.orchestration.reporting import readable_errors, waiting_metadata
from embed_pipeline.stages import CODE_VERSIONS, Pipeline, make_champion, write_champion_cards


def champion_data_version(promotion: Promotion) -> dg.DataVersion:
    """One for every pair of models, and one for nobody."""
    key = promotion.champion.key if promotion.champion else "nobody"
    return dg.DataVersion(sha256(key.encode()).hexdigest()[:DIGITS])


def champion_metadata(store: PipelineStore, promotion: Promotion) -> Mapping[str, Any]:
    """Who serves, since when and why, whom it replaced, and the lines that load it."""
    from embed_pipeline.tracking.registry import link_to, load_lines

    replaced, champion = promotion.replaced, promotion.champion
    about_promotion = {
        "event": promotion.event,
        "promotion": promotion.number,
        "since": promotion.at,
        "by": promotion.by,
        "reason": promotion.reason,
        "replaced": replaced.title if replaced else "nobody",
    }
    if champion is None:
        return about_promotion
    registered = {
        kind: dg.MetadataValue.url(link_to(model))
        for kind, model in zip(("registered_embedder", "registered_reranker"), champion.registered, strict=False)
    }
    return {
        "verdict": champion.verdict,
        **about_promotion,
        "embedder": champion.embedder,
        **({"reranker": champion.reranker} if champion.reranker else {}),
        **registered,
        "load": dg.MetadataValue.md(fenced(load_lines(store, champion), "python")),
        "pointer": dg.MetadataValue.path(str(pointer(store))),
    }


def champion_asset(pipeline: Pipeline) -> dg.AssetsDefinition:
    name = pipeline.settings.name

    @dg.asset(
        key=[name, "champion"],
        deps=[[name, "evaluation"]],
        group_name=name,
        kinds={"mlflow"},
        pool="gpu",
        code_version=CODE_VERSIONS["champion"],
        retry_policy=retry_policy(pipeline),
        description="What serves: registered, checked as loaded, alias and pointer moved. Only behind a passed gate.",
    )
    def champion(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        with readable_errors():
            run = pipeline.for_run(context.run_id)
            try:
                promoted = make_champion(run)
            except TrackingError:
                if (waits := read_waiting(run.store)) is not None:
                    status = {"status": "waits for MLflow", "waiting": waits.sentence(name), "since": waits.since}
                    # What a step has logged as an event goes when it fails.
                    observed = dg.AssetObservation([name, "champion"], metadata=status)
                    context.instance.report_runless_asset_event(observed)
                raise
            cards = write_champion_cards(run)
        told = "is the new champion" if promoted.new else "serves already, nothing was moved"
        context.log.info(f"{promoted.champion.title} {told}")
        return dg.MaterializeResult(
            data_version=champion_data_version(promoted.promotion),
            metadata={
                **champion_metadata(run.store, promoted.promotion),
                **{f"{kind}_card": dg.MetadataValue.path(str(path)) for kind, path in cards.items()},
                **waiting_metadata(context, run.store.folder, "champion"),
                "status": "serves",
                "reused": not promoted.new,
            },
        )

    return champion
