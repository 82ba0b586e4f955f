"""`evaluation`: before and after, on questions nobody trained on."""

from functools import partial
from typing import TYPE_CHECKING, Any

import dagster as dg

from embed_pipeline.artifacts import Artifact
from embed_pipeline.orchestration.automation import retry_policy
from embed_pipeline.orchestration.launching import launch_under_dagster
from embed_pipeline.orchestration.overrides import Overrides
from embed_pipeline.orchestration.reporting import gate_metadata, markdown_table, materialized, picture, readable_errors
from embed_pipeline.settings import EvaluationSettings
from embed_pipeline.stages import CODE_VERSIONS, Pipeline, make_evaluation, mark_challenger

if TYPE_CHECKING:
    from embed_pipeline.evaluation.results import QueryChange

OVERRIDES = Overrides(EvaluationSettings)


def evaluation_metadata(evaluation: Artifact) -> dict[str, Any]:
    """The verdict, the figures with their intervals, the gains as a picture, and where the report is."""
    from embed_pipeline.evaluation.comparison import Comparison
    from embed_pipeline.evaluation.plots import gains_plot
    from embed_pipeline.evaluation.report import read_report
    from embed_pipeline.evaluation.results import REPORT_FILE

    rows = [Comparison.model_validate(row) for row in evaluation.report["summary"]]
    details = read_report(evaluation.path).details
    changes_header = ["query", "rank before", "rank after", "passage"]
    header = ["system", "metric", "value", "gain over base", "low", "high", "p", "queries"]
    table = [
        (r.system, r.metric, r.value, r.gain, r.interval_low, r.interval_high, r.p_value, r.num_queries) for r in rows
    ]
    figures = {f"{r.system}_{r.metric}": r.value for r in rows if r.metric == "ndcg_at_10"}
    gains = gains_plot([r for r in rows if r.system == "embedder"], "gains")
    return {
        **gate_metadata(details.gate),
        "embedder": details.headline,
        **{f"about_{system}": sentence for system, sentence in evaluation.report["verdicts"].items()},
        **figures,
        "figures": markdown_table(header, table),
        "latency": markdown_table(["system", "milliseconds per query"], sorted(details.milliseconds_per_query.items())),
        "gains": picture(gains, "gain of the embedder over its base, per metric"),
        "queries_that_got_better": markdown_table(changes_header, [_change(c) for c in details.better]),
        "queries_that_got_worse": markdown_table(changes_header, [_change(c) for c in details.worse]),
        # A browser opens no file:// link from a page served over http: the path is for copying, MLflow has it too.
        "report": dg.MetadataValue.path(str(evaluation.path / REPORT_FILE)),
    }


def _change(change: "QueryChange") -> tuple[str, str, str, str]:
    before, after = (str(rank) if rank else "below 100" for rank in (change.rank_before, change.rank_after))
    return change.query, before, after, change.positive


def evaluation_asset(pipeline: Pipeline) -> dg.AssetsDefinition:
    name = pipeline.settings.name
    reranker = [[name, "reranker"]] if pipeline.settings.reranker is not None else []

    @dg.asset(
        key=[name, "evaluation"],
        deps=[[name, "cleaned_pairs"], [name, pipeline.settings.final_embedder], *reranker],
        group_name=name,
        kinds={"parquet", "mlflow"},
        pool="gpu",
        config_schema=OVERRIDES.schema,
        code_version=CODE_VERSIONS["evaluation"],
        retry_policy=retry_policy(pipeline),
        description="Base and fine-tuned models and BM25 on the test split, with intervals of the gains.",
    )
    def evaluation(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        with readable_errors():
            evaluation = OVERRIDES.applied(pipeline.settings.evaluation, context)
            run = pipeline.for_run(context.run_id, evaluation=evaluation)
            produced = make_evaluation(run, partial(launch_under_dagster, context))
            mark_challenger(run)
        return materialized(context, produced, evaluation_metadata(produced.artifact))

    return evaluation
