"""Runs that a killed code location left behind: `python -m embed_pipeline.orchestration.abandoned LOCATION`.

A run is a child process of its code location's server, which notices when it dies. When both are killed at once (the
container ran out of memory, the machine lost its power), nobody does: the run stands as started, holds its pool's
slot and keeps every later run waiting until its longest time is over. So the server that takes its place has such runs
marked as failed. What Dagster makes of a failed run (`run_retries`) is Dagster's matter.
"""

from __future__ import annotations

import click
import dagster as dg

from embed_pipeline.tracking.runs import end_runs_of

LOCATION_TAG = "dagster/code_location"
SERVER_TAG = ".dagster/grpc_info"  # set on runs that a code location's server started, not on those of a command line
MESSAGE = "The code location was killed while it worked on this run."


def fail_abandoned_runs(instance: dg.DagsterInstance, location: str, started_before: float) -> list[str]:
    """Mark every unfinished run as failed that the server of `location` had started earlier; returns their ids.

    `started_before` is when the server that runs now was started, in seconds since 1970. Runs that were about to start
    or to be cancelled have time limits of their own in dagster.yaml.
    """
    started = dg.RunsFilter(statuses=[dg.DagsterRunStatus.STARTED], tags={LOCATION_TAG: location})
    abandoned = [
        record.dagster_run
        for record in instance.get_run_records(filters=started)
        if SERVER_TAG in record.dagster_run.tags
        and record.start_time is not None
        and record.start_time < started_before
    ]
    for run in abandoned:
        instance.report_run_failed(run, MESSAGE)
    return [run.run_id for run in abandoned]


@click.command(help=(__doc__ or "").partition(":")[0])
@click.argument("location")
@click.option("--started-before", type=float, required=True, help="Start of the server that runs now (date +%s).")
def main(location: str, started_before: float) -> None:
    with dg.DagsterInstance.get() as instance:
        for run_id in fail_abandoned_runs(instance, location, started_before):
            click.echo(f"run {run_id} was abandoned: marked as failed")
            end_runs_of(run_id)


if __name__ == "__main__":
    main()
