"""A job under Dagster: torchrun on this machine, its rank 0 speaking through Dagster Pipes."""

from __future__ import annotations

from pathlib import Path

import dagster as dg

from embed_pipeline.launch.job import Job
from embed_pipeline.launch.training import launch_training
from embed_pipeline.tracking.runs import TrackedRun


def launch_under_dagster(
    context: dg.AssetExecutionContext, job: Job, job_file: Path, tracked: TrackedRun | None
) -> None:
    """Run `job` to its end. Step metrics appear as asset observations while it runs; cancelling ends every process.

    Raises TrainingError with the first failing rank's cause.
    """
    with dg.open_pipes_session(
        context=context,
        context_injector=dg.PipesTempFileContextInjector(),
        message_reader=dg.PipesTempFileMessageReader(),
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
            seen = len(messages)

        launch_training(job, job_file, tracked, env=session.get_bootstrap_env_vars(), on_poll=report_progress)
        report_progress()
