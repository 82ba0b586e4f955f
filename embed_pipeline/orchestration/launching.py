"""A job under Dagster: torchrun, here or elsewhere, its rank 0 speaking through Dagster Pipes."""

from __future__ import annotations

from pathlib import Path

import dagster as dg

from embed_pipeline.launch.job import Job, Site, launch_job
from embed_pipeline.tracking.runs import TrackedRun


def launch_under_dagster(
    context: dg.AssetExecutionContext, job: Job, job_file: Path, tracked: TrackedRun | None, site: Site
) -> None:
    """Run `job` to its end. The forecast, then step metrics, appear as asset observations while it runs.

    Cancelling ends every process.

    Raises TrainingError with the first failing rank's cause.
    """
    with dg.open_pipes_session(
        context=context,
        # Rank 0 may be on another machine: its environment tells it all, and what it says lies in the store.
        context_injector=dg.PipesEnvContextInjector(),
        message_reader=dg.PipesFileMessageReader(str(job_file.with_name("messages.jsonl").absolute())),
    ) as session:
        seen = 0

        def report_progress() -> None:
            nonlocal seen
            messages = session.get_custom_messages()
            for message in messages[seen:]:
                if isinstance(message, dict) and message.get("type") == "metrics":
                    metadata = {"step": message["step"], **message["metrics"]}
                    context.log_event(dg.AssetObservation(context.asset_key, metadata=metadata))
                    shown = ", ".join(f"{name} {value:.4g}" for name, value in message["metrics"].items())
                    context.log.info(f"step {message['step']}: {shown}")
                if isinstance(message, dict) and message.get("type") == "preflight":
                    told = {name: value for name, value in message["told"].items() if value}
                    context.log_event(dg.AssetObservation(context.asset_key, metadata=told))
                    if "preflight" in told:
                        context.log.info(told["preflight"])
                    for warning in told.get("warnings", ()):
                        context.log.warning(warning)
            seen = len(messages)

        launch_job(job, job_file, tracked, site, env=session.get_bootstrap_env_vars(), on_poll=report_progress)
        report_progress()
